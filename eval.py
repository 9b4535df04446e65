r"""Scores models, saved answers and runs: benchmarks, behaviours, curves, pictures.

  python eval.py demo runs/coldstart runs/grpo            before / after on held-out samples
  python eval.py run --model DIR --task grounding --data refcoco-vlmr1:refcoco_val.json --out DIR
  python eval.py metrics --task detection --predictions FILE.jsonl --annotations instances.json
  python eval.py behaviours --predictions step-0.jsonl step-500.jsonl --plot behaviours.png
  python eval.py plot RUN [RUN…]           training curves; `show RUN`: its samples on a sheet
  python eval.py curriculum --model DIR --data SPEC --out DIR   easy to hard, by the pass rate
  python eval.py average CHECKPOINT CHECKPOINT --out DIR  [OVR §4.1] ends with such a mean

A row of predictions is {"id" or "image_id", "completion", "answer", "image_size": [W, H]}, with
"truncated" if it was cut; boxes lie in image_size. Metrics are parts of 1, one JSON object; papers'
rows go to stderr. [PR1] 2504.07954 · [OVR] 2507.05255 · [ORZ] Open-Reasoner-Zero, 2503.24290.
Unlike [PR1 code]: IoU's denominator lacks 1e-10, so an exact 0.5 is a hit; a malformed detection
loses itself, not its list. OCR: of thinking and tags only the answer is read, its ends stripped; a
wordless page, where [PR1 code] stops, has 0, or 1 if nothing is said; no BLEU, no METEOR.
"""
import contextlib
import json
import math
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import tyro
from typing_extensions import Doc

import data as datasets
import formats
import pictures
import plots
import rewards
from formulas import library
from tiny import TINY

# ---- §1 options, and rows of predictions ---------------------------------------------------------
Task = Annotated[Literal[*datasets.TASKS], Doc("how to score")]
Annotations = Annotated[str, Doc("COCO instances, and their frame; empty: the rows' own answers")]
Data = Annotated[tuple[str, ...], Doc("specs of data.py, as coco:FILE; demo: the run's if empty")]
Samples = Annotated[int, Doc("the first so many samples; 0: all")]
Tries = Annotated[int, Doc("1: greedy, more: T = 1; 0: 1 [PR1 code], math, choice 16 [ORZ]")]
MaxTokens = Annotated[int, Doc("0: 512, ocr 2048, detection 4096 [PR1 code], math, choice 49152")]
System = Annotated[str | None, Doc("system turn where the data has none; default: Qwen's own")]
Blind = Annotated[bool, Doc("control: grey images of the same size, so only the question is left")]
Seeds = Annotated[bool, Doc("runs named alike but for the last number: their mean ± one error")]
Steps = Annotated[int, Doc("so many of the steps with samples, from the first to the last")]
Out = Annotated[str, Doc("where to write; empty: in the (last) run folder")]


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


# ---- §2 metrics: what a row is worth, then the mean ----------------------------------------------
def grounding(row) -> dict:
    """[PR1 §4.3] acc@t: the first box has IoU ≥ t; centre_acc: its centre is in the true box."""
    text, answer, size = row["completion"], row["answer"], row.get("image_size")
    iou = rewards.score("grounding", text, answer, size).parts["iou"]
    accuracies = {f"acc@{t}": float(iou >= t) for t in (0.5, 0.75, 0.95)}
    mean = fmean(accuracies.values())  # the paper's "Avg"
    inside = False
    boxes = rewards.parse_boxes(text, size)
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
    true = row["answer"]
    if not isinstance(true, str):
        raise ValueError(f"the answer in ocr must be text, not {true!r:.60}")
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


def said_text(completion: str) -> str:
    """What is said, to the letter but for special tokens; of <think> and <answer>, the answer."""
    if "<think>" in completion or "<answer>" in completion:
        completion = rewards.split_thinking(completion)[0]
    return re.sub(r"<\|[a-z_]+\|>", "", completion)


def over_samples(rows, task: str) -> dict:
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


COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl",  # s, m, l: areas under 32², 96², above
              "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # of the first 1, 10, 100 boxes


