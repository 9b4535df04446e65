"""Packed rows in, log-probabilities out: shared-prefix attention, the FSDP root.

§1 attention · §2 a packed row → log-probabilities, entropies

The network itself (weights, MLPs) is Hugging Face's `Qwen2_5_VLForConditionalGeneration`; its two
attention forwards are replaced (§1), as packing is a statement about attention, and what PyTorch
has faster: norms, and the patch embedding, a convolution that is a matrix product. What lies
between the matrix products of a layer, and behind lm_head, is functions of tensors: --compile fuses
the kernels of each.

Each fast form has a plain twin that tests/test_policy.py (of the first, test_packing.py) holds it
to:
  varlen attention    the same rule as a mask
  norms, rotary       Hugging Face's formulas
  token_logprobs      log_softmax and autograd
  patch embedding     Hugging Face's convolution

Shapes, as suffixes: L packed tokens, S scored completion tokens, P groups in a row, N image
patches, I image tokens, V vocabulary, D width, H heads, K key/value heads, d head width,
B rollouts; of a padded batch B rows, T queries and K keys of each.
"""
import inspect
import math
from functools import lru_cache, partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from packing import Pack, PaddedBatch, VarlenLayout, borders, on_device

try:  # the GPU extra; PyTorch's own variable-length attention stands in
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
# Which keywords this PyTorch's functions know: they changed from release to release.
VARLEN_KEYWORDS = inspect.signature(varlen_attn).parameters
COMPILE_KEYWORDS = inspect.signature(torch.compile).parameters

KEPT_BYTES = 2**26  # of π over all ids, of a pack: what is more is computed again in backward


def compiled(function, on: bool):
    """The function, through torch.compile if `on`: its element-wise operations become few kernels.

    The packed length is a variable of what is compiled: a new one compiles nothing. Lengths 0 and
    1, a flag, a gradient or none do, once each; more than 64 are an error, and so is a function
    that does not compile as a whole. Plain twin: the function itself.
    """
    if not on:
        return function
    options = {}
    if "recompile_limit" in COMPILE_KEYWORDS:
        options["recompile_limit"] = 64
    else:  # torch 2.11: one limit for all functions
        torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True, dynamic=True, **options)


# §1 ─────────────────────────────────────── attention ────────────────────────────────────────
def varlen_attention(q_LHd, k_LKd, v_LKd, cu_q, cu_k, max_q: int, max_k: int, *, causal: bool):
    """Attention over sequences laid end to end (CUDA): flash-attn if installed, else PyTorch's.

    With --deterministic the backward adds in one order: flash-attn is told, PyTorch's own kernel
    looks for itself. Plain twin: the mask of `mask_layout`, or a loop over the sequences.
    """
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(
            q_LHd, k_LKd, v_LKd, cu_q, cu_k, max_q, max_k, causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled())
    options = {"window_size": (-1, 0 if causal else -1)}
    if "is_causal" in VARLEN_KEYWORDS:  # before torch 2.11
        options = {"is_causal": causal}
    repeats = q_LHd.shape[1] // k_LKd.shape[1]
    if "enable_gqa" in VARLEN_KEYWORDS:
        options["enable_gqa"] = repeats > 1
    elif repeats > 1:
        k_LKd = k_LKd.repeat_interleave(repeats, dim=1)
        v_LKd = v_LKd.repeat_interleave(repeats, dim=1)
    return varlen_attn(q_LHd, k_LKd, v_LKd, cu_q, cu_k, max_q, max_k, **options)


def shared_prefix_attention(q_LHd, k_LKd, v_LKd, layout) -> torch.Tensor:
    """softmax(q·kᵀ/√d + mask)·v over a packed row. layout: `Pack.attention`. Returns [L, H, d].

    Plain twin: `mask_layout`'s one batch and mask, by `padded_attention` too.
    """
    if isinstance(layout, VarlenLayout):
        k_LKd, v_LKd = k_LKd[layout.key_index], v_LKd[layout.key_index]
        return varlen_attention(
            q_LHd, k_LKd, v_LKd, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, causal=True)
    outs = [padded_attention(q_LHd, k_LKd, v_LKd, batch) for batch in layout.batches]
    return torch.cat(outs)[layout.scatter_L]


