"""How many steps of SFT take as long as GRPO's: by it claims_table.py's `sft_steps` were chosen.

  python benchmarks/claims_pace.py P1 P2     a line a task, also in results/claims_pace.jsonl

A clock would give SFT more steps where GRPO happened to run beside other work, and each machine its
own result. So the two are timed once, at the same time and on a thread each (what slows the machine
slows both), on a seed that is for choosing; the number of steps is fixed by that. What held-out
scenes cost is left out on both sides.
"""
import argparse
import json
import shutil
import signal
import subprocess
from pathlib import Path

import claims
import claims_report
import claims_table
from claims import ROOT, Bench, Job

STEPS = 20  # of GRPO
WARM_UP = 2  # steps that are not timed
RAW = ROOT / "results" / "claims_pace.jsonl"


def start_training(job: Job, steps: int) -> subprocess.Popen:
    """Train the arm for so many steps, without held-out scenes."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    command = claims.training_command(job, job.bench.base, job.folder / "train", steps=steps)
    with (job.folder / "log").open("w") as log:
        return claims.start([*command, "--eval-every", "0"], log, stdout=log)


def seconds_a_step(folder: Path) -> float:
    """The mean over a run's steps but the first ones."""
    rows = claims_report.read_rows(folder / "metrics.jsonl")
    took = rows[-1]["seconds/total"] - rows[WARM_UP - 1]["seconds/total"]
    return took / (len(rows) - WARM_UP)


def measure(grpo: Job, sft: Job) -> dict:
    """SFT trains until GRPO's steps are done."""
    ours, beside = start_training(grpo, STEPS), start_training(sft, 10**6)
    try:
        failed = ours.wait()
    finally:  # Ctrl-C, too, must not leave it at work
        beside.terminate()  # it ends after the step at hand
    if failed or beside.wait():
        raise SystemExit(f"training failed: see {grpo.folder}/log and {sft.folder}/log")
    slow, quick = seconds_a_step(grpo.folder / "train"), seconds_a_step(sft.folder / "train")
    return {
        "arm": grpo.name,
        "scene": grpo.arm.world.scene,
        "GRPO's seconds a step": round(slow, 4),
        "SFT's": round(quick, 4),
        "SFT's steps for one of GRPO": round(slow / quick, 2),
        "SFT's steps for GRPO's": round(grpo.arm.world.steps * slow / quick),
    }


def main() -> None:
    tables = claims_table.all_claims()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("claims", nargs="+", choices=tables)
    parser.add_argument("--base", default="base", help="the model to start from [base]")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children end with this process
    bench = Bench(given.base, ROOT / "runs" / "tried" / "pace", ROOT / "runs" / "tried", tables)
    for name in given.claims:
        arms = {arm.name: arm for arm in tables[name].arms}
        for arm in tables[name].arms:
            if arm.what != "SFT":
                continue
            grpo = Job(bench, name, arms[f"{arm.where} GRPO"], claims.TRYING)
            row = measure(grpo, Job(bench, name, arm, claims.TRYING))
            print(json.dumps(row), flush=True)
            with RAW.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
