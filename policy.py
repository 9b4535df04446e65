"""Packed rows in, log-probabilities out: packing, shared-prefix attention, the FSDP root.

§1 packing: the prompt is paid once · §2 attention · §3 a packed row → log-probabilities, entropies

The network itself (weights, norms, MLPs) is Hugging Face's `Qwen2_5_VLForConditionalGeneration`;
its two attention forwards are replaced (§2), as packing is a statement about attention, and the
patch embedding, a convolution that is a matrix product.

Each fast form has a plain twin that tests/test_policy.py holds it to:
  a packed row        one completion at a time through Hugging Face's forward
  varlen attention    the same rule as a mask
  patch embedding     Hugging Face's convolution

Shapes, as suffixes: L packed tokens, S scored completion tokens, P groups in a row, N image
patches, I image tokens, V vocabulary, D width, H heads, K key/value heads, d head width,
B rollouts, T longest completion.
"""
import inspect
import math
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen_vl import MERGE, PATCH, Group, Prompt, SpecialIds, rope_positions

try:  # the GPU extra; PyTorch's own variable-length attention, then masked attention, stand in
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
# Which keywords this PyTorch's varlen_attn knows: they changed from release to release.
VARLEN_KEYWORDS = inspect.signature(varlen_attn).parameters if varlen_attn else ()


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
    grids_I3: torch.Tensor | None  # stays on the host
    features_ID: torch.Tensor | None = None  # in place of pixels, where they are known
    attention: dict = field(default_factory=dict)  # §2's index tensors, from `prepare_attention`

    def to(self, device) -> "Pack":
        def move(values: dict) -> dict:
            return {k: v.to(device) if torch.is_tensor(v) else v for k, v in values.items()}

        moved = move(vars(self))
        moved["attention"] = move(self.attention)
        moved["grids_I3"] = self.grids_I3  # `vision_features` reads them on the host
        return Pack(**moved)


def split_groups(groups: list[Group], budget: int) -> list[list[Group]]:
    """Cut groups into micro-batches of at most `budget` tokens each, in order.

    A group over the budget is split and its prompt repeated; a prompt with one completion over the
    budget stands alone (nothing is ever dropped here).
    """
    pieces = []
    for group in groups:
        pieces += split_group(group, budget)
    micro_batches, filled = [], math.inf
    for piece in pieces:
        tokens = len(piece.prompt.ids)
        for completion in piece.completions:
            tokens += len(completion.tokens)
        if filled + tokens > budget:
            micro_batches.append([])
            filled = 0
        micro_batches[-1].append(piece)
        filled += tokens
    return micro_batches


def split_group(group: Group, budget: int) -> list[Group]:
    """The group in pieces of as many completions as fit beside the prompt, one at least."""
    left = budget - len(group.prompt.ids)
    starts, used = [0], 0
    for i, completion in enumerate(group.completions):
        used += len(completion.tokens)
        if used > left and i > starts[-1]:
            starts.append(i)
            used = len(completion.tokens)
    pieces = []
    for first, end in zip(starts, [*starts[1:], None]):
        completions = group.completions[first:end]
        pieces.append(replace(group, completions=completions, row=group.row + first))
    return pieces


def pack_groups(groups: list[Group]) -> Pack:
    """Lay groups end to end: [prompt | completion 1 | … | completion G] [prompt | …] …

    Positions restart after the prompt for each completion. The token at place t of a completion is
    predicted by the hidden state before it: by the prompt's last token for t = 0.
    Plain twin: one completion at a time through Hugging Face's forward.
    """
    ids, positions, group_of, segment = [], [], [], []
    source, target, row, column = [], [], [], []
    slots = []
    for index, group in enumerate(groups):
        prompt, start = group.prompt, len(ids)
        slots += [start + slot for slot in prompt.image_slots]
        ids += prompt.ids
        segment += [0] * len(prompt.ids)
        positions.append(prompt.positions_3L)
        prompt_end = len(ids) - 1
        for number, completion in enumerate(group.completions):
            length = len(completion.tokens)
            first = len(ids)
            source += [prompt_end, *range(first, first + length - 1)]
            target += completion.tokens
            row += [group.row + number] * length
            column += range(length)
            ids += completion.tokens
            segment += [number + 1] * length
            own_positions, _ = rope_positions([length], prompt.next_position)
            positions.append(own_positions)
        group_of += [index] * (len(ids) - start)
    return Pack(
        ids_L=torch.tensor(ids),
        positions_3L=torch.cat(positions, dim=1),
        group_L=torch.tensor(group_of),
        segment_L=torch.tensor(segment),
        source_S=torch.tensor(source).long(),
        target_S=torch.tensor(target).long(),
        row_S=torch.tensor(row).long(),
        column_S=torch.tensor(column).long(),
        image_slots=torch.tensor(slots).long(),
        **image_inputs([group.prompt for group in groups]))


