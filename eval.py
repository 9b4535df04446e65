r"""Scores models, saved answers and runs: benchmarks, behaviours, curves, pictures.

  python eval.py demo runs/coldstart runs/grpo            before / after on held-out samples
  python eval.py run --model DIR --task grounding --data refcoco-vlmr1:refcoco_val.json --out DIR
  python eval.py run --model DIR --task math --data math500:test.jsonl --samples-per-question 16
  python eval.py metrics --task detection --predictions FILE.jsonl --annotations instances.json
  python eval.py behaviours --predictions step-0.jsonl step-500.jsonl --plot behaviours.png
  python eval.py plot runs/grpo                           training curves, of one run or several
  python eval.py show runs/grpo                           the run's saved samples on one sheet
  python eval.py average CHECKPOINT CHECKPOINT --out DIR  [OVR §4.1] ends with such a mean

`run` follows the papers' protocol, also under torchrun, and prints the paper's own row beside. A
row of predictions is {"id" or "image_id", "completion", "answer", "image_size": [W, H]}, with
"truncated" if it was cut; answer and completion lie in the frame of image_size. Metrics are parts
of 1, in one JSON object on stdout.

[PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, 2507.05255 · [ORZ] its base,
Open-Reasoner-Zero, 2503.24290. Where this departs from [PR1 code]:
  -  IoU has no 1e-10 in its denominator: an exact 0.5 of a small union is a hit at 0.5.
  -  A malformed detection loses itself and not the rest of its list; the last image counts too.
  -  A page without words has precision, recall and F1 of 0, or of 1 if nothing was said either.
     Words end at white space (there jieba cuts Chinese ones). BLEU and METEOR are left out.
  -  No repetition penalty (there 1.05 in grounding): the sampler has none.
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import data as datasets
import rewards


# ---- §1 saved predictions ------------------------------------------------------------------------
def read_predictions(path, needs=("completion", "answer")) -> list[dict]:
    """The rows of a file, each with "where" it stands and, if it has one, its "id" as text."""
    rows = []
    for where, raw in datasets.read_rows(Path(path)):
        with blame(where):
            row = json.loads(raw) if isinstance(raw, bytes) else raw
            if not isinstance(row, dict) or not set(needs) <= row.keys():
                raise ValueError(f"a row must be a JSON object with {' and '.join(needs)}")
            if not isinstance(row["completion"], str):
                raise ValueError(f"completion must be text, not {row['completion']!r:.60}")
            if "answer" in needs and not {"id", "image_id"} & row.keys():
                raise ValueError('a row needs "id" or "image_id"')
            rows.append(row | {"where": where, "id": str(row.get("id", row.get("image_id")))})
    if not rows:
        raise ValueError(f"{path}: there are no rows in this file")
    return rows


@contextlib.contextmanager
def blame(where: str):
    """Whatever goes wrong within becomes one sentence that begins with the place of a bad row."""
    try:
        yield
    except (AttributeError, *datasets.FAULTS) as error:
        raise ValueError(f"{where}: {error}") from error


def write_rows(path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- §2 metrics: what a row is worth, then the mean ----------------------------------------------
def grounding(row) -> dict:
    """[PR1 §4.3] acc@t: the first box has IoU ≥ t; centre_acc: its centre is in the true box."""
    text, answer, size = row["completion"], row["answer"], row.get("image_size")
    iou = rewards.score("grounding", text, answer, size).parts["iou"]
    values = {f"acc@{t}": float(iou >= t) for t in (0.5, 0.75, 0.95)}
    values["acc_mean"] = sum(values.values()) / 3  # the paper's "Avg"
    left, top, right, low = json.loads(answer) if isinstance(answer, str) else answer
    boxes = [b for b in rewards.parse_boxes(text, size) if b[0] <= b[2] and b[1] <= b[3]]
    inside = [left <= (x1 + x2) / 2 <= right and top <= (y1 + y2) / 2 <= low
              for x1, y1, x2, y2 in boxes[:1]]
    return values | {"centre_acc": float(any(inside)), "mean_iou": iou}


def counting(row) -> dict:
    """[PR1 §4.3] The exact number of boxes, of points, or the number said; cut answers count."""
    inputs = row["completion"], row["answer"], row.get("image_size")
    return {"accuracy": rewards.correct("counting", *inputs)}


def ocr(row) -> dict:
    """[PR1 §4.3] Levenshtein over the longer length, by character; the sets of words compared."""
    from rapidfuzz.distance import Levenshtein

    if not isinstance(row["answer"], str):
        raise ValueError(f"the answer in ocr must be text, not {row['answer']!r:.60}")
    said, true = rewards.split_thinking(row["completion"])[0], row["answer"].strip()
    words, true_words = set(said.split()), set(true.split())
    hits, silent = len(words & true_words), float(not words and not true_words)
    return {
        "edit_distance": Levenshtein.normalized_distance(said, true),
        "f1": 2 * hits / (len(words) + len(true_words)) if hits else silent,
        "precision": hits / len(words) if words else silent,
        "recall": hits / len(true_words) if true_words else silent,
    }


def over_samples(rows, task: str) -> dict:
    """[ORZ] Accuracy averaged over the k samples of a question, then over questions; pass@1 … k.

    An answer that was cut is wrong. A row may name its own task: benchmarks mix math and choice.
    """
    tries, cut = {}, 0
    for row in rows:
        with blame(row["where"]):
            kind = row["task"] if row.get("task") in ("math", "choice") else task
            inputs, truncated = (row["completion"], row["answer"]), bool(row.get("truncated"))
            right = rewards.score(kind, *inputs, truncated=truncated).parts["correct"]
            tries.setdefault(row["id"], []).append(int(right))
            cut += truncated
    questions, least = len(tries), min(map(len, tries.values()))
    result = {"accuracy": sum(sum(right) / len(right) for right in tries.values()) / questions}
    for k in sorted({2**power for power in range(least.bit_length())} | {least}):
        rates = [pass_at_k(len(right), sum(right), k) for right in tries.values()]
        result[f"pass@{k}"] = sum(rates) / questions
    return result | {"questions": questions, "truncated": cut}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that k of the samples hold a right one, unbiased. [arXiv 2107.03374 Eq. 1]"""
    # pass@k = 1 − C(n − c, k) / C(n, k)
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def average_precision(rows, annotations: str = "") -> dict:
    """[PR1 §4.3] AP, AP50, AP75 by pycocotools: all scores 1.0, so equals keep the order said.

    annotations: COCO instances; predictions are scaled back to their frame, images without one are
    missed. Otherwise the rows' answers are the truth. None where there is nothing to find.
    """
    truth = json.loads(Path(annotations).read_bytes()) if annotations else truth_of_rows(rows)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise ValueError(f"{annotations}: images, annotations and categories are expected")
    numbers = {category["name"]: category["id"] for category in truth["categories"]}
    images, said = {str(image["id"]): image for image in truth["images"]}, []
    for row in rows:
        with blame(row["where"]):
            key, seen = str(row.get("image_id", row["id"])), row.get("image_size")
            if key not in images:
                raise ValueError(f"image {key!r} is not there, or it was answered before")
            image = images.pop(key)
            stored = (image["width"], image["height"]) if annotations else seen
            items = rewards._json(rewards.split_thinking(row["completion"])[0])
            for thing in map(rewards._object, items if isinstance(items, list) else []):
                if thing and thing[1] in numbers:  # a malformed one is None
                    box = datasets.scale(thing[0], seen, stored) if seen else thing[0]
                    said.append(coco_item(image["id"], numbers[thing[1]], box))
    return coco_metrics(truth, said) | {"images_without_prediction": len(images)}


