"""What is around a step in both stages? A run's objects, prompts, evaluation, the loop's frame.

§1 the run's objects · §2 samples → prompts · §3 held-out answers · §4 optimizer ·
§5 around a step: resume, log, evaluate, save, finish

Papers: [PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, arXiv 2507.05255.
"""
import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import data as datasets
import fsdp
import lora
import pictures
import qwen_vl
import rewards
import run_folder
from fsdp import Processes
from noise import keyed_uniforms
from options import data_options
from policy import Policy
from prompts import encode_sample, think_of
from qwen_vl import Group, Prompt, SpecialIds
from run_folder import say
from sampler import Interrupted, Sampler
from sources import Sample, chance


# §1 ─────────────────────────────────── the run's objects ────────────────────────────────────
@dataclass
class Run:
    """Everything that a step reads or changes."""

    config: Any
    processes: Processes
    policy: Policy
    reference: Callable | None  # the frozen initial model, if β > 0
    tokenizer: Any
    special: SpecialIds
    sampler: Sampler
    optimizer: torch.optim.Optimizer | None  # None: nothing is trained
    data: datasets.Mixture
    eval_data: datasets.Mixture | None  # None: nothing is evaluated
    reward: Any  # rewards.score, or a function of the user's
    source: str = ""  # hub id or directory of the checkpoint that it began with
    cursor: int = 0  # draws consumed so far
    drawn: list = field(default_factory=list)  # ids of the batch at hand, for reports
    example: tuple = ("", "")  # a true answer and the last completion, for reports


def prepare(config, processes: Processes, source: str, *, freeze_vision=False, frozen=False,
            beta=0.0, reward=rewards.score, imitates=False):
    """Load, shard, and build all that a run needs; `source` is the checkpoint to begin with.

    frozen: nothing is trained, so weights are kept in the dtype to compute with. imitates: rows may
    have a response to imitate in place of a true answer.
    """
    data = datasets.open_data(config.data, split="train", **data_options(config))
    if data.heldout_count:
        say(f"{len(data)} samples to train on, {data.heldout_count} held out (--heldout "
            f"{config.heldout}: the same ones in every run over this data)")
    if not imitates:
        require_answers(data, "--data")
    eval_data = open_heldout(config)
    if eval_data is not None:
        require_answers(eval_data, "the data to evaluate on")
        warn_of_overlap(data, eval_data)
    freeze_vision = freeze_vision or config.lora > 0
    policy, tokenizer, special = fsdp.load_policy(
        source, processes, config, freeze_vision=freeze_vision, frozen=frozen,
        sharding=config.sharding)
    on_gpu = processes.device.type == "cuda"
    reference = None
    if beta and config.lora:
        reference = partial(lora.run_base, policy)
    elif beta:
        reference, _, _ = fsdp.load_policy(
            source, processes, config, frozen=True, sharding=config.sharding)
    sampler = Sampler(
        policy.model, special, device=processes.device, dtype=fsdp.compute_dtype(processes.device),
        kv_gb=config.kv_gb, graphs=config.graphs and on_gpu, compile=config.compile,
        keep_features=freeze_vision)
    optimizer = None
    if not frozen:
        optimizer = make_optimizer(config, fsdp.trainable_parameters(policy), on_gpu=on_gpu)
    return Run(
        config=config,
        processes=processes,
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        special=special,
        sampler=sampler,
        optimizer=optimizer,
        data=data,
        eval_data=eval_data,
        reward=reward,
        source=source)


def open_heldout(config) -> datasets.Mixture | None:
    """--eval-data, all of it; else the held-out share of --data; None without evaluation."""
    if not config.eval_every:
        return None
    options = data_options(config)
    if config.eval_data:
        return datasets.open_data(config.eval_data, split="heldout", **options | {"heldout": 0.0})
    if config.heldout == 0 and file_samples(datasets.open_data(config.data, **options)):
        raise datasets.DataError("--heldout 0 leaves nothing of a file to evaluate on: give "
                                 "--eval-data as well")
    return datasets.open_data(config.data, split="heldout", **options)


def file_samples(mix: datasets.Mixture) -> list[tuple]:
    """(where it stands, sample, its images unread) of all samples of files."""
    return [(where, sample, images) for source in mix.sources
            for where, sample, images, *_ in getattr(source, "samples", ())]


def require_answers(mix: datasets.Mixture, what: str) -> None:
    """Errors: DataError naming the first row that nothing can be scored by."""
    for where, sample, _ in file_samples(mix):
        if sample.answer == "":
            raise datasets.DataError(f"{where}: {what} needs true answers, and this row has none "
                                     "(a response alone serves the cold start)")


