"""Group sampling: G completions a prompt, the prompt computed once.

Read in this order:
  §1 noise      keyed uniforms: a rollout depends on (seed, step, sample, completion, token) alone
  §2 weights    a plain copy of the policy in compute dtype, allocated once, refreshed each step
  §3 prefill    vision tower and prompt, once per prompt → the prompt's keys and values
  §4 decode     one token a row and round; all rows of a group read the same prompt keys
  §5 sample     temperature, banned ids, inverse CDF, stop ids; finished rows make room
  §6 run folder options (config.json), checkpoints, the model in Hugging Face's format

Decoding issues no collectives: ranks finish at different lengths, and a collective would hang.

Shapes: P prompts, G completions a prompt, L longest prompt, T completion tokens, V vocabulary,
D width, H query heads, K key/value heads, R = H/K queries that share a key head, d head width.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import tyro
from torch.distributed.checkpoint import state_dict as dist_state

from qwen_vl import Prompt, SpecialIds, rotate, vision_attention


# §1 ───────────────────────────────────────── noise ──────────────────────────────────────────
def keyed_uniforms(seed: int, step: int, sample_id: str, group: int, length: int) -> torch.Tensor:
    """Uniforms in [0, 1) for the G completions of one sample. Returns [G, T] float64.

    A pure function of its arguments: a rollout is the same on any rank, in any batch, after a
    resume.
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


@dataclass
class Completion:
    """One rollout: what was sampled, and what it earned."""

    tokens: list[int]  # with the stop token, unless truncated
    logps: list[float] = field(default_factory=list)  # of each token, as it was sampled
    truncated: bool = False  # cut at the length limit
    text: str = ""
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Group:
    """A prompt and its completions; `row` is the first one's row in the padded [B, T] batch."""

    prompt: Prompt
    completions: list[Completion]
    row: int = 0
    sample: Any = None  # the data.Sample behind the prompt
    draw: int = 0  # its place in the run's global order

    @property
    def rewards(self) -> list[float]:
        return [completion.reward for completion in self.completions]


