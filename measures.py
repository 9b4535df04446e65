"""What does a step of GRPO say of itself, and what looks sick in it? README explains each metric.

Most are means, kept as tensors [sum, count]: those add up over micro-batches and ranks.
"""
import math

import torch


def sum_and_count(values_S, counted_S=None) -> torch.Tensor:
    """[sum, count] of the values that count (all, unless told), in float64, on their device."""
    if counted_S is None:
        counted_S = torch.ones_like(values_S, dtype=torch.bool)
    total = torch.where(counted_S, values_S, 0).sum(dtype=torch.float64)
    count = counted_S.sum().double()
    return torch.stack([total, count])


def add_sums(sums: dict, stats: dict) -> None:
    """Add [sum, count] tensors to the running ones, on their device: no wait for a GPU."""
    for name, pair in stats.items():
        sums[name] = sums.get(name, 0) + pair


def sampler_gap(packs, old_logp, sampler_logp, weight_B) -> torch.Tensor:
    """[sum, count] of |log π_old − log π_sampler| over the tokens that are trained on."""
    total = torch.zeros(2, dtype=torch.float64, device=weight_B.device)
    for pack, old_S, sampled_S in zip(packs, old_logp, sampler_logp):
        gap_S = (old_S - sampled_S).abs()
        trained_S = weight_B[pack.row_S] > 0
        total += sum_and_count(gap_S, trained_S)
    return total


def step_metrics(ranks, rollouts: list, rewards_PG: torch.Tensor, sums: dict, clock: list) -> dict:
    """What a step of GRPO says of itself, over all ranks. README explains each name.

    rollouts: this rank's completions; rewards_PG: of all ranks, NaN where undecided; sums: name →
    this rank's [sum, count]; clock: seconds before sampling and after each of the step's parts.
    """
    pairs = torch.stack([*sums.values()]).tolist()  # read from the device once
    own = dict(zip(sums, pairs))
    for completion in rollouts:
        add_pair(own, "length", len(completion.tokens))
        add_pair(own, "truncated", completion.truncated)
        if math.isnan(completion.reward):
            continue
        for name, value in completion.parts.items():
            add_pair(own, f"reward/{name}", value)
    totals: dict[str, tuple] = {}
    for part in ranks.gather(own):
        for name, (total, count) in part.items():
            add_pair(totals, name, total, count)
    metrics = reward_metrics(rewards_PG)
    for name, (total, count) in totals.items():
        if count:  # of nothing there is no mean
            metrics[name] = total / count
    for name, before, after in zip(("sample", "train", "refresh"), clock, clock[1:]):
        metrics[f"seconds/{name}"] = after - before
    return metrics


def add_pair(pairs: dict, name: str, total: float, count: int = 1) -> None:
    """Add to the (sum, count) of a name."""
    before, counted = pairs.get(name, (0, 0))
    pairs[name] = before + total, counted + count


def reward_metrics(rewards_PG: torch.Tensor) -> dict:
    """Mean reward, spread within groups, and how many groups teach nothing."""
    groups = len(rewards_PG)  # dynamic sampling may find none
    if groups == 0:
        return {"reward": 0.0, "groups": 0, "reward_std": 0.0, "zero_variance": 1.0}
    stds, equal = [], 0
    for rewards_G in rewards_PG:
        known_G = rewards_G[~rewards_G.isnan()]
        std = 0.0  # of a group that is undecided as a whole
        if len(known_G):
            std = known_G.std(correction=0).item()
        stds.append(std)
        if spread(known_G.tolist()) < 1e-6:
            equal += 1
    known = rewards_PG[~rewards_PG.isnan()].tolist()
    metrics = {
        "reward": mean(known) if known else 0.0, "groups": groups, "reward_std": mean(stds),
        "zero_variance": equal / groups}
    if len(known) < rewards_PG.numel():
        metrics["undecided"] = 1 - len(known) / rewards_PG.numel()
    return metrics


def spread(rewards_G: list[float]) -> float:
    """Largest difference of a group's rewards; undecided ones (NaN) do not count."""
    known = [reward for reward in rewards_G if not math.isnan(reward)]
    if not known:
        return 0.0
    return max(known) - min(known)


SYMPTOMS = (  # metric; sick by its mean over ten steps, and over the first ten; what to try
    ("zero_variance", lambda now, first: now > 0.8,
     "most groups have equal rewards: try --dynamic-sampling 3 or other prompts"),
    ("entropy", lambda now, first: now < 0.1 * first,
     "hardly any variety is left: try a lower --lr, --clip-high 0.28, --beta 0.04"),
    # bf16 kernels alone differ by 0.05 or so: only a growing gap tells something
    ("sampler_gap", lambda now, first: now > max(0.02, 3 * first),
     "sampler and trainer disagree: try --tis 2"),
    ("truncated", lambda now, first: now > 0.5, "answers are cut: try a higher --max-tokens"),
    ("undecided", lambda now, first: now > 0.01,
     "formulas are too hard to compare in time: look at samples/"),
    ("kl", lambda now, first: now > max(1, 10 * first), "try a higher --beta or a lower --lr"),
    ("reward/format", lambda now, first: now < first - 0.2, "look at samples/, lower --lr"))


def symptoms(history: list[dict]) -> list[str]:
    """What looks sick in the last ten of these steps' metrics, in words, and what to try."""
    found = []
    for name, sick, advice in SYMPTOMS:
        values = [row[name] for row in history if row.get(name) is not None]
        if not values:
            continue
        now, first = mean(values[-10:]), mean(values[:10])
        if sick(now, first):
            found.append(f"{name} is {now:.3g}, at first {first:.3g}: {advice}")
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
