"""SwiGLU, silu(gate) * up, forward and backward, in Triton.

Called by the seam. With s = sigmoid(g), a number of the gate g and of the other half u give

    y = g s u      du = dy g s      dg = dy u s (1 + g (1 - s))

since ds/dg = s (1 - s). Made in fp32 and rounded once; the backward makes s again from g, so that nothing is kept but
the inputs, which autograd keeps anyway. One pass over memory each: 2 reads and 1 write, 3 reads and 2 writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import OPTIONS, rows

BLOCK = 2048  # numbers of a program
WARPS = 4  # so 16 numbers a thread, of each tensor: 2 loads of 16 bytes of bf16


@triton.jit
def _place(F: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Which row a program is in, and which of its columns it has. Both 64 bits wide: rows may be longer than 2^31."""
    blocks = tl.cdiv(F, BLOCK)
    n = tl.program_id(0).to(tl.int64) // blocks
    f = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return n, f


@triton.jit
def swiglu_forward_kernel(
    GATE: tl.tensor,
    gate_step: tl.tensor,
    UP: tl.tensor,
    up_step: tl.tensor,
    Y: tl.tensor,
    F: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """y, whose rows lie one behind the other."""
    n, f = _place(F, BLOCK)
    g = tl.load(GATE + n * gate_step + f, f < F, other=0.0).to(tl.float32)
    u = tl.load(UP + n * up_step + f, f < F, other=0.0).to(tl.float32)
    tl.store(Y + n * F + f, (g * tl.sigmoid(g) * u).to(Y.dtype.element_ty), f < F)


@triton.jit
def swiglu_backward_kernel(
    DY: tl.tensor,
    GATE: tl.tensor,
    gate_step: tl.tensor,
    UP: tl.tensor,
    up_step: tl.tensor,
    DGATE: tl.tensor,
    DUP: tl.tensor,
    F: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The gradients of gate and up; their rows and dy's lie one behind the other."""
    n, f = _place(F, BLOCK)
    dy = tl.load(DY + n * F + f, f < F, other=0.0).to(tl.float32)
    g = tl.load(GATE + n * gate_step + f, f < F, other=0.0).to(tl.float32)
    u = tl.load(UP + n * up_step + f, f < F, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(DUP + n * F + f, (dy * g * s).to(DUP.dtype.element_ty), f < F)
    tl.store(DGATE + n * F + f, (dy * u * s * (1 + g * (1 - s))).to(DGATE.dtype.element_ty), f < F)


def _cut(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int, tuple[int]]:
    """gate and up as (N, F), the width F of a row, and the grid. What is contiguous is one row, cut without rests."""
    if gate.is_contiguous() and up.is_contiguous():
        gate, up = gate.view(1, -1), up.view(1, -1)
    else:
        gate, up = rows("swiglu", "gate", gate), rows("swiglu", "up", up)
    N, F = gate.shape
    return gate, up, F, (N * triton.cdiv(F, BLOCK),)


@torch.library.custom_op("chatdoctor::swiglu_forward", mutates_args=())
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y, contiguous, in the shape and dtype of gate."""
    y = gate.new_empty(gate.shape)
    gate, up, F, grid = _cut(gate, up)
    swiglu_forward_kernel[grid](gate, gate.stride(0), up, up.stride(0), y, F, BLOCK, num_warps=WARPS, **OPTIONS)
    return y


@swiglu_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("chatdoctor::swiglu_backward", mutates_args=())
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, contiguous."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    gate, up, F, grid = _cut(gate, up)
    swiglu_backward_kernel[grid](
        dy.contiguous(), gate, gate.stride(0), up, up.stride(0), dgate, dup, F, BLOCK, num_warps=WARPS, **OPTIONS
    )
    return dgate, dup


@swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward(dy, *ctx.saved_tensors)


swiglu_forward.register_autograd(_gradients, setup_context=_keep)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """kernels.reference.swiglu by these kernels, tensors as the seam has checked them.

    Rows must be evenly spaced, as those of the two halves of one product are; ValueError for others.
    """
    return swiglu_forward(gate, up)
