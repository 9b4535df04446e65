"""GRPO on Qwen2.5-VL, top to bottom: sample groups → reward → advantage → clipped loss → step.

  python grpo_vl.py                             no GPU: from base/, a tiny model that sees
  torchrun --nproc_per_node=8 grpo_vl.py        GPUs: Qwen2.5-VL-3B counts shapes in drawn scenes
  torchrun --nproc_per_node=8 grpo_vl.py --data my.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct

§1 config · §2 group sampling · §3 rewards → advantages · §4 loss · §5 train_step · §6 main
Its slow twin, one file and no flags, is naive_grpo.py: a test holds the two together.
[PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, 2507.05255 · [DSM] DeepSeekMath,
2402.03300 · [DAPO] 2503.14476 · [DRG] Dr. GRPO, 2503.20783 · [GSPO] 2507.18071 · [RLOO] 2402.14740
A tensor's last letters are its shape: P prompts of all ranks, G completions per prompt, B rollouts
of this rank, S all completion tokens of one micro-batch. A rollout is a completion, an answer; all
ranks together have N = P·G. Prompts are numbered through a run: a prompt's number is its draw. A
group is a prompt and, once they are sampled, its G completions (qwen_vl.Group).

DEVIATION D1: OVR trains with PPO and a critic (γ = λ = 1, so A_t = R − V(s_t)). Here the mean of
the group stands in V's place, as in GRPO, and no critic is trained.
DEVIATION D2: Perception-R1's grounding, counting and OCR rows come from Qwen2-VL-2B, which answers
in 0–1000. Here Qwen2.5-VL answers every task in pixels of the resized image.
"""
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import fsdp
import packing
import plan
import qwen_vl
import reward_function
import run_folder
import sft_coldstart
import training
from measures import add_sums, sampler_gap, spread, step_metrics, sum_and_count
from noise import keyed_uniforms, repeats
from options import Options, check_data, parse_config, without_effect, without_effect_in_rl
from presets import PRESETS
from qwen_vl import Group
from run_folder import say
from training import Run, draw_groups, due, learning_rate, optimizer_step


# §1 ───────────────────────────────────────── config ─────────────────────────────────────────
@dataclass(frozen=True)
class Config(Options):
    """What is set of GRPO; what the cold start has too is in options.Options. The run folder's
    config.json replays it: --config FILE."""

    cold_start: str = ""  # run folder (or model) of the cold start to begin from; run if missing
    prompts: int = 16  # prompts per step, all ranks [PR1 code: 14; OVR §4.1: 512]
    group: int = 8  # G, completions per prompt [PR1 §4.3: 8; OVR §4.1: 16]
    max_tokens_at: tuple[str, ...] = ()  # later limits [OVR §4.1: 300:32768 700:49152]
    temperature: float = 1.0  # of π, sampled from and trained [PR1 §4.3, OVR §4.1: 1.0]
    reward: str = ""  # path.py:function in place of rewards.score, same arguments
    reward_options: str = "{}"  # JSON for the reward, e.g. {"iou_power": 2}
    overlong: Literal["zero", "keep", "mask", "soft"] = "zero"  # for answers cut [OVR: zero]
    overlong_buffer: int = 128  # soft: tokens over which the penalty grows [DAPO §3.4]
    # A is divided by the std of its group, by that of the whole batch [OVR], or not at all [DRG]
    scale: Literal["group", "batch", "none"] = "group"
    std: Literal["sample", "population"] = "sample"  # over G−1 or G [PR1 code: sample]
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of all or of the others [RLOO]
    dynamic_sampling: int = 0  # rounds to replace groups of equal rewards [DAPO §3.2]
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # how tokens are averaged [DSM: grpo]
    ratio: Literal["token", "sequence"] = "token"  # importance ratio [GSPO: sequence]
    clip_low: float | None = None  # ε below 1: 0.2 [OVR §3.2], of sequences 3e-4 [GSPO §5.1]
    clip_high: float | None = None  # ε above 1: 0.2 [DAPO: 0.28], of sequences 4e-4 [GSPO §5.1]
    beta: float = 0.0  # KL weight; 0: no reference model [PR1 §4.3: 0.04; OVR §3.2: 0]
    kl: Literal["k1", "k2", "k3"] = "k3"  # k2, k3: in the loss; k1: in the reward [PR1: k3]
    inner_steps: int = 1  # µ, optimizer steps on a batch [PR1, OVR: 1]
    tis: float = 0.0  # truncated importance sampling: cap of π_old/π_sampler; 0: off
    freeze_vision: bool = False  # train neither vision tower nor merger [PR1: trains all]
    entropy_every: int = 1  # every n-th step measures the entropy; 0: none does, faster
    pictures_every: int = 50  # every n-th step saves rollouts and pictures; 0: none does
    plan: str = ""  # 8x80: print what each of 8 GPUs of 80 GiB would hold, and stop

    def __post_init__(self):
        super().__post_init__()
        if self.cold_start and Path(self.cold_start) == Path(self.out):
            raise ValueError(f"--cold-start and --out are both {self.out}: give them two folders")
        if self.overlong == "soft" and self.overlong_buffer >= self.max_tokens:
            raise ValueError(f"--overlong-buffer is {self.overlong_buffer} and --max-tokens "
                             f"{self.max_tokens}: every answer would be punished; lower the buffer")


