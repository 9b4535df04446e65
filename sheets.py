"""What do samples look like? Sheets of them: what was said, on the image that it was said of.

§1 a page of tiles · §2 answers on images · §3 a run's samples · §4 before and after

A run folder's samples/ holds step-N.json, a row a completion with its step, draw, image, text,
reward and parts, beside the images that it names.
"""
import json
import math
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont

import pictures
import rewards

# §1 ──────────────────────────────────── a page of tiles ─────────────────────────────────────
WIDTH, GAP = 230, 10  # pixels of a tile, and between tiles
HEADING, TITLE, FACT, TEXT = 44, 24, 18, 15  # pixels that a line of these takes
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
        height = max(tile.height for tile in tiles)
        if title:
            height += TITLE
        heights.append(height)
    columns = max(len(tiles) for _, tiles in rows)
    tiles_width = columns * (WIDTH + GAP)
    heading_width = math.ceil(font.getlength(heading)) + GAP
    width = GAP + max(tiles_width, heading_width)
    page = Image.new("RGB", (width, HEADING + sum(heights)), "#ececec")
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 12), heading, "black", font)
    top = HEADING
    for (title, tiles), height in zip(rows, heights):
        tiles_top = top
        if title:
            pen.text((GAP, top), title, "black", font_size=15)
            tiles_top = top + TITLE
        for column, tile in enumerate(tiles):
            left = GAP + column * (WIDTH + GAP)
            put(page, pen, tile, (left, tiles_top))
        top += height
    return page


def put(page: Image.Image, pen, tile: Tile, corner: tuple[int, int]) -> None:
    """A tile's picture at `corner`, its lines below."""
    left, top = corner
    page.paste(tile.picture, corner)
    top += tile.picture.height + 2
    pen.text((left, top), tile.fact, "black", font_size=13)
    text = "\n".join(tile.said)
    pen.multiline_text((left, top + FACT), text, "#555555", font_size=12, spacing=3)


def in_lines(text: str, count: int) -> list[str]:
    """At most so many lines of a tile's width, white space folded."""
    folded = " ".join(text.split())
    lines = textwrap.wrap(folded, 38)
    if len(lines) > count:
        last = lines[count - 1]
        lines[count - 1] = f"{last[:36]} …"
    return lines[:count]


# §2 ─────────────────────────────────── answers on images ────────────────────────────────────
def in_tile(image, width: int = WIDTH) -> Image.Image:
    """The image so many pixels wide, its height in proportion; a blank one for None."""
    if image is None:
        return Image.new("RGB", (width, 28), "white")
    height = max(1, image.height * width // image.width)
    method = Image.Resampling.LANCZOS
    if image.width < width:  # a small image's pixels stay sharp
        method = Image.Resampling.NEAREST
    return image.resize((width, height), method)


def marked(image, task: str, text: str, answer, image_size) -> Image.Image:
    """The image in a tile's width; what was said and what is true on it, where these are places."""
    picture = in_tile(image)
    if image is None:
        return picture
    frame = image_size or image.size
    said = rewards.parse_places(task, text, frame)
    said = pictures.scale(said, frame, picture.size)
    true = pictures.scale(answer, frame, picture.size)
    return pictures.draw(picture, predicted=said, true=true)


PALE = 0.4  # what one answer's marks cover; eight at one place cover 1 − 0.6⁸ = 98 %


def cloud(image, task: str, texts: list[str], answer, image_size, width=WIDTH) -> Image.Image:
    """All answers over the image, each so pale that only many at one place make a clear line.

    So a policy that knows shows one sharp box where another one shows a cloud. Width: 225 or more.
    """
    picture = in_tile(image, width)
    if image is None:
        return picture
    frame = image_size or image.size
    true = pictures.scale(answer, frame, picture.size)
    picture = pictures.draw(picture, true=true)
    for text in texts:
        said = rewards.parse_places(task, text, frame)
        said = pictures.scale(said, frame, picture.size)
        over = pictures.draw(picture, predicted=said)
        picture = Image.blend(picture, over, PALE)
    return picture


# §3 ──────────────────────────────────── a run's samples ─────────────────────────────────────
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
    if first["task"] not in rewards.PLACED:
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
    facts = [f"step {row['step']}", f"reward {row['reward']:.2f}"]
    parts = row["parts"]
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


# §4 ──────────────────────────────────── before and after ────────────────────────────────────
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
    metric = rewards.metric_name([sample.task])
    fact = f"scene {number}: mean {metric} {mean:.2f}"
    said = in_lines(sample.question or sample.task, 1)
    if sample.task not in rewards.PLACED:
        said += in_lines(f"true: {sample.answer}", 1)
        for text, count in Counter(texts).most_common(3):
            said += in_lines(f"{count} x {text}", 1)
    image = None
    if sample.images:
        image = sample.images[0]
    picture = cloud(image, sample.task, texts, sample.answer, sample.image_size)
    return Tile(picture, fact, said)