def image_inputs(prompts: list[Prompt]) -> dict:
    """The images of a row: as features where the sampler kept them, else as pixels and grids."""
    known = [prompt.features_ID for prompt in prompts if prompt.features_ID is not None]
    if known:
        return {"pixels_ND": None, "grids_I3": None, "features_ID": torch.cat(known)}
    seeing = [prompt for prompt in prompts if prompt.grids]
    if not seeing:
        return {"pixels_ND": None, "grids_I3": None}
    grids = [grid for prompt in seeing for grid in prompt.grids]
    pixels_ND = torch.cat([prompt.pixels_ND for prompt in seeing])
    return {"pixels_ND": pixels_ND, "grids_I3": torch.tensor(grids)}


def ensure_image(pack: Pack) -> None:
    """Give a text-only row a 28×28 blank that touches no token, as other ranks see images."""
    if pack.pixels_ND is None:
        pack.pixels_ND = torch.zeros(MERGE * MERGE, 3 * 2 * PATCH * PATCH)
        pack.grids_I3 = torch.tensor([[1, MERGE, MERGE]])


def pack_for_ranks(groups: list[Group], budget: int, special: SpecialIds, ranks) -> list[Pack]:
    """Packed micro-batches, equally many on every rank, since FSDP's collectives must match.

    A short rank adds fillers that score no token; a row without images carries a dummy one if
    another rank has images in its turn. ranks: who we are (fsdp.Processes).
    """
    row = 0
    for group in groups:
        group.row = row
        row += len(group.completions)
    packs = [pack_groups(part) for part in split_groups(groups, budget)]
    # [rank][turn]: does that rank's micro-batch of this turn hold images?
    image_flags = ranks.gather([pack.pixels_ND is not None for pack in packs])
    turns = max(len(flags) for flags in image_flags)
    while len(packs) < turns:
        packs.append(filler(special))
    for turn, pack in enumerate(packs):
        if any(True in flags[turn : turn + 1] for flags in image_flags):
            ensure_image(pack)
    return [prepare_attention(pack, ranks.device) for pack in packs]


def filler(special: SpecialIds) -> Pack:
    """One token, none scored."""
    nothing = Prompt([special.im_start], torch.zeros(3, 1).long(), next_position=1)
    return pack_groups([Group(nothing, completions=[])])


def scatter_BT(values_S: torch.Tensor, pack: Pack, shape: tuple[int, int]) -> torch.Tensor:
    """Scored tokens back into their places of the padded [B, T] batch, zero elsewhere."""
    return values_S.new_zeros(shape).index_put((pack.row_S, pack.column_S), values_S)


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
    lengths_P = torch.bincount(pack.group_L)
    starts_P = lengths_P.cumsum(0) - lengths_P
    place_L = torch.arange(int(lengths_P.max()))
    filled_PL = place_L < lengths_P[:, None]
    gather_PL = torch.where(filled_PL, starts_P[:, None] + place_L, 0)

    segment_PL = torch.where(filled_PL, pack.segment_L[gather_PL], -1)
    key_P1L = segment_PL[:, None, :]
    query_PL1 = segment_PL[:, :, None]
    causal_LL = place_L[:, None] >= place_L[None, :]
    seen_PLL = causal_LL & ((key_P1L == 0) | (key_P1L == query_PL1))  # empty sees empty
    mask_PLL = torch.zeros(seen_PLL.shape).masked_fill(~seen_PLL, -math.inf)
    return {
        "gather_PL": gather_PL,
        "scatter_L": torch.nonzero(filled_PL.flatten()).squeeze(1),
        "mask_P1LL": mask_PLL[:, None]}


