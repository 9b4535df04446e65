"""The papers' claims in miniature: each asked of the model in base/, on drawn scenes.

base/ is what `sft_coldstart.py --preset base` and `benchmarks/base_model.py publish` built; any
model that answers drawn scenes can stand in its place (--base DIR).

  python benchmarks/claims.py P1 --seeds 0 1 2     its arms, two at a time, on one thread each
  python benchmarks/claims.py --report             all tables and figures, and the README's table
  python benchmarks/claims.py P2 --seeds 10 --set steps=50 lr=1e-4 --only "6 objects"    trying

§1 a call and its jobs · §2 training · §3 which step is answered · §4 answers · §5 chance ·
§6 arms in order. The claims are claims_table.py; how "seen" is decided: claims_report.py §2.

Seed n trains on scenes and in the order of seed n, what goes on from a trained arm on scenes of seed
500 + n. A best step is chosen on held-out scenes of seed 1000 + n; answers are measured on held-out
scenes of seed n, on which nothing is trained or chosen.
Seeds from 10 on are for choosing what claims_table.py §2 holds: they stay under runs/tried.
A finished arm is a file in results/claims/NAME/ and is not run again: delete it to repeat the arm.
One that was stopped begins anew. Whole answers, models and logs stay under runs/claims/NAME/SEED/.
"""
import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import claims_report
import claims_table
from claims_report import Result
from claims_table import CHANCE, GRPO, SFT, Arm, Claim, World

import data as datasets
import rewards
import training
from sources import Sample

ROOT = Path(__file__).resolve().parents[1]
TRAIN_SECONDS = 1200  # the most for training; with four times ANSWER_SECONDS, 40 minutes an arm
ANSWER_SECONDS = 300  # the most for answering, greedily and again at T = 1
TRIES = 8  # sampled answers to a scene, for pass@8
TRYING = 10  # the first seed that is for choosing alone


