"""Adapters: the base at first, merged as adapted, the same on ranks, resumed, exported. Ranks' parts first."""
import json

import pytest
import ranks
import torch
import torch.distributed as dist
from test_training import close
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import Qwen2_5_VLForConditionalGeneration

import fsdp
import grpo_vl
import lora
import qwen_vl
import sft_coldstart
import training
from data import open_data
from packing import pack_for_ranks, sampled_logps
from policy import Policy
from qwen_vl import Completion, Group, SpecialIds

ADAPTED = 4 * 7  # layers of the stand-in; q, k, v, o, gate, up, down


# ── what each rank does ──
def randomise(policy):
    """Adapters as training may leave them: B is not zero."""
    generator = torch.Generator().manual_seed(3)
    for linear in lora.adapted_linears(policy).values():
        for part in (linear.lora_A, linear.lora_B):
            values = torch.randn(part.shape, generator=generator) * 0.05
            if hasattr(part, "placements"):
                values = distribute_tensor(values, part.device_mesh, part.placements)
            part.data.copy_(values)


def adapted_run(ranks_, **changes):
    run = ranks.make_run(ranks_, **(dict(lora=4) | changes))
    randomise(run.policy)
    run.sampler.refresh(fsdp.gathered_parameters(run.policy, frozen=False))
    return run


def unsharded(model="tiny", rank=4):
    network, tokenizer = qwen_vl.load(model)
    special = SpecialIds.read(tokenizer, network.config)
    policy = Policy(network, special.banned_V)
    if rank:
        lora.adapt(policy, rank)
        randomise(policy)
    return policy, tokenizer, special


def micro_batches(ranks_, tokenizer, special, draws=3):
    """This rank's share of the draws; all ranks together score 8 tokens a draw."""
    world, groups = open_data([ranks.WORLD], seed=0), []
    for draw in range(ranks_.rank, draws, ranks_.world):
        sample = world[draw]
        prompt = qwen_vl.encode_chat(tokenizer, special, sample.question, sample.images)
        tokens = [[*range(70 + draw, 75 + draw), special.im_end], [90 + draw, special.im_end]]
        groups.append(Group(prompt, [Completion(t) for t in tokens]))
    return pack_for_ranks(groups, 80, special, ranks_)


def gradients(ranks_, policy, packs):
    """{name: whole gradient} of the sum of all log-probabilities, over all ranks."""
    for pack in packs:
        (policy(pack)[0].sum() * ranks_.world).backward()
    return {name: fsdp.whole(p.grad).clone() for name, p in policy.named_parameters() if p.requires_grad}


def sharded_gradients(ranks_, model="tiny", bf16=False, draws=3, offload=False):
    """Under FSDP2; bf16: as on a GPU, the base kept in bf16, A and B in fp32, computed in bf16."""
    policy, tokenizer, special = unsharded(model)
    options = {"mesh": dist.init_device_mesh("cpu", (ranks_.world,))}
    if bf16:
        fsdp.cast_kept(policy, torch.device("cuda"))
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for unit in fsdp.units_of(policy):
        fully_shard(unit, **options)
    return gradients(ranks_, policy, micro_batches(ranks_, tokenizer, special, draws))


def refreshed_names(ranks_, **changes):
    """Weights of a first refresh, and of one after a step."""
    run = ranks.make_run(ranks_, **changes)
    first = [name for name, _ in fsdp.gathered_parameters(run.policy)]
    return first, [name for name, _ in fsdp.gathered_parameters(run.policy, frozen=False)]


def exported(ranks_, folder, model):
    """A trained run's model/ and adapter/, and the log-probabilities of its policy."""
    run = ranks.make_run(
        ranks_, model=model, lora=4, lora_alpha=2.0, export="adapter", lr=1.0, steps=2, out=folder)
    assert grpo_vl.train(run)
    packs = micro_batches(ranks_, run.tokenizer, run.special, draws=2)
    with torch.no_grad():
        return [run.policy(pack)[0] for pack in packs]


# ── the formula ──
def test_an_adapted_linear_by_hand():
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
    linear.lora_A, linear.lora_B = nn.Parameter(torch.tensor([[1.0, -1.0]])), nn.Parameter(torch.tensor([[5.0], [7.0]]))
    linear.lora_scale = 0.5
    # W·x + b = (1·2 + 2·3 + 10, 3·2 + 4·3 + 20) = (18, 38); A·x = 2 − 3 = −1; ½·B·(−1) = (−2.5, −3.5)
    assert lora.adapted_linear(linear, torch.tensor([2.0, 3.0])).tolist() == [15.5, 34.5]
    # ½·B·A = ½·[[5, −5], [7, −7]]
    merged = lora.merge(linear.weight, linear.lora_A, linear.lora_B, 0.5)
    assert merged.tolist() == [[3.5, -0.5], [6.5, 0.5]]
    half = lora.merge(linear.weight.bfloat16(), linear.lora_A, linear.lora_B, 2**-12)
    assert half[0, 0].item() == 1 + 5 * 2**-12  # in fp32: bf16 has no number between 1 and 1 + 2⁻⁷


