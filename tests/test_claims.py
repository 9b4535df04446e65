"""The papers' claims in miniature: verdicts, chance, which step is answered, what is run again."""
import json
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import rewards

sys.path.append(str(ROOT / "benchmarks"))
import claims
import claims_report
import claims_table
from claims_report import Result, estimate, verdict
from claims_table import GRPO, Arm, Claim, Contrast, World

WORLD = World(
    "grounding", "size=56x56", steps=4, sft_steps=8, lr=1e-4, sft_lr=1e-4, max_tokens=32, schedule="constant")
GAIN = {"after": 1.0, "before": -1.0}
HERE, BETWEEN, THERE = [0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]


def of_seeds(*means):
    """A seed each, of two scenes whose greedy scores are that mean; sampled ones too."""
    return {seed: Result({}, [], [[mean], [mean]], [[mean], [mean]]) for seed, mean in enumerate(means)}


@pytest.mark.parametrize("after, mean, error, expected", [
    # gains 0.1, 0.2, 0.3: s = 0.1, s/√3 = 0.057735, and 0.2 is above 2 · 0.0577 = 0.1155
    ((0.6, 0.7, 0.8), 0.2, 0.057735, "seen"),
    ((0.4, 0.3, 0.2), -0.2, 0.057735, "reversed"),
    # gains −0.1, 0.1, 0.3: s = 0.2, s/√3 = 0.115470, and 0.1 is within 0.2309 of 0
    ((0.4, 0.6, 0.8), 0.1, 0.115470, "not seen"),
    ((0.6, 0.4, 0.2), -0.1, 0.115470, "not seen"),
])
def test_verdict_over_seeds(after, mean, error, expected):
    found = estimate({"before": of_seeds(0.5, 0.5, 0.5), "after": of_seeds(*after)}, GAIN, "greedy")
    assert (found.mean, found.error, found.seeds) == (pytest.approx(mean), pytest.approx(error, abs=1e-6), 3)
    assert verdict(found) == expected


def test_only_seeds_that_all_arms_have_count():
    # seeds 0 and 1 gain 0.1 and 0.3: mean 0.2, s = 0.141421, s/√2 = 0.1; 0.9 of seed 2 has no match
    found = estimate({"before": of_seeds(0.5, 0.5), "after": of_seeds(0.6, 0.8, 0.9)}, GAIN, "greedy")
    assert (found.mean, found.error, found.seeds) == (pytest.approx(0.2), pytest.approx(0.1), 2)
    assert verdict(estimate({"before": {}, "after": of_seeds(0.6)}, GAIN, "greedy")) == "not run"


def test_one_seed_has_the_error_over_scenes():
    # differences 1, 1, 0, 0: mean 0.5, s = √(4 · 0.25 / 3) = 0.577350, s/√4 = 0.288675
    before = {0: Result({"metrics": {"AP": 0.2}}, [], [[0], [0], [1], [0]], [])}
    after = {0: Result({"metrics": {"AP": 0.3}}, [], [[1], [1], [1], [0]], [])}
    found = estimate({"before": before, "after": after}, GAIN, "greedy")
    assert (found.mean, found.error, found.seeds) == (0.5, pytest.approx(0.288675, abs=1e-6), 1)
    assert verdict(found) == "not seen"  # 0.5 is within 0.577
    of_all = estimate({"before": before, "after": after}, GAIN, "AP")
    assert (of_all.mean, of_all.error) == (pytest.approx(0.1), None)
    assert verdict(of_all) == "one seed, error unknown"


def test_seeds_that_came_out_close_are_no_surer_than_their_scenes():
    """Both seeds gain 0.5, so s = 0; each has the error over scenes of the test above, and the mean of
    two √(2 · 0.288675²) / 2 = 0.204124: 0.5 is beyond twice that, 0.25 (a scene in four) is not."""
    before, after = [[0], [0], [1], [0]], [[1], [1], [1], [0]]
    results = {"before": {seed: Result({}, [], before, []) for seed in (0, 1)},
               "after": {seed: Result({}, [], after, []) for seed in (0, 1)}}
    found = estimate(results, GAIN, "greedy")
    assert (found.mean, found.error, found.scene_error) == (0.5, 0.0, pytest.approx(0.204124, abs=1e-6))
    assert verdict(found) == "seen"
    for seed in (0, 1):  # differences 1, 0, 0, 0: s = 0.5, s/√4 = 0.25, of two seeds 0.176777
        results["after"][seed] = Result({}, [], [[1], [0], [1], [0]], [])
    assert verdict(estimate(results, GAIN, "greedy")) == "not seen"


