"""benchmarks/demo_arms.py and demo_report.py: numbers worked by hand, what is run again, the figure."""
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data as datasets
import grpo_vl
import options
import rewards
import sft_coldstart
import tiny

sys.path.append(str(ROOT / "benchmarks"))
import claims_report
import control_rewards
import demo_arms
import demo_report
from claims_report import Estimate, Result
from demo_report import ARMS, BASE, CONTROLS, GRPO, SUPERVISED

FORMAT, RANDOM = CONTROLS
SLOW, FAST = SUPERVISED
SPEC = f"{tiny.FEW}&seed=0"


def of_seeds(*means, about=None, steps=()):
    """A seed each, of two scenes whose greedy scores are that mean; the sampled ones are 0.5 lower."""
    about = about or {"steps": 10, "seconds": 60.0}
    found = {}
    for seed, mean in enumerate(means):
        lower = mean - 0.5
        found[seed] = Result(about, list(steps), [[mean], [mean]], [[lower, lower], [lower, lower]])
    return found


def nothing():
    return {arm.name: {} for arm in ARMS}


# ---- errors and verdicts ----
def test_error_before_and_after_by_hand():
    results = nothing() | {"base": of_seeds(0.9, 0.9, 0.9), "GRPO": of_seeds(0.95, 0.96, 0.97)}
    # errors 0.1 and 0.05, 0.04, 0.03; they fell by 0.05, 0.06, 0.07: s = 0.01, s/√3 = 0.0057735
    found = demo_report.change(results, GRPO, "greedy")
    assert (found.before.mean, found.after.mean, found.fell.mean) == pytest.approx((0.1, 0.04, 0.06))
    assert (found.before.error, found.after.error, found.fell.error) == pytest.approx((0, 0.0057735, 0.0057735), abs=1e-6)
    assert found.factor == pytest.approx(0.4) and found.fell.seeds == 3
    # sampled: errors 0.6 and 0.55, 0.54, 0.53
    assert demo_report.change(results, GRPO, "sampled").factor == pytest.approx(0.54 / 0.6)


def test_only_seeds_that_both_have_count():
    results = nothing() | {"base": of_seeds(0.9, 0.8, 0.1), "GRPO": of_seeds(0.95, 0.95)}
    # errors 0.1, 0.2 and 0.05, 0.05
    found = demo_report.change(results, GRPO, "greedy")
    assert (found.before.mean, found.after.mean, found.fell.seeds) == pytest.approx((0.15, 0.05, 2))


@pytest.mark.parametrize("arm, mean, expected", [
    (GRPO, 0.31, "better by more than three standard errors"),
    (GRPO, 0.29, "within three standard errors"),
    (GRPO, -0.29, "within three standard errors"),
    (FAST, -0.31, "worse by more than three standard errors"),
    (RANDOM, 0.21, "above the base by more than two standard errors"),
    (RANDOM, 0.19, "not above the base by two standard errors"),
    (FORMAT, -0.9, "not above the base by two standard errors"),
])
def test_verdict(arm, mean, expected):
    assert demo_report.verdict(arm, Estimate(mean, 0.1, 3)) == expected


def test_the_better_learning_rate_stands_beside_grpo():
    results = nothing() | {"base": of_seeds(0.9, 0.9), "GRPO": of_seeds(0.95, 0.97),
                           SLOW.name: of_seeds(0.91, 0.91), FAST.name: of_seeds(0.98, 0.98)}
    assert demo_report.better_supervised(results) == FAST
    # GRPO's score less by 0.03 and 0.01: mean 0.02, s = 0.0141421, s/√2 = 0.01
    assert demo_report.against_supervised(results)[1:] == [
        "- greedy: GRPO's error is higher by 2.0 ± 1.0 points.", "- sampled: GRPO's error is higher by 2.0 ± 1.0 points."]
    results[FAST.name] = of_seeds(0.90, 0.90)
    assert demo_report.better_supervised(results) == SLOW
    assert demo_report.against_supervised(nothing() | {"base": of_seeds(0.9), "GRPO": of_seeds(0.9)}) == []


# ---- curves ----
def evaluated(step, seconds, greedy):
    return {"step": step, "seconds/total": seconds, "eval/greedy": greedy}


def test_a_curve_is_the_mean_of_seeds_over_minutes():
    """The last steps differ, as those of runs that end by the clock: they are one point all the same."""
    first = [{"step": 0, "seconds/total": 6.0, "before/greedy": 0.5}, evaluated(9, 60.0, 0.6), evaluated(12, 90.0, 0.8)]
    second = [{"step": 0, "seconds/total": 6.0, "before/greedy": 0.7}, evaluated(9, 120.0, 0.6), evaluated(19, 180.0, 0.7),
              evaluated(20, 210.0, 0.9)]
    line = demo_report.curve({0: Result({}, first, [], []), 1: Result({}, second, [], [])}, "greedy")
    # Before: 50 and 70 %, s/√2 = 10; after 1 and 2 minutes 60 and 60; at the end, 1.5 and 3.5 minutes, 80 and 90, s/√2 = 5
    assert line.xs == pytest.approx([0, 1.5, 2.5]) and line.ys == pytest.approx([60, 60, 85])
    assert line.errors == pytest.approx([10, 0, 5])


