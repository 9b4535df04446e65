"""GRPO on Qwen2.5-VL, top to bottom: sample groups → reward → advantage → clipped loss → step.

  python grpo_vl.py                             no GPU: the tiny stand-in, cold start included
  torchrun --nproc_per_node=8 grpo_vl.py        GPUs: Qwen2.5-VL-3B counts shapes in drawn scenes
  torchrun --nproc_per_node=8 grpo_vl.py --data my.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct

§1 config · §2 group sampling · §3 rewards → advantages · §4 token log-probs · §5 loss ·
§6 train_step · §7 metrics · §8 main
[PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, 2507.05255 · [DSM] DeepSeekMath,
2402.03300 · [DAPO] 2503.14476 · [DRG] Dr. GRPO, 2503.20783 · [GSPO] 2507.18071 · [RLOO] 2402.14740.
Shapes: P prompts, G completions a prompt, B = P·G rollouts, T tokens (padded), S scored tokens.

DEVIATION D1: OVR trains with PPO and a critic (γ = λ = 1, so A_t = R − V(s_t)). Here the mean of
the group stands in V's place, as in GRPO, and no critic is trained.
DEVIATION D2: Perception-R1's grounding, counting and OCR rows come from Qwen2-VL-2B, which answers
in 0–1000. Here Qwen2.5-VL answers every task in pixels of the resized image.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data as datasets
import fsdp
import policy
import qwen_vl
import run_folder
import training
from policy import pad_BT, scatter_BT
from qwen_vl import Group
from sampler import keyed_uniforms
from tiny import WORLD
from training import Run, draw_groups, learning_rate, optimizer_step, unless_interrupted


# §1 ───────────────────────────────────────── config ─────────────────────────────────────────
@dataclass(frozen=True)
class Config:
    """Every option of a run. The run folder's config.json replays it: --config FILE."""

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # hub id, local directory or tiny
    # files and drawn worlds, each with an optional :weight
    data: tuple[str, ...] = ("synthetic:counting?size=644x476&objects=2-10",)
    fields: str = ""  # names of the data's fields, e.g. question=problem,answer=solution
    skip_bad: int = 0  # bad rows to leave out and list, instead of stopping
    check: bool = False  # list each fault of --data as file:line, images too, and stop
    out: str = "runs/grpo"  # run folder
    cold_start: str = ""  # run folder of the cold start to begin from; run first if missing
    system_prompt: str = qwen_vl.SYSTEM  # system turn [PR1 code: this one]
    think: bool = False  # <think>…</think><answer>…</answer> [PR1 T5: hurts perception]
    min_pixels: int = 56 * 56  # least area of a resized image [PR1 code: 3136]
    max_pixels: int = 1_000_000  # largest area of a resized image [PR1 code: 1000000]
    max_prompt: int = 2048  # longest prompt, tokens; never truncated [PR1 code: 2048]
    prompts: int = 16  # prompts a step, all ranks [PR1 code: 14; OVR §4.1: 512]
    group: int = 8  # G, completions a prompt [PR1 §4.3: 8; OVR §4.1: 16]
    max_tokens: int = 768  # longest completion [PR1 §4.3: 2048, code: 768; OVR §4.1: 24k]
    max_tokens_at: tuple[str, ...] = ()  # later limits [OVR §4.1: 300:32768 700:49152]
    temperature: float = 1.0  # of sampling and of the scored π [PR1 §4.3, OVR §4.1: 1.0]
    kv_gb: float = 8.0  # memory for keys and values while sampling, GiB a rank
    reward: str = ""  # path.py:function in place of rewards.score, same arguments
    reward_options: str = "{}"  # JSON for the reward, e.g. {"iou_power": 2}
    overlong: Literal["zero", "keep", "mask", "soft"] = "zero"  # truncated ones [OVR: zero]
    overlong_buffer: int = 128  # soft: tokens over which the penalty grows [DAPO §3.4]
    scale: Literal["group", "batch", "none"] = "group"  # std of [OVR: batch; DRG: none]
    std: Literal["sample", "population"] = "sample"  # over G−1 or G [PR1 code: sample]
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of all or of the others [RLOO]
    dynamic_sampling: int = 0  # rounds to replace groups of equal rewards [DAPO §3.2]
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # average over tokens [DSM: grpo]
    ratio: Literal["token", "sequence"] = "token"  # importance ratio [GSPO: sequence]
    clip_low: float = -1.0  # ε below 1; −1: 0.2 [OVR §3.2], sequences 3e-4 [GSPO §5.1]
    clip_high: float = -1.0  # ε above 1; −1: 0.2 [DAPO: 0.28], sequences 4e-4 [GSPO §5.1]
    beta: float = 0.0  # KL weight; 0: no reference model [PR1 §4.3: 0.04; OVR §3.2: 0]
    kl: Literal["k1", "k2", "k3"] = "k3"  # k2, k3: in the loss; k1: in the reward [PR1: k3]
    inner_steps: int = 1  # µ, optimizer steps on a batch [PR1, OVR: 1]
    tis: float = 0.0  # cap of the weight π_old/π_sampler; 0: off
    steps: int = 500  # batches to train on [PR1 code: 357–7900; OVR §4.1: 900]
    lr: float = 1e-6  # AdamW learning rate [PR1 §4.3, OVR §4.1: 1e-6]
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # [OVR; PR1: linear]
    warmup: int = 0  # steps of linear warm-up [PR1 code: 0; OVR §4.1: 50]
    beta2: float = 0.999  # AdamW β₂ [PR1 code: 0.999; OVR §4.1: 0.95]
    max_norm: float = 1.0  # clip of the gradient's norm [PR1 code: 1.0]
    max_bad_steps: int = 5  # skipped steps in a row (gradient not finite) that end the run
    freeze_vision: bool = False  # train neither vision tower nor merger [PR1: trains all]
    micro_tokens: int = 16384  # tokens of a packed micro-batch
    checkpointing: bool = True  # recompute activations in the backward pass [PR1 code: on]
    offload: bool = False  # sharded weights and optimizer in host memory
    graphs: bool = True  # sample by captured CUDA graphs
    timeout: int = 3600  # seconds ranks wait for each other; above the longest rollout
    seed: int = 0  # of data order, sampling noise and tiny weights [PR1 code: 42]
    save_every: int = 100  # steps between checkpoints [PR1 code: 100]
    keep: int = 2  # newest checkpoints to keep
    resume: Literal["auto", "never"] = "auto"  # from the newest checkpoint in --out
    log: Literal["", "wandb", "tensorboard"] = ""  # where metrics go besides metrics.jsonl
    eval_every: int = 0  # steps between held-out evaluations; 0: never [OVR: 10]
    eval_data: tuple[str, ...] = ()  # held-out data; default: the held-out split of --data
    eval_samples: int = 200  # held-out samples
    pictures_every: int = 50  # steps between saved rollouts and pictures; 0: never
    plan: str = ""  # 8x80: print what each of 8 GPUs of 80 GiB would hold, and stop

    def __post_init__(self):
        training.check_options(self)
        for name, of_sequence in (("clip_low", 3e-4), ("clip_high", 4e-4)):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, 0.2 if self.ratio == "token" else of_sequence)


