"""The demo and its controls: arms × seeds, all from the model in base/.

  python benchmarks/demo_arms.py                      seeds 0 1 2, two processes an arm
  python benchmarks/demo_arms.py --report             results/demo.md and demo.png, from the raw rows
  python benchmarks/demo_arms.py --seeds 10 --results runs/tried/demo      trying

For each seed, from base/: GRPO as `make demo` has it; the same with a format-only and with a random
reward; supervised training on the same scenes with as many prompts a step, for as many seconds as
GRPO took (evaluations included), at two learning rates. Runs are evaluated on 200 held-out scenes
as they go. In the end each model answers the same 500 held-out scenes, greedily and eight times at
T = 1, and so does the base. Seed n trains on scenes of seed n, and its held-out scenes are its own.

A finished arm is a file in results/demo/ and is not run again: delete it to repeat the arm. One that
was stopped begins anew. Models, whole answers and logs stay under runs/demo_arms/SEED/.
"""
import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import claims_report
import demo_report
from claims import shown
from demo_report import Arm

import grpo_vl
import sheets
import training
from eval import write_rows

ROOT = Path(__file__).resolve().parents[1]
SCENES = 500  # held-out, that each model answers in the end
LOOKED_AT = 200  # of them, at each evaluation of a run
EVERY = 25  # GRPO steps between evaluations
SUPERVISED_EVERY = 100  # supervised steps, which are about ten times as fast
EXAMPLES = 6  # scenes whose sampled answers are kept, of the base and of GRPO


@dataclass(frozen=True)
class Bench:
    """What all arms of a call share."""
    base: str  # the model that they start from
    ranks: int
    runs: Path
    results: Path
    config: grpo_vl.Config  # of the demo


@dataclass(frozen=True)
class Job:
    """An arm with a seed."""
    bench: Bench
    arm: Arm
    seed: int

    @property
    def folder(self) -> Path:
        """Of run/, greedy/, sampled/ and a log."""
        return self.bench.runs / str(self.seed) / self.arm.slug

    @property
    def file(self) -> Path:
        """The arm's raw rows."""
        return self.bench.results / f"{self.arm.slug}-{self.seed}.jsonl.gz"

    @property
    def scenes(self) -> str:
        """The demo's world with this seed, as --data takes it."""
        (world,) = self.bench.config.data
        return f"{world}&seed={self.seed}"


def call(job: Job, command: list[str]) -> None:
    """Run a script of the repository on all ranks. Errors: RuntimeError naming the log."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher.append(f"--nproc_per_node={job.bench.ranks}")
    log = job.folder / "log"
    with log.open("a") as file:
        print("$", as_typed(job, command), file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, *launcher, *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        )
        try:
            process.wait()
        except KeyboardInterrupt:  # torchrun then ends its processes
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise RuntimeError(
            f"{job.arm.name}, seed {job.seed}: {command[0]} ended with {process.returncode}, see {log}")


def as_typed(job: Job, command: list[str]) -> str:
    return f"torchrun --nproc_per_node={job.bench.ranks} {shlex.join(command)}"


def training_command(job: Job, seconds: float) -> list[str]:
    """seconds: the most that supervised training takes."""
    arm, demo = job.arm, job.bench.config
    common = ["--model", job.bench.base, "--seed", str(job.seed), "--out", shown(job.folder / "run"),
              "--eval-samples", str(LOOKED_AT)]
    if arm.kind == "supervised":
        return [
            "sft_coldstart.py", *common, "--data", *demo.data, "--train", "all", "--lr", str(arm.lr),
            "--schedule", "constant", "--warmup", "10", "--batch", str(demo.prompts),
            "--steps", "1000000", "--seconds", f"{seconds:.1f}", "--save-every", "1000000",
            "--eval-every", str(SUPERVISED_EVERY), "--eval-tokens", str(demo.max_tokens),
            "--no-checkpointing", "--micro-tokens", str(demo.micro_tokens)]
    command = ["grpo_vl.py", "--preset", "tiny", *common,
               "--eval-every", str(EVERY), "--pictures-every", "0"]
    if arm.kind == "control":
        command += ["--reward", f"benchmarks/control_rewards.py:{arm.slug}"]
    return command


def answer(job: Job, model: str, mode: str) -> tuple[list[dict], list[str]]:
    """Held-out scenes by number: (the rows of all answers, each with "correct"; the command)."""
    demo, out = job.bench.config, job.folder / mode
    tries = 1 if mode == "greedy" else sheets.TRIES
    task = job.scenes.removeprefix("synthetic:").partition("?")[0]
    command = [
        "eval.py", "run", "--model", model, "--task", task, "--data", job.scenes,
        "--samples", str(SCENES), "--samples-per-question", str(tries),
        "--max-tokens", str(demo.max_tokens), "--prompts", "training", "--out", shown(out)]
    call(job, command)
    rows = claims_report.read_rows(out / "predictions.jsonl")
    rows.sort(key=scene_number)  # each rank wrote its own after the other
    for row in rows:
        row["correct"] = training.right(demo, row)
    return rows, command


def scene_number(row: dict) -> int:
    return int(row["id"].rpartition("-")[2])


def by_scene(rows: list[dict]) -> list[list[float]]:
    """The scores of each scene's answers, in the order of scenes."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["id"], []).append(row["correct"])
    return list(scores.values())


