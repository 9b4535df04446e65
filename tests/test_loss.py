"""Advantages and loss: hand-worked constants, naive loops, finite differences, invariances."""
import math

import pytest
import torch

from grpo_vl import group_advantages, kl_estimate, policy_loss, token_weights


def rows(*values):
    """Ragged rows → padded tensor and mask."""
    longest = max(map(len, values))
    padded = torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in values])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in values]).bool()
    return padded, mask


def loss_of(logp_BT, old_BT, advantages_B, mask_BT, *, loss="grpo", max_tokens=None, norm=None, ref_BT=None,
            sampler_BT=None, **options):
    """policy_loss of the tokens under the mask, laid end to end with their weights."""
    mask_BT = mask_BT.bool()
    row_S = torch.arange(len(mask_BT))[:, None].expand(mask_BT.shape)[mask_BT]
    weight_B = token_weights(mask_BT.sum(1), loss=loss, max_tokens=max_tokens or mask_BT.shape[1], norm=norm)
    weight_B = weight_B.to(logp_BT.dtype)
    return policy_loss(
        logp_BT[mask_BT], old_BT[mask_BT], advantages_B[row_S], weight_B[row_S], row_S=row_S,
        ref_logp_S=None if ref_BT is None else ref_BT[mask_BT],
        sampler_logp_S=None if sampler_BT is None else sampler_BT[mask_BT], **options)


# ── advantages ──
@pytest.mark.parametrize(
    "options, expected",
    [
        # mean 0.5, deviations ±0.5; population std 0.5, sample std √0.5
        (dict(std="population", eps=0.0), [1.0, -1.0]),
        (dict(std="sample", eps=0.0), [0.70710678, -0.70710678]),
        (dict(std="sample", eps=1e-4), [0.5 / 0.70720678, -0.5 / 0.70720678]),
        (dict(scale="none"), [0.5, -0.5]),
        # the other's reward is the baseline: 1 − 0 and 0 − 1
        (dict(scale="none", baseline="leave_one_out"), [1.0, -1.0]),
    ],
)
def test_advantages_of_one_and_zero(options, expected):
    got = group_advantages(torch.tensor([[1.0, 0.0]]), **options)
    torch.testing.assert_close(got, torch.tensor([expected]), atol=1e-6, rtol=0)


def test_batch_scale_uses_the_std_of_all_raw_rewards():
    # groups [1, 0] and [3, 3]: raw rewards have mean 1.75, squares 0.5625+3.0625+1.5625+1.5625 = 6.75
    # sample variance 6.75/3 = 2.25, std 1.5; group means are subtracted: ±0.5 / 1.5 = ±1/3
    got = group_advantages(torch.tensor([[1.0, 0.0], [3.0, 3.0]]), scale="batch", eps=0.0)
    torch.testing.assert_close(got, torch.tensor([[1 / 3, -1 / 3], [0.0, 0.0]]))


