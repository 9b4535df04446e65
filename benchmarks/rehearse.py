"""The CUDA branch rehearsed without a GPU: true shapes and dtypes, on tensors that hold no data.

    c++ -shared -fPIC -std=c++20 -I <torch>/include benchmarks/no_gpu.cpp -o no_gpu.so
    python benchmarks/rehearse.py no_gpu.so --layers 36 --depth 32      # Qwen2.5-VL-3B

One JSON object: dtypes, how often the host waits for the device or copies to it, and the kernels a
decoder layer takes, of decoding and of a training pass under FSDP2 as one of 8 ranks. Not
rehearsed: values, memory, NCCL, and capture itself.
"""
# ruff: noqa: E402 (the device guard must be there before torch is)
import argparse
import contextlib
import ctypes
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace


def load_guard(library: str) -> None:
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("guard", help="no_gpu.cpp, built")
parser.add_argument("--layers", type=int, default=36, help="of the decoder")
parser.add_argument("--depth", type=int, default=32, help="blocks of the vision tower")
arguments = parser.parse_args()
load_guard(str(Path(arguments.guard).resolve()))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import fsdp
import packing
import policy
from packing import Pack
from policy import Policy
from qwen_vl import Completion, Group, Prompt, rope_positions
from sampler import Sampler

CUDA = torch.device("cuda:0")
GRID = (1, 34, 46)  # an image of 644×476 pixels
KERNELS = ("aten", "torch_attn", "rehearsal")  # the last: PyTorch's fused norm
WAITS = {"_local_scalar_dense", "nonzero", "unique_consecutive", "is_nonzero"}
NO_KERNEL = {
    "view", "_unsafe_view", "expand", "transpose", "t", "permute", "slice", "select", "unsqueeze",
    "squeeze", "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "set_", "device"}


class Count(TorchDispatchMode):
    """What the operations on CUDA tensors ask of the device."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.copies = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in WAITS and any(x.is_cuda for x in inputs):
            self.waits += 1
        out = function(*args, **(kwargs or {}))
        tensors = inputs + [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not any(x.is_cuda for x in tensors):
            return out
        if name in ("_to_copy", "copy_") and any(x.device.type == "cpu" for x in inputs):
            self.copies += 1
        elif function.namespace in KERNELS and name not in NO_KERNEL:
            self.kernels[name] += 1
        return out

    def total(self) -> int:
        return sum(self.kernels.values())

    def report(self) -> dict:
        return {"kernels": self.total(), "waits": self.waits, "copies": self.copies}


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


def true_config(layers: int, depth: int) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B's, but for the number of layers and blocks."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    return Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16,
            num_key_value_heads=2, intermediate_size=11_008, vocab_size=151_936, rms_norm_eps=1e-6,
            max_position_embeddings=128_000, tie_word_embeddings=True, rope_parameters=rope),
        vision_config=dict(
            depth=depth, hidden_size=1280, num_heads=16, intermediate_size=3420,
            out_hidden_size=2048, window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
        image_token_id=151_655, video_token_id=151_656, vision_start_token_id=151_652,
        vision_end_token_id=151_653, tie_word_embeddings=True)


def make_groups(prompts: int, group: int, length: int) -> list[Group]:
    count = GRID[1] * GRID[2] // 4
    ids = [1] * 15 + [151_655] * count + [5] * 31
    positions_3L, after = rope_positions([15, GRID, 31])
    groups = []
    for index in range(prompts):
        pixels_ND = torch.zeros(GRID[1] * GRID[2], 1176)
        slots = list(range(15, 15 + count))
        prompt = Prompt(ids, positions_3L, after, slots, pixels_ND, (GRID,))
        completions = [Completion([7] * length) for _ in range(group)]
        groups.append(Group(prompt, completions, row=index * group))
    return groups


def fake_pack(groups: list[Group], mode: FakeTensorMode) -> Pack:
    """The pack as prepare_attention leaves it on CUDA."""
    pack = packing.pack_groups(groups)
    pack.attention = packing.varlen_layout(pack)

    def move(value):
        return mode.from_tensor(value).to(CUDA) if torch.is_tensor(value) else value

    moved = {name: move(value) for name, value in vars(pack).items() if name != "grids_I3"}
    moved["attention"] = {name: move(value) for name, value in pack.attention.items()}
    return Pack(grids_I3=pack.grids_I3, **moved)


def rehearse_decoding(config, banned_V) -> dict:
    """8 prompts of 8 rows: prefill, a step, a token for each row, the first growth."""
    with CUDA:
        model = Qwen2_5_VLForConditionalGeneration(config)
    special = SimpleNamespace(banned_V=banned_V, stops=(1, 2), pad=0)
    sampler = Sampler(model, special, device=CUDA, dtype=torch.bfloat16, graphs=True)
    prompts = [group.prompt for group in make_groups(8, 8, 1)]
    shape = sampler.cache.first_shape([len(prompt.ids) for prompt in prompts], 8, 2048)
    report = {}
    with torch.no_grad():
        batch, _ = sampler.start_batch(prompts, shape, 2048)
        with Count() as count:
            hidden_PGD = sampler.decode(batch, shape[3])
        report["step"] = count.report()
        layers, sampler.copy.layers = sampler.copy.layers, []
        with Count() as around:
            sampler.decode(batch, shape[3])
        sampler.copy.layers = layers
        report["kernels_a_layer"] = (count.total() - around.total()) / len(layers)
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


def rehearse_training(config, banned_V, pack: Pack) -> dict:
    """A packed row of 6 groups of 8 completions, forward and backward, sharded over 8 ranks."""
    with CUDA:
        model = Qwen2_5_VLForConditionalGeneration(config)
    trained = Policy(model, banned_V, checkpointing=True)
    fsdp.shard(trained, fsdp.Processes(0, 8, CUDA))
    attention = trained.decoder.layers[0].self_attn
    inputs, forward = [], attention.forward

    def watched(**given):
        inputs.append(str(given["hidden_states"].dtype))
        return forward(**given)

    attention.forward = watched
    with Count() as count:
        logp_S, _ = trained(pack)
        logp_S.sum().backward()
    report = count.report()
    gradients = {str(p.grad.dtype) for p in trained.parameters() if p.grad is not None}
    without = [name for name, p in trained.named_parameters() if p.grad is None]
    return report | {"inputs": inputs[0], "logp": str(logp_S.dtype),
                     "gradients": sorted(gradients), "without_gradient": without}


def main() -> None:
    stub_cuda()
    fuse_norms()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    torch.nn.Module._apply = move_in_place
    dist.init_device_mesh = on_the_host(dist.init_device_mesh)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    config = true_config(arguments.layers, arguments.depth)
    layout = on_the_host(policy.vision_layout)
    grids = {images: torch.tensor([GRID] * images) for images in (6, 8)}
    policy.vision_layout = lambda vision, given: layout(vision, grids[len(given)])
    pack = fake_pack(make_groups(6, 8, 200), mode)
    with mode:
        banned_V = torch.zeros(config.text_config.vocab_size, dtype=torch.bool, device=CUDA)
        decoding = rehearse_decoding(config, banned_V)
        training = rehearse_training(config, banned_V, pack)
    print(json.dumps({"decoding": decoding, "training": training}))


if __name__ == "__main__":
    main()
