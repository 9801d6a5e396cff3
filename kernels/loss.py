"""Linear cross-entropy: sum_i w_i * CE(x_i @ weight.T, t_i) and its gradients, without ever holding the (N, V) logits.

Called by the seam. One Triton kernel does the softmax; the three products stay with cuBLAS, which no kernel of ours
beats. The definition of right is reference.linear_cross_entropy.

Derivation. Row i has logits z = W x_i, one of V numbers for each word of the vocabulary, and with m = max z

    loss_i     = w_i * (m + log s - z_t),   s = sum_v exp(z_v - m)
    dloss/dz_v = w_i * (exp(z_v - m) / s - [v = t])
    dX         = dZ W            (N, V) x (V, D)
    dW         = dZ^T X          (V, N) x (N, D)

dZ needs nothing from the outside but a scalar factor (the loss is a sum), so it is made in the forward, while the
logits are there: rows are taken a chunk at a time, the kernel overwrites a chunk's logits with its dZ, and two products
turn that into the chunk's dX and its part of dW. Backward multiplies both by the incoming factor. Nothing of size N * V
ever exists, and nothing is computed twice.

dW is summed over chunks in fp32: each addition into a bf16 sum would lose up to 8 of its bits. The sum costs memory and
time, which decides how many rows a chunk has: see rows_per_chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import OPTIONS

LOGITS_BYTES = 256 * 2**20  # logits of a chunk, where that is more than FEWEST_ROWS
FEWEST_ROWS = 2048  # rows of a chunk at least: see rows_per_chunk
BLOCK = 8192  # columns that a program takes at a time
VALUES = 16  # of them for a thread: 32-40 registers in bf16 (ptxas, sm_80 and sm_90), so 1,500 threads and more an SM
LOWEST = tl.constexpr(-3.0e38)  # in place of -inf, so that -inf minus the largest so far is not NaN


@triton.jit
def _cross_entropy(
    logits: tl.tensor,
    targets: tl.tensor,
    weights: tl.tensor,
    losses: tl.tensor,
    row_stride: tl.tensor,
    target_stride: tl.tensor,
    weight_stride: tl.tensor,
    V: tl.tensor,
    padded: tl.tensor,
    ignore_index: tl.tensor,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One row: its loss, and with GRADIENT its logits overwritten by the loss's gradient with respect to them.

    Columns V to padded are there, hold anything and get zeros: a mask of padded, a multiple of 16, lets the end of the
    row be loaded 16 bytes at a time for any V.
    """
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2^31 at 16,744 rows of V = 128,256
    logits += row * row_stride
    target = tl.load(targets + row * target_stride)
    weight = tl.load(weights + row * weight_stride).to(tl.float32) if WEIGHTED else 1.0
    columns = tl.arange(0, BLOCK)
    full = V // BLOCK * BLOCK  # only the columns from here on need masks
    rest = full + columns

    if (target == ignore_index) | (weight == 0.0):
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK,), logits.dtype.element_ty)
            for start in range(0, full, BLOCK):
                tl.store(logits + start + columns, zeros)
            tl.store(logits + rest, zeros, mask=rest < padded)
        return

    # A target outside the vocabulary cannot raise an error here, but must not pass: it makes loss and gradient NaN.
    known = (target >= 0) & (target < V)
    weight = tl.where(known, weight, float("nan"))
    # Before anything is overwritten. The reductions below hold a barrier between this read and the first write.
    z_target = tl.load(logits + target, mask=known, other=0.0).to(tl.float32)

    # First pass. Every GROUP neighbouring columns, the 16 bytes that one thread loads at once, keep a maximum and a sum
    # of their own, so that threads need not talk to each other before the end of the row.
    top = tl.full((BLOCK // GROUP,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK // GROUP,), tl.float32)
    for start in range(0, full, BLOCK):
        z = tl.load(logits + start + columns, eviction_policy="evict_last").to(tl.float32)
        z = tl.reshape(z, (BLOCK // GROUP, GROUP))
        higher = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        top = higher
    if full < V:
        z = tl.load(logits + rest, mask=rest < padded, other=float("-inf")).to(tl.float32)
        z = tl.reshape(tl.where(rest < V, z, float("-inf")), (BLOCK // GROUP, GROUP))
        higher = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        top = higher
    highest = tl.max(top, axis=0)
    total_of_row = tl.sum(total * tl.exp(top - highest), axis=0)
    tl.store(losses + row, weight * (tl.log(total_of_row) + (highest - z_target)))

    # Second pass, from the end of the row backwards: what was read last is the likeliest to be in the caches still.
    if GRADIENT:
        scale = weight / total_of_row
        hit = target.to(tl.int32)
        if full < V:
            z = tl.load(logits + rest, mask=rest < padded, other=float("-inf")).to(tl.float32)
            z = tl.where(rest < V, z, float("-inf"))
            dz = tl.exp(z - highest) * scale
            dz = tl.where(rest == hit, dz - weight, dz)
            tl.store(logits + rest, dz.to(logits.dtype.element_ty), mask=rest < padded)
        for back in range(BLOCK, full + BLOCK, BLOCK):
            here = full - back + columns
            z = tl.load(logits + here, eviction_policy="evict_first").to(tl.float32)
            dz = tl.exp(z - highest) * scale
            dz = tl.where(here == hit, dz - weight, dz)
            tl.store(logits + here, dz.to(logits.dtype.element_ty))


def launch(
    logits: Tensor, targets: Tensor, token_weights: Tensor | None, losses: Tensor, ignore_index: int, gradient: bool
) -> None:
    """Write the losses of these rows of logits, and with gradient overwrite the logits by their gradients.

    logits (R, V), rows at a multiple of 16 elements from each other, with the elements up to there at the kernel's
    disposal; targets (R,); token_weights (R,) or None; losses (R,) fp32.
    """
    R, V = logits.shape
    block = min(BLOCK, max(256, triton.next_power_of_2(V)))
    _cross_entropy[(R,)](
        logits,
        targets,
        targets if token_weights is None else token_weights,
        losses,
        logits.stride(0),
        targets.stride(0),
        0 if token_weights is None else token_weights.stride(0),
        V,
        triton.cdiv(V, 16) * 16,
        ignore_index,
        WEIGHTED=token_weights is not None,
        GRADIENT=gradient,
        BLOCK=block,
        GROUP=16 // logits.element_size(),
        num_warps=max(4, block // (32 * VALUES)),
        **OPTIONS,
    )


def rows_per_chunk(N: int, V: int, D: int, itemsize: int, need_dw: bool) -> int:
    """How many of the N rows have their logits in memory at a time.

    Arithmetic, not measured. A chunk of R rows costs 6 R V D operations in three products, and where dW is summed over
    chunks, 6 V D bytes more than one product would move (the fp32 sum is read and written, 8 V D, where a product
    writes 2 V D once). At an H200's 700 TFLOP/s and 4.2 TB/s that is 167 / R of the products' time: 8 % at 2,048 rows,
    4 % at 4,096.

    Memory: backward holds dW twice, the sum and its scaled copy, (4 + itemsize) V D bytes. The forward holds the sum
    and the chunk, so D rows of logits come for nothing. And up to R + (4 / itemsize - 1) D rows make one chunk: its dW
    is a single product straight into weight.dtype, and it weighs no more than the fp32 sum and R rows would.
    """
    most = max(FEWEST_ROWS, LOGITS_BYTES // (V * itemsize), D if need_dw else 0)
    if most + (4 // itemsize - 1) * (D if need_dw else 0) >= N:
        return max(N, 1)
    chunks = -(-N // most)
    return -(-N // (chunks * 128)) * 128  # even: 8,200 rows are not 8,192 and a product of 8


def compute(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) for a factor of 1; dx in x.dtype, dw in fp32, or in weight.dtype where one chunk makes it.

    What is not needed is an empty tensor. Values are never looked at: nothing waits for the device.
    """
    (N, D), V = x.shape, weight.shape[0]
    rows = rows_per_chunk(N, V, D, x.element_size(), need_dw)
    losses = x.new_empty(N, dtype=torch.float32)
    dx = x.new_empty((N, D) if need_dx else 0)
    dw = weight.new_empty((V, D) if need_dw else 0, dtype=weight.dtype if rows >= N else torch.float32)
    if N == 0:
        dw.zero_()
    # Rows start at a cache line for any V, which both the kernel's loads and the products want: cuBLAS takes strides.
    buffer = x.new_empty(min(rows, N), -(-V // 64) * 64)
    for i in range(0, N, rows):
        chunk = x[i : i + rows]
        logits = buffer[: chunk.shape[0], :V]
        torch.mm(chunk, weight.t(), out=logits)
        some = None if token_weights is None else token_weights[i : i + rows]
        launch(logits, targets[i : i + rows], some, losses[i : i + rows], ignore_index, need_dx or need_dw)
        if need_dx:
            torch.mm(logits, weight, out=dx[i : i + rows])
        if need_dw:
            _add_product(dw, logits.t(), chunk, first=i == 0)
    return losses.sum(), dx, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b for the first; total fp32 or in the dtype of a and b."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.is_cuda:
        # Products of 16-bit numbers, summed and added in fp32 inside cuBLAS: no temporary. In torch since 2.10.
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif first:
        torch.mm(a.float(), b.float(), out=total)  # no such product on a CPU, where only tests come by
    else:
        total.addmm_(a.float(), b.float())


@torch.library.custom_op("chatdoctor::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return compute(x, weight, targets, token_weights, ignore_index, need_dx, need_dw)


@_linear_cross_entropy.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (N, D), V = x.shape, weight.shape[0]
    whole = rows_per_chunk(N, V, D, x.element_size(), need_dw) >= N
    dx = x.new_empty((N, D) if need_dx else 0)
    dw = weight.new_empty((V, D) if need_dw else 0, dtype=weight.dtype if whole else torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dw


@torch.library.custom_op("chatdoctor::scaled", mutates_args=())
def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, computed in fp32 and rounded once, without a temporary."""
    # A factor without dimensions would take part as a bf16 number where gradient is bf16: up to 0.4 % off, the same
    # way for every element. One of shape (1,) makes the computation fp32.
    return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


@_scaled.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _set_up(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dx, dw = output
    ctx.save_for_backward(dx, dw)
    ctx.mark_non_differentiable(dx, dw)
    ctx.set_materialize_grads(False)  # else backward is handed zeros as large as dx and dw
    ctx.needs, ctx.dtype = inputs[5:7], inputs[1].dtype


def _backward(ctx: FunctionCtx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dx, dw = ctx.saved_tensors
    need_dx, need_dw = ctx.needs
    dx = _scaled(dx, grad, dx.dtype) if need_dx and grad is not None else None
    dw = _scaled(dw, grad, ctx.dtype) if need_dw and grad is not None else None
    return dx, dw, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_set_up)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, token_weights: Tensor | None = None
) -> Tensor:
    """Sum over the rows of token_weights * cross_entropy(x @ weight.T, targets), fp32 scalar.

    x (N, D) and weight (V, D) of one dtype, last dimension contiguous; targets (N,) int64; token_weights (N,) fp32, 1
    where not given, without gradient. A row whose target is ignore_index, or whose weight is 0, counts nothing,
    whatever finite numbers x holds there (what is not finite stays out of loss and dx, but 0 times it is NaN in dw);
    its part in the products is paid for all the same, because to leave it out the host would have to wait for the
    device. Softmax and sums in fp32, logits and their gradients in x.dtype. A target outside the vocabulary makes the
    loss NaN. The gradients are made with the loss, if x or weight asks for them. No second derivative.
    """
    grad = torch.is_grad_enabled()
    need_dx, need_dw = grad and x.requires_grad, grad and weight.requires_grad
    return _linear_cross_entropy(x, weight, targets, token_weights, ignore_index, need_dx, need_dw)[0]
