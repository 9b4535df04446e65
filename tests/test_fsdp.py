"""Sharding by hand against PyTorch's, on one and two ranks. Ranks' parts first."""
import os
from pathlib import Path

import pytest
import ranks
import torch
from ranks import steps
from test_lora import randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration

import fsdp
import grpo_vl
import lora
import qwen_vl
from data import open_data
from packing import pack_for_ranks
from policy import Policy
from qwen_vl import Completion, Group, SpecialIds

WORLD = ["synthetic:grounding?size=56x56&distractors=0-2"]
UNITS = ["vision", "layer 0", "layer 1", "layer 2", "layer 3", "root"]


# ── what each rank does ──
def load(ranks, sharding, model="tiny", checkpointing=False, freeze_vision=False):
    """(policy, tokenizer, special ids); sharding "" leaves the policy whole."""
    config = grpo_vl.Config(model=model, checkpointing=checkpointing)
    if sharding:
        return fsdp.load_policy(model, ranks, config, freeze_vision=freeze_vision, sharding=sharding)
    network, tokenizer = qwen_vl.load(model)
    special = SpecialIds.read(tokenizer, network.config)
    policy = Policy(network, special.banned_V, checkpointing=checkpointing)
    policy.vision.requires_grad_(not freeze_vision)
    return policy, tokenizer, special


def micro_batches(ranks, tokenizer, special):
    """This rank's share of three groups, a micro-batch each: of two ranks the second adds a filler."""
    world, groups = open_data(WORLD, seed=0), []
    for draw in range(ranks.rank, 3, ranks.world):
        sample = world[draw]
        prompt = qwen_vl.encode_chat(tokenizer, special, sample.question, sample.images)
        tokens = [[*range(70 + draw, 75 + draw), special.im_end], [90 + draw, special.im_end]]
        groups.append(Group(prompt, [Completion(t) for t in tokens]))
    packs = pack_for_ranks(groups, 80, special, ranks)
    assert len(packs) == {1: 3, 2: 2}[ranks.world]
    assert [len(pack.target_S) for pack in packs] == ([8, 0] if ranks.rank else [8] * len(packs))
    return packs


def accumulate(ranks, policy, packs) -> list[float]:
    """Backward of each micro-batch; their losses. 24 tokens are scored on all ranks together."""
    losses = []
    for pack in packs:
        logp_S, _ = policy(pack)
        loss = -logp_S.sum() / 24
        (loss * ranks.world).backward()
        losses.append(loss.item())
    return losses


