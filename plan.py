"""What would a GPU hold? `--plan 8x80`, from the model's shape alone: no weights, no hub, no GPU.

§1 the network without memory · §2 the terms, an estimate from above
"""
import math
import re

import torch
from torch import nn

import qwen_vl

# §1 ──────────────────────────────── the network without memory ──────────────────────────────
SHAPES = {  # of the published config.json: width, layers, heads, key/value heads, width of the MLP,
    # vocabulary, tied embeddings, width of the vision tower's MLP (else the towers are alike)
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "Qwen/Qwen2.5-VL-32B-Instruct": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "Qwen/Qwen2.5-VL-72B-Instruct": (8192, 80, 64, 8, 29568, 152064, False, 3456)}


def bare_model(name: str) -> nn.Module:
    """The network without memory for its weights; the published four need no hub."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        if name not in SHAPES:
            try:
                return qwen_vl.load(name, weights=False)[0]
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise SystemExit(f"--plan knows no shape of --model {name}: {reason}") from None
        width, layers, heads, kv_heads, inner, rows, tied, vision_inner = SHAPES[name]
        text = dict(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=rows,
            tie_word_embeddings=tied)
        vision = dict(
            depth=32, hidden_size=1280, num_heads=16, intermediate_size=vision_inner,
            out_hidden_size=width)
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied)
        return Qwen2_5_VLForConditionalGeneration(config)


# §2 ──────────────────────────────────────── the terms ───────────────────────────────────────
def show(config, max_tokens: int) -> None:
    """Print what each GPU of `grpo_vl.py --plan 8x80` would hold, an estimate from above.

    Errors: SystemExit if --plan is no such pair.
    """
    shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", config.plan)
    if not shape:
        raise SystemExit(f"--plan is {config.plan!r}; give GPUs and GiB of each, as in 8x80")
    gpus, gib = int(shape[1]), int(shape[2])
    model = bare_model(config.model)
    print(f"{count(model):,} parameters on {gpus} GPUs")
    held = held_by_a_rank(config, model, gpus, max_tokens)
    peak = sum(held.values())
    for name, size in [*held.items(), (f"peak, of {gib} GiB", peak)]:
        print(f"{name:26}{size / 2**30:8.2f} GiB")
    if peak < 0.9 * gib * 2**30:
        print("fits")
    else:
        print("does not fit: lower --micro-tokens, --kv-gb or --max-pixels, add --offload or GPUs")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def held_by_a_rank(config, model: nn.Module, gpus: int, max_tokens: int) -> dict[str, float]:
    """{what: bytes}, as `shard` cuts the model. Each term at its own peak, all at once."""
    text, vision_config = model.config.text_config, model.config.vision_config
    layers = text.num_hidden_layers
    weights, vision = count(model), count(model.model.visual)
    layer = count(model.model.language_model.layers[0])
    root = weights - vision - layers * layer
    gathered = root + vision + 2 * layer  # one computes, the next is on its way
    if config.beta:
        gathered += root  # the reference's stays whole: it waits for a backward
    trained_vision = 0 if config.freeze_vision else vision
    trained = weights - vision + trained_vision
    reduced = root + max(layer, trained_vision)  # the root's lasts through the backward
    parts = math.inf if config.offload else gpus  # offloaded: in host memory

    prompts = math.ceil(config.prompts / gpus)
    image_tokens = min(config.max_pixels // 28**2, config.max_prompt)  # one image a prompt
    patches = 4 * min(prompts * image_tokens, config.micro_tokens)
    pictures = saved(config, patches, vision_config, vision_config.depth)
    return {
        "weights, fp32, sharded": 4 * weights / parts,
        "gradients, fp32, sharded": 4 * trained / parts,
        "AdamW, fp32, sharded": 8 * trained / parts,
        "reference, bf16, sharded": 2 * weights / parts if config.beta else 0,
        "gathered units, bf16": 2 * gathered,
        "gradients of units, bf16": 2 * reduced,
        "reduce-scatter input, fp32": 4 * reduced,
        "sampling copy, bf16": 2 * weights,
        "keys and values, bf16": cache(config, text, prompts, max_tokens),
        "activations": saved(config, config.micro_tokens, text, layers),
        "vision activations": 0 if config.freeze_vision else pictures,
        "logits of a chunk": 10 * 1024 * text.vocab_size}  # two in fp32 and one in bf16


def cache(config, text, prompts: int, max_tokens: int) -> int:
    """Bytes of keys and values as the sampler reserves them: at least one prompt's."""
    head = text.hidden_size // text.num_attention_heads
    keys = text.num_hidden_layers * text.num_key_value_heads * head
    token = 2 * 2 * keys  # and as many values, 2 bytes each
    tokens = config.max_prompt + config.group * max_tokens
    one_prompt = tokens * token
    at_once = max(1, int(config.kv_gb * 2**30 // one_prompt))
    return min(prompts, at_once) * one_prompt


def saved(config, tokens: int, shape, layers: int) -> int:
    """Bytes that the backward needs in bf16: each layer's input, and what is inside of those that
    are not checkpointed and of one: counted, 14 tensors of the layer's width, 6 of its MLP's."""
    inside = 14 * shape.hidden_size + 6 * shape.intermediate_size
    open_layers = layers
    if config.checkpointing:
        open_layers = 1 + layers - math.ceil(layers / config.checkpoint_every)
    return 2 * tokens * (layers * shape.hidden_size + open_layers * inside)
