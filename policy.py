"""Packed rows in, log-probabilities out: packing, shared-prefix attention, the FSDP root.

§1 packing: the prompt is paid once · §2 attention · §3 a packed row → log-probabilities, entropies

The network itself (weights, norms, MLPs) is Hugging Face's `Qwen2_5_VLForConditionalGeneration`;
its two attention forwards are replaced (§2), as packing is a statement about attention, and the
patch embedding, a convolution that is a matrix product.

Shapes, as suffixes: L packed tokens, S scored completion tokens, P groups in a row, N image
patches, V vocabulary, D width, H heads, K key/value heads, B rollouts, T longest completion.
"""
import inspect
import math
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen_vl import MERGE, PATCH, Prompt, SpecialIds, rope_positions

try:  # the GPU extra; PyTorch's own variable-length attention, then masked attention, stand in
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


# §1 ──────────────────────────────────────── packing ─────────────────────────────────────────
@dataclass
class Pack:
    """One micro-batch: groups end to end in one row of L tokens, by `pack_groups`. Tensors only."""

    ids_L: torch.Tensor
    positions_3L: torch.Tensor
    group_L: torch.Tensor  # which group a token belongs to
    segment_L: torch.Tensor  # 0 in a prompt, i in its i-th completion
    source_S: torch.Tensor  # where the hidden state lies that predicts scored token s
    target_S: torch.Tensor  # the scored token
    row_S: torch.Tensor  # its place [row, column] in the [B, T] batch
    column_S: torch.Tensor
    image_slots: torch.Tensor  # indices into L, in the order of the image features
    pixels_ND: torch.Tensor | None
    grids_I3: torch.Tensor | None
    features_ID: torch.Tensor | None = None  # in place of pixels, where they are known
    attention: dict = field(default_factory=dict)  # §4's index tensors, from `prepare_attention`

    def to(self, device) -> "Pack":
        def move(values: dict) -> dict:
            return {k: v.to(device) if torch.is_tensor(v) else v for k, v in values.items()}

        return Pack(**move(vars(self)) | {"attention": move(self.attention)})


def split_groups(groups: list, budget: int) -> list[list]:
    """Cut sampler.Groups into micro-batches of at most `budget` tokens each, in order.

    A group over the budget is split and its prompt repeated; a prompt with one completion over the
    budget stands alone (nothing is ever dropped here).
    """
    pieces = []
    for group in groups:
        room = budget - len(group.prompt.ids)
        starts, used = [0], 0
        for i, completion in enumerate(group.completions):
            used += len(completion.tokens)
            if used > room and i > starts[-1]:
                starts.append(i)
                used = len(completion.tokens)
        for first, end in zip(starts, [*starts[1:], None]):
            part = group.completions[first:end]
            pieces.append(replace(group, completions=part, row=group.row + first))
    micro_batches, filled = [], math.inf
    for part in pieces:
        tokens = len(part.prompt.ids) + sum(len(c.tokens) for c in part.completions)
        if filled + tokens > budget:
            micro_batches.append([])
            filled = 0
        micro_batches[-1].append(part)
        filled += tokens
    return micro_batches


def pack_groups(groups: list) -> Pack:
    """Lay groups end to end: [prompt | completion 1 | … | completion G] [prompt | …] …

    Positions restart after the prompt for each completion. The token at place t of a completion is
    predicted by the hidden state before it: by the prompt's last token for t = 0.
    """
    ids, positions, group_of, segment, source, target, row, column, slots = ([] for _ in range(9))
    for index, group in enumerate(groups):
        prompt, start = group.prompt, len(ids)
        slots += [start + slot for slot in prompt.image_slots]
        ids += prompt.ids
        segment += [0] * len(prompt.ids)
        positions.append(prompt.positions_3L)
        prompt_end = len(ids) - 1
        for number, completion in enumerate(group.completions):
            tokens, length = completion.tokens, len(completion.tokens)
            source += [prompt_end, *range(len(ids), len(ids) + length - 1)]
            target += tokens
            row += [group.row + number] * length
            column += range(length)
            ids += tokens
            segment += [number + 1] * length
            positions.append(rope_positions([length], prompt.next_position)[0])
        group_of += [index] * (len(ids) - start)
    lists = (group_of, segment, source, target, row, column, slots)
    known = [group.prompt.features_ID for group in groups if group.prompt.features_ID is not None]
    unknown = [group.prompt for group in groups if group.prompt.grids and not known]
    return Pack(
        torch.tensor(ids), torch.cat(positions, dim=1), *(torch.tensor(x).long() for x in lists),
        torch.cat([prompt.pixels_ND for prompt in unknown]) if unknown else None,
        torch.tensor([g for p in unknown for g in p.grids]) if unknown else None,
        torch.cat(known) if known else None)


