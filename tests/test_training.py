"""What is around a step: schedules, optimizer, checkpoints, held-out answers; on the tiny stand-in."""
import importlib
import json
from pathlib import Path
from unittest import mock

import pytest
import ranks
import torch
from conftest import ROOT
from ranks import full_weights, make_run
from test_run_folder import text_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fsdp
import grpo_vl
import packing
import qwen_vl
import run_folder
import sft_coldstart
import training
from data import DataError


def close(one, two, atol):
    """Largest difference of two dictionaries of tensors."""
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one) <= atol


# ── around a step ──
def test_the_learning_rate_follows_its_schedule():
    def rates(**changes):
        config = grpo_vl.Config(**(dict(steps=10, lr=1.0) | changes))
        return [round(training.learning_rate(config, step), 4) for step in (0, 1, 2, 6, 9)]

    assert rates(warmup=2) == [0.5, 1, 1, 1, 1]
    # linear: 1 − (step − 2)/8;  cosine: (1 + cos(π(step − 2)/8))/2
    assert rates(warmup=2, schedule="linear") == [0.5, 1, 1, 0.5, 0.125]
    assert rates(warmup=2, schedule="cosine") == [0.5, 1, 1, 0.5, 0.0381]


@pytest.mark.parametrize("script, wanted", [("grpo_vl", True), ("grpo_vl", False), ("sft_coldstart", True)])
def test_both_stages_pass_deterministic_on(script, wanted, tmp_path, monkeypatch):
    class Started(Exception):
        pass

    def start(timeout, *, deterministic):
        assert deterministic is wanted
        raise Started

    monkeypatch.setattr(fsdp, "start_processes", start)
    options = ["--model", "tiny", "--out", str(tmp_path / "run"), *(["--deterministic"] if wanted else [])]
    with pytest.raises(Started):
        importlib.import_module(script).main(options)


def test_a_prompt_longer_than_the_limit_is_refused_not_cut(alone):
    run = ranks.make_run(alone, max_prompt=10)
    with pytest.raises(ValueError, match="--max-prompt is 10"):
        training.make_prompt(run, run.data[0])


# ── checkpoints ──
def checkpoint_roundtrip(ranks, folder, **changes):
    """Six steps at once, against three, a fresh start from the checkpoint, and three more."""
    results = []
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        for stop in stops:
            run = make_run(ranks, optimizer="adamw", lr=1e-3, steps=6, out=f"{folder}/{name}", **changes)
            first, found = 0, run_folder.find_checkpoints(Path(run.config.out))
            if found:
                state = run_folder.load_checkpoint(found[-1], run.policy, run.optimizer)
                first, run.cursor = state["step"], state["cursor"]
                run.sampler.refresh(fsdp.gathered_parameters(run.policy))
            for step in range(first, stop):
                grpo_vl.train_step(run, step)
            state = {"step": stop, "cursor": run.cursor}
            run_folder.save_checkpoint(Path(run.config.out), run.policy, run.optimizer, state, keep=1)
        results.append(full_weights(run.policy))
    left = [path.name for path in Path(folder, "parts").iterdir()]
    return all(torch.equal(results[0][n], results[1][n]) for n in results[0]), left


def test_resume_is_exact(alone, pair, tmp_path):
    for results in ([checkpoint_roundtrip(alone, str(tmp_path / "one"))],
                    pair.run("test_training.checkpoint_roundtrip", folder=str(tmp_path / "two"))):
        for equal, left in results:
            assert equal and left == ["checkpoint-6"]


def optimizer_switch(ranks, folder, fused):
    """Four steps of the fused AdamW or the plain one, a checkpoint, then four of the other: weights, and is it fused."""
    run = make_run(ranks, optimizer="adamw", lr=1e-3, max_norm=1.0)
    parameters = fsdp.trainable_parameters(run.policy)
    run.optimizer = training.make_optimizer(run.config, parameters, on_gpu=fused[0])
    for step in range(4):
        grpo_vl.train_step(run, step)
    run_folder.save_checkpoint(Path(folder), run.policy, run.optimizer, {"step": 4, "cursor": 0}, keep=1)
    run.optimizer = training.make_optimizer(run.config, parameters, on_gpu=fused[1])
    is_fused = [group["fused"] for group in run.optimizer.param_groups]
    run_folder.load_checkpoint(Path(folder, "checkpoint-4"), run.policy, run.optimizer)
    for step in range(4, 8):
        grpo_vl.train_step(run, step)
    return full_weights(run.policy), is_fused


