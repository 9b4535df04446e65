"""The policy against Hugging Face: norms, rotation, vision tower, scored tokens; what runs where."""
import pytest
import ranks
import torch
from references import (
    ATTENTION,
    Operations,
    gradients,
    noise_image,
    packed_logps,
    prepared,
    ragged_groups,
    relative_error,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import vision_utils
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRMSNorm,
    apply_rotary_pos_emb,
)

import policy as policy_module
import qwen_vl
from packing import pack_groups
from policy import Policy
from qwen_vl import Completion, Group, encode_chat


@pytest.mark.parametrize("every, again", [(1, 4 + 3), (2, 2 + 2), (9, 1 + 1)])  # tiny: four layers, three blocks
def test_checkpointing_changes_nothing(world, every, again):
    policy, _, _, _, prompts = world
    model, _ = qwen_vl.load("tiny" if policy.model.config.tie_word_embeddings else "tiny-untied")
    twin = Policy(model, policy.banned_V, checkpointing=True, checkpoint_every=every).train()
    ran = []
    for part in [*twin.decoder.layers, *twin.vision.blocks]:
        part.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    groups = ragged_groups(prompts)
    for module in (policy, twin):
        module.zero_grad()
        packed_logps(module, groups)[0].sum().backward()
    want = gradients(policy)
    for name, got in gradients(twin).items():
        torch.testing.assert_close(got, want[name])
    assert len(ran) == 4 + 3 + again


@pytest.mark.parametrize("options, times", [
    (dict(), 1), (dict(checkpointing=True), 2), (dict(checkpointing=True, keep_attention=True), 1)])
def test_attention_that_is_kept_is_not_computed_again_and_gradients_are_the_same(world, options, times):
    policy, _, _, _, prompts = world
    groups = ragged_groups(prompts)
    policy.zero_grad()
    packed_logps(policy, groups)[0].sum().backward()
    want = gradients(policy)
    model, _ = qwen_vl.load("tiny" if policy.model.config.tie_word_embeddings else "tiny-untied")
    twin = Policy(model, policy.banned_V, **options).train()
    with Operations() as forward:
        logp_S = packed_logps(twin, groups)[0]
    with Operations() as backward:
        logp_S.sum().backward()
    once = forward.ran.count(ATTENTION)
    assert once >= 4 + 3  # one a layer and a block, or more
    assert once + backward.ran.count(ATTENTION) == times * once
    for name, got in gradients(twin).items():
        assert torch.equal(got, want[name])


def test_attention_that_is_kept_with_flash_attn_is_its_registered_operation(monkeypatch):
    monkeypatch.setattr(policy_module, "flash_attn_varlen_func", lambda *given, **options: None)
    with pytest.raises(ValueError, match="--keep-attention: this flash-attn registers no operation"):
        policy_module.attention_kernels()
    library = torch.library.Library("flash_attn", "DEF")  # as flash-attn 2.8 does
    library.define("_flash_attn_varlen_forward(Tensor q) -> Tensor")
    assert torch.ops.flash_attn._flash_attn_varlen_forward.default in policy_module.attention_kernels()


@pytest.mark.parametrize("keep_attention", [False, True])
def test_compiled_log_probabilities_and_gradients_are_the_same_and_a_new_length_compiles_nothing(
        world, monkeypatch, keep_attention):
    policy, _, _, _, prompts = world
    monkeypatch.setattr(policy_module, "KEPT_BYTES", 0)
    groups, made = ragged_groups(prompts), []
    with ranks.compiling() as graphs:
        model, _ = qwen_vl.load("tiny" if policy.model.config.tie_word_embeddings else "tiny-untied")
        twin = Policy(
            model, policy.banned_V, checkpointing=True, keep_attention=keep_attention, compile=True).train()
        for part in (groups[:1], groups[1:3], groups[2:]):
            for module in (policy, twin):
                module.zero_grad()
            want_S, found_S = (module(prepared(pack_groups(part)), 0.7)[0] for module in (policy, twin))
            torch.testing.assert_close(found_S, want_S, rtol=1e-6, atol=1e-6)
            for logp_S in (want_S, found_S):
                logp_S.sum().backward()
            want = gradients(policy)
            for name, got in gradients(twin).items():
                torch.testing.assert_close(got, want[name], rtol=1e-5, atol=1e-5)
            made.append(len(graphs))
    # rotating, sum and norm, MLP, a chunk's log-probabilities and their gradient; the stand-in has one key head
    assert made == [made[0]] * 3 and 5 <= made[0] <= 7, made


def plain_logprobs(hidden_SD, weight_VD, target_S, banned_V, temperature):
    logits_SV = (hidden_SD @ weight_VD.T / temperature).masked_fill(banned_V, float("-inf"))
    logp_SV = logits_SV.log_softmax(-1)
    entropy_S = -(logp_SV.exp() * logp_SV.masked_fill(banned_V, 0.0)).sum(-1)
    return logp_SV[torch.arange(len(target_S)), target_S], entropy_S


