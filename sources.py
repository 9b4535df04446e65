"""How does a row of a file, or a drawn scene, become a sample?

§1 a sample, and its resize · §2 a source from files · §3 a drawn world as a source

Qwen2.5-VL answers in pixels of the image AFTER its resize to multiples of 28. Images are resized
here, once; `scale` moves true answers into that frame and predictions back out. A box is
[x1, y1, x2, y2] by its edges: pixel columns 3 and 4 are x1 = 3, x2 = 5. Sizes are (width, height).
"""
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from PIL import Image

import formats
import readers
import rows
from pictures import Synthetic, load_image, map_marks, scale, smart_resize
from rewards import PLACED, TABLE, read_truth
from rows import FAULTS, DataError, Stored, blame, words

# §1 ──────────────────────────────────────── a sample ────────────────────────────────────────


@dataclass(frozen=True)
class Sample:
    """One example; `answer` is in the frame of the resized first image."""
    id: str  # unique in its source
    task: str
    question: str  # raw question or label, with no IMAGE_MARK (images first) or one an image
    answer: object  # box | points or a count | [{"bbox_2d", "label"}] | text
    images: tuple[Image.Image, ...] = ()  # RGB, sides are multiples of 28
    response: str | None = None  # a completion to imitate, if the data has one
    system: str | None = None

    @property
    def image_size(self):
        """(W, H) of the first image as the model sees it; None for text."""
        return self.images[0].size if self.images else None


def fit(sample, images, *, frame="pixels", **limits):
    """The sample with resized images; its answer moves from `frame` along with the first one."""
    sizes = []
    for image in images:
        rows, columns = smart_resize(image.height, image.width, **limits)
        sizes.append((columns, rows))
    answer = sample.answer
    if images and sample.task in PLACED:
        frames = {"pixels": images[0].size, "resized": sizes[0]}
        size = frames[frame] if frame in frames else (float(frame), float(frame))
        map_marks(answer, lambda mark: within(mark, size))
        answer = scale(answer, size, sizes[0])
    resized = tuple(image.resize(size) for image, size in zip(images, sizes))  # bicubic, as Qwen
    return replace(sample, answer=answer, images=resized)


def within(mark, size):
    """DataError if a point or box lies outside of its frame."""
    for value, side in zip(mark, size * 2):
        if not -1 - side / 100 <= value <= 1.01 * side + 1:  # annotators pass the border a little
            raise DataError(f"answer {mark} is outside of its frame {size}: is it ?frame=1000")


# §2 ────────────────────────────────── a source from files ───────────────────────────────────


