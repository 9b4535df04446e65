"""What a good answer is. Per task: the prompt, the reader of the answer, the reward, its parts.

    python rewards.py score rollouts.jsonl        # or -: one row in, one row out, in order
    {"task": "grounding", "completion": "[0, 0, 10, 10]", "answer": [0, 0, 10, 20]}
    -> {"reward": 1.5, "parts": {"format": 1.0, "iou": 0.5}}      # 1 + 100/200

[PR1] is Perception-R1, arXiv 2504.07954 (grounding, counting, OCR, detection), [PR1 code] its
release; [OVR] is Open-Vision-Reasoner, arXiv 2507.05255 (math, choice). Worked, each one a test:
  counting   true (0,0) (30,40), said (0,0): min/max = 1/2 at no distance, so 0.5
  detection  two true boxes, one said exactly, so 0.25·1 + 0.75·2/3 + 1 + 1 − 0.5·1/2 = 2.5
  ocr        "kitten" read as "sitting": Levenshtein 3, longer length 7, so 4/7

`score` is pure: whatever the model writes becomes a number in bounded time; only the caller's own
mistakes (task, option, true answer) are errors. Departures from the papers and the released code:
D2 Answers are JSON in absolute pixels of the resized image, as Qwen2.5-VL's. Qwen2-VL's box tokens
   (0-1000), with which [PR1] trained grounding and counting, are read too.
-  Thinking adds format_weight · think to any task. The weight, on format and think, is 1, but 0 for
   math and choice: [OVR] ignores the format. Text before </think> is never the answer.
-  No reward by accident, as an exception's 0: IoU without area is 0, a bad box is one invalid item,
   class indices line up, far-off points earn 0 and not less, a format is its whole pattern. Nothing
   to find and "[]" said is right: 3 in detection, 1 in counting. An empty true text is refused.
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
from dataclasses import dataclass

import numpy as np

from formulas import boxed, check, equal, library

TASKS = ("grounding", "counting", "detection", "ocr", "math", "choice")
# Each task's options, default first. `penalty`: any number from 0. `components`: any of [PR1 T6].
COMPONENTS = ("format", "f1", "class", "iou", "penalty")
OPTIONS = {
    "grounding": {"iou_power": (1, 2)},  # 1 [PR1 §4.1], 2 [PR1 code]
    "counting": {"matching": ("optimal", "order")},  # order: [PR1 T5] "w/o reward matching"
    "detection": {"matching": ("iou", "detr", "order"),  # [PR1 §4.2], [PR1 code], [PR1 T5]
                  "penalty": (0.5, 0.0), "components": (COMPONENTS,)},  # 0.5 [PR1 T6], 0 [PR1 code]
    "math": {"exact": (False, True)},  # False: by math-verify; True: the same text [OVR §3.2]
}
# COCO's 80 names in COCO's order, and their ids: of 1 to 90, ten are not in use.
COCO_NAMES = re.split("[/\n]", """person/bicycle/car/motorcycle/airplane/bus/train/truck/boat
traffic light/fire hydrant/stop sign/parking meter/bench/bird/cat/dog/horse/sheep/cow/elephant/bear
zebra/giraffe/backpack/umbrella/handbag/tie/suitcase/frisbee/skis/snowboard/sports ball
kite/baseball bat/baseball glove/skateboard/surfboard/tennis racket/bottle/wine glass/cup/fork/knife
spoon/bowl/banana/apple/sandwich/orange/broccoli/carrot/hot dog/pizza/donut/cake/chair/couch
potted plant/bed/dining table/toilet/tv/laptop/mouse/remote/keyboard/cell phone/microwave/oven
toaster/sink/refrigerator/book/clock/vase/scissors/teddy bear/hair drier/toothbrush""")
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


@dataclass(frozen=True)
class Score:
    """A completion's reward and, by name, the parts it was made of, unweighted."""
    total: float
    parts: dict[str, float]


