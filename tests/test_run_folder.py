"""What lies under --out: whose it is, what a resumed run may change, what is exported."""
import json
import math
import stat
from dataclasses import asdict, replace

import pytest
import ranks
import torch
from PIL import Image
from safetensors.torch import load_file

import grpo_vl
import run_folder
import sft_coldstart
import training
from data import DataError
from qwen_vl import Completion, Group
from sampler import Interrupted
from sources import Sample


def finished_run(alone, folder, **changes):
    """A run of two steps, all done."""
    run = ranks.make_run(alone, optimizer="adamw", lr=1e-4, steps=2, out=str(folder), **changes)
    assert grpo_vl.train(run)
    return run


# ── whose folder is it? ──
def test_other_options_are_refused_and_named_with_both_values(alone, tmp_path):
    run = finished_run(alone, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    changed = replace(run.config, loss="dapo", lr=1e-3)
    with pytest.raises(SystemExit) as stopped:
        run_folder.claim(changed)
    said = str(stopped.value)
    assert "--loss was 'grpo' and is 'dapo'" in said and "--lr was 0.0001 and is 0.001" in said
    assert "--steps" not in said
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("changes", [
    dict(steps=9), dict(log="wandb"), dict(keep=7), dict(save_every=3), dict(eval_every=5), dict(eval_samples=50),
    dict(eval_data=("synthetic:math?text=1",)), dict(pictures_every=9), dict(timeout=60), dict(kv_gb=1.0),
    dict(micro_tokens=300), dict(checkpointing=True), dict(checkpoint_every=2), dict(keep_attention=True),
    dict(entropy_every=0), dict(offload=True), dict(graphs=False), dict(compile=True),
])
def test_options_that_teach_nothing_else_may_change(tmp_path, changes):
    config = grpo_vl.Config(**ranks.SMALL | dict(out=str(tmp_path / "run")))
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(config)))
    (tmp_path / "run" / "checkpoint-1" / "state.json").write_text('{"step": 1, "cursor": 4}')
    assert run_folder.claim(replace(config, **changes))


def test_steps_may_not_change_under_a_schedule_that_ends(tmp_path):
    config = grpo_vl.Config(**ranks.SMALL | dict(out=str(tmp_path / "run"), schedule="linear"))
    saved = json.loads(json.dumps(asdict(config)))
    assert run_folder.changed_options(saved, replace(config, steps=9)) == ["--steps was 3 and is 9"]


def test_a_finished_run_says_so_and_goes_on_with_more_steps(alone, tmp_path, capsys):
    run = finished_run(alone, tmp_path / "run")
    assert not run_folder.claim(run.config)
    assert f"{tmp_path}/run is finished: 2 steps, the model is in {tmp_path}/run/model" in capsys.readouterr().err
    assert run_folder.claim(replace(run.config, steps=3))


def test_a_cold_start_that_ended_by_its_seconds_is_finished(tmp_path, capsys):
    config = sft_coldstart.Config(model="tiny", out=str(tmp_path), seconds=5.0)
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    (tmp_path / "checkpoint-7" / "state.json").write_text('{"step": 7, "cursor": 4, "finished": true}')
    assert not run_folder.claim(config)
    assert "is finished: 7 steps" in (said := capsys.readouterr().err) and "Raise --seconds to go on" in said
    assert run_folder.claim(replace(config, seconds=50.0))