def padded_attention(q_LHd, k_LKd, v_LKd, batch: PaddedBatch) -> torch.Tensor:
    """Attention over one batch of sequences. Returns [B·T, H, d]."""
    taken = []
    for x_LHd, index in (q_LHd, batch.queries_BT), (k_LKd, batch.keys_BK), (v_LKd, batch.keys_BK):
        # A prompt's keys are taken many times: x[index] would add up their gradients in any order.
        x = x_LHd.index_select(0, index.flatten()).unflatten(0, index.shape)
        taken.append(x.transpose(1, 2))
    mask_B1TK = batch.mask_B1TK
    causal = mask_B1TK is None
    if not causal:
        mask_B1TK = mask_B1TK.to(q_LHd.dtype)
    out_BHTd = F.scaled_dot_product_attention(
        *taken, attn_mask=mask_B1TK, is_causal=causal, enable_gqa=True)
    return out_BHTd.transpose(1, 2).flatten(0, 1)


def attention_kernels() -> list:
    """The operations behind the functions above, on a CPU and on CUDA: what --keep-attention keeps.
    Their time grows with the square of a sequence's length, what they give with the length alone.
    """
    kernels = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.torch_attn._varlen_attn.default]
    if flash_attn_varlen_func is not None:
        if not hasattr(torch.ops.flash_attn, "_flash_attn_varlen_forward"):
            raise ValueError("--keep-attention: this flash-attn registers no operation with "
                             "PyTorch; install 2.8, or leave the option out")
        kernels.append(torch.ops.flash_attn._flash_attn_varlen_forward.default)
    return kernels


def half_negated(sin: torch.Tensor) -> torch.Tensor:
    """[−sin₁, sin₂] of [sin₁, sin₂] along the head's width: computed once for all layers."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [..., H, d] = [x₁, x₂] by cos and `half_negated` sin, [..., 1, d].

    Plain twin: x·cos + rotate_half(x)·sin with rotate_half(x) = [−x₂, x₁]. Here [x₂, x₁] is what is
    multiplied: three passes over x instead of five.
    """
    return torch.addcmul(x * cos, halves_swapped(x), sin)


def halves_swapped(x: torch.Tensor) -> torch.Tensor:
    """[x₂, x₁] of [x₁, x₂], the halves of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def add_and_norm(x, y, weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and its norm: together, so that --compile makes one kernel of them."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up, an MLP's middle: what --compile makes one kernel of."""
    return F.silu(gate) * up


def decoder_layer(self, add_and_norm, hidden_states, **given):
    """Replaces `Qwen2_5_VLDecoderLayer.forward`; hidden_states [1, L, D]."""
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, **given)
    norm = self.post_attention_layernorm
    hidden_states, normed = add_and_norm(
        hidden_states, attended, norm.weight, norm.variance_epsilon)
    return hidden_states + self.mlp(normed)


def decoder_mlp(self, gated, x):
    """Replaces `Qwen2MLP.forward`."""
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def decoder_attention(self, rotate, hidden_states, position_embeddings, layout):
    """Replaces `Qwen2_5_VLAttention.forward` for packed rows; hidden_states [1, L, D].

    Plain twin: that forward, on one completion at a time.
    """
    hidden_LD = hidden_states[0]
    heads = (-1, self.head_dim)
    q_LHd = self.q_proj(hidden_LD).unflatten(-1, heads)
    k_LKd = self.k_proj(hidden_LD).unflatten(-1, heads)
    v_LKd = self.v_proj(hidden_LD).unflatten(-1, heads)
    cos_L1d, sin_L1d = (x[0][:, None] for x in position_embeddings)
    q_LHd = rotate(q_LHd, cos_L1d, sin_L1d)
    k_LKd = rotate(k_LKd, cos_L1d, sin_L1d)
    out_LHd = shared_prefix_attention(q_LHd, k_LKd, v_LKd, layout)
    return self.o_proj(out_LHd.flatten(1))[None], None


def rms_norm(x, weight, eps: float) -> torch.Tensor:
    """x · weight / √(mean(x²) + eps), in fp32 and rounded once: one kernel on CUDA, not six.

    Plain twin: Hugging Face's forward.
    """
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def replace_norms(module) -> None:
    """`rms_norm` in each norm of vision tower or decoder. Plain twin: Hugging Face's forward."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    for part in module.modules():
        if isinstance(part, Qwen2_5_VLRMSNorm):
            part.forward = MethodType(forward, part)


def replace_vision_forwards(vision) -> None:
    """Our norms, our attention, and the patch embedding as the matrix product that it is."""
    replace_norms(vision)
    vision.rotary_pos_emb.forward = MethodType(vision_angles, vision.rotary_pos_emb)
    vision.patch_embed.forward = MethodType(patch_embedding, vision.patch_embed)
    for block in vision.blocks:
        block.attn.forward = MethodType(vision_attention, block.attn)


def vision_angles(self, hidden_states, position_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's angles of each patch, [N, d] fp32 each, ready for `rotate`."""
    cos_Nd, sin_Nd = type(self).forward(self, hidden_states, position_ids)
    return cos_Nd.float(), half_negated(sin_Nd.float())


