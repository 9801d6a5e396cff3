"""Linear cross-entropy: loss and both gradients against fp64, chunks, weights, ignored rows, and what is never held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import loss, reference
from kernels.loss import BLOCK

Check = Callable[..., None]
Normal = Callable[..., Tensor]
Results = dict[str, Tensor]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
IGNORED = -100


def words(N: int, V: int, device: torch.device, ignored: float = 0.3) -> Tensor:
    """Targets: the first and the last word among them, and a share of ignored rows, the second and the last too."""
    generator = torch.Generator().manual_seed(N + V)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:1], targets[2:3] = V - 1, 0
    if ignored:
        targets[torch.rand(N, generator=generator) < ignored] = IGNORED
        targets[:1], targets[1:2], targets[-1:] = V - 1, IGNORED, IGNORED
    return targets.to(device)


def weights_of_rows(N: int, device: torch.device) -> Tensor:
    """As from 0.1 to 2.5, one of them 0 and one negative."""
    weights = torch.linspace(0.1, 2.5, N)
    weights[3:4], weights[5:6] = 0.0, -0.7
    return weights.to(device)


# ---- the kernel: rows of logits in, losses and gradients out ----


def padded(logits: Tensor, to: int = 16) -> Tensor:
    """The same numbers in rows of a multiple of `to`, whose ends hold NaN."""
    R, V = logits.shape
    place = torch.empty(R, -(-V // to) * to, dtype=logits.dtype, device=logits.device)[:, :V]
    return place.copy_(logits)


def launched(logits: Tensor, targets: Tensor, token_weights: Tensor | None, gradient: bool = True) -> Results:
    """Losses and, with gradient, what has become of the logits."""
    losses = torch.empty(len(logits), device=logits.device)
    loss.launch(logits, targets, token_weights, losses, IGNORED, gradient)
    return {"losses": losses, "dz": logits}


def by_rows(logits: Tensor, targets: Tensor, token_weights: Tensor | None) -> Results:
    """The same by torch, computed in the type of logits and at least fp32."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, F32)).requires_grad_()
    losses = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    losses = losses if token_weights is None else losses * token_weights.to(wide.dtype)
    (dz,) = torch.autograd.grad(losses.sum(), wide)
    return {"losses": losses.detach(), "dz": dz.to(logits.dtype)}


@pytest.mark.parametrize(
    ("V", "dtype", "weighted"),
    [
        (1, F32, False),
        (97, BF16, True),
        (255, F16, False),
        (256, F32, True),
        (257, BF16, False),
        (1003, F32, False),
        (BLOCK - 1, F16, True),
        (BLOCK, F32, False),
        (BLOCK + 1, BF16, False),
        (2 * BLOCK, BF16, True),
        (2 * BLOCK + 811, F32, True),
    ],
)
def test_losses_and_gradients_of_rows(
    V: int, dtype: torch.dtype, weighted: bool, normal: Normal, no_worse: Check, device: torch.device
) -> None:
    """On both sides of the block, with and without columns left over; the ends of the rows hold NaN before, 0 after."""
    R = 65
    given = normal(R, V, dtype=dtype) * 3
    targets = words(R, V, device)
    token_weights = weights_of_rows(R, device) if weighted else None
    ours = launched(padded(given), targets, token_weights)
    torchs, exact = (by_rows(t, targets, token_weights) for t in (given, given.double()))
    for name in exact:
        no_worse(name, ours[name], torchs[name], exact[name])
    ends = ours["dz"].as_strided((R, ours["dz"].stride(0) - V), ours["dz"].stride(), V)
    assert torch.equal(ends, torch.zeros_like(ends))