# ---- page and figure ----
def answers_of(offset):
    """Eight answers to each of the first scenes: the truth, moved by `offset` pixels more each time."""
    mix = datasets.open_data([SPEC], split="heldout")
    rows = []
    for index in range(6):
        sample = mix.at(index)
        for number in range(8):
            moved = []
            for item in sample.answer:
                left, top, right, bottom = item["bbox_2d"]
                shift = offset * number
                moved.append({"bbox_2d": [left + shift, top, right + shift, bottom], "label": item["label"]})
            text = json.dumps(moved)
            right = rewards.correct("detection", text, sample.answer, sample.image_size)
            rows.append({"id": sample.id, "task": "detection", "completion": text, "answer": sample.answer,
                         "image_size": sample.image_size, "correct": right})
    return rows


@pytest.fixture
def measured(tmp_path):
    """Raw rows of two seeds of all arms: base 0.90, GRPO 0.95 and 0.97, all others 0.91 and 0.91."""
    folder = tmp_path / "demo"
    steps = [{"step": 0, "seconds/total": 6.0, "before/greedy": 0.9, "before/sampled": 0.4},
             {"step": 1, "seconds/total": 66.0, "eval/greedy": 0.95, "eval/sampled": 0.45}]
    for arm in ARMS:
        means = {"base": (0.9, 0.9), "grpo": (0.95, 0.97)}.get(arm.kind, (0.91, 0.91))
        about = {"steps": 2, "seconds": 66.0, "commands": [f"train {arm.slug}", "greedy", "sampled"], "scenes": SPEC}
        if arm.kind == "base":
            about |= {"steps": 0, "seconds": 0.0, "commands": ["greedy", "sampled"]}
        for seed, result in of_seeds(*means).items():
            claims_report.write(folder / f"{arm.slug}-{seed}.jsonl.gz", about, steps, result.greedy, result.sampled)
    for arm, rows in ((BASE, answers_of(2)), (GRPO, answers_of(0))):
        lines = [json.dumps(row) for row in rows]
        demo_report.answers_file(folder, arm, 0).write_text("\n".join(lines))
    return folder


