"""Products of a few rows with large weights on the CPU, at the speed of memory.

Decoding multiplies one row per sequence with every weight; the time is that of reading the weights, and F.linear reads
them at a third of the memory's speed. lay_out() acts on a finished module that only decodes from then on;
generation.py calls it. Knows torch.nn, not LLaMA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 8  # from 16 rows on F.linear is as fast
SMALLEST = 65_536  # elements; below, the extra call costs what it wins


class SplitLinear(nn.Module):
    """nn.Linear without bias for fp32, its weight (out, in) stored transposed and read by all threads at once.

    The sum over `in` is cut into one part per thread, the parts are a batched product and are added up. F.linear
    against this, us per row, 2 threads of an AMD EPYC (Zen 4), torch 2.13, MKL: (288, 288) 44 / 30, (768, 768)
    194 / 111, (768, 2048) 429 / 331, (2048, 768) 509 / 253, (32000, 288) 4434 / 1155, (32000, 768) 9375 / 2701.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().t().contiguous().t(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out, width = self.weight.shape
        rows = x.numel() // width
        if rows > MOST_ROWS:
            return F.linear(x, self.weight)
        parts = torch.get_num_threads()
        while width % parts:
            parts -= 1
        x_parts = x.reshape(rows, parts, width // parts).transpose(0, 1)
        sums = torch.bmm(x_parts, self.weight.t().view(parts, width // parts, out))
        return sums.sum(0).view(*x.shape[:-1], out)


class PackedLinear(nn.Module):
    """nn.Linear without bias for bf16, its weight in oneDNN's own order and nowhere else.

    F.linear against this, us per row, as above: (768, 768) 221 / 138, (768, 2048) 358 / 263, (4096, 768) 709 / 357,
    (32000, 288) 3012 / 939, (32000, 768) 5559 / 2705. The operators are torch.compile's and not documented:
    has_packed() says whether this torch has them.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def has_packed() -> bool:
    """Whether this machine and this torch can run PackedLinear."""
    ops = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ops)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def faster_linear(weight: Tensor) -> nn.Module | None:
    """The module that multiplies a few rows by this weight faster than nn.Linear does; None if there is none."""
    if weight.device.type != "cpu" or weight.numel() < SMALLEST:
        return None
    if weight.dtype == torch.float32:
        return SplitLinear(weight)
    return PackedLinear(weight) if weight.dtype == torch.bfloat16 and has_packed() else None


def join(parent: nn.Module, names: Sequence[str]) -> None:
    """Make one product of the linears with these names, which all take the same rows, and let parent.project be it.

    Reading one large weight is faster than several small ones. The linears are removed; nothing happens where
    faster_linear has nothing for their weights joined, or one of them is more than an nn.Linear (adapters, 4 bits).
    """
    if any(type(getattr(parent, name)) is not nn.Linear for name in names):
        return
    weights = [getattr(parent, name).weight for name in names]
    joined = faster_linear(torch.cat(weights).detach())
    if joined is None:
        return
    sizes = [len(w) for w in weights]
    for name in names:
        delattr(parent, name)
    parent.joined = joined
    parent.project = lambda x: joined(x).split(sizes, dim=-1)  # type: ignore[method-assign]


def lay_out(module: nn.Module) -> None:
    """Put a faster module in the place of every large nn.Linear without bias."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.bias is None and (faster := faster_linear(child.weight)):
                setattr(parent, name, faster)