def truth_of_rows(rows) -> dict:
    """COCO instances of the rows' own answers, in the frame that the model saw."""
    images, items, numbers = [], [], {}
    for row in rows:
        with blame(row["where"]):
            images.append({"id": str(row.get("image_id", row["id"]))})
            for thing in datasets.read_answer("detection", row["answer"]):
                number = numbers.setdefault(thing["label"], len(numbers) + 1)
                items.append(coco_item(images[-1]["id"], number, thing["bbox_2d"]))
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": items, "categories": categories}


def coco_item(image, category, box) -> dict:
    width, height = box[2] - box[0], box[3] - box[1]
    return {"image_id": image, "category_id": category, "bbox": [box[0], box[1], width, height],
            "area": width * height, "iscrowd": 0, "score": 1.0}


def coco_metrics(truth, said) -> dict:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    true, found = COCO(), COCO()
    true.dataset, found.dataset = truth, truth | {"annotations": said}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        for index in (true, found):
            for number, item in enumerate(index.dataset["annotations"], 1):
                item["id"] = number  # pycocotools takes an id of 0 for "no match"
            index.createIndex()
        result = COCOeval(true, found, "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    values = [float(value) if value >= 0 else None for value in result.stats[:3]]
    return dict(zip(("AP", "AP50", "AP75"), values))


def score_predictions(task: str, rows: list[dict], annotations: str = "") -> dict:
    """The task's metrics; ValueError says where a bad row stands."""
    head, simple = {"task": task, "samples": len(rows)}, [grounding, counting, ocr]
    if task == "detection":
        return head | average_precision(rows, annotations)
    if task in ("math", "choice"):
        return head | over_samples(rows, task)
    metric, values = next(m for m in simple if m.__name__ == task), []
    for row in rows:
        with blame(row["where"]):
            values.append(metric(row))
    return head | {name: sum(v[name] for v in values) / len(values) for name in values[0]}


# The papers' rows in percent: a task's models (the start, the result) and metrics; a benchmark.
PAPER = """
grounding / Qwen2-VL-2B / Perception-R1 2B / acc@0.5 acc@0.75 acc@0.95 acc_mean
RefCOCO val / 86.8 77.2 33.0 65.7 / 89.1 79.5 35.0 67.9
RefCOCO testA / 89.6 80.6 35.7 68.6 / 91.4 83.6 38.5 71.2
RefCOCO testB / 82.0 70.1 26.9 59.7 / 84.5 72.4 28.8 61.9
RefCOCO+ val / 77.1 68.7 29.4 58.4 / 81.7 73.6 32.6 62.6
RefCOCO+ testA / 82.5 73.8 32.3 62.9 / 86.8 79.3 36.9 67.7
RefCOCO+ testB / 70.1 60.0 23.0 51.0 / 74.3 64.2 26.7 55.1
RefCOCOg val / 83.3 72.7 28.9 61.6 / 85.7 75.7 32.1 64.5
RefCOCOg test / 83.1 73.0 27.9 61.3 / 85.4 76.0 33.1 64.8

counting / Qwen2-VL-2B / Perception-R1 2B / accuracy
PixMo-Count val / 60.2 / 78.1
PixMo-Count test / 50.5 / 75.6

ocr / Qwen2-VL-2B / Perception-R1 2B / edit_distance f1 precision recall
PageOCR en / 8.0 94.4 96.9 93.0 / 2.8 98.2 98.6 97.8

detection / Qwen2.5-VL-3B / Perception-R1 3B / AP AP50 AP75
COCO val2017 / 16.1 23.7 16.7 / 31.9 46.7 33.4

math / Qwen2.5-VL-7B / OVR-7B / accuracy
AIME24 / 6.7 / 63.5
AIME25 / 6.7 / 52.1
MATH500 / 67.4 / 95.3
MathVision / 25.5 / 51.8
MathVerse vision-only / 41.1 / 54.6
"""  # [PR1 T1, T3a, T2, T3b] [OVR T2, T3]


def beside_paper(task: str, metrics: dict, benchmark: str = "") -> str:
    """A table in percent: these metrics, then the paper's rows of the benchmarks so named."""
    blocks = (block.splitlines() for block in PAPER.strip().split("\n\n"))
    (head, *rows), = (b for b in blocks if b[0].split()[0] == ("math" if task == "choice" else task))
    *models, columns = head.split(" / ")[1:]
    measured = [metrics[name] for name in columns.split()]
    lines = [("", "percent", columns.split())]
    lines += [("measured", "", ["-" if v is None else f"{100 * v:.1f}" for v in measured])]
    for name, *both in (row.split(" / ") for row in rows):
        if benchmark.lower() in name.lower():
            lines += [(name, model, values.split()) for model, values in zip(models, both)]
    return "\n".join(f"{name:<22}{model:<18}" + "".join(f"{value:>14}" for value in row)
                     for name, model, row in lines)


# ---- §3 running a model --------------------------------------------------------------------------
# Longest answer in tokens and samples a question. One sample is greedy [PR1 code], several have
# T = 1 [ORZ]; OVR states neither, its last stage stops at 48k tokens.
PROTOCOL = {"grounding": (512, 1), "counting": (512, 1), "detection": (4096, 1), "ocr": (2048, 1),
            "math": (49152, 16), "choice": (49152, 16)}
EVAL_PROMPTS = {  # [PR1 code] where they differ from the prompts of training; <image> is literal
    "detection": "Locate every item from the category list in the image and output the coordinates "
                 "in JSON format. The category set includes {}.",
    "ocr": "<image>\nOCR this image: ",
}


def answer_all(run, samples_per_question: int, max_tokens: int, limit: int) -> list[dict]:
    """A row for each answer to the first `limit` samples (0: all), in their order, on each rank."""
    import qwen_vl
    from sampler import keyed_uniforms

    ranks, rows, shape = run.processes, [], (samples_per_question, max_tokens)
    own = range(ranks.rank, min(limit or math.inf, len(run.eval_data)), ranks.world)
    for first in range(0, len(own), 32):  # not all at once: a large image is 300 MB of patches
        samples, prompts = [run.eval_data.at(place) for place in own[first : first + 32]], []
        for s in samples:
            text = rewards.prompt(s.task, s.question, think=run.config.think)
            if s.task in EVAL_PROMPTS:
                names = s.question or rewards.QUESTIONS[s.task]
                text = EVAL_PROMPTS[s.task].format(names) + rewards.THINK * run.config.think
            system = s.system or run.config.system_prompt
            prompts += [qwen_vl.encode_chat(run.tokenizer, run.special, text, s.images, system)]
        noise = [keyed_uniforms(0, 0, f"eval {s.id}", *shape) for s in samples]
        groups = run.sampler.generate(prompts, noise if shape[0] > 1 else None, max_tokens)
        for place, s, group in zip(own[first : first + 32], samples, groups):
            texts = [qwen_vl.decode(run.tokenizer, run.special, c.tokens) for c in group]
            rows += [(place, dict(id=s.id, task=s.task, question=s.question, completion=text,
                                  answer=s.answer, image_size=s.image_size, truncated=c.truncated))
                     for text, c in zip(texts, group)]
        print(f"rank {ranks.rank}: {first + len(samples)}/{len(own)} samples", file=sys.stderr)
    everyone = [pair for part in ranks.gather(rows) for pair in part]
    return [row for _, row in sorted(everyone, key=lambda pair: pair[0])]


def run_model(given) -> None:
    """`run`: predictions.jsonl and metrics.json in --out, the metrics on stdout."""
    import grpo_vl

    tokens, samples = PROTOCOL[given.task]
    tokens, samples = given.max_tokens or tokens, given.samples_per_question or samples
    names = ("model", "data", "think", "max_pixels")
    config = grpo_vl.Config(**{name: getattr(given, name) for name in names}, checkpointing=False)
    processes, folder = grpo_vl.start_processes(config.timeout), Path(given.out)
    run = grpo_vl.prepare(config, processes, given.model)
    run.sampler.refresh(run.policy)
    rows = answer_all(run, samples, tokens, given.samples)
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "predictions.jsonl", rows)
        rows = [row | {"where": f"sample {row['id']}"} for row in rows]
        result = score_predictions(given.task, rows, given.annotations)
        (folder / "metrics.json").write_text(json.dumps(result, indent=1))
        print(beside_paper(given.task, result, given.benchmark), file=sys.stderr)
        print(json.dumps(result))
    grpo_vl.dist.destroy_process_group()


