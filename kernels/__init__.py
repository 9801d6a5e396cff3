"""THE seam between the model and its arithmetic: seven operations, checked, then sent to an implementation.

Callers say `kernels.attention(...)`; which code runs is chosen per call, reported by describe() and set by use():
the Triton kernels where they can run, else plain PyTorch (reference.py, which defines the numerics). Tensors and
floats in, tensors out: nothing here knows a model. Triton and the kernel files are imported by the first call that
needs them, so a CPU run never loads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import launch, peers, reference
from kernels.reference import Documents, Scales, dequantise, from_codes, joined, split, to_codes

__all__ = [
    "BACKENDS",
    "Documents",
    "Scales",
    "adamw",
    "attention",
    "dequantise",
    "describe",
    "from_codes",
    "joined",
    "linear_cross_entropy",
    "quantised_linear",
    "rms_norm",
    "rope",
    "split",
    "swiglu",
    "to_codes",
    "use",
]

BACKENDS = ("auto", "triton", "torch", *peers.NAMES)
GROUPS = (32, 64, 128)  # numbers that may share a scale, besides a whole row

_wanted = "auto"


def use(backend: str, device: torch.device | str | None = None) -> None:
    """Choose who computes.

    "auto": our Triton kernels on a GPU that can run them, else PyTorch. "triton", "torch": that, or an error from the
    call that cannot. A name of peers.NAMES: attention by that implementation, the rest, and documents that branch, as
    auto.
    ValueError for a backend that is not there, or that cannot run on the device given.
    """
    global _wanted
    if backend not in BACKENDS:
        raise ValueError(f"kernels: no backend {backend!r}; there are {', '.join(BACKENDS)}")
    if device is not None and (reason := _why_not(backend, torch.device(device))):
        raise ValueError(f"kernels: {backend} was asked for, but {reason}")
    _wanted = backend


def describe(device: torch.device | str = "cpu") -> str:
    """One line: what runs on this device, and why."""
    device = torch.device(device)
    pytorch = f"torch {torch.__version__}"
    if _wanted == "torch":
        return f"kernels: {pytorch} (asked for)"
    reason = launch.why_not(device)
    if reason is None and (device.type == "cuda" or _wanted == "triton"):
        import triton

        where = "in its interpreter" if launch.interpreting() else f"on sm_{launch.architecture(device)}"
        rest = f"triton {triton.__version__} {where}"
    else:
        rest = f"{pytorch} ({'CPU' if device.type == 'cpu' else reason})"
    return f"kernels: {rest}" if _wanted not in peers.NAMES else f"kernels: attention by {_wanted}, the rest by {rest}"


def _why_not(backend: str, device: torch.device) -> str | None:
    if backend in peers.NAMES:
        return peers.why_not(backend, device)
    return launch.why_not(device) if backend == "triton" else None


def _by_triton(operation: str, x: Tensor, *others: Tensor) -> bool:
    """Whether this call goes to a Triton kernel; ValueError where it was asked for and cannot."""
    dtype, device = x.dtype, x.device
    for t in others:
        if t.dtype is not dtype or t.device != device:
            found = ", ".join(f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (x, *others))
            raise ValueError(f"{operation}: tensors of one dtype and device are needed, not {found}: use .to()")
    if _wanted == "torch" or not (x.is_cuda or _wanted == "triton"):
        return False
    reason = launch.why_not(x.device)
    if reason is None and x.dtype not in launch.DTYPES:
        reason = f"{x.dtype} has no kernel: use float32, bfloat16, float16, or the torch backend"
    return _decided(operation, reason)


def _decided(operation: str, reason: str | None) -> bool:
    """True for a Triton kernel; False where a reason speaks against it; ValueError if Triton was asked for by name."""
    if reason is not None and _wanted == "triton":
        raise ValueError(f"{operation}: triton was asked for, but {reason}")
    return reason is None


def _check_last_dimension(operation: str, *tensors: Tensor) -> None:
    for t in tensors:
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ValueError(
                f"{operation}: the last dimension of {tuple(t.shape)} with strides {t.stride()} is not contiguous: "
                "call .contiguous() on it first"
            )


def _check_devices(operation: str, x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{operation}: {name} on {t.device}, the rest on {x.device}: use .to()")


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each vector of x (..., D) to root mean square 1, then by weight (D,). See reference.rms_norm.

    With a residual of x's shape: (h, norm of h) for h = x + residual, the stream and what the next layer reads of it.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual {tuple(residual.shape)} does not fit x {tuple(x.shape)}")
    tensors = (x, weight) if residual is None else (x, weight, residual)
    if _by_triton("rms_norm", *tensors):
        from kernels import norm

        long = x.shape[-1] > norm.LARGEST
        if _decided(
            "rms_norm", f"rows of {x.shape[-1]} exceed its {norm.LARGEST}: use the torch backend" if long else None
        ):
            _check_last_dimension("rms_norm", *tensors)
            return norm.rms_norm(x, weight, eps) if residual is None else norm.add_rms_norm(x, residual, weight, eps)
    if residual is None:
        return reference.rms_norm(x, weight, eps)
    h = x + residual
    return h, reference.rms_norm(h, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, K) and k (B, T, G, K) by cos, sin (T, K/2) or (B, T, K/2) fp32. See reference.rope."""
    B, T, _, K = q.shape
    if k.shape[:2] != (B, T) or k.shape[3] != K or K % 2:
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    if cos.shape[-2:] != (T, K // 2) or cos.shape != sin.shape or (cos.ndim == 3 and cos.shape[0] not in (1, B)):
        raise ValueError(f"rope: tables {tuple(cos.shape)} do not fit q {tuple(q.shape)}")
    _check_devices("rope", q, cos=cos, sin=sin)
    if _by_triton("rope", q, k):
        from kernels import rotary

        _check_last_dimension("rope", q, k, cos, sin)
        return rotary.rope(q, k, cos, sin)
    return reference.rope(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for tensors of one shape. See reference.swiglu."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    if _by_triton("swiglu", gate, up):
        from kernels import gate as gating

        _check_last_dimension("swiglu", gate, up)
        return gating.swiglu(gate, up)
    return reference.swiglu(gate, up)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    length: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """Causal attention of q (B, T, H, K) over k, v (B, S, G, K), within documents. See reference.attention.

    length int32 (1,), on the device: only so many positions of k and v are there, and the queries are the last of them.
    scales, k's and v's, fp32 (B, S, G): k and v are int8 codes, as to_codes makes them of heads; there is no gradient.
    """
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != K or H % G or S < T:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    branches = documents is not None and len(documents) == 4
    if documents is not None:
        if not (branches or len(documents) == 2) or any(d.shape != (B, S) or d.dtype != torch.int32 for d in documents):
            raise ValueError(f"attention: documents must be two int32 tensors of shape {(B, S)}, or four that branch")
        if branches and (S != T or scales is not None):
            raise ValueError(f"attention: documents that branch are whole rows, not {T} queries over {S} positions")
        if branches and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            raise ValueError("attention: documents that branch have no gradient: call it in torch.no_grad()")
    if length is not None:
        if length.shape != (1,) or length.dtype != torch.int32 or documents is not None:
            raise ValueError("attention: a length must be one int32, and goes without documents")
        _check_devices("attention", q, length=length)
    if scales is not None:
        return _attention_of_codes(q, k, v, scales, documents, length)
    if length is not None:
        if not _by_triton("attention", q, k, v):
            return reference.attention_bounded(q, k, v, length)
        from kernels import decode

        reason = None if decode.takes(q, k) else f"{T} queries are too many for a length: give documents instead"
        if _decided("attention", reason):
            return decode.attention(q, k, v, None, length)
        return reference.attention_bounded(q, k, v, length)
    if _wanted in peers.NAMES and not branches:
        return peers.attention(_wanted, q, k, v, documents)
    if _by_triton("attention", q, k, v):
        from kernels import decode, flash

        if _decided("attention", flash.why_not(q, k, v, documents)):
            few = decode.takes(q, k) and not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)))
            return (decode if few else flash).attention(q, k, v, documents)
    return reference.attention(q, k, v, documents)


