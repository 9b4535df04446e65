"""What a GPU would hold: the published shapes, each term by hand, what is no plan."""
import functools
import itertools

import pytest
import torch
from torch import nn

import fsdp
import grpo_vl
import lora
import plan
import policy as policy_module
import qwen_vl
from kv_cache import Cache
from policy import Policy, token_logprobs
from qwen_vl import SpecialIds


def no_hub(*_, **__):
    raise AssertionError("a published shape needs no hub")


@pytest.mark.parametrize("size, parameters", [  # the safetensors headers of the published checkpoints
    ("3B", "3,754,622,976"), ("7B", "8,292,166,656"), ("32B", "33,452,718,336"), ("72B", "73,410,777,344"),
])
def test_the_published_shapes_are_built_in(size, parameters, monkeypatch, capsys):
    monkeypatch.setattr(qwen_vl, "load", no_hub)
    model = f"Qwen/Qwen2.5-VL-{size}-Instruct"
    plan.show(grpo_vl.Config(model=model, plan="64x80"), 768)
    assert capsys.readouterr().out.splitlines()[0] == f"{parameters} parameters on 64 GPUs"
    assert plan.bare_model(model).config.tie_word_embeddings == (size == "3B")


# 7B: a layer has 3584² + 3584 (q), 2·(512·3584 + 512) (k, v), 3584² (o), 3·3584·18944 (MLP), 2·3584 (norms)
# = 233,057,792, the tower 676,550,144, the root 2·152064·3584 + 3584 = 1,089,998,336; 8,292,166,656 together.
KEPT = {
    "trained weights, fp32": 4_146_083_328,  # 4 bytes / 8 GPUs
    "frozen weights, bf16": 0,
    "gradients, fp32": 4_146_083_328,
    "AdamW, fp32": 8_292_166_656,  # two moments
    "reference, bf16": 0,
}
ALWAYS = {
    "sampling copy, bf16": 16_584_333_312,
    # a token 2·2·28·512 = 57,344 bytes, a prompt 2048 + 8·768 = 8,192 tokens: 469,762,048; 16 prompts on 8 GPUs
    "keys and values, bf16": 939_524_096,
}
# 1,000,000 pixels are 1,275 tokens, two prompts 10,200 patches of 3·2·14² numbers
IN_A_PASS = ALWAYS | {
    "pixels, bf16": 23_990_400, "image features, bf16": 0, "whole root, bf16": 2_179_996_672, "root of the reference": 0}
LM_HEAD = IN_A_PASS | {
    "whole layers, bf16": 466_115_584,  # the last one
    "a layer from the host": 0,
    "gradient of the root, bf16": 2_179_996_672,
    "activations": 3_288_334_336,  # 2·16,384·28·3584: inputs of layers
    "vision activations": 835_584_000,  # 2·10,200·32·1280: inputs of blocks
    "logits of a chunk": 1_557_135_360,  # 1024·152064·(4 + 4 + 2): π and the gradient, in fp32 and rounded
}
DECODER = IN_A_PASS | {
    "whole layers, bf16": 466_115_584,
    "next unit, bf16": 1_353_100_288,  # the tower's 676,550,144
    "a layer from the host": 0,
    "gradient of a layer": 1_514_875_648,  # 2 bytes, 4 to be reduced, 4/8 of the sum
    "gradient of the root, bf16": 2_179_996_672,
    "activations": 8_657_043_456,  # 2·16,384·(28·3584 inputs + 14·3584 + 6·18944 of the layer computed again)
    "vision activations": 835_584_000,
}
TOWER = IN_A_PASS | {
    "whole tower, bf16": 1_353_100_288,
    "gradient of a layer": 1_048_760_064,  # 4 + 4/8 bytes: the last one is being reduced
    "gradient of the root, bf16": 2_179_996_672,  # untied
    "gradient of the tower, bf16": 1_353_100_288,
    "vision activations": 1_619_760_000,  # 2·10,200·(32·1280 + 14·1280 + 6·3420)
}
END = IN_A_PASS | {
    "whole tower, bf16": 1_353_100_288,
    "gradient of the root, bf16": 2_179_996_672,
    "gradient of the tower, bf16": 1_353_100_288,
    "gradient in fp32": 4_904_992_512,  # 4 + 4/8 bytes of the root, the larger one
}
REFRESH = ALWAYS | {
    "a unit as it arrives, bf16": 2_179_996_672,  # the root
    "a unit for the sampler": 2_179_996_672, "a weight from the host": 0, "a merged weight, fp32": 0}


