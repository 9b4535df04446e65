"""Who is where? Ranks; a policy cut over them by PyTorch or by hand; what a rank holds (--plan).

§1 ranks · §2 sharding by PyTorch's FSDP2 · §3 the same by hand · §4 either way: what the others
need of a sharded policy · §5 what a rank holds
"""
import math
import os
import sys
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

import qwen_vl
from policy import Policy
from qwen_vl import SpecialIds


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


def start_processes(timeout: int) -> Processes:
    """torchrun's ranks; without torchrun a world of one, which takes the same path."""
    rank, world, local = (int(os.environ.get(n, 0)) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    how = {} if world else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **how)
    return Processes(rank, max(world, 1), torch.device(f"cuda:{local}" if cuda else "cpu"))


def leave() -> None:
    """The end of a script: of several ranks, none runs its destructors.

    There gloo's threads abort now and then, and torchrun takes the run for failed.
    """
    if dist.get_world_size() == 1:
        return dist.destroy_process_group()
    dist.barrier()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


# §2 ──────────────────────────────── sharding by PyTorch's FSDP2 ─────────────────────────────
def shard(policy: Policy, processes: Processes, *, offload: bool = False) -> None:
    """`fully_shard` on each unit: vision tower, each decoder layer, a root with all the rest.

    fp32 master weights are cut over all ranks; a unit gathers a bf16 copy (fp32 on CPU) to compute
    with; gradients are reduced in fp32. lm_head stays in the root: ranks run it unequally often.
    """
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    options = {"mesh": mesh}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    if processes.device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for module in units_of(policy):
        fully_shard(module, **options)


def units_of(policy: Policy) -> list[nn.Module]:
    """What is gathered and freed as one; the root comes last and takes what the others left."""
    return [policy.vision, *policy.decoder.layers, policy]


def load_policy(source: str, processes: Processes, config, *, freeze_vision=False, dtype=None,
                sharding="fsdp2"):
    """(sharded policy, tokenizer, special ids). Rank 0 reads the weights and deals them out.

    sharding: "fsdp2" or "by-hand". dtype: of the kept weights, fp32 unless given: what is trained
    needs that, as bf16 loses most updates of lr 1e-6.
    """
    model, tokenizer = qwen_vl.load(source, weights=processes.rank == 0, seed=config.seed)
    special = SpecialIds.read(tokenizer, model.config)
    policy = Policy(model, special.banned_V, checkpointing=config.checkpointing)
    policy.vision.requires_grad_(not freeze_vision)
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype or torch.float32)
    if sharding == "by-hand":
        shard_by_hand(policy, processes)
        return policy, tokenizer, special
    full = policy.state_dict() if processes.rank == 0 else {}
    shard(policy, processes, offload=config.offload)  # moves weights and buffers to the device
    options = dist_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dist_state.set_model_state_dict(policy, full, options=options)
    return policy, tokenizer, special


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
        dist.reduce_scatter_tensor(part, gradient.to(part.dtype))
        return part / dist.get_world_size(), None


