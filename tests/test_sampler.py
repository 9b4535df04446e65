"""The sampler against plain references: Hugging Face's generate, and the policy's log-probabilities."""
import contextlib
import weakref
from dataclasses import replace

import pytest
import torch
from references import CPU, image_inputs, make_world, noise_image, packed_logps, prepared

import kv_cache
import qwen_vl
import sampler as sampler_module
from noise import keyed_uniforms
from packing import pack_groups
from policy import Policy
from qwen_vl import Group, encode_chat
from sampler import Sampler


@pytest.fixture(scope="module", params=["tiny", "tiny-untied"])
def world(request):
    return make_world(request.param)


@pytest.fixture(scope="module")
def sampler(world):
    policy, _, _, special, _ = world
    sampler = Sampler(policy.model, special)
    sampler.refresh(policy.named_parameters())
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
        out = twin.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **image_inputs(prompt), do_sample=False,
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
        input_ids=ids, attention_mask=torch.ones_like(ids), **image_inputs(text), do_sample=False,
        repetition_penalty=1.3, max_new_tokens=8, eos_token_id=list(special.stops), pad_token_id=special.pad,
        bad_words_ids=[[i] for i in torch.nonzero(sampler.banned_V).flatten().tolist()],
        temperature=None, top_k=None, top_p=None,
    )
    assert out[0, len(text.ids) :].tolist() == completion.tokens
    (plain,), = sampler.generate([text], None, 8)
    assert plain.tokens != completion.tokens  # else the penalty was not tried


def test_shapes_in_buckets_change_no_rollout(world):
    """What CUDA graphs need, without CUDA: caches and rows padded to buckets, masked, reused across batches."""
    policy, _, _, special, prompts = world
    model, _ = qwen_vl.load("tiny-untied")
    with torch.no_grad():
        model.lm_head.weight[special.im_end] *= 4.0  # ragged ends: compaction happens
    biased = Policy(model, policy.banned_V)
    exact, bucketed = Sampler(model, special), Sampler(model, special, graphs=True)
    for one in (exact, bucketed):
        one.refresh(biased.named_parameters())
    for count, group in ((4, 5), (3, 3), (4, 5)):  # the last finds its shape's batch with old contents
        noise = uniforms(prompts[:count], group=group, length=200, seed=count)
        expected = exact.generate(prompts[:count], noise, 200)
        found = bucketed.generate(prompts[:count], noise, 200)
        assert tokens_of(found) == tokens_of(expected)
        for one, other in zip(expected, found):
            for a, b in zip(one, other):
                torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-5, rtol=0)
        assert_sampler_equals_trainer(biased, prompts[:count], found, 1.0)
    assert len({shape[:2] for shape in bucketed.cache.batches}) > 2  # it did compact into smaller shapes


class Recorder:
    """CUDA graphs on a CPU: a graph keeps addresses, and a replay computes into what lies there.

    As in PyTorch, memory pools count the graphs that live in them, and one that had some and has
    none any more refuses the next.
    """

    def __init__(self, monkeypatch):
        self.pools, self.streams, self.captured = {}, [], 0
        recorder = self

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def stream(chosen):
            recorder.streams.append(chosen)
            yield

        @contextlib.contextmanager
        def graph(graph, pool, stream):
            graphs = recorder.pools[pool]
            assert not graphs or any(reference() for reference in graphs), "use_count > 0"
            graphs.append(weakref.ref(graph))
            recorder.captured += 1
            recorder.streams.append(stream)
            yield

        def new_pool():
            recorder.pools[len(recorder.pools)] = []
            return len(recorder.pools) - 1

        for name, stub in dict(Stream=Stream, stream=stream, graph=graph, graph_pool_handle=new_pool,
                               CUDAGraph=type("CUDAGraph", (), {}), current_stream=Stream,
                               synchronize=lambda: None).items():
            monkeypatch.setattr(torch.cuda, name, stub)

    def alive(self):
        return sum(reference() is not None for graphs in self.pools.values() for reference in graphs)

    def sampler(self, model, special, **options):
        """A Sampler on the CPU that takes the CUDA path."""
        sampler = Sampler(model, special, graphs=True, **options)
        sampler.cache.captures, sampler.capture_stream = True, torch.cuda.Stream()
        sampler.cache.graph_pool = torch.cuda.graph_pool_handle()
        capture = sampler.capture

        def record(batch, *places):
            graph, hidden = capture(batch, *places)
            batch = weakref.proxy(batch)  # a graph must not keep its batch alive
            graph.replay = lambda: hidden.copy_(sampler.decode(batch, *places))
            return graph, hidden

        sampler.capture = record
        return sampler


def test_captured_graphs_outlive_a_growing_cache(world, monkeypatch):
    """A larger cache ends all graphs; the next ones need a pool that is new, and the one stream of all captures."""
    policy, _, _, special, prompts = world
    recorder, exact = Recorder(monkeypatch), Sampler(policy.model, special)
    sampler = recorder.sampler(policy.model, special)
    for one in (sampler, exact):
        one.refresh(policy.named_parameters())
    for count, group in ((1, 2), (4, 3), (4, 5), (4, 3)):
        noise = uniforms(prompts[:count], group=group, length=40)
        found = sampler.generate(prompts[:count], noise, 40)
        assert tokens_of(found) == tokens_of(exact.generate(prompts[:count], noise, 40))
    assert recorder.captured >= 3 and len(recorder.pools) > 2
    assert set(recorder.streams) == {sampler.capture_stream}