def average_precision(rows, annotations: str = "") -> dict:
    """[PR1 §4.3] COCO's twelve numbers: all scores are 1.0, so boxes keep their order."""
    if annotations:
        truth = json.loads(Path(annotations).read_bytes())
    else:
        truth = truth_of_rows(rows)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise ValueError(f"{annotations}: images, annotations and categories are expected")
    with datasets.blame(annotations):
        truth, numbers = merge_categories(truth)
    images = {str(image["id"]): image for image in truth["images"]}
    said = []
    for row in rows:
        with datasets.blame(row["where"]):
            image = images.pop(str(row.get("image_id", row["id"])), None)
            if image is None:
                raise ValueError("its image is not there, or was answered before")
            for box, label in said_objects(row["completion"]):
                if annotations and row.get("image_size"):
                    frame = image["width"], image["height"]
                    box = pictures.scale(box, row["image_size"], frame)
                number = numbers.get(label)  # None: in no class
                said.append(coco_item(image["id"], number, box))
    stats = coco_stats(truth, said)
    return dict(zip(COCO_STATS, stats, strict=True), images_without_prediction=len(images))


def merge_categories(truth: dict) -> tuple[dict, dict]:
    """(the truth with one category a name, {name: its id}): an answer says names, never ids."""
    numbers, merged = {}, {}
    for category in truth["categories"]:
        first = numbers.setdefault(category["name"], category["id"])
        merged[category["id"]] = first
    annotations = []
    for item in truth["annotations"]:
        number = item["category_id"]
        if number not in merged:
            raise ValueError(f"an annotation is of category {number}, which is not in categories")
        annotations.append(item | {"category_id": merged[number]})
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return truth | {"categories": categories, "annotations": annotations}, numbers


def said_objects(completion: str) -> list:
    """The (box, label) pairs of an answer; a malformed one is left out."""
    items = rewards.read_json(rewards.split_thinking(completion)[0])
    if not isinstance(items, list):
        return []
    return [*filter(None, map(rewards.read_object, items))]


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


def score_predictions(task: str, rows: list[dict], annotations: str = "") -> dict:
    """The task's metrics; ValueError says where a bad row stands."""
    if task == "detection":
        return average_precision(rows, annotations)
    if task in ("math", "choice"):
        return over_samples(rows, task)
    score_row = {"grounding": grounding, "counting": counting, "ocr": ocr}[task]
    values = []
    for row in rows:
        with datasets.blame(row["where"]):
            values.append(score_row(row))
    return {name: fmean(value[name] for value in values) for name in values[0]}


def metrics(task: Task, predictions: Path, annotations: Annotations = "") -> None:
    """Scores saved predictions, without a model, as the papers do."""
    rows = read_predictions(predictions, task=task, answers=not annotations)
    result = score_predictions(task, rows, annotations)
    print(beside_paper(task, result), file=sys.stderr)
    print(json.dumps({"task": task, "samples": len(rows)} | result))


# ---- §3 the papers' protocols, and what they report ----------------------------------------------
PAPERS = Path(__file__).with_name("results") / "papers.json"


@dataclass(frozen=True)
class Protocol:
    """How a paper answers a benchmark, and where its own rows stand."""
    max_tokens: int  # of the longest answer
    samples: int  # answers to a question; 1: greedy, more: T = 1
    penalty: float  # on repetition
    rows: str  # key in results/papers.json: metrics and source, then a row a benchmark


PROTOCOLS = {
    "grounding": Protocol(512, 1, 1.05, "grounding"),  # [PR1 code], these four
    "counting": Protocol(512, 1, 1.0, "counting"),
    "ocr": Protocol(2048, 1, 1.0, "ocr"),
    "detection": Protocol(4096, 1, 1.0, "detection"),
    "math": Protocol(49152, 16, 1.0, "math"),  # unstated: OVR's last 48k tokens, 16 of [ORZ]
    "choice": Protocol(49152, 16, 1.0, "math")}
PROMPTS = rewards.PROMPTS | {  # [PR1 code] evaluates two with others; <image> is literal
    "ocr": "<image>\nOCR this image: ", "detection": "Locate every item from the category list in "
        "the image and output the coordinates in JSON format. The category set includes {}."}


