"""THE seam between the model and its arithmetic: five operations, checked, then sent to an implementation.

Callers say `kernels.attention(...)`; which code runs is chosen per call, reported by describe() and set by use().
Tensors and floats in, tensors out: nothing here knows a model. The numerics are defined in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import Documents

__all__ = [
    "BACKENDS",
    "Documents",
    "attention",
    "describe",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "swiglu",
    "use",
]

BACKENDS = ("auto", "torch")

_wanted = "auto"


def use(backend: str) -> None:
    """Choose who computes: "auto" or "torch". ValueError for a backend that is not there."""
    global _wanted
    if backend not in BACKENDS:
        raise ValueError(f"kernels: no backend {backend!r}; there are {', '.join(BACKENDS)}")
    _wanted = backend


def describe() -> str:
    """One line: what runs, and why."""
    why = "asked for" if _wanted == "torch" else "the only backend of this version"
    return f"kernels: torch {torch.__version__} ({why})"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector of x (..., D) to root mean square 1, then by weight (D,). See reference.rms_norm."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    return reference.rms_norm(x, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, K) and k (B, T, G, K) by cos, sin (T, K/2) or (B, T, K/2) fp32. See reference.rope."""
    if cos.shape[-2:] != (q.shape[1], q.shape[3] // 2) or cos.shape != sin.shape:
        raise ValueError(f"rope: tables {tuple(cos.shape)} do not fit q {tuple(q.shape)}")
    return reference.rope(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for tensors of one shape. See reference.swiglu."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    return reference.swiglu(gate, up)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Causal attention of q (B, T, H, K) over k, v (B, S, G, K), within documents. See reference.attention."""
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != K or H % G or S < T:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if documents is not None and any(d.shape != (B, S) or d.dtype != torch.int32 for d in documents):
        raise ValueError(f"attention: documents must be two int32 tensors of shape {(B, S)}")
    return reference.attention(q, k, v, documents)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Summed cross-entropy of x (N, D) @ weight (V, D).T against targets (N,). See reference.linear_cross_entropy."""
    N, D = x.shape
    if weight.shape[1] != D or targets.shape != (N,):
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        )
    return reference.linear_cross_entropy(x, weight, targets, ignore_index)
