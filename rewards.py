"""What is a good answer? Per task the prompt, the reader of the answer, the reward, its parts.

    python rewards.py score rollouts.jsonl        # or -: one row in, one row out, in order
    {"task": "grounding", "completion": "[0, 0, 10, 10]", "answer": [0, 0, 10, 20]}
    -> {"reward": 1.5, "parts": {"format": 1.0, "iou": 0.5}}      # 1 + 100/200

[PR1] is Perception-R1, arXiv 2504.07954 (grounding, counting, OCR, detection), [PR1 code] its
release; [OVR] is Open-Vision-Reasoner, arXiv 2507.05255 (math, choice). Worked, each one a test:
  counting   true (0,0) (30,40), said (0,0): min/max = 1/2 at no distance, so 0.5
  detection  two true boxes, one said exactly, so 0.25·1 + 0.75·2/3 + 1 + 1 − 0.5·1/2 = 2.5
  ocr        "kitten" read as "sitting": Levenshtein 3, longer length 7, so 4/7

`score` is pure: whatever the model writes becomes a number in bounded time; only the caller's own
mistakes (task, option, true answer) are errors. A task is a row of TABLE (§4) and its functions.
Departures from the papers and the released code, whose settings are iou_power 2, matching detr,
penalty 0. Of what it takes for well formed, only the first two and the class indices change scores:
D2 Answers are JSON in absolute pixels of the resized image, as Qwen2.5-VL's. Qwen2-VL's box tokens
   (0-1000), with which [PR1] trained grounding and counting, are read too, but counting measures in
   pixels: in an image that is no square, other distances. Numbers of 0-1 are pixels as well.
-  Labels are any where the true ones are not all COCO's. Nothing to find and "[]" said is right: 3
   in detection, 1 in counting, there 0. What cannot be read is no "[]". F1 has no 1e-8.
-  Thinking adds format_weight · think to any task. The weight, on format and think, is 1, but 0 for
   math and choice: [OVR] ignores the format. Text within <think> is never the answer. White space
   and newlines do not break the form, a tag that is there twice does.
-  No reward by accident, as an exception's 0: IoU without area is 0, a bad box is one invalid item,
   class indices line up, far-off points earn 0 and not less, a format is its whole pattern, but for
   <|im_end|>: `truncated` says that it is missing.
-  What is there is read: in grounding a box under any key, in counting other models' lists of
   points and, where the data has a number, numbers in bold, with a dot or as {"count": 2}. In
   detection the whole objects of prose and of a cut list; all else of it is one invalid item.
-  A true answer that nothing can match (empty, a box without area) is refused.
-  Maths follows formulas.py. What it cannot decide in its processor time is 0, and marked so.
"""
import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import readers
from formulas import boxed, equal
from needs import check, library
from readers import COCO_NAMES, chosen_letters, read_objects, split_thinking, think_order

COMPONENTS = ("format", "f1", "class", "iou", "penalty")  # of detection


@dataclass(frozen=True)
class Score:
    """A completion's reward and, by name, the parts it was made of, unweighted."""
    total: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Task:
    """A row of the table of tasks."""
    prompt: str  # {} is the question
    read: Callable  # true answer, as data sets write it -> its one spelling
    write: Callable  # (true answer, question) -> the value, or text, that earns the full reward
    rule: Callable  # (text, true, **settings) -> reward, parts
    right: Callable  # parts -> what `correct` says, 0 to 1
    seen: Callable  # (true answer, question) -> what a reference's thinking says that it sees
    question: str = ""  # if none is given; without one the data must ask
    metric: str = "accuracy"  # what `right` is called in tables and figures
    placed: bool = False  # its answers are places in the image
    needs_image: bool = False
    format_weight: float = 1.0
    options: dict = field(default_factory=dict)  # name: its values, default first
    others: dict = field(default_factory=dict)  # name: (all it may be in words, value -> may it?)


# ---- §1 prompts and references -------------------------------------------------------------------
THINK = (" Output the thinking process in <think> </think> and final answer in <answer> </answer>"
         " tags.")  # [PR1 code] says "final answer (number)"; here they are boxes and texts too
THINK_AFTER = (" Output the final answer in <answer> </answer> and after it the thinking process in"
               " <think> </think> tags.")


def think_prompt(think: bool | str) -> str:
    """What asks for thinking, at the end of a prompt."""
    return {"": "", "before": THINK, "after": THINK_AFTER}[think_order(think)]


