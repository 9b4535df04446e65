"""The policy and the sampler against plain references: Hugging Face's forward, generate and processor."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import policy as packing
import qwen_vl
from policy import Policy, pack_groups, scatter_BT
from qwen_vl import Completion, Group, SpecialIds, encode_chat
from sampler import Sampler, inverse_cdf, keyed_uniforms

CPU = torch.device("cpu")


def prepared(pack):
    return packing.prepare_attention(pack, CPU)


def noise_image(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=["tiny", "tiny-untied"])
def world(request):
    """(policy, Hugging Face twin with stock attention, tokenizer, special ids, prompts)."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, tokenizer = qwen_vl.load(request.param)
    special = SpecialIds.read(tokenizer, model.config)
    twin = Qwen2_5_VLForConditionalGeneration(model.config).eval()
    twin.load_state_dict(model.state_dict())
    prompts = [
        encode_chat(tokenizer, special, "red circle 12", [noise_image(84, 84, 0)]),
        encode_chat(tokenizer, special, "no image here: 34 + 5"),
        encode_chat(tokenizer, special, "two images", [noise_image(56, 140, 1), noise_image(168, 112, 2)]),
        encode_chat(tokenizer, special, "wide", [noise_image(280, 28, 3)]),
    ]
    return Policy(model, special.banned_V), twin, tokenizer, special, prompts


RAGGED = [[3, 1, 7], [5, 2, 2], [1, 1, 9], [4, 6, 3]]  # lengths of three completions of each prompt


def ragged_groups(prompts, vocabulary=200):
    generator = np.random.default_rng(5)
    groups, row = [], 0
    for prompt, lengths in zip(prompts, RAGGED):
        completions = [Completion(generator.integers(0, vocabulary, n).tolist()) for n in lengths]
        groups.append(Group(prompt, completions, row))
        row += len(lengths)
    return groups


def rows_of(groups):
    """(group, tokens, row) of every completion."""
    return [(g, c.tokens, g.row + i) for g in groups for i, c in enumerate(g.completions)]


def longest_of(groups):
    return max(len(tokens) for _, tokens, _ in rows_of(groups))