def warn_of_overlap(data: datasets.Mixture, eval_data: datasets.Mixture) -> None:
    """Say how much of what is evaluated is trained on, by image or, without one, by question."""
    trained = {chance(sample, images) for _, sample, images in file_samples(data)}
    evaluated = [chance(sample, images) for _, sample, images in file_samples(eval_data)]
    common = sum(key in trained for key in evaluated)
    if common:
        say(f"note: {common} of the {len(evaluated)} samples to evaluate on are trained on too")


# §2 ─────────────────────────────────── samples → prompts ────────────────────────────────────
def make_prompt(run: Run, sample: Sample) -> Prompt:
    """The paper's prompt for the sample's task, tokenised with its images. Never truncated."""
    prompt = encode_sample(run.config, run.tokenizer, run.special, sample)
    if len(prompt.ids) > run.config.max_prompt:
        raise datasets.DataError(
            f"sample {sample.id}: its prompt has {len(prompt.ids)} tokens, --max-prompt is "
            f"{run.config.max_prompt}; raise it, or lower --max-pixels")
    return prompt


def draw_groups(run: Run, count: int) -> list[Group]:
    """This rank's share of the next `count` draws: prompts without completions.

    Rank r of R takes draws cursor + r, cursor + r + R, …, so a batch does not depend on R.
    """
    ranks, groups = run.processes, []
    for draw in range(run.cursor + ranks.rank, run.cursor + count, ranks.world):
        sample = run.data[draw]
        groups.append(Group(make_prompt(run, sample), [], sample=sample, draw=draw))
    run.cursor += count
    run.drawn = [group.sample.id for group in groups]
    return groups


# §3 ──────────────────────────────────── held-out answers ────────────────────────────────────
def answer(run: Run, samples: list, *, tries: int, max_tokens: int, greedy: bool, penalty=1.0,
           prompt_of=make_prompt) -> list[dict]:
    """`tries` answers to each of these samples of this rank, a row each: see eval.py's rows.

    Noise is keyed by the sample alone: every evaluation of a run draws the same uniforms.
    """
    rows = []
    for first in range(0, len(samples), 32):  # not all at once: a large image is 300 MB of patches
        part = samples[first : first + 32]
        prompts = [prompt_of(run, sample) for sample in part]
        noise = [keyed_uniforms(0, 0, f"eval {sample.id}", tries, max_tokens) for sample in part]
        groups = run.sampler.generate(
            prompts, None if greedy else noise, max_tokens, repetition_penalty=penalty)
        for sample, completions in zip(part, groups):
            for completion in completions:
                text = qwen_vl.decode(run.tokenizer, run.special, completion.tokens)
                rows.append({
                    "id": sample.id, "task": sample.task, "question": sample.question,
                    "answer": sample.answer, "image_size": sample.image_size, "completion": text,
                    "truncated": completion.truncated})
    return rows


def answer_heldout(run: Run, count: int, **options) -> list[dict]:
    """Rows of the first `count` held-out samples (0: of all), of all ranks, equal on every rank.

    Several sources take turns, so that the first ones are of each. options: those of `answer`. With
    --blind the images are grey. Raises what `together` raises.
    """
    ranks = run.processes
    first = [*islice(run.eval_data.in_turn(), count or None)]
    own = first[ranks.rank :: ranks.world]

    def answer_own() -> list[dict]:
        samples = [run.eval_data.good(index) for index in own]
        samples = [sample for sample in samples if sample is not None]  # named, by --skip-bad
        if run.config.blind:
            samples = [blinded(sample) for sample in samples]
        return answer(run, samples, **options)

    return [row for part in ranks.gather(together(run, answer_own)) for row in part]


def blinded(sample: Sample) -> Sample:
    """The sample with grey images of the same sizes: a control for what is guessed."""
    return replace(sample, images=tuple(pictures.grey(image) for image in sample.images))


def right(config, row: dict) -> float:
    """What the row's answer alone is worth, from 0 to 1, asked for as --think says."""
    return rewards.correct(
        row["task"], row["completion"], row["answer"], row["image_size"],
        think=think_of(config, row["id"]))