def row_of(task: str) -> Task:
    check(task in TABLE, f"unknown task {task!r}; the tasks are {', '.join(TABLE)}")
    return TABLE[task]


def prompt(task: str, question: str = "", *, think: bool | str = False) -> str:
    """The user's text for a question (grounding, counting: a name; detection: names or nothing)."""
    row = row_of(task)
    return row.prompt.format(question or row.question) + think_prompt(think)


def reference(task: str, answer: object, question: str = "", *, think: bool | str = False) -> str:
    """A completion that earns the full reward, coordinates in whole pixels, as Qwen writes them."""
    row = row_of(task)
    true = read_truth(task, answer)
    said = row.write(true, question)
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    thought = f"<think>I see {row.seen(true, question)}.</think>"
    order = think_order(think)
    if order == "before":
        return f"{thought}<answer>{text}</answer>"
    if order == "after":
        return f"<answer>{text}</answer>{thought}"
    return text


def read_truth(task: str, answer: object) -> object:
    r"""The true answer in its task's one spelling, whatever a data set or a trainer puts around it.

    grounding [x1, y1, x2, y2]; counting [[x, y], …] or a whole number from 0; detection
    [{"bbox_2d": [x1, y1, x2, y2], "label": str}, …]; ocr, math: text; choice: one capital letter.
    Read too: JSON as text, <answer>…</answer>, \boxed{…} and $…$ around it, points as {"x", "y"},
    [PR1 code] {"target_id", "target_box"}, "(B)" and "b.". ValueError says what does not fit.
    """
    row = row_of(task)
    try:
        return row.read(answer)
    except ValueError as error:
        raise ValueError(f"the true answer in {task}: {error}") from None


# ---- §2 perception: each rule returns its reward and its parts -----------------------------------
def grounding(text, true, image_size, truncated, weight, iou_power):
    shapes, form = readers.read_shapes(text, image_size)
    boxes = [shape for shape in shapes if len(shape) == 4]
    boxes = [box for box in boxes if box[0] <= box[2] and box[1] <= box[3]]
    one = len(boxes) == len(shapes) == 1
    formed = float(one and form in ("tokens", "list", "bare") and not truncated)
    overlap = 0.0
    if boxes:  # the first one said counts, so that a second guess earns nothing
        iou_11, _ = overlaps(np.array(boxes[:1]), np.array([true]))
        overlap = iou_11.item()
    # [PR1 §4.1] S = format + Φ,  Φ = IoU (squared in the released code)
    return weight * formed + overlap**iou_power, {"format": formed, "iou": overlap}


def overlaps(boxes_N4, true_M4):
    """-> IoU and GIoU of each pair, both [N, M]; 0 where there is no area."""
    low_N12 = boxes_N4[:, None, :2]
    high_N12 = boxes_N4[:, None, 2:]
    low_1M2 = true_M4[None, :, :2]
    high_1M2 = true_M4[None, :, 2:]
    shared_NM2 = np.minimum(high_N12, high_1M2) - np.maximum(low_N12, low_1M2)
    both_NM = shared_NM2.clip(0).prod(-1)
    area_N1 = (high_N12 - low_N12).prod(-1)
    area_1M = (high_1M2 - low_1M2).prod(-1)
    either_NM = area_N1 + area_1M - both_NM
    spanned_NM2 = np.maximum(high_N12, high_1M2) - np.minimum(low_N12, low_1M2)
    hull_NM = spanned_NM2.prod(-1)
    # IoU = |A ∩ B| / |A ∪ B|,  GIoU = IoU − |hull \ (A ∪ B)| / |hull|
    iou_NM = both_NM / np.where(either_NM > 0, either_NM, 1)
    outside_NM = (hull_NM - either_NM) / np.where(hull_NM > 0, hull_NM, 1)
    return iou_NM, iou_NM - outside_NM


def matched(cost_NM, matching):
    """-> rows and columns of min(N, M) pairs: the cheapest assignment, or simply as listed."""
    if matching == "order":
        listed = np.arange(min(cost_NM.shape))
        return listed, listed
    # [PR1 §4.2] σ̂ = argmax_σ Σ_i Φ(y_i, z_σ(i)), by the Hungarian algorithm
    return library("scipy.optimize", "scipy").linear_sum_assignment(cost_NM)