def test_the_gradient_of_an_adapted_linear_by_finite_differences():
    torch.manual_seed(0)
    linear = nn.Linear(5, 4).double().requires_grad_(False)
    x, a, b = torch.randn(3, 5), torch.randn(2, 5), torch.randn(4, 2)

    def value(x, a, b):
        linear.lora_A, linear.lora_B = a, b
        return lora.adapted_linear(linear, x)

    linear.lora_scale = 1.5
    inputs = [part.double().requires_grad_() for part in (x, a, b)]
    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-7)


def test_gradients_of_the_policy_by_finite_differences(alone):
    """Of each of the 56 tensors along its gradient g: (f(θ + ε·g/‖g‖) − f(θ − ε·g/‖g‖)) / 2ε = ‖g‖."""
    policy, tokenizer, special = unsharded()
    (pack,) = micro_batches(alone, tokenizer, special, draws=1)
    found = gradients(alone, policy, [pack])
    assert len(found) == 2 * ADAPTED
    parameters = dict(policy.named_parameters())
    for name, gradient in found.items():
        direction, values = gradient / gradient.norm(), []
        for epsilon in (0.03, -0.03):
            with torch.no_grad():
                parameters[name].add_(direction, alpha=epsilon)
                values.append(policy(pack)[0].double().sum().item())
                parameters[name].add_(direction, alpha=-epsilon)
        assert (values[0] - values[1]) / 0.06 == pytest.approx(gradient.norm().item(), rel=0.02, abs=1e-3), name


# ── the base, and the sum ──
@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_training_begins_at_the_base_and_the_reference_stays_there(alone, model):
    bare, tokenizer, special = unsharded(model, rank=0)
    adapted, *_ = unsharded(model, rank=0)
    lora.adapt(adapted, 4)
    (pack,) = micro_batches(alone, tokenizer, special, draws=1)
    with torch.no_grad():
        want = bare(pack)
        assert all(torch.equal(a, b) for a, b in zip(adapted(pack), want))
        randomise(adapted)
        assert (adapted(pack)[0] - want[0]).abs().max() > 0.1
        assert all(torch.equal(a, b) for a, b in zip(lora.run_base(adapted, pack, 1.0), want))
        assert (adapted(pack)[0] - want[0]).abs().max() > 0.1  # switched on again


def test_each_linear_of_the_decoder_is_adapted_and_nothing_else_trained():
    policy, *_ = unsharded("tiny-untied", rank=0)
    lora.adapt(policy, 3)
    adapted = lora.adapted_linears(policy)
    assert len(adapted) == ADAPTED and all(".language_model.layers." in name for name in adapted)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * ADAPTED and all(name.endswith((".lora_A", ".lora_B")) for name in trained)
    down = policy.decoder.layers[0].mlp.down_proj
    assert down.lora_A.shape == (3, 384) and down.lora_B.shape == (128, 3) and down.lora_scale == 2
    assert down.lora_B.abs().max() == 0 and 0.045 < down.lora_A.abs().max() <= 384**-0.5  # 0.051


@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_the_merged_sampler_is_the_adapted_trainer(alone, model):
    run = adapted_run(alone, model=model)
    groups, *_ = grpo_vl.collect_groups(run, 0)
    (pack,) = pack_for_ranks(groups, 10**6, run.special, alone)
    (sampled_S,) = sampled_logps([c for group in groups for c in group.completions], [pack], "cpu")
    with torch.no_grad():
        logp_S, _ = run.policy(pack)
        base_S, _ = lora.run_base(run.policy, pack)
    assert (logp_S - sampled_S).abs().max() <= 1e-5
    assert (logp_S - base_S).abs().max() > 0.1


def test_a_refresh_takes_what_changes(alone):
    """With adapters 28 merged weights, with a frozen tower all but it."""
    first, later = refreshed_names(alone, lora=4)
    assert len(later) == ADAPTED and all(name.endswith("_proj.weight") for name in later)
    everything, _ = refreshed_names(alone)
    assert first == everything and not any("lora" in name for name in first)
    for sharding in ("fsdp2", "by-hand"):
        first, later = refreshed_names(alone, freeze_vision=True, sharding=sharding)
        assert len(first) == len(everything)
        assert sorted(later) == sorted(name for name in everything if ".visual." not in name)


