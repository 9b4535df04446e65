"""A step's metrics, and what looks sick in them."""
import pytest
import torch

import measures


def history(**metrics):
    """Twenty steps: (value in the first ten, value in the last ten)."""
    return [{name: values[step >= 10] for name, values in metrics.items()} for step in range(20)]


@pytest.mark.parametrize("name, healthy, sick, advice", [
    ("zero_variance", (0.2, 0.5), (0.2, 0.9), "--dynamic-sampling"),
    ("entropy", (2.0, 0.5), (2.0, 0.1), "--clip-high"),
    ("sampler_gap", (0.05, 0.08), (0.02, 0.07), "--tis"),
    ("truncated", (0.9, 0.1), (0.1, 0.6), "--max-tokens"),
    ("undecided", (0.001, 0.009), (0.001, 0.02), "samples/"),
    ("kl", (0.01, 0.5), (0.01, 1.5), "--beta"),
    ("reward/format", (0.5, 0.9), (0.9, 0.6), "samples/"),
])
def test_a_sick_run_is_told_in_words(name, healthy, sick, advice):
    assert measures.symptoms(history(**{name: healthy})) == []
    (sentence,) = measures.symptoms(history(**{name: sick}))
    assert sentence.startswith(f"{name} is {sick[1]:.3g}, at first {sick[0]:.3g}") and advice in sentence


def test_a_steps_sums_are_read_from_the_device_once(alone, monkeypatch):
    sums = {"entropy": torch.tensor([6.0, 4.0]), "ratio": torch.tensor([3.0, 3.0]), "clip_low": torch.tensor([1.0, 4.0]),
            "kl": torch.zeros(2)}
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda values: read.append(values.shape) or tolist(values))
    metrics = measures.step_metrics(alone, [], torch.tensor([[1.0, 0.0, 0.5]]), sums, [0.0, 1.0])
    assert (metrics["entropy"], metrics["ratio"], metrics["clip_low"]) == (1.5, 1.0, 0.25)
    assert "kl" not in metrics  # of nothing there is no mean
    assert [shape for shape in read if shape[-1] == 2] == [(4, 2)]  # all pairs at once; rewards have three columns
