"""What a GPU would hold: the published shapes, each term by hand, what is no plan."""
import itertools

import pytest
import torch
from torch import nn

import grpo_vl
import plan
import policy as policy_module
import qwen_vl
from policy import token_logprobs


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
HELD = {
    "weights, fp32, sharded": 4_146_083_328,  # 4 bytes / 8 GPUs
    "gradients, fp32, sharded": 4_146_083_328,
    "AdamW, fp32, sharded": 8_292_166_656,  # two moments
    "reference, bf16, sharded": 0,
    "gathered units, bf16": 4_465_328_128,  # root, tower and two layers, 2 bytes
    "gradients of units, bf16": 3_533_096_960,  # root and tower, 2 bytes
    "reduce-scatter input, fp32": 7_066_193_920,  # the same, 4 bytes
    "sampling copy, bf16": 16_584_333_312,
    # a token 2·2·28·512 = 57,344 bytes, a prompt 2048 + 8·768 = 8,192 tokens: 469,762,048; 16 prompts on 8 GPUs
    "keys and values, bf16": 939_524_096,
    "activations": 8_657_043_456,  # 2·16,384·(28·3584 inputs + 14·3584 + 6·18944 of the open layer)
    # 1,000,000 pixels are 1,275 tokens, two prompts 10,200 patches; 2·10,200·(32·1280 + 14·1280 + 6·3420)
    "vision activations": 1_619_760_000,
    "logits of a chunk": 1_557_135_360,  # 1024·152064·(4 + 4 + 2): π and the gradient, in fp32 and rounded
}


def held(gpus=8, **options):
    config = grpo_vl.Config(model="Qwen/Qwen2.5-VL-7B-Instruct", **options)
    return plan.held_by_a_rank(config, plan.bare_model(config.model), gpus, config.max_tokens)


@pytest.mark.parametrize("options, changes", [
    (dict(), {}),
    (dict(beta=0.04), {  # its weights, and its root, which waits for a backward that never comes
        "reference, bf16, sharded": 2_073_041_664, "gathered units, bf16": 4_465_328_128 + 2_179_996_672}),
    (dict(freeze_vision=True), {  # 7,615,616,512 are trained; root and a layer are 1,323,056,128
        "gradients, fp32, sharded": 3_807_808_256, "AdamW, fp32, sharded": 7_615_616_512,
        "gradients of units, bf16": 2_646_112_256, "reduce-scatter input, fp32": 5_292_224_512,
        "vision activations": 0}),
    (dict(offload=True), {
        "weights, fp32, sharded": 0, "gradients, fp32, sharded": 0, "AdamW, fp32, sharded": 0}),
    (dict(kv_gb=0.1), {"keys and values, bf16": 469_762_048}),  # one prompt, though it is 0.44 GiB
    (dict(kv_gb=0.5, prompts=80), {  # one of ten prompts at once; all ten images fit the micro-batch
        "keys and values, bf16": 469_762_048, "vision activations": 8_098_800_000}),
    (dict(prompts=800), {  # 18 prompts in 8 GiB; no more than 16,384 image tokens in a micro-batch
        "keys and values, bf16": 8_455_716_864, "vision activations": 2 * 65_536 * 79_400}),
    (dict(checkpoint_every=2), {  # 14 layers and 16 blocks are kept open, and one is while it is computed again
        "activations": 2 * 16_384 * (28 * 3584 + 15 * 163_840),
        "vision activations": 2 * 10_200 * (32 * 1280 + 17 * 38_440)}),
    (dict(checkpoint_every=2, checkpointing=False), {
        "activations": 2 * 16_384 * (28 * 3584 + 28 * 163_840),
        "vision activations": 2 * 10_200 * (32 * 1280 + 32 * 38_440)}),
    (dict(checkpointing=False), {  # all 28 layers and 32 blocks are open
        "activations": 2 * 16_384 * (28 * 3584 + 28 * 163_840),
        "vision activations": 2 * 10_200 * (32 * 1280 + 32 * 38_440)}),
])
def test_each_term_of_the_plan_by_hand(options, changes):
    assert held(**options) == HELD | changes


def test_the_plan_prints_its_terms_and_the_peak(capsys):
    plan.show(grpo_vl.Config(model="Qwen/Qwen2.5-VL-7B-Instruct", plan="8x80"), 768)
    lines = capsys.readouterr().out.splitlines()
    # 61,006,748,544 bytes together
    assert "sampling copy, bf16          15.45 GiB" in lines and lines[-1] == "fits"
    assert lines[-2] == "peak, of 80 GiB              56.82 GiB"
    plan.show(grpo_vl.Config(model="Qwen/Qwen2.5-VL-7B-Instruct", plan="8x63"), 768)  # 0.9 · 63 = 56.7
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: lower --micro-tokens")


def test_a_chunk_of_logits_takes_two_copies(monkeypatch):
    """Counted by the allocator: the peak of forward and backward over one [chunk, V] in fp32 (in bf16: half one more)."""
    monkeypatch.setattr(policy_module, "KEPT_BYTES", 0)
    rows, ids = 512, 4096
    weight = nn.Parameter(torch.zeros(ids, 8))
    hidden, target, banned = torch.zeros(rows, 8, requires_grad=True), torch.zeros(rows).long(), torch.zeros(ids).bool()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        token_logprobs(hidden, weight, target, banned, 1.0)[0].sum().backward()
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