# ── ranks ──
@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_gradients_of_two_ranks_of_one_and_unsharded(alone, pair, model):
    policy, tokenizer, special = unsharded(model)
    want = gradients(alone, policy, micro_batches(alone, tokenizer, special))
    one = sharded_gradients(alone, model=model)
    two, other = pair.run("test_lora.sharded_gradients", model=model)
    assert len(want) == 2 * ADAPTED and min(g.abs().max() for g in want.values()) > 1e-3
    assert want.keys() == one.keys() and all(torch.equal(one[name], want[name]) for name in want)
    assert close(two, want, 1e-5) and all(torch.equal(two[name], other[name]) for name in two)


def test_a_base_in_bf16_under_adapters_in_fp32(alone, pair):
    """As on a GPU: gradients of a model that is bf16 throughout, and over micro-batches and ranks their fp32 sum."""
    policy, tokenizer, special = unsharded()
    for parameter in policy.parameters():
        parameter.data = parameter.data.bfloat16()
    want = gradients(alone, policy, micro_batches(alone, tokenizer, special, draws=1))
    one = sharded_gradients(alone, bf16=True, draws=1)
    assert want.keys() == one.keys() and all(torch.equal(one[name], want[name].float()) for name in want)
    two, _ = pair.run("test_lora.sharded_gradients", bf16=True, draws=2)
    assert close(two, sharded_gradients(alone, bf16=True, draws=2), 1e-6)
    offloaded, _ = pair.run("test_lora.sharded_gradients", bf16=True, draws=2, offload=True)
    assert offloaded.keys() == two.keys() and all(torch.equal(offloaded[name], two[name]) for name in two)


