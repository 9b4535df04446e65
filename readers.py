"""What does an answer say? From a text to boxes, points, counts, objects and letters.

Three sorts of text are read here: a completion, where thinking is taken off (§1); the text of an
answer, as models write it, in good form or not (§2 to §4); and the true answers of data sets (§5),
which are read strictly. What a good answer is, rewards.py says.
"""
import contextlib
import itertools
import json
import re
import unicodedata

import numpy as np

from formulas import boxed
from needs import check

# COCO's 80 names in COCO's order, and their ids: of 1 to 90, ten are not in use.
COCO_NAMES = re.split("[/\n]", """person/bicycle/car/motorcycle/airplane/bus/train/truck/boat
traffic light/fire hydrant/stop sign/parking meter/bench/bird/cat/dog/horse/sheep/cow/elephant/bear
zebra/giraffe/backpack/umbrella/handbag/tie/suitcase/frisbee/skis/snowboard/sports ball
kite/baseball bat/baseball glove/skateboard/surfboard/tennis racket/bottle/wine glass/cup/fork/knife
spoon/bowl/banana/apple/sandwich/orange/broccoli/carrot/hot dog/pizza/donut/cake/chair/couch
potted plant/bed/dining table/toilet/tv/laptop/mouse/remote/keyboard/cell phone/microwave/oven
toaster/sink/refrigerator/book/clock/vase/scissors/teddy bear/hair drier/toothbrush""")
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


# ---- §1 from a completion to the text of its answer ----------------------------------------------
def think_order(think: bool | str) -> str:
    """-> "before" (or True): thinking, then the answer; "after": thinking after the answer, as
    in Think-After-Answer, arXiv 2503.16188; "" (or False): no thinking is asked for."""
    order = {False: "", True: "before"}.get(think, think)
    check(order in ("", "before", "after"), f"think can be before or after, not {think!r}")
    return order


BEFORE = re.compile(r"(?s)\s*<think>.*</think>\s*<answer>.*</answer>\s*")
AFTER = re.compile(r"(?s)\s*<answer>.*</answer>\s*<think>.*</think>\s*")


def split_thinking(completion: str, think: bool | str = "before") -> tuple[str, bool]:
    """-> the answer's text, in either order; whether all has the form asked for, each tag once."""
    text = completion.partition("<|im_end|>")[0].partition("<|endoftext|>")[0]
    once = len(re.findall("</?(?:think|answer)>", text)) == 4
    # [PR1 code] 1 if all has this form, else 0; there a newline broke it, here it does not.
    form = AFTER if think_order(think) == "after" else BEFORE
    formed = once and form.fullmatch(text) is not None
    # Outside of all thinking: what follows it, or what came first.
    head, opened, _ = text.partition("<think>")
    tail = text.rpartition("</think>")[2]
    if "<think>" in tail:
        tail = ""  # still thinking
    if not opened:
        head = ""
    head = head.rpartition("</think>")[2]
    answer = tail
    if "<answer>" not in tail and ("<answer>" in head or not tail.strip()):
        answer = head
    return answer.rpartition("<answer>")[2].partition("</answer>")[0].strip(), formed


# ---- §2 JSON, boxes and points -------------------------------------------------------------------
def read_json(text):
    """The value of a JSON text, bare or in a ```json fence; None if it is not JSON."""
    text = text.removeprefix("```json").removeprefix("```").removesuffix("```")
    with contextlib.suppress(ValueError, RecursionError):  # not JSON; nested too deeply
        return json.loads(text, parse_int=float)  # int() refuses long numbers, float() says inf
    return None


def plain_numbers(value, length):
    """A list of so many numbers as floats; None if it is not, or has NaN or impossible sizes."""
    if not isinstance(value, (list, tuple)) or len(value) != length:
        return None
    if any(type(n) not in (int, float) or not abs(n) <= 1e7 for n in value):  # no bool, no NaN
        return None
    return [float(n) for n in value]