def test_nothing_is_started_into_a_folder_that_holds_something_else(alone, tmp_path):
    finished_run(alone, tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    for folder in (tmp_path / "run" / "model", tmp_path / "notes"):
        before = sorted(folder.iterdir())
        for config in (grpo_vl.Config(model="tiny", out=str(folder)), sft_coldstart.Config(model="tiny", out=str(folder))):
            with pytest.raises(SystemExit, match=r"holds something that is no run.*choose a new folder"):
                run_folder.claim(config)
        assert sorted(folder.iterdir()) == before


def test_a_run_of_the_other_script_is_refused(alone, tmp_path):
    finished_run(alone, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"another script or version, with options .*group"):
        run_folder.claim(sft_coldstart.Config(model="tiny", out=str(tmp_path / "run")))


# ── a checkpoint before an evaluation ──
def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(alone, tmp_path, monkeypatch):
    before = [({}, {"eval/greedy": 0.5, "eval/sampled": 0.25})]

    def bad_row(run, tokens):  # not yet before the first step
        if before:
            return before.pop()
        raise DataError("rows.jsonl:7: this picture is broken")

    options = dict(optimizer="adamw", lr=1e-4, steps=3, eval_every=2, save_every=100, out=str(tmp_path / "run"))
    run = ranks.make_run(alone, **options)
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", bad_row)
        with pytest.raises(DataError, match=r"rows.jsonl:7"):
            grpo_vl.train(run)
    (saved,) = run_folder.find_checkpoints(tmp_path / "run")
    assert saved.name == "checkpoint-2"
    assert grpo_vl.train(ranks.make_run(alone, **options))  # mended: the second step's evaluation is made up for
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert ["eval/greedy" in row for row in rows] == [False, True, True]
    assert ["before/greedy" in row for row in rows] == [True, False, False]
    assert rows[1]["grad_norm"] > 0


def test_the_model_before_the_first_step_is_evaluated_once(alone, tmp_path, monkeypatch):
    """Killed after its first step's checkpoint and before that step was logged: the row is made up for, whole."""
    seen = []

    def accuracy(run, tokens):
        seen.append(tokens)
        return [], {"eval/greedy": 0.5 + len(seen), "eval/sampled": 0.25}

    def killed(log, metrics):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", accuracy)
    options = dict(optimizer="adamw", lr=1e-4, steps=3, eval_every=3, save_every=1, out=str(tmp_path))
    run = ranks.make_run(alone, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.RunLog, "add", killed)
        grpo_vl.train(run)
    assert grpo_vl.train(ranks.make_run(alone, **options))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and len(seen) == 2  # before, and after the last step
    assert (rows[0]["before/greedy"], rows[0]["before/sampled"]) == (1.5, 0.25)
    assert rows[2]["eval/greedy"] == 2.5 and "eval/greedy" not in rows[0]
    assert not any("before/greedy" in row for row in rows[1:])


def test_told_to_stop_in_the_evaluation_before_the_first_step(alone, tmp_path, monkeypatch, capsys):
    def interrupted(run, tokens):
        raise Interrupted

    run = ranks.make_run(alone, steps=2, eval_every=1, out=str(tmp_path))
    monkeypatch.setattr(training, "evaluate", interrupted)
    assert not grpo_vl.train(run)
    assert "stopped after 0 of 2 steps; the same command begins anew" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_it_says_where_it_goes_on_and_that_it_is_finished(alone, tmp_path, capsys):
    run = finished_run(alone, tmp_path / "run")
    assert f"finished: 2 steps, model in {tmp_path}/run/model" in capsys.readouterr().err
    again = ranks.make_run(alone, optimizer="adamw", **{
        name: getattr(run.config, name) for name in ("lr", "out")} | {"steps": 3})
    assert grpo_vl.train(again)
    assert f"going on from {tmp_path}/run/checkpoint-2, 2 of 3 steps done" in capsys.readouterr().err


# ── exports ──
@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_one_and_two_ranks_export_the_same_tensors_readable_by_all(alone, pair, tmp_path, model):
    ranks.export(alone, str(tmp_path / "one"), model)
    pair.run("ranks.export", folder=str(tmp_path / "two"), model=model)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and ("lm_head.weight" in one) == (model == "tiny-untied")
    for file in (tmp_path / "two").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file.name


def test_samples_hold_what_a_sheet_needs(alone, tmp_path):
    run = ranks.make_run(alone, out=str(tmp_path), pictures_every=1)
    grpo_vl.train_step(run, 0)
    rows = json.loads((tmp_path / "samples" / "step-0.json").read_text())
    assert len(rows) == 4 * 3  # four groups of three
    assert {"step", "draw", "id", "task", "question", "answer", "image", "image_size", "text", "reward", "parts",
            "truncated"} == set(rows[0])
    assert (tmp_path / "samples" / rows[0]["image"]).exists()


def test_the_picture_of_the_best_answer_is_in_the_images_pixels(tmp_path):
    """Box tokens count to 1,000; 84 pixels are drawn five times as large, 420 wide."""
    image = Image.new("RGB", (84, 84), "white")
    tokens = "<|object_ref_start|>a<|object_ref_end|><|box_start|>(500,500),(750,750)<|box_end|>"
    said = [Completion([], text=tokens, reward=2.0), Completion([], text="[0, 0, 9, 9]", reward=1.0)]
    placed = Sample("a", "grounding", "", [14, 14, 28, 28], (image,))
    read = Sample("b", "ocr", "", "[7, 7, 49, 49]", (image,))  # an answer that is printed, and no place
    printed = [Completion([], text="[7, 7, 49, 49]", reward=1.0)]
    groups = [Group(None, said, sample=placed, draw=0), Group(None, printed, sample=read, draw=1)]
    run_folder.save_rollouts(tmp_path, 5, groups)
    with Image.open(tmp_path / "samples" / "step-5-0-best.png") as best:
        # said from 42 to 63, so 210 to 315; true from 14 to 28, so 70 to 140
        corners = [(210, 260), (315, 260), (260, 210), (260, 315)]
        assert best.size == (420, 420) and [best.getpixel(at) for at in corners] == [(255, 0, 192)] * 4
        assert best.getpixel((70, 100)) == best.getpixel((100, 140)) == (0, 208, 255)
    with Image.open(tmp_path / "samples" / "step-5-1-best.png") as best:
        assert best.getcolors() == [(420 * 420, (255, 255, 255))]


def test_a_missing_tracker_is_one_sentence(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--log wandb: pip install wandb"):
        run_folder.open_tracker(grpo_vl.Config(**ranks.SMALL | dict(log="wandb")))


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    log = run_folder.RunLog(grpo_vl.Config(**ranks.SMALL | dict(out=str(tmp_path))))
    log.add({"step": 0, "loss": math.inf, "skipped_samples": ["a"]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": None, "skipped_samples": ["a"]}


def test_weights_are_restored(alone, tmp_path):
    run = finished_run(alone, tmp_path / "run")
    other = ranks.make_run(alone, optimizer="adamw", lr=1e-4, steps=2, out=str(tmp_path / "run"))
    run_folder.resume(other.config, other.policy, other.optimizer)
    one, two = ranks.full_weights(run.policy), ranks.full_weights(other.policy)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ten_steps_without_any_reward_show_a_truth_and_a_completion(alone, tmp_path, capsys):
    """The answer's form or the model's: a warning at step 10, and none where something is earned."""
    for reward, warned in ((lambda *a, **k: 0.0, True), (ranks.by_length, False)):
        run = ranks.make_run(alone, reward=reward, lr=1e-4, steps=11, prompts=1, group=2, max_tokens=4,
                             out=str(tmp_path / str(warned)))
        grpo_vl.train(run)
        said = capsys.readouterr().err
        assert ("every reward so far is 0: look at samples/" in said) == warned
        assert ("truth:      [" in said) == warned  # a box


# ── a run begun elsewhere, halfway, or without checkpoints ──
def text_rows(path, answers=("2", "3", "4", "5")):
    rows = [{"task": "math", "question": f"What is {n} + 1?", "answer": a} for n, a in enumerate(answers, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_run_on_texts_alone_goes_on_exactly(alone, tmp_path):
    """The tower has had no gradient: AdamW has no state of it, neither in the checkpoint nor afterwards."""
    data = (text_rows(tmp_path / "sums.jsonl"),)
    weights = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            run = ranks.make_run(alone, optimizer="adamw", lr=1e-3, steps=stop, data=data, prompts=2,
                                 out=str(tmp_path / name))
            assert grpo_vl.train(run)
        weights.append(ranks.full_weights(run.policy))
        known = {name for name, p in run.policy.named_parameters() if p in run.optimizer.state}
        assert known and not any(".visual." in name for name in known)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_stopped_in_its_first_step_begins_anew_exactly(alone, tmp_path):
    options = dict(optimizer="adamw", lr=1e-3, steps=2)
    run = ranks.make_run(alone, out=str(tmp_path / "stopped"), **options)
    assert not grpo_vl.train(run, stopped=lambda: True)
    assert run_folder.find_checkpoints(tmp_path / "stopped") == []
    results = []
    for name in ("stopped", "whole"):
        run = ranks.make_run(alone, out=str(tmp_path / name), **options)
        assert run_folder.claim(run.config) and grpo_vl.train(run)
        results.append(ranks.full_weights(run.policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_run_that_was_killed_before_it_saved_is_not_relabelled(tmp_path):
    config = grpo_vl.Config(**ranks.SMALL | dict(out=str(tmp_path / "run")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(config)))
    assert run_folder.claim(config)
    with pytest.raises(SystemExit, match="--seed was 0 and is 9"):
        run_folder.claim(replace(config, seed=9))
    saved = json.loads(json.dumps(asdict(config)))
    del saved["think"]  # written by a version that did not know it
    assert run_folder.changed_options(saved, config) == ["--think was 'not known to that version' and is 'no'"]


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tmp_path, capsys):
    config = grpo_vl.Config(**ranks.SMALL | dict(out=str(tmp_path / "run")))
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(config)))
    assert not run_folder.claim(config)
    assert "is finished" in capsys.readouterr().err


def test_a_signal_in_the_last_evaluation_is_made_up_for(alone, tmp_path, capsys):
    """Told to stop while the last step is evaluated: not finished, and the same command evaluates."""
    options = dict(optimizer="adamw", lr=1e-4, steps=2, eval_every=2, out=str(tmp_path / "run"))
    run = ranks.make_run(alone, **options)
    generate, calls = run.sampler.generate, []

    def stopped():
        return len(calls) > 4

    def counted(*arguments, **named):  # an evaluation's greedy and sampled, two rollouts, an evaluation's
        calls.append(1)
        return generate(*arguments, **named)

    run.sampler.generate = counted
    assert not grpo_vl.train(run, stopped=stopped)
    assert "stopped after 2 of 2 steps; the same command goes on from" in capsys.readouterr().err
    again = ranks.make_run(alone, **options)
    assert run_folder.claim(again.config) and grpo_vl.train(again, stopped=lambda: False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and "eval/greedy" in rows[1]
