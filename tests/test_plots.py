"""plots.py: curves and their errors by hand, what stands where in a picture, and the demo's table."""
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import eval as evaluation
import plots


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refused(*arguments):
    """The sentence with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(argument) for argument in arguments])
    return str(stop.value)


def shows_something(path):
    """A picture that opens and has more than a hundred colours, text and lines among them."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return len(pixels) > 10_000 and len(np.unique(pixels, axis=0)) > 100


def metric_rows(steps=80):
    return [{"step": i, "reward": 1 + i / 100, "reward/iou": 0.3, "kl": 0.01, "entropy": 1.0,
             "length": 17, "clip_low": 0, "clip_high": 0.1, "zero_variance": 0.2,
             "seconds/sample": 1.0, "seconds/train": 2.0, "seconds/refresh": 0.1,
             "seconds/total": 3.1 * i, **({"eval/greedy": i / 80, "eval/sampled": i / 90}
                                          if i % 20 == 19 else {})} for i in range(steps)]


def make_run(folder, steps=80):
    folder.mkdir(parents=True)
    write(folder / "metrics.jsonl", *metric_rows(steps), '{"step": 80, "rew')
    return folder


# ---- curves ----
def only(lines):
    (line,) = lines
    return line


def test_curves_by_hand_with_a_resume_and_half_a_line(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"step": 1, "reward": 9.0, "kl": None}) + "\n")  # null: not finite
    panels = plots.curves([run])
    assert panels["reward"] == [plots.Line(str(run), "reward", [1, 2, 3], [1.0, 9.0, 1.02])]
    assert [line.metric for line in panels["clipped tokens (share)"]] == ["clip_low", "clip_high"]
    assert only(panels["parts of the reward"]).xs == only(panels["KL to the reference (nats a token)"]).xs == [1, 3]
    assert "seconds/total" not in str(panels) and "loss" not in panels


def test_held_out_points_have_the_standard_error_of_a_share(tmp_path):
    rows = [{"step": 0, "reward": 1.0, "before/greedy": 0.1}, {"step": 49, "reward": 1.0, "eval/greedy": 0.2},
            {"step": 99, "reward": 1.0, "eval/greedy": 0.5}]
    write(tmp_path / "metrics.jsonl", *rows)
    assert only(plots.curves([tmp_path])["held-out accuracy"]).errors is None  # of how many is unknown
    write(tmp_path / "config.json", {"eval_samples": 100})
    panels = plots.curves([tmp_path])  # from the model before the first step on
    # √(0.1·0.9/100) = 0.03, √(0.2·0.8/100) = 0.04, √(0.5·0.5/100) = 0.05
    line = only(panels["held-out accuracy"])
    assert line.xs == [0, 50, 100] and line.errors == pytest.approx([0.03, 0.04, 0.05])
    assert only(panels["reward"]).errors is None


def test_an_arm_is_the_mean_of_its_seeds(tmp_path):
    for seed, first, second in ((0, 1.0, 2.0), (1, 3.0, 2.0)):
        (tmp_path / f"grpo-{seed}").mkdir()
        rows = [{"step": 0, "reward": first}, {"step": 1, "reward": second}]
        rows += [{"step": 2, "reward": 7.0, "kl": 1.0}] * (1 - seed)  # the other one has not come so far
        write(tmp_path / f"grpo-{seed}" / "metrics.jsonl", *rows)
    runs = [tmp_path / "grpo-0", tmp_path / "grpo-1"]
    panels = plots.mean_curves("grpo", runs)
    # mean of 1 and 3 is 2, s = √2, s/√2 = 1; both are 2 at the second step
    assert panels == {"reward": [plots.Line("grpo (mean of 2)", "reward", [1, 2], [2.0, 2.0], pytest.approx([1.0, 0.0]), 1)]}
    assert plots.mean_curves("one", runs[:1])["reward"][0].errors is None


def test_arms_are_runs_named_alike_but_for_the_last_number():
    runs = [*map(plots.Path, ("runs/b2-0", "runs/dr-1", "runs/b2-1", "s0/grpo", "s1/grpo"))]
    assert plots.arms(runs) == {"runs/b2": [runs[0], runs[2]], "runs/dr": [runs[1]], "s/grpo": runs[3:]}


def panel_of(lines, runs):
    figure = Figure(layout="constrained")
    axis = figure.add_subplot(title="parts")
    plots.draw_panel(axis, lines, runs, "step")
    figure.draw_without_rendering()
    return axis