def test_without_gradient_the_logits_stay(normal: Normal, device: torch.device) -> None:
    V = 97
    given, targets = normal(5, V), words(5, V, device)
    found = launched(padded(given, 64), targets, None, gradient=False)
    assert torch.equal(found["dz"], given)
    assert found["dz"].as_strided((5, 128 - V), (128, 1), V).isnan().all()
    assert torch.equal(found["losses"], launched(padded(given), targets, None)["losses"])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_large_logits(dtype: torch.dtype, normal: Normal, no_worse: Check, device: torch.device) -> None:
    """Differences of 10^4, whose exponentials nothing holds."""
    given = (normal(65, 97) * 1e4).to(dtype)
    targets = words(65, 97, device)
    ours = launched(padded(given), targets, None)
    torchs, exact = (by_rows(t, targets, None) for t in (given, given.double()))
    assert ours["losses"].max() > 1e4
    for name in exact:
        no_worse(name, ours[name], torchs[name], exact[name])


def test_equal_and_infinite_logits(device: torch.device) -> None:
    """A row of one number; blocks and groups of -inf before and behind the largest; -inf at the target itself."""
    V = BLOCK + 40
    z = torch.zeros(6, V)
    z[1] = -12345.5
    z[2, :BLOCK] = -torch.inf
    z[3, 100:] = -torch.inf
    z[4, :-1] = -torch.inf
    z[5, 7] = -torch.inf
    targets = torch.tensor([5, BLOCK, BLOCK + 3, 99, V - 1, 7], device=device)
    z = z.to(device)
    found, exact = launched(padded(z), targets, None), by_rows(z.double(), targets, None)
    assert found["losses"][4] == 0
    assert found["losses"][5] == torch.inf
    torch.testing.assert_close(found["losses"][:5].double(), exact["losses"][:5], rtol=3e-7, atol=0)
    torch.testing.assert_close(found["dz"].double(), exact["dz"], rtol=3e-6, atol=1e-11)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [3, BLOCK + 3])
def test_what_is_not_a_number_is_not_hidden(what: float, at: int, normal: Normal, device: torch.device) -> None:
    z = normal(3, BLOCK + 9)
    z[1, at] = what
    found = launched(padded(z), torch.tensor([7, 7, BLOCK + 8], device=device), None)
    assert found["losses"].isfinite().tolist() == [True, False, True]
    assert not found["dz"][1].isfinite().all()


@pytest.mark.parametrize("target", [97, 100, 127, 5000, 2**40, -1, -101])
def test_a_target_outside_the_vocabulary_gives_nan(target: int, normal: Normal, device: torch.device) -> None:
    """Not the padding's loss, nor a stray read, nor nothing; and of this row alone."""
    z, targets = normal(3, 97), torch.tensor([5, target, 96], device=device)
    found = launched(padded(z, 64), targets, None)
    assert found["losses"].isnan().tolist() == [False, True, False]
    assert found["dz"].isnan().all(1).tolist() == [False, True, False]
    assert not found["dz"][::2].isnan().any()


def test_no_row_depends_on_the_rows_around_it(normal: Normal, device: torch.device) -> None:
    """Bit for bit: what a row gives alone, among others, and on a second run."""
    V = BLOCK + 5
    z, targets, weights = normal(5, V, dtype=BF16), words(5, V, device), weights_of_rows(5, device)
    together, again = (launched(padded(z), targets, weights) for _ in range(2))
    for i in range(5):
        alone = launched(padded(z[i : i + 1]), targets[i : i + 1], weights[i : i + 1])
        for name in together:
            assert torch.equal(together[name][i : i + 1], alone[name])
            assert torch.equal(together[name], again[name])


def test_rows_beyond_two_to_the_31_elements(vast: Callable[..., Tensor], normal: Normal, device: torch.device) -> None:
    """Rows of logits, targets and weights 2^30 apart: the steps fit 32 bits, their products with the row do not."""
    V = 97
    z, targets, weights = normal(3, V, dtype=F16), torch.tensor([3, 96, 50], device=device), normal(3, seed=1).abs()
    want = launched(padded(z), targets, weights)
    far_z = vast(3, V, dtype=F16)
    far_targets, far_weights = (vast(3, 1, dtype=t.dtype)[:, 0] for t in (targets, weights))
    for place, t in ((far_z, z), (far_targets, targets), (far_weights, weights)):
        place.copy_(t)
        assert 2 * place.stride(0) > 2**31 > place.stride(0)
    for some in ((far_z, targets, weights), (padded(z), far_targets, weights), (padded(z), targets, far_weights)):
        got = launched(*some)
        assert all(torch.equal(got[name], want[name]) for name in want)