def counting(text, true, image_size, truncated, weight, matching):
    shapes, form = readers.read_shapes(text, image_size)
    bare = isinstance(true, int)  # the data has no points: then a bare number is an answer too
    formed = form in ("list", "tokens", "plain")
    said = len(shapes)
    wanted = true if bare else len(true)
    if not shapes and not formed:
        said = readers.read_number(text)
        formed = bare and said is not None
    gate = float(formed and not truncated)
    count = distance = 0.0  # what cannot be read is wrong, not "none"
    if said is not None:
        count = 1.0 if said == wanted else min(said, wanted) / max(said, wanted)
    if gate and (bare or said == wanted == 0):
        distance = 1.0  # with nothing to measure
    elif gate and said and wanted:
        distance = closeness(shapes, true, image_size, matching)
    # [PR1 code] r = gate · min(n, m)/max(n, m) · (1 − mean matched distance / diagonal)
    return gate * count * distance, {"format": gate, "count": count, "distance": distance}


def closeness(shapes, true, image_size, matching):
    """1 − mean distance of the matched points / the image's diagonal, at least 0."""
    width, height = image_size or (1000, 1000)
    points_N2 = np.array([readers.centre(shape) for shape in shapes])
    true_M2 = np.array(true)
    offsets_NM2 = points_N2[:, None] - true_M2[None]
    distance_NM = np.linalg.norm(offsets_NM2, axis=-1)
    pairs = matched(distance_NM, matching)
    mean = distance_NM[pairs].mean().item()
    return max(0.0, 1 - mean / math.hypot(width, height))


def detection(text, true, image_size, truncated, weight, matching, penalty, components):
    true = [(item["bbox_2d"], item["label"]) for item in true]
    said, items = read_objects(text)
    # Labels are COCO's where the true ones are (as released: always), else any.
    if matching == "detr" or (true and {label for _, label in true} <= set(COCO_NAMES)):
        said = [pair for pair in said if pair[1] in COCO_NAMES]
    parts = dict.fromkeys(COMPONENTS, 0.0)
    if not true and items == 0:  # "[]", and rightly
        parts |= {"format": 1.0, "f1": 1.0, "class": 1.0, "iou": 1.0}
    if said:
        parts["format"] = len(said) / items  # [PR1 code] an invalid item lowers it
    if said and true:
        parts |= found(said, true, matching)
    weights = {"format": 0.25 * weight, "f1": 0.75, "class": 1.0, "iou": 1.0, "penalty": -penalty}
    # [PR1 code] r = 0.25·format + 0.75·F1 + class + IoU − penalty·(FP/n_pred + FN/n_gt)
    total = sum(weights[name] * parts[name] for name in components)
    return min(max(total, 0.0), 3.0), parts


def found(said, true, matching):
    """F1, class, IoU and penalty over the pairs that match; none of them without such a pair."""
    boxes_N4 = np.array([box for box, _ in said])
    true_M4 = np.array([box for box, _ in true])
    names_N1 = np.array([[label] for _, label in said], object)
    names_M = np.array([label for _, label in true], object)
    same_NM = names_N1 == names_M
    iou_NM, giou_NM = overlaps(boxes_N4, true_M4)
    cost_NM = -iou_NM
    if matching == "detr":
        cost_NM = detr_cost(boxes_N4, true_M4, same_NM, giou_NM)
    pairs = matched(cost_NM, matching)
    kept = iou_NM[pairs] > 0.5  # [PR1 code] strictly, and only after the assignment
    hits = kept.sum().item()
    n_pred, n_gt = len(said), len(true)  # valid items only
    if hits == 0:
        return {}
    # F1 = 2PR/(P + R),  P = hits/n_pred,  R = hits/n_gt
    return {
        "f1": 2 * hits / (n_pred + n_gt),
        "class": same_NM[pairs][kept].mean().item(),
        "iou": iou_NM[pairs][kept].mean().item(),
        "penalty": (n_pred - hits) / n_pred + (n_gt - hits) / n_gt,
    }


def detr_cost(boxes_N4, true_M4, same_NM, giou_NM):
    """[PR1 code] L1 of centre and size in pixels: distance decides nearly alone."""
    sizes_N4 = centre_and_size(boxes_N4)
    sizes_M4 = centre_and_size(true_M4)
    l1_NM = np.abs(sizes_N4[:, None] - sizes_M4[None]).sum(axis=-1)
    # p is a softmax over 90 scores, 1 for the class said and 0 for the others.
    p_NM = np.where(same_NM, math.e, 1) / (math.e + 89)
    # cost = 5·L1 − p(class) − 2·GIoU
    return 5 * l1_NM - p_NM - 2 * giou_NM