# §2 ──────────────────────────────────────── weights ─────────────────────────────────────────
class Sampler:
    """Owns the weight copy; `refresh` fills it, `generate` samples from it.

    model: a Hugging Face Qwen2.5-VL whose shapes count; device, dtype: where and how to sample;
    kv_gb: memory for keys and values, GiB.
    """

    def __init__(self, model, special: SpecialIds, *, device="cpu", dtype=torch.float32, kv_gb=8.0):
        self.special, self.device, self.dtype = special, torch.device(device), dtype
        self.banned_V, self.kv_bytes = special.banned_V.to(device), kv_gb * 2**30
        self.stops = torch.tensor(special.stops, device=device)
        text = model.config.text_config
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.eps = text.rms_norm_eps
        decoder, vision = model.model.language_model, model.model.visual
        self.rotary = type(decoder.rotary_emb)(text).to(device)
        self.vision = type(vision)(vision.config).to(device, dtype).eval().requires_grad_(False)
        for block in self.vision.blocks:
            block.attn.forward = MethodType(vision_attention, block.attn)
        # `targets` maps each of the policy's parameters to its place here. Query, key and value lie
        # in one matrix, gate and up in another: a decoding step is bound by reading weights, so
        # fewer, larger reads.
        vision_weights = self.vision.named_parameters()
        self.targets = {f"model.model.visual.{n}": p.data for n, p in vision_weights}
        self.layers = [self._allocate_layer(i, layer) for i, layer in enumerate(decoder.layers)]
        prefix, embedding = "model.model.language_model.", decoder.embed_tokens.weight
        self.norm = self._allocate(prefix + "norm.weight", [decoder.norm.weight])
        self.embed = self.head = self._allocate(prefix + "embed_tokens.weight", [embedding])
        if model.lm_head.weight is not embedding:
            self.head = self._allocate("model.lm_head.weight", [model.lm_head.weight])

    def _allocate(self, names, parameters) -> torch.Tensor:
        """One tensor for several parameters stacked along their first dimension."""
        names = [names] if isinstance(names, str) else names
        rows = [parameter.shape[0] for parameter in parameters]
        shape = (sum(rows), *parameters[0].shape[1:])
        fused = torch.empty(shape, device=self.device, dtype=self.dtype)
        self.targets.update(zip(names, fused.split(rows)))
        return fused

    def _allocate_layer(self, index: int, layer) -> SimpleNamespace:
        prefix = f"model.model.language_model.layers.{index}."
        named = dict(layer.named_parameters())

        def fuse(*names):
            return self._allocate([prefix + n for n in names], [named[n] for n in names])

        return SimpleNamespace(
            norm_in=fuse("input_layernorm.weight"),
            qkv=fuse(*(f"self_attn.{x}_proj.weight" for x in "qkv")),
            qkv_bias=fuse(*(f"self_attn.{x}_proj.bias" for x in "qkv")),
            out=fuse("self_attn.o_proj.weight"),
            norm_mlp=fuse("post_attention_layernorm.weight"),
            gate_up=fuse("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            down=fuse("mlp.down_proj.weight"),
        )

    @torch.no_grad()
    def refresh(self, policy) -> None:
        """Copy the policy's weights here. Gathers shards, so all ranks must call it together."""
        parameters = dict(policy.named_parameters())
        if odd := parameters.keys() ^ self.targets.keys():
            raise ValueError(f"policy and sampler differ in {sorted(odd)[:3]}: two architectures?")
        for name, parameter in parameters.items():
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            self.targets[name].copy_(full)

    # §3 ────────────────────────────────────── prefill ───────────────────────────────────────
    def run_layers(self, x, cos, sin, attend) -> torch.Tensor:
        """All decoder layers on x [..., D], without the last norm.

        `attend(layer, q, k, v)` sees [..., heads, d].
        """
        for index, w in enumerate(self.layers):
            qkv = F.linear(self.rms(x, w.norm_in), w.qkv, w.qkv_bias)
            qkv = qkv.unflatten(-1, (-1, cos.shape[-1]))
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

    def prefill(self, prompts: list[Prompt]):
        """Vision tower and decoder once per prompt, right-padded to the longest.

        Returns the last hidden state of each prompt [P, D] and, a layer, keys and values
        [P, K, L, d]. Padding lies behind, so causal attention never sees it; decoding masks it.
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
        cache = []

        def attend(_, q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            cache.append((k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)

        x_PLD = self.run_layers(x_PLD, cos, sin, attend)
        last_P = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=self.device)
        return x_PLD[torch.arange(len(prompts), device=self.device), last_P], cache

    def image_features(self, prompts: list[Prompt]) -> torch.Tensor:
        """Merged vision features of all images in order, [image tokens, D]."""
        pixels_ND = torch.cat([prompt.pixels_ND for prompt in prompts]).to(self.device, self.dtype)
        grids_I3 = torch.tensor([grid for prompt in prompts for grid in prompt.grids])
        features_ID = self.vision(pixels_ND, grid_thw=grids_I3.to(self.device)).pooler_output
        return features_ID.to(self.dtype)

    # §4 ─────────────────────────────────────── decode ───────────────────────────────────────
    def decode(self, ids_PG, position_P, wave: SimpleNamespace, t: int) -> torch.Tensor:
        """One token of every row through the decoder; its key and value join the cache at place t.

        Attention of a row runs over [its group's prompt | its own tokens]: one softmax over both,
        the prompt's keys read once a group, not once a row. Returns hidden states [P, G, D].
        """
        x_PGD = F.embedding(ids_PG, self.embed)
        cos, sin = (c[:, :, None] for c in self.rotary(x_PGD, position_P.expand(3, -1)[:, :, None]))
        repeats = self.heads // self.kv_heads

        def attend(layer, q, k, v):  # q [P, G, H, d]; k, v [P, G, K, d]
            keys_PKGTd, values_PKGTd = wave.own[layer]
            keys_PKGTd[:, :, :, t], values_PKGTd[:, :, :, t] = k.transpose(1, 2), v.transpose(1, 2)
            keys_PKGTd, values_PKGTd = keys_PKGTd[..., : t + 1, :], values_PKGTd[..., : t + 1, :]
            keys_PKLd, values_PKLd = wave.prompt[layer]
            q_PKGRd = q.unflatten(2, (self.kv_heads, repeats)).transpose(1, 2)
            to_prompt = q_PKGRd.flatten(2, 3) @ keys_PKLd.mT + wave.padding_P11L  # [P, K, G·R, L]
            to_own = (q_PKGRd @ keys_PKGTd.mT).flatten(2, 3)  # [P, K, G·R, t+1]
            scores = torch.cat([to_prompt, to_own], dim=-1).float() * q.shape[-1] ** -0.5
            weights = scores.softmax(-1).to(q.dtype)
            weights_prompt, weights_own = weights.split([keys_PKLd.shape[2], t + 1], dim=-1)
            out = (weights_prompt @ values_PKLd).view_as(q_PKGRd)
            out = out + weights_own.view(*q_PKGRd.shape[:-1], t + 1) @ values_PKGTd
            return out.transpose(1, 2).flatten(2, 3)

        return self.run_layers(x_PGD, cos, sin, attend)

    def start_wave(self, prompts: list[Prompt], group: int, length: int) -> SimpleNamespace:
        """Prefill, and room for `length` tokens of each of the P·G rows."""
        hidden_PD, cache = self.prefill(prompts)
        lengths_P = torch.tensor([len(prompt.ids) for prompt in prompts], device=self.device)
        place_L = torch.arange(cache[0][0].shape[2], device=self.device)
        padding_PL = torch.zeros(len(prompts), len(place_L), device=self.device, dtype=self.dtype)
        padding_PL.masked_fill_(place_L >= lengths_P[:, None], float("-inf"))
        shape = (len(prompts), self.kv_heads, group, length, cache[0][0].shape[-1])
        how = {"device": self.device, "dtype": self.dtype}
        empty = [[torch.empty(shape, **how) for _ in "kv"] for _ in cache]
        rows_PG = torch.arange(len(prompts) * group, device=self.device).view(len(prompts), group)
        next_P = torch.tensor([prompt.next_position for prompt in prompts], device=self.device)
        return SimpleNamespace(
            hidden_PGD=hidden_PD[:, None].expand(-1, group, -1), prompt=cache, own=empty,
            padding_P11L=padding_PL[:, None, None], next_P=next_P, rows_PG=rows_PG,
            alive_PG=torch.ones_like(rows_PG).bool(),
        )

    @staticmethod
    def compact(wave: SimpleNamespace) -> None:
        """Drop groups without a living row, then as many columns of G as the fullest can spare."""
        keep_P = wave.alive_PG.any(1).nonzero().squeeze(1)
        alive_PG = wave.alive_PG[keep_P]
        columns_PG = alive_PG.int().argsort(dim=1, descending=True, stable=True)
        columns_PG = columns_PG[:, : int(alive_PG.sum(1).max())]
        pick = torch.arange(len(keep_P), device=keep_P.device)[:, None]

        def keep(own_PKGTd):
            return own_PKGTd[keep_P].transpose(1, 2)[pick, columns_PG].transpose(1, 2)

        wave.alive_PG = alive_PG[pick, columns_PG]
        wave.rows_PG = wave.rows_PG[keep_P][pick, columns_PG]
        wave.ids_PG = wave.ids_PG[keep_P][pick, columns_PG]
        wave.padding_P11L, wave.next_P = wave.padding_P11L[keep_P], wave.next_P[keep_P]
        wave.prompt = [[t[keep_P] for t in pair] for pair in wave.prompt]
        wave.own = [[keep(t) for t in pair] for pair in wave.own]

    # §5 ─────────────────────────────────────── sample ───────────────────────────────────────
    def choose(self, hidden_PGD, uniform_PG, temperature: float):
        """Each row's token and log-probability, from the distribution that training scores."""
        hidden_BD = self.rms(hidden_PGD, self.norm).flatten(0, 1)
        logits_BV = F.linear(hidden_BD, self.head).float() / temperature
        logp_BV = logits_BV.masked_fill(self.banned_V, float("-inf")).log_softmax(-1)
        if uniform_PG is None:
            ids_B = logp_BV.argmax(-1)
        else:
            ids_B = inverse_cdf(logp_BV.exp(), uniform_PG.flatten())
        shape, logp_B1 = hidden_PGD.shape[:2], logp_BV.gather(1, ids_B[:, None])
        return ids_B.view(shape), logp_B1.view(shape)

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], noise, max_tokens: int, temperature: float = 1.0):
        """A list of G Completions for each prompt.

        noise: [G, ≥ max_tokens] a prompt, from `keyed_uniforms`; None decodes greedily, G = 1.
        Prompts run in waves that fit the key/value budget.
        """
        group = len(noise[0]) if noise else 1
        out = []
        for first, last in self.waves(prompts, group, max_tokens):
            uniform_PGT = None if noise is None else torch.stack(noise[first:last]).to(self.device)
            rows = self.run_wave(prompts[first:last], uniform_PGT, group, max_tokens, temperature)
            out += [rows[i : i + group] for i in range(0, len(rows), group)]
        return out

    def waves(self, prompts, group: int, max_tokens: int) -> list[tuple[int, int]]:
        """Cut the prompts so that a wave's keys and values fit the budget (one prompt at least)."""
        per_token = 2 * len(self.layers) * self.kv_heads * self.layers[0].qkv_bias.shape[0]
        per_token = per_token // (self.heads + 2 * self.kv_heads) * self.embed.element_size()
        cuts, longest = [0], 0
        for index, prompt in enumerate(prompts):
            longest = max(longest, len(prompt.ids))
            rows = index + 1 - cuts[-1]
            if rows > 1 and rows * (longest + group * max_tokens) * per_token > self.kv_bytes:
                cuts.append(index)
                longest = len(prompt.ids)
        return list(zip(cuts, [*cuts[1:], len(prompts)])) if prompts else []

    def run_wave(self, prompts, uniform_PGT, group, max_tokens, temperature) -> list[Completion]:
        wave = self.start_wave(prompts, group, max_tokens)
        rows = len(prompts) * group
        tokens_BT = torch.full((rows, max_tokens), self.special.pad, device=self.device)
        logp_BT = torch.zeros(rows, max_tokens, device=self.device)
        length_B = torch.full((rows,), max_tokens, device=self.device)
        uniform_BT = None if uniform_PGT is None else uniform_PGT.flatten(0, 1)
        hidden_PGD, t = wave.hidden_PGD, 0
        while True:
            uniform_PG = None if uniform_BT is None else uniform_BT[wave.rows_PG, t]
            wave.ids_PG, logp_PG = self.choose(hidden_PGD, uniform_PG, temperature)
            living = wave.rows_PG[wave.alive_PG]
            tokens_BT[living, t] = wave.ids_PG[wave.alive_PG]
            logp_BT[living, t] = logp_PG[wave.alive_PG]
            stopped_PG = wave.alive_PG & torch.isin(wave.ids_PG, self.stops)
            length_B[wave.rows_PG[stopped_PG]] = t + 1
            wave.alive_PG = wave.alive_PG & ~stopped_PG
            living = int(wave.alive_PG.sum())  # the round's one wait for the device
            t += 1
            if not living or t == max_tokens:
                break
            if living <= wave.alive_PG.numel() // 2:
                self.compact(wave)
            hidden_PGD = self.decode(wave.ids_PG, wave.next_P + t - 1, wave, t - 1)
        rows = zip(tokens_BT.tolist(), logp_BT.tolist(), length_B.tolist())
        return [
            Completion(tokens[:n], logps[:n], truncated=tokens[n - 1] not in self.special.stops)
            for tokens, logps, n in rows
        ]