def test_both_means_are_of_the_seeds_that_both_arms_have():
    # seed 0 alone: 50 → 60; GRPO's other seed, 90, has no match
    gain = Contrast("gain", GAIN)
    text, _ = claims_report.measured({"before": of_seeds(0.5), "after": of_seeds(0.6, 0.9)}, gain)
    assert text.startswith("50.0 → 60.0: +10.0")


def test_a_doubling_of_g_by_least_squares():
    """0.1 a doubling and a constant: the slope is 0.1."""
    results = {}
    for group, mean in zip(claims_table.GROUPS, (0.3, 0.4, 0.5, 0.6, 0.7), strict=True):
        results[f"G = {group} same prompts"] = of_seeds(mean)
    found = estimate(results, claims_table.slope("same prompts").weights, "greedy")
    assert found.mean == pytest.approx(0.1)


def test_metrics_of_an_arm():
    # two scenes: greedy 1 and 0; sampled 1 of 4 and 0 of 4 right; the best of each 1 and 0
    result = Result({}, [], [[1.0], [0.0]], [[0, 1, 0, 0], [0, 0, 0, 0]])
    assert [claims_report.score(result, name) for name in ("greedy", "sampled", "pass@8")] == [0.5, 0.125, 0.5]
    assert claims_report.score(result, "AP") is None


def test_chance_is_the_best_fixed_answer(monkeypatch):
    """HERE is right in three of these four scenes, THERE in one."""
    said = [rewards.reference("grounding", box) for box in (THERE, HERE)]
    assert claims.fixed_answer("grounding", said, [HERE, THERE, HERE, HERE]) == said[1]

    # Of 300 other scenes the first 100 say the answers, HERE and THERE. The next 200 choose THERE,
    # right 60 times, HERE 40 (of all 300, HERE would be right more often; BETWEEN was not said).
    # Then THERE is right in one of the four scenes that are measured.
    def drawn(world, seed, count):
        others = [HERE] * 99 + [THERE] + [THERE] * 60 + [HERE] * 40 + [BETWEEN] * 100
        boxes = {2007: others, 7: [HERE, HERE, THERE, HERE]}[seed]
        return [SimpleNamespace(answer=box, question="") for box in boxes]

    monkeypatch.setattr(claims, "drawn", drawn)
    assert claims.chance(WORLD, 7) == [[0.0], [0.0], [1.0], [0.0]]


def test_scenes_of_a_seed_are_its_own_and_the_same_again():
    def boxes(seed):
        return [sample.answer for sample in claims.drawn(claims_table.GROUNDING, seed, 5)]

    assert boxes(3) == boxes(3) != boxes(4)


def test_the_step_that_is_answered():
    rows = []
    for step in range(6):  # 2 tokens · 16 prompts · 8 answers = 256 tokens a step
        rows.append({"step": step, "length": 2.0, "seconds/total": step + 1.0})
    rows[1]["eval/greedy"], rows[3]["eval/greedy"], rows[5]["eval/greedy"] = 0.1, 0.5, 0.5

    def wanted(at, **like):
        return claims.wanted_step(Arm("a", "b", WORLD, GRPO, at=at), rows, like)

    assert wanted("last") == 6
    assert wanted("best") == 4  # after step 3, the first of the two best
    assert wanted("prompts", prompts=80) == 5  # 80 / 16
    assert wanted("tokens", tokens=600) == 2  # 512, and a third step would make 768
    assert claims.spent(rows[:2], Arm("a", "b", WORLD, GRPO)) == dict(
        step=2, prompts=32, rollouts=256, tokens=512, seconds=2.0)


def test_what_goes_on_from_a_trained_arm_sees_other_scenes(tmp_path):
    arms = [Arm("a", "SFT", WORLD, claims.SFT), Arm("a", "GRPO", WORLD, GRPO, start="a SFT")]
    first, then = (claims.Job(None, "X", arm, 2) for arm in arms)

    def data(job):
        command = claims.training_command(job, "base", tmp_path)
        return command[command.index("--data") + 1]

    assert data(first) == "synthetic:grounding?size=56x56"
    assert data(then) == "synthetic:grounding?size=56x56&seed=502"


def test_steps_are_answered_from_what_was_saved(tmp_path):
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [claims.saved_step(tmp_path, wanted) for wanted in (5, 10, 19, 99)] == [10, 10, 10, 20]
    with pytest.raises(RuntimeError, match="run its arm again"):
        claims.saved_step(tmp_path / "none", 5)


