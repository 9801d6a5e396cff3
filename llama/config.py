"""Sizes of a LLaMA: presets, and the two ways the world writes them down.

Everything that needs a size takes a LlamaConfig; nothing guesses one from a path. Reads `config.json` as
transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) write it, and Meta's `params.json`.
Standard library only: the data package imports this file without torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind "linear" divides every frequency by `factor`; kind "llama3" divides only wavelengths longer than
    original_max_seq_len / low_freq_factor and blends up to original_max_seq_len / high_freq_factor
    (Llama 3.1, Meta's llama-models).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one model. `rope_theta` is the rotary base, `norm_eps` RMSNorm's epsilon."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int = 0  # 0: dim / n_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    ranks: int = 1  # processes that share the heads (tensor_parallel.py); no file says it

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ValueError(f"config: {name} is {value!r}; it must be a positive whole number")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"config: {name} is {value!r}; it must be a positive number")
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"config: tie_embeddings is {self.tie_embeddings!r}; it must be true or false")
        if self.head_dim == 0:
            if self.dim % self.n_heads:
                raise ValueError(f"config: dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"config: head_dim is {self.head_dim!r}; rotary embeddings need an even head size")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")

    def n_params(self) -> int:
        """Parameters in the model, a tied head counted once."""
        attn = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        block = attn + 3 * self.dim * self.ffn_dim + 2 * self.dim
        ends = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * block + ends + self.dim

    def with_vocab(self, vocab_size: int) -> LlamaConfig:
        """The same model over another vocabulary."""
        return dataclasses.replace(self, vocab_size=vocab_size)


def ffn_dim_of(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Meta's rule for the MLP width: 8/3 of dim, times a multiplier, rounded up to multiple_of."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


# --- presets --------------------------------------------------------------------------------------

_LLAMA31 = RopeScaling("llama3", factor=8.0)
_LLAMA32 = RopeScaling("llama3", factor=32.0)


def _llama1(dim: int, layers: int, heads: int, ffn: int, eps: float = 1e-6) -> LlamaConfig:
    return LlamaConfig(dim, layers, heads, heads, ffn, 32000, norm_eps=eps, max_seq_len=2048)


def _llama2(dim: int, layers: int, heads: int, kv: int, ffn: int) -> LlamaConfig:
    return LlamaConfig(dim, layers, heads, kv, ffn, 32000, max_seq_len=4096)


def _llama3(dim: int, layers: int, heads: int, ffn: int, **kw: Any) -> LlamaConfig:
    return LlamaConfig(dim, layers, heads, 8, ffn, 128256, rope_theta=500000.0, **kw)


PRESETS: dict[str, LlamaConfig] = {
    # The embedded default: small enough to train in minutes on two CPU cores. The vocabulary is that of the
    # tokenizer trained with it.
    "tiny": LlamaConfig(128, 3, 4, 4, 384, 2048, max_seq_len=512, tie_embeddings=True),
    # Sizes of karpathy's llama2.c models, for benches.
    "15m": LlamaConfig(288, 6, 6, 6, 768, 32000, max_seq_len=1024, tie_embeddings=True),
    "110m": LlamaConfig(768, 12, 12, 12, 2048, 32000, max_seq_len=1024, tie_embeddings=True),
    # TinyLlama (Zhang et al. 2024, arXiv:2401.02385).
    "1.1b": LlamaConfig(2048, 22, 32, 4, 5632, 32000, max_seq_len=2048),
    # LLaMA 1 (Touvron et al. 2023, arXiv:2302.13971), Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783).
    "7b": _llama1(4096, 32, 32, 11008),
    "13b": _llama1(5120, 40, 40, 13824),
    "30b": _llama1(6656, 60, 52, 17920),
    "65b": _llama1(8192, 80, 64, 22016, eps=1e-5),
    "llama2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama3-8b": _llama3(4096, 32, 32, 14336, max_seq_len=8192),
    "llama3-70b": _llama3(8192, 80, 64, 28672, max_seq_len=8192),
    "llama3.1-8b": _llama3(4096, 32, 32, 14336, max_seq_len=131072, rope_scaling=_LLAMA31),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672, max_seq_len=131072, rope_scaling=_LLAMA31),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248, max_seq_len=131072, rope_scaling=_LLAMA31),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, max_seq_len=131072, rope_scaling=_LLAMA32, tie_embeddings=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, max_seq_len=131072, rope_scaling=_LLAMA32, tie_embeddings=True),
    "llama3.3-70b": _llama3(8192, 80, 64, 28672, max_seq_len=131072, rope_scaling=_LLAMA31),
}


# --- Hugging Face config.json ---------------------------------------------------------------------


def _need(d: dict[str, Any], key: str, kind: tuple[type, ...] | type, default: Any = None) -> Any:
    value = d.get(key, default)
    if value is None:
        raise ValueError(f"config.json: {key} is missing")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"config.json: {key} is {value!r}; it must be {' or '.join(k.__name__ for k in kinds)}")
    return value


def _rope_from_hf(d: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    scaling = d.get("rope_parameters") or d.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json: rope parameters are {scaling!r}; they must be an object")
    theta = scaling.get("rope_theta", d.get("rope_theta", 10000.0))
    if not isinstance(theta, (int, float)) or isinstance(theta, bool):
        raise ValueError(f"config.json: rope_theta is {theta!r}; it must be a number")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported; default, linear and llama3 are")
    number = (int, float)
    if kind == "linear":
        return float(theta), RopeScaling("linear", float(_need(scaling, "factor", number)))
    return float(theta), RopeScaling(
        "llama3",
        float(_need(scaling, "factor", number)),
        float(_need(scaling, "low_freq_factor", number)),
        float(_need(scaling, "high_freq_factor", number)),
        _need(scaling, "original_max_position_embeddings", int),
    )


def from_hf(d: dict[str, Any]) -> LlamaConfig:
    """LlamaConfig of a Hugging Face `config.json`. ValueError names the key and value that cannot be used."""
    if d.get("model_type") != "llama":
        raise ValueError(f"config.json: model_type is {d.get('model_type')!r}; only llama models open here")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if d.get(key, wanted) != wanted:
            raise ValueError(f"config.json: {key} is {d[key]!r}; only {wanted!r} is supported")
    heads = _need(d, "num_attention_heads", int)
    theta, scaling = _rope_from_hf(d)
    return LlamaConfig(
        dim=_need(d, "hidden_size", int),
        n_layers=_need(d, "num_hidden_layers", int),
        n_heads=heads,
        n_kv_heads=_need(d, "num_key_value_heads", int, heads) if d.get("num_key_value_heads") else heads,
        ffn_dim=_need(d, "intermediate_size", int),
        vocab_size=_need(d, "vocab_size", int),
        head_dim=d.get("head_dim") or 0,
        norm_eps=float(_need(d, "rms_norm_eps", (int, float), 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=_need(d, "max_position_embeddings", int, 2048),
        tie_embeddings=bool(d.get("tie_word_embeddings", False)),
    )


def to_hf(c: LlamaConfig) -> dict[str, Any]:
    """`config.json` in the spelling of transformers 4, which 5, vLLM and llama.cpp's converter read as well."""
    d: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    if s := c.rope_scaling:
        d["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            d["rope_scaling"] |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_seq_len,
            }
    return d


