"""What would a GPU hold? `--plan 8x80`, from the model's shape alone: no weights, no hub, no GPU.

§1 the network without memory · §2 the terms, an estimate from above
"""
import math
import re
from dataclasses import dataclass

import torch
from torch import nn

import lora
import qwen_vl
from kv_cache import round_up_places

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
        text, vision = published(name)
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])
        return Qwen2_5_VLForConditionalGeneration(config)


def published(name: str) -> tuple[dict, dict]:
    """(text_config, vision_config) of a name in SHAPES; the rest is Hugging Face's default."""
    width, layers, heads, kv_heads, inner, rows, tied, vision_inner = SHAPES[name]
    text = dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=rows,
        tie_word_embeddings=tied, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    vision = dict(
        depth=32, hidden_size=1280, num_heads=16, intermediate_size=vision_inner, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=width)
    return text, vision


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
    sizes = sizes_of(config, model)
    said = f"{sizes.model:,} parameters"
    if config.lora:
        said += f" and {sizes.trained:,} of adapters"
    print(f"{said} on {gpus} GPUs")
    if config.sharding == "by-hand":
        print("counted as PyTorch shards; by hand no unit is gathered ahead of its turn")

    kept = kept_by_a_rank(config, sizes, gpus)
    moments = held_at_moments(config, model, sizes, gpus, max_tokens)
    moment, terms = max(moments.items(), key=lambda pair: sum(pair[1].values()))
    print(f"on each GPU at the fullest moment, {moment}")
    if not config.offload:
        terms = kept | terms
    peak = sum(terms.values())
    print_terms(terms | {f"peak, of {gib} GiB": peak})
    if config.offload:
        print("in host memory, the share of each GPU")
        print_terms(kept | {"together": sum(kept.values())})
    if peak < 0.9 * gib * 2**30:
        print("fits")
    else:
        print("does not fit: lower --micro-tokens, --kv-gb or --max-pixels, add --lora, --offload "
              "or GPUs")


def print_terms(terms: dict[str, float]) -> None:
    for name, size in terms.items():
        print(f"{name:26}{size / 2**30:8.2f} GiB")


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    model: int  # all of it, without adapters
    trained: int
    frozen: int
    vision: int  # of the tower, if training passes run it; else features come from the sampler
    layer: int  # of a decoder layer, without adapters
    adapters: int  # of a decoder layer's A [rank, in] and B [out, rank]
    root: int  # of what is in no other unit: embeddings, last norm, lm_head


def sizes_of(config, model: nn.Module) -> Sizes:
    layers, tower = model.model.language_model.layers, count(model.model.visual)
    everything, layer = count(model), count(layers[0])
    shapes = [linear.weight.shape for linear in lora.linears(layers[0])]
    adapters = config.lora * sum(rows + columns for rows, columns in shapes)
    if config.lora:
        trained, frozen = len(layers) * adapters, everything
    else:
        frozen = tower if config.freeze_vision else 0
        trained = everything - frozen
    return Sizes(
        model=everything, trained=trained, frozen=frozen,
        vision=0 if config.lora or config.freeze_vision else tower, layer=layer,
        adapters=adapters, root=everything - tower - len(layers) * layer)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def kept_by_a_rank(config, sizes: Sizes, gpus: int) -> dict[str, float]:
    """{what: bytes} that is cut over all ranks and stays from step to step: on the host with
    --offload, else on the GPU."""
    return {
        "trained weights, fp32": 4 * sizes.trained / gpus,
        "frozen weights, bf16": 2 * sizes.frozen / gpus,
        "gradients, fp32": 4 * sizes.trained / gpus,
        "AdamW, fp32": 8 * sizes.trained / gpus,
        "reference, bf16": 2 * sizes.model / gpus if has_second_model(config) else 0}