def patch_embedding(self, pixels_ND):
    """Replaces a 3-D convolution whose stride is its kernel size: a matrix product.

    Plain twin: that convolution, in Hugging Face's tower.
    """
    weight = self.proj.weight.flatten(1)
    return F.linear(pixels_ND.to(weight.dtype), weight)


def vision_features(vision, pixels_ND, grids_I3, layout: dict | None = None) -> torch.Tensor:
    """Image features [image tokens, D] of pixels on the tower's device, grids on the host.

    layout: what `vision_layout` gave for these grids, where it is known from an earlier pass.
    """
    layout = layout or on_device(vision_layout(vision, grids_I3), pixels_ND.device)
    return vision(pixels_ND, grid_thw=grids_I3, **layout).pooler_output


def vision_layout(vision, grids_I3: torch.Tensor) -> dict:
    """Windows and positions follow from the grids alone: on the host, once for each of the last
    1,024 sizes.

    Hugging Face's forward takes them as keyword arguments; it would otherwise ask the device for
    them, and each block for its longest window. Plain twin: what that forward computes itself.
    """
    order, windows, frames, positions = [], [], [], []
    tokens = 0  # of the images so far
    sizes = vision.spatial_merge_size, vision.window_size, vision.patch_size
    for grid in grids_I3.tolist():
        order_I, window_lengths, frame_lengths, positions_N2 = image_layout(tuple(grid), *sizes)
        order.append(tokens + order_I)
        windows.append(window_lengths)
        frames.append(frame_lengths)
        positions.append(positions_N2)
        tokens += len(order_I)
    windows, frames = torch.cat(windows), torch.cat(frames)
    return {
        "position_ids": torch.cat(positions),
        "window_index": torch.cat(order),
        "cu_window_seqlens": borders(windows),
        "max_window_seqlen": int(windows.max()),
        "cu_seqlens": borders(frames),
        "max_seqlen": int(frames.max())}


@lru_cache(maxsize=1024)
def image_layout(grid: tuple[int, int, int], merge: int, window: int, patch: int) -> tuple:
    """One image alone: its tokens in the order of windows, patches of each window and of each
    frame, and each patch's row and column. Nobody may write to them: later images share them."""
    from transformers import vision_utils

    grid_13 = torch.tensor([grid])
    order_I, cu_windows = vision_utils.get_vision_window_index(grid_13, merge, window, patch)
    cu_frames = vision_utils.get_vision_cu_seqlens(grid_13)
    positions_N2 = vision_utils.get_vision_position_ids(grid_13, merge)
    return order_I, cu_windows.diff(), cu_frames.diff(), positions_N2


def vision_attention(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **_):
    """Replaces `Qwen2_5_VLVisionAttention.forward`: all windows (or images) of a layer at once.

    hidden_states [N, D]; cu_seqlens: borders of the windows; max_seqlen: the longest, on the host.
    Plain twin: Hugging Face's tower, which loops over the windows.
    """
    qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
    v_NHd = qkv[:, 2]
    cos_N11d, sin_N11d = (x[:, None, None] for x in position_embeddings)
    qk = rotate(qkv[:, :2], cos_N11d, sin_N11d)  # in fp32, as the angles are
    q_NHd, k_NHd = qk.to(v_NHd.dtype).unbind(1)
    if q_NHd.is_cuda:
        out_NHd = varlen_attention(
            q_NHd, k_NHd, v_NHd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=False)
    else:
        out_NHd = window_attention(q_NHd, k_NHd, v_NHd, cu_seqlens)
    return self.proj(out_NHd.flatten(1))


def window_attention(q_NHd, k_NHd, v_NHd, cu_seqlens) -> torch.Tensor:
    """Full attention within each window; windows of one size make one batch. [N, H, d].

    Plain twin: Hugging Face's tower, which loops over the windows.
    """
    out_NHd = torch.empty_like(q_NHd)
    lengths = cu_seqlens.diff()
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        index = starts[:, None] + torch.arange(length, device=starts.device)  # [windows, length]
        batch = [x[index].transpose(1, 2) for x in (q_NHd, k_NHd, v_NHd)]
        out = F.scaled_dot_product_attention(*batch).transpose(1, 2)
        out_NHd = out_NHd.index_put((index.flatten(),), out.flatten(0, 1))
    return out_NHd