def beside_paper(task: str, result: dict) -> str:
    """In percent: what was measured, and under it the paper's rows with their models' names."""
    columns, *rows = json.loads(PAPERS.read_bytes())[PROTOCOLS[task].rows]
    names = columns.partition(" [")[0].split()
    measured = []
    for name in names:
        share = result[name]
        measured.append("-" if share is None else f"{100 * share:.1f}")
    return "\n".join([f"{columns}, in percent", f"measured here: {' '.join(measured)}", *rows])


# ---- §4 running a model --------------------------------------------------------------------------
def answer_all(run, per_question: int, max_tokens: int, limit: int, penalty: float = 1.0):
    """A row for each answer to each of the first `limit` samples (0: all), equal on all ranks."""
    import qwen_vl
    from sampler import keyed_uniforms
    run.sampler.refresh(run.policy)
    ranks, rows = run.processes, []
    own = range(ranks.rank, min(limit or math.inf, len(run.eval_data)), ranks.world)
    for first in range(0, len(own), 32):  # not all at once: a large image is 300 MB of patches
        samples, prompts = [run.eval_data.at(place) for place in own[first : first + 32]], []
        for s in samples:
            question = s.question or rewards.QUESTIONS.get(s.task, "")
            text = PROMPTS[s.task].format(question) + rewards.THINK * run.config.think
            system = s.system or run.config.system_prompt
            prompts += [qwen_vl.encode_chat(run.tokenizer, run.special, text, s.images, system)]
        noise = [keyed_uniforms(0, 0, f"eval {s.id}", per_question, max_tokens) for s in samples]
        noise = noise if per_question > 1 else None
        groups = run.sampler.generate(prompts, noise, max_tokens, repetition_penalty=penalty)
        for s, c in ((s, c) for s, group in zip(samples, groups) for c in group):
            text = qwen_vl.decode(run.tokenizer, run.special, c.tokens)
            rows += [dict(id=s.id, task=s.task, question=s.question, completion=text,
                          answer=s.answer, image_size=s.image_size, truncated=c.truncated)]
        print(f"rank {ranks.rank}: {first + len(samples)}/{len(own)} samples", file=sys.stderr)
    return [row for part in ranks.gather(rows) for row in part]


PACKAGES = {"detection": ("pycocotools", "pycocotools"), "ocr": ("rapidfuzz", "rapidfuzz"),
            "math": ("math_verify", "math-verify")}  # module, name to install


def check_packages(task: str) -> None:
    """Errors: ImportError naming the package that scoring needs, before anything is answered."""
    if task in PACKAGES:
        library(*PACKAGES[task])


def check_model(name: str) -> None:
    """Errors: ValueError, at once and not after a library's retries, if there is no such model."""
    if name in TINY:
        return
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ValueError(f"--model {name} has no config.json: of a run, give RUN/model")
        return
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"--model {name}: no such folder, and no name OWNER/MODEL of the hub")
    import huggingface_hub
    found = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    advice = "give the folder of a model, or set HF_HOME to where the hub's files are kept"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        if not found:
            raise ValueError(f"--model {name} is not on this machine (HF_HUB_OFFLINE): {advice}")
        return
    token = huggingface_hub.get_token()
    head = {"Authorization": f"Bearer {token}"} if token else {}
    hub = huggingface_hub.constants.ENDPOINT
    try:
        call = urllib.request.Request(f"{hub}/api/models/{name}", headers=head)
        urllib.request.urlopen(call, timeout=10).close()
    except urllib.error.HTTPError as error:
        raise ValueError(f"--model {name}: {hub} says {error.code} {error.reason}: is the name "
                         "right, and does HF_TOKEN give access?") from None
    except OSError as error:
        if found:
            advice = "set HF_HUB_OFFLINE=1: it is on this machine"
        raise ValueError(f"--model {name}: {hub} can not be reached ({error}); {advice}") from None


@dataclass(frozen=True)
class Blinded:
    """Samples whose images are grey: what is scored without eyes, on the same questions."""
    samples: datasets.Mixture

    def __len__(self):
        return len(self.samples)

    def at(self, index: int) -> datasets.Sample:
        sample = self.samples.at(index)
        grey = tuple(pictures.grey(image) for image in sample.images)
        return replace(sample, images=grey)


