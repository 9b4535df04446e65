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
loses itself, not its list; a wordless page has 0, or 1 if nothing is said; no jieba, BLEU, METEOR.
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
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import tyro
from PIL import Image
from typing_extensions import Doc

import data as datasets
import formats
import pictures
import plots
import rewards

# ---- §1 options, and rows of predictions ---------------------------------------------------------
Task = Annotated[Literal[*datasets.TASKS], Doc("how to score")]
Annotations = Annotated[str, Doc("COCO instances, and their frame; empty: the rows' own answers")]
Data = Annotated[tuple[str, ...], Doc("specs of data.py, as coco:FILE; demo: the run's if empty")]
Samples = Annotated[int, Doc("the first so many samples; 0: all")]
Tries = Annotated[int, Doc("1: greedy, more: T = 1; 0: 1 [PR1 code], math, choice 16 [ORZ]")]
MaxTokens = Annotated[int, Doc("0: 512, ocr 2048, detection 4096 [PR1 code], math, choice 49152")]
Out = Annotated[str, Doc("where to write; empty: in the (last) run folder")]


def read_predictions(path, *, task: str = "", answers: bool = False) -> list[dict]:
    """The rows of a file, each with "where" it stands and its "id" as text."""
    rows = []
    for where, raw in formats.read_rows(Path(path)):
        with datasets.blame(where):
            row = json.loads(raw) if isinstance(raw, bytes) else raw
            good = isinstance(row, dict) and isinstance(row.get("completion"), str)
            if not good or not {"id", "image_id"} & row.keys() or (answers and "answer" not in row):
                raise ValueError('a row needs "id" or "image_id", a text "completion", an "answer"')
            own = row.get("task", task)
            if task not in ("", own) and {task, own} != {"math", "choice"}:  # benchmarks mix them
                raise ValueError(f"this row's task is {own}, but --task is {task}: give --task "
                                 f"{own} or a file of {task} alone (math and choice may mix)")
            rows.append(row | {"where": where, "id": str(row.get("id", row.get("image_id")))})
    if not rows:
        raise ValueError(f"{path}: there are no rows in this file")
    return rows


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
    return {"accuracy": rewards.correct("counting", row["completion"], row["answer"])}


def ocr(row) -> dict:
    """[PR1 §4.3] Levenshtein over the longer length, by character; the sets of words compared."""
    from rapidfuzz.distance import Levenshtein
    if not isinstance(row["answer"], str):
        raise ValueError(f"the answer in ocr must be text, not {row['answer']!r:.60}")
    said, true = rewards.split_thinking(row["completion"])[0], row["answer"].strip()
    words, true_words = (set(text.split()) or {""} for text in (said, true))  # "": no word
    hits = len(words & true_words)
    return {"edit_distance": Levenshtein.normalized_distance(said, true),
            "f1": 2 * hits / (len(words) + len(true_words)),
            "precision": hits / len(words), "recall": hits / len(true_words)}


def over_samples(rows, task: str) -> dict:
    """[ORZ] Mean accuracy of a question's k samples, then of the questions; pass@1 … pass@k."""
    tries = {}
    for row in rows:
        with datasets.blame(row["where"]):
            inputs = row.get("task", task), row["completion"], row["answer"]
            score = rewards.score(*inputs, truncated=bool(row.get("truncated")))  # a cut one: 0
            tries.setdefault(row["id"], []).append(int(score.parts["correct"]))
    least, cut = min(map(len, tries.values())), sum(bool(row.get("truncated")) for row in rows)
    result = {"accuracy": fmean(map(fmean, tries.values()))}
    for k in sorted({2**power for power in range(least.bit_length())} | {least}):
        # pass@k = 1 − C(n − c, k) / C(n, k), unbiased, with c of n right  [arXiv 2107.03374 Eq. 1]
        missed = fmean(math.comb(n.count(0), k) / math.comb(len(n), k) for n in tries.values())
        result[f"pass@{k}"] = 1 - missed
    return result | {"questions": len(tries), "truncated": cut}