# ---- the whole: hidden states and the head's weight in, loss and gradients out ----


def plain(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED, token_weights: Tensor | None = None
) -> Tensor:
    """In the type given, with all logits at once."""
    losses = F.cross_entropy(x @ weight.t(), targets, ignore_index=ignore_index, reduction="none")
    return losses.sum() if token_weights is None else (losses * token_weights).sum()


def run(
    f: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORED,
    token_weights: Tensor | None = None,
    factor: float = 1.0,
) -> Results:
    """f's loss and its two gradients, times factor."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    total = f(x, weight, targets, ignore_index, token_weights)
    total.backward(torch.full_like(total, factor))
    return {"loss": total.detach(), "dx": x.grad, "dw": weight.grad}


def three(x: Tensor, weight: Tensor, *rest: Tensor | int | None, factor: float = 1.0) -> tuple[Results, ...]:
    """By our operator, by plain torch in the same dtype, in fp64."""
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in rest]
    return (
        run(loss.linear_cross_entropy, x, weight, *rest, factor=factor),
        run(reference.linear_cross_entropy, x, weight, *rest, factor=factor),
        run(plain, x.double(), weight.double(), *wide, factor=factor),
    )


def compare(no_worse: Check, results: tuple[Results, ...], dtype: torch.dtype, N: int) -> None:
    """Gradients by the rule; the loss, which is one number, with a floor.

    It adds up N roundings of a logit to dtype, of either sign. Both sums err by about sqrt(N) of them, and how they
    compare is luck; granted is half of that for logits of 1, as they are here.
    """
    ours, torchs, exact = results
    for name in ("dx", "dw"):
        no_worse(name, ours[name], torchs[name], exact[name])
    assert ours["loss"].dtype == F32
    assert ours["loss"].shape == ()
    error, peer = ((r["loss"].double() - exact["loss"]).abs().item() for r in (ours, torchs))
    floor = max(0.5 * torch.finfo(dtype).eps * N**0.5, torch.finfo(F32).eps * exact["loss"].abs().item())
    assert error <= max(1.3 * peer, floor), (error, peer, floor)


def head(normal: Normal, V: int, D: int, dtype: torch.dtype = F32) -> Tensor:
    """Such that the logits of normal x are normal."""
    return (normal(V, D, seed=1, dtype=torch.float64) / D**0.5).to(dtype)


@pytest.fixture
def chunks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 30 rows are already more than one; by its own arithmetic a chunk has 128 at least."""
    monkeypatch.setattr(loss, "rows_per_chunk", lambda N, *_: 16)