# §6 ───────────────────────────────────── the run folder ─────────────────────────────────────
WORLD = "synthetic:grounding?size=56x56&shapes=2&colours=3&distractors=1-2&reach=0.3-0.5"
PR1 = dict(  # what its tasks share and no default has yet  [PR1 §4.3, code]
    model="Qwen/Qwen2.5-VL-3B-Instruct", prompts=14, beta=0.04, schedule="linear", seed=42)
PRESETS = {  # of grpo_vl.py: named sets of differences from its defaults
    "tiny": dict(  # what a machine without a GPU trains in minutes; no paper's values
        model="tiny", data=(WORLD,), cold_start="runs/coldstart", max_tokens=24, prompts=32,
        steps=400, lr=1e-4, warmup=10, schedule="linear", reward_options='{"iou_power": 2}',
        eval_every=50, checkpointing=False, micro_tokens=4096,
    ),
    # steps: samples used / 14 prompts a step [PR1 T7, code]; max_tokens [PR1 code]
    "pr1-grounding": PR1 | dict(data=("refcoco-pr1:refcoco_train.json",), steps=357),
    "pr1-counting": PR1 | dict(data=("pixmo-pr1:pixmo_count_train.json",), steps=714),
    "pr1-ocr": PR1 | dict(data=("fox:page_ocr_train.json",), steps=357, max_tokens=2048),
    "pr1-detection": PR1 | dict(
        data=("coco:annotations/instances_train2017.json",), steps=7857, max_tokens=2048),
    "ovr-rl": dict(  # [OVR §3.2, §4.1]; the loss as in its base, Open-Reasoner-Zero [ORZ code]
        model="Qwen/Qwen2.5-VL-7B-Instruct", data=("ovr_rl.jsonl",), cold_start="runs/coldstart",
        prompts=512, group=16, scale="batch", loss="dapo", warmup=50, beta2=0.95, steps=900,
        max_tokens=24 * 1024, max_tokens_at=(f"300:{32 * 1024}", f"700:{48 * 1024}"), eval_every=10,
    ),
}


