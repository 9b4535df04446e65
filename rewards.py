r"""Rewards: what a good answer is. Per task: the prompt, the reader of the answer, the reward, its parts.

    python rewards.py score rollouts.jsonl            # one row in, one row out, in order
    echo '{"task": "grounding", "completion": "[0, 0, 10, 10]", "answer": [0, 0, 10, 20]}' \
        | python rewards.py score -                   # {"reward": 1.5, "parts": {"format": 1.0, "iou": 0.5}}

Two papers: Perception-R1 [PR1], arXiv 2504.07954 (grounding, counting, OCR, detection) and
Open-Vision-Reasoner [OVR], arXiv 2507.05255 (maths, choice). [PR1 code] is the first one's release.

Worked examples (each is a test):
  grounding  true [0,0,10,20], said [0,0,10,10]: IoU = 100/200, so 1 (format) + 0.5 = 1.5
  counting   true (0,0) (30,40), said (0,0), image 30x40: min/max = 1/2, no distance, so 0.5
  detection  two true boxes, one of them found exactly, nothing else said: format 1, F1 2/3, class 1,
             IoU 1, penalty 0.5 * (0/1 + 1/2), so 0.25 + 0.5 + 1 + 1 - 0.25 = 2.5
  ocr        "kitten" read as "sitting": Levenshtein 3, longer length 7, so 4/7
  maths      "... so \boxed{0.5}" with the reference \frac{1}{2}: 1

`score(task, completion, answer, image_size)` is pure: whatever the model writes becomes a number in
bounded time. Only the caller's own mistakes (task, option, unreadable true answer) are errors.
Coordinates are pixels of the resized image, which is what the model sees; `image_size` is its [W, H].

Deviations from the papers and from the released code:
  D2  Coordinates are Qwen2.5-VL's absolute pixels. Qwen2-VL's box tokens (0-1000), which [PR1] used for
      grounding and counting, are read too. `<|im_end|>` may be missing: samplers strip it.
  Thinking adds `format_weight` * think to a task's total; text before `</think>` is never the answer.
      The weight is 1, but 0 for maths and choice, where [OVR] ignores the format.
  No value by accident. The released code divides by zero, or an exception makes its total 0, where
      we say: IoU with no area is 0; a malformed or inverted box is one invalid item; true labels are
      compared with the right index; nothing to find and `[]` said is fully right (3 in detection,
      1 in counting); far-off points earn 0, not less; a format needs its whole pattern, not its first "<".
      Empty OCR texts stay at 0, as released.
"""

import argparse
import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

TASKS = ("grounding", "counting", "detection", "ocr", "math", "choice")

# Options of each task and what they may be; the first one is the default.
OPTIONS = {
    "grounding": {"iou_power": (1, 2)},  # 1 [PR1 §4.1], 2 [PR1 code]
    "counting": {"matching": ("optimal", "order")},  # order: [PR1 T5] "without reward matching"
    "detection": {
        "matching": ("iou", "detr", "order"),  # iou [PR1 §4.2], detr [PR1 code], order [PR1 T5]
        "penalty": (0.5, 0.0),  # 0.5 [PR1 T6], 0 in the released script; any number >= 0 is taken
    },
    "ocr": {},
    "math": {"exact": (False, True)},  # False: equal by math-verify; True: same string [OVR §3.2]
    "choice": {},
}
COMPONENTS = ("format", "f1", "class", "iou", "penalty")  # [PR1 T6] adds them one by one

# COCO's 80 names in its own order. Its ids run from 1 to 90 and leave these ten out.
COCO_NAMES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,"
    "mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,"
    "teddy bear,hair drier,toothbrush".split(",")
)
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(i for i in range(1, 91) if i not in COCO_GAPS)


@dataclass(frozen=True)
class Score:
    """A completion's reward and, by name, the unweighted parts it was made of."""

    total: float
    parts: dict[str, float]


# ---------------------------------------------------------------------------------------------------
# §1 Prompts
# ---------------------------------------------------------------------------------------------------

SYSTEM_DEFAULT = "You are a helpful assistant. "  # [PR1 code], with the space, in training
SYSTEM_THINK = (  # [PR1 code]: its "r1v" entry
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with "
    "the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> "
    "</answer> tags, respectively, i.e., <think> reasoning process here </think><answer> answer here "
    "</answer>"
)
# [PR1 code] says "final answer (number)"; the answers here are boxes, texts and letters as well.
THINK = " Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."