@pytest.fixture
def smallest_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own arithmetic: 128 rows."""
    monkeypatch.setattr(loss, "FEWEST_ROWS", 128)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("N", "D", "V"), [(65, 24, 97), (9, 33, 1003), (7, 16, BLOCK + 7)])
def test_loss_and_gradients(
    N: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    weighted: bool,
    normal: Normal,
    no_worse: Check,
    device: torch.device,
) -> None:
    token_weights = weights_of_rows(N, device) if weighted else None
    x, w, targets = normal(N, D, dtype=dtype), head(normal, V, D, dtype), words(N, V, device)
    compare(no_worse, three(x, w, targets, IGNORED, token_weights, factor=1 / 3), dtype, N)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_many_chunks_are_as_good_as_one(
    dtype: torch.dtype,
    normal: Normal,
    no_worse: Check,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    N, D, V = 69, 16, 97
    x, w, targets = normal(N, D, dtype=dtype), head(normal, V, D, dtype), words(N, V, device)
    given = (x, w, targets, IGNORED, weights_of_rows(N, device))
    whole = run(loss.linear_cross_entropy, *given)
    assert loss.rows_per_chunk(N, V, D, x.element_size(), True) == N
    request.getfixturevalue("chunks_of_16")
    results = three(*given)
    compare(no_worse, results, dtype, N)
    for name, want in whole.items():  # a few units of the largest number: products of other sizes round otherwise
        allowed = 4 * torch.finfo(want.dtype).eps * want.abs().max().item()
        torch.testing.assert_close(results[0][name], want, rtol=0, atol=allowed)


@settings(max_examples=500, deadline=None)
@given(
    N=st.integers(0, 10**6),
    V=st.integers(1, 300_000),
    D=st.integers(1, 20_000),
    itemsize=st.sampled_from([2, 4]),
    need_dw=st.booleans(),
)
def test_chunks_cover_all_rows_evenly_and_stay_small(N: int, V: int, D: int, itemsize: int, need_dw: bool) -> None:
    rows = loss.rows_per_chunk(N, V, D, itemsize, need_dw)
    chunks = -(-N // rows)
    # Bytes that one may have anyway: a sum in fp32, and beside it the logits of so many rows.
    anyway = max(loss.LOGITS_BYTES, loss.FEWEST_ROWS * V * itemsize, D * V * itemsize if need_dw else 0)
    sum_bytes = 4 * V * D if need_dw else 0
    assert rows >= 1
    assert rows * chunks >= N
    if rows >= N:
        assert rows == max(N, 1)
        assert rows * V * itemsize + sum_bytes // 4 * itemsize <= max(anyway + sum_bytes, V * itemsize + sum_bytes)
    else:
        assert rows % 128 == 0
        assert rows - N / -(-N // (anyway // (V * itemsize))) < 128, "even, up to a multiple of 128"
        assert rows * V * itemsize < anyway + 128 * V * itemsize
        assert N * V * itemsize + sum_bytes // 4 * itemsize > anyway + sum_bytes - V * itemsize, "one would have done"


def test_the_chunks_of_a_7b() -> None:
    """Of 64 Ki tokens: 256 MiB of logits with 32,000 words; with 128,256 as many rows as a sum of dW weighs, if any."""
    assert loss.rows_per_chunk(65536, 32000, 4096, 2, True) == 4096
    assert loss.rows_per_chunk(65536, 128256, 4096, 2, True) == 4096
    assert loss.rows_per_chunk(65536, 128256, 4096, 2, False) == 2048
    assert loss.rows_per_chunk(4096 + 4096, 128256, 4096, 2, True) == 8192, "one chunk, whose dW needs no sum"
    assert loss.rows_per_chunk(4096 + 4097, 128256, 4096, 2, True) == 2816, "three"


class Operations(TorchDispatchMode):
    """The operations that ran, and the bytes of the largest tensor that one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        found = func(*args, **(kwargs or {}))
        self.names.append(func._opname)
        for t in found if isinstance(found, tuple | list) else [found]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return found


def test_never_are_all_logits_held(normal: Normal, device: torch.device, smallest_chunks: None) -> None:
    N, D, V = 200, 8, 1003
    x, w, targets = normal(N, D), head(normal, V, D), words(N, V, device)
    with Operations() as all_at_once:
        plain(x, w, targets)
    assert all_at_once.largest >= N * V * 4
    with Operations() as ours:
        loss.compute(x, w, targets, None, IGNORED, True, True)
    assert ours.largest == 128 * 1024 * 4  # a chunk's logits, in rows of whole cache lines


def test_backward_makes_the_gradients_and_nothing_else(
    normal: Normal, device: torch.device, chunks_of_16: None
) -> None:
    """No zeros as gradients of the operator's own outputs dx and dw; no dw in fp32 for autograd to cast."""
    x, w = normal(20, 16, dtype=BF16).requires_grad_(), head(normal, 97, 16, BF16).requires_grad_()
    total = loss.linear_cross_entropy(x, w, words(20, 97, device))
    factor = torch.ones((), device=device)
    with Operations() as ours:
        total.backward(factor)
    assert [name for name in ours.names if name != "detach"] == ["scaled", "scaled"]