# §2 ───────────────────────────────────────── policy ─────────────────────────────────────────
class TokenLogprobs(torch.autograd.Function):
    """log π(y | …) of scored tokens y and the entropy of π, chunk by chunk: see `token_logprobs`.

        z = h·Wᵀ / T, −∞ where banned    log π(y) = z_y − log Σ_j e^(z_j)    H = −Σ_j π_j·log π_j
        ∂ log π(y) / ∂z_j = 1[j = y] − π_j,    and the gradient of H is wanted by nobody

    Plain twin: `log_softmax` and autograd, which write each [chunk, V] in fp32 six times over.
    """

    @staticmethod
    def forward(context, hidden_SD, weight_VD, target_S, banned_V, temperature, entropy, chunk,
                score, logits_gradient):
        context.temperature, context.chunk = temperature, chunk
        context.logits_gradient = logits_gradient
        keep = 4 * len(target_S) * len(weight_VD) <= KEPT_BYTES
        logps, entropies, kept = [], [hidden_SD.new_zeros(0).float()], []
        for hidden, target in zip(hidden_SD.split(chunk), target_S.split(chunk)):
            logp_S, entropy_S, pi_SV = score(
                hidden, weight_VD, target, banned_V, temperature, entropy, keep)
            logps.append(logp_S)
            if entropy:
                entropies.append(entropy_S)
            if keep:
                kept.append(pi_SV)
        context.save_for_backward(hidden_SD, weight_VD, target_S, banned_V, *kept)
        entropy_S = torch.cat(entropies)
        context.mark_non_differentiable(entropy_S)
        return torch.cat(logps), entropy_S

    @staticmethod
    def backward(context, grad_S, _):
        hidden_SD, weight_VD, target_S, banned_V, *kept = context.saved_tensors
        hidden_grad_SD = torch.empty_like(hidden_SD)
        weight_grad_VD = torch.zeros_like(weight_VD) if context.needs_input_grad[1] else None
        parts = [x.split(context.chunk) for x in (hidden_SD, target_S, grad_S, hidden_grad_SD)]
        for index, (hidden, target, grad, hidden_grad) in enumerate(zip(*parts)):
            pi_SV = kept[index] if kept else None
            z_grad_SV = None  # the last chunk's is let go before there is another
            z_grad_SV = context.logits_gradient(
                hidden, weight_VD, target, banned_V, context.temperature, grad, pi_SV)
            torch.mm(z_grad_SV, weight_VD, out=hidden_grad)
            if weight_grad_VD is not None:
                weight_grad_VD.addmm_(z_grad_SV.T, hidden)
        return hidden_grad_SD, weight_grad_VD, *[None] * 7


def score_chunk(hidden_SD, weight_VD, target_S, banned_V, temperature, entropy: bool, keep: bool):
    """(log π(target) [S], entropy of π [S] if asked for, π [S, V] if to be kept), fp32."""
    logp_SV = log_softmax(hidden_SD, weight_VD, banned_V, temperature)
    logp_S = logp_SV.gather(1, target_S[:, None])[:, 0]
    entropy_S = pi_SV = None
    if keep or entropy:
        pi_SV = logp_SV.exp_()
    if entropy:
        entropy_S = torch.special.entr(pi_SV).sum(1)
    return logp_S, entropy_S, pi_SV if keep else None


def chunk_gradient(hidden_SD, weight_VD, target_S, banned_V, temperature, grad_S, pi_SV):
    """The gradient of Σ grad·log π(target) by z [S, V], in the weight's dtype; π None: again."""
    if pi_SV is None:
        pi_SV = log_softmax(hidden_SD, weight_VD, banned_V, temperature).exp_()
    grad_S1 = grad_S[:, None] / temperature
    z_grad_SV = pi_SV * -grad_S1
    z_grad_SV.scatter_add_(1, target_S[:, None], grad_S1)
    return z_grad_SV.to(weight_VD.dtype)


def log_softmax(hidden_SD, weight_VD, banned_V, temperature: float) -> torch.Tensor:
    """log π over all ids, [S, V] fp32; −∞ where banned."""
    logits_SV = F.linear(hidden_SD, weight_VD).float()
    if temperature != 1:
        logits_SV = logits_SV / temperature
    return logits_SV.masked_fill_(banned_V, -math.inf).log_softmax(1)