PR1 = dict(  # what its tasks share and no default has yet  [PR1 §4.3, code]
    model="Qwen/Qwen2.5-VL-3B-Instruct", prompts=14, beta=0.04, schedule="linear", seed=42)
PRESETS = {  # of grpo_vl.py: differences from its defaults
    "tiny": dict(  # what a machine without a GPU trains in minutes; no paper's values
        model="tiny", data=(WORLD,), cold_start="runs/coldstart", max_tokens=24, prompts=32,
        steps=400, lr=1e-4, warmup=10, schedule="linear", reward_options='{"iou_power": 2}',
        eval_every=50, checkpointing=False, micro_tokens=4096),
    # steps: samples used / 14 prompts a step [PR1 T7, code]; max_tokens [PR1 code]
    "pr1-grounding": PR1 | dict(data=("refcoco-pr1:refcoco_train.json",), steps=357),
    "pr1-counting": PR1 | dict(data=("pixmo-pr1:pixmo_count_train.json",), steps=714),
    "pr1-ocr": PR1 | dict(data=("fox:page_ocr_train.json",), steps=357, max_tokens=2048),
    "pr1-detection": PR1 | dict(steps=7857, max_tokens=2048,
        data=("coco:annotations/instances_train2017.json?folder=../train2017",)),
    "ovr-rl": dict(  # [OVR §3.2, §4.1]; the loss as in its base, Open-Reasoner-Zero [ORZ code]
        model="Qwen/Qwen2.5-VL-7B-Instruct", data=("ovr_rl.jsonl",), cold_start="runs/coldstart",
        prompts=512, group=16, scale="batch", loss="dapo", warmup=50, beta2=0.95, steps=900,
        max_tokens=24 * 1024, max_tokens_at=("300:32768", "700:49152"), eval_every=10)}