def average_precision(rows, annotations: str = "") -> dict:
    """[PR1 §4.3] AP, AP50, AP75 by pycocotools: all scores are 1.0, so equals keep their order."""
    from pycocotools import coco, cocoeval
    truth = json.loads(Path(annotations).read_bytes()) if annotations else truth_of_rows(rows)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise ValueError(f"{annotations}: images, annotations and categories are expected")
    numbers = {category["name"]: category["id"] for category in truth["categories"]}
    images, said = {str(image["id"]): image for image in truth["images"]}, []
    for row in rows:
        with datasets.blame(row["where"]):
            image = images.pop(str(row.get("image_id", row["id"])), None)
            if image is None:
                raise ValueError("its image is not there, or was answered before")
            items = rewards.read_json(rewards.split_thinking(row["completion"])[0])
            things = map(rewards.read_object, items if isinstance(items, list) else [])
            for box, label in filter(None, things):  # a malformed one is None
                if annotations and row.get("image_size"):
                    box = pictures.scale(box, row["image_size"], (image["width"], image["height"]))
                said.append(coco_item(image["id"], numbers.get(label), box))  # unknown: in no class
    true, found = coco.COCO(), coco.COCO()
    true.dataset, found.dataset = truth, truth | {"annotations": said}
    with contextlib.redirect_stdout(None):  # it prints tables
        for index in (true, found):
            for number, item in enumerate(index.dataset["annotations"], 1):
                absent = {"iscrowd": 0, "area": item["bbox"][2] * item["bbox"][3]}
                item |= absent | item | {"id": number}  # an id of 0 would mean "no match"
            index.createIndex()
        result = cocoeval.COCOeval(true, found, "bbox")
        for work in (result.evaluate, result.accumulate, result.summarize):
            work()
    shares = [float(value) if value >= 0 else None for value in result.stats]  # -1: no boxes
    return dict(zip(("AP", "AP50", "AP75"), shares), images_without_prediction=len(images))


def truth_of_rows(rows) -> dict:
    """COCO instances of the rows' own answers, in the frame that the model saw."""
    images, annotations = [{"id": str(row.get("image_id", row["id"]))} for row in rows], []
    for image, row in zip(images, rows):
        with datasets.blame(row["where"]):
            annotations += [coco_item(image["id"], thing["label"], thing["bbox_2d"])
                            for thing in rewards.read_truth("detection", row["answer"])]
    categories = [{"id": name, "name": name} for name in {a["category_id"] for a in annotations}]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_item(image, category, box) -> dict:
    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": 1.0}


def score_predictions(task: str, rows: list[dict], annotations: str = "") -> dict:
    """The task's metrics; ValueError says where a bad row stands."""
    if task == "detection":
        return average_precision(rows, annotations)
    if task in ("math", "choice"):
        return over_samples(rows, task)
    values = []
    for row in rows:
        with datasets.blame(row["where"]):
            values.append({"grounding": grounding, "counting": counting, "ocr": ocr}[task](row))
    return {name: fmean(value[name] for value in values) for name in values[0]}


def metrics(task: Task, predictions: Path, annotations: Annotations = "") -> None:
    """Scores saved predictions, without a model, as the papers do."""
    rows = read_predictions(predictions, task=task, answers=not annotations)
    result = score_predictions(task, rows, annotations)
    print(beside_paper(task, result), file=sys.stderr)
    print(json.dumps({"task": task, "samples": len(rows)} | result))


def beside_paper(task: str, result: dict) -> str:
    """In percent: what was measured, and under it the paper's rows with their models' names."""
    papers = json.loads(Path(__file__).with_name("results").joinpath("papers.json").read_bytes())
    columns, *rows = papers["math" if task == "choice" else task]
    shares = [result[name] for name in columns.partition(" [")[0].split()]
    measured = " ".join("-" if share is None else f"{100 * share:.1f}" for share in shares)
    return f"{columns}, in percent\nmeasured here: {measured}\n" + "\n".join(rows)


# ---- §3 running a model --------------------------------------------------------------------------
PROTOCOL = {  # tokens of the longest answer, samples a question, repetition penalty
    "grounding": (512, 1, 1.05), "counting": (512, 1, 1.0),  # [PR1 code], these four
    "ocr": (2048, 1, 1.0), "detection": (4096, 1, 1.0),
    "math": (49152, 16, 1.0), "choice": (49152, 16, 1.0)}  # unstated: OVR's last 48k, 16 of [ORZ]
PROMPTS = rewards.PROMPTS | {  # [PR1 code] evaluates two with others; <image> is literal
    "ocr": "<image>\nOCR this image: ", "detection": "Locate every item from the category list in "
        "the image and output the coordinates in JSON format. The category set includes {}."}


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


