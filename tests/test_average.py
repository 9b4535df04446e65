"""average.py through eval.py's command: means of checkpoints by hand, and those that cannot be made."""
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from test_plots import refused

import eval as evaluation

FIXTURES = Path(__file__).parent / "fixtures"  # no model is there


def save_model(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    return folder


def test_average_by_hand(tmp_path):
    # In bf16 1 + 1/128 is exact and 3·(1 + 1/128) is not: adding in fp32 keeps the mean exact.
    fine = torch.tensor([1 + 1 / 128, 0.0], dtype=torch.bfloat16)
    models = [save_model(tmp_path / str(i), w=torch.tensor([float(i), -1.0]), b=fine)
              for i in (1, 2, 6)]
    evaluation.main(["average", *map(str, models), "--out", str(tmp_path / "mean")])
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean["w"].tolist() == [3.0, -1.0] and mean["b"].dtype == torch.bfloat16
    assert torch.equal(mean["b"], fine)
    assert (tmp_path / "mean" / "config.json").read_text() == '{"a": 1}'


def test_average_reads_like_any_file(tmp_path):
    models = [save_model(tmp_path / name, w=torch.zeros(2)) for name in ("a", "b")]
    mask = os.umask(0o027)
    try:
        evaluation.main(["average", *map(str, models), "--out", str(tmp_path / "mean")])
    finally:
        os.umask(mask)
    assert (tmp_path / "mean" / "model.safetensors").stat().st_mode & 0o777 == 0o640  # 666 less 027


def test_average_of_checkpoints_that_are_cut_otherwise(tmp_path):
    """One file there, two here: tensors are found by name, and the first one's files are kept."""
    one = save_model(tmp_path / "one", w=torch.tensor([1.0]), v=torch.tensor([2.0]))
    two = tmp_path / "two"
    two.mkdir()
    for name, value in (("w", 3.0), ("v", 6.0)):
        save_file({name: torch.tensor([value])}, two / f"model-{name}.safetensors")
    evaluation.main(["average", str(two), str(one), "--out", str(tmp_path / "mean")])
    got = {file.name: load_file(file) for file in (tmp_path / "mean").glob("*.safetensors")}
    assert got["model-w.safetensors"]["w"].item() == 2 and got["model-v.safetensors"]["v"].item() == 4


def test_averages_that_can_not_be_made(tmp_path):
    out = tmp_path / "out"
    one = save_model(tmp_path / "one", w=torch.zeros(2))
    wide = save_model(tmp_path / "wide", w=torch.zeros(3))
    assert "w is [2] in" in (said := refused("average", one, wide, "--out", out)) and "[3] in" in said
    more = save_model(tmp_path / "more", **{"w": torch.zeros(2), "lm_head.weight": torch.zeros(2)})
    for pair in ((one, more), (more, one)):
        said = refused("average", *pair, "--out", out)
        assert "do not have the same tensors" in said and f"lm_head.weight is in {more} alone" in said
    assert "no safetensors" in refused("average", one, FIXTURES, "--out", out)
    broken = save_model(tmp_path / "broken", w=torch.zeros(2))
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "broken/model.safetensors: " in refused("average", one, broken, "--out", out)
    assert "must be a new folder" in refused("average", one, one, "--out", tmp_path)
    assert "two checkpoints" in refused("average", one, "--out", out)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"one", "wide", "more", "broken"}  # nothing was written


def test_a_failed_average_does_not_block_the_next_try(tmp_path, monkeypatch):
    models = [save_model(tmp_path / name, w=torch.zeros(2)) for name in ("a", "b")]
    command = ["average", *models, "--out", tmp_path / "mean"]

    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        assert "no space left" in refused(*command)
    assert not (tmp_path / "mean").exists()
    evaluation.main([*map(str, command)])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "mean"}
