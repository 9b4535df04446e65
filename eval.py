r"""Scores models, saved answers and runs: benchmarks, behaviours, curves, pictures.

  python eval.py demo runs/coldstart runs/grpo            before / after on held-out samples
  python eval.py run --model DIR --task grounding --data refcoco-vlmr1:refcoco_val.json --out DIR
  python eval.py metrics --task detection --predictions FILE.jsonl --annotations instances.json
  python eval.py behaviours --predictions step-0.jsonl step-500.jsonl --plot behaviours.png
  python eval.py plot RUN [RUN…]                          training curves
  python eval.py show RUN                                 the run's saved samples on one sheet
  python eval.py curriculum --model DIR --data SPEC --out DIR   easy to hard, by the pass rate
  python eval.py average CHECKPOINT CHECKPOINT --out DIR  [OVR §4.1] ends with such a mean

A row of predictions is {"id" or "image_id", "completion", "answer", "image_size": [W, H]}, with
"truncated" if it was cut; answer and completion lie in the frame of image_size. Metrics are parts
of 1, one JSON object on stdout; `run` (torchrun works too) shows the paper's own row beside.

[PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, 2507.05255 · [ORZ] its base,
Open-Reasoner-Zero, 2503.24290. Unlike [PR1 code]: no 1e-10 in IoU's denominator, so an exact 0.5
is a hit; a malformed detection loses itself and not its list; a page without words has precision,
recall and F1 of 0, or of 1 if nothing was said; no jieba, BLEU, METEOR, repetition penalty (1.05).
"""
import contextlib
import json
import math
import os
import re
import shutil
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import Image, ImageDraw, ImageFont

import data as datasets
import rewards


# ---- §1 options, and rows of predictions ---------------------------------------------------------
def says(kind, text: str):
    """The type of an option with the sentence that --help prints."""
    return Annotated[kind, tyro.conf.arg(help=text)]


Task = says(Literal["grounding", "counting", "detection", "ocr", "math", "choice"], "how to score")
Predictions = says(list[Path], "JSONL files, those of several checkpoints in their order")
Annotations = says(str, "COCO instances to scale detections back to; empty: rows' answers instead")
Data = says(tuple[str, ...], "specs of data.py, as coco:FILE; demo: the run's own if empty")
Samples = says(int, "the first so many samples; 0: all")
PerQuestion = says(int, "1: greedy, more: T = 1; 0: 1 [PR1 code], math and choice 16 [ORZ]")
MaxTokens = says(int, "longest answer; 0: 512, ocr 2048, detection 4096 [PR1 code], else 49152")
Out = says(str, "where to write; empty: in the (last) run folder")


def read_predictions(path, *, answers: bool = False) -> list[dict]:
    """The rows of a file, each with "where" it stands and its "id" as text."""
    rows = []
    for where, raw in datasets.read_rows(Path(path)):
        with blame(where):
            row = json.loads(raw) if isinstance(raw, bytes) else raw
            good = isinstance(row, dict) and isinstance(row.get("completion"), str)
            if not good or not {"id", "image_id"} & row.keys() or (answers and "answer" not in row):
                raise ValueError('a row needs "id" or "image_id", a text "completion", an "answer"')
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


# ---- §2 metrics: what a row is worth, then the mean ----------------------------------------------
def grounding(row) -> dict:
    """[PR1 §4.3] acc@t: the first box has IoU ≥ t; centre_acc: its centre is in the true box."""
    text, answer, size = row["completion"], row["answer"], row.get("image_size")
    iou = rewards.score("grounding", text, answer, size).parts["iou"]
    values = {f"acc@{t}": float(iou >= t) for t in (0.5, 0.75, 0.95)}
    values["acc_mean"] = sum(values.values()) / 3  # the paper's "Avg"
    left, top, right, low = json.loads(answer) if isinstance(answer, str) else answer
    inside = [left <= (x1 + x2) / 2 <= right and top <= (y1 + y2) / 2 <= low
              for x1, y1, x2, y2 in rewards.parse_boxes(text, size)[:1]]
    return values | {"centre_acc": float(any(inside)), "mean_iou": iou}


def counting(row) -> dict:
    """[PR1 §4.3] Exactly as many boxes or points, or the number itself; cut answers count too."""
    said = row["completion"], row["answer"], row.get("image_size")
    return {"accuracy": rewards.correct("counting", *said)}