# [PR1 T8]; OVR's prompts were not published, so the last two lines are ours.
PROMPTS = {
    "grounding": "Output the bounding box of the {question} in the image.",
    "counting": "Output all the bounding boxes of the {question}",
    "detection": "Please output bbox coordinates and names of {question}.",
    "ocr": "{question}",
    "math": "{question}\nPut the final answer in \\boxed{{}}.",
    "choice": "{question}\nAnswer with the letter of the right option.",
}
DEFAULT_QUESTIONS = {"detection": ", ".join(COCO_NAMES), "ocr": "OCR this image."}


def prompt(task: str, question: str = "", *, think: bool = False) -> str:
    """The user's text for one sample. Detection and OCR have a standing question."""
    _check_task(task)
    text = PROMPTS[task].format(question=question or DEFAULT_QUESTIONS.get(task, ""))
    return text + THINK if think else text


def reference(task: str, answer: object, question: str = "", *, think: bool = False) -> str:
    """A completion that earns the full reward, coordinates rounded to whole pixels as Qwen writes them."""
    _check_task(task)
    if task == "grounding":
        said = [{"bbox_2d": _whole(_true_box(answer)), "label": question}]
    elif task == "counting":
        true = _true_points(answer)
        said = true
        if not isinstance(true, int):
            said = [{"point_2d": _whole(point), "label": question} for point in true]
    elif task == "detection":
        said = [{"bbox_2d": _whole(box), "label": label} for box, label in _true_objects(answer)]
    elif task == "math":
        said = f"\\boxed{{{_unwrap(str(answer))}}}"
    else:
        said = str(answer)
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    topic = question or "the image"
    return f"<think>I look closely at {topic}.</think><answer>{text}</answer>" if think else text


def _whole(numbers):
    return [round(number) for number in numbers]


def _check_task(task):
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")


# ---------------------------------------------------------------------------------------------------
# §2 From a completion to the answer's text
# ---------------------------------------------------------------------------------------------------

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THINK_FORM = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)


def think_form(completion: str) -> bool:
    """[PR1 code] `<think>…</think><answer>…</answer>`, exactly once each. Newlines may occur: there they
    broke the pattern, so that longer thoughts earned nothing."""
    text = _until_stop(completion)
    # Counting first keeps the lazy pattern linear, and bars nested or repeated tags.
    return all(text.count(tag) == 1 for tag in TAGS) and bool(THINK_FORM.fullmatch(text))


def answer_text(completion: str) -> str:
    """What counts as the answer: the last `<answer>` after the thinking, else all that follows it."""
    text = _until_stop(completion)
    if "<think>" in text or "</think>" in text:
        _, closed, text = text.rpartition("</think>")
        if not closed or "<think>" in text:
            return ""  # still thinking
    text = text.rpartition("<answer>")[2]
    return text.partition("</answer>")[0].strip()


def _until_stop(completion):
    for token in STOP_TOKENS:
        completion = completion.partition(token)[0]
    return completion


# ---------------------------------------------------------------------------------------------------
# §3 From text to boxes and points
# ---------------------------------------------------------------------------------------------------

# Bounded digits and literals between any two repeats keep every pattern linear in the text.
NUMBER = r"\s*(-?[0-9]{1,7}(?:\.[0-9]{1,20})?)\s*"
PAIR = f"{NUMBER},{NUMBER}"
CORNERS = re.compile(rf"\({PAIR}\),\s*\({PAIR}\)")
KEYED = re.compile(rf'"(?:bbox|point)_2d"\s*:\s*\[{PAIR}(?:,{PAIR})?\]')
# The three spellings that [PR1 code] reads: [a,b,c,d], (a,b,c,d), (a,b),(c,d).
LOOSE = re.compile(rf"\[{PAIR},{PAIR}\]|\({PAIR},{PAIR}\)|\({PAIR}\),\s*\({PAIR}\)")
# [PR1 code] with its pipes escaped: a name, then one or more boxes.
BOX_TOKENS = re.compile(
    r"<\|object_ref_start\|>[^<]*<\|object_ref_end\|>(?:<\|box_start\|>[^<]*<\|box_end\|>)+"
)
LARGEST = 1e7  # no image is that large: beyond it, squares would overflow


