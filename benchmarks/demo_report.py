"""What the raw rows of benchmarks/demo_arms.py say: results/demo.md and the figure demo.png.

§1 the arms · §2 errors and verdicts · §3 the page · §4 its figure: curves · §5 its scenes

A raw file is an arm with a seed, in lines as claims_report.py §1 has them: about, training steps, the
scores of each held-out scene. Error is 1 − rewards.correct, in the mean over scenes.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import claims_report
from claims_report import Estimate, Result, estimate

import data as datasets
import plots
import readers
import rewards
import sheets
from plots import Line


# §1 ─────────────────────────────────────── the arms ─────────────────────────────────────────────
@dataclass(frozen=True)
class Arm:
    name: str
    slug: str  # names its files; a control's is also the name of its reward
    kind: str  # base, grpo, control, supervised
    lr: float = 0.0  # supervised


SUPERVISED_LRS = 1e-4, 3e-4
BASE = Arm("base", "base", "base")
GRPO = Arm("GRPO", "grpo", "grpo")
CONTROLS = Arm("format-only reward", "format_only", "control"), Arm(
    "random reward", "random_reward", "control")
SUPERVISED = tuple(Arm(f"supervised, lr {lr:g}", f"supervised_{lr:g}", "supervised", lr)
                   for lr in SUPERVISED_LRS)
ARMS = BASE, GRPO, *CONTROLS, *SUPERVISED
MODES = "greedy", "sampled"


def read_arms(folder: Path) -> dict[str, dict[int, Result]]:
    """{arm's name: {seed: Result}} of what is finished. Errors: SystemExit without base and GRPO."""
    results = {arm.name: claims_report.read_seeds(folder, arm.slug) for arm in ARMS}
    if not results[BASE.name].keys() & results[GRPO.name].keys():
        raise SystemExit(f"{folder} has no seed with raw rows of base and GRPO: run "
                         "benchmarks/demo_arms.py without --report first")
    return results


def answers_file(folder: Path, arm: Arm, seed: int) -> Path:
    """Where the sampled answers to the first scenes are kept."""
    return folder / f"{arm.slug}-{seed}-answers.jsonl"


def better_supervised(results: dict) -> Arm:
    """The learning rate with the lower greedy error on the held-out scenes, in its favour."""
    finished = [arm for arm in SUPERVISED if results[arm.name]]
    if not finished:
        return SUPERVISED[0]
    return max(finished, key=lambda arm: estimate(results, {arm.name: 1.0}, "greedy").mean)


# §2 ───────────────────────────────── errors and verdicts ────────────────────────────────────────
@dataclass(frozen=True)
class Change:
    """From the base to an arm, over the seeds that both have. Errors are 1 − score."""
    before: Estimate
    after: Estimate
    fell: Estimate  # by how much, seed by seed

    @property
    def factor(self) -> float:
        """What is left of the error."""
        if self.before.mean == 0:
            return math.nan
        return self.after.mean / self.before.mean


def change(results: dict, arm: Arm, mode: str) -> Change:
    """± is s/√n over n seeds; of one seed, over its scenes."""
    both = results[BASE.name].keys() & results[arm.name].keys()
    own = {}
    for name in (BASE.name, arm.name):
        own[name] = {seed: results[name][seed] for seed in both}
    before = estimate(own, {BASE.name: 1.0}, mode)
    after = estimate(own, {arm.name: 1.0}, mode)
    rose = estimate(own, {arm.name: 1.0, BASE.name: -1.0}, mode)  # by as much as errors fall
    fell = Estimate(rose.mean, rose.error, rose.seeds)  # the page's errors are of seeds alone
    return Change(error_of(before), error_of(after), fell)


def error_of(score: Estimate) -> Estimate:
    return Estimate(1 - score.mean, score.error, score.seeds)


def verdict(arm: Arm, fell: Estimate) -> str:
    """A control should not be above the base by two standard errors, another arm by three."""
    if arm.kind == "control":
        if fell.mean > 2 * fell.error:
            return "above the base by more than two standard errors"
        return "not above the base by two standard errors"
    if fell.mean > 3 * fell.error:
        return "better by more than three standard errors"
    if fell.mean < -3 * fell.error:
        return "worse by more than three standard errors"
    return "within three standard errors"


def against_supervised(results: dict) -> list[str]:
    """GRPO beside the better supervised arm, a sentence a mode."""
    arm = better_supervised(results)
    if not results[arm.name]:
        return []
    lines = [f"Beside {arm.name} for as many seconds:"]
    for mode in MODES:
        lower = estimate(results, {GRPO.name: 1.0, arm.name: -1.0}, mode)
        if lower is None:
            return []
        lines.append(f"- {mode}: GRPO's error is {lower_or_higher(lower)}.")
    return lines


def lower_or_higher(found: Estimate) -> str:
    word = "lower" if found.mean > 0 else "higher"
    return f"{word} by {100 * abs(found.mean):.1f} ± {100 * found.error:.1f} points"


# §3 ─────────────────────────────────────── the page ─────────────────────────────────────────────
COLUMNS = ("arm", "answers", "error before, %", "error after, %", "factor", "fell by, points",
           "verdict", "seeds", "steps", "seconds")


def table(results: dict) -> list[str]:
    """Two lines an arm: greedy and sampled."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for arm in ARMS[1:]:
        if results[BASE.name].keys() & results[arm.name].keys():
            for mode in MODES:
                cells = line_of(results, arm, mode)
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def line_of(results: dict, arm: Arm, mode: str) -> list[str]:
    found = change(results, arm, mode)
    seeds = [result.about for result in results[arm.name].values()]
    steps = fmean(about["steps"] for about in seeds)
    seconds = fmean(about["seconds"] for about in seeds)
    return [
        arm.name, mode, claims_report.points(found.before), claims_report.points(found.after),
        f"×{found.factor:.2f}", claims_report.points(found.fell, "+"), verdict(arm, found.fell),
        str(found.fell.seeds), f"{steps:,.0f}", f"{seconds:,.0f}"]


def page(results: dict, metric: str) -> str:
    """demo.md."""
    base = results[BASE.name]
    scenes = len(next(iter(base.values())).greedy)
    lines = [
        "# The demo and its controls", "",
        f"`python benchmarks/demo_arms.py --seeds {' '.join(map(str, sorted(base)))}`. Error is "
        f"1 − {metric} of the answer alone (`rewards.correct`) on {scenes:,} held-out scenes a seed; "
        f"sampled: the mean of {sheets.TRIES} answers at T = 1. ± is one standard error over seeds, "
        "with one seed over scenes. Seconds are those of training with its evaluations.", "",
        "![Held-out curves, and the first scenes before and after](demo.png)", "",
        *table(results), "", *against_supervised(results), "",
        "The figure's curves are of fewer scenes, those that a run is evaluated on as it goes.", "",
        "The commands of one seed, the answers' of the first arm alone:", "",
        "```", *commands(results), "```"]
    return "\n".join(lines) + "\n"


def commands(results: dict) -> list[str]:
    """How each arm was trained with its first seed, and how the base was answered."""
    lines = []
    for arm in ARMS:
        if results[arm.name]:
            first = results[arm.name][min(results[arm.name])]
            own = first.about["commands"]
            if arm.kind != "base":
                own = own[:1]
            lines += [f"# {arm.name}", *own]
    return lines


def write(folder: Path) -> None:
    """demo.md and demo.png beside the folder of raw rows."""
    results = read_arms(folder)
    _, rows = examples(folder, results)
    metric = rewards.metric_name(row["task"] for row in rows)
    path = folder.with_suffix(".md")
    path.write_text(page(results, metric))
    draw(folder, results, metric, folder.with_suffix(".png"))
    print(path.read_text())


# §4 ────────────────────────────────── its figure: curves ────────────────────────────────────────
WIDE, HIGH, DPI = 1800, 800, 200  # pixels; it is read at half of that width
TEXT = 9.5  # points, 26 pixels
GREYS = {"format_only": ("#777777", ":"), "random_reward": ("#999999", "-.")}


def curve(results: dict[int, Result], metric: str) -> Line:
    """Held-out percent over minutes of training: means of the seeds ± s/√n, where all have a value."""
    points: dict = {}
    for result in results.values():
        for key, point in evaluations(result, metric).items():
            points.setdefault(key, []).append(point)
    xs, ys, errors = [], [], []
    for own in points.values():
        if len(own) == len(results):
            xs.append(fmean(minutes for minutes, _ in own))
            values = [value for _, value in own]
            ys.append(fmean(values))
            errors.append(stdev(values) / math.sqrt(len(own)) if len(own) > 1 else 0.0)
    return Line("", metric, xs, ys, errors, smoothed=1)


def evaluations(result: Result, metric: str) -> dict:
    """{step, or "last": (minutes, percent)}; runs that end by the clock end at other steps."""
    found = {}
    for row in result.steps:
        if f"before/{metric}" in row:
            found["first"] = 0.0, 100 * row[f"before/{metric}"]
        if f"eval/{metric}" in row:
            key = "last" if row is result.steps[-1] else row["step"]
            found[key] = row["seconds/total"] / 60, 100 * row[f"eval/{metric}"]
    return found


def draw_curves(figure, results: dict, metric: str) -> None:
    """Greedy above sampled; GRPO and supervised training in colour, the controls in grey."""
    seeds = len(results[GRPO.name])
    figure.text(60 / WIDE, 1 - 20 / HIGH, f"Held-out {metric}, {in_words(seeds)}",
                va="top", fontsize=TEXT + 1.5)
    better = better_supervised(results)
    lines = [(better, "#c05a00", "--", "supervised")]
    for arm in CONTROLS:
        lines.append((arm, *GREYS[arm.slug], arm.name))
    lines.append((GRPO, "C0", "-", "GRPO"))
    handles = []
    for place, mode in enumerate(MODES):
        axis = add_axes(figure, left=120, top=85 + 305 * place, width=540, height=275)
        for arm, colour, style, _ in lines:
            if results[arm.name]:
                plots.draw_line(axis, curve(results[arm.name], mode), colour, style)
        axis.set_ylabel(f"{mode}, %", fontsize=TEXT)
        axis.tick_params(labelsize=TEXT - 1, labelbottom=place == 1)
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
    axis.set_xlabel("minutes of training", fontsize=TEXT, labelpad=2)
    for arm, colour, style, label in reversed(lines):
        if results[arm.name]:
            handles.append(plots.handle(label, colour, style))
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(30 / WIDE, 0), ncols=4,
                  frameon=False, fontsize=TEXT - 0.5, columnspacing=1.2, borderpad=0.2)


def in_words(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds ± SE"


def add_axes(figure, *, left: int, top: int, width: int, height: int):
    """Axes at this place, in pixels from the figure's upper left corner."""
    bottom = HIGH - top - height
    return figure.add_axes((left / WIDE, bottom / HIGH, width / WIDE, height / HIGH))


# §5 ────────────────────────────────── its figure: scenes ────────────────────────────────────────
COLUMNS_SHOWN, TILE, GAP = 4, 252, 12  # scenes, the first by number; pixels: three to one of 84


def examples(folder: Path, results: dict) -> tuple[int, list[dict]]:
    """The first seed that base and GRPO have, and the base's kept answers with it."""
    seed = min(results[BASE.name].keys() & results[GRPO.name].keys())
    return seed, claims_report.read_rows(answers_file(folder, BASE, seed))


def first_scenes(spec: str, rows: list[dict]) -> list:
    """The samples of the kept answers, drawn anew. Errors: ValueError if other ones are drawn."""
    answers = {row["id"]: row["answer"] for row in rows}
    mix = datasets.open_data([spec], split="heldout")
    samples = [mix.at(index) for index in range(min(COLUMNS_SHOWN, len(answers)))]
    for sample in samples:
        if answers.get(sample.id) != sample.answer:
            raise ValueError(f"{spec} draws another scene {sample.id} than the one that was answered: "
                             "the drawn world has changed, measure again")
    return samples


def draw_scenes(figure, folder: Path, results: dict, metric: str) -> None:
    """Before above after: the first scenes with all their sampled answers, the mean under each."""
    seed, before = examples(folder, results)
    rows_of = {"before": before,
               "after GRPO": claims_report.read_rows(answers_file(folder, GRPO, seed))}
    samples = first_scenes(results[BASE.name][seed].about["scenes"], before)
    left, top = 735, 100
    figure.text((left - 35) / WIDE, 1 - 20 / HIGH, "The first held-out scenes, "
                f"{sheets.TRIES} sampled answers over each", va="top", fontsize=TEXT + 1.5)
    for place, (name, rows) in enumerate(rows_of.items()):
        for column, sample in enumerate(samples):
            own = [row for row in rows if row["id"] == sample.id]
            axis = add_axes(figure, left=left + column * (TILE + GAP), top=top + place * (TILE + 62),
                            width=TILE, height=TILE)
            texts = [row["completion"] for row in own]
            axis.imshow(sheets.cloud(sample.images[0], sample.task, texts, sample.answer,
                                    sample.image_size, width=TILE), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(below(own, metric), fontsize=TEXT, labelpad=4)
            if place == 0:
                axis.set_title(above(sample), fontsize=TEXT, pad=3)
            if column == 0:
                axis.set_ylabel(name, fontsize=TEXT + 1, labelpad=4)
    marks = "boxes said in magenta"
    if samples[0].task == "counting":
        marks = "points said in magenta, counted below"
    figure.text((WIDE - 10) / WIDE, 12 / HIGH, f"{marks}; true in cyan",
                ha="right", va="bottom", fontsize=TEXT - 1.5)


def above(sample) -> str:
    """What a tile's scene is asked, with the true number where it is a number."""
    if sample.task == "counting":
        return f"{sample.question}: {len(sample.answer)}"
    return sample.question


def below(rows: list[dict], metric: str) -> str:
    """What a tile's answers amount to: each one's count, or their mean score."""
    if rows[0]["task"] != "counting":
        return f"mean {metric} {fmean(row['correct'] for row in rows):.2f}"
    counts = []
    for row in rows:
        points, _ = readers.read_shapes(row["completion"], row["image_size"])
        counts.append(len(points))
    return " ".join(map(str, sorted(counts)))


def draw(folder: Path, results: dict, metric: str, path: Path) -> None:
    """The figure: left the curves, right the scenes."""
    from matplotlib.figure import Figure  # without pyplot, as there may be no screen

    figure = Figure(figsize=(WIDE / DPI, HIGH / DPI), dpi=DPI)
    draw_curves(figure, results, metric)
    draw_scenes(figure, folder, results, metric)
    figure.savefig(path, dpi=DPI)