def demo(given) -> None:
    """`demo`: table.json, answers.jsonl, curve.png and rollouts.png; the table on stdout."""
    import grpo_vl

    places = {"before": Path(given.cold_start_run), "after": Path(given.grpo_run)}
    for place in places.values():
        if not (place / "model").is_dir():
            raise ValueError(f"there is no {place / 'model'}: finish the run {place} first")
    config = grpo_vl.Config(**json.loads((places["after"] / "config.json").read_text()))
    heldout = given.data or config.eval_data or config.data
    config = replace(config, eval_samples=given.samples, eval_data=heldout)
    processes, rows, table = grpo_vl.start_processes(config.timeout), {}, {"data": heldout}
    for name, place in places.items():
        run = grpo_vl.prepare(config, processes, str(place / "model"))
        run.sampler.refresh(run.policy)
        rows[name], accuracy = grpo_vl.evaluate(run, config.max_tokens)
        table[name] = {mode.removeprefix("eval/"): value for mode, value in accuracy.items()}
    table["samples"] = len(rows["after"]) // 2  # greedy and sampled
    if processes.rank == 0:
        folder = Path(given.out or places["after"] / "eval")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.json").write_text(json.dumps(table, indent=1))
        write_rows(folder / "answers.jsonl", [dict(r, model=n) for n in rows for r in rows[n]])
        plot_curve(places["after"], table, folder / "curve.png")
        scenes = [run.eval_data.at(i) for i in range(min(12, table["samples"]))]
        before_after(scenes, rows).save(folder / "rollouts.png")
        print(f"{demo_table(table)}\nin {folder}: curve.png, rollouts.png, answers.jsonl")
    grpo_vl.dist.destroy_process_group()