def parse_boxes(completion: str, image_size=None) -> list[list[float]]:
    """Every box that can be made out in the answer, well-formed or not (for pictures)."""
    return [shape for shape in _shapes(answer_text(completion), image_size)[0] if len(shape) == 4]


def parse_points(completion: str, image_size=None) -> list[list[float]]:
    """Every point, or centre of a box, that can be made out in the answer."""
    return [_centre(shape) for shape in _shapes(answer_text(completion), image_size)[0]]


def _shapes(text, image_size):
    """-> (boxes and points in the order said, whether the text is nothing but such a list)."""
    if "<|box_start|>" in text:
        scale = (1.0, 1.0) if image_size is None else (image_size[0] / 1000, image_size[1] / 1000)
        boxes = [[float(n) for n in match.groups()] for match in CORNERS.finditer(text)]
        scaled = [[x * scale[i % 2] for i, x in enumerate(box)] for box in boxes]
        return scaled, bool(BOX_TOKENS.fullmatch(text))
    items = _json(text)
    if _numbers(items, 4):
        return [_numbers(items, 4)], True
    if isinstance(items, list):
        shapes = [_shape(item) for item in items]
        found = [shape for shape in shapes if shape]
        return found, len(found) == len(shapes)
    # Prose or a list cut short. Keyed coordinates first: a label may hold numbers too.
    matches = list(KEYED.finditer(text)) or LOOSE.finditer(text)
    return [[float(n) for n in match.groups() if n is not None] for match in matches], False


def _json(text):
    """The value of a JSON text, in a ```json fence or bare; None if it is not JSON."""
    text = text.strip()
    if text.startswith("```"):
        text = text.removeprefix("```").removeprefix("json").strip().removesuffix("```")
    try:
        # parse_int=float: int() refuses more than 4,300 digits, float() makes them infinite.
        return json.loads(text, parse_int=float)
    except (ValueError, RecursionError):  # not JSON; nested too deeply
        return None


def _shape(item):
    """The box or point of `{"bbox_2d": …}` or `{"point_2d": …}`, else None."""
    if not isinstance(item, dict):
        return None
    return _numbers(item.get("bbox_2d"), 4) or _numbers(item.get("point_2d"), 2)


def _numbers(value, length):
    """A list of `length` finite numbers as floats, else None. JSON's true is no number."""
    if not isinstance(value, (list, tuple)) or len(value) != length:
        return None
    plain = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value)
    return [float(n) for n in value] if plain and all(abs(n) <= LARGEST for n in value) else None


def _centre(shape):
    return shape if len(shape) == 2 else [(shape[0] + shape[2]) / 2, (shape[1] + shape[3]) / 2]


def _upright(box):
    return box[0] <= box[2] and box[1] <= box[3]


# True answers come from data files: here a mistake is an error, in a sentence.


def _true_value(answer):
    """[PR1 code] stores answers as strings of JSON; arrays become lists."""
    if isinstance(answer, str):
        answer = json.loads(answer)
    return answer.tolist() if isinstance(answer, (np.ndarray, np.generic)) else answer


def _true_box(answer):
    box = _numbers(_true_value(answer), 4)
    if box is None:
        raise ValueError(f"the true box must be four numbers [x1, y1, x2, y2], not {answer!r:.200}")
    return box


def _true_points(answer):
    """-> a list of [x, y], or the bare number if the data has no more than that."""
    value = _true_value(answer)
    if isinstance(value, (int, float)) and value >= 0 and value == int(value):
        return int(value)
    points = [_numbers(p, 2) or _numbers(p, 4) for p in value] if isinstance(value, list) else [None]
    if None in points:
        raise ValueError(f"true points must be a list of [x, y] or a number, not {answer!r:.200}")
    return [_centre(point) for point in points]


