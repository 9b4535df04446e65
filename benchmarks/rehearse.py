"""The CUDA branch rehearsed without a GPU: true shapes and dtypes, on tensors that hold no data.

    python benchmarks/rehearse.py --shape 3b      # or 7b; needs a C++ compiler, and PyTorch for CPUs

A table: of a training pass, an optimizer step and a refresh of the sampler under FSDP2, as one of 8
ranks, and of a decoding step. A row's columns:

kernels    that are started, and how many more each decoder layer brings. With --compile: in a
           compiled function all operations between two products are taken for one kernel, as
           inductor is meant to make of them
GB         that they read and write: each tensor once a kernel, as if nothing stayed in a cache
waits      of the host for the device, and copies from the host
GiB        that tensors hold at their fullest, and what --plan says of the same sizes; it looks at
           moments that may be the fullest alone, of which decoding is none. Of training without
           keys and values

Then GiB of a pass of one card with adapters. --json FILE has all of it, and dtypes. Not rehearsed:
values, NCCL, the allocator, and capture itself.
"""
# ruff: noqa: E402 (the device guard must be there before torch is)
import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace


def load_guard() -> None:
    """Build no_gpu.cpp and load it, which must be there before torch is."""
    compiler, folder = shutil.which("c++"), Path(importlib.util.find_spec("torch").origin).parent
    if not compiler:
        sys.exit("no C++ compiler here: the device guard that stands in for CUDA cannot be built")
    with tempfile.TemporaryDirectory() as built:
        library = Path(built, "no_gpu.so")
        source = Path(__file__).with_name("no_gpu.cpp")
        build = [compiler, "-shared", "-fPIC", "-std=c++20", "-I", folder / "include", source]
        subprocess.run([*build, "-o", library], check=True)
        for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(folder / "lib" / name), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shape", choices=("3b", "7b"), default="3b")
parser.add_argument("--layers", type=int, help="of the decoder, if not all; at least 2")
parser.add_argument("--depth", type=int, help="blocks of the vision tower, if not all")
parser.add_argument("--json", type=Path, metavar="FILE", help="where all that is counted goes")
arguments = parser.parse_args()
load_guard()
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_step
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import fsdp
import grpo_vl
import lora
import packing
import plan
import policy
import sampler as sampler_module
import training
import weight_copy
from packing import Pack
from policy import Policy
from qwen_vl import Completion, Group, Prompt, rope_positions
from sampler import Sampler
from weight_copy import WeightCopy

CUDA = torch.device("cuda:0")
GRID = (1, 34, 46)  # an image of 644×476 pixels
LENGTHS = dict(group=8, max_prompt=437, max_pixels=34 * 46 * 14**2)  # for --plan
BACKWARD = (  # plan.py's moments of it
    "lm_head's backward", "the decoder's backward", "the tower's backward", "the last reduce-scatter")
