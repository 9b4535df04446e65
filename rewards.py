r"""What a good answer is. Per task: the prompt, the reader of the answer, the reward, its parts.

    python rewards.py score rollouts.jsonl        # or -: one row in, one row out, in order
    {"task": "grounding", "completion": "[0, 0, 10, 10]", "answer": [0, 0, 10, 20]}
    -> {"reward": 1.5, "parts": {"format": 1.0, "iou": 0.5}}      # 1 + 100/200

[PR1] is Perception-R1, arXiv 2504.07954 (grounding, counting, OCR, detection), [PR1 code] its
release; [OVR] is Open-Vision-Reasoner, arXiv 2507.05255 (math, choice). Worked, each one a test:
  counting   true (0,0) (30,40), said (0,0): min/max = 1/2 at no distance, so 0.5
  detection  two true boxes, one of them said exactly and nothing else: format 1, F1 2/3, class 1,
             IoU 1, missed 1/2, so 0.25·1 + 0.75·2/3 + 1 + 1 − 0.5·1/2 = 2.5
  ocr        "kitten" read as "sitting": Levenshtein 3, longer length 7, so 4/7
  math       "so it is \boxed{0.5}" with the reference \frac{1}{2}: 1

`score` is pure: whatever the model writes becomes a number in bounded time; only the caller's own
mistakes (task, option, true answer) are errors. Coordinates are pixels of the resized image that
the model sees; `image_size` is its [W, H]. Departures from the papers and from the released code:
  D2  Answers are Qwen2.5-VL's absolute pixels in JSON. Qwen2-VL's box tokens (0-1000), with which
      [PR1] trained grounding and counting, are read too, with or without their final <|im_end|>.
  -   Thinking adds format_weight · think to any task. The weight, on format and think, is 1, but 0
      for math and choice: [OVR] ignores the format. Text before </think> is never the answer.
  -   No reward by accident. The release divides by zero or lets an exception make the total 0; here
      IoU without area is 0, a malformed or inverted box is one invalid item, class indices line up,
      far-off points earn 0 and not less, a format is its whole pattern and not its first "<".
      Nothing to find and "[]" said is right: 3 in detection, 1 in counting. Empty OCR texts stay 0.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import queue
import re
import resource
import signal
import sys
from dataclasses import dataclass
from subprocess import DEVNULL, PIPE, Popen

import numpy as np

TASKS = ("grounding", "counting", "detection", "ocr", "math", "choice")
# Each task's options, default first. `penalty`: any number from 0. `components`: any of [PR1 T6].
COMPONENTS = ("format", "f1", "class", "iou", "penalty")
OPTIONS = {
    "grounding": {"iou_power": (1, 2)},  # 1 [PR1 §4.1], 2 [PR1 code]
    "counting": {"matching": ("optimal", "order")},  # order: [PR1 T5] "w/o reward matching"
    "detection": {
        "matching": ("iou", "detr", "order"),  # iou [PR1 §4.2], detr [PR1 code], order [PR1 T5]
        "penalty": (0.5, 0.0),  # 0.5 [PR1 T6] "missing penalty", 0 in the released script
        "components": (COMPONENTS,),
    },
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
SYSTEM_DEFAULT = "You are a helpful assistant. "  # [PR1 code] with this space, in training
SYSTEM_THINK = (  # [PR1 code] where it is called "r1v"
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
    "<answer> answer here </answer>"
)
THINK = (  # [PR1 code] says "final answer (number)"; here answers are boxes, texts and letters too
    " Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
)
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
    _check(task in TASKS, f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    return PROMPTS[task].format(question or QUESTIONS.get(task, "")) + (THINK if think else "")


def reference(task: str, answer: object, question: str = "", *, think: bool = False) -> str:
    """A completion that earns the full reward, coordinates in whole pixels, as Qwen writes them."""
    said = _truth(task, answer)
    if task == "grounding":
        said = [{"bbox_2d": [round(x) for x in said], "label": question}]
    elif task == "counting" and isinstance(said, list):
        said = [{"point_2d": [round(x) for x in point], "label": question} for point in said]
    elif task == "detection":
        said = [{"bbox_2d": [round(x) for x in box], "label": label} for box, label in said]
    elif task == "math":
        said = f"\\boxed{{{_formula(said)}}}"
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return f"<think>I look: {question}.</think><answer>{text}</answer>" if think else text


def _check(holds, sentence):
    if not holds:
        raise ValueError(sentence)


def _library(name, package):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"this reward needs {name}: pip install {package}") from None


def _truth(task, answer):
    """The true answer: a box, points or their bare number, (box, label) pairs, or a text."""
    _check(task in TASKS, f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if task in ("ocr", "math", "choice"):
        return str(answer)
    value = json.loads(answer) if isinstance(answer, str) else answer  # [PR1 code] stores strings
    _check(isinstance(value, (list, dict, int, float)), f"not an answer in {task}: {answer!r:.200}")
    if task == "grounding":
        true, form = _numbers(value, 4), "[x1, y1, x2, y2]"
    elif task == "counting" and isinstance(value, (int, float)):
        true, form = int(value) if value >= 0 and value % 1 == 0 else None, "a whole number"
    elif task == "counting":
        true, form = [_numbers(point, 2) for point in value], "a list of [x, y]"
    else:
        if isinstance(value, dict):  # [PR1 code] {"target_id": [1, …], "target_box": [[…], …]}
            names = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
            pairs = zip(value["target_box"], value["target_id"], strict=True)
            value = [{"bbox_2d": box, "label": names.get(number)} for box, number in pairs]
        true, form = [read_object(item) for item in value], 'a list of {"bbox_2d", "label"}'
    readable = None not in true if isinstance(true, list) else true is not None
    _check(readable, f"the true answer in {task} must be {form}, not {answer!r:.200}")
    return true


# ---- §2 from a completion to the text of its answer ----------------------------------------------
# [PR1 code] 1 if the completion has this form, else 0; there a newline broke it, here it may not.
THINK_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def split_thinking(completion: str) -> tuple[str, bool]:
    """-> the answer's text (none of the thinking); whether all has THINK_FORM, each tag once."""
    text = completion.partition("<|im_end|>")[0].partition("<|endoftext|>")[0]
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    formed = once and THINK_FORM.fullmatch(text) is not None
    rest = text.rpartition("</think>")[2]
    if "<think>" in rest:
        return "", False  # still thinking
    return rest.rpartition("<answer>")[2].partition("</answer>")[0].strip(), formed