def ocr(row) -> dict:
    """[PR1 §4.3] Levenshtein over the longer length, by character; the sets of words compared."""
    from rapidfuzz.distance import Levenshtein
    if not isinstance(row["answer"], str):
        raise ValueError(f"the answer in ocr must be text, not {row['answer']!r:.60}")
    said, true = rewards.split_thinking(row["completion"])[0], row["answer"].strip()
    words, true_words = set(said.split()), set(true.split())
    hits, silent = len(words & true_words), float(not words and not true_words)
    return {"edit_distance": Levenshtein.normalized_distance(said, true),
            "f1": 2 * hits / (len(words) + len(true_words)) if hits else silent,
            "precision": hits / len(words) if words else silent,
            "recall": hits / len(true_words) if true_words else silent}


def over_samples(rows, task: str) -> dict:
    """[ORZ] Mean accuracy of a question's k samples, then of the questions; pass@1 … pass@k."""
    tries, cut = {}, 0
    for row in rows:
        with blame(row["where"]):
            inputs, truncated = (row["completion"], row["answer"]), bool(row.get("truncated"))
            # a cut answer is wrong; rows may name their task: benchmarks mix math and choice
            score = rewards.score(row.get("task", task), *inputs, truncated=truncated)
            tries.setdefault(row["id"], []).append(int(score.parts["correct"]))
            cut += truncated
    least = min(map(len, tries.values()))
    result = {"accuracy": sum(sum(right) / len(right) for right in tries.values()) / len(tries)}
    for k in sorted({2**power for power in range(least.bit_length())} | {least}):
        # pass@k = 1 − C(n − c, k) / C(n, k), unbiased, with c of n right  [arXiv 2107.03374 Eq. 1]
        missed = (math.comb(n.count(0), k) / math.comb(len(n), k) for n in tries.values())
        result[f"pass@{k}"] = 1 - sum(missed) / len(tries)
    return result | {"questions": len(tries), "truncated": cut}


def average_precision(rows, annotations: str = "") -> dict:
    """[PR1 §4.3] AP, AP50, AP75 by pycocotools: all scores are 1.0, so equals keep their order."""
    truth = json.loads(Path(annotations).read_bytes()) if annotations else truth_of_rows(rows)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise ValueError(f"{annotations}: images, annotations and categories are expected")
    numbers = {category["name"]: category["id"] for category in truth["categories"]}
    images, said = {str(image["id"]): image for image in truth["images"]}, []
    for row in rows:
        with blame(row["where"]):
            image = images.pop(str(row.get("image_id", row["id"])), None)
            if image is None:
                raise ValueError("its image is not there, or was answered before")
            seen = row.get("image_size") if annotations else None
            items = rewards.read_json(rewards.split_thinking(row["completion"])[0])
            for thing in map(rewards.read_object, items if isinstance(items, list) else []):
                box, label = thing or (None, None)  # a malformed one is None
                if label and seen:
                    box = datasets.scale(box, seen, (image["width"], image["height"]))
                if label in numbers:
                    said.append(coco_item(image["id"], numbers[label], box))
    return coco_metrics(truth, said) | {"images_without_prediction": len(images)}


def truth_of_rows(rows) -> dict:
    """COCO instances of the rows' own answers, in the frame that the model saw."""
    numbers, truth = {}, {"images": [], "annotations": []}
    for row in rows:
        with blame(row["where"]):
            truth["images"].append({"id": str(row.get("image_id", row["id"]))})
            for thing in datasets.read_answer("detection", row["answer"]):
                number = numbers.setdefault(thing["label"], len(numbers) + 1)
                item = coco_item(truth["images"][-1]["id"], number, thing["bbox_2d"])
                truth["annotations"].append(item)
    return truth | {"categories": [{"id": n, "name": name} for name, n in numbers.items()]}


def coco_item(image, category, box) -> dict:
    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": 1.0}


