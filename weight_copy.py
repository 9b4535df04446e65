"""With which weights is sampled? A copy of the policy's, allocated once, refreshed after each step.

It is whole on every rank, in the dtype to compute with, and some weights are stacked: decoding a
token is bound by how many kernels it starts and how many bytes it reads. Static addresses let
captured graphs live as long as the run.
Plain twin (tests/test_sampler.py): the policy's own layers.

Shapes: P prompts, T tokens, D width, F width of the MLP, H query heads, K key/value heads, d head
width.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from policy import (
    compiled,
    gated,
    half_negated,
    halves_swapped,
    replace_vision_forwards,
    rms_norm,
)


@dataclass
class Layer:
    """A decoder layer's weights. Reading them bounds a step, so some are stacked: fewer reads."""

    norm_in: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(H + 2K)·d, D]
    qkv_bias: torch.Tensor  # [(H + 2K)·d]
    out: torch.Tensor  # [D, H·d]
    norm_mlp: torch.Tensor  # [D]
    gate_up: torch.Tensor  # [2F, D]
    down: torch.Tensor  # [D, F]


LAYER_PARTS = {  # Hugging Face's parameters in each of a Layer's tensors
    "norm_in": ["input_layernorm.weight"],
    "qkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "qkv_bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "out": ["self_attn.o_proj.weight"],
    "norm_mlp": ["post_attention_layernorm.weight"],
    "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "down": ["mlp.down_proj.weight"]}


def empty_tower(vision, dtype: torch.dtype):
    """Its twin to be filled, of this dtype. Buffers, the angles, are computed, and stay fp32."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        twin = type(vision)(vision.config)
    for parameter in twin.parameters():
        parameter.data = torch.empty_like(parameter, dtype=dtype)
    return twin.eval().requires_grad_(False)


def normed_qkv(x_BD, cos_B1d, sin_B1d, norm, qkv, bias, rotated_heads: int, eps: float):
    """Queries, keys and values [B, H + 2K, d] of the normed x, by one product and rotated in place.

    Plain twin: three products and `policy.rotate`, in the policy's layers (tests/test_sampler.py).
    """
    normed_BD = rms_norm(x_BD, norm, eps)
    qkv = F.linear(normed_BD, qkv, bias).unflatten(-1, (-1, cos_B1d.shape[-1]))
    rotated = qkv[:, :rotated_heads]
    swapped = halves_swapped(rotated)
    rotated.mul_(cos_B1d).addcmul_(swapped, sin_B1d)
    return qkv


def normed_mlp(x_BD, norm, gate_up, eps: float) -> torch.Tensor:
    """The MLP's width [B, F] of the normed x: all but its last product, gate and up in one.

    Plain twin: `policy.decoder_mlp`'s two products (tests/test_sampler.py).
    """
    normed_BD = rms_norm(x_BD, norm, eps)
    gate, up = F.linear(normed_BD, gate_up).chunk(2, dim=-1)
    return gated(gate, up)


class WeightCopy:
    """The copy: `refresh` fills it, `run_layers` computes with it.

    model: a Qwen2.5-VL whose shapes count. `targets`: where each of the policy's parameters lies.
    compile: what lies before and behind attention by `policy.compiled` functions.
    """

    def __init__(self, model, *, device: torch.device, dtype: torch.dtype, compile=False):
        text, decoder = model.config.text_config, model.model.language_model
        self.device = device
        self.dtype = dtype
        self.heads = text.num_attention_heads
        self.kv_heads = text.num_key_value_heads
        self.head_width = text.hidden_size // self.heads
        self.eps = text.rms_norm_eps
        self.normed_qkv = compiled(normed_qkv, compile)
        self.normed_mlp = compiled(normed_mlp, compile)
        self.rotary = type(decoder.rotary_emb)(text).to(self.device)
        self.vision = empty_tower(model.model.visual, self.dtype).to(self.device)
        replace_vision_forwards(self.vision)

        self.targets = dict(self.vision.named_parameters("model.model.visual"))
        shapes = {f"model.{name}": weight.shape for name, weight in model.named_parameters()}
        prefix = "model.model.language_model."
        self.layers = []
        for index in range(len(decoder.layers)):
            parts = {}
            for name, sources in LAYER_PARTS.items():
                parts[name] = self.allocate(shapes, f"{prefix}layers.{index}.", sources)
            self.layers.append(Layer(**parts))
        self.norm = self.allocate(shapes, prefix, ["norm.weight"])
        self.embed = self.allocate(shapes, prefix, ["embed_tokens.weight"])
        self.head = self.embed
        if "model.lm_head.weight" in shapes:  # not tied
            self.head = self.allocate(shapes, "model.", ["lm_head.weight"])
        self.never_given = set(self.targets)

    def allocate(self, shapes: dict, prefix: str, names: list[str]) -> torch.Tensor:
        """One tensor for several parameters stacked along their first dimension."""
        names = [prefix + name for name in names]
        rows = [shapes[name][0] for name in names]
        stacked_shape = (sum(rows), *shapes[names[0]][1:])
        stacked = torch.empty(stacked_shape, device=self.device, dtype=self.dtype)
        self.targets.update(zip(names, stacked.split(rows)))
        return stacked

    @torch.no_grad()
    def refresh(self, pairs) -> None:
        """Copy the policy's weights here.

        pairs: (name of the policy's parameter, whole tensor), as fsdp.gathered_parameters yields
        them: each is copied before the next is asked for.
        Errors: ValueError naming parameters that are unknown, or were never given.
        """
        for name, full in pairs:
            if name not in self.targets:
                raise ValueError(f"{name} is no parameter of the policy that is copied here")
            self.targets[name].copy_(full)
            self.never_given.discard(name)
        if self.never_given:
            raise ValueError(f"the sampler never got {', '.join(sorted(self.never_given)[:3])} …: "
                             "the first refresh takes every parameter of the policy")

    def angles(self, x, positions_3PT) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and `half_negated` sine of these positions, in x's dtype: [P, T, 1, d] each."""
        cos_PTd, sin_PTd = self.rotary(x, positions_3PT)
        return cos_PTd[:, :, None], half_negated(sin_PTd)[:, :, None]

    def run_layers(self, x, cos, sin, attend) -> torch.Tensor:
        """All decoder layers on x [P, T, D], in place: what decoding waits for is starting kernels.

        `attend(index, q, kv)` sees queries [P, T, H, d], and keys and values [P, T, 2, K, d].
        """
        shape, flat = x.shape[:2], x.flatten(0, 1)
        cos_B1d = cos.expand(*shape, 1, -1).flatten(0, 1)
        sin_B1d = sin.expand(*shape, 1, -1).flatten(0, 1)
        for index, layer in enumerate(self.layers):
            qkv = self.normed_qkv(
                flat, cos_B1d, sin_B1d, layer.norm_in, layer.qkv, layer.qkv_bias,
                self.heads + self.kv_heads, self.eps)
            qkv = qkv.unflatten(0, shape)
            q = qkv[..., : self.heads, :]
            kv = qkv[..., self.heads :, :].unflatten(-2, (2, self.kv_heads))
            out = attend(index, q, kv)
            flat.addmm_(out.flatten(0, 1).flatten(1), layer.out.T)  # x += out·Wᵀ

            inner = self.normed_mlp(flat, layer.norm_mlp, layer.gate_up, self.eps)
            flat.addmm_(inner, layer.down.T)
        return x
