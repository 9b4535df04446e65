"""plots.py: curves and their errors by hand, what stands where in a picture, and sheets of samples."""
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import eval as evaluation
import plots
from sources import Sample


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


# ---- sheets of samples ----
def save_samples(run, step, colour, rewards, **about):
    """A step's samples as a run folder keeps them: one prompt, a completion for each reward."""
    folder = run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (115, 56), colour).save(folder / f"step-{step}-7.png")
    row = {"step": step, "draw": 7, "id": "s", "task": "grounding", "question": "red star", "answer": [10, 10, 50, 30],
           "image": f"step-{step}-7.png", "image_size": [115, 56], "text": "[20, 20, 60, 40]", "truncated": False}
    rows = [row | {"reward": reward, "parts": {"format": 1.0, "iou": reward - 1}} | about for reward in rewards]
    (folder / f"step-{step}.json").write_text(json.dumps(rows))
    return folder / f"step-{step}.json"


def test_a_group_is_shown_whole_from_best_to_worst(tmp_path):
    file = save_samples(tmp_path, 50, "white", [1.25, 1.75, 1.5])
    (group,) = plots.read_groups(file)
    ((title, tiles),) = plots.group_rows(group, file.parent)
    assert title == "step 50: red star"
    assert [tile.fact for tile in tiles] == ["step 50, reward 1.75, IoU 0.75", "step 50, reward 1.50, IoU 0.50",
                                             "step 50, reward 1.25, IoU 0.25"]
    # The picture is twice as wide, so the corner of the box said, (20, 20), is at (40, 40); of the true one at (20, 20).
    tile = tiles[0].picture
    assert tile.size == (230, 112) and tiles[0].said == ["[20, 20, 60, 40]"]
    assert tile.getpixel((40, 40)) == (255, 0, 192) and tile.getpixel((20, 20)) == (0, 208, 255)


def test_a_tile_of_text_says_what_is_true_and_what_was_cut(tmp_path):
    about = {"task": "ocr", "answer": "seven", "question": "", "text": "se ven " * 40, "truncated": True, "parts": {"similarity": 0.5},
             "image": None, "image_size": None}
    file = save_samples(tmp_path, 3, "white", [0.5], **about)
    ((title, (tile,)),) = plots.group_rows(plots.read_groups(file)[0], file.parent)
    assert title == "step 3: ocr - true: seven" and tile.fact == "step 3, reward 0.50, similarity 0.50, cut"
    assert len(tile.said) == 3 and tile.said[-1].endswith(" …")


def test_large_groups_take_several_rows(tmp_path):
    file = save_samples(tmp_path, 3, "white", [1.0] * 10)
    rows = plots.group_rows(plots.read_groups(file)[0], file.parent)
    assert [(title, len(tiles)) for title, tiles in rows] == [("step 3: red star", 8), ("", 2)]


def test_show_goes_from_the_first_step_to_the_last(tmp_path, capsys):
    colours = {0: (200, 0, 0), 50: (0, 150, 0), 100: (0, 0, 250), 1000: (90, 90, 0)}
    for step, colour in colours.items():
        save_samples(tmp_path, step, colour, [1.0, 2.0])
    evaluation.main(["show", str(tmp_path), "--steps", "3", "--out", str(tmp_path / "page")])
    assert str(tmp_path / "page.png") in capsys.readouterr().out
    with Image.open(tmp_path / "page.png") as page:
        pixels = np.asarray(page.convert("RGB"))
    tops = {}
    for step, colour in colours.items():
        found = np.argwhere((pixels == colour).all(axis=2))
        if len(found):
            tops[step] = found[:, 0].min()
            assert found[:, 1].max() > 2 * 230  # both completions, side by side
    assert sorted(tops, key=tops.get) == [0, 100, 1000]  # evenly spaced, and by number, not by name


def test_a_spread_holds_both_ends():
    assert plots.spread([0, 1, 2, 3, 4, 5, 6], 3) == [0, 3, 6] and plots.spread([0, 1], 3) == [0, 1]
    assert plots.spread([0, 1, 2], 1) == [2]


# ---- answers over each other ----
WHITE, TRUE, SAID = (255, 255, 255), (0, 208, 255), (255, 0, 192)
ANSWER = [{"bbox_2d": [5, 5, 20, 20], "label": "red circle"}]


def boxes_at(*lefts):
    """Eight answers, one box each: 20 pixels wide and high, its left edge at one of these."""
    return [f'[{{"bbox_2d": [{left}, 40, {left + 20}, 60], "label": "red circle"}}]' for left in lefts]


