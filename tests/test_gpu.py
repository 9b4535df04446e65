"""benchmarks/gpu.py where there is no GPU: what it does not run it says, what a CPU can do is done."""
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import grpo_vl
import plan

SCRIPT = ROOT / "benchmarks" / "gpu.py"
ALL = ["machine", "varlen_is_mask", "graphs_are_eager", "compiled_is_eager", "sampler_is_trainer", "deterministic", "tiny_steps",
       "bench_3b", "steps_3b", "lora_3b", "offload_3b", "lean_3b"]


def lines(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    return [json.loads(line) for line in shown.splitlines()]


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_check_says_not_run():
    found = lines()
    assert [row["check"] for row in found] == ALL
    assert all((row["result"], row["why"]) == ("not run", "no CUDA device here") for row in found)


def test_what_a_cpu_can_do_is_done():
    checks = ["varlen_is_mask", "graphs_are_eager", "compiled_is_eager", "sampler_is_trainer", "deterministic", "steps_3b"]
    varlen, graphs, compiled, gap, repeats, steps = lines("--cpu", "--only", *checks)
    assert varlen["result"] == "not run" and "CUDA" in varlen["why"]
    assert compiled["result"] == "not run" and "minutes" in compiled["why"]
    assert [row["result"] for row in (graphs, gap, repeats, steps)] == ["ok"] * 4, (graphs, gap, repeats, steps)
    assert gap["measured"]["largest"] < 1e-4
    small, large = steps["measured"]["prompts"]
    # 280×196 are 70 image tokens, 644×476 are 391: prompts of mixed length
    assert min(small, large) < 200 < 400 < max(small, large)
    assert [row["step"] for row in steps["measured"]["steps"]] == [0, 1]
    assert all("eval/greedy" in row for row in steps["measured"]["steps"])


def test_speed_adapters_and_offloading_are_measured():
    speed, lora, offload, lean = found = lines("--cpu", "--only", "bench_3b", "lora_3b", "offload_3b", "lean_3b")
    assert [row["result"] for row in found] == ["ok"] * 4, found
    for measured in (speed["measured"], lean["measured"]):
        assert 0 < measured["refresh_share"] < 1 and measured["decode"]["share"] > 0
        assert measured["train"]["tflops"] > 0 and measured["memory"]["peak"] > 0
    for row in (lora, offload):
        (step,) = row["measured"]["steps"]
        assert step["step"] == 0 and step["grad_norm"] > 0 and row["measured"]["peak_gib"] > 0


@pytest.mark.parametrize("lean, gib", [(False, 73), (True, 112)])
def test_the_steps_at_3b_fit_the_card_by_the_plan(gpu, monkeypatch, lean, gib):
    """An H200 has 139 GiB; a tenth is left to what the plan does not know. A prompt has 40 tokens beside its image's."""
    asked = {}
    monkeypatch.setattr(gpu.bench_step, "ours", lambda a: asked.update(vars(a)) or {"seconds": {"refresh": 1, "step": 2}})
    monkeypatch.setattr(gpu, "build_3b", lambda folder, device: folder)
    monkeypatch.setattr(gpu, "card", lambda device: "NVIDIA H200")
    (gpu.lean_3b if lean else gpu.bench_3b)(torch.device("cuda"), "folder")
    same = ("prompts", "group", "micro_tokens", "checkpointing", "checkpoint_every", "keep_attention", "entropy_every", "beta")
    config = grpo_vl.Config(
        max_tokens=asked["length"], max_pixels=asked["image_tokens"] * 28**2, max_prompt=asked["image_tokens"] + 40,
        **{name: asked[name] for name in same})
    model = plan.bare_model("Qwen/Qwen2.5-VL-3B-Instruct")
    sizes = plan.sizes_of(config, model)
    moments = plan.held_at_moments(config, model, sizes, 1, config.max_tokens)
    peak = sum(plan.kept_by_a_rank(config, sizes, 1).values()) + max(sum(terms.values()) for terms in moments.values())
    assert round(peak / 2**30) == gib < 0.9 * 139


def test_time_that_is_over_is_said():
    (row,) = lines("--cpu", "--only", "tiny_steps", "--seconds", "1")
    assert (row["result"], row["why"]) == ("not run", "1 s are over")


def test_sampler_and_trainer_of_like_error_pass_in_bf16_and_one_that_is_off_does_not(gpu, monkeypatch):
    """Rounding alone puts both about 0.005 off; 0.03 more is an error, though bf16 has gaps of that size elsewhere."""
    policy, special, prompts = gpu.small_world(torch.device("cpu"), torch.bfloat16)
    found = gpu.gap(policy, special, prompts)
    assert 0.001 < found["trainer"] < 0.02
    rollouts = gpu.rollouts

    def off(*given, **options):
        groups = rollouts(*given, **options)
        for completion in (completion for group in groups for completion in group):
            completion.logps = [logp + 0.03 for logp in completion.logps]
        return groups

    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(gpu, "rollouts", off)
        gpu.gap(policy, special, prompts)
    policy.register_forward_hook(lambda module, inputs, out: (out[0] + 0.03, out[1]))  # the trainer is off
    with pytest.raises(AssertionError):
        gpu.gap(policy, special, prompts)


def test_a_check_that_fails_or_hangs_is_a_line(tmp_path, gpu):
    arguments = SimpleNamespace(folder=str(tmp_path), cpu=True)
    failed = gpu.outcome("no_such_check", 60, arguments)
    assert failed["result"] == "failed" and failed["why"] == "exit status 2" and "no_such_check" in failed["said"]
    hung = gpu.outcome("machine", 0.5, arguments)
    assert hung["result"] == "failed" and hung["why"] == "no end after 0 s"