def _true_objects(answer):
    """-> [(box, label)], from our list or from the released {"target_id", "target_box"}."""
    value = _true_value(answer)
    if isinstance(value, dict) and "target_id" in value and "target_box" in value:
        names = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
        pairs = zip(value["target_box"], value["target_id"], strict=True)
        value = [{"bbox_2d": box, "label": names.get(category)} for box, category in pairs]
    objects = []
    for item in value if isinstance(value, list) else [value]:
        box = _numbers(item.get("bbox_2d"), 4) if isinstance(item, dict) else None
        if box is None or not isinstance(item.get("label"), str):
            raise ValueError(f'a true object must be {{"bbox_2d", "label"}}, not {item!r:.200}')
        objects.append((box, item["label"]))
    return objects


# ---------------------------------------------------------------------------------------------------
# §4 Perception: each task's reward as (total, parts)
# ---------------------------------------------------------------------------------------------------


def _overlaps(boxes_N4, true_M4):
    """-> IoU and GIoU, each [N, M]. A ratio without area is 0."""
    boxes, true = boxes_N4[:, None], true_M4[None]
    area_N1 = np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
    area_1M = np.prod(true[..., 2:] - true[..., :2], axis=-1)
    low = np.maximum(boxes[..., :2], true[..., :2])
    high = np.minimum(boxes[..., 2:], true[..., 2:])
    inner_NM = np.prod(np.clip(high - low, 0, None), axis=-1)
    union_NM = area_N1 + area_1M - inner_NM
    outer_low = np.minimum(boxes[..., :2], true[..., :2])
    outer_high = np.maximum(boxes[..., 2:], true[..., 2:])
    hull_NM = np.prod(outer_high - outer_low, axis=-1)
    # IoU = |A ∩ B| / |A ∪ B|;  GIoU = IoU − (|hull| − |A ∪ B|) / |hull|
    iou_NM = inner_NM / np.where(union_NM > 0, union_NM, 1)
    giou_NM = iou_NM - (hull_NM - union_NM) / np.where(hull_NM > 0, hull_NM, 1)
    return iou_NM, giou_NM


def _pairs(cost_NM, in_order):
    """-> rows, columns of min(N, M) pairs: the cheapest assignment, or simply as listed."""
    if in_order:
        count = min(cost_NM.shape)
        return np.arange(count), np.arange(count)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("matching boxes needs scipy: pip install scipy") from None
    # [PR1 §4.2] σ̂ = argmax_σ Σ_i Φ(y_i, z_σ(i)), the Hungarian algorithm
    return linear_sum_assignment(cost_NM)


def _iou(box, true):
    if box is None or not (_upright(box) and _upright(true)):
        return 0.0
    return float(_overlaps(np.array([box]), np.array([true]))[0][0, 0])


def _grounding(text, answer, image_size, truncated, weight, *, iou_power):
    true = _true_box(answer)
    shapes, formed = _shapes(text, image_size)
    boxes = [shape for shape in shapes if len(shape) == 4]
    box = boxes[0] if boxes else None  # the first one said: a second guess earns nothing
    formed = formed and len(shapes) == 1 and box is not None and _upright(box) and not truncated
    parts = {"format": float(formed), "iou": _iou(box, true)}
    # [PR1 §4.1] S = format reward + answer reward,  Φ = IoU (IoU² in the released code)
    return weight * parts["format"] + parts["iou"] ** iou_power, parts


def _counting(text, answer, image_size, truncated, weight, *, matching):
    true = _true_points(answer)
    shapes, formed = _shapes(text, image_size)
    formed = formed and not truncated and (bool(shapes) or _json(text) == [])
    # A bare list of four is a box for grounding only; a bare number answers a bare number.
    formed = formed and _numbers(_json(text), 4) is None
    number = _said_number(text)
    if isinstance(true, int) and number is not None and not truncated:
        formed, said = True, number
    else:
        said = len(shapes)
    total_true = true if isinstance(true, int) else len(true)
    parts = {"format": float(formed), "count": 0.0, "distance": 0.0}
    if formed:
        parts["count"] = 1.0 if said == total_true else min(said, total_true) / max(said, total_true)
        parts["distance"] = _closeness(shapes, true, image_size, matching == "order")
    # [PR1 code] r = gate · min(n, m)/max(n, m) · (1 − mean distance / diagonal)
    return parts["format"] * parts["count"] * parts["distance"], parts


