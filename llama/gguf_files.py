"""GGUF files, llama.cpp's format: written as a stream, and read back to be compared.

Called by convert_weights.py. Keys and tensors are those of llama.cpp's own converter (convert_hf_to_gguf.py,
LlamaModel): q and k rows in Meta's interleaved order, norms in fp32. Needs the `gguf` package, imported late.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.layout import Entry, deinterleave, entries, interleave
from llama.model import rotation_frequencies
from llama.tokenizer import Tokenizer
from llama.torch_files import Stored, read_bytes

_ROPE = "rope_freqs.weight"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FILE_TYPES = {torch.float32: "ALL_F32", torch.bfloat16: "MOSTLY_BF16", torch.float16: "MOSTLY_F16"}


def package() -> ModuleType:
    """The gguf package; ValueError with the remedy when it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ValueError("--to gguf needs the gguf package: pip install gguf") from None


def dtype_in_gguf(e: Entry, dtype: torch.dtype) -> torch.dtype:
    """Number type of a tensor in a file of that type: llama.cpp computes with norms in fp32 only."""
    return torch.float32 if len(e.shape) == 1 else dtype


def write_gguf(
    path: Path,
    tensors: Iterable[tuple[Entry, Tensor]],
    c: LlamaConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    name: str,
) -> None:
    """Write one GGUF file, a tensor at a time. tensors: those of entries(c), in order, in our layout."""
    gguf = package()
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _add_metadata(writer, gguf, c, dtype, name)
        _add_tokenizer(writer, gguf, tokenizer, c.vocab_size)
        factors = _rope_factors(c)
        if factors is not None:
            writer.add_tensor_info(_ROPE, factors.shape, factors.dtype, factors.nbytes)
        for e in entries(c):
            kind = dtype_in_gguf(e, dtype)
            numbers = np.dtype(np.float32 if kind == torch.float32 else np.uint16)  # NumPy has no bfloat16
            size = numbers.itemsize * int(np.prod(e.shape))
            writer.add_tensor_info(e.gguf, e.shape, numbers, size, raw_dtype=gguf.GGMLQuantizationType[_NAMES[kind]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for e, t in tensors:
            whole = interleave(t, e.rope_heads) if e.rope_heads else t
            kind = dtype_in_gguf(e, dtype)
            raw = whole.to(kind).contiguous()
            writer.write_tensor_data((raw if kind == torch.float32 else raw.view(torch.uint16)).numpy())
            del t, whole, raw  # or they would live on while the next one is made
    finally:
        writer.close()


def _add_metadata(writer: Any, gguf: ModuleType, c: LlamaConfig, dtype: torch.dtype, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.ffn_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    if c.rope_scaling and c.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling.factor)


def _add_tokenizer(writer: Any, gguf: ModuleType, tokenizer: Tokenizer, vocab_size: int) -> None:
    """SentencePiece's pieces, scores and types. Rows beyond them (ChatDoctor's 32001st) are unused pad pieces."""
    p = sentencepiece.SentencePieceProcessor()
    p.LoadFromSerializedProto(tokenizer.model_bytes)
    pieces: list[bytes] = []
    types: list[int] = []
    for i in range(tokenizer.vocab_size):
        pieces.append(p.IdToPiece(i).encode())
        kind = gguf.TokenType
        types.append(
            kind.UNKNOWN
            if p.IsUnknown(i)
            else kind.CONTROL
            if p.IsControl(i)
            else kind.UNUSED
            if p.IsUnused(i)
            else kind.BYTE
            if p.IsByte(i)
            else kind.NORMAL
        )
    extra = range(tokenizer.vocab_size, vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces + [f"[PAD{i}]".encode() for i in extra])
    writer.add_token_scores([p.GetScore(i) for i in range(tokenizer.vocab_size)] + [-10000.0] * len(extra))
    writer.add_token_types([int(t) for t in types] + [int(gguf.TokenType.UNUSED)] * len(extra))
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.encode("a") != tokenizer.encode("a", continued=True))


def _rope_factors(c: LlamaConfig) -> np.ndarray[Any, Any] | None:
    """By what each rotary frequency is divided (Llama 3.1's scaling), which llama.cpp reads as a tensor; or None."""
    if c.rope_scaling is None or c.rope_scaling.kind != "llama3":
        return None
    plain = dataclasses.replace(c, rope_scaling=None)
    return (rotation_frequencies(plain) / rotation_frequencies(c)).numpy()


class GGUF:
    """A GGUF file that was written here, as a source of tensors in our layout: to compare it with what went in."""

    def __init__(self, path: Path, c: LlamaConfig) -> None:
        """ValueError when its tensors are not those of the config."""
        self._path = path
        self._tensors = {t.name: t for t in package().GGUFReader(path).tensors}
        expected = {e.gguf: e for e in entries(c)}
        if self._tensors.keys() - {_ROPE} != expected.keys():
            raise ValueError(f"{path}: reading it back gives other tensors than were written")
        for name, e in expected.items():
            if tuple(reversed(self._tensors[name].shape.tolist())) != e.shape:
                raise ValueError(f"{path}: reading it back gives {name} another shape than was written")

    def read(self, e: Entry) -> Tensor:
        """One whole tensor; do not write into it."""
        t = self._tensors[e.gguf]
        kind = {name: dtype for dtype, name in _NAMES.items()}[t.tensor_type.name]
        raw = read_bytes(self._path, Stored(kind, e.shape, t.data_offset))
        return deinterleave(raw, e.rope_heads) if e.rope_heads else raw
