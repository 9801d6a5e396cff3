"""RMSNorm kernels: forward and every gradient against fp64, LLaMA's casts, the residual, strides, far rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import launch, norm, reference
from tests.kernels.on_device.fences import Fences

Check = Callable[..., None]
Normal = Callable[..., Tensor]
Results = dict[str, Tensor]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EPS = 1e-5
FAR = 2**31


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In the type given, for fp64: the reference computes in fp32 whatever it is given."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def torch_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + residual
    return h, reference.rms_norm(h, weight, eps)


def exact_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + residual
    return h, exact_norm(h, weight, eps)


def run(f: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor, eps: float = EPS) -> Results:
    """f's output and its two gradients."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    y = f(x, weight, eps)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad}


def run_sum(
    f: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    dh: Tensor | None,
    dy: Tensor | None,
    eps: float = EPS,
) -> Results:
    """f's two outputs and its three gradients; no dw where nothing comes back through the norm."""
    x, residual, weight = (t.detach().requires_grad_() for t in (x, residual, weight))
    h, y = f(x, residual, weight, eps)
    outputs = [(o, g) for o, g in ((h, dh), (y, dy)) if g is not None]
    torch.autograd.backward(*zip(*outputs, strict=True))
    found = {"h": h.detach(), "y": y.detach(), "dx": x.grad, "ds": residual.grad, "dw": weight.grad}
    return {name: t for name, t in found.items() if t is not None}


def three(x: Tensor, weight: Tensor, dy: Tensor, eps: float = EPS) -> tuple[Results, Results, Results]:
    """By the kernels, by plain torch in the same dtype, in fp64."""
    return (
        run(norm.rms_norm, x, weight, dy, eps),
        run(reference.rms_norm, x, weight, dy, eps),
        run(exact_norm, *(t.double() for t in (x, weight, dy)), eps),
    )


def three_sums(
    x: Tensor, residual: Tensor, weight: Tensor, dh: Tensor | None, dy: Tensor | None
) -> tuple[Results, Results, Results]:
    wide = (None if t is None else t.double() for t in (x, residual, weight, dh, dy))
    return (
        run_sum(norm.add_rms_norm, x, residual, weight, dh, dy),
        run_sum(torch_sum, x, residual, weight, dh, dy),
        run_sum(exact_sum, *wide),
    )


