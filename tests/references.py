"""What the tests compare with: a small world, and Hugging Face's model used in the plainest way."""
import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration

import packing
import qwen_vl
from packing import pack_groups
from policy import Policy
from qwen_vl import Completion, Group, SpecialIds, encode_chat

CPU = torch.device("cpu")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Operations(TorchDispatchMode):
    """Which operations run, in order."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ran.append(function)
        return function(*args, **(kwargs or {}))


def prepared(pack):
    return packing.prepare_attention(pack, CPU)


def noise_image(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_world(name):
    """(policy, Hugging Face twin with stock attention, tokenizer, special ids, prompts)."""
    model, tokenizer = qwen_vl.load(name)
    special = SpecialIds.read(tokenizer, model.config)
    twin = Qwen2_5_VLForConditionalGeneration(model.config).eval()
    twin.load_state_dict(model.state_dict())
    prompts = [
        encode_chat(tokenizer, special, "red circle 12", [noise_image(84, 84, 0)]),
        encode_chat(tokenizer, special, "no image here: 34 + 5"),
        encode_chat(tokenizer, special, "two images", [noise_image(56, 140, 1), noise_image(168, 112, 2)]),
        encode_chat(tokenizer, special, "wide", [noise_image(280, 28, 3)]),
    ]
    return Policy(model, special.banned_V), twin, tokenizer, special, prompts


RAGGED = [[3, 1, 7], [5, 2, 2], [1, 1, 9], [4, 6, 3]]  # lengths of three completions of each prompt


def ragged_groups(prompts, vocabulary=200):
    generator = np.random.default_rng(5)
    groups, row = [], 0
    for prompt, lengths in zip(prompts, RAGGED):
        completions = [Completion(generator.integers(0, vocabulary, n).tolist()) for n in lengths]
        groups.append(Group(prompt, completions, row))
        row += len(lengths)
    return groups


def rows_of(groups):
    """(group, tokens, row) of every completion."""
    return [(g, c.tokens, g.row + i) for g in groups for i, c in enumerate(g.completions)]


def longest_of(groups):
    return max(len(tokens) for _, tokens, _ in rows_of(groups))


def huggingface_logps(twin, banned_V, group, tokens, temperature=1.0):
    """One completion alone, unpadded and unpacked, through the stock model with its own positions."""
    prompt = group.prompt
    ids = torch.tensor([prompt.ids + tokens])
    kinds = torch.zeros_like(ids)
    kinds[0, prompt.image_slots] = 1
    images = {}
    if prompt.pixels_ND is not None:
        images = dict(pixel_values=prompt.pixels_ND, image_grid_thw=torch.tensor(prompt.grids), mm_token_type_ids=kinds)
    logits = twin(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
    logp = (logits / temperature).masked_fill(banned_V, float("-inf")).log_softmax(-1)
    return logp[len(prompt.ids) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


def padded_logps(twin, banned_V, groups):
    """The readable reference: one row a completion, right-padded, the prompt repeated in each. [B, T]."""
    longest = longest_of(groups)
    out = torch.zeros(len(rows_of(groups)), longest)
    for group, tokens, row in rows_of(groups):
        length = len(group.prompt.ids) + longest
        ids = torch.tensor([(group.prompt.ids + tokens + [0] * longest)[:length]])
        mask = torch.arange(length)[None] < len(group.prompt.ids) + len(tokens)
        tail = qwen_vl.rope_positions([longest], group.prompt.next_position)[0]
        positions = torch.cat([group.prompt.positions_3L, tail], dim=1)[:, None]
        images = {}
        if group.prompt.pixels_ND is not None:
            images = dict(pixel_values=group.prompt.pixels_ND)
            images["image_grid_thw"] = torch.tensor(group.prompt.grids)
        logits = twin(ids, attention_mask=mask.long(), position_ids=positions, **images).logits[0]
        logp = logits.masked_fill(banned_V, float("-inf")).log_softmax(-1)
        logp = logp[len(group.prompt.ids) - 1 : -1][: len(tokens)]
        scored = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        place = (torch.tensor([row] * len(tokens)), torch.arange(len(tokens)))
        out = out.index_put(place, scored)
    return out


def scatter_BT(values_S, row_S, shape):
    """Scored tokens, in order within each row, back into their places of the padded [B, T] batch; zero elsewhere."""
    column_S, lengths = [], {}
    for row in row_S.tolist():
        column_S.append(lengths.get(row, 0))
        lengths[row] = column_S[-1] + 1
    return values_S.new_zeros(shape).index_put((row_S, torch.tensor(column_S)), values_S)


def packed_logps(policy, groups, budget=10**6, temperature=1.0):
    """([B, T] log-probs by shared-prefix packing, number of micro-batches)."""
    shape = (len(rows_of(groups)), longest_of(groups))
    packs = [prepared(pack_groups(part)) for part in packing.split_groups(groups, budget)]
    return sum(scatter_BT(policy(p, temperature)[0], p.row_S, shape) for p in packs), len(packs)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def relative_error(got, want):
    return ((got - want).norm() / want.norm().clamp(min=1e-12)).item()


def image_inputs(prompt):
    """What Hugging Face's forward and generate take beside the ids."""
    kinds = torch.zeros(1, len(prompt.ids), dtype=torch.long)
    kinds[0, prompt.image_slots] = 1
    if prompt.pixels_ND is None:
        return dict(mm_token_type_ids=kinds)
    return dict(pixel_values=prompt.pixels_ND, image_grid_thw=torch.tensor(prompt.grids), mm_token_type_ids=kinds)
