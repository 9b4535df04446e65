"""Keyed noise, and the inverse CDF against a loop over ids."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from noise import inverse_cdf, keyed_uniforms, repeats


def test_inverse_cdf_by_hand():
    # cumulative 0, 0.25, 0.25, 0.75, 1.0, 1.0: u = 0 → id 1; 0.25 → id 3; 0.74 → 3; 0.75 → 4; just below 1 → 4
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(5, -1)
    u = torch.tensor([0.0, 0.25, 0.74, 0.75, 1 - 1e-16], dtype=torch.float64)
    assert inverse_cdf(p, u).tolist() == [1, 3, 3, 4, 4]


def plain_inverse_cdf(probabilities, u):
    """One row at a time, one id at a time."""
    below, threshold = 0.0, u * sum(probabilities)
    for index, probability in enumerate(probabilities):
        below += probability
        if below > threshold:
            return index


@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 151_936])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])  # even, random, nearly all on a few ids
def test_inverse_cdf_on_two_levels_equals_a_loop_over_ids(vocabulary, sharpness):
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 8 if vocabulary > 1000 else 64
    logits = sharpness * torch.randn(rows, vocabulary, generator=generator)
    logits[:, ::3] = float("-inf")  # banned
    p = logits.softmax(-1)
    u = torch.rand(rows, dtype=torch.float64, generator=generator)
    u[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    ids = inverse_cdf(p, u)
    assert (p.gather(1, ids[:, None]) > 0).all()
    # the last u may fall into the loop's rounding: there any id is right that has mass
    assert ids[2:].tolist() == [plain_inverse_cdf(row, x) for row, x in zip(p[2:].tolist(), u[2:].tolist())]
    assert ids[0] == next(i for i, mass in enumerate(p[0].tolist()) if mass >= 2**-62)  # less is taken for nothing


def test_inverse_cdf_never_draws_an_empty_block():
    # all mass in the middle of the second and in the fourth block of 64, at either end of u
    p = torch.zeros(3, 300)
    p[:, 100], p[:, 200] = 0.25, 0.75
    u = torch.tensor([0.0, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(p, u).tolist() == [100, 200, 200]


class RefuseFloatSums(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten.cumsum.default or not args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


def test_inverse_cdf_accumulates_whole_numbers_alone():
    """On CUDA a running sum of floats depends on timing, and --deterministic makes PyTorch refuse it."""
    p = torch.rand(4, 300).softmax(-1)
    with RefuseFloatSums():
        ids = inverse_cdf(p, torch.tensor([0.0, 0.3, 0.6, 1 - 2**-53], dtype=torch.float64))
    assert ids[0] == 0 and ids[3] == 299


def test_inverse_cdf_of_a_broken_model_stays_in_range():
    ids = inverse_cdf(torch.full((4, 100), float("nan")), torch.rand(4, dtype=torch.float64))
    assert ((ids >= 0) & (ids < 128)).all()  # blocks of 64; out of it the device would stop the process


def test_inverse_cdf_draws_the_distribution():
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, -1)
    u = keyed_uniforms(0, 0, "x", 1, 20_000)[0]
    share = torch.bincount(inverse_cdf(p, u), minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.015, rtol=0)
    assert share[1] == 0


def test_noise_is_keyed_not_streamed():
    base = keyed_uniforms(1, 2, "a", 4, 8)
    assert torch.equal(base[:2], keyed_uniforms(1, 2, "a", 2, 8))
    assert torch.equal(base[:, :5], keyed_uniforms(1, 2, "a", 4, 5))
    others = [keyed_uniforms(0, 2, "a", 4, 8), keyed_uniforms(1, 3, "a", 4, 8),
              keyed_uniforms(1, 2, "b", 4, 8), base.roll(1, 0)]
    assert all((base != other).any(1).all() for other in others)


def test_a_sample_asked_again_has_other_noise_and_the_first_time_has_what_it_always_had():
    # NumPy's generator of [seed 1, step 2, the first 8 bytes of sha256("a"), g]
    first = torch.tensor([[0.12198022671157915, 0.40564392481846057], [0.0845729462296212, 0.6345907482657586]])
    assert torch.equal(keyed_uniforms(1, 2, "a", 2, 2).float(), first)
    times = [keyed_uniforms(1, 2, "a", 2, 2, repeat) for repeat in range(3)]
    assert torch.equal(times[0].float(), first)
    values = torch.cat(times).flatten().tolist()
    assert len(set(values)) == 12


def test_repeats_count_earlier_draws_of_the_same_sample():
    # draws 7 … 12 in the order in which two ranks report them
    drawn = {7: "a", 9: "a", 11: "a", 8: "b", 10: "c", 12: "b"}
    assert repeats(drawn) == {7: 0, 8: 0, 9: 1, 10: 0, 11: 2, 12: 1}