def test_eight_boxes_at_one_place_are_one_sharp_box():
    image = Image.new("RGB", (84, 84), "white")
    tile = plots.cloud(image, "detection", boxes_at(*[30] * 8), ANSWER, (84, 84), width=252)
    # Three times as large: the box said from (90, 120) to (150, 180), the true one from (15, 15).
    # Each covers 40 %, eight 1 − 0.6⁸ = 98.3 %: of white's 255 green 4.3 are left, of 255 − 192 = 63 blue 1.06.
    assert tile.size == (252, 252) and tile.getpixel((15, 40)) == TRUE and tile.getpixel((200, 200)) == WHITE
    for corner in ((90, 120), (150, 120), (90, 180), (150, 180)):
        red, green, blue = tile.getpixel(corner)
        assert red == 255 and green <= 12 and abs(blue - 193) <= 6, corner


def test_eight_boxes_at_eight_places_are_a_cloud():
    image = Image.new("RGB", (84, 84), "white")
    lefts = [4, 11, 18, 25, 32, 39, 46, 53]
    tile = plots.cloud(image, "detection", boxes_at(*lefts), ANSWER, (84, 84), width=252)
    for left in lefts:  # halfway down its left edge, on which no other box lies: 255 − 0.4 · 255 = 153 green,
        red, green, blue = tile.getpixel((3 * left, 150))  # 255 − 0.4 · 63 = 229.8 blue
        assert red == 255 and abs(green - 153) <= 1 and abs(blue - 229.8) <= 1, left
    darkest = min(tile.getpixel((x, 150))[1] for x in range(252))
    assert darkest > 80  # nowhere a line as clear as that of eight


def test_a_text_that_says_no_place_and_a_scene_without_an_image():
    image = Image.new("RGB", (84, 84), "white")
    tile = plots.cloud(image, "detection", ["nothing", "[]"], ANSWER, (84, 84))
    assert {colour for _, colour in tile.getcolors()} == {WHITE, TRUE}
    assert plots.cloud(None, "math", ["4"], "4", None).size == (230, 28)


def scene(number, task="detection", answer=ANSWER):
    images = () if task == "math" else (Image.new("RGB", (84, 84), "white"),)
    return Sample(f"scene-{number}", task, "coloured shapes", answer, images)


def test_scenes_before_stand_over_the_same_scenes_after():
    samples = [scene(number) for number in range(8)]
    rows = {"before": [], "after": []}
    for sample in samples:
        for text, before, after in zip(boxes_at(4, 11, 18, 25), (1, 0, 0, 0), (1, 1, 1, 0)):
            rows["before"].append({"id": sample.id, "completion": text, "correct": before})
            rows["after"].append({"id": sample.id, "completion": boxes_at(30)[0], "correct": after})
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "sheet", lambda lines, heading: seen.append((lines, heading)))
        plots.before_after(samples, rows)
    ((lines, heading),) = seen
    assert [(title, len(tiles)) for title, tiles in lines] == [
        ("before GRPO", 6), ("after GRPO", 6), ("before GRPO", 2), ("after GRPO", 2)]
    assert heading == "The first held-out scenes, 8 sampled answers over each"
    facts = [tiles[-1].fact for _, tiles in lines]  # means of 1, 0, 0, 0 and of 1, 1, 1, 0
    assert facts == ["scene 6: mean F1 0.25", "scene 6: mean F1 0.75", "scene 8: mean F1 0.25", "scene 8: mean F1 0.75"]
    before, after = lines[0][1][0].picture, lines[1][1][0].picture
    assert before.getpixel((11 * 230 // 84, 136))[1] > 100 > after.getpixel((30 * 230 // 84, 136))[1]
    page = plots.before_after(samples, rows)
    assert page.size == (6 * 240 + 10, 44 + 4 * (24 + 230 + 18 + 15 + 10))


def test_answers_that_are_no_places_are_counted():
    rows = [{"id": "scene-0", "completion": text, "correct": float(text == "7")} for text in ("7", "8", "7", "9", "7")]
    tile = plots.cloud_tile(1, scene(0, "math", "7"), rows)
    assert tile.fact == "scene 1: mean accuracy 0.60"
    assert tile.said == ["coloured shapes", "true: 7", "3 x 7", "1 x 8", "1 x 9"]


# ---- tables ----
def test_the_metric_has_its_name():
    assert plots.metric_name(["detection", "detection"]) == "F1"
    assert plots.metric_name(["grounding", "counting", "math"]) == "accuracy"
    assert plots.metric_name(["ocr"]) == "similarity" and plots.metric_name(["ocr", "math"]) == "score"


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
