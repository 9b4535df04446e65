"""rows.py: files, folders, the hub's cache, tables, parquet, images in every wrapping."""

import base64
import json
import sys

import pytest
from PIL import Image
from small import HERE, SMALL, check, one, write

import rows
from data import DataError, open_data

PNG = (HERE / "a.png").read_bytes()
ROW = {"task": "math", "question": "q", "answer": "1"}


def parquet(path, *values, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(values), path, **options)
    return path


def named(spec, **options):
    mix = open_data([spec], **SMALL | options)
    return [mix.at(index).id for index in range(len(mix))]


# ---- files and folders ----


def test_shards_of_a_folder_in_order(tmp_path):
    for shard in (1, 0):
        parquet(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", ROW | {"id": f"t{shard}"})
    assert named(str(tmp_path)) == ["t0", "t1"]
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROW | {"id": "held"})
    assert named(f"{tmp_path}@test") == ["held"] and named(f"{tmp_path}@train") == ["t0", "t1"]
    assert named(f"{tmp_path}/data/train-*.parquet") == ["t0", "t1"]
    with pytest.raises(DataError, match="holds test, train: choose one with @NAME"):
        open_data([str(tmp_path)])
    with pytest.raises(DataError, match="holds test, train: choose"):
        open_data([f"{tmp_path}@dev"])
    with pytest.raises(DataError, match=r"no file is named .*val-\*\.parquet"):
        open_data([f"{tmp_path}/data/val-*.parquet"])


@pytest.mark.parametrize("name, split", [
    ("data/train-00000-of-00002.parquet", "train"), ("data/testA-00000-of-00001-3f.parquet", "testA"),
    ("train.jsonl", "train"), ("default/validation/0000.parquet", "default/validation"), ("39Krelease.parquet", ""),
    ("data-00000-of-00002.parquet", "data"), ("metadata.jsonl", ""), ("train/metadata.jsonl", "train"),
    ("vision/test-00000-of-00001.parquet", "vision/test"), ("cats/metadata.jsonl", "cats"),
])
def test_the_split_that_a_name_tells(name, split):
    assert rows.part_of(rows.Path(name)) == split


def test_configurations_are_not_mixed(tmp_path):
    for name in ("vision", "standard"):
        parquet(tmp_path / name / "test-00000-of-00001.parquet", ROW | {"id": name})
    for spec in (f"{tmp_path}", f"{tmp_path}@test"):
        with pytest.raises(DataError, match="holds standard/test, vision/test: choose one"):
            open_data([spec])
    assert named(f"{tmp_path}@vision/test") == ["vision"]
    assert named(f"{tmp_path}/*/test-*.parquet") == ["standard", "vision"]


def test_an_imagefolder_with_its_metadata(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "b.png").write_bytes(PNG)
    write(tmp_path / "train", {"file_name": "b.png", "text": "Hi"}, name="metadata.jsonl")
    sample = one(f"{tmp_path}?task=ocr&answer=text&question=")
    assert (sample.answer, sample.question, sample.image_size) == ("Hi", "", (112, 56))
    (tmp_path / "train" / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="a folder of images needs"):
        open_data([str(tmp_path)])


def hub_cache(folder):
    """hiyouga/geometry3k as huggingface_hub keeps it: links into blobs."""
    kept = folder / "datasets--hiyouga--geometry3k"
    snapshot = kept / "snapshots" / ("a" * 40)
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    (snapshot / "data").mkdir(parents=True)
    blob = {"images": [{"bytes": PNG, "path": None}], "problem": "<image>Find x.", "answer": "48"}
    for split in ("train", "test"):
        parquet(kept / "blobs" / split, blob | {"problem": f"<image>{split}"})
        link = snapshot / "data" / f"{split}-00000-of-00001.parquet"
        link.symlink_to(f"../../../blobs/{split}")
    return snapshot


