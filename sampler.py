"""Group sampling: G completions a prompt, the prompt computed once.

§1 keyed noise · §2 the weights' copy · §3 prefill: vision tower and prompt, once per prompt · §4
decode: all rows of a group read the same prompt keys · §5 sample

Decoding issues no collectives: ranks finish at different lengths, and a collective would hang.

Shapes: P prompts, G completions a prompt, L longest prompt, T completion tokens, V vocabulary,
D width, H query heads, K key/value heads, R = H/K queries that share a key head, d head width.
"""
import hashlib
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from policy import replace_vision_forwards, rotate
from qwen_vl import Completion, Prompt, SpecialIds


# §1 ───────────────────────────────────────── noise ──────────────────────────────────────────
def keyed_uniforms(seed: int, step: int, sample_id: str, group: int, length: int) -> torch.Tensor:
    """Uniforms in [0, 1) for the G completions of one sample: [G, T] float64.

    A pure function: a rollout is the same on any rank, in any batch, after a resume.
    """
    sample_key = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")
    rows = [np.random.default_rng([seed, step, sample_key, g]).random(length) for g in range(group)]
    return torch.from_numpy(np.stack(rows))


def inverse_cdf(probabilities_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first id whose cumulative probability exceeds u: ids [B], never one of probability 0."""
    cdf_BV = probabilities_BV.double().cumsum(-1)
    threshold_B1 = uniform_B[:, None] * cdf_BV[:, -1:]  # the sum is 1 only up to rounding
    id_B = torch.searchsorted(cdf_BV, threshold_B1, right=True).squeeze(1)
    id_B = id_B.clamp(max=cdf_BV.shape[1] - 1)
    chosen_B = probabilities_BV.gather(1, id_B[:, None]).squeeze(1)
    return torch.where(chosen_B > 0, id_B, probabilities_BV.argmax(-1))  # a parallel sum may wobble


def product_fp32(a, b) -> torch.Tensor:
    """a @ b with its sums kept in fp32: attention's scores must not be rounded to bf16."""
    if not a.is_cuda or a.dtype == torch.float32:
        return (a @ b).float()
    out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return out.unflatten(0, a.shape[:-2])


class Interrupted(Exception):
    """A rollout was abandoned because the run shall end."""


# §2 ──────────────────────────────────────── weights ─────────────────────────────────────────
LAYER = {  # a decoding step is bound by reading weights, so fewer, larger reads: some are stacked
    "norm_in": "input_layernorm.weight",
    "qkv": "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
    "qkv_bias": "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
    "out": "self_attn.o_proj.weight", "norm_mlp": "post_attention_layernorm.weight",
    "gate_up": "mlp.gate_proj.weight mlp.up_proj.weight", "down": "mlp.down_proj.weight"}


class Sampler:
    """Owns the weight copy; `refresh` fills it, `generate` samples from it.

    model: a Qwen2.5-VL whose shapes count; kv_gb: GiB for keys and values; graphs: shapes padded to
    buckets, on CUDA replayed as captured graphs; keep_features: leave images' features in prompts
    (frozen tower). `interrupted()` is asked every round; True abandons the rollout.
    """

    def __init__(self, model, special: SpecialIds, *, device="cpu", dtype=torch.float32, kv_gb=8.0,
                 graphs=False, keep_features=False):
        self.special, self.device, self.dtype = special, torch.device(device), dtype
        self.graphs, self.keep_features, self.interrupted = graphs, keep_features, lambda: False
        self.stages, self.pool = {}, torch.empty(0, device=device, dtype=dtype)
        self.graph_pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.banned_V, self.kv_bytes = special.banned_V.to(device), kv_gb * 2**30
        self.stops = torch.tensor(special.stops, device=device)
        text = model.config.text_config
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_width, self.eps = text.hidden_size // self.heads, text.rms_norm_eps
        decoder, vision = model.model.language_model, model.model.visual
        self.rotary = type(decoder.rotary_emb)(text).to(device)
        self.vision = type(vision)(vision.config).to(device, dtype).eval().requires_grad_(False)
        replace_vision_forwards(self.vision)
        # Each of the policy's parameters and its place in this copy.
        self.targets = dict(self.vision.named_parameters("model.model.visual"))
        weights = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        prefix = "model.model.language_model."
        self.layers = [
            SimpleNamespace(**{short: self.allocate(weights, f"{prefix}layers.{i}.", names)
                               for short, names in LAYER.items()})
            for i in range(len(decoder.layers))]
        self.norm = self.allocate(weights, prefix, "norm.weight")
        self.embed = self.head = self.allocate(weights, prefix, "embed_tokens.weight")
        if "model.lm_head.weight" in weights:  # not tied
            self.head = self.allocate(weights, "model.", "lm_head.weight")

    def allocate(self, weights: dict, prefix: str, names: str) -> torch.Tensor:
        """One tensor for several parameters stacked along their first dimension."""
        names = [prefix + name for name in names.split()]
        rows = [len(weights[name]) for name in names]
        shape = (sum(rows), *weights[names[0]].shape[1:])
        fused = torch.empty(shape, device=self.device, dtype=self.dtype)
        self.targets.update(zip(names, fused.split(rows)))
        return fused

    @torch.no_grad()
    def refresh(self, policy) -> None:
        """Copy the policy's weights here. Gathers shards, so all ranks must call it together."""
        for name, parameter in policy.named_parameters():
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            self.targets[name].copy_(full)

    # §3 ────────────────────────────────────── prefill ───────────────────────────────────────
    def run_layers(self, x, cos, sin, attend) -> torch.Tensor:
        """All decoder layers on x [..., D]; `attend(layer, q, k, v)` sees [..., heads, d]."""
        for index, w in enumerate(self.layers):
            qkv = F.linear(self.rms(x, w.norm_in), w.qkv, w.qkv_bias)
            qkv = qkv.unflatten(-1, (-1, self.head_width))
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
            out = attend(index, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + F.linear(out.flatten(-2), w.out)
            gate, up = F.linear(self.rms(x, w.norm_mlp), w.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, w.down)
        return x

    def rms(self, x, weight):
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * (x32 * scale).to(x.dtype)

    def prefill(self, prompts: list[Prompt], prompt_cache) -> torch.Tensor:
        """Vision tower and decoder once per prompt, right-padded to the longest.

        Fills `prompt_cache` [layers, 2, P, K, ≥ L, d] and returns the last hidden state of each
        prompt [P, D]. Padding lies behind: causal attention never sees it, decoding masks it.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        ids_PL = torch.full((len(prompts), longest), self.special.pad)
        positions_3PL = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        for p, prompt in enumerate(prompts):
            ids_PL[p, : len(prompt.ids)] = torch.tensor(prompt.ids)
            positions_3PL[:, p, : len(prompt.ids)] = prompt.positions_3L
        x_PLD = F.embedding(ids_PL.to(self.device), self.embed)
        slots = [p * longest + s for p, prompt in enumerate(prompts) for s in prompt.image_slots]
        if slots:
            features_ID = self.image_features([p for p in prompts if p.pixels_ND is not None])
            x_PLD.view(-1, x_PLD.shape[-1])[torch.tensor(slots, device=self.device)] = features_ID
        cos, sin = (t[:, :, None] for t in self.rotary(x_PLD, positions_3PL.to(self.device)))

        def attend(layer, q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            prompt_cache[layer, 0, :, :, :longest], prompt_cache[layer, 1, :, :, :longest] = k, v
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)

        x_PLD = self.run_layers(x_PLD, cos, sin, attend)
        last_P = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=self.device)
        return x_PLD[torch.arange(len(prompts), device=self.device), last_P]

    def image_features(self, prompts: list[Prompt]) -> torch.Tensor:
        """Merged vision features of all images in order, [image tokens, D]."""
        pixels_ND = torch.cat([prompt.pixels_ND for prompt in prompts]).to(self.device, self.dtype)
        grids_I3 = torch.tensor([grid for prompt in prompts for grid in prompt.grids])
        features_ID = self.vision(pixels_ND, grid_thw=grids_I3.to(self.device)).pooler_output
        features_ID = features_ID.to(self.dtype)
        parts = features_ID.split([len(prompt.image_slots) for prompt in prompts])
        for prompt, part_ID in zip(prompts, parts):
            prompt.features_ID = part_ID if self.keep_features else None
        return features_ID

    # §4 ─────────────────────────────────────── decode ───────────────────────────────────────
    def decode(self, wave: SimpleNamespace, room: int) -> torch.Tensor:
        """One token of every row through the decoder; its key and value join the cache.

        Attention of a row runs over [its group's prompt | its own tokens]: one softmax over both,
        the prompt's keys read once a group, not once a row. All that changes from round to round
        lies in `wave`'s tensors (`place_1`: how many own tokens are cached); `room` places of the
        own cache are read, those past `place_1` masked. Returns hidden states [P, G, D].
        """
        x_PGD = F.embedding(wave.ids_PG, self.embed)
        position_3P1 = (wave.next_P + wave.place_1).expand(3, -1)[:, :, None]
        cos, sin = (c[:, :, None] for c in self.rotary(x_PGD, position_3P1))
        later_T = torch.arange(room, device=self.device) > wave.place_1
        later_T = torch.zeros_like(later_T, dtype=torch.float32).masked_fill(later_T, -math.inf)

        def attend(layer, q, k, v):  # q [P, G, H, d]; k, v [P, G, K, d]
            for cached_PKGTd, new_PGKd in zip(wave.own[layer], (k, v)):
                cached_PKGTd.index_copy_(3, wave.place_1, new_PGKd.transpose(1, 2)[:, :, :, None])
            keys_PKTd, values_PKTd = (cached[:, :, :, :room] for cached in wave.own[layer])
            keys_PKLd, values_PKLd = wave.prompt[layer]
            q_PKGRd = q.unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
            to_prompt = product_fp32(q_PKGRd.flatten(2, 3), keys_PKLd.mT) + wave.padding_P11L
            to_own = (product_fp32(q_PKGRd, keys_PKTd.mT) + later_T).flatten(2, 3)
            scores = torch.cat([to_prompt, to_own], dim=-1)  # [P, K, G·R, L + room]
            weights = (scores * self.head_width**-0.5).softmax(-1).to(q.dtype)
            weights_prompt, weights_own = weights.split([keys_PKLd.shape[2], room], dim=-1)
            out = (weights_prompt @ values_PKLd).view_as(q_PKGRd)
            out = out + weights_own.unflatten(2, q_PKGRd.shape[2:4]) @ values_PKTd
            return out.transpose(1, 2).flatten(2, 3)

        return self.run_layers(x_PGD, cos, sin, attend)

    def next_hidden(self, wave: SimpleNamespace, t: int) -> torch.Tensor:
        """`decode` at place t; on CUDA a graph captured once a shape: one launch, not hundreds."""
        wave.place_1.fill_(t)
        if not self.graphs:
            return self.decode(wave, t + 1)
        bucket = max(128, (1 << t.bit_length()) // 4)  # few shapes, and few places read in vain
        room = min(-(-(t + 1) // bucket) * bucket, wave.shape[3])
        if self.device.type != "cuda":
            return self.decode(wave, room)
        if room not in wave.captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate what they need on a first call
                self.decode(wave, room)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_pool):
                wave.captured[room] = graph, self.decode(wave, room)
        graph, hidden_PGD = wave.captured[room]
        graph.replay()
        return hidden_PGD

    def stage(self, prompts: int, group: int, width: int, length: int) -> SimpleNamespace:
        """The tensors of a wave of this shape, keys and values as views of one pool.

        Equal shapes lie at equal addresses: graphs need that. Zeros first, as 0 · NaN is NaN.
        """
        if (prompts, group, width, length) in self.stages:
            return self.stages[prompts, group, width, length]
        prompt_shape = (len(self.layers), 2, prompts, self.kv_heads, width, self.head_width)
        own_shape = (len(self.layers), 2, prompts, self.kv_heads, group, length, self.head_width)
        sizes = [math.prod(prompt_shape), math.prod(own_shape)]
        if sum(sizes) > len(self.pool):
            self.stages.clear()  # their graphs know the old addresses only
            self.pool = torch.zeros(sum(sizes), device=self.device, dtype=self.dtype)
        prompt, own = self.pool[: sum(sizes)].split(sizes)
        ids_PG = torch.zeros(prompts, group, dtype=torch.long, device=self.device)
        stage = SimpleNamespace(
            shape=(prompts, group, width, length), captured={}, prompt=prompt.view(prompt_shape),
            own=own.view(own_shape), ids_PG=ids_PG, rows_PG=ids_PG.clone(), alive_PG=ids_PG.bool(),
            next_P=ids_PG[:, 0].clone(), place_1=ids_PG[0, :1].clone(),
            padding_P11L=torch.zeros(prompts, 1, 1, width, device=self.device))
        if self.graphs:
            self.stages[stage.shape] = stage
        return stage

    def start_wave(self, prompts: list[Prompt], group: int, length: int) -> SimpleNamespace:
        """Prefill, and room for `length` tokens of each of the P·G rows."""
        lengths_P = torch.tensor([len(prompt.ids) for prompt in prompts], device=self.device)
        bucket = 128 if self.graphs else 1
        width = -(-max(len(prompt.ids) for prompt in prompts) // bucket) * bucket
        wave = self.stage(len(prompts), group, width, length)
        wave.hidden_PGD = self.prefill(prompts, wave.prompt)[:, None].expand(-1, group, -1)
        padding_PL = torch.arange(width, device=self.device) >= lengths_P[:, None]
        wave.padding_P11L.zero_().masked_fill_(padding_PL[:, None, None], -math.inf)
        wave.next_P.copy_(torch.tensor([prompt.next_position for prompt in prompts]))
        wave.rows_PG.copy_(torch.arange(len(prompts) * group).view(-1, group))
        wave.alive_PG.fill_(True)
        return wave

    def compact(self, wave: SimpleNamespace, t: int) -> SimpleNamespace:
        """The wave after t tokens without finished groups, in the fewest columns that do."""
        living_P = wave.alive_PG.sum(1)
        keep_P = living_P.nonzero().squeeze(1)
        keep_PG = wave.alive_PG[keep_P].int().argsort(dim=1, descending=True, stable=True)
        pick = keep_P[:, None], keep_PG[:, : int(living_P.max())]
        # Read all of the old wave before writing: the smaller one lies in the same pool.
        kept = {name: getattr(wave, name)[keep_P] for name in ("next_P", "padding_P11L")}
        kept |= {name: getattr(wave, name)[pick] for name in ("alive_PG", "rows_PG", "ids_PG")}
        prompt = wave.prompt[:, :, keep_P]
        own = wave.own[..., :t, :].transpose(3, 4)[:, :, pick[0], pick[1]]  # […, P, G, K, t, d]
        smaller = self.stage(*pick[1].shape, *wave.shape[2:])
        for name, tensor in kept.items():
            getattr(smaller, name).copy_(tensor)
        smaller.prompt.copy_(prompt)
        smaller.own[..., :t, :] = own.transpose(3, 4)
        return smaller

    # §5 ─────────────────────────────────────── sample ───────────────────────────────────────
    def choose(self, hidden_PGD, uniform_PG, temperature: float, seen_PGV=None, penalty=1.0):
        """Each row's token and log-probability, from the distribution that training scores.

        `penalty` (evaluation only) makes ids in `seen_PGV`, of prompt and answer, less likely.
        """
        logits_PGV = F.linear(self.rms(hidden_PGD, self.norm), self.head).float() / temperature
        if seen_PGV is not None:  # as in Hugging Face's and vLLM's repetition_penalty
            factor = torch.where(logits_PGV > 0, 1 / penalty, penalty)
            logits_PGV = torch.where(seen_PGV, logits_PGV * factor, logits_PGV)
        logp_PGV = logits_PGV.masked_fill(self.banned_V, -math.inf).log_softmax(-1)
        if uniform_PG is None:
            ids_PG = logp_PGV.argmax(-1)
        else:
            ids_B = inverse_cdf(logp_PGV.flatten(0, 1).exp(), uniform_PG.flatten())
            ids_PG = ids_B.view(uniform_PG.shape)
        return ids_PG, logp_PGV.gather(-1, ids_PG[..., None]).squeeze(-1)

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], noise, max_tokens: int, temperature: float = 1.0,
                 repetition_penalty: float = 1.0):
        """A list of G Completions for each prompt.

        noise: [G, ≥ max_tokens] a prompt, from `keyed_uniforms`; None decodes greedily, G = 1.
        Prompts run in waves that fit the key/value budget.
        """
        group, how, out = len(noise[0]) if noise else 1, (temperature, repetition_penalty), []
        per_token = 2 * len(self.layers) * self.kv_heads * self.head_width * self.dtype.itemsize
        row = max((len(prompt.ids) for prompt in prompts), default=0) + group * max_tokens
        most = max(1, int(self.kv_bytes // (row * per_token)))
        for first in range(0, len(prompts), most):
            wave, end = prompts[first : first + most], first + most
            uniform_BT = torch.cat(noise[first:end]).to(self.device) if noise else None
            rows = self.run_wave(wave, uniform_BT, group, max_tokens, *how)
            out += [rows[i : i + group] for i in range(0, len(rows), group)]
        return out

    def run_wave(self, prompts, uniform_BT, group, max_tokens, temperature, penalty):
        """Rounds of one token a row, until all rows have stopped: their Completions."""
        wave = self.start_wave(prompts, group, max_tokens)
        rows = len(prompts) * group
        tokens_BT = torch.full((rows, max_tokens), self.special.pad, device=self.device)
        logp_BT = torch.zeros(rows, max_tokens, device=self.device)
        length_B = torch.full((rows,), max_tokens, device=self.device)
        seen_BV = None
        if penalty != 1:
            seen_BV = torch.zeros_like(self.banned_V).repeat(rows, 1)
            for row in range(rows):
                seen_BV[row, prompts[row // group].ids] = True
        hidden_PGD = wave.hidden_PGD
        for t in range(max_tokens):
            at = wave.rows_PG
            uniform_PG = None if uniform_BT is None else uniform_BT[at, t]
            seen_PGV = None if seen_BV is None else seen_BV[at]
            ids_PG, logp_PG = self.choose(hidden_PGD, uniform_PG, temperature, seen_PGV, penalty)
            tokens_BT[at, t] = ids_PG.where(wave.alive_PG, self.special.pad)
            logp_BT[at, t] = logp_PG.where(wave.alive_PG, 0.0)
            stopped_PG = wave.alive_PG & torch.isin(ids_PG, self.stops)
            length_B[at] = torch.where(stopped_PG, t + 1, length_B[at])
            wave.alive_PG &= ~stopped_PG
            living = wave.alive_PG.sum(1).tolist()  # of each group; the one wait for the device
            if self.interrupted():
                raise Interrupted
            if not any(living) or t + 1 == max_tokens:
                break
            wave.ids_PG.copy_(ids_PG)
            if seen_BV is not None:
                seen_BV[at, ids_PG] = True
            fewest = sum(count > 0 for count in living) * max(living)  # places after compaction
            if 2 * fewest <= wave.alive_PG.numel():
                wave = self.compact(wave, t)
            hidden_PGD = self.next_hidden(wave, t)
        results = zip(tokens_BT.tolist(), logp_BT.tolist(), length_B.tolist())
        return [Completion(tokens[:n], logps[:n], tokens[n - 1] not in self.special.stops)
                for tokens, logps, n in results]