def test_leave_one_out_of_three():
    # rewards 3, 0, 0: baselines 0, 1.5, 1.5
    got = group_advantages(torch.tensor([[3.0, 0.0, 0.0]]), scale="none", baseline="leave_one_out")
    torch.testing.assert_close(got, torch.tensor([[3.0, -1.5, -1.5]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_zero_even_with_float_noise(scale, baseline):
    noisy = torch.tensor([[0.7, 0.7, 0.7 + 6e-8, 0.7], [0.0, 0.0, 0.0, 0.0]])
    assert group_advantages(noisy, scale=scale, baseline=baseline, eps=0.0).abs().max() == 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("std", ["sample", "population"])
def test_a_group_of_one_is_defined(scale, std):
    assert group_advantages(torch.tensor([[2.0]]), scale=scale, std=std).tolist() == [[0.0]]


@pytest.mark.parametrize("wrong", [dict(scale="row"), dict(std="n"), dict(baseline="median")])
def test_advantages_refuse_unknown_names(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        group_advantages(torch.zeros(1, 2), **wrong)


# ── loss ──
# Ratios [[1.5, 1.0], [0.5]], A = [1, −1], ε = 0.2:
# row 1: min(1.5, 1.2)·1 = 1.2 and 1.0; row 2: min(−0.5, −0.8) = −0.8
def worked_example():
    ratio, mask = rows([1.5, 1.0], [0.5])
    logp = torch.where(mask, ratio.clamp(min=1e-9).log(), 0.0)
    return logp, torch.zeros_like(logp), torch.tensor([1.0, -1.0]), mask


@pytest.mark.parametrize(
    "options, objective",
    [
        (dict(loss="grpo"), ((1.2 + 1.0) / 2 - 0.8) / 2),  # 0.15
        (dict(loss="dapo"), (1.2 + 1.0 - 0.8) / 3),  # 0.46667
        (dict(loss="dr_grpo"), (1.2 + 1.0 - 0.8) / (2 * 2)),  # 0.7 a sequence, over T = 2
        (dict(loss="dr_grpo", max_tokens=10), (1.2 + 1.0 - 0.8) / 20),  # configured length 10
        (dict(loss="grpo", norm=4), (1.1 - 0.8) / 4),
        # clip-higher 0.6: 1.5 is not clipped any more
        (dict(loss="dapo", clip_high=0.6), (1.5 + 1.0 - 0.8) / 3),
        # clip-lower 0.6: 0.5 is not clipped any more
        (dict(loss="dapo", clip_low=0.6), (1.2 + 1.0 - 0.5) / 3),
        # sequence ratio: √1.5 = 1.2247 → 1.2, twice; 0.5 → −0.8
        (dict(loss="grpo", ratio="sequence"), (1.2 - 0.8) / 2),
    ],
)
def test_objective_of_the_worked_example(options, objective):
    loss, _ = loss_of(*worked_example(), **options)
    assert loss.item() == pytest.approx(-objective, abs=1e-6)


def test_clip_fractions_of_the_worked_example():
    _, stats = loss_of(*worked_example())
    # 1.5 > 1.2 with A > 0: one of three tokens above; 0.5 < 0.8 with A < 0: one below; mean ratio 1
    assert stats["clip_high"].tolist() == [1, 3]
    assert stats["clip_low"].tolist() == [1, 3]
    assert stats["ratio"].tolist() == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize("kind, value", [("k2", 0.240227), ("k3", 0.193147)])
def test_kl_at_log_two(kind, value):
    # d = ln 2: k2 = d²/2 = 0.240227; k3 = e^−d + d − 1 = 0.5 + 0.693147 − 1
    assert kl_estimate(torch.tensor(math.log(2)), kind).item() == pytest.approx(value, abs=1e-6)
    logp, mask = rows([math.log(2)] * 3, [math.log(2)])
    zeros = torch.zeros_like(logp)
    loss, stats = loss_of(logp, logp, torch.zeros(2), mask, beta=0.04, kl=kind, ref_BT=zeros)
    assert loss.item() == pytest.approx(0.04 * value, abs=1e-7)
    assert stats["kl"].tolist() == pytest.approx([4 * value, 4], abs=1e-5)


def test_k3_far_below_the_reference_is_finite_and_never_pushes_further_down():
    """∂/∂d (e^−d + d − 1) = 1 − e^−d: below 0 where d is, so that descent raises log π. At −100 e^100 is no fp32."""
    d = torch.tensor([-1.0, -19.0, -21.0, -100.0], requires_grad=True)
    kl = kl_estimate(d, "k3")
    kl.sum().backward()
    assert kl.isfinite().all() and kl[0].item() == pytest.approx(math.e - 2, rel=1e-6)
    assert kl[3].item() == kl[2].item() == pytest.approx(math.exp(20) - 21, rel=1e-6)
    assert d.grad.tolist() == pytest.approx([1 - math.e, 1 - math.exp(19), 0.0, 0.0], rel=1e-5)


def test_k1_in_the_loss_is_refused():
    logp, mask = rows([0.1])
    with pytest.raises(ValueError, match="k2 or k3"):
        loss_of(logp, logp, torch.zeros(1), mask, beta=0.1, kl="k1", ref_BT=logp)


def test_truncated_importance_weight():
    # old − sampler = ln 3 → weight min(3, 2) = 2; ln 0.5 → 0.5. On policy, A = 1: −(2 + 0.5)/2
    logp, mask = rows([0.0, 0.0])
    sampler = torch.tensor([[-math.log(3), math.log(2)]])
    loss, _ = loss_of(logp, logp, torch.ones(1), mask, sampler_BT=sampler, tis_cap=2.0)
    assert loss.item() == pytest.approx(-1.25, abs=1e-6)


def test_loss_is_zero_on_policy_but_its_gradient_is_not():
    # rewards [1, 0] → A = ±0.7071; ratio 1 everywhere: L = −Σ A/2 = 0, dL/dlogp = −A/(B·|o|)
    logp = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    advantages = group_advantages(torch.tensor([[1.0, 0.0]]), eps=0.0)[0]
    loss, _ = loss_of(logp, logp.detach(), advantages, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    a = 0.70710678
    expected = torch.tensor([[-a / 4, -a / 4], [a / 2, 0.0]])
    torch.testing.assert_close(logp.grad, expected)


def naive_objective(logp, old, advantages, lengths, loss, ratio, low, high, beta, kl, ref):
    """The papers' sums as plain loops over Python floats."""
    per_row = []
    for i, length in enumerate(lengths):
        total = 0.0
        log_ratios = [float(logp[i][t] - old[i][t]) for t in range(length)]
        for t in range(length):
            r = math.exp(log_ratios[t] if ratio == "token" else sum(log_ratios) / length)
            clipped = max(1 - low, min(1 + high, r))
            d = float(logp[i][t] - ref[i][t])
            penalty = d * d / 2 if kl == "k2" else math.exp(-d) + d - 1
            total += min(r * advantages[i], clipped * advantages[i]) - beta * penalty
        per_row.append(total)
    if loss == "grpo":
        return sum(total / length for total, length in zip(per_row, lengths)) / len(lengths)
    if loss == "dapo":
        return sum(per_row) / sum(lengths)
    return sum(per_row) / (len(lengths) * len(logp[0]))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_loss_equals_a_naive_loop(loss, ratio, kl):
    torch.manual_seed(1)
    lengths, shape = [5, 3, 1, 4], (4, 5)
    logp, old, ref = (-torch.rand(shape, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    advantages = torch.tensor([0.7, -1.2, 0.3, -0.4], dtype=torch.float64)
    options = dict(loss=loss, ratio=ratio, clip_low=0.1, clip_high=0.3, beta=0.05, kl=kl)
    got, _ = loss_of(logp, old, advantages, mask, ref_BT=ref, **options)
    want = naive_objective(logp, old, advantages.tolist(), lengths, loss, ratio, 0.1, 0.3, 0.05, kl, ref)
    assert got.item() == pytest.approx(-want, abs=1e-12)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_gradient_by_finite_differences(loss, ratio, kl):
    torch.manual_seed(2)
    shape = (3, 4)
    logp, old, ref = (-torch.rand(shape, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    advantages = torch.tensor([0.9, -1.1, 0.2], dtype=torch.float64)

    def value(x):
        options = dict(loss=loss, ratio=ratio, beta=0.1, kl=kl, ref_BT=ref)
        return loss_of(x, old, advantages, mask, **options)[0]

    assert torch.autograd.gradcheck(value, logp.requires_grad_(), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_add_up(loss):
    torch.manual_seed(3)
    logp, old = -torch.rand(6, 5), -torch.rand(6, 5)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    advantages = torch.randn(6)
    norm = {"grpo": 6, "dapo": 20, "dr_grpo": 6}[loss]  # 5+1+3+2+5+4 = 20 tokens
    whole, _ = loss_of(logp, old, advantages, mask, loss=loss, norm=norm)
    default, _ = loss_of(logp, old, advantages, mask, loss=loss)
    parts = [loss_of(logp[i:j], old[i:j], advantages[i:j], mask[i:j], loss=loss, norm=norm)[0]
             for i, j in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(default, whole)


def test_tokens_without_weight_may_hold_anything():
    """A masked rollout between two others: neither its numbers nor its gradient get through."""
    logp = torch.tensor([0.1, math.nan, -0.2, math.inf], requires_grad=True)
    old = torch.tensor([0.0, -7.0, 0.0, math.inf])
    options = dict(row_S=torch.tensor([0, 1, 2, 1]), beta=0.1, ref_logp_S=old.clone(), tis_cap=2.0, sampler_logp_S=old.clone())
    advantage, weight = torch.tensor([1.0, 2.0, -1.0, 2.0]), torch.tensor([0.5, 0.0, 0.5, 0.0])
    for ratio in ("token", "sequence"):
        loss, stats = policy_loss(logp, old, advantage, weight, ratio=ratio, **options)
        kept = [0, 2]
        alone, _ = policy_loss(logp[kept], old[kept], advantage[kept], weight[kept], ratio=ratio, row_S=torch.tensor([0, 1]),
                               beta=0.1, ref_logp_S=old[kept], tis_cap=2.0, sampler_logp_S=old[kept])
        torch.testing.assert_close(loss, alone)
        assert stats["ratio"][1] == 2
        (gradient,) = torch.autograd.grad(loss, logp)
        assert gradient.isfinite().all() and gradient[[1, 3]].tolist() == [0.0, 0.0]


def test_everything_masked_is_zero_not_nan():
    logp = torch.zeros(6, requires_grad=True)
    for loss in ("grpo", "dapo", "dr_grpo"):
        weight_B = token_weights(torch.zeros(2), loss=loss, max_tokens=3)
        assert weight_B.tolist() == [0.0, 0.0]
        value, _ = policy_loss(logp, logp.detach(), torch.ones(6), weight_B.float().repeat_interleave(3))
        assert value.item() == 0.0


def test_token_weights_by_hand():
    lengths = torch.tensor([2, 0, 3])  # the second rollout is masked: counted in B = 3, not in Σ = 5
    for loss, options, expected in (
            ("grpo", {}, [1 / 6, 0, 1 / 9]), ("grpo", dict(norm=30), [1 / 60, 0, 1 / 90]),
            ("dapo", {}, [1 / 5, 0, 1 / 5]), ("dapo", dict(norm=20), [1 / 20, 0, 1 / 20]),
            ("dr_grpo", {}, [1 / 30, 0, 1 / 30]), ("dr_grpo", dict(norm=6), [1 / 60, 0, 1 / 60])):
        got = token_weights(lengths, loss=loss, max_tokens=10, **options)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), msg=loss)
    with pytest.raises(ValueError, match="mean"):
        token_weights(lengths, loss="mean", max_tokens=10)


def test_an_undecided_reward_is_in_no_mean():
    # known rewards [1, 0]: ±0.5 over the sample std 0.7071; the third is left out with advantage 0
    got = group_advantages(torch.tensor([[1.0, math.nan, 0.0]]), eps=0.0)
    torch.testing.assert_close(got, torch.tensor([[0.70710678, 0.0, -0.70710678]]), atol=1e-6, rtol=0)
    for scale in ("group", "batch", "none"):
        nothing = group_advantages(torch.tensor([[math.nan, math.nan], [math.nan, 1.0]]), scale=scale)
        assert nothing.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_errors_show_all_shapes():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        policy_loss(torch.zeros(3), torch.zeros(4), torch.zeros(3), torch.ones(3))
    for options, said in ((dict(beta=0.1), "ref_logp_S"), (dict(tis_cap=2.0), "sampler_logp_S"),
                          (dict(ratio="sequence"), "row_S"), (dict(ratio="word"), "word")):
        with pytest.raises(ValueError, match=said):
            policy_loss(one, one, one, one, **options)
