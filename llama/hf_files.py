"""Tensors of a Hugging Face LLaMA directory, one at a time: safetensors or `pytorch_model*.bin`, single or sharded.

Called by convert_weights.py. checkpoint.py loads what this project writes into a model; this reads what strangers
wrote, of which nothing is trusted, without a model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama import files
from llama.config import LlamaConfig, from_hf
from llama.layout import Entry, entries
from llama.torch_files import DTYPES, Stored, TorchFile, Unchanged, read_bytes, same_bits, what_is

_SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorFile(Protocol):
    """What the two kinds of file have in common."""

    path: Path
    unchanged: Unchanged
    stored: dict[str, Stored]

    def read(self, name: str) -> Tensor:
        """One tensor; do not write into it."""
        ...


class SafetensorsFile:
    """The tensors of one safetensors file; `stored` says what is in it, read() gives one tensor."""

    def __init__(self, path: Path, mmap: bool = True) -> None:
        """ValueError, one line with the file and the reason, for a file that is not whole. mmap as in TorchFile."""
        self.path = path
        self.unchanged = Unchanged(path)
        try:
            self._file = safe_open(path, framework="pt")
            names = self._file.keys()
        except SafetensorError as e:
            what = what_is(path)
            reason = f"truncated or damaged ({e})" if "under another name" in what else what
            raise ValueError(f"{path}: {reason}") from None
        except OSError as e:
            raise ValueError(f"{path}: cannot be read ({e.strerror or e})") from None
        # safe_open has checked the header (lengths, offsets, dtypes), but does not tell where the bytes lie.
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
        self.stored = {}
        for name in names:
            about = header[name]
            if about["dtype"] not in _SAFETENSORS:
                raise ValueError(
                    f"{path}: tensor {name!r} is {about['dtype']}; only {', '.join(DTYPES.values())} are read"
                )
            offset = 8 + length + about["data_offsets"][0]
            self.stored[name] = Stored(_SAFETENSORS[about["dtype"]], tuple(about["shape"]), offset)
        self._mmap = mmap

    def read(self, name: str) -> Tensor:
        """One tensor; do not write into it."""
        return self._file.get_tensor(name) if self._mmap else read_bytes(self.path, self.stored[name])


class HuggingFace:
    """A Hugging Face directory as a source of tensors in our names and layout."""

    kind = "hf"

    def __init__(self, path: Path, mmap: bool = True) -> None:
        """Checks everything that can be known without reading the data. ValueError names file, reason and remedy."""
        self.path = path
        self.config = _config(path)
        if "quantization_config" in files.read_json(path / "config.json"):
            raise ValueError(f"{path}: quantised already; convert the model that it was made of")
        self.files, self.label = _open(path, mmap)
        where: dict[str, TensorFile] = {}
        self.ignored: list[str] = []
        for file in self.files:
            for name in file.stored:
                if name in where:
                    raise ValueError(f"{file.path}: holds {name!r}, which {where[name].path.name} holds too")
                if name.endswith("rotary_emb.inv_freq"):
                    self.ignored.append(name)  # a table that rope_theta gives; 16-bit in ChatDoctor's own files
                else:
                    where[name] = file
        if self.config.tie_embeddings and "lm_head.weight" in where:
            _same(where, "lm_head.weight", "model.embed_tokens.weight", path)
            self.ignored.append("lm_head.weight")
            del where["lm_head.weight"]
        self._where = where
        check_names(path, where, (e.hf for e in wanted(path / "config.json", self.config, len(where))))
        for e in entries(self.config):
            s = where[e.hf].stored[e.hf]
            if s.shape != e.shape:
                shape, right = "x".join(map(str, s.shape)), "x".join(map(str, e.shape))
                raise ValueError(f"{where[e.hf].path}: {e.hf} is {shape}; config.json makes it {right}")
            if s.dtype not in DTYPES:
                raise ValueError(f"{where[e.hf].path}: {e.hf} is {s.dtype}; only {', '.join(DTYPES.values())} are read")

    def dtype(self, e: Entry) -> torch.dtype:
        """Number type in which the tensor is stored."""
        return self._where[e.hf].stored[e.hf].dtype

    def read(self, e: Entry) -> Tensor:
        """One whole tensor; do not write into it."""
        return self._where[e.hf].read(e.hf)

    def check_unchanged(self) -> None:
        """ValueError if any file is not as it was when opened."""
        for file in self.files:
            file.unchanged.check()


def wanted(file: Path, c: LlamaConfig, found: int) -> list[Entry]:
    """The entries a config asks for, after making sure that it does not ask for absurdly many."""
    if c.n_layers > found:
        raise ValueError(f"{file}: asks for {c.n_layers:,} layers, but there are only {found} tensors")
    return list(entries(c))


def check_names(path: Path, found: Collection[str], names: Iterable[str]) -> None:
    """ValueError that says which tensors are missing and which are not known. Nothing is skipped."""
    expected = list(names)
    missing = [n for n in expected if n not in found]
    unknown = sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [
            f"{len(odd)} {what} ({_listed(odd)})" for odd, what in ((missing, "missing"), (unknown, "unknown")) if odd
        ]
        raise ValueError(f"{path}: tensors {' and '.join(parts)}: not a whole LLaMA; nothing is guessed or skipped")


def _listed(names: list[str]) -> str:
    return ", ".join(repr(n[:80]) for n in names[:3]) + (", ..." if len(names) > 3 else "")


def _config(path: Path) -> LlamaConfig:
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{file}: missing; it comes with the weights, copy it beside them")
    try:
        return from_hf(files.read_json(file))
    except ValueError as e:
        message = str(e)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _open(path: Path, mmap: bool) -> tuple[list[TensorFile], str]:
    """The files that hold the tensors, opened and checked; and what to call them."""
    kinds = (
        ("model.safetensors", SafetensorsFile, "Hugging Face safetensors"),
        ("pytorch_model.bin", TorchFile, "Hugging Face .bin"),
    )
    for name, kind, label in kinds:
        index = path / f"{name}.index.json"
        if (path / name).exists():
            return [kind(path / name, mmap)], label
        if index.exists():
            return _open_sharded(index, kind, mmap), label
    raise AssertionError("the caller looks for these files")


def _open_sharded(index: Path, kind: type[SafetensorsFile] | type[TorchFile], mmap: bool) -> list[TensorFile]:
    where = files.read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: has no weight_map; fetch it again")
    for name in where.values():
        if not files.is_plain(name):
            raise ValueError(f"{index}: names the file {name!r}, which is not in this directory")
    opened: list[TensorFile] = []
    for name in sorted(set(where.values())):
        if not (index.parent / name).exists():
            raise ValueError(f"{index.parent / name}: missing, though {index.name} lists it; fetch it")
        file = kind(index.parent / name, mmap)
        listed = {tensor for tensor, home in where.items() if home == name}
        if odd := sorted(listed ^ set(file.stored)):
            what = "lists" if odd[0] in listed else "does not list"
            raise ValueError(f"{file.path}: {index.name} {what} {odd[0]!r} there; the files are not of one set")
        opened.append(file)
    return opened


def _same(where: dict[str, TensorFile], a: str, b: str, path: Path) -> None:
    if b not in where or not same_bits(where[a].read(a), where[b].read(b)):
        raise ValueError(f"{path}: config.json ties {a} to {b}, but they differ; set tie_word_embeddings to false")