@pytest.mark.parametrize("kept_bytes", [0, 10**6])  # π computed again in backward, and kept
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scored_tokens_equal_log_softmax_and_autograd(monkeypatch, kept_bytes, temperature):
    monkeypatch.setattr(policy_module, "KEPT_BYTES", kept_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, generator=generator).requires_grad_()
    target, factor = torch.tensor([0, 4, 4, 10, 7, 1, 9]), torch.randn(7, generator=generator)
    banned = torch.zeros(11, dtype=torch.bool)
    banned[[2, 3]] = True
    logp, entropy = policy_module.token_logprobs(hidden, weight, target, banned, temperature, chunk=3)
    want, want_entropy = plain_logprobs(hidden, weight, target, banned, temperature)
    torch.testing.assert_close(logp, want)
    torch.testing.assert_close(entropy, want_entropy)
    assert not entropy.requires_grad
    found = torch.autograd.grad((logp * factor).sum(), (hidden, weight))
    for mine, theirs in zip(found, torch.autograd.grad((want * factor).sum(), (hidden, weight))):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    weight.requires_grad_(False)  # a frozen head, under LoRA
    logp, _ = policy_module.token_logprobs(hidden, weight, target, banned, temperature, chunk=3)
    assert torch.equal(torch.autograd.grad((logp * factor).sum(), hidden)[0], found[0])


@pytest.mark.parametrize("kept_bytes", [0, 10**6])
def test_without_the_entropy_log_probabilities_and_gradients_are_the_same(monkeypatch, kept_bytes):
    monkeypatch.setattr(policy_module, "KEPT_BYTES", kept_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, generator=generator).requires_grad_()
    target, banned = torch.tensor([0, 4, 4, 10, 7, 1, 9]), torch.arange(11) == 3
    want, entropy = policy_module.token_logprobs(hidden, weight, target, banned, 0.7, chunk=3)
    monkeypatch.setattr(torch.special, "entr", lambda *_: pytest.fail("the entropy was computed"))
    found, nothing = policy_module.token_logprobs(hidden, weight, target, banned, 0.7, False, chunk=3)
    assert torch.equal(found, want) and (entropy.shape, nothing.shape) == ((7,), (0,))
    for mine, theirs in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (found, want))):
        assert torch.equal(mine, theirs)


def test_a_chunk_is_computed_again_only_where_it_is_large(monkeypatch):
    calls, log_softmax = [], policy_module.log_softmax
    monkeypatch.setattr(policy_module, "log_softmax", lambda *given: calls.append(len(given[0])) or log_softmax(*given))
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    for kept_bytes in (5 * 8 * 4, 5 * 8 * 4 - 1):
        monkeypatch.setattr(policy_module, "KEPT_BYTES", kept_bytes)
        policy_module.token_logprobs(hidden, weight, torch.arange(5), torch.zeros(8).bool(), 1.0, chunk=3)[0].sum().backward()
    assert calls == [3, 2, 3, 2, 3, 2]  # forward alone, then both


def test_vision_features_equal_huggingface(world):
    """With what follows from the grids given, and longest windows right, of images of many sizes."""
    policy, twin, *_ = world
    sizes = ((84, 84), (56, 140), (280, 28), (56, 140), (28, 28), (252, 140), (56, 140), (84, 84))
    images = [qwen_vl.patchify(noise_image(w, h, w)) for w, h in sizes]
    pixels_ND, grids = torch.cat([pixels for pixels, _ in images]), torch.tensor([grid for _, grid in images])
    seen = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
             for block in policy.vision.blocks]
    with torch.no_grad():
        found = policy_module.vision_features(policy.vision, pixels_ND, grids)
        want = twin.model.visual(pixels_ND, grid_thw=grids).pooler_output
    for hook in hooks:
        hook.remove()
    assert relative_error(found, want) <= 1e-5
    # blocks 0 and 1 see windows of at most 8×8 patches, block 2 whole images: 18·10 patches the largest
    assert [given["max_seqlen"] for given in seen] == [64, 64, 180]
    assert all(given["cu_seqlens"].diff().max() == given["max_seqlen"] for given in seen)


def huggingface_norm(dtype):
    norm = Qwen2_5_VLRMSNorm(2048, 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(2048, generator=torch.Generator().manual_seed(1)))
    return norm


def test_the_norm_is_huggingfaces():
    norm, x = huggingface_norm(torch.float32), 5 * torch.randn(100, 2048, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy_module.rms_norm(x, norm.weight, 1e-6), norm(x), rtol=1e-6, atol=0)