def coco_metrics(truth, said) -> dict:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    true, found = COCO(), COCO()
    true.dataset, found.dataset = truth, truth | {"annotations": said}
    with contextlib.redirect_stdout(None):  # it prints tables
        for index in (true, found):
            for number, item in enumerate(index.dataset["annotations"], 1):
                item["id"] = number  # pycocotools takes an id of 0 for "no match"
                item.setdefault("iscrowd", 0)
                item.setdefault("area", item["bbox"][2] * item["bbox"][3])
            index.createIndex()
        result = COCOeval(true, found, "bbox")
        for work in (result.evaluate, result.accumulate, result.summarize):
            work()
    return {name: float(value) if value >= 0 else None
            for name, value in zip(("AP", "AP50", "AP75"), result.stats)}


def score_predictions(task: str, rows: list[dict], annotations: str = "") -> dict:
    """The task's metrics; ValueError says where a bad row stands."""
    if task == "detection":
        return average_precision(rows, annotations)
    if task in ("math", "choice"):
        return over_samples(rows, task)
    values = []
    for row in rows:
        with blame(row["where"]):
            values.append({"grounding": grounding, "counting": counting, "ocr": ocr}[task](row))
    return {name: sum(v[name] for v in values) / len(values) for name in values[0]}


def metrics(task: Task, predictions: Path, annotations: Annotations = "") -> None:
    """Scores saved predictions, without a model, as the papers do."""
    rows = read_predictions(predictions, answers=not annotations)
    result = score_predictions(task, rows, annotations)
    print(json.dumps({"task": task, "samples": len(rows)} | result))


PAPER = {  # in percent, each paper's start and result
    "grounding": """acc@0.5 acc@0.75 acc@0.95 acc_mean [PR1 T1]
RefCOCO val     Qwen2-VL-2B 86.8 77.2 33.0 65.7   Perception-R1 2B 89.1 79.5 35.0 67.9
RefCOCO+ val    Qwen2-VL-2B 77.1 68.7 29.4 58.4   Perception-R1 2B 81.7 73.6 32.6 62.6
RefCOCOg val    Qwen2-VL-2B 83.3 72.7 28.9 61.6   Perception-R1 2B 85.7 75.7 32.1 64.5
RefCOCOg test   Qwen2-VL-2B 83.1 73.0 27.9 61.3   Perception-R1 2B 85.4 76.0 33.1 64.8""",
    "counting": """accuracy [PR1 T3a]
PixMo-Count val, test   Qwen2-VL-2B 60.2, 50.5   Perception-R1 2B 78.1, 75.6""",
    "ocr": """edit_distance f1 precision recall [PR1 T2]
PageOCR en  Qwen2-VL-2B 8.0 94.4 96.9 93.0   Perception-R1 2B 2.8 98.2 98.6 97.8""",
    "detection": """AP AP50 AP75 [PR1 T3b]
COCO val2017  Qwen2.5-VL-3B 16.1 23.7 16.7   Perception-R1 3B 31.9 46.7 33.4""",
    "math": """accuracy [OVR T2, T3]
MATH500                Qwen2.5-VL-7B 67.4   OVR-7B 95.3
MathVision             Qwen2.5-VL-7B 25.5   OVR-7B 51.8
MathVerse vision-only  Qwen2.5-VL-7B 41.1   OVR-7B 54.6""",
}


def beside_paper(task: str, result: dict) -> str:
    """In percent: what was measured, and under it the paper's rows with their models' names."""
    columns, _, rows = PAPER["math" if task == "choice" else task].partition("\n")
    shares = [result[name] for name in columns.partition(" [")[0].split()]
    measured = " ".join("-" if share is None else f"{100 * share:.1f}" for share in shares)
    return f"{columns}, in percent\nmeasured here: {measured}\n{rows}"


# ---- §3 running a model --------------------------------------------------------------------------
# Longest answer in tokens, samples a question. OVR states neither: its last stage stops at 48k.
PROTOCOL = {"detection": (4096, 1), "ocr": (2048, 1), "math": (49152, 16), "choice": (49152, 16)}
EVAL_PROMPTS = {  # [PR1 code] where they differ from the prompts of training; <image> is literal
    "detection": "Locate every item from the category list in the image and output the coordinates "
                 "in JSON format. The category set includes {}.",
    "ocr": "<image>\nOCR this image: ",
}