def test_a_frozen_tower_is_run_once_for_sampling_and_training(world, monkeypatch):
    """Features kept by the sampler give the log-probs that pixels give, and the tower is not run again."""
    policy, _, tokenizer, special, _ = world
    keeping = Sampler(policy.model, special, keep_features=True)
    keeping.refresh(policy.named_parameters())
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


def test_rollouts_do_not_depend_on_the_batch(world, sampler):
    _, _, _, _, prompts = world
    noise = uniforms(prompts)
    together = sampler.generate(prompts, noise, 10)
    for i, prompt in enumerate(prompts):
        alone = sampler.generate([prompt], noise[i:i + 1], 10)
        assert tokens_of(alone) == tokens_of(together[i : i + 1])

def tokens_of(rollouts):
    return [completion.tokens for group in rollouts for completion in group]


@pytest.fixture(scope="module")
def stopping():
    """(policy, special ids, prompts) whose completions stop at very different lengths."""
    _, _, _, special, prompts = make_world("tiny-untied")
    model, _ = qwen_vl.load("tiny-untied")
    with torch.no_grad():
        model.lm_head.weight[special.im_end] *= 3.5
    return Policy(model, special.banned_V), special, prompts


def kv_gib(places):
    """--kv-gb that holds so many places: 4 layers, 2 heads of width 32, keys and values in fp32."""
    return places * 4 * 2 * 32 * 2 * 4 / 2**30


def bytes_held(sampler):
    return sum(layer.numel() * layer.element_size() for layer in sampler.cache.layers)


def recorded_shapes(sampler, monkeypatch):
    """(P, G, L, T) of every batch that was laid out, in order."""
    shapes, batch_of = [], sampler.cache.batch_of
    monkeypatch.setattr(sampler.cache, "batch_of", lambda shape: shapes.append(shape) or batch_of(shape))
    return shapes


# The longest prompt has 69 tokens; with 4 places to begin with, 4 prompts of 5 rows take 4·(69 + 20) = 356 places.
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("places", [
    10_000,  # everything
    400,  # growing rows are split, prompts first
    150,  # a group at a time, later some of its rows
    60,  # of most prompts less than a group even at first
    1,  # nothing: then one row at a time, whatever it takes
])
def test_a_small_budget_changes_no_rollout(stopping, monkeypatch, places, graphs):
    policy, special, prompts = stopping
    monkeypatch.setattr(kv_cache, "PLACES", 4)
    noise = uniforms(prompts, group=5, length=40)
    free = Sampler(policy.model, special, graphs=graphs)
    tight = Sampler(policy.model, special, kv_gb=kv_gib(places), graphs=graphs)
    for one in (free, tight):
        one.refresh(policy.named_parameters())
    shapes = recorded_shapes(tight, monkeypatch)
    expected, found = free.generate(prompts, noise, 40), tight.generate(prompts, noise, 40)
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(expected, found):
        for a, b in zip(one, other):
            assert a.truncated == b.truncated
            torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-6, rtol=1e-6)
    for count, group, prompt_places, own_places in shapes:
        assert count * (prompt_places + group * own_places) <= places or count * group == 1
    one_row = max(shape[2] for shape in shapes) + 40
    assert bytes_held(tight) <= max(kv_gib(places), kv_gib(one_row)) * 2**30
    if places == 10_000:
        assert shapes[0][:2] == (4, 5) and len({shape[3] for shape in shapes}) > 3  # it grew
    if places == 1:
        assert {shape[:2] for shape in shapes} == {(1, 1)}


def test_rows_start_by_what_they_hold_and_are_split_as_they_grow(stopping, monkeypatch):
    """Four text prompts, no stop: places double until the limit, and what no longer fits waits its turn."""
    policy, special, prompts = stopping
    monkeypatch.setattr(kv_cache, "PLACES", 8)
    length = len(prompts[1].ids)
    # 4 prompts, 2 rows of 8 places: 4·(L + 16); with 16 places 4·(L + 32); that is the budget
    sampler = Sampler(policy.model, replace(special, stops=(-1,)), kv_gb=kv_gib(4 * (length + 32)))
    sampler.refresh(policy.named_parameters())
    shapes = recorded_shapes(sampler, monkeypatch)
    rollouts = sampler.generate([prompts[1]] * 4, uniforms(prompts, group=2, length=40), 40)
    assert [len(tokens) for tokens in tokens_of(rollouts)] == [40] * 8
    # 8, 16 for all; at 24 places 4·(L + 48) is too much: two prompts go on to the limit of 40, 2·(L + 80)
    # if that fits, and the two that were parked at 16 follow
    fits = 2 * (length + 80) <= 4 * (length + 32)
    assert fits and [(p, g, t) for p, g, _, t in shapes] == [
        (4, 2, 8), (4, 2, 16), (2, 2, 24), (2, 2, 32), (2, 2, 40), (2, 2, 24), (2, 2, 32), (2, 2, 40)]
    assert bytes_held(sampler) == kv_gib(4 * (length + 32)) * 2**30