# §1 ─────────────────────────────────── a call and its jobs ──────────────────────────────────────
@dataclass
class Bench:
    """What all jobs of a call share."""
    base: str  # the model that arms start from
    runs: Path
    results: Path
    claims: dict[str, Claim]
    running: list[subprocess.Popen] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """An arm of a claim with a seed."""
    bench: Bench
    claim: str
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.claim} {self.arm.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Of train/ (a run), at/ (that run, up to the step that is answered), greedy/, sampled/."""
        return self.bench.runs / self.claim / str(self.seed) / self.arm.slug

    @property
    def file(self) -> Path:
        """The arm's raw rows."""
        return self.bench.results / self.claim / f"{self.arm.slug}-{self.seed}.jsonl.gz"

    @property
    def result(self) -> Result:
        """Errors: RuntimeError if the arm is not finished."""
        if not self.file.exists():
            raise RuntimeError(f"{self.name} is needed and not finished: run {self.claim} first")
        return claims_report.read(self.file)

    def other(self, name: str) -> "Job":
        """Of another arm with this seed: "grounding GRPO"; of another claim "P1/grounding GRPO"."""
        claim, _, arm_name = name.rpartition("/")
        claim = claim or self.claim
        arms = {arm.name: arm for arm in self.bench.claims[claim].arms}
        return Job(self.bench, claim, arms[arm_name], self.seed)


def start(command: list[str], log: TextIO, **options) -> subprocess.Popen:
    """A script of the repository, on one thread. options: of Popen; what it says goes to the log."""
    print("$ python", shlex.join(command), file=log, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stderr=log, **options)


def call(job: Job, command: list[str], seconds: float) -> tuple[str, bool]:
    """`start` a script, and wait for it: (its standard output, was it cut).

    After `seconds` it is told to stop, which training does after the step at hand.
    Errors: RuntimeError naming the log.
    """
    log = job.folder / "log"
    cut = False
    with log.open("a") as file:
        process = start(command, file, stdout=subprocess.PIPE, text=True)
        job.bench.running.append(process)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            cut = True
            process.terminate()
            output, _ = process.communicate()
        job.bench.running.remove(process)
    if process.returncode:
        raise RuntimeError(f"{job.name}: {command[0]} ended with {process.returncode}, see {log}")
    return output, cut


def shown(path: Path) -> str:
    """A path as one would type it in the repository's folder."""
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return str(path)


# §2 ──────────────────────────────────────── training ────────────────────────────────────────────
def scenes(world: World, seed: int) -> str:
    """The world with a seed of its own, as --data takes it."""
    return f"synthetic:{world.task}?{world.scene}&seed={seed}"


def training_command(job: Job, model: str, out: Path, *, steps: int | None = None) -> list[str]:
    """steps: the last one, if not the world's. SFT's learning rate is constant, as any of its steps
    may be the one that is answered."""
    world = job.arm.world
    data = f"synthetic:{world.task}?{world.scene}"
    if job.arm.start:  # other scenes than those that arm has seen
        data = scenes(world, 500 + job.seed)
    command = [
        job.arm.script, "--model", model, "--out", shown(out), "--seed", str(job.seed),
        "--data", data, "--think", world.think,
        "--eval-data", scenes(world, 1000 + job.seed), "--eval-samples", str(world.looked_at),
        "--warmup", "10", "--keep", "10000",
        "--no-checkpointing", "--micro-tokens", "4096", *job.arm.options]
    if job.arm.script == SFT:
        return [
            *command, "--train", "all", "--batch", str(world.prompts),
            "--lr", str(world.sft_lr), "--schedule", "constant",
            "--steps", str(steps or world.sft_steps),
            "--max-tokens", "1024", "--eval-tokens", str(world.max_tokens),
            "--save-every", str(world.steps), "--eval-every", str(world.steps)]
    often = max(1, world.steps // 10)
    return [
        *command, "--lr", str(world.lr), "--schedule", world.schedule,
        "--prompts", str(world.prompts), "--group", str(world.group),
        "--steps", str(steps or world.steps), "--max-tokens", str(world.max_tokens),
        "--reward-options", world.reward_options, "--pictures-every", "0",
        "--save-every", str(often), "--eval-every", str(5 * often)]


def train(job: Job) -> tuple[list[str], bool]:
    """Train the arm in train/: (the command, did the time limit cut it)."""
    out = job.folder / "train"
    model = job.bench.base
    if job.arm.start:
        model = model_of(job.other(job.arm.start))
    command = training_command(job, model, out)
    _, cut = call(job, command, TRAIN_SECONDS)
    if cut:  # the step that it has come to becomes the last one, and the model is written
        done = len(claims_report.read_rows(out / "metrics.jsonl"))
        again = training_command(job, model, out, steps=done)
        call(job, again, ANSWER_SECONDS)
    if not (out / "model").exists():
        raise RuntimeError(f"{job.name}: training was stopped")
    return command, cut


# §3 ─────────────────────────────── which step is answered ───────────────────────────────────────
def model_of(job: Job) -> str:
    """The model that an arm's answers are of."""
    if job.arm.at != "last":
        return shown(job.folder / "at" / "model")
    if job.arm.script:
        return shown(job.folder / "train" / "model")
    if job.arm.start:
        return model_of(job.other(job.arm.start))
    return job.bench.base


def wanted_step(arm: Arm, rows: list[dict], like: dict) -> int:
    """After how many steps of a run the arm is answered. rows: the run's metrics; like: what the
    arm `like` took, by `spent`."""
    if arm.at == "best":
        evaluated = [row for row in rows if "eval/greedy" in row]
        best = max(evaluated, key=lambda row: row["eval/greedy"])
        return best["step"] + 1
    if arm.at == "prompts":
        return like["prompts"] // arm.world.prompts
    if arm.at == "tokens":
        steps, total = 0, 0.0
        for row in rows:
            total += tokens_of(row, arm.world)
            if total > like["tokens"]:
                break
            steps += 1
        return steps
    return len(rows)


def tokens_of(row: dict, world: World) -> float:
    """Tokens of a step's answers: those that SFT imitates, or all sampled ones."""
    if "tokens" in row:
        return row["tokens"]
    return row["length"] * world.prompts * world.group


def spent(rows: list[dict], arm: Arm) -> dict:
    """What these steps of an arm took: seconds with evaluations, tokens of answers alone."""
    prompts = len(rows) * arm.world.prompts
    tokens = sum(tokens_of(row, arm.world) for row in rows)
    rollouts = 0
    if arm.script == GRPO:
        rollouts = prompts * arm.world.group
    seconds = rows[-1]["seconds/total"]
    return dict(step=len(rows), prompts=prompts, rollouts=rollouts, tokens=round(tokens),
                seconds=round(seconds, 1))


def saved_step(folder: Path, wanted: int) -> int:
    """The last step of a run that was saved up to the wanted one; the first, if that is later."""
    saved = []
    for checkpoint in folder.glob("checkpoint-*"):
        saved.append(int(checkpoint.name.removeprefix("checkpoint-")))
    if not saved:
        raise RuntimeError(f"{folder} holds no checkpoint any more: run its arm again, after "
                           "deleting its file in results/")
    return max([step for step in saved if step <= wanted], default=min(saved))


def choose_step(job: Job, trained: Job) -> dict:
    """Write at/model, of the step that the arm is answered at: what the run took up to it."""
    run, out = trained.folder / "train", job.folder / "at"
    rows = claims_report.read_rows(run / "metrics.jsonl")
    like = {}
    if job.arm.at in ("prompts", "tokens"):
        like = job.other(job.arm.like).result.about
    step = saved_step(run, wanted_step(job.arm, rows, like))
    out.mkdir()
    if step == len(rows):
        shutil.copytree(run / "model", out / "model")
    else:  # a copy of the run as it stood then, told that this was its last step
        shutil.copytree(run / f"checkpoint-{step}", out / f"checkpoint-{step}")
        shutil.copy(run / "config.json", out)
        shutil.copy(run / "metrics.jsonl", out)
        model = json.loads((run / "config.json").read_text())["model"]
        call(job, training_command(trained, model, out, steps=step), ANSWER_SECONDS)
    return spent(rows[:step], trained.arm)


# §4 ──────────────────────────────────────── answers ─────────────────────────────────────────────
def answer(job: Job, mode: str) -> tuple[list[list[float]], dict, list[str]]:
    """Held-out scenes: (the scores of each one's answers, eval.py's own metrics, the command)."""
    world, out = job.arm.world, job.folder / mode
    tries = 1 if mode == "greedy" else TRIES
    command = [
        "eval.py", "run", "--model", model_of(job), "--task", world.task,
        "--data", scenes(world, job.seed), "--samples", str(world.samples),
        "--samples-per-question", str(tries), "--max-tokens", str(world.max_tokens),
        "--think", world.think, "--prompts", "training", "--out", shown(out)]
    if job.arm.blind:
        command.append("--blind")
    printed, _ = call(job, command, ANSWER_SECONDS)
    scores: dict[str, list[float]] = {}
    for row in claims_report.read_rows(out / "predictions.jsonl"):
        scores.setdefault(row["id"], []).append(training.right(world, row))
    metrics = {}
    if mode == "greedy":
        metrics = json.loads(printed)
    return list(scores.values()), metrics, command


# §5 ───────────────────────────────────────── chance ─────────────────────────────────────────────
def fixed_answer(task: str, said: list[str], answers: list) -> str:
    """That of the texts which has the highest mean score when it is said to all these scenes.

    Why this is chance: where the question tells nothing about the scene, as here, a blind policy
    draws a from the same distribution π whatever is drawn, and scores Σ_a π(a)·E[score(a, scene)],
    which is at most max_a E[score(a, scene)]: no guessing beats the best fixed answer.
    """
    best, highest = "", 0.0
    for text in said:
        mean = fmean(rewards.correct(task, text, answer) for answer in answers)
        if mean > highest:
            best, highest = text, mean
    return best


def chance(world: World, seed: int) -> list[list[float]]:
    """Each held-out scene's score of the fixed answer: of 100 other scenes' true ones, the best on
    200 more. (Answers that are true of no scene, as a larger box, may score more yet.)"""
    others = drawn(world, 2000 + seed, 300)
    said = []
    for sample in others[:100]:
        said.append(rewards.reference(world.task, sample.answer, sample.question))
    best = fixed_answer(world.task, said, [sample.answer for sample in others[100:]])
    scores = []
    for sample in drawn(world, seed, world.samples):
        scores.append([rewards.correct(world.task, best, sample.answer)])
    return scores


def drawn(world: World, seed: int, count: int) -> list[Sample]:
    """The first held-out scenes, as eval.py takes them."""
    mix = datasets.open_data([scenes(world, seed)], split="heldout")
    return [mix.at(index) for index in range(count)]


# §6 ────────────────────────────────────── arms in order ─────────────────────────────────────────
def run_arm(job: Job) -> None:
    """Train, choose a step, answer, and keep the raw rows."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    arm, about, steps = job.arm, {"commands": []}, []
    if arm.script == CHANCE:
        claims_report.write(job.file, about, steps, chance(arm.world, job.seed), [])
        return
    trained = job
    if arm.start and not arm.script:
        trained = job.other(arm.start)
        if (arm.world, arm.at, arm.blind) == (trained.arm.world, "last", False):
            claims_report.write(job.file, **vars(trained.result))  # that policy on these scenes
            return
    if arm.script:
        command, cut = train(job)
        about["commands"].append(command)
        about["cut"] = cut
        steps = claims_report.read_rows(job.folder / "train" / "metrics.jsonl")
        about |= spent(steps, arm)
    elif arm.start:
        about |= {name: trained.result.about.get(name, 0) for name in claims_report.SPENT}
    if arm.at != "last":
        about |= choose_step(job, trained)
    greedy, about["metrics"], command = answer(job, "greedy")
    about["commands"].append(command)
    sampled, _, command = answer(job, "sampled")
    about["commands"].append(command)
    answers = claims_report.read_rows(job.folder / "greedy" / "predictions.jsonl")
    said = [row["completion"] for row in answers]  # one a scene
    claims_report.write(job.file, about, steps, greedy, sampled, said)


def run_arms(bench: Bench, claim: str, seeds: list[int], only: str) -> list[str]:
    """A claim's arms, two at a time, but for those that are finished: what went wrong."""
    jobs = []
    for seed in seeds:
        jobs += [Job(bench, claim, arm, seed) for arm in bench.claims[claim].arms]
    waiting = [job for job in jobs if only in job.arm.name and not job.file.exists()]
    running: dict[Future, Job] = {}
    troubles = []
    with ThreadPoolExecutor(2) as pool:
        try:
            while waiting or running:
                for job in ready(waiting, [*running.values()])[: 2 - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(run_arm, job)] = job
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    del running[future]
                    troubles.append(future.exception())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(bench.running):
                process.terminate()
            raise
    for seed in seeds:
        forget_checkpoints(bench.runs / claim / str(seed), [job for job in jobs if job.seed == seed])
    return [str(trouble) for trouble in troubles if trouble]


def ready(waiting: list[Job], running: list[Job]) -> list[Job]:
    """The jobs that wait for no other arm. (One whose arm has failed says so when it starts.)"""
    unfinished = {(job.seed, job.arm.name) for job in waiting + running}
    found = []
    for job in waiting:
        needed = {(job.seed, job.arm.start), (job.seed, job.arm.like)}
        if not needed & unfinished:
            found.append(job)
    return found


def forget_checkpoints(folder: Path, jobs: list[Job]) -> None:
    """Once all arms of a seed are finished, only their models stay."""
    if all(job.file.exists() for job in jobs):
        for checkpoint in folder.glob("*/*/checkpoint-*"):
            shutil.rmtree(checkpoint)


def take_lock(folder: Path) -> TextIO:
    """The lock of a claim's folder, in which two calls would train into each other's runs.

    Errors: SystemExit if another call has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sentence = f"another call runs arms in {shown(folder)}: wait for it, or end it"
        raise SystemExit(sentence) from None
    return lock


def with_changes(claim: Claim, changes: list[str]) -> Claim:
    """The claim with other numbers in all its worlds, as "lr=1e-4"."""
    types = {option.name: option.type for option in fields(World)}
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in types:
            raise SystemExit(f"--set {change}: there is no {name!r}, but {', '.join(types)}")
        values[name] = types[name](value)
    arms = [replace(arm, world=replace(arm.world, **values)) for arm in claim.arms]
    return replace(claim, arms=arms)


def main(arguments: list[str] | None = None) -> None:
    claims = claims_table.all_claims()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("claim", nargs="?", choices=claims)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", default="base", help="the model to start from [base]")
    parser.add_argument("--only", default="", help="arms whose name holds this")
    parser.add_argument("--set", nargs="+", default=[], help="settings to try, on seeds from 10 on")
    parser.add_argument("--report", action="store_true", help="tables and figures of what there is")
    given = parser.parse_args(arguments)
    runs, results = ROOT / "runs" / "claims", ROOT / "results" / "claims"
    if given.report:
        claims_report.write_all(claims, results, ROOT / "README.md")
        return
    if not given.claim:
        parser.error(f"give one of {', '.join(claims)}, or --report")
    trying = min(given.seeds) >= TRYING
    if not trying and (given.set or max(given.seeds) >= TRYING):
        parser.error(f"settings are tried on seeds from {TRYING} on; the others are for results")
    if trying:
        runs = ROOT / "runs" / "tried" / ("_".join(given.set) or "as-written")
        results = runs / "results"
        claims = {name: with_changes(claim, given.set) for name, claim in claims.items()}
    if not list((ROOT / given.base).glob("*.safetensors")):
        parser.error(f"--base {given.base} holds no model: build one (sft_coldstart.py --preset "
                     "base, then benchmarks/base_model.py publish), or name another folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children end with this process
    lock = take_lock(runs / given.claim)
    bench = Bench(given.base, runs, results, claims)
    troubles = run_arms(bench, given.claim, given.seeds, given.only)
    lock.close()
    page = claims_report.write_claim(given.claim, claims[given.claim], results)
    print(page.read_text())
    if troubles:
        raise SystemExit("\n".join(troubles))


if __name__ == "__main__":
    main()