def answer_all(run, per_question: int, max_tokens: int, limit: int) -> list[dict]:
    """A row for each answer to each of the first `limit` samples (0: all), equal on all ranks."""
    import qwen_vl
    from sampler import keyed_uniforms
    ranks, rows = run.processes, []
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
        noise = [keyed_uniforms(0, 0, f"eval {s.id}", per_question, max_tokens) for s in samples]
        groups = run.sampler.generate(prompts, noise if per_question > 1 else None, max_tokens)
        for s, c in ((s, c) for s, group in zip(samples, groups) for c in group):
            text = qwen_vl.decode(run.tokenizer, run.special, c.tokens)
            rows += [dict(id=s.id, task=s.task, question=s.question, completion=text,
                          answer=s.answer, image_size=s.image_size, truncated=c.truncated)]
        print(f"rank {ranks.rank}: {first + len(samples)}/{len(own)} samples", file=sys.stderr)
    return [row for part in ranks.gather(rows) for row in part]


def run_model(
    model: str, task: Task, data: Data, out: Out, samples: Samples = 0, think: bool = False,
    samples_per_question: PerQuestion = 0, max_tokens: MaxTokens = 0, annotations: Annotations = "",
) -> None:
    """Answers a benchmark by the papers' protocol and scores it: predictions and metrics."""
    import grpo_vl
    tokens, tries = PROTOCOL.get(task, (512, 1))
    config = grpo_vl.Config(model=model, data=[*data], think=think, max_pixels=16384 * 28 * 28)
    processes, folder = grpo_vl.start_processes(config.timeout), Path(out)
    run = grpo_vl.prepare(config, processes, model)
    run.sampler.refresh(run.policy)
    rows = answer_all(run, samples_per_question or tries, max_tokens or tokens, samples)
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [row | {"where": f"sample {row['id']}"} for row in rows]
        result = score_predictions(task, rows, annotations)
        print(beside_paper(task, result), file=sys.stderr)
        print(json.dumps({"task": task, "samples": len(rows)} | result))
    grpo_vl.sampler.leave()


def demo(
    cold_start: Path, grpo: Path, /, out: Out = "", data: Data = (), samples: Samples = 400
) -> None:
    """Before and after GRPO on held-out samples: table, answers.jsonl, curve.png, rollouts.png."""
    import grpo_vl
    places, rows, table = {"before": cold_start, "after": grpo}, {}, {}
    for place in places.values():
        if not (place / "model").is_dir():
            raise ValueError(f"there is no {place / 'model'}: finish the run {place} first")
    saved = json.loads((grpo / "config.json").read_text())
    heldout = [*data] or saved["eval_data"] or saved["data"]
    config = grpo_vl.Config(**saved | {"eval_samples": samples or 10**9, "eval_data": heldout})
    processes, folder = grpo_vl.start_processes(config.timeout), Path(out or grpo / "eval")
    for name, place in places.items():
        run = grpo_vl.prepare(config, processes, str(place / "model"))
        run.sampler.refresh(run.policy)
        rows[name], accuracy = grpo_vl.evaluate(run, config.max_tokens)
        table[name] = {mode.removeprefix("eval/"): value for mode, value in accuracy.items()}
    table |= {"samples": len(rows["after"]) // 2, "data": heldout}  # greedy and sampled
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.json").write_text(json.dumps(table, indent=1))
        text = (json.dumps(row | {"model": name}) + "\n" for name in rows for row in rows[name])
        (folder / "answers.jsonl").write_text("".join(text))
        panels = curves([grpo], ["reward", "held-out accuracy"])
        for mode, value in table["before"].items():  # the cold start is step 0
            xs, ys = panels.setdefault("held-out accuracy", {}).get(f"eval/{mode}", ([], []))
            panels["held-out accuracy"][f"eval/{mode}"] = [0, *xs], [value, *ys]
        draw_panels(panels, folder / "curve.png", "GRPO step")
        scenes = [run.eval_data.at(i) for i in range(min(12, table["samples"]))]
        before_after(scenes, rows).save(folder / "rollouts.png")
        print(f"{demo_table(table)}\nin {folder}: curve.png, rollouts.png, answers.jsonl")
    grpo_vl.sampler.leave()


def demo_table(table: dict) -> str:
    """Accuracy of the answer alone, ± one standard error of a share."""
    lines = [f"held-out accuracy of the answer alone, {table['samples']} samples",
             f"{'':<9}{'cold start':>16}{'after GRPO':>16}{'gain':>14}{'factor':>9}"]
    for mode, after in table["after"].items():
        before = table["before"][mode]
        cells = [f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / table['samples']):.1f} %"
                 for p in (before, after)]
        factor, gain = f"×{after / before:.2f}" if before else "-", 100 * (after - before)
        lines.append(f"{mode:<9}{cells[0]:>16}{cells[1]:>16}{gain:>+7.1f} points{factor:>9}")
    return "\n".join(lines)