@dataclass
class FileSource:
    """The samples of files, images read when asked for; `faults`: "file:line: why" of bad rows."""
    path: str  # a file, a folder, a pattern, or hf:OWNER/NAME
    task: str = ""  # empty: each row names its own
    question: str = "question|problem"  # its field, as those below; each of a list is a sample
    answer: str = "answer"  # a.b: field b of field a
    image: str = "images|image|image_path|image_sha256|file_name"  # path, bytes, base64 or a list
    id: str = "id"  # empty: rows are numbered
    response: str = "response"  # a completion to imitate
    system: str = "system"
    box: str = ""  # xywh: x, y, width, height; corners: surely x1, y1, x2, y2
    frame: str = ""  # of the answer: pixels (of the stored image), resized, or N: 0 … N both ways
    folder: str = "."  # where images lie, from the file's folder
    allow_outside: str = ""  # 1: images may lie elsewhere too
    in_order: str = ""  # 1: drawn in the file's order, as a curriculum is
    read: object = rows.read_rows
    adapt: object = None  # what field names cannot say: the fields, or None without a sample
    split: str = "all"  # train, heldout or all
    heldout: float = 0.0  # the share that is held out
    limits: dict = field(default_factory=dict)  # min_pixels, max_pixels

    def __post_init__(self):
        for name, known in (("box", ["xywh", "corners"]), ("in_order", ["1"]),
                            ("allow_outside", ["1"])):
            value = getattr(self, name)
            if value not in ("", *known):
                raise DataError(f"?{name}={value} is none of {', '.join(known)}")
        if self.frame not in ("", "pixels", "resized") and not float(self.frame) > 0:
            raise DataError(f"?frame={self.frame} is neither pixels, resized nor a number above 0")
        self.samples, self.faults, self.heldout_count = [], [], 0
        self.in_unit, self.in_fractions = True, False  # all marks in 0 … 1; some not whole
        files, self.root, self.cache = rows.find_files(self.path)
        self.read_files(files)
        self.refuse_doubts()
        self.hold_out()

    def read_files(self, files):
        number, taken = 0, {}
        stem = Path(self.path if files == [Path(self.path)] else self.path.split("@")[0]).stem
        for file in files:
            with blame(file):  # a row's faults are noted, a file's end it
                for where, row in self.read(file):
                    number += 1
                    try:
                        found = self.read_row(row, f"{stem}-{number}", file)
                        for sample, *_ in found:
                            self.refuse_again(taken, sample.id, where)
                    except FAULTS as error:
                        self.faults.append(f"{where}: {words(error)}")
                        continue
                    self.samples += [(where, *sample) for sample in found]
        if not self.samples and not self.faults:
            raise DataError("there are no samples in this file")

    def refuse_again(self, taken, name, where):
        first = taken.setdefault(name, where)
        if first != where:
            raise DataError(f"id {name!r} is taken by {first}: ?id= numbers the rows, ?id=NAME "
                            "takes another field")

    def read_row(self, row, name, file):
        """[(sample, what its images open from, frame)] of a row, without opening an image."""
        if isinstance(row, Exception):
            raise row
        row = json.loads(row) if isinstance(row, bytes) else row
        if not isinstance(row, dict):
            raise DataError(f"a row is an object of named fields, not {row!r:.60}")
        picked = {"task": self.task or row.get("task"), "frame": self.frame}
        for ours in ("question", "answer", "image", "id", "response", "system"):
            picked[ours] = formats.pick(row, getattr(self, ours))
        picked["image"] = rows.image_list(picked["image"])
        picked = self.adapt(row, picked) if self.adapt else picked
        if picked is None:
            return []
        if picked["question"] is None and not self.question:
            picked["question"] = ""  # the task's own
        task, frame = picked["task"], picked.pop("frame")
        images = rows.image_list(picked.pop("image"))
        if task not in TABLE:
            raise DataError(f"task {task!r} is none of {', '.join(TABLE)}: try ?task=NAME")
        if not images:
            self.miss_images(task, row)
        if picked["question"] is None:
            self.miss_field("question", row)
        picked["answer"] = self.read_answer(task, picked, row)
        if not frame and task in PLACED:
            map_marks(picked["answer"], self.note)
        name = name if picked["id"] is None else str(picked["id"])
        asked, found = picked["question"], []
        asked = asked if isinstance(asked, list) else [asked]
        for part, question in enumerate(asked):
            refuse_types(picked | {"question": question})
            question, places = formats.place_images(task, question, images)
            question = formats.name_of(task, question)
            if not question and not TABLE[task].question:
                raise DataError(f"{task} needs a question")
            picked |= {"question": question, "id": f"{name}-{part}" if asked[1:] else name}
            places = [self.find(place, file) for place in places]
            found.append((Sample(**picked), places, frame or "pixels"))
        return found

    def note(self, mark):
        self.in_unit = self.in_unit and all(0 <= value <= 1 for value in mark)
        self.in_fractions = self.in_fractions or any(value % 1 for value in mark)

    def miss_images(self, task, row):
        """DataError if a row without images should have some; ?image= says that it has none."""
        for name, value in row.items():
            if self.image and rows.looks_like_image(value):
                raise DataError(f"the field {name!r} looks like an image: is it ?image={name}")
        if TABLE[task].needs_image:
            raise DataError(f"{task} needs an image: is its field named otherwise? then ?image=")

    def read_answer(self, task, picked, row):
        answer = picked["answer"]
        if answer in (None, "") and picked["response"]:
            return ""  # imitation needs none
        if answer is None:
            self.miss_field("answer", row)
        if self.box == "xywh" and task in PLACED:
            answer = formats.from_xywh(readers.unwrapped(answer))
        return read_truth(task, answer)

    def miss_field(self, name, row):
        raise DataError(f"{name} is missing among {', '.join(map(str, row))}: is it --fields "
                        f"{name}=NAME, or another format?")

    def find(self, image, file):
        """What the image opens from; its file may not leave the folder, nor the hub's cache."""
        folders = [file.parent / self.folder]
        if self.folder == ".":
            folders.append(self.root)
        trusted = [*folders, *([self.cache] if self.cache else [])]
        return rows.find_image(image, folders, None if self.allow_outside else trusted)

    def refuse_doubts(self):
        """DataError for what makes the whole file doubtful, once, whatever may be left out."""
        turned = [fault for fault in self.faults if "?box=xywh" in fault]
        if not self.box and len(turned) > 9 and len(turned) > len(self.samples) / 100:
            raise DataError(f"{len(turned)} rows are as this one: {turned[0]} (?box=corners if "
                            "it is surely not)")
        if self.in_unit and self.in_fractions:
            raise DataError("all boxes and points lie within 0 … 1: is it ?frame=1 "
                            "(?frame=pixels: surely not)")
        kinds = {re.sub(r"^.*?: |'[^']*'|\d+", "", fault) for fault in self.faults}
        strange = all("another format?" in fault for fault in self.faults)
        if not self.samples and len(self.faults) > 1 and (strange or len(kinds) == 1):
            raise DataError(f"none of the {len(self.faults)} rows can be used: {self.faults[0]}")

    def hold_out(self):
        """Keep the split's samples: by image, so that none is trained on and asked about."""
        if not self.heldout or not self.samples:
            return
        chosen = [chance(sample, images) < self.heldout for _, sample, images, _ in self.samples]
        self.heldout_count = sum(chosen)
        if self.split == "all":
            return
        if self.split == "train" and self.heldout_count == 0:
            return  # too few rows to hold one out: an evaluation would say so
        if self.heldout_count in (0, len(chosen)):
            raise DataError(f"of {len(chosen)} samples {self.heldout_count} are held out (a share "
                            f"of {self.heldout}): give held-out data with --eval-data")
        keep = self.split == "heldout"
        self.samples = [row for row, held in zip(self.samples, chosen) if held == keep]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        where, sample, images, frame = self.samples[item]
        with blame(where):
            opened = []
            for image in images:
                opened.append(load_image(image.read() if isinstance(image, Stored) else image))
            return fit(sample, opened, frame=frame, **self.limits)


