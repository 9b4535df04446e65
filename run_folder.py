"""What lies under --out? Configuration, metrics, checkpoints, samples/, model/.

    config.json      every option; --config FILE replays it
    metrics.jsonl    one object a step
    checkpoint-N/    weights, optimizer and place in the data after N steps: the run goes on from it
    samples/         some rollouts, as text and with their images
    model/           the trained model in Hugging Face's format, once the run has finished

§1 is this folder ours? · §2 checkpoints · §3 the log · §4 samples and the exported model
"""
import contextlib
import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as dist_state
from tqdm import tqdm

import lora
import pictures
import rewards
from measures import symptoms
from qwen_vl import Group
from tiny import TINY

MISSING = "not known to that version"
# Options that do not change what is learned: a resumed run may have others than before.
FREE = {
    "steps", "seconds", "out", "resume", "log", "keep", "save_every", "max_bad_steps", "skip_bad",
    "eval_every", "eval_data", "eval_samples", "eval_tokens", "blind", "pictures_every",
    "entropy_every", "timeout", "kv_gb", "max_prompt", "micro_tokens", "checkpointing",
    "checkpoint_every", "keep_attention", "offload", "graphs", "compile", "deterministic", "check",
    "plan", "export"}


def say(sentence: str) -> None:
    """A line to the user on rank 0, above the progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(sentence, file=sys.stderr)


# §1 ────────────────────────────── is this folder ours? ──────────────────────────────────────
def saved_config(folder: Path) -> dict | None:
    """The options of the run in this folder; None where no run has been started.

    Errors: SystemExit if the folder holds something that is no run.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if not name.startswith(".") and not name.endswith(".log")]
    if not others:
        return None
    saved = {}
    if "config.json" in others:
        saved = json.loads((folder / "config.json").read_text())
    if "out" not in saved or "data" not in saved:  # a model's config.json has neither
        raise SystemExit(f"--out {folder} holds something that is no run of this script "
                         f"({', '.join(others[:4])}): choose a new folder")
    return saved


def changed_options(saved: dict, config) -> list[str]:
    """Of the options that change what is learned, those that differ, each with both values."""
    now = json.loads(json.dumps(asdict(config)))  # tuples as lists, as they were saved
    free = set(FREE)
    if now["schedule"] != "constant":  # the learning rate of a step depends on the last one
        free.remove("steps")
    if "batch" in now:  # the cold start's limit refuses responses, and cuts none
        free.add("max_tokens")
    changes = []
    for name in now.keys() - free:
        if saved.get(name, MISSING) != now[name]:
            flag = "--" + name.replace("_", "-")
            changes.append(f"{flag} was {saved.get(name, MISSING)!r} and is {now[name]!r}")
    return sorted(changes)


def claim(config) -> bool:
    """Whether --out is new or may be gone on with; False if its run is finished, which is said.

    Errors: SystemExit if the folder holds something else, or a run with other options.
    """
    folder = Path(config.out)
    saved = saved_config(folder)
    if saved is None:
        return True
    checkpoints = find_checkpoints(folder)
    unknown = sorted(saved.keys() - asdict(config).keys())
    if unknown:
        raise SystemExit(f"--out {folder} holds a run of another script or version, with options "
                         f"{', '.join(unknown)}: choose a new folder")
    if config.resume == "never" and checkpoints:
        raise SystemExit(f"--resume never, but {checkpoints[-1]} exists: choose another --out")
    changes = changed_options(saved, config)
    if changes:
        raise SystemExit(f"--out {folder} holds a run with other options: {'; '.join(changes)}. "
                         f"Choose another --out, or go on with --config {folder}/config.json")
    if not checkpoints:
        return not has_model(folder)
    state = json.loads((checkpoints[-1] / "state.json").read_text())
    seconds = getattr(config, "seconds", math.inf)
    ended_early = seconds < math.inf and saved["seconds"] == seconds
    if state.get("finished") and (state["step"] >= config.steps or ended_early):
        limit = "--steps" if state["step"] >= config.steps else "--seconds"
        say(f"{folder} is finished: {state['step']} steps, the model is in {folder}/model. Raise "
            f"{limit} to go on (under a constant schedule), or choose another --out")
        return False
    return True