def demo_table(table: dict) -> str:
    """Accuracy of the answer alone, ± one standard error of a share."""
    lines = [f"held-out accuracy of the answer alone, {table['samples']} samples",
             f"{'':<9}{'cold start':>16}{'after GRPO':>16}{'gain':>14}{'factor':>9}"]
    for mode in ("greedy", "sampled"):
        before, after = pair = table["before"][mode], table["after"][mode]
        error = [math.sqrt(max(0, p * (1 - p)) / table["samples"]) for p in pair]
        cells = [f"{100 * p:.1f} ± {100 * e:.1f} %" for p, e in zip(pair, error)]
        factor, gain = f"×{after / before:.2f}" if before else "-", 100 * (after - before)
        lines.append(f"{mode:<9}{cells[0]:>16}{cells[1]:>16}{gain:>+7.1f} points{factor:>9}")
    return "\n".join(lines)


# ---- §4 behaviours [OVR §4] ----------------------------------------------------------------------
IMAGE = r"\b(?:image|picture|figure|diagram|graph|chart|photo|drawing|table|scene)s?\b"
PLACE = r"\b(?:left|right|top|bottom|upper|lower|corner|cent(?:er|re)|middle|region|row|column|each)"
GOAL = r"\bto (?:get|reach|obtain|find|make|have|answer)\b.{0,80}\b(?:need|must|require)"
# A visual behaviour, then its linguistic counterpart: what it is, in short; the paper's example
# [OVR T1]; our lexicon, a regular expression of which a sentence in lower case is one hit.
BEHAVIOURS = {
    "visual reflection": (
        "going back to the image after noticing a mistake", "Let me see the image again.",
        rf"(?:look|see|check).*{IMAGE}.*(?:again|once more|closely)|re-?(?:exam|check|vis).*{IMAGE}"
        rf"|(?:look|see|check)\w* (?:back|again) at.*{IMAGE}|\b(?:wait|hmm|hold on)\b.*{IMAGE}"),
    "backtracking": (
        "finding a path wrong and trying another one", "This approach won't work because...",
        r"dead end|start(?:ing)? over|(?:won't|doesn't|does not|didn't) work|made an? (?:mistake|err)"
        r"|\b(?:was|is|were|are) (?:wrong|incorrect|a mistake|not right)|\bwait, (?:no|that)"
        r"|\btry (?:again|another|a different)|another (?:approach|way)"),
    "visual divide-and-conquer": (
        "handling the image's parts in turn", "Let's first look at the numbers on the left.",
        rf"\b(?:first|next|then|now|let's|let me)\b.*\b(?:look|focus|count|read|exam\w*)\b.*{PLACE}"),
    "subgoal setting": (
        "naming an intermediate goal", "First, we need to...",
        r"\b(?:first|next|then|finally),? (?:i|we|let's|let me)\b|\bstep \d|\bbreak \w+ down"),
    "visual verification": (
        "confirming a conclusion by the image", "I will now verify this against the image.",
        rf"(?:verif|confirm|double-?check|cross-?check|consistent with|matches).*{IMAGE}"),
    "verification": (
        "checking an intermediate result", "Let me check this result.",
        r"\bverif|\bconfirm|double-?check|\bcheck (?:this|that|if|whether|my|the|our|it)\b"
        r"|checks out|plug\w* .{0,40}back|sanity check"),
    "goal-driven visual tracing": (
        "reasoning from a wanted visual conclusion back to evidence in the image",
        "To get this answer, I need to find an object that...",
        rf"{GOAL}.*(?:find|look for|locate|spot|see).*(?:{IMAGE}|object|shape|region|colou?r)"),
    "backward chaining": (
        "reasoning from the wanted result back", "To get 75, we need a number divisible by...",
        rf"{GOAL}|work(?:ing)? backwards?\b|\bfor (?:this|that|it) to (?:be|hold)"),
}
TRANSFER = dict(zip([*BEHAVIOURS][::2], [*BEHAVIOURS][1::2]))  # visual: linguistic


