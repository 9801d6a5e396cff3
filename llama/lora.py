"""LoRA over a finished module: adapters beside its linears, trained while the rest stands still, and folded in again.

train.py calls apply() and init_weights(), then trains; lora_files.py stores and opens adapters. A linear that is
adapted keeps its name, its weight and its place: apply() gives it a subclass of its own class, as fully_shard does with
what it shards, so that checkpoints of the base load as before. Knows torch.nn and nf4.py's linear, not Llama.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from llama import parallel
from llama.lora_config import LoRAConfig
from llama.nf4 import NF4Linear


class Adapted(nn.Module):
    """What apply() adds to a linear's class: lora_A (R, in), lora_B (out, R), and their product in forward."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora: LoRAConfig

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # type: ignore[misc]
        if self.lora.dropout and self.training:
            x = F.dropout(x, self.lora.dropout)
        # Scaled while it is narrow: R numbers a row, not out.
        inner = F.linear(x, self.lora_A.to(x.dtype)) * self.lora.scale
        return y + F.linear(inner, self.lora_B.to(x.dtype))


@functools.cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def apply(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze a module and put adapters beside its target linears, in place, before it is sharded.

    Adapters are fp32 on the device of their linear (meta too) and have no values yet: init_weights() or a file gives
    them. Only they ask for gradients. ValueError if a target is nowhere in the module.
    """
    model.requires_grad_(False)
    found = set()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last not in config.targets or not isinstance(module, nn.Linear | NF4Linear):
            continue
        assert not isinstance(module, Adapted), f"{name} has adapters already"
        assert isinstance(module, NF4Linear) or module.bias is None, f"{name} has a bias"
        found.add(last)
        options = {"dtype": torch.float32, "device": module.weight.device}
        module.lora_A = nn.Parameter(torch.empty(config.r, module.in_features, **options))
        module.lora_B = nn.Parameter(torch.empty(module.out_features, config.r, **options))
        module.lora = config  # type: ignore[assignment]
        module.__class__ = _adapted(type(module))
    if missing := [t for t in config.targets if t not in found]:
        raise ValueError(f"LoRA: the model has no linear named {missing[0]}")


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of all adapters, in the module's order."""
    return ((name, p) for name, p in model.named_parameters() if name.endswith((".lora_A", ".lora_B")))


@torch.no_grad()
def init_weights(
    model: nn.Module, seed: int, assign: Callable[[nn.Parameter, Tensor], object] = torch.Tensor.copy_
) -> None:
    """B is 0, so that training starts at the base; A as in PEFT, kaiming_uniform(a=sqrt(5)): within 1 / sqrt(in).

    From name and seed, so that values do not depend on how it is sharded. assign(parameter, full fp32 tensor) stores.
    """
    for name, p in adapters(model):
        value = torch.zeros(p.shape)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(p.shape[1])
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            value.uniform_(-bound, bound, generator=generator)
        assign(p, value)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the dropout of a step, on every device, a function of these three: a resumed run needs no generator state.

    Each rank has its own, for it has its own records.
    """
    torch.manual_seed(zlib.crc32(f"dropout {seed} {step} {rank}".encode()))


# --- folding in -----------------------------------------------------------------------------------


@torch.no_grad()
def folded(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale B A in fp32, whatever the flags allow other products (--tf32); rounding it is the caller's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return weight.float() + scale * (b.float() @ a.float())
    finally:
        torch.set_float32_matmul_precision(before)


def merge(model: nn.Module) -> None:
    """Fold all adapters into their weights, in place, each rounded once to the type of its base: plain linears again.

    NF4 bases, adapted or not, become linears in the number type that they computed in. Not for sharded modules: there
    merged_tensors() gathers.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Adapted | NF4Linear):
            continue
        whole = dict(module.named_parameters(recurse=False))
        assert not any(isinstance(p, parallel.DTensor) for p in whole.values()), "a sharded module is not merged"
        dtype = module.dtype if isinstance(module, NF4Linear) else whole["weight"].dtype
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")  # type: ignore[arg-type]
        plain.weight = nn.Parameter(_whole_weight(module, whole).detach().to(dtype))
        plain.train(module.training)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    model.requires_grad_(True)


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the base whole, adapters folded in (those in fp32), in order, one linear at a time.

    Called by all ranks together, like parallel.full_tensors.
    """
    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if not own:
            continue
        assert next(module.children(), None) is None, f"{name} holds parameters and modules"
        whole = dict(parallel.full_tensors(module))
        if isinstance(module, Adapted | NF4Linear):
            yield f"{name}.weight", _whole_weight(module, whole)
        else:
            yield from ((f"{name}.{n}", whole[n]) for n in own)


def _whole_weight(module: nn.Module, whole: dict[str, Tensor]) -> Tensor:
    """The weight that a linear with these whole parameters stands for; fp32 where it was computed."""
    base = module.dense() if isinstance(module, NF4Linear) else whole["weight"]
    if not isinstance(module, Adapted):
        return base
    return folded(base, whole["lora_A"], whole["lora_B"], module.lora.scale)