def clip_range(config: Config) -> tuple[float, float]:
    """(ε below 1, ε above 1): the options, else the papers' values for this kind of ratio."""
    low, high = (3e-4, 4e-4) if config.ratio == "sequence" else (0.2, 0.2)
    if config.clip_low is not None:
        low = config.clip_low
    if config.clip_high is not None:
        high = config.clip_high
    return low, high


def length_limit(config: Config, step: int) -> int:
    """The longest completion at a step: --max-tokens, or what --max-tokens-at has raised it to.
    (OVR raises it when the mean length stalls [OVR §4.1]; here the steps are given.)"""
    limit = config.max_tokens
    for pair in config.max_tokens_at:
        first_step, later_limit = pair.split(":")
        if step >= int(first_step):
            limit = max(limit, int(later_limit))
    return limit


# §2 ────────────────────────────────────── group sampling ────────────────────────────────────
def collect_groups(run: Run, step: int) -> tuple[list[Group], dict[int, list[float]], dict]:
    """This rank's groups with rewards, {draw: its G rewards} of all ranks, in order of draws, and
    metrics of dynamic sampling, if it is on.

    Dynamic sampling [DAPO §3.2] replaces groups of equal rewards, in a bounded number of rounds.
    """
    config, ranks = run.config, run.processes
    groups: list[Group] = []
    rewards_of: dict[int, list[float]] = {}
    for attempt in range(config.dynamic_sampling + 1):
        # `together`: a signal or a bad sample on one rank stops all of them, and none hangs.
        # (1) This rank's share of the next P prompts.
        new = training.together(run, partial(draw_groups, run, config.prompts))
        # {draw: how many earlier draws of this batch have the same sample}
        repeat_of = repeats(ranks.merge({group.draw: group.sample.id for group in new}))
        sampling = partial(sample_groups, run, step, new, repeat_of, attempt)
        training.together(run, sampling)  # (1) their completions
        training.together(run, partial(score_groups, run, step, new))  # (2)
        if config.dynamic_sampling:
            new = [group for group in new if spread(group.rewards) > 1e-6]
        groups += new
        rewards_of |= ranks.merge({group.draw: group.rewards for group in new})
        if len(rewards_of) >= config.prompts:
            break
    counts = {}
    if config.dynamic_sampling:
        drawn = (attempt + 1) * config.prompts
        counts = {"groups_drawn": drawn, "groups_rejected": drawn - len(rewards_of)}
    # Rounds may have found more than P groups of unequal rewards: the first P draws are kept.
    rewards_of = dict(list(rewards_of.items())[: config.prompts])
    return [group for group in groups if group.draw in rewards_of], rewards_of, counts


def sample_groups(run: Run, step: int, groups: list[Group], repeat_of: dict, attempt: int) -> None:
    """(1) Sample G completions of each group's prompt.

    Sampling is by uniform numbers drawn beforehand, keyed by seed, step, sample, attempt and how
    often the batch has asked the sample before: so an answer is the same on any rank, among
    whatever other samples and after a resume.
    """
    config, limit = run.config, length_limit(run.config, step)
    noise = []
    for group in groups:
        key = group.sample.id
        if attempt > 0:
            key += f"/{attempt}"
        noise.append(keyed_uniforms(
            config.seed, step, key, config.group, limit, repeat_of[group.draw]))
    prompts = [group.prompt for group in groups]
    sampled = run.sampler.generate(prompts, noise, limit, config.temperature)
    for group, completions in zip(groups, sampled):
        group.completions = completions