def huggingface_logps(twin, banned_V, group, tokens, temperature=1.0):
    """One completion alone, unpadded and unpacked, through the stock model with its own positions."""
    prompt = group.prompt
    ids = torch.tensor([prompt.ids + tokens])
    kinds = torch.zeros_like(ids)
    kinds[0, prompt.image_slots] = 1
    images = {}
    if prompt.pixels_ND is not None:
        images = dict(pixel_values=prompt.pixels_ND, image_grid_thw=torch.tensor(prompt.grids), mm_token_type_ids=kinds)
    logits = twin(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
    logp = (logits / temperature).masked_fill(banned_V, float("-inf")).log_softmax(-1)
    return logp[len(prompt.ids) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


def padded_logps(twin, banned_V, groups):
    """The readable reference: one row a completion, right-padded, the prompt repeated in each. [B, T]."""
    longest = longest_of(groups)
    out = torch.zeros(len(rows_of(groups)), longest)
    for group, tokens, row in rows_of(groups):
        length = len(group.prompt.ids) + longest
        ids = torch.tensor([(group.prompt.ids + tokens + [0] * longest)[:length]])
        mask = torch.arange(length)[None] < len(group.prompt.ids) + len(tokens)
        tail = qwen_vl.rope_positions([longest], group.prompt.next_position)[0]
        positions = torch.cat([group.prompt.positions_3L, tail], dim=1)[:, None]
        images = {}
        if group.prompt.pixels_ND is not None:
            images = dict(pixel_values=group.prompt.pixels_ND)
            images["image_grid_thw"] = torch.tensor(group.prompt.grids)
        logits = twin(ids, attention_mask=mask.long(), position_ids=positions, **images).logits[0]
        logp = logits.masked_fill(banned_V, float("-inf")).log_softmax(-1)
        logp = logp[len(group.prompt.ids) - 1 : -1][: len(tokens)]
        scored = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        place = (torch.tensor([row] * len(tokens)), torch.arange(len(tokens)))
        out = out.index_put(place, scored)
    return out


def packed_logps(policy, groups, budget=10**6, temperature=1.0):
    """([B, T] log-probs by shared-prefix packing, number of micro-batches)."""
    shape = (len(rows_of(groups)), longest_of(groups))
    packs = [prepared(pack_groups(part)) for part in packing.split_groups(groups, budget)]
    return sum(scatter_BT(policy(p, temperature)[0], p, shape) for p in packs), len(packs)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def relative_error(got, want):
    return ((got - want).norm() / want.norm().clamp(min=1e-12)).item()


# ── inputs ──
def test_patches_equal_the_image_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for width, height in ((84, 84), (56, 140), (280, 28)):
        image = noise_image(width, height, width)
        want = Qwen2VLImageProcessorPil(do_resize=False)([image], return_tensors="pt")
        pixels, grid = qwen_vl.patchify(image)
        assert list(grid) == want["image_grid_thw"][0].tolist()
        torch.testing.assert_close(pixels, want["pixel_values"], atol=1e-6, rtol=0)


def test_patchify_refuses_sides_that_are_no_multiple_of_28():
    with pytest.raises(ValueError, match="90×84"):
        qwen_vl.patchify(noise_image(90, 84, 0))


def test_positions_of_a_hand_worked_prompt():
    # two text tokens, a 4×6-patch image (2×3 tokens), one text token: text 0 1, image from 2, next at 2 + 3
    positions, after = qwen_vl.rope_positions([2, (1, 4, 6), 1])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert after == 6


def test_positions_equal_get_rope_index(world):
    _, twin, _, _, prompts = world
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        kinds = torch.zeros_like(ids)
        kinds[0, prompt.image_slots] = 1
        grids = torch.tensor(prompt.grids) if prompt.grids else None
        want, delta = twin.model.get_rope_index(ids, kinds, image_grid_thw=grids)
        torch.testing.assert_close(prompt.positions_3L, want[:, 0])
        assert prompt.next_position == len(prompt.ids) + delta.item()


def test_image_token_text_in_a_question_stays_text(world):
    _, _, tokenizer, special, _ = world
    prompt = encode_chat(tokenizer, special, "what is <|image_pad|><|im_end|>?", [noise_image(56, 56, 0)])
    assert prompt.ids.count(special.image_pad) == 4 == len(prompt.image_slots)
    assert prompt.ids.count(special.im_end) == 2  # system and user turn
    assert "<|image_pad|><|im_end|>?" in tokenizer.decode(prompt.ids)


def test_a_tokenizer_without_a_needed_id_is_refused(world):
    _, twin, *_ = world

    class Lacking:
        def get_vocab(self):
            return {"<|im_start|>": 0}

    with pytest.raises(ValueError, match=r"<\|image_pad\|>"):
        SpecialIds.read(Lacking(), twin.config)


# ── packed = padded = Hugging Face ──
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


def test_checkpointing_changes_nothing(world):
    policy, _, _, _, prompts = world
    model, _ = qwen_vl.load("tiny" if policy.model.config.tie_word_embeddings else "tiny-untied")
    twin = Policy(model, policy.banned_V, checkpointing=True).train()
    groups = ragged_groups(prompts)
    for module in (policy, twin):
        module.zero_grad()
        packed_logps(module, groups)[0].sum().backward()
    want = gradients(policy)
    for name, got in gradients(twin).items():
        torch.testing.assert_close(got, want[name])


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


def test_varlen_layout_lists_the_keys_of_each_sequence():
    short = qwen_vl.Prompt([7, 8], qwen_vl.rope_positions([2])[0], 2)
    pack = pack_groups([Group(short, [Completion([1, 2, 3]), Completion([4])]), Group(short, [Completion([5])], 2)])
    layout = packing.varlen_layout(pack)
    # row: 7 8 | 1 2 3 | 4 || 7 8 | 5 → sequences of queries [0 1] [2 3 4] [5] [6 7] [8]
    assert layout["cu_q"].tolist() == [0, 2, 5, 6, 8, 9]
    assert layout["key_index"].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 6, 7, 8]
    assert layout["cu_k"].tolist() == [0, 2, 7, 10, 12, 15]
    assert (layout["max_q"], layout["max_k"]) == (3, 5)


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

    monkeypatch.setattr(packing, "varlen_attention", loop)
    pack = pack_groups(ragged_groups(prompts))
    with torch.no_grad():
        by_mask, entropy = policy(prepared(pack))
        pack.attention = packing.varlen_layout(pack)
        by_varlen, _ = policy(pack)
    torch.testing.assert_close(by_mask, by_varlen, atol=1e-5, rtol=0)
    assert entropy.min() > 0


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


# ── sampler ──
@pytest.fixture(scope="module")
def sampler(world):
    policy, _, _, special, _ = world
    sampler = Sampler(policy.model, special)
    sampler.refresh(policy)
    return sampler


def uniforms(prompts, group=3, length=10, seed=0):
    return [keyed_uniforms(seed, 0, f"sample {i}", group, length) for i in range(len(prompts))]


def assert_sampler_equals_trainer(policy, prompts, rollouts, temperature):
    size = len(rollouts[0])
    groups = [Group(p, done, i * size) for i, (p, done) in enumerate(zip(prompts, rollouts))]
    with torch.no_grad():
        packed, _ = packed_logps(policy, groups, temperature=temperature)
    for group in groups:
        for row, completion in enumerate(group.completions, start=group.row):
            logps = torch.tensor(completion.logps)
            assert (packed[row, : len(logps)] - logps).abs().max() <= 1e-5


def test_sampler_logps_equal_the_trainer(world, sampler):
    policy, _, _, _, prompts = world
    rollouts = sampler.generate(prompts, uniforms(prompts), 10, temperature=0.8)
    assert_sampler_equals_trainer(policy, prompts, rollouts, 0.8)


def test_greedy_tokens_equal_generate(world, sampler):
    _, twin, _, special, prompts = world
    rollouts = sampler.generate(prompts, None, 12)
    banned = [[i] for i in torch.nonzero(sampler.banned_V).flatten().tolist()]
    for prompt, (completion,) in zip(prompts, rollouts):
        ids = torch.tensor([prompt.ids])
        kinds = torch.zeros_like(ids)
        kinds[0, prompt.image_slots] = 1
        images = {}
        if prompt.pixels_ND is not None:
            images = dict(pixel_values=prompt.pixels_ND, image_grid_thw=torch.tensor(prompt.grids))
        out = twin.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **images, do_sample=False,
            repetition_penalty=1.0, max_new_tokens=12, eos_token_id=list(special.stops), pad_token_id=special.pad,
            bad_words_ids=banned, temperature=None, top_k=None, top_p=None,
        )
        assert out[0, len(prompt.ids) :].tolist() == completion.tokens


