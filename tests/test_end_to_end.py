"""The commands as a user types them, on the tiny stand-in with a handful of steps."""
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

QUICK = ["--steps", "2", "--prompts", "2", "--group", "2", "--max-tokens", "6", "--eval-samples", "4",
         "--eval-every", "2", "--pictures-every", "1", "--save-every", "1", "--schedule", "constant"]


def run(*command, cwd=ROOT):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cold_start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "coldstart"
    run("sft_coldstart.py", "--preset", "tiny", "--out", folder, "--steps", 2, "--batch", 4, "--eval-samples", 4,
        "--eval-every", 2)
    return folder


def test_cold_start_then_grpo_under_torchrun(cold_start, tmp_path):
    assert [m["step"] for m in metrics(cold_start)] == [0, 1]
    out = tmp_path / "grpo"
    run("-m", "torch.distributed.run", "--nproc_per_node=2", "grpo_vl.py", "--preset", "tiny", "--cold-start",
        cold_start, "--out", out, *QUICK)
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1] and "eval/greedy" in rows[1]
    assert 0 <= rows[0]["before/greedy"] <= 1 and "eval/greedy" not in rows[0]
    assert {"config.json", "metrics.jsonl", "samples", "model", "checkpoint-1", "checkpoint-2"} == {
        path.name for path in out.iterdir()}
    pictures = sorted((out / "samples").glob("*.png"), key=lambda path: len(path.name))  # -best.png behind
    texts = json.loads((out / "samples" / "step-1.json").read_text())
    assert Image.open(pictures[0]).size == (84, 84)  # as the model saw it
    assert Image.open(pictures[-1]).size[0] >= 400 and pictures[-1].name.endswith("-best.png")
    assert {"id", "task", "question", "text", "answer", "reward"} <= set(texts[0])
    # one more step from the checkpoint, with the saved configuration
    run("grpo_vl.py", "--config", out / "config.json", "--steps", "3")
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]


def test_a_missing_cold_start_is_announced_and_run(tmp_path):
    """Stopped as soon as the cold start has taken its first step."""
    cold = tmp_path / "cold"
    command = ["grpo_vl.py", "--preset", "tiny", "--cold-start", str(cold), "--out", str(tmp_path / "grpo")]
    process = subprocess.Popen([sys.executable, "-u", *command, *QUICK], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    said = ""
    for line in process.stdout:  # the progress bar's carriage returns count as line ends
        said += line
        if (cold / "metrics.jsonl").exists() and (cold / "metrics.jsonl").read_text():
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert f"no cold start in {cold}: running it first" in said
    assert json.loads((cold / "metrics.jsonl").read_text().splitlines()[0])["loss"] > 1


def test_training_on_a_file_of_mixed_rows(cold_start, tmp_path):
    """One image, two images, none; paths relative to the file."""
    Image.new("RGB", (90, 60), "red").save(tmp_path / "a.png")
    Image.new("RGB", (60, 90), "blue").save(tmp_path / "b.png")
    rows = [
        {"task": "grounding", "image": "a.png", "question": "red", "answer": [0, 0, 90, 60]},
        {"task": "choice", "images": ["a.png", "b.png"], "question": "Which is red? A. left B. right", "answer": "A"},
        {"task": "math", "question": "What is 2 + 3?", "answer": "5"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    run("-m", "torch.distributed.run", "--nproc_per_node=2", "grpo_vl.py", "--preset", "tiny", "--cold-start",
        cold_start, "--out", out, *QUICK, "--prompts", "3", "--data", tmp_path / "data.jsonl", "--think",
        "--eval-every", "0")
    assert {"reward/format", "reward/iou", "reward/correct", "reward/think"} <= set(metrics(out)[0])


def test_a_wrong_row_stops_with_file_and_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"task": "math", "question": "1", "answer": "1"}\n{"task": "maths"}\n')
    done = subprocess.run(
        [sys.executable, "grpo_vl.py", "--model", "tiny", "--data", str(tmp_path / "data.jsonl"), "--out",
         str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "data.jsonl:2" in done.stderr
