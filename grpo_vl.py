"""GRPO on Qwen2.5-VL, top to bottom: sample groups → reward → advantage → clipped loss → step.

  python grpo_vl.py                                  no GPU: the tiny stand-in, cold start included
  torchrun --nproc_per_node=2 grpo_vl.py             the same on two processes
  torchrun --nproc_per_node=8 grpo_vl.py             GPUs: Qwen2.5-VL-3B counts shapes in drawn scenes
  torchrun --nproc_per_node=8 grpo_vl.py --data my.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct

Papers: [PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, arXiv 2507.05255 ·
[DSM] DeepSeekMath (GRPO), arXiv 2402.03300 · [DAPO] arXiv 2503.14476 · [DRG] Dr. GRPO, arXiv 2503.20783 ·
[GSPO] arXiv 2507.18071 · [RLOO] arXiv 2402.14740.

§1 config · §2 processes and FSDP2 · §3 samples → prompts · §4 group sampling · §5 rewards → advantages
§6 token log-probs · §7 loss · §8 train_step · §9 logs, pictures, checkpoints · §10 main

Where this departs from the papers:
DEVIATION D1: OVR trains with PPO and a critic (γ = λ = 1, so A_t = R − V(s_t)); here GRPO's group mean
  stands in V's place, and no value network is trained.
DEVIATION D2: Perception-R1's grounding, counting and OCR rows come from Qwen2-VL-2B, whose boxes lie in
  0–1000; here Qwen2.5-VL answers all tasks in pixels of the resized image.

Shapes, as suffixes: P prompts, G completions a prompt, B = P·G rollouts, T completion tokens (padded),
S scored tokens of a micro-batch (packed), L packed length.
"""
import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from tqdm import tqdm

import data as data_module
import qwen_vl
import rewards
from qwen_vl import Group, Policy, Prompt, SpecialIds, scatter_BT
from sampler import Rollouts, Sampler, keyed_uniforms


