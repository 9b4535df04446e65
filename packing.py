"""How do groups become packed rows, and who sees whom in them?

§1 packing: the prompt is paid once · §2 who sees whom: index tensors, once for all layers

Each fast form has a plain twin that tests/test_packing.py holds it to:
  a packed row                 one completion at a time through Hugging Face's forward
  two-part, varlen layout      the same rule as one mask

Shapes, as suffixes: L packed tokens, S scored completion tokens, P groups in a row, N image
patches, I image tokens, B rollouts; of §2's batches B rows, T queries and K keys of each.
"""
import math
from dataclasses import dataclass, is_dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from qwen_vl import MERGE, PATCH, Group, Prompt, SpecialIds, rope_positions


# §1 ──────────────────────────────────────── packing ─────────────────────────────────────────
@dataclass
class PaddedBatch:
    """Sequences side by side, one call of SDPA: `padded_batch`."""

    queries_BT: torch.Tensor  # indices into L, 0 where padded
    keys_BK: torch.Tensor  # alike
    mask_B1TK: torch.Tensor | None  # what is added to scores; None: causal, which SDPA knows itself


@dataclass
class PaddedLayout:
    """Who sees whom, in batches: the CPU's two parts, or the one of `mask_layout`."""

    batches: list[PaddedBatch]
    scatter_L: torch.Tensor  # where each token's output lies, batches one after the other


@dataclass
class VarlenLayout:
    """Who sees whom on CUDA: sequences end to end, a call per layer. Queries stay in place."""

    key_index: torch.Tensor  # each sequence's keys, indices into L: its prompt, then itself
    cu_q: torch.Tensor  # where sequences of queries begin, and where the last one ends
    cu_k: torch.Tensor  # of keys
    max_q: int  # the longest sequence
    max_k: int


@dataclass
class Pack:
    """One micro-batch: groups end to end in one row of L tokens, by `pack_groups`."""

    ids_L: torch.Tensor
    positions_3L: torch.Tensor
    group_L: torch.Tensor  # which group a token belongs to
    segment_L: torch.Tensor  # 0 in a prompt, i in its i-th completion
    source_S: torch.Tensor  # where the hidden state lies that predicts scored token s
    target_S: torch.Tensor  # the scored token
    row_S: torch.Tensor  # the rollout that it belongs to, an index into B
    image_slots: torch.Tensor  # indices into L, in the order of the image features
    # The prompts' own tensors, [N, D] each, still on the host: each pass takes them to the device.
    pixels: list[torch.Tensor]
    grids_I3: torch.Tensor | None
    features: list[torch.Tensor]  # in place of pixels, where the sampler kept them
    attention: PaddedLayout | VarlenLayout | None = None  # of §2, from `prepare_attention`
    vision: dict | None = None  # policy.vision_layout of the grids, kept by the first pass

    def to(self, device) -> "Pack":
        images = ("pixels", "grids_I3", "features")
        others = {name: value for name, value in vars(self).items() if name not in images}
        return replace(self, **on_device(others, device))


def on_device(values, device):
    """The same with its tensors on the device."""
    return map_tensors(values, lambda tensor: tensor.to(device))


def map_tensors(values, function):
    """The same with the function's value for each tensor, also in dicts, lists and layouts."""
    if torch.is_tensor(values):
        return function(values)
    if is_dataclass(values):
        return type(values)(**map_tensors(vars(values), function))
    if isinstance(values, dict):
        return {name: map_tensors(value, function) for name, value in values.items()}
    if isinstance(values, list):
        return [map_tensors(value, function) for value in values]
    return values


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
    features = [prompt.features_ID for prompt in prompts if prompt.features_ID is not None]
    seeing = [prompt for prompt in prompts if prompt.grids]
    if features or not seeing:
        return {"pixels": [], "grids_I3": None, "features": features}
    pixels = [prompt.pixels_ND for prompt in seeing]
    grids = [grid for prompt in seeing for grid in prompt.grids]
    return {"pixels": pixels, "grids_I3": torch.tensor(grids), "features": []}


def ensure_image(pack: Pack) -> None:
    """Give a text-only row a 28×28 blank that touches no token, as other ranks see images."""
    if not pack.pixels:
        pack.pixels = [torch.zeros(MERGE * MERGE, 3 * 2 * PATCH * PATCH)]
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
    image_flags = ranks.gather([bool(pack.pixels) for pack in packs])
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
# its own completion. Three ways to compute the same thing, of one group:
#
#   queries   keys: prompt o_1 o_2                 prompt o_1                  prompt o_2
#   prompt            ◣    ·   ·                     ◣
#   o_1               ■    ◣   ·                     ■     ◣
#   o_2               ■    ·   ◣                                                 ■     ◣
#
#             mask: · is computed, too         two parts, varlen: · is not
#
#   mask       (reference) groups side by side in a padded batch, one call of SDPA
#   two parts  (CPU) prompts in a padded batch of their own; a completion's keys are gathered as
#              prompt + completion, and completions of about one length make a batch: few calls
#   varlen     (CUDA) the same keys; each prompt and each completion is a sequence, nothing is
#              padded, causal aligned at the bottom right, one call a layer
def prepare_attention(pack: Pack, device: torch.device) -> Pack:
    """Fill `pack.attention`, once for all layers, and move the row to the device."""
    on_gpu = device.type == "cuda"
    pack.attention = varlen_layout(pack) if on_gpu else two_part_layout(pack)
    return pack.to(device)


