"""Who is where? Ranks; a policy cut over them, by PyTorch or by hand.

§1 ranks · §2 sharding by PyTorch's FSDP2 · §3 the same by hand · §4 either way: what the others
need of a sharded policy
"""
import atexit
import os
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import state_dict as dist_state
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import lora
import qwen_vl
from policy import Policy
from qwen_vl import SpecialIds

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # their names before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single


# §1 ───────────────────────────────────────── ranks ──────────────────────────────────────────
@dataclass(frozen=True)
class Processes:
    """Who we are among the ranks, and where tensors live."""

    rank: int
    world: int
    device: torch.device

    def gather(self, value: Any) -> list:
        """A small Python object of every rank, in rank order."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def merge(self, own: dict) -> dict:
        """The entries of every rank's dict in one, in the order of keys."""
        found = {}
        for part in self.gather(own):
            found |= part
        return dict(sorted(found.items()))


def start_processes(timeout: int, *, deterministic: bool = False) -> Processes:
    """torchrun's ranks; without torchrun a world of one, which takes the same path.

    timeout: seconds after which a rank gives up waiting for the others. deterministic: the same
    bits from run to run, see `use_deterministic_kernels`.
    """
    if deterministic:
        use_deterministic_kernels()
    rank, world, local = (int(os.environ.get(n, 0)) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    options = {}
    if not world:
        options = {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    backend = register_gloo()
    if cuda:
        backend = f"cpu:{backend},cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **options)
    return Processes(rank, max(world, 1), torch.device(f"cuda:{local}" if cuda else "cpu"))


def use_deterministic_kernels() -> None:
    """From now on no kernel of this process adds in an order that depends on timing.

    On a CPU none does anyhow. On CUDA PyTorch takes other kernels, slower ones, or raises where it
    knows none; `policy.varlen_attention` tells flash-attn. cuBLAS reads its variable at first use.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def register_gloo() -> str:
    """The name of gloo with one worker thread, for init_process_group.

    PyTorch starts two, and both write the name of the collective they have just finished into one
    string without a lock (ProcessGroupGloo::runLoop): now and then into memory that the other has
    freed, and malloc ends the process. results/gloo_race.txt has the proof.
    """
    name = "gloo_one_thread"
    if not hasattr(dist.Backend, name.upper()):
        dist.Backend.register_backend(name, gloo_one_thread, devices=["cpu"])
    return name


def gloo_one_thread(store, rank: int, world: int, timeout: timedelta):
    options = dist.ProcessGroupGloo._Options()
    options._threads = 1
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    return dist.ProcessGroupGloo(store, rank, world, options)


def leave() -> None:
    """The end of a run: ranks wait for each other, so that none waits for one that has gone."""
    dist.barrier()
    dist.destroy_process_group()


def end_process() -> None:
    """The end of a script, with status 0 and without the interpreter's teardown.

    DTensor's caches keep the mesh, so the group, so gloo's thread, beyond `leave`. What that
    thread still has to do after the last barrier may need the interpreter, and one that is being
    torn down ends the process instead: "terminate called without an active exception", SIGABRT,
    and torchrun reports a failure of a run that has written everything.
    """
    threading._shutdown()  # as the interpreter does first: wait for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# §2 ──────────────────────────────── sharding by PyTorch's FSDP2 ─────────────────────────────
def shard(policy: Policy, processes: Processes, *, offload: bool = False) -> None:
    """`fully_shard` on each unit: vision tower, each decoder layer, a root with all the rest.

    Weights as they are kept are cut over all ranks; a unit gathers a bf16 copy (fp32 on CPU) to
    compute with; gradients are reduced in fp32. lm_head stays in the root: ranks run it unequally
    often.
    """
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    options = {"mesh": mesh}
    if offload:
        pinned = processes.device.type == "cuda"  # host memory that a GPU reads by itself
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
    dtype = compute_dtype(processes.device)
    if dtype != torch.float32:
        # Inputs are cast where they are used: pixels on the GPU, and a Pack stays the one it was.
        options["mp_policy"] = MixedPrecisionPolicy(
            dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in units_of(policy):
        fully_shard(module, **options)


def units_of(policy: Policy) -> list[nn.Module]:
    """What is gathered and freed as one; the root comes last and takes what the others left."""
    return [policy.vision, *policy.decoder.layers, policy]


def load_policy(source: str, processes: Processes, config, *, freeze_vision=False, frozen=False,
                sharding="fsdp2"):
    """(sharded policy, tokenizer, special ids). Rank 0 reads the weights and deals them out.

    sharding: "fsdp2" or "by-hand". frozen: nothing of it is trained.
    """
    frozen_dtype = compute_dtype(processes.device)  # in which what is frozen is kept, and read
    untrained = frozen or config.lora > 0  # the model itself, adapters aside
    model, tokenizer = qwen_vl.load(
        source, weights=processes.rank == 0, seed=config.seed,
        dtype=frozen_dtype if untrained else torch.float32,
        vision_dtype=frozen_dtype if untrained or freeze_vision else torch.float32)
    special = SpecialIds.read(tokenizer, model.config)
    policy = Policy(
        model, special.banned_V, checkpointing=config.checkpointing,
        checkpoint_every=config.checkpoint_every, keep_attention=config.keep_attention,
        compile=config.compile)
    policy.vision.requires_grad_(not freeze_vision)
    if frozen:
        policy.requires_grad_(False)
    elif config.lora:
        lora.adapt(policy, config.lora, config.lora_alpha, config.seed)
    cast_kept(policy, processes.device)
    if sharding == "by-hand":
        shard_by_hand(policy, processes)
        return policy, tokenizer, special
    full = policy.state_dict() if processes.rank == 0 else {}
    shard(policy, processes, offload=config.offload)  # moves weights and buffers to the device
    options = dist_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dist_state.set_model_state_dict(policy, full, options=options)
    return policy, tokenizer, special


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward and backward passes compute with."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def cast_kept(policy, device: torch.device) -> None:
    """What is trained is kept in fp32, as bf16 loses most updates of lr 1e-6; what is frozen in the
    dtype that is computed with."""
    for parameter in policy.parameters():
        kept = torch.float32 if parameter.requires_grad else compute_dtype(device)
        parameter.data = parameter.data.to(kept)


# §3 ───────────────────────────────────── the same by hand ───────────────────────────────────
# What a rank does over time, with a root and two layers. Between g and f a unit's weights are whole
# in its memory; else it keeps 1/N of them.
#
#              forward                             backward
#   root     g ═══════════════════════════ f     g ═══════════════════════════ f r
#   layer 1       g ═════ f                                      g ═════ f r
#   layer 2                 g ═════ f                 g ═════ f r
#
#   g  gather           every rank's 1/N, cast to bf16 on GPUs, becomes the whole unit
#   ═  compute          the unit's forward; in its backward activations are recomputed, if asked for
#   f  free             the whole weights go, a rank's own 1/N stays
#   r  reduce-scatter   the whole gradient, in fp32: a rank keeps the mean of its 1/N, adds it up
#                       over micro-batches, and its optimizer steps on that
#
# `fully_shard` does this and more: it gathers a unit while the one before it computes, saves and
# resumes, moves weights to host memory, and keeps the root whole between forward and backward.
class Gather(torch.autograd.Function):
    """1/N of a unit's weights → all of them; the gradient takes the way back."""

    @staticmethod
    def forward(context, shard, unit):
        context.unit = unit
        unit.gather()
        return unit.full.detach()

    @staticmethod
    def backward(context, gradient):
        """Autograd comes here once, when the last of the unit's weights has its gradient.

        By then it has added up what tied weights get, and put zeros where a weight got nothing.
        """
        unit = context.unit
        unit.free()
        part = torch.empty_like(unit.shard)
        reduce_scatter_single(part, gradient.to(part.dtype))
        return part / dist.get_world_size(), None


class Unit:
    """A module, less the units inside it, of whose weights this rank keeps 1/N.

    shard: that 1/N, flat, the optimizer's parameter. full: all weights, flat, in the dtype to
    compute with, without memory unless gathered. parameters: one a weight, names and shapes without
    memory. places: where a weight stands, (part of the module, attribute, parameter); a tied one
    stands at two.
    """

    def __init__(self, module: nn.Module, processes: Processes):
        self.places, stand_ins = [], {}
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                if not weight.is_meta:  # else it is in a unit inside this one
                    stand_in = nn.Parameter(weight.to("meta"), weight.requires_grad)
                    stand_ins.setdefault(weight, stand_in)
                    self.places.append((part, name, stand_ins[weight]))
        weights, self.parameters = list(stand_ins), list(stand_ins.values())
        trained = {weight.requires_grad for weight in weights}
        if len(trained) > 1:
            raise ValueError(f"--sharding by-hand trains or freezes all of {type(module).__name__}")
        self.sizes = [weight.numel() for weight in weights]
        count, world = sum(self.sizes), processes.world
        self.sizes.append(-count % world)  # zeros, so that N parts are equally long
        device, parts = processes.device, None
        part = weights[0].new_empty(sum(self.sizes) // world, device=device)
        if processes.rank == 0:
            flat = torch.cat([weight.detach().flatten() for weight in weights])
            flat = F.pad(flat, (0, self.sizes[-1])).to(device)
            parts = list(flat.chunk(world))
        dist.scatter(part, parts)
        self.shard = nn.Parameter(part, requires_grad=trained.pop())
        dtype = compute_dtype(device)
        self.full = torch.empty(sum(self.sizes), dtype=dtype, device=device)
        self.free()
        module.register_forward_pre_hook(self.before_forward)
        module.register_forward_hook(self.after_forward)

    def gather(self) -> None:
        """All ranks' shards into `full`, whose memory autograd's saved tensors share."""
        self.full.untyped_storage().resize_(self.full.nbytes)
        shard = self.shard.detach().to(self.full.dtype)
        all_gather_single(self.full.data, shard)  # .data: to autograd nothing changed

    def free(self) -> None:
        self.full.untyped_storage().resize_(0)
        for part, name, parameter in self.places:
            part._parameters[name] = parameter

    def show(self, full: torch.Tensor) -> None:
        """Put views of the whole weights where the module's code looks for them."""
        with torch.set_grad_enabled(full.requires_grad):  # off in backward, where layers recompute
            views = dict(zip(self.parameters, full.split(self.sizes)))
            for part, name, parameter in self.places:
                part._parameters[name] = views[parameter].view(parameter.shape)

    def before_forward(self, module, inputs) -> None:
        self.show(Gather.apply(self.shard, self))

    def after_forward(self, module, inputs, output) -> None:
        self.free()
        outputs = output.values() if isinstance(output, dict) else output
        for tensor in [output] if torch.is_tensor(output) else outputs:
            if tensor.requires_grad and not self.shard.requires_grad:
                raise ValueError("--sharding by-hand cannot freeze a unit behind a trained one")
            if tensor.requires_grad:
                tensor.register_hook(self.before_backward)

    def before_backward(self, gradient) -> None:
        if not self.full.untyped_storage().size():  # else another output came first
            self.gather()
            self.show(self.full.detach().requires_grad_())


def shard_by_hand(policy: Policy, processes: Processes) -> None:
    """Cut the policy's weights over all ranks, a unit at a time; rank 0 has them.

    Twin: `fully_shard`, whose losses, gradients, norms and steps a test on two ranks compares.
    """
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(processes.device)
    policy.units = [Unit(module, processes) for module in units_of(policy)]


def refuse_by_hand(config) -> None:
    """Errors: ValueError naming an option that sharding by hand lacks."""
    if config.offload:
        raise ValueError("--sharding by-hand has no --offload: leave one of them out")
    if config.lora:
        raise ValueError("--sharding by-hand has no --lora, as it trains or freezes all of a "
                         "layer: leave one of them out")
    if config.save_every <= config.steps:
        raise ValueError(f"--sharding by-hand saves no checkpoints, only the model at the end: "
                         f"give --save-every {config.steps + 1}, or leave --sharding out")
    if any(Path(config.out).glob("checkpoint-*")):
        raise ValueError(f"--sharding by-hand cannot resume, and {config.out} has checkpoints: "
                         "choose another --out, or leave --sharding out")


# §4 ─────────────────────────────────────── either way ───────────────────────────────────────
def trainable_parameters(policy) -> list[nn.Parameter]:
    """What the optimizer holds: this rank's part of each parameter or, by hand, of each unit."""
    by_hand = hasattr(policy, "units")
    kept = [unit.shard for unit in policy.units] if by_hand else policy.parameters()
    return [parameter for parameter in kept if parameter.requires_grad]


def clip_gradients(policy, max_norm: float) -> torch.Tensor:
    """g ← g · min(1, max_norm / ‖g‖), over all ranks' parts. Returns ‖g‖ before, fp32, [].

    Squares are summed in fp64, so ‖g‖ does not depend on how the gradient is cut. Plain twin, of
    one rank: torch.nn.utils.clip_grad_norm_.
    """
    parameters = trainable_parameters(policy)
    squares = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    for gradient in gradients:
        squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    dist.all_reduce(squares)
    norm = squares.sqrt().float()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)  # torch's clip_grad_norm_ adds 1e-6 too
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, in place: FSDP2 wraps it in a DTensor, which computes on all ranks."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' parts together; all ranks must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered_parameters(policy, *, frozen=True):
    """Yields (name, whole weight as forward passes see it); all ranks must call together.

    A unit at a time, by its own gather: cast to the dtype to compute with first, and on the device,
    also if it is kept in host memory. A tensor is good until the next one is asked for.
    frozen: also what never changes. Of adapted linears the sum with their adapters, fp32.
    Plain twin: `full_parameters`, then cast.
    """
    if hasattr(policy, "units"):
        yield from gathered_by_hand(policy, frozen)
        return
    adapted = lora.adapted_linears(policy)
    for unit, names in names_by_unit(policy):
        if not frozen and not any(policy.get_parameter(name).requires_grad for name in names):
            continue
        unit.unshard()
        for name in names:
            parameter = policy.get_parameter(name)
            if name in adapted:
                yield name, merged(adapted[name])
            elif not name.endswith(lora.NAMES) and (frozen or parameter.requires_grad):
                yield name, parameter.detach()
        unit.reshard()


def names_by_unit(policy) -> list[tuple[nn.Module, list[str]]]:
    """Each unit, and which of the policy's weights are gathered with it."""
    left = {parameter: name for name, parameter in policy.named_parameters()}
    found = []
    for unit in units_of(policy):
        own = [parameter for parameter in unit.parameters() if parameter in left]
        found.append((unit, [left.pop(parameter) for parameter in own]))
    return found


def gathered_by_hand(policy, frozen: bool):
    names = {parameter: name for name, parameter in policy.named_parameters()}
    for unit in policy.units:
        if not frozen and not unit.shard.requires_grad:
            continue
        unit.gather()
        for parameter, weight in zip(unit.parameters, unit.full.split(unit.sizes)):
            yield names[parameter], weight.view(parameter.shape)
        unit.free()


def full_parameters(policy):
    """Yields (name, whole weight as it is kept, fp32 if trained); all ranks must call together.

    Of adapted linears the sum with their adapters, fp32. By hand a unit at a time, and the tensor
    is a view that keeps the unit's memory.
    """
    if hasattr(policy, "units"):
        yield from full_parameters_by_hand(policy)
        return
    adapted = lora.adapted_linears(policy)
    for name, parameter in policy.named_parameters():
        if name in adapted:
            yield name, merged(adapted[name])
        elif not name.endswith(lora.NAMES):
            yield name, whole(parameter)


def merged(linear: nn.Linear) -> torch.Tensor:
    """The whole weight with its adapter, fp32."""
    parts = [whole(part) for part in (linear.weight, linear.lora_A, linear.lora_B)]
    return lora.merge(*parts, linear.lora_scale)


def full_parameters_by_hand(policy):
    names = {parameter: name for name, parameter in policy.named_parameters()}
    for unit in policy.units:
        shard = unit.shard.detach()
        full = shard.new_empty(sum(unit.sizes))
        all_gather_single(full, shard)
        for parameter, weight in zip(unit.parameters, full.split(unit.sizes)):
            yield names[parameter], weight.view(parameter.shape)


def full_state_dict(policy) -> dict[str, torch.Tensor]:
    """On rank 0 {name: whole weight, in host memory}, tied ones once; elsewhere {}. All call it."""
    return on_first_rank(full_parameters(policy))


def adapter_state_dict(policy) -> dict[str, torch.Tensor]:
    """As `full_state_dict`, of the adapters alone: {name: whole A or B, fp32} on rank 0."""
    adapters = [pair for pair in policy.named_parameters() if pair[0].endswith(lora.NAMES)]
    return on_first_rank((name, whole(parameter)) for name, parameter in adapters)


def on_first_rank(pairs) -> dict[str, torch.Tensor]:
    """{name: tensor in host memory} on rank 0, {} elsewhere; every rank takes every pair."""
    first, state = dist.get_rank() == 0, {}
    for name, tensor in pairs:
        if first:
            state[name] = tensor.to("cpu", copy=True)
    return state
