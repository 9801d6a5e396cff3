"""Causal attention over packed documents with grouped queries, forward and backward, in Triton.

Called by the seam. FlashAttention-2's arithmetic (Dao 2023, arXiv:2307.08691) with the documents built in. In a row of
S positions, query t stands at position p = S - T + t and sees the keys start[p] .. p of its own document. As documents
lie one behind the other, start and end never fall along a row: a tile of queries needs the keys from its first
query's start to its last query, a tile of keys the queries from its first key to its last key's end. So the grid is
fixed, nothing is read back to the host, and a tile may straddle documents. Where documents branch, there is a forward
only, which masks every tile.

Forward, per query, in base 2 (c = log2(e) / sqrt(K), folded into one multiplication after the product):

    s_n = c q.k_n      lse = log2 sum_n 2^s_n      p_n = 2^(s_n - lse)      o = sum_n p_n v_n

Backward, from the gradient g of o. With delta = g.o (since sum_n p_n (g.v_n) = g.o):

    dv_n = sum p_n g      ds_n = p_n (g.v_n - delta)      dq = sum_n ds_n k_n / sqrt(K)      dk_n = sum ds_n q / sqrt(K)

where the sums of dv and dk run over the queries that see key n, of every head in the group. p is made again from lse.
Two kernels: dK and dV keep a tile of keys and walk over queries and heads; dQ keeps a tile of queries and walks over
keys. That is seven products instead of the five of one pass with atomic additions, and the same bits in every run.

Tensor descriptors are made in the kernel: TMA on sm_90, cp.async on sm_80. They bound every access to its row, so any
T, S and head size (a multiple of 8) work, and cost fewer registers than pointers: at K = 128 the forward spills 24
bytes with pointers and none with descriptors (triton 3.9, sm_80, compiled on a CPU, 2026-11-22).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import OPTIONS, architecture, family, with_workspace
from kernels.reference import Documents

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e30)  # a score nobody sees; not -inf, whose difference to itself is NaN
LARGEST_HEAD = 128
DELTA_ROWS = 64


class Tiles(NamedTuple):
    """How a kernel is cut: m query rows and n key rows at a time, warps of a program, stages of its loop's loads."""

    m: int
    n: int
    warps: int
    stages: int


# Tiles that compile without spills and within shared memory, triton 3.6 and 3.9 (bench/bench_tiles.py); the sm_80 ones
# stay within the 99 KiB of sm_86, sm_89 and sm_120. For heads of 128 on sm_90 the best for both of the sweep's shapes
# on an H200 (bench/results/tiles_nvidia_h200.json); the others are the largest, not yet timed.
# (kernel, architecture, padded head size, bytes of a number)
TILES = {
    ("forward", 80, 64, 2): Tiles(128, 64, 8, 3),
    ("forward", 80, 128, 2): Tiles(128, 64, 8, 3),
    ("forward", 90, 64, 2): Tiles(128, 128, 8, 2),
    ("forward", 90, 128, 2): Tiles(64, 64, 4, 3),
    ("forward", 80, 128, 4): Tiles(32, 32, 8, 1),
    ("forward", 90, 128, 4): Tiles(16, 16, 8, 1),
    ("dkdv", 80, 64, 2): Tiles(64, 64, 8, 2),
    ("dkdv", 80, 128, 2): Tiles(64, 64, 8, 2),
    ("dkdv", 90, 64, 2): Tiles(64, 128, 8, 2),
    ("dkdv", 90, 128, 2): Tiles(32, 64, 4, 3),
    ("dkdv", 80, 128, 4): Tiles(32, 32, 8, 1),
    ("dkdv", 90, 128, 4): Tiles(16, 16, 8, 1),
    ("dq", 80, 64, 2): Tiles(128, 64, 8, 2),
    ("dq", 80, 128, 2): Tiles(64, 64, 8, 2),
    ("dq", 90, 64, 2): Tiles(128, 64, 8, 2),
    ("dq", 90, 128, 2): Tiles(64, 32, 4, 2),
    ("dq", 80, 128, 4): Tiles(32, 32, 8, 1),
    ("dq", 90, 128, 4): Tiles(16, 16, 8, 1),
}
OVERRIDE: dict[str, Tiles] = {}  # kernel -> tiles, for the sweep and the tests