# Digits are bounded and repeats never touch, so that the patterns stay linear in the text.
NUMBER = r"\s*(-?[0-9]{1,7}(?:\.[0-9]{1,20})?)\s*"
PAIR = f"{NUMBER},{NUMBER}"
CORNERS = rf"\({PAIR}\),\s*\({PAIR}\)"
KEYED = re.compile(rf'"(?:bbox|point)_2d"\s*:\s*\[{PAIR}(?:,{PAIR})?\]')
LOOSE = re.compile(rf"\[{PAIR},{PAIR}\]|\({PAIR},{PAIR}\)|{CORNERS}")  # the spellings of [PR1 code]
TOKENS = re.compile(r"<\|object_ref_start\|>[^<]*<\|object_ref_end\|>"  # [PR1 code], its pipes
                    r"(?:<\|box_start\|>[^<]*<\|box_end\|>)+")  # escaped: a name, then boxes
TAG = re.compile("<points?(?= )[^<>]*>")  # <point x="1" y="2"> or <points x1="1" y1="2" x2=…>
TAGS = re.compile(r"(?:<points?(?= )[^<>]*(?:/>|>[^<>]*</points?>)\s*)+")
MARK = re.compile(rf"""\bx([0-9]{{0,4}})=["']?{NUMBER}["']? y\1=["']?{NUMBER}""")


def parse_boxes(completion: str, image_size=None) -> list[list[float]]:
    """All boxes that can be made out in the answer, in good form or not: what pictures show."""
    shapes, _ = read_shapes(split_thinking(completion)[0], image_size)
    return [shape for shape in shapes if len(shape) == 4]


def parse_points(completion: str, image_size=None) -> list[list[float]]:
    """All points, or centres of boxes, that can be made out in the answer."""
    shapes, _ = read_shapes(split_thinking(completion)[0], image_size)
    return [centre(shape) for shape in shapes]


def read_shapes(text, image_size):
    """-> boxes and points in the order said; the form: tokens, list, bare, plain or "" (none)."""
    if "<|box_start|>" in text:
        boxes_N4 = np.array(re.findall(CORNERS, text), float).reshape(-1, 4)
        boxes_N4 *= np.tile(image_size or (1000, 1000), 2) / 1000
        whole = TOKENS.fullmatch(text) and len(boxes_N4) == text.count("<|box_start|>")
        return boxes_N4.tolist(), "tokens" if whole else ""
    if tags := TAG.findall(text):
        points = [[float(x), float(y)] for tag in tags for _, x, y in MARK.findall(tag)]
        return points, "plain" if points and TAGS.fullmatch(text) else ""
    items = read_json(text)
    if box := plain_numbers(items, 4):
        return [box], "bare"
    shapes = nested_shapes(items)
    if isinstance(items, list):
        if len(shapes) != len(items):
            return shapes, ""
        return shapes, "list" if all(map(is_qwens, items)) else "plain"
    if shapes:
        return shapes, ""
    # Prose, or a list cut short: keyed coordinates first, as a label may hold numbers.
    found = list(KEYED.finditer(text)) or LOOSE.finditer(text)
    return [[float(n) for n in match.groups() if n is not None] for match in found], ""


def is_qwens(item):
    """Whether a box or a point is written as Qwen2.5-VL is taught to."""
    return isinstance(item, dict) and ("bbox_2d" in item or "point_2d" in item)


def nested_shapes(value):
    """The boxes and points in a JSON value, under whatever keys, in their order."""
    shapes, left = [], [value]
    while left:
        item = left.pop()
        shape = shape_of(item)
        if shape:
            shapes.append(shape)
        elif isinstance(item, dict):
            left += reversed(item.values())
        elif isinstance(item, list):
            left += reversed(item)
    return shapes


CORNER_NAMES = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"),
                ("x_min", "y_min", "x_max", "y_max"), ("left", "top", "right", "bottom"))


def shape_of(item):
    """A box or a point; None if it is neither."""
    if not isinstance(item, dict):
        return plain_numbers(item, 4) or plain_numbers(item, 2)
    box = plain_numbers(item.get("bbox_2d"), 4)
    point = plain_numbers(item.get("point_2d"), 2)
    for names in CORNER_NAMES:
        box = box or plain_numbers([item.get(name) for name in names], 4)
    place = [item.get(name) for name in ("x", "y")]
    return box or point or plain_numbers(place, 2)


def centre(shape):
    return [(shape[0] + shape[-2]) / 2, (shape[1] + shape[-1]) / 2]  # a point's is itself


# ---- §3 objects and counts -----------------------------------------------------------------------
def read_object(item):
    """(box, label) of {"bbox_2d", "label"}; None without an upright box or without a label."""
    if not isinstance(item, dict):
        return None
    box, label = plain_numbers(item.get("bbox_2d"), 4), item.get("label")
    if not box or box[0] > box[2] or box[1] > box[3]:
        return None
    return (box, label) if isinstance(label, str) and label else None


