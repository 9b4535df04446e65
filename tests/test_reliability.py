"""A run that is killed, told to stop, out of disk, fed bad numbers: what survives and what is said."""
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from ranks import SMALL, full_weights, make_run
from small import check

import data as datasets
import grpo_vl
import run_folder
import sampler
from options import data_options

ROOT = Path(__file__).parent.parent
FAST = ["--preset", "tiny", "--cold-start", "", "--prompts", "2", "--group", "2", "--max-tokens", "6", "--eval-every",
        "0", "--pictures-every", "0", "--save-every", "1000", "--schedule", "constant"]


def start(out, *options, ranks=1, script="grpo_vl.py"):
    launch = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    return subprocess.Popen([*launch, script, *FAST, "--out", str(out), *options], cwd=ROOT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_steps(folder, count, process, seconds=90):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (folder / "metrics.jsonl").exists() and len(steps_of(folder)) >= count:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("no steps were made")


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def workers_of(process):
    """The processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


# ── told to stop ──
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_completed_step_and_exits_0(tmp_path, kind):
    run = start(tmp_path / "run", "--steps", "100000")
    wait_for_steps(tmp_path / "run", 3, run)
    run.send_signal(kind)
    assert run.wait(20) == 0
    steps = steps_of(tmp_path / "run")
    (saved,) = run_folder.find_checkpoints(tmp_path / "run")
    assert saved.name == f"checkpoint-{len(steps)}" and steps == list(range(len(steps)))
    run = start(tmp_path / "run", "--steps", str(len(steps) + 2))
    assert run.wait(60) == 0 and steps_of(tmp_path / "run") == list(range(len(steps) + 2))


def test_a_signal_to_torchrun_saves_and_leaves_no_worker(tmp_path):
    run = start(tmp_path / "run", "--steps", "100000", ranks=2)
    wait_for_steps(tmp_path / "run", 3, run)
    workers = workers_of(run)
    run.send_signal(signal.SIGTERM)
    run.wait(40)
    (saved,) = run_folder.find_checkpoints(tmp_path / "run")
    assert saved.name == f"checkpoint-{len(steps_of(tmp_path / 'run'))}"
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_signal_to_one_rank_stops_both_with_exit_0(tmp_path):
    """The ranks agree: torchrun itself ends with 0 as all its workers do."""
    run = start(tmp_path / "run", "--steps", "100000", ranks=2)
    wait_for_steps(tmp_path / "run", 3, run)
    os.kill(workers_of(run)[1], signal.SIGTERM)
    assert run.wait(40) == 0, run.stdout.read()
    assert len(run_folder.find_checkpoints(tmp_path / "run")) == 1


def test_a_rollout_in_progress_is_abandoned(alone, tmp_path):
    """The flag rises while a rollout of a million rounds has begun; weights and cursor stay where they were."""
    run = make_run(alone, out=str(tmp_path))
    before, asked = full_weights(run.policy), []

    def interrupted():
        asked.append(1)
        return len(asked) > 5  # in the fifth round or so

    run.sampler.interrupted = interrupted
    with pytest.raises(sampler.Interrupted):
        grpo_vl.train_step(run, 0)
    assert len(asked) < 10
    after = full_weights(run.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_second_signal_ends_the_process_at_once():
    program = ("import training, time\nstopped = training.watch_signals()\nprint('ready', flush=True)\n"
               "while True:\n    time.sleep(0.1)\n    print(stopped(), flush=True)")
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n" and child.stdout.readline() == "False\n"
    child.send_signal(signal.SIGTERM)
    while child.stdout.readline() != "True\n":
        pass
    assert child.poll() is None  # the first one was only noted
    child.send_signal(signal.SIGTERM)
    assert child.wait(5) == -signal.SIGTERM


def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path):
    run = start(tmp_path / "run", "--steps", "100000", ranks=2)
    wait_for_steps(tmp_path / "run", 2, run)
    workers = workers_of(run)
    os.kill(workers[1], signal.SIGKILL)
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert re.search(r"rank\s*:?\s*1\b", said) and "SIGKILL" in said


# ── checkpoints ──
def train_and_save(ranks, folder):
    """Two steps, saved: the full weights and, of each parameter, AdamW's two moments and its step."""
    run = make_run(ranks, optimizer="adamw", lr=1e-3, out=folder)
    for step in range(2):
        grpo_vl.train_step(run, step)
    run_folder.save_checkpoint(Path(folder), run.policy, run.optimizer, {"step": 2, "cursor": run.cursor}, keep=1)
    states = [run.optimizer.state[p] for p in run.policy.parameters()]
    moments = [(s["exp_avg"].full_tensor(), s["exp_avg_sq"].full_tensor(), s["step"]) for s in states]
    return full_weights(run.policy), moments


def test_resume_at_another_number_of_ranks(alone, pair, tmp_path, capfd):
    """Two ranks save; one rank finds the same weights and the same AdamW state."""
    (weights, moments), _ = pair.run("test_reliability.train_and_save", folder=str(tmp_path))
    run = make_run(alone, optimizer="adamw", out=str(tmp_path))
    state = run_folder.resume(run.config, run.policy, run.optimizer)
    assert (state["step"], state["cursor"]) == (2, 8)
    here = full_weights(run.policy)
    assert all(torch.equal(here[name], weights[name]) for name in weights)
    found = [run.optimizer.state[p] for p in run.policy.parameters()]
    assert len(found) == len(moments)
    for one, (first, second, step) in zip(found, moments):
        assert torch.equal(one["exp_avg"].full_tensor(), first) and torch.equal(one["exp_avg_sq"].full_tensor(), second)
        assert one["step"] == step
    assert "saved by 2 ranks, here are 1" in capfd.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(alone, tmp_path):
    run = make_run(alone, optimizer="adamw", out=str(tmp_path))
    run_folder.save_checkpoint(tmp_path, run.policy, run.optimizer, {"step": 1, "cursor": 4}, 2)
    other = make_run(alone, optimizer="adamw", out=str(tmp_path), model="tiny-untied")
    with pytest.raises(SystemExit, match=r"checkpoint-1 is of another architecture: model.lm_head.weight is "
                                                 r"\[\d+, 128\] in --model and None there"):
        run_folder.resume(other.config, other.policy, other.optimizer)


def test_a_folder_with_checkpoints_is_not_begun_anew(alone, tmp_path):
    run = make_run(alone, optimizer="adamw", out=str(tmp_path), resume="never")
    run_folder.save_checkpoint(tmp_path, run.policy, run.optimizer, {"step": 1, "cursor": 4}, 2)
    (tmp_path / "config.json").write_text(json.dumps(asdict(run.config)))
    with pytest.raises(SystemExit, match=r"--resume never, but .*checkpoint-1 exists"):
        run_folder.claim(run.config)


def test_disk_full_while_saving_keeps_the_last_checkpoint(alone, tmp_path):
    """No file may grow over 100 kB: writing fails as on a full disk, with EFBIG in ENOSPC's place."""
    run = make_run(alone, optimizer="adamw", out=str(tmp_path))
    run_folder.save_checkpoint(tmp_path, run.policy, run.optimizer, {"step": 1, "cursor": 4}, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SystemExit, match="checkpoint-2 could not be written, earlier checkpoints are whole"):
            run_folder.save_checkpoint(tmp_path, run.policy, run.optimizer, {"step": 2, "cursor": 8}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert run_folder.load_checkpoint(tmp_path / "checkpoint-1", run.policy, run.optimizer)["step"] == 1


def test_what_was_logged_after_the_checkpoint_is_done_again(alone, tmp_path):
    run = make_run(alone, optimizer="adamw", out=str(tmp_path))
    run_folder.save_checkpoint(tmp_path, run.policy, run.optimizer, {"step": 2, "cursor": 8}, 2)
    rows = [json.dumps({"step": step}) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 4, "rew')  # killed in the middle of a line
    assert run_folder.resume(run.config, run.policy, run.optimizer)["step"] == 2
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize("log, unlogged", [('{"step": 0}\n{"step": 1}\n', False), ('{"step": 0}\n', True),
                                           ('{"step": 0}\n{"step": 1, "rew', True)])
def test_a_step_saved_before_its_evaluation_is_logged_once(alone, tmp_path, log, unlogged):
    """Killed after the checkpoint: before, in the middle of, or after the step's line in metrics.jsonl."""
    run = make_run(alone, optimizer="adamw", out=str(tmp_path), steps=3, lr=1e-4)
    state = {"step": 2, "cursor": 8, "unlogged": {"step": 1, "reward": 0.5, "grad_norm": 1.0}}
    run_folder.save_checkpoint(tmp_path, run.policy, run.optimizer, state, 2)
    (tmp_path / "metrics.jsonl").write_text(log)
    assert grpo_vl.train(run)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and ("reward" in rows[1]) == unlogged


# ── numbers gone bad ──
def poison(monkeypatch, when):
    """A loss that is not a number in those calls, counted from 0, for which when(call) holds."""
    calls, policy_loss = [], grpo_vl.policy_loss

    def poisoned(*arguments, **options):
        calls.append(1)
        loss, stats = policy_loss(*arguments, **options)
        return (loss * math.nan if when(len(calls) - 1) else loss), stats

    monkeypatch.setattr(grpo_vl, "policy_loss", poisoned)


def test_steps_without_a_finite_gradient_are_skipped_named_and_end_the_run(alone, tmp_path, monkeypatch):
    poison(monkeypatch, lambda call: True)
    run = make_run(alone, optimizer="adamw", out=str(tmp_path), steps=9, max_bad_steps=2, micro_tokens=10**6)
    before = full_weights(run.policy)
    ids = [run.data[draw].id for draw in range(4, 8)]  # the second step's samples
    with pytest.raises(SystemExit, match=r"2 steps in a row without a finite gradient.*synthetic-grounding"):
        grpo_vl.train(run)
    after = full_weights(run.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[1]["skipped_samples"] == ids and rows[1]["grad_norm"] is None


def test_one_good_step_starts_the_count_anew(alone, tmp_path, monkeypatch):
    poison(monkeypatch, lambda call: call % 2 == 0)  # one micro-batch a step
    run = make_run(alone, optimizer="adamw", out=str(tmp_path), steps=4, max_bad_steps=2, lr=1e-4, micro_tokens=10**6)
    grpo_vl.train(run)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["skipped_samples" in row for row in rows] == [True, False, True, False]


@pytest.mark.parametrize("changes", [dict(group=1), dict(group=1, baseline="leave_one_out"), dict(max_tokens=1)])
def test_one_completion_or_one_token_gives_numbers(alone, changes):
    metrics = grpo_vl.train_step(make_run(alone, **changes), 0)
    assert all(math.isfinite(value) for value in metrics.values())


# ── no hangs ──
@pytest.mark.parametrize("fault", ["reward", "data"])
def test_an_exception_on_one_rank_ends_both(tmp_path, fault):
    """The others would wait for it forever; torchrun ends them, and what went wrong is in the output."""
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef reward(*arguments, **options):\n"
        "    return 0.5 if os.environ['RANK'] == '0' else {}['no such key']\n")
    options = ["--reward", f"{tmp_path}/mine.py:reward"]
    if fault == "data":  # rank 1 has every second draw, and draws this row
        bad_data(tmp_path)
        good, broken = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[:2]]
        (tmp_path / "two.jsonl").write_text("\n".join(json.dumps(row) for row in (good, broken)))
        options = ["--data", str(tmp_path / "two.jsonl")]
    run = start(tmp_path / "run", "--steps", "3", *options, ranks=2)
    said, _ = run.communicate(timeout=90)
    assert run.returncode != 0
    assert ("no such key" in said) if fault == "reward" else re.search(r"two.jsonl:2: .*broken.png is unusable", said)


# ── seen while it runs ──
def test_the_log_is_flushed_and_warns(alone, tmp_path, capsys):
    config = grpo_vl.Config(**SMALL | dict(out=str(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text("")
    log = run_folder.RunLog(config)
    for step in range(10):
        log.add({"step": step, "truncated": 1.0, "loss": math.nan})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step + 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {
        "step": 0, "truncated": 1.0, "loss": None}
    assert "step 9: truncated is 1, at first 1: answers are cut" in capsys.readouterr().err


def test_wandb_gets_each_step(tmp_path, monkeypatch):
    """A stand-in for the package: what it is called with is what a tracker would get."""
    seen = []

    class Wandb:
        @staticmethod
        def init(**options):
            seen.append(options)
            return Wandb

        log = staticmethod(seen.append)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    config = grpo_vl.Config(**SMALL | dict(out=str(tmp_path), log="wandb"))
    (tmp_path / "metrics.jsonl").write_text("")
    run_folder.RunLog(config).add({"step": 0, "reward": 0.5})
    assert seen[0]["config"]["group"] == 3 and seen[1:] == [{"step": 0, "reward": 0.5}]


def test_tensorboard_gets_the_numbers_of_each_step(tmp_path, monkeypatch):
    """A stand-in for torch.utils.tensorboard, whose package may be missing."""
    seen = []

    class Board:
        class SummaryWriter:
            def __init__(self, folder):
                self.folder = folder

            def add_scalar(self, *arguments):
                seen.append((self.folder, *arguments))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Board)
    config = grpo_vl.Config(**SMALL | dict(out=str(tmp_path), log="tensorboard"))
    (tmp_path / "metrics.jsonl").write_text("")
    run_folder.RunLog(config).add({"step": 7, "reward": 0.5, "skipped_samples": ["a"]})
    assert seen == [(str(tmp_path), "step", 7, 7), (str(tmp_path), "reward", 0.5, 7)]


def test_same_seed_same_run(alone, tmp_path):
    def rows(name):
        run = make_run(alone, optimizer="adamw", out=str(tmp_path / name), lr=1e-3)
        grpo_vl.train(run)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]

    assert rows("a") == rows("b") and len(rows("a")) == 3


# ── nothing runs that should not ──
def test_no_code_is_run_from_data_or_weights():
    forbidden = r"trust_remote_code|\bpickle\.|(?<!\.)\beval\(|\bexec\(|shell=True|os\.system|torch\.load|use_safetensors=False"
    for script in ROOT.glob("*.py"):
        found = re.findall(forbidden, script.read_text())
        assert not found, f"{script.name}: {found}"
    assert "use_safetensors=True" in (ROOT / "qwen_vl.py").read_text()


def test_weights_in_a_pickle_are_refused(tmp_path):
    """A checkpoint folder with pytorch_model.bin alone: from_pretrained must not unpickle it."""
    import qwen_vl

    model, tokenizer = qwen_vl.load("tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        qwen_vl.load(str(tmp_path))


# ── --check and --skip-bad ──
def bad_data(folder):
    picture = "a.png"
    from PIL import Image

    Image.new("RGB", (56, 56), "white").save(folder / picture)
    (folder / "broken.png").write_bytes((folder / picture).read_bytes()[:60])
    row = {"task": "grounding", "question": "x", "answer": [1, 1, 9, 9], "image": picture}
    rows = [row, row | {"image": "broken.png"}, row | {"answer": "none"}, row]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("script", ["grpo_vl.py", "sft_coldstart.py"])
def test_check_lists_every_fault_with_its_line(tmp_path, script):
    spec = bad_data(tmp_path)
    command = [sys.executable, script, "--data", spec, "--check", "--out", str(tmp_path / "run")]
    run = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = run.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line.startswith(spec)]  # unreadable rows, then images
    assert run.returncode == 1 and [line.split(": ")[0] for line in lines] == [f"{spec}:3", f"{spec}:2"]
    assert not (tmp_path / "run").exists()


def test_check_of_a_file_that_is_not_there_is_one_fault(tmp_path):
    (fault,) = check([f"{tmp_path}/none.jsonl"])
    assert fault.startswith(f"in '{tmp_path}/none.jsonl': ") and "No such file" in fault


def test_bad_rows_stop_a_run_unless_allowed(alone, tmp_path):
    spec = bad_data(tmp_path)
    how = data_options(grpo_vl.Config(**SMALL))
    with pytest.raises(datasets.DataError, match=f"1 bad rows; .*\n{spec}:3: the true answer in grounding: it must be JSON"):
        datasets.open_data([spec], **how)
    mix = datasets.open_data([spec], **how | {"skip_bad": 2})
    ids = {mix[draw].id for draw in range(40)}  # the broken image is noticed when it is drawn, and left out
    assert ids == {"rows-1", "rows-4"}
    assert [fault.split(": ")[0] for fault in mix.faults] == [f"{spec}:3", f"{spec}:2"]
    strict = datasets.open_data([spec], **how | {"skip_bad": 1})
    with pytest.raises(datasets.DataError, match=r"rows.jsonl:2: .*broken.png is unusable"):
        [strict[draw] for draw in range(40)]