def compare(no_worse: Check, results: tuple[Results, Results, Results]) -> None:
    ours, torchs, exact = results
    assert ours.keys() == torchs.keys() == exact.keys()
    for name in exact:
        no_worse(name, ours[name], torchs[name], exact[name])


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor, so that few rows are enough for every program of the backward to walk over several tiles."""
    monkeypatch.setattr(norm, "multiprocessors", lambda device: 1)


def walks(N: int, D: int) -> bool:
    """On one multiprocessor every program of the backward has a second tile."""
    c = norm.cut(D)
    return triton.cdiv(N, c.rows) >= 2 * (norm.MOST_WARPS // c.warps)


# Sizes of D with a tile of many rows, of few, of one; more rows than all programs take at once, and N odd.
LONG = [
    ((16385,), 1, F16),
    ((2049,), 7, F16),
    ((7, 43), 37, BF16),
    ((37,), 288, F32),
    ((37,), 288, BF16),
    ((19,), 1000, F16),
    ((7,), 4096, BF16),
    ((7,), 4096, F32),
    ((3,), 16384, BF16),
]
SHORT = [((), 288, F32), ((1,), 37, F16), ((1, 3), 1, BF16), ((5,), 2048, F32)]


@pytest.mark.parametrize(("lead", "D", "dtype"), LONG + SHORT)
def test_forward_and_gradients(
    lead: tuple[int, ...], D: int, dtype: torch.dtype, normal: Normal, no_worse: Check, few_programs: None
) -> None:
    x, w, dy = normal(*lead, D, dtype=dtype), normal(D, seed=1, dtype=dtype), normal(*lead, D, seed=2, dtype=dtype)
    assert walks(x.numel() // D, D) == ((lead, D, dtype) in LONG)
    compare(no_worse, three(x, w, dy))


@pytest.mark.parametrize("gradients", ["both", "of y", "of h"])
@pytest.mark.parametrize(
    ("lead", "D", "dtype"),
    [((7, 43), 37, F16), ((37,), 288, BF16), ((37,), 288, F32), ((7,), 4096, BF16), ((3,), 16384, F32)],
)
def test_forward_and_gradients_with_the_residual(
    lead: tuple[int, ...],
    D: int,
    dtype: torch.dtype,
    gradients: str,
    normal: Normal,
    no_worse: Check,
    few_programs: None,
) -> None:
    x, s, dh, dy = (normal(*lead, D, seed=i, dtype=dtype) for i in range(4))
    assert walks(x.numel() // D, D)
    results = three_sums(
        x,
        s,
        normal(D, seed=4, dtype=dtype),
        None if gradients == "of y" else dh,
        None if gradients == "of h" else dy,
    )
    assert ("dw" in results[0]) == (gradients != "of h")
    compare(no_worse, results)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_gradients_are_rounded_once(dtype: torch.dtype, normal: Normal, no_worse: Check, few_programs: None) -> None:
    """As if fp32 were exact: the sum over rows within a program and over programs, and the residual's share."""
    x, s, dh, dy = (normal(37, 288, seed=i, dtype=dtype) for i in range(4))
    w = normal(288, seed=4, dtype=dtype)
    ours = run_sum(norm.add_rms_norm, x, s, w, dh, dy)
    # What was normed is the rounded sum: the exact gradients start from it.
    h = x + s
    exact = run_sum(exact_sum, *(t.double() for t in (h, torch.zeros_like(h), w, dh, dy)))
    for name in ("dx", "ds", "dw"):
        no_worse(name, ours[name], exact[name].to(dtype), exact[name], factor=1.01)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(0, 70),
    D=st.integers(1, 700),
    dtype=st.sampled_from([F32, F16, BF16]),
    eps=st.sampled_from([1e-6, 1e-5, 0.5]),
)
def test_any_shape(N: int, D: int, dtype: torch.dtype, eps: float, normal: Normal, few_programs: None) -> None:
    x, w, dy = normal(N, D, dtype=dtype), normal(D, seed=1, dtype=dtype), normal(N, D, seed=2, dtype=dtype)
    ours, torchs, exact = three(x, w, dy, eps)
    # A row of few numbers hardly moves the norm of itself: its dx is a small difference, known as well as what is
    # subtracted. For the same reason few rows have the luck of a few roundings; both get a floor of a few units of
    # what the gradient would be if the norm were a constant.
    rstd = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    sizes = {"y": exact["y"], "dx": rstd * w.double() * dy.double(), "dw": (x.double() * rstd * dy.double()).abs()}
    for name, want in exact.items():
        error, peer = ((r[name].double() - want).norm().item() for r in (ours, torchs))
        size = sizes[name].sum(0) if name == "dw" else sizes[name]
        assert error <= max(1.3 * peer, 2 * torch.finfo(dtype).eps * size.norm().item()), (name, error, peer)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_cast_back_comes_before_the_weight(dtype: torch.dtype, normal: Normal) -> None:
    """As in Meta's and Hugging Face's LLaMA: their bits, where a weight applied in fp32 gives others."""
    x, w = normal(9, 64, dtype=dtype), normal(64, seed=1, dtype=dtype)
    y, want = norm.rms_norm(x, w, EPS), reference.rms_norm(x, w, EPS)
    x32 = x.float()
    later = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS) * w.float()).to(dtype)
    assert (later != want).sum() > 57  # every tenth number
    # A device may sum the squares in another order, and rstd's last bit decide one of these 576 roundings.
    assert torch.equal(y, want) if launch.interpreting() else (y != want).sum() <= 1


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_sum_is_rounded_before_it_is_normed(dtype: torch.dtype, normal: Normal) -> None:
    """What goes on along the residual is what was normed: the same bits as an addition and then a norm."""
    x, s, w = normal(9, 64, dtype=dtype), normal(9, 64, seed=1, dtype=dtype), normal(64, seed=2, dtype=dtype)
    h, y = norm.add_rms_norm(x, s, w, EPS)
    assert torch.equal(h, x + s)
    assert torch.equal(y, norm.rms_norm(x + s, w, EPS))
    sum32 = x.float() + s.float()
    never = (sum32 * torch.rsqrt(sum32.square().mean(-1, keepdim=True) + EPS)).to(dtype) * w
    assert not torch.equal(never, y)


