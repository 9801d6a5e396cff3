"""AdamW whose weights are split: bf16 for the model to compute with, and the other 16 bits of exact fp32 beside it.

Built by train.py over a finished module, sharded or not; the update itself is kernels.adamw. Bytes a parameter: 2 for
the weight, 2 for its low half, 2 for the gradient, and 8 (fp32) or 4 (bf16, rounded at random) for the two moments: 14
or 10, where fp32 weights with fp32 gradients and moments take 16, and their bf16 copies for the forward more. Knows
torch.nn, not Llama.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import kernels
from llama.parallel import local


class SplitAdamW(torch.optim.Optimizer):
    """AdamW over named bf16 parameters; state exists from the start: step, exp_avg, exp_avg_sq, low."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: dict[nn.Parameter, str],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        # Parameters round their moments by random bits of their own, the same in every run and on every resume.
        self._salt = {p: zlib.crc32(name.encode()) ^ seed for p, name in names.items()}
        for p in self._parameters():
            assert p.dtype == torch.bfloat16, f"a split weight is bf16, not {p.dtype}"
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(p, dtype=moments),
                "exp_avg_sq": torch.zeros_like(p, dtype=moments),
                "low": torch.zeros_like(p, dtype=torch.int16),
            }

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def assign(self, p: nn.Parameter, values: Tensor) -> None:
        """Set this rank's part of a weight to fp32 values, all their bits."""
        high, low = kernels.split(values.float().contiguous())
        local(p).copy_(high)
        local(self.state[p]["low"]).copy_(low)

    def master(self, p: nn.Parameter) -> Tensor:
        """This rank's part of a weight in fp32."""
        return kernels.joined(local(p).detach(), local(self.state[p]["low"]))

    @torch.no_grad()
    def step(self, scale: Tensor | None = None) -> None:
        """One update; gradients count scale times (an fp32 scalar on any device: what clipping asks for)."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                t = int(state["step"])
                weight = local(p)
                scale = torch.ones((), device=weight.device) if scale is None else scale.to(weight.device)
                kernels.adamw(
                    weight.view(-1),
                    local(state["low"]).view(-1),
                    local(p.grad).contiguous().view(-1),
                    local(state["exp_avg"]).view(-1),
                    local(state["exp_avg_sq"]).view(-1),
                    scale,
                    keep=1 - group["lr"] * group["weight_decay"],
                    rate=group["lr"] / (1 - beta1**t),
                    beta1=beta1,
                    beta2=beta2,
                    root=math.sqrt(1 - beta2**t),
                    eps=group["eps"],
                    seed=(self._salt[p] + t * 0x9E3779B1) & 0x7FFFFFFF,
                )


@torch.no_grad()
def clipped_step(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float) -> None:
    """One update, gradients of this norm scaled down to the limit (0: as they are). Nothing waits for the device."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
    if isinstance(optimizer, SplitAdamW):
        optimizer.step(scale)
        return
    if limit:
        grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(grads, scale.to(grads[0].device))
    optimizer.step()
