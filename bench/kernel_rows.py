"""The rows of bench_kernels, their shapes and targets: RMSNorm, RoPE, SwiGLU and the loss are here, attention is
kernel_work's, products with quantised matrices are kernel_codes'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench import kernel_codes
from bench import kernel_work as work
from bench.kernel_work import Absent, Call, Outputs, Part, Row, Setting, Target, Work, as_tuple
from kernels import reference

EPS = 1e-5


def memory_bound(
    s: Setting,
    functions: dict[str, Callable[[], Callable[..., Any]]],
    plain: Callable[..., Any],
    make: Callable[[int], Sequence[Tensor]],
    step: str,
    amount: float,
) -> Work:
    """A row whose implementations take the tensors of make(seed); plain defines what is right."""
    sets = s.sets(make)
    gradients: list[Outputs] = []
    if step == "backward":
        shapes = [t.shape for t in as_tuple(plain(*sets[0]))]
        gradients = [
            tuple(s.normal(*shape, seed=1000 + 10 * i + j) for j, shape in enumerate(shapes)) for i in range(len(sets))
        ]

    def calls(name: str) -> Call:
        function, own, theirs = functions[name](), sets, gradients
        if name == "liger":  # writes over its inputs
            own = [[t.clone() for t in inputs] for inputs in sets]
            theirs = [tuple(t.clone() for t in of_one) for of_one in gradients]
        return work.backward(function, own, theirs) if gradients else work.forward(function, own)

    return Work(
        {name: partial(calls, name) for name in functions},
        lambda: work.from_reference(plain, sets[0], gradients[0] if gradients else None),
        amount,
        s.tolerance,
    )


def _liger(name: str) -> Callable[..., Any]:
    if find_spec("liger_kernel") is None:
        raise Absent("liger is not installed: pip install liger-kernel")
    from liger_kernel.transformers import functional

    return getattr(functional, name)


def norm(s: Setting, *, N: int, D: int, step: str, residual: bool) -> Work:
    """RMSNorm of x, or of x + r, which is a result too."""

    def make(seed: int) -> list[Tensor]:
        rows = [s.normal(N, D, seed=3 * seed + i) for i in range(1 + residual)]
        return [*rows, s.normal(D, seed=3 * seed + 2, scale=0.1).add_(1)]

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return reference.rms_norm(x, w, EPS)

    def plain_sum(x: Tensor, r: Tensor, w: Tensor) -> Outputs:
        h = x + r
        return h, reference.rms_norm(h, w, EPS)

    def ligers() -> Callable[..., Tensor]:
        function = _liger("liger_rms_norm")
        return lambda x, w: function(x, w, EPS)

    def ligers_sum() -> Callable[..., Outputs]:
        function = _liger("liger_fused_add_rms_norm")
        return lambda x, r, w: function(x, r, w, EPS)[::-1]  # the sum comes second

    functions: dict[str, Callable[[], Callable[..., Any]]]
    if residual:
        functions = {
            "ours": lambda: lambda x, r, w: kernels.rms_norm(x, w, EPS, residual=r),
            "compiled": lambda: s.compiled(plain_sum),
            "liger": ligers_sum,
        }
    else:
        functions = {
            "ours": lambda: lambda x, w: kernels.rms_norm(x, w, EPS),
            "compiled": lambda: s.compiled(plain),
            "F.rms_norm": lambda: lambda x, w: F.rms_norm(x, (D,), w, EPS),
            "liger": ligers,
        }
    amount = norm_bytes(N, D, s.dtype.itemsize, step, residual)
    return memory_bound(s, functions, plain_sum if residual else plain, make, step, amount)


def norm_bytes(N: int, D: int, itemsize: int, step: str, residual: bool) -> float:
    """Forward x (r) -> (h) y; backward dy (dh) x -> dx. The weight and its gradient are D numbers each."""
    rows = {("forward", False): 2, ("forward", True): 4, ("backward", False): 3, ("backward", True): 4}[step, residual]
    return float(itemsize * (rows * N * D + D * (2 if step == "backward" else 1)))


def rope(s: Setting, *, B: int, T: int, H: int, G: int, K: int, step: str) -> Work:
    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, K, 2) / K))
    cos, sin = angles.cos().to(s.device), angles.sin().to(s.device)

    def with_tables(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k: function(q, k, cos, sin)

    def liger() -> Callable[..., Any]:
        function, tables = _liger("liger_rope"), [torch.cat((t, t), -1)[None].to(s.dtype) for t in (cos, sin)]
        return lambda q, k: [t.transpose(1, 2) for t in function(q.transpose(1, 2), k.transpose(1, 2), *tables)]

    plain = with_tables(reference.rope)
    functions = {
        "ours": lambda: with_tables(kernels.rope),
        "compiled": lambda: s.compiled(plain),
        "liger": liger,
    }
    return memory_bound(
        s,
        functions,
        plain,
        lambda seed: [s.normal(B, T, n, K, seed=2 * seed + i) for i, n in enumerate((H, G))],
        step,
        rope_bytes(B, T, H, G, K, s.dtype.itemsize),
    )


def rope_bytes(B: int, T: int, H: int, G: int, K: int, itemsize: int) -> float:
    """q and k read and written, the two fp32 tables read; the same backward."""
    return float(2 * itemsize * B * T * (H + G) * K + 2 * 4 * T * (K // 2))


def swiglu(s: Setting, *, N: int, width: int, step: str) -> Work:
    functions = {
        "ours": lambda: kernels.swiglu,
        "compiled": lambda: s.compiled(reference.swiglu),
        "liger": lambda: _liger("liger_swiglu"),
    }
    return memory_bound(
        s,
        functions,
        reference.swiglu,
        lambda seed: [s.normal(N, width, seed=2 * seed + i) for i in range(2)],
        step,
        swiglu_bytes(N, width, s.dtype.itemsize, step),
    )


def swiglu_bytes(N: int, width: int, itemsize: int, step: str) -> float:
    """Forward gate, up -> y; backward dy, gate, up -> two gradients."""
    return float(itemsize * N * width * (3 if step == "forward" else 5))


# ---- the loss ----


def loss(s: Setting, *, N: int, V: int, D: int) -> Work:
    """Forward and backward of the summed cross-entropy; the gradient of the mean, as in training."""
    x, w = s.normal(N, D, seed=0), s.normal(V, D, seed=1, scale=D**-0.5)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)).to(s.device)
    gradient = (torch.tensor(1.0 / N, device=s.device),)

    def torchs_chunked() -> Callable[..., Tensor]:
        if not hasattr(F, "linear_cross_entropy"):
            raise Absent("torch has F.linear_cross_entropy from 2.13 on")
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        return partial(F.linear_cross_entropy, reduction="sum", options=LinearCrossEntropyOptions())

    functions: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "ours": lambda: kernels.linear_cross_entropy,
        "plain": lambda: lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum"),
        "plain, fp32 logits": lambda: lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t, reduction="sum"),
        "F.linear_cross_entropy": torchs_chunked,
        "liger": lambda: partial(_liger("liger_fused_linear_cross_entropy"), reduction="sum"),
    }

    def call(function: Callable[..., Tensor]) -> Call:
        return work.both(lambda x, w: function(x, w, targets).float(), [[x, w]], [gradient])

    return Work(
        {name: lambda f=f: call(f()) for name, f in functions.items()},
        lambda: exact_loss(x, w, targets),
        6.0 * N * V * D,
        s.tolerance,
    )


def exact_loss(x: Tensor, w: Tensor, targets: Tensor, rows: int = 1024, some: int = 64) -> list[Part]:
    """In fp32: the loss, and the mean's gradient for the first and last rows of x and the first rows of w."""
    N, V = x.shape[0], w.shape[0]
    w32, first = w.float(), min(some, V)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    dw = torch.zeros(first, x.shape[1], device=x.device)
    dx = {}
    for i in range(0, N, rows):
        xc, tc = x[i : i + rows].float(), targets[i : i + rows, None]
        logits = xc @ w32.t()
        lse = logits.logsumexp(1, keepdim=True)
        total += (lse - logits.gather(1, tc)).double().sum()
        p = logits.sub_(lse).exp_().scatter_add_(1, tc, torch.full_like(lse, -1.0))
        dw += p[:, :first].t() @ xc
        dx[i] = (p[:some] @ w32) / N
    begin, end = 0, max(dx)
    return [
        Part(lambda outputs: outputs[0], total),
        Part(lambda outputs: outputs[1][begin : begin + min(some, rows)], dx[begin]),
        Part(lambda outputs: outputs[1][end : end + min(some, rows)], dx[end]),
        Part(lambda outputs: outputs[2][:first], dw / N),
    ]