@pytest.mark.parametrize(
    ("dtype", "size"), [(F32, 1e-20), (BF16, 1e-20), (F16, 1e-6), (F16, 1e4), (F32, 1e16), (BF16, 1e16)]
)
def test_large_and_tiny_numbers(dtype: torch.dtype, size: float, normal: Normal, no_worse: Check) -> None:
    """Squares that only fp32 holds, or that vanish beside eps, and a row of zeros, where eps alone is left."""
    x = (normal(5, 96, dtype=F32) * size).to(dtype)
    x[2] = 0
    w, dy = normal(96, seed=1, dtype=dtype), normal(5, 96, seed=2, dtype=dtype)
    assert x.isfinite().all()
    results = three(x, w, dy)
    assert all(t.isfinite().all() for t in results[0].values())
    compare(no_worse, results)


def layouts(normal: Normal) -> dict[str, Tensor]:
    """Rows that are evenly spaced and not contiguous."""
    return {
        "columns": normal(2, 5, 3 * 40)[..., 40:80],
        "every other": normal(2, 6, 40)[:, ::2],
        "the last": normal(3, 6, 40)[:, -1:],
        "the same": normal(1, 40).expand(6, 40),
    }


@pytest.mark.parametrize("name", ["columns", "every other", "the last", "the same"])
def test_evenly_spaced_rows_are_read_where_they_lie(name: str, normal: Normal) -> None:
    x = layouts(normal)[name]
    assert not x.is_contiguous()
    assert launch.rows("rms_norm", "x", x).data_ptr() == x.data_ptr()
    s, dh, dy = (normal(*x.shape, seed=i) for i in (1, 2, 3))
    w = normal(40, seed=4)
    near = x.contiguous()
    for got, want in (
        (run(norm.rms_norm, x, w, dy), run(norm.rms_norm, near, w, dy)),
        (run_sum(norm.add_rms_norm, x, s, w, dh, dy), run_sum(norm.add_rms_norm, near, s, w, dh, dy)),
        (run_sum(norm.add_rms_norm, s, x, w, dh, dy), run_sum(norm.add_rms_norm, s, near, w, dh, dy)),
    ):
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert got["y"].is_contiguous()


@pytest.mark.parametrize("cut", [lambda x: x.transpose(0, 1), lambda x: x[:, :-1]], ids=["transposed", "cut"])
def test_unevenly_spaced_rows_are_refused(cut: Callable[[Tensor], Tensor], normal: Normal) -> None:
    x, w = cut(normal(3, 4, 8)), normal(8)
    message = r"rms_norm: the rows of {} \(.*\) with strides \(.*\) are not evenly spaced.*pass a contiguous copy"
    with pytest.raises(ValueError, match=message.format("x")):
        norm.rms_norm(x, w, EPS)
    with pytest.raises(ValueError, match=message.format("residual")):
        norm.add_rms_norm(x.contiguous(), x, w, EPS)


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_come_with_any_strides(kind: str, normal: Normal) -> None:
    """The gradient of a sum has stride 0 everywhere; that of a transposed result has its rows the other way about."""
    x, s, w = normal(3, 4, 40), normal(3, 4, 40, seed=1), normal(40, seed=2)
    if kind == "expanded":
        dh = dy = torch.ones((), device=x.device).expand(x.shape)
    else:
        dh, dy = (normal(4, 3, 40, seed=i).transpose(0, 1) for i in (3, 4))
    got = run_sum(norm.add_rms_norm, x, s, w, dh, dy)
    want = run_sum(norm.add_rms_norm, x, s, w, dh.contiguous(), dy.contiguous())
    assert all(torch.equal(got[name], want[name]) for name in want)
    got, want = run(norm.rms_norm, x, w, dy), run(norm.rms_norm, x, w, dy.contiguous())
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_nothing_that_was_given_is_written(normal: Normal, fenced: Callable[[Tensor], Tensor]) -> None:
    """Out of place, and the gradients of x and the residual, equal as they are, share no memory."""
    x, s, dh, dy = (normal(5, 40, seed=i) for i in range(4))
    given = [x, s, normal(40, seed=4), dh, dy]
    before = [fenced(t) for t in given]
    for gradients in ((dh, dy), (dh, None), (None, dy)):
        found = run_sum(norm.add_rms_norm, *given[:3], *gradients)
        found |= {"y alone": run(norm.rms_norm, x, given[2], dy)["y"]}
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        memory = [t.untyped_storage().data_ptr() for t in (*given, *found.values())]
        assert len(set(memory)) == len(memory)