def run_missing(job: Job) -> None:
    """Train, answer, and keep the raw rows; nothing, if they are there."""
    if job.file.exists():
        return
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    model, steps, commands = job.bench.base, [], []
    about = {"steps": 0, "seconds": 0.0}
    if job.arm.kind != "base":
        command = training_command(job, seconds_of_grpo(job))
        call(job, command)
        commands.append(command)
        model = shown(job.folder / "run" / "model")
        steps = claims_report.read_rows(job.folder / "run" / "metrics.jsonl")
        about["steps"] = len(steps)
        about["seconds"] = round(steps[-1]["seconds/total"], 1)
    greedy, command = answer(job, model, "greedy")
    commands.append(command)
    sampled, command = answer(job, model, "sampled")
    commands.append(command)
    if job.arm.kind in ("base", "grpo"):
        examples = sampled[: EXAMPLES * sheets.TRIES]
        write_rows(demo_report.answers_file(job.bench.results, job.arm, job.seed), examples)
    about["commands"] = [as_typed(job, command) for command in commands]
    about["scenes"] = job.scenes
    claims_report.write(job.file, about, steps, by_scene(greedy), by_scene(sampled))


def seconds_of_grpo(job: Job) -> float:
    """What supervised training may take; GRPO and its controls end by their steps."""
    if job.arm.kind != "supervised":
        return 0.0
    grpo = Job(job.bench, demo_report.GRPO, job.seed)
    return claims_report.read(grpo.file).about["seconds"]


def main(arguments: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", default="base", help="the model to start from [base]")
    parser.add_argument("--ranks", type=int, default=2, help="processes an arm [2]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo_arms")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "demo")
    parser.add_argument("--report", action="store_true", help="table and figure of what there is")
    given = parser.parse_args(arguments)
    results = given.results.resolve()
    if given.report:
        demo_report.write(results)
        return
    if not list((ROOT / given.base).glob("*.safetensors")):
        parser.error(f"--base {given.base} holds no model: build one (sft_coldstart.py --preset "
                     "base, then benchmarks/base_model.py publish), or name another folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children end with this process
    demo = grpo_vl.Config(**grpo_vl.PRESETS["tiny"])
    bench = Bench(given.base, given.ranks, given.runs.resolve(), results, demo)
    for seed in given.seeds:
        for arm in demo_report.ARMS:
            run_missing(Job(bench, arm, seed))
    demo_report.write(results)


if __name__ == "__main__":
    main()
