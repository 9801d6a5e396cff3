"""AdamW over split weights, apart from its arithmetic (tests/kernels) and its shards (test_parallel.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from llama.optimizer import SplitAdamW


class OnGpu:
    """Stands for a scalar on the GPU, where the gradients' norm is made; offloaded weights are on the CPU."""

    def to(self, device: Any) -> Tensor:
        return torch.tensor(0.5, device=device)


def test_the_scale_of_clipping_goes_to_where_the_weights_are() -> None:
    p = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    optimizer = SplitAdamW([{"params": [p]}], {p: "p"}, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    p.grad = torch.ones_like(p)
    optimizer.step(OnGpu())  # type: ignore[arg-type]
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((8,), 0.05))