# §1 ─────────────────────────────────────────── config ────────────────────────────────────────────
def option(default: Any, text: str, choices: tuple = ()):
    """A config field: its default, the sentence that --help prints, the values it may take."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every option of a run; `config.json` in the run folder replays it with --config."""

    # what is trained, on what
    preset: str = option("", "a named set of differences from these defaults (PRESETS)")
    model: str = option("Qwen/Qwen2.5-VL-3B-Instruct", "hub id, local directory, tiny or tiny-untied")
    data: list = option(["synthetic:counting?size=644x476&objects=2-10"], "FILE.jsonl[:weight] or synthetic:TASK?…")
    fields: str = option("", "names of fields in the data, e.g. question=problem,answer=solution")
    out: str = option("runs/grpo", "run folder")
    cold_start: str = option("", "cold-start folder to begin from; made by sft_coldstart.py if missing")
    system_prompt: str = option(qwen_vl.SYSTEM, "system turn [PR1 code: You are a helpful assistant.]")
    think: bool = option(False, "ask for <think>…</think><answer>…</answer> and reward it [PR1 T5: hurts perception]")
    min_pixels: int = option(56 * 56, "images are resized once to at least this area [PR1 code: 3136]")
    max_pixels: int = option(1_000_000, "and at most this one [PR1 code: 1000000]")
    max_prompt: int = option(2048, "longest prompt in tokens [PR1 code: 2048]; longer ones are an error")
    # sampling
    prompts: int = option(16, "prompts an optimizer step, all ranks together [PR1 code: 14; OVR §4.1: 512]")
    group: int = option(8, "completions a prompt, G [PR1 §4.3: 8; OVR: 16]")
    max_tokens: int = option(768, "longest completion [PR1 §4.3: 2048, code 768; OVR: 24k to 48k]")
    temperature: float = option(1.0, "of sampling and of the trained distribution [PR1 §4.3, OVR: 1.0]")
    kv_gb: float = option(8.0, "memory for keys and values while sampling, GiB a rank")
    # reward and advantage
    reward: str = option("", "path.py:function in place of rewards.score, same arguments")
    reward_options: dict = option({}, "JSON object passed to the reward, e.g. {\"iou_power\": 2}")
    overlong: str = option("zero", "reward of a truncated completion [OVR: 0]", ("keep", "zero", "mask", "soft"))
    overlong_buffer: int = option(128, "soft: the penalty grows over the last so many tokens [DAPO §3.4]")
    scale: str = option("group", "A = (r − mean) / std of what [DSM: group; OVR: batch; DRG: none]",
                        ("group", "batch", "none"))
    std: str = option("sample", "divide squares by G−1 or by G [PR1 code: sample]", ("sample", "population"))
    baseline: str = option("mean", "of the group, or of the others [RLOO: leave_one_out]", ("mean", "leave_one_out"))
    dynamic_sampling: int = option(0, "replace groups without reward variance, at most so many rounds [DAPO §3.2]")
    # loss
    loss: str = option("grpo", "what the sum is divided by [DSM, PR1: grpo]", ("grpo", "dapo", "dr_grpo"))
    ratio: str = option("token", "importance ratio of a token or a sequence [GSPO]", ("token", "sequence"))
    clip_low: float = option(-1.0, "ε below 1; −1: 0.2 [OVR §3.2], for sequences 3e-4 [GSPO §5.1]")
    clip_high: float = option(-1.0, "ε above 1; −1: 0.2 [OVR §3.2; DAPO: 0.28], for sequences 4e-4 [GSPO §5.1]")
    beta: float = option(0.0, "KL to the initial model; 0 needs no reference [PR1 §4.3: 0.04; OVR: 0]")
    kl: str = option("k3", "estimator: k2, k3 in the loss, k1 in the reward [PR1 code: k3]", ("k1", "k2", "k3"))
    inner_steps: int = option(1, "µ optimizer steps on each batch [PR1, OVR: 1, strictly on-policy]")
    tis: float = option(0.0, "cap of the sampler-to-trainer importance weight; 0 is off")
    # optimizer
    steps: int = option(500, "optimizer batches [PR1 code: 357 to 7900; OVR: 900]")
    lr: float = option(1e-6, "AdamW learning rate [PR1 §4.3, OVR: 1e-6]")
    schedule: str = option("constant", "after warm-up [OVR: constant; PR1 code: linear]", ("constant", "linear", "cosine"))
    warmup: int = option(0, "steps of linear warm-up [PR1: 0; OVR: 50]")
    beta2: float = option(0.999, "AdamW β₂ [OVR: 0.95]")
    weight_decay: float = option(0.0, "AdamW weight decay [PR1, OVR: 0]")
    max_norm: float = option(1.0, "gradient norm is clipped to this [PR1 code: 1.0]")
    freeze_vision: bool = option(False, "do not train vision tower and merger [PR1: trains all]")
    # machine
    micro_tokens: int = option(16384, "tokens of a packed micro-batch")
    checkpointing: bool = option(True, "compute activations again in the backward pass")
    offload: bool = option(False, "keep sharded weights and optimizer in host memory")
    timeout: int = option(3600, "seconds a rank waits for the others; above the longest rollout")
    # running
    seed: int = option(0, "of data order, sampling noise and tiny weights [PR1 code: 42]")
    save_every: int = option(100, "steps between checkpoints [PR1 code: 100]")
    keep: int = option(2, "checkpoints kept")
    resume: str = option("auto", "continue from the newest checkpoint in --out", ("auto", "never"))
    eval_every: int = option(0, "steps between evaluations on held-out samples; 0 is off [OVR: 10]")
    eval_data: list = option([], "held-out data; default: the held-out split of --data")
    eval_samples: int = option(200, "held-out samples")
    pictures_every: int = option(50, "steps between saved sheets of rollouts; 0 is off")

    def __post_init__(self):
        check_choices(self)
        at_least_one = ("prompts", "group", "max_tokens", "inner_steps", "micro_tokens", "steps")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"--{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError("--temperature must be above 0: the sampled distribution is the trained one")
        for name, token, sequence in (("clip_low", 0.2, 3e-4), ("clip_high", 0.2, 4e-4)):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, token if self.ratio == "token" else sequence)


# The demo: what a machine without a GPU trains when nothing else is asked for.
PRESETS = {
    "tiny": dict(
        model="tiny", data=["synthetic:grounding?size=84x84&objects=1-3"], cold_start="runs/coldstart",
        prompts=16, group=8, max_tokens=24, lr=2e-4, steps=300, max_pixels=84 * 84, checkpointing=False,
        save_every=100, eval_every=50, eval_samples=200, micro_tokens=4096,
    ),
}


def flag(name: str) -> str:
    return name.replace("_", "-")


def check_choices(config) -> None:
    for field in dataclasses.fields(config):
        choices, value = field.metadata["choices"], getattr(config, field.name)
        if choices and value not in choices:
            raise ValueError(f"--{flag(field.name)} is {value!r}; choose one of {', '.join(choices)}")