@functools.cache
def model_7b():
    return plan.bare_model("Qwen/Qwen2.5-VL-7B-Instruct")


def held(gpus=8, **options):
    """(kept, the five moments)."""
    config = grpo_vl.Config(model="Qwen/Qwen2.5-VL-7B-Instruct", **options)
    sizes = plan.sizes_of(config, model_7b())
    moments = plan.held_at_moments(config, model_7b(), sizes, gpus, config.max_tokens)
    return plan.kept_by_a_rank(config, sizes, gpus), *moments.values()


def test_each_term_of_the_plan_by_hand():
    assert held() == (KEPT, LM_HEAD, DECODER, TOWER, END, REFRESH)


def test_a_reference_in_the_plan():
    """Its weights, and its root, which waits for a backward that never comes."""
    kept, _, decoder, *_ = held(beta=0.04)
    assert kept == KEPT | {"reference, bf16": 2_073_041_664}
    assert decoder == DECODER | {"root of the reference": 2_179_996_672}


def test_a_frozen_tower_in_the_plan():
    """7,615,616,512 are trained; the tower is kept in bf16, and training passes never ask for it."""
    kept, _, decoder, tower, end, _ = held(freeze_vision=True)
    assert kept == KEPT | {
        "trained weights, fp32": 3_807_808_256, "frozen weights, bf16": 169_137_536,
        "gradients, fp32": 3_807_808_256, "AdamW, fp32": 7_615_616_512}
    assert decoder == DECODER | {
        "pixels, bf16": 0, "image features, bf16": 18_278_400,  # 2·1,275·3584 numbers
        "next unit, bf16": 466_115_584, "vision activations": 0}
    for moment in (tower, end):
        assert all(moment[name] == 0 for name in moment if "tower" in name or "vision" in name)


def test_adapters_in_the_plan():
    """Rank 32: 32·(2·7168 + 2·4096 + 3·22,528) = 2,883,584 a layer, of inputs + outputs of q, o; k, v; the MLP;
    80,740,352 together. No reference of its own, no gradient of the root, no tower."""
    kept, head, decoder, tower, end, refresh = held(gpus=1, lora=32, beta=0.04, offload=True)
    assert kept == {
        "trained weights, fp32": 322_961_408, "frozen weights, bf16": 16_584_333_312,
        "gradients, fp32": 322_961_408, "AdamW, fp32": 645_922_816, "reference, bf16": 0}
    assert decoder == DECODER | {
        "keys and values, bf16": 16 * 469_762_048,
        "pixels, bf16": 0, "image features, bf16": 117_440_512,  # of 16,384 tokens: 16 prompts have 20,400
        "whole layers, bf16": 471_882_752, "next unit, bf16": 471_882_752,  # 2·(233,057,792 + 2,883,584)
        "a layer from the host": 949_532_672,  # frozen 2 + 2 bytes, adapters 4 + 2
        "gradient of a layer": 28_835_840,  # of adapters, 2 + 4 + 4 bytes
        "gradient of the root, bf16": 0, "vision activations": 0}
    assert refresh == REFRESH | {
        "keys and values, bf16": 16 * 469_762_048,
        "a weight from the host": 1_089_994_752,  # 152064·3584 in bf16
        "a merged weight, fp32": 543_162_368}  # 8·3584·18944: W, and its sum with B·A
    assert max(sum(moment.values()) for moment in (head, tower, end)) < sum(decoder.values())


def test_offload_in_the_plan():
    kept, _, decoder, _, _, refresh = held(offload=True)
    assert kept == KEPT and decoder == DECODER | {"a layer from the host": 174_793_344}  # (4 + 2)·233,057,792 / 8
    assert refresh == REFRESH | {"a weight from the host": 272_498_688}  # 152064·3584 in fp32, / 8


