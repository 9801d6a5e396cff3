"""RoPE kernel: both directions against fp64, tables of all shapes, odd heads, strided inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import reference, rotary

Check = Callable[..., None]
Normal = Callable[..., Tensor]
Results = dict[str, Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def tables(*shape: int, device: torch.device, seed: int = 5) -> tuple[Tensor, Tensor]:
    """cos and sin of angles like those of positions up to some thousands."""
    angles = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul(3000.0).to(device)
    return angles.cos(), angles.sin()


def run(f: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, *t: Tensor) -> Results:
    q, k = (x.detach().requires_grad_() for x in (q, k))
    q_out, k_out = f(q, k, *t)
    gq, gk = torch.autograd.grad((q_out, k_out), (q, k), (dq, dk))
    return {"q": q_out.detach(), "k": k_out.detach(), "dq": gq, "dk": gk}


def compare(no_worse: Check, tensors: list[Tensor], cos: Tensor, sin: Tensor) -> Results:
    ours = run(rotary.rope, *tensors, cos, sin)
    torchs = run(reference.rope, *tensors, cos, sin)
    exact = run(reference_fp64, *(t.double() for t in tensors), cos, sin)
    for name, want in exact.items():
        no_worse(name, ours[name], torchs[name], want)
    return ours


def reference_fp64(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs as complex numbers, each multiplied by e^(i angle): another way to say it than the reference's."""
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        z = torch.complex(a, b) * turn
        return torch.cat((z.real, z.imag), -1)

    return turned(q), turned(k)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "K", "rows"),
    [
        (2, 13, 4, 2, 64, 0),  # a table for all rows
        (2, 13, 4, 2, 64, 1),  # the same, with a dimension for them
        (2, 13, 4, 2, 64, 2),  # a table a row, as packed documents need
        (1, 5, 33, 3, 128, 1),  # more heads than a tile holds: two tiles, the second nearly empty
        (3, 1, 8, 1, 96, 3),  # half a head is no power of two
        (1, 7, 3, 3, 2, 0),
        (2, 3, 5, 1, 34, 2),
        (1, 3, 2, 1, 512, 0),
    ],
)
def test_both_directions(
    B: int, T: int, H: int, G: int, K: int, rows: int, dtype: torch.dtype, normal: Normal, no_worse: Check
) -> None:
    tensors = [normal(B, T, heads, K, seed=i, dtype=dtype) for i, heads in enumerate((H, G, H, G))]
    shape = (T, K // 2) if rows == 0 else (rows, T, K // 2)
    cos, sin = (t.clone() for t in tables(*shape, device=tensors[0].device))
    compare(no_worse, tensors, cos, sin)


def test_heads_cut_from_one_product_are_read_where_they_lie(normal: Normal, no_worse: Check) -> None:
    B, T, H, G, K = 2, 9, 4, 2, 32
    fused = normal(B, T, H + 2 * G, K, dtype=BF16)
    q, k, _ = fused.split((H, G, G), dim=2)
    before = fused.clone()
    ours = compare(
        no_worse, [q, k, *(normal(B, T, n, K, seed=n, dtype=BF16) for n in (H, G))], *tables(T, K // 2, device=q.device)
    )
    assert torch.equal(fused, before), "written in place"
    assert ours["q"].is_contiguous()


def test_a_cached_rows_heads_first(normal: Normal, no_worse: Check) -> None:
    """(B, heads, T, K) seen as (B, T, heads, K), and tables cut from longer ones."""
    q, k = (normal(2, n, 11, 16, seed=n).transpose(1, 2) for n in (4, 2))
    cos, sin = tables(2, 40, 8, device=q.device)
    gradients = [normal(2, 11, n, 16, seed=9 + n) for n in (4, 2)]
    compare(no_worse, [q, k, *gradients], cos[:, 7:18], sin[:, 7:18])


def test_gradient_of_a_sum(normal: Normal, no_worse: Check) -> None:
    """Autograd hands over one number with strides of 0."""
    q, k = normal(1, 6, 2, 16), normal(1, 6, 1, 16, seed=1)
    one = torch.ones((), device=q.device)
    compare(no_worse, [q, k, one.expand_as(q), one.expand_as(k)], *tables(6, 8, device=q.device))


def test_turned_back_is_what_it_was(normal: Normal) -> None:
    q, k = normal(1, 50, 4, 64), normal(1, 50, 2, 64, seed=1)
    cos, sin = tables(50, 32, device=q.device)
    for back, was in zip(rotary.rotated(*rotary.rope(q, k, cos, sin), cos, sin, True), (q, k), strict=True):
        torch.testing.assert_close(back, was)


def test_only_one_of_them_needs_a_gradient(normal: Normal) -> None:
    q, k = normal(1, 6, 2, 16).requires_grad_(), normal(1, 6, 1, 16, seed=1)
    t = tables(6, 8, device=q.device)
    rotary.rope(q, k, *t)[0].backward(torch.ones_like(q))
    got, q.grad = q.grad, None
    reference.rope(q, k, *t)[0].backward(torch.ones_like(q))
    torch.testing.assert_close(got, q.grad)


def test_a_position_does_not_depend_on_its_batch(normal: Normal) -> None:
    q, k = normal(3, 5, 4, 32, dtype=F16), normal(3, 5, 2, 32, seed=1, dtype=F16)
    cos, sin = tables(3, 5, 16, device=q.device)
    together = rotary.rope(q, k, cos, sin)
    alone = rotary.rope(q[1:2, 2:3], k[1:2, 2:3], cos[1:2, 2:3], sin[1:2, 2:3])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2, 2:3], b)