def lexicon_count(name: str, row: dict) -> int:
    """Sentences that show the behaviour, by the lexicon; 500 characters of each are read."""
    sentences = re.split(r"(?<=[.!?])\s|\n", row["completion"].lower().replace("’", "'"))
    return sum(re.search(BEHAVIOURS[name][2], sentence[:500]) is not None for sentence in sentences)


def judge_count(name: str, row: dict, url: str, model: str) -> int | None:
    """What a judge counts, asked in the order of [OVR App. C]; None where it gives no <count>."""
    meaning, example, _ = BEHAVIOURS[name]
    request = (
        f'Problem Statement: "{row.get("question", "")}"\n\nModel\'s Reasoning: "'
        f'{row["completion"]}"\n\nLook in this reasoning, by its text alone, for {name}: {meaning}. '
        f'For example: "{example}" Count the distinct instances. '
        "Provide the count in <count>X</count> tags. If none, use <count>0</count>."
    )
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": request}]}
    head = {"Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('JUDGE_API_KEY', '')}"}
    with blame(f"--judge {url}: no answer to a chat completion"):
        call = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(call, timeout=120) as reply:
            content = json.load(reply)["choices"][0]["message"]["content"]
        found = re.findall(r"<count>\s*(\d{1,6})\s*</count>", content)
    return int(found[-1]) if found else None