def parse_config(config_class, arguments: list[str], presets: dict, description: str = ""):
    """A config from defaults < preset < --config FILE.json < command line. Unknown options are errors."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="JSON of a saved run; later options override it")
    for field in dataclasses.fields(config_class):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        kinds = {
            bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs="+"), dict: dict(type=json.loads),
        }
        kind = kinds.get(type(default), dict(type=type(default), choices=field.metadata["choices"] or None))
        text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{flag(field.name)}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(arguments))
    saved = {}
    if path := given.pop("config", None):
        try:
            saved = json.loads(Path(path).read_text())
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"--config {path}: {error}")
        if unknown := saved.keys() - {field.name for field in dataclasses.fields(config_class)}:
            parser.error(f"--config {path}: unknown option {sorted(unknown)[0]!r}")
    preset = given.get("preset", saved.get("preset", ""))
    if preset and preset not in presets:
        parser.error(f"--preset {preset!r}; choose one of {', '.join(presets)}")
    try:
        return config_class(**{**presets.get(preset, {}), **saved, **given})
    except ValueError as error:
        parser.error(str(error))


# §2 ──────────────────────────────────── processes and FSDP2 ──────────────────────────────────────
@dataclass(frozen=True)
class Processes:
    """Who we are among the ranks, and where tensors live."""

    rank: int
    world: int
    device: torch.device

    def gather(self, value: Any) -> list:
        """`value` of every rank, in rank order (a small Python object)."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def maximum(self, values: list[int]) -> list[int]:
        tensor = torch.tensor(values, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()


def start_processes(timeout: int) -> Processes:
    """One process or many: torchrun's variables if set, else a world of one."""
    defaults = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = dist.HashStore() if os.environ["WORLD_SIZE"] == "1" else None
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), store=store,
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
    )
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def shard(policy: Policy, processes: Processes, *, offload: bool = False) -> Policy:
    """fully_shard by hand: vision tower, each decoder layer, and the rest (embedding, norm, lm_head).

    fp32 master weights are cut over all ranks; each unit gathers a bf16 copy (fp32 on CPU) while it
    computes. lm_head is never a unit of its own: it runs a different number of times on each rank.
    """
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    cuda = processes.device.type == "cuda"
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = dict(
        mesh=mesh, mp_policy=precision if cuda else MixedPrecisionPolicy(),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
    )
    for unit in [policy.vision, *policy.decoder.layers, policy]:
        fully_shard(unit, **options)
    return policy


def load_policy(name: str, processes: Processes, *, checkpointing=False, freeze_vision=False, offload=False, seed=0):
    """(sharded policy, tokenizer, special ids): rank 0 reads the weights and broadcasts them."""
    model, tokenizer = qwen_vl.load(name, weights=processes.rank == 0, seed=seed)
    special = SpecialIds.read(tokenizer, model.config)
    banned_V = special.banned_mask(tokenizer, model.config.text_config.vocab_size)
    policy = Policy(model, banned_V, checkpointing=checkpointing)
    policy.vision.requires_grad_(not freeze_vision)
    full = policy.state_dict() if processes.rank == 0 else {}
    shard(policy, processes, offload=offload)
    policy.to(processes.device) if not offload else policy.banned_V.to(processes.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, full, options=options)
    return policy, tokenizer, special


# §3 ───────────────────────────────────── samples → prompts ───────────────────────────────────────
@dataclass
class Task:
    """One sample of the step with its prompt, ready to be sampled from."""

    sample: Any  # data.Sample
    prompt: Prompt
    noise_key: str


def make_prompt(sample, tokenizer, special: SpecialIds, config) -> Prompt:
    """The paper's prompt for the sample's task, tokenised with its images. Never truncated."""
    text = rewards.prompt(sample.task, sample.question, think=config.think)
    prompt = qwen_vl.encode_chat(tokenizer, special, text, sample.images, sample.system or config.system_prompt)
    if len(prompt.ids) > config.max_prompt:
        raise ValueError(
            f"sample {sample.id}: its prompt has {len(prompt.ids)} tokens, --max-prompt is {config.max_prompt}; "
            "lower --max-pixels or raise --max-prompt"
        )
    return prompt


def draw_tasks(run: "Run", first: int, count: int, attempt: int = 0) -> list[Task]:
    """This rank's share of draws first … first+count−1: every world-th one, beginning with its rank."""
    tasks = []
    for draw in range(first + run.processes.rank, first + count, run.processes.world):
        sample = run.data[draw]
        prompt = make_prompt(sample, run.tokenizer, run.special, run.config)
        tasks.append(Task(sample, prompt, f"{sample.id}/{attempt}" if attempt else sample.id))
    return tasks


# §4 ─────────────────────────────────────── group sampling ────────────────────────────────────────
def sample_groups(run: "Run", tasks: list[Task], step: int) -> Rollouts:
    """G completions of each task, row p·G + g, with the log-probability of every sampled token."""
    config = run.config
    noise = [keyed_uniforms(config.seed, step, t.noise_key, range(config.group), config.max_tokens) for t in tasks]
    if not noise:  # a rank may have no prompt
        return Rollouts([], [], [])
    prompts = [task.prompt for task in tasks]
    return run.sampler.generate(prompts, torch.stack(noise), config.max_tokens, temperature=config.temperature)


def decode(tokenizer, special: SpecialIds, tokens: list[int]) -> str:
    """Text of a completion. Special tokens stay (boxes of Qwen2-VL are made of them), stop ids go."""
    return tokenizer.decode([token for token in tokens if token not in special.stops], skip_special_tokens=False)


# §5 ──────────────────────────────────── rewards → advantages ─────────────────────────────────────
def load_reward(spec: str):
    """The function that scores a completion: rewards.score, or `path.py:function`."""
    if not spec:
        return rewards.score
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"--reward {spec!r}: no file {path!r}; write path.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {spec!r}: {path} has no function {name!r}")
    return getattr(module, name)


