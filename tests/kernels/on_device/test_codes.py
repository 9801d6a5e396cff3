"""Products with quantised matrices: against fp64, every layout of codes, groups and rows; what must be refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import kernels
from kernels import codes as coded
from kernels import launch, reference

Check = Callable[..., None]
Normal = Callable[..., Tensor]
Fenced = Callable[[Tensor], Tensor]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FEW = 64
ROW = 0  # a group of the whole row


@pytest.fixture(autouse=True)
def triton(device: torch.device) -> Iterator[None]:
    kernels.use("triton", device)
    yield
    kernels.use("auto")


@pytest.fixture
def matrix(normal: Normal, fenced: Fenced, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """matrix(out, width, bits, group, dtype): codes of every value, and scales of both signs, in fenced memory."""

    def matrix(out: int, width: int, bits: int, group: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(out + width)
        codes = torch.randint(0, 256, (out, width * bits // 8), generator=generator, dtype=torch.uint8)
        scales = normal(out, width // (group or width), seed=7, dtype=dtype).mul(0.1)
        return fenced(codes.to(device)), fenced(scales)

    return matrix


def numbers(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The matrix in fp64, number by number from what the format says, not by the reference."""
    rows = []
    for row, row_scales in zip(codes.tolist(), scales.double().tolist(), strict=True):
        values = [v for byte in row for v in ((byte % 16, byte // 16) if bits == 4 else (byte,))]
        group = len(values) // len(row_scales)
        rows.append([(v - (8 if bits == 4 else 128)) * row_scales[i // group] for i, v in enumerate(values)])
    return torch.tensor(rows, dtype=torch.float64, device=codes.device)


def compare(no_worse: Check, x: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    got = kernels.quantised_linear(x, codes, scales, bits)
    peer = reference.quantised_linear(x, codes, scales, bits)
    exact = x.double() @ numbers(codes, scales, bits).T
    no_worse("y", got, peer, exact, factor=1.3 if exact.numel() >= FEW else 4)  # of few the ratio is luck
    assert got.is_contiguous()
    return got


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, ROW])
@pytest.mark.parametrize("rows", [1, 5])
def test_groups(
    rows: int, group: int, bits: int, dtype: torch.dtype, normal: Normal, matrix: Callable, no_worse: Check
) -> None:
    codes, scales = matrix(67, 384, bits, group, dtype)
    compare(no_worse, normal(rows, 384, dtype=dtype), codes, scales, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [*range(1, 18), 64, 65, 130])
def test_rows(rows: int, bits: int, normal: Normal, matrix: Callable, no_worse: Check) -> None:
    codes, scales = matrix(70, 128, bits, 64, BF16)
    compare(no_worse, normal(rows, 128, dtype=BF16), codes, scales, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out", [1, 7, 8, 9, 63, 129])
@pytest.mark.parametrize("width", [32, 160, 352])
@pytest.mark.parametrize("rows", [1, 3])
def test_odd_sizes_with_a_scale_a_row(
    rows: int, width: int, out: int, bits: int, normal: Normal, matrix: Callable, no_worse: Check
) -> None:
    codes, scales = matrix(out, width, bits, ROW)
    compare(no_worse, normal(rows, width), codes, scales, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "group"), [(1, 128), (1, ROW), (2, 128), (2, ROW)])
def test_long_rows_are_cut_and_joined(
    rows: int, group: int, bits: int, normal: Normal, matrix: Callable, no_worse: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into splits, the last of them shorter; the same bits every time."""
    joins = []
    join = coded._join
    monkeypatch.setattr(
        coded, "_join", lambda sums, y: joins.append(len(sums) if sums is not y else 1) or join(sums, y)
    )
    codes, scales = matrix(7, 128 * 45, bits, group, BF16)
    x = normal(rows, 128 * 45, dtype=BF16)
    first = compare(no_worse, x, codes, scales, bits)
    assert min(joins) > 1, joins
    assert torch.equal(first, kernels.quantised_linear(x, codes, scales, bits))


def test_splits_cover_every_step_once() -> None:
    for steps in range(1, 40):
        for programs in (1, 3, 8, 600):
            for fewest in (1, 4):
                each, splits = coded.splits_of(steps, programs, 64, fewest)
                assert (splits - 1) * each < steps <= splits * each
                assert splits == 1 or each >= fewest
                assert splits == 1 or programs < 64


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_each_code_at_each_place(rows: int, bits: int, device: torch.device) -> None:
    """The product with one number after another is the matrix itself: halves, offset and groups, exactly."""
    width = 128  # in groups of 32
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (24, width * bits // 8), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, 255  # the extremes of all codes
    codes = codes.to(device)
    # Powers of two, each its own: whatever is scaled by another's scale is far off, and nothing is rounded.
    powers = torch.arange(24 * 4, device=device).reshape(24, 4) % 13 - 6
    scales = torch.exp2(powers.float()) * torch.where(powers % 2 == 0, 1.0, -1.0)
    want = numbers(codes, scales, bits).T.float()
    for k in range(width):
        x = torch.zeros(rows, width, device=device)
        x[0, k], x[-1, (k + 1) % width] = 1.0, 1.0
        got = kernels.quantised_linear(x, codes, scales, bits)
        expected = (
            torch.stack((want[k], want[(k + 1) % width])) if rows == 2 else (want[k] + want[(k + 1) % width])[None]
        )
        assert torch.equal(got, expected), k
    assert torch.equal(kernels.dequantise(codes, scales, bits, F32), want.T)


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_scales_of_another_type(rows: int, normal: Normal, matrix: Callable, no_worse: Check) -> None:
    for dtype in (F32, F16, BF16):
        codes, scales = matrix(40, 256, 4, 64, dtype)
        compare(no_worse, normal(rows, 256, dtype=BF16), codes, scales, 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_x_as_it_lies(bits: int, normal: Normal, matrix: Callable, no_worse: Check, device: torch.device) -> None:
    """The last position of a batch, columns of a longer row, a transposed one; three dimensions, one, none of rows."""
    codes, scales = matrix(33, 128, bits, 32)
    sequence = normal(3, 5, 128)
    compare(no_worse, sequence, codes, scales, bits)
    compare(no_worse, sequence[:, -1:], codes, scales, bits)
    compare(no_worse, sequence[1:2, -1], codes, scales, bits)
    compare(no_worse, normal(4, 200)[:, 40:168], codes, scales, bits)
    compare(no_worse, normal(1, 200)[:, 40:168], codes, scales, bits)
    compare(no_worse, normal(128, 6).T, codes, scales, bits)
    compare(no_worse, normal(128, 6).T[:1], codes, scales, bits)
    compare(no_worse, normal(128), codes, scales, bits)
    assert kernels.quantised_linear(torch.empty(2, 0, 128, device=device), codes, scales, bits).shape == (2, 0, 33)


def test_rows_of_a_longer_matrix(normal: Normal, matrix: Callable, no_worse: Check) -> None:
    codes, scales = matrix(40, 128, 4, 32)
    for rows in (1, 3):
        compare(no_worse, normal(rows, 128), codes[5:30], scales[5:30], 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_that_start_anywhere(bits: int, normal: Normal, no_worse: Check) -> None:
    memory = zeros(20 * 64 + 3)
    memory[:] = torch.arange(len(memory), device=memory.device)
    for rows in (1, 3):
        compare(no_worse, normal(rows, 512 // bits), memory[3:].view(20, 64), normal(20, 1, seed=1), bits)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_passes_through(rows: int, bits: int, normal: Normal, matrix: Callable) -> None:
    """Infinities with the sign of their weight, NaN where torch has it; the other rows untouched."""
    codes, scales = matrix(50, 128, bits, 64)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = normal(rows, 128)
        x[0, 77] = value
        got, want = kernels.quantised_linear(x, codes, scales, bits), reference.quantised_linear(x, codes, scales, bits)
        assert not got[0].isfinite().any()
        assert torch.equal(got[0].isnan(), want[0].isnan())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_number_too_large_for_fp16_overflows_as_in_torch(device: torch.device) -> None:
    codes = torch.full((9, 64), 255, dtype=torch.uint8, device=device)
    for rows in (1, 2):
        x = torch.full((rows, 64), 65504.0, dtype=F16, device=device)
        y = kernels.quantised_linear(x, codes, torch.ones(9, 1, device=device), 8)
        assert (y == torch.inf).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_codes_beyond_two_to_the_31(
    rows: int, vast: Callable[..., Tensor], normal: Normal, device: torch.device
) -> None:
    """Too many bytes to number in 32 bits: the last rows of the matrix are read where they lie."""
    if device.type == "cpu":
        pytest.skip("needs a CUDA device: 2^31 codes, one by one")
    codes = torch.full((2**20 + 3, 2048), 0x88, dtype=torch.uint8, device=device)
    codes[-2:] = 0x9A
    scales = torch.ones(len(codes), 1, device=device, dtype=BF16)
    x = torch.ones(rows, 4096, device=device, dtype=BF16)
    y = kernels.quantised_linear(x, codes, scales, 4)
    assert (y[:, -2:] == 3 * 2048).all()
    assert not y[:, :-2].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_operator_is_one_that_torch_can_trace(rows: int, normal: Normal, matrix: Callable) -> None:
    codes, scales = matrix(20, 128, 4, 32)
    x = normal(1, rows, 128)
    torch.library.opcheck(coded.quantised_linear, (x, codes, scales, 4))
    compiled = torch.compile(
        lambda x: kernels.quantised_linear(x, codes, scales, 4), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), kernels.quantised_linear(x, codes, scales, 4))


@pytest.mark.parametrize("grad", ["x", "scales"])
def test_a_gradient_is_refused(grad: str, normal: Normal, matrix: Callable) -> None:
    codes, scales = matrix(20, 128, 4, 32)
    x = normal(1, 128)
    (x if grad == "x" else scales).requires_grad_()
    with pytest.raises(ValueError, match=r"quantised_linear: it has no gradient.*torch\.no_grad\(\)"):
        kernels.quantised_linear(x, codes, scales, 4)
    with torch.no_grad():
        assert kernels.quantised_linear(x, codes, scales, 4).shape == (1, 20)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device="cpu" if launch.interpreting() else "cuda")


@pytest.mark.parametrize(
    ("codes", "groups", "bits", "message"),
    [
        (lambda: zeros(4, 12), 1, 4, "rows of 24 numbers of 4 bits are no multiple of 32: use the torch backend"),
        (lambda: zeros(4, 24), 1, 8, "rows of 24 numbers of 8 bits are no multiple of 16: use the torch backend"),
        (lambda: zeros(64, 4).T, 1, 4, r"codes and scales are not contiguous: call \.contiguous\(\)"),
    ],
)
def test_what_no_kernel_can_do(codes: Callable[[], Tensor], groups: int, bits: int, message: str) -> None:
    """One line when asked for by name; PyTorch's product otherwise."""
    matrix = codes()
    x = torch.ones(2, matrix.shape[1] * 8 // bits, device=matrix.device)
    scales = torch.ones(len(matrix), groups, device=matrix.device)
    with pytest.raises(ValueError, match=f"quantised_linear: triton was asked for, but .*{message}") as raised:
        kernels.quantised_linear(x, matrix, scales, bits)
    assert "\n" not in str(raised.value)
    kernels.use("auto")
    want = x.double() @ numbers(matrix, scales, bits).T
    assert torch.equal(kernels.quantised_linear(x, matrix, scales, bits).double(), want)


def test_scales_of_eight_bits_have_no_kernel(device: torch.device) -> None:
    scales = torch.ones(4, 1, device=device).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales of torch\.float8_e4m3fn have no kernel"):
        kernels.quantised_linear(torch.ones(1, 32, device=device), zeros(4, 16), scales, 4)