def test_dw_adds_up_in_fp32(normal: Normal, device: torch.device, chunks_of_16: None, no_worse: Check) -> None:
    """17 chunks that all pull the same way: a sum in bf16 would lose most of the last of them."""
    N, D, V = 17 * 16, 4, 32
    x, w = normal(N, D, dtype=BF16).abs(), head(normal, V, D, BF16)
    targets = torch.arange(N, device=device) % 2
    results = three(x, w, targets)
    compare(no_worse, results, BF16, N)
    error = (results[0]["dw"].double() - results[2]["dw"]).norm() / results[2]["dw"].norm()
    assert error < 2.5e-3  # 2^-9 and a little: the last rounding


@pytest.mark.parametrize("ignore_index", [0, -1, 5])
def test_any_index_can_be_ignored(ignore_index: int, normal: Normal, no_worse: Check, device: torch.device) -> None:
    """A padding token's own, too."""
    x, w, targets = normal(20, 16), head(normal, 97, 16), words(20, 97, device, ignored=0)
    targets[::3] = ignore_index
    results = three(x, w, targets, ignore_index)
    compare(no_worse, results, F32, 20)
    assert not results[0]["dx"][::3].any()


@pytest.mark.parametrize("how", ["ignored", "weight 0"])
def test_rows_that_do_not_count(how: str, normal: Normal, device: torch.device, chunks_of_16: None) -> None:
    """Nothing of them is left in any bit, even where their logits overflow; and when no row counts, all is 0."""
    N, D, V = 40, 16, 97
    x, w, targets = normal(N, D, dtype=F16), head(normal, V, D, F16), words(N, V, device, ignored=0)
    weights = torch.ones(N, device=device) if how == "weight 0" else None
    out = torch.arange(N, device=device) % 7 == 3
    out[-1] = out[0] = True
    if weights is None:
        targets[out] = IGNORED
    else:
        weights[out] = 0
        targets[1:2], out[1] = IGNORED, True
    clean = run(loss.linear_cross_entropy, x, w, targets, IGNORED, weights)
    other = x.clone()
    other[out] = 6e4
    assert (other @ w.t()).isinf().any()
    dirty = run(loss.linear_cross_entropy, other, w, targets, IGNORED, weights)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    other[out] = torch.nan
    dirty = run(loss.linear_cross_entropy, other, w, targets, IGNORED, weights)
    assert all(torch.equal(clean[name], dirty[name]) for name in ("loss", "dx"))
    other[out] = 6e4
    assert not clean["dx"][out].any()
    assert clean["dx"][~out].any(1).all()
    targets.fill_(IGNORED) if weights is None else weights.zero_()
    nothing = run(loss.linear_cross_entropy, other, w, targets, IGNORED, weights)
    assert not any(t.any() for t in nothing.values())


def test_a_weight_counts_a_row_so_many_times(normal: Normal, device: torch.device) -> None:
    """Weights of 0, 1, 2: as the rows themselves, left out or twice."""
    x, w, targets = normal(9, 16), head(normal, 97, 16), words(9, 97, device)
    times = torch.arange(9, device=device) % 3
    got = run(loss.linear_cross_entropy, x, w, targets, IGNORED, times.float())
    rows = torch.arange(9, device=device).repeat_interleave(times)
    want = run(loss.linear_cross_entropy, x[rows], w, targets[rows])
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(got["dw"], want["dw"], rtol=1e-5, atol=1e-6)


def test_strided_tensors_are_read_where_they_lie(normal: Normal, no_worse: Check, device: torch.device) -> None:
    N, D, V = 65, 16, 97
    x, w = normal(N, 3 * D)[:, D : 2 * D], head(normal, V, 2 * D)[:, D:]
    targets, weights = words(3 * N, V, device)[::3], weights_of_rows(2 * N, device)[::2]
    results = three(x, w, targets, IGNORED, weights)
    compare(no_worse, results, F32, N)
    near = run(loss.linear_cross_entropy, x, w, targets.contiguous(), IGNORED, weights.contiguous())
    assert all(torch.equal(results[0][name], near[name]) for name in near)
    same = torch.full((), 0.7, device=device)
    expanded, filled = (
        run(loss.linear_cross_entropy, x, w, targets[:1].expand(N), IGNORED, t)
        for t in (same.expand(N), torch.full((N,), 0.7, device=device))
    )
    assert all(torch.equal(expanded[name], filled[name]) for name in filled)


