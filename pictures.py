"""Where is what in an image? Sizes, coordinates, marks, and drawn scenes with exact answers.

§1 sizes and coordinates · §2 reading and marking pictures · §3 the drawn world

Qwen2.5-VL answers in pixels of the image AFTER its resize to multiples of 28. A box is
[x1, y1, x2, y2] by its edges: pixel columns 3 and 4 are x1 = 3, x2 = 5. Sizes are (width, height).
"""
import io
import math
import random
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError,
              ValueError, SyntaxError, Image.DecompressionBombError)  # Syntax: a broken PNG chunk
PLACED = ("grounding", "counting", "detection")  # tasks whose answers are places in the image
DRAWN = (*PLACED, "ocr", "math")


# §1 ─────────────────────────────── sizes and coordinates ────────────────────────────────────


def smart_resize(height, width, *, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280):
    """Qwen2.5-VL's rule: (height, width) in multiples of `factor`, the area within the limits."""
    sides = height, width  # the limits' defaults are those of Qwen's image processor
    if max(sides) > 200 * min(sides):
        raise ValueError(f"an image of {width}x{height} pixels is longer than 200 : 1: crop it")
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


# §2 ────────────────────────── reading and marking pictures ─────────────────────────────────


def load_image(source):
    """An upright RGB image from a path or from encoded bytes; ValueError for what is unreadable."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # Bombs, before anything is decoded; floating-point pixels have no agreed white.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS or image.mode == "F":
                raise ValueError(f"{image.width}x{image.height} pixels of mode {image.mode}")
            image = ImageOps.exif_transpose(image)  # cameras may store it lying; boxes are upright
    except UNREADABLE as error:
        raise ValueError(f"image {str(source)[:99]} is unusable, replace it: {error}") from error
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


# §3 ──────────────────────────────── the drawn world ────────────────────────────────────────
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
            raise ValueError(f"{len(things)} shapes do not fit in {image.size}: ask for fewer")
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

    def __post_init__(self):
        if self.task not in DRAWN:
            raise ValueError(f"no task {self.task!r} is drawn, but {', '.join(DRAWN)}")
        self.draw(0)  # options that no scene can have show here and not in the middle of a run

    def draw(self, item):
        """(question, answer, images) of item 0 … count − 1; IndexError after the last."""
        rng = random.Random(f"{self!r} {range(self.count)[item]}")
        image = Image.new("RGB", self.size, (rng.randint(232, 255),) * 3)
        pen, thick = ImageDraw.Draw(image), 1 + min(self.size) // 100
        for _ in range(round(20 * self.clutter)):  # pale lines, in no colour that a question names
            ends = [rng.randint(0, side - 1) for side in self.size * 2]
            pen.line(ends, tuple(rng.randint(165, 225) for _ in "rgb"), rng.randint(1, 3) * thick)
        make = self.printed if self.task in ("ocr", "math") else self.scene
        question, answer = make(image, rng.randint(*self.objects), rng)
        return question, answer, [] if self.text and self.task == "math" else [image]

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