@pytest.mark.parametrize("options, changes", [
    (dict(kv_gb=0.1), {"keys and values, bf16": 161_480_704}),  # one row's 2816 tokens, though they are 0.15 GiB
    (dict(kv_gb=0.5, prompts=80), {"keys and values, bf16": 536_870_912}),  # all of it: ten prompts are 4.4 GiB
    (dict(prompts=800), {"keys and values, bf16": 8_589_934_592}),
    (dict(max_prompt=600), {"keys and values, bf16": 2 * 9 * 768 * 57_344}),  # 600 lie in 768 places
    (dict(checkpoint_every=2), {  # 14 layers and 16 blocks are not, and one layer is computed again
        "activations": 2 * 16_384 * (28 * 3584 + 15 * 163_840),
        "vision activations": 2 * 10_200 * (32 * 1280 + 16 * 38_440)}),
    (dict(checkpoint_every=2, keep_attention=True), {  # of 14 layers and 16 blocks, a row of their width each
        "activations": 2 * 16_384 * (28 * 3584 + 15 * 163_840 + 14 * 3584),
        "vision activations": 2 * 10_200 * (32 * 1280 + 16 * 38_440 + 16 * 1280)}),
    (dict(checkpoint_every=2, checkpointing=False), {
        "activations": 2 * 16_384 * (28 * 3584 + 28 * 163_840),
        "vision activations": 2 * 10_200 * (32 * 1280 + 32 * 38_440)}),
])
def test_what_options_change_in_the_decoders_backward(options, changes):
    decoder = held(**options)[2]
    assert {name: decoder[name] for name in changes} == changes


@pytest.mark.parametrize("options, patches", [  # of as many images as fit the micro-batch
    (dict(kv_gb=0.5, prompts=80), 51_000), (dict(prompts=800), 65_536),
])
def test_patches_of_a_micro_batch(options, patches):
    assert held(**options)[3]["vision activations"] == 2 * patches * 79_400


def test_pixels_or_features_of_one_micro_batch_are_there():
    """100 prompts a GPU of 1,275 image tokens: a micro-batch has 16,384, of four patches."""
    assert held(prompts=800)[1]["pixels, bf16"] == 2 * 65_536 * 1176
    assert held(prompts=800, freeze_vision=True)[1]["image features, bf16"] == 2 * 16_384 * 3584


def test_tied_embeddings_have_a_gradient_of_each_place_and_their_sum():
    model = plan.bare_model("Qwen/Qwen2.5-VL-3B-Instruct")
    config = grpo_vl.Config()
    _, _, tower, *_ = plan.held_at_moments(config, model, plan.sizes_of(config, model), 8, 768).values()
    assert tower["gradient of the root, bf16"] == 3 * 2 * (151_936 * 2048 + 2048)


@pytest.mark.parametrize("gpus, size", [
    (1, 668_684_288),  # 32 blocks of 19,702,200, and 38,213,888 of patches and merger
    (8, 669_012_224),  # 4 rows more in each block's two [3420, 1280] and their biases: 32·2·4·1281
])
def test_at_3b_the_tower_is_the_largest_unit_that_a_refresh_gathers(gpus, size):
    model = plan.bare_model("Qwen/Qwen2.5-VL-3B-Instruct")
    assert plan.largest_unit(model, gpus) == size
    found = plan.for_the_sampler(grpo_vl.Config(), model, gpus)
    assert sum(found.values()) == 4 * size


# ── held against what is counted elsewhere ──
@pytest.mark.parametrize("options", [
    dict(), dict(kv_gb=0.1), dict(kv_gb=0.5), dict(kv_gb=2.0, prompts=14), dict(max_prompt=600), dict(group=3, prompts=5)])
def test_keys_and_values_are_counted_as_the_sampler_reserves_them(options):
    """To the layer: the sampler's are as many whole numbers in each of 28."""
    config = grpo_vl.Config(**options)
    reserved = Cache(layers=28, kv_heads=4, head_width=128, kv_gb=config.kv_gb, device=torch.device("meta"),
                     dtype=torch.bfloat16, graphs=True)
    shape = reserved.first_shape([config.max_prompt] * config.prompts, config.group, 768)
    reserved.reserve(shape, 768)
    planned = plan.cache(config, model_7b().config.text_config, config.prompts, 768)
    assert 0 <= planned - sum(layer.nbytes for layer in reserved.layers) < 28 * 2


