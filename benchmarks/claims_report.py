"""What the raw rows of benchmarks/claims.py say: tables, figures, and the table in the README.

§1 raw rows · §2 means, errors and verdicts · §3 a claim's page · §4 its figure · §5 the README

A raw file is an arm with a seed, results/claims/NAME/ARM-SEED.jsonl.gz, in lines of three kinds:
the first is about the arm (commands, what its training took, eval.py's metrics); a line a training
step, thinned; a line a held-out scene, {"greedy": [score], "sampled": [8 scores], "said": greedy
answer}, in their order. A score is rewards.correct: the answer alone, no points for form. Worked
examples are the tests.
"""
import gzip
import json
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from claims_table import Claim, Contrast

SPENT = ("step", "prompts", "rollouts", "tokens")  # what training took, whatever the machine
KEPT = ("step", "reward", "reward_std", "zero_variance", "length", "truncated", "entropy", "loss",
        "grad_norm", "tokens", "before/greedy", "before/sampled", "eval/greedy", "eval/sampled",
        "seconds/total")
STEP_LINES = 200  # about so many are kept of a run's, and all that were evaluated
MARKS = "<!-- claims -->", "<!-- /claims -->"
NOTHING = "Nothing has been measured yet."  # between the marks while there are no raw rows


# §1 ─────────────────────────────────────── raw rows ─────────────────────────────────────────────
@dataclass(frozen=True)
class Result:
    """An arm with a seed: what it is about, its training steps, its scores a held-out scene."""
    about: dict
    steps: list[dict]
    greedy: list[list[float]]
    sampled: list[list[float]]
    said: list[str] = field(default_factory=list)  # the greedy answers; [] in older files


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, about: dict, steps: list[dict], greedy: list, sampled: list, said=()) -> None:
    """One rename makes the file appear: it is whole or not there. The same rows, the same bytes."""
    lines = [about]
    every = max(1, len(steps) // STEP_LINES)
    for row in steps:
        if row["step"] % every == 0 or "eval/greedy" in row:
            lines.append({name: short(row[name]) for name in KEPT if name in row})
    for number, scores in enumerate(greedy):
        scene = {"greedy": [short(score) for score in scores]}
        if sampled:
            scene["sampled"] = [short(score) for score in sampled[number]]
        if said:
            scene["said"] = said[number]
        lines.append(scene)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(gzip.compress(text.encode(), mtime=0))
    partial.rename(path)


def short(value):
    """A number to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value


def read(path: Path) -> Result:
    about, *rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    steps = [row for row in rows if "step" in row]
    scenes = [row for row in rows if "greedy" in row]
    greedy = [scene["greedy"] for scene in scenes]
    sampled = [scene["sampled"] for scene in scenes if "sampled" in scene]
    said = [scene["said"] for scene in scenes if "said" in scene]
    return Result(about, steps, greedy, sampled, said)


def read_claim(claim: Claim, folder: Path) -> dict[str, dict[int, Result]]:
    """{arm's name: {seed: Result}} of what is finished."""
    return {arm.name: read_seeds(folder, arm.slug) for arm in claim.arms}


def read_seeds(folder: Path, slug: str) -> dict[int, Result]:
    """{seed: Result} of an arm."""
    found = {}
    for file in folder.glob(f"{slug}-*.jsonl.gz"):
        seed = file.name.removeprefix(f"{slug}-").removesuffix(".jsonl.gz")
        if seed.isdigit():  # else another arm, whose name is longer
            found[int(seed)] = read(file)
    return found


# §2 ──────────────────────────── means, errors and verdicts ──────────────────────────────────────
@dataclass(frozen=True)
class Estimate:
    mean: float
    error: float | None  # one standard error, over seeds where there are several; None: not known
    seeds: int
    scene_error: float | None = None  # that over held-out scenes; None: not known

    @property
    def larger_error(self) -> float | None:
        """Seeds that came out close by chance do not make a mean surer than its scenes do."""
        known = [error for error in (self.error, self.scene_error) if error is not None]
        return max(known, default=None)


def scores(result: Result, metric: str) -> list[float]:
    """A score a held-out scene: of its greedy answer, the mean of its sampled ones, their best.

    Where answers are right or wrong, the mean of the best is pass@8. [] if there are none.
    """
    if metric == "greedy":
        return [own[0] for own in result.greedy]
    if metric == "sampled":
        return [fmean(own) for own in result.sampled]
    if metric == "pass@8":
        return [max(own) for own in result.sampled]
    raise ValueError(f"metric {metric!r}: choose greedy, sampled, pass@8 or AP")


def score(result: Result, metric: str) -> float | None:
    """The arm's, with this seed. AP is eval.py's own, of greedy answers; None if there is none."""
    if metric == "AP":
        return result.about.get("metrics", {}).get("AP")
    own = scores(result, metric)
    return fmean(own) if own else None


def estimate(results: dict, weights: dict[str, float], metric: str) -> Estimate | None:
    """Σ weight · score over the arms, from the seeds that all of them have; None without such.

    The standard error over n seeds is s/√n. That over scenes is √(Σ e²)/n, from each seed's own e.
    """
    values, scene_errors = [], []
    for seed in common_seeds(results, weights):
        own = {name: results[name][seed] for name in weights}
        parts = {name: score(result, metric) for name, result in own.items()}
        if None not in parts.values():
            values.append(sum(weight * parts[name] for name, weight in weights.items()))
            scene_errors.append(error_over_scenes(own, weights, metric))
    if not values:
        return None
    scene_error = None
    if None not in scene_errors:
        scene_error = math.hypot(*scene_errors) / len(values)
    if len(values) == 1:
        return Estimate(values[0], scene_error, 1, scene_error)
    error = stdev(values) / math.sqrt(len(values))
    return Estimate(fmean(values), error, len(values), scene_error)


def common_seeds(results: dict, names) -> list[int]:
    """Those that all of these arms have."""
    return sorted(set.intersection(*(set(results[name]) for name in names)))


def error_over_scenes(own: dict[str, Result], weights: dict, metric: str) -> float | None:
    """One seed's standard error, of differences scene by scene (arms of two worlds have other
    scenes: any pairing serves). None of AP, which is no mean over scenes."""
    if metric == "AP":
        return None
    columns = []
    for name, weight in weights.items():
        columns.append([weight * value for value in scores(own[name], metric)])
    differences = [sum(row) for row in zip(*columns, strict=True)]
    return stdev(differences) / math.sqrt(len(differences))


def verdict(found: Estimate | None) -> str:
    """Is Σ weight · score above 0, as the claim says?

    seen: by more than two standard errors, the larger ones of seeds and scenes; reversed: below 0
    by more than two; not seen: else. With three seeds this is a weak rule: where training differs
    by chance alone, t with two degrees of freedom is beyond 2 in 9 of 100 cases on each side. Over
    500 scenes of one seed it is 2 or 3 of 100, but another seed may train otherwise.
    """
    if found is None:
        return "not run"
    if found.larger_error is None:
        return "one seed, error unknown"
    if found.mean > 2 * found.larger_error:
        return "seen"
    if found.mean < -2 * found.larger_error:
        return "reversed"
    return "not seen"


def points(found: Estimate | None, sign: str = "") -> str:
    """In percent: mean ± the error that decides. sign: "+" writes it before a gain too."""
    if found is None:
        return "–"
    mean = f"{100 * found.mean:{sign}.1f}"
    if found.larger_error is None:
        return mean
    return f"{mean} ± {100 * found.larger_error:.1f}"


def measured(results: dict, contrast: Contrast) -> tuple[str, str]:
    """A contrast in words: (what was measured, the verdict)."""
    found = estimate(results, contrast.weights, contrast.metric)
    if found is None:
        return "not run", verdict(found)
    text = points(found, "+")
    higher = {name: weight for name, weight in contrast.weights.items() if weight > 0}
    lower = {name: -weight for name, weight in contrast.weights.items() if weight < 0}
    if math.isclose(sum(higher.values()), 1.0):  # two means, not a difference of differences
        common = common_seeds(results, contrast.weights)
        both = {name: {seed: results[name][seed] for seed in common} for name in contrast.weights}
        first = estimate(both, lower, contrast.metric)
        second = estimate(both, higher, contrast.metric)
        text = f"{100 * first.mean:.1f} → {100 * second.mean:.1f}: {text}"
    seeds = "one seed" if found.seeds == 1 else f"{found.seeds} seeds"
    return f"{text} ({seeds})", verdict(found)


# §3 ──────────────────────────────────── a claim's page ──────────────────────────────────────────
METRICS = ("greedy", "sampled", "pass@8", "AP")


def page(name: str, claim: Claim, results: dict) -> str:
    """NAME.md: what the claim's contrasts say, all arms, the commands of one seed."""
    lines = [f"# {name}: {claim.title}", "", f"{command_of(name, results)}. Scores are in percent, on "
             "held-out scenes, by the answer alone; pass@8 is the best of eight sampled ones. ± is one "
             "standard error, the larger of that over seeds and that over scenes. Seen: in the claimed "
             "direction by more than two of them; with three seeds chance alone does it in up to 9 of "
             "100 cases, with two in up to 15, and with one nobody knows what another seed would do."]
    if claim.note:
        lines += ["", claim.note]
    lines += ["", "| claim | the paper | here | verdict |", "|---|---|---|---|"]
    for contrast in claim.contrasts:
        here, decided = measured(results, contrast)
        lines.append(f"| {contrast.text} | {contrast.paper} | {here} | {decided} |")
    lines += ["", f"![scores of the arms]({name}.png)", "", *arm_table(claim, results)]
    lines += ["", "The commands with one seed, the answers' of the first arm alone:", "", "```",
              *commands(claim, results), "```"]
    return "\n".join(lines) + "\n"


def command_of(name: str, results: dict) -> str:
    """The command, with the seeds that were run: those that all arms with results have."""
    measured_arms = [name for name, seeds in results.items() if seeds]
    seeds = common_seeds(results, measured_arms) if measured_arms else [0, 1, 2]
    return f"`python benchmarks/claims.py {name} --seeds {' '.join(map(str, seeds))}`"


def arm_table(claim: Claim, results: dict) -> list[str]:
    """A line an arm: what its training took, in the mean over seeds, and its scores."""
    lines = [f"| arm | seeds | {' | '.join(SPENT)} | {' | '.join(METRICS)} |",
             "|---" * (2 + len(SPENT) + len(METRICS)) + "|"]
    for arm in claim.arms:
        own = results[arm.name]
        if not own:
            continue
        cells = [arm.name, ", ".join(map(str, sorted(own)))]
        if any(result.about.get("cut") for result in own.values()):
            cells[0] += " (cut by the time limit)"
        for quantity in SPENT:
            mean = fmean(result.about.get(quantity, 0) for result in own.values())
            cells.append(f"{mean:,.0f}")
        for metric in METRICS:
            cells.append(points(estimate(results, {arm.name: 1.0}, metric)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def commands(claim: Claim, results: dict) -> list[str]:
    """How each arm was trained with its first seed; how the first one was answered. The others'
    answers are asked for alike, and stand in the raw rows."""
    lines, answered = [], False
    for arm in claim.arms:
        if not results[arm.name]:
            continue
        first = results[arm.name][min(results[arm.name])]
        for command in first.about["commands"]:
            if command[0] != "eval.py" or not answered:
                lines += [f"# {arm.name}", f"python {shlex.join(command)}"]
        answered = answered or bool(first.about["commands"])
    return lines


def write_claim(name: str, claim: Claim, folder: Path) -> Path:
    """NAME.md and NAME.png beside the raw rows in folder/NAME/: the page's path."""
    results = read_claim(claim, folder / name)
    path = folder / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(name, claim, results))
    if any(results.values()):
        draw(claim, results, folder / f"{name}.png")
    return path


# §4 ─────────────────────────────────────── its figure ───────────────────────────────────────────
def draw(claim: Claim, results: dict, path: Path) -> None:
    """Greedy and sampled scores ± one standard error: a colour for each kind of arm."""
    from matplotlib.figure import Figure

    places = [*dict.fromkeys(arm.where for arm in claim.arms)]
    kinds = [*dict.fromkeys(arm.what for arm in claim.arms if results[arm.name])]
    kinds = [kind for kind in kinds if kind not in claim.not_drawn]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for column, metric in enumerate(("greedy", "sampled"), 1):
        axis = figure.add_subplot(1, 2, column, title=f"{metric}, % of the answer alone")
        for number, kind in enumerate(kinds):
            shift = 0.0
            if not claim.ordinal:
                shift = 0.6 * ((number + 0.5) / len(kinds) - 0.5)  # side by side
            draw_kind(axis, claim, results, metric, kind, places, shift, f"C{number}")
        axis.set_xticks(range(len(places)), places)
        axis.grid(axis="y", alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=90)


def draw_kind(axis, claim: Claim, results: dict, metric: str, kind: str, places: list, shift,
              colour: str):
    """One kind of arm, `shift` beside its places. Not all have all metrics: the colour is given."""
    xs, means, errors = [], [], []
    for arm in claim.arms:
        found = estimate(results, {arm.name: 1.0}, metric)
        if arm.what == kind and found is not None:
            xs.append(places.index(arm.where) + shift)
            means.append(100 * found.mean)
            errors.append(100 * (found.larger_error or 0.0))
    if xs:
        neighbours = xs[-1] - xs[0] == len(xs) - 1  # nothing lies between that was not run
        line = "-" if claim.ordinal and neighbours else "none"
        axis.errorbar(
            xs, means, errors, label=kind, color=colour, marker="o", linestyle=line, capsize=2)


# §5 ─────────────────────────────────────── the README ───────────────────────────────────────────
FIGURE = "P2"  # the claim whose figure stands there
FIGURE_TEXT = "detection: scores of the base, SFT and GRPO over the number of objects"


def readme_part(claims: dict[str, Claim], folder: Path) -> str:
    """The table between the README's marks, and the figure once it is drawn."""
    lines = ["| claim | the paper | here | verdict | command |", "|---|---|---|---|---|"]
    measured_any = False
    for name, claim in claims.items():
        results = read_claim(claim, folder / name)
        if any(results.values()):
            measured_any = True
        lines += headlines(name, claim, results)
    if not measured_any:
        return NOTHING
    if (folder / f"{FIGURE}.png").exists():
        lines += ["", f"![{FIGURE_TEXT}](results/claims/{FIGURE}.png)"]
    return "\n".join(lines)


def headlines(name: str, claim: Claim, results: dict) -> list[str]:
    """A claim's lines of that table; the first also holds its title and its command."""
    lines = []
    text = f"**[{name}](results/claims/{name}.md)** {claim.title}<br>"
    command = command_of(name, results)
    for contrast in claim.contrasts:
        if contrast.headline:
            here, decided = measured(results, contrast)
            cells = [text + contrast.text, contrast.paper, here, f"**{decided}**", command]
            lines.append(f"| {' | '.join(cells)} |")
            text, command = "", ""
    return lines


def write_all(claims: dict[str, Claim], folder: Path, readme: Path) -> None:
    """The pages, the figures of claims with results, and the README's table.

    Errors: SystemExit if the README has no place for it.
    """
    if readme_part(claims, folder) != NOTHING:  # then the table has a link to each page
        for name, claim in claims.items():
            print(write_claim(name, claim, folder))
    text = readme.read_text()
    opening, closing = MARKS
    before, opened, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not opened or not closed:
        raise SystemExit(f"{readme} has no {opening} … {closing} for the table to stand between")
    part = readme_part(claims, folder)
    readme.write_text(f"{before}{opening}\n{part}\n{closing}{after}")
    print(readme)