# ---- §4 behaviours [OVR §4] ----------------------------------------------------------------------
IMAGE = r"\b(?:image|picture|figure|diagram|graph|chart|photo|drawing|table|scene)s?\b"
PLACE = r"\b(?:left|right|top|bottom|upper|lower|corner|cent(?:er|re)|middle|region|row|column)"
GOAL = r"\bto (?:get|reach|obtain|find|make|have|answer)\b.{0,80}\b(?:need|must|require)"
# A visual behaviour, then its linguistic counterpart: an example, the paper's [OVR T1] but for
# verification, and our lexicon: a sentence that holds the regular expression is one instance.
BEHAVIOURS = {
    "visual reflection": ("Let me see the image again.",
        rf"(?=.*{IMAGE}).*\b(?:(?:look|see|check).*\b(?:again|back|once more)"
        r"|re-?(?:exam|check|vis)|(?:wait|hmm|hold on)\b)"),
    "backtracking": ("This approach won't work because...",
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
        rf"{GOAL}|work(?:ing)? backwards?\b|\bfor (?:this|that|it) to (?:be|hold)"),
}
TRANSFER = dict(zip([*BEHAVIOURS][::2], [*BEHAVIOURS][1::2]))  # visual: linguistic


def lexicon_count(name: str, row: dict) -> int:
    """Sentences that show the behaviour, by the lexicon; 500 characters of each are read."""
    sentences = re.split(r"(?<=[.!?])\s|\n", row["completion"].lower().replace("’", "'"))
    return sum(re.search(BEHAVIOURS[name][1], sentence[:500]) is not None for sentence in sentences)