def longest(config: Config, step: int) -> int:
    """The length limit at a step. OVR raises it when the mean length stalls [OVR §4.1]."""
    later = [pair.split(":") for pair in config.max_tokens_at]
    return max([config.max_tokens, *(int(limit) for at, limit in later if int(at) <= step)])


# §2 ────────────────────────────────────── group sampling ────────────────────────────────────
def sample_groups(run: "Run", step: int, attempt: int = 0) -> list[Group]:
    """This rank's next groups, G scored completions each. Noise is keyed by sample and attempt."""
    config, limit = run.config, longest(run.config, step)
    groups = draw_groups(run, config.prompts)
    keys = [group.sample.id + f"/{attempt}" * (attempt > 0) for group in groups]
    noise = [keyed_uniforms(config.seed, step, key, config.group, limit) for key in keys]
    prompts = [group.prompt for group in groups]
    sampled = run.sampler.generate(prompts, noise, limit, config.temperature)
    for group, completions in zip(groups, sampled):
        group.completions = completions
    score_groups(run, step, groups)
    return groups


# §3 ──────────────────────────────── rewards → advantages ────────────────────────────────────
def score_groups(run: "Run", step: int, groups: list[Group]) -> None:
    """Fill in text, reward and the reward's named parts of every completion."""
    config, options = run.config, json.loads(run.config.reward_options)
    options |= {"think": True} if config.think else {}
    for sample, c in [(group.sample, c) for group in groups for c in group.completions]:
        c.text = qwen_vl.decode(run.tokenizer, run.special, c.tokens)
        options["truncated"] = c.truncated
        score = run.reward(sample.task, c.text, sample.answer, sample.image_size, **options)
        c.reward, c.parts = float(getattr(score, "total", score)), getattr(score, "parts", {})
        if c.truncated and config.overlong == "zero":
            c.reward = 0.0
        if config.overlong == "soft":  # 0, then linearly to −1 over the buffer [DAPO Eq. 13]
            over = len(c.tokens) - (longest(config, step) - config.overlong_buffer)
            c.reward -= max(0.0, over / config.overlong_buffer)


