"""Where keys and values lie: budgets, growth and captured shapes change no rollout."""
from dataclasses import replace

import pytest
import torch
from references import CPU, make_world
from test_sampler import Recorder, tokens_of, uniforms

import kv_cache
import qwen_vl
from policy import Policy
from sampler import Sampler


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


def test_parked_rows_go_to_the_host_layer_by_layer(monkeypatch):
    """Copies of all layers at once would need on the device what parking is to free."""
    cache = kv_cache.Cache(layers=3, kv_heads=1, head_width=2, kv_gb=1.0, device=CPU, dtype=torch.float32, graphs=False)
    cache.reserve((2, 2, 3, 4), 4)
    batch, done, parked = cache.batch_of((2, 2, 3, 4)), [], []
    batch.alive_PG.fill_(True)
    read = kv_cache.cached_rows
    monkeypatch.setattr(kv_cache, "cached_rows", lambda *given: done.append("read") or read(*given))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: done.append("moved") or tensor)
    cache.park(batch, torch.tensor([1]), torch.tensor([[0, 1]]), 2, parked)
    assert done[:9] == ["read", "moved", "moved"] * 3
    assert [own.shape for own in parked[0].own] == [(2, 1, 1, 2, 2, 2)] * 3


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
