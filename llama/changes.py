"""How many weights an update changes, from a sample of them: train.py logs it. Knows torch.nn, not Llama.

Why: an update smaller than half the distance to the next number of a type changes nothing. In bf16 that is 1/256 of
the weight's size, so that at fine-tuning's learning rates most bf16 weights would never move (docs/design.md,
section 5); fp32 weights move, but what the model computes with in bf16 does so only now and then.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernels
from llama import parallel

NUMBERS = 1000  # of each parameter, at least, where it has so many


class WeightSample:
    """About 1,000 numbers of each parameter that an optimizer updates, always the same ones, on this rank's shards."""

    def __init__(self, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
        """bf16: the model computes in bf16, so count also what changes there."""
        self._optimizer, self._bf16 = optimizer, bf16

    @torch.no_grad()
    def take(self) -> Tensor:
        """The sampled weights as they are stored, in fp32."""
        return torch.cat([self._part(p) for group in self._optimizer.param_groups for p in group["params"]])

    def _part(self, p: Tensor) -> Tensor:
        flat = parallel.local(p).detach().reshape(-1)
        stride = max(1, flat.numel() // NUMBERS)
        low = self._optimizer.state[p].get("low")
        if low is None:
            return flat[::stride].float()
        return kernels.joined(flat[::stride].contiguous(), parallel.local(low).reshape(-1)[::stride].contiguous())

    def changed(self, before: Tensor) -> dict[str, float]:
        """Shares of the sample whose bits differ from those of before, over all ranks. All ranks call it."""
        after = self.take()
        counts = [torch.tensor(after.numel()), (_bits(before) != _bits(after)).sum()]
        if self._bf16:
            counts.append((_bits(before.bfloat16()) != _bits(after.bfloat16())).sum())
        total, *differ = parallel.all_reduce(torch.stack([c.cpu().double() for c in counts])).tolist()
        return {name: n / total for name, n in zip(("weights_changed", "bf16_weights_changed"), differ, strict=False)}


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