def group_advantages(rewards_PG, *, scale="group", std="sample", baseline="mean", eps=1e-4):
    """How much better than its group: advantages_PG, fp32, from the global batch's rewards_PG.
    Equal rewards give zeros; G = 1: `mean` gives 0, `leave_one_out` the reward itself."""
    if (scale not in ("group", "batch", "none") or std not in ("sample", "population")
            or baseline not in ("mean", "leave_one_out")):
        raise ValueError(f"scale={scale!r}, std={std!r}, baseline={baseline!r}: see their options")
    rewards_PG, size = rewards_PG.float(), rewards_PG.shape[1]
    if baseline == "mean":  # b_i = 1/G · Σ_j r_j  [DSM §4.1.2]
        baseline_PG = rewards_PG.mean(1, keepdim=True)
    else:  # b_i = 1/(G−1) · Σ_{j≠i} r_j  [RLOO]
        baseline_PG = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / max(size - 1, 1)
    advantages_PG = rewards_PG - baseline_PG
    dims, count = (1, size) if scale == "group" else ((0, 1), rewards_PG.numel())
    # A_i = (r_i − b_i) / (std(r) + ε)  [DSM §4.1.2]; Dr. GRPO leaves the division out [DRG §3.2]
    if scale != "none" and min(count, rewards_PG.numel()) > 1:
        std_PG = rewards_PG.std(dims, correction=int(std == "sample"), keepdim=True)
        advantages_PG = advantages_PG / (std_PG + eps)
    equal_P1 = (rewards_PG.amax(1) - rewards_PG.amin(1) < 1e-6)[:, None]  # rounding is no signal
    return advantages_PG.masked_fill(equal_P1, 0.0) if size > 1 else advantages_PG


def collect_groups(run: "Run", step: int) -> tuple[list[Group], dict[int, list[float]]]:
    """This rank's scored groups, and {draw: its G rewards} of all ranks in global order.

    Dynamic sampling [DAPO §3.2] replaces groups of equal rewards, in a bounded number of rounds.
    """
    config, groups, rewards_of = run.config, [], {}
    for attempt in range(config.dynamic_sampling + 1):
        new = unless_interrupted(run, sample_groups, run, step, attempt)
        if config.dynamic_sampling:
            new = [group for group in new if max(group.rewards) - min(group.rewards) > 1e-6]
        groups += new
        for part in run.processes.gather({group.draw: group.rewards for group in new}):
            rewards_of |= part
        if len(rewards_of) >= config.prompts:
            break
    rewards_of = dict(sorted(rewards_of.items())[: config.prompts])
    return [group for group in groups if group.draw in rewards_of], rewards_of


# §4 ───────────────────────────────────── token log-probs ────────────────────────────────────
def reference_logps(run: "Run", packs: list[policy.Pack], shape) -> torch.Tensor | None:
    """log π_ref of every rollout token [B, T]; None without a reference model (β = 0)."""
    with torch.no_grad():
        return run.reference and sum(
            scatter_BT(run.reference(pack, run.config.temperature)[0], pack, shape)
            for pack in packs)


