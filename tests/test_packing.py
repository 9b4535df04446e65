"""Packed rows against plain references: Hugging Face's forward, and the padded form. packed = padded."""
from dataclasses import replace

import pytest
import torch
from references import (
    gradients,
    huggingface_logps,
    noise_image,
    packed_logps,
    padded_logps,
    prepared,
    ragged_groups,
    relative_error,
    rows_of,
)

import packing
import policy as policy_module
import qwen_vl
from packing import pack_groups
from qwen_vl import Completion, Group, encode_chat


@pytest.mark.parametrize("budget", [10**6, 60, 1])
def test_packed_logps_equal_huggingface(world, budget):
    policy, twin, _, _, prompts = world
    groups = ragged_groups(prompts)
    packed, count = packed_logps(policy, groups, budget, temperature=0.7)
    # one row holds everything; or groups are split; or each completion stands alone with its prompt
    assert count == 1 if budget == 10**6 else count > 4 if budget == 60 else count == 12
    with torch.no_grad():
        for group, tokens, row in rows_of(groups):
            want = huggingface_logps(twin, policy.banned_V, group, tokens, temperature=0.7)
            assert (packed[row, : len(tokens)] - want).abs().max() <= 1e-5
            assert packed[row, len(tokens) :].abs().sum() == 0


@pytest.mark.parametrize("budget", [10**6, 60])
def test_packed_gradients_equal_the_padded_form(world, budget):
    policy, twin, _, _, prompts = world
    groups = ragged_groups(prompts)
    weights = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    policy.zero_grad()
    twin.zero_grad()
    packed, _ = packed_logps(policy, groups, budget)
    (packed * weights).sum().backward()
    padded = padded_logps(twin, policy.banned_V, groups)
    (padded * weights).sum().backward()
    assert (packed - padded).abs().max() <= 1e-5
    got, want = gradients(policy.model), gradients(twin)
    assert got.keys() == want.keys() and len(got) > 50
    # a key's bias moves all scores of a query alike, so its gradient is zero up to rounding: compare the rest
    for name in want:
        if "k_proj.bias" not in name:
            assert relative_error(got[name], want[name]) <= 1e-4, name


def test_a_completion_depends_on_its_own_prompt_and_image_only(world):
    policy, _, tokenizer, special, prompts = world
    groups = ragged_groups(prompts)
    changed = encode_chat(tokenizer, special, "red circle 12", [noise_image(84, 84, 99)])
    other = [Group(changed, groups[0].completions, groups[0].row), *groups[1:]]
    with torch.no_grad():
        before, after = packed_logps(policy, groups)[0], packed_logps(policy, other)[0]
    assert (before[:3] - after[:3]).abs().max() > 1e-3
    torch.testing.assert_close(before[3:], after[3:], atol=1e-6, rtol=0)


def test_order_of_groups_does_not_matter(world):
    policy, _, _, _, prompts = world
    groups = ragged_groups(prompts)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logps(policy, groups)[0], packed_logps(policy, groups[::-1])[0], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("budget", [10**6, 60])
def test_two_parts_compute_what_the_mask_does(world, budget):
    """Values and gradients, in batches of completions of about one length."""
    policy, _, _, _, prompts = world
    values, grads = [], []
    for layout in (packing.mask_layout, packing.two_part_layout):
        policy.zero_grad()
        found = []
        for part in packing.split_groups(ragged_groups(prompts), budget):
            pack = pack_groups(part)
            pack.attention = layout(pack)
            found.append(policy(pack)[0])
            (found[-1] * torch.linspace(1, 2, len(found[-1]))).sum().backward()
        values.append(torch.cat(found))
        grads.append(gradients(policy))
    torch.testing.assert_close(values[1], values[0], atol=1e-5, rtol=0)
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[0].items():
        if "k_proj.bias" not in name:  # zero up to rounding
            assert relative_error(grads[1][name], want) <= 1e-5, name


def text_group(length, *lengths):
    prompt = qwen_vl.Prompt([7] * length, qwen_vl.rope_positions([length])[0], length)
    return Group(prompt, [Completion([3] * n) for n in lengths])


def test_two_parts_batch_completions_by_length():
    layout = packing.two_part_layout(pack_groups([text_group(2, 3, 1, 2), text_group(1, 2)]))
    # row: 0 1 | 2 3 4 | 5 | 6 7 || 8 | 9 10; lengths 2 and 3 have two binary digits, 1 has one
    assert [batch.queries_BT.tolist() for batch in layout.batches] == [
        [[0, 1], [8, 0]], [[2, 3, 4], [6, 7, 0], [9, 10, 0]], [[5]]]
    assert [batch.keys_BK.tolist() for batch in layout.batches] == [
        [[0, 1], [8, 0]], [[0, 1, 2, 3, 4], [0, 1, 6, 7, 0], [8, 0, 9, 10, 0]], [[0, 1, 5]]]
    first, second, third = [batch.mask_B1TK for batch in layout.batches]
    assert first is None and third.tolist() == [[[[0, 0, 0]]]]
    no = float("-inf")  # the last row's prompt is one token
    assert second[0, 0].tolist() == [[0, 0, 0, no, no], [0, 0, 0, 0, no], [0, 0, 0, 0, 0]]
    assert second[2, 0].tolist() == [[0, no, 0, no, no], [0, no, 0, 0, no], [0, no, 0, 0, 0]]
    # outputs: 0 1 8 – | 2 3 4 6 7 – 9 10 – | 5
    assert layout.scatter_L.tolist() == [0, 1, 4, 5, 6, 13, 7, 8, 2, 10, 11]


