"""Products of a few rows with large weights on the CPU, at the speed of memory.

Decoding multiplies one row per sequence with every weight; the time is that of reading the weights, and F.linear reads
them at a third of the memory's speed. lay_out() acts on a finished module that only decodes from then on;
generation.py calls it. Knows torch.nn, not LLaMA.

Weights may be 16-bit or quantised; what lies between two products is fp32 then, for on a CPU the small operations are
faster in fp32 (torch 2.13: attention of one query 5 times, a norm twice) and lose nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from llama.quantize import GROUPS, Packed, QuantisedLinear

NARROW = (torch.bfloat16, torch.float16)
SMALLEST = 65_536  # elements; below, the extra call costs what it wins
MOST_ROWS_INT8 = 16  # beyond, a bf16 copy made for the call is faster; (4096, 768), 2 threads of an EPYC (Zen 4)
COPIED = 2**22  # numbers of that copy at a time: one of (32000, 768) whole takes 3 times as long, in fresh memory
MOST_ROWS_INT4 = 96
MOST_ROWS_FP16 = 3  # beyond, fp32 copies made for the call are faster than a product a row
WIDENED = 2**20  # numbers of such a copy at a time, which the cache holds; with 2^18 or 2^22 it takes 1.1 times as long
STEP = 16


class SplitLinear(nn.Module):
    """nn.Linear without bias for fp32, its weight (out, in) stored transposed and read by all threads at once.

    For one row the sum over `in` is cut into one part per thread, the parts are a batched product and are added up.
    F.linear against this, us, 2 threads of an AMD EPYC (Zen 4), torch 2.13, MKL: (288, 288) 44 / 30, (768, 768)
    194 / 111, (768, 2048) 429 / 331, (2048, 768) 509 / 253, (32000, 288) 4434 / 1155, (32000, 768) 9375 / 2701.
    More rows go to oneDNN, which takes the transposed weight as it lies; us of (2304, 768) by the number of rows:
    F.linear 585 (2), 653 (8), 1223 (32), the parts 228, 448, 1205, oneDNN 217, 297, 499.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().t().contiguous().t(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out, width = self.weight.shape
        rows = x.numel() // width
        if rows > 1:
            if not has_onednn():
                return F.linear(x, self.weight)
            return _by_onednn(x, self.weight, out)
        parts = torch.get_num_threads()
        while width % parts:
            parts -= 1
        x_parts = x.reshape(rows, parts, width // parts).transpose(0, 1)
        sums = torch.bmm(x_parts, self.weight.t().view(parts, width // parts, out))
        return sums.sum(0).view(*x.shape[:-1], out)


def _by_onednn(x: Tensor, weight: Tensor, out: int) -> Tensor:
    """x (..., in) times a weight (out, in), in a number of rows that oneDNN has met before.

    It compiles and keeps a kernel for every number of rows: 0.4 ms, and 0.6 MB and more, up to 1,024 of them. Beyond
    STEP rows, zeros make them a multiple of STEP.
    """
    rows = _whole_steps(x.reshape(-1, x.shape[-1]))
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return y[: x.numel() // x.shape[-1]].view(*x.shape[:-1], out)


def _whole_steps(rows: Tensor) -> Tensor:
    more = -len(rows) % STEP if len(rows) > STEP else 0
    return F.pad(rows, (0, 0, 0, more)) if more else rows


class PackedLinear(nn.Module):
    """nn.Linear without bias for bf16 weights and fp32 rows, its weight in oneDNN's own order and nowhere else.

    F.linear against this, us per row, as above: (768, 768) 221 / 138, (768, 2048) 358 / 263, (4096, 768) 709 / 357,
    (32000, 288) 3012 / 939, (32000, 768) 5559 / 2705. has_packed() says whether it can run.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out = len(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return _by_onednn(x.bfloat16(), self.packed, self.out).float()


class HalfLinear(nn.Module):
    """nn.Linear without bias for fp16 weights and fp32 rows.

    PyTorch's product of one fp16 row is as fast as any, but more rows are so many products, and oneDNN has fp16 on few
    CPUs. So they meet the weight in fp32, a piece at a time. us of (4096, 768), one thread of an EPYC (Zen 4), torch
    2.13, for 1, 8, 64, 256 rows: F.linear 267, 2057, 16049, 63656, this 267, 908, 2412, 7511; beside it fp32 540, 1306,
    2688, 7480, bf16 (PackedLinear) 217, 299, 1088, 3599.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        width = self.weight.shape[1]
        if x.numel() <= MOST_ROWS_FP16 * width:
            return F.linear(x.half(), self.weight).float()
        multiply = _by_onednn if has_onednn() else lambda rows, weight, _: F.linear(rows, weight)
        pieces = self.weight.split(max(1, WIDENED // width))
        return torch.cat([multiply(x, piece.float(), len(piece)) for piece in pieces], dim=-1)


class NarrowLinear(nn.Module):
    """nn.Linear without bias for bf16 weights and fp32 rows, where there is no PackedLinear."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight).float()


class Int8Linear(nn.Module):
    """A product with whole numbers of 8 bits and one scale per row, for fp32 rows, by PyTorch's kernel for bf16 rows.

    us per row as above, weights not in the cache: (2304, 768) 61, (4096, 768) 98, (32000, 768) 765; PackedLinear in the
    same run 97, 165, 1070.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.q = (packed.codes ^ 0x80).view(torch.int8)
        self.scales = packed.scales.view(-1).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        if len(rows) <= MOST_ROWS_INT8:
            y = torch._weight_int8pack_mm(rows, self.q, self.scales)
        else:
            some, n = max(1, COPIED // self.q.shape[1]), len(rows)
            rows = _whole_steps(rows)
            y = torch.cat([F.linear(rows, q.bfloat16())[:n] for q in self.q.split(some)], dim=1).mul_(self.scales)
        return y.float().view(*x.shape[:-1], len(self.q))


class Int4Linear(nn.Module):
    """A product with whole numbers of 4 bits in groups, for fp32 rows, by PyTorch's kernel for bf16 rows.

    us per row as above: (2304, 768) 40, (4096, 768) 64, (32000, 768) 450. For many rows a bf16 copy is made from the
    kernel's own order of codes, where that order is the known one: a prompt of 256 takes 0.6 of the kernel's time.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        codes, scales = packed
        self.out, self.width = len(codes), 2 * codes.shape[1]
        self.group = self.width // scales.shape[1]
        q = torch.stack((codes & 15, codes >> 4), dim=-1).view(self.out, self.width)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        steps = scales.t().bfloat16()
        self.scales = torch.stack((steps, torch.zeros_like(steps)), dim=-1).contiguous()
        self.legible = self.out % INT4_BLOCK == 0 and int4_order_is_known()

    @staticmethod
    def takes(packed: Packed) -> bool:
        """Whether the kernel can multiply by a weight of this shape."""
        out, width = len(packed.codes), 2 * packed.codes.shape[1]
        return out % 16 == 0 and width // packed.scales.shape[1] in GROUPS

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.width).bfloat16()
        if len(rows) <= MOST_ROWS_INT4 or not self.legible:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scales)
        else:
            y = rows @ self._transposed()
        return y.float().view(*x.shape[:-1], self.out)

    def _transposed(self) -> Tensor:
        """The weight as bf16 (in, out)."""
        low, high = int4_halves(self.packed, self.width)
        scales = self.scales[..., 0].view(-1, 1, self.out // INT4_BLOCK, INT4_BLOCK)
        weight = torch.empty(len(scales), self.group, *scales.shape[2:], dtype=torch.bfloat16)
        for half, part in ((low, slice(0, INT4_BLOCK // 2)), (high, slice(INT4_BLOCK // 2, INT4_BLOCK))):
            q = half.view(torch.int8).sub_(8).view(-1, len(scales), self.group, INT4_BLOCK // 2)
            torch.mul(q.permute(1, 2, 0, 3), scales[..., part], out=weight[..., part])
        return weight.view(self.width, self.out)


INT4_BLOCK = 64  # outputs whose codes lie together in the order of PyTorch's AVX-512 kernel


def int4_halves(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 (out / 64, in, 32) of the first and the last 32 outputs of each block, in that order."""
    codes = packed.view(-1, width, INT4_BLOCK // 2)
    return codes & 15, codes >> 4


@functools.cache
def int4_order_is_known() -> bool:
    """Whether this torch, on this CPU, packs codes as int4_halves() reads them."""
    q = torch.randint(16, (INT4_BLOCK, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return torch.equal(torch.cat(int4_halves(packed, 32), dim=-1)[0].t(), q)


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN's products. The operators are torch.compile's and not documented."""
    ops = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in ops)


def has_packed() -> bool:
    """Whether this machine and this torch can run PackedLinear."""
    return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def faster(linears: Sequence[nn.Module]) -> nn.Module | None:
    """The module that multiplies fp32 rows by all of these weights at once, faster than they do one by one.

    None where there is none. On a CPU 16-bit and quantised weights always get one, for theirs are not fp32 rows; on a
    GPU only several weights gain, by being one.
    """
    if any(child.bias is not None for child in linears if isinstance(child, nn.Linear)):
        return None
    if all(type(child) is nn.Linear for child in linears):
        weights = [child.weight.detach() for child in linears]
        if len(weights) == 1:
            return _of_floats(weights[0]) if weights[0].device.type == "cpu" else None
        joined = torch.cat(weights)
        return _of_floats(joined) or linear(joined)
    if all(type(child) is QuantisedLinear for child in linears):
        codes, scales = [child.codes for child in linears], [child.scales for child in linears]
        if len(codes) == 1 and codes[0].device.type != "cpu":
            return None
        return _of_codes(Packed(torch.cat(codes), torch.cat(scales)), linears[0].bits)
    return None


def _of_floats(weight: Tensor) -> nn.Module | None:
    if weight.device.type != "cpu":
        return linear(weight)
    if weight.dtype == torch.float32:
        return SplitLinear(weight) if weight.numel() >= SMALLEST else None
    if weight.dtype == torch.float16:
        return HalfLinear(weight)
    if weight.dtype != torch.bfloat16:
        return None
    return PackedLinear(weight) if weight.numel() >= SMALLEST and has_packed() else NarrowLinear(weight)


def linear(weight: Tensor) -> nn.Linear:
    """nn.Linear with this weight, which is not copied."""
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return module


def _of_codes(packed: Packed, bits: int) -> nn.Module:
    if packed.codes.device.type != "cpu":
        return QuantisedLinear(packed, bits)
    if bits == 8:
        return Int8Linear(packed)
    return Int4Linear(packed) if Int4Linear.takes(packed) else QuantisedLinear(packed, bits)


def join(parent: nn.Module, names: Sequence[str]) -> None:
    """Make one product of the linears with these names, which all take the same rows, and let parent.project be it.

    Reading one large weight is faster than several small ones. The linears are removed; nothing happens where
    faster() has nothing for them, as for adapters.
    """
    children = [getattr(parent, name) for name in names]
    # Rows of what is there: out_features is of the whole weight also where this process holds a slice.
    sizes = [len(child.codes if isinstance(child, QuantisedLinear) else child.weight) for child in children]
    if (joined := faster(children)) is None:
        return
    for name in names:
        delattr(parent, name)
    parent.joined = joined
    parent.project = lambda x: joined(x).split(sizes, dim=-1)  # type: ignore[method-assign]


class FloatEmbedding(nn.Module):
    """nn.Embedding whose 16-bit rows come out as fp32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).float()


def lay_out(module: nn.Module) -> None:
    """Put a faster module in the place of every linear that has one; on a CPU all vectors become fp32."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (quicker := faster([child])) is not None:
                setattr(parent, name, quicker)
    for p in module.parameters():
        if p.ndim == 1 and p.device.type == "cpu" and p.dtype in NARROW:
            p.data = p.data.float()