# ---- §1 prompts ----------------------------------------------------------------------------------
THINK = (" Output the thinking process in <think> </think> and final answer in <answer> </answer>"
         " tags.")  # [PR1 code] says "final answer (number)"; here they are boxes and texts too
PROMPTS = {
    "grounding": "Output the bounding box of the {} in the image.",  # [PR1 T8]
    "counting": "Output all the bounding boxes of the {}",  # [PR1 T8]
    "detection": "Please output bbox coordinates and names of {}.",  # [PR1 T8]
    "ocr": "{}",
    "math": "{}\nPut the final answer in \\boxed{{}}.",  # ours: OVR's prompts are not published
    "choice": "{}\nAnswer with the letter of the right option.",  # ours
}
QUESTIONS = {"detection": ", ".join(COCO_NAMES), "ocr": "OCR this image."}  # [PR1 T8] if none given


def prompt(task: str, question: str = "", *, think: bool = False) -> str:
    """The user's text for a question (grounding, counting: a name; detection: names or nothing)."""
    check(task in TASKS, f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    return PROMPTS[task].format(question or QUESTIONS.get(task, "")) + (THINK if think else "")


def reference(task: str, answer: object, question: str = "", *, think: bool = False) -> str:
    """A completion that earns the full reward, coordinates in whole pixels, as Qwen writes them."""
    said = read_truth(task, answer)
    if task == "grounding":
        said = [{"bbox_2d": [round(x) for x in said], "label": question}]
    elif task == "counting" and isinstance(said, list):
        said = [{"point_2d": [round(x) for x in point], "label": question} for point in said]
    elif task == "detection":
        said = [item | {"bbox_2d": [round(x) for x in item["bbox_2d"]]} for item in said]
    elif task == "math":
        said = f"\\boxed{{{said}}}"
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return f"<think>I look: {question}.</think><answer>{text}</answer>" if think else text


# ---- §2 the true answer --------------------------------------------------------------------------
def read_truth(task: str, answer: object) -> object:
    """The true answer in its task's one spelling, whatever a data set or a trainer wraps around it.

    grounding [x1, y1, x2, y2]; counting [[x, y], …] or a whole number from 0; detection
    [{"bbox_2d": [x1, y1, x2, y2], "label": str}, …]; ocr, math: text; choice: one capital letter.
    Read too: JSON as text, <answer>…</answer>, \\boxed{…} and $…$ around it, points as {"x", "y"},
    [PR1 code] {"target_id", "target_box"}, "(B)" and "b.". ValueError says what does not fit.
    """
    check(task in TASKS, f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if isinstance(answer, str):
        wrapped = re.fullmatch(r"(?s).*<answer>(.*)</answer>\s*", answer)
        answer = wrapped[1].strip() if wrapped else answer
    if task in ("grounding", "counting", "detection"):
        if isinstance(answer, str):
            value = read_json(boxed(answer).strip())
            check(value is not None, f"the true answer in {task} is no JSON: {answer!r:.200}")
            answer = value
        readers = {"grounding": _true_box, "counting": _true_count, "detection": _true_objects}
        return readers[task](answer)
    return _true_text(task, answer)


def _true_box(value):
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bbox_2d")
    box = _true_numbers(value, 4)
    check(box is not None, f"a true box must be [x1, y1, x2, y2], not {value!r:.200}")
    upright = box[0] < box[2] and box[1] < box[3]
    check(upright, f"the true box {box} has x2 ≤ x1 or y2 ≤ y1: is it x, y, w, h? then ?box=xywh")
    return box


def _true_count(value):
    if isinstance(value, (list, tuple)):
        return [_true_point(item) for item in value]
    form = "the true answer in counting must be a whole number from 0 or a list of [x, y]"
    number = _true_numbers([value], 1)
    check(number is not None and number[0] >= 0, f"{form}, not {value!r:.200}")
    check(number[0] % 1 == 0, f"{form}, not {value!r:.200}")
    return int(number[0])


def _true_point(value):
    point = value
    if isinstance(value, dict):
        point = value.get("point_2d") or [value.get("x"), value.get("y")]
    point = _true_numbers(point, 2)
    check(point is not None, f"a true point must be [x, y], not {value!r:.200}")
    return point


def _true_objects(value):
    if isinstance(value, dict) and {"target_id", "target_box"} <= value.keys():
        names = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
        pairs = zip(value["target_box"], value["target_id"], strict=True)
        value = [{"bbox_2d": box, "label": names.get(number)} for box, number in pairs]
    form = 'the true answer in detection must be a list of {"bbox_2d", "label"}'
    check(isinstance(value, (list, tuple)), f"{form}, not {value!r:.200}")
    objects = []
    for item in value:
        whole = isinstance(item, dict) and {"bbox_2d", "label"} <= item.keys()
        check(whole, f"{form}, not {value!r:.200}")
        label = item["label"]
        named = isinstance(label, (str, int, float)) and str(label).strip() != ""
        check(named, f"a true label must be text, not {label!r:.200}")
        objects.append({"bbox_2d": _true_box(item["bbox_2d"]), "label": str(label)})
    return objects


def _true_text(task, value):
    check(value is not None, f"the true answer in {task} is missing")
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    check(plain, f"the true answer in {task} must be text or a number, not {value!r:.200}")
    text = str(value)
    if task != "ocr":
        text = boxed(text)
    check(text.strip() != "", f"the true answer in {task} is empty: every completion would earn 0")
    if task == "choice":
        letter = re.sub(r"\\[a-z]+|[{}\s().:]", "", text)
        one = re.fullmatch("[A-Za-z]", letter)
        check(one, f"the true answer in choice must be one letter, not {value!r:.200}")
        return letter.upper()
    return text


def _true_numbers(values, length):
    """So many finite numbers as floats, numbers as text too; None if they are not."""
    if isinstance(values, (str, bytes, dict)):
        return None
    try:
        values = list(values)
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):  # no list; no number; too long an integer
        return None
    plain = len(numbers) == length and not any(isinstance(value, bool) for value in values)
    return numbers if plain and all(abs(number) <= 1e7 for number in numbers) else None


# ---- §2 from a completion to the text of its answer ----------------------------------------------
def split_thinking(completion: str) -> tuple[str, bool]:
    """-> the answer's text (none of the thinking); whether all has the form, each tag once."""
    text = completion.partition("<|im_end|>")[0].partition("<|endoftext|>")[0]
    # [PR1 code] 1 if all has this form, else 0; there a newline broke it, here it does not.
    once = len(re.findall("</?(?:think|answer)>", text)) == 4
    formed = once and re.fullmatch(r"(?s)\s*<think>.*</think>\s*<answer>.*</answer>\s*", text)
    rest = text.rpartition("</think>")[2]
    if "<think>" in rest:
        return "", False  # still thinking
    return rest.rpartition("<answer>")[2].partition("</answer>")[0].strip(), bool(formed)


# ---- §3 from text to boxes and points ------------------------------------------------------------
# Digits are bounded and repeats never touch, so that the patterns stay linear in the text.
NUMBER = r"\s*(-?[0-9]{1,7}(?:\.[0-9]{1,20})?)\s*"
PAIR = f"{NUMBER},{NUMBER}"
CORNERS = rf"\({PAIR}\),\s*\({PAIR}\)"
KEYED = re.compile(rf'"(?:bbox|point)_2d"\s*:\s*\[{PAIR}(?:,{PAIR})?\]')
LOOSE = re.compile(rf"\[{PAIR},{PAIR}\]|\({PAIR},{PAIR}\)|{CORNERS}")  # the spellings of [PR1 code]
TOKENS = re.compile(r"<\|object_ref_start\|>[^<]*<\|object_ref_end\|>"  # [PR1 code], its pipes
                    r"(?:<\|box_start\|>[^<]*<\|box_end\|>)+")  # escaped: a name, then boxes


def parse_boxes(completion: str, image_size=None) -> list[list[float]]:
    """All boxes that can be made out in the answer, in good form or not: what pictures show."""
    return [s for s in _shapes(split_thinking(completion)[0], image_size)[0] if len(s) == 4]


def parse_points(completion: str, image_size=None) -> list[list[float]]:
    """All points, or centres of boxes, that can be made out in the answer."""
    return [_centre(shape) for shape in _shapes(split_thinking(completion)[0], image_size)[0]]


def _shapes(text, image_size):
    """-> boxes and points in the order said; the form: tokens, list, bare, number or "" (none)."""
    if "<|box_start|>" in text:
        boxes_N4 = np.array(re.findall(CORNERS, text), float).reshape(-1, 4)
        boxes_N4 *= np.tile(image_size or (1000, 1000), 2) / 1000
        return boxes_N4.tolist(), "tokens" if TOKENS.fullmatch(text) else ""
    items = read_json(text)
    if box := _numbers(items, 4):
        return [box], "bare"
    if isinstance(items, list):
        said = [item if isinstance(item, dict) else {} for item in items]
        said = [_numbers(d.get("bbox_2d"), 4) or _numbers(d.get("point_2d"), 2) for d in said]
        return [shape for shape in said if shape], "list" if all(said) else ""
    if re.fullmatch("[0-9]{1,6}", text):
        return [], "number"
    # Prose, or a list cut short: keyed coordinates first, as a label may hold numbers.
    found = list(KEYED.finditer(text)) or LOOSE.finditer(text)
    return [[float(n) for n in match.groups() if n is not None] for match in found], ""


def read_json(text):
    """The value of a JSON text, bare or in a ```json fence; None if it is not JSON."""
    text = text.removeprefix("```json").removeprefix("```").removesuffix("```")
    with contextlib.suppress(ValueError, RecursionError):  # not JSON; nested too deeply
        return json.loads(text, parse_int=float)  # int() refuses long numbers, float() says inf
    return None


def _numbers(value, length):
    """A list of so many numbers as floats; None if it is not, or has NaN or impossible sizes."""
    fits = isinstance(value, (list, tuple)) and len(value) == length
    plain = fits and all(type(n) in (int, float) and abs(n) <= 1e7 for n in value)  # no bool
    return [float(n) for n in value] if plain else None


def read_object(item):
    """(box, label) of {"bbox_2d", "label"}; None without an upright box or without a label."""
    box = _numbers(item.get("bbox_2d"), 4) if isinstance(item, dict) else None
    good = box and box[0] <= box[2] and box[1] <= box[3] and isinstance(item.get("label"), str)
    return (box, item["label"]) if good and item["label"] else None


def _centre(shape):
    return [(shape[0] + shape[-2]) / 2, (shape[1] + shape[-1]) / 2]  # a point's is itself


# ---- §4 perception: each reward returns its total and its parts ----------------------------------
def _grounding(text, true, image_size, truncated, weight, iou_power):
    shapes, form = _shapes(text, image_size)
    boxes = [s for s in shapes if len(s) == 4 and s[0] <= s[2] and s[1] <= s[3]]
    formed = form != "" and len(boxes) == len(shapes) == 1 and not truncated
    # The first box said counts, so that a second guess earns nothing.
    overlap = _overlaps(np.array(boxes[:1]), np.array([true]))[0].item() if boxes else 0.0
    # [PR1 §4.1] S = format + Φ,  Φ = IoU (squared in the released code)
    return weight * formed + overlap**iou_power, {"format": float(formed), "iou": overlap}


def _overlaps(boxes_N4, true_M4):
    """-> IoU and GIoU of each pair, both [N, M]; 0 where there is no area."""
    low, high = boxes_N4[:, None, :2], boxes_N4[:, None, 2:]
    true_low, true_high = true_M4[None, :, :2], true_M4[None, :, 2:]
    both_NM = (np.minimum(high, true_high) - np.maximum(low, true_low)).clip(0).prod(axis=-1)
    either_NM = (high - low).prod(axis=-1) + (true_high - true_low).prod(axis=-1) - both_NM
    hull_NM = (np.maximum(high, true_high) - np.minimum(low, true_low)).prod(axis=-1)
    # IoU = |A ∩ B| / |A ∪ B|,  GIoU = IoU − |hull \ (A ∪ B)| / |hull|
    iou_NM = both_NM / np.where(either_NM > 0, either_NM, 1)
    return iou_NM, iou_NM - (hull_NM - either_NM) / np.where(hull_NM > 0, hull_NM, 1)


def _matched(cost_NM, matching):
    """-> rows and columns of min(N, M) pairs: the cheapest assignment, or simply as listed."""
    if matching == "order":
        return (np.arange(min(cost_NM.shape)),) * 2
    # [PR1 §4.2] σ̂ = argmax_σ Σ_i Φ(y_i, z_σ(i)), by the Hungarian algorithm
    return library("scipy.optimize", "scipy").linear_sum_assignment(cost_NM)


def _counting(text, true, image_size, truncated, weight, matching, gate=True):
    shapes, form = _shapes(text, image_size)
    bare = isinstance(true, int)  # the data has no points: then a bare number is an answer too
    formed = form in ("list", "tokens") or (bare and form == "number")
    if gate and (truncated or not formed):
        return 0.0, {"format": 0.0, "count": 0.0, "distance": 0.0}
    said, wanted = int(text) if form == "number" else len(shapes), true if bare else len(true)
    count = min(said, wanted) / max(said, wanted) if said != wanted else 1.0
    closeness = float(bare or said == wanted)  # with nothing to measure
    if shapes and true and not bare:
        said_N2, true_M2 = np.array([_centre(shape) for shape in shapes]), np.array(true)
        distance_NM = np.linalg.norm(said_N2[:, None] - true_M2[None], axis=-1)
        mean = distance_NM[_matched(distance_NM, matching)].mean().item()
        closeness = max(0.0, 1 - mean / math.hypot(*(image_size or (1000, 1000))))
    # [PR1 code] r = gate · min(n, m)/max(n, m) · (1 − mean matched distance / diagonal)
    return count * closeness, {"format": 1.0, "count": count, "distance": closeness}


def _detection(text, true, image_size, truncated, weight, matching, penalty, components):
    true = [(item["bbox_2d"], item["label"]) for item in true]
    items = read_json(text)
    # Labels are COCO's where the true ones are (as released: always), else any.
    coco = matching == "detr" or (true and {label for _, label in true} <= set(COCO_NAMES))
    pairs = map(read_object, items if isinstance(items, list) else [])
    said = [pair for pair in pairs if pair and (not coco or pair[1] in COCO_NAMES)]
    parts = dict.fromkeys(COMPONENTS, 0.0)
    if not true and items == []:
        parts |= {"format": 1.0, "f1": 1.0, "class": 1.0, "iou": 1.0}
    elif said:
        parts["format"] = len(said) / len(items)  # [PR1 code] an invalid item lowers it
        parts |= _found(said, true, matching) if true else {}
    weights = {"format": 0.25 * weight, "f1": 0.75, "class": 1.0, "iou": 1.0, "penalty": -penalty}
    # [PR1 code] r = 0.25·format + 0.75·F1 + class + IoU − penalty·(FP/n_pred + FN/n_gt)
    total = sum(weights[name] * parts[name] for name in components)
    return min(max(total, 0.0), 3.0), parts


def _found(said, true, matching):
    """F1, class, IoU and penalty over the pairs that match; none of them without such a pair."""
    boxes_N4, true_M4 = (np.array([box for box, _ in pairs]) for pairs in (said, true))
    iou_NM, giou_NM = _overlaps(boxes_N4, true_M4)
    same_NM = np.array([[label == true_label for _, true_label in true] for _, label in said])
    cost_NM = -iou_NM
    if matching == "detr":
        # [PR1 code] 5·L1 − p(class) − 2·GIoU, with L1 of centre and size in pixels, and p a softmax
        # over 90 scores, 1 for the class said and 0 for the others: distance decides nearly alone.
        to_size = np.array([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]])
        l1_NM = np.abs((boxes_N4 @ to_size)[:, None] - (true_M4 @ to_size)[None]).sum(axis=-1)
        cost_NM = 5 * l1_NM - np.where(same_NM, math.e, 1) / (math.e + 89) - 2 * giou_NM
    pairs = _matched(cost_NM, matching)
    kept = iou_NM[pairs] > 0.5  # [PR1 code] strictly, and only after the assignment
    hits, n_pred, n_gt = kept.sum().item(), len(said), len(true)  # n_pred: valid items only
    if hits == 0:
        return {}
    # F1 = 2PR/(P + R),  P = hits/n_pred,  R = hits/n_gt
    return {"f1": 2 * hits / (n_pred + n_gt),
            "class": same_NM[pairs][kept].mean().item(), "iou": iou_NM[pairs][kept].mean().item(),
            "penalty": (n_pred - hits) / n_pred + (n_gt - hits) / n_gt}


