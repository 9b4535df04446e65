"""What is a data set? Specs of files and drawn worlds, their mixture, checking.

§1 the mixture · §2 from a spec to its source · §3 checking · §4 the command line

    mix = open_data(["a.jsonl:0.7", "synthetic:counting?size=448x448&objects=1-6:0.3"], seed=0)
    mix[12345]   # a draw of an endless run, by (seed, 12345) alone; mix.at(0): plain order
    python data.py --help               # formats and options
    python data.py check SPEC …         # every fault as file:line, or what the data holds

A spec is FILE, FORMAT:FILE (see formats.py), hf:OWNER/NAME@SPLIT or synthetic:TASK, then
`?option=value&…` (fields of FileSource or Synthetic), then `:weight`. For FILE a folder or PATTERN*
will do. A JSONL row is {"task", "question", "answer"}, perhaps "image" or "images" (paths from the
file's folder), and perhaps "id", "response", "system".
"""
import argparse
import inspect
import math
import os
import re
import sys
import textwrap
from collections import Counter
from dataclasses import fields
from urllib.parse import unquote

import numpy as np

import formats
from formats import FORMATS
from pictures import Synthetic
from rows import DataError, blame
from sources import DrawnSource, FileSource

# §1 ────────────────────────────────────── the mixture ───────────────────────────────────────


class Mixture:
    """Sources as one endless run: `m[k]` is draw k, `m.at(i)` plain order, `m.faults` bad rows.

    A draw follows from (seed, k) alone: one integer is a run's data cursor. Draws come in shuffled
    blocks, a pass over everything or 1000 draws split by weight; each source shuffled by pass.
    """

    def __init__(self, sources, weights=None, *, seed=0, skip_bad=0):
        self.sources = sources
        self.seed = seed
        self.skip_bad = skip_bad
        self.orders = {}
        self.faults: list[str] = []
        self.heldout_count = 0
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

    def in_turn(self):
        """Indices for `at`: each source's first sample, then each one's second, …"""
        lengths = [len(source) for source in self.sources]
        starts = np.cumsum([0, *lengths]).tolist()
        for place in range(max(lengths)):
            for start, length in zip(starts, lengths):
                if place < length:
                    yield start + place

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


# §2 ─────────────────────────────── from a spec to its source ────────────────────────────────


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
            sources.append(open_source(
                body, renamed, limits, seed=seed, split=split, heldout=heldout))
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


# §3 ──────────────────────────────────────── checking ────────────────────────────────────────


SCENES_CHECKED = 200  # of a drawn world --check looks at so many: they are all alike


def looked_at(mix):
    """Indices for `Mixture.at` of what --check looks at: all of a file, some of a drawn world."""
    first = 0
    for source in mix.sources:
        drawn = isinstance(source, DrawnSource)
        yield from range(first, first + min(len(source), SCENES_CHECKED if drawn else len(source)))
        first += len(source)


def examine(specs, **options):
    """(every fault as "file:line: sentence", lines on what the data holds). Decodes each image."""
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
        lines.append(f"of a drawn world's scenes the first {SCENES_CHECKED}")
    if sizes:
        small, large = (pick(sizes, key=math.prod) for pick in (min, max))
        common, count = sizes.most_common(1)[0]
        lines.append(f"{sizes.total()} images, as the model reads them from {small[0]}x{small[1]} "
                     f"to {large[0]}x{large[1]} pixels, {count} of {common[0]}x{common[1]}")
    lines.append(f"{bare} answers can earn nothing (rows to imitate, without a true answer)")
    return faults, lines


# §4 ──────────────────────────────────── the command line ────────────────────────────────────


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
