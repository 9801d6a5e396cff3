"""What only a device can show: races, graphs, synchronisation, streams and threads, tensors beyond 2^31 elements.

Where kernels are interpreted the bodies that mean something there run too, on small tensors, so that they are known to
run before a device is at hand; the rest is skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
RUNS = 100 if CUDA else 2
STREAMS = 4
NAMES = ("attention", "packed attention", "rms_norm", "add_rms_norm", "rope", "swiglu", "linear_cross_entropy")


@pytest.fixture(autouse=True)
def fences() -> None:
    """Instead of the suite's: memory as it is, for graphs keep theirs, and 2^31 elements need not be held twice."""


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    kernels.use("triton")
    yield
    kernels.use("auto")
    if CUDA:
        torch.cuda.empty_cache()  # other processes test on the same device


class Operation(NamedTuple):
    """A call of the seam, its differentiable inputs and its outputs' gradients."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    gradients: list[Tensor]


def draw(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def borders(lengths: list[int], device: torch.device) -> kernels.Documents:
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    start, end = (x.repeat_interleave(sizes).int()[None].to(device) for x in (ends - sizes, ends))
    return start, end


def operation(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Operation:
    """Sizes that fill a device (or, interpreted, that end soon), with ragged ends."""
    T, K, N, D, V = (1999, 128, 4099, 4096, 32003) if CUDA else (33, 16, 9, 72, 97)
    H, G = (16, 4) if CUDA else (2, 1)

    def normal(*shape: int, at: int) -> Tensor:
        return draw(shape, 10 * seed + at, device, dtype)

    if "attention" in name:
        lengths = [T // 3, 1, T // 2, T - T // 3 - 1 - T // 2]
        documents = borders(lengths, device) if name.startswith("packed") else None
        inputs = [normal(1, T, heads, K, at=i) for i, heads in enumerate((H, G, G))]
        return Operation(lambda q, k, v: kernels.attention(q, k, v, documents), inputs, [normal(1, T, H, K, at=4)])
    if name == "rms_norm":
        inputs = [normal(N, D, at=0), normal(D, at=1)]
        return Operation(lambda x, w: kernels.rms_norm(x, w, 1e-5), inputs, [normal(N, D, at=2)])
    if name == "add_rms_norm":
        inputs = [normal(N, D, at=0), normal(N, D, at=1), normal(D, at=2)]
        gradients = [normal(N, D, at=i) for i in (3, 4)]
        return Operation(lambda x, r, w: kernels.rms_norm(x, w, 1e-5, residual=r), inputs, gradients)
    if name == "rope":
        angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, K, 2) / K)).to(device)
        cos, sin = angles.cos(), angles.sin()
        shapes = ((2, T, H, K), (2, T, G, K))
        inputs, gradients = ([normal(*s, at=i + j) for i, s in enumerate(shapes)] for j in (0, 2))
        return Operation(lambda q, k: kernels.rope(q, k, cos, sin), inputs, gradients)
    if name == "swiglu":
        inputs = [normal(N, 2 * D, at=i) for i in range(2)]
        return Operation(kernels.swiglu, inputs, [normal(N, 2 * D, at=2)])
    assert name == "linear_cross_entropy"
    inputs = [normal(N, D // 8, at=0), normal(V, D // 8, at=1).mul_(0.05)]
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    targets[::3] = -100
    targets = targets.to(device)
    scale = torch.tensor(1.0 / N, device=device)
    return Operation(lambda x, w: kernels.linear_cross_entropy(x, w, targets), inputs, [scale])


def results(op: Operation) -> list[Tensor]:
    """Outputs, then the inputs' gradients."""
    leaves = [t.detach().requires_grad_() for t in op.inputs]
    outputs = op.function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, op.gradients))


