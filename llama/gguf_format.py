"""The bytes of a GGUF file, llama.cpp's format: header read and checked, tensors located, unpacked and packed.

Called by gguf_files.py; knows nothing of LLaMA. The header is parsed here and not by gguf.GGUFReader, which follows
whatever counts a file announces (an array of 2**60 bytes never ends). The `gguf` package, imported late, knows the
block types: their numbers, their sizes, and the arithmetic of all of them.
"""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from llama.torch_files import bytes_of, what_is

MAGIC = b"GGUF"
_MAX_HEADER = 64 << 20  # bytes; a vocabulary of 256,000 pieces with its merges takes 12 MB
_MAX_COUNT = 1 << 16  # tensors, or keys; Llama 3.1 405B has 1,138 tensors
_CHUNK = 1 << 22  # numbers unpacked or packed at a time: 16 MiB of fp32, where the gguf package needs three of them

# GGUF's value types by number: struct codes of the plain ones (ggml's gguf.h).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOAT_KINDS = {dtype: name for name, dtype in FLOATS.items()}


def package() -> ModuleType:
    """The gguf package; ValueError with the remedy when it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ValueError("GGUF files need the gguf package: pip install gguf") from None


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do. ValueError when it cannot be read."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as f:
            return f.read(4) == MAGIC
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None


@dataclass(frozen=True)
class Packed:
    """Where a tensor lies: the name of its number type, its shape (rows first, as torch counts), its bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its plain number type; None for numbers packed in blocks."""
        return FLOATS.get(self.kind)


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors, and where each of them lies."""

    values: dict[str, Any]
    tensors: dict[str, Packed]


class _Cursor:
    """Reads forward through the header, never past the file's end or _MAX_HEADER."""

    def __init__(self, path: Path, f: BinaryIO, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._f = f

    def take(self, n: int) -> bytes:
        if self.at + n > self.size:
            raise ValueError(f"{self.path}: truncated or damaged: its header runs past the end; fetch it again")
        if self.at + n > _MAX_HEADER:
            raise ValueError(f"{self.path}: its header is over {_MAX_HEADER >> 20} MiB, no model's is; damaged?")
        self.at += n
        return self._f.read(n)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def name(self) -> str:
        try:
            return self.text().decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: a name in its header is not UTF-8; damaged, fetch it again") from None

    def value(self, key: str, kind: int) -> Any:
        """One value: a number, bytes, a NumPy array of numbers or a list of bytes."""
        if kind in _SCALARS:
            return self.number("B") != 0 if _SCALARS[kind] == "?" else self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                dtype = np.dtype("?" if _SCALARS[inner] == "?" else "<" + _SCALARS[inner])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype)
            if inner == _STRING:
                return [self.text() for _ in range(count)]  # the file ends before a hostile count does
            kind = inner
        raise ValueError(f"{self.path}: {key[:40]!r} has a value of type {kind}, which GGUF lacks; damaged or too new")


def read_header(path: Path) -> Header:
    """The header, checked: every tensor has a known type, lies whole in the file and overlaps no other. ValueError
    says what is wrong, and reads no more than the header."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        c = _Cursor(path, f, size)
        if size < 4 or c.take(4) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file: {what_is(path)}")
        version = c.number("I")
        if version & 0xFFFF == 0:
            raise ValueError(f"{path}: written for a big-endian machine; convert it with gguf's gguf_convert_endian.py")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version}; 2 and 3 open, write it anew with a recent llama.cpp")
        tensor_count, value_count = c.number("Q"), c.number("Q")
        if max(tensor_count, value_count) > _MAX_COUNT:
            raise ValueError(f"{path}: announces {tensor_count:,} tensors and {value_count:,} keys; damaged")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = c.name()
            if key in values:
                raise ValueError(f"{path}: says {key[:40]!r} twice; damaged, fetch it again")
            values[key] = c.value(key, c.number("I"))
        _refuse_parts(path, values)
        infos = list(_infos(c, tensor_count))
        return Header(values, _locate(path, infos, _data_start(path, values, c.at), size))


def _refuse_parts(path: Path, values: dict[str, Any]) -> None:
    """A file cut by llama-gguf-split says so in its metadata, and usually in its name."""
    parts = values.get("split.count", 0)
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name) or (isinstance(parts, int) and parts > 1):
        raise ValueError(
            f"{path}: one part of a split file; join the parts first: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )


def _data_start(path: Path, values: dict[str, Any], at: int) -> int:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment is {str(alignment)[:40]}; it must be a power of two")
    return at + -at % alignment


def _infos(c: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, type number and offset of every tensor."""
    for _ in range(count):
        name = c.name()
        dimensions = c.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{c.path}: tensor {name[:40]!r} has {dimensions:,} dimensions; damaged, fetch it again")
        shape = tuple(c.number("Q") for _ in range(dimensions))[::-1]
        yield name, shape, c.number("I"), c.number("Q")