def test_only_what_is_needed_is_made(
    normal: Normal, device: torch.device, monkeypatch: pytest.MonkeyPatch, chunks_of_16: None
) -> None:
    """By who asks for gradients: x, the weight, both or nobody; what is made has the same bits each time."""
    N, D, V = 40, 16, 97
    x, w, targets = normal(N, D), head(normal, V, D), words(N, V, device)
    want = run(loss.linear_cross_entropy, x, w, targets)
    overwritten: list[bool] = []
    launch = loss.launch

    def spy(logits: Tensor, *rest: object) -> None:
        before = logits.clone()
        launch(logits, *rest)
        overwritten.append(not torch.equal(before, logits))

    monkeypatch.setattr(loss, "launch", spy)
    for of_x, of_w in ((True, False), (False, True), (True, True)):
        leaves = x.clone().requires_grad_(of_x), w.clone().requires_grad_(of_w)
        total = loss.linear_cross_entropy(*leaves, targets)
        total.backward()
        assert torch.equal(total, want["loss"])
        for t, needed, name in zip(leaves, (of_x, of_w), ("dx", "dw"), strict=True):
            assert torch.equal(t.grad, want[name]) if needed else t.grad is None
        made = loss.compute(x, w, targets, None, IGNORED, of_x, of_w)
        assert [t.numel() for t in made[1:]] == [N * D * of_x, V * D * of_w]
    assert all(overwritten)
    overwritten.clear()
    assert torch.equal(loss.linear_cross_entropy(x, w, targets), want["loss"])
    with torch.no_grad():
        silent = loss.linear_cross_entropy(x.clone().requires_grad_(), w.clone().requires_grad_(), targets)
    assert torch.equal(silent, want["loss"])
    assert not silent.requires_grad
    assert overwritten
    assert not any(overwritten)