def refuse_types(picked):
    """DataError if what is said is not text."""
    for key, kind in (("question", str), ("response", str | None), ("system", str | None)):
        if not isinstance(picked[key], kind):
            raise DataError(f"{key} is not text but {picked[key]!r:.60}: what is its field?")


def chance(sample, images):
    """A number in [0, 1) of a sample's first image (its name or bytes), or of its question.

    The same for all that is asked about an image, in whatever file, row, order, rank and run.
    """
    key = sample.question
    if images:
        first = images[0]
        key = PurePath(first).name if isinstance(first, str) else image_digest(first)
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12


def image_digest(image):
    return image.digest if isinstance(image, Stored) else rows.digest(image)


# §3 ───────────────────────────────────── a drawn world ──────────────────────────────────────


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
            sample = Sample(name, self.world.task, question, answer)
            if self.world.traces:
                sample = replace(sample, response=solution(question))
            return fit(sample, images, **self.limits)


def solution(question):
    """The worked answer to "What is 3 + 5 - 2?", thinking first; it sets subgoals and verifies."""
    first, *rest = question.removeprefix("What is ").removesuffix("?").split(" ")
    steps, undone = [], []
    total = int(first)
    for sign, number in zip(rest[::2], rest[1::2]):
        before = total
        total += int(sign + number)
        back = "-" if sign == "+" else "+"
        steps.append(f"{before} {sign} {number} = {total}.")
        undone.append(f"{total} {back} {number} = {before}.")
    thought = "First, I add from the left: " + " ".join(steps)
    thought += " Let me check it from the right: " + " ".join(undone[::-1])
    return f"<think>{thought} That is where I began.</think><answer>\\boxed{{{total}}}</answer>"