def score_rollouts(run: "Run", tasks: list[Task], rollouts: Rollouts) -> tuple[torch.Tensor, list[dict]]:
    """(rewards_PG, the named parts of each of the B rewards)."""
    config, totals, parts = run.config, [], []
    options = dict(config.reward_options) | ({"think": True} if config.think else {})
    for b, (tokens, truncated) in enumerate(zip(rollouts.tokens, rollouts.truncated)):
        sample, text = tasks[b // config.group].sample, decode(run.tokenizer, run.special, tokens)
        score = run.reward(sample.task, text, sample.answer, sample.image_size, truncated=truncated, **options)
        total = score.total if isinstance(score, rewards.Score) else float(score)
        if truncated and config.overlong == "zero":
            total = 0.0
        if config.overlong == "soft":  # [DAPO Eq. 13]: 0 up to the buffer, then linearly down to −1
            total += min(0.0, (config.max_tokens - config.overlong_buffer - len(tokens)) / config.overlong_buffer)
        totals.append(total)
        parts.append(score.parts if isinstance(score, rewards.Score) else {})
    return torch.tensor(totals, dtype=torch.float32).view(-1, config.group), parts


def group_advantages(rewards_PG, *, scale="group", std="sample", baseline="mean", eps=1e-4) -> torch.Tensor:
    """How much better a completion is than its group. Returns advantages_PG, fp32.

    rewards_PG is the whole global batch (gathered before the call). A group without reward variance gets
    zeros. G = 1 is defined: no std to divide by, so mean gives 0 and leave_one_out the reward itself.
    """
    rewards_PG = rewards_PG.float()
    group = rewards_PG.shape[1]
    if baseline == "mean":  # b_i = 1/G · Σ_j r_j  [DSM §4.1.2]
        baseline_PG = rewards_PG.mean(1, keepdim=True)
    elif baseline == "leave_one_out":  # b_i = 1/(G−1) · Σ_{j≠i} r_j  [RLOO Eq. 9]
        baseline_PG = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / max(group - 1, 1)
    else:
        raise ValueError(f"baseline is {baseline!r}; choose mean or leave_one_out")
    if scale not in ("group", "batch", "none") or std not in ("sample", "population"):
        raise ValueError(f"scale={scale!r}, std={std!r}; choose group, batch or none and sample or population")
    centred_PG = rewards_PG - baseline_PG
    if scale != "none" and (group > 1 or scale == "batch"):  # A_i = (r_i − b_i) / (std(r) + ε); Dr. GRPO leaves the division out [DRG §3.2]
        dims, count = (1, group) if scale == "group" else ((0, 1), rewards_PG.numel())
        correction = 1 if std == "sample" and count > 1 else 0
        centred_PG = centred_PG / (rewards_PG.std(dims, correction=correction, keepdim=True) + eps)
    equal_P1 = (rewards_PG.amax(1) - rewards_PG.amin(1) < 1e-6)[:, None]  # float noise is no signal
    return torch.where(equal_P1 & (group > 1), 0.0, centred_PG).nan_to_num(0.0)


@dataclass
class Batch:
    """The step's groups: this rank's tasks with their rollouts, and every rank's rewards."""

    tasks: list[Task]
    rollouts: Rollouts
    parts: list[dict]  # named reward parts of each rollout
    draws: list[int]  # global order of this rank's tasks
    rewards: dict[int, list[float]]  # draw → the G rewards of its group, of all ranks in global order

    def local(self, values_PG: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor over the global batch, flattened to [B]."""
        order = list(self.rewards)
        return values_PG[[order.index(draw) for draw in self.draws]].flatten()


def collect_groups(run: "Run", step: int) -> Batch:
    """Draw, sample and score the step's groups.

    Dynamic sampling [DAPO §3.2]: groups whose rewards are all equal teach nothing; draw more until there
    are enough, keep the first ones in global order, and train on a short batch if tries run out.
    """
    config, entries, rewards_of = run.config, [], {}
    for attempt in range(config.dynamic_sampling + 1):
        first, run.cursor = run.cursor, run.cursor + config.prompts
        tasks = draw_tasks(run, first, config.prompts, attempt)
        rollouts = sample_groups(run, tasks, step)
        rewards_PG, parts = score_rollouts(run, tasks, rollouts)
        mine = {}
        for p, task in enumerate(tasks):
            draw, rows = first + run.processes.rank + p * run.processes.world, range(p * config.group, (p + 1) * config.group)
            if not config.dynamic_sampling or rewards_PG[p].max() - rewards_PG[p].min() > 1e-6:
                mine[draw] = rewards_PG[p].tolist()
                entries.append((draw, task, [(rollouts, parts, b) for b in rows]))
        for part in run.processes.gather(mine):
            rewards_of |= part
        if len(rewards_of) >= config.prompts:
            break
    chosen = dict(sorted(rewards_of.items())[: config.prompts])
    entries = [entry for entry in entries if entry[0] in chosen]
    rows = [row for _, _, rows in entries for row in rows]
    merged = Rollouts(*([getattr(r, name)[b] for r, _, b in rows] for name in ("tokens", "logps", "truncated")))
    return Batch([e[1] for e in entries], merged, [parts[b] for _, parts, b in rows], [e[0] for e in entries], chosen)


# §6 ────────────────────────────────────── token log-probs ────────────────────────────────────────
def micro_batches(run: "Run", tasks: list[Task], rollouts: Rollouts) -> list[qwen_vl.Pack]:
    """The rank's rollouts in shared-prefix packed rows; equally many on every rank.

    Under FSDP every rank must run the same collectives: short ranks add fillers that score no token, and a
    text-only row carries a dummy image if another rank has images in its turn.
    """
    size = run.config.group
    groups = [
        Group(task.prompt, rollouts.tokens[p * size : (p + 1) * size], list(range(p * size, (p + 1) * size)))
        for p, task in enumerate(tasks)
    ]
    return equal_packs([qwen_vl.pack_groups(part) for part in qwen_vl.split_groups(groups, run.config.micro_tokens)],
                       run.special, run.processes)


def equal_packs(packs: list[qwen_vl.Pack], special: SpecialIds, processes: Processes) -> list[qwen_vl.Pack]:
    """Pad the list to the longest rank's, give dummies for images, and move everything to the device."""
    filler = Group(Prompt([special.im_start], torch.zeros(3, 1, dtype=torch.long), 1), [], [])
    count = processes.maximum([len(packs)])[0]
    packs = packs + [qwen_vl.pack_groups([filler]) for _ in range(count - len(packs))]
    with_image = processes.maximum([int(pack.pixels_ND is not None) for pack in packs])
    kind = "varlen" if processes.device.type == "cuda" and qwen_vl.has_varlen() else "mask"
    for pack, wanted in zip(packs, with_image):
        if wanted and pack.pixels_ND is None:
            qwen_vl.add_dummy_image(pack)
    return [qwen_vl.prepare_attention(pack, kind).to(processes.device) for pack in packs]


@torch.no_grad()
def reference_logps(run: "Run", packs: list[qwen_vl.Pack], zeros_BT: torch.Tensor) -> torch.Tensor | None:
    """log π_ref of every rollout token [B, T]; None without a reference model (β = 0)."""
    if run.reference is None:
        return None
    return sum(scatter_BT(run.reference(pack, run.config.temperature)[0], pack, zeros_BT) for pack in packs)


# §7 ─────────────────────────────────────────── loss ──────────────────────────────────────────────
def policy_loss(
    logp_BT, old_logp_BT, advantages_B, mask_BT, *, loss="grpo", ratio="token", clip_low=0.2, clip_high=0.2,
    beta=0.0, kl="k3", ref_logp_BT=None, sampler_logp_BT=None, tis_cap=None, norm=None,
):
    """The clipped objective with its KL term. Returns (loss, stats); stats: name → [sum, count].

    loss: what the sum over tokens is divided by. grpo: mean over a sequence's tokens, then over sequences;
    dapo: mean over all tokens; dr_grpo: sum / (sequences · longest possible length). norm: that outer
    denominator of the global batch (sequences; tokens; sequences · length), so that micro-batches and ranks
    add up to one gradient; without it the batch at hand counts (B; tokens; B·T).
    On policy old = logp.detach(): the loss is then −mean(A) ≈ 0, but its gradient is −mean(A·∇logp).
    """
    check_loss_arguments(logp_BT, old_logp_BT, advantages_B, mask_BT, loss, ratio, beta, kl, ref_logp_BT)
    mask_BT = mask_BT.bool()
    length_B = mask_BT.sum(1).clamp(min=1)
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0)
    if ratio == "sequence":  # s_i = (π(o_i)/π_old(o_i))^(1/|o_i|)  [GSPO Eq. 7]
        log_ratio_BT = (log_ratio_BT.sum(1) / length_B)[:, None].expand_as(log_ratio_BT)
    # L = −min(r·A, clip(r, 1−ε_low, 1+ε_high)·A),  r = π/π_old  [DSM Eq. 3; OVR §3.2]
    ratio_BT, advantages_B1 = log_ratio_BT.exp(), advantages_B[:, None]
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    term_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    if tis_cap:  # w = min(π_old/π_sampler, C), no gradient: rollouts came from slightly other numbers
        term_BT = term_BT * (old_logp_BT - sampler_logp_BT).exp().clamp(max=tis_cap).detach()
    stats = {"clip_low": (ratio_BT < 1 - clip_low) & (advantages_B1 < 0),
             "clip_high": (ratio_BT > 1 + clip_high) & (advantages_B1 > 0), "ratio": ratio_BT.detach()}
    if beta:
        kl_BT = kl_estimate(torch.where(mask_BT, logp_BT - ref_logp_BT, 0.0), kl)
        term_BT, stats["kl"] = term_BT + beta * kl_BT, kl_BT.detach()
    term_BT = torch.where(mask_BT, term_BT, 0.0)
    if loss == "grpo":  # 1/B · Σ_i 1/|o_i| · Σ_t  [DSM Eq. 3]
        total, default = (term_BT.sum(1) / length_B).sum(), len(mask_BT)
    elif loss == "dapo":  # 1/Σ|o_i| · Σ_i Σ_t  [DAPO Eq. 8]
        total, default = term_BT.sum(), mask_BT.sum().clamp(min=1)
    else:  # 1/(B·T_max) · Σ_i Σ_t  [DRG §3.2]
        total, default = term_BT.sum(), mask_BT.numel()
    counts = mask_BT.sum()
    stats = {name: torch.stack([torch.where(mask_BT, value, 0).sum(), counts]) for name, value in stats.items()}
    return total / (default if norm is None else norm), stats


def kl_estimate(log_ratio: torch.Tensor, kind: str) -> torch.Tensor:
    """An estimate of KL(π ‖ π_ref) from d = log π − log π_ref of tokens sampled from π."""
    if kind == "k2":  # ½·d²: its gradient is that of the reverse KL
        return 0.5 * log_ratio.square()
    if kind == "k3":  # e^(−d) + d − 1 ≥ 0  [DSM Eq. 4]
        return (-log_ratio).clamp(max=20).exp() + log_ratio - 1  # clamped: e^20 is past any use
    raise ValueError(f"kl={kind!r} in the loss; choose k2 or k3 (the gradient of k1 has mean zero)")


def check_loss_arguments(logp_BT, old_logp_BT, advantages_B, mask_BT, loss, ratio, beta, kl, ref_logp_BT):
    shapes = [tuple(x.shape) for x in (logp_BT, old_logp_BT, mask_BT)] + [(len(advantages_B), logp_BT.shape[1])]
    if len(set(shapes)) != 1:
        raise ValueError(f"shapes differ: logp {shapes[0]}, old {shapes[1]}, mask {shapes[2]}, advantages {shapes[3]}")
    if loss not in ("grpo", "dapo", "dr_grpo") or ratio not in ("token", "sequence"):
        raise ValueError(f"loss={loss!r}, ratio={ratio!r}; choose grpo, dapo or dr_grpo and token or sequence")
    if beta and ref_logp_BT is None:
        raise ValueError(f"beta={beta} needs ref_logp_BT")
    if beta and kl not in ("k2", "k3"):
        kl_estimate(logp_BT, kl)


# §8 ──────────────────────────────────────── train_step ───────────────────────────────────────────
@dataclass
class Run:
    """Everything that a step uses and changes."""

    config: Config
    processes: Processes
    policy: Policy
    tokenizer: Any
    special: SpecialIds
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    data: Any  # data.Mixture
    eval_data: Any
    reward: Any
    reference: Policy | None = None
    cursor: int = 0  # draws consumed so far


def pad_BT(rows: list[list[float]], length: int) -> torch.Tensor:
    """Ragged rows → [B, T], zero behind their ends."""
    return torch.tensor([row + [0.0] * (length - len(row)) for row in rows]).view(len(rows), length)


def train_step(run: Run, step: int) -> dict:
    """One batch of GRPO [DSM Algorithm 1, inner part]. Returns the step's metrics, equal on all ranks."""
    config, processes, clock = run.config, run.processes, [time.perf_counter()]
    # 1. For each prompt q sample G outputs o_1 … o_G from the current policy, and score them.
    batch = collect_groups(run, step)
    clock.append(time.perf_counter())

    # 2. Masks come from lengths: the stop token is trained, padding is not.
    rollouts = batch.rollouts
    longest = max(map(len, rollouts.tokens), default=1)
    dropped = [config.overlong == "mask" and truncated for truncated in rollouts.truncated]
    mask_BT = pad_BT([[float(not drop)] * len(row) for row, drop in zip(rollouts.tokens, dropped)], longest)
    mask_BT, sampler_logp_BT = mask_BT.bool().to(processes.device), pad_BT(rollouts.logps, longest).to(processes.device)
    zeros_BT = torch.zeros_like(sampler_logp_BT)

    # 3. log π_ref of every token, if β > 0; k1 is subtracted from the rewards before advantages.
    packs = micro_batches(run, batch.tasks, rollouts)
    ref_logp_BT = reference_logps(run, packs, zeros_BT)
    if config.beta and config.kl == "k1":
        subtract_kl(batch, config, processes, ((sampler_logp_BT - ref_logp_BT) * mask_BT).sum(1))

    # 4. Advantages A_i from the rewards of the whole global batch.
    rewards_PG = torch.tensor(list(batch.rewards.values())).view(-1, config.group)
    advantages_PG = group_advantages(rewards_PG, scale=config.scale, std=config.std, baseline=config.baseline)
    advantages_B = batch.local(advantages_PG).to(processes.device)

    # 5. One normaliser for the whole batch, counted before it is cut into micro-batches.
    tokens = sum(processes.gather(int(mask_BT.sum())))
    sequences = rewards_PG.numel()
    norm = {"grpo": sequences, "dapo": max(tokens, 1), "dr_grpo": sequences * config.max_tokens}[config.loss]

    # 6. µ optimizer steps on the batch; pass 1's own log-probs are π_old.
    totals: dict[str, torch.Tensor] = {}
    old_logp_BT = None
    for inner in range(config.inner_steps):
        pass_logp_BT = torch.zeros_like(zeros_BT)
        for pack in packs:
            logp_S, entropy_S = run.policy(pack, config.temperature)
            logp_BT = scatter_BT(logp_S, pack, zeros_BT)
            here_BT = scatter_BT(torch.ones_like(logp_S), pack, zeros_BT).bool() & mask_BT
            pass_logp_BT += logp_BT.detach()
            loss, stats = policy_loss(
                logp_BT, logp_BT.detach() if inner == 0 else old_logp_BT, advantages_B, here_BT,
                loss=config.loss, ratio=config.ratio, clip_low=config.clip_low, clip_high=config.clip_high,
                beta=0.0 if config.kl == "k1" else config.beta, kl=config.kl, ref_logp_BT=ref_logp_BT,
                sampler_logp_BT=sampler_logp_BT, tis_cap=config.tis or None, norm=norm,
            )
            (loss * processes.world).backward()  # FSDP averages over ranks; the norm already counts them all
            stats["loss"] = torch.stack([loss.detach() * here_BT.sum(), here_BT.sum()])
            stats["entropy"] = torch.stack([entropy_S.sum(), here_BT.sum()])
            add_sums(totals, stats)
        if inner == 0:
            old_logp_BT = pass_logp_BT
        grad_norm = optimizer_step(run, step)
    clock.append(time.perf_counter())

    # 7. The sampler's copy of the weights follows.
    run.sampler.refresh(run.policy)
    clock.append(time.perf_counter())
    gap_BT = ((old_logp_BT - sampler_logp_BT).abs() * mask_BT)
    add_sums(totals, {"sampler_gap": torch.stack([gap_BT.sum(), mask_BT.sum()])})
    return step_metrics(run, step, batch, rewards_PG, totals, grad_norm, clock)


def add_sums(totals: dict, more: dict) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0) + value.detach().double().cpu()