def evaluate(run: Run, max_tokens: int) -> tuple[list[dict], dict[str, float]]:
    """Held-out samples, greedily and at T = 1: (a row an answer, accuracy of the answers alone)."""
    config, rows, accuracy = run.config, [], {}
    for mode in ("greedy", "sampled"):
        found = answer_heldout(
            run, config.eval_samples, tries=1, max_tokens=max_tokens, greedy=mode == "greedy")
        for row in found:
            row["mode"] = mode
            row["correct"] = right(config, row)
        if not found:
            raise datasets.DataError("no held-out sample can be read: look at what was left out")
        rows += found
        accuracy[f"eval/{mode}"] = sum(row["correct"] for row in found) / len(found)
    return rows, accuracy


def together(run: Run, work):
    """work(); what stops it on any rank stops all: Interrupted (told to stop) or DataError.

    Decoding issues no collectives, so ranks agree on this after it.
    """
    outcome = trouble = None
    try:
        outcome = work()
    except Interrupted:
        pass  # the flag that raised it is gathered below
    except datasets.DataError as error:
        trouble = str(error)
    found = run.processes.gather((run.sampler.interrupted(), trouble))
    troubles = [trouble for _, trouble in found if trouble]
    if troubles:
        raise datasets.DataError("\n".join(troubles))
    if any(interrupted for interrupted, _ in found):
        raise Interrupted
    return outcome


