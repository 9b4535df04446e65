"""GRPO on Qwen2.5-VL, top to bottom: sample groups → reward → advantage → clipped loss → step.

  python grpo_vl.py                             no GPU: the tiny stand-in, cold start included
  torchrun --nproc_per_node=8 grpo_vl.py        GPUs: Qwen2.5-VL-3B counts shapes in drawn scenes
  torchrun --nproc_per_node=8 grpo_vl.py --data my.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct

§1 config · §2 sharding by FSDP2 · §3 samples → prompts · §4 group sampling · §5 rewards →
advantages · §6 token log-probs · §7 loss · §8 train_step · §9 logs and pictures · §10 main
[PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, 2507.05255 · [DSM] DeepSeekMath,
2402.03300 · [DAPO] 2503.14476 · [DRG] Dr. GRPO, 2503.20783 · [GSPO] 2507.18071 · [RLOO] 2402.14740.
Shapes: P prompts, G completions a prompt, B = P·G rollouts, T tokens (padded), S scored tokens.

DEVIATION D1: OVR trains with PPO and a critic (γ = λ = 1, so A_t = R − V(s_t)). Here the mean of
the group stands in V's place, as in GRPO, and no critic is trained.
DEVIATION D2: Perception-R1's grounding, counting and OCR rows come from Qwen2-VL-2B, which answers
in 0–1000. Here Qwen2.5-VL answers every task in pixels of the resized image.
"""
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dist_state
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import data as datasets
import qwen_vl
import rewards
import sampler
from qwen_vl import Policy, Prompt, SpecialIds, pad_BT, scatter_BT
from rewards import learning_rate, longest
from sampler import Group, Interrupted, Processes, Sampler, keyed_uniforms, start_processes


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
        datasets.check_options(self)
        for name, of_sequence in (("clip_low", 3e-4), ("clip_high", 4e-4)):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, 0.2 if self.ratio == "token" else of_sequence)


# §2 ───────────────────────────────────────── FSDP2 ──────────────────────────────────────────
def shard(policy: Policy, processes: Processes, *, offload: bool = False) -> Policy:
    """fully_shard by hand: vision tower, each decoder layer, and a root with all the rest.

    fp32 master weights are cut over all ranks; a unit gathers a bf16 copy (fp32 on CPU) to compute
    with; gradients are reduced in fp32. lm_head stays in the root: ranks run it unequally often.
    """
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    how = {"mesh": mesh} | ({"offload_policy": CPUOffloadPolicy()} if offload else {})
    if processes.device.type == "cuda":
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for unit in [policy.vision, *policy.decoder.layers, policy]:
        fully_shard(unit, **how)
    return policy


def load_policy(source: str, processes: Processes, config, *, freeze_vision=False, dtype=None):
    """(sharded policy, tokenizer, special ids). Rank 0 reads the weights and broadcasts them."""
    model, tokenizer = qwen_vl.load(source, weights=processes.rank == 0, seed=config.seed)
    special = SpecialIds.read(tokenizer, model.config)
    policy = Policy(model, special.banned_V, checkpointing=config.checkpointing)
    policy.vision.requires_grad_(not freeze_vision)
    for parameter in policy.parameters():  # fp32 if trained: bf16 loses most updates of lr 1e-6
        parameter.data = parameter.data.to(dtype or torch.float32)
    full = policy.state_dict() if processes.rank == 0 else {}
    shard(policy, processes, offload=config.offload)  # moves weights and buffers to the device
    how = dist_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dist_state.set_model_state_dict(policy, full, options=how)
    return policy, tokenizer, special


# §3 ─────────────────────────────────── samples → prompts ────────────────────────────────────
def make_prompt(run: "Run", sample: datasets.Sample) -> Prompt:
    """The paper's prompt for the sample's task, tokenised with its images. Never truncated."""
    text = rewards.prompt(sample.task, sample.question, think=run.config.think)
    system, most = sample.system or run.config.system_prompt, run.config.max_prompt
    prompt = qwen_vl.encode_chat(run.tokenizer, run.special, text, sample.images, system)
    if len(prompt.ids) > most:
        raise datasets.DataError(f"sample {sample.id}: its prompt has {len(prompt.ids)} tokens, "
                                 f"--max-prompt is {most}; raise it, or lower --max-pixels")
    return prompt


# §4 ────────────────────────────────────── group sampling ────────────────────────────────────
def draw_groups(run: "Run", count: int) -> list[Group]:
    """This rank's share of the next draws; a thread decodes the ones after them meanwhile."""
    def prepare(first):
        torch.set_num_threads(1)  # this thread's: a second OpenMP team slows the main thread's
        draws = range(first + run.processes.rank, first + count, run.processes.world)
        drawn = [(run.data[draw], draw) for draw in draws]
        return [Group(make_prompt(run, s), [], sample=s, draw=draw) for s, draw in drawn]

    for first in (run.cursor, run.cursor + count):
        if first not in run.ahead:
            run.ahead[first] = run.thread.submit(prepare, first)
    groups = run.ahead.pop(run.cursor).result()
    run.drawn = [group.sample.id for group in groups]
    run.cursor += count
    return groups


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