# --- Meta params.json -----------------------------------------------------------------------------


def from_meta(p: dict[str, Any], vocab_size: int) -> LlamaConfig:
    """LlamaConfig of Meta's `params.json`; vocab_size (rows of the embedding) stands in for their -1.

    The file does not say everything: LLaMA 1 and Llama 2 differ by norm_eps (65B by its 80 layers without grouped
    queries), and Llama 3.2's frequency factor of 32 is known only by its sizes.
    """
    dim, heads = _need(p, "dim", int), _need(p, "n_heads", int)
    eps, theta = float(_need(p, "norm_eps", (int, float))), float(p.get("rope_theta") or 10000.0)
    kv = p.get("n_kv_heads") or heads
    stated = p.get("vocab_size", -1)
    if stated not in (-1, vocab_size):
        raise ValueError(f"params.json: vocab_size is {stated}, but the embedding has {vocab_size} rows")
    scaling = None
    if p.get("use_scaled_rope"):
        factor = p.get("rope_scaling_factor") or (32.0 if dim in (2048, 3072) else 8.0)
        scaling = RopeScaling("llama3", float(factor))
    if theta == 500000.0:
        context = 131072 if scaling else 8192
    else:
        context = 2048 if kv == heads and (eps < 5e-6 or dim == 8192) else 4096
    return LlamaConfig(
        dim=dim,
        n_layers=_need(p, "n_layers", int),
        n_heads=heads,
        n_kv_heads=kv,
        ffn_dim=p.get("ffn_dim") or ffn_dim_of(dim, _need(p, "multiple_of", int, 256), p.get("ffn_dim_multiplier")),
        vocab_size=vocab_size,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=p.get("max_seq_len") or context,
    )


def to_meta(c: LlamaConfig) -> dict[str, Any]:
    """Meta's `params.json`. multiple_of and ffn_dim_multiplier are chosen so that Meta's rule gives ffn_dim back."""
    if c.head_dim * c.n_heads != c.dim:
        raise ValueError(f"Meta's format has no head_dim: {c.n_heads} heads of {c.head_dim} do not make {c.dim}")
    p: dict[str, Any] = {
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "vocab_size": c.vocab_size,
        "norm_eps": c.norm_eps,
    }
    if c.n_kv_heads != c.n_heads:
        p["n_kv_heads"] = c.n_kv_heads
    p["multiple_of"] = 256
    if ffn_dim_of(c.dim, 256) != c.ffn_dim:
        p["multiple_of"] = math.gcd(c.ffn_dim, 4096)
        p["ffn_dim_multiplier"] = c.ffn_dim / int(2 * 4 * c.dim / 3)
        if ffn_dim_of(c.dim, p["multiple_of"], p["ffn_dim_multiplier"]) != c.ffn_dim:
            # int() of the product may fall just below ffn_dim; aimed half a unit higher it cannot.
            p["ffn_dim_multiplier"] = (c.ffn_dim + 0.5) / int(2 * 4 * c.dim / 3)
    if c.rope_scaling:
        if c.rope_scaling.kind != "llama3":
            raise ValueError(f"Meta's format has no {c.rope_scaling.kind} rope scaling")
        p["use_scaled_rope"] = True
    if c.rope_theta != 10000.0:
        p["rope_theta"] = c.rope_theta
    # Keys that Meta's own files lack, and its code refuses (Llama 2 passes max_seq_len to ModelArgs a second time),
    # are written only where from_meta would guess another value.
    if c.rope_scaling and from_meta(p, c.vocab_size).rope_scaling != c.rope_scaling:
        p["rope_scaling_factor"] = c.rope_scaling.factor
    if from_meta(p, c.vocab_size).max_seq_len != c.max_seq_len:
        p["max_seq_len"] = c.max_seq_len
    return p