def read_objects(completion: str) -> tuple[list[tuple], int]:
    """-> (box, label) of each whole object in the answer; how many items were said.

    Of anything but a JSON list, the whole objects count, and all the rest is one item more: the
    prose around them, the end that was cut off, the list that is missing around a lone object.
    """
    text = split_thinking(completion)[0]
    items = read_json(text)
    if not isinstance(items, list):
        items = [read_json(piece) for piece in re.findall(r"\{[^{}]*\}", text)]
        items.append(None)
    pairs = [read_object(item) for item in items]
    return [pair for pair in pairs if pair], len(items)


def read_number(text):
    """The whole number that is all of an answer: 2, "2.", **2**, {"count": 2}; None without."""
    if "\\boxed{" in text:
        text = boxed(text)
    value = read_json(text)
    if isinstance(value, dict):
        numbers = [true_numbers([item], 1) for item in value.values()]
        numbers = [number for number in numbers if number]
        if len(numbers) == 1:  # {"label": "cat", "count": "2"}
            text = f"{numbers[0][0]:g}"
    number = re.fullmatch(r"[*_$ ]{0,9}([0-9]{1,6})(?:\.0{1,9})?[*_$ .]{0,9}", text)
    return int(number[1]) if number else None


# ---- §4 option letters ---------------------------------------------------------------------------
# An option letter that is meant as one, strongest form first: in a box, after "answer is", alone.
COMMAND = re.compile(r"\\(?:text|math|operator)[a-z]{0,6}\s?\{([^{}]*)\}")  # \text{E} is E
IN_BOX = re.compile(r"\\(?:boxed|fbox)\s?\{([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}")
STATED = re.compile(r"(?:(?i:answer|option|choice)[*_\"]*\s?(?i:is|:|=)"
                    r"|答案(?:应?该?[是为选選]|[:】])|(?<!不)[选選][择擇]?(?![项項]):?)\s*(?=([^\n]{0,80}))")
ALONE = re.compile(r"(?:^|(?<=\s))[(*\[$]*([A-Z])(?:[).:*$\]]+(?=\s|$)|[^\S\n]*$)", re.MULTILINE)
# Not the I of "I think", nor the A of "A circle"; that of "A because …" is one.
GOES_ON = ("(?:and|or|not|as|because|since|is|was|but|for|so|given|due|based|if|which|where|when"
           "|with|from|in|on|at|of|to|by|the|this|it|we) ")  # no word that an article goes before
LETTER = rf"(?:[B-HJ-Z]|I(?! [a-z])|A(?! (?!{GOES_ON})[a-z]))"
BEFORE_IT = "(?:(?i:the|option|choice) |选项 ?)*"
LEADING = re.compile(rf"{BEFORE_IT}({LETTER}(?: (?:(?:[|] )?(?:or|and) )?{LETTER})*)(?: |$)")
SMALL = re.compile(rf"[*$\[ ]{{0,9}}{BEFORE_IT}([a-z])[).\]*$ ]{{0,9}}$")  # e and no more
IN_BRACKETS = re.compile(r"(?<!\w)\([a-z]\)")  # (e) is (E)


def chosen_letters(text: str) -> set[str]:
    """The letters given in the strongest form that the text has. Two letters are a hedge: wrong."""
    text = unicodedata.normalize("NFKC", text)  # （B） is (B)
    text = COMMAND.sub(r"\1", COMMAND.sub(r"\1", text))
    text = IN_BRACKETS.sub(lambda match: match[0].upper(), text)
    for form in (IN_BOX, STATED):
        letters = set()
        statements = dict.fromkeys(form.findall(text))  # each once, as a loop may repeat it
        for said in itertools.islice(statements, 100):
            letters |= named_letters(said)
        if letters:
            return letters
    text = re.sub(r"^(?i:option |choice |answer |选项)\s?", "", text)
    if small := SMALL.fullmatch(text):
        return {small[1].upper()}
    return set(ALONE.findall(text)) if ALONE.match(text) else set()


