"""Stage 1, the cold start: supervised fine-tuning on prompt → response, before any reinforcement.

  python sft_coldstart.py                  no GPU: base/ learns to add step by step, from text alone
  torchrun --nproc_per_node=2 sft_coldstart.py --preset base      all drawn tasks, over an hour
  torchrun --nproc_per_node=8 sft_coldstart.py --data traces.jsonl      GPUs, OVR's settings

[OVR §3.1] tunes the language model alone (--train llm) on text-only reasoning traces; --train all
also tunes vision tower and merger, which a model with random weights needs: --preset base.

A sample is a packed group with one completion: the prompt is masked from the loss, positions
restart with each sample, and no sample sees another (packing.py §2). Texts and images mix freely.
"""
import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data as datasets
import fsdp
import packing
import rewards
import run_folder
import tiny
import training
from options import Options, check_data, parse_config, without_effect
from presets import COLD_START as PRESETS
from prompts import think_of
from qwen_vl import Completion
from training import Run


@dataclass(frozen=True)
class Config(Options):
    """Every option of the cold start. Other defaults than in reinforcement learning come first."""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # hub id, local directory, tiny or tiny-untied
    out: str = "runs/coldstart"  # run folder
    max_tokens: int = 16384  # longest response in tokens; longer ones are an error [OVR §4.1: 64k]
    steps: int = 960  # optimizer steps [OVR Fig. 3a: about 960 in 5 epochs]
    lr: float = 2e-4  # AdamW learning rate [OVR §4.1: 2e-4]
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # [OVR: not given]
    warmup: int = 50  # steps of linear warm-up [OVR: not given]
    save_every: int = 200  # steps between checkpoints
    # all: half of the samples plain, a quarter with each form, so that the model knows all three
    think: Literal["no", "before", "after", "all"] = "no"
    after: str = ""  # preset whose run this one continues; it is run first if its folder is missing
    train: Literal["llm", "all"] = "llm"  # llm: vision tower and merger stay [OVR §3.1]
    batch: int = 640  # samples an optimizer step, all ranks together [OVR §4.1: 640]
    seconds: float = math.inf  # stop after so many of training, resumed or not
    eval_tokens: int = 768  # longest completion when evaluating

    def __post_init__(self):
        super().__post_init__()
        if self.after and self.after not in PRESETS:
            raise ValueError(f"--after is {self.after!r}; choose from {', '.join(PRESETS)}")
        if self.lora and self.train == "all":
            raise ValueError("--lora leaves the vision tower as it is: give --train llm")


def response_tokens(run: Run, sample) -> list[int]:
    """The response to learn, with its stop token: the data's own, else the reference answer."""
    text = sample.response
    if text is None:
        text = rewards.reference(sample.task, sample.answer, sample.question,
                                 think=think_of(run.config, sample.id))
    tokens = [*run.tokenizer.encode(text, add_special_tokens=False), run.special.im_end]
    if run.special.banned_V[tokens].any():
        raise datasets.DataError(f"sample {sample.id}: its response holds an image placeholder")
    if len(tokens) > run.config.max_tokens:
        raise datasets.DataError(
            f"sample {sample.id}: its response has {len(tokens)} tokens, --max-tokens is "
            f"{run.config.max_tokens}; raise it or drop the sample")
    return tokens


def sft_step(run: Run, step: int) -> dict:
    """−Σ log π(response token | prompt, response so far) / all response tokens of the batch."""
    config, ranks = run.config, run.processes
    groups = training.together(run, lambda: labelled_groups(run))
    targets = sum(ranks.gather(sum(len(group.completions[0].tokens) for group in groups)))
    total = torch.zeros((), device=ranks.device)
    for pack in packing.pack_for_ranks(groups, config.micro_tokens, run.special, ranks):
        logp_S, _ = run.policy(pack, entropy=False)
        loss = -logp_S.sum() / targets
        (loss * ranks.world).backward()  # FSDP averages over ranks; targets counts them all
        total += loss.detach()
    grad_norm = fsdp.clip_gradients(run.policy, config.max_norm).item()
    training.optimizer_step(run, step, grad_norm)
    return {"step": step, "loss": sum(ranks.gather(total.item())), "tokens": targets,
            "grad_norm": grad_norm, "lr": training.learning_rate(config, step),
            "cursor": run.cursor}


