"""Group sampling: G completions a prompt, the prompt computed once.

§1 rows, and who samples them · §2 prefill: vision tower and prompt, once per prompt · §3 decode:
all rows of a group read the same prompt keys · §4 sample

Decoding issues no collectives: ranks finish at different lengths, and a collective would hang.
Plain twins (tests/test_sampler.py): tokens ↔ Hugging Face's `generate`, log-probabilities ↔ the
policy's, padded shapes ↔ exact ones; and in tests/test_kv_cache.py a small budget ↔ a large one.

Words: a *row* is one completion being sampled; a *batch* is what decodes together, P prompts with G
rows each. Where its keys and values lie is kv_cache.py's business, the weights', weight_copy.py's.

Shapes: P prompts, G rows a prompt, L prompt places, T own places, S = L + T, V vocabulary, D width,
H query heads, K key/value heads, R = H/K queries that share a key head, d head width, B rows in the
order of the results, N image patches, I image tokens.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kv_cache import Batch, Cache
from noise import inverse_cdf
from policy import compiled, rms_norm, vision_features
from qwen_vl import Completion, Prompt, SpecialIds
from weight_copy import WeightCopy

PREFILL = 16_384  # prompt tokens in one pass: what they need beside the cache has no other bound


def product_fp32(a, b) -> torch.Tensor:
    """a @ b with its sums kept in fp32: attention's scores must not be rounded to bf16."""
    if not a.is_cuda or a.dtype == torch.float32:
        return (a @ b).float()
    batch = a.shape[:-2]
    a = a.flatten(0, -3)
    b = b.flatten(0, -3)
    out = torch.bmm(a, b, out_dtype=torch.float32)
    return out.unflatten(0, batch)


