"""RMSNorm, alone and with the residual addition before it, forward and backward, in Triton.

Called by the seam. Of each row of D numbers, with the weight w and

    r = 1 / sqrt(mean_i x_i^2 + eps)      n_i = x_i r      y_i = w_i n_i

r is made in fp32 from x; n is rounded to x's type before it meets the weight, and y is rounded once, as the reference
does and Meta's and Hugging Face's LLaMA. Backward, from the gradient g of y, with u_i = w_i g_i: since
dr/dx_j = -r^3 x_j / D,

    dw_i = sum over rows of g_i n_i      dx_i = r u_i - r^3 x_i / D sum_j u_j x_j = r (u_i - n_i mean_j(u_j n_j))

all in fp32 up to one rounding; n is made again from x and the saved r (4 bytes a row). With the residual, h = x + s is
rounded to x's type, returned, and normed as rounded. h also goes on past the norm, and the gradient e of that other
path adds up: dh_i = e_i + (dx_i above, of h); it is the gradient of x and of s alike, one tensor for both.

These kernels wait for memory only, so what counts is bytes under way. Forward: a program a row (a few, of short ones),
16 numbers a thread, several programs on a multiprocessor. Backward: as many programs as fit on the device at once
walk over the rows, while copies of the next rows are under way; each keeps its own dw in registers and writes it as
one fp32 row at the end, and a second kernel sums those rows. No atomics: the same bits on every run.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import architecture, gradient_rows, multiprocessors, rows

LARGEST = 16384  # numbers in a row
PER_THREAD = 16  # numbers of a tile: 2 loads of 16 bytes of bf16, 4 of fp32
SMALLEST_TILE = 2048  # numbers
MOST_WARPS = 16  # that work for one multiprocessor; at about 100 registers a thread in the backward, 20 would fit
SHARED_BYTES = {80: 163 * 2**10, 90: 227 * 2**10}  # that one program may take, by architecture
LEAST_SHARED_BYTES = 99 * 2**10  # elsewhere, as on sm_86, sm_89 and sm_120
SLACK_BYTES = 1024  # of shared memory beside each tile: r, and the reduction's own
SUM_ROWS, SUM_COLUMNS = 128, 32  # the tile of the sum over programs


class Cut(NamedTuple):
    """How the rows are cut: rows and columns of a tile, and the warps on it."""

    rows: int
    columns: int
    warps: int


@cache
def cut(D: int) -> Cut:
    """The tiles for rows of D numbers."""
    columns = triton.next_power_of_2(D)
    rows = max(1, SMALLEST_TILE // columns)
    return Cut(rows, columns, min(MOST_WARPS, rows * columns // (32 * PER_THREAD)))


@cache
def stages(D: int, row_bytes: int, arch: int) -> int:
    """Stages of the backward's loop: how many tiles' copies fit in shared memory, two at most, and one in registers.

    row_bytes: of one number's column over all that is read. A single copy buys nothing (it is waited for right after
    it starts), but costs no more than loads to registers, and lets the other programs on the multiprocessor run.
    """
    c = cut(D)
    return 1 + min(2, SHARED_BYTES.get(arch, LEAST_SHARED_BYTES) // (c.rows * c.columns * row_bytes + SLACK_BYTES))


@triton.jit(do_not_specialize=["N"])
def rms_norm_forward_kernel(
    X: tl.tensor,
    x_step: tl.tensor,
    S: tl.tensor,
    s_step: tl.tensor,
    W: tl.tensor,
    H: tl.tensor,
    Y: tl.tensor,
    RSTD: tl.tensor,
    N: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """y and r of ROWS rows; with ADD of the rows of h = x + s, and h."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    w = tl.load(W + d, d < D, other=0.0).to(tl.float32)
    x = tl.load(X + n[:, None] * x_step + d[None, :], inside, other=0.0).to(tl.float32)
    out = n[:, None] * D + d[None, :]
    if ADD:
        s = tl.load(S + n[:, None] * s_step + d[None, :], inside, other=0.0).to(tl.float32)
        h = (x + s).to(H.dtype.element_ty)
        tl.store(H + out, h, inside)
        x = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(RSTD + n, rstd, n < N)
    normed = (x * rstd[:, None]).to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + out, (normed * w[None, :]).to(Y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N"])
def rms_norm_backward_kernel(
    DY: tl.tensor,
    dy_step: tl.tensor,
    X: tl.tensor,
    x_step: tl.tensor,
    W: tl.tensor,
    RSTD: tl.tensor,
    DH: tl.tensor,
    dh_step: tl.tensor,
    DX: tl.tensor,
    DW: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """dx of every so-many-th tile of rows, and their share of dw in this program's row of DW (programs, D)."""
    lane = tl.arange(0, ROWS).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    w = tl.load(W + d, d < D, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(0), (N + ROWS - 1) // ROWS, tl.num_programs(0), num_stages=STAGES):
        n = tile * ROWS + lane
        inside = (n < N)[:, None] & (d < D)[None, :]
        rstd = tl.load(RSTD + n, n < N, other=0.0)
        x = tl.load(X + n[:, None] * x_step + d[None, :], inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + n[:, None] * dy_step + d[None, :], inside, other=0.0).to(tl.float32)
        normed = x * rstd[:, None]
        u = dy * w[None, :]
        along = tl.sum(u * normed, 1) / D
        dx = (u - normed * along[:, None]) * rstd[:, None]
        if ADD:
            dx += tl.load(DH + n[:, None] * dh_step + d[None, :], inside, other=0.0).to(tl.float32)
        tl.store(DX + n[:, None] * D + d[None, :], dx.to(DX.dtype.element_ty), inside)
        dw += dy * normed
    tl.store(DW + tl.program_id(0).to(tl.int64) * D + d, tl.sum(dw, 0), d < D)


@triton.jit(do_not_specialize=["P"])
def sum_programs_kernel(
    PARTS: tl.tensor,
    OUT: tl.tensor,
    P: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """OUT (D,) = the sum over the rows of PARTS (P, D) fp32."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for p0 in range(0, P, ROWS):
        inside = (p0 + p < P)[:, None] & (d < D)[None, :]
        total += tl.load(PARTS + (p0 + p)[:, None] * D + d[None, :], inside, other=0.0)
    tl.store(OUT + d, tl.sum(total, 0).to(OUT.dtype.element_ty), d < D)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """h where there is a residual, y, and r fp32 in the shape of x's rows."""
    D = x.shape[-1]
    if D > LARGEST:
        raise ValueError(f"rms_norm: rows of {D} numbers; the kernel takes up to {LARGEST}: use the torch backend")
    lines = rows("rms_norm", "x", x)
    extra = None if residual is None else rows("rms_norm", "residual", residual)
    h = None if residual is None else x.new_empty(x.shape)
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    c, N = cut(D), lines.shape[0]
    rms_norm_forward_kernel[(triton.cdiv(N, c.rows),)](
        lines,
        lines.stride(0),
        extra,
        0 if extra is None else extra.stride(0),
        weight,
        h,
        y,
        rstd,
        N,
        eps,
        D=D,
        ROWS=c.rows,
        COLUMNS=c.columns,
        ADD=extra is not None,
        num_warps=c.warps,
    )
    return h, y, rstd


@torch.library.custom_op("chatdoctor::rms_norm_forward", mutates_args=())
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (..., D) in x.dtype, and fp32 r (...) for the backward."""
    return _forward(x, None, weight, eps)[1:]


@rms_norm_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("chatdoctor::add_rms_norm_forward", mutates_args=())
def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + residual and its norm y, both (..., D) in x.dtype, and fp32 r (...) for the backward."""
    return _forward(x, residual, weight, eps)


@add_rms_norm_forward.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("chatdoctor::rms_norm_backward", mutates_args=())
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx in x.dtype, dh added where there is one, and dw in weight.dtype. x is what was normed."""
    D = x.shape[-1]
    lines, gradient = rows("rms_norm", "x", x), gradient_rows(dy)
    past = None if dh is None else gradient_rows(dh)
    c, N = cut(D), lines.shape[0]
    programs = max(1, min(MOST_WARPS // c.warps * multiprocessors(x.device), triton.cdiv(N, c.rows)))
    dx, dw = x.new_empty(x.shape), weight.new_empty(D)
    parts = x.new_empty(programs, D, dtype=torch.float32)
    rms_norm_backward_kernel[(programs,)](
        gradient,
        gradient.stride(0),
        lines,
        lines.stride(0),
        weight,
        rstd,
        past,
        0 if past is None else past.stride(0),
        dx,
        parts,
        N,
        D=D,
        ROWS=c.rows,
        COLUMNS=c.columns,
        ADD=past is not None,
        STAGES=stages(D, x.dtype.itemsize * (2 if past is None else 3), architecture(x.device)),
        num_warps=c.warps,
    )
    sum_programs_kernel[(triton.cdiv(D, SUM_COLUMNS),)](
        parts, dw, programs, D=D, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=8
    )
    return dx, dw


@rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: FunctionCtx, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    return *rms_norm_backward(dy, *ctx.saved_tensors, None), None


def _keep_sum(
    ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.save_for_backward(output[0], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradients_of_sum(
    ctx: FunctionCtx, dh: Tensor | None, dy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dh, dh, None, None
    dx, dw = rms_norm_backward(dy, *ctx.saved_tensors, dh)
    return dx, dx, dw, None


rms_norm_forward.register_autograd(_gradients, setup_context=_keep)
add_rms_norm_forward.register_autograd(_gradients_of_sum, setup_context=_keep_sum)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """kernels.reference.rms_norm by these kernels; x and weight as the seam has checked them.

    The rows of x (..., D) must be evenly spaced: x[:, ::2] with an even number of rows, or x[:, -1:], is read where
    it lies; ValueError for others (a transposed x, x[:, :-1] in a batch), since copying it would not be silent.
    """
    return rms_norm_forward(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + residual, rounded to x.dtype, and its norm; strides as for rms_norm, each tensor its own."""
    h, y, _ = add_rms_norm_forward(x, residual, weight, eps)
    return h, y
