"""The operations of a LLaMA block in plain PyTorch: the definition of right.

What is computed in fp32 is decided here and quoted by every other implementation. Runs on any device; on a CPU it
is also the fast path, so the shapes of the work (tiles, chunks) are chosen for one. Knows tensors, not models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

TILE = 128  # query rows per tile where documents or a cache bound what a row may see
CALL = 20_000  # numbers of k that are read while attention of one row is called
LOGITS_BYTES = 64 * 2**20  # fp32 logits held at a time by linear_cross_entropy
CODES = 2**20  # numbers of keys, and of values, made from codes at a time: 4 MiB in fp32, near enough to two cores
DEQUANTISED = 2**22  # numbers made from codes at a time: 16 MiB in fp32, whatever the matrix
ADAMW_NUMBERS = 2**18  # of a parameter at a time: what adamw needs beside it stays in the cache

Documents = tuple[Tensor, ...]
Scales = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector of x to root mean square 1, then by weight.

    x (..., D), any float dtype; weight (D,). Result (..., D) in x.dtype. The mean is taken in fp32: bf16 carries 8
    significant bits, too few to sum D = 4096 squares. The cast back comes before the weight, as in Meta's model.py
    and Hugging Face's. After Zhang & Sennrich 2019 (arXiv:1910.07467).
    """
    if x.dtype == torch.float32 and not torch.is_grad_enabled():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd).to(x.dtype) * weight


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, K) and k (B, T, G, K) by position, in the rotate-half layout.

    cos, sin fp32, (T, K/2) or (B, T, K/2). Computed in fp32, returned in the dtype given.
    After Su et al. 2021 (arXiv:2104.09864).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    low = torch.addcmul(a * cos, b, sin, value=-1)
    high = torch.addcmul(b * cos, a, sin)
    return torch.cat((low, high), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the dtype given. After Shazeer 2020 (arXiv:2002.05202)."""
    return F.silu(gate) * up


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Causal softmax attention with grouped queries; result (B, T, H, K) in q.dtype.

    q (B, T, H, K); k, v (B, S, G, K) with S >= T and H a multiple of G: the T queries are the last of the S
    positions, so a cached prefix is simply a longer k and v. documents: (start, end) int32 (B, S), the first and one
    past the last position of each position's document; a query sees start[its position] .. its position. Where a
    document branches, (start, end, fork, own): without fork[its position] .. own[its position] - 1, which are other
    branches behind the same beginning; both are alike where there are none. The softmax scale is 1 / sqrt(K); the
    softmax runs in fp32.
    """
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    branches = documents is not None and len(documents) > 2
    if T == 1 and not branches:
        # The group's query heads stand in as rows of one head: no copy of the cache per query head.
        q = q.reshape(B, G, H // G, K)
        if documents is None:
            return F.scaled_dot_product_attention(q, k, v).reshape(B, 1, H, K)
        if q.is_cpu and not torch.compiler.is_compiling():
            return _each_row(q, k, v, documents[0][:, -1].tolist()).reshape(B, 1, H, K)
        mask = _visible(documents[0], S - 1, S, 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, 1, H, K)
    if documents is None and T == S:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        return o.transpose(1, 2)
    start = None if documents is None else documents[0]
    tiles = []
    for i in range(0, T, TILE):
        top, bottom = S - T + i, S - T + min(i + TILE, T)  # these queries' positions
        # A compiled graph cannot depend on values: there every tile starts at 0, and the mask does the rest.
        free = start is None or torch.compiler.is_compiling()
        left = 0 if free else int(start[:, top:bottom].min())
        mask = _visible(start, top, bottom, left, q.device)
        seen_k, seen_v = k[:, :, left:bottom], v[:, :, left:bottom]
        if branches:
            mask, seen_k, seen_v = _without_siblings(
                mask, seen_k, seen_v, *(t[:, top:bottom] - left for t in documents[2:])
            )
        tiles.append(
            F.scaled_dot_product_attention(q[:, :, i : i + TILE], seen_k, seen_v, attn_mask=mask, enable_gqa=H != G)
        )
    return torch.cat(tiles, dim=2).transpose(1, 2)


def _without_siblings(mask: Tensor, k: Tensor, v: Tensor, fork: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's mask (B, 1, rows, columns), keys and values without what other branches hold: columns fork .. own - 1.

    What no row of the tile sees is left out, where that is enough to be worth a copy of the rest.
    """
    columns = torch.arange(mask.shape[-1], device=mask.device)
    mask = mask & ((columns < fork[..., None]) | (columns >= own[..., None]))[:, None]
    if torch.compiler.is_compiling():
        return mask, k, v
    first, last = int(fork.max()), int(own.min())
    if last - first < TILE:
        return mask, k, v
    mask = torch.cat((mask[..., :first], mask[..., last:]), -1)
    return mask, *(torch.cat((t[:, :, :first], t[:, :, last:]), 2) for t in (k, v))


def attention_bounded(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """attention() where only the first `length` (int32 (1,)) positions of k and v are there; nothing waits for it."""
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    columns, rows = torch.arange(S, device=q.device), torch.arange(T, device=q.device)
    mask = columns <= (length - T + rows)[:, None]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if T == 1:
        return F.scaled_dot_product_attention(q.reshape(B, G, H // G, K), k, v, attn_mask=mask).reshape(B, 1, H, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != G).transpose(1, 2)


def to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) as int8 codes and a scale for each K numbers, fp32 (...): the largest magnitude is 127 scales.

    A scale is 1e-30 at least, also of zeros. In 16 bits it would save 2 bytes of K + 4, and be out of its range where
    numbers are small.
    """
    x = x.float()
    scales = (x.abs().amax(-1) / 127).clamp_min(1e-30)
    return (x / scales[..., None]).round_().to(torch.int8), scales


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers (..., K) that to_codes' results stand for, multiplied in fp32 and rounded once to dtype."""
    return codes.float().mul_(scales[..., None]).to(dtype)


def attention_of_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Scales,
    documents: Documents | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """attention(), or with a length attention_bounded(), of k and v (B, S, G, K) as to_codes makes them; no gradient.

    scales: k's and v's, fp32 (B, S, G). For one query a row, scales multiply scores and probabilities, all in fp32; for
    more, k and v are made in q.dtype. Either way it happens to a few heads at a time.
    """
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if T == 1:
        return _one_query_of_codes(q, k, v, scales, documents, length)
    some = max(1, CODES // (B * S * K))
    parts = []
    for g in range(0, G, some):
        heads, part = slice(g * (H // G), (g + some) * (H // G)), slice(g, g + some)
        some_k, some_v = (
            from_codes(t[:, :, part], s[:, :, part], q.dtype) for t, s in zip((k, v), scales, strict=True)
        )
        if length is None:
            parts.append(attention(q[:, :, heads], some_k, some_v, documents))
        else:
            parts.append(attention_bounded(q[:, :, heads], some_k, some_v, length))
    return torch.cat(parts, 2)


def _one_query_of_codes(
    q: Tensor, k: Tensor, v: Tensor, scales: Scales, documents: Documents | None, length: Tensor | None
) -> Tensor:
    B, _, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    hidden = None
    if length is not None:
        hidden = torch.arange(S, device=q.device) >= length
    elif documents is not None and q.is_cpu and not torch.compiler.is_compiling():
        starts = documents[0][:, -1].tolist()
        left = min(starts)
        if _apart(starts, G * K):
            tensors = zip(q.split(1), k.split(1), v.split(1), *(s.split(1) for s in scales), starts, strict=True)
            each = ((a, *(t[:, i:] for t in others)) for a, *others, i in tensors)
            return torch.cat([_one_query_of_codes(a, b, c, (d, e), None, None) for a, b, c, d, e in each])
        k, v, scales = k[:, left:], v[:, left:], (scales[0][:, left:], scales[1][:, left:])
        if max(starts) > left:
            hidden = (torch.arange(left, S) < torch.tensor(starts)[:, None])[:, None, None]
    elif documents is not None:
        hidden = ~_visible(documents[0], S - 1, S, 0)
    heads = [t.transpose(1, 2) for t in (k, v, *scales)]
    rows = q.float().view(B, G, H // G, K) * K**-0.5
    some = max(1, CODES // (B * k.shape[1] * K))
    if some >= G:
        return _of_codes(rows, *heads, hidden).to(q.dtype).view(B, 1, H, K)
    parts = [_of_codes(*(t[:, g : g + some] for t in (rows, *heads)), hidden) for g in range(0, G, some)]
    return torch.cat(parts, 1).to(q.dtype).view(B, 1, H, K)


def _of_codes(rows: Tensor, k: Tensor, v: Tensor, k_scales: Tensor, v_scales: Tensor, hidden: Tensor | None) -> Tensor:
    """rows (B, G, H / G, K), fp32 and scaled, over k, v (B, G, S, K) and their scales (B, G, S)."""
    scores = (rows @ k.float().mT).mul_(k_scales[:, :, None])
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    return scores.softmax(-1).mul_(v_scales[:, :, None]) @ v.float()


def _each_row(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """q (B, G, H / G, K) over the positions of k, v (B, G, S, K) from each row's start on.

    A call for each row reads no more than the row; one call with a mask reads the longest in every row. 32 rows of 20
    to 330 positions, 6 layers, 6 heads of 48, one thread of an EPYC (Zen 5): 8.3 ms instead of 11.3.
    """
    S, left = k.shape[2], min(starts)
    if _apart(starts, k.shape[1] * k.shape[3]):
        rows = zip(q.split(1), k.split(1), v.split(1), starts, strict=True)
        return torch.cat([F.scaled_dot_product_attention(a, b[:, :, i:], c[:, :, i:]) for a, b, c, i in rows])
    mask = None
    if max(starts) > left:
        mask = (torch.arange(left, S) >= torch.tensor(starts)[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k[:, :, left:], v[:, :, left:], attn_mask=mask)


def _apart(starts: list[int], numbers: int) -> bool:
    """Whether rows of so many numbers a position differ so much in length that a call for each takes less time."""
    return (sum(starts) - min(starts) * len(starts)) * numbers > CALL * len(starts)


def _visible(start: Tensor | None, top: int, bottom: int, left: int, device: torch.device | None = None) -> Tensor:
    """True where positions top..bottom may see positions left..bottom: (rows, columns) or (B, 1, rows, columns)."""
    device = device if start is None else start.device
    columns = torch.arange(left, bottom, device=device)
    causal = columns <= torch.arange(top, bottom, device=device)[:, None]
    if start is None:
        return causal
    return (causal & (columns >= start[:, top:bottom, None]))[:, None]


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made with the loss, chunk by chunk, so that no more than LOGITS_BYTES of logits ever live."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, token_weights: Tensor | None
    ) -> Tensor:
        counts = targets != ignore_index
        if token_weights is not None:
            counts &= token_weights != 0
        kept = counts.nonzero().squeeze(1)
        x_kept, t_kept = x.index_select(0, kept), targets.index_select(0, kept)
        weights = None if token_weights is None else token_weights.index_select(0, kept)[:, None]
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.zeros_like(x) if need_x else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        loss = x.new_zeros((), dtype=torch.float32)
        rows = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
        for i in range(0, len(kept), rows):
            xc, tc = x_kept[i : i + rows], t_kept[i : i + rows, None]
            logits = F.linear(xc, weight).float()
            lse = torch.logsumexp(logits, dim=1, keepdim=True)
            losses = lse - logits.gather(1, tc)
            wc = None if weights is None else weights[i : i + rows]
            loss += losses.sum() if wc is None else (losses * wc).sum()
            if not (need_x or need_w):
                continue
            p = logits.sub_(lse).exp_()
            p.scatter_add_(1, tc, torch.full_like(lse, -1.0))
            if wc is not None:
                p *= wc
            p = p.to(x.dtype)
            if dx is not None:
                dx.index_copy_(0, kept[i : i + rows], p @ weight)
            if dw is not None:
                if p.dtype == torch.float32:
                    dw.addmm_(p.t(), xc)
                else:
                    dw += p.t() @ xc
        ctx.save_for_backward(*(t for t in (dx, dw) if t is not None))
        ctx.needs = (need_x, need_w, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        saved = list(ctx.saved_tensors)
        need_x, need_w, dtype = ctx.needs
        dx = saved.pop(0) * grad if need_x else None
        dw = (saved.pop(0) * grad).to(dtype) if need_w else None
        return (None if dx is None else dx.to(dtype)), dw, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, token_weights: Tensor | None = None
) -> Tensor:
    """Sum over the rows of token_weights * cross_entropy(x @ weight.T, targets), fp32, without ever holding all logits.

    x (N, D), weight (V, D), targets (N,) int64, token_weights (N,) fp32 or None for ones; rows whose target is
    ignore_index or whose weight is 0 count nothing and cost nothing. Softmax and sum in fp32. No gradient for
    token_weights, and no second derivative.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, ignore_index, token_weights)


def dequantise(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that codes stand for: (u - 2^(bits-1)) * scale of its group, in fp32, rounded once to dtype.

    codes uint8 (out, in * bits / 8), u unsigned. 4 bits: number 2j of a row is the low half of byte j, 2j + 1 the high
    one, as in the bytes of compressed-tensors' little-endian "pack-quantized" words. scales (out, groups) of any float
    type and sign: each for in / groups numbers in a row.
    """
    rows, groups = scales.shape
    weight = torch.empty(rows, codes.shape[1] * 8 // bits, dtype=dtype, device=codes.device)
    some = max(1, DEQUANTISED // max(1, weight.shape[1]))
    for i in range(0, rows, some):
        u = codes[i : i + some]
        u = torch.stack((u & 15, u >> 4), -1) if bits == 4 else u
        q = u.float().reshape(len(u), groups, -1) - 2 ** (bits - 1)
        weight[i : i + some] = (q * scales[i : i + some, :, None].float()).flatten(1)
    return weight


def quantised_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x (..., in) @ dequantise(codes, scales, bits, x.dtype).T, accumulated in fp32."""
    return F.linear(x, dequantise(codes, scales, bits, x.dtype))


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose halves these are: high bf16, low int16. See split."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers as two halves without loss: rounded to bf16 (half-way cases away from 0), and the rest as int16."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.short().view(torch.bfloat16), (bits - (high << 16)).short()


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
    """One AdamW update of a flat parameter in place, in fp32; the arguments of kernels.adamw."""
    for at in range(0, weight.numel(), ADAMW_NUMBERS):
        part = slice(at, at + ADAMW_NUMBERS)
        w = weight[part] if low is None else joined(weight[part], low[part])
        g = gradient[part].float() * scale
        m = torch.lerp(exp_avg[part].float(), g, 1 - beta1)
        v = torch.addcmul(exp_avg_sq[part].float() * beta2, g, g, value=1 - beta2)
        w = w * keep - rate * (m / (v.sqrt() / root + eps))
        if low is None:
            weight[part] = w
        else:
            weight[part], low[part] = split(w)
        if exp_avg.dtype == torch.bfloat16:
            random = _random_bits(at, len(w), seed, w.device)
            m, v = _rounded_at_random(m, random & 0xFFFF), _rounded_at_random(v, random >> 16)
        exp_avg[part], exp_avg_sq[part] = m, v


def _random_bits(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """32 bits of each place, as int64, that look random: a hash of place and seed (Wellons' finaliser)."""
    mask = 0xFFFFFFFF
    x = (torch.arange(first, first + count, device=device) ^ seed) & mask
    x = (x ^ (x >> 16)) * 0x7FEB352D & mask
    x = (x ^ (x >> 15)) * 0x846CA68B & mask
    return x ^ (x >> 16)


def _rounded_at_random(x: Tensor, random: Tensor) -> Tensor:
    """fp32 x as bf16, rounded up in magnitude with the probability of what is cut off; random: 16 bits each."""
    return ((x.view(torch.int32) + random.int()) >> 16).short().view(torch.bfloat16)