def _attention_of_codes(
    q: Tensor, k: Tensor, v: Tensor, scales: Scales, documents: Documents | None, length: Tensor | None
) -> Tensor:
    """Few queries read the codes; for many, or a peer, k and v are made of them first, all on a GPU."""
    for name, t, s in zip("kv", (k, v), scales, strict=True):
        if t.dtype != torch.int8 or s.dtype != torch.float32 or s.shape != t.shape[:3]:
            raise ValueError(
                f"attention: {name} of {t.dtype} with scales {tuple(s.shape)} of {s.dtype}: int8 and float32 "
                f"{tuple(t.shape[:3])} are needed"
            )
        _check_devices("attention", q, **{name: t, f"{name}'s scales": s})
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("attention: codes are for inference and give no gradient: call it in torch.no_grad()")
    if _wanted not in peers.NAMES or length is not None:
        if not _by_triton("attention", q):
            return reference.attention_of_codes(q, k, v, scales, documents, length)
        from kernels import decode, flash

        if decode.takes(q, k) and flash.why_not(q, k, v, documents) is None:
            return decode.attention(q, k, v, documents, length, scales)
    k, v = (from_codes(t, s, q.dtype) for t, s in zip((k, v), scales, strict=True))
    return attention(q, k, v, documents, length)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, token_weights: Tensor | None = None
) -> Tensor:
    """Summed cross-entropy of x (N, D) @ weight (V, D).T against targets (N,). See reference.linear_cross_entropy.

    token_weights (N,) fp32: each row's loss counts so many times.
    """
    N, D = x.shape
    if weight.shape[1] != D or targets.shape != (N,):
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        )
    if token_weights is not None and (token_weights.shape != (N,) or token_weights.dtype != torch.float32):
        raise ValueError(f"linear_cross_entropy: token_weights must be float32 of shape {(N,)}")
    _check_devices("linear_cross_entropy", x, targets=targets, token_weights=token_weights)
    if _by_triton("linear_cross_entropy", x, weight):
        from kernels import loss

        _check_last_dimension("linear_cross_entropy", x, weight)
        return loss.linear_cross_entropy(x, weight, targets, ignore_index, token_weights)
    return reference.linear_cross_entropy(x, weight, targets, ignore_index, token_weights)