def behaviour_rates(rows: list[dict], count=lexicon_count) -> dict:
    """Emergence rates (shares of the answers that show a behaviour), and transfer rates.

    count: (behaviour, row) -> instances; None, from a judge that gave no count, is left out.
    """
    rates, unjudged = {}, 0
    for name in BEHAVIOURS:
        with ThreadPoolExecutor(8) as pool:  # a judge is waited for
            counts = list(pool.map(count, [name] * len(rows), rows))
        shown = [instances > 0 for instances in counts if instances is not None]
        unjudged += len(rows) - len(shown)
        rates[name] = sum(shown) / len(shown) if shown else 0.0
    # [OVR §4] BTR = CBR_visual / CBR_linguistic; undefined where nothing could be carried over
    transfer = {visual: rates[visual] / rates[linguistic] if rates[linguistic] else None
                for visual, linguistic in TRANSFER.items()}
    return {"answers": len(rows), "unjudged": unjudged, "rates": rates, "transfer": transfer}


def behaviours(
    predictions: list[str], judge: str = "", judge_model: str = "", plot: str = ""
) -> None:
    """Cognitive behaviours in saved answers, and how many moved from text to vision [OVR §4].

    Args:
        predictions: files of {"completion", "question"} rows, of checkpoints in their order
        judge: OpenAI-compatible URL, as http://host/v1, key in JUDGE_API_KEY; else the lexicon
        judge_model: name of the judging model [OVR App. C: GPT-4o]
        plot: PNG of the rates over the files
    """
    if bool(judge) != bool(judge_model):
        raise ValueError("--judge URL and --judge-model NAME belong together")
    count = functools.partial(judge_count, url=judge, model=judge_model) if judge else lexicon_count
    results = {path: behaviour_rates(read_predictions(path, ["completion"]), count)
               for path in predictions}
    print(json.dumps({"judge": judge_model or "lexicon", "files": results}))
    panels = {"visual behaviours (share)": ("rates", TRANSFER.keys()),
              "linguistic counterparts (share)": ("rates", TRANSFER.values()),
              "transfer rate (visual / linguistic)": ("transfer", TRANSFER.keys())}
    for title, (kind, names) in panels.items():
        ys = {name: [r[kind][name] for r in results.values()] for name in names}
        panels[title] = {name: ([Path(path).stem for path in results], ys[name]) for name in names}
    if plot:
        draw_panels(panels, plot, "file")