def subtract_kl(batch: Batch, config: Config, processes: Processes, kl_B: torch.Tensor) -> None:
    """r ← r − β·Σ_t (log π − log π_ref): KL as part of the reward, before advantages."""
    mine = dict(zip(batch.draws, kl_B.view(-1, config.group).tolist()))
    for part in processes.gather(mine):
        for draw, values in part.items():
            batch.rewards[draw] = [r - config.beta * k for r, k in zip(batch.rewards[draw], values)]


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant, linear to 0 or cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    return config.lr * shape[config.schedule]


def optimizer_step(run: Run, step: int) -> float:
    """Clip, step, clear. A gradient that is not finite is thrown away. Returns its norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), run.config.max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step)
    if torch.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return float(norm)


# §9 ─────────────────────────────── logs, pictures, checkpoints ───────────────────────────────────
def step_metrics(run: Run, step: int, batch: Batch, rewards_PG, totals: dict, grad_norm: float, clock) -> dict:
    """One flat dict for metrics.jsonl, equal on all ranks. README explains each name."""
    lengths, cut = [len(tokens) for tokens in batch.rollouts.tokens], batch.rollouts.truncated
    sums = {name: value.tolist() for name, value in totals.items()}
    sums |= {"length": [sum(lengths), len(lengths)], "truncated": [sum(cut), len(cut)]}
    for name in {name for parts in batch.parts for name in parts}:
        values = [parts[name] for parts in batch.parts if name in parts]
        sums[f"reward/{name}"] = [sum(values), len(values)]
    merged: dict[str, list] = {}
    for part in run.processes.gather(sums):
        for name, (total, count) in part.items():
            before = merged.get(name, [0.0, 0])
            merged[name] = [before[0] + total, before[1] + count]
    means = {name: total / max(count, 1) for name, (total, count) in sorted(merged.items())}
    flat = rewards_PG.amax(1) - rewards_PG.amin(1) < 1e-6
    seconds = [after - before for before, after in zip(clock, clock[1:])]
    return {
        "step": step, "reward": rewards_PG.mean().item(), "reward_std": rewards_PG.std(1).mean().item(),
        "zero_variance": flat.float().mean().item(), "prompts": len(rewards_PG), **means, "grad_norm": grad_norm,
        "lr": learning_rate(run.config, step), "cursor": run.cursor,
        "seconds": {"sample": seconds[0], "train": seconds[1], "refresh": seconds[2]},
    }


def evaluate(run: Run, max_tokens: int) -> dict:
    """Accuracy on held-out samples by the answer alone: greedy, and one sample at T = 1."""
    config, ranks = run.config, run.processes
    count = min(config.eval_samples, len(run.eval_data))
    samples = [run.eval_data.at(i) for i in range(ranks.rank, count, ranks.world)]
    prompts = [make_prompt(sample, run.tokenizer, run.special, config) for sample in samples]
    noise = [keyed_uniforms(config.seed, 2**31, s.id, range(1), max_tokens) for s in samples]
    result = {}
    for name, uniforms in (("greedy", None), ("sampled", torch.stack(noise) if noise else None)):
        rollouts = run.sampler.generate(prompts, uniforms, max_tokens)
        texts = [decode(run.tokenizer, run.special, tokens) for tokens in rollouts.tokens]
        right = [rewards.correct(s.task, text, s.answer, s.image_size, think=config.think)
                 for s, text in zip(samples, texts)]
        everyone = [value for part in ranks.gather(right) for value in part]
        result[f"eval/{name}"] = sum(everyone) / max(len(everyone), 1)
    return result


def save_pictures(folder: Path, run: Run, batch_tasks, rollouts, step: int) -> None:
    pass


def save_checkpoint(run: Run, folder: Path, step: int) -> None:
    """Sharded weights and optimizer state; appears under its name by one rename, so it is whole or absent."""
    final, partial = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.partial"
    if run.processes.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    model, optimizer = get_state_dict(run.policy, run.optimizer)
    torch.distributed.checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial)
    if run.processes.rank == 0:
        (partial / "run.json").write_text(json.dumps({"step": step, "cursor": run.cursor}))
        partial.rename(final)
        for old in find_checkpoints(folder)[: -run.config.keep]:
            shutil.rmtree(old)
    dist.barrier()


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def restore_checkpoint(run: Run, path: Path) -> int:
    """Weights, optimizer, cursor; works with another number of ranks. Returns the next step."""
    model, optimizer = get_state_dict(run.policy, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    torch.distributed.checkpoint.load(state, checkpoint_id=path)
    set_state_dict(run.policy, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    saved = json.loads((path / "run.json").read_text())
    run.cursor = saved["cursor"]
    return saved["step"]


def export_model(policy: Policy, tokenizer, folder: Path, source: str, processes: Processes) -> None:
    """Write `model/` in Hugging Face format. Every rank calls it, rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(policy, options=options)
    if processes.rank == 0:
        dtype = torch.bfloat16 if processes.device.type == "cuda" else torch.float32
        state = {name.removeprefix("model."): tensor for name, tensor in full.items()}
        qwen_vl.save(folder, policy.model, tokenizer, state, source, dtype)
    dist.barrier()