def unless_interrupted(run: "Run", work, *arguments):
    """work(*arguments); if any rank was told to stop meanwhile, all of them raise Interrupted."""
    outcome = None
    with contextlib.suppress(Interrupted):
        outcome = work(*arguments)
    if any(run.processes.gather(run.sampler.interrupted())):
        raise Interrupted
    return outcome


# §5 ──────────────────────────────── rewards → advantages ────────────────────────────────────
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


# §6 ───────────────────────────────────── token log-probs ────────────────────────────────────
def reference_logps(run: "Run", packs: list[qwen_vl.Pack], shape) -> torch.Tensor | None:
    """log π_ref of every rollout token [B, T]; None without a reference model (β = 0)."""
    with torch.no_grad():
        return run.reference and sum(
            scatter_BT(run.reference(pack, run.config.temperature)[0], pack, shape)
            for pack in packs)


# §7 ─────────────────────────────────────────── loss ─────────────────────────────────────────
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


# §8 ─────────────────────────────────────── train_step ───────────────────────────────────────
@dataclass
class Run:
    """Everything that a step reads or changes."""

    config: Any
    processes: Processes
    policy: Policy
    reference: Policy | None  # the frozen initial model, if β > 0
    tokenizer: Any
    special: SpecialIds
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    data: datasets.Mixture
    eval_data: datasets.Mixture
    reward: Any
    cursor: int = 0  # draws consumed so far
    ahead: dict = field(default_factory=dict)  # first draw: the batch that the thread prepares
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    drawn: list = field(default_factory=list)  # ids of the batch at hand, for reports


def train_step(run: Run, step: int) -> dict:
    """One batch of GRPO [DSM Algorithm 1]. Returns the step's metrics, the same on every rank."""
    config, ranks, clock, sums = run.config, run.processes, [time.perf_counter()], {}
    # 1. Sample G completions o_1 … o_G of each prompt from π_θ and score them.
    groups, rewards_of = collect_groups(run, step)
    rollouts = [completion for group in groups for completion in group.completions]
    clock.append(time.perf_counter())

    # 2. Pack the rollouts. Masks come from lengths: the stop token is trained, padding is not.
    packs = qwen_vl.pack_for_ranks(groups, config.micro_tokens, run.special, ranks)
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
        save_rollouts(run, step, groups)
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