# ---- §5 curves -----------------------------------------------------------------------------------
PANELS = {  # title: names in metrics.jsonl, or what they begin with
    "reward": ["reward"], "parts of the reward": ["reward/"], "held-out accuracy": ["eval/"],
    "completion length (tokens)": ["length"], "entropy (nats a token)": ["entropy"],
    "KL to the reference (nats a token)": ["kl"], "clipped tokens (share)": ["clip_"],
    "equal rewards (share of groups)": ["zero_variance"], "loss": ["loss"],
    "truncated completions (share)": ["truncated"], "gradient norm": ["grad_norm"],
    "time split (seconds a step)": ["seconds/sample", "seconds/train", "seconds/refresh"],
}


def read_metrics(run) -> dict[str, tuple[list, list]]:
    """{metric: (completed steps, values)}. After a resume, the later line of a step counts."""
    steps, lines = {}, {}
    for where, raw in datasets.read_rows(Path(run) / "metrics.jsonl"):
        with blame(where), contextlib.suppress(json.JSONDecodeError):  # half a line: a killed run
            row = json.loads(raw)
            steps[row["step"]] = row
    for step, name, value in ((step, *item) for step in sorted(steps) for item in steps[step].items()):
        xs, ys = lines.setdefault(name, ([], []))
        xs.append(step + 1)
        ys.append(value)
    if not lines:
        raise ValueError(f"{run}/metrics.jsonl: no step has been logged yet")
    return lines