def check_data(config, task: str) -> None:
    """Errors: DataError, without a model, if the data can not be read or is of another task."""
    import training
    mixture = datasets.open_data(config.data, split="heldout", **training.data_options(config))
    for source in mixture.sources:
        if isinstance(source, datasets.DrawnSource):
            with datasets.blame(source.world):
                check_task(source.world.task, task)
            continue
        for where, sample, _ in source.samples:
            with datasets.blame(where):
                check_task(sample.task, task)


def run(model: str, task: Task, data: Data, out: Out, samples: Samples = 0, think: bool = False,
        samples_per_question: Tries = 0, max_tokens: MaxTokens = 0, annotations: Annotations = "",
        system_prompt: System = None, blind: Blind = False):
    """Answers a benchmark by the papers' protocol and scores it: predictions and metrics."""
    import fsdp
    import grpo_vl
    import training
    protocol = PROTOCOLS[task]
    samples_per_question = samples_per_question or protocol.samples
    max_tokens = max_tokens or protocol.max_tokens
    penalty = protocol.penalty
    config = grpo_vl.Config(model=model, data=[*data], think=think, max_pixels=16384 * 28 * 28)
    if system_prompt is not None:
        config = replace(config, system_prompt=system_prompt)
    check_packages(task)
    check_data(config, task)
    check_model(model)
    processes = fsdp.start_processes(config.timeout)
    run = training.prepare(config, processes, model)
    if blind:
        run.eval_data = Blinded(run.eval_data)
    rows = answer_all(run, samples_per_question, max_tokens, samples, penalty)
    if processes.rank == 0:
        file = Path(out) / "predictions.jsonl"
        write_rows(file, rows)
        metrics(task, file, annotations)
    fsdp.leave()


def write_rows(file: Path, rows) -> None:
    """JSONL; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    file.write_text("".join(lines))


def curriculum(model: str, data: Data, out: Out, low: float = 0.1, high: float = 0.9,
               samples: Samples = 0, samples_per_question: Tries = 8, max_tokens: MaxTokens = 768):
    """[PR1 §4.3] Keeps what is right (rewards.correct) in `low` to `high` of the tries, easy first:
    the images, resized, and curriculum.jsonl, to train with --data curriculum.jsonl?in_order=1."""
    import fsdp
    import grpo_vl
    import training
    config = grpo_vl.Config(model=model, data=data)
    check_model(model)
    processes = fsdp.start_processes(config.timeout)
    run = training.prepare(config, processes, model)
    run.eval_data = run.data
    answers = answer_all(run, samples_per_question, max_tokens, samples)
    if processes.rank == 0:
        rates = pass_rates(answers)
        drawn = [run.data.at(index) for index in range(len(rates))]
        kept = [sample for sample in drawn if low <= rates[sample.id] <= high]
        file = Path(out) / "curriculum.jsonl"
        write_rows(file, curriculum_rows(kept, rates, file.parent))
        print(f"kept {len(kept)} of {len(rates)} samples in {file}")
    fsdp.leave()


def pass_rates(answers: list[dict]) -> dict[str, float]:
    """Of each sample by id: the mean of rewards.correct over its answers."""
    tries = {}
    for row in answers:
        right = rewards.correct(row["task"], row["completion"], row["answer"], row["image_size"])
        tries.setdefault(row["id"], []).append(right)
    return {name: fmean(right) for name, right in tries.items()}


def curriculum_rows(samples, rates: dict, folder: Path) -> list[dict]:
    """The samples as rows of a data file, easy to hard; their images are written to images/."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, sample in enumerate(samples):
        names = []
        for i, image in enumerate(sample.images):
            names.append(f"images/{number}-{i}.png")
            image.save(folder / names[-1])
        rate = rates[sample.id]
        row = dict(id=sample.id, task=sample.task, question=sample.question, images=names)
        rows.append(row | {"answer": sample.answer, "pass_rate": rate})
    return sorted(rows, key=lambda row: -row["pass_rate"])


