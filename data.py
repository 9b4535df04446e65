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
import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from formats import FORMATS, read_rows
from pictures import PLACED, Synthetic, load_image, map_marks, scale, smart_resize

TASKS = (*PLACED, "ocr", "math", "choice")
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

# ---- §2 files: from published formats to samples -------------------------------------------
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

@dataclass(frozen=True)
class DrawnSource:
    """The samples of a drawn world."""
    world: Synthetic
    limits: dict = field(default_factory=dict)  # min_pixels, max_pixels

    def __len__(self):
        return self.world.count

    def __getitem__(self, item):
        name = f"synthetic-{self.world.task}-{self.world.split}-{item}"
        with blame(name, ValueError):
            question, answer, images = self.world.draw(item)
            return fit(Sample(name, self.world.task, question, answer), images, **self.limits)

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
    return DrawnSource(Synthetic(target, **drawn), limits)


def open_data(specs, *, seed=0, split="train", fields="", skip_bad=0, heldout=0.0, **limits):
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
