"""Curves, sheets and tables of a run.

§1 reading a run · §2 means over seeds · §3 drawing curves · §4 sheets of samples · §5 tables

A run folder holds metrics.jsonl (a line a step), config.json, and samples/: step-N.json, a row a
completion with its step, draw, image, text, reward and parts, beside the images that it names.
"""
import contextlib
import json
import math
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image, ImageDraw, ImageFont

import formats
import pictures
import readers
from formulas import library

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
        handles.append(handle(metric.rpartition("/")[2], colour, style))
    axis.set_xlabel(f"{xlabel} {what_is_shown(lines)}".strip())
    names = isinstance(lines[0].xs[0], str)
    axis.tick_params("x", rotation=20 if names else 0)
    axis.grid(alpha=0.25)
    if len(metrics) > 1:
        axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False,
                    ncols=2 if names else 4, fontsize="small", handlelength=3)


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
    return f"({', '.join(notes)})" if notes else ""


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


# §4 ─────────────────────────────────── sheets of samples ────────────────────────────────────
WIDTH, GAP = 230, 10  # pixels of a tile, and between tiles
TITLE, FACT, TEXT = 24, 18, 15  # pixels that a line of these takes
LEGEND = "predicted in magenta, true in cyan"


@dataclass(frozen=True)
class Tile:
    """A picture, what counts about it, and what was said."""
    picture: Image.Image
    fact: str
    said: list[str]

    @property
    def height(self) -> int:
        below = FACT + TEXT * len(self.said) + GAP
        return self.picture.height + below


def sheet(rows: list[tuple[str, list[Tile]]], heading: str) -> Image.Image:
    """A page under a heading: rows of tiles, each row under its title, if it has one."""
    heading = f"{heading} - {LEGEND}"
    font = ImageFont.load_default(18)
    heights = []
    for title, tiles in rows:
        tallest = max(tile.height for tile in tiles)
        heights.append(tallest + TITLE if title else tallest)
    columns = max(len(tiles) for _, tiles in rows)
    width = max(columns * (WIDTH + GAP), math.ceil(font.getlength(heading)) + GAP)
    page = Image.new("RGB", (width + GAP, 44 + sum(heights)), "#ececec")
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 12), heading, "black", font)
    top = 44
    for (title, tiles), height in zip(rows, heights):
        pen.text((GAP, top), title, "black", ImageFont.load_default(15))
        for column, tile in enumerate(tiles):
            corner = GAP + column * (WIDTH + GAP), top + TITLE if title else top
            put(page, pen, tile, corner)
        top += height
    return page


def put(page: Image.Image, pen, tile: Tile, corner: tuple[int, int]) -> None:
    """A tile's picture at `corner`, its lines below."""
    left, top = corner
    page.paste(tile.picture, corner)
    top += tile.picture.height + 2
    pen.text((left, top), tile.fact, "black", ImageFont.load_default(13))
    text = "\n".join(tile.said)
    pen.multiline_text((left, top + FACT), text, "#555555", ImageFont.load_default(12), spacing=3)