def _ocr(text, true, image_size, truncated, weight):
    levenshtein = library("rapidfuzz.distance", "rapidfuzz").Levenshtein
    text, true = " ".join(text.split()), " ".join(true.split())
    # [PR1 §4.1] Φ = edit distance: 1 − Levenshtein / longer length, white space folded
    similarity = levenshtein.normalized_similarity(text, true) if text or true else 0.0
    return similarity, {"similarity": similarity}


# ---- §5 maths and choice -------------------------------------------------------------------------
def _math(text, true, image_size, truncated, weight, exact):
    said = boxed(text) if "\\boxed{" in text and not truncated else ""
    # [OVR §3.2] r = 1 if the answer in the box matches the reference (0.5 and \frac{1}{2}), else 0
    same = equal(said, true, exact=exact)
    if same is None:
        return 0.0, {"correct": 0.0, "undecided": 1.0}
    return float(same), {"correct": float(same)}


# An option letter that is meant as one, strongest form first: in a box, after "answer is", alone.
IN_BOX = re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}")
STATED = re.compile(r"(?i:answer|option|choice)[*_\"]*\s?(?i:is|:|=)\s*([^\n]{0,80})")
ALONE = re.compile(r"(?:^|(?<=\s))[(*\[$]*([A-J])(?:[).:*$\]]+(?=\s|$)|[^\S\n]*$)", re.MULTILINE)
LETTER = "(?:[A-HJ]|I(?! [a-z]))"  # not the I of "I think"
LEADING = re.compile(rf"(?:(?:the|option|choice) )*({LETTER}(?: (?:or |and )?{LETTER})*)(?: |$)")