def centre_and_size(boxes_N4):
    """[x1, y1, x2, y2] -> [x, y, width, height] of each box, (x, y) its centre."""
    low_N2, high_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
    return np.concatenate([(low_N2 + high_N2) / 2, high_N2 - low_N2], axis=1)


def ocr(text, true, image_size, truncated, weight):
    levenshtein = library("rapidfuzz.distance", "rapidfuzz").Levenshtein
    text, true = " ".join(text.split()), " ".join(true.split())
    # [PR1 §4.1] Φ = edit distance: 1 − Levenshtein / longer length, white space folded
    similarity = levenshtein.normalized_similarity(text, true)
    return similarity, {"similarity": similarity}


# ---- §3 maths and choice -------------------------------------------------------------------------
def maths(text, true, image_size, truncated, weight, exact):
    said = ""
    if "\\boxed{" in text and not truncated:
        said = boxed(text)
    # [OVR §3.2] r = 1 if the answer in the box matches the reference (0.5 and \frac{1}{2}), else 0
    same = equal(said, true, exact=exact)
    if same is None:
        return 0.0, {"correct": 0.0, "undecided": 1.0}
    return float(same), {"correct": float(same)}


def choice(text, true, image_size, truncated, weight):
    right = float(chosen_letters(text) == {true} and not truncated)
    return right, {"correct": right}


# ---- §4 the table of tasks -----------------------------------------------------------------------
def whole_pixels(values):
    return [round(value) for value in values]


def write_box(true, question):
    return [{"bbox_2d": whole_pixels(true), "label": question}]


def write_points(true, question):
    if isinstance(true, int):
        return true
    return [{"point_2d": whole_pixels(point), "label": question} for point in true]


def write_objects(true, question):
    return [item | {"bbox_2d": whole_pixels(item["bbox_2d"])} for item in true]


def write_text(true, question):
    return true


def write_formula(true, question):
    return f"\\boxed{{{true}}}"


def see_one(true, question):
    return f"the {question or 'object'}"


def see_number(true, question):
    count = true if isinstance(true, int) else len(true)
    return f"{count} {question or 'objects'}"


def see_objects(true, question):
    *others, last = [f"a {item['label']}" for item in true] or ["no such object"]
    return f"{', '.join(others)} and {last}" if others else last


def see_lines(true, question):
    lines = len(true.splitlines())
    return "a line of text" if lines == 1 else f"{lines} lines of text"


def see_question(true, question):
    return "a question"


def from_zero(value):
    return readers.plain_numbers([value], 1) is not None and value >= 0


def are_components(value):
    listed = isinstance(value, (list, tuple)) and len(value) > 0
    return listed and all(name in COMPONENTS for name in value)


TABLE = {
    "grounding": Task(
        prompt="Output the bounding box of the {} in the image.",  # [PR1 T8]
        read=readers.true_box, write=write_box, rule=grounding, seen=see_one,
        right=lambda parts: float(parts["iou"] > 0.5), placed=True, needs_image=True,
        options={"iou_power": (1, 2)},  # 1 [PR1 §4.1], 2 [PR1 code]
    ),
    "counting": Task(
        prompt="Output all the bounding boxes of the {}",  # [PR1 T8]
        read=readers.true_points, write=write_points, rule=counting, seen=see_number,
        right=lambda parts: float(parts["count"] == 1), placed=True, needs_image=True,
        options={"matching": ("optimal", "order")},  # order: [PR1 T5] "w/o reward matching"
    ),
    "detection": Task(
        prompt="Please output bbox coordinates and names of {}.",  # [PR1 T8]
        question=", ".join(COCO_NAMES),  # [PR1 T8]
        read=readers.true_objects, write=write_objects, rule=detection, seen=see_objects,
        right=lambda parts: parts["f1"], metric="F1", placed=True, needs_image=True,
        options={
            "matching": ("iou", "detr", "order"),  # [PR1 §4.2], [PR1 code], [PR1 T5]
            "penalty": (0.5, 0.0),  # [PR1 T6], [PR1 code]
            "components": (COMPONENTS,),  # [PR1 T6]
        },
        others={
            "penalty": ("any number from 0", from_zero),
            "components": (f"a list of some of {', '.join(COMPONENTS)}", are_components)},
    ),
    "ocr": Task(
        prompt="{}", question="OCR this image.",  # [PR1 T8]
        read=readers.true_text, write=write_text, rule=ocr, seen=see_lines,
        right=lambda parts: parts["similarity"], metric="similarity", needs_image=True,
    ),
    "math": Task(
        prompt="{}\nPut the final answer in \\boxed{{}}.",  # ours: OVR's prompts are not published
        read=readers.true_formula, write=write_formula, rule=maths, seen=see_question,
        right=lambda parts: parts["correct"], format_weight=0.0,
        options={"exact": (False, True)},  # False: by formulas.py; True: the same text [OVR §3.2]
    ),
    "choice": Task(
        prompt="{}\nAnswer with the letter of the right option.",  # ours
        read=readers.true_letter, write=write_text, rule=choice, seen=see_question,
        right=lambda parts: parts["correct"], format_weight=0.0,
    ),
}  # fmt: skip
TASKS = tuple(TABLE)
OPTIONS = {name: row.options for name, row in TABLE.items() if row.options}
PLACED = tuple(name for name, row in TABLE.items() if row.placed)