def optimizer_step(run: Run, step: int) -> float:
    """Clip, step, clear; a gradient that is not finite is dropped. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), run.config.max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step)
    if torch.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm.item()


# §9 ────────────────────────────────── logs and pictures ─────────────────────────────────────
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


def evaluate(run: Run, max_tokens: int) -> tuple[list[dict], dict[str, float]]:
    """Held-out samples, greedily and at T = 1: (a row an answer, accuracy of the answers alone)."""
    ranks, rows, count = run.processes, [], min(run.config.eval_samples, len(run.eval_data))
    samples = [run.eval_data.at(i) for i in range(ranks.rank, count, ranks.world)]
    prompts = [make_prompt(run, sample) for sample in samples]
    noise = [keyed_uniforms(0, 0, f"eval {s.id}", 1, max_tokens) for s in samples]
    for mode, keyed in (("greedy", None), ("sampled", noise)):
        answers = unless_interrupted(run, run.sampler.generate, prompts, keyed, max_tokens)
        for s, (c,) in zip(samples, answers):
            text = qwen_vl.decode(run.tokenizer, run.special, c.tokens)
            right = rewards.correct(s.task, text, s.answer, s.image_size, think=run.config.think)
            about = dict(id=s.id, task=s.task, question=s.question, answer=s.answer)
            rows.append(about | {"image_size": s.image_size, "mode": mode, "completion": text,
                                 "correct": right})
    rows = [row for part in ranks.gather(rows) for row in part]
    return rows, {f"eval/{mode}": sum(row["correct"] for row in rows if row["mode"] == mode) / count
                  for mode in ("greedy", "sampled")}


def save_rollouts(run: Run, step: int, groups: list[Group]) -> None:
    """Four groups as text, and their best completions as pictures with the true boxes: samples/."""
    folder, rows = Path(run.config.out) / "samples", []
    folder.mkdir(parents=True, exist_ok=True)
    for s, group in [(group.sample, group) for group in groups[:4]]:
        about = dict(id=s.id, task=s.task, question=s.question, answer=s.answer)
        rows += [about | {"text": c.text, "reward": c.reward} for c in group.completions]
        best = max(group.completions, key=lambda c: c.reward).text
        said = rewards.parse_boxes(best) or rewards.parse_points(best)
        if s.images:
            picture = datasets.draw(s.images[0], predicted=said, true=s.answer, caption=s.question)
            picture.save(folder / f"step-{step}-{group.draw}.png")
    (folder / f"step-{step}.json").write_text(json.dumps(rows, indent=1))


# §10 ────────────────────────────────────────── main ─────────────────────────────────────────
def prepare(config, processes: Processes, source: str, *, freeze_vision=False, beta=0.0, reward=""):
    """Load, shard, and build all that a run needs; `source` is the checkpoint to begin with."""
    policy, tokenizer, special = load_policy(source, processes, config, freeze_vision=freeze_vision)
    dtype = torch.bfloat16 if processes.device.type == "cuda" else torch.float32
    reference = load_policy(source, processes, config, dtype=dtype)[0] if beta else None
    copy = Sampler(policy.model, special, device=processes.device, dtype=dtype, kv_gb=config.kv_gb,
                   graphs=config.graphs and dtype == torch.bfloat16, keep_features=freeze_vision)
    trained, betas = [p for p in policy.parameters() if p.requires_grad], (0.9, config.beta2)
    optimizer = torch.optim.AdamW(trained, betas=betas, weight_decay=0)  # [PR1, OVR: 0]
    specs = {"train": config.data, "heldout": config.eval_data or config.data}
    opened = [datasets.open_data(specs[s], split=s, **data_options(config)) for s in specs]
    return Run(config, processes, policy, reference, tokenizer, special, copy, optimizer, *opened,
               rewards.load(reward))


def data_options(config) -> dict:
    names = ("seed", "min_pixels", "max_pixels", "fields", "skip_bad")
    return {name: getattr(config, name) for name in names}


def train(run: Run, one_step, *, eval_tokens: int, seconds: float = math.inf) -> None:
    """The loop around one_step(run, step) → metrics: resume, log, evaluate, save, export.

    Told to stop (SIGTERM, Ctrl-C), it saves the last completed step and returns.
    """
    config, folder, ranks = run.config, Path(run.config.out), run.processes
    state = sampler.resume(config, run.policy, run.optimizer)
    run.cursor, bad_steps, stop, last = state["cursor"], 0, False, state["step"] >= config.steps
    run.sampler.refresh(run.policy)
    run.sampler.interrupted = sampler.watch_signals()
    log = sampler.RunLog(config, rewards.symptoms) if ranks.rank == 0 else None
    started = time.perf_counter()
    while not (stop or last or bad_steps == config.max_bad_steps):
        try:
            metrics = one_step(run, state["step"])
        except Interrupted:  # nothing of this step has touched the weights
            break
        state = {"step": state["step"] + 1, "cursor": run.cursor}
        metrics["seconds/total"] = max(ranks.gather(time.perf_counter() - started))
        last = state["step"] == config.steps or metrics["seconds/total"] > seconds
        if config.eval_every and (state["step"] % config.eval_every == 0 or last):
            run.sampler.refresh(run.policy)
            with contextlib.suppress(Interrupted):  # seen again below
                metrics |= evaluate(run, eval_tokens)[1]
        bad_steps = 0 if math.isfinite(metrics["grad_norm"]) else bad_steps + 1
        if bad_steps:  # the optimizer left this step out
            metrics["skipped_samples"] = [name for part in ranks.gather(run.drawn) for name in part]
        if log:
            log.add(metrics)
        stop = any(ranks.gather(run.sampler.interrupted()))
        if state["step"] % config.save_every == 0:
            sampler.save_checkpoint(folder, run.policy, run.optimizer, state, config.keep)
    sampler.save_checkpoint(folder, run.policy, run.optimizer, state, config.keep)
    if bad_steps == config.max_bad_steps:
        raise SystemExit(f"{bad_steps} steps in a row without a finite gradient, the last one from "
                         f"{metrics['skipped_samples']}: lower --lr or look at these samples")
    if last:
        qwen_vl.export(folder / "model", run.policy, run.tokenizer, config.model)


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
    config = datasets.parse_config(Config, arguments, rewards.PRESETS, __doc__, gpu)
    if config.plan:
        return run_script("eval.py", "plan", json.dumps(asdict(config)))
    if config.check:  # faults and exit status 1, or nothing and 0
        sys.exit("\n".join(datasets.check(config.data, **data_options(config))) or 0)
    source = ensure_cold_start(config)
    how = {name: getattr(config, name) for name in ("freeze_vision", "beta", "reward")}
    with sampler.one_run():
        run = prepare(config, start_processes(config.timeout), source, **how)
        train(run, train_step, eval_tokens=config.max_tokens)


if __name__ == "__main__":
    main()