def three_steps(ranks, sharding, **options):
    """Losses, norms and weights of three SGD steps, and the whole gradient after them."""
    policy, tokenizer, special = load(ranks, sharding, **options)
    packs, losses, norms = micro_batches(ranks, tokenizer, special), [], []
    optimizer = torch.optim.SGD(fsdp.trainable_parameters(policy), lr=0.1)
    for _ in range(3):
        losses.append(accumulate(ranks, policy, packs))
        norms.append(fsdp.clip_gradients(policy, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    weights = fsdp.full_state_dict(policy)
    accumulate(ranks, policy, packs)
    with torch.no_grad():
        for parameter in fsdp.trainable_parameters(policy):
            parameter.copy_(parameter.grad)
    return losses, norms, weights, fsdp.full_state_dict(policy)


def watch(policy, events):
    """Note which unit is gathered, freed and reduced, and in the end how much is whole."""
    names = dict(zip(policy.units, UNITS))
    for unit in policy.units:
        def noted(what, work, unit=unit):
            def do(*arguments):
                events.append(f"{what} {names[unit]}")
                return work(*arguments)
            return do

        unit.gather, unit.free = noted("gather", unit.gather), noted("free", unit.free)

    def reduce(part, whole):
        events.append(f"reduce {whole.numel()}")
        real_reduce(part, whole)

    real_reduce, fsdp.reduce_scatter_single = fsdp.reduce_scatter_single, reduce
    return real_reduce


def timeline(ranks, **options):
    """(events in forward, events in backward, bytes whole after each, of a forward without grad)."""
    policy, tokenizer, special = load(ranks, "by-hand", **options)
    pack, events = micro_batches(ranks, tokenizer, special)[0], []
    held = lambda: sum(unit.full.untyped_storage().size() for unit in policy.units)  # noqa: E731
    real_reduce = watch(policy, events)
    try:
        logp_S, _ = policy(pack)
        forward, after_forward = events[:], held()
        logp_S.sum().backward()
        backward, after_backward = events[len(forward):], held()
        with torch.no_grad():
            policy(pack)
    finally:
        fsdp.reduce_scatter_single = real_reduce
    alone = events[len(forward) + len(backward):]
    return forward, backward, (after_forward, after_backward, held()), alone


def shares(ranks):
    """Numbers that this rank keeps: (of weights, of AdamW's state), and what stands for a weight."""
    policy, tokenizer, special = load(ranks, "by-hand")
    optimizer = torch.optim.AdamW(fsdp.trainable_parameters(policy))
    accumulate(ranks, policy, micro_batches(ranks, tokenizer, special))
    optimizer.step()
    kept = sum(unit.shard.numel() for unit in policy.units)
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    return kept, state, {name: tuple(p.shape) for name, p in policy.named_parameters() if p.is_meta}


def one_unit(ranks, dtype):
    """A unit of three numbers on two ranks that see different inputs: what each has afterwards."""
    linear = nn.Linear(2, 1)
    linear.weight.data, linear.bias.data = torch.tensor([[1 + 2**-10, 2.0]]), torch.tensor([3.0])
    unit = fsdp.Unit(linear, ranks)
    unit.full = torch.empty(4, dtype=dtype)  # as on a GPU, if bf16
    y = linear(torch.tensor([[[256.0, 1.0]], [[1.0, 0.0]]], dtype=dtype)[ranks.rank])
    y.sum().backward()
    return unit.shard.tolist(), y.item(), unit.shard.grad.tolist(), unit.full.untyped_storage().size()


def evaluated(ranks, sharding):
    """Log-probabilities without gradients, as of a reference model, twice."""
    policy, tokenizer, special = load(ranks, sharding)
    packs = micro_batches(ranks, tokenizer, special)
    with torch.no_grad():
        return [policy(pack)[0] for pack in [*packs, *packs]]


def names_in_order(ranks, sharding, model):
    policy, *_ = load(ranks, sharding, model)
    return [name for name, _ in fsdp.full_parameters(policy)]


class Gathers(TorchDispatchMode):
    """Bytes of each all-gather's output."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_allgather_base_" in str(function):
            self.bytes.append(args[0].nbytes)
        return function(*args, **(kwargs or {}))


def gathered(ranks_, **changes):
    """Of a policy that computes in bf16: gathered weights, all and those that change; all by the plain twin, cast and
    then merged with adapters; the bytes of each gather; whether each rank is left with its own part alone."""
    with ranks.computing_in_bf16():
        policy = ranks.make_run(ranks_, **changes).policy
        randomise(policy)
        with Gathers() as gathers:
            found = {n: (w.dtype, w.to(torch.bfloat16, copy=True)) for n, w in fsdp.gathered_parameters(policy)}
        changing = [name for name, _ in fsdp.gathered_parameters(policy, frozen=False)]
        plain = {n: w.to(torch.bfloat16, copy=True) for n, w in fsdp.full_parameters(policy)}
    for name, linear in lora.adapted_linears(policy).items():
        parts = [fsdp.whole(part).bfloat16() for part in (linear.weight, linear.lora_A, linear.lora_B)]
        plain[name] = lora.merge(*parts, linear.lora_scale).bfloat16()
    own = all(parameter.is_meta or hasattr(parameter, "to_local") for parameter in policy.parameters())
    return found, changing, plain, gathers.bytes, own


def exported(ranks, folder, model):
    """Rank 0 writes the model as Hugging Face's; the log-probabilities of the policy itself."""
    policy, *_ = load(ranks, "by-hand", model)
    state = fsdp.full_state_dict(policy)
    if ranks.rank == 0:
        state = {name.removeprefix("model."): weight for name, weight in state.items()}
        policy.model.save_pretrained(folder, state_dict=state)
    return len(state)


# ── by hand as by PyTorch ──
@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("options", [
    dict(), dict(checkpointing=True), dict(freeze_vision=True), dict(checkpointing=True, freeze_vision=True),
])
def test_by_hand_and_by_pytorch_are_equal_bit_by_bit(pair, model, options):
    ours = pair.run("test_fsdp.three_steps", sharding="by-hand", model=model, **options)
    theirs = pair.run("test_fsdp.three_steps", sharding="fsdp2", model=model, **options)
    for (losses, norms, *_), (their_losses, their_norms, *_) in zip(ours, theirs):
        assert losses == their_losses and norms == their_norms and min(norms) > 1
    for own, their in zip(ours[0][2:], theirs[0][2:]):  # weights, gradient
        assert own.keys() == their.keys() and all(torch.equal(own[n], their[n]) for n in own)
    assert ours[1][2] == ours[1][3] == {}  # rank 1 keeps no whole weights
    assert ours[0][0][0] != ours[0][0][2]  # it learned


@pytest.mark.parametrize("dtype, y", [(torch.float32, 4 + 2**-10), (torch.bfloat16, 4.0)])
def test_a_unit_by_hand(pair, dtype, y):
    one, two = pair.run("test_fsdp.one_unit", dtype=dtype)
    # Weights 1 + 2⁻¹⁰, 2 and the bias 3 are padded to four. Inputs (256, 1) and (1, 0) are the weights' gradients,
    # 1 and 1 the bias's; their means are 128.5, 0.5 and 1. In bf16 2⁻¹⁰ would go, and 256 + 1 make 256.
    assert one[0] == [1 + 2**-10, 2.0] and two[0] == [3.0, 0.0]
    assert two[1] == y  # 1·(1 + 2⁻¹⁰) + 0·2 + 3, computed in bf16 without the 2⁻¹⁰
    assert one[2] == [128.5, 0.5] and two[2] == [1.0, 0.0]
    assert one[3] == two[3] == 0


@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_two_ranks_one_rank_and_none_make_the_same_steps(alone, pair, model):
    whole = three_steps(alone, "", model=model)
    one = three_steps(alone, "by-hand", model=model)
    two, filler = pair.run("test_fsdp.three_steps", sharding="by-hand", model=model)
    assert one[:2] == whole[:2]
    for step in range(3):
        assert filler[0][step][1] == 0  # the second micro-batch of rank 1 scores nothing
        assert sum(two[0][step] + filler[0][step]) == pytest.approx(sum(whole[0][step]), rel=1e-6)
        assert two[1][step] == filler[1][step] == pytest.approx(whole[1][step], rel=1e-6)
    for name in whole[2]:
        assert torch.equal(one[2][name], whole[2][name]) and torch.equal(one[3][name], whole[3][name])
        assert torch.allclose(two[2][name], whole[2][name], rtol=0, atol=1e-6)
        assert torch.allclose(two[3][name], whole[3][name], rtol=1e-5, atol=1e-6)


def test_forwards_without_gradients_agree(alone, pair):
    ours, theirs = (pair.run("test_fsdp.evaluated", sharding=s) for s in ("by-hand", "fsdp2"))
    for own, their in zip(ours, theirs):
        assert len(own) == 4 and all(torch.equal(a, b) for a, b in zip(own, their))
    assert torch.equal(ours[0][0], evaluated(alone, "")[0])


# ── the drawing ──
# Numbers of tiny (width 128, MLP 384, 640 ids): a layer has 128·128 + 128 (q), 2·(64·128 + 64) (k, v), 128² (o),
# 3·128·384 (MLP) and 2·128 (norms) = 197,120; the root 640·128 + 128 = 82,048; the tower the rest of 1,460,288.
REDUCED = {"vision": 589_760, "layer": 197_120, "root": 82_048}


@pytest.mark.parametrize("options", [dict(), dict(checkpointing=True)])
def test_units_are_gathered_and_freed_as_drawn(alone, pair, options):
    inner = [f"{what} {name}" for name in UNITS[:5] for what in ("gather", "free")]
    forward = ["gather root", *inner, "free root"]
    backward = ["gather root"]
    for name in ["layer 3", "layer 2", "layer 1", "layer 0", "vision"]:
        backward += [f"gather {name}", f"free {name}", f"reduce {REDUCED[name.split()[0]]}"]
    backward += ["free root", f"reduce {REDUCED['root']}"]
    for outcome in [timeline(alone, **options), *pair.run("test_fsdp.timeline", **options)]:
        assert outcome == (forward, backward, (0, 0, 0), forward)


def test_a_frozen_tower_is_gathered_in_forward_alone(pair):
    for forward, backward, held, _ in pair.run("test_fsdp.timeline", freeze_vision=True):
        assert forward[1:3] == ["gather vision", "free vision"] and held == (0, 0, 0)
        assert not any("vision" in event or "589760" in event for event in backward)


def test_a_rank_keeps_half_of_weights_and_optimizer(pair):
    for kept, state, stand_ins in pair.run("test_fsdp.shares"):
        assert kept == 1_460_288 // 2 and state == 2 * kept  # the whole model has 1,460,288; AdamW two moments
        assert stand_ins["model.model.language_model.layers.0.mlp.down_proj.weight"] == (128, 384)


# ── what the others ask for ──
@pytest.mark.parametrize("changes", [
    dict(), dict(model="tiny-untied"), dict(freeze_vision=True), dict(offload=True), dict(lora=4),
    dict(sharding="by-hand"), dict(sharding="by-hand", model="tiny-untied", freeze_vision=True),
])
def test_weights_are_gathered_a_unit_at_a_time_in_the_dtype_to_compute_with(pair, changes):
    for found, changing, plain, sizes, own in pair.run("test_fsdp.gathered", **changes):
        assert found.keys() == plain.keys() and own
        for name, (dtype, weight) in found.items():
            assert torch.equal(weight, plain[name]), name
            assert dtype == (torch.float32 if changes.get("lora") and name.endswith("_proj.weight") and "language" in name
                             else torch.bfloat16)
        # two bytes a weight; an untied head has 640·128 of its own, rank 4 takes 4·(in + out) of each linear:
        # q and o 256, k and v 192, MLP 512 are 4·(2·256 + 2·192 + 3·512) = 9,728 a layer
        layer = REDUCED["layer"] + (9728 if "lora" in changes else 0)
        root = REDUCED["root"] + (640 * 128 if "model" in changes else 0)
        assert sizes == [2 * size for size in (REDUCED["vision"], layer, layer, layer, layer, root)]
        wanted = [name for name in found if not (changes.get("freeze_vision") and "visual" in name)]
        if "lora" in changes:
            wanted = [name for name in found if ".layers." in name and name.endswith("_proj.weight")]
        assert changing == wanted


def test_one_rank_gathers_in_the_dtype_to_compute_with(alone):
    found, _, plain, *_ = gathered(alone)
    assert found.keys() == plain.keys() and {dtype for dtype, _ in found.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, plain[name]) for name, (_, weight) in found.items())


@pytest.mark.parametrize("model, head", [("tiny", False), ("tiny-untied", True)])
def test_all_ranks_name_the_same_weights_in_the_same_order(pair, model, head):
    one, two = pair.run("test_fsdp.names_in_order", sharding="by-hand", model=model)
    theirs, _ = pair.run("test_fsdp.names_in_order", sharding="fsdp2", model=model)
    assert one == two and sorted(one) == sorted(theirs) and len(set(one)) == len(one)
    assert ("model.lm_head.weight" in one) == head


@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_an_export_by_hand_loads_as_hugging_face(pair, tmp_path, model):
    count, none = pair.run("test_fsdp.exported", folder=str(tmp_path), model=model)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    wanted = qwen_vl.load(model)[0].state_dict()
    assert none == 0 and count == len(wanted) - (model == "tiny")  # the tied head has no row of its own
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[n], wanted[n]) for n in wanted)