def _closeness(shapes, true, image_size, in_order):
    """1 − mean matched distance / diagonal; 1 where there is nothing to measure it from."""
    if isinstance(true, int) or not (shapes or true):
        return 1.0
    if not (shapes and true):
        return 0.0
    said_N2, true_M2 = np.array([_centre(shape) for shape in shapes]), np.array(true)
    distance_NM = np.linalg.norm(said_N2[:, None] - true_M2[None], axis=-1)
    diagonal = 1000 * math.sqrt(2) if image_size is None else math.hypot(*image_size)
    mean = distance_NM[_pairs(distance_NM, in_order)].mean()
    # Not below 0: as released, points far outside the image made the reward negative.
    return max(0.0, 1 - float(mean) / diagonal)


def _said_number(text):
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else None


def _detection(text, answer, image_size, truncated, weight, *, matching, penalty, components):
    objects = _true_objects(answer)
    items = _json(text)
    said = _valid_objects(items, _vocabulary(objects, matching))
    parts = dict.fromkeys(COMPONENTS, 0.0)
    if items == [] and not objects:
        parts.update({"format": 1.0, "f1": 1.0, "class": 1.0, "iou": 1.0})
    elif said:
        parts["format"] = len(said) / len(items)
        if objects:
            parts.update(_found(said, objects, matching))
    weights = {"format": 0.25 * weight, "f1": 0.75, "class": 1.0, "iou": 1.0, "penalty": -penalty}
    # [PR1 code] r = 0.25·format + 0.75·F1 + class + IoU − penalty·(FP/n_pred + FN/n_gt) in [0, 3]
    total = sum(weights[name] * parts[name] for name in components)
    return min(max(total, 0.0), 3.0), parts


def _vocabulary(objects, matching):
    """Labels that are valid: COCO's where the true ones are COCO's (always as released), else any."""
    coco = set(COCO_NAMES)
    true = {label for _, label in objects}
    return coco if matching == "detr" or (true and true <= coco) else None


def _valid_objects(items, vocabulary):
    """-> [(box, label)]. [PR1 code] An invalid item lowers the format and counts nowhere else."""
    said = []
    for item in items if isinstance(items, list) else []:
        box = _numbers(item.get("bbox_2d"), 4) if isinstance(item, dict) else None
        label = item.get("label") if isinstance(item, dict) else None
        known = isinstance(label, str) and (bool(label) if vocabulary is None else label in vocabulary)
        if box and _upright(box) and known:
            said.append((box, label))
    return said


def _found(said, objects, matching):
    """F1, class, IoU and penalty of the pairs that match; nothing at all if none does."""
    boxes_N4, true_M4 = (np.array([box for box, _ in pairs]) for pairs in (said, objects))
    names, true_names = (np.array([label for _, label in pairs]) for pairs in (said, objects))
    iou_NM, giou_NM = _overlaps(boxes_N4, true_M4)
    same_NM = names[:, None] == true_names[None]
    cost_NM = -iou_NM
    if matching == "detr":
        # [PR1 code] 5·L1(centre and size, pixels) − p(class) − 2·GIoU; p is a softmax over 90 scores,
        # 1 at the class said and 0 elsewhere, so that distance decides nearly alone.
        l1_NM = np.abs(_centre_size(boxes_N4)[:, None] - _centre_size(true_M4)[None]).sum(-1)
        class_NM = np.where(same_NM, math.e, 1.0) / (math.e + 89)
        cost_NM = 5 * l1_NM - class_NM - 2 * giou_NM
    rows, columns = _pairs(cost_NM, matching == "order")
    kept = iou_NM[rows, columns] > 0.5  # strictly, and after the assignment
    rows, columns = rows[kept], columns[kept]
    hits, n_pred, n_gt = len(rows), len(said), len(objects)
    if hits == 0:
        return {}
    return {
        "f1": 2 * hits / (n_pred + n_gt),  # = 2PR/(P + R) with P = hits/n_pred, R = hits/n_gt
        "class": float(same_NM[rows, columns].mean()),
        "iou": float(iou_NM[rows, columns].mean()),
        "penalty": (n_pred - hits) / n_pred + (n_gt - hits) / n_gt,
    }


def _centre_size(boxes_N4):
    low, high = boxes_N4[:, :2], boxes_N4[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1)


