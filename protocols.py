r"""What are saved answers worth? The papers' metrics, protocols and own rows, without a model.

A row of predictions is {"id" or "image_id", "completion", "answer", "image_size": [W, H]}, with
"truncated" if it was cut; boxes lie in image_size. Metrics are parts of 1.
[PR1] 2504.07954 · [OVR] 2507.05255 · [ORZ] Open-Reasoner-Zero, 2503.24290.
Unlike [PR1 code]: IoU's denominator lacks 1e-10, so an exact 0.5 is a hit; counts are read from
JSON, points and bare numbers too, and "[]" is right where there is nothing; of a malformed or cut
list of detections what is whole counts; the last image is not left out. OCR: of tagged thinking
only the answer is read, its ends stripped; a wordless page, where that code stops, has 0, or 1 if
nothing is said; no BLEU, no METEOR; the prompt's "<image>", literal there, is where the image is.
"""
import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import data as datasets
import formats
import pictures
import readers
import rewards
from needs import library


# ---- §1 rows of predictions ----------------------------------------------------------------------
def read_predictions(path, *, task: str = "", answers: bool = False) -> list[dict]:
    """The rows of a file, each with "where" it stands and its "id" as text.

    task: the rows' own tasks must agree with it. answers: each row must have its true answer.
    Errors: ValueError naming file, line and what to do.
    """
    rows = []
    for where, raw in formats.read_rows(Path(path)):
        with datasets.blame(where):
            row = json.loads(raw) if isinstance(raw, bytes) else raw
            check_prediction(row, task, answers)
        name = row.get("id", row.get("image_id"))
        rows.append(row | {"where": where, "id": str(name)})
    if not rows:
        raise ValueError(f"{path}: there are no rows in this file")
    return rows


def check_prediction(row, task: str, answers: bool) -> None:
    """Errors: ValueError if a row lacks what scoring needs, or is of another task."""
    complete = isinstance(row, dict) and isinstance(row.get("completion"), str)
    if complete and "id" not in row:
        complete = "image_id" in row
    if complete and answers:
        complete = "answer" in row
    if not complete:
        raise ValueError('a row needs "id" or "image_id", a text "completion", an "answer"')
    if task:
        check_task(row.get("task", task), task)


def check_task(own, task: str) -> None:
    """Errors: ValueError if a row's own task is not `task`; benchmarks mix math and choice."""
    if own != task and {own, task} != {"math", "choice"}:
        raise ValueError(f"this row's task is {own}, but --task is {task}: give --task "
                         f"{own} or a file of {task} alone (math and choice may mix)")


# ---- §2 what a row is worth, then the mean -------------------------------------------------------
COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl",  # s, m, l: areas under 32², 96², above
              "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # of the first 1, 10, 100 boxes


def grounding(row) -> dict:
    """[PR1 §4.3] acc@t: the first box has IoU ≥ t; centre_acc: its centre is in the true box."""
    text, answer, size = row["completion"], row["answer"], row.get("image_size")
    iou = rewards.score("grounding", text, answer, size).parts["iou"]
    accuracies = {f"acc@{t}": float(iou >= t) for t in (0.5, 0.75, 0.95)}
    mean = fmean(accuracies.values())  # the paper's "Avg"
    inside = False
    boxes = readers.parse_boxes(text, size)
    if boxes:
        inside = contains_centre(answer, boxes[0])
    others = {"acc_mean": mean, "centre_acc": float(inside), "mean_iou": iou}
    return accuracies | others


def contains_centre(answer, box) -> bool:
    """Is the centre of `box` in the true box?"""
    left, top, right, bottom = rewards.read_truth("grounding", answer)
    x1, y1, x2, y2 = box
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return left <= x <= right and top <= y <= bottom


def counting(row) -> dict:
    """[PR1 §4.3] Exactly as many boxes or points, or the number itself; cut answers count too."""
    return {"accuracy": rewards.correct("counting", row["completion"], row["answer"])}


def ocr(row) -> dict:
    """[PR1 code] Levenshtein over the longer length, by character; the sets of words compared.

    White space counts, at the ends too. Errors: ImportError if Chinese words need jieba.
    """
    levenshtein = library("rapidfuzz.distance", "rapidfuzz").Levenshtein
    true = true_text(row["answer"])
    said = said_text(row["completion"])
    distance = levenshtein.normalized_distance(said, true)
    chinese = re.search("[\u4e00-\u9fa5]", said + true)
    cut = library("jieba", "jieba").lcut if chinese else str.split
    words = set(cut(said)) or {""}  # "": no word
    true_words = set(cut(true)) or {""}
    hits = len(words & true_words)
    # P = hits/|said|, R = hits/|true|, F1 = 2PR/(P + R) = 2·hits/(|said| + |true|)
    f1 = 2 * hits / (len(words) + len(true_words))
    precision = hits / len(words)
    recall = hits / len(true_words)
    return {"edit_distance": distance, "f1": f1, "precision": precision, "recall": recall}