def test_the_gradient_is_clipped_to_its_norm(alone):
    module = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
    module[0].grad, module[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])  # the third has none
    assert fsdp.clip_gradients(module, 10.0).item() == 5.0  # √(3² + 4²)
    assert module[0].grad.tolist() == [3.0, 0.0] and module[1].grad.tolist() == [4.0]
    assert fsdp.clip_gradients(module, 1.0).item() == 5.0
    assert module[0].grad.tolist() == pytest.approx([0.6, 0.0]) and module[1].grad.tolist() == pytest.approx([0.8])
    module[0].grad, module[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert nn.utils.clip_grad_norm_(module.parameters(), 1.0).item() == 5.0  # the plain twin
    assert module[0].grad.tolist() == pytest.approx([0.6, 0.0]) and module[1].grad.tolist() == pytest.approx([0.8])
    module[1].grad[0] = float("nan")
    assert fsdp.clip_gradients(module, 1.0).isnan()
    assert fsdp.clip_gradients(nn.ParameterList([nn.Parameter(torch.zeros(1))]), 1.0).item() == 0


# ── in host memory ──
def test_offloaded_steps_are_the_same_bit_by_bit(pair):
    """On CPUs both lie in the same memory: what is tested is FSDP2's way there, the clipping and the refresh."""
    (metrics, weights), _ = pair.run("ranks.steps", count=2)
    (offloaded, moved), _ = pair.run("ranks.steps", count=2, offload=True)
    for one, other in zip(metrics, offloaded):
        assert all(one[name] == other[name] for name in ("loss", "grad_norm", "reward", "sampler_gap"))
    assert metrics[0]["grad_norm"] > 0 and weights.keys() == moved.keys()
    assert all(torch.equal(weights[name], moved[name]) for name in weights)


# ── refusals ──
def test_what_sharding_by_hand_lacks_is_refused(tmp_path):
    config = grpo_vl.Config(save_every=501, steps=500, out=str(tmp_path))
    fsdp.refuse_by_hand(config)
    with pytest.raises(ValueError, match="no --offload"):
        fsdp.refuse_by_hand(grpo_vl.Config(offload=True, save_every=501, out=str(tmp_path)))
    with pytest.raises(ValueError, match="give --save-every 501"):
        fsdp.refuse_by_hand(grpo_vl.Config(save_every=500, steps=500, out=str(tmp_path)))
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="cannot resume"):
        fsdp.refuse_by_hand(config)