# §3 ──────────────────────────────── rewards → advantages ────────────────────────────────────
def score_groups(run: Run, step: int, groups: list[Group]) -> None:
    """(2) Fill in text, reward and the reward's named parts of every completion."""
    config, limit = run.config, length_limit(run.config, step)
    options = json.loads(config.reward_options)
    if config.think != "no":
        options["think"] = config.think
    for group in groups:
        for completion in group.completions:
            completion.text = qwen_vl.decode(run.tokenizer, run.special, completion.tokens)
            score = reward_function.call_reward(
                run.reward, group.sample, completion.text, truncated=completion.truncated,
                options=options)
            run.example = group.sample.answer, completion.text
            completion.parts = {name: float(part) for name, part in score.parts.items()}
            completion.reward = shaped_reward(config, completion, score.total, limit)


def shaped_reward(config: Config, completion, reward: float, limit: int) -> float:
    """The rule's reward, as --overlong zero or soft changes it (mask acts in `rollout_weights`).

    NaN if right or wrong could not be told: then it joins no mean.
    """
    if completion.parts.get("undecided"):
        return math.nan
    if config.overlong == "zero" and completion.truncated:
        return 0.0
    if config.overlong == "soft":  # 0, then linearly to −1 over the buffer [DAPO Eq. 13]
        over = len(completion.tokens) - (limit - config.overlong_buffer)
        return reward - max(0.0, over / config.overlong_buffer)
    return reward


