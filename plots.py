"""How did a run go? Curves and tables, from its metrics.jsonl (a line a step) and config.json.

§1 reading a run · §2 means over seeds · §3 drawing curves · §4 tables
"""
import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import formats
from needs import library

PANELS = {  # title: pattern of names in metrics.jsonl
    "reward": "reward", "parts of the reward": "reward/.*", "held-out accuracy": "eval/.*",
    "completion length (tokens)": "length", "truncated completions (share)": "truncated",
    "KL to the reference (nats a token)": "kl", "entropy (nats a token)": "entropy",
    "clipped tokens (share)": "clip_.*", "equal rewards (share of groups)": "zero_variance",
    "loss": "loss", "gradient norm": "grad_norm", "seconds a step": "seconds/(?!total).*"}


def picture_path(out, default: Path) -> Path:
    """Where a picture goes: `default` if nothing is said, a .png unless said otherwise.

    Its folder is made. Errors: OSError naming what stands in the way.
    """
    path = Path(out) if out else default
    if path.is_dir():
        path = path / default.name
    if path.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        path = path.with_name(path.name + ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# §1 ───────────────────────────────────── reading a run ──────────────────────────────────────
@dataclass(frozen=True)
class Line:
    """A metric of a run, or of an arm's runs in the mean."""
    run: str
    metric: str
    xs: list  # completed steps; names of checkpoints
    ys: list[float]
    errors: list[float] | None = None  # one standard error of each y
    smoothed: int = 0  # an arm's mean, of each run's running mean of so many values; 0: a run's


def read_steps(run: Path) -> dict[int, dict]:
    """{step: its metrics}, the later of two lines of one step. Errors: ValueError without any."""
    steps = {}
    for _, raw in formats.read_rows(run / "metrics.jsonl"):
        with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed run
            row = json.loads(raw)
            steps[row["step"]] = row
    if not steps:
        raise ValueError(f"{run}/metrics.jsonl: no step has been logged yet")
    return steps


def held_out_samples(run: Path) -> int:
    """The number of samples behind each held-out accuracy; 0 if config.json does not tell."""
    file = run / "config.json"
    if not file.exists():
        return 0
    return json.loads(file.read_text()).get("eval_samples", 0)


def standard_error(share: float, samples: int) -> float:
    """Of a share p of n samples; of graded answers in 0 … 1, whose spread is less, a bound."""
    variance = share * (1 - share)
    return math.sqrt(variance / samples)  # √(p(1 − p)/n)


def curves(runs: list[Path], titles=tuple(PANELS)) -> dict:
    """{panel: [Line]} over completed steps; held-out metrics begin at 0, before the first step."""
    panels = {title: [] for title in titles}
    for run in runs:
        steps = read_steps(run)
        steps[-1] = before_training(steps)
        samples = held_out_samples(run)
        names = dict.fromkeys(name for step in sorted(steps) for name in steps[step])
        for title in titles:
            for name in filter(re.compile(PANELS[title]).fullmatch, names):
                line = read_line(run, name, steps, samples)
                panels[title].append(line)
    return {title: lines for title, lines in panels.items() if lines}


def before_training(steps: dict[int, dict]) -> dict:
    """{"eval/greedy": …} of the model that the run began with, which its first row holds."""
    first = steps[min(steps)]
    found = {}
    for name, value in first.items():
        if name.startswith("before/"):
            found[name.replace("before/", "eval/")] = value
    return found


def read_line(run: Path, name: str, steps: dict, samples: int) -> Line:
    """A metric where it was logged; null stands for a value that was not finite."""
    xs, ys = [], []
    for step in sorted(steps):
        value = steps[step].get(name)
        if value is not None:
            xs.append(step + 1)
            ys.append(value)
    errors = None
    if samples and name.startswith("eval/"):
        errors = [standard_error(share, samples) for share in ys]
    return Line(str(run), name, xs, ys, errors)


# §2 ──────────────────────────────────── means over seeds ────────────────────────────────────
def arms(runs: list[Path]) -> dict[str, list[Path]]:
    """Runs whose names differ in their last number alone are seeds of one arm: {arm: runs}."""
    found = {}
    for run in runs:
        name = re.sub(r"[-_]?\d+(?=\D*$)", "", str(run))
        found.setdefault(name, []).append(run)
    return found


def mean_curves(arm: str, runs: list[Path], titles=tuple(PANELS)) -> dict:
    """{panel: [Line]} of an arm: the mean of its runs ± one standard error, where all have a value.

    Long lines are smoothed run by run first, so that the error is that of what is shown.
    """
    panels = {}
    for title, lines in curves(runs, titles=titles).items():
        for metric in dict.fromkeys(line.metric for line in lines):
            own = [line for line in lines if line.metric == metric]
            if len(own) == len(runs):
                panels.setdefault(title, []).append(mean_line(arm, metric, own))
    return panels


def mean_line(arm: str, metric: str, lines: list[Line]) -> Line:
    width = min(window(line.ys) for line in lines)
    values = {}
    for line in lines:
        for x, y in zip(line.xs, running_mean(line.ys, width)):
            values.setdefault(x, []).append(y)
    count = len(lines)
    xs = [x for x in sorted(values) if len(values[x]) == count]
    means = [fmean(values[x]) for x in xs]
    errors = None
    if count > 1:
        # s/√n, with s over n − 1
        errors = [stdev(values[x]) / math.sqrt(count) for x in xs]
    return Line(f"{arm} (mean of {count})", metric, xs, means, errors, smoothed=width)


def window(ys: list[float]) -> int:
    """How many values a running mean takes: a twentieth of a long line."""
    if len(ys) <= 60:
        return 1
    return len(ys) // 20


def running_mean(ys: list[float], width: int) -> list[float]:
    """Each value's mean with the `width` − 1 before it."""
    means = []
    for last in range(len(ys)):
        first = max(0, last + 1 - width)
        means.append(fmean(ys[first : last + 1]))
    return means


# §3 ───────────────────────────────────── drawing curves ─────────────────────────────────────
STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1)))