def has_model(folder: Path) -> bool:
    """Says that a run without checkpoints is finished, if it is: it cannot be gone on with."""
    if not (folder / "model").exists():
        return False
    say(f"{folder} is finished, the model is in {folder}/model; there is no checkpoint to go on "
        "from: choose another --out")
    return True


# §2 ──────────────────────────────────── checkpoints ─────────────────────────────────────────
def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint-N folders, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(folder: Path, policy, optimizer, state: dict, keep: int) -> None:
    """Sharded weights and AdamW state. One rename makes it appear: it is whole or not there.

    Errors: SystemExit on every rank if one cannot write; the earlier checkpoints stay.
    """
    final = folder / f"checkpoint-{state['step']}"
    if as_rank_0_sees(final.exists()):  # a step has but one state
        return
    partial = final.with_suffix(".partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    trouble = None
    try:
        model, optim = dist_state.get_state_dict(policy, optimizer)
        dcp.save({"model": model, "optimizer": optim}, checkpoint_id=partial)
        if first:
            about = {"ranks": dist.get_world_size(), "shapes": shapes_of(policy)}
            (partial / "state.json").write_text(json.dumps(state | about))
            partial.rename(final)
    except (OSError, CheckpointException) as error:
        trouble = str(error)
    troubles = [None] * dist.get_world_size()
    dist.all_gather_object(troubles, trouble)
    if any(troubles):
        shutil.rmtree(partial, ignore_errors=True)
        raise SystemExit(f"{final} could not be written, earlier checkpoints are whole: {troubles}")
    if first:
        for old in find_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def mark_finished(checkpoint: Path) -> None:
    """Note in a checkpoint that its run needs no further step. Rank 0 calls it."""
    state = json.loads((checkpoint / "state.json").read_text())
    write_whole(checkpoint / "state.json", json.dumps(state | {"finished": True}))


def shapes_of(policy) -> dict:
    return {name: list(p.shape) for name, p in policy.named_parameters()}


def load_checkpoint(path: Path, policy, optimizer) -> dict:
    """Restore weights and AdamW state, whatever the number of ranks that saved them.

    Errors: SystemExit naming a parameter that is another one there.
    """
    state = json.loads((path / "state.json").read_text())
    here, there = shapes_of(policy), state["shapes"]
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise SystemExit(f"{path} is of another architecture: {name} is {here.get(name)} in "
                             f"--model and {there.get(name)} there; choose another --out")
    model, optim = dist_state.get_state_dict(policy, optimizer)
    saved = {"model": model, "optimizer": optim}
    # A parameter that had no gradient yet (a tower that has seen no image) has no state there.
    dcp.load(saved, checkpoint_id=path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    dist_state.set_state_dict(
        policy, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, parameter in policy.named_parameters():
        if f"optimizer.state.{name}.step" not in known:
            optimizer.state.pop(parameter, None)
    return state


def resume(config, policy, optimizer) -> dict:
    """{"step", "cursor", "seconds", "unlogged"}: steps done, draws consumed and time taken, of the
    newest checkpoint in --out; and the metrics of its last step, where the run ended before they
    were logged.

    What a killed run logged after that checkpoint is done again, so it leaves metrics.jsonl.
    """
    folder, ranks = Path(config.out), dist.get_world_size()
    found = as_rank_0_sees(find_checkpoints(folder))
    state = {"step": 0, "cursor": 0, "ranks": ranks}
    if found:
        state = load_checkpoint(found[-1], policy, optimizer)
        say(f"going on from {found[-1]}, {state['step']} of {config.steps} steps done")
    if state["ranks"] != ranks:
        say(f"{found[-1]} was saved by {state['ranks']} ranks, here are {ranks}: weights and "
            "optimizer are the same, but sums run in another order")
    lines = whole_lines(folder / "metrics.jsonl")[: state["step"]]
    if as_rank_0_sees(len(lines) == state["step"]):
        state["unlogged"] = None
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(asdict(config), indent=2))
        write_whole(folder / "metrics.jsonl", "".join(lines))
    return state


def as_rank_0_sees(value):
    """Rank 0's value on every rank: file systems that nodes share may show each its own state."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, if there is one, without a last one that a kill has cut."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def write_whole(path: Path, text: str) -> None:
    """The file has its old content or all of the new one, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)


# §3 ────────────────────────────────────── the log ───────────────────────────────────────────
class RunLog:
    """Rank 0's record: metrics.jsonl, flushed each step; a progress bar; --log's tracker; and every
    ten steps what looks sick."""

    def __init__(self, config):
        path = Path(config.out) / "metrics.jsonl"
        self.history = [json.loads(line) for line in path.read_text().splitlines()]
        self.file = path.open("a")
        self.track = open_tracker(config)
        self.bar = tqdm(desc=path.parent.name, initial=len(self.history), total=config.steps)

    def add(self, metrics: dict) -> None:
        """Log one step. A number that is not finite becomes null, since JSON has no NaN."""
        finite = {n: v for n, v in metrics.items() if not isinstance(v, float) or math.isfinite(v)}
        self.history.append(dict.fromkeys(metrics) | finite)
        print(json.dumps(self.history[-1]), file=self.file, flush=True)
        self.track(finite)
        shown = {n: f"{finite[n]:.3f}" for n in ("reward", "loss", "length") if n in finite}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if len(self.history) % 10 == 0:
            for sentence in symptoms(self.history):
                say(f"step {metrics['step']}: {sentence}")


def open_tracker(config):
    """A function that takes a step's metrics: to Weights & Biases, to TensorBoard, or nowhere.

    Errors: SystemExit naming the package to install.
    """
    if not config.log:
        return lambda metrics: None
    try:
        if config.log == "wandb":
            import wandb
            return wandb.init(project="grpo-vl", dir=config.out, config=asdict(config)).log
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(f"--log {config.log}: pip install {config.log} ({error})") from None
    writer = SummaryWriter(config.out)

    def add_scalars(metrics: dict) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, metrics["step"])

    return add_scalars