@pytest.mark.parametrize("changes", [{}, dict(model="tiny-untied", beta=0.1), dict(checkpointing=True, offload=True)])
def test_two_ranks_make_the_same_three_steps_as_one(alone, pair, changes):
    want, weights = ranks.steps(alone, lora=4, **changes)
    (got, two), _ = pair.run("ranks.steps", lora=4, **changes)
    for one, other in zip(want, got):
        for name in {"loss", "grad_norm", "reward", "entropy", "length", "kl"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert [m["grad_norm"] > 1e-4 for m in want] == [True] * 3
    assert max(m["sampler_gap"] for m in [*want, *got]) < 1e-5
    assert close(weights, two, 1e-5)


def test_the_reference_is_the_base_and_kl_grows_from_zero(alone):
    metrics, weights = ranks.steps(alone, lora=4, beta=0.1)
    assert metrics[0]["kl"] == 0 and metrics[2]["kl"] > 1e-3
    bare = qwen_vl.load("tiny")[0].state_dict()
    for name, weight in bare.items():
        assert torch.equal(weights[f"model.{name}"], weight), name


# ── the run folder ──
@pytest.mark.parametrize("changes", [{}, dict(offload=True)])
def test_resume_is_exact(pair, tmp_path, changes):
    found = pair.run("test_training.checkpoint_roundtrip", folder=str(tmp_path), lora=4, **changes)
    assert found == [(True, ["checkpoint-6"])] * 2


@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_the_exports_are_the_trained_policy(pair, alone, tmp_path, model):
    """model/ by Hugging Face, adapter/ by PEFT on the base: both have the log-probabilities of two ranks' policy."""
    from peft import PeftModel

    want = pair.run("test_lora.exported", folder=str(tmp_path), model=model)
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    base, tokenizer = qwen_vl.load(model)
    with_peft = PeftModel.from_pretrained(base, tmp_path / "adapter")
    special = SpecialIds.read(tokenizer, base.config)
    adapted = {name for name, part in with_peft.base_model.model.named_modules() if hasattr(part, "lora_A")}
    assert len(adapted) == ADAPTED and not any("visual" in name for name in adapted)
    assert with_peft.peft_config["default"].lora_alpha == 2.0 and with_peft.peft_config["default"].r == 4
    for network in (merged, with_peft.base_model.model):
        policy = Policy(network.eval(), special.banned_V)
        with torch.no_grad():
            got = [policy(pack)[0] for pack in micro_batches(alone, tokenizer, special, draws=2)]
        assert len(got) == 2  # of rank 0 and of rank 1
        for (own,), (ranks_own,) in zip(zip(got), want):
            assert (own - ranks_own).abs().max() <= 1e-5
    bare, *_ = unsharded(model, rank=0)
    with torch.no_grad():
        assert (bare(micro_batches(alone, tokenizer, special, draws=1)[0])[0] - want[0][0]).abs().max() > 0.01
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == model


def test_longer_limits_come_with_adapters_too(alone):
    """OVR's curriculum of lengths, 4 tokens and then 8: what is sampled grows, and both steps are trained."""
    metrics, _ = ranks.steps(alone, count=2, lora=4, max_tokens=4, max_tokens_at=("1:8",))
    assert metrics[0]["length"] <= 4 < metrics[1]["length"] <= 8
    assert min(m["grad_norm"] for m in metrics) > 1e-4 and max(m["sampler_gap"] for m in metrics) < 1e-5


def test_a_cold_start_with_adapters_leads_to_grpo_with_others(alone, tmp_path):
    """Stage 2 begins at stage 1's merged model: its own adapters are new."""
    cold = sft_coldstart.Config(
        model="tiny", data=(ranks.WORLD,), lora=4, lr=0.01, schedule="constant", warmup=0, batch=2, steps=2,
        eval_every=2, eval_samples=2, eval_tokens=4, checkpointing=False, out=str(tmp_path / "cold"))
    assert sft_coldstart.train(cold, alone)
    model = sft_coldstart.find_model(tmp_path / "cold")
    stage_1 = qwen_vl.load(str(model))[0].state_dict()
    tiny = qwen_vl.load("tiny")[0].state_dict()
    moved = [name for name in tiny if not torch.equal(stage_1[name], tiny[name])]
    assert len(moved) == ADAPTED and all(name.endswith("_proj.weight") for name in moved)
    run = ranks.make_run(alone, model=str(model), lora=8, beta=0.1)
    assert grpo_vl.train_step(run, 0)["kl"] == 0  # its reference is stage 1's model
    weights = dict(fsdp.full_parameters(ranks.make_run(alone, model=str(model), lora=8).policy))
    assert all(torch.equal(weights[f"model.{name}"], stage_1[name]) for name in moved)


# ── does it learn? ──
def sampled_scores(run) -> torch.Tensor:
    """The mean of four answers at T = 1 to each of 300 held-out scenes, by the answer alone. [300]

    Always by the same random numbers: the differences of two calls are the weights'.
    """
    run.sampler.refresh(fsdp.gathered_parameters(run.policy))
    rows = training.answer_heldout(run, 300, tries=4, max_tokens=run.config.max_tokens, greedy=False)
    scores = {}
    for row in rows:
        scores.setdefault(row["id"], []).append(training.right(run.config, row))
    return torch.tensor(list(scores.values())).mean(1)


@pytest.mark.parametrize("trained", [
    dict(lr=1e-4, steps=60), dict(lora=8, lr=1.5e-3, steps=36)], ids=["all weights", "adapters"])
def test_the_demos_task_is_learnt_from_base(alone, trained, tmp_path):
    """Counting, by all weights and by adapters alone. Steps, rank and learning rates were chosen on seeds 11 and 12,
    where the sampled accuracy rose by 0.05 to 0.08, three to five standard errors."""
    demo = grpo_vl.PRESETS["tiny"]
    (world,) = demo["data"]
    changes = dict(data=(f"{world}&seed=1",), seed=1, prompts=16, warmup=3, eval_every=1, pictures_every=0, out=str(tmp_path))
    run = training.prepare(grpo_vl.Config(**(demo | changes | trained)), alone, demo["model"])
    begun = {name: fsdp.whole(weight).clone() for name, weight in run.policy.named_parameters()}
    before = sampled_scores(run)
    for step in range(run.config.steps):
        grpo_vl.train_step(run, step)
    gain = sampled_scores(run) - before
    assert gain.mean() > 0.02
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5  # standard errors
    moved = {name for name, weight in run.policy.named_parameters() if not torch.equal(fsdp.whole(weight), begun[name])}
    if run.config.lora:
        assert len(moved) == 2 * ADAPTED and all(name.endswith(lora.NAMES) for name in moved)
    else:
        assert moved == begun.keys()


# ── refusals ──
@pytest.mark.parametrize("changes, said", [
    (dict(lora=-1), "--lora is -1; it must be 0 or more"),
    (dict(lora=4, lora_alpha=0.0), "--lora-alpha is 0.0; it must be above 0"),
    (dict(export="adapter"), "--export adapter: there is none without --lora RANK"),
    (dict(lora=4, sharding="by-hand", save_every=501), "--sharding by-hand has no --lora"),
])
def test_what_adapters_cannot_is_one_sentence(changes, said):
    with pytest.raises(ValueError, match=said):
        grpo_vl.Config(**changes)


def test_adapters_and_a_trained_tower_are_refused():
    with pytest.raises(ValueError, match="--lora leaves the vision tower as it is: give --train llm"):
        sft_coldstart.Config(lora=4, train="all")
    assert sft_coldstart.Config(lora=4).train == "llm"
