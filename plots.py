"""Curves, sheets, tables of a run."""
import contextlib
import json
import math
import re
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont

import formats
import pictures
import rewards

PANELS = {  # title: pattern of names in metrics.jsonl
    "reward": "reward", "parts of the reward": "reward/.*", "held-out accuracy": "eval/.*",
    "completion length (tokens)": "length", "truncated completions (share)": "truncated",
    "KL to the reference (nats a token)": "kl", "entropy (nats a token)": "entropy",
    "clipped tokens (share)": "clip_.*", "equal rewards (share of groups)": "zero_variance",
    "loss": "loss", "gradient norm": "grad_norm", "seconds a step": "seconds/(?!total).*"}


def curves(runs: list[Path], start: dict | None = None, titles=tuple(PANELS)) -> dict:
    """{panel: {metric: (completed steps, values)}}, `start` at 0. A step's later line counts."""
    panels = {title: {} for title in titles}
    for run in runs:
        steps = {-1: start or {}}
        for _, raw in formats.read_rows(run / "metrics.jsonl"):
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed run
                row = json.loads(raw)
                steps[row["step"]] = row
        if len(steps) == 1:
            raise ValueError(f"{run}/metrics.jsonl: no step has been logged yet")
        names = dict.fromkeys(name for row in steps.values() for name in row)
        for title in titles:
            for name in filter(re.compile(PANELS[title]).fullmatch, names):
                xs = [step for step in sorted(steps) if name in steps[step]]
                line = [step + 1 for step in xs], [steps[step][name] for step in xs]
                panels[title][f"{run} {name}" if len(runs) > 1 else name] = line
    return {title: lines for title, lines in panels.items() if lines}


def draw_panels(panels: dict, path, xlabel: str) -> None:
    """PNG of {title: {label: (xs, ys)}}; a long line is drawn pale under its running mean."""
    from matplotlib.figure import Figure  # without pyplot, as there may be no screen
    shape = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = Figure(figsize=(5.8 * shape[1], 4 * shape[0]), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(*shape, place, title=title, xlabel=xlabel)
        for label, (xs, ys) in lines.items():
            width = len(ys) // 20 if len(ys) > 60 else 1
            means = [fmean(ys[max(0, end - width) : end]) for end in range(1, len(ys) + 1)]
            (line,) = axis.plot(xs, means, "-" if width > 1 else ".-", label=label)
            axis.plot(xs, ys, color=line.get_color(), lw=0.6, alpha=0.25)
        axis.tick_params("x", rotation=20 if isinstance(xs[0], str) else 0)
        axis.grid(alpha=0.25)
        axis.legend(fontsize="small", framealpha=0.6)
    figure.savefig(path, dpi=88)


def sheet(pictures, heading: str):
    """Pictures side by side, four in a row and each 260 pixels wide, under a heading."""
    small = [p.resize((260, p.height * 260 // p.width), Image.Resampling.LANCZOS) for p in pictures]
    down = max(p.height for p in small) + 10
    page = Image.new("RGB", (4 * 270 + 10, 44 + math.ceil(len(small) / 4) * down), "#e1e1e1")
    legend = f"{heading} - predicted in magenta, true in cyan"
    ImageDraw.Draw(page).text((10, 12), legend, "black", ImageFont.load_default(18))
    for place, picture in enumerate(small):
        page.paste(picture, (10 + place % 4 * 270, 44 + place // 4 * down))
    return page


def before_after(samples, rows):
    """The first held-out samples, none picked, each answered greedily before and after GRPO."""
    tiles = []
    for sample, name in ((sample, name) for sample in samples for name in rows):
        row = next(r for r in rows[name] if r["id"] == sample.id and r["mode"] == "greedy")
        text, size = row["completion"], sample.image_size
        said = rewards.parse_boxes(text, size) or rewards.parse_points(text, size)
        verdict = {0: "wrong", 1: "right"}.get(row["correct"], f"{row['correct']:.2f}")
        caption = f"{name}, {sample.question or sample.task}: {verdict}"
        if sample.task not in pictures.PLACED:
            said, caption = (), f"{caption} {text!r:.80}"
        image = sample.images[0] if sample.images else Image.new("RGB", (224, 28), "white")
        tiles.append(pictures.draw(image, predicted=said, true=sample.answer, caption=caption))
    return sheet(tiles, "held-out, greedy, before and after GRPO")


def demo_table(table: dict) -> str:
    """Accuracy of the answer alone, ± one standard error of a share."""
    lines = [f"held-out accuracy of the answer alone, {table['samples']} samples",
             f"{'':<9}{'cold start':>16}{'after GRPO':>16}{'gain':>14}{'factor':>9}"]
    for mode, after in table["after"].items():
        before, n = table["before"][mode], table["samples"]
        cells = [f"{100 * p:.1f} ± {100 * (p * (1 - p) / n) ** 0.5:.1f} %" for p in (before, after)]
        factor, gain = f"×{after / before:.2f}" if before else "-", 100 * (after - before)
        lines.append(f"{mode:<9}{cells[0]:>16}{cells[1]:>16}{gain:>+7.1f} points{factor:>9}")
    return "\n".join(lines)