KERNELS = ("aten", "torch_attn", "fsdp", "rehearsal")  # the last: PyTorch's fused norm
WAITS = {"_local_scalar_dense", "nonzero", "unique_consecutive", "is_nonzero"}
NO_KERNEL = {
    "view", "_unsafe_view", "expand", "transpose", "t", "permute", "slice", "select", "unsqueeze",
    "squeeze", "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "set_", "device"}


TAKE_ROWS = {"embedding", "index", "index_select", "gather"}  # and read no more than they give
PUT_ROWS = {"index_copy_", "index_put_", "scatter_add_"}  # and write no more than they are given
OVERWRITE = {"copy_", "_foreach_copy_", "fill_", "zero_"}  # what they write to is not read


PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm_"}


class Count(TorchDispatchMode):
    """What the operations on CUDA tensors ask of the device."""

    before = None  # the last kernel of the compiled function that is running, "" at its beginning

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.copies, self.touched = Counter(), 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        inputs = tensors_of((args, kwargs))
        if name in WAITS and any(x.is_cuda for x in inputs):
            self.waits += 1
        out = function(*args, **(kwargs or {}))
        if not any(x.is_cuda for x in inputs + tensors_of(out)):
            return out
        if name in ("_to_copy", "copy_") and any(x.device.type == "cpu" for x in inputs):
            self.copies += 1
        elif function.namespace in KERNELS and name not in NO_KERNEL:
            if not self.joins(name):
                self.kernels[name] += 1
            self.touched += bytes_touched(function, name, args, kwargs or {}, out)
        return out

    def joins(self, name: str) -> bool:
        """Whether it is part of the kernel before it."""
        if Count.before is None:
            return False
        before, Count.before = Count.before, name
        return before not in PRODUCTS | {""} and name not in PRODUCTS

    def total(self) -> int:
        return sum(self.kernels.values())

    def report(self, memory: "Memory") -> dict:
        """Since it began; bytes at most since `memory.start`."""
        return {
            "kernels": self.total(), "waits": self.waits, "copies": self.copies,
            "touched": self.touched, "peak": memory.peak}


def as_if_compiled(function, on: bool):
    """In place of `policy.compiled`."""
    if not on:
        return function

    def call(*args):
        Count.before = ""
        try:
            return function(*args)
        finally:
            Count.before = None

    return call


def tensors_of(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def bytes_touched(function, name: str, args, kwargs: dict, out) -> int:
    """What a kernel reads, and what it writes: its outputs, and inputs that it changes."""
    given = dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
    changes = [argument.name for argument in function._schema.arguments if argument.is_write]
    changed = tensors_of([given.get(key) for key in changes])
    inputs = tensors_of(given)
    if name in TAKE_ROWS:
        return 2 * sum(map(size, tensors_of(out)))
    if name == "all_gather_copy_in":  # a rank's shards side by side, into its part of the whole
        return 2 * sum(map(size, args[0]))
    if name in PUT_ROWS:
        return 2 * min(size(x) for x in inputs if x.is_floating_point())
    read = inputs
    if name in OVERWRITE or "out" in kwargs:
        read = [x for x in inputs if not any(x is y for y in changed)]
    made = [x for x in tensors_of(out) if not any(x is y for y in inputs)]
    return sum(map(size, read + changed + made))


def size(tensor: torch.Tensor) -> int:
    """Bytes of this rank's part; what is expanded lies in memory once."""
    tensor = fsdp.local(tensor)
    lengths = [length for length, stride in zip(tensor.shape, tensor.stride()) if stride]
    return tensor.itemsize * math.prod(lengths)


class Memory(TorchDispatchMode):
    """Bytes that tensors on CUDA hold, now and at most; what FSDP2 frees it resizes to nothing."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage, size):
            resize(storage, size)
            if storage._cdata in self.sizes:
                self.note(storage)

        torch.UntypedStorage.resize_ = resize_and_note

    def note(self, storage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self.forget, key)
        self.now += storage.nbytes() - self.sizes[key]
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def forget(self, key) -> None:
        self.now -= self.sizes.pop(key)

    def start(self) -> None:
        """From now on `peak` is of what follows."""
        self.peak = self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                self.note(fsdp.local(tensor).untyped_storage())
        return out


@torch.library.custom_op("rehearsal::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As F.rms_norm on CUDA: one kernel forward, two backward. A CPU build writes out its parts."""
    return torch.empty_like(x)


@torch.library.custom_op("rehearsal::rms_norm_backward", mutates_args=())
def rms_norm_backward(
        gradient: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(gradient), torch.empty_like(weight)


def fuse_norms() -> None:
    def remember(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, gradient):
        _, weight = ctx.saved_tensors
        return rms_norm_backward(gradient, weight)

    rms_norm.register_fake(lambda x, weight: torch.empty_like(x))
    rms_norm_backward.register_fake(lambda gradient, weight: (torch.empty_like(gradient), torch.empty_like(weight)))
    rms_norm.register_autograd(backward, setup_context=remember)
    torch.nn.functional.rms_norm = lambda x, shape, weight, eps: rms_norm(x, weight)


def fuse_silu() -> torch.library.Library:
    """Its backward as on CUDA: one kernel. A CPU build writes out its parts, and keeps them all."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "CUDA")
    return library  # its kernels live as long as it does


class Stub:
    """A stream, an event, a graph: everything may be asked of it, nothing happens."""

    def __init__(self, *_, **__):
        self.device, self.stream_id, self.device_index = CUDA, 0, 0

    def __getattr__(self, name):
        return lambda *_, **__: self


def stub_cuda() -> None:
    """What the CPU build's torch.cuda lacks."""
    def nothing(*_, **__):
        return contextlib.nullcontext()

    stubs = dict(
        Stream=Stub, Event=Stub, CUDAGraph=Stub, current_stream=Stub, default_stream=Stub,
        stream=nothing, graph=nothing, device=nothing, synchronize=nothing, empty_cache=nothing,
        set_device=nothing, current_device=lambda: 0, device_count=lambda: 8,
        is_initialized=lambda: True, graph_pool_handle=lambda: (0, 1),
        get_device_capability=lambda *_: (9, 0), is_current_stream_capturing=lambda: False)
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    torch.Tensor.pin_memory = lambda self: self  # fakes have no host memory to be locked
    torch.Tensor.is_pinned = lambda self: True
    torch.Tensor.record_stream = lambda self, stream: None


def move_in_place(module, function, recurse=True):
    """Module._apply without the swapping of tensors that fakes refuse."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = function(parameter.detach())
                part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def on_the_host(function):
    """What PyTorch or the tower computes from values, computed on true tensors."""
    def call(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def true_config(layers: int | None) -> Qwen2_5_VLConfig:
    """Of the published shape, but for the number of layers and blocks if they are given."""
    text, vision = plan.published(bench_step.SHAPES[arguments.shape])
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    vision["depth"] = arguments.depth or vision["depth"]
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision,
        image_token_id=151_655, video_token_id=151_656, vision_start_token_id=151_652,
        vision_end_token_id=151_653, tie_word_embeddings=text["tie_word_embeddings"])


def make_groups(prompts: int, group: int, length: int, width: int | None = None) -> list[Group]:
    """width: of features that the sampler kept, where the tower is frozen."""
    count = GRID[1] * GRID[2] // 4
    ids = [1] * 15 + [151_655] * count + [5] * 31
    positions_3L, after = rope_positions([15, GRID, 31])
    groups = []
    for index in range(prompts):
        pixels_ND = torch.zeros(GRID[1] * GRID[2], 1176)
        slots = list(range(15, 15 + count))
        prompt = Prompt(ids, positions_3L, after, slots, pixels_ND, (GRID,))
        if width:
            prompt.features_ID = torch.zeros(count, width, dtype=torch.bfloat16)
        completions = [Completion([7] * length) for _ in range(group)]
        groups.append(Group(prompt, completions, row=index * group))
    return groups


def fake_pack(groups: list[Group], mode: FakeTensorMode) -> Pack:
    """The pack as prepare_attention leaves it on CUDA."""
    pack = packing.pack_groups(groups)
    pack.attention = packing.varlen_layout(pack)

    on_host = packing.map_tensors(pack, mode.from_tensor)
    on_host.grids_I3 = pack.grids_I3  # read for their values
    return on_host.to(CUDA)


def rehearse_decoding(config, banned_V, memory: Memory, compile: bool = False) -> dict:
    """8 prompts of 8 rows: prefill, a step, a token for each row, the first growth."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    special = SimpleNamespace(banned_V=banned_V, stops=(1, 2), pad=0)
    sampler = Sampler(
        model, special, device=CUDA, dtype=torch.bfloat16, graphs=True, keep_features=True,
        compile=compile)
    prompts = [group.prompt for group in make_groups(8, 8, 1)]
    shape = sampler.cache.first_shape([len(prompt.ids) for prompt in prompts], 8, 2048)
    report = {}
    with torch.no_grad():
        batch, _ = sampler.start_batch(prompts, shape, 2048)
        memory.start()
        with Count() as count:
            hidden_PGD = sampler.decode(batch, shape[3])
        report["step"] = count.report(memory)
        report["features"] = str(prompts[0].features_ID.device)
        layers, sampler.copy.layers = sampler.copy.layers, []
        with Count() as around:
            sampler.decode(batch, shape[3])
        sampler.copy.layers = layers
        report["step"]["a layer"] = (count.total() - around.total()) / len(layers)
        report["hidden"] = str(hidden_PGD.dtype)
        with Count() as count:
            uniform_PG = torch.empty(8, 8, dtype=torch.float64, device=CUDA)
            _, logp_PG = sampler.choose(hidden_PGD, uniform_PG, 1.0)
            sampler.next_hidden(batch, 0)
            grown = sampler.cache.make_room(batch, [8] * 8, shape[3], 2048, [])
        report["round"] = {"waits": count.waits, "copies": count.copies}
        report["logp"] = str(logp_PG.dtype)
        report["shapes"] = [batch.shape, grown.shape]
    return report


def rehearse_training(
        config, banned_V, pack: Pack, memory: Memory, keep_attention: bool = False) -> dict:
    """A packed row of 6 groups of 8 completions, forward and backward, sharded over 8 ranks; a step
    of the optimizer, and a refresh. Neither the first micro-batch nor the first step: gradients and
    AdamW's state are there."""
    with CUDA:
        model = Qwen2_5_VLForConditionalGeneration(config)
    trained = Policy(model, banned_V, checkpointing=True, keep_attention=keep_attention)
    fsdp.shard(trained, fsdp.Processes(0, 8, CUDA))
    attention = trained.decoder.layers[0].self_attn
    inputs, attend = [], attention.forward

    def watched(**given):
        inputs.append(str(given["hidden_states"].dtype))
        return attend(**given)

    attention.forward = watched
    copy = WeightCopy(model, device=CUDA, dtype=torch.bfloat16)
    parameters = fsdp.trainable_parameters(trained)
    optimizer = training.make_optimizer(SimpleNamespace(beta2=0.999), parameters, on_gpu=True)
    report = {"kept, and the sampler's copy": memory.now}
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    memory.start()
    with Count() as count:
        logp_S, _ = trained(pack)
    report["forward"] = count.report(memory)
    report |= {"inputs": inputs[0], "logp": str(logp_S.dtype)}
    memory.start()
    with Count() as count:
        logp_S.sum().backward()
    report["backward"] = count.report(memory)
    del logp_S
    report["gradients"] = sorted({str(p.grad.dtype) for p in parameters if p.grad is not None})
    names = [name for name, p in trained.named_parameters() if p.grad is None]
    report["without_gradient"] = names
    memory.start()
    with Count() as count:
        fsdp.clip_gradients(trained, 1.0)
        optimizer.step()
    report["step"] = count.report(memory)
    optimizer.zero_grad(set_to_none=True)
    memory.start()
    with Count() as count:
        copy.refresh(fsdp.gathered_parameters(trained))
    report["refresh"] = count.report(memory)

    options = grpo_vl.Config(
        prompts=48, **LENGTHS, micro_tokens=len(pack.ids_L), keep_attention=keep_attention)
    moments = planned(model, options, 8, 200)
    report["refresh"]["planned"] = moments["the sampler's refresh"] - moments["keys and values"]
    fullest = max(moments[moment] for moment in BACKWARD)
    report["backward"]["planned"] = fullest - moments["keys and values"]
    return report


def per_layer(report: dict, shorter: dict, layers: int) -> None:
    """Kernels that a layer brings, from the same with one layer."""
    for part in ("forward", "backward", "step", "refresh"):
        more = report[part]["kernels"] - shorter[part]["kernels"]
        report[part]["a layer"] = more / (layers - 1)


def plan_of(model, options, ranks: int, max_tokens: int) -> tuple[dict, dict]:
    """What plan.py says of the model: ({what a rank keeps: bytes}, {moment: {what else: bytes}})."""
    with unset_fake_temporarily(), torch.device("meta"):
        bare = Qwen2_5_VLForConditionalGeneration(model.config)
    sizes = plan.sizes_of(options, bare)
    kept = plan.kept_by_a_rank(options, sizes, ranks)
    return kept, plan.held_at_moments(options, bare, sizes, ranks, max_tokens)


def planned(model, options, ranks: int, max_tokens: int) -> dict[str, float]:
    """{moment: bytes} by plan.py, with what a rank keeps; and of keys and values alone."""
    kept_terms, moments = plan_of(model, options, ranks, max_tokens)
    kept = sum(kept_terms.values())
    terms = moments["the sampler's refresh"]
    cache = terms["keys and values, bf16"]
    return {"keys and values": cache} | {moment: kept + sum(terms.values()) for moment, terms in moments.items()}


def rehearse_adapters(config, banned_V, pack: Pack, memory: Memory, offload: bool) -> dict:
    """One card, --lora 32: the same pack forward and backward; bytes that it holds, and planned."""
    with CUDA:
        model = Qwen2_5_VLForConditionalGeneration(config)
    trained = Policy(model, banned_V, checkpointing=True)
    lora.adapt(trained, 32)
    for linear in lora.adapted_linears(trained).values():  # drawn on the host
        linear.lora_A = torch.nn.Parameter(linear.lora_A.detach().to(CUDA))
        linear.lora_B = torch.nn.Parameter(linear.lora_B.detach().to(CUDA))
    fsdp.cast_kept(trained, CUDA)
    fsdp.shard(trained, fsdp.Processes(0, 1, CUDA), offload=offload)
    memory.peak = held = memory.now
    logp_S, _ = trained(pack)
    logp_S.sum().backward()
    kept = {True: set(), False: set()}
    for parameter in trained.parameters():
        kept[parameter.requires_grad].add(f"{parameter.dtype} {parameter.device.type}")
    gradients = {f"{p.grad.dtype} {p.grad.device.type}" for p in trained.parameters() if p.grad is not None}
    return {"trained": sorted(kept[True]), "frozen": sorted(kept[False]), "gradients": sorted(gradients),
            "held": held, "peak": memory.peak, "planned": planned_pass(model, pack, offload)}


def planned_pass(model, pack: Pack, offload: bool) -> int:
    """Bytes by plan.py of the same pass alone: without sampler and optimizer."""
    options = grpo_vl.Config(
        prompts=6, **LENGTHS, lora=32, offload=offload, micro_tokens=len(pack.ids_L))
    kept, moments = plan_of(model, options, 1, 200)
    if offload:  # on the host
        kept = {}
    absent, found = ("sampling", "keys", "AdamW"), []
    for moment in BACKWARD:
        terms = moments[moment] | kept
        found.append(sum(size for name, size in terms.items() if not name.startswith(absent)))
    return max(found)


ROWS = {  # of the table: where the report has it
    "forward": ("training", "forward"), "backward": ("training", "backward"),
    "optimizer step": ("training", "step"), "refresh": ("training", "refresh"),
    "decoding, a step": ("decoding", "step"), "with --compile": ("compiled",),
    "adapters, a pass": ("adapters",),
    "and --offload": ("offloaded",)}
COLUMNS = {  # heading: name in the report, its unit, how it is printed
    "kernels": ("kernels", 1, ",.0f"), "a layer": ("a layer", 1, ".0f"),
    "GB": ("touched", 1e9, ".1f"), "waits": ("waits", 1, ".0f"), "copies": ("copies", 1, ".0f"),
    "GiB": ("peak", 2**30, ".2f"), "--plan's": ("planned", 2**30, ".2f")}


def table(report: dict) -> str:
    """A line a row; – where nothing is counted or planned."""
    lines = [f"{'':18}" + "".join(f"{heading:>10}" for heading in COLUMNS)]
    for title, path in ROWS.items():
        found = report
        for key in path:
            found = found[key]
        line = f"{title:18}"
        for name, unit, layout in COLUMNS.values():
            shown = "–"
            if name in found:
                shown = format(found[name] / unit, layout)
            line += f"{shown:>10}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    stub_cuda()
    silu = fuse_silu()  # noqa: F841 (kept alive)
    fuse_norms()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    torch.nn.Module._apply = move_in_place
    sampler_module.compiled = weight_copy.compiled = as_if_compiled
    dist.init_device_mesh = on_the_host(dist.init_device_mesh)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    config = true_config(arguments.layers)
    layers = config.text_config.num_hidden_layers
    layout = on_the_host(policy.vision_layout)
    grids = {images: torch.tensor([GRID] * images) for images in (6, 8)}
    policy.vision_layout = lambda vision, given: layout(vision, grids[len(given)])
    pack = fake_pack(make_groups(6, 8, 200), mode)
    seen = fake_pack(make_groups(6, 8, 200, config.text_config.hidden_size), mode)
    with mode:
        banned_V = torch.zeros(config.text_config.vocab_size, dtype=torch.bool, device=CUDA)
        with Memory() as memory:
            decoding = rehearse_decoding(config, banned_V, memory)
        with Memory() as memory:
            compiled = rehearse_decoding(config, banned_V, memory, compile=True)["step"]
        compiled = {name: compiled[name] for name in ("kernels", "a layer")}
        with Memory() as memory:
            trained = rehearse_training(config, banned_V, pack, memory)
        with Memory() as memory:
            shorter = rehearse_training(true_config(1), banned_V, pack, memory)
        with Memory() as memory:
            kept = rehearse_training(true_config(1), banned_V, pack, memory, keep_attention=True)
        per_layer(trained, shorter, layers)
        with Memory() as memory:
            adapters = rehearse_adapters(config, banned_V, seen, memory, offload=False)
        with Memory() as memory:
            offloaded = rehearse_adapters(config, banned_V, seen, memory, offload=True)
    report = {
        "decoding": decoding, "compiled": compiled, "training": trained, "a layer of training": shorter,
        "attention kept": kept, "adapters": adapters, "offloaded": offloaded}
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