def judge_count(name: str, row: dict, url: str, model: str) -> int | None:
    """What a judge counts, asked in the order of [OVR App. C]; None where it gives no <count>."""
    request = (
        f'Problem Statement: "{row.get("question", "")}"\n\nModel\'s Reasoning: "'
        f'{row["completion"]}"\n\nLook in the text of this reasoning for {name}, as in "'
        f'{BEHAVIOURS[name][0]}" Count the distinct instances. '
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


def behaviour_rates(rows: list[dict], *judge: str) -> dict:
    """Shares of answers that show a behaviour, by lexicon or judge (url, model); and transfer."""
    rates, unjudged = {}, 0
    for name in BEHAVIOURS:
        with ThreadPoolExecutor(8 if judge else 1) as pool:
            asked = [pool.submit(judge_count if judge else lexicon_count, name, row, *judge)
                     for row in rows]
        shown = [ask.result() > 0 for ask in asked if ask.result() is not None]
        unjudged += len(rows) - len(shown)
        rates[name] = sum(shown) / len(shown) if shown else 0.0
    # [OVR §4] BTR = CBR_visual / CBR_linguistic; undefined where nothing could be carried over
    transfer = {visual: rates[visual] / rates[linguistic] if rates[linguistic] else None
                for visual, linguistic in TRANSFER.items()}
    return {"answers": len(rows), "unjudged": unjudged, "rates": rates, "transfer": transfer}


def behaviours(
    predictions: Predictions, judge: str = "", judge_model: str = "", plot: str = ""
) -> None:
    """Cognitive behaviours by the lexicon, or by a judge: an OpenAI-compatible URL like
    http://host/v1 and its model (GPT-4o in [OVR App. C]), the key in JUDGE_API_KEY; plot: a PNG."""
    if bool(judge) != bool(judge_model):
        raise ValueError("--judge URL and --judge-model NAME belong together")
    by = [judge, judge_model] if judge else []
    results = {str(file): behaviour_rates(read_predictions(file), *by) for file in predictions}
    print(json.dumps({"judge": judge_model or "lexicon", "files": results}))
    if plot:
        panels, files = {}, [file.stem for file in predictions]
        for name in BEHAVIOURS:
            title = f"{'visual' if name in TRANSFER else 'linguistic'} (share of answers)"
            line = files, [result["rates"][name] for result in results.values()]
            panels.setdefault(title, {})[name] = line
        draw_panels(panels, plot, "")


# ---- §5 curves and pictures ----------------------------------------------------------------------
PANELS = {  # title: pattern of names in metrics.jsonl
    "reward": "reward", "parts of the reward": "reward/.*", "held-out accuracy": "eval/.*",
    "completion length (tokens)": "length", "truncated completions (share)": "truncated",
    "KL to the reference (nats a token)": "kl", "entropy (nats a token)": "entropy",
    "clipped tokens (share)": "clip_.*", "equal rewards (share of groups)": "zero_variance",
    "loss": "loss", "gradient norm": "grad_norm", "seconds a step": "seconds/(?!total).*",
}


def curves(runs: list[Path], titles=tuple(PANELS)) -> dict:
    """{panel: {metric: (completed steps, values)}}. After a resume, a step's later line counts."""
    panels: dict[str, dict] = {}
    for run in runs:
        steps = {}
        for _, raw in datasets.read_rows(run / "metrics.jsonl"):
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed run
                row = json.loads(raw)
                steps[row["step"]] = row
        if not steps:
            raise ValueError(f"{run}/metrics.jsonl: no step has been logged yet")
        names = dict.fromkeys(name for row in steps.values() for name in row)
        for title, name in ((t, n) for t in titles for n in names if re.fullmatch(PANELS[t], n)):
            xs = [step for step in sorted(steps) if name in steps[step]]
            line = [step + 1 for step in xs], [steps[step][name] for step in xs]
            panels.setdefault(title, {})[f"{run} {name}" if len(runs) > 1 else name] = line
    return {title: panels[title] for title in titles if title in panels}


def draw_panels(panels: dict, path, xlabel: str) -> None:
    """PNG of {title: {label: (xs, ys)}}; a long line is drawn pale under its running mean."""
    import matplotlib
    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot
    pyplot.rcParams["font.size"] = 8
    shape = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = pyplot.figure(figsize=(4.6 * shape[1], 3.2 * shape[0]), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(*shape, place)
        for label, (xs, ys) in lines.items():
            width = len(ys) // 20 if len(ys) > 60 else 1
            parts = (ys[max(0, end - width) : end] for end in range(1, len(ys) + 1))
            means = [sum(part) / len(part) for part in parts]
            (line,) = axis.plot(xs, means, "-" if width > 1 else ".-", label=label)
            axis.plot(xs, ys, color=line.get_color(), lw=0.6, alpha=0.25)
        axis.set(title=title, xlabel=xlabel)
        axis.tick_params("x", rotation=20 if isinstance(xs[0], str) else 0)
        axis.grid(alpha=0.25)
        if len(lines) > 1:
            axis.legend(fontsize="small", framealpha=0.6)
    figure.savefig(path, dpi=110)


def plot(runs: list[Path], /, out: Out = "") -> None:
    """Training curves of one run, or of several in the same panels: curves.png."""
    draw_panels(curves(runs), out or runs[-1] / "curves.png", "step")


def sheet(pictures, heading: str, columns: int = 4, width: int = 260):
    """Pictures side by side, each `width` pixels wide, under a heading."""
    small = [p.resize((width, p.height * width // p.width), Image.Resampling.LANCZOS)
             for p in pictures]
    across, down, top = width + 10, max(p.height for p in small) + 10, 44
    tall = top + math.ceil(len(small) / columns) * down
    page = Image.new("RGB", (columns * across + 10, tall), "#e1e1e1")
    legend = f"{heading} - predicted in magenta, true in cyan"
    ImageDraw.Draw(page).text((10, 12), legend, "black", ImageFont.load_default(18))
    for place, picture in enumerate(small):
        page.paste(picture, (10 + place % columns * across, top + place // columns * down))
    return page


def before_after(samples, rows):
    """The first held-out samples, none picked, each answered greedily before and after GRPO."""
    tiles = []
    for sample, name in ((sample, name) for sample in samples for name in rows):
        row = next(r for r in rows[name] if r["id"] == sample.id and r["mode"] == "greedy")
        text, size, true = row["completion"], sample.image_size, sample.answer
        said = rewards.parse_boxes(text, size) or rewards.parse_points(text, size)
        verdict = {0: "wrong", 1: "right"}.get(row["correct"], f"{row['correct']:.2f}")
        caption = f"{name}, {sample.question or sample.task}: {verdict}"
        if sample.task not in datasets.PLACED:
            said, true, caption = (), (), f"{caption} {text!r:.80}"
        image = sample.images[0] if sample.images else Image.new("RGB", (224, 28), "white")
        tiles.append(datasets.draw(image, predicted=said, true=true, caption=caption))
    return sheet(tiles, "held-out, greedy, before and after GRPO")


def show(run: Path, /, out: Out = "") -> None:
    """The 24 newest pictures of a run's samples, with boxes, points or text: samples.png."""
    files = sorted(run.glob("samples/step-*.png"), key=lambda file: file.stat().st_mtime)[-24:]
    if not files:
        raise ValueError(f"{run}/samples has no pictures: train with --pictures-every above 0")
    tiles = [Image.open(file).convert("RGB") for file in files]
    page = sheet(tiles, f"{run.name}, {files[0].stem} to {files[-1].stem}")
    page.save(out or run / "samples.png")


# ---- §6 the mean of checkpoints, and the command line --------------------------------------------
def curriculum(
    model: str, data: Data, out: Out, low: float = 0.1, high: float = 0.9, samples: Samples = 0,
    samples_per_question: PerQuestion = 8, max_tokens: MaxTokens = 768,
) -> None:
    """[PR1 §4.3] Keeps what the policy gets right in `low` to `high` of its tries, easy first.

    Right is rewards.correct: IoU > 0.5, the exact count, F1, … Writes the images, resized, and
    curriculum.jsonl: train with --data curriculum.jsonl?in_order=1.
    """
    import grpo_vl
    config = grpo_vl.Config(model=model, data=data)
    processes, folder, rates, rows = grpo_vl.start_processes(config.timeout), Path(out), {}, []
    run = grpo_vl.prepare(config, processes, model)
    run.sampler.refresh(run.policy)
    run.eval_data = run.data
    for row in answer_all(run, samples_per_question, max_tokens, samples):
        inputs = row["task"], row["completion"], row["answer"], row["image_size"]
        rates.setdefault(row["id"], []).append(rewards.correct(*inputs) / samples_per_question)
    if processes.rank == 0:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for sample in map(run.data.at, range(len(rates))):
            if low <= sum(rates[sample.id]) <= high:
                names = [f"images/{len(rows)}-{i}.png" for i in range(len(sample.images))]
                for name, image in zip(names, sample.images):
                    image.save(folder / name)
                rows += [dict(id=sample.id, task=sample.task, question=sample.question,
                              images=names, answer=sample.answer, pass_rate=sum(rates[sample.id]))]
        rows.sort(key=lambda row: -row["pass_rate"])
        (folder / "curriculum.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"kept {len(rows)} of {len(rates)} samples in {folder / 'curriculum.jsonl'}")
    grpo_vl.sampler.leave()


def average(models: list[Path], /, out: Out) -> None:
    """The uniform mean of Hugging Face checkpoints of one run, added in fp32 [OVR §4.1]."""
    from safetensors.torch import load_file, save_file
    files = sorted(models[0].glob("*.safetensors"))
    if not files:
        raise ValueError(f"{models[0]} holds no safetensors")
    shutil.copytree(models[0], out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in files:
        parts = [load_file(model / file.name) for model in models]
        shapes = [{name: tensor.shape for name, tensor in part.items()} for part in parts]
        if any(other != shapes[0] for other in shapes):
            raise ValueError(f"{file.name} has other tensors in one of {[*map(str, models)]}")
        mean = {name: (sum(part[name].float() for part in parts) / len(parts)).to(tensor.dtype)
                for name, tensor in parts[0].items()}
        save_file(mean, Path(out) / file.name, metadata={"format": "pt"})


def main(arguments: list[str] | None = None) -> None:
    commands = {"demo": demo, "run": run_model, "metrics": metrics, "behaviours": behaviours,
                "plot": plot, "show": show, "average": average, "curriculum": curriculum}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, description=__doc__)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"eval.py: {error}") from None


if __name__ == "__main__":
    main()
