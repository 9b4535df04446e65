r"""What is a model, an answer or a run worth? Each of these commands answers one part.

  python eval.py demo base runs/grpo             before / after on held-out samples
  python eval.py run --model DIR --task grounding --data refcoco-vlmr1:refcoco_val.json --out DIR
  python eval.py metrics --task detection --predictions FILE.jsonl --annotations instances.json
  python eval.py behaviours --predictions step-0.jsonl step-500.jsonl --plot behaviours.png
  python eval.py plot RUN [RUN…] [--seeds]  training curves; `show RUN`: its samples on a sheet
  python eval.py curriculum --model DIR --data SPEC --out DIR   easy to hard, by the pass rate
  python eval.py average CHECKPOINT CHECKPOINT --out DIR  [OVR §4.1] ends with such a mean

Metrics are one JSON object on stdout; the papers' rows go to stderr. [PR1] arXiv 2504.07954 · [OVR]
2507.05255.
"""
import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import tyro
from typing_extensions import Doc

import behaviours as behaviours_of
import data as datasets
import fsdp
import grpo_vl
import plots
import protocols
import qwen_vl
import rewards
import sft_coldstart
import sheets
import training
from average import write_average
from curriculum import pass_rates, rows_of
from needs import library
from prompts import encode_sample, think_of
from sources import DrawnSource

# ---- §1 options ----------------------------------------------------------------------------------
Task = Annotated[Literal[*rewards.TASKS], Doc("how to score")]
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
Prompts = Annotated[Literal["paper", "training"],
                    Doc("prompts, penalty on repetition: of the papers' evaluation, of training")]
Think = Annotated[Literal["no", "before", "after"], Doc("<think> before the answer, or after it")]


# ---- §2 saved answers ----------------------------------------------------------------------------
def metrics(task: Task, predictions: Path, annotations: Annotations = "") -> None:
    """Scores saved predictions, without a model, as the papers do."""
    rows = protocols.read_predictions(predictions, task=task, answers=not annotations)
    result = protocols.score_predictions(task, rows, annotations)
    print(protocols.beside_paper(task, result), file=sys.stderr)
    about = {"task": task, "samples": len(rows)}
    if any(row.get("blind") for row in rows):
        about["blind"] = True
    print(json.dumps(about | result))


def behaviours(predictions: list[Path], judge: str = "", judge_model: str = "", plot: str = ""):
    """Cognitive behaviours, a file a checkpoint, by the lexicon or a judge: an OpenAI-compatible
    http://host/v1, its model (GPT-4o in [OVR App. C]), its key in JUDGE_API_KEY; plot: a PNG."""
    if bool(judge) != bool(judge_model):
        raise ValueError("--judge URL and --judge-model NAME belong together")
    count = behaviours_of.lexicon_count
    if judge:
        count = partial(behaviours_of.judge_count, url=judge, model=judge_model)
    results = {}
    for file in predictions:
        rows = protocols.read_predictions(file)
        results[str(file)] = behaviours_of.rates_of(rows, count)
    print(json.dumps({"judge": judge_model or "lexicon", "files": results}))
    if plot:
        path = plots.picture_path(plot, Path("behaviours.png"))
        plots.draw_panels(behaviour_panels(results), path, "")
        print(f"behaviours of {len(results)} files in {path}", file=sys.stderr)


def behaviour_panels(results: dict) -> dict:
    """Rates over files, visual and linguistic ones apart, each ± one standard error."""
    names = [Path(file).stem for file in results]
    panels = {}
    for behaviour in behaviours_of.BEHAVIOURS:
        rates = [result["rates"][behaviour] for result in results.values()]
        errors = []
        for rate, result in zip(rates, results.values()):
            errors.append(plots.standard_error(rate, result["answers"]))
        kind = "visual" if behaviour in behaviours_of.TRANSFER else "linguistic"
        line = plots.Line("", behaviour, names, rates, errors)
        panels.setdefault(f"{kind} (share of answers)", []).append(line)
    return panels


# ---- §3 running a model --------------------------------------------------------------------------
def check_task_of_data(config, task: str) -> None:
    """Errors: DataError, without a model, if the data can not be read or is of another task."""
    mixture = training.open_heldout(config)
    for source in mixture.sources:
        if isinstance(source, DrawnSource):
            with datasets.blame("--data synthetic"):
                protocols.check_task(source.world.task, task)
            continue
        for where, sample, *_ in source.samples:
            with datasets.blame(where):
                protocols.check_task(sample.task, task)