def group_advantages(rewards_PG, *, scale="group", std="sample", baseline="mean", eps=1e-4):
    """(3) How much better than its group: advantages_PG, fp32, from the global batch's rewards_PG.

    Equal rewards give zeros. With G = 1 the baseline is the reward (mean) or 0 (leave_one_out). NaN
    stands for a reward that could not be told (a formula too hard to compare in time): it has
    advantage 0 and counts in no mean and no std.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r}: choose group, batch or none")
    if std not in ("sample", "population") or baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"std={std!r}, baseline={baseline!r}: see --std and --baseline")
    rewards_PG = rewards_PG.double()
    known_PG = ~rewards_PG.isnan()
    batch_std = std_of(rewards_PG[known_PG], std)
    advantages_PG = torch.zeros_like(rewards_PG)
    for p, known_G in enumerate(known_PG):
        r_G = rewards_PG[p, known_G]
        size = len(r_G)
        if size == 0 or (size > 1 and r_G.max() - r_G.min() < 1e-6):  # rounding is no signal
            continue
        if baseline == "mean":  # b_i = 1/G · Σ_j r_j  [DSM §4.1.2]
            baseline_G = r_G.mean()
        else:  # b_i = 1/(G−1) · Σ_{j≠i} r_j  [RLOO]
            baseline_G = (r_G.sum() - r_G) / max(size - 1, 1)
        # A_i = (r_i − b_i) / (std(r) + eps)  [DSM §4.1.2]; without the division [DRG §3.2]
        advantage_G = r_G - baseline_G
        std_r = batch_std if scale == "batch" else std_of(r_G, std)
        if scale != "none" and std_r is not None:
            advantage_G = advantage_G / (std_r + eps)
        advantages_PG[p, known_G] = advantage_G
    return advantages_PG.float()


def std_of(rewards: torch.Tensor, kind: str) -> torch.Tensor | None:
    """The standard deviation over n−1 (sample) or n (population); None of fewer than two."""
    if len(rewards) < 2:
        return None
    return rewards.std(correction=1 if kind == "sample" else 0)


# §4 ─────────────────────────────────────────── loss ─────────────────────────────────────────
def token_weights(lengths_B, *, loss: str, max_tokens: int, norm: float | None = None):
    """(7) weight_B, float64: how much each token of rollout i counts. All that --loss changes.

    lengths_B: how many tokens of each rollout are trained on. A masked or undecided rollout has 0;
    it still counts in N (grpo, dr_grpo), but adds no tokens to Σ|o| (dapo).
    norm: the divisor, counted over all ranks, so that micro-batches add up to one gradient: N = P·G
    rollouts (1/G and the mean over prompts at once) or, for dapo, Σ|o| tokens; by default of B.
    """
    lengths_B = lengths_B.double()
    trained_B = (lengths_B > 0).double()
    if loss == "grpo":  # 1/N · Σ_i 1/|o_i| · Σ_t ℓ_t  [DSM Eq. 3]
        return trained_B / lengths_B.clamp(min=1) / (norm or len(lengths_B))
    if loss == "dapo":  # 1/Σ|o_i| · Σ_i Σ_t ℓ_t  [DAPO Eq. 8]
        return trained_B / (norm or lengths_B.sum().clamp(min=1))
    if loss == "dr_grpo":  # 1/(N·T_max) · Σ_i Σ_t ℓ_t  [DRG §3.2]
        return trained_B / (norm or len(lengths_B)) / max_tokens
    raise ValueError(f"loss={loss!r}: choose grpo, dapo or dr_grpo")


def policy_loss(logp_S, old_logp_S, advantage_S, weight_S, *, row_S=None, ratio="token",
                clip_low=0.2, clip_high=0.2, beta=0.0, kl="k3", ref_logp_S=None,
                sampler_logp_S=None, tis_cap=None):
    """The clipped objective with its KL term over the tokens of completions: (loss, stats).

    loss = Σ weight·ℓ over tokens of weight above 0; the others may hold anything. stats: name →
    tensor [sum, count] over the same tokens. row_S: the rollout of a token, for ratio="sequence".
    On policy every ratio is 1 and no clip active: with `grpo` weights and β = 0 the loss −mean(A)
    is about 0, but its gradient −mean(A·∇log π) is not, where rewards differ. Slow twin: grpo_loss
    in naive_grpo.py, a loop over rollouts, and a loop over tokens in tests/test_loss.py.
    """
    check_loss_shapes(logp_S, old_logp_S, advantage_S, weight_S)
    if ratio not in ("token", "sequence"):
        raise ValueError(f"ratio={ratio!r}: choose token or sequence")
    if ratio == "sequence" and row_S is None:
        raise ValueError("ratio='sequence' needs row_S, the rollout of each token")
    if beta and ref_logp_S is None:
        raise ValueError("beta needs ref_logp_S")
    if tis_cap and sampler_logp_S is None:
        raise ValueError("tis_cap needs sampler_logp_S")

    trained_S = weight_S > 0
    log_ratio_S = torch.where(trained_S, logp_S - old_logp_S, 0.0)
    if ratio == "sequence":  # s_i = (π(o_i) / π_old(o_i))^(1/|o_i|)  [GSPO Eq. 7]
        log_ratio_S = mean_of_row(log_ratio_S, trained_S, row_S)

    # (5) ℓ_t = −min(ρ·A, clip(ρ, 1−ε_low, 1+ε_high)·A),  ρ = π/π_old  [DSM Eq. 3; OVR §3.2]
    ratio_S = log_ratio_S.exp()
    clipped_S = ratio_S.clamp(1 - clip_low, 1 + clip_high)
    loss_S = -torch.minimum(ratio_S * advantage_S, clipped_S * advantage_S)
    per_token = {
        "ratio": ratio_S.detach(),
        "clip_low": (ratio_S < 1 - clip_low) & (advantage_S < 0),
        "clip_high": (ratio_S > 1 + clip_high) & (advantage_S > 0)}

    # Sampling computes π_old with other kernels (bf16, cached keys): π_sampler ≈ π_old. Truncated
    # importance sampling makes up for the difference: · min(π_old/π_sampler, C), a constant.
    if tis_cap:
        log_tis_S = torch.where(trained_S, old_logp_S - sampler_logp_S, 0.0).detach()
        loss_S = loss_S * log_tis_S.exp().clamp(max=tis_cap)
    if beta:  # (6) + β·KL(π ‖ π_ref)
        kl_S = kl_estimate(torch.where(trained_S, logp_S - ref_logp_S, 0.0), kl)
        loss_S = loss_S + beta * kl_S
        per_token["kl"] = kl_S.detach()

    loss = (weight_S * torch.where(trained_S, loss_S, 0.0)).sum()  # (7)
    stats = {name: sum_and_count(value_S, trained_S) for name, value_S in per_token.items()}
    return loss, stats


def check_loss_shapes(*tensors) -> None:
    """Errors: ValueError with the shapes, if they are not [S], all the same."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"logp, old_logp, advantage and weight must be [S], not {shapes}")


def mean_of_row(values_S, counted_S, row_S) -> torch.Tensor:
    """For each token the mean over its rollout's tokens that count. values_S is 0 at others. [S]"""
    if len(row_S) == 0:
        return values_S
    zeros_B = values_S.new_zeros(int(row_S.max()) + 1)
    sum_B = zeros_B.index_add(0, row_S, values_S)
    count_B = zeros_B.index_add(0, row_S, counted_S.to(values_S.dtype))
    mean_B = sum_B / count_B.clamp(min=1)
    return mean_B[row_S]