def test_a_unit_is_trained_or_frozen_as_a_whole_and_frozen_ones_come_first(alone):
    policy, tokenizer, special = load(alone, "")
    policy.decoder.layers[1].mlp.requires_grad_(False)
    with pytest.raises(ValueError, match="all of Qwen2_5_VLDecoderLayer"):
        fsdp.shard_by_hand(policy, alone)
    policy, tokenizer, special = load(alone, "")
    policy.decoder.layers[1].requires_grad_(False)
    fsdp.shard_by_hand(policy, alone)
    with pytest.raises(ValueError, match="behind a trained one"):
        policy(micro_batches(alone, tokenizer, special)[0])


# ── processes ──
def test_deterministic_kernels_change_nothing_on_a_cpu(alone, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    usual, usual_weights = ranks.steps(alone, count=2, beta=0.04)
    fsdp.use_deterministic_kernels()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # of the two that PyTorch's reproducibility notes name
        strict, strict_weights = ranks.steps(alone, count=2, beta=0.04)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(usual, strict):
        assert all(one[name] == two[name] for name in one if not name.startswith("seconds"))
    assert all(torch.equal(usual_weights[name], strict_weights[name]) for name in usual_weights)


def gloo_threads(ranks):
    """How many of gloo's worker threads live here, after a step."""
    steps(ranks, count=1)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")


def test_gloo_has_one_worker_thread(pair):
    """Two of them write one string without a lock, and now and then end the process."""
    assert pair.run("test_fsdp.gloo_threads") == [1, 1]