def labelled_groups(run: Run) -> list:
    """This rank's next samples, each a prompt with the one completion to imitate."""
    groups = training.draw_groups(run, run.config.batch)
    for group in groups:
        group.completions = [Completion(response_tokens(run, group.sample))]
    return groups


def train(config: Config, ranks: fsdp.Processes, stopped=None, source: str | None = None) -> bool:
    """All steps that are left; whether the run is finished (False: it was told to stop).

    stopped: as `training.watch_signals` returned it. source: the checkpoint to begin with, if it
    is another than --model.
    """
    run = training.prepare(
        config, ranks, source or config.model, freeze_vision=config.train == "llm", imitates=True)
    progress = training.Progress(
        run, lambda step: config.eval_tokens, config.seconds, stopped=stopped)
    for step in progress.steps():
        try:
            metrics = sft_step(run, step)
        except training.ABANDONED as error:  # nothing of this step has touched the weights
            progress.abandon(error)
        else:
            progress.add(metrics)
    finished = progress.finish()
    del run, progress
    gc.collect()  # hooks hold modules in cycles, and a run may follow in this process
    return finished


def train_after(config: Config, ranks: fsdp.Processes, stopped) -> bool:
    """`train`, after the run that this one continues."""
    source = None
    if config.after:
        source = model_of(Config(**PRESETS[config.after]), ranks, stopped)
        if source is None:
            return False
    return train(config, ranks, stopped, source)


def model_of(config: Config, ranks: fsdp.Processes, stopped) -> str | None:
    """The model of this run, which is run first if it is missing; None: it was told to stop."""
    folder = Path(config.out)
    model = ranks.gather(find_model(folder))[0]  # rank 0's look at the file system
    if model is None:
        run_folder.say(f"no cold start in {folder}: running it first")
        run_folder.claim(config)
        if not train_after(config, ranks, stopped):
            return None
        model = folder / "model"
    return str(model)


def model_for(config, ranks: fsdp.Processes, stopped) -> str | None:
    """The checkpoint that grpo_vl.py begins with: --cold-start's, else --model.

    A tiny model's cold start is run if it is missing. None: it was told to stop.

    Errors: SystemExit if a real model's cold start is missing, or another run lies in its place.
    """
    if not config.cold_start:
        return config.model
    folder = Path(config.cold_start)
    model = ranks.gather(find_model(folder))[0]  # rank 0's look at the file system
    if model is not None:
        return str(model)
    if config.model not in (tiny.BASE, *tiny.TINY):
        raise SystemExit(f"there is no cold start in {folder}: python sft_coldstart.py --model "
                         f"{config.model} --data … --out {folder} makes one")
    options = PRESETS["tiny"] | {
        "model": config.model, "out": str(folder), "seed": config.seed, "timeout": config.timeout}
    return model_of(Config(**options), ranks, stopped)


def find_model(folder: Path) -> Path | None:
    """The model of a finished cold start, given its run folder or the model's own; None: no run.

    Errors: SystemExit if the folder holds something else.
    """
    for model in (folder / "model", folder):
        if list(model.glob("*.safetensors")):
            return model
    run_folder.saved_config(folder)
    return None


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(Config, arguments, PRESETS, __doc__, torch.cuda.is_available())
    if config.check:
        return check_data(config)
    if not run_folder.claim(config):
        return None
    for sentence in without_effect(config):
        run_folder.say(f"note: {sentence}")
    stopped = training.watch_signals()
    with training.one_run():
        ranks = fsdp.start_processes(config.timeout, deterministic=config.deterministic)
        train_after(config, ranks, stopped)


if __name__ == "__main__":
    main()
    fsdp.end_process()
