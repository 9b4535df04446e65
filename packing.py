"""How do groups become packed rows, and who sees whom in them?

§1 packing: the prompt is paid once · §2 who sees whom: index tensors, once for all layers

Each fast form has a plain twin that tests/test_policy.py holds it to:
  a packed row        one completion at a time through Hugging Face's forward
  varlen layout       the same rule as a mask

Shapes, as suffixes: L packed tokens, S scored completion tokens, P groups in a row, N image
patches, I image tokens, B rollouts.
"""
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from qwen_vl import MERGE, PATCH, Group, Prompt, SpecialIds, rope_positions


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
    row_S: torch.Tensor  # the rollout that it belongs to, an index into B
    image_slots: torch.Tensor  # indices into L, in the order of the image features
    pixels_ND: torch.Tensor | None
    grids_I3: torch.Tensor | None  # stays on the host
    features_ID: torch.Tensor | None = None  # in place of pixels, where they are known
    attention: dict = field(default_factory=dict)  # §2's index tensors, from `prepare_attention`
    vision: dict | None = None  # policy.vision_layout of the grids, kept by the first pass

    def to(self, device) -> "Pack":
        moved = on_device(vars(self), device)
        moved["attention"] = on_device(self.attention, device)
        moved["grids_I3"] = self.grids_I3  # `vision_layout` reads them on the host
        return Pack(**moved)


def on_device(values: dict, device) -> dict:
    """The same with its tensors on the device."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in values.items()}


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
    source, target, row = [], [], []
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


def sampled_logps(rollouts: list, packs: list[Pack], device) -> list[torch.Tensor]:
    """The sampler's log-probability of each scored token, [S] a pack: packs keep their order."""
    flat = torch.tensor([logp for completion in rollouts for logp in completion.logps])
    return list(flat.to(device).split([len(pack.target_S) for pack in packs]))


# §2 ───────────────────────────────────── who sees whom ───────────────────────────────────────
# Token i attends to j ≤ i with group(j) = group(i) and segment(j) ∈ {0, segment(i)}: the prompt and
# its own completion. Two ways to compute the same thing:
#   mask    (CPU, reference) groups side by side in a padded batch [P, longest group], one SDPA call
#   varlen  (CUDA) each prompt and each completion is a sequence of queries; a completion's keys are
#           gathered as prompt + completion, causal aligned at the bottom right, one call a layer
def prepare_attention(pack: Pack, device: torch.device) -> Pack:
    """Fill `pack.attention`, once for all layers, and move the row to the device."""
    on_gpu = device.type == "cuda"
    pack.attention = varlen_layout(pack) if on_gpu else mask_layout(pack)
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