def test_a_data_set_of_the_hub_from_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = hub_cache(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for spec in ("hf:hiyouga/geometry3k@train", "geometry3k:hf:hiyouga/geometry3k@train:0.5"):
        sample = open_data([spec], **SMALL).at(0)
        assert (sample.id, sample.question, sample.answer) == ("geometry3k-1", "<image>train", "48")
        assert sample.image_size == (112, 56)
    with pytest.raises(DataError, match="holds test, train: choose one with @NAME"):
        open_data(["hf:hiyouga/geometry3k"])
    (snapshot / "c.png").symlink_to("../../blobs/c.png")  # images beside the rows are links too
    (snapshot.parent.parent / "blobs" / "c.png").write_bytes(PNG)
    (snapshot.parent.parent / "blobs" / "val").write_text(json.dumps(ROW | {"image": "c.png"}))
    (snapshot / "val.jsonl").symlink_to("../../blobs/val")
    assert open_data(["jsonl:hf:hiyouga/geometry3k@val"], **SMALL).at(0).images
    with pytest.raises(DataError, match="the hub's hiyouga/other cannot be had: is this its name"):
        open_data(["hf:hiyouga/other@train"])


# ---- rows ----


def test_parquet_keeps_its_images_until_they_are_asked_for(tmp_path):
    images = []
    for number in range(150):  # two and a half batches, in row groups of 40
        picture = Image.new("RGB", (28, 28), (number, 0, 0))
        picture.save(tmp_path / "one.png")
        images.append((tmp_path / "one.png").read_bytes())
    values = [ROW | {"images": [{"bytes": PNG, "path": "x"}, {"bytes": image, "path": None}]}
              for image in images]
    path = parquet(tmp_path / "i.parquet", *values, row_group_size=40)
    source = open_data([str(path)], **SMALL).sources[0]
    for _, _, (_, second), _ in source.samples:
        assert isinstance(second, rows.Stored)  # no bytes in memory
    for number in (0, 39, 40, 111, 149):
        assert source[number].images[1].getpixel((0, 0)) == (number, 0, 0)
    first = source.samples[0][2][0]
    assert first.digest == rows.digest(PNG) and first.read() == PNG


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        open_data([f"refcoco:{tmp_path}/r.parquet"])


def test_a_link_out_of_the_folder_needs_trust(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "out.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    row = {"task": "ocr", "image": "link.png", "question": "", "answer": "a"}
    path = write(tmp_path / "in", row)
    assert "no image" in check([path])[0]
    assert check([path + "?allow_outside=1"]) == []
    assert check([path + "?folder=.."])[0].count("no image") == 1


def test_json_lines_under_another_name(tmp_path):
    assert named(write(tmp_path, ROW | {"id": "a"}, ROW | {"id": "b"}, name="r.json")) == ["a", "b"]
    (fault,) = check([write(tmp_path, ROW, "{", name="r.json")])
    assert fault.startswith(f"{tmp_path}/r.json:2: Expecting") and "this is not JSON" in fault


def test_tables(tmp_path):
    (tmp_path / "r.csv").write_text('id,task,question,answer\n7,math,"a, b\nc",1\n8,math,q,1,2\n')
    mix = open_data([f"{tmp_path}/r.csv"], skip_bad=1)
    assert (mix.at(0).id, mix.at(0).question) == ("7", "a, b\nc")
    assert mix.faults == [f"{tmp_path}/r.csv: row 2: this row has more cells than the table has columns"]


# ---- images ----


@pytest.mark.parametrize("image", [
    base64.b64encode(PNG).decode(), "data:image/png;base64," + base64.b64encode(PNG).decode(),
    [base64.b64encode(PNG).decode()], "['a.png']", "file://a.png", {"path": "a.png", "bytes": None},
])
def test_images_in_every_wrapping(tmp_path, image):
    (tmp_path / "a.png").write_bytes(PNG)
    assert one(write(tmp_path, ROW | {"image": image})).image_size == (112, 56)


@pytest.mark.parametrize("image, words", [
    ("https://x.org/a.png", "is on the web: download it"), (5, "a path, base64 or bytes, not 5"),
    (base64.b64encode(PNG).decode()[:-3], "image"), ("['a.png', 'b", "a list as text, but cut"), ("f" * 64, "no image 'ffff"),  # a hash is a name
])
def test_images_that_do_not_open(tmp_path, image, words):
    good = ROW | {"id": "good"}
    (fault,) = check([write(tmp_path, good, ROW | {"image": image})])
    assert fault.startswith(f"{tmp_path}/rows.jsonl:2: ") and words in fault
    assert len(fault) < 300  # never the base64 itself
