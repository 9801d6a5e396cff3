"""AdamW in one pass over memory, in Triton: weights, moments and the low halves of split weights, in place.

Called by the seam. The update is that of Loshchilov and Hutter (arXiv:1711.05101) as torch.optim.AdamW computes it. Per
number of a parameter, with gradient g times the scale that clipping asks for, in fp32:

    w = w (1 - lr decay)      m = m + (1 - b1)(g - m)      v = b2 v + (1 - b2) g g
    w = w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

A split weight is fp32 in two halves: hi, the weight rounded to bf16, which the model computes with, and low, what that
rounding took away, as 16 bits: bits32 = hi * 2^16 + low. So hi and low together are exact fp32 in 4 bytes, where fp32
weights and their bf16 copies take 6. Half-way cases are rounded away from 0 (to even, low would need a 17th bit).

Moments in bf16 are rounded at random, up as often as the rest is large: rounded to nearest, v could not decay, since
0.1 % is less than half a unit of bf16. The random bits are a hash of the number's place and a seed (32-bit finaliser of
Wellons, https://nullprogram.com/blog/2018/07/31/), so the same step gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OPTIONS

BLOCK = 2048  # numbers of a program
WARPS = 4  # so 16 numbers a thread


@triton.jit
def _random_rounding(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """fp32 x as bf16, rounded up in magnitude with the probability of what would be cut off; random: 16 bits."""
    bits = x.to(tl.uint32, bitcast=True) + random
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    W: tl.tensor,
    LOW: tl.tensor,
    G: tl.tensor,
    M: tl.tensor,
    V: tl.tensor,
    SCALE: tl.tensor,
    n: tl.tensor,
    keep: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    seed: tl.tensor,
    SPLIT: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """keep: 1 - lr * decay. rate: lr / (1 - b1^t). root: sqrt(1 - b2^t). rest: 1 - b, made in fp64."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    w = tl.load(W + i, inside, other=0.0)
    if SPLIT:
        high = w.to(tl.int16, bitcast=True).to(tl.int32) << 16
        w = (high + tl.load(LOW + i, inside, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    g = tl.load(G + i, inside, other=0.0).to(tl.float32) * tl.load(SCALE)
    m = tl.load(M + i, inside, other=0.0).to(tl.float32)
    v = tl.load(V + i, inside, other=0.0).to(tl.float32)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * keep - rate * (m / (tl.sqrt(v) / root + eps))
    if SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(LOW + i, (bits - (high << 16)).to(tl.int16), inside)
        tl.store(W + i, high.to(tl.int16).to(tl.bfloat16, bitcast=True), inside)
    else:
        tl.store(W + i, w, inside)
    if AT_RANDOM:
        x = i.to(tl.uint32) ^ seed.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x ^= x >> 16
        tl.store(M + i, _random_rounding(m, x & 0xFFFF), inside)
        tl.store(V + i, _random_rounding(v, x >> 16), inside)
    else:
        tl.store(M + i, m, inside)
        tl.store(V + i, v, inside)


def adamw(
    weight: Tensor,
    low: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    *,
    keep: float,
    rate: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    seed: int,
) -> None:
    """kernels.reference.adamw by this kernel; tensors as the seam has checked them."""
    n = weight.numel()
    adamw_kernel[(triton.cdiv(n, BLOCK),)](
        weight,
        low,
        gradient,
        exp_avg,
        exp_avg_sq,
        scale,
        n,
        keep,
        rate,
        1 - beta1,
        beta2,
        1 - beta2,
        root,
        eps,
        seed,
        SPLIT=low is not None,
        AT_RANDOM=exp_avg.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
        **OPTIONS,
    )
