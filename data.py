"""What a sample is: readers of published formats, coordinate scaling, and a drawn synthetic world.

    mix = open_data(["a.jsonl:0.7", "synthetic:counting?size=448x448&objects=1-6:0.3"], seed=0)
    mix[12345]   # draw 12,345 of an endless run, a pure function of (seed, 12345)
    mix.at(0)    # plain order, for evaluation; len(mix) is one pass

A spec is FILE.jsonl, FORMAT:FILE (see FORMATS) or synthetic:TASK, then `?option=value&…` (fields of
`Format` or of `Synthetic`), then `:weight`. A JSONL row is {"task", "question", "answer", "image" or
"images" or neither} and perhaps "id", "response", "system"; paths start at the file.

Qwen2.5-VL answers in pixels of the image AFTER its resize to multiples of 28. Images are resized
here, once; `scale` moves true answers into that frame and predictions back out. A box is
[x1, y1, x2, y2] by its edges: pixel columns 3 and 4 are x1 = 3, x2 = 5. Sizes are (width, height).
"""

import io
import json
import math
import random
import re
import string
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

TASKS = ("grounding", "counting", "detection", "ocr", "math", "choice")
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # the defaults of Qwen's image processor


class DataError(ValueError):
    """A fault in data or in a spec: the message says where it is and what to do."""


@dataclass(frozen=True)
class Sample:
    """One example; `answer` is in the frame of the resized first image."""

    id: str  # unique in its source
    task: str
    question: str  # the raw question or label; rewards.py puts the prompt around it
    answer: object  # box | points or a count | [{"bbox_2d", "label"}] | text
    images: tuple[Image.Image, ...] = ()  # RGB, sides are multiples of 28
    original_sizes: tuple[tuple[int, int], ...] = ()  # (W, H) before the resize
    response: str | None = None  # a completion to imitate, if the data has one
    system: str | None = None

    @property
    def image_size(self):
        """(W, H) of the first image as the model sees it; None for text."""
        return self.images[0].size if self.images else None


# ---- §1 sizes and coordinates --------------------------------------------------------------


def smart_resize(height, width, *, factor=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS):
    """Qwen2.5-VL's rule, in Qwen's order: (height, width) in multiples of `factor`.

    The area ends up within the limits. Raises DataError for an image longer than 200 : 1.
    """
    if max(height, width) > 200 * min(height, width):
        raise DataError(f"an image of {width}x{height} pixels is longer than 200 : 1; crop it")
    sides = height, width
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
    factors = [to / old for to, old in zip(to_size, from_size, strict=True)] * 2
    return map_marks(answer, lambda mark: [v * factor for v, factor in zip(mark, factors)])


scale_points = scale_boxes = scale


# ---- §2 images -----------------------------------------------------------------------------