# §5 ─────────────────────────────────────────── loss ─────────────────────────────────────────
def policy_loss(logp_BT, old_logp_BT, advantages_B, mask_BT, *, loss="grpo", ratio="token",
                clip_low=0.2, clip_high=0.2, beta=0.0, kl="k3", ref_logp_BT=None,
                sampler_logp_BT=None, tis_cap=None, norm=None):
    """The clipped objective with its KL term: (loss, stats), stats being name → [sum, count].

    norm: the denominator over the global batch (sequences; tokens; sequences · longest length), so
    that micro-batches and ranks add up to one gradient; without it the batch at hand counts.
    On policy every ratio is 1 and no clip active: the loss −mean(A) is about 0, but its gradient
    −mean(A·∇log π) is not.
    """
    shapes = [tuple(x.shape) for x in (logp_BT, old_logp_BT, mask_BT)]
    if len(set(shapes)) > 1 or len(advantages_B) != len(logp_BT):
        raise ValueError(f"logp, old_logp, mask are {shapes}, advantages {len(advantages_B)} rows")
    if loss not in ("grpo", "dapo", "dr_grpo") or ratio not in ("token", "sequence"):
        raise ValueError(f"loss={loss!r}, ratio={ratio!r}: see --loss and --ratio for the choices")
    if (beta and ref_logp_BT is None) or (tis_cap and sampler_logp_BT is None):
        raise ValueError("beta needs ref_logp_BT, tis_cap needs sampler_logp_BT")
    mask_BT, advantages_B1 = mask_BT.bool(), advantages_B[:, None]
    length_B = mask_BT.sum(1).clamp(min=1)
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0)
    if ratio == "sequence":  # s_i = (π(o_i) / π_old(o_i))^(1/|o_i|)  [GSPO Eq. 7]
        log_ratio_BT = (log_ratio_BT.sum(1) / length_B)[:, None].expand_as(log_ratio_BT)
    # ℓ_t = −min(r·A, clip(r, 1−ε_low, 1+ε_high)·A),  r = π/π_old  [DSM Eq. 3; OVR §3.2]
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    stats = {"ratio": ratio_BT.detach(),
             "clip_low": (ratio_BT < 1 - clip_low) & (advantages_B1 < 0),
             "clip_high": (ratio_BT > 1 + clip_high) & (advantages_B1 > 0)}
    if tis_cap:  # · min(π_old/π_sampler, C), constant: rollouts came from slightly other numbers
        loss_BT = loss_BT * (old_logp_BT - sampler_logp_BT).exp().clamp(max=tis_cap).detach()
    if beta:  # + β·KL(π ‖ π_ref)
        kl_BT = kl_estimate(torch.where(mask_BT, logp_BT - ref_logp_BT, 0.0), kl)
        loss_BT, stats["kl"] = loss_BT + beta * kl_BT, kl_BT.detach()
    tokens = mask_BT.sum()
    sums = {n: torch.stack([x.where(mask_BT, 0).sum(), tokens]) for n, x in stats.items()}
    return average(torch.where(mask_BT, loss_BT, 0.0), length_B, tokens, loss, norm), sums


def average(loss_BT, length_B, tokens, loss: str, norm: int | None) -> torch.Tensor:
    """What "the mean" of ℓ is: the one thing in which the losses differ."""
    if loss == "grpo":  # 1/B · Σ_i 1/|o_i| · Σ_t ℓ_t  [DSM Eq. 3]
        return (loss_BT.sum(1) / length_B).sum() / (norm or len(loss_BT))
    if loss == "dapo":  # 1/Σ|o_i| · Σ_i Σ_t ℓ_t  [DAPO Eq. 8]
        return loss_BT.sum() / (norm or tokens.clamp(min=1))
    return loss_BT.sum() / (norm or loss_BT.numel())  # 1/(B·T_max) · Σ_i Σ_t ℓ_t  [DRG §3.2]


def kl_estimate(log_ratio: torch.Tensor, kind: str) -> torch.Tensor:
    """KL(π ‖ π_ref) estimated from d = log π − log π_ref at tokens drawn from π. Shape of d."""
    if kind == "k2":  # ½·d², whose gradient is that of the reverse KL
        return 0.5 * log_ratio.square()
    if kind == "k3":  # e^(−d) + d − 1  [DSM Eq. 4]; past e^20 only overflow is left
        return (-log_ratio).clamp(max=20).exp() + log_ratio - 1
    raise ValueError(f"kl={kind!r} in the loss: choose k2 or k3, k1's gradient has mean zero")