def named_letters(said):
    """The option letters that a statement begins with: "(B) since A…" B, "A or B" both."""
    if small := SMALL.match(said.strip()):
        return {small[1].upper()}
    said = re.sub(r"(?<=\w)[).:]{1,3}\s*(?=\w)", " | ", said)  # the A of "A. circle" is one
    said = re.sub(r"([A-Z])(?=[一-鿿])", r"\1 ", said)
    said = re.sub(r"\\[a-z]+|[^\w'|]+", " ", said).strip()
    match = LEADING.match(said)
    return set(re.findall(r"\b[A-Z]\b", match[1])) if match else set()


# ---- §5 true answers -----------------------------------------------------------------------------
def unwrapped(answer):
    """The answer of a truth that a trainer wrote as a completion, with <think> or <answer>."""
    if isinstance(answer, str) and re.search("</?(think|answer)>", answer):
        return split_thinking(answer)[0]
    return answer


def placed(answer):
    """A true answer that is JSON, also where it is kept as text."""
    answer = unwrapped(answer)
    if not isinstance(answer, str):
        return answer
    value = read_json(boxed(answer))
    check(value is not None, f"it must be JSON, but is {answer!r:.200}")
    return value


def true_numbers(values, length):
    """So many numbers as floats, also where they are text; None if they are not that."""
    if isinstance(values, (str, bytes, dict)):
        return None
    try:
        values = list(values)
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):  # no list; no number; too long an integer
        return None
    if any(isinstance(value, bool) for value in values):
        return None
    return plain_numbers(numbers, length)


def true_box(answer):
    value = placed(answer)
    if isinstance(value, list) and len(value) == 1:  # as it would be answered
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bbox_2d")
    box = true_numbers(value, 4)
    check(box, f"a box must be [x1, y1, x2, y2], not {value!r:.200}")
    upright = box[0] < box[2] and box[1] < box[3]
    check(upright, f"the box {box} has x2 ≤ x1 or y2 ≤ y1: is it x, y, w, h? then ?box=xywh")
    return box


def true_points(answer):
    value = placed(answer)
    if isinstance(value, (list, tuple)):
        return [true_point(item) for item in value]
    number = true_numbers([value], 1)
    whole = number and number[0] >= 0 and number[0] % 1 == 0
    form = "it must be a whole number from 0 or a list of [x, y]"
    check(whole, f"{form}, not {value!r:.200}")
    return int(number[0])


def true_point(value):
    point = value
    if isinstance(value, dict):
        point = value.get("point_2d") or [value.get("x"), value.get("y")]
    point = true_numbers(point, 2)
    check(point, f"a point must be [x, y], not {value!r:.200}")
    return point


def true_objects(answer):
    value = placed(answer)
    if isinstance(value, dict) and {"target_id", "target_box"} <= value.keys():  # [PR1 code]
        names = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
        pairs = zip(value["target_box"], value["target_id"], strict=True)
        value = [{"bbox_2d": box, "label": names.get(number)} for box, number in pairs]
    form = 'it must be a list of {"bbox_2d", "label"}'
    check(isinstance(value, (list, tuple)), f"{form}, not {value!r:.200}")
    objects = []
    for item in value:
        whole = isinstance(item, dict) and {"bbox_2d", "label"} <= item.keys()
        check(whole, f"{form}, not {item!r:.200}")
        label = item["label"]
        named = isinstance(label, (str, int, float)) and str(label).strip() != ""
        check(named, f"a label must be text, not {label!r:.200}")
        objects.append({"bbox_2d": true_box(item["bbox_2d"]), "label": str(label)})
    return objects


def true_text(answer):
    answer = unwrapped(answer)
    check(answer is not None, "it is missing")
    plain = isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
    check(plain, f"it must be text or a number, not {answer!r:.200}")
    check(str(answer).strip(), "it is empty: every completion would earn 0")
    return str(answer)


def true_formula(answer):
    text = true_text(answer).rpartition("#### ")[2]  # GSM8K: the steps, then the value
    listed = re.match(r"""\s*[\[{]\s*['"]""", text)
    check(not listed, f"it is a list kept as text, {text!r:.60}: name one value")
    formula = boxed(text)
    check(formula, f"{answer!r:.200} is empty: every completion would earn 0")
    return formula


def true_letter(answer):
    letter = re.sub(r"\\[a-z]+|[{}\s().:]", "", true_formula(answer))
    one = re.fullmatch("[A-Za-z]", letter)
    check(one, f"it must be one letter, not {answer!r:.200}")
    return letter.upper()
