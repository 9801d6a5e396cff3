"""The harness can fail: each fault that it is there to find is made here and found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.on_device.fences import Fences


@triton.jit
def double(X: tl.tensor, Y: tl.tensor, n: tl.tensor, at: tl.tensor, B: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(Y + at + i, 2 * tl.load(X + i, i < n), i < n)


@torch.library.custom_op("harness::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    double[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), 0, 64)
    return y


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, dy: twice(dy.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_right_kernel_passes(
    normal: Callable[..., Tensor], no_worse: Callable[..., None], dtype: torch.dtype
) -> None:
    x = normal(7, 33, dtype=dtype).requires_grad_()
    y = twice(x)
    y.backward(normal(7, 33, dtype=dtype, seed=1))
    no_worse("y", y, 2 * x, 2 * x.double())
    torch.library.opcheck(twice, (x,))
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    assert compiled(x).requires_grad
    assert not y._is_view()


@pytest.mark.parametrize(("at", "side"), [(1, "after"), (-3, "before")])
@pytest.mark.parametrize("allocate", ["empty_like", "zeros_like", "new_empty", "empty"])
def test_a_write_outside_is_found(
    normal: Callable[..., Tensor], fences: Fences, at: int, side: str, allocate: str
) -> None:
    x = normal(100)
    if allocate == "empty":
        y = torch.empty(100, device=x.device)
    else:
        y = x.new_empty(100) if allocate == "new_empty" else getattr(torch, allocate)(x)
    double[(2,)](x, y, 100, at, 64)
    with pytest.raises(AssertionError, match=rf"written {side} the memory of .*\(100,\).*: {4 * abs(at)} bytes"):
        fences.verify()


def test_a_read_outside_gives_nan(normal: Callable[..., Tensor], device: torch.device) -> None:
    y = torch.zeros(128, device=device)
    double[(2,)](normal(100), y, 128, 0, 64)
    assert y[100:].isnan().all()


def test_what_nobody_wrote_is_poison(device: torch.device) -> None:
    assert torch.empty(3, 4, device=device).isnan().all()
    assert (torch.empty(5, dtype=torch.int32, device=device) == torch.iinfo(torch.int32).max).all()
    assert torch.empty(2, dtype=torch.bool, device=device).all()
    assert torch.empty(0, device=device).shape == (0,)
    assert torch.empty((), device=device).isnan()


def test_gaps_of_strided_rows_are_poison(fenced: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x = fenced(torch.ones(3, 8, device=device)[:, :5])
    assert x.stride() == (8, 1)
    assert (x == 1).all()
    assert x.as_strided((2, 3), (8, 1), 5).isnan().all()


def test_rows_beyond_two_to_the_31(vast: Callable[..., Tensor]) -> None:
    x = vast(3, 4, 5, dtype=torch.bfloat16)
    assert x.shape == (3, 4, 5)
    assert x.stride(-1) == 1
    assert 2 * x.stride(0) + 3 * x.stride(1) > 2**31
    x[2, 3] = 7
    assert x.sum() == 35
    y = twice(x[:, 3].contiguous())
    assert torch.equal(y, 2 * x[:, 3])


@pytest.mark.parametrize(
    "fault",
    [
        lambda y: y * 1.01,
        lambda y: torch.where(torch.arange(y.numel(), device=y.device) == 7, torch.nan, y),
        lambda y: y.double(),
        lambda y: y[:-1],
        lambda y: torch.zeros_like(y),
    ],
    ids=["off", "nan", "dtype", "shape", "zero"],
)
def test_no_worse_refuses(
    normal: Callable[..., Tensor], no_worse: Callable[..., None], fault: Callable[[Tensor], Tensor]
) -> None:
    x = normal(1000)
    exact, peer = x.double() / 3, x / 3
    no_worse("right", peer.clone(), peer, exact)
    with pytest.raises(AssertionError, match="wrong"):
        no_worse("wrong", fault(peer), peer, exact)


@pytest.mark.parametrize(("size", "passes"), [(4e-7, True), (6e-7, False), (1.0, False)])
def test_where_zero_is_exact_a_unit_of_rounding_is_granted(
    no_worse: Callable[..., None], size: float, passes: bool
) -> None:
    """Whatever torch's own error happens to be."""
    exact, got = torch.full((100,), 1e-17, dtype=torch.float64), torch.full((100,), size)
    if passes:
        no_worse("zero", got, torch.zeros(100), exact)
    else:
        with pytest.raises(AssertionError, match="zero"):
            no_worse("zero", got, torch.zeros(100), exact)
