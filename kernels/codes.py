"""Products of x with a matrix of 4- or 8-bit codes, dequantised on the way, in Triton. Forward only.

Called by the seam for inference with frozen weights. With q = u - 2^(bits-1) and a scale s per group of a row,

    y_n = sum_groups s_n,group sum_{k in group} q_n,k x_k

One row of x (a step of generation) is bounded by reading the codes once: vector. More rows go by tiles of Tensor Core
products, whose weights are rounded to x's type as in reference.dequantise; 4-bit tiles multiply the low halves of
their bytes with x's even numbers and the high halves with the odd ones, which are parted beforehand, so that no weight
moves between threads. Where the matrix has too few rows for the machine, `in` is cut into splits whose sums a second
kernel adds in order: no atomics, the same bits every time.

A code becomes a float without a conversion, which would be half as fast: with the bits of 2^23 or'ed over it, the
number reads 2^23 + u, from which 2^23 + 2^(bits-1) leaves q, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.launch import OPTIONS

CHUNK = 16  # bytes of codes of one load, which share a scale: 32 numbers in 4 bits, 16 in 8
TWO_23 = tl.constexpr(8388608)
# The bits of 2^23 as fp32, an argument of the kernels: as a constant, it and the mask beside it took two instructions.
MAGIC = 0x4B000000


class Vector(NamedTuple):
    """Of one program of the product with one row: rows of codes, chunks of each at a time, stages of its loads.

    It is one warp, and block_c a multiple of its 32 threads: with more, or fewer, x is passed around in shared memory.
    """

    block_n: int
    block_c: int
    stages: int


class Tiles(NamedTuple):
    """Of one program of the product with more: rows of x, rows of codes, bytes of each at a time."""

    block_m: int
    block_n: int
    block_b: int
    warps: int
    stages: int


VECTOR = {4: Vector(1, 128, 1), 8: Vector(4, 32, 3)}  # by the bits of a code; timed on an H200
# By family and bytes of a number, and by the most rows of x that they serve. fp32 has no Tensor Cores: its tiles are
# what spills nothing.
FEW = {16: Tiles(16, 64, 128, 4, 3), 64: Tiles(64, 64, 64, 4, 3)}
FP32 = {16: Tiles(16, 32, 32, 4, 1), 2**63: Tiles(32, 64, 32, 4, 1)}
TILES = {
    (80, 2): {**FEW, 2**63: Tiles(128, 128, 64, 8, 3)},
    (90, 2): {**FEW, 2**63: Tiles(256, 128, 64, 8, 3)},  # on an H200 1.13x (8 bits) and 1.23x (4) of sm_80's
    (80, 4): FP32,
    (90, 4): FP32,
}
PROGRAMS = 4  # of the vector's for a multiprocessor, before `in` is cut
TILE_PROGRAMS = 2
FEWEST_STEPS = 4  # of a tile's split: fewer are over before copies and products overlap
JOINED = 1024  # numbers of a program that adds splits


@triton.jit
def quantised_vector_kernel(
    X: tl.tensor,
    WORDS: tl.tensor,
    SCALES: tl.tensor,
    Y: tl.tensor,
    out: tl.tensor,
    chunks: tl.tensor,
    groups: tl.tensor,
    group_chunks: tl.tensor,
    steps: tl.tensor,
    magic: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """BLOCK_N numbers of y, or of a split's sums, which are of `steps` times BLOCK_C chunks of each row.

    A thread has a chunk, word by word, and reads the numbers of x that belong to a word in one load: nothing moves
    between threads before the sum at the end.
    """
    J: tl.constexpr = 32 // BITS
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, 4)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    low = tl.program_id(1) * steps
    for step in tl.range(low, tl.minimum(low + steps, tl.cdiv(chunks, BLOCK_C)), num_stages=STAGES):
        c = step * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (n[:, None] < out) & (c[None, :] < chunks)
        at = WORDS + (n[:, None] * chunks + c[None, :])[:, :, None] * 4 + w[None, None, :]
        words = tl.load(at, mask=inside[:, :, None], other=0)
        s = tl.load(SCALES + n[:, None] * groups + (c // group_chunks)[None, :], mask=inside, other=0.0)
        even, odd = tl.split(tl.reshape(words, [BLOCK_N, BLOCK_C, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        at = X + (c * (4 * J))[:, None] + tl.arange(0, J)[None, :]
        there = (c < chunks)[:, None]
        zero = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        p0 = _with_word(zero, w0, tl.load(at, mask=there, other=0.0), magic, BITS, BLOCK_C)
        p1 = _with_word(zero, w1, tl.load(at + J, mask=there, other=0.0), magic, BITS, BLOCK_C)
        p2 = _with_word(zero, w2, tl.load(at + 2 * J, mask=there, other=0.0), magic, BITS, BLOCK_C)
        p3 = _with_word(zero, w3, tl.load(at + 3 * J, mask=there, other=0.0), magic, BITS, BLOCK_C)
        acc += ((p0 + p1) + (p2 + p3)) * s.to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * out + n
    tl.store(Y + at, tl.sum(acc, 1).to(Y.dtype.element_ty), mask=n < out)


@triton.jit
def _with_word(
    p: tl.tensor, word: tl.tensor, x: tl.tensor, magic: tl.tensor, BITS: tl.constexpr, BLOCK_C: tl.constexpr
) -> tl.tensor:
    """p (BLOCK_N, BLOCK_C) + a word of codes each, times their numbers x (BLOCK_C, 32 / BITS)."""
    x = x.to(tl.float32)
    if BITS == 4:
        x0, x1 = tl.split(tl.reshape(x, [BLOCK_C, 2, 2, 2]))
        x00, x01 = tl.split(x0)  # of the numbers' three bits, the last and the middle one
        x10, x11 = tl.split(x1)
        x000, x001 = tl.split(x00)
        x010, x011 = tl.split(x01)
        x100, x101 = tl.split(x10)
        x110, x111 = tl.split(x11)
        p = _with(p, word, x000, magic, 0, BITS)
        p = _with(p, word, x100, magic, 4, BITS)
        p = _with(p, word, x010, magic, 8, BITS)
        p = _with(p, word, x110, magic, 12, BITS)
        p = _with(p, word, x001, magic, 16, BITS)
        p = _with(p, word >> 16, x101, magic, 4, BITS)
        p = _with(p, word >> 16, x011, magic, 8, BITS)
        p = _with(p, word >> 16, x111, magic, 12, BITS)
    else:
        x0, x1 = tl.split(tl.reshape(x, [BLOCK_C, 2, 2]))
        x00, x01 = tl.split(x0)
        x10, x11 = tl.split(x1)
        p = _with(p, word, x00, magic, 0, BITS)
        p = _with(p, word, x10, magic, 8, BITS)
        p = _with(p, word >> 16, x01, magic, 0, BITS)
        p = _with(p, word >> 16, x11, magic, 8, BITS)
    return p


@triton.jit
def _shifted(codes: tl.tensor, magic: tl.tensor, SHIFT: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """2^SHIFT q, exactly, for the code at bit SHIFT."""
    u = (codes & ((2**BITS - 1) << SHIFT)) | magic
    return u.to(tl.float32, bitcast=True) - (TWO_23 + (2 ** (BITS - 1) << SHIFT))


@triton.jit
def _with(
    p: tl.tensor, words: tl.tensor, x: tl.tensor, magic: tl.tensor, SHIFT: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """p + q x, for the code at bit SHIFT of each word. It stays where it is, 2^SHIFT times itself; x pays for that."""
    return p + _shifted(words, magic, SHIFT, BITS) * (x * (1.0 / 2**SHIFT))[None, :]


@triton.jit
def quantised_tile_kernel(
    X: tl.tensor,
    CODES: tl.tensor,
    SCALES: tl.tensor,
    Y: tl.tensor,
    M: tl.tensor,
    out: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    group_steps: tl.tensor,
    steps: tl.tensor,
    magic: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A tile of y, or of a split's sum, turned: its rows are the matrix's. BLOCK_B bytes of codes a step, one scale."""
    HALVES: tl.constexpr = 8 // BITS  # of a byte; x's numbers are parted likewise
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Beyond the end the last row is read again, which costs less than a mask in the loop, and not stored.
    codes = CODES + tl.minimum(n, out - 1)[:, None] * row_bytes
    scales = SCALES + tl.minimum(n, out - 1) * groups
    rows = X + tl.minimum(m, M - 1)[None, :] * (row_bytes * HALVES)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    low = tl.program_id(2) * steps
    for step in range(low, tl.minimum(low + steps, tl.cdiv(row_bytes, BLOCK_B))):
        s = tl.load(scales + step // group_steps).to(tl.float32)
        # Two products a step: low and high halves of bytes, or first and second half of 8-bit codes. With a single one
        # triton 3.6 lets a product of sm_90 run on while the next step's weights are made in the registers that it
        # reads: garbage in some tiles of 128 x 128 (an H200, 2026-11-26; test_products_with_codes_again_and_again).
        for half in tl.static_range(2):
            if BITS == 4:
                b = step * BLOCK_B + tl.arange(0, BLOCK_B)
                x_at = rows + half * row_bytes + b[:, None]
            else:
                b = step * BLOCK_B + half * (BLOCK_B // 2) + tl.arange(0, BLOCK_B // 2)
                x_at = rows + b[:, None]
            if EVEN:
                u = tl.load(codes + b[None, :])
                x = tl.load(x_at)
            else:
                u = tl.load(codes + b[None, :], mask=b[None, :] < row_bytes, other=0)
                x = tl.load(x_at, mask=b[:, None] < row_bytes, other=0.0)
            w = _weights(u, s, magic, half * 4 if BITS == 4 else 0, BITS, x.dtype)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
    at = (tl.program_id(2).to(tl.int64) * M + m[None, :]) * out + n[:, None]
    tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < out))