def test_the_fused_optimizer_and_the_plain_one_take_up_each_others_checkpoints(alone, tmp_path):
    plain, no = optimizer_switch(alone, tmp_path / "plain", (False, False))
    for name, fused in (("to", (False, True)), ("from", (True, False)), ("fused", (True, True))):
        weights, is_fused = optimizer_switch(alone, tmp_path / name, fused)
        assert close(weights, plain, 1e-5) and is_fused == [fused[1] or None] and no == [None]
    start = full_weights(make_run(alone).policy)
    assert not close(start, plain, 1e-4)  # eight steps of 1e-3 moved them


def test_resume_with_frozen_vision(alone, tmp_path):
    assert checkpoint_roundtrip(alone, str(tmp_path), freeze_vision=True)[0]


@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_exported_model_loads_with_the_same_logits(alone, pair, tmp_path, model):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    assert pair.run("ranks.export", folder=str(tmp_path), model=model) == [model == "tiny"] * 2
    want = ranks.make_run(alone, model=model, lr=0.1)
    grpo_vl.train_step(want, 0)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path).encode("red circle 12")])
    plain, _ = qwen_vl.load(model)
    plain.load_state_dict({n.removeprefix("model.", ): w for n, w in ranks.full_weights(want.policy).items()})
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    names = json.loads((tmp_path / "config.json").read_text())
    assert names["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_two_ranks_load_a_checkpoint_that_only_rank_0_reads(alone, pair, tmp_path, model):
    """Rank 1 builds the modules without weights: ties, buffers and values must come out the same."""
    ranks.export(alone, str(tmp_path), model)
    want, weights = ranks.steps(alone, count=1, model=str(tmp_path))
    got = pair.run("ranks.steps", count=1, model=str(tmp_path))
    assert got[0][0][0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=1e-4)
    assert close(weights, got[0][1], 1e-5)


# ── --compile ──
def compiled_steps(processes, **changes):
    """`ranks.steps` with --compile, and how many graphs were made."""
    with ranks.compiling() as graphs:
        return *ranks.steps(processes, compile=True, **changes), len(graphs)


@pytest.mark.parametrize("changes", [
    dict(checkpointing=True, beta=0.1, kl="k2"), dict(lora=4, checkpointing=True),
    dict(sharding="by-hand", save_every=9, checkpointing=True)])
def test_compiled_steps_are_the_same(alone, changes):
    want, weights = ranks.steps(alone, count=2, **changes)
    found, found_weights, graphs = compiled_steps(alone, count=2, **changes)
    assert 7 <= graphs <= 20
    assert_same_metrics(found, want)
    assert close(found_weights, weights, 1e-5)


@pytest.mark.parametrize("changes", [dict(), dict(sharding="by-hand", save_every=9)])
def test_compiled_steps_are_the_same_on_two_ranks(pair, changes):
    """The compiled functions lie inside the sharded units: gathered weights go in, hooks stay outside."""
    changes = dict(count=2, checkpointing=True) | changes
    (want, weights), _ = pair.run("ranks.steps", **changes)
    (found, found_weights, graphs), other = pair.run("test_training.compiled_steps", **changes)
    assert graphs >= 7 and other[2] >= 7
    assert_same_metrics(found, want)
    assert close(found_weights, weights, 1e-5)


def assert_same_metrics(found, want):
    for name in ("loss", "grad_norm", "reward", "entropy"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in want], rel=1e-4, abs=1e-6)


# ── the reference ──
def test_by_hand_the_reference_is_cut_by_hand_too(alone):
    run = ranks.make_run(alone, sharding="by-hand", save_every=9, beta=0.1)
    assert len(run.reference.units) == len(run.policy.units) == 1 + 4 + 1  # tower, layers, root
    assert not any(unit.shard.requires_grad for unit in run.reference.units)


def test_steps_beside_a_reference_are_the_same_by_hand(pair):
    """lr 1: from the second step on the policy is far from it, and the KL term counts."""
    (want, weights), _ = pair.run("ranks.steps", count=2, beta=0.1)
    (found, found_weights), _ = pair.run("ranks.steps", count=2, beta=0.1, sharding="by-hand", save_every=9)
    assert found[1]["kl"] == pytest.approx(want[1]["kl"], rel=1e-4) and want[1]["kl"] > 0.01
    assert_same_metrics(found, want)
    assert close(found_weights, {name: weights[name] for name in found_weights}, 1e-5)  # by hand tied ones once


