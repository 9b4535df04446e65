"""All that only a GPU can show, in one go: equalities, ten tiny steps, Qwen2.5-VL-3B's shape.

  python benchmarks/gpu.py > results/gpu.jsonl       an H200, at most 9 minutes; of its 139 GiB --plan
                                                     counts 73 for bench_3b and 112 for lean_3b
  python benchmarks/gpu.py --only machine graphs_are_eager
  python benchmarks/gpu.py --cpu                             what a CPU can do of it, the 3B tiny

One JSON line a check: its name, "ok", "failed" with the end of what it said, or "not run" and why;
then what was measured. Each check is a process of its own, with a limit: a kernel that fails ends no
other. No network, hub or data is needed; weights are random.

machine             hardware, versions, GB/s of a copy, TFLOP/s of a product in bf16
varlen_is_mask      log-probabilities and gradients by variable-length kernels and by a mask, both
                    in bf16 beside fp32: errors of like size
graphs_are_eager    tokens and log-probabilities of captured graphs and of the same steps uncaptured,
                    over batches that make the cache grow: equal
compiled_is_eager   log-probabilities and gradients with --compile and without, both in bf16 beside
                    fp32: errors of like size; and the next check's gap with --compile
sampler_is_trainer  log-probabilities of the sampler's tokens by the sampler and by the policy, in the
                    dtype of the run, beside fp32: errors of like size; and mean |Δ log π|
deterministic       --deterministic: a gradient twice, bit for bit
tiny_steps          ten steps of `grpo_vl.py` on the stand-in, with evaluation and checkpoint
bench_3b            bench_step.py's step: share of a copy's bandwidth in decoding (decode.share, wanted
                    0.6), MFU (train.mfu, wanted 0.33), memory, refresh_share of a step (wanted 0.03)
steps_3b            two steps at 3B, prompts of mixed length, --eval-every 1
lora_3b             a step at 3B with --lora 32
offload_3b          a step at 3B with --offload
lean_3b             bench_3b with --checkpoint-every 2 --keep-attention --entropy-every 0, in
                    micro-batches of half the size
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import bench_step

import fsdp
import grpo_vl
import packing
import policy as policy_module
import qwen_vl
import training
from noise import keyed_uniforms
from packing import pack_groups
from policy import Policy
from qwen_vl import Completion, Group, SpecialIds, encode_chat
from sampler import Sampler

HERE = Path(__file__).parent
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312}  # of bf16 products, without sparsity
LEAN = dict(checkpoint_every=2, keep_attention=True, entropy_every=0, micro_tokens=8192)
SIZE_3B = dict(prompts=8, group=8, length=256, image_tokens=400, steps=2)
MIXED = ("synthetic:counting?size=644x476&objects=2-10", "synthetic:grounding?size=280x196")


# ── a small world ──
def small_world(device, dtype, **options):
    """(policy, special ids, prompts of four lengths) of the stand-in, weights in the dtype."""
    model, tokenizer = qwen_vl.load("tiny-untied")
    special = SpecialIds.read(tokenizer, model.config)
    policy = Policy(model, special.banned_V, **options).to(device)
    for parameter in policy.parameters():  # buffers, the angles, stay fp32
        parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for width, height in ((84, 84), (280, 28), (252, 140), (448, 336)):
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        prompts.append(encode_chat(tokenizer, special, "red circle 12", [image]))
    return policy, special, prompts


def rollouts(policy, special, prompts, length: int, **options) -> list[list[Completion]]:
    """Five completions a prompt, by a new sampler with the policy's weights."""
    weight = next(policy.parameters())
    sampler = Sampler(policy.model, special, device=weight.device, dtype=weight.dtype, **options)
    sampler.refresh(policy.named_parameters())
    noise = [keyed_uniforms(0, 0, str(i), 5, length) for i in range(len(prompts))]
    return sampler.generate(prompts, noise, length)


def packed(prompts, completions) -> packing.Pack:
    groups = [Group(p, done, 5 * i) for i, (p, done) in enumerate(zip(prompts, completions))]
    return pack_groups(groups)