def run(model: str, task: Task, data: Data, out: Out, samples: Samples = 0, think: bool = False,
        samples_per_question: Tries = 0, max_tokens: MaxTokens = 0, annotations: Annotations = ""):
    """Answers a benchmark by the papers' protocol and scores it: predictions and metrics."""
    import fsdp
    import grpo_vl
    import training
    tokens, tries, penalty = PROTOCOL[task]
    config = grpo_vl.Config(model=model, data=[*data], think=think, max_pixels=16384 * 28 * 28)
    processes, file = fsdp.start_processes(config.timeout), Path(out) / "predictions.jsonl"
    run = training.prepare(config, processes, model)
    rows = answer_all(run, samples_per_question or tries, max_tokens or tokens, samples, penalty)
    if processes.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics(task, file, annotations)
    fsdp.leave()


def curriculum(model: str, data: Data, out: Out, low: float = 0.1, high: float = 0.9,
               samples: Samples = 0, samples_per_question: Tries = 8, max_tokens: MaxTokens = 768):
    """[PR1 §4.3] Keeps what is right (rewards.correct) in `low` to `high` of the tries, easy first:
    the images, resized, and curriculum.jsonl, to train with --data curriculum.jsonl?in_order=1."""
    import fsdp
    import grpo_vl
    import training
    config = grpo_vl.Config(model=model, data=data)
    processes, folder = fsdp.start_processes(config.timeout), Path(out)
    run, tries, rows = training.prepare(config, processes, model), {}, []
    run.eval_data = run.data
    for row in answer_all(run, samples_per_question, max_tokens, samples):
        inputs = row["task"], row["completion"], row["answer"], row["image_size"]
        tries.setdefault(row["id"], []).append(rewards.correct(*inputs))
    if processes.rank == 0:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for sample in map(run.data.at, range(len(tries))):
            rate = fmean(tries[sample.id])
            if low <= rate <= high:
                names = [f"images/{len(rows)}-{i}.png" for i in range(len(sample.images))]
                for name, image in zip(names, sample.images):
                    image.save(folder / name)
                rows += [dict(id=sample.id, task=sample.task, question=sample.question,
                              images=names, answer=sample.answer, pass_rate=rate)]
        rows.sort(key=lambda row: -row["pass_rate"])
        (folder / "curriculum.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"kept {len(rows)} of {len(tries)} samples in {folder / 'curriculum.jsonl'}")
    fsdp.leave()


def demo(cold_start: Path, grpo: Path, /, out: Out = "", data: Data = (), samples: Samples = 400):
    """Before and after GRPO on held-out samples: table, answers.jsonl, curve.png, rollouts.png."""
    import fsdp
    import grpo_vl
    import training
    models, rows, table = {"before": cold_start / "model", "after": grpo / "model"}, {}, {}
    for model in models.values():
        if not model.is_dir():
            raise ValueError(f"there is no {model}: finish the run {model.parent} first")
    saved = json.loads((grpo / "config.json").read_text())
    heldout = [*data] or saved["eval_data"] or saved["data"]
    config = grpo_vl.Config(**saved | {"eval_samples": samples or 10**9, "eval_data": heldout})
    processes, folder = fsdp.start_processes(config.timeout), Path(out or grpo / "eval")
    for name, model in models.items():
        run = training.prepare(config, processes, str(model))
        run.sampler.refresh(run.policy)
        rows[name], accuracy = training.evaluate(run, config.max_tokens)
        table[name] = {mode.removeprefix("eval/"): value for mode, value in accuracy.items()}
    table |= {"samples": len(rows["after"]) // 2, "data": heldout}  # greedy and sampled
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.json").write_text(json.dumps(table, indent=1))
        text = (json.dumps(row | {"model": name}) + "\n" for name in rows for row in rows[name])
        (folder / "answers.jsonl").write_text("".join(text))
        start = {f"eval/{mode}": value for mode, value in table["before"].items()}
        panels = plots.curves([grpo], start, ["reward", "held-out accuracy"])
        plots.draw_panels(panels, folder / "curve.png", "GRPO step")
        scenes = [run.eval_data.at(i) for i in range(min(12, table["samples"]))]
        plots.before_after(scenes, rows).save(folder / "rollouts.png")
        print(f"{plots.demo_table(table)}\nin {folder}: curve.png, rollouts.png, answers.jsonl")
    fsdp.leave()


# ---- §4 behaviours [OVR §4] ----------------------------------------------------------------------
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
    sentences = re.split(r"(?<=[.!?])\s|\n", row["completion"].lower().replace("’", "'"))
    return sum(re.search(BEHAVIOURS[name][1], sentence[:500]) is not None for sentence in sentences)


def judge_count(name: str, row: dict, url: str, model: str) -> int | None:
    """What a judge counts, asked in the order of [OVR App. C]; None where it gives no <count>."""
    request = (f'Problem Statement: "{row.get("question", "")}"\n\nModel\'s Reasoning: "'
               f'{row["completion"]}"\n\nLook in the text of this reasoning for {name}, as in "'
               f'{BEHAVIOURS[name][0]}" Count the distinct instances. '
               "Provide the count in <count>X</count> tags. If none, use <count>0</count>.")
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": request}]}
    head = {"Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('JUDGE_API_KEY', '')}"}
    with datasets.blame(f"--judge {url}: no answer to a chat completion"):
        call = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(call, timeout=120) as reply:
            content = json.load(reply)["choices"][0]["message"]["content"]
        found = re.findall(r"<count>\s*(\d{1,6})\s*</count>", content)
    return int(found[-1]) if found else None


def behaviours(predictions: list[Path], judge: str = "", judge_model: str = "", plot: str = ""):
    """Cognitive behaviours, a file a checkpoint, by the lexicon or a judge: an OpenAI-compatible
    http://host/v1, its model (GPT-4o in [OVR App. C]), its key in JUDGE_API_KEY; plot: a PNG."""
    if bool(judge) != bool(judge_model):
        raise ValueError("--judge URL and --judge-model NAME belong together")
    count = partial(judge_count, url=judge, model=judge_model) if judge else lexicon_count
    results, panels = {}, {}
    for file in map(str, predictions):
        rows = read_predictions(file)
        with ThreadPoolExecutor(8) as pool:  # a judge takes its time
            counts = {name: [*pool.map(partial(count, name), rows)] for name in BEHAVIOURS}
        shown = {name: [n > 0 for n in found if n is not None] for name, found in counts.items()}
        rates = {name: fmean(found or [0]) for name, found in shown.items()}  # shares of answers
        unjudged = sum(found.count(None) for found in counts.values())
        # [OVR §4] BTR = CBR_visual / CBR_linguistic; undefined where nothing could be carried over
        transfer = {visual: rates[visual] / rates[linguistic] if rates[linguistic] else None
                    for visual, linguistic in TRANSFER.items()}
        results[file] = dict(answers=len(rows), unjudged=unjudged, rates=rates, transfer=transfer)
    print(json.dumps({"judge": judge_model or "lexicon", "files": results}))
    if plot:
        for name in BEHAVIOURS:
            rates = [result["rates"][name] for result in results.values()]
            title = f"{'visual' if name in TRANSFER else 'linguistic'} (share of answers)"
            panels.setdefault(title, {})[name] = [file.stem for file in predictions], rates
        plots.draw_panels(panels, plot, "")


# ---- §5 curves and pictures, the mean of checkpoints, the command line ---------------------------
def plot(runs: list[Path], /, out: Out = "") -> None:
    """Training curves of one run, or of several in the same panels: curves.png."""
    plots.draw_panels(plots.curves(runs), out or runs[-1] / "curves.png", "step")


def show(run: Path, /, out: Out = "") -> None:
    """The 24 newest pictures of a run's samples, with boxes, points or text: samples.png."""
    files = sorted(run.glob("samples/step-*.png"), key=lambda file: file.stat().st_mtime)[-24:]
    if not files:
        raise ValueError(f"{run}/samples has no pictures: train with --pictures-every above 0")
    heading = f"{run.name}, {files[0].stem} to {files[-1].stem}"
    page = plots.sheet([*map(Image.open, files)], heading)
    page.save(out or run / "samples.png")


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
    commands = (demo, run, metrics, behaviours, plot, show, curriculum, average)
    named = {command.__name__: command for command in commands}
    try:
        tyro.extras.subcommand_cli_from_dict(named, args=arguments, description=__doc__)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"eval.py: {error}") from None


if __name__ == "__main__":
    main()
