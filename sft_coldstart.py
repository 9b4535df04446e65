"""Stage 1, the cold start: supervised fine-tuning on prompt → response, before any reinforcement.

  python sft_coldstart.py                  the tiny stand-in learns the answer's form
  torchrun --nproc_per_node=8 sft_coldstart.py --data traces.jsonl      GPUs, OVR's settings

[OVR §3.1] tunes the language model alone (--train llm) on text-only reasoning traces; --train all
also tunes vision tower and merger, which the tiny stand-in needs: it starts from random weights.

A sample is a packed group with one completion: the prompt is masked from the loss, positions
restart with each sample, and no sample sees another (qwen_vl.py §3, §4). Text-only and image
samples mix freely.
"""
import math
from dataclasses import dataclass
from typing import Literal

import grpo_vl
import qwen_vl
import rewards
import sampler
from sampler import Completion, Group


@dataclass(frozen=True)
class Config:
    """Every option of the cold start."""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # hub id, local directory, tiny or tiny-untied
    # FILE.jsonl[:weight] or synthetic:TASK?…
    data: tuple[str, ...] = ("synthetic:counting?size=644x476&objects=2-10",)
    fields: str = ""  # names of fields in the data, e.g. question=problem,response=solution
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
    weight_decay: float = 0.0  # AdamW weight decay
    max_norm: float = 1.0  # gradient norm is clipped to this
    micro_tokens: int = 16384  # tokens of a packed micro-batch
    checkpointing: bool = True  # compute activations again in the backward pass
    offload: bool = False  # keep sharded weights and optimizer in host memory
    timeout: int = 3600  # seconds a rank waits for the others
    kv_gb: float = 8.0  # memory for keys and values while evaluating, GiB a rank
    seed: int = 0  # of data order and tiny weights
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    resume: Literal["auto", "never"] = "auto"  # from the newest checkpoint in --out
    eval_every: int = 0  # steps between evaluations on held-out samples; 0 is off
    eval_data: tuple[str, ...] = ()  # held-out data; default: the held-out split of --data
    eval_samples: int = 200  # held-out samples
    eval_tokens: int = 768  # longest completion when evaluating

    def __post_init__(self):
        sampler.check_options(self)


PRESETS = {
    "ovr-coldstart": dict(data=("traces:cold_start.jsonl",)),  # the defaults are OVR's
    "tiny": dict(
        model="tiny", data=(sampler.WORLD,), train="all", batch=32, steps=500, lr=1e-3,
        schedule="constant", max_tokens=256, eval_every=100, eval_tokens=24, checkpointing=False,
        micro_tokens=4096,
    ),
}


def response_tokens(run, sample) -> list[int]:
    """The response to learn, with its stop token: the data's own, else the reference answer."""
    text = sample.response
    if text is None:
        text = rewards.reference(
            sample.task, sample.answer, sample.question, think=run.config.think)
    tokens = [*run.tokenizer.encode(text, add_special_tokens=False), run.special.im_end]
    if run.special.banned_V[tokens].any():
        raise ValueError(f"sample {sample.id}: its response holds an image or video placeholder")
    if len(tokens) > run.config.max_tokens:
        raise ValueError(
            f"sample {sample.id}: its response has {len(tokens)} tokens, --max-tokens is "
            f"{run.config.max_tokens}; raise it or drop the sample"
        )
    return tokens


def sft_step(run, step: int) -> dict:
    """−Σ log π(response token | prompt, response so far) / all response tokens of the batch."""
    config, ranks, groups = run.config, run.processes, []
    for draw in range(run.cursor + ranks.rank, run.cursor + config.batch, ranks.world):
        sample = run.data[draw]
        response = Completion(response_tokens(run, sample))
        groups.append(Group(grpo_vl.make_prompt(run, sample), [response]))
    run.cursor += config.batch
    targets = sum(ranks.gather(sum(len(group.completions[0].tokens) for group in groups)))
    total = 0.0
    for pack in qwen_vl.pack_for_ranks(groups, config.micro_tokens, run.special, ranks):
        logp_S, _ = run.policy(pack)
        loss = -logp_S.sum() / targets
        (loss * ranks.world).backward()  # FSDP averages over ranks; targets counts them all
        total += loss.item()
    grad_norm = grpo_vl.optimizer_step(run, step)
    return {"step": step, "loss": sum(ranks.gather(total)), "tokens": targets,
            "grad_norm": grad_norm, "lr": grpo_vl.learning_rate(config, step), "cursor": run.cursor}


def main(arguments: list[str] | None = None) -> None:
    config = sampler.parse_config(Config, arguments, PRESETS, __doc__)
    processes = grpo_vl.start_processes(config.timeout)
    run = grpo_vl.prepare(config, processes, config.model, freeze_vision=config.train == "llm")
    grpo_vl.train(run, sft_step, eval_tokens=config.eval_tokens, seconds=config.seconds)
    sampler.leave()


if __name__ == "__main__":
    main()