def test_two_parts_compare_less_than_half_of_the_masks_pairs():
    """Two groups as in the speed table: 320 tokens of prompt, 8 completions of 64."""
    pack = pack_groups([text_group(320, *[64] * 8)] * 2)
    pairs = []
    for layout in (packing.mask_layout(pack), packing.two_part_layout(pack)):
        sizes = [batch.queries_BT.numel() * batch.keys_BK.shape[1] for batch in layout.batches]
        pairs.append(sum(sizes))
    # 2·(320 + 512)², and 2·(320² + 512·(320 + 64)), of which SDPA skips half of the first
    assert pairs == [1_384_448, 598_016]


def test_varlen_layout_lists_the_keys_of_each_sequence():
    short = qwen_vl.Prompt([7, 8], qwen_vl.rope_positions([2])[0], 2)
    pack = pack_groups([Group(short, [Completion([1, 2, 3]), Completion([4])]), Group(short, [Completion([5])], 2)])
    layout = packing.varlen_layout(pack)
    # row: 7 8 | 1 2 3 | 4 || 7 8 | 5 → sequences of queries [0 1] [2 3 4] [5] [6 7] [8]
    assert layout.cu_q.tolist() == [0, 2, 5, 6, 8, 9]
    assert layout.key_index.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 6, 7, 8]
    assert layout.cu_k.tolist() == [0, 2, 7, 10, 12, 15]
    assert (layout.max_q, layout.max_k) == (3, 5)


def test_varlen_layout_computes_the_same_attention(world, monkeypatch):
    """The CUDA path's indices with a plain loop in the kernel's place, causal from the bottom right."""
    policy, _, _, _, prompts = world

    def loop(q, k, v, cu_q, cu_k, max_q, max_k, *, causal):
        outs = []
        repeats = q.shape[1] // k.shape[1]
        for i in range(len(cu_q) - 1):
            qi, ki, vi = q[cu_q[i]:cu_q[i + 1]], k[cu_k[i]:cu_k[i + 1]], v[cu_k[i]:cu_k[i + 1]]
            ki, vi = ki.repeat_interleave(repeats, 1), vi.repeat_interleave(repeats, 1)
            scores = torch.einsum("qhd,khd->hqk", qi, ki) * q.shape[-1] ** -0.5
            offset = len(ki) - len(qi)
            seen = torch.arange(len(ki)) <= torch.arange(len(qi))[:, None] + offset
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, vi))
        return torch.cat(outs)

    monkeypatch.setattr(policy_module, "varlen_attention", loop)
    pack = pack_groups(ragged_groups(prompts))
    with torch.no_grad():
        by_mask, entropy = policy(prepared(pack))
        pack.attention = packing.varlen_layout(pack)
        by_varlen, _ = policy(pack)
    torch.testing.assert_close(by_mask, by_varlen, atol=1e-5, rtol=0)
    assert entropy.min() > 0


@pytest.mark.parametrize("frozen_tower", [False, True])
def test_images_wait_on_the_host_until_their_pass(world, frozen_tower):
    """On a card only the pixels, or features, of the micro-batch at hand lie; and a pack has no copies of them."""
    *_, prompts = world
    features_ID = torch.ones(len(prompts[0].image_slots), 4) if frozen_tower else None
    group = Group(replace(prompts[0], features_ID=features_ID), [Completion([7])])
    pack = pack_groups([group])
    moved = pack.to(torch.device("meta"))
    assert moved.ids_L.is_meta and not pack.ids_L.is_meta
    if frozen_tower:
        assert moved.features[0] is features_ID and moved.pixels == []
    else:
        assert moved.pixels[0] is prompts[0].pixels_ND and moved.features == []


def test_dummy_image_and_filler_add_nothing(world):
    policy, _, _, special, prompts = world
    text = ragged_groups(prompts)[1]
    alone, with_dummy = pack_groups([text]), pack_groups([text])
    packing.ensure_image(with_dummy)
    logps, grads = [], []
    for pack in (alone, with_dummy):
        policy.zero_grad()
        logps.append(policy(prepared(pack))[0])
        logps[-1].sum().backward()
        grads.append(gradients(policy))
    torch.testing.assert_close(logps[0], logps[1])
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0].get(name, torch.zeros_like(grad)))
    policy.zero_grad()
    nothing = qwen_vl.Prompt([special.im_start], torch.zeros(3, 1).long(), 1)
    logp, _ = policy(prepared(pack_groups([Group(nothing, [])])))
    assert logp.shape == (0,)
    logp.sum().backward()
    assert all(grad.abs().max() == 0 for grad in gradients(policy).values())