def draw_panels(panels: dict[str, list[Line]], path, xlabel: str) -> None:
    """A picture of {title: [Line]}: a run has one colour in all panels, a metric one line style.

    With a single run, colours tell its metrics apart. A long line is pale under its running mean.
    """
    library("matplotlib", "matplotlib")
    from matplotlib.figure import Figure  # without pyplot, as there may be no screen
    runs = [*dict.fromkeys(line.run for lines in panels.values() for line in lines)]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.8 * columns, 4.2 * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    for place, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, place, title=title)
        draw_panel(axis, lines, runs, xlabel)
    if len(runs) > 1:
        handles = [handle(run, f"C{n}", "-", lw=4) for n, run in enumerate(runs)]
        columns = min(4, len(runs))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    elif runs[0]:
        figure.suptitle(runs[0])
    figure.savefig(path, dpi=88)


def draw_panel(axis, lines: list[Line], runs: list[str], xlabel: str) -> None:
    """The lines of one panel, and under it, where it hides nothing, which metric is which."""
    metrics = [*dict.fromkeys(line.metric for line in lines)]
    several = len(runs) > 1
    handles = []
    for number, metric in enumerate(metrics):
        style = STYLES[number % len(STYLES)]
        for line in lines:
            if line.metric == metric:
                colour = runs.index(line.run) if several else number
                draw_line(axis, line, f"C{colour}", style)
        colour = "black" if several else f"C{number}"
        name = metric.rpartition("/")[2]
        handles.append(handle(name, colour, style))
    axis.set_xlabel(f"{xlabel} {what_is_shown(lines)}".strip())
    rotation, columns = 0, 4
    if isinstance(lines[0].xs[0], str):  # names of checkpoints take more room than steps
        rotation, columns = 20, 2
    axis.tick_params("x", rotation=rotation)
    axis.grid(alpha=0.25)
    if len(metrics) > 1:
        axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False,
                    ncols=columns, fontsize="small", handlelength=3)


def handle(label: str, colour: str, style, **options):
    """A legend's entry."""
    from matplotlib.lines import Line2D
    return Line2D([], [], color=colour, linestyle=style, label=label, **options)


def what_is_shown(lines: list[Line]) -> str:
    """In words, beside a panel's x-axis: smoothing and errors."""
    width = max(line.smoothed or window(line.ys) for line in lines)
    notes = []
    if width > 1:
        notes.append(f"running mean of {width}")
    if any(line.errors for line in lines):
        notes.append("± one standard error")
    if not notes:
        return ""
    return f"({', '.join(notes)})"


def draw_line(axis, line: Line, colour: str, style) -> None:
    """A line with its standard errors: an area around a mean of runs, bars at a run's points."""
    if line.smoothed:
        axis.plot(line.xs, line.ys, color=colour, linestyle=style)
        if line.errors:
            low = [y - error for y, error in zip(line.ys, line.errors)]
            high = [y + error for y, error in zip(line.ys, line.errors)]
            axis.fill_between(line.xs, low, high, color=colour, alpha=0.2, linewidth=0)
        return
    width = window(line.ys)
    if width > 1:
        axis.plot(line.xs, line.ys, color=colour, lw=0.6, alpha=0.25)
        axis.plot(line.xs, running_mean(line.ys, width), color=colour, linestyle=style)
        return
    axis.errorbar(line.xs, line.ys, line.errors, color=colour, linestyle=style, marker=".",
                  elinewidth=0.8, capsize=2)


# §4 ──────────────────────────────────────── tables ──────────────────────────────────────────
def demo_table(table: dict) -> str:
    """The metric of the answer alone before and after, and what is left of the error 1 − metric.

    ± is one standard error of a share; where answers are graded their spread is less: a bound.
    """
    samples, metric = table["samples"], table["metric"]
    spread = "one standard error"
    if metric != "accuracy":
        spread = f"at most {spread}"
    lines = [f"held-out {metric} of the answer alone, {samples} samples, ± {spread}",
             f"{'':<9}{'before GRPO':>16}{'after GRPO':>16}{'gain':>15}{'error':>26}"]
    for mode, after in table["after"].items():
        before = table["before"][mode]
        old = percent(before, samples)
        new = percent(after, samples)
        gain = 100 * (after - before)
        error = error_change(before, after)
        lines.append(f"{mode:<9}{old:>16}{new:>16}{gain:>+8.1f} points{error:>26}")
    return "\n".join(lines)


def error_change(before: float, after: float) -> str:
    """1 − metric before and after, in percent, and their ratio."""
    old = 1 - before
    new = 1 - after
    text = f"{100 * old:.1f} → {100 * new:.1f} %"
    if old > 0:
        text += f", ×{new / old:.2f}"
    return text


def percent(share: float, samples: int) -> str:
    """A share and its standard error."""
    error = 100 * standard_error(share, samples)
    return f"{100 * share:.1f} ± {error:.1f} %"