def adamw(
    weight: Tensor,
    low: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    *,
    keep: float,
    rate: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    seed: int,
) -> None:
    """One AdamW update in place, computed in fp32.

    All flat and contiguous, of one length but for scale, an fp32 scalar that gradient is multiplied by. weight: fp32
    with low None, or bf16 with low int16, its other half (reference.split). Moments both fp32, or both bf16: then
    rounded at random, by seed. keep: 1 - lr * weight_decay. rate: lr / (1 - beta1^t). root: sqrt(1 - beta2^t).
    """
    for name, t in (("low", low), ("gradient", gradient), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if t is not None and (t.shape != weight.shape or t.ndim != 1 or not t.is_contiguous()):
            raise ValueError(f"adamw: {name} {tuple(t.shape)} is no flat contiguous tensor like weight {weight.shape}")
    if not weight.is_contiguous():
        raise ValueError("adamw: weight must be contiguous")
    if (weight.dtype, None if low is None else low.dtype) not in (
        (torch.float32, None),
        (torch.bfloat16, torch.int16),
    ):
        raise ValueError(f"adamw: weight {weight.dtype} with low half {None if low is None else low.dtype}")
    if exp_avg.dtype != exp_avg_sq.dtype or exp_avg.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"adamw: moments {exp_avg.dtype} and {exp_avg_sq.dtype}: float32 or bfloat16 are needed")
    _check_devices("adamw", weight, low=low, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, scale=scale)
    numbers = {"keep": keep, "rate": rate, "beta1": beta1, "beta2": beta2, "root": root, "eps": eps, "seed": seed}
    if _by_triton("adamw", weight):
        from kernels import optimizer

        optimizer.adamw(weight, low, gradient, exp_avg, exp_avg_sq, scale, **numbers)
    else:
        reference.adamw(weight, low, gradient, exp_avg, exp_avg_sq, scale, **numbers)


def quantised_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x (..., in) times a matrix of 4- or 8-bit codes: y (..., out) in x.dtype, no gradient. See reference.dequantise.

    codes uint8 (out, in * bits / 8), two to a byte in 4 bits; scales (out, in / group) of any float type, where a group
    is of 32, 64 or 128 numbers or the whole row.
    """
    _check_codes(x, codes, scales, bits)
    _check_devices("quantised_linear", x, codes=codes, scales=scales)
    if torch.is_grad_enabled() and (x.requires_grad or scales.requires_grad):
        raise ValueError("quantised_linear: it has no gradient, as codes are for inference: call it in torch.no_grad()")
    if _by_triton("quantised_linear", x):
        from kernels import codes as coded

        if _decided("quantised_linear", coded.why_not(x, codes, scales, bits)):
            return coded.quantised_linear(x, codes, scales, bits)
    return reference.quantised_linear(x, codes, scales, bits)


def _check_codes(x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> None:
    operation = "quantised_linear"
    if bits not in (4, 8):
        raise ValueError(f"{operation}: codes of {bits} bits: 4 or 8 are needed")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"{operation}: codes {tuple(codes.shape)} {codes.dtype}: a uint8 matrix is needed")
    if not x.is_floating_point() or not scales.is_floating_point():
        raise ValueError(f"{operation}: x is {x.dtype} and scales are {scales.dtype}: floating types are needed")
    width = codes.shape[1] * 8 // bits
    if x.shape[-1:] != (width,):
        raise ValueError(f"{operation}: x {tuple(x.shape)} does not fit {codes.shape[0]} rows of {width} codes")
    if scales.ndim != 2 or len(scales) != len(codes) or not scales.shape[1] or width % scales.shape[1]:
        raise ValueError(f"{operation}: scales {tuple(scales.shape)} do not fit {len(codes)} rows of {width} codes")
    group = width // scales.shape[1]
    if group not in GROUPS and scales.shape[1] > 1:
        raise ValueError(f"{operation}: groups of {group} numbers: 32, 64, 128 or a whole row are possible")
