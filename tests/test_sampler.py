"""The sampler against plain references: Hugging Face's generate, and the policy's log-probabilities."""
import contextlib
import weakref
from dataclasses import replace

import pytest
import ranks
import torch
from references import image_inputs, noise_image, packed_logps, prepared

import qwen_vl
import sampler as sampler_module
from noise import keyed_uniforms
from packing import pack_groups
from policy import Policy
from qwen_vl import Group, encode_chat
from sampler import Sampler


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


def test_compiled_layers_change_no_rollout_and_are_compiled_before_a_capture(world, sampler, monkeypatch):
    policy, _, _, special, prompts = world
    recorder, graph, made = Recorder(monkeypatch), torch.cuda.graph, []
    with ranks.compiling() as graphs:
        @contextlib.contextmanager
        def compiling_nothing(*given, **options):
            with graph(*given, **options):
                before = len(graphs)
                yield
                assert len(graphs) == before

        monkeypatch.setattr(torch.cuda, "graph", compiling_nothing)
        captured = recorder.sampler(policy.model, special, compile=True)
        captured.refresh(policy.named_parameters())
        for count, group in ((4, 3), (1, 1), (3, 5)):
            noise = uniforms(prompts[:count], group=group, length=20)
            found = captured.generate(prompts[:count], noise, 20)
            want = sampler.generate(prompts[:count], noise, 20)
            assert tokens_of(found) == tokens_of(want)
            for completions, others in zip(found, want):
                for one, other in zip(completions, others):
                    assert one.logps == pytest.approx(other.logps, abs=1e-5)
            made.append(len(graphs))
    # two functions for prefill and decoding, and the softmax for a first own place and later ones; each for many rows
    # and one. A third batch's shapes make nothing new
    assert recorder.captured and 9 <= made[2] == made[1] <= 12, made


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


def test_a_prompts_memory_is_bounded_in_prefill(world, sampler, monkeypatch):
    """Prompts beyond so many tokens pass through the layers in turns; nothing changes."""
    _, _, _, _, prompts = world
    noise, turns, prefill = uniforms(prompts), [], sampler.prefill
    together = sampler.generate(prompts, noise, 10)
    monkeypatch.setattr(sampler_module, "PREFILL", 140)  # two prompts of up to 69 tokens
    monkeypatch.setattr(sampler, "prefill", lambda part, cache: turns.append(len(part)) or prefill(part, cache))
    assert tokens_of(sampler.generate(prompts, noise, 10)) == tokens_of(together)
    assert turns == [2, 2]


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
