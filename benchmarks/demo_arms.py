"""The demo's claim and its controls: arms × seeds, written to results/demo.jsonl.

  python benchmarks/demo_arms.py --seeds 0 1 2      two processes of one thread at a time

From base/, for each seed: GRPO as in `make demo`; GRPO with a format-only and with a random reward;
and supervised training on the same prompts for as many seconds as GRPO took. Each is measured on
1,000 scenes that none of them used. An arm that has finished is not run again. What a step logged
is kept as results/demo/ARM-SEED.jsonl, and `python eval.py figure` draws it.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRPO = ("grpo_vl.py", "--preset", "tiny")
SUPERVISED = ("sft_coldstart.py", "--preset", "supervised")
CONTROL = "benchmarks/control_rewards.py"
ARMS = {
    "grpo": GRPO,
    "format_only": (*GRPO, "--reward", f"{CONTROL}:format_only", "--reward-options", "{}"),
    "random_reward": (*GRPO, "--reward", f"{CONTROL}:random_reward", "--reward-options", "{}"),
    "supervised": SUPERVISED,
}


def start(*words: str) -> None:
    """Run a script of the project by one process of one thread; an error ends this one too."""
    places = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=env, check=True)


def run_arm(name: str, seed: int, given, *more: str) -> float:
    """Train and measure one arm, unless it is there already; returns its seconds of training."""
    folder = ROOT / given.runs / str(seed) / name
    row_file = folder / "measured.json"
    if not row_file.exists():
        command = [*ARMS[name], "--seed", str(seed), *more, *given.options]
        start(*command, "--out", str(folder))
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        row = dict(arm=name, seed=seed, steps=last["step"] + 1, seconds=last["seconds/total"],
                   command=" ".join(("python", *command)))
        start("benchmarks/base_model.py", "one", str(folder / "model"), given.world,
              "--scenes", str(given.scenes), "--out", str(folder / "accuracy.json"))
        row |= json.loads((folder / "accuracy.json").read_text())
        row_file.write_text(json.dumps(row))
    row = json.loads(row_file.read_text())
    print(row, flush=True)
    return row["seconds"]


def run_seed(seed: int, given, arms: tuple[str, str]) -> None:
    """Two arms one after the other; supervised training has the seconds of the arm before it."""
    seconds = 0.0
    for name in arms:
        more = ("--seconds", str(round(seconds, 1))) if name == "supervised" else ()
        seconds = run_arm(name, seed, given, *more)


def write_results(given) -> None:
    """results/demo.jsonl, the base's row first, and each arm's steps beside it."""
    results = ROOT / "results" / "demo"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    rows = [json.loads((ROOT / given.runs / "base.json").read_text()) | {"arm": "base"}]
    for seed in given.seeds:
        for name in ARMS:
            folder = ROOT / given.runs / str(seed) / name
            rows.append(json.loads((folder / "measured.json").read_text()))
            shutil.copy(folder / "metrics.jsonl", results / f"{name}-{seed}.jsonl")
    lines = [json.dumps(row) + "\n" for row in rows]
    (ROOT / "results" / "demo.jsonl").write_text("".join(lines))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tiny import WORLD

    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/arms")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--world", default=WORLD, help="what is asked when measuring")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more, of all arms")
    given = parser.parse_args()
    base = ROOT / given.runs / "base.json"
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        start("benchmarks/base_model.py", "one", "base", given.world,
              "--scenes", str(given.scenes), "--out", str(base))
    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for seed in given.seeds:
            for arms in (("grpo", "supervised"), ("format_only", "random_reward")):
                jobs.append(pool.submit(run_seed, seed, given, arms))
        for job in jobs:
            job.result()
    write_results(given)


if __name__ == "__main__":
    main()
