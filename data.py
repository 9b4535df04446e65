"""What a sample is: readers of published formats, coordinate scaling, and a drawn synthetic world.

    mix = open_data(["a.jsonl:0.7", "synthetic:counting?size=448x448&objects=1-6:0.3"], seed=0)
    mix[12345]   # a draw of an endless run, by (seed, 12345) alone; mix.at(0): plain order

A spec is FILE.jsonl, FORMAT:FILE (see FORMATS) or synthetic:TASK, then `?option=value&…` (fields
of FileSource or Synthetic), then `:weight`. A JSONL row is {"task", "question", "answer"}, perhaps
"image" or "images" (paths from the file's folder), and perhaps "id", "response", "system".

Qwen2.5-VL answers in pixels of the image AFTER its resize to multiples of 28. Images are resized
here, once; `scale` moves true answers into that frame and predictions back out. A box is
[x1, y1, x2, y2] by its edges: pixel columns 3 and 4 are x1 = 3, x2 = 5. Sizes are (width, height).
"""
import argparse
import io
import json
import math
import random
import re
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps

PLACED = ("grounding", "counting", "detection")  # tasks whose answers are places in the image
TASKS = (*PLACED, "ocr", "math", "choice")  # of all but the last, worlds are drawn
FAULTS = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError,
          ValueError)  # what data and options can raise


class DataError(ValueError):
    """A fault in data or in a spec: the message says where it is and what to do."""


@contextmanager
def blame(where, faults=FAULTS):
    """Whatever of `faults` goes wrong within becomes a DataError that begins with its place."""
    try:
        yield
    except faults as error:
        raise DataError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Sample:
    """One example; `answer` is in the frame of the resized first image."""
    id: str  # unique in its source
    task: str
    question: str  # the raw question or label; rewards.py puts the prompt around it
    answer: object  # box | points or a count | [{"bbox_2d", "label"}] | text
    images: tuple[Image.Image, ...] = ()  # RGB, sides are multiples of 28
    response: str | None = None  # a completion to imitate, if the data has one
    system: str | None = None

    @property
    def image_size(self):
        """(W, H) of the first image as the model sees it; None for text."""
        return self.images[0].size if self.images else None

# ---- §1 sizes, coordinates, pictures -------------------------------------------------------
def smart_resize(height, width, *, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280):
    """Qwen2.5-VL's rule: (height, width) in multiples of `factor`, the area within the limits."""
    sides = height, width  # the limits' defaults are those of Qwen's image processor
    if max(sides) > 200 * min(sides):
        raise DataError(f"an image of {width}x{height} pixels is longer than 200 : 1: crop it")
    rows, columns = (max(factor, round(side / factor) * factor) for side in sides)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, int(side / shrink / factor) * factor) for side in sides)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in sides)
    return rows, columns


def map_marks(answer, move):
    """The answer with `move` applied to each point [x, y] and box [x1, y1, x2, y2] in it."""
    if isinstance(answer, dict):
        return {key: map_marks(value, move) for key, value in answer.items()}
    if not isinstance(answer, (list, tuple)):
        return answer  # counts and texts are nowhere
    mark = len(answer) in (2, 4) and all(isinstance(value, (int, float)) for value in answer)
    return move(answer) if mark else [map_marks(item, move) for item in answer]


def scale(answer, from_size, to_size):
    """Move a point, a box or a whole answer from a frame of (W, H) to another one."""
    if tuple(from_size) == tuple(to_size):
        return answer
    factors = [new / old for new, old in zip(to_size, from_size)] * 2
    return map_marks(answer, lambda mark: [v * factor for v, factor in zip(mark, factors)])


