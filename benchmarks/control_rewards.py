"""Rewards of the demo's controls: neither knows whether an answer is right.

  python grpo_vl.py --reward benchmarks/control_rewards.py:format_only
"""
import random

import rewards

NOISE = random.Random(0)


def format_only(task, completion, answer, image_size=None, *, truncated=False, **options):
    """1 for an answer in the asked form, whatever it says."""
    score = rewards.score(task, completion, answer, image_size, truncated=truncated, **options)
    return rewards.Score(score.parts["format"], score.parts)


def random_reward(task, completion, answer, image_size=None, *, truncated=False, **options):
    """Heads or tails."""
    score = rewards.score(task, completion, answer, image_size, truncated=truncated, **options)
    return rewards.Score(float(NOISE.random() < 0.5), score.parts)


def by_text(task, completion, answer, image_size=None, *, truncated=False, **options):
    """A reward with variance for a model that knows nothing: the text's letters, summed, in [0, 1]."""
    return (sum(map(ord, completion)) % 97) / 97