# §6 ─────────────────────────────────────── train_step ───────────────────────────────────────
def train_step(run: Run, step: int) -> dict:
    """One batch of GRPO [DSM Algorithm 1]. Returns the step's metrics, the same on every rank."""
    config, ranks, clock, sums = run.config, run.processes, [time.perf_counter()], {}
    # 1. Sample G completions o_1 … o_G of each prompt from π_θ and score them.
    groups, rewards_of = collect_groups(run, step)
    rollouts = [completion for group in groups for completion in group.completions]
    clock.append(time.perf_counter())

    # 2. Pack the rollouts. Masks come from lengths: the stop token is trained, padding is not.
    packs = policy.pack_for_ranks(groups, config.micro_tokens, run.special, ranks)
    kept = [not (c.truncated and config.overlong == "mask") for c in rollouts]
    mask_BT = pad_BT([[k] * len(c.tokens) for k, c in zip(kept, rollouts)]).bool().to(ranks.device)
    sampler_logp_BT = pad_BT([c.logps for c in rollouts]).to(ranks.device)

    # 3. log π_ref, if β > 0. With k1 the KL joins the reward.
    ref_logp_BT = reference_logps(run, packs, mask_BT.shape)
    if config.beta and config.kl == "k1":
        subtract_kl(run, groups, rewards_of, ((sampler_logp_BT - ref_logp_BT) * mask_BT).sum(1))

    # 4. Advantages A_i from the rewards of the whole global batch; this rank's rows of them.
    rewards_PG = torch.tensor(list(rewards_of.values())).view(len(rewards_of), config.group)
    how = {name: getattr(config, name) for name in ("scale", "std", "baseline")}
    advantages_PG = group_advantages(rewards_PG, **how)
    own_P = [list(rewards_of).index(group.draw) for group in groups]
    advantages_B = advantages_PG[own_P].flatten().to(ranks.device)

    # 5. One normaliser, counted over the global batch before it is cut into micro-batches.
    how = loss_options(config, step, rewards_PG.numel(), sum(ranks.gather(int(mask_BT.sum()))))

    # 6. µ optimizer steps; the first pass's own log-probs are π_old.
    old_logp_BT = None
    for inner in range(config.inner_steps):
        pass_logp_BT = torch.zeros_like(sampler_logp_BT)
        for pack in packs:
            logp_S, entropy_S = run.policy(pack, config.temperature)
            logp_BT = scatter_BT(logp_S, pack, mask_BT.shape)
            here_BT = scatter_BT(torch.ones_like(logp_S), pack, mask_BT.shape).bool() & mask_BT
            pass_logp_BT += logp_BT.detach()
            loss, stats = policy_loss(
                logp_BT, old_logp_BT if inner else logp_BT.detach(), advantages_B, here_BT,
                ref_logp_BT=ref_logp_BT, sampler_logp_BT=sampler_logp_BT, **how)
            (loss * ranks.world).backward()  # FSDP averages over ranks; norm counts them all
            add_sums(sums, stats, entropy=(entropy_S.sum(), len(entropy_S)),
                     loss=(loss.detach(), 1 / len(packs) / ranks.world))
        old_logp_BT = old_logp_BT if inner else pass_logp_BT
        grad_norm = optimizer_step(run, step)
    clock.append(time.perf_counter())

    # 7. The sampler's copy of the weights follows; its log-probs should equal the trainer's.
    run.sampler.refresh(run.policy)
    gap_BT = (old_logp_BT - sampler_logp_BT).abs() * mask_BT
    add_sums(sums, {}, sampler_gap=(gap_BT.sum(), mask_BT.sum()))
    clock.append(time.perf_counter())
    if ranks.rank == 0 and config.pictures_every and step % config.pictures_every == 0:
        run_folder.save_rollouts(Path(config.out), step, groups)
    return step_metrics(run, step, rollouts, rewards_PG, sums, clock) | {"grad_norm": grad_norm}


def subtract_kl(run: Run, groups: list[Group], rewards_of: dict, kl_B: torch.Tensor) -> None:
    """r ← r − β·Σ_t (log π − log π_ref), in this rank's table of all ranks' rewards."""
    kl_PG = kl_B.view(-1, run.config.group).tolist()
    for part in run.processes.gather({g.draw: kl_G for g, kl_G in zip(groups, kl_PG)}):
        for draw, kl_G in part.items():
            rewards_of[draw] = [r - run.config.beta * k for r, k in zip(rewards_of[draw], kl_G)]