# §4 ─────────────────────────── samples and the exported model ───────────────────────────────
def save_rollouts(out: Path, step: int, groups: list[Group]) -> None:
    """Four groups under samples/: step-N.json, a row a completion; of each group the image, and the
    image with the true boxes and those of its best completion."""
    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for group in groups[:4]:
        sample = group.sample
        image = f"step-{step}-{group.draw}.png" if sample.images else None
        if sample.images:
            sample.images[0].save(folder / image)
            best = max(group.completions, key=lambda completion: completion.reward).text
            said = rewards.parse_places(sample.task, best, sample.image_size)
            picture = pictures.draw(
                sample.images[0], predicted=said, true=sample.answer, caption=sample.question)
            picture.save(folder / f"step-{step}-{group.draw}-best.png")
        for completion in group.completions:
            rows.append({
                "step": step, "draw": group.draw, "id": sample.id, "task": sample.task,
                "question": sample.question, "answer": sample.answer, "image": image,
                "image_size": sample.image_size, "text": completion.text,
                "truncated": completion.truncated, "reward": completion.reward,
                "parts": completion.parts})
    (folder / f"step-{step}.json").write_text(json.dumps(rows, indent=1))


@contextlib.contextmanager
def appearing(folder: Path):
    """A new folder to write to, which then takes the place of `folder` by one rename."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in partial.iterdir():  # safetensors are written for their owner alone
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def export(folder: Path, policy, weights: dict, tokenizer, source: str) -> None:
    """Write a Hugging Face checkpoint; every rank calls it, rank 0 writes.

    weights: {name in the policy: whole weight} on rank 0, by fsdp.full_state_dict. Written in
    bf16 on GPUs, fp32 on CPU, with the image processor of `source` (a hub id or directory), so that
    `from_pretrained` and vLLM load the folder.
    """
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

    if dist.get_rank() == 0:
        dtype = torch.bfloat16 if policy.banned_V.is_cuda else torch.float32
        state = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in weights.items()}
        if policy.model.config.tie_word_embeddings:  # else it depends on the number of ranks
            state.pop("lm_head.weight", None)
        images = processing.Qwen2VLImageProcessorPil
        processor = images() if source in TINY else images.from_pretrained(source)
        with appearing(folder) as partial:
            policy.model.save_pretrained(partial, state_dict=state)
            processor.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    dist.barrier()


def export_adapter(folder: Path, policy, tensors: dict, source: str) -> None:
    """Write the adapters alone, as PEFT reads them; every rank calls it, rank 0 writes.

    tensors: {name in the policy: whole A or B} on rank 0, by fsdp.adapter_state_dict.
    """
    if dist.get_rank() == 0:
        with appearing(folder) as partial:
            lora.save_adapter(partial, policy, tensors, source)
    dist.barrier()
