"""sheets.py: a run's samples from best to worst, eight answers over a scene, scenes before and after."""
import json

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import sheets
from sources import Sample


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
    (group,) = sheets.read_groups(file)
    ((title, tiles),) = sheets.group_rows(group, file.parent)
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
    ((title, (tile,)),) = sheets.group_rows(sheets.read_groups(file)[0], file.parent)
    assert title == "step 3: ocr - true: seven" and tile.fact == "step 3, reward 0.50, similarity 0.50, cut"
    assert len(tile.said) == 3 and tile.said[-1].endswith(" …")


def test_large_groups_take_several_rows(tmp_path):
    file = save_samples(tmp_path, 3, "white", [1.0] * 10)
    rows = sheets.group_rows(sheets.read_groups(file)[0], file.parent)
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
    assert sheets.spread([0, 1, 2, 3, 4, 5, 6], 3) == [0, 3, 6] and sheets.spread([0, 1], 3) == [0, 1]
    assert sheets.spread([0, 1, 2], 1) == [2]


# ---- answers over each other ----
WHITE, TRUE, SAID = (255, 255, 255), (0, 208, 255), (255, 0, 192)
ANSWER = [{"bbox_2d": [5, 5, 20, 20], "label": "red circle"}]


def boxes_at(*lefts):
    """Eight answers, one box each: 20 pixels wide and high, its left edge at one of these."""
    return [f'[{{"bbox_2d": [{left}, 40, {left + 20}, 60], "label": "red circle"}}]' for left in lefts]


def test_eight_boxes_at_one_place_are_one_sharp_box():
    image = Image.new("RGB", (84, 84), "white")
    tile = sheets.cloud(image, "detection", boxes_at(*[30] * 8), ANSWER, (84, 84), width=252)
    # Three times as large: the box said from (90, 120) to (150, 180), the true one from (15, 15).
    # Each covers 40 %, eight 1 − 0.6⁸ = 98.3 %: of white's 255 green 4.3 are left, of 255 − 192 = 63 blue 1.06.
    assert tile.size == (252, 252) and tile.getpixel((15, 40)) == TRUE and tile.getpixel((200, 200)) == WHITE
    for corner in ((90, 120), (150, 120), (90, 180), (150, 180)):
        red, green, blue = tile.getpixel(corner)
        assert red == 255 and green <= 12 and abs(blue - 193) <= 6, corner


def test_eight_boxes_at_eight_places_are_a_cloud():
    image = Image.new("RGB", (84, 84), "white")
    lefts = [4, 11, 18, 25, 32, 39, 46, 53]
    tile = sheets.cloud(image, "detection", boxes_at(*lefts), ANSWER, (84, 84), width=252)
    for left in lefts:  # halfway down its left edge, on which no other box lies: 255 − 0.4 · 255 = 153 green,
        red, green, blue = tile.getpixel((3 * left, 150))  # 255 − 0.4 · 63 = 229.8 blue
        assert red == 255 and abs(green - 153) <= 1 and abs(blue - 229.8) <= 1, left
    darkest = min(tile.getpixel((x, 150))[1] for x in range(252))
    assert darkest > 80  # nowhere a line as clear as that of eight


def test_a_text_that_says_no_place_and_a_scene_without_an_image():
    image = Image.new("RGB", (84, 84), "white")
    tile = sheets.cloud(image, "detection", ["nothing", "[]"], ANSWER, (84, 84))
    assert {colour for _, colour in tile.getcolors()} == {WHITE, TRUE}
    assert sheets.cloud(None, "math", ["4"], "4", None).size == (230, 28)


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
        patch.setattr(sheets, "sheet", lambda lines, heading: seen.append((lines, heading)))
        sheets.before_after(samples, rows)
    ((lines, heading),) = seen
    assert [(title, len(tiles)) for title, tiles in lines] == [
        ("before GRPO", 6), ("after GRPO", 6), ("before GRPO", 2), ("after GRPO", 2)]
    assert heading == "The first held-out scenes, 8 sampled answers over each"
    facts = [tiles[-1].fact for _, tiles in lines]  # means of 1, 0, 0, 0 and of 1, 1, 1, 0
    assert facts == ["scene 6: mean F1 0.25", "scene 6: mean F1 0.75", "scene 8: mean F1 0.25", "scene 8: mean F1 0.75"]
    before, after = lines[0][1][0].picture, lines[1][1][0].picture
    assert before.getpixel((11 * 230 // 84, 136))[1] > 100 > after.getpixel((30 * 230 // 84, 136))[1]
    page = sheets.before_after(samples, rows)
    assert page.size == (6 * 240 + 10, 44 + 4 * (24 + 230 + 18 + 15 + 10))


def test_answers_that_are_no_places_are_counted():
    rows = [{"id": "scene-0", "completion": text, "correct": float(text == "7")} for text in ("7", "8", "7", "9", "7")]
    tile = sheets.cloud_tile(1, scene(0, "math", "7"), rows)
    assert tile.fact == "scene 1: mean accuracy 0.60"
    assert tile.said == ["coloured shapes", "true: 7", "3 x 7", "1 x 8", "1 x 9"]
