"""sources.py: frames, bad rows by file and line, the held-out split, what is said in words."""

import json

import numpy as np
import pytest
from PIL import Image
from small import HERE, RED, SMALL, check, one, pictures_of, write

import pictures
from data import DataError, open_data
from sources import Sample, chance, solution

# ---- sizes and frames ----


def test_the_resized_block_lies_where_its_answer_says():
    sample = one("@own.jsonl")
    red = np.asarray(sample.images[0])[..., 1] < 128
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert sample.answer == pytest.approx(RED)
    assert seen == pytest.approx(RED, abs=1)
    assert sample.image_size == (112, 56)
    assert pictures.scale(sample.answer, (112, 56), (100, 50)) == pytest.approx([20, 10, 60, 40])


# ---- bad input ----


@pytest.mark.parametrize("row, words", [
    ('{"task": "math"', "Expecting ',' delimiter at column 16: this is not JSON"),
    ("[1, 2]", "an object of named fields, not [1, 2]"),
    ("[" * 100_000, "nested too deeply"),
    ({"task": "poetry", "question": "q", "answer": "a"}, "'poetry' is none of"),
    ({"question": "q", "answer": "a"}, "task None is none of"),
    ({"task": "math", "question": 3, "answer": "a"}, "question is not text"),
    ({"task": "math", "question": "q"}, "answer is missing among task, question: is it --fields answer=NAME"),
    ({"task": "choice", "question": "q", "answer": "maybe"}, "one letter"),
    ({"task": "grounding", "question": "q", "answer": [1, 2, 3, 4]}, "needs an image"),
    ({"task": "grounding", "image": "no.png", "question": "q", "answer": [1, 2, 3, 4]}, "no image"),
    ({"task": "grounding", "image": "a.png", "question": "q", "answer": [1, 2, 3]}, "must be [x1, y1, x2, y2], not [1, 2, 3]"),
    ({"task": "grounding", "image": "a.png", "question": "q", "answer": [1, 2, 1, 9]}, "x2 ≤ x1"),
    ({"task": "counting", "image": "a.png", "question": "q", "answer": [[1]]}, "must be [x, y], not [1]"),
    ({"task": "detection", "image": "a.png", "question": "q", "answer": [{"box": 1}]}, "bbox_2d"),
    ({"task": "ocr", "image": 5, "question": "q", "answer": "a"}, "a path, base64 or bytes, not 5"),
    ({"task": "ocr", "image": "../secret.png", "question": "q", "answer": "a"}, "no image"),
    ({"task": "ocr", "image": "/etc/passwd", "question": "q", "answer": "a"}, "no image"),
    ({"task": "ocr", "image": "a" * 5000 + ".png", "question": "q", "answer": "a"}, "no image"),
    ({"task": "ocr", "image": "a\0.png", "question": "q", "answer": "a"}, "null"),
    ({"task": "math", "question": "q", "answer": "a", "id": "good"}, "is taken by"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, words):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    good = {"task": "math", "question": "q", "answer": "a", "id": "good"}
    path = write(tmp_path, good, "", row)
    (fault,) = check([path])
    assert fault.startswith(f"{path}:3: ") and words in fault
    with pytest.raises(DataError, match="1 bad rows"):
        open_data([path])
    mix = open_data([path], skip_bad=1)
    assert len(mix) == 1 and mix.faults == [fault]


def test_coordinates_outside_the_image_are_a_fault():
    spec = f"refcoco-vlmr1:{HERE}/refcoco_pr1.json"  # the other scale: [200, 200, 600, 800]
    (fault,) = check([spec], **SMALL)  # its first row is [0, 0, 1, 1], which is not to be told
    assert "refcoco_pr1.json: row 2: " in fault and "frame=1000" in fault and "(100, 50)" in fault


def test_extreme_sizes_and_broken_files_are_found_by_check(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (10_000, 1)).save(tmp_path / "line.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    rows = [{"task": "ocr", "image": f"{name}.png", "question": "", "answer": "a"}
            for name in ("dot", "line", "bad")]
    path = write(tmp_path, *rows)
    assert open_data([path]).at(0).image_size == (56, 56)
    thin, bad = check([path])
    assert thin.startswith(f"{path}:2: ") and "200 : 1" in thin
    assert bad.startswith(f"{path}:3: ") and "unusable" in bad


# ---- the held-out split ----


def asked(path, split, **options):
    mix = open_data([path], split=split, **SMALL | options)
    return [mix.at(index).question for index in range(len(mix))]


@pytest.mark.parametrize("by_bytes", [False, True])
def test_a_share_of_a_file_is_held_out_by_image(tmp_path, by_bytes):
    rows = pictures_of(tmp_path, 60, by_bytes=by_bytes)
    path = write(tmp_path, *rows)
    train, held = (asked(path, split, heldout=0.2) for split in ("train", "heldout"))
    assert sorted(train + held) == sorted(row["question"] for row in rows)
    assert not {q.split()[0] for q in train} & {q.split()[0] for q in held}  # by image
    assert 12 <= len(held) <= 36  # of 120 the share is 24
    assert asked(path, "all", heldout=0.2) == asked(path, "train") == [row["question"] for row in rows]
    for split, count in (("train", len(held)), ("heldout", len(held)), ("all", len(held))):
        assert open_data([path], split=split, heldout=0.2).heldout_count == count
    assert open_data([path]).heldout_count == 0


def test_what_is_held_out_follows_from_the_image_alone(tmp_path):
    rows = pictures_of(tmp_path, 60)
    held = asked(write(tmp_path, *rows), "heldout", heldout=0.2)
    assert asked(write(tmp_path, *rows[::-1]), "heldout", heldout=0.2) == held[::-1]  # order
    assert asked(write(tmp_path, *rows, name="other.jsonl"), "heldout", heldout=0.2, seed=7) == held
    third = [rows[0] | {"question": f"{number} c", "image": f"{number}.png"} for number in range(60)]
    more = asked(write(tmp_path, *third, *rows), "heldout", heldout=0.2)  # another expression
    assert {q.split()[0] for q in more} == {q.split()[0] for q in held} and len(more) == len(held) * 3 / 2
    assert set(held) <= set(asked(write(tmp_path, *rows), "heldout", heldout=0.3))
    # SHA-256 of "0.png" begins with 0f25: 3877 / 65536 = 0.0592
    assert chance(Sample("", "ocr", "q", "a"), ["/x/0.png"]) == pytest.approx(0.0592, abs=1e-4)


def test_texts_are_held_out_by_question(tmp_path):
    rows = [{"task": "math", "question": str(number % 50), "answer": "1"} for number in range(100)]
    train, held = (asked(write(tmp_path, *rows), split, heldout=0.3) for split in ("train", "heldout"))
    assert len(train) + len(held) == 100 and held and not set(train) & set(held)


def test_a_data_set_too_small_to_hold_out_asks_for_eval_data(tmp_path):
    path = write(tmp_path, *pictures_of(tmp_path, 1))
    with pytest.raises(DataError, match=r"of 2 samples . are held out .*--eval-data"):
        open_data([path], split="heldout", heldout=0.01)
    assert len(open_data([path], split="train", heldout=0.01)) == 2  # nothing to leave out, nothing evaluated
    with pytest.raises(DataError, match="train, heldout or all"):
        open_data([path], split="test")
    with pytest.raises(DataError, match="0 … 1"):
        open_data([path], heldout=1.5)


# ---- words ----


def test_a_wrong_format_says_so_once(tmp_path):
    rows = [{"prompt": f"text {number}", "label": number} for number in range(30)]
    (fault,) = check([write(tmp_path, *rows) + "?task=math"])
    assert "none of the 30 rows can be used: " in fault
    assert "question is missing among prompt, label: is it --fields question=NAME" in fault
    pretty = json.dumps([{"task": "math", "question": "q", "answer": "1"}], indent=1)
    (fault,) = check([write(tmp_path, pretty)])  # a list of rows, not a row a line
    assert "none of the 7 rows can be used: " in fault
    assert fault.endswith("rows.jsonl:1: Expecting value at column 2: this is not JSON, is it another format?")


def test_options_are_read_as_they_are_written(tmp_path):
    (tmp_path / "train+val").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "train+val" / "a b.png")
    row = {"task": "ocr", "question": "", "answer": "x", "image": "a b.png"}
    path = write(tmp_path, row)
    assert check([path + "?folder=train+val"], **SMALL) == []
    for spec, words in ((path + "?in_order=0", "none of 1"), (path + "?frame=-1", "number above 0"),
                        (path + "?box=yxyx", "none of xywh"), (path + "?read=x", "sets none of the options")):
        (fault,) = check([spec])
        assert words in fault
    with pytest.raises(DataError, match="in --fields: 'question' sets none of the options task"):
        open_data([path], fields="question")


def test_ids_that_repeat_can_be_numbers(tmp_path):
    row = {"task": "math", "question": "q", "answer": "1", "id": "7"}
    path = write(tmp_path, row, row)
    (fault,) = check([path])
    assert fault == f"{path}:2: id '7' is taken by {path}:1: ?id= numbers the rows, ?id=NAME takes another field"
    numbered = open_data([path + "?id="])
    assert [numbered[draw].id for draw in range(2)] != ["7", "7"] and check([path + "?id="]) == []


def test_a_folder_or_a_missing_field_is_named_in_words(tmp_path):
    row = {"task": "ocr", "question": "", "answer": "x", "image": "."}
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    (fault,) = check([write(tmp_path, row, row | {"image": "a.png"})])
    assert "no image '.' in " in fault and "Errno" not in fault
    (fault,) = check(["fox:" + write(tmp_path, {"conversations": []}, name="f.jsonl")])
    assert fault.endswith("f.jsonl:1: the field 'image' is missing")


# ---- drawn worlds ----


def test_a_solution_adds_from_the_left_and_checks_from_the_right():
    said = solution("What is -3 + 6 - 10?")
    assert said == (
        "<think>First, I add from the left: -3 + 6 = 3. 3 - 10 = -7. Let me check it from the right: -7 + 10 = 3. "
        "3 - 6 = -3. That is where I began.</think><answer>\\boxed{-7}</answer>")