# ── dtypes, as on a GPU ──
VISION = "model.model.visual."


def test_a_pack_stays_itself_in_a_sharded_pass(alone):
    """FSDP2 would cast it by a copy: pixels on the host, once a pass, and what the first pass kept would be lost."""
    with ranks.computing_in_bf16():
        run = ranks.make_run(alone)
    groups = training.draw_groups(run, 1)
    groups[0].completions = [qwen_vl.Completion([7, 8])]
    (pack,) = packing.pack_for_ranks(groups, 10**6, run.special, alone)
    logp_S, _ = run.policy(pack)
    assert logp_S.dtype == torch.float32 and logp_S.shape == (2,)
    assert pack.vision is not None and pack.pixels[0] is groups[0].prompt.pixels_ND


@pytest.mark.parametrize("options, read, small", [
    (dict(), ["float32 float32"], ""),
    (dict(beta=0.04), ["float32 float32", "bfloat16 bfloat16"], ""),  # the reference
    (dict(freeze_vision=True), ["float32 bfloat16"], VISION),
    (dict(frozen=True), ["bfloat16 bfloat16"], "model."),  # for evaluation
    (dict(lora=4), ["bfloat16 bfloat16"], "model."),
])
@pytest.mark.parametrize("sharding", ["fsdp2", "by-hand"])
def test_what_is_not_trained_is_read_and_kept_in_the_dtype_to_compute_with(alone, monkeypatch, sharding, options, read, small):
    """read: dtypes of the weights and of the tower's; small: what the names of weights kept in bf16 begin with,
    adapters aside."""
    dtypes, load = [], qwen_vl.load
    monkeypatch.setattr(fsdp, "compute_dtype", lambda device: torch.bfloat16)

    def watched(*args, **kwargs):
        dtypes.append(" ".join(str(kwargs[name]).removeprefix("torch.") for name in ("dtype", "vision_dtype")))
        return load(*args, **kwargs)

    monkeypatch.setattr(qwen_vl, "load", watched)
    rank = options.get("lora", 0)
    if rank and sharding == "by-hand":
        pytest.skip("--sharding by-hand has no --lora")
    config = grpo_vl.Config(**ranks.SMALL, lora=rank, sharding=sharding)
    run = training.prepare(config, alone, "tiny", **{n: v for n, v in options.items() if n != "lora"})
    assert dtypes == read
    plain = {f"model.{name}": weight for name, weight in load("tiny")[0].named_parameters()}
    kept = {name: fsdp.whole(weight) for name, weight in run.policy.named_parameters()}
    if sharding == "by-hand":
        kept = dict(fsdp.full_parameters(run.policy))
    for name, weight in plain.items():
        dtype = torch.bfloat16 if small and name.startswith(small) else torch.float32
        assert kept[name].dtype == dtype and torch.equal(kept[name], weight.to(dtype)), name
    assert {kept[name].dtype for name in kept.keys() - plain.keys()} <= {torch.float32}  # adapters
    if run.reference:
        assert {weight.dtype for _, weight in fsdp.full_parameters(run.reference)} == {torch.bfloat16}
    assert (run.optimizer is None) == ("frozen" in options)