def joint_softmax(to_prompt, to_own, mask_P11S, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """softmax(scale·scores + mask) over scores to a prompt's places and to a row's own, fp32, of
    [P, K, G·R, L] and [P, K, G·R, T]; rounded once. Plain twin: itself, not compiled.
    """
    scores = torch.cat([to_prompt, to_own], dim=-1)
    scores = torch.add(mask_P11S, scores, alpha=scale)
    return scores.softmax(-1).to(dtype)


class Interrupted(Exception):
    """A rollout was abandoned because the run shall end."""


# §1 ──────────────────────────────── rows, and who samples them ──────────────────────────────
@dataclass
class Rows:
    """What has been sampled so far, in the order of the results."""

    tokens_BT: torch.Tensor
    logp_BT: torch.Tensor
    length_B: torch.Tensor
    uniform_BT: torch.Tensor | None  # None: greedy
    seen_BV: torch.Tensor | None  # ids that a repetition penalty makes less likely

    def completions(self, stops: tuple[int, ...]) -> list[Completion]:
        results = []
        lengths = self.length_B.tolist()
        rows = zip(self.tokens_BT.tolist(), self.logp_BT.tolist(), lengths)
        for tokens, logps, length in rows:
            last = tokens[length - 1]
            truncated = last not in stops
            results.append(Completion(tokens[:length], logps[:length], truncated))
        return results


class Sampler:
    """Owns the weight copy; `refresh` fills it, `generate` samples from it.

    model: a Qwen2.5-VL whose shapes count; kv_gb: GiB for keys and values, never exceeded but by a
    single row that needs more; graphs: few, padded shapes, on CUDA replayed as captured graphs;
    compile: its layers by `policy.compiled` functions; keep_features: leave images' features in
    prompts, on the host (frozen tower). `interrupted()` is asked every round; True abandons the
    rollout.
    """

    def __init__(self, model, special: SpecialIds, *, device="cpu", dtype=torch.float32, kv_gb=8.0,
                 graphs=False, compile=False, keep_features=False):
        self.special = special
        self.device = torch.device(device)
        self.dtype = dtype
        self.graphs = graphs
        self.keep_features = keep_features
        self.interrupted = lambda: False
        self.banned_V = special.banned_V.to(device)
        self.stops = torch.tensor(special.stops, device=device)

        self.joint_softmax = compiled(joint_softmax, compile)
        self.copy = WeightCopy(model, device=self.device, dtype=dtype, compile=compile)
        self.cache = Cache(
            layers=len(self.copy.layers),
            kv_heads=self.copy.kv_heads,
            head_width=self.copy.head_width,
            kv_gb=kv_gb,
            device=self.device,
            dtype=dtype,
            graphs=graphs)
        if self.cache.captures:
            self.capture_stream = torch.cuda.Stream()

    def refresh(self, pairs) -> None:
        """Copy the policy's weights here, see WeightCopy.refresh."""
        self.copy.refresh(pairs)

    # §2 ────────────────────────────────────── prefill ───────────────────────────────────────
    def prefill(self, prompts: list[Prompt], cache: list[torch.Tensor]) -> torch.Tensor:
        """Vision tower and decoder once per prompt, right-padded to the longest.

        Fills `cache`, [2, P, K, ≥ L, d] a layer, and returns the last hidden state of each prompt,
        [P, D]. Padding lies behind: causal attention never sees it, decoding masks it.
        Plain twin: the policy's forward.
        """
        count = len(prompts)
        lengths = [len(prompt.ids) for prompt in prompts]
        longest = max(lengths)
        ids_PL = torch.full((count, longest), self.special.pad)
        positions_3PL = torch.zeros(3, count, longest, dtype=torch.long)
        slots = []
        for p, prompt in enumerate(prompts):
            length = lengths[p]
            ids_PL[p, :length] = torch.tensor(prompt.ids)
            positions_3PL[:, p, :length] = prompt.positions_3L
            begin = p * longest
            slots += [begin + slot for slot in prompt.image_slots]

        ids_PL = ids_PL.to(self.device)
        positions_3PL = positions_3PL.to(self.device)
        x_PLD = F.embedding(ids_PL, self.copy.embed)
        if slots:
            slots_I = torch.tensor(slots, device=self.device)
            flat = x_PLD.view(-1, x_PLD.shape[-1])
            flat[slots_I] = self.image_features(prompts)
        cos_PL1d, sin_PL1d = self.copy.angles(x_PLD, positions_3PL)

        def attend(index, q_PLHd, kv_PL2Kd):
            kv = kv_PL2Kd.permute(2, 0, 3, 1, 4)  # [2, P, K, L, d]
            cache[index][:, :, :, :longest] = kv
            q_PHLd = q_PLHd.transpose(1, 2)
            out = F.scaled_dot_product_attention(q_PHLd, *kv, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)

        x_PLD = self.copy.run_layers(x_PLD, cos_PL1d, sin_PL1d, attend)
        prompt_P = torch.arange(count, device=self.device)
        last_P = torch.tensor(lengths, device=self.device) - 1
        return x_PLD[prompt_P, last_P]

    def image_features(self, prompts: list[Prompt]) -> torch.Tensor:
        """Merged vision features of all images in order, [I, D]."""
        seeing = [prompt for prompt in prompts if prompt.pixels_ND is not None]
        pixels_ND = torch.cat([prompt.pixels_ND for prompt in seeing])
        pixels_ND = pixels_ND.to(self.device, self.dtype)
        grids = torch.tensor([grid for prompt in seeing for grid in prompt.grids])
        features_ID = vision_features(self.copy.vision, pixels_ND, grids)
        features_ID = features_ID.to(self.dtype)
        sizes = [len(prompt.image_slots) for prompt in seeing]
        for prompt, part_ID in zip(seeing, features_ID.split(sizes)):
            prompt.features_ID = None
            if self.keep_features:
                prompt.features_ID = part_ID.cpu()
        return features_ID

    def start_batch(self, prompts: list[Prompt], shape, max_tokens: int):
        """(a batch of this shape, hidden states [P, G, D] after its prompts)."""
        count, group, prompt_places, _ = shape
        self.cache.reserve(shape, max_tokens)
        batch = self.cache.batch_of(shape)
        for cached in (*batch.prompt, *batch.own):
            cached.zero_()  # masked places count 0 times what lies there, and 0 · NaN is NaN

        at_once = max(1, PREFILL // prompt_places)
        hidden = []
        for first in range(0, count, at_once):
            end = first + at_once
            part = prompts[first:end]
            cache = [cached[:, first:end] for cached in batch.prompt]
            hidden.append(self.prefill(part, cache))
        hidden_PD = torch.cat(hidden)

        lengths = [len(prompt.ids) for prompt in prompts]
        lengths_P = torch.tensor(lengths, device=self.device)
        place_L = torch.arange(prompt_places, device=self.device)
        behind_PL = place_L >= lengths_P[:, None]
        behind_P11L = behind_PL[:, None, None]
        batch.padding_P11L.zero_().masked_fill_(behind_P11L, -math.inf)
        next_positions = [prompt.next_position for prompt in prompts]
        batch.next_P.copy_(torch.tensor(next_positions))
        row_B = torch.arange(count * group)
        batch.row_PG.copy_(row_B.view(count, group))
        batch.alive_PG.fill_(True)
        hidden_PGD = hidden_PD[:, None].expand(-1, group, -1)
        return batch, hidden_PGD

    # §3 ─────────────────────────────────────── decode ───────────────────────────────────────
    def decode(self, batch: Batch, places: int) -> torch.Tensor:
        """One token of every row through the decoder; its key and value join the cache.

        All that changes from round to round lies in the batch's tensors. `places` of the own cache
        are read, those past `place_1` masked. Returns hidden states [P, G, D].
        Plain twin: Hugging Face's `generate`, and the policy's log-probabilities.
        """
        x_PGD = F.embedding(batch.ids_PG, self.copy.embed)
        position_P = batch.next_P + batch.place_1
        position_3P1 = position_P.expand(3, -1)[:, :, None]
        cos_P11d, sin_P11d = self.copy.angles(x_PGD, position_3P1)
        place_T = torch.arange(places, device=self.device)
        ahead_T = torch.zeros(places, device=self.device)
        ahead_T = ahead_T.masked_fill(place_T > batch.place_1, -math.inf)
        ahead_P11T = ahead_T.expand(len(position_P), 1, 1, -1)
        mask_P11S = torch.cat([batch.padding_P11L, ahead_P11T], dim=-1)

        def attend(index, q_PGHd, kv_PG2Kd):
            own = batch.own[index]  # [2, P, K, G, T, d]
            new = kv_PG2Kd.permute(2, 0, 3, 1, 4)
            own.index_copy_(4, batch.place_1, new[..., None, :])
            read = own[..., :places, :]
            return self.shared_attention(q_PGHd, batch.prompt[index], read, mask_P11S)

        return self.copy.run_layers(x_PGD, cos_P11d, sin_P11d, attend)

    def shared_attention(self, q_PGHd, prompt, own, mask_P11S) -> torch.Tensor:
        """Each row attends to S = [its group's prompt | its own tokens]: one softmax over both.

        A prompt's keys are read once a group, not once a row. Returns [P, G, H, d].
        Plain twin: the policy's attention, by the log-probabilities that come of both.
        """
        keys_PKLd, values_PKLd = prompt
        keys_PKGTd, values_PKGTd = own
        q_PGKRd = q_PGHd.unflatten(2, (self.copy.kv_heads, -1))
        q_PKGRd = q_PGKRd.transpose(1, 2).contiguous()
        to_prompt = product_fp32(q_PKGRd.flatten(2, 3), keys_PKLd.mT)
        to_own = product_fp32(q_PKGRd, keys_PKGTd.mT).flatten(2, 3)
        sizes = [to_prompt.shape[-1], to_own.shape[-1]]

        # softmax(q·kᵀ/√d + mask), [P, K, G·R, S]
        scale = self.copy.head_width**-0.5
        weights = self.joint_softmax(to_prompt, to_own, mask_P11S, scale, q_PGHd.dtype)

        of_prompt, of_own = weights.split(sizes, dim=-1)
        out = of_prompt @ values_PKLd
        out = out.view_as(q_PKGRd)
        grouped = q_PKGRd.shape[2:4]  # (G, R)
        of_own = of_own.unflatten(2, grouped).flatten(0, 2)
        of_values = values_PKGTd.flatten(0, 2)
        out.flatten(0, 2).baddbmm_(of_own, of_values)  # out += in place: it is contiguous
        out_PGKRd = out.transpose(1, 2)
        return out_PGKRd.flatten(2, 3)

    def next_hidden(self, batch: Batch, t: int) -> torch.Tensor:
        """`decode` at place t; on CUDA a graph captured once a shape: one launch, not hundreds.

        Plain twin: `decode` itself.
        """
        batch.place_1.fill_(t)
        if not self.graphs:
            return self.decode(batch, t + 1)
        places = batch.shape[3]
        if not self.cache.captures:
            return self.decode(batch, places)
        if batch.graph is None:
            batch.graph, batch.hidden_PGD = self.capture(batch, places)
        batch.graph.replay()
        return batch.hidden_PGD

    def capture(self, batch: Batch, places: int) -> tuple:
        """(a graph of `decode`, the hidden states that each replay fills).

        Warm-up and capture share one stream for good: cuBLAS keeps a workspace a stream, and so
        takes it from ordinary memory, not from the graphs' pool.
        """
        current = torch.cuda.current_stream()
        self.capture_stream.wait_stream(current)
        # On a first call libraries allocate, and what is compiled is compiled.
        with torch.cuda.stream(self.capture_stream):
            self.decode(batch, places)
        current.wait_stream(self.capture_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.cache.graph_pool, stream=self.capture_stream):
            hidden_PGD = self.decode(batch, places)
        return graph, hidden_PGD

    # §4 ─────────────────────────────────────── sample ───────────────────────────────────────
    @torch.no_grad()
    def generate(self, prompts: list[Prompt], noise, max_tokens: int, temperature: float = 1.0,
                 repetition_penalty: float = 1.0) -> list[list[Completion]]:
        """A list of G Completions for each prompt.

        noise: [G, ≥ max_tokens] a prompt, from `keyed_uniforms`; None decodes greedily, G = 1.
        Prompts run in batches that fit the key/value budget, a large group in several.
        """
        group = len(noise[0]) if noise else 1
        groups = [[] for _ in prompts]
        first = 0
        while first < len(prompts):
            done = len(groups[first])  # rows of this prompt, if its group is cut
            ahead = prompts[first:]
            if done:
                ahead = ahead[:1]
            lengths = [len(prompt.ids) for prompt in ahead]
            shape = self.cache.first_shape(lengths, group - done, max_tokens)
            count, size = shape[:2]
            part = ahead[:count]
            uniform_BT = None
            if noise:
                of_part = noise[first : first + count]
                uniforms = [uniform_GT[done : done + size] for uniform_GT in of_part]
                uniform_BT = torch.cat(uniforms).to(self.device)
            rows = self.new_rows(part, size, max_tokens, uniform_BT, repetition_penalty)
            self.run_batch(part, shape, rows, temperature, repetition_penalty)
            completions = rows.completions(self.special.stops)
            for index in range(count):
                begin = index * size
                groups[first + index] += completions[begin : begin + size]
            if len(groups[first]) == group:
                first += count
        return groups

    def new_rows(self, prompts, group, max_tokens, uniform_BT, penalty) -> Rows:
        count = len(prompts) * group
        seen_BV = None
        if penalty != 1:
            seen_BV = torch.zeros_like(self.banned_V).repeat(count, 1)
            for row in range(count):
                prompt = prompts[row // group]
                seen_BV[row, prompt.ids] = True
        return Rows(
            tokens_BT=torch.full((count, max_tokens), self.special.pad, device=self.device),
            logp_BT=torch.zeros(count, max_tokens, device=self.device),
            length_B=torch.full((count,), max_tokens, device=self.device),
            uniform_BT=uniform_BT,
            seen_BV=seen_BV)

    def run_batch(self, prompts, shape, rows: Rows, temperature: float, penalty: float) -> None:
        """Rounds of one token a row, until all rows have stopped."""
        max_tokens = rows.tokens_BT.shape[1]
        batch, hidden_PGD = self.start_batch(prompts, shape, max_tokens)
        parked = []
        t = 0
        while True:
            self.sample_tokens(batch, rows, hidden_PGD, t, temperature, penalty)
            living = batch.alive_PG.sum(1).tolist()  # of each prompt; the one wait for the device
            if self.interrupted():
                raise Interrupted
            if not any(living) or t + 1 == max_tokens:
                if not parked:
                    return
                batch = parked.pop()
                living = batch.alive_PG.sum(1).tolist()
                t = batch.shape[3]
            batch = self.cache.make_room(batch, living, t, max_tokens, parked)
            hidden_PGD = self.next_hidden(batch, t)
            t += 1

    def sample_tokens(self, batch, rows: Rows, hidden_PGD, t, temperature, penalty) -> None:
        """Each living row's token t, noted in `rows` and set as the next input of the batch."""
        at, alive_PG = batch.row_PG, batch.alive_PG
        uniform_PG = seen_PGV = None
        if rows.uniform_BT is not None:
            uniform_PG = rows.uniform_BT[at, t]
        if rows.seen_BV is not None:
            seen_PGV = rows.seen_BV[at]
        ids_PG, logp_PG = self.choose(hidden_PGD, uniform_PG, temperature, seen_PGV, penalty)
        rows.tokens_BT[at, t] = ids_PG.where(alive_PG, self.special.pad)
        rows.logp_BT[at, t] = logp_PG.where(alive_PG, 0.0)
        stopped_PG = alive_PG & torch.isin(ids_PG, self.stops)
        length_PG = rows.length_B[at]
        rows.length_B[at] = torch.where(stopped_PG, t + 1, length_PG)
        if rows.seen_BV is not None:
            rows.seen_BV[at, ids_PG] = True
        batch.alive_PG &= ~stopped_PG
        batch.ids_PG.copy_(ids_PG)

    def choose(self, hidden_PGD, uniform_PG, temperature: float, seen_PGV=None, penalty=1.0):
        """Each row's token and log-probability, from the distribution that training scores.

        `penalty` (evaluation only) makes ids in `seen_PGV`, of prompt and answer, less likely.
        """
        normed_PGD = rms_norm(hidden_PGD, self.copy.norm, self.copy.eps)
        logits_PGV = F.linear(normed_PGD, self.copy.head).float()
        logits_PGV = logits_PGV / temperature
        if seen_PGV is not None:  # as in Hugging Face's and vLLM's repetition_penalty
            factor_PGV = torch.where(logits_PGV > 0, 1 / penalty, penalty)
            logits_PGV = torch.where(seen_PGV, logits_PGV * factor_PGV, logits_PGV)
        logits_PGV = logits_PGV.masked_fill(self.banned_V, -math.inf)
        logp_PGV = logits_PGV.log_softmax(-1)
        if uniform_PG is None:
            ids_PG = logp_PGV.argmax(-1)
        else:
            pi_BV = logp_PGV.flatten(0, 1).exp()
            ids_B = inverse_cdf(pi_BV, uniform_PG.flatten())
            ids_PG = ids_B.view(uniform_PG.shape)
        logp_PG1 = logp_PGV.gather(-1, ids_PG[..., None])
        return ids_PG, logp_PG1.squeeze(-1)