def chosen_letters(text: str) -> set[str]:
    """The letters given in the strongest form that the text has. Two letters are a hedge: wrong."""
    for form in (IN_BOX, STATED):
        # "(B) since A…" -> B;  "A or B" -> A, B;  "not A" -> none
        given = (re.sub(r"\\[a-z]+|[^\w']+", " ", said).strip() for said in form.findall(text))
        letters = set("".join(m[1] for m in map(LEADING.match, given) if m)) & set("ABCDEFGHIJ")
        if letters:
            return letters
    text = re.sub(r"^(?i:option|choice|answer)\s", "", text)
    return set(ALONE.findall(text)) if ALONE.match(text) else set()


def _choice(text, true, image_size, truncated, weight):
    right = chosen_letters(text) == {true} and not truncated
    return float(right), {"correct": float(right)}


# ---- §6 the score --------------------------------------------------------------------------------
def score(task: str, completion: str, answer: object, image_size=None, *, truncated=False,
          think=False, format_weight: float | None = None, **options) -> Score:
    """The reward of a completion; `options` are the task's in OPTIONS.
    image_size: [W, H] that the model saw; without it nothing is rescaled, and distances are divided
    by 1000·√2. truncated (too long) makes counting, math, choice, think and grounding's form 0.
    """
    true, own = read_truth(task, answer), OPTIONS.get(task, {})
    for name, value in options.items():
        check(name in own, f"{task} has no option {name!r}; its own are {list(own)}")
        fits = set(value) <= set(COMPONENTS) if name == "components" else value in own[name]
        if name == "penalty":
            fits = bool(_numbers([value], 1)) and value >= 0
        check(fits, f"{name} in {task} can be {own[name]}, not {value!r}")
    check(isinstance(completion, str), f"a completion must be text, not {type(completion)}")
    sized = image_size is None or (_numbers(image_size, 2) and min(image_size) > 0)
    check(sized, f"image_size must be [W, H] in pixels, not {image_size!r:.200}")
    settings = {name: values[0] for name, values in own.items()} | options
    weight = format_weight if format_weight is not None else float(task not in ("math", "choice"))
    text, think_formed = split_thinking(completion)
    rules = (_grounding, _counting, _detection, _ocr, _math, _choice)
    total, parts = rules[TASKS.index(task)](text, true, image_size, truncated, weight, **settings)
    if think:
        parts["think"] = float(think_formed and not truncated)
        total += weight * parts["think"]
    return Score(float(total), parts)