# ---- the table ----

STEPS = ("forward", "backward")

# full: the issue's shapes at LLaMA-7B's and Llama-3's sizes. quick: one of each. tiny: for a CPU, to see that it runs.
SHAPES: dict[str, dict[str, list[dict[str, int]]]] = {
    "full": {
        "attention": [
            {"B": 8, "T": 2048, "H": 16, "G": 16, "K": 128},
            {"B": 4, "T": 4096, "H": 16, "G": 16, "K": 128},
            {"B": 2, "T": 8192, "H": 16, "G": 16, "K": 128},
            {"B": 1, "T": 16384, "H": 16, "G": 16, "K": 128},
            {"B": 2, "T": 8192, "H": 32, "G": 8, "K": 128},
            {"B": 4, "T": 4096, "H": 32, "G": 32, "K": 64},
        ],
        "packed": [{"B": 1, "T": T, "H": 32, "G": 32, "K": 128} for T in (8192, 32768)],
        "decode": [
            *({"B": B, "S": S, "H": 32, "G": 32, "K": 128} for S in (2048, 8192) for B in (1, 8, 32)),
            {"B": 32, "S": 8192, "H": 32, "G": 8, "K": 128},
            {"B": 1, "S": 1024, "H": 32, "G": 32, "K": 128, "room": 1024},
            {"B": 1, "S": 8192, "H": 32, "G": 8, "K": 128, "room": 8192},
        ],
        "norm": [{"N": 32768, "D": 4096}],
        "rope": [{"B": 4, "T": 4096, "H": 32, "G": 32, "K": 128}],
        "swiglu": [{"N": 16384, "width": 11008}],
        "codes": kernel_codes.SHAPES["full"],
        "loss": [{"N": N, "V": V, "D": 4096} for V in (32000, 128256) for N in (8192, 32768)],
    },
    "quick": {
        "attention": [{"B": 4, "T": 4096, "H": 16, "G": 16, "K": 128}],
        "packed": [{"B": 1, "T": 8192, "H": 32, "G": 32, "K": 128}],
        "decode": [{"B": 8, "S": 8192, "H": 32, "G": 32, "K": 128}],
        "norm": [{"N": 32768, "D": 4096}],
        "rope": [{"B": 4, "T": 4096, "H": 32, "G": 32, "K": 128}],
        "swiglu": [{"N": 16384, "width": 11008}],
        "codes": kernel_codes.SHAPES["quick"],
        "loss": [{"N": 8192, "V": 32000, "D": 4096}],
    },
    "tiny": {
        "attention": [{"B": 2, "T": 48, "H": 4, "G": 2, "K": 32}],
        "packed": [{"B": 1, "T": 64, "H": 2, "G": 2, "K": 32}],
        "decode": [{"B": 2, "S": 64, "H": 4, "G": 2, "K": 32, **room} for room in ({}, {"room": 32})],
        "norm": [{"N": 8, "D": 64}],
        "rope": [{"B": 1, "T": 16, "H": 2, "G": 1, "K": 32}],
        "swiglu": [{"N": 8, "width": 64}],
        "codes": kernel_codes.SHAPES["tiny"],
        "loss": [{"N": 96, "V": 128, "D": 32}],
    },
}
OPS = tuple(SHAPES["full"])


