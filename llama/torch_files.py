"""One torch file of tensors (`consolidated.NN.pth`, `pytorch_model.bin`): read safely, written as a stream.

Called by meta_files.py and hf_files.py. Nothing in a file is trusted: the zip directory is checked before it is
unpickled, unpickling is `weights_only` and never falls back, and every storage must be one whole record of the zip.
The outcomes these checks stand against (garbage under mmap, bombs, code) were measured one by one; tests/llama/
test_torch_files.py has them all.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import re
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.files import looks_like

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MAX_PICKLE = 64 << 20  # the names and shapes of 65B's 723 tensors take 0.2 MB
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file: dtype, shape, and the file offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Unchanged:
    """A file that must stay as it is while it is read: its size and time of change when first seen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._seen = self._stat()
        except OSError as e:
            raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
        if not path.is_file():
            raise ValueError(f"{path}: is not a regular file")

    def _stat(self) -> tuple[int, int]:
        s = os.stat(self.path)
        return s.st_size, s.st_mtime_ns

    def check(self) -> None:
        """ValueError if the file is not the one that was opened."""
        try:
            same = self._stat() == self._seen
        except OSError:
            same = False
        if not same:
            raise ValueError(f"{self.path}: changed while it was being read; convert a copy that nobody writes to")


def what_is(path: Path) -> str:
    """What a file that should hold tensors is instead, judged by its first bytes; with the remedy."""
    with open(path, "rb") as f:
        head = f.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "a zip file, as torch.save writes it"
    if head[:1] == b"\x80":
        return "a bare pickle (torch before 1.6, or not torch's), which is not opened; save it again with torch.save"
    if known := looks_like(head):
        return known
    if head[8:9] == b"{":
        return "a safetensors file under another name; rename it"
    if head.lstrip().startswith((b"{", b"[")):
        return "JSON, not weights; fetch the file again"
    if not head.strip(b"\0"):
        return "nothing but zeros: the download or the disk failed; fetch it again"
    return "neither torch's zip format nor anything else known; fetch it again"


class TorchFile:
    """The tensors of one torch zip file, checked; `stored` says what is in it, read() gives one tensor."""

    def __init__(self, path: Path, mmap: bool = True) -> None:
        """ValueError, one line with the file and the reason, for anything but a plain dictionary of tensors.

        mmap: read() returns views of the mapped file, which the kernel may drop again; a file cut short meanwhile
        kills the process (SIGBUS). Without, read() copies the bytes into memory.
        """
        self.path = path
        self.unchanged = Unchanged(path)
        records = _zip_records(path)
        tensors = _load(path)
        offsets = _check_storages(path, tensors, records)
        self.stored: dict[str, Stored] = {}
        for name, t in tensors.items():
            start = offsets[t.untyped_storage().data_ptr()] + t.storage_offset() * t.element_size()
            self.stored[name] = Stored(t.dtype, tuple(t.shape), start)
        self._mapped = tensors if mmap else None

    def read(self, name: str) -> Tensor:
        """One tensor; do not write into it."""
        if self._mapped is not None:
            return self._mapped[name]
        return read_bytes(self.path, self.stored[name])

    def close(self) -> None:
        """Let go of the mapped file."""
        self._mapped = None


