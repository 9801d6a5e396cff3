"""What a row of bench_kernels is made of: inputs, who computes it, what counts as work, what is right. And attention's.

Work is counted from the shapes alone: the fewest operations, or the fewest bytes (each input read once, each result
written once), whatever an implementation really does. Causal attention counts the pairs of query and key that are
seen: 4 K FLOP a pair and head forward, 2.5 times that backward, as FlashAttention's authors count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from bench.timing import Call, sets_beyond_cache
from kernels import peers, reference

MEAN_DOCUMENT = 170  # tokens of a doctor's dialogue
Outputs = tuple[Tensor, ...]


class Absent(Exception):
    """An implementation that is not there, with the reason."""


class Target(NamedTuple):
    """Hoped for: at least `factor` times the speed of `versus` (an implementation, or "copy" bandwidth).

    memory: instead, at most `factor` times its peak memory.
    """

    versus: str
    factor: float
    memory: bool = False


class Part(NamedTuple):
    """One of the outputs, or a piece of it, and what it should be."""

    pick: Callable[[Outputs], Tensor]
    exact: Tensor


@dataclass
class Work:
    """A row, ready to run. calls: for each implementation what makes its Call, "ours" first; Absent where it cannot."""

    calls: dict[str, Callable[[], Call]]
    exact: Callable[[], list[Part]]
    amount: float  # FLOP or bytes of a call
    tolerance: float


@dataclass
class Row:
    """A line of the table."""

    op: str
    name: str
    unit: str  # "TFLOP/s" or "GB/s"
    build: Callable[[Setting], Work]
    targets: list[Target] = field(default_factory=list)
    memory: bool = False  # whether peak memory is of interest


@dataclass
class Setting:
    """Where the rows run, and in what."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    compiler: str = "inductor"

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        numbers = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return numbers if scale == 1.0 else numbers.mul_(scale)

    def sets(self, make: Callable[[int], Sequence[Tensor]]) -> list[list[Tensor]]:
        """make(seed) as often as it takes to go past the cache."""
        first = list(make(0))
        many = sets_beyond_cache(self.device, sum(t.numel() * t.element_size() for t in first))
        return [first, *(list(make(seed)) for seed in range(1, many))]

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend=self.compiler)

    @property
    def tolerance(self) -> float:
        """Relative L2 error that a right implementation stays below and a wrong one does not."""
        return 1e-4 if self.dtype == torch.float32 else 1e-2


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; NaN where anything is NaN."""
    exact = exact.double()
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def worst_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest relative error of some results; NaN where one is NaN, which Python's max may pass over."""
    return torch.tensor([relative_error(got, exact) for got, exact in pairs]).max().item()


def as_tuple(outputs: Tensor | Outputs) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ---- calls ----


def forward(function: Callable[..., Any], sets: list[list[Tensor]]) -> Call:
    """The forward alone, as in training: every output that the backward would need is computed."""
    return lambda i: as_tuple(function(*sets[i % len(sets)]))


def backward(function: Callable[..., Any], sets: list[list[Tensor]], gradients: list[Outputs]) -> Call:
    """The backward alone, of a forward done beforehand."""
    leaves = [[t.detach().requires_grad_() for t in inputs] for inputs in sets]
    outputs = [as_tuple(function(*inputs)) for inputs in leaves]

    def call(i: int) -> Outputs:
        i %= len(sets)
        return torch.autograd.grad(outputs[i], leaves[i], gradients[i % len(gradients)], retain_graph=True)

    return call


def both(function: Callable[..., Any], sets: list[list[Tensor]], gradients: list[Outputs]) -> Call:
    """Forward and backward: outputs, then gradients."""
    leaves = [[t.detach().requires_grad_() for t in inputs] for inputs in sets]

    def call(i: int) -> Outputs:
        inputs = leaves[i % len(sets)]
        outputs = as_tuple(function(*inputs))
        gained = torch.autograd.grad(outputs, inputs, gradients[i % len(gradients)])
        return (*(o.detach() for o in outputs), *gained)

    return call


def from_reference(function: Callable[..., Any], inputs: list[Tensor], gradients: Outputs | None) -> list[Part]:
    """What function gives in fp32 for these inputs: outputs without gradients, else the inputs' gradients."""
    leaves = [t.detach().float().requires_grad_(gradients is not None) for t in inputs]
    exact = as_tuple(function(*leaves))
    if gradients is not None:
        exact = torch.autograd.grad(exact, leaves, tuple(g.float() for g in gradients))
    return [Part(lambda outputs, i=i: outputs[i], e.detach()) for i, e in enumerate(exact)]