def varlen_layout(pack: Pack) -> dict:
    """Queries stay in place; `key_index` lists each sequence's keys: own prompt, then itself.

    Plain twin: `mask_layout`.
    """
    segments = pack.segment_L.max() + 1
    sequence_L = pack.group_L * segments + pack.segment_L  # a number for each (group, segment)
    _, lengths = torch.unique_consecutive(sequence_L, return_counts=True)
    keys, prompt = [], None
    for own in torch.arange(len(sequence_L)).split(lengths.tolist()):
        if pack.segment_L[own[0]] == 0:
            prompt = own
            keys.append(prompt)
        else:
            keys.append(torch.cat([prompt, own]))
    key_lengths = torch.tensor([len(index) for index in keys])
    return {
        "key_index": torch.cat(keys),
        "cu_q": borders(lengths),
        "cu_k": borders(key_lengths),
        "max_q": int(lengths.max()),
        "max_k": int(key_lengths.max())}


def borders(lengths: torch.Tensor) -> torch.Tensor:
    """Where sequences laid end to end begin, and where the last one ends: [n + 1] int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


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


def shared_prefix_attention(q_LHd, k_LKd, v_LKd, layout: dict) -> torch.Tensor:
    """softmax(q·kᵀ/√d + mask)·v over a packed row. Returns [L, H, d]."""
    if "key_index" in layout:
        index = layout["key_index"]
        cu_q, cu_k = layout["cu_q"], layout["cu_k"]
        max_q, max_k = layout["max_q"], layout["max_k"]
        return varlen_attention(
            q_LHd, k_LKd[index], v_LKd[index], cu_q, cu_k, max_q, max_k, causal=True)
    index = layout["gather_PL"]
    q_PHLd = q_LHd[index].transpose(1, 2)
    k_PKLd = k_LKd[index].transpose(1, 2)
    v_PKLd = v_LKd[index].transpose(1, 2)
    mask_P1LL = layout["mask_P1LL"].to(q_LHd.dtype)
    out_PHLd = F.scaled_dot_product_attention(
        q_PHLd, k_PKLd, v_PKLd, attn_mask=mask_P1LL, enable_gqa=True)
    return out_PHLd.transpose(1, 2).flatten(0, 1)[layout["scatter_L"]]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: x·cos + rotate_half(x)·sin. x [..., H, d]; cos, sin [..., 1, d]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin


def decoder_attention(self, hidden_states, position_embeddings, layout: dict, **_):
    """Replaces `Qwen2_5_VLAttention.forward` for packed rows; hidden_states [1, L, D]."""
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


def replace_vision_forwards(vision) -> None:
    """Our attention in each block, and the patch embedding as the matrix product that it is."""
    vision.patch_embed.forward = MethodType(patch_embedding, vision.patch_embed)
    for block in vision.blocks:
        block.attn.forward = MethodType(vision_attention, block.attn)


def patch_embedding(self, pixels_ND):
    """Replaces a 3-D convolution whose stride is its kernel size: a matrix product.

    Plain twin: that convolution, in Hugging Face's tower.
    """
    weight = self.proj.weight.flatten(1)
    return F.linear(pixels_ND.to(weight.dtype), weight)


def vision_features(vision, pixels_ND: torch.Tensor, grids_I3: torch.Tensor) -> torch.Tensor:
    """Image features [image tokens, D] of pixels on the tower's device, grids on the host."""
    layout = {}
    for name, value in vision_layout(vision, grids_I3).items():
        layout[name] = value.to(pixels_ND.device) if torch.is_tensor(value) else value
    return vision(pixels_ND, grid_thw=grids_I3, **layout).pooler_output


def vision_layout(vision, grids_I3: torch.Tensor) -> dict:
    """Windows and positions follow from the grids alone: computed on the host, once a pass.

    Hugging Face's forward takes them as keyword arguments; it would otherwise ask the device for
    them, and each block for its longest window.
    """
    from transformers import vision_utils

    merge = vision.spatial_merge_size
    window_index, cu_windows = vision_utils.get_vision_window_index(
        grids_I3, merge, vision.window_size, vision.patch_size)
    cu_images = vision_utils.get_vision_cu_seqlens(grids_I3)
    return {
        "position_ids": vision_utils.get_vision_position_ids(grids_I3, merge),
        "window_index": window_index,
        "cu_window_seqlens": cu_windows,
        "max_window_seqlen": int(cu_windows.diff().max()),
        "cu_seqlens": cu_images,
        "max_seqlen": int(cu_images.diff().max())}