# ---- §3 from text to boxes and points ------------------------------------------------------------
# Digits are bounded and repeats never touch, so that the patterns stay linear in the text.
NUMBER = r"\s*(-?[0-9]{1,7}(?:\.[0-9]{1,20})?)\s*"
PAIR = f"{NUMBER},{NUMBER}"
CORNERS = rf"\({PAIR}\),\s*\({PAIR}\)"
KEYED = re.compile(rf'"(?:bbox|point)_2d"\s*:\s*\[{PAIR}(?:,{PAIR})?\]')
LOOSE = re.compile(rf"\[{PAIR},{PAIR}\]|\({PAIR},{PAIR}\)|{CORNERS}")  # the spellings of [PR1 code]
TOKENS = re.compile(  # [PR1 code], its pipes escaped: a name, then boxes
    r"<\|object_ref_start\|>[^<]*<\|object_ref_end\|>(?:<\|box_start\|>[^<]*<\|box_end\|>)+"
)


def parse_boxes(completion: str, image_size=None) -> list[list[float]]:
    """All boxes that can be made out in the answer, in good form or not: what pictures show."""
    return [s for s in _shapes(split_thinking(completion)[0], image_size)[0] if len(s) == 4]


def parse_points(completion: str, image_size=None) -> list[list[float]]:
    """All points, or centres of boxes, that can be made out in the answer."""
    return [_centre(shape) for shape in _shapes(split_thinking(completion)[0], image_size)[0]]


def _shapes(text, image_size):
    """-> boxes and points in the order said; the form: tokens, list, bare, number or "" (none)."""
    if "<|box_start|>" in text:
        width, height = image_size or (1000, 1000)
        scale = (width / 1000, height / 1000) * 2
        found = [match.groups() for match in re.finditer(CORNERS, text)]
        boxes = [[float(n) * s for n, s in zip(box, scale, strict=True)] for box in found]
        return boxes, "tokens" if TOKENS.fullmatch(text) else ""
    items = read_json(text)
    if _numbers(items, 4):
        return [_numbers(items, 4)], "bare"
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
    try:
        # parse_int: int() refuses long numbers with an error, float() makes them infinite.
        return json.loads(text, parse_int=float)
    except (ValueError, RecursionError):  # not JSON; nested too deeply
        return None