def test_page_by_hand(measured, capsys):
    demo_arms.main(["--report", "--results", str(measured)])
    text = measured.with_suffix(".md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    # GRPO's errors 5 and 3 %, mean 4, s = √2, s/√2 = 1: ×0.40, fell by 5 and 7
    assert ("| GRPO | greedy | 10.0 ± 0.0 | 4.0 ± 1.0 | ×0.40 | +6.0 ± 1.0 | better by more than three standard errors "
            "| 2 | 2 | 66 |") in text
    assert "| GRPO | sampled | 60.0 ± 0.0 | 54.0 ± 1.0 | ×0.90 | +6.0 ± 1.0 |" in text
    # the controls' 9 %, both: 1 point less, without any spread
    assert "| random reward | greedy | 10.0 ± 0.0 | 9.0 ± 0.0 | ×0.90 | +1.0 ± 0.0 | above the base by more than two" in text
    assert "Error is 1 − F1 of the answer alone" in text and "on 2 held-out scenes a seed" in text
    block = text.split("```")[1].strip().splitlines()
    assert block[:5] == ["# base", "greedy", "sampled", "# GRPO", "train grpo"] and block[-1] == "train supervised_0.0003"


def test_figure_shows_a_cloud_before_and_a_sharp_box_after(measured):
    demo_report.write(measured)
    with Image.open(measured.with_suffix(".png")) as image:
        assert image.size == (1800, 800)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red, green, blue = np.moveaxis(pixels, 2, 0)
    magenta = (red > 240) & (green < 200) & (blue > 180)
    pale = magenta & (green > 80)  # of one answer or two
    sharp = (red > 240) & (green < 20) & (blue > 180)
    before, after = slice(85, 337), slice(412, 664)
    tiles = slice(735, 1791)
    assert sharp[after, tiles].sum() > 2 * sharp[before, tiles].sum()
    assert pale[before, tiles].sum() > 500 and not pale[after, tiles].any()
    assert not magenta[:, :700].any()  # the curves are elsewhere
    curves = (blue > 150) & (red < 60)
    assert curves[85:360, 120:660].any() and curves[390:665, 120:660].any()


def test_other_scenes_than_were_answered_are_refused():
    sample = datasets.open_data([SPEC], split="heldout").at(0)
    rows = [{"id": sample.id, "answer": sample.answer}] * 8
    assert demo_report.first_scenes(SPEC, rows)[0].answer == sample.answer
    rows = [{"id": sample.id, "answer": sample.answer[:-1]}] * 8
    with pytest.raises(ValueError, match="measure again"):
        demo_report.first_scenes(SPEC, rows)


def test_nothing_to_report(tmp_path):
    with pytest.raises(SystemExit, match="no seed with raw rows of base and GRPO"):
        demo_arms.main(["--report", "--results", str(tmp_path)])


@pytest.mark.skipif(not (ROOT / "results" / "demo.md").exists(), reason="not measured yet")
def test_the_page_is_of_the_raw_rows():
    folder = ROOT / "results" / "demo"
    results = demo_report.read_arms(folder)
    assert (ROOT / "results" / "demo.md").read_text() == demo_report.page(results, "accuracy")


# ---- running ----
@pytest.fixture
def bench(tmp_path):
    demo = grpo_vl.Config(**grpo_vl.PRESETS["tiny"] | {"data": (tiny.FEW,), "prompts": 16})
    return demo_arms.Bench("base", 2, tmp_path / "runs", tmp_path / "results", demo)


def parsed(module, command):
    return options.parse_config(module.Config, command[1:], module.PRESETS, "", gpu=False)


def test_all_arms_start_from_the_base_and_differ_in_one_thing(bench):
    configs = {}
    for arm in ARMS[1:]:
        command = demo_arms.training_command(demo_arms.Job(bench, arm, 7), 12.34)
        module = {"grpo_vl.py": grpo_vl, "sft_coldstart.py": sft_coldstart}[command[0]]
        configs[arm] = parsed(module, command)
        assert configs[arm].model == "base" and configs[arm].seed == 7
    grpo = dataclasses.asdict(configs[GRPO])
    for arm in CONTROLS:
        other = dataclasses.asdict(configs[arm])
        assert {name for name in grpo if grpo[name] != other[name]} == {"reward", "out"}
        assert hasattr(control_rewards, other["reward"].rpartition(":")[2])
    for arm in SUPERVISED:
        supervised = configs[arm]
        assert (supervised.lr, supervised.seconds, supervised.batch) == (arm.lr, 12.3, 16)
        assert supervised.data == (tiny.FEW,) and supervised.train == "all"


def pretend(bench, monkeypatch, faults):
    """Scripts that write what they would, of two ranks: scenes 0, 2, …, then 1, 3, …; 10 is right alone."""
    started = []

    def call(job, command):
        started.append((job.arm.slug, job.seed, command))
        out = Path(command[command.index("--out") + 1])
        out = out if out.is_absolute() else ROOT / out
        out.mkdir(parents=True)
        if command[0] != "eval.py":
            if faults and job.arm == RANDOM:
                raise RuntimeError(faults.pop())
            (out / "model").mkdir()
            (out / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward": 0.5, "seconds/total": 41.27}) + "\n")
            return
        tries = int(command[command.index("--samples-per-question") + 1])
        sample = datasets.open_data([SPEC], split="heldout").at(0)
        rows = []
        for number in (0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9):
            said = sample.answer if number == 10 else []
            row = {"id": f"synthetic-detection-heldout-{number}", "task": "detection", "answer": sample.answer, "image_size": [84, 84], "completion": json.dumps(said)}
            rows += [json.dumps(row)] * tries
        (out / "predictions.jsonl").write_text("\n".join(rows))

    monkeypatch.setattr(demo_arms, "call", call)
    return started


def test_finished_arms_are_not_run_again(bench, monkeypatch):
    """The random-reward arm fails once; a second call begins with it, a third one starts nothing."""
    started = pretend(bench, monkeypatch, ["the disk is full"])

    def run():
        started.clear()
        for arm in ARMS:
            demo_arms.run_missing(demo_arms.Job(bench, arm, 0))
        return [slug for slug, _, command in started if command[0] != "eval.py"]

    with pytest.raises(RuntimeError, match="the disk is full"):
        run()
    assert [slug for slug, _, _ in started] == [*["base"] * 2, *["grpo"] * 3, *["format_only"] * 3, "random_reward"]
    assert run() == ["random_reward", SLOW.slug, FAST.slug]
    commands = {slug: command for slug, _, command in started if command[0] == "sft_coldstart.py"}
    for command in commands.values():  # GRPO's seconds
        assert command[command.index("--seconds") + 1] == "41.3"
    result = claims_report.read(bench.results / "grpo-0.jsonl.gz")
    assert result.greedy == [[0.0]] * 10 + [[1.0]] and result.sampled == [[0.0] * 8] * 10 + [[1.0] * 8]
    assert (result.about["steps"], result.about["seconds"], result.about["scenes"]) == (1, 41.3, SPEC)
    assert [command.split()[2] for command in result.about["commands"]] == ["grpo_vl.py", "eval.py", "eval.py"]
    kept = claims_report.read_rows(bench.results / "grpo-0-answers.jsonl")
    assert [row["id"].split("-")[-1] for row in kept] == [number for number in "012345" for _ in range(8)]
    assert not (bench.results / "random_reward-0-answers.jsonl").exists()
    assert run() == [] and started == []


def test_the_base_is_looked_for_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo_arms.main(["--base", str(tmp_path)])
    assert f"--base {tmp_path} holds no model: build one" in capsys.readouterr().err
