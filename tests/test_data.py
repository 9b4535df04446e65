"""data.py: specs, drawn worlds, mixing, bad rows that are left out, checking."""

import pytest
from small import HERE, SMALL, check, pictures_of, write

import data
from data import DataError, Mixture, open_data
from pictures import Synthetic
from sources import DrawnSource


def drawn(task, **options):
    """Samples of a drawn world, at the size that they are drawn in."""
    return DrawnSource(Synthetic(task, **options))


# ---- bad input ----


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


def test_a_curriculum_is_drawn_in_the_files_order(tmp_path):
    rows = [f'{{"task": "math", "id": "{i}", "question": "{i}", "answer": "{i}"}}\n' for i in range(5)]
    (tmp_path / "easy_to_hard.jsonl").write_text("".join(rows))
    mix = data.open_data([f"{tmp_path}/easy_to_hard.jsonl?in_order=1"], seed=3)
    assert [mix[draw].id for draw in range(7)] == ["0", "1", "2", "3", "4", "0", "1"]
    shuffled = data.open_data([f"{tmp_path}/easy_to_hard.jsonl"], seed=3)
    assert [shuffled[draw].id for draw in range(5)] != ["0", "1", "2", "3", "4"]


# ---- what is left out ----


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


def test_sources_take_turns():
    """Three, one and two samples: the first ones, then the second ones of those that have any."""
    mix = Mixture([["a0", "a1", "a2"], ["b0"], ["c0", "c1"]])
    assert [mix.at(index) for index in mix.in_turn()] == ["a0", "b0", "c0", "a1", "c1", "a2"]