def _locate(path: Path, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int) -> dict[str, Packed]:
    gguf = package()
    tensors: dict[str, Packed] = {}
    for name, shape, number, offset in infos:
        about = f"{path}: tensor {name[:40]!r}"
        if name in tensors:
            raise ValueError(f"{about} is there twice; damaged, fetch it again")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{about} is of type {number}, which the installed gguf package does not know") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"{about} has rows of {shape[-1]:,}, no whole blocks of {kind.name}; damaged")
        count = 1
        for n in shape:
            count *= n
        packed = Packed(kind.name, shape, start + offset, count // block * block_bytes)
        if count < 1 or packed.offset + packed.size > size:
            raise ValueError(
                f"{about} takes bytes {packed.offset:,} to {packed.offset + packed.size:,} of a file of {size:,}: "
                "truncated or damaged; fetch it again"
            )
        tensors[name] = packed
    end = start
    for name, p in sorted(tensors.items(), key=lambda item: item[1].offset):
        if p.offset < end:
            raise ValueError(f"{path}: tensor {name[:40]!r} overlaps another; damaged, fetch it again")
        end = p.offset + p.size
    return tensors


# --- numbers --------------------------------------------------------------------------------------


def can_unpack(kind: str) -> bool:
    """Whether the gguf package has the arithmetic of a type, found by unpacking one block of zeros."""
    if kind in FLOATS:
        return True
    gguf = package()
    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def unpack(path: Path, p: Packed) -> Tensor:
    """A whole tensor as stored, or in fp32 where it is packed in blocks. Holds it and one chunk, nothing more."""
    gguf = package()
    t = torch.empty(p.shape, dtype=p.dtype or torch.float32)
    number = gguf.GGMLQuantizationType[p.kind]
    with open(path, "rb") as f, np.errstate(all="ignore"):  # what is not finite is found by the caller
        f.seek(p.offset)
        for rows in _chunks(t):
            raw = np.empty(rows.numel() * p.size // t.numel(), np.uint8) if p.dtype is None else bytes_of(rows)
            if f.readinto(memoryview(raw)) != raw.nbytes:
                raise ValueError(f"{path}: ended while it was being read; convert a copy that nobody writes to")
            if p.dtype is None:
                rows.view(-1).numpy()[:] = gguf.quants.dequantize(raw.reshape(rows.shape[0], -1), number).reshape(-1)
    return t


def pack(t: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in a type."""
    if kind in FLOATS:
        return bytes_of(t.to(FLOATS[kind]))
    gguf = package()
    whole = np.empty(packed_bytes(tuple(t.shape), kind), np.uint8)
    at = 0
    with np.errstate(all="ignore"):  # the inverse of a scale below fp32's smallest; such a block is all 0
        for rows in _chunks(t):
            part = gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType[kind])
            whole[at : at + part.size] = part.reshape(-1)
            at += part.size
    return whole


def packed_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes that a tensor takes in a type."""
    gguf = package()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    n = 1
    for d in shape:
        n *= d
    return n // block * size


def _chunks(t: Tensor) -> tuple[Tensor, ...]:
    """Runs of whole rows, about _CHUNK numbers each; a vector is one row."""
    rows = t.view(-1, t.shape[-1])
    return rows.split(max(1, _CHUNK // rows.shape[1]))