class Made(TorchDispatchMode):
    """Dtypes and shapes of all tensors with memory that operations of this thread give."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.found.add((tensor.dtype, tensor.shape))
        return out


@pytest.mark.parametrize("options, small", [
    (dict(), ""), (dict(freeze_vision=True), VISION), (dict(lora=4), "model."), (dict(frozen=True), "model.")])
def test_of_frozen_weights_no_fp32_copy_is_ever_made(alone, monkeypatch, options, small):
    """While a checkpoint in bf16 is read, as the hub's are, and dealt out. small: as above; of a shape that no other
    weight has. Matrices alone: angles have the shapes of some biases."""
    base = str(ROOT / "base")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # else other threads read
    shapes = {True: set(), False: set()}
    for name, weight in qwen_vl.load(base)[0].named_parameters():
        if weight.dim() > 1:
            shapes[bool(small) and f"model.{name}".startswith(small)].add(weight.shape)
    frozen, trained = shapes[True] - shapes[False], shapes[False]
    config = grpo_vl.Config(**ranks.SMALL, lora=options.get("lora", 0))
    with ranks.computing_in_bf16(), Made() as made:
        fsdp.load_policy(base, alone, config, **{n: v for n, v in options.items() if n != "lora"})
    assert not {(torch.float32, shape) for shape in frozen} & made.found
    assert {(torch.bfloat16, shape) for shape in frozen} | {(torch.float32, shape) for shape in trained} <= made.found
    assert bool(frozen) == bool(small)


def step_in_bf16(ranks_):
    """A step as on GPUs: its metrics, dtypes of a layer's inputs and of gradients, is the copy what was trained?"""
    inputs, gradients, clip = set(), set(), fsdp.clip_gradients

    def watched(policy, max_norm):
        gradients.update(weight.grad.dtype for weight in policy.parameters())
        return clip(policy, max_norm)

    with ranks.computing_in_bf16(), mock.patch.object(fsdp, "clip_gradients", watched):
        run = make_run(ranks_, lr=0.1, checkpointing=True)
        run.policy.decoder.layers[1].register_forward_pre_hook(lambda layer, args: inputs.add(args[0].dtype))
        metrics = grpo_vl.train_step(run, 0)
    kept = {name: fsdp.whole(weight) for name, weight in run.policy.named_parameters()}
    equal = [torch.equal(run.sampler.copy.targets[name], weight.bfloat16()) for name, weight in kept.items()]
    return metrics, inputs, gradients, {weight.dtype for weight in kept.values()}, len(equal), all(equal)


def test_the_sampler_scores_as_the_trainer_does_in_bf16(pair):
    """A token of 640 alike is at log(1/640) = −6.5, where bf16 steps by 2⁻⁵."""
    for metrics, inputs, gradients, kept, count, equal in pair.run("test_training.step_in_bf16"):
        assert (inputs, gradients, kept) == ({torch.bfloat16}, {torch.float32}, {torch.float32})
        assert count == 92 and equal  # tensors of the stand-in, its head tied
        assert 1e-5 < metrics["sampler_gap"] < 2**-5 and metrics["grad_norm"] > 0


# ── held-out answers ──
def test_blind_evaluation_sees_grey_images(alone):
    run = ranks.make_run(alone, eval_every=1, blind=True)
    seen, encode = [], training.make_prompt
    rows = training.answer_heldout(
        run, 2, tries=1, max_tokens=2, greedy=True, prompt_of=lambda run, s: seen.append(s) or encode(run, s))
    assert len(rows) == 2
    assert all(image.getcolors() == [(56 * 56, (128, 128, 128))] for sample in seen for image in sample.images)


def test_an_evaluation_of_several_worlds_asks_each(alone):
    worlds = (ranks.WORLD, "synthetic:math?text=1", "synthetic:ocr?size=56x56")
    run = ranks.make_run(alone, data=worlds, eval_every=1, eval_samples=6, max_tokens=2)
    rows, _ = training.evaluate(run, 2)
    asked = [row["task"] for row in rows if row["mode"] == "greedy"]
    assert asked == ["grounding", "math", "ocr"] * 2


def test_rows_without_a_true_answer_are_refused_where_they_are_scored(alone, tmp_path):
    row = {"task": "math", "question": "1+1", "response": "It is 2."}
    (tmp_path / "traces.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "b"}) + "\n")
    spec = f"traces:{tmp_path}/traces.jsonl"
    with pytest.raises(DataError, match=r"traces.jsonl:1: --data needs true answers"):
        ranks.make_run(alone, data=(spec,))
    config = sft_coldstart.Config(model="tiny", data=(spec,), eval_data=(spec,), eval_every=1)
    with pytest.raises(DataError, match=r"traces.jsonl:1: the data to evaluate on needs true answers"):
        training.prepare(config, alone, "tiny", imitates=True)


def test_what_is_trained_on_and_evaluated_too_is_said(alone, tmp_path, capsys):
    data = text_rows(tmp_path / "sums.jsonl")
    ranks.make_run(alone, data=(data,), eval_data=(data,), eval_every=1, heldout=0.0)
    assert "4 of the 4 samples to evaluate on are trained on too" in capsys.readouterr().err


def test_the_longest_held_out_answer_follows_the_step(alone, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "evaluate", lambda run, tokens: seen.append(tokens) or ([], {}))
    run = ranks.make_run(alone, lr=1e-4, steps=2, max_tokens_at=("2:12",), eval_every=1, out=str(tmp_path))
    grpo_vl.train(run)
    assert seen == [8, 8, 12]  # before the first step, after it, after the second