def _numbers(value, length):
    """A list of so many numbers as floats; None if it is not, or has NaN or impossible sizes."""
    if not isinstance(value, (list, tuple)) or len(value) != length:
        return None
    plain = all(type(n) in (int, float) and abs(n) <= 1e7 for n in value)  # True is an int as well
    return [float(n) for n in value] if plain else None


def read_object(item):
    """(box, label) of {"bbox_2d", "label"}; None without an upright box or without a label."""
    box = _numbers(item.get("bbox_2d"), 4) if isinstance(item, dict) else None
    good = box and box[0] <= box[2] and box[1] <= box[3] and isinstance(item.get("label"), str)
    return (box, item["label"]) if good and item["label"] else None


def _centre(shape):
    return shape if len(shape) == 2 else [(shape[0] + shape[2]) / 2, (shape[1] + shape[3]) / 2]


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
    boxes, true = boxes_N4[:, None], true_M4[None]
    area_N1, area_1M = (np.prod(b[..., 2:] - b[..., :2], axis=-1) for b in (boxes, true))
    low = np.maximum(boxes[..., :2], true[..., :2])
    high = np.minimum(boxes[..., 2:], true[..., 2:])
    both_NM = np.prod(np.clip(high - low, 0, None), axis=-1)
    either_NM = area_N1 + area_1M - both_NM
    low = np.minimum(boxes[..., :2], true[..., :2])
    high = np.maximum(boxes[..., 2:], true[..., 2:])
    hull_NM = np.prod(high - low, axis=-1)
    # IoU = |A ∩ B| / |A ∪ B|,  GIoU = IoU − |hull \ (A ∪ B)| / |hull|
    iou_NM = both_NM / np.where(either_NM > 0, either_NM, 1)
    return iou_NM, iou_NM - (hull_NM - either_NM) / np.where(hull_NM > 0, hull_NM, 1)


def _matched(cost_NM, matching):
    """-> rows and columns of min(N, M) pairs: the cheapest assignment, or simply as listed."""
    if matching == "order":
        return (np.arange(min(cost_NM.shape)),) * 2
    # [PR1 §4.2] σ̂ = argmax_σ Σ_i Φ(y_i, z_σ(i)), by the Hungarian algorithm
    return _library("scipy.optimize", "scipy").linear_sum_assignment(cost_NM)


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
        # Not below 0: in the release, points far outside the image make the reward negative.
        closeness = max(0.0, 1 - mean / math.hypot(*(image_size or (1000, 1000))))
    # [PR1 code] r = gate · min(n, m)/max(n, m) · (1 − mean matched distance / diagonal)
    return count * closeness, {"format": 1.0, "count": count, "distance": closeness}


def _detection(text, true, image_size, truncated, weight, matching, penalty, components):
    items = read_json(text)
    # Labels are COCO's where the true ones are (as released: always), else any.
    coco = matching == "detr" or (true and {label for _, label in true} <= set(COCO_NAMES))
    pairs = map(read_object, items if isinstance(items, list) else [])
    said = [pair for pair in pairs if pair and (not coco or pair[1] in COCO_NAMES)]
    parts = dict.fromkeys(COMPONENTS, 0.0)
    if not true and items == []:
        parts |= {"format": 1.0, "f1": 1.0, "class": 1.0, "iou": 1.0}
    elif said:
        # [PR1 code] An invalid item lowers the format; it is not in n_pred.
        parts["format"] = len(said) / len(items)
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
    rows, columns = _matched(cost_NM, matching)
    kept = iou_NM[rows, columns] > 0.5  # [PR1 code] strictly, and only after the assignment
    rows, columns = rows[kept], columns[kept]
    hits, n_pred, n_gt = len(rows), len(said), len(true)
    if hits == 0:
        return {}
    return {
        "f1": 2 * hits / (n_pred + n_gt),  # = 2PR/(P + R),  P = hits/n_pred,  R = hits/n_gt
        "class": same_NM[rows, columns].mean().item(),
        "iou": iou_NM[rows, columns].mean().item(),
        "penalty": (n_pred - hits) / n_pred + (n_gt - hits) / n_gt,
    }


def _ocr(text, true, image_size, truncated, weight):
    distance = _library("rapidfuzz.distance", "rapidfuzz").Levenshtein.distance
    text, true = " ".join(text.split()), " ".join(true.split())
    longer = max(len(text), len(true))
    # [PR1 §4.1] Φ = edit distance: 1 − Levenshtein / longer length, white space folded
    similarity = 1 - distance(text, true) / longer if longer else 0.0
    return similarity, {"similarity": similarity}


