"""Qwen2.5-VL as a policy: text and image in, log-probabilities of completions out.

§1 special ids · §2 image and prompt · §3 packing: the prompt is paid once · §4 attention · §5 a
packed row → log-probabilities, entropies · §6 load, export, the stand-in without GPU and hub

The network itself (weights, norms, MLPs) is Hugging Face's `Qwen2_5_VLForConditionalGeneration`;
its two attention forwards are replaced (§4), as packing is a statement about attention, and the
patch embedding, a convolution that is a matrix product.

Shapes, as suffixes: L packed tokens, S scored completion tokens, P groups in a row, N image
patches, V vocabulary, D width, H heads, K key/value heads, B rollouts, T longest completion.
"""
import inspect
import math
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType, SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import state_dict as dist_state
from torch.utils.checkpoint import checkpoint

from data import DataError

try:  # the GPU extra; PyTorch's own variable-length attention, then masked attention, stand in
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

PATCH, MERGE = 14, 2  # a patch is 14×14 pixels; 2×2 patches become one image token (28×28 pixels)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in preprocessor_config.json
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SYSTEM = "You are a helpful assistant."  # Qwen's default, also Perception-R1's  [PR1 code]
SPECIAL_TOKENS = [  # Qwen2.5's 22 added tokens, in order (151643 … 151664 in the true vocabulary)
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>"]


# §1 ────────────────────────────────────── special ids ───────────────────────────────────────
@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning, read from a checkpoint's tokenizer and config, never assumed."""

    im_start: int
    im_end: int
    image_pad: int
    vision_start: int
    vision_end: int
    pad: int
    stops: tuple[int, ...]  # a completion ends with any of these
    banned_V: torch.Tensor  # True where an id is never sampled and never scored, [V] bool

    @staticmethod
    def read(tokenizer, config) -> "SpecialIds":
        """Errors: DataError naming a token that the tokenizer lacks or numbers otherwise."""
        names = ("im_start", "im_end", "image_pad", "vision_start", "vision_end", "endoftext")
        vocabulary = tokenizer.get_vocab()
        missing = [f"<|{name}|>" for name in names if f"<|{name}|>" not in vocabulary]
        if missing:
            raise DataError(f"the tokenizer lacks {', '.join(missing)}: no Qwen2.5-VL tokenizer")
        ids = [vocabulary[f"<|{name}|>"] for name in names]
        if vocabulary["<|image_pad|>"] != config.image_token_id:
            raise DataError(
                f"<|image_pad|> is {vocabulary['<|image_pad|>']} in the tokenizer and "
                f"{config.image_token_id} in the model's config: they do not belong together")
        # A sampled placeholder would be taken for an image slot by the next forward pass; and
        # Qwen's embedding has 151,936 rows for 151,665 tokens.
        banned_V = torch.zeros(config.text_config.vocab_size, dtype=torch.bool)
        for kind in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad"):
            if f"<|{kind}|>" in vocabulary:
                banned_V[vocabulary[f"<|{kind}|>"]] = True
        banned_V[max(vocabulary.values()) + 1 :] = True
        return SpecialIds(*ids, stops=(ids[1], ids[-1]), banned_V=banned_V)


def decode(tokenizer, special: SpecialIds, tokens: list[int]) -> str:
    """A completion's text. Stop ids go; other special tokens stay: Qwen2-VL puts boxes in them."""
    kept = [token for token in tokens if token not in special.stops]
    return tokenizer.decode(kept, skip_special_tokens=False)


# §2 ──────────────────────────────────── image and prompt ────────────────────────────────────
def patchify(image) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """An RGB image → (pixels [N, 3·2·14·14], grid (1, H/14, W/14)), as Qwen2VLImageProcessor does.

    Patches are ordered so that the 2×2 that merge into one image token lie together. The image is
    taken as a video of two equal frames (the patch embedding spans two): the factor 2 and the 1.
    Errors: ValueError if a side is not a multiple of 28 (resize once, in data.py).
    """
    width, height = image.size
    if width % (PATCH * MERGE) or height % (PATCH * MERGE):
        raise ValueError(f"image is {width}×{height}; sides must be multiples of {PATCH * MERGE}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    pixels = (pixels - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    rows, columns = height // PATCH, width // PATCH
    # [row/2, 2, 14, column/2, 2, 14, channel] → [row/2, column/2, 2, 2, channel, 14, 14]
    blocks = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, PATCH, PATCH)
    frames = np.repeat(blocks, 2, axis=2).reshape(rows * columns, -1)
    return torch.from_numpy(frames), (1, rows, columns)


def rope_positions(kinds: list, start: int = 0) -> tuple[torch.Tensor, int]:
    """M-RoPE positions of text runs and images in order: ([3, L] int64, next free position).

    `kinds` holds an int (a run of so many text tokens) or a grid (t, h, w) in patches.
    Text: all three rows count on. Image: row 0 (time) stands still, rows 1 and 2 are the token's
    row and column, what follows starts after the longer side.  [Qwen2-VL, arXiv 2409.12191 §2.1]
    """
    parts = []
    for kind in kinds:
        if isinstance(kind, int):
            parts.append(torch.arange(start, start + kind).expand(3, kind))
            start += kind
        else:
            rows, columns = kind[1] // MERGE, kind[2] // MERGE
            row, column = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
            parts.append(start + torch.stack([torch.zeros_like(row), row, column]))
            start += max(rows, columns)
    return torch.cat(parts, dim=1), start


@dataclass
class Prompt:
    """One chat turn, ready for the model. Image slots are already expanded in `ids`."""

    ids: list[int]
    positions_3L: torch.Tensor
    next_position: int  # where a completion starts
    image_slots: list[int] = field(default_factory=list)  # indices of ids that are image tokens
    pixels_ND: torch.Tensor | None = None
    grids: tuple = ()  # one (1, h, w) an image, in patches
    features_ID: torch.Tensor | None = None  # a frozen tower's, kept by the sampler for training


def encode_chat(tokenizer, special: SpecialIds, text: str, images=(), system=SYSTEM) -> Prompt:
    """System and user turn in Qwen's chat format, up to where the assistant speaks.

    Images come before the text [PR1 code]. `text` is tokenised as plain text: a literal
    "<|image_pad|>" or "<|im_end|>" in a question stays characters and never becomes an image slot.
    """
    plain = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    newline, start, end = plain("\n"), [special.im_start], [special.im_end]
    ids = start + plain(f"system\n{system}") + end + newline + start + plain("user\n")
    kinds, slots, text_since = [], [], 0
    pixels, grids = zip(*map(patchify, images)) if images else ((), ())
    for grid in grids:
        count = grid[1] * grid[2] // MERGE**2
        ids += [special.vision_start]
        kinds += [len(ids) - text_since, grid]
        slots += range(len(ids), len(ids) + count)
        ids += [special.image_pad] * count
        text_since = len(ids)
        ids += [special.vision_end]
    ids += plain(text) + end + newline + start + plain("assistant\n")
    positions_3L, next_position = rope_positions([*kinds, len(ids) - text_since])
    pixels_ND = torch.cat(pixels) if pixels else None
    return Prompt(ids, positions_3L, next_position, slots, pixels_ND, grids)


# §3 ──────────────────────────────────────── packing ─────────────────────────────────────────
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


# §4 ─────────────────────────────────────── attention ────────────────────────────────────────
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


# §5 ───────────────────────────────────────── policy ─────────────────────────────────────────
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


# §6 ────────────────────────────────────── load, export ──────────────────────────────────────
QWEN_SPLIT = (  # Qwen2.5's pre-tokenizer: words, single digits, punctuation, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TINY = ("tiny", "tiny-untied")  # names of the stand-in
TINY_CORPUS = """\
You are a helpful assistant. system user assistant Output the bounding box of the in the image.
Output all the bounding boxes of the Please output bbox coordinates and names of OCR this image.
red green blue yellow purple orange cyan magenta white black gray circle square triangle cross \
star diamond
circles squares triangles crosses stars diamonds How many are there Which What is color shape \
the answer
Put your final answer within boxed option letter think answer plus minus times"""
TINY_FRAGMENTS = (
    '[{"bbox_2d": [', '{"bbox_2d": [', '[{"point_2d": [', '{"point_2d": [', ", ", '], "label": "',
    '"}, ', '"}]', "\\boxed{", "<think>", "</think>", "<answer>", "</answer>")


def tiny_tokenizer():
    """A byte-level BPE of a few hundred ids with Qwen's pre-tokenizer and special tokens.

    Digits stay single as in Qwen2.5. Frequent pieces of the answer format are one token each, so
    that a box costs a dozen tokens, not three dozen, and a CPU can sample thousands of them.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    core.train_from_iterator(TINY_CORPUS.splitlines() * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TINY_FRAGMENTS])
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def tiny_model(tokenizer, *, tied: bool = True, seed: int = 0, hidden: int = 128, layers: int = 4):
    """A ~1 M-parameter `Qwen2_5_VLForConditionalGeneration` for teaching and tests, seeded.

    Initializer range 0.06: with Qwen's 0.02 a model this small sits on a long plateau first.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64 + 64,  # rows without a token, as in Qwen's
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, initializer_range=0.06,
            max_position_embeddings=4096, tie_word_embeddings=tied,
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[4, 6, 6]),
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"]),
        vision_config=dict(
            depth=3, hidden_size=96, intermediate_size=192, num_heads=4, out_hidden_size=hidden,
            fullatt_block_indexes=[2], window_size=112, initializer_range=0.06),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).float()