def check_options(config) -> None:
    """Errors: ValueError naming the option, its value, and what it may be."""
    whole = ("prompts", "group", "max_tokens", "inner_steps", "micro_tokens", "steps", "batch",
             "keep", "save_every", "eval_samples")
    for f in fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        choices = getattr(f.type, "__args__", ()) if isinstance(value, str) else (value,)
        if choices and value not in choices:
            raise ValueError(f"{flag} is {value!r}; choose from {', '.join(choices)}")
        if (f.name in whole and value < 1) or (f.name in ("temperature", "lr") and value <= 0):
            raise ValueError(f"{flag} is {value}; it must be {1 if f.name in whole else 'above 0'}")


def parse_config(config_class, arguments: list[str] | None, presets: dict, text: str):
    """Defaults < --preset < --config FILE < command line, each option's help the comment beside it.

    Without a GPU, and with none of --preset, --config and --model, the preset is "tiny".
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets)
    first.add_argument("--config", type=Path)
    chosen, rest = first.parse_known_args(arguments)
    if not (chosen.preset or chosen.config or "--model" in rest or torch.cuda.is_available()):
        chosen.preset = "tiny"
    try:
        saved = json.loads(chosen.config.read_text()) if chosen.config else {}
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        text += f"\n--preset {' | '.join(presets)}; --config FILE: a run's config.json"
        default = config_class(**(presets.get(chosen.preset, {}) | saved))
        return tyro.cli(config_class, args=rest, default=default, description=text)
    except (OSError, ValueError, TypeError) as error:
        first.error(str(error))


def memory_plan(config, model) -> str:
    """What each GPU of --plan would hold, an estimate; the model's weights may be anything.

    Sampling's keys and values are gone when training's activations come: the larger one counts.
    """
    gpus, gib = (int(part) for part in config.plan.split("x"))
    text, decoder = model.config.text_config, model.model.language_model
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in
            (("all", model), ("layer", decoder.layers[0]), ("vision", model.model.visual))}
    trained = size["all"] - size["vision"] * config.freeze_vision
    shards = gpus if not config.offload else math.inf  # offloaded: in host memory
    per_token = 4 * text.num_hidden_layers * text.num_key_value_heads * (
        text.hidden_size // text.num_attention_heads)  # bf16 key and value
    longest = max([config.max_tokens, *(int(at.split(":")[1]) for at in config.max_tokens_at)])
    need = -(-config.prompts // gpus) * (config.max_prompt + config.group * longest) * per_token
    one_layer = 2 * config.micro_tokens * (8 * text.hidden_size + 4 * text.intermediate_size)
    activations = one_layer * (1 if config.checkpointing else text.num_hidden_layers)
    activations += 2 * config.micro_tokens * text.hidden_size * text.num_hidden_layers  # inputs
    root = size["all"] - size["vision"] - text.num_hidden_layers * size["layer"]
    held = {
        "weights, fp32, sharded": 4 * size["all"] / shards,
        "gradients, fp32, sharded": 4 * trained / shards,
        "AdamW, fp32, sharded": 8 * trained / shards,
        "reference, fp32, sharded": 4 * size["all"] / shards if config.beta else 0,
        "gathered units, bf16": 2 * (root + 2 * size["layer"] + size["vision"]),
        "sampling copy, bf16": 2 * size["all"],
        "keys and values (sampling)": min(need, config.kv_gb * 2**30),
        "activations (training)": activations,
        "logits of a chunk (training)": 3 * 1024 * 4 * text.vocab_size,
    }
    *still, keys, active, logits = held.values()
    peak = (sum(still) + max(keys, active + logits)) / 2**30
    lines = [f"{name:30}{count / 2**30:8.2f} GiB" for name, count in held.items()]
    verdict = "fits" if peak < 0.9 * gib else (
        "does not fit: lower --micro-tokens, --kv-gb or --max-pixels, add --offload or GPUs")
    total = f"{'peak, of ' + str(gib) + ' GiB':30}{peak:8.2f} GiB: {verdict}"
    return "\n".join([f"{size['all']:,} parameters on {gpus} GPUs", *lines, total])


def export(folder: Path, policy, tokenizer, source: str) -> None:
    """Write the sharded policy as a Hugging Face checkpoint; every rank calls it, rank 0 writes.

    bf16 on GPUs, fp32 on CPU. The image processor's settings come along from `source`, a hub id or
    directory, so that `from_pretrained` and vLLM load the folder. One rename makes it appear.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    options = dist_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = dist_state.get_model_state_dict(policy, options=options)
    if dist.get_rank() == 0:
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        dtype = torch.bfloat16 if policy.banned_V.is_cuda else torch.float32
        state = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in full.items()}
        policy.model.save_pretrained(partial_folder, state_dict=state)
        if source in ("tiny", "tiny-untied"):
            processor = Qwen2VLImageProcessorPil()
        else:
            processor = Qwen2VLImageProcessorPil.from_pretrained(source)
        processor.save_pretrained(partial_folder)
        tokenizer.save_pretrained(partial_folder)
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
    dist.barrier()


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint-N folders, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(folder: Path, policy, optimizer, state: dict, keep: int) -> None:
    """Sharded weights and AdamW state. One rename makes it appear: it is whole or not there."""
    final = folder / f"checkpoint-{state['step']}"
    partial_folder = final.with_suffix(".partial")
    model, optim = dist_state.get_state_dict(policy, optimizer)
    if dist.get_rank() == 0:
        shutil.rmtree(partial_folder, ignore_errors=True)
    dist.barrier()
    dcp.save({"model": model, "optimizer": optim}, checkpoint_id=partial_folder)
    if dist.get_rank() == 0:
        (partial_folder / "state.json").write_text(json.dumps(state))
        shutil.rmtree(final, ignore_errors=True)
        partial_folder.rename(final)
        for old in find_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(path: Path, policy, optimizer) -> dict:
    """Restore weights and AdamW state, whatever the number of ranks that saved them."""
    model, optim = dist_state.get_state_dict(policy, optimizer)
    saved = {"model": model, "optimizer": optim}
    dcp.load(saved, checkpoint_id=path)
    dist_state.set_state_dict(
        policy, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return json.loads((path / "state.json").read_text())


def leave() -> None:
    """The end of a script: all ranks go together.

    Of many, none runs its destructors: there gloo's threads abort now and then ("terminate called
    without an active exception"), and torchrun takes the run for failed.
    """
    if dist.get_world_size() == 1:
        return dist.destroy_process_group()
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
