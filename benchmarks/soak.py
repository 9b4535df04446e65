"""Starts the demo's two scripts on two ranks, many times, and counts the starts that die.

  python benchmarks/soak.py --starts 50 --steps 40
  python benchmarks/soak.py --starts 50 --steps 40 --load 2      other work beside: other timings

A start is one torchrun in a fresh folder: a short cold start, then GRPO from it, in turn. Batches
are small; evaluating, saving and drawing pictures come often. Each start appends a line to --out:

date, script, command, seconds
steps       lines of metrics.jsonl, so steps that were finished
returncode  of torchrun
outcome     finished; died: a signal ended a rank; failed: an ordinary error; hung: past --patience
tail        the output's last lines, unless it finished

The file grows over repeated calls. The summary at the end covers all of it. The bound beside the
deaths: were the rate higher, so few deaths in so many steps would have a chance below 5 %. The
exit status is 1 if a start of this call did not finish.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from math import exp, factorial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
COLD_STEPS = 10
OFTEN = ["--eval-every", "20", "--eval-samples", "2", "--save-every", "20"]
SMALL = ["--prompts", "2", "--group", "2", "--max-tokens", "8", "--pictures-every", "20"]
BUSY = "while True: sorted(range(200_000), key=str)"  # allocates and frees, as neighbours do
TAIL = 120  # lines of output that a bad start leaves; torchrun's own report takes half of them


def cold_start_command(folder: str, seed: int) -> list[str]:
    sizes = ["--steps", str(COLD_STEPS), "--seed", str(seed)]
    return ["sft_coldstart.py", "--preset", "tiny", "--out", f"{folder}/coldstart", *sizes, *OFTEN]


def grpo_command(folder: str, seed: int, steps: int) -> list[str]:
    folders = ["--cold-start", f"{folder}/coldstart", "--out", f"{folder}/grpo"]
    sizes = ["--steps", str(steps), "--seed", str(seed), *SMALL]
    return ["grpo_vl.py", "--preset", "tiny", *folders, *sizes, *OFTEN]


def launch(command: list[str], patience: float) -> tuple[int, str, bool]:
    """Run a script under torchrun: (return code, all output, did it hang)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, f"--nproc_per_node={RANKS}", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=patience)
        return process.returncode, output, False
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, by force after 30 seconds
        output, _ = process.communicate()
        return process.returncode, output, True


def outcome_of(returncode: int, output: str, hung: bool) -> str:
    """What the output says about a start's end.

    torchrun itself ends with 1 after any trouble. Its report gives each rank's exit code, which is
    −n after signal n; −15 is what it sends to the ranks that are left.
    """
    if hung:
        return "hung"
    if returncode == 0:
        return "finished"
    rank_codes = {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", output)}
    by_signal = {code for code in rank_codes if code < 0} - {-15}
    if returncode < 0 or by_signal or "Fatal Python error" in output:
        return "died"
    return "failed"


def count_steps(run_folder: Path) -> int:
    log = run_folder / "metrics.jsonl"
    if not log.exists():
        return 0
    return len(log.read_text().splitlines())


def last_lines(output: str) -> list[str]:
    """The end of the output; of a progress bar's line only what was shown last."""
    lines = [line.rpartition("\r")[2] for line in output.rstrip().split("\n")]
    return lines[-TAIL:]


def one_start(command: list[str], run_folder: Path, patience: float) -> dict:
    """Run the command; the line to append."""
    began = time.perf_counter()
    returncode, output, hung = launch(command, patience)
    row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "script": command[0],
        "command": f"torchrun --standalone --nproc_per_node={RANKS} {shlex.join(command)}",
        "steps": count_steps(run_folder),
        "returncode": returncode,
        "outcome": outcome_of(returncode, output, hung),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if row["outcome"] != "finished":
        row["tail"] = last_lines(output)
    return row


def record(row: dict, out: Path) -> None:
    """Append the line; show on the terminal how the start went."""
    with out.open("a") as file:
        print(json.dumps(row), file=file)
    shown = f"{row['script']}: {row['outcome']}, {row['steps']} steps, {row['seconds']} s"
    print(shown, flush=True)
    for line in row.get("tail", []):
        print(f"    {line}", flush=True)


def soak(starts: int, steps: int, patience: float, out: Path) -> int:
    """`starts` pairs of cold start and GRPO; how many starts did not finish."""
    bad = 0
    seed = len(read_rows(out))  # another seed at each call
    for number in range(starts):
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            commands = {
                "coldstart": cold_start_command(folder, seed + number),
                "grpo": grpo_command(folder, seed + number, steps),
            }
            for name, command in commands.items():
                row = one_start(command, Path(folder) / name, patience)
                record(row, out)
                if row["outcome"] != "finished":
                    bad += 1
                    break
    return bad


@contextlib.contextmanager
def busy(processes: int):
    """Other work beside, as long as the context lasts."""
    workers = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def read_rows(out: Path) -> list[dict]:
    if not out.exists():
        return []
    return [json.loads(line) for line in out.read_text().splitlines()]


def chance_of_at_most(deaths: int, expected: float) -> float:
    # P(X ≤ k) = Σ_{i ≤ k} λ^i · e^(−λ) / i!, deaths being rare and independent
    return sum(expected**i * exp(-expected) / factorial(i) for i in range(deaths + 1))


def upper_bound(deaths: int) -> float:
    """The expected number of deaths above which at most so many have a chance below 5 %.

    No death: 3.00, so a rate below 3 / steps.
    """
    low, high = 0.0, 4.0 * deaths + 4.0
    for _ in range(60):
        middle = (low + high) / 2
        if chance_of_at_most(deaths, middle) > 0.05:
            low = middle
        else:
            high = middle
    return high


def summary(rows: list[dict]) -> str:
    """What the file says, one line a script and one over all."""
    lines = []
    scripts = sorted({row["script"] for row in rows})
    for script in [*scripts, "all"]:
        chosen = [row for row in rows if script in (row["script"], "all")]
        steps = sum(row["steps"] for row in chosen)
        counts = {
            name: sum(row["outcome"] == name for row in chosen)
            for name in ("died", "hung", "failed")
        }
        line = f"{script}: {len(chosen)} starts, {steps} steps"
        for name, count in counts.items():
            line += f", {count} {name}"
        if steps:
            bound = upper_bound(counts["died"])
            line += f"; at most one death in {steps / bound:.1f} steps"
            line += f", in {len(chosen) / bound:.1f} starts (95 %)"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=10, help="pairs of cold start and GRPO")
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps a start")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside")
    parser.add_argument("--patience", type=float, default=3600, help="seconds until a start hung")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "soak.jsonl")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with busy(given.load):
        bad = soak(given.starts, given.steps, given.patience, given.out)
    print(summary(read_rows(given.out)))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