def in_tile(image, width: int = WIDTH) -> Image.Image:
    """The image so many pixels wide, its height in proportion; a blank one for None."""
    if image is None:
        return Image.new("RGB", (width, 28), "white")
    small = image.width < width
    size = width, max(1, image.height * width // image.width)
    return image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def marked(image, task: str, text: str, answer, image_size) -> Image.Image:
    """The image in a tile's width; what was said and what is true on it, where these are places."""
    picture = in_tile(image)
    if image is None or task not in pictures.PLACED:
        return picture
    frame = image_size or image.size
    said = places_said(text, frame, picture.size)
    true = pictures.scale(answer, frame, picture.size)
    return pictures.draw(picture, predicted=said, true=true)


def places_said(text: str, frame, size) -> list:
    """Boxes, else points, of an answer in a frame of (W, H), moved into a picture of that size."""
    said = readers.parse_boxes(text, frame) or readers.parse_points(text, frame)
    return pictures.scale(said, frame, size)


PALE = 0.4  # what one answer's marks cover; eight at one place cover 1 − 0.6⁸ = 98 %


def cloud(image, task: str, texts: list[str], answer, image_size, width=WIDTH) -> Image.Image:
    """All answers over the image, each so pale that only many at one place make a clear line.

    So a policy that knows shows one sharp box where another one shows a cloud. Width: 225 or more.
    """
    picture = in_tile(image, width)
    if image is None or task not in pictures.PLACED:
        return picture
    frame = image_size or image.size
    true = pictures.scale(answer, frame, picture.size)
    picture = pictures.draw(picture, true=true)
    for text in texts:
        said = places_said(text, frame, picture.size)
        over = pictures.draw(picture, predicted=said)
        picture = Image.blend(picture, over, PALE)
    return picture


def in_lines(text: str, count: int) -> list[str]:
    """At most so many lines of a tile's width, white space folded."""
    folded = " ".join(text.split())
    lines = textwrap.wrap(folded, 38)
    if len(lines) > count:
        last = lines[count - 1]
        lines[count - 1] = f"{last[:36]} …"
    return lines[:count]


SHOWN = {"step", "draw", "task", "answer", "text", "reward", "parts", "image", "image_size"}


def read_groups(file: Path) -> list[list[dict]]:
    """A step's groups, each one's completions from best to worst. Errors: ValueError."""
    groups = {}
    for row in json.loads(file.read_text()):
        lacking = SHOWN - row.keys()
        if lacking:
            raise ValueError(f"{file}: a row lacks {', '.join(sorted(lacking))}: the run was "
                             "trained by another version of this code")
        groups.setdefault(row["draw"], []).append(row)
    return [sorted(rows, key=lambda row: -row["reward"]) for rows in groups.values()]


def spread(items: list, count: int) -> list:
    """At most `count` of the items at even distances, the first and the last among them."""
    if count == 1 or len(items) <= count:
        return items[-count:]
    distance = (len(items) - 1) / (count - 1)
    places = [round(number * distance) for number in range(count)]
    return [items[place] for place in places]


def rollouts(run: Path, steps: int = 8, groups: int = 1) -> Image.Image:
    """A page of a run's samples: `steps` steps in order, of each the first `groups` prompts with
    all their completions, best to worst. Errors: ValueError if the run has no samples."""
    files = [*run.glob("samples/step-*.json")]
    if not files:
        raise ValueError(f"{run}/samples has no samples: train with --pictures-every above 0")
    files.sort(key=lambda file: int(file.stem.removeprefix("step-")))
    rows = []
    for file in spread(files, steps):
        for group in read_groups(file)[:groups]:
            rows += group_rows(group, file.parent)
    return sheet(rows, f"{run.name}: samples from best to worst")


def group_rows(group: list[dict], folder: Path) -> list[tuple[str, list[Tile]]]:
    """A prompt and its completions, eight in a row."""
    first = group[0]
    title = f"step {first['step']}: {first.get('question') or first['task']}"
    if first["task"] not in pictures.PLACED:
        title = f"{title} - true: {first['answer']}"
    title = textwrap.shorten(title, 110, placeholder=" …")
    image = None
    if first["image"]:
        image = pictures.load_image(folder / first["image"])
    rows = []
    for start in range(0, len(group), 8):
        tiles = [rollout_tile(row, image) for row in group[start : start + 8]]
        rows.append((title, tiles))
        title = ""
    return rows


def rollout_tile(row: dict, image) -> Tile:
    """One completion: step, reward, IoU or the first other part, and what was said."""
    step, reward, parts = row["step"], row["reward"], row["parts"]
    facts = [f"step {step}", f"reward {reward:.2f}"]
    others = [name for name in parts if name != "format"]
    if "iou" in parts:
        facts.append(f"IoU {parts['iou']:.2f}")
    elif others:
        name = others[0]
        facts.append(f"{name} {parts[name]:.2f}")
    if row.get("truncated"):
        facts.append("cut")
    picture = marked(image, row["task"], row["text"], row["answer"], row["image_size"])
    return Tile(picture, ", ".join(facts), in_lines(row["text"], 3))


TRIES = 8  # sampled answers to a scene that lie over each other
IN_A_ROW = 6  # scenes of a sheet before and after


def before_after(samples: list, rows: dict[str, list[dict]]) -> Image.Image:
    """The first held-out samples, none picked: under each other all answers before and after GRPO.

    rows: {"before": several rows an id, "after": …}, see training.answer, with "correct".
    """
    lines = []
    for start in range(0, len(samples), IN_A_ROW):
        part = samples[start : start + IN_A_ROW]
        for name, answers in rows.items():
            tiles = []
            for number, sample in enumerate(part, start + 1):
                own = [row for row in answers if row["id"] == sample.id]
                tiles.append(cloud_tile(number, sample, own))
            lines.append((f"{name} GRPO", tiles))
    return sheet(lines, f"The first held-out scenes, {TRIES} sampled answers over each")


def cloud_tile(number: int, sample, rows: list[dict]) -> Tile:
    """A sample's number, the mean of its answers' metric, and the answers."""
    texts = [row["completion"] for row in rows]
    mean = fmean(row["correct"] for row in rows)
    fact = f"scene {number}: mean {metric_name([sample.task])} {mean:.2f}"
    said = in_lines(sample.question or sample.task, 1)
    if sample.task not in pictures.PLACED:
        said += in_lines(f"true: {sample.answer}", 1)
        for text, count in Counter(texts).most_common(3):
            said += in_lines(f"{count} x {text}", 1)
    image = sample.images[0] if sample.images else None
    picture = cloud(image, sample.task, texts, sample.answer, sample.image_size)
    return Tile(picture, fact, said)


# §5 ──────────────────────────────────────── tables ──────────────────────────────────────────
GRADED = {"detection": "F1", "ocr": "similarity"}  # tasks whose answers are not right or wrong


def metric_name(tasks) -> str:
    """What rewards.correct is called on samples of these tasks."""
    names = {GRADED.get(task, "accuracy") for task in tasks}
    return names.pop() if len(names) == 1 else "score"


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
    old, new = 1 - before, 1 - after
    text = f"{100 * old:.1f} → {100 * new:.1f} %"
    if old > 0:
        text += f", ×{new / old:.2f}"
    return text


def percent(share: float, samples: int) -> str:
    """A share and its standard error."""
    error = 100 * standard_error(share, samples)
    return f"{100 * share:.1f} ± {error:.1f} %"