def ensure_image(pack: Pack) -> None:
    """Give a text-only row a 28×28 blank that touches no token, as other ranks see images."""
    if pack.pixels_ND is None:
        pack.pixels_ND = torch.zeros(MERGE * MERGE, 3 * 2 * PATCH * PATCH)
        pack.grids_I3 = torch.tensor([[1, MERGE, MERGE]])


def pack_for_ranks(groups: list, budget: int, special: SpecialIds, ranks) -> list[Pack]:
    """Packed micro-batches, equally many on every rank, since FSDP's collectives must match.

    A short rank adds fillers that score no token; a row without images carries a dummy one if
    another rank has images in its turn. ranks: who we are (grpo_vl.Processes).
    """
    row = 0
    for group in groups:
        group.row, row = row, row + len(group.completions)
    packs = [pack_groups(part) for part in split_groups(groups, budget)]
    image_flags = ranks.gather([pack.pixels_ND is not None for pack in packs])
    nothing = Prompt([special.im_start], torch.zeros(3, 1).long(), 1)
    for turn in range(max(map(len, image_flags))):
        if turn == len(packs):
            packs.append(pack_groups([SimpleNamespace(prompt=nothing, completions=[], row=0)]))
        if any(True in flags[turn : turn + 1] for flags in image_flags):
            ensure_image(packs[turn])
    return [prepare_attention(pack, ranks.device) for pack in packs]


def scatter_BT(values_S: torch.Tensor, pack: Pack, shape: tuple[int, int]) -> torch.Tensor:
    """Scored tokens back into their places of the padded [B, T] batch, zero elsewhere."""
    return values_S.new_zeros(shape).index_put((pack.row_S, pack.column_S), values_S)


def pad_BT(rows: list[list[float]]) -> torch.Tensor:
    """Ragged rows → [B, T], zero behind their ends."""
    longest = max(map(len, rows), default=1)
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows]).view(-1, longest)


# §2 ─────────────────────────────────────── attention ────────────────────────────────────────
# Token i attends to j ≤ i with group(j) = group(i) and segment(j) ∈ {0, segment(i)}: the prompt and
# its own completion. Two ways to compute the same thing:
#   mask    (CPU, reference) groups side by side in a padded batch [P, longest group], one SDPA call
#   varlen  (CUDA) each prompt and each completion is a sequence of queries; a completion's keys are
#           gathered as prompt + completion, causal aligned at the bottom right, one call a layer
def prepare_attention(pack: Pack, device: torch.device) -> Pack:
    """Fill `pack.attention`, once for all layers, and move the row to the device."""
    varlen = device.type == "cuda" and (flash_attn_varlen_func or varlen_attn)
    pack.attention = varlen_layout(pack) if varlen else mask_layout(pack)
    return pack.to(device)


def mask_layout(pack: Pack) -> dict:
    """`gather_PL`: token index of each padded place (0 where empty); `mask_P1LL`: who sees whom."""
    lengths = torch.bincount(pack.group_L)
    longest, starts = int(lengths.max()), lengths.cumsum(0) - lengths
    place_L = torch.arange(longest)
    filled_PL = place_L < lengths[:, None]
    gather_PL = torch.where(filled_PL, starts[:, None] + place_L, 0)
    segment_PL = torch.where(filled_PL, pack.segment_L[gather_PL], -1)
    key, query = segment_PL[:, None, :], segment_PL[:, :, None]
    causal_LL = place_L[:, None] >= place_L[None, :]
    seen_PLL = causal_LL & ((key == 0) | (key == query))  # empty places see each other
    return {"gather_PL": gather_PL, "scatter_L": torch.nonzero(filled_PL.flatten()).squeeze(1),
            "mask_P1LL": torch.zeros(seen_PLL.shape).masked_fill(~seen_PLL, -math.inf)[:, None]}


