"""Attention of a few new queries over a long cache, in Triton: what a step of generation asks for. Forward only.

Called by the seam where no gradient is wanted. The queries are few and the keys many, so the work is reading the cache
once: it is cut along the positions into parts of PART keys (flash decoding, Dao et al. 2023), each part's program
serves every query of its key/value head, and a second kernel joins the parts,

    top = max_i top_i      w_i = 2^(top_i - top)      o = sum_i w_i o_i / sum_i w_i l_i

from each part's unnormalised o_i, weight total l_i and largest score top_i. The parts depend on the position alone,
so a row's bits are the same in any batch. Where the length lies on the device (a cache of fixed size, in a CUDA graph),
the parts behind it find nothing to do.

A cache may hold int8 codes with a scale for each position and head. Codes are exact in every type that a product takes;
so they go into the products as they are, and scales multiply what comes out of the first and what goes into the second:

    s_n = (q . k_n) scale_n      o = sum_n (p_n scale_n / most) v_n  most

most is the largest scale of the tile, without which p_n scale_n would leave fp16's range where values are small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash import HIDDEN, LOG2_E, padded
from kernels.launch import OPTIONS
from kernels.reference import Documents, Scales

PART = 256  # keys of one program: 64 KiB of a 16-bit cache at K = 128 against 2 KiB of results for a group of 4
TILE = {2: 64, 4: 16}  # keys at a time by bytes of a number: 32 in fp32 spill 328 bytes at K = 128 on sm_86
MOST_ROWS = 64  # queries times heads of a group, the rows of one program


@triton.jit
def attention_part_kernel(
    Q: tl.tensor,
    q_strides: tl.tensor,
    K: tl.tensor,
    k_strides: tl.tensor,
    V: tl.tensor,
    v_strides: tl.tensor,
    K_SCALES: tl.tensor,
    k_scales_strides: tl.tensor,
    V_SCALES: tl.tensor,
    v_scales_strides: tl.tensor,
    START: tl.tensor,
    LENGTH: tl.tensor,
    PARTS: tl.tensor,
    TOPS: tl.tensor,
    TOTALS: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    CODES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Rows r = t * GROUP + i (query t, head i of the group) over the keys of one part: o_i, top_i, l_i, all fp32."""
    part, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_K)
    t, h = r // GROUP, g * GROUP + r % GROUP
    real = r < T * GROUP
    at = (
        Q
        + b * q_strides[0]
        + t.to(tl.int64)[:, None] * q_strides[1]
        + h.to(tl.int64)[:, None] * q_strides[2]
        + j[None, :]
    )
    q = tl.load(at, mask=real[:, None] & (j[None, :] < HEAD), other=0.0)
    end = S
    if BOUNDED:
        end = tl.load(LENGTH)
    position = end - T + t
    first = tl.zeros([BLOCK_R], tl.int32)
    low = part * PART
    if MASKED:
        first = tl.load(START + b * S + position, mask=real, other=S)
        low = tl.maximum(low, tl.min(first, 0) // BLOCK_N * BLOCK_N)
    keys = K + b * k_strides[0] + g.to(tl.int64) * k_strides[2]
    values = V + b * v_strides[0] + g.to(tl.int64) * v_strides[2]
    if CODES:
        key_scales = K_SCALES + b * k_scales_strides[0] + g.to(tl.int64) * k_scales_strides[2]
        value_scales = V_SCALES + b * v_scales_strides[0] + g.to(tl.int64) * v_scales_strides[2]
    top = tl.full([BLOCK_R], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for n0 in range(low, tl.minimum(part * PART + PART, end), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (n[:, None] < end) & (j[None, :] < HEAD)
        k = tl.load(keys + n.to(tl.int64)[:, None] * k_strides[1] + j[None, :], mask=inside, other=0.0)
        s = tl.dot(q, k.to(q.dtype).T, input_precision=PRECISION) * (SCALE * LOG2_E)
        if CODES:
            s *= tl.load(key_scales + n.to(tl.int64) * k_scales_strides[1], mask=n < end, other=0.0)[None, :]
        seen = (n[None, :] <= position[:, None]) & (n[None, :] >= first[:, None])
        s = tl.where(seen, s, HIDDEN)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s - tl.where(new_top > HIDDEN, new_top, 0.0)[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values + n.to(tl.int64)[:, None] * v_strides[1] + j[None, :], mask=inside, other=0.0)
        if CODES:
            scales = tl.load(value_scales + n.to(tl.int64) * v_scales_strides[1], mask=n < end, other=0.0)
            most = tl.maximum(tl.max(scales, 0), 1e-30)
            p = (p * (scales / most)[None, :]).to(q.dtype)
            acc = acc * shrink[:, None] + tl.dot(p, v.to(q.dtype), input_precision=PRECISION) * most
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    row = ((b * tl.num_programs(1) + g) * tl.num_programs(0) + part) * BLOCK_R + r
    tl.store(PARTS + row[:, None] * BLOCK_K + j[None, :], acc, mask=real[:, None])
    tl.store(TOPS + row, top, mask=real)
    tl.store(TOTALS + row, total, mask=real)


@triton.jit
def attention_join_kernel(
    PARTS: tl.tensor,
    TOPS: tl.tensor,
    TOTALS: tl.tensor,
    OUT: tl.tensor,
    parts: tl.tensor,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """One query of one head: its parts into OUT (B, T, H, HEAD), contiguous."""
    r, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    T, G = tl.num_programs(0) // GROUP, tl.num_programs(1)
    j = tl.arange(0, BLOCK_K)
    top = HIDDEN
    total = 0.0
    acc = tl.zeros([BLOCK_K], tl.float32)
    for i0 in range(0, parts, BLOCK_P):
        i = i0 + tl.arange(0, BLOCK_P)
        row = ((b * G + g) * parts + i) * BLOCK_R + r
        tops = tl.load(TOPS + row, mask=i < parts, other=HIDDEN)
        totals = tl.load(TOTALS + row, mask=i < parts, other=0.0)
        o = tl.load(PARTS + row[:, None] * BLOCK_K + j[None, :], mask=i[:, None] < parts, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink, w = tl.math.exp2(top - new_top), tl.math.exp2(tops - new_top)
        total = total * shrink + tl.sum(w * totals, 0)
        acc = acc * shrink + tl.sum(w[:, None] * o, 0)
        top = new_top
    at = ((b * T + r // GROUP) * G * GROUP + g * GROUP + r % GROUP) * HEAD + j
    tl.store(OUT + at, (acc / total).to(OUT.dtype.element_ty), mask=j < HEAD)


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether these queries are few enough, and stand behind a cache."""
    return q.shape[1] < k.shape[1] and q.shape[1] * (q.shape[2] // k.shape[2]) <= MOST_ROWS


@torch.library.custom_op("chatdoctor::attention_decode", mutates_args=())
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    length: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, K) in q.dtype, contiguous."""
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    parts, rows, width = triton.cdiv(S, PART), max(16, triton.next_power_of_2(T * (H // G))), padded(K)
    o = q.new_empty(B, T, H, K)
    kept = q.new_empty(B, G, parts, rows, width, dtype=torch.float32)
    tops = q.new_empty(B, G, parts, rows, dtype=torch.float32)
    totals = torch.empty_like(tops)
    constants = {"GROUP": H // G, "HEAD": K, "BLOCK_K": width, "BLOCK_R": rows}
    attention_part_kernel[(parts, G, B)](
        q,
        q.stride()[:3],
        k,
        k.stride()[:3],
        v,
        v.stride()[:3],
        k_scales,
        (0, 0, 0) if k_scales is None else k_scales.stride(),
        v_scales,
        (0, 0, 0) if v_scales is None else v_scales.stride(),
        start,
        length,
        kept,
        tops,
        totals,
        T,
        S,
        SCALE=K**-0.5,
        BLOCK_N=TILE[q.dtype.itemsize],
        PART=PART,
        MASKED=start is not None,
        BOUNDED=length is not None,
        CODES=k_scales is not None,
        PRECISION="ieee",
        **constants,
        num_warps=4,
        **OPTIONS,
        num_stages=3 if q.dtype.itemsize == 2 else 1,
    )
    attention_join_kernel[(T * (H // G), G, B)](kept, tops, totals, o, parts, BLOCK_P=16, **constants, **OPTIONS)
    return o


@attention_decode.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    length: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    length: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """kernels.reference.attention, or with scales attention_of_codes, where takes(q, k); no gradient."""
    start = None if documents is None else documents[0]
    return attention_decode(q, k, v, start, length, *(scales or (None, None)))