# ---- §5 maths and choice -------------------------------------------------------------------------
DEADLINE = 1.0  # seconds for a comparison, as in Open-Reasoner-Zero, on which [OVR §3.2] builds
LONGEST = 400  # characters of a formula that is worth comparing
# Powers of powers, long exponents, factorials of long numbers: hours of work in few characters.
POWER = r"(?:\^|\*\*)[{(\s]*-?"
TOO_HARD = re.compile(rf"{POWER}[0-9]+[)}}\s]*{POWER}|{POWER}[0-9]{{5,}}|[0-9]{{4,}}\s*!|!\s*!")
SPELLINGS = (  # several ways to write the same
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;:]|[$\s]"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\.0*$"), ""),
    (re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"), ""),
)


def _formula(text):
    r"""What stands in the last \boxed{…}, or else in $…$; "" if its braces do not balance."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text.strip().strip("$").strip()
    content, depth = text[start + len("\\boxed{") :][: 10 * LONGEST], 1
    for match in re.finditer(r"\\.|[{}]", content, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return content[: match.start()].strip()
    return ""


def _math(text, true, image_size, truncated, weight, exact, compare):
    said, true = _formula(text) if "\\boxed{" in text and not truncated else "", _formula(true)
    # [OVR §3.2] r = 1 if the answer in the box matches the reference, else 0
    right = said == true if exact else _same_formula(said, true, compare or _equal_in_child)
    return float(right and said != ""), {"correct": float(right and said != "")}


def _same_formula(said, true, compare):
    """Spelt alike, or else equal by symbols, unless that is hopeless or both are whole numbers."""
    if said == true or not said or max(len(said), len(true)) > LONGEST:
        return said == true
    plain, plain_true = said, true
    for pattern, spelling in SPELLINGS:
        plain, plain_true = pattern.sub(spelling, plain), pattern.sub(spelling, plain_true)
    whole = re.fullmatch(r"-?[1-9][0-9]*=-?[1-9][0-9]*", f"{plain}={plain_true}")
    if plain == plain_true or whole or TOO_HARD.search(said) or TOO_HARD.search(true):
        return plain == plain_true
    return compare(said, true)


def symbolically_equal(said: str, true: str, deadline: float = 0) -> bool:
    """Whether math-verify finds two formulas equal; at the deadline this process is killed."""
    verifier = _library("math_verify", "'math-verify[antlr4_13_2]'")
    # Its own timeouts work in the main thread only, and not within C; the system's alarm does.
    signal.setitimer(signal.ITIMER_REAL, deadline)
    latex = [verifier.LatexExtractionConfig()]
    said, true = (f"${formula.replace('$', ' ')}$" for formula in (said, true))
    said, true = (verifier.parse(s, latex, parsing_timeout=None) for s in (said, true))
    equal = verifier.verify(true, said, timeout_seconds=None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return bool(equal)


def _equal_in_child(said, true, children=None):
    """Let a child process compare; no answer, because that was its end, means not equal."""
    children = children or _children(os.getpid())
    child, reply = children.get(), ""
    row = {"task": "math", "completion": f"\\boxed{{{said}}}", "answer": true}
    try:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(row), file=child.stdin, flush=True)
            reply = child.stdout.readline()
    finally:
        if not reply:  # dead, or interrupted before it could answer
            child.kill()
            child.wait()
            child = _start_child()
        children.put(child)
    return reply != "" and json.loads(reply)["reward"] == 1


@functools.lru_cache(maxsize=1)
def _children(process_id):
    """A queue of idle children, one queue a process: a fork must not write to its parent's pipes.

    SymPy cannot be interrupted from within, as 9^(9^9) is one endless call into C. An alarm kills
    the child that is late; a new one goes to the end of the queue, and is ready when it is needed.
    """
    children = queue.SimpleQueue()
    for _ in range(2):
        children.put(_start_child())
    hint = "pip install 'math-verify[antlr4_13_2]', or see `python rewards.py score - --child` fail"
    _check(_equal_in_child("x+x", "2x", children), f"formulas can not be compared: {hint}")
    return children


def _start_child():
    command = [sys.executable, os.path.abspath(__file__), "score", "-", "--child"]
    return Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)


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
    right = chosen_letters(text) == {true.strip(" ().").upper()} and not truncated
    return float(right), {"correct": float(right)}


# ---- §6 the score --------------------------------------------------------------------------------
def score(
    task: str, completion: str, answer: object, image_size=None, *, truncated: bool = False,
    think: bool = False, format_weight: float | None = None, compare=None, **options,
) -> Score:
    """The reward of a completion; `options` are the task's in OPTIONS.
    image_size: [W, H] that the model saw; without it nothing is rescaled, and distances are divided
    by 1000·√2. truncated (too long) makes counting, math, choice, think and grounding's form 0.
    compare: a function (said, true) -> bool in place of the children that compare formulas.
    """
    true, settings = _truth(task, answer), _settings(task, options)
    _check(isinstance(completion, str), f"a completion must be text, not {type(completion)}")
    sized = image_size is None or (_numbers(image_size, 2) and min(image_size) > 0)
    _check(sized, f"image_size must be [W, H] in pixels, not {image_size!r:.200}")
    settings |= {"compare": compare} if task == "math" else {}
    weight = format_weight if format_weight is not None else float(task not in ("math", "choice"))
    text, think_formed = split_thinking(completion)
    rules = (_grounding, _counting, _detection, _ocr, _math, _choice)
    total, parts = rules[TASKS.index(task)](text, true, image_size, truncated, weight, **settings)
    if think:
        parts["think"] = float(think_formed and not truncated)
        total += weight * parts["think"]
    return Score(float(total), parts)


def _settings(task, options):
    """The task's options with their defaults; an unknown name or value is an error."""
    settings = {name: allowed[0] for name, allowed in OPTIONS.get(task, {}).items()}
    for name, value in options.items():
        _check(name in settings, f"{task} has no option {name!r}; its own are {list(settings)}")
        allowed = OPTIONS[task][name]
        fits = set(value) <= set(COMPONENTS) if name == "components" else value in allowed
        if name == "penalty":
            fits = bool(_numbers([value], 1)) and value >= 0
        _check(fits, f"{name} in {task} can be {allowed}, not {value!r}")
    return settings | options