def on(device, pack, layout) -> packing.Pack:
    pack.attention = layout(pack)
    pack.vision = None
    return pack.to(device)


def logps_and_gradients(policy, pack) -> tuple[torch.Tensor, dict]:
    policy.zero_grad()
    logp_S, _ = policy(pack)
    logp_S.mean().backward()
    gradients = {n: p.grad.float().cpu() for n, p in policy.named_parameters()}
    return logp_S.detach().float().cpu(), gradients


def errors(policy, pack, want_S, want: dict) -> tuple[float, float]:
    """The mean distance of a log-probability, and the largest relative one of a gradient."""
    logp_S, gradients = logps_and_gradients(policy, pack)
    return (logp_S - want_S).abs().mean().item(), farthest(gradients, want)


def of_like_size(found: tuple, wanted: tuple) -> bool:
    """Whether these `errors` are at most twice those, or small."""
    return found[0] < 2 * wanted[0] + 1e-3 and found[1] < 2 * wanted[1] + 1e-2


def farthest(found: dict, wanted: dict) -> float:
    """The largest relative distance of a gradient, but for keys' biases, which have none."""
    distances = []
    for name, want in wanted.items():
        if "k_proj.bias" not in name:
            distances.append(((found[name] - want).norm() / want.norm()).item())
    return max(distances)


# ── checks: each returns what it measured, or raises ──
def machine(device, folder) -> dict:
    about = bench_step.describe(bench_step.peak_gib())
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    log = bench_step.watch(torch, "mm")
    for _ in range(5):
        torch.mm(a, a)
    fastest = min(seconds for seconds, _ in log)
    return {name: about[name] for name in ("device", "torch", "transformers")} | dict(
        copy_gbytes=bench_step.copy_bandwidth(device) / 1e9,
        tflops=2 * side**3 / fastest / 1e12,
        flash_attn=policy_module.flash_attn_varlen_func is not None)


def varlen_is_mask(device, folder) -> dict:
    if device.type != "cuda":
        raise NotImplementedError("variable-length kernels need CUDA")
    exact, special, prompts = small_world(torch.device("cpu"), torch.float32)
    policy, _, _ = small_world(device, torch.bfloat16)
    pack = packed(prompts, rollouts(exact, special, prompts, 40))
    want_S, want = logps_and_gradients(exact, on("cpu", pack, packing.mask_layout))
    by_mask = errors(policy, on(device, pack, packing.mask_layout), want_S, want)
    by_varlen = errors(policy, on(device, pack, packing.varlen_layout), want_S, want)
    assert of_like_size(by_varlen, by_mask), (by_varlen, by_mask)
    return {"mask": by_mask, "varlen": by_varlen}


def compiled_is_eager(device, folder) -> dict:
    if device.type != "cuda":
        raise NotImplementedError("kernels for a CPU take minutes to compile")
    exact, special, prompts = small_world(torch.device("cpu"), torch.float32)
    pack = packed(prompts, rollouts(exact, special, prompts, 40))
    want_S, want = logps_and_gradients(exact, on("cpu", pack, packing.mask_layout))
    dtype, found = fsdp.compute_dtype(device), {}
    for name, compile in (("eager", False), ("compiled", True)):
        policy, _, _ = small_world(device, dtype, compile=compile)
        found[name] = errors(policy, on(device, pack, packing.varlen_layout), want_S, want)
    assert of_like_size(found["compiled"], found["eager"]), found
    return found | {"sampler_gap": gap(policy, special, prompts, compile=True)}