def draw_panels(panels: dict, path, xlabel: str) -> None:
    """PNG of {title: {label: (xs, ys)}}; a long line is drawn pale under its running mean."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    shape = math.ceil(len(panels) / 3), min(3, len(panels))
    figure, axes = pyplot.subplots(*shape, figsize=(4.6 * shape[1], 3.2 * shape[0]),
                                   squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for label, (xs, ys) in lines.items():
            width = len(ys) // 20 if len(ys) > 60 else 1
            means = [sum(ys[max(0, i - width) : i]) / min(i, width)
                     for i in range(1, len(ys) + 1)] if width > 1 else ys
            (line,) = axis.plot(xs, means, "-" if width > 1 else ".-", label=label)
            axis.plot(xs, ys, color=line.get_color(), lw=0.6, alpha=0.25)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(lines) > 1:
            axis.legend(fontsize=7, framealpha=0.6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot(runs: list[str], /, out: str = "") -> None:
    """Training curves of one run, or of several in the same panels.

    Args:
        runs: run folders
        out: PNG; curves.png in the first run if empty
    """
    panels: dict[str, dict] = {}
    for run in runs:
        for name, line in read_metrics(run).items():
            label = f"{Path(run).name} {name}" if len(runs) > 1 else name
            for title, starts in PANELS.items():
                if name in starts or name.startswith(tuple(s for s in starts if s[-1] in "/_")):
                    panels.setdefault(title, {})[label] = line
    ordered = {title: panels[title] for title in PANELS if title in panels}
    draw_panels(ordered, out or Path(runs[0]) / "curves.png", "step")


# ---- §6 sheets of pictures -----------------------------------------------------------------------
def sheet(pictures, heading: str, columns: int = 4, width: int = 260):
    """Pictures side by side, each `width` pixels wide, under a heading that explains the colours."""
    small = [p.resize((width, p.height * width // p.width), Image.Resampling.LANCZOS)
             for p in pictures]
    rows, gap, top = [small[i : i + columns] for i in range(0, len(small), columns)], 10, 44
    tall = top + sum(max(p.height for p in row) + gap for row in rows)
    page = Image.new("RGB", (columns * (width + gap) + gap, tall), (225, 225, 225))
    pen, font, x = ImageDraw.Draw(page), ImageFont.load_default(18), gap
    for text, colour in ((heading, "black"), ("predicted", "#c0008f"), ("true", "#0080a0")):
        pen.text((x, 12), text, colour, font)
        x += pen.textlength(text, font) + 24
    for row in rows:
        for column, picture in enumerate(row):
            page.paste(picture, (gap + column * (width + gap), top))
        top += max(p.height for p in row) + gap
    return page


def before_after(samples, rows):
    """The first held-out samples, none picked, each answered greedily before and after GRPO."""
    tiles = []
    for sample, name in ((sample, name) for sample in samples for name in rows):
        row = next(r for r in rows[name] if r["id"] == sample.id and r["mode"] == "greedy")
        text, size, true = row["completion"], sample.image_size, sample.answer
        said = rewards.parse_boxes(text, size) or rewards.parse_points(text, size)
        caption = f"{name}, {sample.question or sample.task}: {row['correct']:.2f}"
        if sample.task not in datasets.PLACED:
            said, true, caption = (), (), f"{caption} {text!r:.80}"
        image = sample.images[0] if sample.images else Image.new("RGB", (224, 28), "white")
        tiles.append(datasets.draw(image, predicted=said, true=true, caption=caption))
    return sheet(tiles, "held-out, greedy, before and after GRPO")


def show(run: str, /, out: str = "", samples: int = 24) -> None:
    """The newest pictures of a run's samples on one sheet, with boxes, points or text.

    Args:
        run: run folder
        out: PNG; samples.png in the run folder if empty
        samples: how many pictures
    """
    files = [*Path(run).glob("samples/step-*.png")]
    files.sort(key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)])
    tiles = [Image.open(file).convert("RGB") for file in files[-samples:]]
    if not tiles:
        raise ValueError(f"{run}/samples has no pictures: train with --pictures-every above 0")
    heading = f"{Path(run).name}, {files[-samples:][0].stem} to {files[-1].stem}"
    sheet(tiles, heading).save(out or Path(run) / "samples.png")


# ---- §7 the mean of checkpoints, and the command line --------------------------------------------
def average(models: list[str], /, out: str) -> None:
    """The uniform mean of Hugging Face checkpoints, added in fp32 [OVR §4.1].

    Tensors keep their type, files their layout: one shard of the first model is in memory at once.

    Args:
        models: folders with safetensors, all of one architecture
        out: folder to make
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = [[safe_open(f, "pt") for f in sorted(Path(m).glob("*.safetensors"))] for m in models]
    where = [{name: file for file in opened for name in file.keys()} for opened in files]
    for model, names in zip(models, where):
        if odd := sorted(names.keys() ^ where[0].keys()) or not names:
            raise ValueError(f"{model} is no checkpoint like {models[0]}: it differs in {odd!s:.80}")
    shutil.copytree(models[0], out, ignore=shutil.ignore_patterns("*.safetensors"))
    for shard, path in zip(files[0], sorted(Path(models[0]).glob("*.safetensors"))):
        mean = {}
        for name in shard.keys():  # noqa: SIM118 a safetensors file is no dictionary
            parts = [names[name].get_tensor(name) for names in where]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{name} has shapes {[tuple(part.shape) for part in parts]}")
            mean[name] = (sum(part.float() for part in parts) / len(parts)).to(parts[0].dtype)
        save_file(mean, Path(out) / path.name, metadata={"format": "pt"})


def main(arguments: list[str] | None = None) -> None:
    commands = {"demo": demo, "run": run_model, "metrics": metrics, "behaviours": behaviours,
                "plot": plot, "show": show, "average": average}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, description=__doc__)
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.py: {error}") from None


if __name__ == "__main__":
    main()
