"""What lies under --out? config, metrics and what they say, checkpoints, samples/, model/.

§1 checkpoints and resume · §2 metrics · §3 samples and the exported model
"""
import json
import math
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

import pictures
import rewards
from qwen_vl import Group
from tiny import TINY

SYMPTOMS = (  # metric; sick by its mean over ten steps, and over the first ten; what to try
    ("zero_variance", lambda now, first: now > 0.8,
     "most groups have equal rewards: try --dynamic-sampling 3 or other prompts"),
    ("entropy", lambda now, first: now < 0.1 * first,
     "hardly any variety is left: try a lower --lr, --clip-high 0.28, --beta 0.04"),
    ("sampler_gap", lambda now, first: now > 0.05, "sampler and trainer disagree: try --tis 2"),
    ("truncated", lambda now, first: now > 0.5, "answers are cut: try a higher --max-tokens"),
    ("kl", lambda now, first: now > max(1, 10 * first), "try a higher --beta or a lower --lr"),
    ("reward/format", lambda now, first: now < first - 0.2, "look at samples/, lower --lr"))


def symptoms(history: list[dict]) -> list[str]:
    """What looks sick in the last ten of these steps' metrics, in words, and what to try."""
    found = []
    for name, sick, advice in SYMPTOMS:
        values = [row[name] for row in history if row.get(name) is not None]
        now, first = (sum(part) / max(len(part), 1) for part in (values[-10:], values[:10]))
        if values and sick(now, first):
            found.append(f"{name} is {now:.3g}, at first {first:.3g}: {advice}")
    return found


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint-N folders, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(folder: Path, policy, optimizer, state: dict, keep: int) -> None:
    """Sharded weights and AdamW state. One rename makes it appear: it is whole or not there.

    Errors: SystemExit on every rank if one cannot write; the earlier checkpoints stay.
    """
    final, troubles = folder / f"checkpoint-{state['step']}", [None] * dist.get_world_size()
    partial_folder, first, trouble = final.with_suffix(".partial"), dist.get_rank() == 0, None
    if final.exists():  # a step has but one state
        return
    if first:
        shutil.rmtree(partial_folder, ignore_errors=True)
    dist.barrier()
    try:
        model, optim = dist_state.get_state_dict(policy, optimizer)
        dcp.save({"model": model, "optimizer": optim}, checkpoint_id=partial_folder)
        state = state | {"ranks": len(troubles), "shapes": shapes_of(policy)}
        if first:
            (partial_folder / "state.json").write_text(json.dumps(state))
            partial_folder.rename(final)
    except (OSError, CheckpointException) as error:
        trouble = str(error)
    dist.all_gather_object(troubles, trouble)
    if any(troubles):
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise SystemExit(f"{final} could not be written, earlier checkpoints are whole: {troubles}")
    for old in find_checkpoints(folder)[:-keep] if first else ():
        shutil.rmtree(old)


def shapes_of(policy) -> dict:
    return {name: list(p.shape) for name, p in policy.named_parameters()}


def load_checkpoint(path: Path, policy, optimizer) -> dict:
    """Restore weights and AdamW state, whatever the number of ranks that saved them.

    Errors: SystemExit naming a parameter that is another one there.
    """
    state, here = json.loads((path / "state.json").read_text()), shapes_of(policy)
    for name in sorted(here.keys() | state["shapes"].keys()):
        if here.get(name) != (there := state["shapes"].get(name)):
            raise SystemExit(f"{path} is of another architecture: {name} is {here.get(name)} in "
                             f"--model and {there} there; choose another --out")
    saved = dict(zip(("model", "optimizer"), dist_state.get_state_dict(policy, optimizer)))
    dcp.load(saved, checkpoint_id=path)
    how = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    dist_state.set_state_dict(policy, optimizer, **how)
    return state