def test_an_earlier_steps_model_is_that_of_a_run_which_ended_there(tmp_path):
    """By the real scripts: three steps, their first one written again, and a run of one step."""
    from safetensors.torch import load_file

    world = World("counting", "size=56x56", steps=3, sft_steps=8, lr=1e-3, sft_lr=1e-3, max_tokens=12, prompts=2,
                  group=4, looked_at=2, schedule="constant")
    learns = (*claims_table.control("by_text"), "--overlong", "keep")  # the stand-in knows no answer
    arms = [Arm("c", "like", world), Arm("c", "three", world, GRPO, learns),
            Arm("c", "first", world, start="c three", at="tokens", like="c like"),
            Arm("c", "one", claims.replace(world, steps=1), GRPO, learns)]
    bench = claims.Bench("tiny", tmp_path / "runs", tmp_path / "results", {"X": Claim("x", arms, [])})
    like, three, first, one = (claims.Job(bench, "X", arm, 10) for arm in arms)
    for job in (three, first, one):
        job.folder.mkdir(parents=True)
    claims_report.write(like.file, {"tokens": 100}, [], [], [])  # a step has 2 · 4 · 12 = 96 at most
    claims.train(three)
    claims.train(one)
    assert claims.choose_step(first, three)["step"] == 1

    def weights(model):
        return load_file(ROOT / model / "model.safetensors")

    written, own, last = (weights(claims.model_of(job)) for job in (first, one, three))
    assert all(written[name].equal(own[name]) for name in own)
    assert any(not written[name].equal(last[name]) for name in last)


def test_an_arm_starts_once_those_that_it_waits_for_are_finished():
    """The one thinks as many tokens as GRPO wrote, the best step is one of its own; the other seed
    waits for nothing."""
    arms = [Arm("a", "GRPO", WORLD, GRPO), Arm("a", "think", WORLD, GRPO, like="a GRPO"),
            Arm("a", "best", WORLD, start="a think"), Arm("a", "base", WORLD)]
    first = [claims.Job(None, "X", arm, 0) for arm in arms]
    second = [claims.Job(None, "X", arm, 1) for arm in arms]
    assert claims.ready(first, []) == [first[0], first[3]]
    assert claims.ready(first[1:], [first[0]]) == [first[3]]
    assert claims.ready(first[1:3], []) == [first[1]]  # GRPO is finished
    assert claims.ready(first[2:3], second) == [first[2]]