def _ocr(text, answer, image_size, truncated, weight):
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ImportError("the OCR reward needs rapidfuzz: pip install rapidfuzz") from None
    said, true = " ".join(text.split()), " ".join(str(answer).split())
    longest = max(len(said), len(true))
    # [PR1 §4.1] Φ = edit distance: 1 − Levenshtein / longer length, white space folded
    similarity = 1 - Levenshtein.distance(said, true) / longest if longest else 0.0
    return similarity, {"similarity": similarity}


# ---------------------------------------------------------------------------------------------------
# §5 Maths and choice
# ---------------------------------------------------------------------------------------------------

LONGEST_FORMULA = 400  # characters that are worth a symbolic comparison
DEADLINE = 1.0  # seconds for one comparison, as in Open-Reasoner-Zero, whose reward [OVR §3.2] follows
# Powers of powers, long exponents, factorials of long numbers: hours of work in a few characters.
TOO_HARD = re.compile(
    r"(?:\^|\*\*)[{(\s]*-?[0-9]+[)}\s]*(?:\^|\*\*)|(?:\^|\*\*)[{(\s]*-?[0-9]{5,}|[0-9]{5,}\s*!|!\s*!"
)
SPELLINGS = (  # the same formula, written differently
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;:]|[$\s]"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}"), r"\1"),
)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…}, braces balanced; None if there is none."""
    start = text.rfind("\\boxed{")
    depth, content = 1, text[start + 7 : start + 7 + 10 * LONGEST_FORMULA]
    if start < 0:
        return None
    for match in re.finditer(r"\\.|[{}]", content, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return content[: match.start()].strip()
    return None


def _unwrap(text):
    """A reference may come as $…$ or in a box of its own."""
    inner = boxed(text)
    return text.strip().strip("$").strip() if inner is None else inner


def _math(text, answer, image_size, truncated, weight, *, exact, compare):
    said, true = boxed(text), _unwrap(str(answer))
    if not said or truncated:
        right = False
    elif exact:
        right = said == true  # [OVR §3.2] r = 1 if the boxed answer matches the reference exactly
    else:
        right = _same_formula(said, true, compare)
    return float(right), {"correct": float(right)}


def _same_formula(said, true, compare):
    """Equal once written alike, or equal as whole numbers, or else by symbols."""
    said_plain, true_plain = _plain(said), _plain(true)
    if said_plain == true_plain:
        return bool(said_plain)
    number, true_number = _number(said_plain), _number(true_plain)
    if number is not None and true_number is not None and number == true_number:
        return True
    if number is not None and true_number is not None and number.denominator == 1 == true_number.denominator:
        return False
    if max(len(said), len(true)) > LONGEST_FORMULA or TOO_HARD.search(said) or TOO_HARD.search(true):
        return False
    return compare(said, true)


def _plain(formula):
    for pattern, spelling in SPELLINGS:
        formula = pattern.sub(spelling, formula)
    formula = formula.rstrip(".")
    thousands = re.fullmatch(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", formula)
    return formula.replace(",", "") if thousands else formula


def _number(formula):
    short = re.fullmatch(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})", formula)
    return Fraction(formula) if short else None


def symbolically_equal(said: str, true: str) -> bool:
    """Compare two formulas by math-verify, in this process, however long it takes."""
    from math_verify import LatexExtractionConfig, parse, verify

    # No timeouts of its own: they are alarms, which only the main thread can set.
    latex = [LatexExtractionConfig()]
    said, true = (parse(f"${formula}$", latex, parsing_timeout=None) for formula in (said, true))
    return bool(verify(true, said, timeout_seconds=None))


def _equal_in_child(said, true):
    # One pool a process: a forked one must not talk through its parent's pipes.
    row = {"task": "math", "completion": f"\\boxed{{{said}}}", "answer": true}
    reply = _children(os.getpid()).ask(json.dumps(row), DEADLINE)
    return bool(reply) and json.loads(reply)["reward"] == 1.0


@functools.lru_cache(maxsize=1)
def _children(process_id):
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("comparing formulas needs math-verify: pip install math-verify[antlr4_13_2]")
    return Children(count=2)


class Children:
    """Child processes that compare formulas. SymPy cannot be interrupted inside one process: 9^(9^9)
    is one call into C. So a child past its deadline is killed, and a new one starts behind the others."""

    def __init__(self, count):
        self.idle = queue.Queue()
        self.all = set()
        for _ in range(count):
            self.idle.put(self._start())
        atexit.register(self.close)

    def ask(self, row: str, seconds: float) -> str:
        """The child's line for this line; "" if it was not there in time."""
        child, ready = self.idle.get()
        reply = ""
        try:
            if child.poll() is not None:  # it died while idle
                child, ready = self._replace(child)
            if not ready and _read_line(child, 60) != "ready\n":
                raise RuntimeError(f"no answer from `{' '.join(child.args)}`; run it by hand to see why")
            child.stdin.write(row + "\n")
            child.stdin.flush()
            reply = _read_line(child, seconds)
        except BrokenPipeError:
            pass  # it died just now: no reply
        finally:
            self.idle.put((child, True) if reply else self._replace(child))
        return reply

    def close(self):
        for child in list(self.all):
            child.kill()
            child.wait()

    def _start(self):
        command = [sys.executable, os.path.abspath(__file__), "score", "-", "--child"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
        self.all.add(child)
        return child, False  # not ready: it is still importing

    def _replace(self, child):
        child.kill()
        child.wait()
        child.stdout.close()
        self.all.discard(child)
        return self._start()


def _read_line(child, seconds):
    alarm = threading.Timer(seconds, child.kill)  # a killed child's pipe ends: readline returns ""
    alarm.start()
    try:
        return child.stdout.readline()
    finally:
        alarm.cancel()


def _prepare_child():
    """Import and warm up, then say so. Huge integers must not take the machine's memory either."""
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):  # where there is no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes
    symbolically_equal("\\frac{1}{2}", "0.5")
    print("ready", flush=True)


