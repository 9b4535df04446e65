"""data.py: sizes and frames, every reader on a small file in its true format, bad input, scenes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import pictures
from data import DataError, check, open_data
from pictures import Synthetic

HERE = Path(__file__).parent / "fixtures" / "data"
SMALL = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64}
# a.png is 100 x 50 with a red block over columns 20 … 59 and rows 10 … 39. smart_resize of 50 x 100
# is round(50/28) = 2 and round(100/28) = 4 patches: 112 x 56, so x by 1.12 and y by 1.12.
RED = [22.4, 11.2, 67.2, 44.8]


def drawn(task, **options):
    """Samples of a drawn world, at the size that they are drawn in."""
    return data.DrawnSource(Synthetic(task, **options))


def one(spec, index=0, **options):
    return open_data([spec.replace("@", f"{HERE}/")], **(SMALL | options)).at(index)


def write(folder, *rows, name="rows.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder / name)


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


# ---- formats ----


def test_own_jsonl_with_many_images_and_with_none():
    box, points, text = (one("@own.jsonl", i) for i in range(3))
    assert (box.id, box.task, box.question) == ("g", "grounding", "red block")
    assert [image.size for image in points.images] == [(112, 56), (56, 28)]
    assert points.answer == [pytest.approx([44.8, 28.0])] and points.id == "own-2"
    assert text.images == () and text.image_size is None and text.answer == "6"
    assert text.question == "2*3 <|image_pad|>"  # text: the encoder keeps it from being a slot


def test_refcoco_in_both_scales_is_one_box():
    assert one("refcoco-vlmr1:@refcoco_vlmr1.json").answer == pytest.approx(RED)
    for index in (0, 1):  # 0 … 1000 as a list and as the text of one
        assert one("refcoco-pr1:@refcoco_pr1.json", index).answer == pytest.approx(RED)
    sample = one("refcoco-pr1:@refcoco_pr1.json", 1)
    assert (sample.task, sample.question, sample.id) == ("grounding", "the block", "refcoco_pr1-2")


def test_refcoco_parquet_has_a_sample_a_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"ref_id": 8, "image_path": "a.png", "bbox": [20.0, 10.0, 60.0, 40.0],
             "captions": ["red block", "the one"], "sent_ids": [1, 2], "split": "train"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    mix = open_data([f"refcoco:{tmp_path}/r.parquet?folder={HERE}"], **SMALL)
    assert [(mix.at(i).id, mix.at(i).question) for i in range(len(mix))] == [
        ("8-0", "red block"), ("8-1", "the one")]
    assert mix.at(1).answer == pytest.approx(RED)


def test_images_inside_parquet_and_pixmo_points(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    png = {"bytes": (HERE / "a.png").read_bytes(), "path": None}
    rows = [{"image": png, "image_url": "http://x", "image_sha256": "f0", "count": 1,
             "points": [{"x": 50.0, "y": 25.0}], "label": "block"},
            {"image": png, "image_url": "http://x", "image_sha256": "f0", "count": 4,
             "points": [], "label": "dots"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    mix = open_data([f"pixmo-count:{tmp_path}/p.parquet"], **SMALL)
    assert mix.at(0).answer == [pytest.approx([56, 28])] and mix.at(1).answer == 4
    table = pyarrow.Table.from_pylist([{k: v for k, v in rows[0].items() if k != "image"}])
    parquet.write_table(table, tmp_path / "q.parquet")
    (tmp_path / "f0").write_bytes(png["bytes"])  # downloaded under its hash
    assert open_data([f"pixmo-count:{tmp_path}/q.parquet"], **SMALL).at(0).images


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        open_data([f"refcoco:{tmp_path}/r.parquet"])


def test_pixmo_counts_of_perception_r1():
    assert one("pixmo-pr1:@pixmo_val.jsonl").answer == 3
    train = one("pixmo-pr1:@pixmo_train.json")  # clicks (400, 500), (100, 900) of 1000 in 112 x 56
    assert train.answer == [pytest.approx([44.8, 28.0]), pytest.approx([11.2, 50.4])]
    assert train.question == "blocks"


def test_fox_page():
    sample = one("fox:@en_page_ocr.json")
    assert (sample.answer, sample.question, sample.task) == ("Hi there", "", "ocr")
    assert sample.id == "en_1.png" and sample.response is None and sample.image_size == (56, 28)


def test_coco_boxes_labels_crowds_and_empty_images():
    mix = open_data([f"coco:{HERE}/instances_val.json"], **SMALL)
    full, empty = mix.at(0), mix.at(1)
    assert full.id == "139" and full.question == "person, toothbrush"
    assert [item["label"] for item in full.answer] == ["person", "toothbrush"]
    assert full.answer[0]["bbox_2d"] == pytest.approx(RED)
    assert full.answer[1]["bbox_2d"] == pytest.approx([0, 0, 6.16, 4.48])
    assert empty.id == "7" and empty.answer == []


def test_maths_benchmarks():
    math500 = one("math500:@math500.jsonl")
    assert (math500.id, math500.answer, math500.images) == ("test/algebra/1.json", "2", ())
    lettered, value, pictured = (one("mathvision:@mathvision.jsonl", i) for i in range(3))
    assert (lettered.task, lettered.answer) == ("choice", "A")
    assert lettered.question == "Which side is longer?\nA. width\nB. height"
    assert (value.task, value.answer, value.question) == ("math", "1", "How many blocks?")
    assert (pictured.task, pictured.question) == ("choice", "Which one?")
    verse = open_data([f"mathverse:{HERE}/mathverse.json"], **SMALL)
    assert [verse.at(i).id for i in range(len(verse))] == ["5", "10"]  # vision-only rows
    assert (verse.at(0).task, verse.at(0).answer) == ("choice", "C")
    assert (verse.at(1).task, verse.at(1).answer) == ("math", "12")
    assert verse.at(0).question


def test_reasoning_traces_in_three_spellings():
    named, chat, shared = (one("traces:@traces.jsonl", i) for i in range(3))
    assert (named.question, named.response) == ("1+1?", "<think>easy</think>2")
    assert (named.answer, named.system) == ("", None)
    assert (chat.question, chat.response, chat.system) == ("2+2?", "4", "Be brief.")
    assert chat.answer == "4" and (shared.question, shared.response) == ("3+3?", "6")


def test_any_other_file_by_naming_its_fields(tmp_path):
    path = write(tmp_path, {"problem": "1+2?", "solution": "3"})
    for mix in (open_data([path + "?task=math"], fields="question=problem,answer=solution"),
                open_data([path + "?task=math&question=problem&answer=solution"])):
        assert (mix.at(0).question, mix.at(0).answer) == ("1+2?", "3")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "pictures" / "b.png")
    row = {"task": "counting", "image": "b.png", "question": "dots", "answer": [[500, 250]]}
    path = write(tmp_path, row)
    mix = open_data([path + "?folder=pictures&frame=1000"], **SMALL)
    assert mix.at(0).answer == [[14.0, 7.0]]


# ---- bad input ----


@pytest.mark.parametrize("row, words", [
    ('{"task": "math"', "not a row"),
    ("[1, 2]", "not a row"),
    ("[" * 100_000, "not a row"),
    ({"task": "poetry", "question": "q", "answer": "a"}, "'poetry' is none of"),
    ({"question": "q", "answer": "a"}, "task None is none of"),
    ({"task": "math", "question": 3, "answer": "a"}, "question is not text"),
    ({"task": "math", "question": "q"}, "it is missing"),
    ({"task": "choice", "question": "q", "answer": "maybe"}, "one letter"),
    ({"task": "grounding", "question": "q", "answer": [1, 2, 3, 4]}, "needs an image"),
    ({"task": "grounding", "image": "no.png", "question": "q", "answer": [1, 2, 3, 4]}, "no image"),
    ({"task": "grounding", "image": "a.png", "question": "q", "answer": [1, 2, 3]}, "does not fit"),
    ({"task": "grounding", "image": "a.png", "question": "q", "answer": [1, 2, 1, 9]}, "no area"),
    ({"task": "counting", "image": "a.png", "question": "q", "answer": [[1]]}, "does not fit"),
    ({"task": "detection", "image": "a.png", "question": "q", "answer": [{"box": 1}]}, "bbox_2d"),
    ({"task": "ocr", "image": 5, "question": "q", "answer": "a"}, "not a row"),
    ({"task": "ocr", "image": "../secret.png", "question": "q", "answer": "a"}, "no image"),
    ({"task": "ocr", "image": "/etc/passwd", "question": "q", "answer": "a"}, "no image"),
    ({"task": "ocr", "image": "a" * 5000, "question": "q", "answer": "a"}, "too long"),
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


def test_a_link_out_of_the_folder_needs_trust(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "out.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    row = {"task": "ocr", "image": "link.png", "question": "", "answer": "a"}
    path = write(tmp_path / "in", row)
    assert "no image" in check([path])[0]
    assert check([path + "?allow_outside=1"]) == []
    assert check([path + "?folder=.."])[0].count("no image") == 1


@pytest.mark.parametrize("name, words", [
    ("none.jsonl", "No such file"), ("empty.jsonl", "no samples"), ("refs.p", "pickle can run"),
    ("dict.json", "coco:FILE"), ("half.json", "Expecting"), ("coco:dict.json", "'categories'"),
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