def parse_places(task: str, completion: str, image_size=None) -> list[list[float]]:
    """Boxes, else points, in the frame of image_size; [] in a task whose answers are no places."""
    if task not in PLACED:
        return []
    boxes = readers.parse_boxes(completion, image_size)
    return boxes or readers.parse_points(completion, image_size)


# ---- §5 the score --------------------------------------------------------------------------------
def score(
    task: str, completion: str, answer: object, image_size=None, *, truncated=False,
    think: bool | str = False, format_weight: float | None = None, sample=None, **options,
) -> Score:  # fmt: skip
    """The reward of a completion; `options` are the task's in OPTIONS.

    image_size: [W, H] that the model saw; without it nothing is rescaled, and distances are divided
    by 1000·√2. truncated (too long) makes counting, math, choice, think and grounding's form 0.
    sample: not used; other rewards (--reward) are handed it, and may pass on what they got.
    """
    row = row_of(task)
    true = read_truth(task, answer)
    for name, value in options.items():
        check(name in row.options, f"{task} has no option {name!r}; its own are {[*row.options]}")
        can_be = values_of(row, name)
        check(fits(row, name, value), f"{name} in {task} can be {can_be}, not {value!r}")
    check(isinstance(completion, str), f"a completion must be text, not {type(completion)}")
    sized = image_size is None or (readers.plain_numbers(image_size, 2) and min(image_size) > 0)
    check(sized, f"image_size must be [W, H] in pixels, not {image_size!r:.200}")
    settings = {name: values[0] for name, values in row.options.items()} | options
    weight = row.format_weight if format_weight is None else format_weight
    text, think_formed = split_thinking(completion, think)
    total, parts = row.rule(text, true, image_size, truncated, weight, **settings)
    if think:
        parts["think"] = float(think_formed and not truncated)
        total += weight * parts["think"]
    return Score(float(total), parts)


def fits(row: Task, name: str, value: object) -> bool:
    """Whether an option of the task can have this value."""
    if name in row.others:
        _, is_one = row.others[name]
        return is_one(value)
    return value in row.options[name]


def values_of(row: Task, name: str) -> str:
    """What an option of the task can be."""
    if name in row.others:
        in_words, _ = row.others[name]
        return in_words
    return str(row.options[name])


def correct(
    task: str, completion: str, answer: object, image_size=None, *, think: bool | str = False
) -> float:
    """The answer alone, no points for form: IoU > 0.5, exact count, F1, similarity, right/wrong."""
    return row_of(task).right(score(task, completion, answer, image_size, think=think).parts)


def metric_name(tasks) -> str:
    """What `correct` is called on samples of these tasks; "score" where they differ."""
    names = {row_of(task).metric for task in tasks}
    return names.pop() if len(names) == 1 else "score"


# ---- §6 command line -----------------------------------------------------------------------------
def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.epilog = f"options of a row, default first: {OPTIONS}"
    parser.add_argument("command", choices=["score"])
    parser.add_argument("file", type=argparse.FileType("rb"), help="rows, one a line; - is stdin")
    given = parser.parse_args()
    for number, line in enumerate(given.file, start=1):
        try:
            result = score_row(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SystemExit(f"{given.file.name}:{number}: {error}") from None
        print(json.dumps({"reward": result.total, "parts": result.parts}), flush=True)  # to a pipe


def score_row(row):
    complete = isinstance(row, dict) and {"task", "completion", "answer"} <= row.keys()
    check(complete, "a row must be a JSON object with task, completion and answer")
    about = row["task"], row["completion"], row["answer"], row.get("image_size")
    return score(*about, **row.get("options", {}))


if __name__ == "__main__":
    main()