def graphs_are_eager(device, folder) -> dict:
    policy, special, prompts = small_world(device, fsdp.compute_dtype(device))
    weight = next(policy.parameters())
    options = dict(device=weight.device, dtype=weight.dtype, graphs=True)
    captured, eager = (Sampler(policy.model, special, **options) for _ in range(2))
    eager.cache.captures = False
    for one in (captured, eager):
        one.refresh(policy.named_parameters())
    graphs = 0
    for count, group, length in ((1, 2, 40), (3, 5, 150), (4, 8, 300), (2, 5, 150)):
        noise = [keyed_uniforms(0, 0, str(i), group, length) for i in range(count)]
        results = [one.generate(prompts[:count], noise, length) for one in (captured, eager)]
        assert results[0] == results[1], f"{count} prompts of {group} rows differ"
        graphs += sum(batch.graph is not None for batch in captured.cache.batches.values())
    assert graphs or device.type != "cuda", "nothing was captured"
    return {"graphs": graphs}


def gap(policy, special, prompts, **options) -> dict:
    """|Δ log π| of sampled tokens, by the sampler and by the policy, and each one's mean distance
    from the same weights in fp32. options: the sampler's."""
    weight = next(policy.parameters())
    done = rollouts(policy, special, prompts, 100, graphs=weight.is_cuda, **options)
    exact = small_world(torch.device("cpu"), weight.dtype)[0].float()
    pack = packed(prompts, done)
    with torch.no_grad():
        exact_S = exact(on("cpu", pack, packing.mask_layout))[0]
        logp_S = policy(packing.prepare_attention(pack, weight.device))[0].cpu()
    sampled_S = torch.tensor([logp for group in done for c in group for logp in c.logps])
    gap_S = (logp_S - sampled_S).abs()
    found = {"mean": gap_S.mean().item(), "largest": gap_S.max().item()}
    found["sampler"] = (sampled_S - exact_S).abs().mean().item()
    found["trainer"] = (logp_S - exact_S).abs().mean().item()
    assert found["sampler"] < 2 * found["trainer"] + 1e-5, found
    assert found["trainer"] < 2 * found["sampler"] + 1e-5, found
    return found


def sampler_is_trainer(device, folder) -> dict:
    policy, special, prompts = small_world(device, fsdp.compute_dtype(device))
    return gap(policy, special, prompts)


def deterministic(device, folder) -> dict:
    fsdp.use_deterministic_kernels()
    policy, special, prompts = small_world(device, fsdp.compute_dtype(device))
    done = rollouts(policy, special, prompts, 100, graphs=device.type == "cuda")
    pack = packing.prepare_attention(packed(prompts, done), device)
    (one_S, one), (two_S, two) = (logps_and_gradients(policy, pack) for _ in range(2))
    assert torch.equal(one_S, two_S) and all(torch.equal(one[name], two[name]) for name in one)
    return {"gradients": len(one)}


def tiny_steps(device, folder) -> dict:
    out = Path(folder) / "tiny"
    command = [sys.executable, str(HERE.parent / "grpo_vl.py"), "--preset", "tiny", "--cold-start", "",
               "--steps", "10", "--eval-every", "5", "--eval-samples", "32", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"steps": len(rows), "last": rows[-1]}


def config_3b(folder, device, **options) -> grpo_vl.Config:
    small = dict(prompts=8, group=8, max_tokens=256)
    if device.type != "cuda":
        small = dict(prompts=2, group=2, max_tokens=8, kv_gb=0.1)
    return grpo_vl.Config(
        model=folder, data=MIXED, overlong="keep", pictures_every=0, save_every=10**6,
        eval_samples=8, **small | options)


def take_steps(folder, device, steps: int, **options) -> dict:
    """`grpo_vl.train` without the checkpoint at its end: 45 GB at 3B."""
    config = config_3b(folder, device, steps=steps, out=f"{folder}/run", **options)
    ranks = fsdp.start_processes(config.timeout)
    run = training.prepare(config, ranks, folder)
    run.reward = lambda task, completion, *_, **__: len(completion) % 7 / 7
    progress = training.Progress(run, lambda step: config.max_tokens)
    lengths = [len(training.make_prompt(run, run.data[i]).ids) for i in range(config.prompts)]
    rows = []
    for step in progress.steps():
        progress.add(grpo_vl.train_step(run, step))
        rows.append(progress.metrics)
    assert all(row["grad_norm"] > 0 for row in rows), rows
    return {"prompts": lengths, "peak_gib": bench_step.peak_gib(), "steps": rows}