def test_a_run_has_one_colour_and_a_metric_one_style():
    lines = [plots.Line(run, metric, [1, 2], [0.1, 0.2]) for run in ("a", "b") for metric in ("reward/iou", "reward/format")]
    axis = panel_of(lines, ["a", "b"])
    drawn = [(line.get_color(), line.get_linestyle()) for line in axis.get_lines()]
    assert drawn == [("C0", "-"), ("C1", "-"), ("C0", "--"), ("C1", "--")]
    legend = axis.get_legend()
    assert [(text.get_text(), line.get_linestyle()) for text, line in zip(legend.get_texts(), legend.get_lines())] == [
        ("iou", "-"), ("format", "--")]
    assert legend.get_window_extent().y1 < axis.get_window_extent().y0  # below: it hides no curve
    alone = panel_of(lines[:2], ["a"])
    assert [line.get_color() for line in alone.get_lines()] == ["C0", "C1"]  # then colour is free


def test_errors_are_bars_at_points_and_an_area_around_a_mean():
    point = plots.Line("a", "eval/greedy", [1, 2], [0.5, 0.6], [0.1, 0.2])
    axis = panel_of([point], ["a"])
    (bars,) = axis.collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.4, 0.6], pytest.approx([0.4, 0.8])]
    assert axis.get_xlabel() == "step (± one standard error)" and axis.get_legend() is None
    mean = plots.Line("a (mean of 2)", "reward", [1, 2], [0.5, 0.6], [0.1, 0.2], smoothed=15)
    axis = panel_of([mean], ["a (mean of 2)"])
    (area,) = axis.collections
    (shape,) = area.get_paths()
    assert {tuple(point) for point in shape.vertices.round(6)} == {(1, 0.4), (2, 0.4), (1, 0.6), (2, 0.8)}
    assert axis.get_xlabel() == "step (running mean of 15, ± one standard error)"


def test_plot_of_one_run_of_two_and_of_an_arm(tmp_path, capsys):
    one, two = make_run(tmp_path / "one" / "grpo"), make_run(tmp_path / "two" / "grpo", steps=30)
    evaluation.main(["plot", str(one)])
    assert shows_something(one / "curves.png")
    assert f"1 runs in {one / 'curves.png'}" in capsys.readouterr().out
    evaluation.main(["plot", str(one), str(two), "--out", str(tmp_path / "new" / "both")])  # a folder that is not there yet
    assert shows_something(tmp_path / "new" / "both.png")
    assert f"2 runs in {tmp_path / 'new' / 'both.png'}" in capsys.readouterr().out
    seeds = [make_run(tmp_path / f"arm-{seed}") for seed in (0, 1)]
    evaluation.main(["plot", *map(str, seeds), "--seeds", "--out", str(tmp_path)])  # in a folder that is there
    assert shows_something(tmp_path / "curves.png")


def test_where_a_picture_goes(tmp_path):
    default = tmp_path / "run" / "curves.png"
    assert plots.picture_path("", default) == default
    assert plots.picture_path(tmp_path / "v1.2", default) == tmp_path / "v1.2.png"
    assert plots.picture_path(tmp_path / "a.pdf", default) == tmp_path / "a.pdf"
    assert plots.picture_path(tmp_path, default) == tmp_path / "curves.png"


def test_plots_that_can_not_be_made(tmp_path):
    assert "metrics.jsonl" in refused("plot", tmp_path)
    write(tmp_path / "metrics.jsonl")
    assert "no step has been logged yet" in refused("plot", tmp_path)
    assert "--pictures-every" in refused("show", tmp_path)
    (tmp_path / "samples").mkdir()
    write(tmp_path / "samples" / "step-0.json", [{"text": "[]", "reward": 1.0}])
    assert "step-0.json: a row lacks answer, draw" in refused("show", tmp_path)
    file = write(tmp_path / "file")
    assert str(file) in refused("plot", make_run(tmp_path / "run"), "--out", file / "below")


# ---- tables ----
def test_demo_table_by_hand():
    table = {"samples": 400, "metric": "accuracy", "before": {"greedy": 0.25, "sampled": 1.0},
             "after": {"greedy": 0.5, "sampled": 0.9}}
    about, _, greedy, sampled = plots.demo_table(table).splitlines()
    assert about == "held-out accuracy of the answer alone, 400 samples, ± one standard error"
    # standard errors √(0.25·0.75/400) = 2.165 %, √(0.25/400) = 2.5 %; errors 0.75 and 0.5, their ratio 0.667
    assert " ".join(greedy.split()) == "greedy 25.0 ± 2.2 % 50.0 ± 2.5 % +25.0 points 75.0 → 50.0 %, ×0.67"
    assert sampled.endswith(" 0.0 → 10.0 %")  # nothing to be a part of
    graded = plots.demo_table(table | {"metric": "F1"}).splitlines()[0]
    assert graded == "held-out F1 of the answer alone, 400 samples, ± at most one standard error"