def demo(cold_start: Path, grpo: Path, /, out: Out = "", data: Data = (), samples: Samples = 400):
    """Before and after GRPO on held-out samples: table, answers.jsonl, curve.png, rollouts.png."""
    library("matplotlib", "matplotlib")
    import fsdp
    import grpo_vl
    import training
    models = {"before": cold_start / "model", "after": grpo / "model"}
    for model in models.values():
        if not model.is_dir():
            raise ValueError(f"there is no {model}: finish the run {model.parent} first")
    saved = json.loads((grpo / "config.json").read_text())
    heldout = [*data] or saved["eval_data"] or saved["data"]
    config = grpo_vl.Config(**saved | {"eval_samples": samples or 10**9, "eval_data": heldout})
    processes = fsdp.start_processes(config.timeout)
    rows, table = {}, {}
    for name, model in models.items():
        run = training.prepare(config, processes, str(model))
        run.sampler.refresh(run.policy)
        rows[name], accuracy = training.evaluate(run, config.max_tokens)
        table[name] = {mode.removeprefix("eval/"): value for mode, value in accuracy.items()}
    table["samples"] = len(rows["after"]) // 2  # each greedy and sampled
    table["data"] = heldout
    if processes.rank == 0:
        scenes = [run.eval_data.at(index) for index in range(min(12, table["samples"]))]
        write_demo(Path(out or grpo / "eval"), grpo, table, rows, scenes)
    fsdp.leave()


def write_demo(folder: Path, grpo: Path, table: dict, rows: dict, scenes: list) -> None:
    """table.json, answers.jsonl, curve.png and rollouts.png; the table is printed too."""
    answers = []
    for name, own in rows.items():
        answers += [row | {"model": name} for row in own]
    write_rows(folder / "answers.jsonl", answers)
    (folder / "table.json").write_text(json.dumps(table, indent=1))
    start = {f"eval/{mode}": value for mode, value in table["before"].items()}
    panels = plots.curves([grpo], start, ["reward", "held-out accuracy"])
    plots.draw_panels(panels, folder / "curve.png", "GRPO step")
    plots.before_after(scenes, rows).save(folder / "rollouts.png")
    print(plots.demo_table(table))
    print(f"in {folder}: curve.png, rollouts.png, answers.jsonl")


# ---- §5 behaviours [OVR §4] ----------------------------------------------------------------------
IMAGE = r"\b(?:image|picture|figure|diagram|graph|chart|photo|drawing|table|scene)s?\b"
PLACE = r"\b(?:left|right|top|bottom|upper|lower|corner|cent(?:er|re)|middle|region|row|column)"
GOAL = r"\bto (?:get|reach|obtain|find|make|have|answer)\b.{0,80}\b(?:need|must|require)"
# A visual behaviour, then its linguistic counterpart: an example, from [OVR T1, Fig. 7] but for
# verification, and our lexicon: a sentence that holds the regular expression is one instance.
BEHAVIOURS = {
    "visual reflection": ("Let me see the image again.", rf"(?=.*{IMAGE}).*\b(?:(?:look|see|check)"
        r".*\b(?:again|back|once more)|re-?(?:exam|check|vis)|(?:wait|hmm|hold on)\b)"),
    "backtracking": ("That calculation led to a dead end. Let's try subtracting Y from X instead. "
        "My previous assumption about the sequence was wrong. Starting over with...",
        r"dead end|start(?:ing)? over|(?:won't|didn't) work|made an? (?:mistake|error)|\bwait, no"
        r"|\b(?:was|is|are) (?:wrong|incorrect|not right)|\b(?:try|use) (?:another|a different) "),
    "visual divide-and-conquer": ("Let's first look at the numbers on the left.",
        rf"\b(?:first|next|then|now|let's|let me)\b.*\b(?:look|focus|count|read|exam)\w*.*{PLACE}"),
    "subgoal setting": ("First, we need to...",
        r"\b(?:first|next|then|finally),? (?:i|we|let's|let me)\b|\bstep \d|\bbreak \w+ down"),
    "visual verification": ("I will now verify this against the image.",
        rf"(?:verif|confirm|double-?check|cross-?check|consistent with|matches).*{IMAGE}"),
    "verification": ("Let me check this result by another calculation.",
        r"\bverif|\bconfirm|double-?check|checks out|\bcheck (?:this|that|if|whether|my|the|it)\b"),
    "goal-driven visual tracing": ("To get this answer, I need to find an object that...",
        rf"{GOAL}.*(?:find|look for|locate|spot|see).*(?:{IMAGE}|object|shape|region|colou?r)"),
    "backward chaining": ("To get 75, we need a number divisible by...",
        rf"{GOAL}|work(?:ing)? backwards?\b|\bfor (?:this|that|it) to (?:be|hold)")}