@triton.jit
def _weights(
    u: tl.tensor, s: tl.tensor, magic: tl.tensor, SHIFT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """q s, rounded once to dtype, for the code at bit SHIFT of each byte."""
    q = _shifted(u.to(tl.int32), magic, SHIFT, BITS)
    return (q * (s * (1.0 / 2**SHIFT))[:, None]).to(dtype)


@triton.jit
def quantised_join_kernel(
    PARTS: tl.tensor, Y: tl.tensor, count: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Y = the sum of `splits` times count numbers, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        total += tl.load(PARTS + i, mask=i < count, other=0.0)
        PARTS += count
    tl.store(Y + i, total.to(Y.dtype.element_ty), mask=i < count)


def why_not(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> str | None:
    """Why these kernels cannot take a product that the seam has checked, as a clause; None when they can."""
    if codes.shape[1] % CHUNK:
        wanted = CHUNK * 8 // bits
        return f"rows of {x.shape[-1]} numbers of {bits} bits are no multiple of {wanted}: use the torch backend"
    if not (codes.is_contiguous() and scales.is_contiguous()):
        return "codes and scales are not contiguous: call .contiguous() on them first"
    if scales.dtype not in launch.DTYPES:
        return f"scales of {scales.dtype} have no kernel: use float32, bfloat16, float16, or the torch backend"
    return None


def splits_of(steps: int, programs: int, wanted: int, fewest: int) -> tuple[int, int]:
    """(steps of a split, splits): as many programs as wanted, if no split gets fewer steps than `fewest`."""
    splits = max(1, min(-(-wanted // programs), steps // fewest))
    each = -(-steps // splits)
    return each, -(-steps // each)


@torch.library.custom_op("chatdoctor::quantised_linear", mutates_args=())
def quantised_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """kernels.reference.quantised_linear by these kernels; y contiguous. Where why_not is None; no gradient."""
    out = codes.shape[0]
    y = x.new_empty(*x.shape[:-1], out)
    rows = x.reshape(-1, x.shape[-1])
    if y.numel() == 0:
        return y
    if codes.data_ptr() % CHUNK:  # a view into something else, which loads of 16 bytes cannot read
        codes = codes.clone()
    if len(rows) == 1:
        _vector(rows.contiguous(), codes, scales, bits, y)
    else:
        _tiled(rows, codes, scales, bits, y)
    return y


@quantised_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _vector(x: Tensor, codes: Tensor, scales: Tensor, bits: int, y: Tensor) -> None:
    out, chunks, groups, v = len(codes), codes.shape[1] // CHUNK, scales.shape[1], VECTOR[bits]
    tiles = triton.cdiv(out, v.block_n)
    wanted = PROGRAMS * launch.multiprocessors(x.device)
    steps, splits = splits_of(triton.cdiv(chunks, v.block_c), tiles, wanted, 1)
    sums = y if splits == 1 else x.new_empty(splits, out, dtype=torch.float32)
    quantised_vector_kernel[(tiles, splits)](
        x,
        codes.view(torch.int32),
        scales,
        sums,
        out,
        chunks,
        groups,
        chunks // groups,
        steps,
        MAGIC,
        BITS=bits,
        BLOCK_N=v.block_n,
        BLOCK_C=v.block_c,
        STAGES=v.stages,
        num_warps=1,
        **OPTIONS,
    )
    _join(sums, y)


def _tiled(x: Tensor, codes: Tensor, scales: Tensor, bits: int, y: Tensor) -> None:
    (M, width), (out, row_bytes), groups = x.shape, codes.shape, scales.shape[1]
    if bits == 4:
        x = x.reshape(M, width // 2, 2).transpose(1, 2)
    family = launch.family(launch.architecture(x.device))
    t = next(tiles for most, tiles in TILES[family, x.element_size()].items() if most >= M)
    group_bytes = row_bytes // groups
    block_b = t.block_b if groups == 1 else min(t.block_b, group_bytes)
    total, tiles = triton.cdiv(row_bytes, block_b), (triton.cdiv(M, t.block_m), triton.cdiv(out, t.block_n))
    wanted = TILE_PROGRAMS * launch.multiprocessors(x.device)
    steps, splits = splits_of(total, tiles[0] * tiles[1], wanted, FEWEST_STEPS)
    sums = y if splits == 1 else x.new_empty(splits, M, out, dtype=torch.float32)
    quantised_tile_kernel[(*tiles, splits)](
        x.contiguous(),
        codes,
        scales,
        sums,
        M,
        out,
        row_bytes,
        groups,
        total if groups == 1 else group_bytes // block_b,
        steps,
        MAGIC,
        BITS=bits,
        BLOCK_M=t.block_m,
        BLOCK_N=t.block_n,
        BLOCK_B=block_b,
        EVEN=row_bytes % block_b == 0,
        PRECISION="ieee",
        num_warps=t.warps,
        num_stages=t.stages,
        **OPTIONS,
    )
    _join(sums, y)


def _join(sums: Tensor, y: Tensor) -> None:
    if sums is not y:
        count = y.numel()
        grid = (triton.cdiv(count, JOINED),)
        quantised_join_kernel[grid](sums, y, count, len(sums), BLOCK=JOINED, num_warps=4, **OPTIONS)