def resume(config, policy, optimizer) -> dict:
    """{"step", "cursor"}: steps done and draws consumed, of the newest checkpoint in --out.

    What a killed run logged after that checkpoint is done again, so it leaves metrics.jsonl.
    """
    folder, ranks = Path(config.out), dist.get_world_size()
    state, found = {"step": 0, "cursor": 0, "ranks": ranks}, find_checkpoints(folder)
    if found and config.resume == "never":
        raise SystemExit(f"--resume never, but {found[-1]} exists: choose another --out")
    if found:
        state = load_checkpoint(found[-1], policy, optimizer)
    if dist.get_rank() == 0:
        if state["ranks"] != ranks:
            print(f"{found[-1]} was saved by {state['ranks']} ranks, here are {ranks}: weights and "
                  "optimizer are the same, but sums run in another order", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        for path, text in ((log, "".join(lines[: state["step"]])),
                           (folder / "config.json", json.dumps(asdict(config), indent=2))):
            path.with_suffix(".partial").write_text(text)
            path.with_suffix(".partial").rename(path)
    return state


class RunLog:
    """Rank 0's record: metrics.jsonl, flushed each step, a progress bar, --log's tracker, and every
    ten steps what `diagnose`, a function of all metrics so far, has to say."""

    def __init__(self, config, diagnose):
        self.diagnose, self.track = diagnose, open_tracker(config)
        path = Path(config.out) / "metrics.jsonl"
        self.history = [json.loads(line) for line in path.read_text().splitlines()]
        self.file, done = path.open("a"), len(self.history)
        self.bar = tqdm(desc=path.parent.name, initial=done, total=config.steps)

    def add(self, metrics: dict) -> None:
        finite = {n: v for n, v in metrics.items() if v not in (math.inf, -math.inf) and v == v}
        self.history.append(dict.fromkeys(metrics) | finite)  # JSON has no NaN: null
        print(json.dumps(self.history[-1]), file=self.file, flush=True)
        self.track(finite)
        shown = {n: f"{finite[n]:.3f}" for n in ("reward", "loss", "length") if n in finite}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        for sentence in self.diagnose(self.history) if len(self.history) % 10 == 0 else ():
            tqdm.write(f"step {metrics['step']}: {sentence}", file=sys.stderr)


def open_tracker(config):
    """A function that takes a step's metrics: to Weights & Biases, to TensorBoard, or nowhere."""
    if config.log == "wandb":
        import wandb
        return wandb.init(project="grpo-vl", dir=config.out, config=asdict(config)).log
    if config.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(config.out)
        return lambda metrics: [writer.add_scalar(n, v, metrics["step"])
                                for n, v in metrics.items() if isinstance(v, (int, float))]
    return lambda metrics: None


def export(folder, policy, tokenizer, source: str) -> None:
    """Write the sharded policy as a Hugging Face checkpoint; every rank calls it, rank 0 writes.

    bf16 on GPUs, fp32 on CPU, with the image processor of `source` (a hub id or directory), so that
    `from_pretrained` and vLLM load the folder. One rename makes it appear.
    """
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

    options = dist_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = dist_state.get_model_state_dict(policy, options=options)
    if dist.get_rank() == 0:
        partial_folder = folder.with_suffix(".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        dtype = torch.bfloat16 if policy.banned_V.is_cuda else torch.float32
        state = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in full.items()}
        policy.model.save_pretrained(partial_folder, state_dict=state)
        images = processing.Qwen2VLImageProcessorPil
        for part in (images() if source in TINY else images.from_pretrained(source), tokenizer):
            part.save_pretrained(partial_folder)
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
    dist.barrier()


def save_rollouts(out: Path, step: int, groups: list[Group]) -> None:
    """Four groups as text, and their best completions as pictures with the true boxes: samples/."""
    folder, rows = out / "samples", []
    folder.mkdir(parents=True, exist_ok=True)
    for s, group in [(group.sample, group) for group in groups[:4]]:
        about = dict(id=s.id, task=s.task, question=s.question, answer=s.answer)
        rows += [about | {"text": c.text, "reward": c.reward} for c in group.completions]
        best = max(group.completions, key=lambda c: c.reward).text
        said = rewards.parse_boxes(best) or rewards.parse_points(best)
        if s.images:
            picture = pictures.draw(s.images[0], predicted=said, true=s.answer, caption=s.question)
            picture.save(folder / f"step-{step}-{group.draw}.png")
    (folder / f"step-{step}.json").write_text(json.dumps(rows, indent=1))