def test_repetition_penalty_equals_huggingface(world, sampler):
    """Greedy decoding under a penalty, stronger than evaluation's 1.05, token for token as the stock model's."""
    _, twin, _, special, prompts = world
    text = next(prompt for prompt in prompts if not prompt.grids)
    (completion,), = sampler.generate([text], None, 8, repetition_penalty=1.3)
    ids = torch.tensor([text.ids])
    out = twin.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=torch.zeros_like(ids), do_sample=False,
        repetition_penalty=1.3, max_new_tokens=8, eos_token_id=list(special.stops), pad_token_id=special.pad,
        bad_words_ids=[[i] for i in torch.nonzero(sampler.banned_V).flatten().tolist()],
        temperature=None, top_k=None, top_p=None,
    )
    assert out[0, len(text.ids) :].tolist() == completion.tokens
    (plain,), = sampler.generate([text], None, 8)
    assert plain.tokens != completion.tokens  # else the penalty was not tried


def test_shapes_in_buckets_change_no_rollout(world):
    """What CUDA graphs need, without CUDA: caches and rows padded to buckets, masked, reused across waves."""
    policy, _, _, special, prompts = world
    model, _ = qwen_vl.load("tiny-untied")
    with torch.no_grad():
        model.lm_head.weight[special.im_end] *= 4.0  # ragged ends: compaction happens
    biased = Policy(model, policy.banned_V)
    exact, bucketed = Sampler(model, special), Sampler(model, special, graphs=True)
    for one in (exact, bucketed):
        one.refresh(biased)
    for count, group in ((4, 5), (3, 3), (4, 5)):  # the last finds its shape's stage with old contents
        noise = uniforms(prompts[:count], group=group, length=200, seed=count)
        expected = exact.generate(prompts[:count], noise, 200)
        found = bucketed.generate(prompts[:count], noise, 200)
        assert tokens_of(found) == tokens_of(expected)
        for one, other in zip(expected, found):
            for a, b in zip(one, other):
                torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-5, rtol=0)
        assert_sampler_equals_trainer(biased, prompts[:count], found, 1.0)
    assert len({stage[:2] for stage in bucketed.stages}) > 2  # it did compact into smaller shapes


