"""Which token does a uniform number choose? Noise keyed by what is sampled, and the inverse CDF.

Shapes: G completions of a sample, T tokens, B rows, V vocabulary, N blocks of K ids.
"""
import hashlib
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 64  # ids that `inverse_cdf` takes as one on its first level


def keyed_uniforms(seed: int, step: int, sample_id: str, group: int, length: int,
                   repeat: int = 0) -> torch.Tensor:
    """Uniforms in [0, 1) for the G completions of one sample: [G, T] float64.

    A pure function: a rollout is the same on any rank, in any batch, after a resume.
    repeat: of the same sample in the same step, which time it is, see `repeats`.
    """
    digest = hashlib.sha256(sample_id.encode()).digest()
    sample_key = int.from_bytes(digest[:8], "little")
    rows = []
    for g in range(group):
        key = [seed, step, sample_key, g]
        if repeat > 0:
            key.append(repeat)
        rows.append(np.random.default_rng(key).random(length))
    return torch.from_numpy(np.stack(rows))


def repeats(sample_of: dict[int, str]) -> dict[int, int]:
    """{draw: how many earlier draws of the batch drew its sample}, from {draw: sample id}.

    Data with fewer samples than a batch comes round several times in one: each time answers anew.
    """
    seen: Counter = Counter()
    repeat_of = {}
    for draw in sorted(sample_of):
        repeat_of[draw] = seen[sample_of[draw]]
        seen[sample_of[draw]] += 1
    return repeat_of


def inverse_cdf(probabilities_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first id whose cumulative probability exceeds u: ids [B], never one of probability 0.

    Sums are of whole numbers, 2⁶² to a probability of 1: exact, and so the same in any order and on
    any device. They run on two levels, over blocks of ids, then within the block that u falls in.
    Plain twin: one cumulative sum over all ids.
    """
    behind = -probabilities_BV.shape[1] % BLOCK
    if behind:
        probabilities_BV = F.pad(probabilities_BV, (0, behind))
    units_BV = (probabilities_BV * 2.0**62).long()
    units_BNK = units_BV.unflatten(1, (-1, BLOCK))
    mass_BN = units_BNK.sum(-1)
    cdf_BN = mass_BN.cumsum(-1)
    total_B1 = cdf_BN[:, -1:]
    threshold_B1 = (uniform_B[:, None] * total_B1).long()
    threshold_B1 = threshold_B1.minimum(total_B1 - 1)  # the product may be rounded up
    block_B1 = first_above(cdf_BN, threshold_B1)

    before_B1 = (cdf_BN - mass_BN).gather(1, block_B1)
    chosen_B1K = units_BNK.take_along_dim(block_B1[:, :, None], dim=1)
    cdf_BK = chosen_B1K[:, 0].cumsum(-1)
    within_B1 = first_above(cdf_BK, threshold_B1 - before_B1)
    ids_B1 = block_B1 * BLOCK + within_B1
    return ids_B1[:, 0]


def first_above(cdf_BN, threshold_B1) -> torch.Tensor:
    """The first index whose cumulative mass exceeds the threshold, [B, 1]."""
    index_B1 = torch.searchsorted(cdf_BN, threshold_B1, right=True)
    return index_B1.clamp(max=cdf_BN.shape[1] - 1)  # acts on NaN alone, from a broken model
