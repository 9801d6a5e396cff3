"""The bytes of GGUF files: what is read, what is refused in one line, and that nothing follows a hostile count."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama import gguf_format
from llama.gguf_format import Packed, can_unpack, is_gguf, pack, packed_bytes, read_header, unpack

gguf = pytest.importorskip("gguf")
ARCHITECTURE = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
MATRIX = ("a", (32, 2), 8, 0)  # 2 rows of 32 in Q8_0


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s.encode())) + s.encode()


def raw(
    keys: Any = (ARCHITECTURE,),
    tensors: Any = (MATRIX,),
    data: int = 68,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    order: str = "<",
    alignment: int = 32,
) -> bytes:
    """A GGUF file: keys are (name, value type, bytes), tensors (name, dimensions, type, offset)."""
    out = b"GGUF" + struct.pack(order + "I", version) + struct.pack("<QQ", *(counts or (len(tensors), len(keys))))
    for name, kind, value in keys:
        out += text(name) + struct.pack("<I", kind) + value
    for name, dimensions, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return out + bytes(-len(out) % alignment) + bytes(data)


def test_values_and_tensors(tmp_path: Path) -> None:
    keys = (
        ARCHITECTURE,
        ("u8", 0, b"\xff"),
        ("i32", 5, struct.pack("<i", -7)),
        ("f32", 6, struct.pack("<f", 0.5)),
        ("yes", 7, b"\x01"),
        ("u64", 10, struct.pack("<Q", 1 << 60)),
        ("texts", 9, struct.pack("<IQ", 8, 2) + text("") + text("\u2581a")),
        ("numbers", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3)),
        ("general.alignment", 4, struct.pack("<I", 64)),
    )
    tensors = (MATRIX, ("b", (3,), 0, 128))
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(keys, tensors, 140, alignment=64))
    header = read_header(path)
    numbers = header.values.pop("numbers")
    assert numbers.tolist() == [1, -2, 3]
    assert header.values == {
        "general.architecture": b"llama",
        "u8": 255,
        "i32": -7,
        "f32": 0.5,
        "yes": True,
        "u64": 1 << 60,
        "texts": [b"", "\u2581a".encode()],
        "general.alignment": 64,
    }
    start = path.stat().st_size - 140
    assert header.tensors == {"a": Packed("Q8_0", (2, 32), start, 68), "b": Packed("F32", (3,), start + 128, 12)}
    assert is_gguf(path)
    assert not is_gguf(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.gguf").write_bytes(raw())
    monkeypatch.setattr(gguf_format, "open", failing, raising=False)
    with pytest.raises(ValueError, match=r"x.gguf: cannot be read \(Permission denied\)"):
        is_gguf(tmp_path / "x.gguf")


def key(name: str, kind: int, value: bytes) -> dict[str, Any]:
    return {"keys": (ARCHITECTURE, (name, kind, value))}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "another file": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "empty": (b"", "the file is empty"),
    "big-endian": (raw(order=">"), "big-endian"),
    "version 1": (raw(version=1), "version 1"),
    "a million tensors": (raw(counts=(1 << 20, 1)), "1,048,576 tensors"),
    "2**63 keys": (raw(counts=(1, 1 << 63)), "keys; damaged"),
    "more tensors than there are": (raw(counts=(60000, 1)), "damaged"),
    "text beyond the end": (raw(**key("x", 8, struct.pack("<Q", 1 << 62))), "runs past the end"),
    "array of 2**60 bytes": (raw(**key("x", 9, struct.pack("<IQ", 0, 1 << 60))), "runs past the end"),
    "array of 2**60 texts": (raw(**key("x", 9, struct.pack("<IQ", 8, 1 << 60))), "runs past the end"),
    "array of arrays": (raw(**key("x", 9, struct.pack("<IQ", 9, 1 << 60))), "value of type 9"),
    "unknown value type": (raw(**key("x", 77, bytes(64))), "value of type 77"),
    "a key twice": (raw((ARCHITECTURE, ARCHITECTURE)), "'general.architecture' twice"),
    "a name that is not UTF-8": (raw().replace(b"general", b"gen\xff\xffal"), "not UTF-8"),
    "alignment 0": (raw(**key("general.alignment", 4, bytes(4))), "alignment is 0"),
    "alignment 48": (raw(**key("general.alignment", 4, struct.pack("<I", 48))), "alignment is 48"),
    "alignment 2**31": (raw(**key("general.alignment", 4, struct.pack("<I", 1 << 31))), "truncated"),
    "alignment in words": (raw(**key("general.alignment", 8, text("32"))), "alignment is b'32'"),
    "no dimensions": (raw(tensors=(("a", (), 0, 0),)), "0 dimensions"),
    "2**32-1 dimensions": (
        raw(tensors=(("a", (), 0, 0),)).replace(text("a") + bytes(4), text("a") + b"\xff" * 4),
        "4,294,967,295 dim",
    ),
    "an empty tensor": (raw(tensors=(("a", (32, 0), 0, 0),)), "damaged"),
    "2**126 numbers": (raw(tensors=(("a", (1 << 63, 1 << 63), 0, 0),)), "of a file of"),
    "offset beyond the end": (raw(tensors=(("a", (32, 2), 8, 1 << 63),)), "of a file of"),
    "one byte short": (raw(data=67), "truncated"),
    "unknown number type": (raw(tensors=(("a", (32, 2), 999, 0),)), "type 999"),
    "a type that was taken out": (raw(tensors=(("a", (32, 2), 4, 0),)), "type 4"),
    "rows of broken blocks": (raw(tensors=(("a", (31, 2), 8, 0),)), "rows of 31, no whole blocks of Q8_0"),
    "a tensor twice": (raw(tensors=(MATRIX, MATRIX)), "'a' is there twice"),
    "overlapping": (raw(tensors=(MATRIX, ("b", (8,), 0, 32))), "overlaps"),
    "a part": (raw(**key("split.count", 2, struct.pack("<H", 3))), "llama-gguf-split --merge"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    data, reason = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason) as error:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = raw()
    path = tmp_path / "x.gguf"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"truncated|not a GGUF file"):
            read_header(path)


def test_a_part_is_known_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00003.gguf"
    path.write_bytes(raw())
    with pytest.raises(ValueError, match="one part of a split file; join the parts first"):
        read_header(path)


def test_a_header_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_format, "_MAX_HEADER", 1 << 20)
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(**key("x", 8, text("y" * (1 << 20)))))
    with pytest.raises(ValueError, match="its header is over 1 MiB"):
        read_header(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_packing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks as in one piece, and near the values: the bytes are those of the gguf package."""
    t = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gguf_format, "_CHUNK", 64 * 5)
    stored = pack(t, kind).view(np.uint8)
    number = gguf.GGMLQuantizationType[kind]
    assert stored.tobytes() == gguf.quants.quantize(t.numpy(), number).tobytes()
    assert stored.nbytes == packed_bytes((37, 64), kind)
    (tmp_path / "x").write_bytes(b"before" + stored.tobytes())
    read = unpack(tmp_path / "x", Packed(kind, (37, 64), 6, stored.nbytes))
    assert read.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    steps = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 1 / 15}
    assert (read.float() - t).abs().max() <= t.abs().max() * steps.get(kind, 1 / 15)
    (tmp_path / "x").write_bytes(stored.tobytes())
    with pytest.raises(ValueError, match="ended while it was being read"):
        unpack(tmp_path / "x", Packed(kind, (37, 64), 6, stored.nbytes))


def test_which_types_unpack() -> None:
    assert all(can_unpack(k) for k in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "Q4_K", "IQ4_NL"))
    assert not any(can_unpack(k) for k in ("I8", "F64", "Q8_K"))


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        gguf_format.package()