def test_a_frozen_tower_is_run_once_for_sampling_and_training(world, monkeypatch):
    """Features kept by the sampler give the log-probs that pixels give, and the tower is not run again."""
    policy, _, tokenizer, special, _ = world
    keeping = Sampler(policy.model, special, keep_features=True)
    keeping.refresh(policy)
    mine = [encode_chat(tokenizer, special, "red circle 12", [noise_image(84, 84, 3)]),
            encode_chat(tokenizer, special, "no image"),
            encode_chat(tokenizer, special, "two", [noise_image(56, 84, 4), noise_image(84, 56, 5)])]
    rollouts = keeping.generate(mine, uniforms(mine), 10)
    groups = [Group(p, done, i * 3) for i, (p, done) in enumerate(zip(mine, rollouts))]
    pixels = [Group(replace(p, features_ID=None), done, i * 3) for i, (p, done) in enumerate(zip(mine, rollouts))]
    with torch.no_grad():
        from_pixels = policy(prepared(pack_groups(pixels)))[0]
        monkeypatch.setattr(policy.vision, "forward", None)
        from_features = policy(prepared(pack_groups(groups)))[0]
    torch.testing.assert_close(from_features, from_pixels, atol=1e-5, rtol=0)


def test_rollouts_do_not_depend_on_the_batch(world, sampler, monkeypatch):
    _, _, _, _, prompts = world
    noise = uniforms(prompts)
    together = sampler.generate(prompts, noise, 10)
    for i, prompt in enumerate(prompts):
        alone = sampler.generate([prompt], noise[i:i + 1], 10)
        assert tokens_of(alone) == tokens_of(together[i : i + 1])
    small = Sampler(world[0].model, world[3], kv_gb=1e-6)  # one prompt a wave
    small.refresh(world[0])
    waves, run_wave = [], small.run_wave
    monkeypatch.setattr(small, "run_wave", lambda *rest: waves.append(1) or run_wave(*rest))
    assert tokens_of(small.generate(prompts, noise, 10)) == tokens_of(together)
    assert len(waves) == 4


def tokens_of(rollouts):
    return [completion.tokens for group in rollouts for completion in group]


def test_changing_an_image_changes_only_its_rollouts(world, sampler):
    _, _, tokenizer, special, prompts = world
    noise = uniforms(prompts, length=16)
    before = sampler.generate(prompts, noise, 16)
    changed = [encode_chat(tokenizer, special, "red circle 12", [noise_image(84, 84, 99)]), *prompts[1:]]
    after = sampler.generate(changed, noise, 16)
    assert tokens_of(before[1:]) == tokens_of(after[1:])
    assert before[0][0].logps[0] != after[0][0].logps[0]