def load_image(source):
    """An upright 8-bit RGB image from a path or from encoded bytes; transparency becomes white.

    Raises DataError for what cannot be read whole and for more pixels than Pillow's bomb limit.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # before anything is decoded
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            if image.mode == "F":
                raise ValueError("floating-point pixels have no agreed white")
            # A camera may store the picture lying; people drew their boxes on the upright one.
            image = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, OSError, SyntaxError,
            ValueError) as error:  # SyntaxError: Pillow's word for a broken PNG chunk
        raise DataError(f"image {str(source)[:99]} is unusable ({error}): replace it") from error
    if image.mode.startswith("I"):  # 16 bits: convert() would clip them to an all-white picture
        grey = np.asarray(image, dtype=np.int64)
        grey = grey // (257 if grey.max() > 255 else 1)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def resize_image(image, **limits):
    """The image at `smart_resize`'s size, bicubic as in Qwen's processor."""
    height, width = smart_resize(image.height, image.width, **limits)
    same = (width, height) == image.size
    return image if same else image.resize((width, height), Image.Resampling.BICUBIC)


# ---- §3 formats: from a file's rows to our fields ------------------------------------------


def read_rows(path):
    """("file:line", row) of a .json list, a .parquet file, or JSONL under any other name."""
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise DataError("a pickle can run any code while it is read, so it is refused: take the "
                        "JSON or parquet form of this data (refcoco-vlmr1:, refcoco:, coco:)")
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise DataError("parquet needs pyarrow: pip install pyarrow") from error
        rows = parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        rows = json.loads(path.read_bytes())
        if not isinstance(rows, list):
            raise DataError("a JSON list of rows is expected; COCO annotations open as coco:FILE")
    else:
        with path.open("rb") as file:  # bytes: each line is parsed where its fault can be noted
            yield from ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
        return
    yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows, 1))


def read_coco(path):
    """COCO instances, a row an image; crowds and boxes without area are no objects to find."""
    coco = json.loads(path.read_bytes())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    question = ", ".join(names.values())
    rows = {image["id"]: {"id": image["id"], "image": image["file_name"], "question": question,
                          "answer": []} for image in coco["images"]}
    for item in coco["annotations"]:
        x, y, w, h = item["bbox"]
        if not item.get("iscrowd") and w > 0 and h > 0:
            box = {"bbox_2d": [x, y, x + w, y + h], "label": names[item["category_id"]]}
            rows[item["image_id"]]["answer"].append(box)
    yield from ((f"{path}: image {key}", row) for key, row in rows.items())


def pick(row, names):
    """The first filled field of "a|b", else the first that is there at all, else None."""
    values = [row[name] for name in names.split("|") if row.get(name) is not None]
    filled = [value for value in values if value != "" and value != []]
    return (filled or values or [None])[0]


def plain_rows(row, form):
    """The one sample of a row that only names its fields differently."""
    ours = ("question", "answer", "image", "id", "response", "system")
    picked = {name: pick(row, getattr(form, name)) for name in ours}
    return [picked | {"task": form.task or row.get("task")}]


def sentence_rows(row, form):
    """RefCOCO as parquet: one box with several sentences, each a sample."""
    sentences = row.get("captions") or [item["sent"] for item in row["sentences"]]
    return [plain_rows(row, form)[0] | {"question": sentence} for sentence in sentences]


def chat_rows(row, form):
    """A reasoning trace: named fields, or chat messages with one question and one answer."""
    (plain,) = plain_rows(row, form)
    messages = row.get("messages") or row.get("conversations")
    if messages:
        turns = [(m.get("role") or m["from"], m.get("content") or m["value"]) for m in messages]
        said = {{"human": "user", "gpt": "assistant"}.get(who, who): text for who, text in turns}
        if len(said) < len(turns) or not {"user", "assistant"} <= set(said):
            raise DataError("one user and one assistant message are expected: split the dialogue")
        plain |= {"question": said["user"], "response": said["assistant"]}
        plain["system"] = said.get("system")
    return [plain | {"answer": plain["answer"] or ""}]  # imitation needs none


def fox_rows(row, form):
    """Fox PageOCR: the page's text is the second turn; the folder follows the language."""
    (plain,) = chat_rows(row, form)
    image = f"{row['image'][:2]}_pdf_png/{row['image']}"
    return [plain | {"question": "", "answer": plain["response"], "response": None, "image": image}]


def option_rows(row, form):
    """MathVision and MathVerse: a letter where the row has options, else a value."""
    if row.get("problem_version", "Vision Only") != "Vision Only":  # the part that OVR reports
        return []
    (plain,) = plain_rows(row, form)
    options = row.get("options") or []
    question = plain["question"] or "Answer the question in the image."  # vision-only: no other
    question = re.sub(r"<image\d*>\s*", "", question).strip()
    if list(options) != list(string.ascii_uppercase[: len(options)]):  # else they are in the image
        lettered = zip(string.ascii_uppercase, options, strict=False)
        question = "\n".join([question, *(f"{letter}. {text}" for letter, text in lettered)])
    choice = options or row.get("question_type") == "multi-choice"
    return [plain | {"question": question, "task": "choice" if choice else "math"}]


