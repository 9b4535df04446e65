"""Stage 1, the cold start: supervised fine-tuning on prompt → response, before any reinforcement.

  python sft_coldstart.py                  the tiny stand-in learns the answer's form
  torchrun --nproc_per_node=8 sft_coldstart.py --data traces.jsonl      GPUs, OVR's settings

[OVR §3.1] tunes the language model alone (--train llm) on text-only reasoning traces; --train all
also tunes vision tower and merger, which the tiny stand-in needs: it starts from random weights.

A sample is a packed group with one completion: the prompt is masked from the loss, positions
restart with each sample, and no sample sees another (qwen_vl.py §3). Texts and images mix freely.
"""
import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch

import data as datasets
import fsdp
import policy
import qwen_vl
import rewards
import training
from qwen_vl import Completion
from tiny import WORLD


@dataclass(frozen=True)
class Config:
    """Every option of the cold start."""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # hub id, local directory, tiny or tiny-untied
    # FILE.jsonl[:weight] or synthetic:TASK?…
    data: tuple[str, ...] = ("synthetic:counting?size=644x476&objects=2-10",)
    fields: str = ""  # names of fields in the data, e.g. question=problem,response=solution
    skip_bad: int = 0  # bad rows to leave out and list, instead of stopping
    check: bool = False  # list each fault of --data as file:line, images too, and stop
    out: str = "runs/coldstart"  # run folder
    train: Literal["llm", "all"] = "llm"  # llm: vision tower and merger stay [OVR §3.1]
    system_prompt: str = qwen_vl.SYSTEM  # system turn
    think: bool = False  # prompts and reference answers with <think>…</think><answer>…</answer>
    min_pixels: int = 56 * 56  # images are resized once to at least this area
    max_pixels: int = 1_000_000  # and at most this one
    max_prompt: int = 2048  # longest prompt in tokens; longer ones are an error
    max_tokens: int = 16384  # longest response in tokens; longer ones are an error [OVR §4.1: 64k]
    batch: int = 640  # samples an optimizer step, all ranks together [OVR §4.1: 640]
    steps: int = 960  # optimizer steps [OVR Fig. 3a: about 960 in 5 epochs]
    seconds: float = math.inf  # stop after so many seconds of training
    lr: float = 2e-4  # AdamW learning rate [OVR §4.1: 2e-4]
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # [OVR: not given]
    warmup: int = 50  # steps of linear warm-up [OVR: not given]
    beta2: float = 0.999  # AdamW β₂
    max_norm: float = 1.0  # gradient norm is clipped to this
    max_bad_steps: int = 5  # skipped steps in a row (gradient not finite) that end the run
    micro_tokens: int = 16384  # tokens of a packed micro-batch
    checkpointing: bool = True  # compute activations again in the backward pass
    offload: bool = False  # keep sharded weights and optimizer in host memory
    graphs: bool = True  # evaluate by captured CUDA graphs
    timeout: int = 3600  # seconds a rank waits for the others
    kv_gb: float = 8.0  # memory for keys and values while evaluating, GiB a rank
    seed: int = 0  # of data order and tiny weights
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    resume: Literal["auto", "never"] = "auto"  # from the newest checkpoint in --out
    log: Literal["", "wandb", "tensorboard"] = ""  # where metrics go besides metrics.jsonl
    eval_every: int = 0  # steps between evaluations on held-out samples; 0 is off
    eval_data: tuple[str, ...] = ()  # held-out data; default: the held-out split of --data
    eval_samples: int = 200  # held-out samples
    eval_tokens: int = 768  # longest completion when evaluating

    def __post_init__(self):
        training.check_options(self)


PRESETS = {
    "ovr-coldstart": dict(data=("traces:cold_start.jsonl",)),  # the defaults are OVR's
    "tiny": dict(
        model="tiny", data=(WORLD,), train="all", batch=32, steps=500, lr=1e-3,
        schedule="constant", max_tokens=256, eval_every=100, eval_tokens=24, checkpointing=False,
        micro_tokens=4096),
}


def response_tokens(run, sample) -> list[int]:
    """The response to learn, with its stop token: the data's own, else the reference answer."""
    about = sample.task, sample.answer, sample.question
    own = sample.response is not None
    text = sample.response if own else rewards.reference(*about, think=run.config.think)
    tokens = [*run.tokenizer.encode(text, add_special_tokens=False), run.special.im_end]
    if run.special.banned_V[tokens].any():
        raise datasets.DataError(f"sample {sample.id}: its response holds an image placeholder")
    if len(tokens) > run.config.max_tokens:
        raise datasets.DataError(
            f"sample {sample.id}: its response has {len(tokens)} tokens, --max-tokens is "
            f"{run.config.max_tokens}; raise it or drop the sample")
    return tokens


def sft_step(run, step: int) -> dict:
    """−Σ log π(response token | prompt, response so far) / all response tokens of the batch."""
    config, ranks = run.config, run.processes
    groups = training.draw_groups(run, config.batch)
    for group in groups:
        group.completions = [Completion(response_tokens(run, group.sample))]
    targets = sum(ranks.gather(sum(len(group.completions[0].tokens) for group in groups)))
    total = 0.0
    for pack in policy.pack_for_ranks(groups, config.micro_tokens, run.special, ranks):
        logp_S, _ = run.policy(pack)
        loss = -logp_S.sum() / targets
        (loss * ranks.world).backward()  # FSDP averages over ranks; targets counts them all
        total += loss.item()
    grad_norm = training.optimizer_step(run, step)
    return {"step": step, "loss": sum(ranks.gather(total)), "tokens": targets,
            "grad_norm": grad_norm, "lr": training.learning_rate(config, step),
            "cursor": run.cursor}


def main(arguments: list[str] | None = None) -> None:
    config = training.parse_config(Config, arguments, PRESETS, __doc__, torch.cuda.is_available())
    if config.check:  # faults and exit status 1, or nothing and 0
        sys.exit("\n".join(datasets.check(config.data, **training.data_options(config))) or 0)
    with training.one_run():
        processes = fsdp.start_processes(config.timeout)
        run = training.prepare(config, processes, config.model, freeze_vision=config.train == "llm")
        training.train(run, sft_step, eval_tokens=config.eval_tokens, seconds=config.seconds)


if __name__ == "__main__":
    main()
