"""The rows: every operation has some at every size, and their bytes and operations are those of the tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import kernels
from bench import kernel_codes, kernel_rows, kernel_work
from bench.kernel_work import Setting
from kernels import reference

CPU = Setting(torch.device("cpu"), torch.float32, "eager")
EVERYTHING = {size: kernel_rows.rows(size) for size in kernel_rows.SHAPES}


@pytest.mark.parametrize("size", EVERYTHING)
def test_every_operation_has_rows_with_names_of_their_own(size: str) -> None:
    rows = EVERYTHING[size]
    assert {row.op for row in rows} == set(kernel_rows.OPS)
    assert len({row.name for row in rows}) == len(rows)
    assert {row.op for row in kernel_rows.rows(size, ["rope", "loss"])} == {"rope", "loss"}


@pytest.mark.parametrize("row", EVERYTHING["tiny"], ids=lambda row: row.name)
def test_targets_are_of_implementations_of_the_row(row: kernel_work.Row) -> None:
    work = row.build(CPU)
    assert next(iter(work.calls)) == "ours"
    assert work.amount > 0
    assert {t.versus for t in row.targets} <= {"copy", *work.calls}
    assert row.unit == "GB/s" or not any(t.versus == "copy" for t in row.targets)


def touched(function: Callable[..., object], inputs: list[torch.Tensor], backward: bool) -> int:
    """Bytes of what a fused kernel reads and writes: each tensor once, equal gradients once."""
    leaves = [t.requires_grad_() for t in inputs]
    outputs = kernel_work.as_tuple(function(*leaves))
    if not backward:
        return sum(t.nbytes for t in (*leaves, *outputs))
    gradients = [torch.randn_like(o) for o in outputs]
    gained = torch.autograd.grad(outputs, leaves, gradients)
    written = [g for i, g in enumerate(gained) if not any(torch.equal(g, other) for other in gained[:i])]
    return sum(t.nbytes for t in (*gradients, *written))


@pytest.mark.parametrize("residual", [False, True])
def test_bytes_of_the_norm(residual: bool) -> None:
    N, D = 3, 8
    x, r, w = torch.randn(N, D), torch.randn(N, D), torch.randn(D)

    def norm(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None = None) -> object:
        h = x if r is None else x + r
        y = reference.rms_norm(h, w, 1e-5)
        return y if r is None else (h, y)

    inputs = [x, w, r] if residual else [x, w]
    assert kernel_rows.norm_bytes(N, D, 4, "forward", residual) == touched(norm, inputs, False)
    saved = x.nbytes + w.nbytes  # what was normed, and the weight
    assert kernel_rows.norm_bytes(N, D, 4, "backward", residual) == touched(norm, inputs, True) + saved


def test_bytes_of_rope() -> None:
    B, T, H, G, K = 2, 5, 4, 2, 8
    q, k, cos, sin = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(T, K // 2), torch.randn(T, K // 2)
    tables = cos.nbytes + sin.nbytes
    for backward in (False, True):
        moved = touched(lambda q, k: reference.rope(q, k, cos, sin), [q, k], backward)
        assert kernel_rows.rope_bytes(B, T, H, G, K, 4) == moved + tables


def test_bytes_of_swiglu() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    assert kernel_rows.swiglu_bytes(3, 8, 4, "forward") == touched(reference.swiglu, [gate, up], False)
    moved = touched(reference.swiglu, [gate, up], True) + gate.nbytes + up.nbytes
    assert kernel_rows.swiglu_bytes(3, 8, 4, "backward") == moved


@pytest.mark.parametrize("row", kernel_codes.SHAPES["tiny"], ids=str)
def test_bytes_of_a_product_with_codes(row: dict[str, int]) -> None:
    x, codes, scales = (
        torch.ones(row["M"], 64),
        torch.zeros(40, 8 * row["bits"]),
        torch.ones(40, 64 // (row["group"] or 64)),
    )
    y = kernels.quantised_linear(x, codes.byte(), scales, row["bits"])
    moved = x.nbytes + codes.numel() + scales.nbytes + y.nbytes
    assert kernel_codes.product_bytes(**row, itemsize=4) == moved
    assert kernel_codes.product(CPU, **row).amount == (moved if row["M"] <= kernel_codes.FEW else 2 * x.numel() * 40)


def test_the_least_time_of_a_product_on_an_h200(capsys: pytest.CaptureFixture[str]) -> None:
    kernel_codes.main()
    told = capsys.readouterr().out
    assert kernel_codes.roofline(1, 4, 128, [(4096, 4096)]) == pytest.approx((8 + 0.25 + 1 / 64) * 2**20 / 4.8e12)
    assert "4,096 x 4,096         4 bits, groups of 128      1.81 us" in told


def test_operations_of_the_loss() -> None:
    """Three products of rows, pieces and width: logits, and their gradient times weight and times rows."""
    N, V, D = 5, 11, 8
    assert kernel_rows.loss(CPU, N=N, V=V, D=D).amount == 3 * (2 * N * V * D)


@pytest.mark.parametrize("N", [5, 8, 9])  # less than a chunk, a chunk, and one row of a second
def test_the_exact_loss_is_that_of_fp64(N: int) -> None:
    x, w = CPU.normal(N, 6, seed=0), CPU.normal(11, 6, seed=1)
    targets = torch.arange(N) % 11
    leaves = [t.double().requires_grad_() for t in (x, w)]
    loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].t(), targets, reduction="sum")
    outputs = (loss.detach(), *torch.autograd.grad(loss / N, leaves))
    exact = kernel_rows.exact_loss(x, w, targets, rows=8, some=4)
    assert kernel_work.worst_error((part.pick(outputs), part.exact) for part in exact) < 1e-6
    for i in range(3):
        spoilt = [o * (1.01 if i == j else 1) for j, o in enumerate(outputs)]
        assert kernel_work.worst_error((part.pick(spoilt), part.exact) for part in exact) > 1e-3