def loss_options(config: Config, step: int, sequences: int, tokens: int) -> dict:
    """policy_loss's options; sequences and tokens of the global batch make the normaliser."""
    counts = {"grpo": sequences, "dapo": tokens, "dr_grpo": sequences * longest(config, step)}
    options = {n: getattr(config, n) for n in ("loss", "ratio", "clip_low", "clip_high", "kl")}
    beta = 0.0 if config.kl == "k1" else config.beta
    return options | {"beta": beta, "tis_cap": config.tis, "norm": max(counts[config.loss], 1)}


def add_sums(sums: dict, stats: dict, **pairs) -> None:
    """Add [sum, count] tensors, or (sum, count) pairs, to the running ones."""
    for name, pair in {**stats, **pairs}.items():
        sums[name] = sums.get(name, 0) + torch.tensor([float(x) for x in pair], dtype=torch.float64)


# §7 ────────────────────────────────── metrics ─────────────────────────────────────────────
def step_metrics(run: Run, step: int, rollouts, rewards_PG, sums: dict, clock: list) -> dict:
    """One flat object for metrics.jsonl, means over all ranks. README explains each name."""
    for c in rollouts:
        parts = {f"reward/{name}": (value, 1) for name, value in c.parts.items()}
        add_sums(sums, parts, length=(len(c.tokens), 1), truncated=(c.truncated, 1))
    totals: dict[str, torch.Tensor] = {}
    for part in run.processes.gather(sums):
        add_sums(totals, part)
    groups = len(rewards_PG)
    rewards_PG = rewards_PG if groups else torch.zeros(1, 1)  # dynamic sampling may find nothing
    spread_P = rewards_PG.amax(1) - rewards_PG.amin(1)
    seconds = zip(("sample", "train", "refresh"), clock, clock[1:])
    return {
        "step": step, "reward": rewards_PG.mean().item(), "groups": groups,
        "reward_std": rewards_PG.std(1, correction=0).mean().item(),
        "zero_variance": (spread_P < 1e-6).float().mean().item(),
        **{name: (pair[0] / pair[1].clamp(min=1e-9)).item() for name, pair in totals.items()},
        "lr": learning_rate(run.config, step), "cursor": run.cursor,
        **{f"seconds/{name}": after - before for name, before, after in seconds}}


# §8 ────────────────────────────────────────── main ─────────────────────────────────────────
def run_script(name: str, *arguments: str) -> None:
    """Another script of this folder, in a process of its own and alone."""
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    script = Path(__file__).with_name(name)
    subprocess.run([sys.executable, script, *arguments], env=alone, check=True)


def ensure_cold_start(config: Config) -> str:
    """The checkpoint to begin with. A missing cold start is run first, by rank 0 alone."""
    model = Path(config.cold_start) / "model"
    if config.cold_start and not model.exists() and os.environ.get("RANK", "0") == "0":
        print(f"no cold start in {config.cold_start}: running sft_coldstart.py first", flush=True)
        how = ["--preset", "tiny"] if config.model == "tiny" else ["--model", config.model]
        run_script("sft_coldstart.py", *how, "--out", config.cold_start)
    while config.cold_start and not model.exists():  # other ranks wait; it appears by one rename
        time.sleep(1)
    return str(model) if config.cold_start else config.model


def main(arguments: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    config = training.parse_config(Config, arguments, PRESETS, __doc__, gpu)
    if config.plan:
        return fsdp.plan(config, longest(config, config.steps))
    if config.check:  # faults and exit status 1, or nothing and 0
        sys.exit("\n".join(datasets.check(config.data, **training.data_options(config))) or 0)
    source = ensure_cold_start(config)
    how = {name: getattr(config, name) for name in ("freeze_vision", "beta", "reward")}
    with training.one_run():
        ranks = fsdp.start_processes(config.timeout)
        run = training.prepare(config, ranks, source, **how)
        training.train(run, train_step, eval_tokens=config.max_tokens)


if __name__ == "__main__":
    main()