def test_rows_stop_at_stop_ids_and_make_room(world):
    """With a stop id made likely, completions end raggedly; compaction must not mix rows up."""
    policy, _, _, special, prompts = world
    model, _ = qwen_vl.load("tiny-untied")
    with torch.no_grad():
        model.lm_head.weight[special.im_end] *= 4.0
    biased = Policy(model, policy.banned_V)
    sampler = Sampler(model, special)
    sampler.refresh(biased)
    noise = uniforms(prompts, group=8, length=40)
    rollouts = sampler.generate(prompts, noise, 40)
    lengths = [len(tokens) for tokens in tokens_of(rollouts)]
    assert min(lengths) < 5 and len(set(lengths)) > 5
    for completion in [completion for group in rollouts for completion in group]:
        stopped = [token in special.stops for token in completion.tokens]
        assert not any(stopped[:-1])
        assert completion.truncated == (not stopped[-1])
        assert stopped[-1] or len(stopped) == 40
    assert_sampler_equals_trainer(biased, prompts, rollouts, 1.0)


def test_compaction_waits_until_it_halves_the_places(world, monkeypatch):
    """Living rows 4 + 1 + 1 of 3 · 4: compacting would copy all keys and free nothing. 2 + 1 + 1: 3 · 2 places remain."""
    _, _, _, special, prompts = world
    sampler, asked = Sampler(world[0].model, special), []
    sampler.refresh(world[0])
    stop, go = special.im_end, 200
    last = [[go, stop, stop, stop]] * 2
    rounds = [[[go] * 4, *last], [[go, go, stop, stop], *last]]
    compact = sampler.compact

    def choose(hidden_PGD, *_):
        ids_PG = torch.tensor(rounds.pop(0)) if rounds else torch.full(hidden_PGD.shape[:2], stop)
        return ids_PG, torch.zeros(ids_PG.shape)

    def watched(wave, t):
        asked.append(t)
        return compact(wave, t)

    monkeypatch.setattr(sampler, "choose", choose)
    monkeypatch.setattr(sampler, "compact", watched)
    rollouts = sampler.generate(prompts[:3], uniforms(prompts[:3], group=4), 10)
    assert asked == [1]
    assert [[len(c.tokens) for c in group] for group in rollouts] == [[3, 3, 2, 2], [3, 1, 1, 1], [3, 1, 1, 1]]


def test_a_placeholder_cannot_be_sampled(world):
    """Even if the model puts nearly all its mass on placeholders and on rows without a token."""
    policy, _, tokenizer, special, prompts = world
    model, _ = qwen_vl.load("tiny-untied")
    kinds = ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    forbidden = {tokenizer.get_vocab()[f"<|{kind}|>"] for kind in kinds}
    forbidden |= set(range(len(tokenizer), model.config.text_config.vocab_size))
    with torch.no_grad():
        model.lm_head.weight[sorted(forbidden)] *= 50.0
    sampler = Sampler(model, special)
    sampler.refresh(Policy(model, policy.banned_V))
    rollouts = sampler.generate(prompts, uniforms(prompts, group=16, length=20), 20)
    assert forbidden == set(torch.nonzero(policy.banned_V).flatten().tolist())
    assert not forbidden & {token for tokens in tokens_of(rollouts) for token in tokens}


def test_inverse_cdf_by_hand():
    # cumulative 0, 0.25, 0.25, 0.75, 1.0, 1.0: u = 0 → id 1; 0.25 → id 3; 0.74 → 3; 0.75 → 4; just below 1 → 4
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(5, -1)
    u = torch.tensor([0.0, 0.25, 0.74, 0.75, 1 - 1e-16], dtype=torch.float64)
    assert inverse_cdf(p, u).tolist() == [1, 3, 3, 4, 4]


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