def rows(size: str = "full", only: Sequence[str] = OPS) -> list[Row]:
    """Every row of a size, in the order in which they are worth measuring."""
    makers = {
        "attention": _attention_rows,
        "packed": _packed_rows,
        "decode": _decode_rows,
        "norm": _norm_rows,
        "rope": _rope_rows,
        "swiglu": _swiglu_rows,
        "codes": kernel_codes.rows,
        "loss": _loss_rows,
    }
    return [row for op in OPS if op in only for shape in SHAPES[size][op] for row in makers[op](shape)]


def _attention_rows(shape: dict[str, int]) -> list[Row]:
    heads = f"{shape['H']} heads" if shape["H"] == shape["G"] else f"{shape['H']}/{shape['G']} heads"
    others = ("sdpa_flash", "cudnn", "flash_attn")
    # Targets are set where the published figures are: as many key/value heads as heads, of size 128.
    stretch = {"forward": 0.9, "backward": 0.8}
    hoped = shape["H"] == shape["G"] and shape["K"] == 128
    return [
        Row(
            "attention",
            f"attention {step}, {shape['B']} x {shape['T']:,}, {heads} of {shape['K']}",
            "TFLOP/s",
            partial(work.attention, **shape, step=step, others=others, lengths=None),
            [Target("sdpa_flash", 1.0), Target("cudnn", stretch[step])] if hoped else [],
        )
        for step in STEPS
    ]