def load(spec: str):
    """The function that scores a completion: `score`, or the one that "path.py:function" names."""
    if not spec:
        return score
    path, _, name = spec.rpartition(":")
    _check(os.path.isfile(path), f"--reward {spec}: no file {path!r}; write path.py:function")
    file = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    _check(callable(getattr(module, name, None)), f"--reward {spec}: {path} has no such function")
    return getattr(module, name)


def correct(task: str, completion: str, answer: object, image_size=None, *, think=False) -> float:
    """The answer alone, no points for form: IoU > 0.5, exact count, F1, similarity, right/wrong."""
    if task == "counting":
        text, true = split_thinking(completion)[0], _truth(task, answer)
        parts = _counting(text, true, image_size, False, 1.0, "order", gate=False)[1]
        return float(parts["count"] == 1)
    parts = score(task, completion, answer, image_size, think=think).parts
    if task == "grounding":
        return float(parts["iou"] > 0.5)
    return parts[{"detection": "f1", "ocr": "similarity"}.get(task, "correct")]


# ---- §7 command line -----------------------------------------------------------------------------
def score_rows(lines, compare=None) -> None:
    """Print a JSON object for each one in a file, flushed: other programs talk to this one."""
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            complete = isinstance(row, dict) and {"task", "completion", "answer"} <= row.keys()
            _check(complete, "a row must be a JSON object with task, completion and answer")
            inputs = row["task"], row["completion"], row["answer"], row.get("image_size")
            result = score(*inputs, compare=compare, **row.get("options", {}))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SystemExit(f"{lines.name}:{number}: {error}") from None
        print(json.dumps({"reward": result.total, "parts": result.parts}), flush=True)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.epilog = f"options of a row, default first: {OPTIONS}"
    parser.add_argument("command", choices=["score"])
    parser.add_argument("file", type=argparse.FileType("rb"), help="rows, one a line; - is stdin")
    parser.add_argument("--child", action="store_true", help="compare formulas in this process")
    given, compare = parser.parse_args(), None
    if given.child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        symbolically_equal("\\frac{1}{2}", "0.5")  # the first comparison is slow
        compare = functools.partial(symbolically_equal, deadline=DEADLINE)
        with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes, for huge integers
    score_rows(given.file, compare)


if __name__ == "__main__":
    main()
