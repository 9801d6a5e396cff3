"""GGUF files, llama.cpp's format, as a source and as a result: names and metadata of a LLaMA.

Called by convert_weights.py and checkpoint.py; the format itself is gguf_format.py's. Keys and tensors are those of
llama.cpp's own converter (convert_hf_to_gguf.py, LlamaModel): q and k rows in Meta's interleaved order, norms in fp32.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama import provenance
from llama.chat import ChatFormat
from llama.config import LlamaConfig, RopeScaling
from llama.gguf_format import (
    FLOATS,
    Packed,
    can_unpack,
    pack,
    package,
    packed_bytes,
    read_header,
    unpack,
)
from llama.gguf_tokenizer import padding, pieces_of, tokenizer_of
from llama.hf_files import check_names, wanted
from llama.hf_tokenizer import chat_template
from llama.layout import Entry, deinterleave, entries, interleave
from llama.model import rotation_frequencies
from llama.tokenizer import Tokenizer
from llama.torch_files import Unchanged

_ROPE = "rope_freqs.weight"
_ARCHITECTURE = "llama"
_CHAT_FORMAT = "chatdoctor.chat_format"  # our own key: chat_format.json; llama.cpp reads the Jinja template beside it
_PROVENANCE = "chatdoctor.provenance"  # and provenance.json
# Types of a whole file, which its matrices have: Q8_0 is 32 whole numbers of 8 bits and their fp16 scale.
_FILE_TYPES = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}

LARGEST_Q8_0 = 127 * 65504.0  # the scale is fp16


def kind_in_gguf(e: Entry, file_kind: str) -> str:
    """Number type of a tensor in a file of that type: llama.cpp computes with norms in fp32 only, and keeps rows that
    are no whole blocks of 32 in fp16."""
    if len(e.shape) == 1:
        return "F32"
    return "F16" if file_kind == "Q8_0" and e.shape[-1] % 32 else file_kind


def dtype_in_gguf(e: Entry, file_kind: str) -> torch.dtype:
    """Number type of the values that such a tensor is made of: blocks are packed from fp32."""
    return FLOATS.get(kind_in_gguf(e, file_kind), torch.float32)


def bytes_in_gguf(e: Entry, file_kind: str) -> int:
    """Bytes that a tensor takes in a file of that type."""
    return packed_bytes(e.shape, kind_in_gguf(e, file_kind))


# --- reading --------------------------------------------------------------------------------------


class GGUF:
    """A GGUF file as a source of tensors in our names and layout."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Checks everything that can be known without reading the data. ValueError names file, reason and remedy."""
        self.path = path
        self.unchanged = Unchanged(path)
        self.files = [path]
        self.ignored: list[str] = []
        header = read_header(path)
        self.values, self._stored = header.values, dict(header.tensors)
        architecture = _text(self.values.get("general.architecture"))
        if architecture != _ARCHITECTURE:
            raise ValueError(f"{path}: its architecture is {architecture!r}; only llama models open here")
        factors = self._stored.pop(_ROPE, None)
        self.config = _config(path, self.values, self._stored, factors)
        expected = wanted(path, self.config, len(self._stored))
        check_names(path, self._stored, (e.gguf for e in expected))
        for e in expected:
            shape = self._stored[e.gguf].shape
            if shape != e.shape:
                sizes = "x".join(map(str, shape)), "x".join(map(str, e.shape))
                raise ValueError(f"{path}: {e.gguf} is {sizes[0]}; its metadata makes it {sizes[1]}")
        kinds = sorted({p.kind for p in self._stored.values()})
        if unknown := [kind for kind in kinds if not can_unpack(kind)]:
            raise ValueError(f"{path}: holds {unknown[0]} numbers, which the gguf package cannot unpack")
        self.label = f"GGUF {'/'.join(kinds)}"
        self._packed = any(p.dtype is None for p in self._stored.values())
        self._matrices = {p.dtype for p in self._stored.values() if len(p.shape) > 1}

    def dtype(self, e: Entry) -> torch.dtype:
        """The number type to keep a tensor in: as stored; float16 in a file of packed ones (docs/design.md says why).

        llama.cpp stores norms as fp32 whatever they were: they count as what the matrices are, if that holds them.
        """
        stored = self._stored[e.gguf].dtype
        if stored is None or self._packed:
            return torch.float16
        if len(e.shape) == 1 and len(self._matrices) == 1:
            narrow = next(iter(self._matrices))
            t = unpack(self.path, self._stored[e.gguf])
            return narrow if torch.equal(t.to(narrow).to(t.dtype), t) else stored
        return stored

    def read(self, e: Entry) -> Tensor:
        """One whole tensor, in fp32 where it is packed; do not write into it."""
        t = unpack(self.path, self._stored[e.gguf])
        return deinterleave(t, e.rope_heads) if e.rope_heads else t

    def holds(self, e: Entry, t: Tensor, file_kind: str) -> bool:
        """Whether the file has these values, in our layout, as a file of that type has to: to the last bit."""
        stored, kind = self._stored[e.gguf], kind_in_gguf(e, file_kind)
        if stored.kind != kind:
            return False
        raw = np.fromfile(self.path, np.uint8, stored.size, offset=stored.offset)
        return np.array_equal(raw, pack(interleave(t, e.rope_heads) if e.rope_heads else t, kind))

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None when it is no SentencePiece model's."""
        return tokenizer_of(self.path, self.values)

    def tokenizer_kind(self) -> str:
        """What the file calls its tokenizer, for a message."""
        return _text(self.values.get("tokenizer.ggml.model"))

    def chat_format(self) -> ChatFormat | None:
        """The prompt format, where write_gguf has put it."""
        if _CHAT_FORMAT not in self.values:
            return None
        try:
            return ChatFormat.from_json(json.loads(self.values[_CHAT_FORMAT]))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{self.path}: its {_CHAT_FORMAT} is none; damaged, fetch it again") from None

    def stages(self) -> provenance.Stages:
        """Where the model comes from, where write_gguf has put it."""
        if _PROVENANCE not in self.values:
            return []
        try:
            stages = provenance.stages_in(json.loads(self.values[_PROVENANCE]))
        except (ValueError, TypeError, RecursionError):
            stages = None
        if stages is None:
            version = provenance.VERSION
            raise ValueError(f"{self.path}: its {_PROVENANCE} is none of version {version}; damaged, fetch it again")
        return stages

    def ids(self) -> dict[str, Any]:
        """BOS and EOS ids, as config.json spells them."""
        found = {f"{role}_token_id": self.values.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
        return {k: v for k, v in found.items() if isinstance(v, int)}

    def check_unchanged(self) -> None:
        """ValueError if the file is not as it was when opened."""
        self.unchanged.check()


def _text(value: object) -> str:
    """A string of the metadata, fit to be shown."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else "missing"
    return "".join(c if c.isprintable() else "?" for c in text[:40])


# Key -> (kinds, least, most), as meta_files.py has them for params.json.
_INT, _NUMBER = (int,), (int, float)
_KEYS: dict[str, tuple[tuple[type, ...], float, float]] = {
    "embedding_length": (_INT, 2, 1 << 17),
    "block_count": (_INT, 1, 1000),
    "attention.head_count": (_INT, 1, 1 << 12),
    "attention.head_count_kv": (_INT, 1, 1 << 12),
    "feed_forward_length": (_INT, 1, 1 << 20),
    "context_length": (_INT, 1, 1 << 27),
    "vocab_size": (_INT, 1, 1 << 24),
    "attention.key_length": (_INT, 2, 1 << 12),
    "attention.value_length": (_INT, 2, 1 << 12),
    "rope.dimension_count": (_INT, 2, 1 << 12),
    "rope.freq_base": (_NUMBER, 1, 1e12),
    "rope.scaling.original_context_length": (_INT, 1, 1 << 27),
    "rope.scaling.factor": (_NUMBER, 1e-6, 1e6),
    "rope.scale_linear": (_NUMBER, 1e-6, 1e6),
    "attention.layer_norm_rms_epsilon": (_NUMBER, 1e-12, 0.1),
    "expert_count": (_INT, 0, 1 << 12),
}


def _config(path: Path, values: dict[str, Any], tensors: dict[str, Packed], factors: Packed | None) -> LlamaConfig:
    def get(key: str, default: Any = None) -> Any:
        value = values.get(f"{_ARCHITECTURE}.{key}")
        kinds, least, most = _KEYS[key]
        if value is None and default is not None:
            return default
        if value is None:
            raise ValueError(f"{path}: {_ARCHITECTURE}.{key} is missing")
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            what = "a list (every layer its own)" if isinstance(value, np.ndarray) else repr(value)[:40]
            raise ValueError(f"{path}: {_ARCHITECTURE}.{key} is {what}; that is not a LLaMA's")
        return value

    if get("expert_count", 0):
        raise ValueError(f"{path}: a mixture of {get('expert_count')} experts (Mixtral); only plain LLaMAs open here")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: token_embd.weight is missing; not a whole LLaMA (a vocabulary alone?)")
    try:
        config = LlamaConfig(
            dim=get("embedding_length"),
            n_layers=get("block_count"),
            n_heads=get("attention.head_count"),
            n_kv_heads=get("attention.head_count_kv", get("attention.head_count")),
            ffn_dim=get("feed_forward_length"),
            vocab_size=get("vocab_size", tensors["token_embd.weight"].shape[0]),
            head_dim=get("attention.key_length", 0),
            norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
            rope_theta=_decimal(get("rope.freq_base", 10000.0)),
            max_seq_len=get("context_length"),
            tie_embeddings="output.weight" not in tensors,
        )
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(str(path)) else f"{path}: {e}") from None
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, config.head_dim) != config.head_dim:
            sizes = f"{get(key)}, the head size {config.head_dim}"
            raise ValueError(f"{path}: {_ARCHITECTURE}.{key} is {sizes}; they must agree")
    if factors is not None:
        original = get("rope.scaling.original_context_length", 8192)
        return dataclasses.replace(config, rope_scaling=_llama3_scaling(path, config, factors, original))
    kind = _text(values.get(f"{_ARCHITECTURE}.rope.scaling.type", b"linear"))  # llama.cpp's default
    factor = _decimal(get("rope.scaling.factor", get("rope.scale_linear", 1.0)))
    if kind not in ("none", "linear"):
        raise ValueError(f"{path}: rope scaling {kind!r} is not supported; none, linear and Llama 3's are")
    scaling = RopeScaling("linear", factor) if kind == "linear" and factor != 1 else None
    return dataclasses.replace(config, rope_scaling=scaling)


def as_stored(c: LlamaConfig) -> LlamaConfig:
    """A config as it comes back from a file, whose numbers are fp32."""
    return dataclasses.replace(c, norm_eps=_decimal(c.norm_eps), rope_theta=_decimal(c.rope_theta))


def _decimal(x: float) -> float:
    """The shortest decimal number that fp32 rounds to this one: GGUF stores 1e-5 as 9.99999974e-06."""
    return float(str(np.float32(x)))


def _llama3_scaling(path: Path, c: LlamaConfig, stored: Packed, original: int) -> RopeScaling | None:
    """Llama 3's scaling from what it divides the frequencies by (rope_freqs.weight); None when by nothing.

    With s = (1/divisor - 1/factor) / (1 - 1/factor), the blended frequencies f have s = f * A - B, a line, where
    A = original / (2 pi (high - low)) and B = low / (high - low). Only ratios count, so low is 1.
    """
    if stored.shape != (c.head_dim // 2,) or stored.kind != "F32":
        raise ValueError(f"{path}: {_ROPE} is {stored.kind} of {stored.shape}; it must be one number a frequency")
    divisors = unpack(path, stored).double()
    if not torch.isfinite(divisors).all() or divisors.min() < 1:
        raise ValueError(f"{path}: {_ROPE} has values below 1; that is not Llama 3's scaling")
    factor = divisors.max().item()
    if factor == 1:
        return None
    factor = float(f"{factor:.5g}")  # of two roundings
    candidates = [RopeScaling("llama3", factor, original_max_seq_len=original)]
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    inside = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    if inside.sum() >= 2:
        f, s = rotation_frequencies(c).double()[inside], smooth[inside]
        A = ((s[0] - s[-1]) / (f[0] - f[-1])).item()
        B = A * f[0].item() - s[0].item()
        if A > 0 and B > 0 and A / B * 2 * math.pi < 2**31:
            high = round(1 + 1 / B, 3)
            candidates.append(RopeScaling("llama3", factor, 1.0, high, round(A / B * 2 * math.pi)))
    for scaling in candidates:
        made = rope_factors(dataclasses.replace(c, rope_scaling=scaling))
        if made is not None and torch.allclose(torch.from_numpy(made).double(), divisors, rtol=1e-4):
            return scaling
    raise ValueError(f"{path}: {_ROPE} divides the frequencies by no rule of Llama 3's; not supported")


# --- writing --------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    tensors: Iterable[tuple[Entry, Tensor]],
    c: LlamaConfig,
    tokenizer: Tokenizer,
    file_kind: str,
    name: str,
    chat_format: ChatFormat | None = None,
    stages: provenance.Stages | None = None,
) -> None:
    """Write one GGUF file, a tensor at a time. tensors: those of entries(c), in order, in our layout and in
    dtype_in_gguf's number type. file_kind: F32, BF16, F16 or Q8_0, which the matrices get. chat_format: llama.cpp's
    chat gets it as a template. stages: where the model comes from."""
    gguf = package()
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    try:
        _add_metadata(writer, gguf, c, file_kind, name)
        _add_tokenizer(writer, tokenizer, c.vocab_size)
        if chat_format is not None:
            writer.add_chat_template(chat_template(chat_format))
            writer.add_string(_CHAT_FORMAT, json.dumps(chat_format.to_json()))
        if stages:
            writer.add_string(_PROVENANCE, json.dumps(provenance.document_of(stages), ensure_ascii=False))
        factors = rope_factors(c)
        if factors is not None:
            writer.add_tensor_info(_ROPE, factors.shape, factors.dtype, factors.nbytes)
        for e in entries(c):
            kind, size = gguf.GGMLQuantizationType[kind_in_gguf(e, file_kind)], bytes_in_gguf(e, file_kind)
            # A NumPy type that is not uint8, or the writer takes the shape for one of bytes; there is no bfloat16.
            writer.add_tensor_info(e.gguf, e.shape, np.dtype(np.uint16), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for e, t in tensors:
            whole = interleave(t, e.rope_heads) if e.rope_heads else t
            writer.write_tensor_data(pack(whole, kind_in_gguf(e, file_kind)))
            del t, whole  # or they would live on while the next one is made
    finally:
        writer.close()


def _add_metadata(writer: Any, gguf: ModuleType, c: LlamaConfig, file_kind: str, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[file_kind]])
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
    if c.rope_scaling and c.rope_scaling.kind == "llama3":  # the rest of it is in _ROPE
        writer.add_rope_scaling_orig_ctx_len(c.rope_scaling.original_max_seq_len)
    if c.rope_scaling and c.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling.factor)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """SentencePiece's pieces, scores and types. Rows beyond them (ChatDoctor's 32001st) are unused pad pieces."""
    pieces = pieces_of(tokenizer) + [padding(i) for i in range(tokenizer.vocab_size, vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([p.text for p in pieces])
    writer.add_token_scores([p.score for p in pieces])
    writer.add_token_types([p.kind for p in pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.encode("a") != tokenizer.encode("a", continued=True))


def rope_factors(c: LlamaConfig) -> np.ndarray[Any, Any] | None:
    """By what each rotary frequency is divided (Llama 3.1's scaling), which llama.cpp reads as a tensor; or None."""
    if c.rope_scaling is None or c.rope_scaling.kind != "llama3":
        return None
    plain = dataclasses.replace(c, rope_scaling=None)
    return (rotation_frequencies(plain) / rotation_frequencies(c)).numpy()