def test_who_needs_no_gradient_gets_none(normal: Normal) -> None:
    x, w, dy = normal(5, 40), normal(40, seed=1), normal(5, 40, seed=2)
    want = run(norm.rms_norm, x, w, dy)
    for frozen in ("dx", "dw"):
        leaves = {"dx": x.detach().clone(), "dw": w.detach().clone()}
        for name, t in leaves.items():
            t.requires_grad_(name != frozen)
        norm.rms_norm(leaves["dx"], leaves["dw"], EPS).backward(dy)
        for name, t in leaves.items():
            assert t.grad is None if name == frozen else torch.equal(t.grad, want[name])
    assert not norm.rms_norm(x, w, EPS).requires_grad


def test_a_second_derivative_is_an_error(normal: Normal) -> None:
    x, w = normal(5, 40).requires_grad_(), normal(40, seed=1)
    (dx,) = torch.autograd.grad(norm.rms_norm(x, w, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"rms_norm_backward.*no autograd formula"):
        dx.sum().backward()


@pytest.mark.parametrize("D", [37, 4096])
def test_no_row_depends_on_the_batch_around_it(D: int, normal: Normal, few_programs: None) -> None:
    """Bit for bit: what a row gives alone, among others, and on a second run."""
    x, s, dh, dy = (normal(67 if D == 37 else 7, D, seed=i, dtype=F16) for i in range(4))
    w = normal(D, seed=4, dtype=F16)
    together = run_sum(norm.add_rms_norm, x, s, w, dh, dy)
    again = run_sum(norm.add_rms_norm, x, s, w, dh, dy)
    assert all(torch.equal(together[name], again[name]) for name in together)
    for some in (slice(0, 1), slice(2, 5), slice(6, None)):
        alone = run_sum(norm.add_rms_norm, x[some], s[some], w, dh[some], dy[some])
        assert all(torch.equal(together[name][some], alone[name]) for name in ("h", "y", "dx", "ds"))
    # And on another number of multiprocessors: that changes who adds up dw, nothing else.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "multiprocessors", lambda device: 3)
        other = run_sum(norm.add_rms_norm, x, s, w, dh, dy)
    assert all(torch.equal(together[name], other[name]) for name in ("h", "y", "dx", "ds"))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows_at_all(shape: tuple[int, ...], normal: Normal) -> None:
    x, w = normal(*shape), normal(40)
    plain, added = run(norm.rms_norm, x, w, x), run_sum(norm.add_rms_norm, x, x, w, x, x)
    for found in (plain, added):
        assert torch.equal(found.pop("dw"), torch.zeros_like(w))
        assert all(t.shape == shape for t in found.values())


def test_rows_that_no_tile_holds_are_refused(normal: Normal) -> None:
    x, w = normal(1, norm.LARGEST + 1), normal(norm.LARGEST + 1)
    for call in (lambda: norm.rms_norm(x, w, EPS), lambda: norm.add_rms_norm(x, x, w, EPS)):
        with pytest.raises(ValueError, match=r"rows of 16385 numbers.*up to 16384: use the torch backend"):
            call()


@pytest.mark.parametrize("P", [1, 128, 301])
def test_the_sum_over_programs(P: int, device: torch.device, fences: Fences) -> None:
    """Whole numbers, whose sums are exact in any order."""
    D = 37
    parts = torch.randint(-1000, 1000, (P, D), generator=torch.Generator().manual_seed(P)).float().to(device)
    parts, out = fences.copy(parts), torch.empty(D, device=device)
    norm.sum_programs_kernel[(triton.cdiv(D, norm.SUM_COLUMNS),)](
        parts, out, P, D=D, ROWS=norm.SUM_ROWS, COLUMNS=norm.SUM_COLUMNS, num_warps=8
    )
    assert torch.equal(out, parts.sum(0))


def test_cuts_fit_what_a_program_can_have() -> None:
    for D in {*range(1, 300), *(2**i + j for i in range(8, 15) for j in (-1, 0, 1) if 2**i + j <= norm.LARGEST)}:
        c = norm.cut(D)
        assert D <= c.columns < 2 * D
        assert c.rows * c.columns >= norm.SMALLEST_TILE
        assert c.warps in (4, 8, 16)
        assert c.rows * c.columns // (32 * c.warps) >= norm.PER_THREAD
        for arch in (80, 86, 90, 120):
            for row_bytes in (4, 6, 8, 12):
                copies = norm.stages(D, row_bytes, arch) - 1
                assert 0 <= copies <= 2
                room = norm.SHARED_BYTES.get(arch, norm.LEAST_SHARED_BYTES)
                assert copies * (c.rows * c.columns * row_bytes + norm.SLACK_BYTES) <= room


def test_rows_beyond_two_to_the_31_elements(vast: Callable[..., Tensor], normal: Normal) -> None:
    """x and the residual each with rows 2^30 apart: the steps fit 32 bits, their products with the row do not."""
    near = [normal(3, 40, seed=i, dtype=F16) for i in range(2)]
    w, dh, dy = normal(40, seed=2, dtype=F16), normal(3, 40, seed=3, dtype=F16), normal(3, 40, seed=4, dtype=F16)
    far = []
    for t in near:
        place = vast(3, 40, dtype=F16)
        place.copy_(t)
        far.append(place)
    assert 2 * far[0].stride(0) > FAR > far[0].stride(0)
    got, want = run(norm.rms_norm, far[0], w, dy), run(norm.rms_norm, near[0], w, dy)
    assert all(torch.equal(got[name], want[name]) for name in want)
    want = run_sum(norm.add_rms_norm, *near, w, dh, dy)
    for x, s in ((far[0], near[1]), (near[0], far[1])):
        got = run_sum(norm.add_rms_norm, x, s, w, dh, dy)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(not launch.interpreting(), reason="needs no device: test_device_only.py has so many rows on one")
def test_contiguous_rows_beyond_two_to_the_31_elements(vast: Callable[..., Tensor], normal: Normal) -> None:
    """What is written too: the interpreter runs a single program, whose row is the first beyond."""
    from triton.runtime.interpreter import interpreter_builder

    D = norm.LARGEST
    last = FAR // D

    def far(row: Tensor | None = None, dtype: torch.dtype = F16) -> Tensor:
        place = vast(2, D, dtype=dtype).as_strided((last + 1, D), (D, 1))
        if row is not None:
            place[last] = row
        return place

    x, s, dh, dy = (normal(D, seed=i, dtype=F16) for i in range(4))
    w = normal(D, seed=4, dtype=F16)
    h, y, r = far(), far(), torch.empty(last + 1)
    sizes = {"D": D, "ROWS": 1, "COLUMNS": D, "ADD": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter_builder, "set_grid_idx", lambda *_: setattr(interpreter_builder, "grid_idx", (last, 0, 0))
        )
        norm.rms_norm_forward_kernel[(1,)](far(x), D, far(s), D, w, h, y, r, last + 1, EPS, **sizes)
        dx, dw = far(), far(dtype=F32)
        norm.rms_norm_backward_kernel[(1,)](far(dy), D, h, D, w, r, far(dh), D, dx, dw, last + 1, **sizes, STAGES=1)
    want = run_sum(norm.add_rms_norm, x, s, w, dh, dy)
    for name, got in {"h": h, "y": y, "dx": dx}.items():
        assert torch.equal(got[last], want[name]), name
    assert torch.equal(dw[last].half(), want["dw"])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_operators_keep_torch_contracts(dtype: torch.dtype, normal: Normal) -> None:
    x, s = (normal(2, 3, 40, seed=i, dtype=dtype).requires_grad_() for i in range(2))
    w = normal(40, seed=2, dtype=dtype).requires_grad_()
    torch.library.opcheck(norm.rms_norm_forward, (x, w, EPS))
    torch.library.opcheck(norm.add_rms_norm_forward, (x, s, w, EPS))
    x, s, w = (t.detach() for t in (x, s, w))
    _, r = norm.rms_norm_forward(x, w, EPS)
    torch.library.opcheck(norm.rms_norm_backward, (s, x, w, r, None))
    torch.library.opcheck(norm.rms_norm_backward, (s, x, w, r, x))


def test_compiles_without_graph_breaks(normal: Normal) -> None:
    x, s, dh, dy = (normal(2, 9, 40, seed=i) for i in range(4))
    w = normal(40, seed=4)
    compiled = torch.compile(norm.rms_norm, fullgraph=True, backend="aot_eager")
    plain, traced = run(norm.rms_norm, x, w, dy), run(compiled, x, w, dy)
    assert all(torch.equal(plain[name], traced[name]) for name in plain)
    compiled = torch.compile(norm.add_rms_norm, fullgraph=True, backend="aot_eager")
    plain, traced = run_sum(norm.add_rms_norm, x, s, w, dh, dy), run_sum(compiled, x, s, w, dh, dy)
    assert all(torch.equal(plain[name], traced[name]) for name in plain)