def _equal_as_child(said, true):
    signal.alarm(10)  # seconds: ends this process if its parent died and cannot
    equal = symbolically_equal(said, true)
    signal.alarm(0)
    return equal


IN_BOX = re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}")
STATED = re.compile(r"(?i:answer|option|choice)[*_\"]*\s?(?i:is|:|=)\s*([^\n]{0,80})")
ALONE = re.compile(r"(?:^|(?<=\s))[(*\[]*([A-J])(?:[).:*\]]+(?=\s|$)|[^\S\n]*$)", re.MULTILINE)
FILLERS = {"the", "option", "choice", "correct", "is", "or", "and", "answer"}


def chosen_letters(text: str) -> set[str]:
    """The option letters that the text gives explicitly, in the strongest form it uses: in a box, after
    "answer is" or the like, or alone at its start. More than one is a hedge, not an answer."""
    for form in (IN_BOX, STATED):
        letters = set().union(*(_leading_letters(given) for given in form.findall(text)))
        if letters:
            return letters
    text = re.sub(r"^(?i:option|choice|answer)\s", "", text).lstrip("$")
    return set(ALONE.findall(text)) if ALONE.match(text) else set()


def _leading_letters(given):
    """B from "(B) because A…", A and B from "A or B"; none from "not A"."""
    words = re.sub(r"\\[a-z]+|[^A-Za-z0-9']+", " ", given).split()
    letters = set()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        pronoun = word == "I" and following[:1].islower()
        if re.fullmatch("[A-J]", word) and not pronoun:
            letters.add(word)
        elif word.lower() not in FILLERS:
            break
    return letters


def _choice(text, answer, image_size, truncated, weight):
    true = str(answer).strip().strip("().").upper()
    right = chosen_letters(text) == {true} and not truncated
    return float(right), {"correct": float(right)}


# ---------------------------------------------------------------------------------------------------
# §6 The score
# ---------------------------------------------------------------------------------------------------

RULES = {
    "grounding": _grounding,
    "counting": _counting,
    "detection": _detection,
    "ocr": _ocr,
    "math": _math,
    "choice": _choice,
}


