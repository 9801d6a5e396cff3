"""Rotary position embedding of queries and keys in one launch, in Triton; its backward is the same kernel.

Called by the seam. In the rotate-half layout a head's numbers i and K/2 + i form a pair, which position t turns by the
angle whose cosine and sine the tables hold:

    a' = a cos - b sin      b' = b cos + a sin

A rotation is orthogonal, so the gradient is turned back: the same with -sin. Nothing has to be kept but the tables.
Computed in fp32, rounded once, as the reference.

Memory is all that counts: a program takes a position, reads its K/2 angles once and every head of q and of k, 16 bytes
a thread at a time. Any strides but the last, so heads may be cut from one fused product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import OPTIONS

PAIRS = 2048  # of a tile of heads: 16 KiB of bf16 under way for a program
PER_THREAD = 16  # of them


@triton.jit
def _turn_heads(
    X: tl.tensor,
    head_step: tl.tensor,
    OUT: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Every head of one position, from X into OUT, whose heads lie one behind the other."""
    i = tl.arange(0, BLOCK_HALF)
    for h0 in tl.static_range(0, HEADS, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        inside = (h < HEADS)[:, None] & (i < HALF)[None, :]
        at = X + h.to(tl.int64)[:, None] * head_step + i[None, :]
        a = tl.load(at, inside, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, inside, other=0.0).to(tl.float32)
        to = OUT + h[:, None] * (2 * HALF) + i[None, :]
        tl.store(to, (a * cos - b * sin).to(OUT.dtype.element_ty), inside)
        tl.store(to + HALF, (b * cos + a * sin).to(OUT.dtype.element_ty), inside)


@triton.jit
def rope_kernel(
    Q: tl.tensor,
    q_strides: tl.tensor,
    K: tl.tensor,
    k_strides: tl.tensor,
    COS: tl.tensor,
    cos_strides: tl.tensor,
    SIN: tl.tensor,
    sin_strides: tl.tensor,
    Q_OUT: tl.tensor,
    K_OUT: tl.tensor,
    T: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """One position of one row: all heads of q and k turned by its angles, or with BACK turned back."""
    n = tl.program_id(0).to(tl.int64)
    b, t = n // T, n % T
    i = tl.arange(0, BLOCK_HALF)
    cos = tl.load(COS + b * cos_strides[0] + t * cos_strides[1] + i, i < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + b * sin_strides[0] + t * sin_strides[1] + i, i < HALF, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sin = -sin
    q, k = Q + b * q_strides[0] + t * q_strides[1], K + b * k_strides[0] + t * k_strides[1]
    _turn_heads(q, q_strides[2], Q_OUT + n * (H * 2 * HALF), cos, sin, H, HALF, BLOCK_H, BLOCK_HALF)
    _turn_heads(k, k_strides[2], K_OUT + n * (G * 2 * HALF), cos, sin, G, HALF, BLOCK_G, BLOCK_HALF)


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Steps from row to row of the batch, 0 where they share one, and from position to position."""
    return (table.stride(0) if table.ndim == 3 and table.shape[0] > 1 else 0), table.stride(-2)


@torch.library.custom_op("chatdoctor::rope", mutates_args=())
def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q (B, T, H, K) and k (B, T, G, K) turned, or turned back, contiguous; tables as in rope()."""
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))  # autograd may send an expanded gradient
    B, T, H, K = q.shape
    G, half = k.shape[2], K // 2
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    width = triton.next_power_of_2(half)
    heads = max(1, PAIRS // width)
    blocks = [min(heads, triton.next_power_of_2(n)) for n in (H, G)]
    rope_kernel[(B * T,)](
        q,
        q.stride()[:3],
        k,
        k.stride()[:3],
        cos,
        _table_strides(cos),
        sin,
        _table_strides(sin),
        q_out,
        k_out,
        T,
        H=H,
        G=G,
        HALF=half,
        BLOCK_H=blocks[0],
        BLOCK_G=blocks[1],
        BLOCK_HALF=width,
        BACK=back,
        num_warps=min(8, max(1, max(blocks) * width // (32 * PER_THREAD))),
        **OPTIONS,
    )
    return q_out, k_out


@rotated.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.back = inputs[4]


def _gradients(ctx: FunctionCtx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *rotated(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None


rotated.register_autograd(_gradients, setup_context=_keep)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """kernels.reference.rope by this kernel, tensors as the seam has checked them; no gradient for the tables.

    cos, sin fp32, (T, K/2), (1, T, K/2) or (B, T, K/2).
    """
    return rotated(q, k, cos, sin, False)
