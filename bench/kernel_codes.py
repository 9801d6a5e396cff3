"""Rows of bench_kernels for products with quantised matrices: LLaMA-7B's matrices in 4 and 8 bits.

    python -m bench.kernel_codes        # what an H200's memory allows at best, no GPU needed

Few rows of x are counted in bytes: codes, scales, x and y, whatever an implementation reads, so that a ratio of GB/s is
a ratio of times. Many rows are counted in FLOP. Peers: the bf16 product that the codes replace; the matrix dequantised
by plain PyTorch before each product; torch's own packed products, which take other layouts, packed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench import kernel_work as work
from bench.kernel_work import Absent, Call, Part, Row, Setting, Target, Work
from bench.timing import sets_beyond_cache
from kernels import reference

FEW = 16  # rows of x up to which the bytes count
SOME = 64  # rows of y that are checked
H200_BYTES_PER_SECOND = 4.8e12  # NVIDIA's data sheet
LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # LLaMA-7B: q k v o, gate up, down

SHAPES: dict[str, list[dict[str, int]]] = {  # group 0: a scale a row, as torch's int8 product has it
    "full": [
        *(
            {"M": 1, "out": out, "width": width, "bits": bits, "group": group}
            for out, width in ((4096, 4096), (11008, 4096), (4096, 11008))
            for bits, group in ((4, 128), (8, 0))
        ),
        *(
            {"M": M, "out": 11008, "width": 4096, "bits": bits, "group": group}
            for M in (16, 2048)
            for bits, group in ((4, 128), (8, 0))
        ),
    ],
    "quick": [{"M": M, "out": 11008, "width": 4096, "bits": 4, "group": 128} for M in (1, 2048)],
    "tiny": [
        {"M": 1, "out": 40, "width": 64, "bits": 4, "group": 32},
        {"M": 20, "out": 40, "width": 64, "bits": 8, "group": 0},
    ],
}


def product_bytes(*, M: int, out: int, width: int, bits: int, group: int, itemsize: int = 2) -> float:
    """Codes and scales, x and y."""
    return out * width * bits / 8 + itemsize * (out * (width // (group or width)) + M * (width + out))


def product(s: Setting, *, M: int, out: int, width: int, bits: int, group: int) -> Work:
    """Sets of (x, codes, scales); a peer makes what it needs of them."""

    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator(s.device).manual_seed(seed)
        size = (out, width * bits // 8)
        codes = torch.randint(0, 256, size, generator=generator, device=s.device, dtype=torch.uint8)
        scales = s.normal(out, width // (group or width), seed=seed, scale=0.01)
        return [s.normal(M, width, seed=seed + 1), codes, scales]

    first = make(0)
    many = 3 * sets_beyond_cache(s.device, first[1].nbytes)  # which has at most 8, too few of 8 MiB
    sets = [first, *(make(seed) for seed in range(1, many))]

    def with_weights(of: Callable[[Tensor, Tensor], tuple[Tensor, ...]], function: Callable[..., Tensor]) -> Call:
        return work.forward(function, [[x, *of(codes, scales)] for x, codes, scales in sets])

    def linear() -> Call:
        return with_weights(lambda c, k: (reference.dequantise(c, k, bits, s.dtype),), F.linear)

    calls = {
        "ours": lambda: work.forward(partial(kernels.quantised_linear, bits=bits), sets),
        "F.linear": linear,
        "dequantised": lambda: work.forward(partial(reference.quantised_linear, bits=bits), sets),
    }
    if bits == 4:
        calls["int4pack_mm"] = lambda: with_weights(int4_packed(s, group), partial(torchs_int4, group=group))
    elif group == 0:
        calls["int8pack_mm"] = lambda: with_weights(int8_packed(s), torch._weight_int8pack_mm)
    shape = {"M": M, "out": out, "width": width, "bits": bits, "group": group}
    return Work(
        calls,
        lambda: exact_product(*first, bits),
        product_bytes(**shape, itemsize=s.dtype.itemsize) if M <= FEW else 2.0 * M * out * width,
        s.tolerance,
    )


def exact_product(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> list[Part]:
    """In fp32, of the last rows of x."""
    exact = x[-SOME:].float() @ reference.dequantise(codes, scales, bits, torch.float32).t()
    return [Part(lambda outputs: outputs[0][-SOME:], exact)]


def int4_packed(s: Setting, group: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Codes as torch packs them, even numbers in the high half; scales and zeros (groups, out, 2): (u - 8) s + zero."""
    if s.device.type != "cuda" or s.dtype != torch.bfloat16 or group not in (32, 64, 128, 256):
        raise Absent("torch's int4 product is bf16, on CUDA, in groups of 32 to 256")

    def pack(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack(codes << 4 | codes >> 4, 8)
        return packed, torch.stack((scales.t(), torch.zeros_like(scales.t())), -1).contiguous()

    return pack


def torchs_int4(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, group: int) -> Tensor:
    return torch._weight_int4pack_mm(x, packed, group, scales_and_zeros)


def int8_packed(s: Setting) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if s.device.type != "cuda" or s.dtype != torch.bfloat16:
        raise Absent("torch's int8 product is measured in bf16 on CUDA")
    return lambda codes, scales: ((codes ^ 128).view(torch.int8), scales[:, 0].contiguous())


def rows(shape: dict[str, int]) -> list[Row]:
    """The row of a shape. At best a 4-bit product is 3.9 times as fast as the bf16 one, an 8-bit one twice."""
    grouped = f"groups of {shape['group']}" if shape["group"] else "a scale a row"
    name = f"{shape['bits']}-bit product, {shape['M']:,} x {shape['width']:,} x {shape['out']:,}, {grouped}"
    if shape["M"] > FEW:
        return [Row("codes", name, "TFLOP/s", partial(product, **shape), [Target("F.linear", 0.6)])]
    hoped = {(1, 4): 2.5, (1, 8): 1.6}.get((shape["M"], shape["bits"]), 1.3)
    targets = [Target("F.linear", hoped)] + ([Target("copy", 0.6)] if shape["M"] == 1 else [])
    return [Row("codes", name, "GB/s", partial(product, **shape), targets)]


def roofline(M: int, bits: int, group: int, shapes: list[tuple[int, int]]) -> float:
    """Seconds that an H200's memory needs for these products."""
    amounts = (product_bytes(M=M, out=out, width=width, bits=bits, group=group) for out, width in shapes)
    return sum(amounts) / H200_BYTES_PER_SECOND


def main() -> None:
    print(f"bytes over {H200_BYTES_PER_SECOND / 1e12} TB/s: the least time on an H200, predicted, not measured")
    for name, shapes in (
        *((f"{out:,} x {width:,}", [(out, width)]) for out, width in sorted(set(LAYER))),
        ("the 32 layers of 7B", LAYER * 32),
    ):
        for bits, group in ((4, 32), (4, 64), (4, 128), (8, 128), (8, 0), (16, 0)):
            scales = f"groups of {group}" if group else "a scale a row" if bits < 16 else "no codes"
            print(f"{name:20} {bits:2} bits, {scales:13} {roofline(1, bits, group, shapes) * 1e6:9.2f} us")


if __name__ == "__main__":
    main()
