"""What do both stages share? Options and command line, prompts, optimizer, the loop's frame."""
import argparse
import contextlib
import json
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import tyro

import data as datasets
import fsdp
import qwen_vl
import rewards
import run_folder
from fsdp import Processes
from policy import Policy
from qwen_vl import Group, Prompt, SpecialIds
from sampler import Interrupted, Sampler, keyed_uniforms


def check_options(config):
    """Errors: ValueError naming the option, its value, and what it may be."""
    whole = ("prompts", "group", "max_tokens", "inner_steps", "micro_tokens", "steps", "batch",
             "keep", "save_every", "eval_samples", "max_bad_steps")
    for f in fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        choices = getattr(f.type, "__args__", ()) if isinstance(value, str) else (value,)
        if choices and value not in choices:
            raise ValueError(f"{flag} is {value!r}; choose from {', '.join(choices)}")
        if (f.name in whole and value < 1) or (f.name in ("temperature", "lr") and value <= 0):
            raise ValueError(f"{flag} is {value}; it must be {1 if f.name in whole else 'above 0'}")


def parse_config(config_class, arguments, presets: dict, text: str, gpu: bool):
    """Defaults < --preset < --config FILE < command line, each option's help the comment beside it.
    Without a GPU, and with none of --preset, --config and --model, the preset is "tiny"."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets)
    first.add_argument("--config", type=Path)
    chosen, rest = first.parse_known_args(arguments)
    if not (chosen.preset or chosen.config or "--model" in rest or gpu):
        chosen.preset = "tiny"
    try:
        saved = json.loads(chosen.config.read_text()) if chosen.config else {}
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        text += f"\n--preset {' | '.join(presets)}; --config FILE: a run's config.json"
        default = config_class(**(presets.get(chosen.preset, {}) | saved))
        return tyro.cli(config_class, args=rest, default=default, description=text)
    except (OSError, ValueError, TypeError) as error:
        first.error(str(error))


def learning_rate(config, step: int) -> float:
    """Linear warm-up, then constant, linear to 0, or cosine to 0."""
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    shape = {"constant": 1, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return config.lr * ((step + 1) / config.warmup if done < 0 else shape[config.schedule])


def watch_signals():
    """A function that says whether SIGTERM or Ctrl-C has come. A second one ends the process."""
    received = []

    def note(number, frame):
        received.append(number)
        listen(signal.SIG_DFL)

    def listen(handler):
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, handler)

    listen(note)
    return lambda: bool(received)


@contextlib.contextmanager
def one_run():
    """The frame of a run: bad data ends it with one sentence; else all ranks leave together."""
    try:
        yield
    except datasets.DataError as error:
        raise SystemExit(str(error)) from None
    fsdp.leave()


@dataclass
class Run:
    """Everything that a step reads or changes."""

    config: Any
    processes: Processes
    policy: Policy
    reference: Policy | None  # the frozen initial model, if β > 0
    tokenizer: Any
    special: SpecialIds
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    data: datasets.Mixture
    eval_data: datasets.Mixture
    reward: Any
    cursor: int = 0  # draws consumed so far
    ahead: dict = field(default_factory=dict)  # first draw: the batch that the thread prepares
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    drawn: list = field(default_factory=list)  # ids of the batch at hand, for reports


def make_prompt(run: "Run", sample: datasets.Sample) -> Prompt:
    """The paper's prompt for the sample's task, tokenised with its images. Never truncated."""
    text = rewards.prompt(sample.task, sample.question, think=run.config.think)
    system, most = sample.system or run.config.system_prompt, run.config.max_prompt
    prompt = qwen_vl.encode_chat(run.tokenizer, run.special, text, sample.images, system)
    if len(prompt.ids) > most:
        raise datasets.DataError(f"sample {sample.id}: its prompt has {len(prompt.ids)} tokens, "
                                 f"--max-prompt is {most}; raise it, or lower --max-pixels")
    return prompt


def draw_groups(run: "Run", count: int) -> list[Group]:
    """This rank's share of the next draws; a thread decodes the ones after them meanwhile."""
    def prepare(first):
        torch.set_num_threads(1)  # this thread's: a second OpenMP team slows the main thread's
        draws = range(first + run.processes.rank, first + count, run.processes.world)
        drawn = [(run.data[draw], draw) for draw in draws]
        return [Group(make_prompt(run, s), [], sample=s, draw=draw) for s, draw in drawn]

    for first in (run.cursor, run.cursor + count):
        if first not in run.ahead:
            run.ahead[first] = run.thread.submit(prepare, first)
    groups = run.ahead.pop(run.cursor).result()
    run.drawn = [group.sample.id for group in groups]
    run.cursor += count
    return groups


def unless_interrupted(run: "Run", work, *arguments):
    """work(*arguments); if any rank was told to stop meanwhile, all of them raise Interrupted."""
    outcome = None
    with contextlib.suppress(Interrupted):
        outcome = work(*arguments)
    if any(run.processes.gather(run.sampler.interrupted())):
        raise Interrupted
    return outcome