@pytest.mark.parametrize("chunks", ["one", "many"])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_factor_is_applied_in_fp32_and_rounded_once(
    dtype: torch.dtype, chunks: str, normal: Normal, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Times 1.001, which bf16 does not know; and again by the same graph, with another factor."""
    if chunks == "many":
        request.getfixturevalue("chunks_of_16")
    N, D, V = 40, 16, 97
    x, w, targets = normal(N, D, dtype=dtype), head(normal, V, D, dtype), words(N, V, device)
    _, dx, dw = loss.compute(x, w, targets, None, IGNORED, True, True)
    assert dw.dtype == (dtype if chunks == "one" else F32)
    x.requires_grad_()
    w.requires_grad_()
    total = loss.linear_cross_entropy(x, w, targets)
    for factor in (1.001, 1 / 3):
        by = torch.full((), factor, device=device)
        got = torch.autograd.grad(total, (x, w), by, retain_graph=True)
        for t, made in zip(got, (dx, dw), strict=True):
            assert t.dtype == dtype
            assert torch.equal(t, (made.float() * by).to(dtype))


def test_nothing_that_was_given_is_written(normal: Normal, device: torch.device) -> None:
    x, w, targets, weights = normal(9, 16), head(normal, 97, 16), words(9, 97, device), weights_of_rows(9, device)
    given = [x, w, targets, weights]
    before = [t.clone() for t in given]
    run(loss.linear_cross_entropy, x, w, targets, IGNORED, weights)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_an_unknown_word_reaches_the_loss(normal: Normal, device: torch.device) -> None:
    x, w, targets = normal(9, 16), head(normal, 97, 16), words(9, 97, device)
    targets[4] = 97
    found = run(loss.linear_cross_entropy, x, w, targets)
    assert found["loss"].isnan()
    assert found["dx"].isnan().any(1).tolist() == [i == 4 for i in range(9)]
    assert found["dw"].isnan().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows_at_all(weighted: bool, normal: Normal, device: torch.device) -> None:
    x, w, targets = normal(0, 16), head(normal, 97, 16), words(0, 97, device)
    found = run(loss.linear_cross_entropy, x, w, targets, IGNORED, torch.ones(0, device=device) if weighted else None)
    assert found["loss"] == 0
    assert found["dx"].shape == (0, 16)
    assert torch.equal(found["dw"], torch.zeros_like(w))


def test_a_second_derivative_is_an_error_and_weights_have_none(normal: Normal, device: torch.device) -> None:
    x, w, targets = normal(9, 16).requires_grad_(), head(normal, 97, 16), words(9, 97, device)
    weights = torch.ones(9, device=device).requires_grad_()
    total = loss.linear_cross_entropy(x, w, targets, IGNORED, weights)
    dx, none = torch.autograd.grad(total.square(), (x, weights), create_graph=True, allow_unused=True)
    assert none is None
    with pytest.raises(RuntimeError, match=r"scaled.*no autograd formula"):
        dx.sum().backward()


def test_same_bits_on_every_run(normal: Normal, device: torch.device, chunks_of_16: None) -> None:
    x, w, targets = normal(40, 16, dtype=BF16), head(normal, 97, 16, BF16), words(40, 97, device)
    first, second = (run(loss.linear_cross_entropy, x, w, targets) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(0, 40),
    D=st.integers(1, 40),
    V=st.integers(1, 600),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    weighted=st.booleans(),
)
def test_any_shape(
    N: int,
    D: int,
    V: int,
    ignored: float,
    weighted: bool,
    normal: Normal,
    device: torch.device,
    chunks_of_16: None,
) -> None:
    x, w, targets = normal(N, D), head(normal, V, D), words(N, V, device, ignored)
    token_weights = weights_of_rows(N, device) if weighted else None
    ours, torchs, exact = three(x, w, targets, IGNORED, token_weights)
    for name, want in exact.items():
        # Of few rows and words the result may be a small difference of large terms: both get a floor of a few units
        # of gradients as large as they can be.
        error, peer = ((r[name].double() - want).norm().item() for r in (ours, torchs))
        size = {"loss": N, "dx": w.norm().item(), "dw": x.norm().item()}[name]
        assert error <= max(1.3 * peer, 1e-6 * size), (name, error, peer)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_operators_keep_torch_contracts(
    dtype: torch.dtype, weighted: bool, normal: Normal, device: torch.device, chunks_of_16: None
) -> None:
    """With one chunk (in fp32) and with two (in bf16), whose dw has another type."""
    N = 9 if dtype == F32 else 20
    x, w = normal(N, 16, dtype=dtype).requires_grad_(), head(normal, 97, 16, dtype).requires_grad_()
    targets, weights = words(N, 97, device), weights_of_rows(N, device) if weighted else None
    torch.library.opcheck(loss._linear_cross_entropy, (x, w, targets, weights, IGNORED, True, True))
    torch.library.opcheck(loss._linear_cross_entropy, (x.detach(), w, targets, weights, IGNORED, False, True))
    dw = loss.compute(x.detach(), w.detach(), targets, weights, IGNORED, True, True)[2]
    torch.library.opcheck(loss._scaled, (dw, torch.ones((), device=device), dtype))


def test_compiles_without_graph_breaks(normal: Normal, device: torch.device, chunks_of_16: None) -> None:
    x, w, targets = normal(20, 16, dtype=BF16), head(normal, 97, 16, BF16), words(20, 97, device)
    compiled = torch.compile(loss.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for weights in (None, weights_of_rows(20, device)):
        plainly, traced = (
            run(f, x, w, targets, IGNORED, weights, factor=0.3) for f in (loss.linear_cross_entropy, compiled)
        )
        assert all(torch.equal(plainly[name], traced[name]) for name in plainly)
