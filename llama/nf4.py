"""Weights in 4 bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), and a frozen linear.

A weight is cut, row after row, into blocks of 64 numbers. Each block is divided by its largest magnitude, its scale,
and every quotient becomes the nearest of 16 levels, which hold equal shares of a normal distribution. Two numbers share
a byte, the first in the high half (the layout of bitsandbytes). Double quantisation: the scales less their mean become
int8 in blocks of 256, each with an fp32 step. Bytes a number: 1/2 + 1/64 + 1/4096, or 1/2 + 1/16 with plain scales.

train.py calls replace(), and assigner() while the weights are read; lora.py adapts what replace() made. Knows torch.nn,
not Llama. The packed weight does not train, and is not sharded: every rank holds all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # numbers that share a scale
SCALES = 256  # scales that share a step
CHUNK = 1 << 22  # numbers packed or unpacked at a time: 16 MiB of fp32; a multiple of BLOCK * SCALES

# The paper's levels (its appendix E), as bitsandbytes has them.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """(256, 2) fp32: what each byte stands for. Kept, as a copy to a GPU waits for all that it still has to do."""
    with torch.inference_mode(False):
        levels = torch.tensor(LEVELS, device=device)
        return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)


class Packed(NamedTuple):
    """A weight of n numbers: codes uint8 (n / 2,), scales int8 (n / 64,) with steps fp32 (one per 256) and mean fp32
    (1,); or scales fp32, with steps and mean empty."""

    codes: Tensor
    scales: Tensor
    steps: Tensor
    mean: Tensor


def packed_shapes(n: int, double: bool = True) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and number type of each part of a packed weight of n numbers. ValueError if blocks do not fill it."""
    if n % BLOCK:
        raise ValueError(f"NF4: {n:,} numbers are no whole blocks of {BLOCK}; leave this model at --base_bits 16")
    scales = n // BLOCK
    return {
        "codes": ((n // 2,), torch.uint8),
        "scales": ((scales,), torch.int8 if double else torch.float32),
        "steps": ((-(-scales // SCALES) if double else 0,), torch.float32),
        "mean": ((1 if double else 0,), torch.float32),
    }


@torch.no_grad()
def quantise(weight: Tensor, double: bool = True) -> Packed:
    """A weight packed, on its own device, CHUNK numbers at a time. ValueError for NaN or infinity."""
    flat, n = weight.detach().reshape(-1), weight.numel()
    packed_shapes(n)
    levels = torch.tensor(LEVELS, device=flat.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(n // 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(n // BLOCK, device=flat.device)
    for at in range(0, n, CHUNK):
        blocks = flat[at : at + CHUNK].float().view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        # A block of zeros has scale 0: divided by 1 instead, its numbers stay 0, which is a level.
        quotients = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
        index = torch.bucketize(quotients, middles, out_int32=True).view(-1, 2)
        codes[at // 2 : (at + CHUNK) // 2] = (index[:, 0] << 4 | index[:, 1]).to(torch.uint8)
        scales[at // BLOCK : (at + CHUNK) // BLOCK] = largest
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("NaN or infinite values cannot be quantised")
    nothing = scales.new_empty(0)
    if not double:
        return Packed(codes, scales, nothing, nothing)
    mean = scales.mean().view(1)
    rest = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)
    steps = rest.abs().amax(dim=1) / 127
    whole = (rest / torch.where(steps > 0, steps, 1.0)[:, None]).round_().view(-1)[: len(scales)]
    return Packed(codes, whole.to(torch.int8), steps, mean)


@torch.no_grad()
def dequantise(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers (n,), computed in fp32 and rounded once to dtype, CHUNK at a time."""
    codes, scales, steps, mean = packed
    pairs = _pairs(codes.device)
    out = torch.empty(2 * len(codes), dtype=dtype, device=codes.device)
    for at in range(0, len(out), CHUNK):
        part = scales[at // BLOCK : (at + CHUNK) // BLOCK].float()
        if len(steps):
            first = at // (BLOCK * SCALES)
            wide = steps[first : first + CHUNK // (BLOCK * SCALES)].repeat_interleave(SCALES)[: len(part)]
            part = part * wide + mean
        numbers = pairs.index_select(0, codes[at // 2 : (at + CHUNK) // 2].int())
        out[at : at + CHUNK] = (numbers.view(-1, BLOCK) * part[:, None]).view(-1)
    return out


# --- the product ----------------------------------------------------------------------------------


# Opaque to torch.compile, forward and backward apart: seen through, the two unpackings would be one common
# subexpression, and the whole model in bf16 would be kept from forward to backward.
@torch.library.custom_op("chatdoctor::nf4_product", mutates_args=())
def _product(x: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, out_features: int) -> Tensor:
    weight = dequantise(Packed(codes, scales, steps, mean), x.dtype)
    return F.linear(x, weight.view(out_features, -1))


@_product.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("chatdoctor::nf4_product_backward", mutates_args=())
def _product_backward(dy: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
    weight = dequantise(Packed(codes, scales, steps, mean), dy.dtype)
    return torch.matmul(dy, weight.view(dy.shape[-1], -1))


@_product_backward.register_fake
def _(dy: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], 2 * codes.shape[0] // dy.shape[-1])


class _Product(torch.autograd.Function):
    """x times the weight, transposed. Keeps the packed weight alone, unpacked again in backward, and no x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, out_features: int
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, steps, mean)
        return _product(x, codes, scales, steps, mean, out_features)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _product_backward(dy, *ctx.saved_tensors), None, None, None, None, None


class NF4Linear(nn.Module):
    """A frozen linear without bias whose weight is packed, in flat `weight`; dtype: what it stands for when merged."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        parts = {
            name: torch.empty(shape, dtype=kind, device=device)
            for name, (shape, kind) in packed_shapes(in_features * out_features).items()
        }
        self.weight = nn.Parameter(parts.pop("codes"), requires_grad=False)
        for name, part in parts.items():
            self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.scales, self.steps, self.mean, self.out_features)

    def packed(self) -> Packed:
        """The parts of the weight; they share its memory."""
        return Packed(self.weight.detach(), self.scales, self.steps, self.mean)

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        """Pack these values (out, in), wherever they lie, on this module's device."""
        for mine, new in zip(self.packed(), quantise(values.to(self.weight.device)), strict=True):
            mine.copy_(new)

    def dense(self) -> Tensor:
        """The weight (out, in) that this computes with, in fp32."""
        return dequantise(self.packed()).view(self.out_features, self.in_features)


def replace(module: nn.Module) -> None:
    """Put an NF4Linear, packed from its weight, in the place of every nn.Linear; on meta, one without values."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            assert child.bias is None, f"{name} has a bias"
            weight = child.weight
            packed = NF4Linear(child.in_features, child.out_features, weight.dtype, weight.device)
            if not weight.is_meta:
                packed.fill(weight)
            setattr(parent, name, packed)


def assigner(
    model: nn.Module, otherwise: Callable[[nn.Parameter, Tensor], object]
) -> Callable[[nn.Parameter, Tensor], object]:
    """assign(parameter, values) for checkpoint.load_weights: packs what is packed, and leaves the rest to otherwise.

    One tensor is held at a time. Made after the model has memory.
    """
    owners = {m.weight: (name, m) for name, m in model.named_modules() if isinstance(m, NF4Linear)}

    def assign(p: nn.Parameter, values: Tensor) -> None:
        if p not in owners:
            otherwise(p, values)
            return
        name, owner = owners[p]
        try:
            owner.fill(values)
        except ValueError as e:
            raise ValueError(f"{name}.weight: {e}") from None

    return assign