def load_image(source):
    """An upright RGB image from a path or from encoded bytes; DataError for what is unreadable."""
    broken = *FAULTS, SyntaxError, Image.DecompressionBombError  # Syntax: of a broken PNG chunk
    with blame(f"image {str(source)[:99]} is unusable, replace it", broken):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # Bombs, before anything is decoded; floating-point pixels have no agreed white.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS or image.mode == "F":
                raise ValueError(f"{image.width}x{image.height} pixels of mode {image.mode}")
            image = ImageOps.exif_transpose(image)  # cameras may store it lying; boxes are upright
    if image.mode.startswith("I"):  # 16 bits: convert() would clip them to an all-white picture
        grey = np.clip(image, 0, 65535)
        image = Image.fromarray((grey // (257 if grey.max() > 255 else 1)).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def draw(image, *, predicted=(), true=(), caption=""):
    """`image`, enlarged if small: predicted marks in magenta over true ones in cyan; a caption."""
    zoom = max(1, 448 // max(image.size))
    picture = ImageOps.scale(image, zoom, Image.Resampling.NEAREST)
    unit = max(picture.size) // 224 + 1  # lines and letters grow with the picture
    lines = textwrap.wrap(caption, max(8, picture.width // (5 * unit)))
    sheet = ImageOps.expand(picture, (0, 0, 0, 9 * unit * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((unit, picture.height), "\n".join(lines), "black", font_size=7 * unit)

    def paint(mark, colour, line):
        if all(abs(value) < 1e9 for value in mark):  # and a number at all
            corners = np.clip(np.reshape(mark, (-1, 2)), -9, np.add(image.size, 9)) * zoom
            grow = 2 * line if len(mark) == 2 else 0  # a point is a small square
            pen.rectangle((*corners.min(0) - grow, *corners.max(0) + grow), None, colour, line)

    map_marks(true, lambda mark: paint(mark, "#00d0ff", 2 * unit))
    map_marks(predicted, lambda mark: paint(mark, "#ff00c0", unit))
    return sheet

# ---- §2 files: from published formats to samples -------------------------------------------
def read_rows(path):
    """("file:line", row) of a .json list, a .parquet file, or JSONL under any other name."""
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise DataError("a pickle can run any code when read, so use this data as JSON or parquet")
    if path.suffix == ".parquet":
        with blame("parquet needs pyarrow (pip install pyarrow)", ImportError):
            from pyarrow import parquet
        rows = parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        rows = json.loads(path.read_bytes())
        if not isinstance(rows, list):
            raise DataError("a JSON list of rows is expected; COCO annotations open as coco:FILE")
    else:  # lines stay bytes here: each is parsed where its fault can be noted
        with path.open("rb") as file:
            yield from ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
        return
    yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows, 1))


def read_coco(path):
    """COCO instances, a row an image; crowds and boxes without area are no objects to find."""
    coco = json.loads(path.read_bytes())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = {image["id"]: [] for image in coco["images"]}
    for item in coco["annotations"]:
        x, y, w, h = item["bbox"]
        if not item.get("iscrowd") and w > 0 and h > 0:
            label = names[item["category_id"]]
            found[item["image_id"]].append({"bbox_2d": [x, y, x + w, y + h], "label": label})
    for image in coco["images"]:
        row = {"id": image["id"], "image": image["file_name"], "answer": found[image["id"]]}
        yield f"{path}: image {image['id']}", row | {"question": ", ".join(names.values())}


def read_chat(row, fields):
    """A reasoning trace: named fields, or chat messages with one question and one answer."""
    if messages := row.get("messages") or row.get("conversations"):
        turns = [(m.get("role") or m["from"], m.get("content") or m["value"]) for m in messages]
        said = {{"human": "user", "gpt": "assistant"}.get(who, who): text for who, text in turns}
        if len(said) < len(turns) or not {"user", "assistant"} <= set(said):
            raise DataError("one user and one assistant message are expected: split the dialogue")
        fields.update(question=said["user"], response=said["assistant"], system=said.get("system"))
    return fields | {"answer": fields["answer"] or ""}  # imitation needs none


def read_fox(row, fields):
    """Fox PageOCR: the page's text is the second turn; the folder follows the language."""
    name, page = row["image"], row["conversations"][1]["value"]
    return fields | {"question": "", "answer": page, "image": f"{name[:2]}_pdf_png/{name}"}


def read_exam(row, fields):
    """MathVision and MathVerse: a letter where the row has options, else a value."""
    if row.get("problem_version", "Vision Only") != "Vision Only":  # the part that OVR reports
        return None
    question = fields["question"] or "Answer the question in the image."  # vision-only: no other
    question = re.sub(r"<image\d*>\s*", "", question).strip()
    options, letters = list(row.get("options") or []), list("ABCDEFGHIJKLMNOP")
    if options != letters[: len(options)]:  # else they are in the image
        question += "".join(f"\n{letter}. {text}" for letter, text in zip(letters, options))
    choice = options or row.get("question_type") == "multi-choice"
    return fields | {"question": question, "task": "choice" if choice else "math"}


FORMATS = {  # fields of FileSource; "a|b" is a, or b where a is missing or empty
    "jsonl": {},
    "refcoco": {"task": "grounding", "question": "captions", "answer": "bbox", "id": "ref_id"},
    "refcoco-vlmr1": {"task": "grounding", "answer": "solution"},
    "refcoco-pr1": {"task": "grounding", "answer": "normalized_solution|solution", "frame": "1000"},
    "pixmo-count": {"task": "counting", "question": "label", "answer": "points|count"},  # by hash
    "pixmo-pr1": {"task": "counting", "question": "label|question|problem", "frame": "1000",
                  "answer": "clicks|ground_truth|solution"},
    "fox": {"task": "ocr", "id": "image", "adapt": read_fox},
    "coco": {"task": "detection", "read": read_coco},
    "math500": {"task": "math", "id": "unique_id|id"},  # and AIME
    "mathvision": {"image": "decoded_image|image", "adapt": read_exam},
    "mathverse": {"id": "sample_index", "adapt": read_exam},
    "traces": {"task": "math", "question": "problem|question|prompt", "adapt": read_chat,
               "response": "response|generation|solution"}}


def read_answer(task, answer):
    """The answer in its task's one spelling; ValueError and the like say what does not fit."""
    def box(values):
        x1, y1, x2, y2 = map(float, values)
        if x1 == x2 or y1 == y2:
            raise ValueError("a box has no area")
        return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]

    if task in PLACED and isinstance(answer, str):
        answer = json.loads(answer)  # some files keep the list as text
    if task == "grounding":
        return box(answer)
    if task == "detection":
        return [{"bbox_2d": box(item["bbox_2d"]), "label": str(item["label"])} for item in answer]
    if task == "counting" and isinstance(answer, list):
        points = [(p["x"], p["y"]) if isinstance(p, dict) else p for p in answer]
        return [[float(x), float(y)] for x, y in points]
    if task == "counting":
        return int(answer)
    if answer is None:
        raise ValueError("it is missing")
    letter = re.fullmatch(r"\(?([A-Za-z])[).]?", str(answer).strip())
    if task == "choice" and not letter:
        raise ValueError("one letter is needed")
    return letter[1].upper() if task == "choice" else str(answer)


def fit(sample, images, *, frame="pixels", **limits):
    """The sample with resized images; its answer moves from `frame` along with the first one."""
    sizes = [smart_resize(image.height, image.width, **limits)[::-1] for image in images]
    answer = sample.answer
    if images and sample.task in PLACED:
        size, marks = images[0].size if frame == "pixels" else (float(frame),) * 2, []
        map_marks(answer, marks.append)
        for mark in marks:  # annotators pass the border by a pixel or so: one in a hundred is fine
            if not all(-1 - s / 100 <= v <= 1.01 * s + 1 for v, s in zip(mark, size * 2)):
                raise DataError(f"answer {mark} is outside of its frame {size}: is it ?frame=1000")
        answer = scale(answer, size, sizes[0])
    resized = tuple(image.resize(size) for image, size in zip(images, sizes))  # bicubic, as Qwen
    return replace(sample, answer=answer, images=resized)


@dataclass
class FileSource:
    """The samples of a file, images read when asked for; `faults`: "file:line: why" of bad rows."""
    path: str
    task: str = ""  # "": each row names its own
    question: str = "question|problem"  # each one of a list is a sample
    answer: str = "answer"
    image: str = "images|image|image_path|image_sha256"  # path, bytes or a list of them
    id: str = "id"
    response: str = "response"
    system: str = "system"
    frame: str = "pixels"  # of the answer: pixels of the stored image, or N: both axes are 0 … N
    folder: str = "."  # where images lie, from the file's folder
    allow_outside: str = ""  # any text: images may lie elsewhere too
    in_order: str = ""  # any text: drawn in the file's order, as a curriculum is
    read: object = read_rows
    adapt: object = None  # what field names cannot say: the fields, or None without a sample
    limits: dict = field(default_factory=dict)  # min_pixels, max_pixels

    def __post_init__(self):
        self.samples, self.faults, taken = [], [], {}
        for number, (where, raw) in enumerate(self.read(Path(self.path)), 1):
            try:
                for sample, images in self.check(raw, f"{Path(self.path).stem}-{number}"):
                    if taken.setdefault(sample.id, where) != where:
                        raise DataError(f"id {sample.id!r} is taken by {taken[sample.id]}")
                    self.samples.append((where, sample, images))
            except FAULTS as error:
                kind = "" if isinstance(error, DataError) else "not a row of this format: "
                self.faults.append(f"{where}: {kind}{error}")
        if not self.samples and not self.faults:
            raise DataError("there are no samples in this file")

    def check(self, raw, name):
        """[(sample, what its images open from)] of a row, in all that needs no image opened."""
        row = json.loads(raw) if isinstance(raw, bytes) else raw
        fields = {"task": self.task or row.get("task")}
        for ours in ("question", "answer", "image", "id", "response", "system"):
            values = [row.get(theirs) for theirs in getattr(self, ours).split("|")]
            fields[ours] = ([v for v in values if v not in (None, "", [])] or values)[0]
        fields = self.adapt(row, fields) if self.adapt else fields
        if fields is None:
            return []
        task, images, asked = fields["task"], fields.pop("image") or [], fields["question"]
        images = [self.find(i) for i in (images if isinstance(images, list) else [images])]
        if task not in TASKS:
            raise DataError(f"task {task!r} is none of {', '.join(TASKS)}: try ?task=NAME")
        if not images and task in (*PLACED, "ocr"):
            raise DataError(f"{task} needs an image: is its field named otherwise?")
        with blame(f"answer {str(fields['answer'])[:60]!r} does not fit {task}"):
            fields["answer"] = read_answer(task, fields["answer"])
        name, samples = name if fields["id"] is None else fields["id"], []
        asked = asked if isinstance(asked, list) else [asked]
        for part, question in enumerate(asked):
            fields |= {"question": question, "id": f"{name}-{part}" if asked[1:] else str(name)}
            for key, kind in (("question", str), ("response", str | None), ("system", str | None)):
                if not isinstance(fields[key], kind):
                    raise DataError(f"{key} is not text but {fields[key]!r}: what is its field?")
            samples.append((Sample(**fields), images))
        return samples

    def find(self, image):
        """What to open: the bytes of an image, or its file, which may not leave the folder."""
        if isinstance(image, dict):  # parquet
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return image
        root = (Path(self.path).parent / self.folder).resolve()
        found = (root / image).resolve()
        if not (self.allow_outside or found.is_relative_to(root)) or not found.is_file():
            raise DataError(f"no image {image!r} in {root}: set ?folder=DIR or ?allow_outside=1")
        return str(found)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        where, sample, images = self.samples[item]
        with blame(where):
            return fit(sample, [*map(load_image, images)], frame=self.frame, **self.limits)

# ---- §3 the drawn world --------------------------------------------------------------------
COLOURS = {"red": (220, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 220),
           "yellow": (240, 195, 20), "purple": (150, 50, 180), "black": (30, 30, 30)}
SHAPES = {  # outlines as in SVG, on a grid of 0 … 100; the circle needs none
    "circle": "", "square": "0,0 100,0 100,100 0,100", "triangle": "50,0 100,100 0,100",
    "cross": "33,0 67,0 67,33 100,33 100,67 67,67 67,100 33,100 33,67 0,67 0,33 33,33",
    "star": "50,0 62,36 100,38 70,61 81,100 50,78 19,100 30,61 0,38 38,36",
    "diamond": "50,0 100,50 50,100 0,50"}
WORDS = ("river", "stone", "lamp", "green", "seven", "winter", "paper", "cloud", "train", "music")


def paint_shapes(image, things, reach, rng):
    """Draw (colour, shape) pairs apart from each other; returns their tight boxes."""
    pen, boxes = ImageDraw.Draw(image), []
    for colour, shape in things:
        side = round(rng.uniform(*reach) * min(image.size))
        for tries in range(1, 2000):
            x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            if all(x > right + 1 or x + side < left - 1 or y > bottom + 1 or y + side < top - 1
                   for left, top, right, bottom in boxes):
                break
            side = max(5, side * 9 // 10) if tries % 50 == 0 else side  # crowded: smaller
        else:
            raise DataError(f"{len(things)} shapes do not fit in {image.size}: ask for fewer")
        end = side - 1  # Pillow draws the outline's own pixels too: 0 … end are `side` pixels
        if shape == "circle":
            pen.ellipse((x, y, x + end, y + end), COLOURS[colour])
        else:
            points = [map(int, point.split(",")) for point in SHAPES[shape].split()]
            outline = [(x + round(u * end / 100), y + round(v * end / 100)) for u, v in points]
            pen.polygon(outline, COLOURS[colour])
        boxes.append([x, y, x + side, y + side])
    return boxes


@dataclass(frozen=True)
class Synthetic:
    """Drawn scenes with exact answers: item i follows from the fields that repr shows, and i.
    grounding: the box of "red circle", the only one; counting: the centres of all "red circles";
    detection: every shape by name; ocr: printed words; math: a sum, printed or as text.
    `objects`: how many are asked for (ocr: lines, math: numbers)."""
    task: str
    size: tuple[int, int] = (84, 84)  # (W, H) as drawn
    objects: tuple[int, int] = (1, 4)  # lowest, highest
    distractors: tuple[int, int] = (1, 3)  # how many other shapes
    reach: tuple[float, float] = (0.15, 0.3)  # a shape's part of the shorter side
    clutter: float = 0.0  # 0 … 1
    shapes: int = len(SHAPES)  # the first so many of SHAPES and of COLOURS
    colours: int = len(COLOURS)
    text: int = 0  # 1: math without an image
    seed: int = 0
    split: str = "train"  # another split is another stream
    count: int = field(default=100_000, repr=False)  # samples in one pass
    limits: dict = field(default_factory=dict, repr=False)  # min_pixels, max_pixels

    def __post_init__(self):
        if self.task not in TASKS[:-1]:
            raise DataError(f"no task {self.task!r} is drawn, but {', '.join(TASKS[:-1])}")
        self[0]  # options that no scene can have show here and not in the middle of a run

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        rng = random.Random(f"{self!r} {range(self.count)[item]}")  # IndexError after the last
        image = Image.new("RGB", self.size, (rng.randint(232, 255),) * 3)
        pen, thick = ImageDraw.Draw(image), 1 + min(self.size) // 100
        for _ in range(round(20 * self.clutter)):  # pale lines, in no colour that a question names
            ends = [rng.randint(0, side - 1) for side in self.size * 2]
            pen.line(ends, tuple(rng.randint(165, 225) for _ in "rgb"), rng.randint(1, 3) * thick)
        make = self.printed if self.task in ("ocr", "math") else self.scene
        question, answer = make(image, rng.randint(*self.objects), rng)
        name = f"synthetic-{self.task}-{self.split}-{item}"
        images = [] if self.text and self.task == "math" else [image]
        return fit(Sample(name, self.task, question, answer), images, **self.limits)

    def scene(self, image, count, rng):
        """(question, answer) about shapes; every other distractor shares the colour or shape."""
        labels = [(c, s) for c in [*COLOURS][: self.colours] for s in [*SHAPES][: self.shapes]]
        target = colour, shape = rng.choice(labels)
        others = [label for label in labels if label != target]
        close = [label for label in others if label[0] == colour or label[1] == shape] or others
        extra = [rng.choice((others, close)[k % 2]) for k in range(rng.randint(*self.distractors))]
        things = [target] * (1 if self.task == "grounding" else count) + extra
        things = rng.choices(labels, k=count) if self.task == "detection" else things
        rng.shuffle(things)  # later ones are smaller in a crowd: that must not tell the target
        placed = paint_shapes(image, things, self.reach, rng)
        if self.task == "detection":
            found = [{"bbox_2d": box, "label": name} for box, (_, name) in zip(placed, things)]
            return ", ".join([*SHAPES][: self.shapes]), found
        boxes = [box for box, thing in zip(placed, things) if thing == target]
        if self.task == "grounding":
            return f"{colour} {shape}", boxes[0]
        plural = f"{colour} {shape}{'es' if shape == 'cross' else 's'}"  # "circle" would mean 1
        return plural, [[(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in boxes]

    def printed(self, image, count, rng):
        """(question, answer) of words, or of a sum with a number a line: small images hold it."""
        if self.task == "ocr":
            most = max(1, min(5, image.width // 100))
            lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, most)))
                     for _ in range(max(1, count))]
            question, answer = "", "\n".join(lines)
        else:
            first, *rest = (rng.choice((-1, 1)) * rng.randint(1, 20) for _ in range(max(2, count)))
            lines = [str(first), *(f"{'-' if n < 0 else '+'} {abs(n)}" for n in rest)]
            shown = " ".join(lines) if self.text else "the result of the sum in the image"
            question, answer = f"What is {shown}?", str(first + sum(rest))
        from matplotlib import get_data_path  # it brings the font
        font, text = Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), "\n".join(lines)
        pen, size, spare = ImageDraw.Draw(image), image.height / 3, (-1, -1)
        while min(spare) < 0 and size > 6:  # as large as it fits
            size *= 0.9
            face = ImageFont.truetype(font, size)
            left, top, right, bottom = pen.multiline_textbbox((0, 0), text, face)
            spare = image.width - right + left, image.height - bottom + top
        x, y = (rng.randint(0, max(0, int(pixels))) for pixels in spare)
        pen.multiline_text((x - left, y - top), text, (20, 20, 20), face)
        return question, answer

# ---- §4 mixing and checking ----------------------------------------------------------------
class Mixture:
    """Sources as one endless run: `m[k]` is draw k, `m.at(i)` plain order, `m.faults` bad rows.
    A draw follows from (seed, k) alone: one integer is a run's data cursor. Draws come in shuffled
    blocks, a pass over everything or 1000 draws split by weight; each source shuffled by pass."""
    def __init__(self, sources, weights=None, *, seed=0, skip_bad=0):
        self.sources, self.seed, self.skip_bad, self.orders = sources, seed, skip_bad, {}
        self.faults = [fault for source in sources for fault in getattr(source, "faults", ())]
        edges = np.cumsum([0, *(weights or map(len, sources))])
        edges = np.round(edges / edges[-1] * 1000).astype(int) if weights else edges
        self.block = np.repeat(np.arange(len(sources)), np.diff(edges))

    def __len__(self):
        return sum(map(len, self.sources))

    def at(self, index):
        """Sample `index` of one pass, the sources one after the other."""
        for source in self.sources:
            if 0 <= index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError("beyond the last sample")

    def __getitem__(self, draw):
        """Draw number `draw`; in place of a bad one, while --skip-bad allows it, one far ahead."""
        try:
            return self.pick(draw)
        except DataError as error:
            self.faults += [str(error)] if str(error) not in self.faults else []
            if len(self.faults) > self.skip_bad:
                raise
            print(f"left out: {error}", file=sys.stderr)
            return self[draw + 10**9]

    def pick(self, draw):
        block, slot = divmod(draw, len(self.block))
        names = self.shuffled(len(self.sources), block, self.block)
        source = self.sources[name := int(names[slot])]
        earlier = block * np.sum(self.block == name) + np.sum(names[:slot] == name)
        again, place = divmod(int(earlier), len(source))
        if not getattr(source, "in_order", ""):
            place = self.shuffled(name, again, len(source))[place]
        return source[int(place)]

    def shuffled(self, stream, again, items):
        """Items (n: 0 … n - 1) in the order of one pass, kept until the stream's next pass."""
        if self.orders.get(stream, (None,))[0] != again:
            rng = np.random.default_rng((self.seed, stream, again))
            self.orders[stream] = again, rng.permutation(items)
        return self.orders[stream][1]


def open_source(spec, fields, limits, **drawn):
    """The source of `format:target?option=value&…`; `drawn` are options of synthetic scenes."""
    name, target, query = re.fullmatch(r"(?:([\w-]+):)?([^?]*)\??(.*)", spec).groups("jsonl")
    options = dict(parse_qsl(query))
    if name in FORMATS:
        renamed = dict(pair.split("=") for pair in fields.split(",") if pair)  # "ours=theirs,…"
        return FileSource(target, **(FORMATS[name] | renamed | options), limits=limits)
    if name != "synthetic":
        raise DataError(f"{name!r} is none of {', '.join(FORMATS)}, synthetic")
    for key, text in options.items():  # "84x84", "1-4" or "0.5"
        parts = [float(part) if "." in part else int(part) for part in re.split("[x-]", text)]
        pair = key in ("size", "objects", "distractors", "reach")
        drawn[key] = (parts[0], parts[-1]) if pair else parts[0]
    return Synthetic(target, **drawn, limits=limits)


def open_data(specs, *, seed=0, split="train", fields="", skip_bad=0, **limits):
    """The Mixture of all specs; DataError if one is wrong or more than `skip_bad` rows are bad."""
    sources, weights = [], []
    for spec in specs:
        body, weight = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", spec).groups()
        weights += [float(weight)] if weight else []
        with blame(f"in {spec!r}"):
            sources.append(open_source(body, fields, limits, seed=seed, split=split))
    if not sources or len(weights) not in (0, len(sources)):
        raise DataError(f"give a weight to each of {specs} or to none of them")
    mix = Mixture(sources, weights, seed=seed, skip_bad=skip_bad)
    if len(mix.faults) > skip_bad:
        faults = "\n".join(mix.faults[:10])
        raise DataError(f"{len(mix.faults)} bad rows; correct or --skip-bad them:\n{faults}")
    drawn = [n for n in np.unique(mix.block) if len(sources[n])]
    if len(drawn) < len(sources) and skip_bad < math.inf:
        raise DataError(f"in {specs} one has no good row or a weight under 1/1000")
    return mix


def check(specs, **options):
    """Every fault of a data set as "file:line: sentence", its images decoded one by one."""
    try:
        mix = open_data(specs, **options | {"skip_bad": math.inf})
    except DataError as error:  # of a spec or a whole file
        return [str(error)]
    for index in range(len(mix)):
        try:
            mix.at(index)
        except DataError as error:
            mix.faults.append(str(error))
    return mix.faults

# ---- §5 options: presets, saved configs, the command line -----------------------------------
def check_options(config):
    """Errors: ValueError naming the option, its value, and what it may be."""
    whole = ("prompts", "group", "max_tokens", "inner_steps", "micro_tokens", "steps", "batch",
             "keep", "save_every", "eval_samples", "max_bad_steps")
    for f in fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        choices = getattr(f.type, "__args__", ()) if isinstance(value, str) else (value,)
        if choices and value not in choices:
            raise ValueError(f"{flag} is {value!r}; choose from {', '.join(choices)}")
        if (f.name in whole and value < 1) or (f.name in ("temperature", "lr") and value <= 0):
            raise ValueError(f"{flag} is {value}; it must be {1 if f.name in whole else 'above 0'}")


def parse_config(config_class, arguments, presets: dict, text: str, gpu: bool):
    """Defaults < --preset < --config FILE < command line, each option's help the comment beside it.
    Without a GPU, and with none of --preset, --config and --model, the preset is "tiny"."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets)
    first.add_argument("--config", type=Path)
    chosen, rest = first.parse_known_args(arguments)
    if not (chosen.preset or chosen.config or "--model" in rest or gpu):
        chosen.preset = "tiny"
    try:
        saved = json.loads(chosen.config.read_text()) if chosen.config else {}
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        text += f"\n--preset {' | '.join(presets)}; --config FILE: a run's config.json"
        default = config_class(**(presets.get(chosen.preset, {}) | saved))
        return tyro.cli(config_class, args=rest, default=default, description=text)
    except (OSError, ValueError, TypeError) as error:
        first.error(str(error))
