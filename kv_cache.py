"""Where do keys and values lie while rows are sampled? One flat tensor a layer, cut for each batch.

A *row* is one completion being sampled; a *batch* is what decodes together: P prompts with G rows
each. A prompt's keys and values are held once, a row's own in T *places*. Rows begin with few
places, as many rows at once as fit the budget then; when the places are full, they grow and, where
the budget does not allow that, half of the rows is *parked* on the host until the others are done.

Shapes: P prompts, G rows a prompt, L prompt places, T own places, K key/value heads, d head width,
B rows in the order of the results.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch

PLACES = 128  # own places that a row begins with
ROWS = 512  # that begin together: each also holds logits of the whole vocabulary
GRAPHS = 64  # shapes whose captured graphs are kept, those used last


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least x."""
    return math.ceil(x / multiple) * multiple


def round_up_places(x: int) -> int:
    """x rounded up to 1, 2, 3, 4, 6, 8, 12, 16 … times PLACES: few shapes, little read in vain."""
    return round_up(x, max(PLACES, power_of_two(x) // 4))


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << (x - 1).bit_length()


@dataclass
class Batch:
    """Rows that decode together: all that a decoding step reads and writes.

    At equal shapes, tensors lie at equal addresses: a captured graph knows addresses only.
    """

    shape: tuple[int, int, int, int]  # P, G, L, T
    prompt: list[torch.Tensor]  # a layer: keys and values of the prompts, [2, P, K, L, d]
    own: list[torch.Tensor]  # a layer: keys and values of the rows' own tokens, [2, P, K, G, T, d]
    padding_P11L: torch.Tensor  # −∞ behind a prompt's end, else 0
    next_P: torch.Tensor  # position of a row's first own token
    place_1: torch.Tensor  # how many own tokens each row has cached
    ids_PG: torch.Tensor  # each row's last token
    row_PG: torch.Tensor  # where its tokens are collected: an index into B
    alive_PG: torch.Tensor  # no stop id so far
    graph: Any = None  # a captured decoding step, and
    hidden_PGD: torch.Tensor | None = None  # what each of its replays fills


def living_first(alive_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of prompts [P], and in it of each one's rows [P, G], in which living rows lead."""
    prompt_P = alive_PG.any(1).int().argsort(descending=True, stable=True)
    row_PG = alive_PG[prompt_P].int().argsort(dim=1, descending=True, stable=True)
    return prompt_P, row_PG


def selected(batch: Batch, prompt_P, row_PG) -> dict[str, torch.Tensor]:
    """Copies of what a batch knows of these prompts and of these rows in them."""
    rows = prompt_P[:, None], row_PG
    return {
        "padding_P11L": batch.padding_P11L[prompt_P],
        "next_P": batch.next_P[prompt_P],
        "ids_PG": batch.ids_PG[rows],
        "row_PG": batch.row_PG[rows],
        "alive_PG": batch.alive_PG[rows]}


def cached_rows(batch: Batch, layer: int, prompt_P, row_PG, t: int):
    """Copies of a layer's keys and values: (prompts [2, P, K, L, d], rows [2, P, K, G, t, d])."""
    prompt = batch.prompt[layer][:, prompt_P]
    by_row = batch.own[layer][..., :t, :].transpose(2, 3)  # [2, P, G, K, t, d]
    own = by_row[:, prompt_P[:, None], row_PG]
    return prompt, own.transpose(2, 3)


class Cache:
    """Keys and values of one batch at a time, within the budget.

    kv_gb: GiB, never exceeded but by a single row that needs more; graphs: few, padded shapes, each
    at fixed addresses, on CUDA with a captured graph. Plain twin: a budget that nothing exceeds.
    """

    def __init__(self, *, layers: int, kv_heads: int, head_width: int, kv_gb: float, device, dtype,
                 graphs: bool):
        self.layer_count = layers
        self.kv_heads = kv_heads
        self.head_width = head_width
        self.budget = int(kv_gb * 2**30 / layers / dtype.itemsize)  # numbers that a layer may hold
        self.device = device
        self.dtype = dtype
        self.graphs = graphs
        self.layers = []  # a flat tensor each
        self.batches = {}  # by shape, each with its graph, the one used last at the end
        self.captures = graphs and device.type == "cuda"
        if self.captures:
            self.graph_pool = torch.cuda.graph_pool_handle()

    def size(self, shape: tuple[int, int, int, int]) -> int:
        """Numbers that a layer holds of a batch (P, G, L, T)."""
        prompts, group, prompt_places, own_places = shape
        places = prompts * (prompt_places + group * own_places)
        return 2 * self.kv_heads * self.head_width * places

    def first_shape(self, lengths: list[int], group: int, max_tokens: int):
        """The batch (P, G, L, T) to begin with: as many of these rows as fit while they are short.

        Halved until it fits, prompts before rows: few shapes, and growing halves it later anyhow.
        """
        count = len(lengths)
        own_places = min(PLACES, max_tokens)
        while True:
            prompt_places = max(lengths[:count])
            if self.graphs:
                prompt_places = round_up_places(prompt_places)
            shape = (count, group, prompt_places, own_places)
            fits = self.size(shape) <= self.budget and count * group <= ROWS
            if fits or count * group == 1:
                return shape
            if count > 1:
                count = math.ceil(count / 2)
            else:
                group = math.ceil(group / 2)

    def reserve(self, shape: tuple[int, int, int, int], max_tokens: int) -> None:
        """A cache for all that this batch may grow to within the budget; one row at least."""
        prompts, group, prompt_places, _ = shape
        most = self.size((prompts, group, prompt_places, max_tokens))
        one_row = self.size((1, 1, prompt_places, max_tokens))
        size = max(min(most, self.budget), one_row)
        if not self.layers or size > len(self.layers[0]):
            self.release()
            for _ in range(self.layer_count):
                self.layers.append(torch.zeros(size, device=self.device, dtype=self.dtype))

    def release(self) -> None:
        """Give the cache back, and with it all graphs: they know its addresses only."""
        self.forget(list(self.batches))
        self.layers.clear()

    def forget(self, shapes: list) -> None:
        """Give these batches back, and their graphs.

        PyTorch refuses a pool whose graphs have all died, so the next ones get a new pool.
        """
        if self.captures:
            torch.cuda.synchronize()  # a graph may still be running
        for shape in shapes:
            del self.batches[shape]
        if self.captures and not any(batch.graph for batch in self.batches.values()):
            self.graph_pool = torch.cuda.graph_pool_handle()

    def batch_of(self, shape: tuple[int, int, int, int]) -> Batch:
        """The batch of this shape, its keys and values views of the cache; kept if graphs are."""
        if not self.graphs:
            return self.new_batch(shape)
        batch = self.batches.pop(shape, None) or self.new_batch(shape)
        self.batches[shape] = batch
        if len(self.batches) > GRAPHS:
            self.forget(list(self.batches)[:-GRAPHS])
        return batch

    def new_batch(self, shape: tuple[int, int, int, int]) -> Batch:
        prompts, group, prompt_places, own_places = shape
        heads, width = self.kv_heads, self.head_width
        prompt_shape = (2, prompts, heads, prompt_places, width)
        own_shape = (2, prompts, heads, group, own_places, width)
        prompt_size, size = math.prod(prompt_shape), self.size(shape)
        ids_PG = torch.zeros(prompts, group, dtype=torch.long, device=self.device)
        return Batch(
            shape=shape,
            prompt=[layer[:prompt_size].view(prompt_shape) for layer in self.layers],
            own=[layer[prompt_size:size].view(own_shape) for layer in self.layers],
            padding_P11L=torch.zeros(prompts, 1, 1, prompt_places, device=self.device),
            next_P=ids_PG.new_zeros(prompts),
            place_1=ids_PG.new_zeros(1),
            ids_PG=ids_PG,
            row_PG=ids_PG.clone(),
            alive_PG=ids_PG.bool())

    def make_room(self, batch: Batch, living: list[int], t: int, max_tokens: int, parked: list):
        """The batch for token t: smaller if that halves it, with more places if they are full.

        living: how many rows of each prompt go on. What would not fit the budget then is split,
        prompts before rows, and one half parked. batch: in the cache, or parked itself.
        """
        rows_now, prompt_places, own_places = batch.alive_PG.numel(), *batch.shape[2:]
        count, group = self.fewest(batch, living)
        full = t == own_places
        if not full and 2 * count * group > rows_now:
            return batch
        if full:
            own_places = min(round_up_places(t + 1), max_tokens)

        prompt_P, row_PG = living_first(batch.alive_PG)
        prompt_P, row_PG = prompt_P[:count], row_PG[:count, :group]
        while self.size((count, group, prompt_places, own_places)) > self.budget:
            if count > 1:
                count = math.ceil(count / 2)
                self.park(batch, prompt_P[count:], row_PG[count:], t, parked)
            elif group > 1:
                group = math.ceil(group / 2)
                self.park(batch, prompt_P, row_PG[:, group:], t, parked)
            else:
                break
            prompt_P, row_PG = prompt_P[:count], row_PG[:count, :group]
        return self.lay_out(batch, prompt_P, row_PG, own_places, t)

    def fewest(self, batch: Batch, living: list[int]) -> tuple[int, int]:
        """(P, G) of the smallest batch with all living rows; powers of two, so that few occur."""
        living_prompts = sum(rows > 0 for rows in living)
        count = min(batch.shape[0], power_of_two(living_prompts))
        group = min(batch.shape[1], power_of_two(max(living)))
        return count, group

    def park(self, batch: Batch, prompt_P, row_PG, t: int, parked: list) -> None:
        """These rows of the batch, t tokens of each cached, to the host, if any is alive."""
        small = selected(batch, prompt_P, row_PG)
        if not small["alive_PG"].any():
            return
        prompts, owns = [], []
        for index in range(self.layer_count):  # the device never holds copies of all layers
            prompt, own = cached_rows(batch, index, prompt_P, row_PG, t)
            prompts.append(prompt.cpu())
            owns.append(own.cpu())
        parked.append(Batch(
            shape=(*row_PG.shape, batch.shape[2], t),
            prompt=prompts,
            own=owns,
            place_1=batch.place_1.cpu(),
            **{name: values.cpu() for name, values in small.items()}))

    def lay_out(self, batch: Batch, prompt_P, row_PG, own_places: int, t: int) -> Batch:
        """These rows of a batch, t tokens of each cached, as the batch that lies in the cache.

        They may lie there themselves: each layer is read before it is written.
        """
        small = selected(batch, prompt_P, row_PG)
        placed = self.batch_of((*row_PG.shape, batch.shape[2], own_places))
        for name, values in small.items():
            getattr(placed, name).copy_(values)
        for index in range(self.layer_count):
            prompt, own = cached_rows(batch, index, prompt_P, row_PG, t)
            placed.prompt[index].copy_(prompt)
            placed.own[index].zero_()
            placed.own[index][..., :t, :] = own
        return placed