class Unit:
    """A module, less the units inside it, of whose weights this rank keeps 1/N.

    shard: that 1/N, flat, the optimizer's parameter. full: all weights, flat, in the dtype to
    compute with, without memory unless gathered. parameters: one a weight, names and shapes without
    memory. places: (part of the module, attribute, parameter); a tied weight has two.
    """

    def __init__(self, module: nn.Module, processes: Processes):
        self.places, stand_ins = [], {}
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                if not weight.is_meta:  # else it is in a unit inside this one
                    stand_ins.setdefault(weight, nn.Parameter(weight.detach().to("meta")))
                    self.places.append((part, name, stand_ins[weight]))
        weights, self.parameters = list(stand_ins), list(stand_ins.values())
        trained = {weight.requires_grad for weight in weights}
        if len(trained) > 1:
            raise ValueError(f"--sharding by-hand trains or freezes all of {type(module).__name__}")
        self.sizes = [weight.numel() for weight in weights]
        count, world = sum(self.sizes), processes.world
        self.sizes.append(-count % world)  # zeros, so that N parts are equally long
        part, parts = weights[0].new_empty(sum(self.sizes) // world, device=processes.device), None
        if processes.rank == 0:
            flat = torch.cat([weight.detach().flatten() for weight in weights])
            flat = F.pad(flat, (0, self.sizes[-1])).to(processes.device)
            parts = list(flat.chunk(world))
        dist.scatter(part, parts)
        self.shard = nn.Parameter(part, requires_grad=trained.pop())
        cuda = processes.device.type == "cuda"
        dtype = torch.bfloat16 if cuda else part.dtype
        self.full = torch.empty(sum(self.sizes), dtype=dtype, device=processes.device)
        self.free()
        module.register_forward_pre_hook(self.before_forward)
        module.register_forward_hook(self.after_forward)

    def gather(self) -> None:
        """All ranks' shards into `full`, whose memory autograd's saved tensors share."""
        self.full.untyped_storage().resize_(self.full.nbytes)
        shard = self.shard.detach().to(self.full.dtype)
        dist.all_gather_into_tensor(self.full.data, shard)  # .data: to autograd nothing changed

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
            if tensor.requires_grad:
                tensor.register_hook(self.before_backward)

    def before_backward(self, gradient) -> None:
        if not self.full.untyped_storage().size():  # else another output came first
            self.gather()
            self.show(self.full.detach().requires_grad_())


def shard_by_hand(policy: Policy, processes: Processes) -> None:
    """Cut the policy's weights over all ranks, a unit at a time; rank 0 has them."""
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(processes.device)
    policy.units = [Unit(module, processes) for module in units_of(policy)]


def refuse_by_hand(config) -> None:
    """Errors: ValueError naming an option that sharding by hand lacks."""
    if config.offload:
        raise ValueError("--sharding by-hand has no --offload: leave one of them out")
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

    Squares are summed in fp64, so ‖g‖ does not depend on how the gradient is cut.
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


def full_parameters(policy):
    """Yields (name, whole weight as it is kept, fp32 if trained); all ranks must call together.

    By hand a unit at a time, and the tensor is a view that keeps the unit's memory.
    """
    if not hasattr(policy, "units"):
        for name, parameter in policy.named_parameters():
            parameter = parameter.detach()
            yield name, parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return
    names = {parameter: name for name, parameter in policy.named_parameters()}
    for unit in policy.units:
        shard = unit.shard.detach()
        full = shard.new_empty(sum(unit.sizes))
        dist.all_gather_into_tensor(full, shard)
        for parameter, weight in zip(unit.parameters, full.split(unit.sizes)):
            yield names[parameter], weight.view(parameter.shape)


def full_state_dict(policy) -> dict[str, torch.Tensor]:
    """On rank 0 {name: whole weight, in host memory}, tied ones once; elsewhere {}. All call it."""
    first, state = dist.get_rank() == 0, {}
    for name, weight in full_parameters(policy):
        if first:
            state[name] = weight.to("cpu", copy=True)
    return state


# §5 ──────────────────────────────────── what a rank holds ───────────────────────────────────
def plan(config, max_tokens: int) -> None:
    """What each GPU of `grpo_vl.py --plan 8x80` would hold, an estimate."""
    model, _ = qwen_vl.load(config.model, weights=False)
    gpus, gib = (int(part) for part in config.plan.split("x"))
    text, decoder = model.config.text_config, model.model.language_model
    weights, layer, vision = (sum(p.numel() for p in part.parameters())
                              for part in (model, decoder.layers[0], model.model.visual))
    trained, layers = weights - vision * config.freeze_vision, text.num_hidden_layers
    shards = math.inf if config.offload else gpus  # offloaded: in host memory
    token = 4 * layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    row = config.max_prompt + config.group * max_tokens
    wide = 2 * config.micro_tokens * (8 * text.hidden_size + 4 * text.intermediate_size)
    inputs = 2 * config.micro_tokens * text.hidden_size * layers
    held = {
        "weights, fp32, sharded": 4 * weights / shards,
        "gradients, fp32, sharded": 4 * trained / shards,
        "AdamW, fp32, sharded": 8 * trained / shards,
        "reference, bf16, sharded": 2 * weights / shards if config.beta else 0,
        "gathered units, bf16": 2 * (weights - (layers - 2) * layer),
        "sampling copy, bf16": 2 * weights,
        "keys and values": min(-(-config.prompts // gpus) * row * token, config.kv_gb * 2**30),
        "activations": inputs + wide * (1 if config.checkpointing else layers),
        "logits of a chunk": 3 * 1024 * 4 * text.vocab_size}
    held[f"peak, of {gib} GiB"] = peak = sum(held.values())
    print(f"{weights:,} parameters on {gpus} GPUs")
    print(*(f"{name:26}{count / 2**30:8.2f} GiB" for name, count in held.items()), sep="\n")
    print("fits" if peak < 0.9 * gib * 2**30 else "does not fit: lower --micro-tokens, --kv-gb or "
          "--max-pixels, add --offload or GPUs")
