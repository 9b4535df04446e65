"""What is trained where a card is too small? Two thin matrices beside each linear, by hand.

[LoRA] arXiv 2106.09685 §4.1: y = W·x + α/r · B·(A·x), with A [r, in] random and B [out, r] zero, so
training begins at the base model itself. Each linear of the decoder's layers is adapted (attention
and MLP), neither lm_head nor the vision tower. The base is frozen, and kept in the dtype that is
computed with; A and B are fp32 and lie in the FSDP units of their layers.

Sampling and export take W + α/r · B·A, merged anew from the frozen W each time. In bf16 (GPUs) the
sum is rounded: what is below half a step of W's grid, 2⁻⁹ of a weight, is lost in the copy that
samples, while training sees all of it. `sampler_gap` tells how much that is, `--tis 2` corrects it.

Plain twin (tests/test_lora.py): the merged model; and PEFT reads what `save_adapter` writes.
"""
import json
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn

NAMES = ".lora_A", ".lora_B"  # ends of an adapter's names
# PEFT's regular expression for what is adapted: the tower's MLPs have a gate_proj too.
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def adapt(policy, rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Freeze the policy, and give each linear of its decoder layers an A and a B to train."""
    policy.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for linear in linears(policy.decoder.layers):
        rows, columns = linear.weight.shape
        bound = columns**-0.5  # as PEFT draws it; the paper's is Gaussian
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        linear.lora_A = nn.Parameter(a)
        linear.lora_B = nn.Parameter(torch.zeros(rows, rank))
        linear.lora_scale = (2 * rank if alpha is None else alpha) / rank
        linear.forward = MethodType(adapted_linear, linear)


def linears(layers: nn.Module) -> list[nn.Linear]:
    """Those of decoder layers, attention's and the MLPs': what is adapted."""
    return [part for part in layers.modules() if isinstance(part, nn.Linear)]


def adapted_linear(self, x: torch.Tensor) -> torch.Tensor:
    """Replaces `nn.Linear.forward`: y = W·x + b + α/r · B·(A·x)  [LoRA §4.1]. x [..., in]."""
    y = F.linear(x, self.weight, self.bias)
    if self.lora_scale == 0:
        return y
    low_rank = F.linear(x, self.lora_A)
    return y + self.lora_scale * F.linear(low_rank, self.lora_B)


def adapted_linears(policy) -> dict[str, nn.Linear]:
    """{name of its weight: linear} of those that have an A and a B."""
    return {f"{name}.weight": part for name, part in policy.named_modules()
            if hasattr(part, "lora_A")}


def run_base(policy, *inputs, **options):
    """policy(*inputs, **options) without its adapters: the reference model, of which there is no
    copy."""
    linears = adapted_linears(policy).values()
    scales = [linear.lora_scale for linear in linears]
    for linear in linears:
        linear.lora_scale = 0.0
    try:
        return policy(*inputs, **options)
    finally:
        for linear, scale in zip(linears, scales):
            linear.lora_scale = scale


def merge(weight, a, b, scale: float) -> torch.Tensor:
    """W + α/r · B·A in fp32; all three whole, on one device."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def save_adapter(folder: Path, policy, tensors: dict[str, torch.Tensor], base: str) -> None:
    """Write A and B as PEFT does: `PeftModel.from_pretrained(base model, folder)` loads them.

    tensors: {name in the policy: whole A or B}; base: hub id or directory of the frozen model.
    """
    from safetensors.torch import save_file

    state = {}
    for name, tensor in tensors.items():  # the policy's "model." is PEFT's "base_model.model."
        state[f"base_model.{name}.weight"] = tensor.contiguous()
    linear = next(iter(adapted_linears(policy).values()))
    rank = len(linear.lora_A)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": rank * linear.lora_scale, "lora_dropout": 0.0, "bias": "none",
        "target_modules": TARGETS, "inference_mode": True}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