def true_text(answer) -> str:
    """The text of a page as rewards.py reads it, or without a word, where no reward can be had.

    Errors: ValueError if it is no text.
    """
    wordless = isinstance(answer, str) and not answer.strip()
    return answer if wordless else rewards.read_truth("ocr", answer)


def said_text(completion: str) -> str:
    """What is said, to the letter but for special tokens; of <think> and <answer>, the answer."""
    if "<think>" in completion or "<answer>" in completion:
        completion = readers.split_thinking(completion)[0]
    return re.sub(r"<\|[a-z_]+\|>", "", completion)


def over_samples(rows, annotations: str = "", *, task: str) -> dict:
    """[ORZ] Mean accuracy of a question's k samples, then of the questions; pass@1 … pass@k."""
    tries = {}  # of each question: 1 for a right sample, 0 for a wrong one
    cut = 0
    for row in rows:
        truncated = bool(row.get("truncated"))  # a cut one is wrong
        own = row.get("task", task)
        with datasets.blame(row["where"]):
            score = rewards.score(own, row["completion"], row["answer"], truncated=truncated)
        right = int(score.parts["correct"])
        tries.setdefault(row["id"], []).append(right)
        cut += truncated
    least = min(map(len, tries.values()))
    powers = {2**power for power in range(least.bit_length())}
    result = {"accuracy": fmean(map(fmean, tries.values()))}
    for k in sorted(powers | {least}):
        result[f"pass@{k}"] = fmean(pass_at(k, right) for right in tries.values())
    return result | {"questions": len(tries), "truncated": cut}


def pass_at(k: int, right: list[int]) -> float:
    """The chance that one of k samples is right, unbiased, from n ≥ k samples of 0 and 1."""
    n = len(right)
    c = sum(right)
    # pass@k = 1 − C(n − c, k) / C(n, k)  [arXiv 2107.03374 Eq. 1]
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def average_precision(rows, annotations: str = "") -> dict:
    """[PR1 §4.3] COCO's twelve numbers: all scores are 1.0, so boxes keep their order."""
    truth = read_annotations(annotations) if annotations else truth_of_rows(rows)
    with datasets.blame(annotations):
        truth, numbers = formats.merge_categories(truth)
        check_categories(truth, set(numbers.values()))
    images = {str(image["id"]): image for image in truth["images"]}
    said = []
    for row in rows:
        with datasets.blame(row["where"]):
            image = images.pop(str(row.get("image_id", row["id"])), None)
            if image is None:
                raise ValueError("its image is not there, or was answered before")
            objects, _ = readers.read_objects(row["completion"])
            for box, label in objects:
                if annotations and row.get("image_size"):
                    frame = image["width"], image["height"]
                    box = pictures.scale(box, row["image_size"], frame)
                number = numbers.get(label)  # None: in no class
                said.append(coco_item(image["id"], number, box))
    stats = coco_stats(truth, said)
    return dict(zip(COCO_STATS, stats, strict=True), images_without_prediction=len(images))


def read_annotations(path: str) -> dict:
    """Errors: ValueError if the file is not COCO's."""
    with datasets.blame(path, ValueError):
        truth = json.loads(Path(path).read_bytes())
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise ValueError(f"{path}: images, annotations and categories are expected")
    return truth


def check_categories(truth: dict, known: set) -> None:
    """Errors: ValueError if an annotation is of no category."""
    for item in truth["annotations"]:
        if item["category_id"] not in known:
            raise ValueError(f"an annotation is of category {item['category_id']}, which is not "
                             "in categories")