def read_bytes(path: Path, s: Stored) -> Tensor:
    """A tensor copied out of a file without mapping it."""
    t = torch.empty(s.shape, dtype=s.dtype)
    with open(path, "rb") as f:
        f.seek(s.offset)
        if f.readinto(memoryview(bytes_of(t))) != t.nbytes:
            raise ValueError(f"{path}: ended while it was being read; convert a copy that nobody writes to")
    return t


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the last bit: NaN equals itself here, and -0 is not 0."""
    bits = torch.int32 if a.element_size() == 4 else torch.int16
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def bytes_of(t: Tensor) -> Any:
    """The bytes of a contiguous tensor as a NumPy array that shares its memory."""
    return t.contiguous().view(-1).view(torch.uint8).numpy()


def _zip_records(path: Path) -> dict[int, int]:
    """Offset -> size of every record of tensor data, after checking the whole zip directory."""
    with open(path, "rb") as f:
        if f.read(4) != b"PK\x03\x04":
            raise ValueError(f"{path}: {what_is(path)}")
        size = f.seek(0, os.SEEK_END)
        try:
            with zipfile.ZipFile(f) as z:
                infos = z.infolist()
                if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in infos):
                    raise ValueError(f"{path}: the zip is compressed, which torch.save never does; refused")
                pickles = [i for i in infos if i.filename.endswith("/data.pkl")]
                if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                    raise ValueError(f"{path}: a zip, but not one of torch.save's (no single small data.pkl in it)")
                root = pickles[0].filename.removesuffix("data.pkl")
                if len({i.filename for i in infos}) != len(infos):
                    raise ValueError(f"{path}: the zip holds a record twice; refused")
                order = f"{root}byteorder"
                if order in z.namelist() and (z.getinfo(order).file_size > 16 or z.read(order) != b"little"):
                    raise ValueError(f"{path}: written on a big-endian machine; not supported")
        except ValueError as e:
            if str(e).startswith(str(path)):
                raise
            raise ValueError(f"{path}: its zip directory is damaged ({_short(e)}); fetch it again") from None
        except zipfile.BadZipFile:
            raise ValueError(f"{path}: truncated or damaged (its zip directory is missing); fetch it again") from None
        except Exception as e:  # zipfile on hostile bytes: struct.error, NotImplementedError, UnicodeDecodeError, ...
            raise ValueError(f"{path}: its zip directory is damaged ({_short(e)}); fetch it again") from None
        return _spans(path, f, infos, f"{root}data/", size)


def _spans(path: Path, f: io.BufferedReader, infos: list[zipfile.ZipInfo], prefix: str, size: int) -> dict[int, int]:
    """Offset -> size of the records under prefix; no record may overlap another or leave the file."""
    records, end = {}, 0
    for i in sorted(infos, key=lambda i: i.header_offset):
        f.seek(i.header_offset)
        local = f.read(30)
        if i.header_offset < end or len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise ValueError(f"{path}: the records of the zip overlap or are damaged; fetch it again")
        names, extra = struct.unpack("<HH", local[26:30])
        start = i.header_offset + 30 + names + extra
        end = start + i.file_size
        if end > size:
            raise ValueError(f"{path}: truncated: {end:,} bytes announced, {size:,} there; fetch it again")
        if i.filename.startswith(prefix) and i.file_size:
            records[start] = i.file_size
    return records


def _load(path: Path) -> dict[str, Tensor]:
    """Names and mapped tensors. Nothing is computed on them, so no page of their data is read yet."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        found = re.search(r"(?:GLOBAL|class|function)\s+`?([\w.]+)", str(e).partition("Unsupported")[2])
        what = f" (`{found[1]}`)" if found else ""
        raise ValueError(
            f"{path}: refused: its pickle asks for more than tensors{what}, which could run code"
        ) from None
    except Exception as e:  # 400 mutated files gave six types; none may become a traceback, none a second attempt
        raise ValueError(f"{path}: torch cannot load it ({_short(e)}); fetch it again") from None
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    tensors = {}
    for name, t in loaded.items():
        if not isinstance(name, str) or type(t) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{path}: entry {_short(name)!r} is a {type(t).__name__}; only named tensors are read")
        if t.layout is not torch.strided or t.device.type != "cpu" or t.is_quantized:
            raise ValueError(f"{path}: tensor {_short(name)!r} is not a plain dense tensor")
        tensors[name] = t.detach()
    return tensors


def _check_storages(path: Path, tensors: dict[str, Tensor], records: dict[int, int]) -> dict[int, int]:
    """Address of each storage -> its file offset. Every storage must be one whole record, every record be used.

    torch maps the file in one piece, so addresses differ as file offsets do. This ties what torch read to the zip
    directory that was checked, and finds pickles that claim more elements than a record has.
    """
    for name, t in tensors.items():
        if t.numel() == 0 or not t.is_contiguous():
            raise ValueError(f"{path}: tensor {_short(name)!r} is empty or not contiguous (an expanded view?); refused")
    storages = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors.values()})
    spans = sorted(records.items())
    shift = storages[0][0] - spans[0][0] if spans else 0
    if [(address - shift, size) for address, size in storages] != spans:
        raise ValueError(f"{path}: its storages do not match the zip's records (sizes or number differ); refused")
    for name, t in tensors.items():
        if (t.storage_offset() + t.numel()) * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"{path}: tensor {_short(name)!r} is larger than its storage; refused")
    return {address: address - shift for address, _ in storages}


def _short(what: object) -> str:
    """One printable line of at most 100 characters."""
    lines = str(what).splitlines() or [type(what).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0][:100]) or type(what).__name__


# --- writing --------------------------------------------------------------------------------------


class _Storage:
    """Stands for a storage in the pickle: written as torch's persistent id."""

    def __init__(self, key: int, dtype: torch.dtype, numel: int) -> None:
        self.id = ("storage", _STORAGES[dtype], str(key), "cpu", numel)


class _Rebuild:
    """Stands for a tensor in the pickle: written as the call by which torch rebuilds it."""

    def __init__(self, key: int, t: Tensor) -> None:
        stride = torch.empty(t.shape, device="meta").stride()
        self._args = (_Storage(key, t.dtype, t.numel()), 0, tuple(t.shape), stride, False, collections.OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._args


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        return obj.id if isinstance(obj, _Storage) else None


class TorchFileWriter:
    """Writes what `torch.save(dict of tensors)` writes, one tensor at a time.

    torch.save needs the whole dictionary in memory, and saves the whole storage of a view. This holds one tensor, in
    the same zip layout: uncompressed records `data/<n>` on 64-byte borders (so that torch.load can map them), then
    `data.pkl`.
    """

    def __init__(self, path: Path) -> None:
        self._root = path.stem
        self._zip = zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True)
        self._tensors: dict[str, _Rebuild] = {}
        self._record("version", b"3\n")
        self._record("byteorder", sys.byteorder.encode())

    def add(self, name: str, t: Tensor) -> None:
        """Append a tensor; a view is written as what it shows, not as its storage."""
        assert name not in self._tensors
        key = len(self._tensors)
        self._record(f"data/{key}", memoryview(bytes_of(t)))
        self._tensors[name] = _Rebuild(key, t)

    def close(self) -> None:
        """Write the names and shapes, and finish the file."""
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(self._tensors)
        self._record("data.pkl", pickled.getvalue())
        self._zip.close()

    def abandon(self) -> None:
        """Let go of an unfinished file; nothing after close()."""
        fp, self._zip.fp = self._zip.fp, None
        if fp is not None:
            with contextlib.suppress(OSError):
                fp.close()

    def _record(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")  # dated 1980: the same tensors give the same file
        large = len(data) >= 1 << 31
        header = 30 + len(info.filename) + (20 if large else 0) + 4
        assert self._zip.fp is not None
        padding = -(self._zip.fp.tell() + header) % 64
        info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", as torch's own writer pads
        info.file_size = len(data)
        with self._zip.open(info, "w", force_zip64=large) as record:
            record.write(data)