def protocol_prompt(run, sample):
    """The prompt of the papers' evaluation, which differs from training's for two tasks."""
    row = rewards.row_of(sample.task)
    own_prompt = protocols.protocol_of(sample.task).prompt or row.prompt
    text = own_prompt.format(sample.question or row.question)
    text += rewards.think_prompt(think_of(run.config, sample.id))
    return encode_sample(run.config, run.tokenizer, run.special, sample, text)


def run(model: str, task: Task, data: Data, out: Out, samples: Samples = 0, think: Think = "no",
        samples_per_question: Tries = 0, max_tokens: MaxTokens = 0, annotations: Annotations = "",
        system_prompt: System = qwen_vl.SYSTEM, blind: Blind = False, prompts: Prompts = "paper"):
    """Answers a benchmark by the papers' protocol and scores it: predictions and metrics."""
    protocol = protocols.protocol_of(task)
    tries = samples_per_question or protocol.samples
    prompt_of, penalty = protocol_prompt, protocol.penalty
    if prompts == "training":
        prompt_of, penalty = training.make_prompt, 1.0
    config = grpo_vl.Config(
        model=model, data=tuple(data), eval_data=tuple(data), heldout=0.0, eval_every=1,
        think=think, system_prompt=system_prompt, blind=blind, max_pixels=16384 * 28 * 28,
        timeout=4 * 86_400)  # ranks end at other times: answers may have 49,152 tokens
    if protocol.package:  # ImportError names it before anything is answered
        library(*protocol.package)
    if annotations:
        protocols.read_annotations(annotations)
    check_task_of_data(config, task)
    qwen_vl.check_model(model)
    processes = fsdp.start_processes(config.timeout)
    run = ready_to_answer(config, processes, model)
    rows = training.answer_heldout(
        run, samples, tries=tries, max_tokens=max_tokens or protocol.max_tokens, greedy=tries == 1,
        penalty=penalty, prompt_of=prompt_of)
    rows = [row | {"blind": blind} for row in rows]
    if processes.rank == 0:
        file = Path(out) / "predictions.jsonl"
        write_rows(file, rows)
        if protocol.why_one and tries > 1:
            print(f"in {file}, unscored: {protocol.why_one}", file=sys.stderr)
        else:
            metrics(task, file, annotations)
    fsdp.leave()


def ready_to_answer(config, processes, model: str) -> training.Run:
    """A run whose sampler has the model's weights, of which nothing is trained."""
    run = training.prepare(config, processes, model, frozen=True)
    run.sampler.refresh(fsdp.gathered_parameters(run.policy))
    return run