def load(name: str, *, weights: bool = True, seed: int = 0):
    """(model in fp32, tokenizer) of "tiny", "tiny-untied", a hub id or a local directory.

    weights=False builds the same modules without touching the weights' memory: for ranks other than
    0, which broadcasts. Weights are read from safetensors only. Errors: DataError if no Qwen2.5-VL.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers import Qwen2_5_VLForConditionalGeneration as Network
    from transformers.initialization import no_init_weights

    if name in TINY:
        tokenizer = tiny_tokenizer()
        return tiny_model(tokenizer, tied=name == "tiny", seed=seed), tokenizer
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "qwen2_5_vl":
        raise DataError(f"{name} is a {config.model_type}: give a Qwen2.5-VL checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not weights:
        with no_init_weights():
            model = Network(config).float()
        model.tie_weights()  # which no_init_weights leaves out
        return model, tokenizer
    return Network.from_pretrained(name, dtype=torch.float32, use_safetensors=True), tokenizer


def export(folder, policy, tokenizer, source: str) -> None:
    """Write the sharded policy as a Hugging Face checkpoint; every rank calls it, rank 0 writes.

    bf16 on GPUs, fp32 on CPU, with the image processor of `source` (a hub id or directory), so that
    `from_pretrained` and vLLM load the folder. One rename makes it appear.
    """
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

    options = dist_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = dist_state.get_model_state_dict(policy, options=options)
    if dist.get_rank() == 0:
        partial_folder = folder.with_suffix(".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        dtype = torch.bfloat16 if policy.banned_V.is_cuda else torch.float32
        state = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in full.items()}
        policy.model.save_pretrained(partial_folder, state_dict=state)
        images = processing.Qwen2VLImageProcessorPil
        for part in (images() if source in TINY else images.from_pretrained(source), tokenizer):
            part.save_pretrained(partial_folder)
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
    dist.barrier()