def vision_attention(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **_):
    """Replaces `Qwen2_5_VLVisionAttention.forward`: all windows (or images) of a layer at once.

    hidden_states [N, D]; cu_seqlens: borders of the windows; max_seqlen: the longest, on the host.
    Plain twin: Hugging Face's tower, which loops over the windows.
    """
    qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
    q_NHd, k_NHd, v_NHd = qkv.unbind(1)
    cos_N1d, sin_N1d = (x[:, None].float() for x in position_embeddings)
    q_NHd = rotate(q_NHd.float(), cos_N1d, sin_N1d).to(v_NHd.dtype)
    k_NHd = rotate(k_NHd.float(), cos_N1d, sin_N1d).to(v_NHd.dtype)
    if q_NHd.is_cuda and (flash_attn_varlen_func or varlen_attn):
        out_NHd = varlen_attention(
            q_NHd, k_NHd, v_NHd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=False)
    else:
        out_NHd = window_attention(q_NHd, k_NHd, v_NHd, cu_seqlens)
    return self.proj(out_NHd.flatten(1))


def window_attention(q_NHd, k_NHd, v_NHd, cu_seqlens) -> torch.Tensor:
    """Full attention within each window; windows of one size make one batch. [N, H, d]."""
    out_NHd = torch.empty_like(q_NHd)
    lengths = cu_seqlens.diff()
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        index = starts[:, None] + torch.arange(length, device=starts.device)  # [windows, length]
        batch = [x[index].transpose(1, 2) for x in (q_NHd, k_NHd, v_NHd)]
        out = F.scaled_dot_product_attention(*batch).transpose(1, 2)
        out_NHd = out_NHd.index_put((index.flatten(),), out.flatten(0, 1))
    return out_NHd


# §3 ───────────────────────────────────────── policy ─────────────────────────────────────────
def token_logprobs(hidden_SD, lm_head, target_S, banned_V, temperature: float, chunk: int = 1024):
    """log π(target | …) and the entropy of π, each [S] fp32, without ever holding [S, V] logits.

    π is the distribution that is sampled from: same temperature, same banned ids. Each chunk is
    computed again in the backward pass, so memory is one chunk of logits: chunk · V · 4 bytes.
    """

    def one_chunk(hidden_SD, target_S):
        logits_SV = lm_head(hidden_SD).float() / temperature
        logits_SV = logits_SV.masked_fill(banned_V, -math.inf)
        logp_SV = logits_SV.log_softmax(dim=-1)
        with torch.no_grad():  # H = −Σ p·log p, for the logs only
            finite_SV = logp_SV.masked_fill(banned_V, 0.0)
            entropy_S = -(logp_SV.exp() * finite_SV).sum(-1)
        logp_S = logp_SV.gather(-1, target_S[:, None]).squeeze(-1)
        return logp_S, entropy_S

    logps, entropies = [], []
    for hidden, target in zip(hidden_SD.split(chunk), target_S.split(chunk)):
        logp, entropy = checkpoint(one_chunk, hidden, target, use_reentrant=False)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


class Policy(nn.Module):
    """Wraps the Hugging Face model so that one `forward` does all that touches weights.

    That makes it the FSDP root: vision tower, decoder and chunked lm_head run inside,
    log-probabilities come out, and the loss is computed outside in fp32.
    Plain twin: Hugging Face's forward on one completion at a time.
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
            features_ID = vision_features(self.vision, pack.pixels_ND, pack.grids_I3)
            hidden_LD = hidden_LD + 0.0 * features_ID.sum()  # a dummy's gradient exists: FSDP waits
        if features_ID is not None:
            features_ID = features_ID[: len(pack.image_slots)]  # a dummy image has no slot
            features_ID = features_ID.to(hidden_LD.dtype)
            hidden_LD = hidden_LD.index_copy(0, pack.image_slots, features_ID)
        hidden_1LD = hidden_LD[None]
        cos_sin = decoder.rotary_emb(hidden_1LD, pack.positions_3L[:, None])
        for layer in decoder.layers:
            hidden_1LD = layer(hidden_1LD, position_embeddings=cos_sin, layout=pack.attention)
        hidden_SD = decoder.norm(hidden_1LD[0, pack.source_S])
        return token_logprobs(
            hidden_SD, self.model.lm_head, pack.target_S, self.banned_V, temperature)