@dataclass(frozen=True)
class Format:
    """How a file spells our fields: "a|b" is a, or b where a is missing or empty."""

    task: str = ""  # "": each row names its own
    question: str = "question"
    answer: str = "answer"
    image: str = "images|image"  # a path, encoded bytes, or a list of them
    id: str = "id"
    response: str = "response"
    system: str = "system"
    frame: str = "pixels"  # of the answer: pixels of the stored image, or N: both axes are 0 … N
    folder: str = "."  # where images lie, from the file's folder
    allow_outside: str = ""  # any text: images may lie elsewhere too
    rows: Callable = plain_rows  # what a row of this table cannot say
    read: Callable = read_rows


FORMATS = {
    "jsonl": Format(),
    # jxu124/refcoco as parquet; the JSON of VLM-R1 in pixels; that of Perception-R1 in 0 … 1000
    "refcoco": Format("grounding", answer="bbox", image="image_path|image", id="ref_id",
                      rows=sentence_rows),
    "refcoco-vlmr1": Format("grounding", "problem", "solution"),
    "refcoco-pr1": Format("grounding", "problem", "normalized_solution|solution", frame="1000"),
    # the hub's parquet, each image stored as a file named by its hash; Perception-R1's JSON and JSONL
    "pixmo-count": Format("counting", "label", "points|count", "image|image_sha256"),
    "pixmo-pr1": Format("counting", "label|question|problem", "clicks|ground_truth|solution",
                        "image|image_path", frame="1000"),
    "fox": Format("ocr", id="image", rows=fox_rows),
    "coco": Format("detection", read=read_coco),
    "math500": Format("math", "problem|question", id="unique_id|id"),  # AIME has these names too
    "mathvision": Format(image="decoded_image|image", rows=option_rows),
    "mathverse": Format(id="sample_index", rows=option_rows),
    "traces": Format("math", "problem|question|prompt", response="response|generation|solution",
                     rows=chat_rows),
}


# ---- §4 the samples of a file --------------------------------------------------------------


def read_answer(task, answer):
    """The answer in its task's one spelling; ValueError and the like say what does not fit."""
    if task in ("grounding", "counting", "detection"):
        answer = json.loads(answer) if isinstance(answer, str) else answer  # a list kept as text
        if task == "counting" and not isinstance(answer, list):
            return int(answer)
        if task == "counting":
            return [numbers([p["x"], p["y"]] if isinstance(p, dict) else p, 2) for p in answer]
        if task == "grounding":
            return numbers(answer, 4)
        return [{"bbox_2d": numbers(item["bbox_2d"], 4), "label": str(item["label"])}
                for item in answer]
    text = "" if answer is None else str(answer).strip()
    if task != "choice":
        return text
    letter = re.fullmatch(r"\(?([A-Za-z])[).]?", text)
    if not letter:
        raise ValueError("one letter is needed")
    return letter[1].upper()


def numbers(values, count):
    """A point, or a box with its corners in order, of finite numbers."""
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{count} finite numbers are needed")
    if count == 2:
        return list(values)
    x1, y1, x2, y2 = values
    if x1 == x2 or y1 == y2:
        raise ValueError("a box has no area")
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def make_sample(row, images, *, frame="pixels", **limits):
    """Sample from checked fields: images are resized and the answer moves with the first one.

    Raises DataError for coordinates outside the image: nearly always another frame was meant.
    """
    resized, answer = tuple(resize_image(image, **limits) for image in images), row["answer"]
    if images:
        size = images[0].size if frame == "pixels" else (float(frame), float(frame))

        def inside(mark):  # annotators pass the border by a pixel or so: one in a hundred is fine
            if not all(-1 - s / 100 <= v <= 1.01 * s + 1 for v, s in zip(mark, size * 2)):
                raise DataError(f"answer {mark} is outside of {size}, its image's frame: set "
                                "?frame=1000 if it counts 0 … 1000, not pixels")
            return mark

        answer = scale(map_marks(answer, inside), size, resized[0].size)
    return Sample(row["id"], row["task"], row["question"], answer, resized,
                  tuple(image.size for image in images), row.get("response"), row.get("system"))