def score(
    task: str,
    completion: str,
    answer: object,
    image_size=None,
    *,
    truncated: bool = False,
    think: bool = False,
    format_weight: float | None = None,
    compare=None,
    **options,
) -> Score:
    """The reward of one completion.

    image_size: [W, H] that the model saw; without it nothing is rescaled and distances are divided by
    1000·√2. truncated: cut at the length limit: no format, and nothing at all in counting, math, choice.
    think: tags are expected; their part is `think`. format_weight: times the format part, 1, but 0 in
    math and choice. compare: (said, true) -> bool in place of the child processes. options: see OPTIONS.
    """
    _check_task(task)
    if not isinstance(completion, str):
        raise ValueError(f"a completion must be a string, not {completion!r:.200}")
    if image_size is not None and min(_numbers(_true_value(image_size), 2) or [0]) <= 0:
        raise ValueError(f"image_size must be [W, H] in pixels, not {image_size!r:.200}")
    settings = _settings(task, options)
    if task == "math":
        settings["compare"] = compare or _equal_in_child
    weight = format_weight
    if weight is None:
        weight = 0.0 if task in ("math", "choice") else 1.0
    text = answer_text(completion)
    total, parts = RULES[task](text, answer, image_size, truncated, weight, **settings)
    if think:
        parts["think"] = float(think_form(completion) and not truncated)
        total += weight * parts["think"]
    return Score(float(total), parts)


def _settings(task, options):
    """The task's options, each at its default unless given; what is unknown is an error."""
    settings = {name: allowed[0] for name, allowed in OPTIONS[task].items()}
    if task == "detection":
        settings["components"] = COMPONENTS
    for name, value in options.items():
        allowed = OPTIONS[task].get(name, ())
        if name not in settings:
            known = ", ".join(["think", "truncated", "format_weight", *settings])
            raise ValueError(f"unknown option {name!r} for {task}; it has {known}")
        if name == "components":
            value = value.split(",") if isinstance(value, str) else list(value)
            fits, allowed = set(value) <= set(COMPONENTS), COMPONENTS
        elif name == "penalty":
            fits, allowed = _numbers([value], 1) is not None and value >= 0, ("any number >= 0",)
        else:
            fits = value in allowed
        if not fits:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        settings[name] = value
    return settings


def correct(task: str, completion: str, answer: object, image_size=None, *, think: bool = False) -> float:
    """The answer alone, no points for form: IoU > 0.5, exact count, F1, similarity, or right/wrong."""
    if task == "counting":
        text, true = answer_text(completion), _true_points(answer)
        shapes, formed = _shapes(text, image_size)
        number = _said_number(text)
        said = number if number is not None else len(shapes) if shapes or formed else None
        return float(said == (true if isinstance(true, int) else len(true)))
    parts = score(task, completion, answer, image_size, think=think).parts
    if task == "grounding":
        return float(parts["iou"] > 0.5)
    return parts[{"detection": "f1", "ocr": "similarity"}.get(task, "correct")]


# ---------------------------------------------------------------------------------------------------
# §7 Command line
# ---------------------------------------------------------------------------------------------------


def _score_rows(lines, name, **extra):
    """One JSON object out for each one in, flushed, so that another program can talk to this one."""
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("options", {}), dict):
                raise ValueError("a row must be a JSON object, its options too")
            missing = {"task", "completion", "answer"} - row.keys()
            if missing:
                raise ValueError(f"a row needs {', '.join(sorted(missing))}")
            keys = ("task", "completion", "answer", "image_size")
            given = {key: row[key] for key in keys if key in row}
            result = score(**given, **row.get("options", {}), **extra)
        except (ValueError, TypeError, RecursionError) as error:
            raise SystemExit(f"{name}:{number}: {error}") from None
        print(json.dumps({"reward": result.total, "parts": result.parts}), flush=True)


def main(arguments=None):
    """`python rewards.py score FILE.jsonl`"""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    command = parser.add_subparsers(required=True).add_parser(
        "score", help="score the rows of a file", epilog=f"Options of a row, default first: {OPTIONS}"
    )
    command.add_argument("file", help="rows {task, completion, answer, image_size, options}; - is stdin")
    command.add_argument("--child", action="store_true", help="compare formulas in this process")
    given = parser.parse_args(arguments)
    extra = {}
    if given.child:
        _prepare_child()
        extra["compare"] = _equal_as_child
    if given.file == "-":
        return _score_rows(sys.stdin.buffer, "<stdin>", **extra)
    try:
        with open(given.file, "rb") as lines:
            return _score_rows(lines, given.file, **extra)
    except OSError as error:
        raise SystemExit(f"{given.file}: {error.strerror}") from None


if __name__ == "__main__":
    main()