def test_the_norm_in_bf16_is_rounded_once():
    """Never farther from the exact value than half a bf16 step, 2⁻⁸ of it; Hugging Face's rounds twice."""
    norm, x = huggingface_norm(torch.bfloat16), 5 * torch.randn(100, 2048, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16()
    exact = norm.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    ours, theirs = policy_module.rms_norm(x, norm.weight, 1e-6), norm(x)
    error = lambda found: ((found.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max().item()  # noqa: E731
    assert ours.dtype == torch.bfloat16
    assert error(ours) <= 1.001 * 2**-8 < error(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_is_huggingfaces_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(7, 3, 8, generator=generator).to(dtype), torch.randn(7, 3, 8, generator=generator).to(dtype)
    angles = 3 * torch.randn(7, 4, generator=generator)
    cos, sin = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None].double(), other.transpose(0, 1)[None].double(), cos[None].double(), sin[None].double())
    found = policy_module.rotate(x, cos[:, None], policy_module.half_negated(sin)[:, None])
    assert found.dtype == dtype
    # two roundings of numbers below 4·√2: 2⁻²⁴ or 2⁻⁸ of it each
    torch.testing.assert_close(found.double(), want[0].transpose(0, 1), rtol=0, atol=2**-20 if dtype == torch.float32 else 2**-4)


def test_no_norm_of_huggingfaces_is_left(world, monkeypatch):
    policy, _, _, _, prompts = world
    norms = [part for part in policy.modules() if isinstance(part, Qwen2_5_VLRMSNorm)]
    # two a layer and block (tiny: four and three), the decoder's last and the merger's
    assert len(norms) == 2 * 4 + 2 * 3 + 2
    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", lambda self, x: pytest.fail("the six-kernel norm ran"))
    with torch.no_grad():
        policy(prepared(pack_groups(ragged_groups(prompts))))


def test_what_follows_from_a_grid_is_computed_once(world, monkeypatch):
    """Three equal images and another; then the same pack again, as of a reference model or a later inner step; then
    another of the same sizes, as of a later step."""
    policy, _, tokenizer, special, _ = world
    policy_module.image_layout.cache_clear()
    seen, window_index = [], vision_utils.get_vision_window_index
    monkeypatch.setattr(
        vision_utils, "get_vision_window_index", lambda grid, *sizes: seen.append(grid.tolist()) or window_index(grid, *sizes))
    images = [noise_image(*size, seed) for seed, size in enumerate(((84, 84), (84, 84), (56, 140), (84, 84)))]
    groups = [Group(encode_chat(tokenizer, special, "four", images), [Completion([1, 2])])]
    pack = prepared(pack_groups(groups))
    with torch.no_grad():
        first = policy(pack)[0]
        again = policy(pack)[0]
        later = policy(prepared(pack_groups(groups)))[0]
    assert seen == [[[1, 6, 6]], [[1, 10, 4]]]  # height and width in patches of 14 pixels
    assert torch.equal(first, again) and torch.equal(first, later)


class RefuseWaits(TorchDispatchMode):
    """On CUDA these operations wait for all work queued."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert function not in (aten._local_scalar_dense.default, aten.nonzero.default, aten.unique_consecutive.default)
        return function(*args, **(kwargs or {}))


def test_the_tower_asks_the_device_for_nothing(world, monkeypatch):
    policy, _, _, _, prompts = world
    forward = policy.vision.forward

    def watched(*args, **kwargs):
        with RefuseWaits():
            return forward(*args, **kwargs)

    monkeypatch.setattr(policy.vision, "forward", watched)
    monkeypatch.setattr(policy_module, "window_attention", lambda q, *_: q)  # the CPU's, in the kernel's place
    with torch.no_grad():
        policy_module.vision_features(policy.vision, prompts[2].pixels_ND, torch.tensor(prompts[2].grids))


@pytest.mark.parametrize("keywords, key_heads, options", [
    # torch 2.13: keys stay two heads; before it had enable_gqa they are repeated for the four query heads
    (("window_size", "enable_gqa"), 2, dict(window_size=(-1, 0), enable_gqa=True)),
    (("window_size",), 4, dict(window_size=(-1, 0))),
    (("is_causal",), 4, dict(is_causal=True)),
])
def test_keys_are_repeated_only_where_pytorch_needs_it(monkeypatch, keywords, key_heads, options):
    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, **given):
        assert k.shape == v.shape == (7, key_heads, 8) and given == options
        assert torch.equal(k[:, -1], keys[:, -1]) and torch.equal(k[:, 0], keys[:, 0])
        return q

    monkeypatch.setattr(policy_module, "flash_attn_varlen_func", None)
    monkeypatch.setattr(policy_module, "varlen_attn", kernel)
    monkeypatch.setattr(policy_module, "VARLEN_KEYWORDS", keywords)
    keys, borders = torch.randn(7, 2, 8), torch.tensor([0, 7])
    policy_module.varlen_attention(torch.randn(7, 4, 8), keys, keys, borders, borders, 7, 7, causal=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_is_told_to_be_deterministic(monkeypatch, deterministic):
    given = {}
    monkeypatch.setattr(policy_module, "flash_attn_varlen_func", lambda q, *_, **options: given.update(options) or q)
    queries, borders = torch.randn(7, 4, 8), torch.tensor([0, 7])
    torch.use_deterministic_algorithms(deterministic)
    try:
        policy_module.varlen_attention(queries, queries, queries, borders, borders, 7, 7, causal=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert given == dict(causal=True, deterministic=deterministic)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="of the version pinned in requirements.txt")
def test_the_keywords_of_this_pytorch_are_known():
    assert {"window_size", "enable_gqa"} <= set(policy_module.VARLEN_KEYWORDS)
    assert "recompile_limit" in policy_module.COMPILE_KEYWORDS