def load(spec: str):
    """The function that scores a completion: `score`, or the one that "path.py:function" names."""
    if not spec:
        return score
    path, _, name = spec.rpartition(":")
    check(os.path.isfile(path), f"--reward {spec}: no file {path!r}; write path.py:function")
    file = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    check(callable(getattr(module, name, None)), f"--reward {spec}: {path} has no such function")
    return getattr(module, name)


def call_reward(function, sample, completion: str, *, truncated=False, think=False, options=None):
    """The Score of a completion by `score` or a user's function; options go where they belong."""
    options = dict(options or {})
    if function is score:
        own = {*OPTIONS.get(sample.task, {}), "format_weight"}
        options = {name: value for name, value in options.items() if name in own}
    value = function(sample.task, completion, sample.answer, sample.image_size,
                     truncated=truncated, **({"think": think} if think else {}), **options)
    return value if isinstance(value, Score) else Score(float(value), {})


def correct(task: str, completion: str, answer: object, image_size=None, *, think=False) -> float:
    """The answer alone, no points for form: IoU > 0.5, exact count, F1, similarity, right/wrong."""
    if task == "counting":
        text, true = split_thinking(completion)[0], read_truth(task, answer)
        parts = _counting(text, true, image_size, False, 1.0, "order", gate=False)[1]
        return float(parts["count"] == 1)
    parts = score(task, completion, answer, image_size, think=think).parts
    part = {"grounding": "iou", "detection": "f1", "ocr": "similarity"}.get(task, "correct")
    return float(parts[part] > 0.5) if task == "grounding" else parts[part]


# ---- §7 command line -----------------------------------------------------------------------------
def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.epilog = f"options of a row, default first: {OPTIONS}"
    parser.add_argument("command", choices=["score"])
    parser.add_argument("file", type=argparse.FileType("rb"), help="rows, one a line; - is stdin")
    given = parser.parse_args()
    for number, line in enumerate(given.file, start=1):
        try:
            row = json.loads(line)
            complete = isinstance(row, dict) and {"task", "completion", "answer"} <= row.keys()
            check(complete, "a row must be a JSON object with task, completion and answer")
            inputs = row["task"], row["completion"], row["answer"], row.get("image_size")
            result = score(*inputs, **row.get("options", {}))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SystemExit(f"{given.file.name}:{number}: {error}") from None
        print(json.dumps({"reward": result.total, "parts": result.parts}), flush=True)  # to a pipe


if __name__ == "__main__":
    main()