def token_logprobs(hidden_SD, weight_VD, target_S, banned_V, temperature: float, entropy=True,
                   chunk=1024, score=score_chunk, logits_gradient=chunk_gradient):
    """log π(target | …) and the entropy of π, each [S] fp32, without ever holding [S, V] logits.

    π is the distribution that is sampled from: same temperature, same banned ids. Each chunk is
    computed again in the backward pass, unless all of them are small. entropy=False spares passes
    over [S, V], and gives [0] in the entropy's place. score, logits_gradient: what is done to a
    chunk, here and in backward; `compiled` or not.
    """
    return TokenLogprobs.apply(
        hidden_SD, weight_VD, target_S, banned_V, temperature, entropy, chunk, score,
        logits_gradient)


def joined(parts: list[torch.Tensor], device) -> torch.Tensor | None:
    """The tensors end to end on the device; None of none."""
    if not parts:
        return None
    return torch.cat([part.to(device) for part in parts])


class Policy(nn.Module):
    """Wraps the Hugging Face model so that one `forward` does all that touches weights.

    That makes it the FSDP root: vision tower, decoder and chunked lm_head run inside,
    log-probabilities come out, and the loss is computed outside in fp32. checkpointing: of every
    n-th layer what lies between its input and output is computed again in the backward pass;
    keep_attention: attention's outputs are kept instead, see `attention_kernels`.
    compile: by `compiled` functions, in the decoder's layers and of log-probabilities.
    Plain twin: Hugging Face's forward on one completion at a time.
    """

    def __init__(self, model, banned_V: torch.Tensor, *, checkpointing=False, checkpoint_every=1,
                 keep_attention=False, compile=False):
        super().__init__()
        self.model = model
        self.register_buffer("banned_V", banned_V, persistent=False)
        replace_vision_forwards(self.vision)
        replace_norms(self.decoder)
        turn, gate = compiled(rotate, compile), compiled(gated, compile)
        add = compiled(add_and_norm, compile)
        self.score = compiled(score_chunk, compile)
        self.logits_gradient = compiled(chunk_gradient, compile)
        for layer in self.decoder.layers:  # attention itself is a kernel, FSDP's hooks stay outside
            layer.self_attn.forward = partial(decoder_attention, layer.self_attn, turn)
            layer.mlp.forward = partial(decoder_mlp, layer.mlp, gate)
            layer.forward = partial(decoder_layer, layer, add)
        if checkpointing:  # inside the modules' forward, so inside FSDP's hooks: no extra gathers
            layers = self.decoder.layers[::checkpoint_every]
            blocks = self.vision.blocks[::checkpoint_every]
            options = {"use_reentrant": False}
            if keep_attention:
                options["context_fn"] = partial(
                    create_selective_checkpoint_contexts, attention_kernels())
            for layer in [*layers, *blocks]:
                layer.forward = partial(checkpoint, layer.forward, **options)

    @property
    def vision(self):
        return self.model.model.visual

    @property
    def decoder(self):
        return self.model.model.language_model

    def forward(self, pack: Pack, temperature: float = 1.0, entropy: bool = True):
        """(logp_S, entropy_S) of the pack's scored tokens, fp32. `pack.attention` must be set.

        entropy: whether it is asked for; else entropy_S is [0].
        """
        decoder = self.decoder
        hidden_LD = decoder.embed_tokens(pack.ids_L)
        features_ID = joined(pack.features, hidden_LD.device)
        if pack.pixels:
            pixels_ND = joined(pack.pixels, hidden_LD.device)
            if pack.vision is None:  # the first of the passes over this pack
                layout = vision_layout(self.vision, pack.grids_I3)
                pack.vision = on_device(layout, pixels_ND.device)
            features_ID = vision_features(self.vision, pixels_ND, pack.grids_I3, pack.vision)
            hidden_LD = hidden_LD + 0.0 * features_ID.sum()  # a dummy's gradient exists: FSDP waits
        if features_ID is not None:
            features_ID = features_ID[: len(pack.image_slots)]  # a dummy image has no slot
            features_ID = features_ID.to(hidden_LD.dtype)
            hidden_LD = hidden_LD.index_copy(0, pack.image_slots, features_ID)
        hidden_1LD = hidden_LD[None]
        cos, sin = decoder.rotary_emb(hidden_1LD, pack.positions_3L[:, None])
        cos_sin = cos, half_negated(sin)
        for layer in decoder.layers:
            hidden_1LD = layer(hidden_1LD, position_embeddings=cos_sin, layout=pack.attention)
        hidden_SD = decoder.norm(hidden_1LD[0, pack.source_S])
        return token_logprobs(
            hidden_SD, self.model.lm_head.weight, pack.target_S, self.banned_V, temperature,
            entropy, score=self.score, logits_gradient=self.logits_gradient)
