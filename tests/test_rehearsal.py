"""The CUDA branch without a GPU, at Qwen2.5-VL-3B's shapes: benchmarks/rehearse.py with two layers."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    compiler = shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler here: the device guard that stands in for CUDA cannot be built")
    if torch.cuda.is_available() or torch.backends.cuda.is_built():
        pytest.skip("this PyTorch has CUDA itself: the stand-in would be a second device guard")
    library = tmp_path_factory.mktemp("guard") / "no_gpu.so"
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "benchmarks" / "no_gpu.cpp"
    subprocess.run([compiler, "-shared", "-fPIC", "-std=c++20", f"-I{include}", source, "-o", library], check=True)
    script = [sys.executable, ROOT / "benchmarks" / "rehearse.py", library, "--layers", "2", "--depth", "2"]
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_decoding_step_neither_waits_nor_copies(report):
    """A graph is captured of it: neither would survive."""
    decoding = report["decoding"]
    assert (decoding["step"]["waits"], decoding["step"]["copies"]) == (0, 0)
    assert decoding["hidden"] == "torch.bfloat16"


def test_a_layer_of_a_decoding_step_takes_22_kernels(report):
    """Products: queries, keys and values at once; two of scores, two of values; out, gate and up at once, down: 8.
    Norms 2, rotating 3, queries in the order of keys 1, the cache 1, scores joined, scaled and masked 2, softmax and
    its rounding 2, the heads side by side 1, silu and its product 2."""
    assert report["decoding"]["kernels_a_layer"] == 22


def test_a_round_waits_for_nothing_but_the_living_rows(report):
    """Choosing tokens, the step's launch and a growing cache; the count of living rows is asked for elsewhere."""
    decoding = report["decoding"]
    assert decoding["round"] == {"waits": 0, "copies": 0}
    assert decoding["logp"] == "torch.float32"
    # 17·23 + 46 = 437 prompt tokens in 512 places; 128 own places grow to 256
    assert decoding["shapes"] == [[8, 8, 512, 128], [8, 8, 512, 256]]


def test_a_training_pass_computes_in_bf16_and_reduces_in_fp32(report):
    training = report["training"]
    assert training["inputs"] == "torch.bfloat16"
    assert training["logp"] == "torch.float32"
    assert training["gradients"] == ["torch.float32"] and training["without_gradient"] == []


def test_a_training_pass_asks_the_device_for_nothing(report):
    """Four copies: order, borders (windows, images) and positions of the images' patches."""
    assert (report["training"]["waits"], report["training"]["copies"]) == (0, 4)