TRANSFER = dict(zip([*BEHAVIOURS][::2], [*BEHAVIOURS][1::2]))  # visual: linguistic


def lexicon_count(name: str, row: dict) -> int:
    """Sentences that show the behaviour, by the lexicon; 500 characters of each are read."""
    pattern = re.compile(BEHAVIOURS[name][1])
    text = row["completion"].lower().replace("’", "'")
    count = 0
    for sentence in re.split(r"(?<=[.!?])\s|\n", text):
        if pattern.search(sentence[:500]):
            count += 1
    return count


def judge_count(name: str, row: dict, url: str, model: str) -> int | None:
    """What a judge counts, asked in the order of [OVR App. C]; None where it gives no <count>."""
    question = row.get("question", "")
    request = (f'Problem Statement: "{question}"\n\nModel\'s Reasoning: "'
               f'{row["completion"]}"\n\nLook in the text of this reasoning for {name}, as in "'
               f'{BEHAVIOURS[name][0]}" Count the distinct instances. '
               "Provide the count in <count>X</count> tags. If none, use <count>0</count>.")
    message = {"role": "user", "content": request}
    body = json.dumps({"model": model, "temperature": 0, "messages": [message]})
    key = os.environ.get("JUDGE_API_KEY", "")
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with datasets.blame(f"--judge {url}: no answer to a chat completion"):
        call = urllib.request.Request(f"{url}/chat/completions", body.encode(), head)
        with urllib.request.urlopen(call, timeout=120) as reply:
            content = json.load(reply)["choices"][0]["message"]["content"]
        found = re.findall(r"<count>\s*(\d{1,6})\s*</count>", content)
    return int(found[-1]) if found else None


def rates_of(rows: list[dict], count) -> dict:
    """The share of answers that show each behaviour, and what moved from text to vision.

    count(behaviour, row): its instances in the answer, None if the judge was vague.
    """
    rates = {}
    unjudged = 0
    for name in BEHAVIOURS:
        with ThreadPoolExecutor(8) as pool:  # a judge takes its time
            counts = [*pool.map(partial(count, name), rows)]
        shown = [n > 0 for n in counts if n is not None]
        rates[name] = fmean(shown) if shown else 0.0
        unjudged += counts.count(None)
    # [OVR §4] BTR = CBR_visual / CBR_linguistic; undefined where nothing could be carried over
    transfer = {}
    for visual, linguistic in TRANSFER.items():
        base = rates[linguistic]
        transfer[visual] = rates[visual] / base if base else None
    return dict(answers=len(rows), unjudged=unjudged, rates=rates, transfer=transfer)


def behaviours(predictions: list[Path], judge: str = "", judge_model: str = "", plot: str = ""):
    """Cognitive behaviours, a file a checkpoint, by the lexicon or a judge: an OpenAI-compatible
    http://host/v1, its model (GPT-4o in [OVR App. C]), its key in JUDGE_API_KEY; plot: a PNG."""
    if bool(judge) != bool(judge_model):
        raise ValueError("--judge URL and --judge-model NAME belong together")
    count = lexicon_count
    if judge:
        count = partial(judge_count, url=judge, model=judge_model)
    results = {str(file): rates_of(read_predictions(file), count) for file in predictions}
    print(json.dumps({"judge": judge_model or "lexicon", "files": results}))
    if plot:
        path = plots.picture_path(plot, Path("behaviours.png"))
        plots.draw_panels(behaviour_panels(results), path, "")
        print(f"behaviours of {len(results)} files in {path}", file=sys.stderr)


def behaviour_panels(results: dict) -> dict:
    """Rates over files, visual and linguistic ones apart, each ± one standard error."""
    names = [Path(file).stem for file in results]
    panels = {}
    for behaviour in BEHAVIOURS:
        rates = [result["rates"][behaviour] for result in results.values()]
        errors = []
        for rate, result in zip(rates, results.values()):
            errors.append(plots.standard_error(rate, result["answers"]))
        kind = "visual" if behaviour in TRANSFER else "linguistic"
        line = plots.Line("", behaviour, names, rates, errors)
        panels.setdefault(f"{kind} (share of answers)", []).append(line)
    return panels