# §10 ──────────────────────────────────────────── main ────────────────────────────────────────────
def prepare(config, processes: Processes, source: str, *, freeze_vision=False, beta=0.0, reward="") -> Run:
    """Load, shard, and build everything that a run needs; `source` is the checkpoint to start from."""
    settings = dict(checkpointing=config.checkpointing, freeze_vision=freeze_vision, offload=config.offload)
    policy, tokenizer, special = load_policy(source, processes, seed=config.seed, **settings)
    reference = None
    if beta:
        reference = load_policy(source, processes, seed=config.seed, **settings)[0].requires_grad_(False)
    dtype = torch.bfloat16 if processes.device.type == "cuda" else torch.float32
    sampler = Sampler(
        policy.model, special, policy.banned_V, device=processes.device, dtype=dtype, kv_gb=config.kv_gb
    )
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay)
    pixels = dict(seed=config.seed, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    dataset = data_module.open_data(config.data, split="train", **pixels)
    heldout = data_module.open_data(config.eval_data or config.data, split="heldout", **pixels)
    return Run(config, processes, policy, tokenizer, special, sampler, optimizer, dataset, heldout,
               load_reward(reward), reference)


def train(run: Run, one_step, *, seconds: float = 0.0, eval_tokens: int) -> None:
    """The loop around `one_step(run, step) -> metrics`: resume, log, evaluate, save, export the model."""
    config, folder, rank = run.config, Path(run.config.out), run.processes.rank
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    if config.resume == "auto" and (found := find_checkpoints(folder)):
        first = restore_checkpoint(run, found[-1])
    run.sampler.refresh(run.policy)
    if rank == 0:
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    bar, started = tqdm(range(first, config.steps), disable=rank > 0, desc=folder.name), time.perf_counter()
    with open(folder / "metrics.jsonl", "a") as log:
        for step in bar:
            metrics = one_step(run, step)
            out_of_time = seconds and run.processes.maximum([int(time.perf_counter() - started > seconds)])[0]
            if config.eval_every and (step + 1) % config.eval_every == 0:
                run.sampler.refresh(run.policy)
                metrics |= evaluate(run, eval_tokens)
            if rank == 0:
                print(json.dumps(metrics), file=log, flush=True)
                shown = {name: f"{metrics[name]:.3f}" for name in ("reward", "loss", "length") if name in metrics}
                bar.set_postfix(shown)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save_checkpoint(run, folder, step + 1)
            if out_of_time:
                break
    export_model(run.policy, run.tokenizer, folder / "model", config.model, run.processes)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(Config, sys.argv[1:] if arguments is None else arguments, PRESETS, __doc__)
    processes = start_processes(config.timeout)
    source = str(Path(config.cold_start) / "model") if config.cold_start else config.model
    run = prepare(config, processes, source, freeze_vision=config.freeze_vision, beta=config.beta, reward=config.reward)
    train(run, train_step, eval_tokens=config.max_tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