def test_rows_beyond_two_to_the_31_elements(vast: Callable[..., Tensor], normal: Normal) -> None:
    """Rows, positions or heads that lie far apart, of q, k and the tables."""
    near = [normal(3, 2, 4, 16, dtype=F16), normal(3, 2, 4, 16, seed=1, dtype=F16)]
    cos, sin = tables(3, 2, 8, device=near[0].device)
    want = rotary.rope(*near, cos, sin)
    for shape, order in (((3, 2, 4, 16), (0, 1, 2, 3)), ((4, 3, 2, 16), (1, 2, 0, 3)), ((2, 3, 4, 16), (1, 0, 2, 3))):
        far = [vast(*shape, dtype=F16).permute(order) for _ in near]
        for place, t in zip(far, near, strict=True):
            place.copy_(t)
        far_tables = [vast(3, 2, 8) for _ in range(2)]
        for place, t in zip(far_tables, (cos, sin), strict=True):
            place.copy_(t)
        for got, wanted in zip(rotary.rope(*far, *far_tables), want, strict=True):
            assert torch.equal(got, wanted)


def test_nothing_in_it(normal: Normal, device: torch.device) -> None:
    q, k = rotary.rope(normal(0, 4, 2, 16), normal(0, 4, 1, 16), *tables(4, 8, device=device))
    assert (q.shape, k.shape) == ((0, 4, 2, 16), (0, 4, 1, 16))


def test_operator_keeps_torch_contracts(normal: Normal) -> None:
    q, k = (normal(1, 6, n, 16, seed=n).requires_grad_() for n in (2, 1))
    torch.library.opcheck(rotary.rotated, (q, k, *tables(6, 8, device=q.device), False))


def test_compiles_without_graph_breaks(normal: Normal) -> None:
    tensors = [normal(1, 6, n, 16, seed=i) for i, n in enumerate((4, 2, 4, 2))]
    t = tables(6, 8, device=tensors[0].device)
    compiled = torch.compile(rotary.rope, fullgraph=True, backend="aot_eager")
    plain, traced = run(rotary.rope, *tensors, *t), run(compiled, *tensors, *t)
    assert all(torch.equal(plain[name], traced[name]) for name in plain)