def coco_stats(truth: dict, said: list[dict]) -> list:
    """COCO's twelve numbers; None where there are no boxes of that kind."""
    coco = library("pycocotools.coco", "pycocotools")
    cocoeval = library("pycocotools.cocoeval", "pycocotools")
    true, found = coco.COCO(), coco.COCO()
    true.dataset = truth
    found.dataset = truth | {"annotations": said}
    with contextlib.redirect_stdout(None):  # it prints tables
        for index in (true, found):
            complete(index.dataset["annotations"])
            index.createIndex()
        result = cocoeval.COCOeval(true, found, "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return [float(value) if value >= 0 else None for value in result.stats]  # -1: no boxes


def complete(annotations: list[dict]) -> None:
    """What pycocotools needs and files may lack. Ids start at 1: 0 would mean "no match"."""
    for number, item in enumerate(annotations, 1):
        width, height = item["bbox"][2:]
        item["id"] = number
        item.setdefault("iscrowd", 0)
        item.setdefault("area", width * height)


def truth_of_rows(rows) -> dict:
    """COCO instances of the rows' own answers, in the frame that the model saw."""
    images, annotations = [], []
    for row in rows:
        image = str(row.get("image_id", row["id"]))
        images.append({"id": image})
        with datasets.blame(row["where"]):
            for thing in rewards.read_truth("detection", row["answer"]):
                annotations.append(coco_item(image, thing["label"], thing["bbox_2d"]))
    names = {item["category_id"] for item in annotations}
    categories = [{"id": name, "name": name} for name in names]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_item(image, category, box) -> dict:
    """A box [x1, y1, x2, y2] as COCO writes it: [x, y, width, height]."""
    x1, y1, x2, y2 = box
    bbox = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": 1.0}


def means_of_rows(rows: list[dict], annotations: str = "", *, score_row: Callable) -> dict:
    """The mean of each metric of a row."""
    values = []
    for row in rows:
        with datasets.blame(row["where"]):
            values.append(score_row(row))
    return {name: fmean(value[name] for value in values) for name in values[0]}


def score_predictions(task: str, rows: list[dict], annotations: str = "") -> dict:
    """The task's metrics; ValueError says where a bad row stands."""
    return protocol_of(task).score(rows, annotations)


# ---- §3 the papers' protocols, and what they report ----------------------------------------------
PAPERS = Path(__file__).with_name("results") / "papers.json"


@dataclass(frozen=True)
class Protocol:
    """How a paper answers a benchmark, what it measures, and where its own rows stand."""
    score: Callable  # (rows, file of annotations or "") -> metrics
    max_tokens: int  # of the longest answer
    rows: str  # key in results/papers.json: metrics and source, then a row a benchmark
    samples: int = 1  # answers to a question; 1: greedy, more: T = 1
    why_one: str = ""  # why several answers to a question go unscored; empty: they are scored
    penalty: float = 1.0  # on repetition
    prompt: str = ""  # where it is not that of training
    package: tuple[str, ...] = ()  # module that scoring needs, and its name to install


PROTOCOLS = {
    "grounding": Protocol(  # [PR1 code], these four
        score=partial(means_of_rows, score_row=grounding), rows="grounding", max_tokens=512,
        penalty=1.05,
    ),
    "counting": Protocol(
        score=partial(means_of_rows, score_row=counting), rows="counting", max_tokens=512,
    ),
    "detection": Protocol(
        score=average_precision, rows="detection", max_tokens=4096,
        why_one="AP is of one answer an image",
        prompt="Locate every item from the category list in the image and output the coordinates "
               "in JSON format. The category set includes {}.",
        package=("pycocotools", "pycocotools"),
    ),
    "ocr": Protocol(
        score=partial(means_of_rows, score_row=ocr), rows="ocr", max_tokens=2048,
        prompt="<image>\nOCR this image: ", package=("rapidfuzz", "rapidfuzz"),
    ),
    "math": Protocol(  # unstated: OVR's last 48k tokens, 16 of [ORZ]
        score=partial(over_samples, task="math"), rows="math", max_tokens=49152, samples=16,
        package=("math_verify", "math-verify"),
    ),
    "choice": Protocol(
        score=partial(over_samples, task="choice"), rows="math", max_tokens=49152, samples=16,
    ),
}  # fmt: skip


def protocol_of(task: str) -> Protocol:
    """Errors: ValueError if no paper's protocol is known for the task."""
    if task not in PROTOCOLS:
        raise ValueError(f"no protocol scores {task}, only {', '.join(PROTOCOLS)}: add a row to "
                         "PROTOCOLS in protocols.py")
    return PROTOCOLS[task]


def beside_paper(task: str, result: dict) -> str:
    """In percent: what was measured, and under it the paper's rows with their models' names."""
    columns, *rows = json.loads(PAPERS.read_bytes())[protocol_of(task).rows]
    names = columns.partition(" [")[0].split()
    measured = []
    for name in names:
        share = result[name]
        measured.append("-" if share is None else f"{100 * share:.1f}")
    return "\n".join([f"{columns}, in percent", f"measured here: {' '.join(measured)}", *rows])