def assert_same_bits(got: list[Tensor], want: list[Tensor], when: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert not a.isnan().any(), f"result {i} has NaN {when}"
        assert torch.equal(a, b), f"result {i} differs {when}: {(a != b).sum().item()} of {a.numel()} numbers"


DTYPES = [torch.bfloat16, torch.float32] if CUDA else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_same_bits_however_often_and_beside_whatever_else(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """RUNS times, on STREAMS streams at once, so that blocks of different runs share the multiprocessors."""
    op = operation(name, device, dtype)
    first = results(op)
    if CUDA:
        torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(STREAMS)] if CUDA else [None] * STREAMS
    for begin in range(0, RUNS, STREAMS):
        found = []
        for stream in streams[: RUNS - begin]:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                found.append(results(op))
        if CUDA:
            torch.cuda.synchronize()
        for i, r in enumerate(found):
            assert_same_bits(r, first, f"in run {begin + i}")


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_in_a_cuda_graph(name: str, device: torch.device) -> None:
    """Captured once, replayed on other numbers: the bits of a plain run on them."""
    op = operation(name, device, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(op)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(op)
    for seed in (1, 2):
        other = operation(name, device, torch.bfloat16, seed)
        for mine, theirs in zip(op.inputs + op.gradients, other.inputs + other.gradients, strict=True):
            mine.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize()
        # The closure's targets are those of the capture, so the plain run is of op itself.
        assert_same_bits(captured, results(op), f"in replay {seed}")


@needs_cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_to_graphs_by_torch(name: str, device: torch.device) -> None:
    """torch.compile(mode="reduce-overhead"): no graph break, graphs captured and replayed, same bits."""
    op = operation(name, device, torch.bfloat16)
    want = results(op)
    compiled = op._replace(function=torch.compile(op.function, mode="reduce-overhead", fullgraph=True))
    for run in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_bits([t.clone() for t in results(compiled)], want, f"in compiled run {run}")


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: str, device: torch.device) -> None:
    op = operation(name, device, torch.bfloat16)
    results(op)  # compiled by now
    torch.cuda.synchronize()
    with synchronising_is_an_error():
        found = results(op)
    assert_same_bits(found, results(op), "without synchronisation")


@needs_cuda
def test_decode_step_waits_for_nothing_and_is_captured(device: torch.device) -> None:
    q, k, v = (
        draw((8, t, h, 128), i, device, torch.bfloat16) for i, (t, h) in enumerate(((1, 32), (777, 8), (777, 8)))
    )
    want = kernels.attention(q, k, v)
    torch.cuda.synchronize()
    with synchronising_is_an_error():
        again = kernels.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.attention(q, k, v)
    for _ in range(RUNS):
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits([again, captured], [want, want], "in a graph")


@pytest.mark.parametrize("name", NAMES)
def test_first_use_in_a_thread_of_ones_own(name: str, device: torch.device) -> None:
    """Triton keeps the allocator of descriptors in a context variable, which a new thread does not have."""
    op = operation(name, device, torch.float32)
    found: list[list[Tensor] | BaseException] = []

    def work() -> None:
        try:
            found.append(results(op))
        except BaseException as e:
            found.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], list), found[0]
    assert_same_bits(found[0], results(op), "in a thread")


