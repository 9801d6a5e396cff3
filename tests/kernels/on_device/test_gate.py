"""SwiGLU kernels: forward and gradients against fp64, all shapes and strides, the ends of the number range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import gate as gating
from kernels import reference

Check = Callable[..., None]
Normal = Callable[..., Tensor]
Results = dict[str, Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def run(f: Callable[..., Tensor], gate: Tensor, up: Tensor, dy: Tensor) -> Results:
    gate, up = (t.detach().requires_grad_() for t in (gate, up))
    y = f(gate, up)
    dgate, dup = torch.autograd.grad(y, (gate, up), dy)
    return {"y": y.detach(), "dgate": dgate, "dup": dup}


def compare(no_worse: Check, *tensors: Tensor) -> Results:
    ours, torchs = run(gating.swiglu, *tensors), run(reference.swiglu, *tensors)
    exact = run(reference.swiglu, *(t.double() for t in tensors))
    for name, want in exact.items():
        no_worse(name, ours[name], torchs[name], want)
    return ours


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    "shape", [(3, 7), (2, 5, 96), (4, gating.BLOCK), (1, gating.BLOCK + 1), (3, gating.BLOCK - 1), (1000,), (1, 1)]
)
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, normal: Normal, no_worse: Check) -> None:
    compare(no_worse, *(normal(*shape, seed=i, dtype=dtype).mul(3) for i in range(3)))


@pytest.mark.parametrize("width", [33, gating.BLOCK + 40])
def test_halves_of_one_product_are_read_where_they_lie(width: int, normal: Normal, no_worse: Check) -> None:
    both = normal(2, 3, 2 * width, dtype=BF16)
    before = both.clone()
    gate, up = both.chunk(2, -1)
    assert not gate.is_contiguous()
    ours = compare(no_worse, gate, up, normal(2, 3, width, seed=1, dtype=BF16))
    assert torch.equal(both, before), "written in place"
    assert all(t.is_contiguous() for t in ours.values())


def test_one_contiguous_one_not(normal: Normal, no_worse: Check) -> None:
    compare(no_worse, normal(6, 50)[:, :40], normal(6, 40, seed=1), normal(6, 40, seed=2))


def test_gradient_of_a_sum(normal: Normal, no_worse: Check) -> None:
    gate = normal(5, 9)
    compare(no_worse, gate, normal(5, 9, seed=1), torch.ones((), device=gate.device).expand(5, 9))


def test_rows_without_even_steps_are_refused(normal: Normal) -> None:
    gate = normal(2, 4, 6)[:, :3]
    with pytest.raises(ValueError, match=r"swiglu: the rows of gate \(2, 3, 6\).*not evenly spaced.*contiguous copy"):
        gating.swiglu(gate, normal(2, 3, 6))
    with pytest.raises(ValueError, match="the rows of up"):
        gating.swiglu(normal(2, 3, 6), gate)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_far_gates(dtype: torch.dtype, device: torch.device) -> None:
    """Where the sigmoid is 0 or 1: nothing overflows, and the sign of what is left is torch's."""
    largest = torch.finfo(dtype).max
    gate = torch.tensor([-largest, -200.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 200.0, largest], device=device).to(
        dtype
    )
    up = torch.full_like(gate, 0.5)
    ours, torchs = (run(f, gate, up, torch.ones_like(gate)) for f in (gating.swiglu, reference.swiglu))
    for name, want in torchs.items():
        assert ours[name].isfinite().all(), (name, ours[name])
        torch.testing.assert_close(ours[name], want, msg=lambda m, name=name: f"{name}: {m}")


def test_same_bits_alone_and_in_a_batch(normal: Normal) -> None:
    tensors = [normal(5, 3000, seed=i, dtype=F16) for i in range(3)]
    together, again = run(gating.swiglu, *tensors), run(gating.swiglu, *tensors)
    alone = run(gating.swiglu, *(t[2:3] for t in tensors))
    for name, value in together.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value[2:3], alone[name])


def test_rows_beyond_two_to_the_31_elements(vast: Callable[..., Tensor], normal: Normal) -> None:
    near = [normal(3, 40, seed=i, dtype=F16) for i in range(3)]
    far = [vast(3, 40, dtype=F16) for _ in near[:2]]
    for place, t in zip(far, near[:2], strict=True):
        place.copy_(t)
    ours, want = run(gating.swiglu, *far, near[2]), run(gating.swiglu, *near)
    assert all(torch.equal(ours[name], want[name]) for name in want)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_nothing_in_it(shape: tuple[int, int], device: torch.device) -> None:
    empty = torch.ones(shape, device=device)
    assert {name: t.shape for name, t in run(gating.swiglu, empty, empty, empty).items()} == dict.fromkeys(
        ("y", "dgate", "dup"), shape
    )


def test_operators_keep_torch_contracts(normal: Normal) -> None:
    gate, up = normal(3, 8).requires_grad_(), normal(3, 8, seed=1).requires_grad_()
    torch.library.opcheck(gating.swiglu_forward, (gate, up))
    torch.library.opcheck(gating.swiglu_backward, (normal(3, 8, seed=2), gate.detach(), up.detach()))


def test_compiles_without_graph_breaks(normal: Normal) -> None:
    tensors = [normal(3, 8, seed=i) for i in range(3)]
    compiled = torch.compile(gating.swiglu, fullgraph=True, backend="aot_eager")
    plain, traced = run(gating.swiglu, *tensors), run(compiled, *tensors)
    assert all(torch.equal(plain[name], traced[name]) for name in plain)