def kl_estimate(d: torch.Tensor, kind: str) -> torch.Tensor:
    """KL(π ‖ π_ref) estimated from d = log π − log π_ref at tokens drawn from π. Shape of d."""
    if kind == "k2":  # ½·d², whose gradient is that of the reverse KL
        return 0.5 * d.square()
    if kind == "k3":  # e^(−d) + d − 1  [DSM Eq. 4]; flat below −20, before e^(−d) is ∞
        d = d.clamp(min=-20)
        return (-d).exp() + d - 1
    raise ValueError(f"kl={kind!r} in the loss: choose k2 or k3, k1's gradient has mean zero")


# §5 ─────────────────────────────────────── train_step ───────────────────────────────────────
def train_step(run: Run, step: int) -> dict:
    """One batch of GRPO [DSM Algorithm 1]. Returns the step's metrics, those of all ranks (but
    seconds are this rank's).

    (1) … (10) are the README's ten lines. Slow twin: train_step in naive_grpo.py.
    """
    config, ranks = run.config, run.processes
    clock = [time.perf_counter()]

    # (1) (2) Sample G completions o_1 … o_G of each prompt from π_θ, and score them.
    groups, rewards_of, counts = collect_groups(run, step)
    rollouts = [completion for group in groups for completion in group.completions]
    clock.append(time.perf_counter())

    # Lay them out in packs, the micro-batches: [prompt | o_1 | … | o_G], the prompt once. (A group
    # too long for a pack is split, its prompt repeated.) An o_i sees the prompt and itself alone.
    # pack.row_S[s] is token s's rollout. The lists below have one tensor [S] per pack.
    packs = packing.pack_for_ranks(groups, config.micro_tokens, run.special, ranks)
    sampler_logp = packing.sampled_logps(rollouts, packs, ranks.device)
    sums = {}  # of the step's metrics: name → [sum, count]

    # (6) log π_ref, if β > 0. k2 and k3 join the loss, below, where k1's gradient would average to
    # 0. So k1 lowers the reward: r_i −= β·Σ_t (log π_sampler − log π_ref).
    ref_logp = reference_logps(run, packs)
    rewards_PG = as_PG(rewards_of, config.group)
    kl_PG = sequence_kl(run, groups, packs, sampler_logp, ref_logp, sums)  # 0.0 but for k1
    penalised_PG = rewards_PG - config.beta * kl_PG

    # (3) Advantages A_i from the rewards of all ranks; then the rows of [P, G] that are ours.
    advantages_PG = group_advantages(
        penalised_PG, scale=config.scale, std=config.std, baseline=config.baseline)
    draws = list(rewards_of)
    own_rows = [draws.index(group.draw) for group in groups]
    advantages_B = advantages_PG[own_rows].flatten().to(ranks.device)

    # (7) What a token weighs in the mean over all ranks' rollouts (not over a micro-batch's).
    weight_B = rollout_weights(config, step, ranks, rollouts, rewards_PG.numel())

    # µ optimizer steps.
    clip_low, clip_high = clip_range(config)
    old_logp = [None] * len(packs)
    total_loss = torch.zeros((), device=ranks.device)
    for inner in range(config.inner_steps):
        for k, pack in enumerate(packs):
            logp_S, entropy_S = run.policy(  # (4)
                pack, config.temperature, entropy=due(config.entropy_every, step))
            if inner == 0:  # π_old: naive_grpo.py spends a pass of its own on it
                old_logp[k] = logp_S.detach()
            loss, stats = policy_loss(  # (5) (6) (7)
                logp_S, old_logp[k], advantages_B[pack.row_S], weight_B[pack.row_S],
                row_S=pack.row_S, ratio=config.ratio, clip_low=clip_low, clip_high=clip_high,
                beta=0.0 if config.kl == "k1" else config.beta, kl=config.kl,
                ref_logp_S=ref_logp[k], sampler_logp_S=sampler_logp[k], tis_cap=config.tis)
            # (8) FSDP averages over ranks. weight_B has divided by all ranks' numbers: undo that.
            (loss * ranks.world).backward()
            add_sums(sums, stats | {"entropy": sum_and_count(entropy_S)})
            total_loss += loss.detach()
        grad_norm = fsdp.clip_gradients(run.policy, config.max_norm).item()  # (8)
        optimizer_step(run, step, grad_norm)  # (9) AdamW, unless the gradient is not finite
    clock.append(time.perf_counter())

    # (10) Copy the new weights to the sampler, but for frozen ones.
    run.sampler.refresh(fsdp.gathered_parameters(run.policy, frozen=False))
    add_sums(sums, {"sampler_gap": sampler_gap(packs, old_logp, sampler_logp, weight_B)})
    clock.append(time.perf_counter())

    if ranks.rank == 0 and due(config.pictures_every, step):
        run_folder.save_rollouts(Path(config.out), step, groups)
    metrics = step_metrics(ranks, rollouts, rewards_PG, sums, clock) | counts
    metrics["loss"] = sum(ranks.gather(total_loss.item())) / config.inner_steps
    if config.kl == "k1" and config.beta:
        metrics["reward_minus_kl"] = penalised_PG.nanmean().item()
    return {"step": step, "grad_norm": grad_norm, "lr": learning_rate(config, step),
            "cursor": run.cursor} | metrics