def varlen_layout(pack: Pack) -> dict:
    """Queries stay in place; `key_index` lists each sequence's keys: own prompt, then itself."""
    sequences, keys, prompt = pack.group_L * (pack.segment_L.max() + 1) + pack.segment_L, [], None
    lengths = torch.unique_consecutive(sequences, return_counts=True)[1]
    for own in torch.arange(len(sequences)).split(lengths.tolist()):
        in_prompt = pack.segment_L[own[0]] == 0
        prompt = own if in_prompt else prompt
        keys.append(own if in_prompt else torch.cat([prompt, own]))
    key_lengths = torch.tensor([len(index) for index in keys])
    cu_q, cu_k = (F.pad(x.cumsum(0), (1, 0)).int() for x in (lengths, key_lengths))
    return {"key_index": torch.cat(keys), "cu_q": cu_q, "cu_k": cu_k,
            "max_q": int(lengths.max()), "max_k": int(key_lengths.max())}


def varlen_attention(q_LHd, k_LKd, v_LKd, cu_q, cu_k, max_q: int, max_k: int, *, causal: bool):
    """Attention over sequences laid end to end (CUDA): flash-attn if installed, else PyTorch's."""
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(q_LHd, k_LKd, v_LKd, cu_q, cu_k, max_q, max_k, causal=causal)
    repeats = q_LHd.shape[1] // k_LKd.shape[1]
    if repeats > 1:  # torch 2.11 has no enable_gqa here; the gathered keys are small
        k_LKd, v_LKd = (x.repeat_interleave(repeats, dim=1) for x in (k_LKd, v_LKd))
    old = "is_causal" in inspect.signature(varlen_attn).parameters  # before torch 2.11
    how = {"is_causal": causal} if old else {"window_size": (-1, 0 if causal else -1)}
    return varlen_attn(q_LHd, k_LKd, v_LKd, cu_q, cu_k, max_q, max_k, **how)