def held_at_moments(config, model, sizes: Sizes, gpus: int, max_tokens: int):
    """{moment of a step: {what: bytes}} on a GPU, beside what `kept_by_a_rank` counts. (Images of
    the other micro-batches wait on the host, which is not counted.)"""
    text, vision = model.config.text_config, model.config.vision_config
    prompts = math.ceil(config.prompts / gpus)
    image_tokens = prompts * min(config.max_pixels // 28**2, config.max_prompt)  # an image a prompt
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    in_a_batch = min(image_tokens, config.micro_tokens)  # of them, in a micro-batch
    patches, features = 0, in_a_batch * text.hidden_size  # of a frozen tower
    if sizes.vision:  # which runs in each pass; four patches are a token
        patches, features = 4 * in_a_batch, 0
    vision_kept, vision_again = saved(config, patches, vision, vision.depth)
    kept, again = saved(config, config.micro_tokens, text, text.num_hidden_layers)
    layer = sizes.layer + sizes.adapters
    trained_root = 0 if config.lora else sizes.root
    trained_layer = sizes.adapters if config.lora else sizes.layer
    reduced = 4 + 4 / gpus  # bytes of a number to reduce in fp32, and of a rank's part of the sum
    always = {
        "sampling copy, bf16": 2 * sizes.model,
        "keys and values, bf16": cache(config, text, prompts, max_tokens)}
    in_a_pass = always | {
        "pixels, bf16": 2 * patches * patch,  # kept for the backward of the patch embedding
        "image features, bf16": 2 * features,
        "whole root, bf16": 2 * sizes.root,
        "root of the reference": 2 * sizes.root if has_second_model(config) else 0}
    lm_head = in_a_pass | {
        "whole layers, bf16": 2 * layer,  # the last one is on its way
        "a layer from the host": from_host(config, sizes) / gpus,
        "gradient of the root, bf16": 2 * trained_root,
        "activations": kept,
        "vision activations": vision_kept,
        "logits of a chunk": 10 * 1024 * text.vocab_size}  # two in fp32 and one in bf16
    decoder = in_a_pass | {
        "whole layers, bf16": 2 * layer,
        "next unit, bf16": 2 * max(layer, sizes.vision),  # on its way; the last one is the tower
        "a layer from the host": from_host(config, sizes) / gpus,
        "gradient of a layer": (2 + reduced) * trained_layer,
        "gradient of the root, bf16": 2 * trained_root,
        "activations": kept + again,
        "vision activations": vision_kept}
    copies = 3 if model.config.tie_word_embeddings else 1  # as lm_head, as embedding, their sum
    tower = in_a_pass | {
        "whole tower, bf16": 2 * sizes.vision,
        "gradient of a layer": reduced * trained_layer,  # of the last one, on its way
        "gradient of the root, bf16": 2 * copies * trained_root,
        "gradient of the tower, bf16": 2 * sizes.vision,
        "vision activations": vision_kept + vision_again}
    end = in_a_pass | {  # what has inputs without gradients is reduced last, one after the other
        "whole tower, bf16": 2 * sizes.vision,
        "gradient of the root, bf16": 2 * trained_root,
        "gradient of the tower, bf16": 2 * sizes.vision,
        "gradient in fp32": reduced * max(trained_root, sizes.vision)}
    return {
        "lm_head's backward": lm_head, "the decoder's backward": decoder,
        "the tower's backward": tower, "the last reduce-scatter": end,
        "the sampler's refresh": always | for_the_sampler(config, model, gpus)}


def has_second_model(config) -> bool:
    """A reference of its own: with adapters, the model without them is the reference."""
    return config.beta > 0 and not config.lora


def from_host(config, sizes: Sizes) -> int:
    """Bytes of a layer on its way to a GPU: as the host keeps it, and in bf16."""
    if not config.offload:
        return 0
    frozen = sizes.layer if config.lora else 0
    trained = sizes.layer + sizes.adapters - frozen
    return (4 + 2) * trained + (2 + 2) * frozen


def for_the_sampler(config, model: nn.Module, gpus: int) -> dict[str, float]:
    """A unit at a time is gathered: it arrives rank after rank, and is laid out weight by weight.

    On one GPU nothing arrives, and a weight is cast on its way: less than is counted here.
    """
    weight = max(parameter.numel() for parameter in model.parameters())
    adapted = [linear.weight.numel() for linear in lora.linears(model.model.language_model.layers)]
    unit = largest_unit(model, gpus)
    kept = 2 if config.lora else 4  # bytes of a number
    return {
        "a unit as it arrives, bf16": 2 * unit,
        "a unit for the sampler": 2 * unit,
        "a weight from the host": kept * weight / gpus if config.offload else 0,
        "a merged weight, fp32": (4 + 4) * max(adapted) if config.lora else 0}  # W, W + α/r·B·A


def largest_unit(model: nn.Module, gpus: int) -> int:
    """Numbers of FSDP's largest unit: tower, decoder layer or root. A layer's adapters are few."""
    tower, layers = model.model.visual, model.model.language_model.layers
    inner = {*tower.parameters(), *layers.parameters()}
    root = [parameter for parameter in model.parameters() if parameter not in inner]
    sizes = []
    for unit in (tower.parameters(), layers[0].parameters(), root):
        sizes.append(sum(padded(parameter, gpus) for parameter in unit))
    return max(sizes)


def padded(parameter: torch.Tensor, gpus: int) -> int:
    """Numbers in all ranks' shards: each has as many rows as the first."""
    rows = len(parameter)
    return math.ceil(rows / gpus) * gpus * (parameter.numel() // rows)


def cache(config, text, prompts: int, max_tokens: int) -> int:
    """Bytes of keys and values as the sampler reserves them: of all rows, but no more than --kv-gb;
    of one row at least. Plain twin: `kv_cache.Cache.reserve`."""
    head = text.hidden_size // text.num_attention_heads
    keys = text.num_hidden_layers * text.num_key_value_heads * head
    token = 2 * 2 * keys  # and as many values, 2 bytes each
    prompt = round_up_places(config.max_prompt)
    one_row = (prompt + max_tokens) * token
    all_rows = prompts * (prompt + config.group * max_tokens) * token
    return max(one_row, min(all_rows, int(config.kv_gb * 2**30)))


def saved(config, tokens: int, shape, layers: int) -> tuple[int, int]:
    """Bytes in bf16 that the backward needs: (from forward, and of the layer computed again).

    Each layer's input is kept, and what is inside of those that are not checkpointed: counted, 14
    tensors of the layer's width, 6 of its MLP's. --keep-attention: one of the layer's width more.
    """
    inside = 14 * shape.hidden_size + 6 * shape.intermediate_size
    if config.checkpointing:
        again, not_checkpointed = inside, layers - math.ceil(layers / config.checkpoint_every)
    else:
        again, not_checkpointed = 0, layers
    kept = layers * shape.hidden_size + not_checkpointed * inside
    if config.checkpointing and config.keep_attention:
        kept += (layers - not_checkpointed) * shape.hidden_size
    return 2 * tokens * kept, 2 * tokens * again