def as_PG(values_of: dict[int, list[float]], group: int) -> torch.Tensor:
    """{draw: G numbers} as [P, G] in float64; P may be 0."""
    return torch.tensor(list(values_of.values()), dtype=torch.float64).view(-1, group)


def reference_logps(run: Run, packs: list[packing.Pack]) -> list[torch.Tensor | None]:
    """log π_ref of each scored token, [S] a pack; None without a reference model (β = 0)."""
    if run.reference is None:
        return [None] * len(packs)
    temperature = run.config.temperature
    with torch.no_grad():
        return [run.reference(pack, temperature, entropy=False)[0] for pack in packs]


def sequence_kl(run: Run, groups: list[Group], packs, sampler_logp, ref_logp, sums: dict):
    """Σ_t (log π_sampler − log π_ref) of each rollout of all ranks, [P, G]; 0.0 unless KL is k1.

    Adds the difference a token to `sums`.
    """
    if run.config.kl != "k1" or run.reference is None:
        return 0.0
    kl_B = torch.zeros(len(groups) * run.config.group, device=run.processes.device)
    for pack, logp_S, ref_S in zip(packs, sampler_logp, ref_logp):
        kl_B.index_add_(0, pack.row_S, logp_S - ref_S)
        add_sums(sums, {"kl": sum_and_count(logp_S - ref_S)})
    kl_PG = kl_B.view(-1, run.config.group).tolist()
    kl_of = run.processes.merge({group.draw: kl_G for group, kl_G in zip(groups, kl_PG)})
    return as_PG(kl_of, run.config.group)


def rollout_weights(config: Config, step: int, ranks, rollouts: list, sequences: int):
    """token_weights of this rank's rollouts, [B]. sequences: how many rollouts all ranks have."""
    lengths = []
    for completion in rollouts:
        masked = completion.truncated and config.overlong == "mask"
        left_out = masked or math.isnan(completion.reward)
        lengths.append(0 if left_out else len(completion.tokens))
    norm = sequences
    if config.loss == "dapo":
        norm = sum(ranks.gather(sum(lengths)))
    weight_B = token_weights(
        torch.tensor(lengths), loss=config.loss, max_tokens=length_limit(config, step),
        norm=max(norm, 1))
    return weight_B.float().to(ranks.device)


# §6 ────────────────────────────────────────── main ──────────────────────────────────────────
def train(run: Run, stopped=None) -> bool:
    """All steps that are left; whether the run is finished (False: it was told to stop).

    stopped: as `training.watch_signals` returned it.
    """
    progress = training.Progress(run, partial(length_limit, run.config), stopped=stopped)
    for step in progress.steps():
        try:
            metrics = train_step(run, step)
        except training.ABANDONED as error:  # nothing of this step has touched the weights
            progress.abandon(error)
        else:
            progress.add(metrics)
    return progress.finish()


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(Config, arguments, PRESETS, __doc__, torch.cuda.is_available())
    if config.plan:
        return plan.show(config, length_limit(config, config.steps))
    if config.check:
        return check_data(config)
    if not run_folder.claim(config):
        return None
    reward = reward_function.chosen(config.reward, config.reward_options)
    for sentence in without_effect(config) + without_effect_in_rl(config):
        say(f"note: {sentence}")
    stopped = training.watch_signals()
    with training.one_run():
        ranks = fsdp.start_processes(config.timeout, deterministic=config.deterministic)
        source = sft_coldstart.model_for(config, ranks, stopped)
        if source is not None:
            run = training.prepare(
                config, ranks, source, freeze_vision=config.freeze_vision, beta=config.beta,
                reward=reward)
            train(run, stopped)


if __name__ == "__main__":
    main()
    fsdp.end_process()