# §4 ─────────────────────────────────────── optimizer ────────────────────────────────────────
def learning_rate(config, step: int) -> float:
    """Linear warm-up, then constant, linear to 0, or cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * (0.5 + 0.5 * math.cos(math.pi * done))
    return config.lr


def make_optimizer(config, parameters: list, *, on_gpu: bool) -> torch.optim.Optimizer:
    """AdamW without weight decay [PR1 code, OVR]; for GPUs the one that is a single kernel.

    Either takes up the other's checkpoint. Plain twin: PyTorch's loop over parameters.
    """
    fused = True if on_gpu else None
    return torch.optim.AdamW(parameters, betas=(0.9, config.beta2), weight_decay=0, fused=fused)


def optimizer_step(run: Run, step: int, grad_norm: float) -> None:
    """AdamW at this step's learning rate, unless the gradient is not finite. Clears it."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step)
    if math.isfinite(grad_norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


# §5 ────────────────────────────────────── around a step ─────────────────────────────────────
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


def due(every: int, step: int) -> bool:
    """Whether something is done at this step that is done every so many; 0: never."""
    return every > 0 and step % every == 0


ABANDONED = Interrupted, datasets.DataError  # what ends a step before it has touched the weights


class Progress:
    """Where a run stands: it resumes, counts, logs, evaluates, saves and finishes.

        progress = Progress(run, eval_tokens)      # from the newest checkpoint
        for step in progress.steps():              # to --steps, a signal, or --max-bad-steps
            try:
                progress.add(one_step(run, step))
            except ABANDONED as error:             # nothing of this step has touched the weights
                progress.abandon(error)
        progress.finish()                          # the last checkpoint, and model/
    """

    def __init__(self, run: Run, eval_tokens: Callable, seconds=math.inf, stopped=None):
        """eval_tokens: the longest held-out answer at a step; stopped: from `watch_signals`.

        seconds: of training after which no step follows, those before a resume counted.
        """
        self.run, self.config, self.folder = run, run.config, Path(run.config.out)
        self.eval_tokens, self.seconds = eval_tokens, seconds
        state = run_folder.resume(run.config, run.policy, run.optimizer)
        self.done = state["step"]
        run.cursor = self.cursor = state["cursor"]
        self.elapsed = state.get("seconds", 0.0)  # of training, up to the last step
        self.bad_steps, self.stopped = 0, False
        self.last = self.done >= self.config.steps or self.elapsed > seconds
        self.metrics: dict = {}
        self.unlogged = False  # the last step's evaluation was interrupted
        self.log = run_folder.RunLog(run.config) if run.processes.rank == 0 else None
        run.sampler.refresh(fsdp.gathered_parameters(run.policy))
        run.sampler.interrupted = stopped or watch_signals()
        self.before = self.evaluate_before()
        self.started = time.perf_counter() - self.elapsed
        if state.get("unlogged"):  # the run ended between a checkpoint and its evaluation
            self.evaluate_and_log(state["unlogged"])

    def evaluate_before(self) -> dict[str, float]:
        """{"before/greedy": …} of the model that the run begins with, where its curves begin.

        It goes into the first step's row, so metrics.jsonl keeps a row a step. {} on going on.
        """
        if self.done or not self.config.eval_every:
            return {}
        try:
            _, accuracy = evaluate(self.run, self.eval_tokens(0))
        except Interrupted:
            self.stopped = True
            return {}
        return {name.replace("eval/", "before/"): value for name, value in accuracy.items()}

    def steps(self):
        """The numbers of the steps to take."""
        while not (self.stopped or self.last or self.bad_steps == self.config.max_bad_steps):
            yield self.done

    def abandon(self, error: Exception) -> None:
        """The step at hand left the weights alone: no other follows it. Bad data ends the run."""
        self.stopped = True
        if not isinstance(error, Interrupted):
            self.save()
            raise error

    def add(self, metrics: dict) -> None:
        """A step was taken: save, evaluate and log as is due. All ranks call it together."""
        run, config = self.run, self.config
        if self.done == 0:
            metrics |= self.before
        self.done += 1
        self.cursor = run.cursor
        self.elapsed = max(run.processes.gather(time.perf_counter() - self.started))
        metrics["seconds/total"] = self.elapsed
        self.last = self.done == config.steps or self.elapsed > self.seconds
        self.bad_steps = 0 if math.isfinite(metrics["grad_norm"]) else self.bad_steps + 1
        if self.bad_steps:  # the optimizer left this step out
            drawn = run.processes.gather(run.drawn)
            metrics["skipped_samples"] = [name for part in drawn for name in part]
        if self.done % config.save_every == 0:  # before an evaluation, which may fail
            self.save(unlogged=metrics)
        self.evaluate_and_log(metrics)
        self.stopped |= any(run.processes.gather(run.sampler.interrupted()))

    def evaluate_and_log(self, metrics: dict) -> None:
        """Finish a step's metrics. Bad held-out data ends the run, and loses no step."""
        run, config = self.run, self.config
        if config.eval_every and (self.done % config.eval_every == 0 or self.last):
            run.sampler.refresh(fsdp.gathered_parameters(run.policy, frozen=False))
            try:
                metrics = metrics | evaluate(run, self.eval_tokens(self.done))[1]
            except ABANDONED as error:
                self.save(unlogged=metrics)
                self.unlogged = self.stopped = True
                if isinstance(error, Interrupted):  # evaluated when the run goes on
                    return
                raise
        self.metrics = metrics
        if self.log:
            self.log.add(metrics)
            self.warn_if_nothing_is_earned()

    def warn_if_nothing_is_earned(self) -> None:
        """After ten steps without any reward, one truth and one completion side by side."""
        history = self.log.history
        if len(history) == 10 and all(row.get("reward") == 0 for row in history):
            truth, completion = self.run.example
            say("every reward so far is 0: look at samples/, is it the truth's form or the "
                f"model's?\n  truth:      {truth!r:.200}\n  completion: {completion!r:.200}")

    def save(self, unlogged: dict | None = None) -> None:
        if self.config.sharding == "by-hand" or self.done == 0:
            return  # by hand the model is written at the end, and nothing before
        state = {"step": self.done, "cursor": self.cursor, "seconds": self.elapsed,
                 "unlogged": unlogged}
        run_folder.save_checkpoint(
            self.folder, self.run.policy, self.run.optimizer, state, self.config.keep)

    def finish(self) -> bool:
        """The last checkpoint, and model/ if all steps are done: whether they are."""
        config, run = self.config, self.run
        self.save()
        if self.bad_steps == config.max_bad_steps:
            raise SystemExit(
                f"{self.bad_steps} steps in a row without a finite gradient, the last one from "
                f"{self.metrics['skipped_samples']}: lower --lr or look at these samples")
        checkpoint = self.folder / f"checkpoint-{self.done}"
        if not self.last or self.unlogged:
            again = "begins anew"
            if self.done and config.sharding != "by-hand":
                again = f"goes on from {checkpoint}"
            say(f"stopped after {self.done} of {config.steps} steps; the same command {again}")
            return False
        weights = fsdp.full_state_dict(run.policy)
        run_folder.export(self.folder / "model", run.policy, weights, run.tokenizer, run.source)
        if config.export == "adapter":
            tensors = fsdp.adapter_state_dict(run.policy)
            run_folder.export_adapter(self.folder / "adapter", run.policy, tensors, run.source)
        if run.processes.rank == 0 and checkpoint.exists():
            run_folder.mark_finished(checkpoint)
        say(f"finished: {self.done} steps, model in {self.folder}/model, metrics in "
            f"{self.folder}/metrics.jsonl")
        return True


@contextlib.contextmanager
def one_run():
    """The frame of a run: bad data ends it with one sentence; else all ranks leave together."""
    try:
        yield
    except datasets.DataError as error:
        raise SystemExit(str(error)) from None
    fsdp.leave()
