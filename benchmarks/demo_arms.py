"""The demo's claim and its controls: arms × seeds, written to results/demo.csv.

  python benchmarks/demo_arms.py --seeds 0 1 2

For each seed: a cold start; from its checkpoint GRPO, GRPO with a format-only and with a random reward,
and as many more seconds of cold-start training as GRPO took. Accuracy is measured on 1,000 held-out
scenes by the answer alone. Two processes each; an hour and a half for three seeds on two cores.
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = ("seed", "arm", "greedy", "sampled", "steps", "seconds", "command")


def launch(script, *options):
    """Run a script on two processes; returns the command as one would type it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [script, "--preset", "tiny", "--eval-samples", "1000", *map(str, options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*torchrun, *command], cwd=ROOT, env=env, check=True)
    return "torchrun --nproc_per_node=2 " + " ".join(command)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/arms")
    parser.add_argument("--results", default="results")
    given = parser.parse_args()
    results = ROOT / given.results
    results.mkdir(exist_ok=True)
    table, raw = results / "demo.csv", results / "demo_last_metrics.jsonl"
    for file in (table, raw):
        file.unlink(missing_ok=True)

    def record(seed, arm, folder, command):
        last = json.loads((ROOT / folder / "metrics.jsonl").read_text().splitlines()[-1])
        row = dict(seed=seed, arm=arm, greedy=round(last["eval/greedy"], 4), sampled=round(last["eval/sampled"], 4),
                   steps=last["step"] + 1, seconds=round(last["seconds/total"], 1), command=command)
        new = not table.exists()
        with open(table, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        with open(raw, "a") as file:
            print(json.dumps(dict(seed=seed, arm=arm, **last)), file=file)
        print(row, flush=True)
        return last["seconds/total"]

    for seed in given.seeds:
        cold = f"{given.runs}/{seed}/coldstart"
        shutil.rmtree(ROOT / given.runs / str(seed), ignore_errors=True)
        command = launch("sft_coldstart.py", "--seed", seed, "--out", cold, "--eval-every", 1000)
        record(seed, "cold start", cold, command)
        seconds = 0.0
        for arm, reward in (("grpo", ""), ("format only", "format_only"), ("random", "random_reward")):
            folder = f"{given.runs}/{seed}/{arm.replace(' ', '_')}"
            extra = ("--reward", f"benchmarks/control_rewards.py:{reward}") if reward else ()
            command = launch("grpo_vl.py", "--seed", seed, "--cold-start", cold, "--out", folder,
                             "--eval-every", 10_000, *extra)
            spent = record(seed, arm, folder, command)
            seconds = seconds or spent
        more = f"{given.runs}/{seed}/more_cold_start"
        shutil.copytree(ROOT / cold, ROOT / more)
        command = launch("sft_coldstart.py", "--seed", seed, "--out", more, "--eval-every", 100_000,
                         "--steps", 100_000, "--seconds", round(seconds, 1))
        record(seed, "more cold start", more, f"cp -r {cold} {more}; {command}")


if __name__ == "__main__":
    main()
