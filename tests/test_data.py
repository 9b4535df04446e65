"""data.py: frames, bad input, drawn worlds, mixing, the held-out split, checking."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from small import HERE, RED, SMALL, one, write

import data
import pictures
from data import DataError, check, open_data
from pictures import Synthetic


def drawn(task, **options):
    """Samples of a drawn world, at the size that they are drawn in."""
    return data.DrawnSource(Synthetic(task, **options))


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


@pytest.mark.parametrize("name, words", [
    ("none.jsonl", "No such file"), ("empty.jsonl", "no samples"), ("refs.p", "pickle can run"),
    ("dict.json", "coco:FILE"), ("half.json", "Expecting"), ("coco:dict.json", "lists images, annotations and categories"),
    ("synthetic:poetry", "no task"), ("synthetic:ocr?size=oo", "oo"), ("tfds:x", "none of jsonl"),
    ("synthetic:ocr?sise=28x28", "sise"), ("synthetic:counting?objects=5-2", "objects=5-2"),
    ("math500:empty.jsonl?colour=red", "colour"), ("synthetic:counting?objects=999", "do not fit"),
])
def test_what_cannot_be_opened_says_why(tmp_path, monkeypatch, name, words):
    files = {"empty.jsonl": "\n", "refs.p": "x", "dict.json": "{}", "half.json": "["}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        open_data([name])


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


# ---- the drawn world ----


def test_train_and_heldout_share_no_scene():
    def scenes(split):
        return {drawn("counting", split=split)[i].images[0].tobytes() for i in range(150)}

    train, heldout = scenes("train"), scenes("heldout")
    assert len(train) == len(heldout) == 150 and not train & heldout
    mix = open_data(["synthetic:counting?count=5"], split="heldout", seed=3)
    assert mix.at(0).id == "synthetic-counting-heldout-0" and len(mix) == 5
    assert mix.at(0).images[0] == drawn("counting", split="heldout", seed=3)[0].images[0]


# ---- mixing ----


def ids(mix, draws):
    return [mix[k].id for k in draws]


def test_a_pass_draws_each_sample_once_and_the_next_in_another_order():
    mix = open_data(["synthetic:math?text=1&count=7", "synthetic:counting?count=5"], seed=5)
    passes = [ids(mix, range(12 * p, 12 * p + 12)) for p in range(3)]
    assert len(mix) == 12 and all(len(set(drawn)) == 12 for drawn in passes)
    assert sorted(passes[0]) == sorted(passes[1]) and passes[0] != passes[1] != passes[2]


def test_a_draw_depends_on_seed_and_cursor_alone():
    specs = ["synthetic:math?text=1&count=7:0.3", "synthetic:math?text=1&seed=1&count=5:0.7"]
    mix = open_data(specs, seed=5)
    straight = ids(mix, range(300))
    again = open_data(specs, seed=5)
    assert [again[k].id for k in (299, 0, 150)] == [straight[299], straight[0], straight[150]]
    assert ids(open_data(specs, seed=6), range(300)) != straight


def test_weights_set_the_shares_exactly_in_a_thousand_draws():
    mix = open_data(["synthetic:math?text=1&count=30:0.7", f"math500:{HERE}/math500.jsonl:0.3"])
    drawn = ids(mix, range(1000))
    assert drawn.count("test/algebra/1.json") == 300
    # 700 draws of 30 samples are 23 whole passes and ten samples of the next one
    counts = sorted(drawn.count(f"synthetic-math-train-{i}") for i in range(30))
    assert counts == [23] * 20 + [24] * 10
    with pytest.raises(DataError, match="under 1/1000"):
        open_data(["synthetic:math:0.9999", "synthetic:ocr:0.0001"])
    with pytest.raises(DataError, match="to each"):
        open_data(["synthetic:math:0.5", "synthetic:ocr"])


# ---- pictures ----


def test_a_curriculum_is_drawn_in_the_files_order(tmp_path):
    rows = [f'{{"task": "math", "id": "{i}", "question": "{i}", "answer": "{i}"}}\n' for i in range(5)]
    (tmp_path / "easy_to_hard.jsonl").write_text("".join(rows))
    mix = data.open_data([f"{tmp_path}/easy_to_hard.jsonl?in_order=1"], seed=3)
    assert [mix[draw].id for draw in range(7)] == ["0", "1", "2", "3", "4", "0", "1"]
    shuffled = data.open_data([f"{tmp_path}/easy_to_hard.jsonl"], seed=3)
    assert [shuffled[draw].id for draw in range(5)] != ["0", "1", "2", "3", "4"]


# ---- the held-out split of files ----


def pictures_of(folder, count, *, by_bytes=False):
    """A row for each of two expressions about each of `count` images."""
    rows = []
    for number in range(count):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(folder / f"{number}.png")
        for part in "ab":
            row = {"task": "ocr", "question": f"{number} {part}", "answer": "x", "image": f"{number}.png"}
            if by_bytes:
                content = (folder / f"{number}.png").read_bytes()
                row["image"] = base64.b64encode(content).decode()
            rows.append(row)
    return rows


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
    assert data.chance(data.Sample("", "ocr", "q", "a"), ["/x/0.png"]) == pytest.approx(0.0592, abs=1e-4)


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


def test_drawn_worlds_keep_their_own_stream():
    mixes = [open_data(["synthetic:math?text=1&count=5"], heldout=0.5, split=s) for s in ("train", "heldout")]
    assert [len(mix) for mix in mixes] == [5, 5] and mixes[0].at(0).id != mixes[1].at(0).id


def test_bad_rows_are_left_out_of_both_uses_up_to_skip_bad(tmp_path, capsys):
    rows = pictures_of(tmp_path, 3)
    for number in (0, 1):
        (tmp_path / f"{number}.png").write_bytes(b"no")
    path = write(tmp_path, *rows[::2])
    mix = open_data([path], skip_bad=2)
    assert mix.good(0) is None and mix.good(0) is None and mix.good(2).question == "2 a"
    assert capsys.readouterr().err.count("left out: ") == 1  # once a row
    assert {mix[draw].question for draw in range(6)} == {"2 a"} and len(mix.faults) == 2
    strict = open_data([path], skip_bad=1)
    assert strict.good(0) is None
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*unusable"):
        strict.good(1)
    with pytest.raises(DataError, match="unusable"):
        open_data([path]).good(0)


def test_rows_that_are_bad_when_read_are_named_once_too(tmp_path, capsys):
    rows = pictures_of(tmp_path, 12)
    path = write(tmp_path, *rows, rows[0] | {"answer": ""})
    for split in ("train", "heldout"):  # both open the whole file
        open_data([path], split=split, skip_bad=1, heldout=0.5)
    assert capsys.readouterr().err == (
        f"left out: {path}:25: the true answer in ocr: it is empty: every completion would earn 0\n")


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
    assert ids(open_data([path + "?id="]), range(2)) != ["7", "7"] and check([path + "?id="]) == []


def test_a_folder_or_a_missing_field_is_named_in_words(tmp_path):
    row = {"task": "ocr", "question": "", "answer": "x", "image": "."}
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    (fault,) = check([write(tmp_path, row, row | {"image": "a.png"})])
    assert "no image '.' in " in fault and "Errno" not in fault
    (fault,) = check(["fox:" + write(tmp_path, {"conversations": []}, name="f.jsonl")])
    assert fault.endswith("f.jsonl:1: the field 'image' is missing")


# ---- checking ----


def test_examine_sums_the_data_up(tmp_path):
    rows = pictures_of(tmp_path, 2)
    rows += [{"task": "math", "question": "1+1?", "response": "two", "answer": ""}]
    (tmp_path / "1.png").write_bytes(b"no")
    faults, lines = data.examine([write(tmp_path, *rows)], **SMALL)
    assert [fault.split(": ")[0].rpartition(":")[2] for fault in faults] == ["3", "4"]
    assert lines == ["2 samples of ocr", "1 samples of math",
                     "2 images, as the model reads them from 28x28 to 28x28 pixels, 2 of 28x28",
                     "1 answers can earn nothing (rows to imitate, without a true answer)"]


def test_the_command_line_lists_formats_and_checks(tmp_path, capsys):
    with pytest.raises(SystemExit):
        data.main(["--help"])
    shown = capsys.readouterr().out
    for name in (*data.FORMATS, *data.FILE_OPTIONS, "hiyouga/geometry3k", "objects"):
        assert f" {name}" in shown, name
    with pytest.raises(SystemExit) as end:
        data.main(["check", write(tmp_path, {"task": "math", "question": "q", "answer": "1"})])
    assert end.value.code == 0 and "1 samples of math" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        data.main(["check", write(tmp_path, {"task": "math", "question": "q"})])
    assert "answer is missing" in end.value.code


def test_check_looks_at_what_is_held_out_too(tmp_path):
    path = write(tmp_path, *pictures_of(tmp_path, 12))
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(b"no")
    assert len(check([path], heldout=0.3, split="train")) == 24


def test_drawn_traces_have_the_solution_as_response():
    sample = open_data(["synthetic:math?text=1&objects=3-3&traces=1"]).at(0)
    assert sample.response.endswith(f"<answer>\\boxed{{{sample.answer}}}</answer>") and not sample.images