def shared_prefix_attention(q_LHd, k_LKd, v_LKd, layout: dict) -> torch.Tensor:
    """softmax(q·kᵀ/√d + mask)·v over a packed row. Returns [L, H, d]."""
    if "key_index" in layout:
        index = layout["key_index"]
        borders = (layout[name] for name in ("cu_q", "cu_k", "max_q", "max_k"))
        return varlen_attention(q_LHd, k_LKd[index], v_LKd[index], *borders, causal=True)
    index, mask = layout["gather_PL"], layout["mask_P1LL"].to(q_LHd.dtype)
    side_by_side = [x[index].transpose(1, 2) for x in (q_LHd, k_LKd, v_LKd)]  # [P, heads, L, d]
    out = F.scaled_dot_product_attention(*side_by_side, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[layout["scatter_L"]]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: x·cos + rotate_half(x)·sin. x [..., H, d]; cos, sin [..., 1, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def decoder_attention(self, hidden_states, position_embeddings, layout: dict, **_):
    """Replaces `Qwen2_5_VLAttention.forward` for packed rows; hidden_states [1, L, D]."""
    hidden_LD = hidden_states[0]
    projections = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (proj(hidden_LD).unflatten(-1, (-1, self.head_dim)) for proj in projections)
    cos, sin = (x[0][:, None] for x in position_embeddings)  # [L, 1, d]
    out_LHd = shared_prefix_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, layout)
    return self.o_proj(out_LHd.flatten(1))[None], None


def replace_vision_forwards(vision) -> None:
    """Our attention in each block, and the patch embedding as the matrix product that it is."""
    vision.patch_embed.forward = MethodType(patch_embedding, vision.patch_embed)
    for block in vision.blocks:
        block.attn.forward = MethodType(vision_attention, block.attn)


def patch_embedding(self, pixels_ND):
    """Replaces a 3-D convolution whose stride is its kernel size: a matrix product."""
    weight = self.proj.weight.flatten(1)
    return F.linear(pixels_ND.to(weight.dtype), weight)


def vision_attention(self, hidden_states, cu_seqlens, position_embeddings, **_):
    """Replaces `Qwen2_5_VLVisionAttention.forward`: all windows (or images) of a layer at once.

    hidden_states [N, D]; cu_seqlens: borders of the windows, over which Hugging Face loops.
    """
    q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [N, H, d]
    cos, sin = (x[:, None].float() for x in position_embeddings)
    q, k = (rotate(x.float(), cos, sin).to(v.dtype) for x in (q, k))
    lengths = cu_seqlens.diff()
    if q.is_cuda and (flash_attn_varlen_func or varlen_attn):
        longest, borders = int(lengths.max()), cu_seqlens.int()
        out = varlen_attention(q, k, v, borders, borders, longest, longest, causal=False)
    else:
        out = torch.empty_like(q)
        for length in lengths.unique().tolist():  # windows of one size make one batch
            starts = cu_seqlens[:-1][lengths == length]
            index = starts[:, None] + torch.arange(length, device=q.device)  # [windows, length]
            batch = F.scaled_dot_product_attention(*(x[index].transpose(1, 2) for x in (q, k, v)))
            out = out.index_put((index.flatten(),), batch.transpose(1, 2).flatten(0, 1))
    return self.proj(out.flatten(1))


# §3 ───────────────────────────────────────── policy ─────────────────────────────────────────
def token_logprobs(hidden_SD, lm_head, target_S, banned_V, temperature: float, chunk: int = 1024):
    """log π(target | …) and the entropy of π, each [S] fp32, without ever holding [S, V] logits.

    π is the distribution that is sampled from: same temperature, same banned ids. Each chunk is
    computed again in the backward pass, so memory is one chunk of logits: chunk · V · 4 bytes.
    """

    def one_chunk(hidden, target):
        logits = lm_head(hidden).float() / temperature
        logp = logits.masked_fill(banned_V, float("-inf")).log_softmax(dim=-1)
        with torch.no_grad():  # H = −Σ p·log p, for the logs only
            entropy = -(logp.exp() * logp.masked_fill(banned_V, 0.0)).sum(-1)
        return logp.gather(-1, target[:, None]).squeeze(-1), entropy

    chunks = zip(hidden_SD.split(chunk), target_S.split(chunk))
    parts = [checkpoint(one_chunk, *pair, use_reentrant=False) for pair in chunks]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class Policy(nn.Module):
    """Wraps the Hugging Face model so that one `forward` does all that touches weights.

    That makes it the FSDP root: vision tower, decoder and chunked lm_head run inside,
    log-probabilities come out, and the loss is computed outside in fp32.
    """

    def __init__(self, model, banned_V: torch.Tensor, *, checkpointing: bool = False):
        super().__init__()
        self.model = model
        self.register_buffer("banned_V", banned_V, persistent=False)
        replace_vision_forwards(self.vision)
        for layer in self.decoder.layers:
            layer.self_attn.forward = MethodType(decoder_attention, layer.self_attn)
        if checkpointing:  # inside the modules' forward, so inside FSDP's hooks: no extra gathers
            for layer in [*self.decoder.layers, *self.vision.blocks]:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @property
    def vision(self):
        return self.model.model.visual

    @property
    def decoder(self):
        return self.model.model.language_model

    def forward(self, pack: Pack, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp_S, entropy_S) of the pack's scored tokens, fp32. `pack.attention` must be set."""
        decoder = self.decoder
        hidden_LD = decoder.embed_tokens(pack.ids_L)
        features_ID = pack.features_ID
        if pack.pixels_ND is not None:
            features_ID = self.vision(pack.pixels_ND, grid_thw=pack.grids_I3).pooler_output
            hidden_LD = hidden_LD + 0.0 * features_ID.sum()  # a dummy's gradient exists: FSDP waits
        if features_ID is not None:
            features_ID = features_ID[: len(pack.image_slots)].to(hidden_LD.dtype)
            hidden_LD = hidden_LD.index_copy(0, pack.image_slots, features_ID)  # a dummy has none
        hidden_1LD = hidden_LD[None]
        cos_sin = decoder.rotary_emb(hidden_1LD, pack.positions_3L[:, None])
        for layer in decoder.layers:
            hidden_1LD = layer(hidden_1LD, position_embeddings=cos_sin, layout=pack.attention)
        hidden_SD = decoder.norm(hidden_1LD[0, pack.source_S])
        return token_logprobs(
            hidden_SD, self.model.lm_head, pack.target_S, self.banned_V, temperature)