def shards(ranks, **options):
    """Bytes of this rank's shards as on a GPU: (trained, frozen), and of AdamW's two moments."""
    network, tokenizer = qwen_vl.load("tiny-untied")
    policy = Policy(network, SpecialIds.read(tokenizer, network.config).banned_V)
    if options.get("lora"):
        lora.adapt(policy, options["lora"])
    policy.vision.requires_grad_(not options)
    fsdp.cast_kept(policy, torch.device("cuda"))
    fsdp.shard(policy, ranks)
    optimizer = torch.optim.AdamW(fsdp.trainable_parameters(policy))
    for parameter in fsdp.trainable_parameters(policy):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    trained, frozen = (
        sum(fsdp.local(p).nbytes for p in policy.parameters() if p.requires_grad == kind) for kind in (True, False))
    state = sum(fsdp.local(v).nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    return trained, frozen, state


@pytest.mark.parametrize("options", [{}, dict(freeze_vision=True), dict(lora=4)])
def test_what_a_rank_keeps_is_what_fsdp_keeps(pair, options):
    """Two ranks' shards together: a rank alone may have a row more than the other."""
    config = grpo_vl.Config(model="tiny-untied", **options)
    kept = plan.kept_by_a_rank(config, plan.sizes_of(config, plan.bare_model("tiny-untied")), 2)
    one, two = pair.run("test_plan.shards", **options)
    planned = kept["trained weights, fp32"], kept["frozen weights, bf16"], kept["AdamW, fp32"]
    assert [a + b for a, b in zip(one, two)] == [2 * size for size in planned]


def test_adapters_are_counted_as_they_are_made():
    model = plan.bare_model("Qwen/Qwen2.5-VL-3B-Instruct")
    sizes = plan.sizes_of(grpo_vl.Config(lora=32), model)
    policy = Policy(model, torch.zeros(1, dtype=torch.bool))
    lora.adapt(policy, 32)
    trained = [p.numel() for p in policy.parameters() if p.requires_grad]
    # 36 layers of 32·(q, o: 2·4096; k, v: 2·2304; MLP: 3·13,056)
    assert sum(trained) == sizes.trained == 59_867_136 and sizes.frozen == 3_754_622_976


# ── what is printed ──
def test_the_plan_prints_its_terms_and_the_peak(capsys):
    plan.show(grpo_vl.Config(model="Qwen/Qwen2.5-VL-7B-Instruct", plan="8x80"), 768)
    lines = capsys.readouterr().out.splitlines()
    # 16,584,333,312 bytes kept and DECODER's 34,758,550,528
    assert lines[1] == "on each GPU at the fullest moment, the decoder's backward"
    assert "sampling copy, bf16          15.45 GiB" in lines and lines[-1] == "fits"
    assert lines[-2] == "peak, of 80 GiB              47.79 GiB"
    plan.show(grpo_vl.Config(model="Qwen/Qwen2.5-VL-7B-Instruct", plan="8x50"), 768)
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: lower --micro-tokens")
    plan.show(grpo_vl.Config(plan="8x80", sharding="by-hand", save_every=501), 768)
    assert "counted as PyTorch shards; by hand no unit is gathered ahead of its turn" in capsys.readouterr().out


def test_the_plan_prints_adapters_and_what_the_host_keeps(capsys):
    plan.show(grpo_vl.Config(model="Qwen/Qwen2.5-VL-7B-Instruct", plan="1x48", lora=32, offload=True), 768)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8,292,166,656 parameters and 80,740,352 of adapters on 1 GPUs"
    host = lines.index("in host memory, the share of each GPU")
    assert not any(line.startswith("frozen weights") for line in lines[:host])
    assert "frozen weights, bf16         15.45 GiB" in lines[host:]
    assert lines[-2] == "together                     16.65 GiB"  # 17,876,178,944 bytes


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_chunk_of_logits_takes_two_copies(monkeypatch, chunks, entropy):
    """Counted by the allocator: the peak of forward and backward over one [chunk, V] in fp32 (in bf16: half one more)."""
    monkeypatch.setattr(policy_module, "KEPT_BYTES", 0)
    rows, ids = 512, 4096
    weight = nn.Parameter(torch.zeros(ids, 8))
    hidden, target = torch.zeros(chunks * rows, 8, requires_grad=True), torch.zeros(chunks * rows).long()
    banned = torch.zeros(ids).bool()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        token_logprobs(hidden, weight, target, banned, 1.0, entropy, chunk=rows)[0].sum().backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(itertools.accumulate(sizes)) / (rows * ids * 4) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("given", ["80", "8x", "x80", "0x80", "8x0", "8x80x2", "8x80GB", "-8x80", "two"])
def test_a_plan_that_is_none_is_one_sentence(given):
    with pytest.raises(SystemExit, match=f"--plan is '{given}'; give GPUs and GiB of each, as in 8x80"):
        plan.show(grpo_vl.Config(plan=given), 768)


def test_a_plan_for_no_model_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=f"no shape of --model {tmp_path}: .*") as stopped:
        plan.show(grpo_vl.Config(plan="8x80", model=str(tmp_path)), 768)
    assert "\n" not in str(stopped.value)


def test_the_stand_in_is_planned_too(capsys):
    plan.show(grpo_vl.Config(plan="2x1", model="tiny"), 24)
    assert capsys.readouterr().out.startswith("1,460,288 parameters on 2 GPUs")
