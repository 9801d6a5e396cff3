"""Makes bf16 right in Triton's interpreter, for tests only; loaded by the conftest beside it, before any launch.

The interpreter (triton 3.6 to 3.9) keeps bf16 as numpy uint16 and forgets it in most operations: arithmetic,
comparisons, tl.dot and reductions work on the bit patterns, integers are cast to and from them, and fp32 -> bf16 cuts
off where the GPU rounds to nearest even. None of it raises. Here every such operation widens its operands to fp32,
computes, and rounds the result once; for + - * / and square roots that is the correctly rounded bf16 result, because
fp32 has more than twice bf16's digits. test_bf16_shim.py holds each operation against torch bit for bit, and shows
that without the shim the interpreter is still wrong: when that test fails, triton has mended it, and this file can go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

# What the patches replace; restored by remove().
ORIGINALS: dict[tuple[type, str], Any] = {}


def is_bf16(handle: Handle) -> bool:
    # A pointer to bf16 and the bools of a comparison carry other types or other data.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def widen(handle: Handle) -> Handle:
    """The same numbers in fp32, exactly; anything but bf16 unchanged."""
    if not is_bf16(handle):
        return handle
    bits = np.asarray(handle.data.astype(np.uint32) << np.uint32(16))
    return Handle(bits.view(np.float32), tl.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16, to nearest, ties to even; overflow gives inf, any NaN torch's quiet NaN."""
    bits = np.atleast_1d(np.ascontiguousarray(values, dtype=np.float32)).view(np.uint32)
    # Adding just under half a unit carries into the kept half where the value rounds up; the kept half's own last
    # bit turns ties to even. The carry may run into the exponent, up to inf: that is what rounding up means there.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(values))


def narrow(handle: Handle) -> Handle:
    """fp32 results as bf16; comparisons as what they are."""
    if handle.data.dtype == np.bool_:
        return Handle(handle.data, tl.int1)
    return Handle(to_bf16(handle.data), tl.bfloat16)


def elementwise(original: Callable[..., Handle]) -> Callable[..., Handle]:
    """A builder operation that takes handles among its arguments and gives the widest type among them."""

    def operation(self: Builder, *arguments: Any) -> Handle:
        if not any(isinstance(a, Handle) and is_bf16(a) for a in arguments):
            return original(self, *arguments)
        return narrow(original(self, *(widen(a) if isinstance(a, Handle) else a for a in arguments)))

    return operation


def dot(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def create_dot(self: Builder, a: Handle, b: Handle, d: Handle, *rest: Any) -> Handle:
        out = original(self, widen(a), widen(b), widen(d), *rest)
        return narrow(out) if is_bf16(d) else out

    return create_dot


def ternary(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def ternary_op(self: Builder, lhs: Handle, rhs: Handle, other: Handle, op: Callable[..., np.ndarray]) -> Handle:
        if op is np.where:  # moves bits, does not compute with them
            return original(self, lhs, rhs, other, op)
        return elementwise(original)(self, lhs, rhs, other, op)

    return ternary_op


def fma(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def create_fma(self: Builder, x: Handle, y: Handle, z: Handle) -> Handle:
        if not is_bf16(z):
            return original(self, x, y, z)
        x64, y64, z64 = (widen(h).data.astype(np.float64) for h in (x, y, z))  # the product is exact
        return Handle(to_bf16((x64 * y64 + z64).astype(np.float32)), tl.bfloat16)

    return create_fma


def cast(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def cast_impl(self: Builder, source: Handle, target: tl.dtype) -> Handle:
        into = target.scalar
        if into == tl.bfloat16 and not is_bf16(source):
            # Through fp32 from wider types and integers, as torch goes.
            return Handle(to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(source) and into != tl.bfloat16:
            wide = widen(source)
            return wide if into == tl.float32 else original(self, wide, target)
        return original(self, source, target)

    return cast_impl


def fp_to_fp(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def create_fp_to_fp(self: Builder, source: Handle, target: tl.dtype, rounding: Any) -> Handle:
        kinds = (source.dtype.scalar, target.scalar)
        eight_bits = 8 in (kind.primitive_bitwidth for kind in kinds)
        if tl.bfloat16 not in kinds or eight_bits or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return original(self, source, target, rounding)
        return self.cast_impl(source, target)

    return create_fp_to_fp


def reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    """Sums, extremes and running sums of bf16 in fp32, rounded once: what a GPU's order of adding is, nobody says."""

    def reduce(self: interpreter.ReduceScanOpInterface, values: Any, *rest: Any, **named: Any) -> Any:
        one = values[0] if isinstance(values, tuple) else values
        if not is_bf16(one.handle):
            return original(self, values, *rest, **named)
        wide = tl.core.tensor(widen(one.handle), tl.block_type(tl.float32, list(one.shape)))
        out = original(self, wide, *rest, **named)
        back = [narrowed(t) for t in (out if isinstance(out, tuple | list) else [out])]
        return type(out)(back) if isinstance(out, tuple | list) else back[0]

    return reduce


def narrowed(t: tl.core.tensor) -> tl.core.tensor:
    if t.dtype != tl.float32:  # the indices of an argmax
        return t
    return tl.core.tensor(narrow(t.handle), tl.block_type(tl.bfloat16, list(t.shape)) if t.shape else tl.bfloat16)


def get_bf16(self: Builder, value: float) -> Handle:
    return Handle(to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)


def install() -> None:
    """Idempotent."""
    if ORIGINALS:
        return
    replace(Builder, "binary_op", elementwise)
    replace(Builder, "unary_op", elementwise)
    replace(Builder, "create_rsqrt", elementwise)
    replace(Builder, "ternary_op", ternary)
    replace(Builder, "create_fma", fma)
    replace(Builder, "create_dot", dot)
    replace(Builder, "cast_impl", cast)
    replace(Builder, "create_fp_to_fp", fp_to_fp)
    replace(Builder, "get_bf16", lambda _: get_bf16)  # triton 3.6 has none
    replace(interpreter.ReduceOps, "sum", reduction)
    replace(interpreter.ReduceOps, "min_max", reduction)
    replace(interpreter.ScanOps, "cumsum", reduction)
    replace(interpreter.ScanOps, "cumprod", reduction)


def replace(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    original = owner.__dict__.get(name)
    ORIGINALS[owner, name] = original
    setattr(owner, name, make(original))


def remove() -> None:
    for (owner, name), original in ORIGINALS.items():
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    ORIGINALS.clear()