def mask_layout(pack: Pack) -> PaddedLayout:
    """One padded batch: row p is all of group p."""
    groups = torch.arange(len(pack.ids_L)).split(torch.bincount(pack.group_L).tolist())
    layout = padded_layout([[(group[:0], group) for group in groups]])
    (batch,) = layout.batches
    segment_PL = pack.segment_L[batch.queries_BT]
    key_P1L = segment_PL[:, None, :]
    query_PL1 = segment_PL[:, :, None]
    places = segment_PL.shape[1]
    causal_LL = torch.ones(places, places).tril().bool()
    batch.mask_B1TK = as_mask(causal_LL & ((key_P1L == 0) | (key_P1L == query_PL1)))
    return layout


def as_mask(seen_BTK: torch.Tensor) -> torch.Tensor:
    """What is added to scores, alike for all heads: 0 where a key is seen, else −∞. [B, 1, T, K]"""
    return torch.zeros(seen_BTK.shape).masked_fill(~seen_BTK, -math.inf)[:, None]


def two_part_layout(pack: Pack) -> PaddedLayout:
    """Several padded batches: prompts, then completions by length.

    Those whose lengths have equally many binary digits go together: padding less than doubles one.
    Plain twin: `mask_layout`.
    """
    rows_of = {}  # a size: the rows of a batch
    for prompt, own in sequences(pack):
        size = len(own).bit_length() if len(prompt) else 0
        rows_of.setdefault(size, []).append((prompt, own))
    return padded_layout(list(rows_of.values()))


def sequences(pack: Pack) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(the tokens of its prompt, its own) of each prompt, which has none before it, and completion,
    in the order of the row; as indices into L."""
    segments = pack.segment_L.max() + 1
    sequence_L = pack.group_L * segments + pack.segment_L  # a number for each (group, segment)
    _, lengths = torch.unique_consecutive(sequence_L, return_counts=True)
    found, prompt = [], None
    for own in torch.arange(len(sequence_L)).split(lengths.tolist()):
        if pack.segment_L[own[0]] == 0:
            prompt = own
            found.append((own[:0], own))
        else:
            found.append((prompt, own))
    return found


def padded_batch(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> PaddedBatch:
    """A row's queries are its own tokens, its keys [prompt | own]: it sees all of the prompt, and
    its own causally. Without prompts there is no mask: SDPA skips half."""
    prompt_BP, has_prompt_BP = padded([prompt for prompt, _ in rows])
    own_BT, _ = padded([own for _, own in rows])
    count, places = own_BT.shape
    mask_B1TK = None
    if prompt_BP.shape[1]:
        all_BTP = has_prompt_BP[:, None].expand(-1, places, -1)
        causal_BTT = torch.ones(places, places).tril().bool().expand(count, -1, -1)
        mask_B1TK = as_mask(torch.cat([all_BTP, causal_BTT], dim=2))
    keys_BK = torch.cat([prompt_BP, own_BT], dim=1)
    return PaddedBatch(own_BT, keys_BK, mask_B1TK)


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices side by side, 0 where one is shorter than the longest; and where they are filled."""
    lengths_B = torch.tensor([len(row) for row in rows])
    padded_BT = pad_sequence(rows, batch_first=True)
    return padded_BT, torch.arange(padded_BT.shape[1]) < lengths_B[:, None]


def padded_layout(rows_of_batches: list[list[tuple]]) -> PaddedLayout:
    """A `padded_batch` of each list of rows, and where each token's output lies behind them all."""
    batches, places, tokens = [], [], []
    begin = 0  # of a row's output
    for rows in rows_of_batches:
        batch = padded_batch(rows)
        batches.append(batch)
        for _, own in rows:
            tokens.append(own)
            places.append(begin + torch.arange(len(own)))
            begin += batch.queries_BT.shape[1]
    order = torch.cat(tokens).argsort()
    return PaddedLayout(batches, scatter_L=torch.cat(places)[order])


def varlen_layout(pack: Pack) -> VarlenLayout:
    """Prompts and completions are sequences, in the order of the row. Plain twin: `mask_layout`."""
    found = sequences(pack)
    keys = [torch.cat([prompt, own]) for prompt, own in found]
    lengths = torch.tensor([len(own) for _, own in found])
    key_lengths = torch.tensor([len(index) for index in keys])
    return VarlenLayout(
        key_index=torch.cat(keys),
        cu_q=borders(lengths),
        cu_k=borders(key_lengths),
        max_q=int(lengths.max()),
        max_k=int(key_lengths.max()))


def borders(lengths: torch.Tensor) -> torch.Tensor:
    """Where sequences laid end to end begin, and where the last one ends: [n + 1] int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()
