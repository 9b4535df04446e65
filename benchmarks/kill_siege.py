"""kill -9 at random moments, over and over: every restart must go on, and end as if nothing had happened.

    python benchmarks/kill_siege.py --kills 50 --ranks 1        minutes on two cores; one JSON line
    python benchmarks/kill_siege.py --kills 20 --ranks 2 --window 15      two ranks start more slowly
    python benchmarks/kill_siege.py --kills 20 --script sft_coldstart.py

A run that saves at every step (so that saves are hit too) is started, killed after a random time, and
started again, until there were so many kills; a run that finishes in between is compared, and the next begins
from nothing. Compared: metrics.jsonl holds every step once, no half-written checkpoint is left, and weights and
metrics equal those of a run that nobody killed, bit for bit. Processes are forked from one that has imported
everything, so that a start costs a tenth of a second instead of ten. With two ranks, one or both are killed.
"""
import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo_vl
import sft_coldstart

SCRIPTS = {"grpo_vl.py": grpo_vl, "sft_coldstart.py": sft_coldstart}
WORLD = "synthetic:grounding?size=56x56&distractors=0-1"


def start(script, arguments, ranks, log):
    """Fork `ranks` processes that run the script's main; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            torch.set_num_threads(1)
            try:
                SCRIPTS[script].main(arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return children


def finish(children):
    """The exit codes; a signal as a negative number."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def steps_done(folder):
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def compare(whole, killed, steps):
    """What must hold of a run that was killed, now that it has finished, beside one that was not."""
    rows = {run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (whole, killed)}
    weights = {run: load_file(run / "model/model.safetensors") for run in (whole, killed)}

    def timeless(run):
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows[run]]

    return {
        "each_step_once": [row["step"] for row in rows[killed]] == list(range(steps)),
        "no_half_written_left": not any(killed.glob("*.partial")),
        "metrics_equal_bitwise": timeless(whole) == timeless(killed),
        "weights_equal_bitwise": all(torch.equal(weights[whole][n], weights[killed][n]) for n in weights[whole]),
    }


def siege(script, kills, ranks, steps, seed, window, folder):
    rng, log = random.Random(seed), open(folder / "log.txt", "a")  # noqa: SIM115
    sizes = ["--prompts", "2", "--group", "2", "--max-tokens", "6", "--pictures-every", "0"]
    if script == "sft_coldstart.py":
        sizes = ["--batch", "4"]
    arguments = ["--preset", "tiny", "--data", WORLD, "--steps", str(steps), "--save-every", "1", "--keep", "2",
                 "--eval-every", "0", "--warmup", "2", *sizes]
    if script == "grpo_vl.py":
        arguments += ["--cold-start", "", "--scale", "none", "--overlong", "keep",
                      "--reward", str(Path(__file__).parent / "control_rewards.py") + ":by_text"]
    whole, killed = folder / "whole", folder / "killed"
    assert finish(start(script, [*arguments, "--out", str(whole)], ranks, log)) == [0] * ranks
    count, starts, in_save, hit_steps, checks = 0, 0, 0, [], []
    while count < kills:
        children = start(script, [*arguments, "--out", str(killed)], ranks, log)
        starts += 1
        time.sleep(rng.uniform(0.05, window))
        victims = children if rng.random() < 0.5 else [rng.choice(children)]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.05)
        in_save += any(killed.glob("*.partial"))
        for survivor in set(children) - set(victims):  # what torchrun does when one rank is gone
            os.kill(survivor, signal.SIGTERM)
            time.sleep(0.2)
            os.kill(survivor, signal.SIGKILL)
        codes = finish(children)
        alone = len(victims) == ranks  # a survivor may fail when it misses the other one
        assert not alone or max(codes) <= 0, f"a rank failed by itself: {codes}; see {folder}/log.txt"
        if codes == [0] * ranks:  # it has finished, faster than the kill: compare, and begin from nothing
            checks.append(compare(whole, killed, steps))
            shutil.rmtree(killed)
            continue
        count += 1
        hit_steps.append(steps_done(killed))
    assert finish(start(script, [*arguments, "--out", str(killed)], ranks, log)) == [0] * ranks, "the last start failed"
    checks.append(compare(whole, killed, steps))
    return {
        "script": script, "ranks": ranks, "kills": count, "starts": starts + 2, "seed": seed, "steps": steps, "window": window,
        "kills_that_left_a_half_written_folder": in_save, "different_steps_at_a_kill": len(set(hit_steps)),
        "finished_runs_compared": len(checks),
        **{name: all(check[name] for check in checks) for name in checks[0]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=SCRIPTS, default="grpo_vl.py")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=float, default=5.0, help="seconds after a start within which to kill")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="siege-"))
    result = siege(given.script, given.kills, given.ranks, given.steps, given.seed, given.window, folder)
    print(json.dumps(result))
    good = all(value for name, value in result.items() if isinstance(value, bool))
    if not good:
        sys.exit(f"see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