# ---- attention ----


def document_lengths(T: int, mean: int = MEAN_DOCUMENT, seed: int = 0) -> list[int]:
    """Lengths of documents that fill a row of T tokens, spread like ChatDoctor's dialogues."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while (left := T - sum(lengths)) > 0:
        lengths.append(min(left, max(1, round(rng.lognormvariate(0, 0.45) * mean * 0.9))))
    return lengths


def documents_of(lengths: list[int], device: torch.device) -> kernels.Documents:
    """start and end (1, T) of the documents of one row."""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    return tuple(x.repeat_interleave(sizes).int()[None].to(device) for x in (ends - sizes, ends))


def attention_flops(lengths: list[int], heads: int, head: int, step: str) -> float:
    """FLOP of causal attention within each of these lengths."""
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return 4.0 * head * heads * pairs * {"forward": 1.0, "backward": 2.5, "both": 3.5}[step]


def exact_attention(
    inputs: list[Tensor], gradient: Tensor, documents: kernels.Documents | None, step: str
) -> list[Part]:
    """In fp64, for the last row of the batch and the first and last group of heads: all would need too much memory."""
    q, k, _ = inputs
    H, G = q.shape[2], k.shape[2]
    groups = sorted({0, G - 1})
    heads = [g * (H // G) + i for g in groups for i in range(H // G)]

    def some(t: Tensor) -> Tensor:
        return t[-1:, :, heads if t.shape[2] == H else groups]

    leaves = [some(t.detach()).double().requires_grad_() for t in inputs]
    last = None if documents is None else tuple(d[-1:] for d in documents)
    o = reference.attention(*leaves, last)
    exact = [] if step == "backward" else [o.detach()]
    if step != "forward":
        exact += torch.autograd.grad(o, leaves, some(gradient).double())
    return [Part(lambda outputs, i=i: some(outputs[i]), e) for i, e in enumerate(exact)]


def peer(name: str, device: torch.device, documents: kernels.Documents | None) -> Callable[..., Tensor]:
    if why := peers.why_not(name, device, documents is not None):
        raise Absent(why)
    return partial(peers.attention, name, documents=documents)


def attention(
    s: Setting, *, B: int, T: int, H: int, G: int, K: int, step: str, others: Sequence[str], lengths: list[int] | None
) -> Work:
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K))
    sets = s.sets(lambda seed: [s.normal(*shape, seed=3 * seed + i) for i, shape in enumerate(shapes)])
    gradients = [(s.normal(B, T, H, K, seed=99),)]
    documents = None if lengths is None else documents_of(lengths, s.device)

    def make(function: Callable[..., Tensor]) -> Call:
        if step == "forward":
            return forward(function, sets)
        return (backward if step == "backward" else both)(function, sets, gradients)

    return Work(
        {
            "ours": lambda: make(partial(kernels.attention, documents=documents)),
            **{name: lambda name=name: make(peer(name, s.device, documents)) for name in others},
        },
        lambda: exact_attention(sets[0], gradients[0][0], documents, step),
        B * attention_flops(lengths or [T], H, K, step),
        s.tolerance,
    )


def decode(s: Setting, *, B: int, S: int, H: int, G: int, K: int, room: int = 0) -> Work:
    """room: positions behind the S filled ones; then ours gets all of them and, on the device, how many are filled."""
    storage = (B, G, S + room, K)  # as llama/cache.py stores them
    length = torch.full((1,), S, dtype=torch.int32, device=s.device) if room else None

    def make(seed: int) -> list[Tensor]:
        k, v = (s.normal(*storage, seed=3 * seed + i).transpose(1, 2) for i in (1, 2))
        return [s.normal(B, 1, H, K, seed=3 * seed), k, v]

    sets = s.sets(make)
    filled = [[q, k[:, :S], v[:, :S]] for q, k, v in sets]
    others = ("sdpa", "sdpa_flash", "flash_attn")
    return Work(
        {
            "ours": lambda: forward(partial(kernels.attention, length=length), sets),
            **{name: lambda name=name: forward(peer(name, s.device, None), filled) for name in others},
        },
        lambda: exact_attention(filled[0], sets[0][0], None, "forward"),
        decode_bytes(B, S, H, G, K, s.dtype.itemsize),
        s.tolerance,
    )


def decode_bytes(B: int, S: int, H: int, G: int, K: int, itemsize: int) -> float:
    """Keys and values read, queries read, results written."""
    return float(itemsize * B * K * (2 * S * G + 2 * H))