def write_rows(file: Path, rows) -> None:
    """JSONL; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    file.write_text("".join(lines))


def curriculum(model: str, data: Data, out: Out, low: float = 0.1, high: float = 0.9,
               samples: Samples = 0, samples_per_question: Tries = 8, max_tokens: MaxTokens = 768,
               think: Think = "no", system_prompt: System = qwen_vl.SYSTEM):
    """[PR1 §4.3] Keeps what is right (rewards.correct) in `low` to `high` of the tries, easy first:
    the images, resized, and curriculum.jsonl, to train with --data curriculum.jsonl?in_order=1.
    Ask as the run will: with its --think, --system-prompt and --max-tokens."""
    config = grpo_vl.Config(
        model=model, data=tuple(data), think=think, system_prompt=system_prompt)
    qwen_vl.check_model(model)
    processes = fsdp.start_processes(config.timeout)
    run = ready_to_answer(config, processes, model)
    run.eval_data = run.data
    answers = training.answer_heldout(
        run, samples, tries=samples_per_question, max_tokens=max_tokens, greedy=False)
    if processes.rank == 0:
        for row in answers:
            row["correct"] = training.right(config, row)
        rates = pass_rates(answers)
        drawn = [run.data.good(index) for index in islice(run.data.in_turn(), samples or None)]
        kept = [sample for sample in drawn if sample and low <= rates[sample.id] <= high]
        file = Path(out) / "curriculum.jsonl"
        write_rows(file, rows_of(kept, rates, file.parent))
        print(f"kept {len(kept)} of {len(rates)} samples in {file}")
    fsdp.leave()


SHOWN = 12  # the first held-out samples, which are shown with several answers


def demo(before: Path, grpo: Path, /, out: Out = "", data: Data = (), samples: Samples = 400):
    """Before and after GRPO on held-out samples: table, answers.jsonl, curve.png, rollouts.png.

    before: the folder of a model, or of the run that made it; grpo: that of the run."""
    library("matplotlib", "matplotlib")
    models = {"before": find_model(before), "after": find_model(grpo)}
    with datasets.blame(grpo / "config.json"):
        saved = json.loads((grpo / "config.json").read_text())
        eval_data = [*data] or saved["eval_data"]  # empty: the held-out share of the run's data
        heldout = {"eval_samples": samples or 10**9, "eval_every": 1, "eval_data": eval_data}
        config = grpo_vl.Config(**saved | heldout)
    processes = fsdp.start_processes(config.timeout)
    table, answers = {}, []
    for name, model in models.items():
        run = ready_to_answer(config, processes, str(model))
        table[name], rows = ask(run)
        answers += [{"model": name} | row for row in rows]
    table["samples"] = len({row["id"] for row in answers})
    table["metric"] = rewards.metric_name(row["task"] for row in answers)
    table["data"] = eval_data or saved["data"]
    if processes.rank == 0:
        first = islice(run.eval_data.in_turn(), min(SHOWN, table["samples"]))
        scenes = [run.eval_data.good(index) for index in first]
        write_demo(Path(out or grpo / "eval"), grpo, table, answers, scenes)
    fsdp.leave()


def find_model(folder: Path) -> Path:
    """The model in a folder: its own or its run's. Errors: ValueError if there is none yet."""
    model = sft_coldstart.find_model(folder)
    if model is None:
        raise ValueError(f"there is no model in {folder}: finish the run first")
    return model


def ask(run) -> tuple[dict[str, float], list[dict]]:
    """({mode: metric}, rows): all samples once greedily and once sampled, the first ones more."""
    limit = grpo_vl.length_limit(run.config, run.config.steps)
    rows, accuracy = training.evaluate(run, limit)
    first = min(SHOWN, run.config.eval_samples)
    several = training.answer_heldout(
        run, first, tries=sheets.TRIES, max_tokens=limit, greedy=False)
    for row in several:
        row["mode"] = "several"
        row["correct"] = training.right(run.config, row)
    metrics = {mode.removeprefix("eval/"): value for mode, value in accuracy.items()}
    return metrics, rows + several


def write_demo(folder: Path, grpo: Path, table: dict, answers: list[dict], scenes: list) -> None:
    """table.json, answers.jsonl, curve.png and rollouts.png; the table is printed too."""
    write_rows(folder / "answers.jsonl", answers)
    (folder / "table.json").write_text(json.dumps(table, indent=1))
    panels = plots.curves([grpo], ["reward", "held-out accuracy"])
    if "held-out accuracy" in panels:
        panels[f"held-out {table['metric']}"] = panels.pop("held-out accuracy")
    plots.draw_panels(panels, folder / "curve.png", "GRPO step")
    several = {"before": [], "after": []}
    for row in answers:
        if row["mode"] == "several":
            several[row["model"]].append(row)
    shown = [scene for scene in scenes if scene is not None]  # others are left out: --skip-bad
    sheets.before_after(shown, several).save(folder / "rollouts.png")
    print(plots.demo_table(table))
    print(f"in {folder}: curve.png, rollouts.png, answers.jsonl")


# ---- §4 curves and pictures, the mean of checkpoints, the command line ---------------------------
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
    page = sheets.rollouts(run, steps, groups)
    path = plots.picture_path(out, run / "samples.png")
    page.save(path)
    print(f"samples of {run}, {page.width} x {page.height} pixels, in {path}")


def average(models: list[Path], /, out: Out) -> None:
    """The uniform mean of Hugging Face checkpoints of one run, added in fp32 [OVR §4.1].

    `out` holds the first one's other files. It appears by one rename: whole or not at all.
    """
    write_average(models, Path(out))
    print(f"the mean of {len(models)} checkpoints is in {out}")


def main(arguments: list[str] | None = None) -> None:
    commands = (demo, run, metrics, behaviours, plot, show, curriculum, average)
    named = {command.__name__: command for command in commands}
    try:
        tyro.extras.subcommand_cli_from_dict(named, args=arguments, description=__doc__)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"eval.py: {error}") from None


if __name__ == "__main__":
    main()
    fsdp.end_process()
