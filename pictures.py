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

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError,
              ValueError, SyntaxError, Image.DecompressionBombError)  # Syntax: a broken PNG chunk
DRAWN = ("grounding", "counting", "detection", "ocr", "math")  # tasks of drawn scenes


# §1 ─────────────────────────────── sizes and coordinates ────────────────────────────────────


def smart_resize(height, width, *, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280):
    """Qwen2.5-VL's rule: (height, width) in multiples of `factor`, the area within the limits.

    The limits' defaults are those of Qwen's image processor. Errors: ValueError for a thin image.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {width}x{height} pixels is longer than 200 : 1: crop it")

    def multiple(side, rule):
        times = rule(side / factor)
        return max(factor, times * factor)

    area = height * width
    rows = multiple(height, round)
    columns = multiple(width, round)
    if rows * columns > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        rows = multiple(height / shrink, int)
        columns = multiple(width / shrink, int)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / area)
        rows = multiple(height * grow, math.ceil)
        columns = multiple(width * grow, math.ceil)
    return rows, columns


def map_marks(answer, move):
    """The answer with `move` applied to each point [x, y] and box [x1, y1, x2, y2] in it."""
    if isinstance(answer, dict):
        return {key: map_marks(value, move) for key, value in answer.items()}
    if not isinstance(answer, (list, tuple)):
        return answer  # counts and texts are nowhere
    numbers = all(isinstance(value, (int, float)) for value in answer)
    if numbers and len(answer) in (2, 4):
        return move(answer)
    return [map_marks(item, move) for item in answer]


def scale(answer, from_size, to_size):
    """Move a point, a box or a whole answer from a frame of (W, H) to another one."""
    if tuple(from_size) == tuple(to_size):
        return answer
    wider = to_size[0] / from_size[0]
    higher = to_size[1] / from_size[1]
    factors = (wider, higher, wider, higher)
    return map_marks(answer, lambda mark: [v * factor for v, factor in zip(mark, factors)])


# §2 ────────────────────────── reading and marking pictures ─────────────────────────────────


def load_image(source):
    """An upright RGB image from a path or from encoded bytes; ValueError for what is unreadable."""
    name, stream = str(source), source
    if isinstance(source, bytes):
        name, stream = f"of {len(source)} bytes", io.BytesIO(source)
    try:
        with Image.open(stream) as image:
            # Bombs, before anything is decoded; floating-point pixels have no agreed white.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS or image.mode == "F":
                raise ValueError(f"{image.width}x{image.height} pixels of mode {image.mode}")
            image = ImageOps.exif_transpose(image)  # cameras may store it lying; boxes are upright
    except UnidentifiedImageError as error:
        raise ValueError(f"image {name} is unusable, replace it: no picture, or damaged") from error
    except UNREADABLE as error:
        raise ValueError(f"image {name} is unusable, replace it: {error}") from error
    if image.mode.startswith("I"):  # 16 bits: convert() would clip them to an all-white picture
        levels = np.clip(image, 0, 65535)
        if levels.max() > 255:
            levels = levels // 257
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def grey(image):
    """A picture of the same size with nothing on it: what is answered without seeing."""
    return Image.new("RGB", image.size, (128, 128, 128))


def draw(image, *, predicted=(), true=(), caption=""):
    """`image`, enlarged if small: predicted marks in magenta over true ones in cyan; a caption."""
    zoom = max(1, 448 // max(image.size))
    picture = ImageOps.scale(image, zoom, Image.Resampling.NEAREST)
    unit = max(picture.size) // 224 + 1  # lines and letters grow with the picture
    letters = max(8, picture.width // (5 * unit))  # that fit into a line
    lines = textwrap.wrap(caption, letters)
    below = 9 * unit * len(lines)
    sheet = ImageOps.expand(picture, (0, 0, 0, below), "white")
    pen = ImageDraw.Draw(sheet)
    corner = unit, picture.height
    pen.multiline_text(corner, "\n".join(lines), "black", font_size=7 * unit)

    def paint(mark, colour, line):
        if not all(abs(value) < 1e9 for value in mark):  # too far, or no number at all
            return
        corners = np.reshape(mark, (-1, 2))
        outside = np.add(image.size, 9)  # a mark further away ends just outside of the image
        corners = np.clip(corners, -9, outside) * zoom
        grow = 0
        if len(mark) == 2:  # a point is a small square
            grow = 2 * line
        low = corners.min(0) - grow
        high = corners.max(0) + grow
        pen.rectangle((*low, *high), None, colour, line)

    map_marks(true, lambda mark: paint(mark, "#00d0ff", 2 * unit))
    map_marks(predicted, lambda mark: paint(mark, "#ff00c0", unit))
    return sheet


# §3 ──────────────────────────────── the drawn world ────────────────────────────────────────
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 195, 20),
    "purple": (150, 50, 180),
    "black": (30, 30, 30)}
SHAPES = {  # outlines as in SVG, on a grid of 0 … 100; the circle needs none
    "circle": "",
    "square": "0,0 100,0 100,100 0,100",
    "triangle": "50,0 100,100 0,100",
    "cross": "33,0 67,0 67,33 100,33 100,67 67,67 67,100 33,100 33,67 0,67 0,33 33,33",
    "star": "50,0 62,36 100,38 70,61 81,100 50,78 19,100 30,61 0,38 38,36",
    "diamond": "50,0 100,50 50,100 0,50"}
WORDS = ("river", "stone", "lamp", "green", "seven", "winter", "paper", "cloud", "train", "music")


def paint_shapes(image, things, reach, rng):
    """Draw (colour, shape) pairs apart from each other; returns their tight boxes."""
    pen = ImageDraw.Draw(image)
    boxes = []
    for colour, shape in things:
        part = rng.uniform(*reach)
        side = round(part * min(image.size))
        for tries in range(1, 2000):
            x = rng.randint(0, image.width - side)
            y = rng.randint(0, image.height - side)
            box = [x, y, x + side, y + side]
            if all(apart(box, other) for other in boxes):
                break
            if tries % 50 == 0:  # crowded: smaller
                side = max(5, side * 9 // 10)
        else:
            raise ValueError(f"{len(things)} shapes do not fit in {image.size}: ask for fewer")
        paint_shape(pen, box, COLOURS[colour], shape)
        boxes.append(box)
    return boxes


def apart(box, other):
    """Whether more than a pixel lies between two boxes."""
    left, top, right, bottom = box
    low_x, low_y, high_x, high_y = other
    if left > high_x + 1 or right < low_x - 1:
        return True
    return top > high_y + 1 or bottom < low_y - 1


def paint_shape(pen, box, colour, shape):
    x, y, right, _ = box
    end = right - x - 1  # Pillow draws the outline's own pixels too: 0 … end are the whole side
    if shape == "circle":
        pen.ellipse((x, y, x + end, y + end), colour)
        return
    outline = []
    for point in SHAPES[shape].split():
        u, v = point.split(",")
        across = round(int(u) * end / 100)
        down = round(int(v) * end / 100)
        outline.append((x + across, y + down))
    pen.polygon(outline, colour)


# Options that one task alone has.
OPTIONS_OF = {"text": "math", "traces": "math", "numbers": "ocr", "coloured": "detection",
              "ordered": "detection"}


@dataclass(frozen=True)
class Synthetic:
    """Drawn scenes with exact answers: item i follows from the fields that repr shows, and i.

    grounding: the box of "red circle", the only one; counting: the centres of all "red circles";
    detection: every shape by name; ocr: printed words; math: a sum, printed or as text.
    `objects`: how many are asked for (ocr: lines, math: numbers).
    """

    task: str
    size: tuple[int, int] = (84, 84)  # (W, H) as drawn
    objects: tuple[int, int] = (1, 4)  # lowest, highest
    distractors: tuple[int, int] = (1, 3)  # how many other shapes
    reach: tuple[float, float] = (0.15, 0.3)  # a shape's part of the shorter side
    clutter: float = 0.0  # 0 … 1
    shapes: int = len(SHAPES)  # the first so many of SHAPES and of COLOURS
    colours: int = len(COLOURS)
    text: int = 0  # 1: math without an image
    coloured: int = field(default=0, repr=False)  # 1: detection's labels name the colour too
    ordered: int = field(default=0, repr=False)  # 1: detection lists from the top, then the left
    numbers: int = field(default=0, repr=False)  # 1: ocr prints numbers among the words
    traces: int = field(default=0, repr=False)  # 1: math as text has a solution to imitate
    seed: int = 0
    split: str = "train"  # another split is another stream
    count: int = field(default=100_000, repr=False)  # samples in one pass

    def __post_init__(self):
        if self.task not in DRAWN:
            raise ValueError(f"no task {self.task!r} is drawn, but {', '.join(DRAWN)}")
        for option, task in OPTIONS_OF.items():
            if getattr(self, option) and self.task != task:
                raise ValueError(f"{option}=1 is an option of {task}, not of {self.task}")
        if self.traces and not self.text:
            raise ValueError("traces=1 goes with math?text=1: only those solutions are written")
        self.draw(0)  # options that no scene can have show here and not in the middle of a run

    def draw(self, item):
        """(question, answer, images) of item 0 … count − 1; IndexError after the last."""
        number = range(self.count)[item]  # none after the last
        rng = random.Random(f"{self!r} {number}")
        shade = rng.randint(232, 255)
        image = Image.new("RGB", self.size, (shade, shade, shade))
        self.clutter_up(image, rng)
        count = rng.randint(*self.objects)
        if self.task in ("ocr", "math"):
            question, answer = self.printed(image, count, rng)
        else:
            question, answer = self.scene(image, count, rng)
        if self.text and self.task == "math":
            return question, answer, []
        return question, answer, [image]

    def clutter_up(self, image, rng):
        """Pale lines, in no colour that a question names."""
        pen = ImageDraw.Draw(image)
        width, height = self.size
        thick = 1 + min(self.size) // 100
        for _ in range(round(20 * self.clutter)):
            ends = []
            for side in (width, height, width, height):
                ends.append(rng.randint(0, side - 1))
            red = rng.randint(165, 225)
            green = rng.randint(165, 225)
            blue = rng.randint(165, 225)
            line_width = rng.randint(1, 3) * thick
            pen.line(ends, (red, green, blue), line_width)

    def scene(self, image, count, rng):
        """(question, answer) about shapes; every other distractor shares the colour or shape."""
        colours = [*COLOURS][: self.colours]
        shapes = [*SHAPES][: self.shapes]
        labels = [(colour, shape) for colour in colours for shape in shapes]
        target = rng.choice(labels)
        colour, shape = target
        others = [label for label in labels if label != target]
        close = [label for label in others if colour in label or shape in label]
        kinds = others, close or others  # in turn
        extra = []
        for number in range(rng.randint(*self.distractors)):
            extra.append(rng.choice(kinds[number % 2]))
        if self.task == "grounding":
            count = 1
        things = [target] * count + extra
        if self.task == "detection":
            things = rng.choices(labels, k=count)
        rng.shuffle(things)  # later ones are smaller in a crowd: that must not tell the target
        placed = paint_shapes(image, things, self.reach, rng)
        if self.task == "detection":
            found = []
            for box, (tone, name) in zip(placed, things):
                label = f"{tone} {name}" if self.coloured else name
                found.append({"bbox_2d": box, "label": label})
            if self.ordered:
                found.sort(key=from_the_top)
            question = "coloured shapes" if self.coloured else ", ".join(shapes)
            return question, found
        boxes = [box for box, thing in zip(placed, things) if thing == target]
        if self.task == "grounding":
            return f"{colour} {shape}", boxes[0]
        ending = "es" if shape == "cross" else "s"  # "circle" would mean one
        centres = []
        for x1, y1, x2, y2 in boxes:
            centres.append([(x1 + x2) / 2, (y1 + y2) / 2])
        return f"{colour} {shape}{ending}", centres

    def printed(self, image, count, rng):
        """(question, answer) of words, or of a sum with a number a line: small images hold it."""
        if self.task == "ocr":
            most = max(1, min(5, image.width // 100))
            lines = []
            for _ in range(max(1, count)):
                length = rng.randint(1, most)
                words = rng.choices(WORDS, k=length)
                if self.numbers:
                    for index, word in enumerate(words):
                        number = rng.randint(10, 9999)
                        words[index] = rng.choice((word, str(number)))
                lines.append(" ".join(words))
            question, answer = "", "\n".join(lines)
        else:
            numbers = []
            for _ in range(max(2, count)):
                sign = rng.choice((-1, 1))
                numbers.append(sign * rng.randint(1, 20))
            lines = [str(numbers[0])]
            for number in numbers[1:]:
                sign = "-" if number < 0 else "+"
                lines.append(f"{sign} {abs(number)}")
            shown = "the result of the sum in the image"
            if self.text:
                shown = " ".join(lines)
            question, answer = f"What is {shown}?", str(sum(numbers))
        write_large(image, "\n".join(lines), rng)
        return question, answer


def from_the_top(item):
    """Where an object comes in reading order: by its upper edge, then by its left one."""
    left, top, _, _ = item["bbox_2d"]
    return top, left


def write_large(image, text, rng):
    """Write the text as large as it fits, somewhere."""
    pen = ImageDraw.Draw(image)
    size = image.height / 3
    beside = below = -1  # pixels that the text leaves on its right and below
    while min(beside, below) < 0 and size > 6:
        size *= 0.9
        face = ImageFont.load_default(size)  # Pillow's own font
        left, top, right, bottom = pen.multiline_textbbox((0, 0), text, face)
        beside = image.width - right + left
        below = image.height - bottom + top
    x = rng.randint(0, max(0, int(beside)))
    y = rng.randint(0, max(0, int(below)))
    pen.multiline_text((x - left, y - top), text, (20, 20, 20), face)