class FileSource:
    """The samples of one file: rows are checked now, images are read when asked for.

    `faults` lists what is wrong as "file:line: sentence"; those rows are left out.
    """

    def __init__(self, path, form, **limits):
        self.path, self.form, self.limits = Path(path), form, limits
        self.rows, self.faults, taken = [], [], {}
        try:
            for number, (where, raw) in enumerate(form.read(self.path), 1):
                try:
                    for row in self.check(raw, f"{self.path.stem}-{number}"):
                        if taken.setdefault(row["id"], where) != where:
                            raise DataError(f"id {row['id']!r} is taken by {taken[row['id']]}")
                        self.rows.append((where, row))
                except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                    what = "" if isinstance(error, DataError) else "not a row of this format: "
                    self.faults.append(f"{where}: {what}{error}")
        except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not readable in this format: {error}") from error
        if not self.rows and not self.faults:
            raise DataError(f"{path}: there are no samples in this file")

    def check(self, raw, name):
        """The samples of one row, in all that can be known without opening an image."""
        rows = self.form.rows(json.loads(raw) if isinstance(raw, bytes) else raw, self.form)
        for part, row in enumerate(rows):
            task, images = row["task"], row["image"] or []
            name = name if row["id"] is None else str(row["id"])
            row["id"] = f"{name}-{part}" if len(rows) > 1 else name
            row["image"] = images if isinstance(images, list) else [images]
            for image in row["image"]:
                self.find(image)
            if task not in TASKS:
                raise DataError(f"task {task!r} is none of {', '.join(TASKS)}: name it in the row, "
                                "or for the whole file by ?task=…")
            if not images and task in ("grounding", "counting", "detection", "ocr"):
                raise DataError(f"{task} needs an image: is its field named otherwise?")
            for key in ("question", "response", "system"):
                if not isinstance(row[key], str) and (row[key] is not None or key == "question"):
                    raise DataError(f"{key} is not text: {row[key]!r}: is it named otherwise?")
            row["answer"] = read_answer(task, row["answer"])
        return rows

    def find(self, image):
        """What to open: the bytes of an image, or its file, which may not leave the folder."""
        if isinstance(image, dict):  # as parquet stores it
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return image
        root = (self.path.parent / self.form.folder).resolve()
        found = (root / image).resolve()
        if not self.form.allow_outside and not found.is_relative_to(root):
            raise DataError(f"image {image!r} is outside {root}: name its folder by ?folder=DIR, or "
                            "trust the file by ?allow_outside=1")
        if not found.is_file():
            raise DataError(f"no image {image!r} in {root}: add it, or set ?folder=DIR")
        return found

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        where, row = self.rows[item]
        try:
            images = [load_image(self.find(image)) for image in row["image"]]
            return make_sample(row, images, frame=self.form.frame, **self.limits)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


# ---- §5 the drawn world --------------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 220),
           "yellow": (240, 195, 20), "purple": (150, 50, 180), "black": (30, 30, 30)}
SHAPES = {  # outlines on a grid of 0 … 100; the circle needs none
    "circle": (),
    "square": ((0, 0), (100, 0), (100, 100), (0, 100)),
    "triangle": ((50, 0), (100, 100), (0, 100)),
    "cross": ((33, 0), (67, 0), (67, 33), (100, 33), (100, 67), (67, 67), (67, 100), (33, 100),
              (33, 67), (0, 67), (0, 33), (33, 33)),
    "star": ((50, 0), (62, 36), (100, 38), (70, 61), (81, 100), (50, 78), (19, 100), (30, 61),
             (0, 38), (38, 36)),
    "diamond": ((50, 0), (100, 50), (50, 100), (0, 50)),
}
WORDS = ("river stone lamp green seven winter paper cloud train music apple silver north garden "
         "window bread tiger ocean letter candle bridge moon forest market").split()
OBJECTS = {"grounding": (1, 1), "counting": (1, 5), "detection": (2, 5), "ocr": (2, 4),
           "math": (2, 3), "choice": (1, 4)}  # lowest and highest number of what is asked for