def test_finished_arms_are_not_run_again(tmp_path, monkeypatch):
    """Training fails once; the arm alone begins anew, and a third call starts nothing."""
    started, faults = [], ["the disk is full"]

    def call(job, command, seconds):
        started.append((job.arm.what, command[0]))
        if command[0] == GRPO:
            out = job.folder / "train"
            (out / "model").mkdir(parents=True)
            if faults:
                raise RuntimeError(faults.pop())
            row = {"step": 0, "length": 2.0, "reward": 0.5, "seconds/total": 3.0}
            (out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            return "", False
        out = ROOT / command[command.index("--out") + 1]
        tries = int(command[command.index("--samples-per-question") + 1])
        out.mkdir(parents=True)
        rows = []
        for number, said in enumerate((HERE, THERE)):  # the truth is HERE: the first is right
            row = dict(id=str(number), task="grounding", answer=HERE, image_size=[56, 56],
                       completion=rewards.reference("grounding", said))
            rows += [json.dumps(row)] * tries
        (out / "predictions.jsonl").write_text("\n".join(rows))
        return json.dumps({"accuracy": 50.0}), False

    monkeypatch.setattr(claims, "call", call)
    arms = [Arm("boxes", "base", WORLD), Arm("boxes", "GRPO", WORLD, GRPO)]
    bench = claims.Bench("base", tmp_path / "runs", tmp_path / "results", {"X": Claim("x", arms, [])})
    assert claims.run_arms(bench, "X", [0], "") == ["the disk is full"]
    assert sorted(started) == [("GRPO", GRPO), ("base", "eval.py"), ("base", "eval.py")]
    assert [file.name for file in (tmp_path / "results/X").iterdir()] == ["boxes-base-0.jsonl.gz"]

    started.clear()
    assert claims.run_arms(bench, "X", [0], "") == []
    assert started == [("GRPO", GRPO), ("GRPO", "eval.py"), ("GRPO", "eval.py")]
    result = claims_report.read(tmp_path / "results/X/boxes-grpo-0.jsonl.gz")
    assert (result.greedy, result.sampled) == ([[1.0], [0.0]], [[1.0] * 8, [0.0] * 8])
    assert result.said == [rewards.reference("grounding", box) for box in (HERE, THERE)]  # the greedy answers
    assert result.about["tokens"] == 256 and result.steps[0]["reward"] == 0.5

    started.clear()
    assert claims.run_arms(bench, "X", [0], "") == [] and started == []

    arms.append(Arm("boxes", "GRPO again", WORLD, start="boxes GRPO"))  # that policy on those scenes
    assert claims.run_arms(bench, "X", [0], "") == [] and started == []
    assert claims_report.read(tmp_path / "results/X/boxes-grpo-again-0.jsonl.gz") == result


@pytest.mark.parametrize("name", claims_table.all_claims())
def test_arms_stand_after_those_they_wait_for(name):
    every = claims_table.all_claims()
    claim, before = every[name], set()
    known = {f"{other}/{arm.name}" for other in every for arm in every[other].arms}
    for arm in claim.arms:
        for needed in filter(None, (arm.start, arm.like)):
            assert needed in before or needed in known, (arm.name, needed)
        before.add(arm.name)
    assert len({arm.slug for arm in claim.arms}) == len(claim.arms)  # a file each
    for contrast in claim.contrasts:
        assert set(contrast.weights) <= before, contrast.text
        assert sum(contrast.weights.values()) == pytest.approx(0)


def test_sft_trains_for_as_many_steps_as_take_grpos_time():
    """To tens, by the seconds that were kept; the order of objects changes no time."""
    every = claims_table.all_claims()
    worlds = [arm.world for name in ("P1", "P2") for arm in every[name].arms if arm.what == "SFT"]
    rows = claims_report.read_rows(ROOT / "results" / "claims_pace.jsonl")
    assert [world.scene for world in worlds] == [row["scene"] for row in rows]
    for world, row in zip(worlds, rows):
        seconds = world.steps * row["GRPO's seconds a step"]
        assert abs(seconds / row["SFT's"] - world.sft_steps) <= 5, row


def test_the_papers_numbers_are_those_of_the_papers_rows():
    """results/papers.json has all that evaluation prints; of OCR it has edit distances, 100 − x is what is raised."""
    papers = json.loads((ROOT / "results" / "papers.json").read_text())
    numbers = {}
    for task, row in (("grounding", "RefCOCO+ val "), ("counting", "PixMo"), ("ocr", "PageOCR en"), ("detection", "COCO")):
        (line,) = [line for line in papers[task] if line.startswith(row)]
        numbers[task] = re.findall(r"(?<= )\d+\.\d", line)
    mean_before, mean_after = numbers["grounding"][3], numbers["grounding"][7]
    edits_before, edits_after = (100 - float(numbers["ocr"][place]) for place in (0, 4))
    found = {
        "grounding": f"RefCOCO+ val, mean, {mean_before} → {mean_after}",
        "counting": f"PixMo-Count val {numbers['counting'][0]} → {numbers['counting'][2]}",
        "ocr": f"PageOCR en, 1 − edit distance, {edits_before:.1f} → {edits_after:.1f}",
        "detection": f"COCO AP {numbers['detection'][0]} → {numbers['detection'][3]}"}
    assert found == claims_table.LIFT


def test_seeds_for_results_take_no_settings():
    for arguments in (["P1", "--seeds", "0", "--set", "lr=1"], ["P1", "--seeds", "0", "10"]):
        with pytest.raises(SystemExit) as stopped:
            claims.main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit, match="there is no 'speed'"):
        claims.main(["P1", "--seeds", "10", "--set", "speed=1"])


def test_the_model_is_looked_for_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        claims.main(["P1", "--seeds", "0", "--base", str(tmp_path)])
    assert f"--base {tmp_path} holds no model: build one" in capsys.readouterr().err


