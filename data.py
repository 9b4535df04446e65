"""What is a sample? Sources of samples, their mixture, the held-out split, checking.

    mix = open_data(["a.jsonl:0.7", "synthetic:counting?size=448x448&objects=1-6:0.3"], seed=0)
    mix[12345]   # a draw of an endless run, by (seed, 12345) alone; mix.at(0): plain order
    python data.py --help               # formats and options
    python data.py check SPEC …         # every fault as file:line, or what the data holds

A spec is FILE, FORMAT:FILE (see formats.py), hf:OWNER/NAME@SPLIT or synthetic:TASK, then
`?option=value&…` (fields of FileSource or Synthetic), then `:weight`. For FILE a folder or PATTERN*
will do. A JSONL row is {"task", "question", "answer"}, perhaps "image" or "images" (paths from the
file's folder), and perhaps "id", "response", "system".

Qwen2.5-VL answers in pixels of the image AFTER its resize to multiples of 28. Images are resized
here, once; `scale` moves true answers into that frame and predictions back out. A box is
[x1, y1, x2, y2] by its edges: pixel columns 3 and 4 are x1 = 3, x2 = 5. Sizes are (width, height).
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from urllib.parse import unquote

import numpy as np
from PIL import Image

import formats
import readers
import rows
from formats import FORMATS
from pictures import PLACED, Synthetic, load_image, map_marks, scale, smart_resize, solution
from rewards import TASKS, read_truth
from rows import FAULTS, DataError, Stored, blame, words

# §1 ───────────────────────────────────── samples ────────────────────────────────────────────


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


# §2 ────────────────────────────────────── sources ───────────────────────────────────────────


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
        if task not in TASKS:
            raise DataError(f"task {task!r} is none of {', '.join(TASKS)}: try ?task=NAME")
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
            if not question and task not in ("ocr", "detection"):
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
        if task in (*PLACED, "ocr"):
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


# §3 ────────────────────────────── the mixture and its checks ─────────────────────────────────


class Mixture:
    """Sources as one endless run: `m[k]` is draw k, `m.at(i)` plain order, `m.faults` bad rows.

    A draw follows from (seed, k) alone: one integer is a run's data cursor. Draws come in shuffled
    blocks, a pass over everything or 1000 draws split by weight; each source shuffled by pass.
    """

    def __init__(self, sources, weights=None, *, seed=0, skip_bad=0):
        self.sources, self.seed, self.skip_bad, self.orders = sources, seed, skip_bad, {}
        self.faults, self.heldout_count = [], 0
        for source in sources:
            self.faults += getattr(source, "faults", ())
            self.heldout_count += getattr(source, "heldout_count", 0)  # samples of files
        counts = [len(source) for source in sources]
        if weights:
            edges = np.cumsum([0, *weights])
            counts = np.diff(np.round(edges / edges[-1] * 1000).astype(int))
        self.block = np.repeat(np.arange(len(sources)), counts)  # the source of each draw, sorted

    def __len__(self):
        return sum(len(source) for source in self.sources)

    def at(self, index):
        """Sample `index` of one pass, the sources one after the other."""
        for source in self.sources:
            if 0 <= index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError("beyond the last sample")

    def good(self, index):
        """Sample `index` of one pass; None for a bad one, while skip_bad allows it."""
        try:
            return self.at(index)
        except DataError as error:
            self.leave_out(error)
            return None

    def __getitem__(self, draw):
        """Draw number `draw`; in place of a bad one, while skip_bad allows it, one far ahead."""
        try:
            return self.pick(draw)
        except DataError as error:
            self.leave_out(error)
            return self[draw + 10**9]

    def leave_out(self, error):
        """Names and counts a bad row; raises it once there are more than skip_bad of them."""
        new = str(error) not in self.faults
        self.faults += [str(error)] if new else []
        if len(self.faults) > self.skip_bad:
            raise error
        if new:
            print(f"left out: {error}", file=sys.stderr)

    def pick(self, draw):
        block, slot = divmod(draw, len(self.block))
        names = self.shuffled(len(self.sources), block, self.block)
        name = int(names[slot])
        source = self.sources[name]
        in_block = np.sum(self.block == name)
        earlier = block * in_block + np.sum(names[:slot] == name)
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


FILE_OPTIONS = [one.name for one in fields(FileSource) if one.type is str and one.name != "path"]
FILE_OPTIONS.remove("split")
SCENE_OPTIONS = [one.name for one in fields(Synthetic) if one.name not in ("task", "split")]


def read_options(text, between, known):
    """{"option": "value"} of option=value pairs; DataError for an option that is not known."""
    options = {}
    for pair in text.split(between) if text else ():
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise DataError(f"{pair!r} sets none of the options {', '.join(known)}")
        options[key] = unquote(value)
    return options


def open_source(spec, renamed, limits, *, seed, split, heldout):
    """The source of `format:target?option=value&…`."""
    name, target, query = re.fullmatch(r"(?:([\w-]+):)?([^?]*)\??(.*)", spec).groups("jsonl")
    if name == "synthetic":
        options = dict(seed=seed, split=split) | scene_options(query)
        return DrawnSource(Synthetic(target, **options), limits)
    if name == "hf":
        name = formats.HUB.get(target.partition("@")[0], "jsonl")
        target = f"hf:{target}"
    if name not in FORMATS:
        raise DataError(f"{name!r} is none of {', '.join(FORMATS)}, hf, synthetic")
    layout = {key: value for key, value in FORMATS[name].items() if key != "about"}
    options = layout | renamed | read_options(query, "&", FILE_OPTIONS)
    return FileSource(target, **options, split=split, heldout=heldout, limits=limits)


def scene_options(query):
    """Options of a drawn world: "84x84", "1-4" or "0.5"."""
    options = {}
    for key, text in read_options(query, "&", SCENE_OPTIONS).items():
        with blame(f"{key}={text} is no number, AxB or A-B"):
            parts = [float(part) if "." in part else int(part) for part in re.split("[x-]", text)]
        pair = key in ("size", "objects", "distractors", "reach")
        options[key] = (parts[0], parts[-1]) if pair else parts[0]
    return options


def open_data(specs, *, seed=0, split="train", fields="", skip_bad=0, heldout=0.0, **limits):
    """The Mixture of all specs; DataError if one is wrong or more than `skip_bad` rows are bad.

    Of files, split="train" leaves the share `heldout` out, "heldout" has only that, "all" has all;
    0: files are not split. Drawn worlds have a stream of scenes for each split.
    """
    if split not in ("train", "heldout", "all") or not 0 <= heldout < 1:
        raise DataError(f"split {split!r} is train, heldout or all; the share {heldout} 0 … 1")
    with blame("in --fields"):
        renamed = read_options(fields, ",", FILE_OPTIONS)
    sources, weights = [], []
    for spec in specs:
        body, weight = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", spec).groups()
        weights += [float(weight)] if weight else []
        with blame(f"in {spec!r}"):
            how = dict(seed=seed, split=split, heldout=heldout)
            sources.append(open_source(body, renamed, limits, **how))
    if not sources or len(weights) not in (0, len(sources)):
        raise DataError(f"give a weight to each of {specs} or to none of them")
    mix = Mixture(sources, weights, seed=seed, skip_bad=skip_bad)
    if len(mix.faults) > skip_bad:
        faults = "\n".join(mix.faults[:10])
        raise DataError(f"{len(mix.faults)} bad rows; correct or --skip-bad them:\n{faults}")
    named_before = split == "heldout" and heldout  # by the other half of the same file
    if skip_bad < math.inf and not named_before and os.environ.get("RANK", "0") == "0":
        for fault in mix.faults:
            print(f"left out: {fault}", file=sys.stderr)
    drawn = [number for number in np.unique(mix.block) if len(sources[number])]
    if len(drawn) < len(sources) and skip_bad < math.inf:
        raise DataError(f"in {specs} one has no good row or a weight under 1/1000")
    return mix


def check(specs, **options):
    """Every fault of a data set as "file:line: sentence", its images decoded one by one."""
    return examine(specs, **options)[0]


SCENES = 200  # of a drawn world --check looks at so many: they are all alike


def looked_at(mix):
    """Indices for `Mixture.at` of what --check looks at: all of a file, some of a drawn world."""
    first = 0
    for source in mix.sources:
        drawn = isinstance(source, DrawnSource)
        yield from range(first, first + min(len(source), SCENES if drawn else len(source)))
        first += len(source)


def examine(specs, **options):
    """(every fault as "file:line: sentence", lines on what the data holds), one pass over it."""
    everything = {"skip_bad": math.inf, "split": "all", "heldout": 0.0}
    try:
        mix = open_data(specs, **options | everything)
    except DataError as error:  # of a spec or a whole file
        return [str(error)], []
    faults, tasks, sizes, bare = mix.faults, Counter(), Counter(), 0
    for index in looked_at(mix):
        try:
            sample = mix.at(index)
        except DataError as error:
            faults.append(str(error))
            continue
        tasks[sample.task] += 1
        sizes.update(image.size for image in sample.images)
        bare += sample.answer == ""
    lines = [f"{count} samples of {task}" for task, count in tasks.most_common()]
    if any(isinstance(source, DrawnSource) for source in mix.sources):
        lines.append(f"of a drawn world's scenes the first {SCENES}")
    if sizes:
        small, large = (pick(sizes, key=math.prod) for pick in (min, max))
        common, count = sizes.most_common(1)[0]
        lines.append(f"{sizes.total()} images, as the model reads them from {small[0]}x{small[1]} "
                     f"to {large[0]}x{large[1]} pixels, {count} of {common[0]}x{common[1]}")
    lines.append(f"{bare} answers can earn nothing (rows to imitate, without a true answer)")
    return faults, lines


# §4 ─────────────────────────────────── the command line ──────────────────────────────────────


def help_text():
    """Formats and options, for --help."""
    lines = ["formats (FORMAT:FILE, FORMAT:FOLDER@SPLIT, FORMAT:hf:OWNER/NAME@SPLIT):"]
    for name, layout in FORMATS.items():
        lines += told(name, layout["about"])
    lines += ["", "the hub's sets whose format hf: knows:", *told("", ", ".join(formats.HUB))]
    lines += ["", "options of files (FILE?option=value&…; --fields option=value,…):"]
    lines += options_of(FileSource, FILE_OPTIONS)
    lines += ["", "options of drawn scenes (synthetic:TASK?option=value&…):"]
    lines += options_of(Synthetic, SCENE_OPTIONS)
    return "\n".join(lines)


def told(name, text):
    indents = dict(initial_indent="  ", subsequent_indent=" " * 17)
    return textwrap.wrap(f"{name:15}{text}", 98, **indents, break_on_hyphens=False)


def options_of(kind, names):
    """The options' lines of --help, from the comments beside a dataclass's fields."""
    lines = []
    for line in inspect.getsource(kind).splitlines():
        found = re.fullmatch(r"    (\w+): .*? = (.+?)(?:  # (.*))?", line)
        if found and found[1] in names:
            default = re.sub(r"field\(default=(\w+).*", r"\1", found[2])
            lines += told(found[1], f"{found[3] or ''} [{default}]".strip())
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["check"])
    parser.add_argument("spec", nargs="+")
    parser.add_argument("--fields", default="", help="ours=theirs,… for every spec")
    options = parser.parse_args(arguments)
    faults, lines = examine(options.spec, fields=options.fields)
    print("\n".join(lines))
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