def test_a_prompts_memory_is_bounded_in_prefill(world, sampler, monkeypatch):
    """Prompts beyond so many tokens pass through the layers in turns; nothing changes."""
    _, _, _, _, prompts = world
    noise, turns, prefill = uniforms(prompts), [], sampler.prefill
    together = sampler.generate(prompts, noise, 10)
    monkeypatch.setattr(sampler_module, "PREFILL", 140)  # two prompts of up to 69 tokens
    monkeypatch.setattr(sampler, "prefill", lambda part, cache: turns.append(len(part)) or prefill(part, cache))
    assert tokens_of(sampler.generate(prompts, noise, 10)) == tokens_of(together)
    assert turns == [2, 2]


def test_few_shapes_are_captured_and_the_oldest_dropped(stopping, monkeypatch):
    policy, special, prompts = stopping
    monkeypatch.setattr(kv_cache, "PLACES", 4)
    monkeypatch.setattr(kv_cache, "GRAPHS", 5)
    recorder, exact = Recorder(monkeypatch), Sampler(policy.model, special)
    sampler = recorder.sampler(policy.model, special)
    for one in (sampler, exact):
        one.refresh(policy.named_parameters())
    shapes = recorded_shapes(sampler, monkeypatch)
    for seed in range(4):
        noise = uniforms(prompts, group=6, length=50, seed=seed)
        assert tokens_of(sampler.generate(prompts, noise, 50)) == tokens_of(exact.generate(prompts, noise, 50))
        assert len(sampler.cache.batches) <= 5 and recorder.alive() <= 5
        last = list(dict.fromkeys(reversed(shapes)))[:5]
        assert list(sampler.cache.batches) == last[::-1]
    assert recorder.captured > 5
    # rows: 4 or 6 at first, then powers of two; places: 4, 8, 12, 16, 24, 32, 48 and the limit; prompts in one size
    assert {shape[0] for shape in shapes} <= {4, 2, 1} and {shape[1] for shape in shapes} <= {6, 4, 2, 1}
    assert {shape[3] for shape in shapes} <= {4, 8, 12, 16, 24, 32, 48, 50}
    assert len({shape[2] for shape in shapes}) == 1


def test_a_batch_begins_with_at_most_so_many_rows():
    cache = kv_cache.Cache(layers=1, kv_heads=1, head_width=1, kv_gb=1.0, device=CPU, dtype=torch.float32, graphs=False)
    # 1024 rows of logits would be 600 MB of fp32 several times over: 32 prompts of 16 rows, one of 512, or a part
    assert cache.first_shape([7] * 64, 16, 40) == (32, 16, 7, 40)
    assert cache.first_shape([7, 9], 500, 40) == (1, 500, 7, 40)
    assert cache.first_shape([7], 700, 40) == (1, 350, 7, 40)


def test_places_grow_in_few_sizes():
    # two sizes a doubling, from 128 on: 128, 256, 384, 512, 768, 1024, 1536, 2048, …
    sizes = [kv_cache.round_up_places(n) for n in (1, 128, 129, 257, 385, 512, 513, 769, 1025, 1537, 40_000)]
    assert sizes == [128, 128, 256, 384, 512, 512, 768, 1024, 1536, 2048, 49_152]


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
        model.lm_head.weight[special.im_end] *= 6.0
    biased = Policy(model, policy.banned_V)
    sampler = Sampler(model, special)
    sampler.refresh(biased.named_parameters())
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
    sampler.refresh(world[0].named_parameters())
    stop, go = special.im_end, 200
    last = [[go, stop, stop, stop]] * 2
    rounds = [[[go] * 4, *last], [[go, go, stop, stop], *last]]
    lay_out = sampler.cache.lay_out

    def choose(hidden_PGD, *_):
        ids_PG = torch.tensor(rounds.pop(0)) if rounds else torch.full(hidden_PGD.shape[:2], stop)
        return ids_PG, torch.zeros(ids_PG.shape)

    def watched(batch, prompt_P, row_PG, own_places, t):
        asked.append((t, *row_PG.shape))
        return lay_out(batch, prompt_P, row_PG, own_places, t)

    monkeypatch.setattr(sampler, "choose", choose)
    monkeypatch.setattr(sampler.cache, "lay_out", watched)
    rollouts = sampler.generate(prompts[:3], uniforms(prompts[:3], group=4), 10)
    assert asked == [(1, 3, 2)]
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
    sampler.refresh(Policy(model, policy.banned_V).named_parameters())
    rollouts = sampler.generate(prompts, uniforms(prompts, group=16, length=20), 20)
    assert forbidden == set(torch.nonzero(policy.banned_V).flatten().tolist())
    assert not forbidden & {token for tokens in tokens_of(rollouts) for token in tokens}
