"""Weights in whole numbers of 8 or 4 bits with a scale per group, for models that only answer.

A weight (out, in) becomes q * scale: q whole, from -2^(bits - 1) to 2^(bits - 1) - 1, and one scale for each group of
neighbours in a row, a whole row at 8 bits. Scales may be negative: then the group's largest number, whatever its sign,
is met by the one more step that the negative side has. How a q is chosen: nearest() by itself, or compensated(), which
moves what rounding one column loses into the columns still to come, by what calibration texts say of the inputs
(GPTQ, Frantar et al. 2022, arXiv:2210.17323).

convert_weights.py makes such models, checkpoint.py stores and loads them (in compressed-tensors' "pack-quantized"
format, which transformers and vLLM read), few_rows.py lays them out for a CPU, the kernels seam multiplies elsewhere.
Acts on a finished module; knows torch.nn, not Llama. Nothing here trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import kernels

GROUPS = (32, 64, 128)  # that 4 bits may have
# Steps tried for a scale, of the largest number's: a little clipping costs less than a coarse grid.
SHRINK = tuple(1 - i / 40 for i in range(-2, 15))
CHUNK = 1 << 22  # numbers of a weight whose scales are searched at a time
DAMP = 0.01  # of the mean of the Hessian's diagonal, added to it (GPTQ's)
COLUMNS = 128  # that are rounded before the columns behind them learn of it


@dataclass(frozen=True)
class Scheme:
    """bits 8 or 4; group: how many neighbours in a row share a scale, 0 for all of them."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if not (self.bits == 8 and self.group == 0) and not (self.bits == 4 and self.group in GROUPS):
            raise ValueError(
                f"{self.bits} bits in groups of {self.group or 'a row'} are not to be had: 8 bits in whole rows, "
                f"or 4 bits in groups of {', '.join(map(str, GROUPS))}"
            )

    def check(self, name: str, width: int) -> None:
        """ValueError unless rows of this width can be cut into groups and packed into words of 32 bits."""
        if width % (self.group or 32 // self.bits):
            smaller = [g for g in GROUPS if self.group and width % g == 0]
            remedy = f"--group_size {smaller[-1]}" if smaller else "--dtype int8" if width % 4 == 0 else "bfloat16"
            raise ValueError(f"{name}: rows of {width} are no whole groups of {self.group or 4}; use {remedy}")

    def groups(self, width: int) -> int:
        """Scales in a row of this width."""
        return width // (self.group or width)


def to_json(scheme: Scheme) -> dict[str, Any]:
    """config.json's `quantization_config`, in compressed-tensors' words."""
    strategy = {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def from_json(d: Any) -> Scheme:
    """The scheme in a config.json's `quantization_config`. ValueError for any other kind of quantisation."""
    wanted = "only compressed-tensors' symmetric pack-quantized weights in 8 bits by row or 4 bits by group open here"
    if not isinstance(d, dict) or d.get("quant_method") != "compressed-tensors" or d.get("format") != "pack-quantized":
        kind = d.get("quant_method", d) if isinstance(d, dict) else d
        raise ValueError(f"quantization_config: {kind!r}; {wanted}")
    groups = d.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("targets") != ["Linear"] or d.get("ignore") != ["lm_head"]:
        raise ValueError(f"quantization_config: every linear but lm_head in one way is needed; {wanted}")
    said = {k: weights.get(k) for k in ("type", "symmetric")} | {k: group.get(k) for k in ("input_activations",)}
    if said != {"type": "int", "symmetric": True, "input_activations": None} or weights.get("actorder") == "group":
        raise ValueError(f"quantization_config: {weights}; {wanted}")
    bits, by_row = weights.get("num_bits"), weights.get("strategy") == "channel"
    size = 0 if by_row else weights.get("group_size")
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (bits, size)):
        raise ValueError(f"quantization_config: num_bits {bits!r}, group_size {size!r}; {wanted}")
    try:
        return Scheme(bits, size)
    except ValueError as e:
        raise ValueError(f"quantization_config: {e}") from None


class Packed(NamedTuple):
    """codes uint8 (out, in * bits / 8), q + 2^(bits - 1) each, the first of two in the low half of a byte; scales
    (out, in / group)."""

    codes: Tensor
    scales: Tensor


class QuantisedLinear(nn.Module):
    """nn.Linear without bias whose weight is packed; its buffers are `codes` and `scales` of Packed."""

    codes: Tensor
    scales: Tensor

    def __init__(self, packed: Packed, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    def forward(self, x: Tensor) -> Tensor:
        return kernels.quantised_linear(x, self.codes, self.scales, self.bits)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={len(self.codes)}, bits={self.bits}, groups={self.scales.shape[1]}"


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that are quantised, by name: all of `module`."""
    for name, child in module.named_modules():
        if type(child) is nn.Linear:
            yield name, child


def replace(module: nn.Module, make: Callable[[str, nn.Linear], Packed], bits: int) -> None:
    """Put a QuantisedLinear in the place of every linear of `module`; make(name, linear) gives its weight."""
    for name, linear in list(linears(module)):
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, QuantisedLinear(make(name, linear), bits))


def empty(linear: nn.Linear, scheme: Scheme, device: torch.device | str, dtype: torch.dtype) -> Packed:
    """Place for a weight, to be read into."""
    out, width = linear.weight.shape
    scheme.check("config.json", width)
    codes = torch.empty(out, width * scheme.bits // 8, dtype=torch.uint8, device=device)
    return Packed(codes, torch.empty(out, scheme.groups(width), dtype=dtype, device=device))


# --- rounding one weight --------------------------------------------------------------------------


@torch.no_grad()
def nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """A weight (out, in), each number rounded to the nearest by scales that lose least; scales in dtype."""
    scales = search_scales(weight, scheme, None, dtype)
    rows = max(1, CHUNK // weight.shape[1])
    codes = [
        pack(_whole(w.float(), _wide(s, w.shape[1]), scheme.bits), scheme.bits)
        for w, s in zip(weight.split(rows), scales.split(rows), strict=True)
    ]
    return Packed(torch.cat(codes), scales)


@torch.no_grad()
def search_scales(weight: Tensor, scheme: Scheme, importance: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of the scales tried for each group, the one with the least squared error, weighed by importance (in,)."""
    width = weight.shape[1]
    G = scheme.groups(width)
    top = 2 ** (scheme.bits - 1)
    weigh = 1.0 if importance is None else importance.float().view(1, G, -1)
    parts = []
    for part in weight.split(max(1, CHUNK // width)):
        w = part.float().view(len(part), G, -1)
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
        best = torch.full_like(largest, torch.inf)
        scales = torch.ones_like(largest)
        for shrink in SHRINK:
            for sign in (-1, 1):
                scale = (largest * (sign * shrink / (top if sign < 0 else top - 1))).to(dtype).float()
                scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros
                rest = (w / scale).round_().clamp_(-top, top - 1).mul_(scale).sub_(w)
                error = rest.square_().mul_(weigh).sum(-1, keepdim=True)
                scales = torch.where(error < best, scale, scales)
                best = torch.minimum(error, best)
        parts.append(scales.squeeze(-1).to(dtype))
    return torch.cat(parts)


@torch.no_grad()
def compensated(weight: Tensor, hessian: Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """A weight (out, in) rounded column by column, each column's loss moved into those that are still to be rounded.

    hessian (in, in): the sum of x x' over the inputs x. Columns go by falling weight in it; scales are searched
    before, so groups stay where they are. fp32 throughout.
    """
    w, H = weight.float().clone(), hessian.float().clone()
    width = w.shape[1]
    diagonal = H.diagonal()
    w[:, diagonal == 0] = 0  # inputs that never came: nothing is known of them, and nothing lost
    diagonal[diagonal == 0] = 1
    scales = search_scales(w, scheme, diagonal, dtype)
    order = diagonal.argsort(descending=True)
    w, wide = w[:, order], _wide(scales, width)[:, order]
    upper = _inverse_root(H[order][:, order])
    top = 2 ** (scheme.bits - 1)
    q = torch.empty_like(w)
    for first in range(0, width, COLUMNS):
        last = min(first + COLUMNS, width)
        errors = torch.empty_like(w[:, first:last])
        for i in range(first, last):
            q[:, i] = (w[:, i] / wide[:, i]).round_().clamp_(-top, top - 1)
            error = (w[:, i] - q[:, i] * wide[:, i]) / upper[i, i]
            w[:, i:last].addr_(error, upper[i, i:last], alpha=-1)
            errors[:, i - first] = error
        w[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    whole = torch.empty_like(q)
    whole[:, order] = q
    return Packed(pack(whole.to(torch.int8), scheme.bits), scales)


def _inverse_root(H: Tensor) -> Tensor:
    """Upper triangular U with U'U the inverse of H, damped as much as it needs."""
    if not torch.isfinite(H).all():
        raise ValueError("calibration: the model's activations are not finite; the weights are damaged")
    damp = DAMP * H.diagonal().mean()
    while True:
        H.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damp *= 10


def _wide(scales: Tensor, width: int) -> Tensor:
    """fp32 scales (out, in / group) for every number (out, in)."""
    return scales.float().repeat_interleave(width // scales.shape[1], dim=1)


def _whole(w: Tensor, scales: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1)
    return (w / scales).round_().clamp_(-top, top - 1).to(torch.int8)


def pack(q: Tensor, bits: int) -> Tensor:
    """Whole numbers int8 (out, in) as Packed's codes."""
    codes = (q + 2 ** (bits - 1)).view(torch.uint8) if bits == 4 else (q.view(torch.uint8) ^ 0x80)
    return codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4


# --- rounding a model by what its inputs are ------------------------------------------------------


class _Seen(Exception):
    """Ends a forward pass once the first block's inputs are known."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Iterable[Tensor],
    scheme: Scheme,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Replace the linears of the blocks, which `model(batch)` runs one after the other, by compensated() ones.

    Every linear is rounded for the inputs that the already rounded ones before it make. Holds the inputs of one block
    for all batches, and the Hessian (in, in) of the linears that share an input. done() is called after each.
    """
    inputs = _first_inputs(model, blocks[0], batches)
    if not inputs:
        raise ValueError("there are no calibration texts")
    for block in blocks:
        for names in _sharing_inputs(block, *inputs[0]):
            first = block.get_submodule(names[0])
            hessian = torch.zeros(first.in_features, first.in_features, device=first.weight.device)
            hook = first.register_forward_pre_hook(_adder(hessian))
            for args, kwargs in inputs:
                block(*args, **kwargs)
            hook.remove()
            for name in names:
                linear = block.get_submodule(name)
                parent, _, last = name.rpartition(".")
                packed = compensated(linear.weight, hessian, scheme, torch.bfloat16)
                setattr(block.get_submodule(parent), last, QuantisedLinear(packed, scheme.bits))
                done()
        inputs = [((block(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in inputs]


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _first_inputs(model: nn.Module, block: nn.Module, batches: Iterable[Tensor]) -> list[Inputs]:
    inputs: list[Inputs] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        raise _Seen

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        try:
            model(batch)
        except _Seen:
            continue
    hook.remove()
    return inputs


def _sharing_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[str]]:
    """Names of the block's linears in the order in which they run, those together that multiply the same tensor."""
    runs: list[tuple[str, Tensor]] = []  # the tensors are held, or another could come to lie where one was
    hooks = [
        linear.register_forward_pre_hook(lambda _, x, name=name: runs.append((name, x[0])))
        for name, linear in linears(block)
    ]
    block(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in runs:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


def _adder(hessian: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, hessian.shape[0]).float()
        hessian.addmm_(x.t(), x)

    return add