def _packed_rows(shape: dict[str, int]) -> list[Row]:
    return [
        Row(
            "packed",
            f"packed documents forward + backward, {shape['T']:,} tokens, {shape['H']} heads of {shape['K']}",
            "TFLOP/s",
            partial(
                work.attention,
                **shape,
                step="both",
                others=("flex", "varlen", "flash_attn"),
                lengths=work.document_lengths(shape["T"]),
            ),
            [Target("flex", 2.0), Target("varlen", 1.2)],
        )
    ]


def _decode_rows(shape: dict[str, int]) -> list[Row]:
    room = shape.get("room", 0)
    cache = f"{shape['S']:,} of {shape['S'] + room:,}" if room else f"{shape['S']:,}"
    name = f"decode attention, batch {shape['B']}, cache {cache}, {shape['H']}/{shape['G']} heads"
    return [Row("decode", name, "GB/s", partial(work.decode, **shape), [Target("copy", 0.8), Target("sdpa", 1.0)])]


def _norm_rows(shape: dict[str, int]) -> list[Row]:
    hoped = {("forward", False): 0.9, ("backward", False): 0.8, ("forward", True): 0.85, ("backward", True): 0.85}
    return [
        Row(
            "norm",
            f"{'residual add + ' if residual else ''}RMSNorm {step}, {shape['N']:,} x {shape['D']:,}",
            "GB/s",
            partial(norm, **shape, step=step, residual=residual),
            [Target("copy", hoped[step, residual])],
        )
        for residual in (False, True)
        for step in STEPS
    ]


def _rope_rows(shape: dict[str, int]) -> list[Row]:
    name = f"{shape['B']} x {shape['T']:,}, {shape['H']} + {shape['G']} heads of {shape['K']}"
    return [
        Row("rope", f"RoPE {step}, {name}", "GB/s", partial(rope, **shape, step=step), [Target("copy", 0.9)])
        for step in STEPS
    ]


def _swiglu_rows(shape: dict[str, int]) -> list[Row]:
    name = f"{shape['N']:,} x {shape['width']:,}"
    return [
        Row("swiglu", f"SwiGLU {step}, {name}", "GB/s", partial(swiglu, **shape, step=step), [Target("copy", 0.9)])
        for step in STEPS
    ]


def _loss_rows(shape: dict[str, int]) -> list[Row]:
    return [
        Row(
            "loss",
            f"linear cross-entropy forward + backward, {shape['N']:,} x {shape['V']:,}",
            "TFLOP/s",
            partial(loss, **shape),
            [Target("plain", 1 / 1.1), Target("plain", 1 / 3, memory=True)],
            memory=True,
        )
    ]