def test_report_in_words(tmp_path):
    """base 0 1 0 1, GRPO 1 1 1 0: differences 1, 0, 1, −1, mean 0.25, s = √(2.75/3) = 0.957427,
    and s/√4 = 0.4787. Without raw rows there is no table."""
    arms = [Arm("boxes", "base", WORLD), Arm("boxes", "GRPO", WORLD, GRPO)]
    gain = Contrast("base → GRPO", {"boxes GRPO": 1.0, "boxes base": -1.0}, "1 → 2", headline=True)
    every = {"X": Claim("boxes get better", arms, [gain])}
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- claims -->\nold\n<!-- /claims -->\nbelow\n")
    claims_report.write_all(every, tmp_path, readme)
    nothing = "above\n<!-- claims -->\nNothing has been measured yet.\n<!-- /claims -->\nbelow\n"
    assert readme.read_text() == nothing
    for what, scores in (("base", (0, 1, 0, 1)), ("grpo", (1, 1, 1, 0))):
        rows = [[float(score)] for score in scores]
        about = {"commands": [["train.py", what], ["eval.py", "run", what]]}
        claims_report.write(tmp_path / "X" / f"boxes-{what}-0.jsonl.gz", about, [], rows, rows)
    claims_report.write_all(every, tmp_path, readme)
    here = "50.0 → 75.0: +25.0 ± 47.9 (one seed)"
    assert (f"| **[X](results/claims/X.md)** boxes get better<br>base → GRPO | 1 → 2 | {here} | **not seen** | "
            "`python benchmarks/claims.py X --seeds 0` |") in readme.read_text()
    assert f"| base → GRPO | 1 → 2 | {here} | not seen |" in (tmp_path / "X.md").read_text()
    shown = [line for line in (tmp_path / "X.md").read_text().splitlines() if line.startswith("python ")]
    assert shown == ["python train.py base", "python eval.py run base", "python train.py grpo"]
    assert (tmp_path / "X.png").exists()
    with pytest.raises(SystemExit, match="has no <!-- claims -->"):
        claims_report.write_all(every, tmp_path, tmp_path / "X.md")


def test_the_larger_error_is_the_one_that_is_shown():
    """Two seeds that came out alike: s = 0 over seeds, 0.478714/√2 = 0.3385 over scenes (as above)."""
    rows = {"boxes base": [[0.0], [1.0], [0.0], [1.0]], "boxes GRPO": [[1.0], [1.0], [1.0], [0.0]]}
    results = {name: {seed: claims_report.Result({}, [], own, own) for seed in (0, 1)} for name, own in rows.items()}
    gain = Contrast("base → GRPO", {"boxes GRPO": 1.0, "boxes base": -1.0})
    assert claims_report.measured(results, gain) == ("50.0 → 75.0: +25.0 ± 33.9 (2 seeds)", "not seen")
    assert claims_report.command_of("X", results) == "`python benchmarks/claims.py X --seeds 0 1`"


def test_an_arm_has_one_colour_on_both_sides_of_a_figure(monkeypatch):
    """Chance has no sampled answers: what comes after it keeps its colour there."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    kinds = ("chance", "base", "GRPO")
    claim = Claim("x", [Arm("boxes", kind, WORLD) for kind in kinds], [])
    results = {}
    for kind in kinds:
        sampled = [] if kind == "chance" else [[0.0], [1.0]]
        results[f"boxes {kind}"] = {0: claims_report.Result({}, [], [[0.0], [1.0]], sampled)}
    claims_report.draw(claim, results, None)
    assert {line.get_linestyle() for line in drawn[0].axes[0].lines} == {"None"}
    colours = []
    for axis in drawn[0].axes:
        handles, labels = axis.get_legend_handles_labels()
        colours.append({label: handle.lines[0].get_color() for handle, label in zip(handles, labels)})
    greedy, sampled = colours
    assert set(greedy) == set(kinds) and sampled == {kind: greedy[kind] for kind in kinds[1:]}


def test_marks_are_joined_where_nothing_lies_between_that_was_not_run(monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    arms = [Arm(where, what, WORLD) for what, wheres in (("all", "123"), ("ends", "13")) for where in wheres]
    result = {0: claims_report.Result({}, [], [[0.0], [1.0]], [[0.0], [1.0]])}
    claims_report.draw(Claim("x", arms, [], ordinal=True), {arm.name: result for arm in arms}, None)
    handles, labels = drawn[0].axes[0].get_legend_handles_labels()
    joined = {label: handle.lines[0].get_linestyle() for handle, label in zip(handles, labels)}
    assert joined == {"all": "-", "ends": "None"}


def test_readme_and_pages_are_the_raw_rows():
    every, folder = claims_table.all_claims(), ROOT / "results" / "claims"
    table = (ROOT / "README.md").read_text().split("<!-- claims -->")[1].split("<!-- /claims -->")[0]
    assert table.strip() == claims_report.readme_part(every, folder)
    for name, claim in every.items():
        path = folder / f"{name}.md"
        if path.exists():
            assert path.read_text() == claims_report.page(name, claim, claims_report.read_claim(claim, folder / name))
    assert sum(file.stat().st_size for file in (ROOT / "results").rglob("*") if file.is_file()) < 20e6


def test_two_calls_do_not_train_into_each_others_runs(tmp_path):
    with claims.take_lock(tmp_path / "P1"):
        claims.take_lock(tmp_path / "P2").close()
        with pytest.raises(SystemExit, match="another call runs arms in"):
            claims.take_lock(tmp_path / "P1")
    claims.take_lock(tmp_path / "P1").close()