# ---- §6 curves and pictures, the mean of checkpoints, the command line ---------------------------
def plot(runs: list[Path], /, out: Out = "", seeds: Seeds = False) -> None:
    """Training curves of one run, or of several in the same panels: curves.png."""
    if seeds:
        panels = {}
        for arm, own in plots.arms(runs).items():
            for title, lines in plots.mean_curves(arm, own).items():
                panels.setdefault(title, []).extend(lines)
    else:
        panels = plots.curves(runs)
    path = plots.picture_path(out, runs[-1] / "curves.png")
    plots.draw_panels(panels, path, "step")
    print(f"{len(panels)} panels of {len(runs)} runs in {path}")


def show(run: Path, /, out: Out = "", steps: Steps = 8, groups: int = 1) -> None:
    """Samples of a run: of each step shown, the first `groups` prompts with all completions, best
    to worst, with step, reward and IoU: samples.png."""
    page = plots.rollouts(run, steps, groups)
    path = plots.picture_path(out, run / "samples.png")
    page.save(path)
    print(f"samples of {run}, {page.width} x {page.height} pixels, in {path}")


def average(models: list[Path], /, out: Out) -> None:
    """The uniform mean of Hugging Face checkpoints of one run, added in fp32 [OVR §4.1].

    `out` holds the first one's other files. It appears by one rename: whole or not at all.
    """
    library("safetensors", "safetensors")
    if len(models) < 2:
        raise ValueError("give two checkpoints or more to average")
    found = [find_tensors(model) for model in models]
    for model, tensors in zip(models[1:], found[1:]):
        check_same(models[0], found[0], model, tensors)
    final = Path(out)
    if not out or final.exists():
        raise ValueError(f"--out {out} must be a new folder")
    partial_folder = final.with_name(final.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    shutil.copytree(models[0], partial_folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted({file for file, _ in found[0].values()}):
        own = [name for name in found[0] if found[0][name][0] == file]
        write_mean(partial_folder / file.name, own, found)
    partial_folder.rename(final)
    print(f"the mean of {len(models)} checkpoints is in {final}")


def find_tensors(model: Path) -> dict[str, tuple[Path, list[int]]]:
    """{name: (file, shape)} of a checkpoint in one file or several."""
    from safetensors import SafetensorError, safe_open
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with datasets.blame(file, SafetensorError), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensors[name] = file, opened.get_slice(name).get_shape()
    if not tensors:
        raise ValueError(f"{model} holds no safetensors")
    return tensors


def check_same(first: Path, here: dict, other: Path, there: dict) -> None:
    """Errors: ValueError naming the tensors that only one has, or that have two shapes."""
    lone = sorted(here.keys() ^ there.keys())
    if lone:
        owner = first if lone[0] in here else other
        raise ValueError(f"{first} and {other} do not have the same tensors, as {lone[0]} is in "
                         f"{owner} alone ({len(lone)} such names): average exports of one run")
    for name, (_, shape) in here.items():
        if shape != there[name][1]:
            raise ValueError(f"{name} is {shape} in {first} and {there[name][1]} in {other}: "
                             "average checkpoints of one run")


def write_mean(path: Path, names: list[str], found: list[dict]) -> None:
    """A file of the mean tensors, which other users may read as any file (umask)."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    mean = {}
    for name in names:
        total = 0
        for tensors in found:
            with safe_open(tensors[name][0], "pt") as opened:
                tensor = opened.get_tensor(name)
            total = total + tensor.float()
        mean[name] = (total / len(found)).to(tensor.dtype)
    save_file(mean, path, metadata={"format": "pt"})
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def main(arguments: list[str] | None = None) -> None:
    commands = (demo, run, metrics, behaviours, plot, show, curriculum, average)
    named = {command.__name__: command for command in commands}
    try:
        tyro.extras.subcommand_cli_from_dict(named, args=arguments, description=__doc__)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"eval.py: {error}") from None


if __name__ == "__main__":
    main()