@needs_cuda
def test_on_another_stream_than_the_current_one_was(device: torch.device) -> None:
    """Work queued on a side stream sees the numbers written there before it, not those of the default stream."""
    op = operation("attention", device, torch.bfloat16)
    want = results(op)
    side, late = torch.cuda.Stream(), [torch.full_like(t, float("nan")) for t in op.inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for mine, theirs in zip(late, op.inputs, strict=True):
            mine.copy_(theirs)
        found = results(op._replace(inputs=late))
    torch.cuda.synchronize()
    assert_same_bits(found, want, "on a side stream")


# ---- beyond 2^31 elements, for real: 5 to 45 GB ----

needs_memory = pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_properties(0).total_memory < 120e9, reason="needs a device of 120 GB"
)
one_after_another = pytest.mark.xdist_group("memory")  # under --dist loadgroup
FAR = 2**31


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@needs_memory
@one_after_another
def test_attention_over_more_than_two_to_the_31_numbers(device: torch.device) -> None:
    """One row of 528,384 tokens in documents of 256: the last document by itself gives the same."""
    H, K, length = 32, 128, 256
    T = FAR // (H * K) + 4096
    documents = borders([length] * (T // length), device)
    q, k, v, do = (draw_in_place((1, T, H, K), i, device) for i in range(4))
    assert q.numel() > FAR
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = kernels.attention(*leaves, documents)
    found = [o.detach(), *torch.autograd.grad(o, leaves, do)]
    last = [t.detach()[:, -length:].double().requires_grad_() for t in leaves]
    kernels.use("torch")
    exact = kernels.attention(*last)
    wanted = [exact.detach(), *torch.autograd.grad(exact, last, do[:, -length:].double())]
    for name, got, want in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
        assert relative_error(got[:, -length:], want) < 1e-2, name


def draw_in_place(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """bf16 without an fp32 copy."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator)


@needs_memory
@one_after_another
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_rows_beyond_two_to_the_31_numbers(name: str, device: torch.device) -> None:
    """The last rows give what they give by themselves."""
    few, width = 8, 4096
    N = FAR // width + 4 * few

    def rows(i: int) -> Tensor:
        return draw_in_place((N, width), i, device)

    weight = draw_in_place((width,), 9, device)
    cos, sin = torch.rand(N, 64, device=device), torch.rand(N, 64, device=device)
    head, targets = draw_in_place((256, width), 8, device).mul_(0.02), torch.arange(N, device=device) % 256
    cases: dict[str, tuple[int, Callable[..., Tensor | tuple[Tensor, ...]]]] = {
        "rms_norm": (1, lambda at, x: kernels.rms_norm(x, weight, 1e-5)),
        "add_rms_norm": (2, lambda at, x, r: kernels.rms_norm(x, weight, 1e-5, residual=r)),
        "swiglu": (2, lambda at, x, y: kernels.swiglu(x, y)),
        "rope": (2, lambda at, *qk: kernels.rope(*(t.view(1, -1, 32, 128) for t in qk), cos[at:], sin[at:])),
        "linear_cross_entropy": (1, lambda at, x: kernels.linear_cross_entropy(x, head, targets[at:])),
    }
    many, function = cases[name]
    inputs = [rows(i) for i in range(many)]
    ours, alone = [
        gradients_of(lambda *t, at=at: function(at, *t), [t[at:].detach().requires_grad_() for t in inputs])
        for at in (0, N - few)
    ]
    for got, want in zip(ours, alone, strict=True):
        assert got.numel() > FAR or name == "linear_cross_entropy"
        # A product of many rows may round otherwise than one of few; everything else is row by row.
        assert relative_error(got.view(-1, width)[-few:], want.view(-1, width)) < 1e-2, name


def gradients_of(function: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs that have rows, and gradients, for output gradients that are the outputs themselves."""
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gained = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) if o.ndim == 0 else o.detach() for o in outputs])
    return [o.detach() for o in outputs if o.ndim] + list(gained)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [16, 64, 512, 2048] if CUDA else [16])
def test_products_with_codes_again_and_again(bits: int, rows: int, device: torch.device) -> None:
    """In full size, tiles of all sizes: the same bits every time, and right. (A race showed only there.)"""
    out, width = (11008, 4096) if CUDA else (40, 64)
    generator = torch.Generator(device).manual_seed(0)
    codes = torch.randint(0, 256, (out, width * bits // 8), generator=generator, device=device, dtype=torch.uint8)
    dtype = torch.bfloat16 if CUDA else torch.float32
    x, scales = draw((rows, width), 1, device, dtype), draw((out, 1), 2, device, dtype)
    first = kernels.quantised_linear(x, codes, scales, bits)
    exact = x.float() @ reference.dequantise(codes, scales, bits, torch.float32).t()
    assert (first.float() - exact).norm() <= 5e-3 * exact.norm()
    for _ in range(RUNS // 5):
        assert torch.equal(kernels.quantised_linear(x, codes, scales, bits), first)