def steps_3b(device, folder) -> dict:
    return take_steps(build_3b(folder, device), device, 2, eval_every=1)


def lora_3b(device, folder) -> dict:
    return take_steps(build_3b(folder, device), device, 1, lora=32, lr=1e-5)


def offload_3b(device, folder) -> dict:
    return take_steps(build_3b(folder, device), device, 1, offload=True)


def bench_3b(device, folder, **lean) -> dict:
    """lean: options of bench_step.py in place of those below."""
    peak = [tflops for name, tflops in PEAK_TFLOPS.items() if name in card(device)]
    size = SIZE_3B
    if device.type != "cuda":
        size = dict(prompts=2, group=2, length=4, image_tokens=4, steps=1)
    asked = dict(
        folder=build_3b(folder, device), beta=0.0, micro_tokens=16384, checkpointing=True, seed=0,
        checkpoint_every=1, keep_attention=False, entropy_every=1,
        peak_tflops=peak[0] if peak else 0.0, g_scaling=False)
    found = bench_step.ours(SimpleNamespace(**asked | size | lean))
    seconds = found["seconds"]
    return found | {"refresh_share": seconds["refresh"] / seconds["step"]}


def lean_3b(device, folder) -> dict:
    return bench_3b(device, folder, **LEAN)


def card(device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else ""


def build_3b(folder, device) -> str:
    """A checkpoint of the shape with random weights, made once; of the tiny shape on a CPU."""
    model = Path(folder) / "model"
    if not (model / "config.json").exists():
        shape = "3b" if device.type == "cuda" else "tiny"
        bench_step.build(SimpleNamespace(shape=shape, seed=0, folder=str(model)))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return str(model)


# ── running them ──
CHECKS = {  # seconds that each may take
    machine: 60, varlen_is_mask: 60, graphs_are_eager: 90, compiled_is_eager: 120, sampler_is_trainer: 60,
    deterministic: 60, tiny_steps: 120, bench_3b: 240, steps_3b: 240, lora_3b: 120,
    offload_3b: 120, lean_3b: 120}


def outcome(name: str, limit: float, arguments) -> dict:
    """The check in a process of its own: what it printed last, or how it failed."""
    command = [sys.executable, __file__, "--one", name, "--folder", arguments.folder]
    if arguments.cpu:
        command.append("--cpu")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        shown, said = process.communicate(timeout=limit)
        why = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        shown, said = process.communicate()
        why = f"no end after {limit:.0f} s"
    if process.returncode:
        return {"result": "failed", "why": why, "said": said[-3000:]}
    return json.loads(shown.splitlines()[-1])


def run_one(name: str, arguments) -> None:
    check = next(check for check in CHECKS if check.__name__ == name)
    device = torch.device("cpu" if arguments.cpu else "cuda:0")
    try:
        found = {"result": "ok", "measured": check(device, arguments.folder)}
    except NotImplementedError as error:
        found = {"result": "not run", "why": str(error)}
    print("\n" + json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--cpu", action="store_true", help="what a CPU can do of it")
    parser.add_argument("--seconds", type=float, default=540, help="for all checks together [540]")
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return run_one(arguments.one, arguments)
    end = time.perf_counter() + arguments.seconds
    with tempfile.TemporaryDirectory() as arguments.folder:
        for check, limit in CHECKS.items():
            if check.__name__ not in arguments.only:
                continue
            start = time.perf_counter()
            if not (arguments.cpu or torch.cuda.is_available()):
                found = {"result": "not run", "why": "no CUDA device here"}
            elif end - start < 15:
                found = {"result": "not run", "why": f"{arguments.seconds:.0f} s are over"}
            else:
                found = outcome(check.__name__, min(limit, end - start), arguments)
            seconds = round(time.perf_counter() - start, 1)
            print(json.dumps({"check": check.__name__, "seconds": seconds} | found), flush=True)


if __name__ == "__main__":
    main()