def paint_shapes(image, things, reach, rng):
    """Draw (colour, shape) pairs apart from each other; returns their tight boxes."""
    pen, boxes = ImageDraw.Draw(image), []
    for colour, shape in things:
        side, free, tries = max(5, round(rng.uniform(*reach) * min(image.size))), False, 0
        while not free:
            tries += 1
            side = side if tries % 50 else side * 9 // 10  # crowded: smaller, so that it ends
            if side < 5:
                raise DataError(f"{len(things)} shapes do not fit in {image.size}: ask for fewer")
            x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            free = all(x > right + 1 or x + side < left - 1 or y > bottom + 1 or y + side < top - 1
                       for left, top, right, bottom in boxes)
        last = side - 1  # Pillow draws the outline's own pixels too: 0 … last are `side` pixels
        outline = [(x + round(u * last / 100), y + round(v * last / 100)) for u, v in SHAPES[shape]]
        if outline:
            pen.polygon(outline, COLOURS[colour])
        else:
            pen.ellipse((x, y, x + last, y + last), COLOURS[colour])
        boxes.append([x, y, x + side, y + side])
    return boxes


def paint_clutter(image, amount, rng):
    """Pale lines and blots, none in a colour that a question names."""
    pen, thick = ImageDraw.Draw(image), 1 + min(image.size) // 100
    for number in range(round(20 * amount)):
        x, y, u, v = (rng.randint(0, side - 1) for side in image.size * 2)
        tone = tuple(rng.randint(165, 225) for _ in "rgb")
        if number % 2:
            pen.line((x, y, u, v), tone, thick)
        else:
            pen.ellipse((x, y, x + 6 * thick, y + 4 * thick), tone)


def paint_text(image, text, rng):
    """Print lines of text, as large as they fit, somewhere in the image."""
    found = find_spec("matplotlib")  # brings the DejaVu fonts along
    font = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found else None
    pen, size, spare = ImageDraw.Draw(image), image.height / 3, (-1, -1)
    while min(spare) < 0 and size > 6:
        size *= 0.9
        face = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
        left, top, right, bottom = pen.multiline_textbbox((0, 0), text, face)
        spare = image.width - right + left, image.height - bottom + top
    x, y = (rng.randint(0, max(0, int(pixels))) for pixels in spare)
    pen.multiline_text((x - left, y - top), text, (20, 20, 20), face)


