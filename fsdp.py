"""Who is where? Ranks; sharding by FSDP2's `fully_shard`; what a rank holds (--plan)."""
import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dist_state
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import qwen_vl
from policy import Policy
from qwen_vl import SpecialIds


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


def shard(policy: Policy, processes: Processes, *, offload: bool = False) -> Policy:
    """fully_shard by hand: vision tower, each decoder layer, and a root with all the rest.

    fp32 master weights are cut over all ranks; a unit gathers a bf16 copy (fp32 on CPU) to compute
    with; gradients are reduced in fp32. lm_head stays in the root: ranks run it unequally often.
    """
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    how = {"mesh": mesh} | ({"offload_policy": CPUOffloadPolicy()} if offload else {})
    if processes.device.type == "cuda":
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for unit in [policy.vision, *policy.decoder.layers, policy]:
        fully_shard(unit, **how)
    return policy


def load_policy(source: str, processes: Processes, config, *, freeze_vision=False, dtype=None):
    """(sharded policy, tokenizer, special ids). Rank 0 reads the weights and broadcasts them."""
    model, tokenizer = qwen_vl.load(source, weights=processes.rank == 0, seed=config.seed)
    special = SpecialIds.read(tokenizer, model.config)
    policy = Policy(model, special.banned_V, checkpointing=config.checkpointing)
    policy.vision.requires_grad_(not freeze_vision)
    for parameter in policy.parameters():  # fp32 if trained: bf16 loses most updates of lr 1e-6
        parameter.data = parameter.data.to(dtype or torch.float32)
    full = policy.state_dict() if processes.rank == 0 else {}
    shard(policy, processes, offload=config.offload)  # moves weights and buffers to the device
    how = dist_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dist_state.set_model_state_dict(policy, full, options=how)
    return policy, tokenizer, special


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