def entry(kind: str, arch: int, head: int, itemsize: int) -> tuple[str, int, int, int]:
    """The entry of TILES: kernel "forward", "dkdv" or "dq", an architecture as in sm_90, a head, bytes of a number."""
    # fp32 runs on the CUDA cores. On sm_90 anything larger than 16 x 16 spills 300 to 19,000 bytes (triton 3.6, 3.9).
    return kind, family(arch), 64 if head <= 64 and itemsize == 2 else 128, itemsize


def tiles(kind: str, arch: int, head: int, itemsize: int) -> Tiles:
    """The tiles to use: those of the entry, unless overridden."""
    return OVERRIDE[kind] if kind in OVERRIDE else TILES[entry(kind, arch, head, itemsize)]


def padded(head: int) -> int:
    """The power of two that holds a head; Tensor Cores need 16."""
    return max(16, triton.next_power_of_2(head))


def why_not(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> str | None:
    """Why these tensors cannot go through these kernels, with the remedy; None when they can."""
    step = 16 // q.dtype.itemsize  # descriptors move whole 16 bytes
    if q.shape[3] > LARGEST_HEAD or q.shape[3] % step:
        return (
            f"a head of {q.shape[3]} does not fit it: for {str(q.dtype).removeprefix('torch.')} the kernel takes "
            f"multiples of {step} up to {LARGEST_HEAD}; use the torch backend"
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1 or any(s % step for s in t.stride()[:3]):
            return (
                f"{name} has strides {t.stride()}, and the kernel needs a contiguous last dimension and multiples of "
                f"{step} before it: call .contiguous() on it"
            )
    if documents is not None and not all(d.is_contiguous() and d.device == q.device for d in documents):
        return f"the documents' borders are not contiguous tensors on {q.device}: call .to(device).contiguous() on them"
    return None


@triton.jit
def _head_rows(
    base: tl.tensor,
    strides: tl.tensor,
    b: tl.tensor,
    h: tl.tensor,
    rows: tl.tensor,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """One head of one batch row of a (B, rows, heads, HEAD) tensor as a descriptor that moves BLOCK rows at a time."""
    start = base + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[2]
    return tl.make_tensor_descriptor(start, [rows, HEAD], [strides[1], 1], [BLOCK, BLOCK_K])


@triton.jit
def _forward_loop(
    acc: tl.tensor,
    total: tl.tensor,
    top: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    fork: tl.tensor,
    own: tl.tensor,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    BRANCHED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Take the key tiles low .. high into the running sum, its weight total and the largest score top."""
    for n0 in range(low, high, BLOCK_N):
        k = keys.load([n0, 0])
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            n = n0 + tl.arange(0, BLOCK_N)
            seen = position[:, None] >= n[None, :]
            if PACKED:
                seen = seen & (n[None, :] >= first[:, None])
            if BRANCHED:
                seen = seen & ((n[None, :] < fork[:, None]) | (n[None, :] >= own[:, None]))
            s = tl.where(seen, s * c, HIDDEN)
            new_top = tl.maximum(top, tl.max(s, 1))
            # A row that has seen no key yet keeps top = HIDDEN: measured from 0, what is hidden has 2^HIDDEN = 0.
            level = tl.where(new_top > HIDDEN, new_top, 0.0)
            p = tl.math.exp2(s - level[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * c)
            p = tl.math.exp2(s * c - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = values.load([n0, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def _key_range(
    START: tl.tensor,
    m0: tl.tensor,
    b: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """Which keys a tile of queries needs: first, from where no row is cut at the left, from where causally, end."""
    p0 = m0 + S - T
    end = tl.minimum(p0 + BLOCK_M, S)
    causal = (p0 + 1) // BLOCK_N * BLOCK_N
    if PACKED:
        START += b.to(tl.int64) * S
        low = tl.load(START + p0) // BLOCK_N * BLOCK_N
        whole = (tl.load(START + end - 1) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        whole = tl.minimum(tl.maximum(whole, low), tl.maximum(causal, low))
        causal = tl.maximum(causal, whole)
    else:
        low = 0
        whole = 0
    return low, whole, causal, end


@triton.jit
def attention_forward_kernel(
    Q: tl.tensor,
    q_strides: tl.tensor,
    K: tl.tensor,
    k_strides: tl.tensor,
    V: tl.tensor,
    v_strides: tl.tensor,
    OUT: tl.tensor,
    o_strides: tl.tensor,
    LSE: tl.tensor,
    START: tl.tensor,
    FORK: tl.tensor,
    OWN: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    BRANCHED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of queries of one head: o and lse (B, H, T)."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows first
    h, b = tl.program_id(1), tl.program_id(2)
    queries = _head_rows(Q, q_strides, b, h, T, HEAD, BLOCK_M, BLOCK_K)
    keys = _head_rows(K, k_strides, b, h // GROUP, S, HEAD, BLOCK_N, BLOCK_K)
    values = _head_rows(V, v_strides, b, h // GROUP, S, HEAD, BLOCK_N, BLOCK_K)
    out = _head_rows(OUT, o_strides, b, h, T, HEAD, BLOCK_M, BLOCK_K)
    low, whole, causal, end = _key_range(START, m0, b, T, S, BLOCK_M, BLOCK_N, PACKED)
    m = m0 + tl.arange(0, BLOCK_M)
    position = m + S - T
    first, fork, own = m, m, m
    if PACKED:
        first = tl.load(START + b.to(tl.int64) * S + position, mask=m < T, other=0)
    if BRANCHED:
        fork = tl.load(FORK + b.to(tl.int64) * S + position, mask=m < T, other=0)
        own = tl.load(OWN + b.to(tl.int64) * S + position, mask=m < T, other=0)
        whole = causal  # a branch may begin behind any key: every tile is masked
    c: tl.constexpr = SCALE * LOG2_E
    q = queries.load([m0, 0])
    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if PACKED:
        acc, total, top = _forward_loop(
            acc, total, top, q, keys, values, low, whole, position, first, fork, own, c, BLOCK_N, True,
            PACKED, BRANCHED, PRECISION,
        )  # fmt: skip
    acc, total, top = _forward_loop(
        acc, total, top, q, keys, values, whole, causal, position, first, fork, own, c, BLOCK_N, False,
        PACKED, BRANCHED, PRECISION,
    )  # fmt: skip
    acc, total, top = _forward_loop(
        acc, total, top, q, keys, values, causal, end, position, first, fork, own, c, BLOCK_N, True,
        PACKED, BRANCHED, PRECISION,
    )  # fmt: skip
    out.store([m0, 0], (acc / total[:, None]).to(q.dtype))
    at = (b.to(tl.int64) * tl.num_programs(1) + h) * T + m
    tl.store(LSE + at, top + tl.math.log2(total), mask=m < T)


@triton.jit
def attention_delta_kernel(
    OUT: tl.tensor,
    DO: tl.tensor,
    DELTA: tl.tensor,
    T: tl.tensor,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """delta (B, H, T) = sum over a head of o * gradient, both (B, T, H, HEAD) and contiguous."""
    h, b, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_K)
    at = ((b * T + m[:, None]) * H + h) * HEAD + j[None, :]
    inside = (m[:, None] < T) & (j[None, :] < HEAD)
    o = tl.load(OUT + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(DO + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(DELTA + (b * H + h) * T + m, tl.sum(o * g, 1), mask=m < T)


@triton.jit
def attention_dkdv_kernel(
    Q: tl.tensor,
    q_strides: tl.tensor,
    K: tl.tensor,
    k_strides: tl.tensor,
    V: tl.tensor,
    v_strides: tl.tensor,
    DO: tl.tensor,
    o_strides: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    dk_strides: tl.tensor,
    LSE: tl.tensor,
    DELTA: tl.tensor,
    START: tl.tensor,
    END: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of keys of one key/value head: dk and dv, over the queries of the whole group.

    One loop that always masks: split like the forward, its three bodies spill 340 bytes on sm_90 (triton 3.9).
    """
    n0 = tl.program_id(0) * BLOCK_N
    g, b = tl.program_id(1), tl.program_id(2)
    past = S - T
    keys = _head_rows(K, k_strides, b, g, S, HEAD, BLOCK_N, BLOCK_K)
    values = _head_rows(V, v_strides, b, g, S, HEAD, BLOCK_N, BLOCK_K)
    k, v = keys.load([n0, 0]), values.load([n0, 0])
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    n = n0 + tl.arange(0, BLOCK_N)
    low = tl.maximum(n0 - past, 0) // BLOCK_M * BLOCK_M
    high = T
    if PACKED:
        START += b.to(tl.int64) * S + past
        high = tl.load(END + b.to(tl.int64) * S + tl.minimum(n0 + BLOCK_N, S) - 1) - past
        high = tl.minimum(high, T)
    c: tl.constexpr = SCALE * LOG2_E
    for i in range(0, GROUP):
        h = g * GROUP + i
        queries = _head_rows(Q, q_strides, b, h, T, HEAD, BLOCK_M, BLOCK_K)
        gradients = _head_rows(DO, o_strides, b, h, T, HEAD, BLOCK_M, BLOCK_K)
        row = (b.to(tl.int64) * (tl.num_programs(1) * GROUP) + h) * T
        for m0 in range(low, high, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            q = queries.load([m0, 0])
            lse = tl.load(LSE + row + m, mask=m < T, other=0.0)
            p = tl.math.exp2(tl.dot(k, q.T, input_precision=PRECISION) * c - lse[None, :])
            seen = (m + past)[None, :] >= n[:, None]
            if PACKED:
                first = tl.load(START + m, mask=m < T, other=0)
                seen = seen & (n[:, None] >= first[None, :])
            p = tl.where(seen, p, 0.0)
            do = gradients.load([m0, 0])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            delta = tl.load(DELTA + row + m, mask=m < T, other=0.0)
            ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_out = _head_rows(DK, dk_strides, b, g, S, HEAD, BLOCK_N, BLOCK_K)
    dv_out = _head_rows(DV, dk_strides, b, g, S, HEAD, BLOCK_N, BLOCK_K)
    dk_out.store([n0, 0], (dk * SCALE).to(k.dtype))
    dv_out.store([n0, 0], dv.to(k.dtype))


@triton.jit
def _dq_loop(
    dq: tl.tensor,
    q: tl.tensor,
    do: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Add to dq what the key tiles low .. high give."""
    for n0 in range(low, high, BLOCK_N):
        k = keys.load([n0, 0])
        v = values.load([n0, 0])
        p = tl.math.exp2(tl.dot(q, k.T, input_precision=PRECISION) * c - lse[:, None])
        if MASKED:
            n = n0 + tl.arange(0, BLOCK_N)
            seen = position[:, None] >= n[None, :]
            if PACKED:
                seen = seen & (n[None, :] >= first[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq_kernel(
    Q: tl.tensor,
    q_strides: tl.tensor,
    K: tl.tensor,
    k_strides: tl.tensor,
    V: tl.tensor,
    v_strides: tl.tensor,
    DO: tl.tensor,
    DQ: tl.tensor,
    o_strides: tl.tensor,
    LSE: tl.tensor,
    DELTA: tl.tensor,
    START: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of queries of one head: dq."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1), tl.program_id(2)
    queries = _head_rows(Q, q_strides, b, h, T, HEAD, BLOCK_M, BLOCK_K)
    gradients = _head_rows(DO, o_strides, b, h, T, HEAD, BLOCK_M, BLOCK_K)
    keys = _head_rows(K, k_strides, b, h // GROUP, S, HEAD, BLOCK_N, BLOCK_K)
    values = _head_rows(V, v_strides, b, h // GROUP, S, HEAD, BLOCK_N, BLOCK_K)
    out = _head_rows(DQ, o_strides, b, h, T, HEAD, BLOCK_M, BLOCK_K)
    low, whole, causal, end = _key_range(START, m0, b, T, S, BLOCK_M, BLOCK_N, PACKED)
    m = m0 + tl.arange(0, BLOCK_M)
    position = m + S - T
    first = m
    if PACKED:
        first = tl.load(START + b.to(tl.int64) * S + position, mask=m < T, other=0)
    row = (b.to(tl.int64) * tl.num_programs(1) + h) * T
    lse = tl.load(LSE + row + m, mask=m < T, other=0.0)
    delta = tl.load(DELTA + row + m, mask=m < T, other=0.0)
    c: tl.constexpr = SCALE * LOG2_E
    q, do = queries.load([m0, 0]), gradients.load([m0, 0])
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if PACKED:
        dq = _dq_loop(
            dq, q, do, lse, delta, keys, values, low, whole, position, first, c, BLOCK_N, True, PACKED, PRECISION
        )
    dq = _dq_loop(
        dq, q, do, lse, delta, keys, values, whole, causal, position, first, c, BLOCK_N, False, PACKED, PRECISION
    )
    dq = _dq_loop(
        dq, q, do, lse, delta, keys, values, causal, end, position, first, c, BLOCK_N, True, PACKED, PRECISION
    )
    out.store([m0, 0], (dq * SCALE).to(q.dtype))


def _launch_facts(kind: str, q: Tensor, k: Tensor, documents: bool) -> tuple[Tiles, dict[str, object]]:
    """The tiles of a kernel, and the constants it is compiled for."""
    K = q.shape[3]
    cut = tiles(kind, architecture(q.device), padded(K), q.dtype.itemsize)
    # fp32 products at fp32's precision, as torch's own by default; in TF32 where torch is told so (--tf32).
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return cut, {
        "SCALE": K**-0.5,
        "GROUP": q.shape[2] // k.shape[2],
        "HEAD": K,
        "BLOCK_K": padded(K),
        "BLOCK_M": cut.m,
        "BLOCK_N": cut.n,
        "PACKED": documents,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": cut.warps,
        "num_stages": cut.stages,
        **OPTIONS,
    }


@torch.library.custom_op("chatdoctor::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    fork: Tensor | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, K) in q.dtype and the base-2 log-sum-exp of the scores, fp32 (B, H, T). end only passes through.

    There is no gradient of documents that branch (fork, own).
    """
    for t in (q, k, v):  # asked here, since torch.compile cannot trace an address
        if t.data_ptr() % 16:
            raise ValueError("attention: q, k and v must start at a multiple of 16 bytes: call .contiguous() on them")
    B, T, H, K = q.shape
    o = q.new_empty(B, T, H, K)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    cut, constants = _launch_facts("forward", q, k, start is not None)
    with_workspace()
    attention_forward_kernel[(triton.cdiv(T, cut.m), H, B)](
        q,
        q.stride()[:3],
        k,
        k.stride()[:3],
        v,
        v.stride()[:3],
        o,
        o.stride()[:3],
        lse,
        start,
        fork,
        own,
        T,
        k.shape[1],
        BRANCHED=fork is not None,
        **constants,
    )
    return o, lse


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    fork: Tensor | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    return q.new_empty(B, T, H, K), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("chatdoctor::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, start: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of attention_forward from the gradient do of o, each contiguous in the shape of what it is of."""
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    do = do.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    delta = torch.empty_like(lse)
    attention_delta_kernel[(triton.cdiv(T, DELTA_ROWS), H, B)](
        o, do, delta, T, HEAD=K, BLOCK_K=padded(K), BLOCK_M=DELTA_ROWS, **OPTIONS
    )
    inputs = (q, q.stride()[:3], k, k.stride()[:3], v, v.stride()[:3], do)
    cut, constants = _launch_facts("dkdv", q, k, start is not None)
    with_workspace()
    attention_dkdv_kernel[(triton.cdiv(S, cut.n), G, B)](
        *inputs, do.stride()[:3], dk, dv, dk.stride()[:3], lse, delta, start, end, T, S, **constants
    )
    cut, constants = _launch_facts("dq", q, k, start is not None)
    attention_dq_kernel[(triton.cdiv(T, cut.m), H, B)](
        *inputs, dq, do.stride()[:3], lse, delta, start, T, S, **constants
    )
    return dq, dk, dv


@attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, start: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, end, _, _ = inputs
    ctx.save_for_backward(q, k, v, *output, start, end)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: FunctionCtx, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 7
    return *attention_backward(do, *ctx.saved_tensors), None, None, None, None


attention_forward.register_autograd(_gradients, setup_context=_keep)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """kernels.reference.attention by these kernels; q, k, v as the seam has checked them."""
    return attention_forward(q, k, v, *(documents or (None, None)))[0]