@dataclass(frozen=True)
class Synthetic:
    """Drawn scenes with exact answers: item i follows from the fields that repr shows, and i.

    grounding: the box of "red circle", the only one; counting: the centres of all "red circles";
    detection: every shape by name; ocr: the printed words; math: a sum, printed or as text;
    choice: how many there are, as a letter. `objects` is how many of these (ocr: lines, math:
    numbers), `distractors` how many other shapes, `reach` a shape's part of the shorter side, each
    from lowest to highest.
    """

    task: str
    size: tuple[int, int] = (84, 84)  # (W, H) as drawn
    objects: tuple[int, int] = ()  # (): OBJECTS[task]
    distractors: tuple[int, int] = (1, 3)
    clutter: float = 0.0  # 0 … 1
    reach: tuple[float, float] = (0.15, 0.3)
    shapes: int = len(SHAPES)  # the first so many of SHAPES and of COLOURS
    colours: int = len(COLOURS)
    text: int = 0  # 1: math without an image
    seed: int = 0
    split: str = "train"  # another split is another stream
    count: int = field(default=100_000, repr=False)  # samples in one pass
    min_pixels: int = field(default=MIN_PIXELS, repr=False)
    max_pixels: int = field(default=MAX_PIXELS, repr=False)

    def __post_init__(self):
        ranges = self.objects or (0, 0), self.distractors, self.reach
        if (self.task not in TASKS or not all(0 <= low <= high for low, high in ranges)
                or self.reach[1] > 1 or min(self.size) < 28 or self.shapes * self.colours < 2):
            raise DataError(f"task in {TASKS}, ranges from low to high, reach up to 1, sides from 28 "
                            f"and at least two labels are needed, not {self}")

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        if not 0 <= item < self.count:
            raise IndexError(item)
        rng = random.Random(f"{self!r} {item}")
        image = Image.new("RGB", self.size, (rng.randint(232, 255),) * 3)
        paint_clutter(image, self.clutter, rng)
        count = rng.randint(*(self.objects or OBJECTS[self.task]))
        make = {"ocr": self.page, "math": self.sum}.get(self.task, self.scene)
        question, answer = make(image, count, rng)
        row = {"id": f"synthetic-{self.task}-{self.split}-{item}", "task": self.task,
               "question": question, "answer": answer}
        images = [] if self.text and self.task == "math" else [image]
        return make_sample(row, images, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def scene(self, image, count, rng):
        """(question, answer) about shapes; half of the others share the target's colour or shape."""
        labels = [(c, s) for c in [*COLOURS][: self.colours] for s in [*SHAPES][: self.shapes]]
        if self.task == "detection":
            things = rng.choices(labels, k=count)
            boxes = paint_shapes(image, things, self.reach, rng)
            found = [{"bbox_2d": b, "label": s} for b, (_, s) in zip(boxes, things, strict=True)]
            return ", ".join([*SHAPES][: self.shapes]), found
        colour, shape = target = rng.choice(labels)
        others = [label for label in labels if label != target]
        close = [label for label in others if label[0] == colour or label[1] == shape]
        extra = rng.randint(*self.distractors)
        if self.task == "grounding":  # one target: further objects are distractors
            count, extra = 1, extra + max(count, 1) - 1
        things = [target] * count + [rng.choice((others, close)[k % 2]) for k in range(extra)]
        rng.shuffle(things)  # later ones are smaller in a crowd: that must not tell the target
        placed = paint_shapes(image, things, self.reach, rng)
        boxes = [box for box, thing in zip(placed, things, strict=True) if thing == target]
        plural = f"{colour} {shape}es" if shape == "cross" else f"{colour} {shape}s"
        if self.task == "grounding":
            return f"{colour} {shape}", boxes[0]
        if self.task == "counting":  # always the plural: a singular would give 1 away
            return plural, [[(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in boxes]
        first = rng.randint(max(0, count - 3), count)
        options = [f"{letter}. {first + k}" for k, letter in enumerate("ABCD")]
        return "\n".join([f"How many {plural} are there?", *options]), "ABCD"[count - first]

    def page(self, image, count, rng):
        """(question, answer) of printed words; wide images have more of them in a line."""
        most = max(1, min(5, image.width // 100))
        text = "\n".join(" ".join(rng.choices(WORDS, k=rng.randint(1, most))) for _ in range(count))
        paint_text(image, text, rng)
        return "", text

    def sum(self, image, count, rng):
        """(question, answer) of a sum, printed with a number a line: small images hold it too."""
        values = [rng.choice((1, 1 if k == 0 else -1)) * rng.randint(1, 20) for k in range(count)]
        terms = [f"{'-' if value < 0 else '+'} {abs(value)}" for value in values]
        terms[0] = str(values[0])
        if self.text:
            return f"What is {' '.join(terms)}?", str(sum(values))
        paint_text(image, "\n".join(terms), rng)
        return "What is the result of the sum in the image?", str(sum(values))


# ---- §6 mixing and checking ----------------------------------------------------------------


class Mixture:
    """Sources as one endless run: `m[k]` is its draw k, `m.at(i)` plain order, `m.faults` the rows
    left out. A draw follows from (seed, k) alone, so that one integer is a run's data cursor.

    Draws come in blocks with a fixed number from each source, in shuffled order: a pass over
    everything, or 1000 draws split by weight. Each source is shuffled anew on each of its passes.
    """

    def __init__(self, sources, weights=None, *, seed=0):
        self.sources, self.seed, self.orders = sources, seed, {}
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
        block, slot = divmod(draw, len(self.block))
        names = self.shuffled(len(self.sources), block, self.block)
        name = int(names[slot])
        source = self.sources[name]
        earlier = block * np.sum(self.block == name) + np.sum(names[:slot] == name)
        again, place = divmod(int(earlier), len(source))
        return source[int(self.shuffled(name, again, len(source))[place])]

    def shuffled(self, stream, again, items):
        """Items (n: 0 … n - 1) in the order of one pass, kept until the stream's next pass."""
        if self.orders.get(stream, (None,))[0] != again:
            rng = np.random.default_rng((self.seed, stream, again))
            self.orders[stream] = again, rng.permutation(items)
        return self.orders[stream][1]


def open_source(spec, fields, seed, split, **limits):
    """(source, weight or None) of `format:target?option=value&…:weight`."""
    body, weight = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", spec).groups()
    body, _, query = body.partition("?")
    name, colon, target = body.partition(":")
    options = dict(parse_qsl(query))
    if name != "synthetic":
        if colon and name not in FORMATS:
            raise DataError(f"{spec}: {name!r} is none of {', '.join(FORMATS)}, synthetic")
        form = replace(FORMATS[name if colon else "jsonl"], **(fields | options))
        return FileSource(target if colon else body, form, **limits), weight
    for key, text in options.items():  # "84x84", "1-4" or "0.5"
        parts = [float(part) if "." in part else int(part) for part in re.split("[x-]", text)]
        pair = key in ("size", "objects", "distractors", "reach")
        options[key] = (parts[0], parts[-1]) if pair else parts[0]
    return Synthetic(target, **({"seed": seed, "split": split} | limits | options)), weight


def open_data(specs, *, seed=0, split="train", min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS,
              fields=None, skip_bad=0):
    """The Mixture of all specs; `fields` is "ours=theirs,…" or a dict, for every file.

    Raises DataError if a spec is wrong or more than `skip_bad` rows are at fault.
    """
    if isinstance(fields, str):
        fields = dict(pair.split("=", 1) for pair in fields.split(","))
    opened = []
    for spec in specs:
        try:
            opened.append(open_source(spec, fields or {}, seed, split,
                                      min_pixels=min_pixels, max_pixels=max_pixels))
        except (TypeError, ValueError) as error:
            raise DataError(f"in {spec!r}: {error}") from error
    sources, weights = zip(*opened, strict=True) if opened else ((), ())
    if not all(weights) and any(weights) or not sources:
        raise DataError(f"give a weight to each of {specs} or to none of them")
    mix = Mixture(sources, [float(weight) for weight in weights if weight], seed=seed)
    if len(mix.faults) > skip_bad or not len(mix):
        raise DataError(f"{len(mix.faults)} bad rows; correct them or allow so many by --skip-bad:"
                        + "".join(f"\n{fault}" for fault in mix.faults[:10]))
    return mix


def check(specs, **options):
    """Every fault of a data set as "file:line: sentence", its images decoded one by one."""
    mix = open_data(specs, skip_bad=math.inf, **options)
    faults = list(mix.faults)
    for index in range(len(mix)):
        try:
            mix.at(index)
        except DataError as error:
            faults.append(str(error))
    return faults


# ---- §7 pictures ---------------------------------------------------------------------------


def draw(image, *, predicted=(), true=(), caption=""):
    """`image` with predicted boxes or points in red over the true ones in green.

    Both may be any answer in the image's frame; what has no place in it is left out. Small images
    are enlarged, and `caption` is printed below.
    """
    zoom = max(1, 448 // max(image.size))
    width, height = image.width * zoom, image.height * zoom
    unit = max(width, height) // 224 + 1  # lines and letters grow with the picture
    lines = textwrap.wrap(caption, max(8, width // (5 * unit)))
    sheet = Image.new("RGB", (width, height + 9 * unit * len(lines)), "white")
    sheet.paste(image.resize((width, height), Image.Resampling.NEAREST))
    pen, face = ImageDraw.Draw(sheet), ImageFont.load_default(7 * unit)
    for answer, colour, line in ((true, "#00a040", 2 * unit), (predicted, "#ff2020", unit)):
        marks = []
        map_marks(answer, marks.append)
        for mark in marks:
            if all(map(math.isfinite, mark)):  # far-off ones end at the border
                ends = [min(max(v, -9), side + 9) * zoom for v, side in zip(mark, image.size * 2)]
                (x1, x2), (y1, y2) = sorted((ends[0], ends[-2])), sorted((ends[1], ends[-1]))
                grow = 2 * line if len(mark) == 2 else 0
                pen.rectangle((x1 - grow, y1 - grow, x2 + grow, y2 + grow), None, colour, line)
    pen.multiline_text((unit, height), "\n".join(lines), "black", face)
    return sheet