def optimizer_step(run: Run, step: int) -> float:
    """Clip, step, clear; a gradient that is not finite is dropped. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), run.config.max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step)
    if torch.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm.item()


def evaluate(run: Run, max_tokens: int) -> tuple[list[dict], dict[str, float]]:
    """Held-out samples, greedily and at T = 1: (a row an answer, accuracy of the answers alone)."""
    ranks, rows, count = run.processes, [], min(run.config.eval_samples, len(run.eval_data))
    samples = [run.eval_data.at(i) for i in range(ranks.rank, count, ranks.world)]
    prompts = [make_prompt(run, sample) for sample in samples]
    noise = [keyed_uniforms(0, 0, f"eval {s.id}", 1, max_tokens) for s in samples]
    for mode, keyed in (("greedy", None), ("sampled", noise)):
        answers = unless_interrupted(run, run.sampler.generate, prompts, keyed, max_tokens)
        for s, (c,) in zip(samples, answers):
            text = qwen_vl.decode(run.tokenizer, run.special, c.tokens)
            right = rewards.correct(s.task, text, s.answer, s.image_size, think=run.config.think)
            about = dict(id=s.id, task=s.task, question=s.question, answer=s.answer)
            rows.append(about | {"image_size": s.image_size, "mode": mode, "completion": text,
                                 "correct": right})
    rows = [row for part in ranks.gather(rows) for row in part]
    return rows, {f"eval/{mode}": sum(row["correct"] for row in rows if row["mode"] == mode) / count
                  for mode in ("greedy", "sampled")}


def prepare(config, processes: Processes, source: str, *, freeze_vision=False, beta=0.0, reward=""):
    """Load, shard, and build all that a run needs; `source` is the checkpoint to begin with."""
    loaded = fsdp.load_policy(source, processes, config, freeze_vision=freeze_vision)
    policy, tokenizer, special = loaded
    dtype = torch.bfloat16 if processes.device.type == "cuda" else torch.float32
    reference = fsdp.load_policy(source, processes, config, dtype=dtype)[0] if beta else None
    copy = Sampler(policy.model, special, device=processes.device, dtype=dtype, kv_gb=config.kv_gb,
                   graphs=config.graphs and dtype == torch.bfloat16, keep_features=freeze_vision)
    trained, betas = [p for p in policy.parameters() if p.requires_grad], (0.9, config.beta2)
    optimizer = torch.optim.AdamW(trained, betas=betas, weight_decay=0)  # [PR1, OVR: 0]
    specs = {"train": config.data, "heldout": config.eval_data or config.data}
    opened = [datasets.open_data(specs[s], split=s, **data_options(config)) for s in specs]
    return Run(config, processes, policy, reference, tokenizer, special, copy, optimizer, *opened,
               rewards.load(reward))


def data_options(config) -> dict:
    names = ("seed", "min_pixels", "max_pixels", "fields", "skip_bad")
    return {name: getattr(config, name) for name in names}


def train(run: Run, one_step, *, eval_tokens: int, seconds: float = math.inf) -> None:
    """The loop around one_step(run, step) → metrics: resume, log, evaluate, save, export.

    Told to stop (SIGTERM, Ctrl-C), it saves the last completed step and returns.
    """
    config, folder, ranks = run.config, Path(run.config.out), run.processes
    state = run_folder.resume(config, run.policy, run.optimizer)
    run.cursor, bad_steps, stop, last = state["cursor"], 0, False, state["step"] >= config.steps
    run.sampler.refresh(run.policy)
    run.sampler.interrupted = watch_signals()
    log = run_folder.RunLog(config, run_folder.symptoms) if ranks.rank == 0 else None
    started = time.perf_counter()
    while not (stop or last or bad_steps == config.max_bad_steps):
        try:
            metrics = one_step(run, state["step"])
        except Interrupted:  # nothing of this step has touched the weights
            break
        state = {"step": state["step"] + 1, "cursor": run.cursor}
        metrics["seconds/total"] = max(ranks.gather(time.perf_counter() - started))
        last = state["step"] == config.steps or metrics["seconds/total"] > seconds
        if config.eval_every and (state["step"] % config.eval_every == 0 or last):
            run.sampler.refresh(run.policy)
            with contextlib.suppress(Interrupted):  # seen again below
                metrics |= evaluate(run, eval_tokens)[1]
        bad_steps = 0 if math.isfinite(metrics["grad_norm"]) else bad_steps + 1
        if bad_steps:  # the optimizer left this step out
            metrics["skipped_samples"] = [name for part in ranks.gather(run.drawn) for name in part]
        if log:
            log.add(metrics)
        stop = any(ranks.gather(run.sampler.interrupted()))
        if state["step"] % config.save_every == 0:
            run_folder.save_checkpoint(folder, run.policy, run.optimizer, state, config.keep)
    run_folder.save_checkpoint(folder, run.policy, run.optimizer, state, config.keep)
    if bad_steps == config.max_bad_steps:
        raise SystemExit(f"{bad_steps} steps in a row without a finite gradient, the last one from "
                         f"{metrics['skipped_samples']}: lower --lr or look at these samples")
    if last:
        run_folder.export(folder / "model", run.policy, run.tokenizer, config.model)
