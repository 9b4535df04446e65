"""What is the mean of several checkpoints? [OVR §4.1] ends its training with one."""
import os
import shutil
from pathlib import Path

from needs import library
from rows import blame


def write_average(models: list[Path], out: Path) -> None:
    """A new folder `out`: the uniform mean of the tensors, added in fp32, and the first one's other
    files. It appears by one rename: whole or not at all.

    Errors: ValueError if these are no Hugging Face checkpoints of one run.
    """
    library("safetensors", "safetensors")
    if len(models) < 2:
        raise ValueError("give two checkpoints or more to average")
    found = [find_tensors(model) for model in models]
    for model, tensors in zip(models[1:], found[1:]):
        check_same(models[0], found[0], model, tensors)
    if out.exists():
        raise ValueError(f"--out {out} must be a new folder")
    partial_folder = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    shutil.copytree(models[0], partial_folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted({file for file, _ in found[0].values()}):
        own = [name for name in found[0] if found[0][name][0] == file]
        write_mean(partial_folder / file.name, own, found)
    partial_folder.rename(out)


def find_tensors(model: Path) -> dict[str, tuple[Path, list[int]]]:
    """{name: (file, shape)} of a checkpoint in one file or several."""
    from safetensors import SafetensorError, safe_open
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with blame(file, SafetensorError), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensors[name] = file, opened.get_slice(name).get_shape()
    if not tensors:
        raise ValueError(f"{model} holds no safetensors")
    return tensors


def check_same(first: Path, here: dict, other: Path, there: dict) -> None:
    """Errors: ValueError naming the tensors that only one has, or that have two shapes."""
    lone = sorted(here.keys() ^ there.keys())
    if lone:
        owner = first if lone[0] in here else other
        raise ValueError(f"{first} and {other} do not have the same tensors, as {lone[0]} is in "
                         f"{owner} alone ({len(lone)} such names): average exports of one run")
    for name, (_, shape) in here.items():
        if shape != there[name][1]:
            raise ValueError(f"{name} is {shape} in {first} and {there[name][1]} in {other}: "
                             "average checkpoints of one run")


def write_mean(path: Path, names: list[str], found: list[dict]) -> None:
    """A file of the mean tensors, which other users may read as any file (umask)."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    mean = {}
    for name in names:
        total = 0
        for tensors in found:
            with safe_open(tensors[name][0], "pt") as opened:
                tensor = opened.get_tensor(name)
            total = total + tensor.float()
        mean[name] = (total / len(found)).to(tensor.dtype)
    save_file(mean, path, metadata={"format": "pt"})
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)
