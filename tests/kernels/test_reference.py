"""The reference operations against the plainest statement of what they mean, in fp64 where that is possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


ANGLES = (normal(3, 2, dtype=torch.float64).cos(), normal(3, 2, dtype=torch.float64).sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
def test_rms_norm(dtype: torch.dtype, grad: bool) -> None:
    x, w = normal(3, 5, 70, dtype=dtype), normal(70, seed=1, dtype=dtype)
    with torch.set_grad_enabled(grad):
        got = kernels.rms_norm(x, w, 1e-5)
    x64 = x.double()
    want = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    unit = torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= 2 * unit * want.abs() + 1e-6).all()


def naive_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None) -> Tensor:
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                row = S - T + t
                first = 0 if start is None else int(start[b, row])
                scores = k[b, first : row + 1, g] @ q[b, t, h] / K**0.5
                out[b, t, h] = scores.softmax(0) @ v[b, first : row + 1, g]
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 7), max_size=4)), min_size=1, max_size=4),
    st.sampled_from([1, 3, 128]),
)
def test_a_branch_sees_its_beginning_and_itself(trees: list[tuple[int, list[int]]], tile: int) -> None:
    """Each branch behind its beginning, as a document of its own, is what it is among its siblings."""
    borders: list[tuple[int, int, int, int]] = []
    paths: list[list[int]] = []  # the places of a beginning and one branch
    for beginning, branches in trees:
        start, end = len(borders), len(borders) + beginning + sum(branches)
        stem = list(range(start, start + beginning))
        borders += [(start, end, start, start)] * beginning
        paths.append(stem)
        for n in branches:
            own = len(borders)
            borders += [(start, end, start + beginning, own)] * n
            paths.append([*stem, *range(own, own + n)])
    T = len(borders)
    q, k, v = normal(1, T, 4, 6), normal(1, T, 2, 6, seed=1), normal(1, T, 2, 6, seed=2)
    documents = torch.tensor(borders, dtype=torch.int32).t()[:, None].unbind()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "TILE", tile)
        got = kernels.attention(q, k, v, documents)
    for path in paths:
        want = naive_attention(q[:, path], k[:, path], v[:, path], None)
        torch.testing.assert_close(got[:, path], want, rtol=1e-5, atol=1e-5)


def test_documents_that_branch_are_whole_rows_without_gradient() -> None:
    q, k = normal(1, 3, 2, 4), normal(1, 5, 2, 4)
    borders = torch.zeros(1, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="are whole rows, not 3 queries over 5 positions"):
        kernels.attention(q, k, k, (borders,) * 4)
    with pytest.raises(ValueError, match="have no gradient"):
        kernels.attention(k.requires_grad_(), k, k, (borders,) * 4)
    with pytest.raises(ValueError, match=r"two int32 tensors of shape \(1, 5\), or four that branch"):
        kernels.attention(k, k, k, (borders,) * 3)


def starts(B: int, S: int, seed: int) -> Tensor:
    """Starts (B, S) of documents of random lengths."""
    cut = torch.randint(0, 2, (B, S), generator=torch.Generator().manual_seed(seed)).bool()
    return torch.where(cut, torch.arange(S), 0).cummax(1).values.int()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 2) | st.integers(1, 12),
    st.integers(0, 9),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.booleans(),
    st.sampled_from([0, 20_000]),
    st.integers(0, 99),
)
def test_attention_is_softmax_over_what_a_row_may_see(
    B: int, T: int, past: int, heads: tuple[int, int], documents: bool, call: int, seed: int
) -> None:
    H, G = heads
    S = past + T
    q, k, v = normal(B, T, H, 6, seed=seed), normal(B, S, G, 6, seed=seed + 1), normal(B, S, G, 6, seed=seed + 2)
    borders = None
    if documents:
        start = starts(B, S, seed)
        borders = (start, torch.full_like(start, S))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "TILE", 5)
        patch.setattr(reference, "CALL", call)  # 0: one query is called row by row wherever rows differ
        got = kernels.attention(q, k, v, borders)
    torch.testing.assert_close(got, naive_attention(q, k, v, borders and borders[0]), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 20),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from(["whole", "documents", "length"]),
    st.sampled_from([1, 100, 10**9]),
    st.sampled_from([0, 20_000]),
    st.integers(0, 99),
)
def test_attention_of_codes_is_that_of_what_they_stand_for(
    B: int, T: int, past: int, heads: tuple[int, int], kind: str, codes: int, call: int, seed: int
) -> None:
    H, G = heads
    S = past + T
    q, k, v = normal(B, T, H, 6, seed=seed), normal(B, S, G, 6, seed=seed + 1), normal(B, S, G, 6, seed=seed + 2)
    v *= normal(B, S, G, 1, seed=seed + 3).mul(3).exp()
    (k, k_scales), (v, v_scales) = kernels.to_codes(k), kernels.to_codes(v)
    exact = (k.double() * k_scales[..., None], v.double() * v_scales[..., None])
    start = starts(B, S, seed) if kind == "documents" else None
    length, spare = None, 5
    if kind == "length":
        length = torch.tensor([S], dtype=torch.int32)
        k, v = (F.pad(t, (0, 0, 0, 0, 0, spare), value=77) for t in (k, v))
        k_scales, v_scales = (F.pad(t, (0, 0, 0, spare), value=1e4) for t in (k_scales, v_scales))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CODES", codes)
        patch.setattr(reference, "CALL", call)
        documents = None if start is None else (start, torch.full_like(start, S))
        got = kernels.attention(q, k, v, documents, length, (k_scales, v_scales))
    want = naive_attention(q.double(), *exact, start)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * float(exact[1].abs().max()))


def test_codes_of_heads_by_hand() -> None:
    x = torch.tensor([[[127.0, -63.4, 0.5, 0.51], [-4e-31, 0, 0, 0]], [[0, 0, 0, 0], [2e30, -1e30, 0, 3e28]]])
    codes, scales = kernels.to_codes(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert codes.tolist() == [[[127, -63, 0, 1], [0, 0, 0, 0]], [[0, 0, 0, 0], [127, -64, 0, 2]]]
    assert scales[0, 0] == 1
    assert torch.equal(kernels.from_codes(codes, scales, torch.float32)[0, 0], torch.tensor([127.0, -63, 0, 1]))
    assert kernels.from_codes(codes, scales, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    x = normal(50, 4, 64, dtype=dtype) * normal(50, 4, 1, seed=1).exp().to(dtype)
    codes, scales = kernels.to_codes(x)
    error = (codes.double() * scales[..., None] - x.double()).abs()
    assert (error <= 0.5001 * scales[..., None]).all()
    assert codes.abs().amax(-1).min() == 127


def test_rope_rotates_pairs_by_position() -> None:
    q, k = normal(2, 7, 4, 8, dtype=torch.float64).float(), normal(2, 7, 2, 8, seed=1)
    angles = normal(7, 4, seed=2)
    got_q, got_k = kernels.rope(q, k, angles.cos(), angles.sin())
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for got, x in ((got_q, q), (got_k, k)):
        z = torch.complex(x[..., :4], x[..., 4:]) * turn
        torch.testing.assert_close(got, torch.cat((z.real, z.imag), -1), rtol=1e-5, atol=1e-6)


def test_swiglu() -> None:
    gate, up = normal(3, 9), normal(3, 9, seed=1)
    torch.testing.assert_close(kernels.swiglu(gate, up), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 50 * 3, 2**26])
@pytest.mark.parametrize("masked", [0.0, 0.6, 1.0])
def test_linear_cross_entropy_is_cross_entropy_of_the_product(
    chunk_bytes: int, masked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LOGITS_BYTES", chunk_bytes)
    x, w = normal(17, 12).requires_grad_(), normal(50, 12, seed=1).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, 50, (17,), generator=generator)
    targets[torch.rand(17, generator=generator) < masked] = -100
    loss = kernels.linear_cross_entropy(x, w, targets)
    (3 * loss).backward()
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    want = F.cross_entropy(x64 @ w64.t(), targets, ignore_index=-100, reduction="sum")
    (3 * want).backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


def test_linear_cross_entropy_accumulates_weight_gradients_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOGITS_BYTES", 4 * 40)  # one row at a time: the worst case for accumulation
    x, w = normal(600, 16, dtype=torch.bfloat16), normal(40, 16, seed=1, dtype=torch.bfloat16).requires_grad_()
    targets = torch.arange(600) % 40
    kernels.linear_cross_entropy(x, w, targets).backward()
    w64 = w.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ w64.t(), targets, reduction="sum").backward()
    error = (w.grad.double() - w64.grad).norm() / w64.grad.norm()
    assert error <= 6e-3  # 2.6e-3 here; accumulated in bf16 it is 1.5e-2


def test_codes_by_hand() -> None:
    """The layout, byte by byte: low half first, offset 8 or 128, a scale for each group, negative ones too."""
    codes = torch.tensor([[0x80, 0xF7] + [0x88] * 14 + [0x19] * 16], dtype=torch.uint8)
    scales = torch.tensor([[0.5, -2.0]])
    weight = kernels.dequantise(codes, scales, 4, torch.float32)
    assert weight.shape == (1, 64)
    assert weight[0, :6].tolist() == [-4.0, 0.0, -0.5, 3.5, 0.0, 0.0]
    assert weight[0, 30:34].tolist() == [0.0, 0.0, -2.0, 14.0]
    whole = kernels.dequantise(torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8), scales[:, :1], 8, torch.float16)
    assert whole.dtype == torch.float16
    assert whole.tolist() == [[-64.0, -0.5, 0.0, 63.5]]
    words = torch.tensor([[0x76543210]], dtype=torch.int32).view(torch.uint8)  # as compressed-tensors packs 0..7
    assert (kernels.dequantise(words, scales[:, :1], 4, torch.float32) * 2 + 8).tolist() == [list(range(8))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("numbers", [1, 200, 2**22])
def test_dequantise_rounds_once_however_it_is_cut(
    bits: int, dtype: torch.dtype, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "DEQUANTISED", numbers)
    q = torch.randint(0, 2**bits, (7, 64), generator=torch.Generator().manual_seed(0))
    codes = (q if bits == 8 else q[:, ::2] + 16 * q[:, 1::2]).to(torch.uint8)
    scales = normal(7, 2, seed=1).mul(0.03)
    exact = (q - 2 ** (bits - 1)) * scales.double().repeat_interleave(32, 1)
    assert torch.equal(kernels.dequantise(codes, scales, bits, dtype), exact.float().to(dtype))
    x = normal(2, 3, 64, seed=2, dtype=dtype)
    got = kernels.quantised_linear(x, codes, scales, bits)
    assert (got.dtype, got.shape) == (dtype, (2, 3, 7))
    assert torch.equal(got, F.linear(x, exact.float().to(dtype)))


DOCUMENTS = torch.tensor([[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (lambda x, w: reference.rms_norm(x, w, 1e-5), [(3, 5), (5,)]),
        (lambda q, k: reference.rope(q, k, *ANGLES), [(1, 3, 2, 4), (1, 3, 1, 4)]),
        (reference.swiglu, [(2, 3), (2, 3)]),
        (reference.attention, [(2, 4, 2, 3), (2, 4, 2, 3), (2, 4, 2, 3)]),
        (reference.attention, [(2, 3, 4, 3), (2, 6, 2, 3), (2, 6, 2, 3)]),
        (lambda *qkv: reference.attention(*qkv, (DOCUMENTS, DOCUMENTS)), [(2, 3, 4, 3), (2, 6, 2, 3), (2, 6, 2, 3)]),
        (lambda *qkv: reference.attention(*qkv, (DOCUMENTS, DOCUMENTS)), [(2, 1, 4, 3), (2, 6, 2, 3), (2, 6, 2, 3)]),
    ],
    ids=["rms_norm", "rope", "swiglu", "attention", "attention_cached", "attention_packed", "attention_one_query"],
)
def test_gradients_are_the_derivatives(
    operation: Callable[..., Tensor], shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp64 throughout, where the reference asks for fp32: differences of 1e-6 say nothing in fp32.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(reference, "TILE", 2)
    inputs = [normal(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(operation, inputs)


@pytest.mark.parametrize("token_weights", [None, torch.tensor([1.0, 0.5, 0.0, 2.0, -1.0])])
def test_the_gradient_of_linear_cross_entropy_is_the_derivative(
    token_weights: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LOGITS_BYTES", 4 * 7 * 2)  # two rows at a time
    x, w = normal(5, 4, dtype=torch.float64).requires_grad_(), normal(7, 4, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([3, -100, 6, 0, 0])
    # The loss is an fp32 sum of about 8: steps of 1e-2 find its derivative to 1e-4, errors are of the order of 1.
    assert torch.autograd.gradcheck(
        lambda x, w: reference.linear_cross_entropy(x, w, targets, token_weights=token_weights),
        (x, w),
        eps=1e-2,
        atol=1e-3,
    )


def product(**change: Tensor | int) -> Tensor:
    """A product of two rows of 64 codes in groups of 32, but for one argument."""
    right = {"x": torch.ones(3, 64), "codes": torch.zeros(2, 32).byte(), "scales": torch.ones(2, 2), "bits": 4}
    return kernels.quantised_linear(**{**right, **change})


def of_codes(**change: Tensor) -> Tensor:
    """Attention of two queries over three positions of codes, but for one argument."""
    right = {"q": torch.ones(1, 2, 1, 4)} | {name: torch.ones(1, 3, 1, 4).char() for name in "kv"}
    right |= {f"{name}_scales": torch.ones(1, 3, 1) for name in "kv"}
    q, k, v, *scales = {**right, **change}.values()
    return kernels.attention(q, k, v, scales=tuple(scales))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5), "rms_norm: weight"),
        (lambda: kernels.rope(*[torch.ones(1, 2, 1, 4)] * 2, *[torch.ones(3, 2)] * 2), "rope: tables"),
        (
            lambda: kernels.rope(*[torch.ones(1, 2, 1, 4)] * 2, torch.ones(2, 2), torch.ones(2, 2, device="meta")),
            r"rope: sin on meta, the rest on cpu: use \.to",
        ),
        (lambda: kernels.swiglu(torch.ones(2), torch.ones(3)), "swiglu: gate"),
        (lambda: kernels.attention(torch.ones(1, 2, 3, 4), *[torch.ones(1, 2, 2, 4)] * 2), "attention: q"),
        (
            lambda: kernels.attention(*[torch.ones(1, 2, 1, 4)] * 3, (torch.zeros(1, 2), torch.zeros(1, 2))),
            "attention: documents",
        ),
        (lambda: of_codes(k=torch.ones(1, 3, 1, 4)), "attention: k of torch.float32 with scales"),
        (
            lambda: of_codes(v_scales=torch.ones(1, 3, 1).half()),
            r"v of torch.int8 with scales \(1, 3, 1\) of torch.float16",
        ),
        (lambda: of_codes(k_scales=torch.ones(1, 3)), r"scales \(1, 3\) of .*int8 and float32 \(1, 3, 1\) are needed"),
        (lambda: of_codes(v_scales=torch.ones(1, 3, 1, device="meta")), "v's scales on meta, the rest on cpu"),
        (lambda: of_codes(q=torch.ones(1, 2, 1, 4).requires_grad_()), r"attention: .*no gradient.*torch.no_grad\(\)"),
        (lambda: kernels.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 4), torch.ones(2)), "linear_cross"),
        (
            lambda: kernels.linear_cross_entropy(
                torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2, dtype=torch.int64, device="meta")
            ),
            "linear_cross_entropy: targets on meta",
        ),
        (lambda: product(bits=3), "codes of 3 bits: 4 or 8"),
        (lambda: product(codes=torch.zeros(2, 32).char()), r"codes \(2, 32\) torch.int8: a uint8 matrix"),
        (lambda: product(codes=torch.zeros(64).byte()), "a uint8 matrix"),
        (lambda: product(x=torch.ones(3, 64).int()), "x is torch.int32 and scales are torch.float32"),
        (lambda: product(scales=torch.ones(2, 2).int()), "scales are torch.int32"),
        (lambda: product(x=torch.ones(3, 32)), r"x \(3, 32\) does not fit 2 rows of 64 codes"),
        (lambda: product(x=torch.ones(())), r"x \(\) does not fit"),
        (lambda: product(scales=torch.ones(3, 2)), r"scales \(3, 2\) do not fit 2 rows of 64"),
        (lambda: product(scales=torch.ones(2, 3)), r"scales \(2, 3\) do not fit"),
        (lambda: product(scales=torch.ones(2, 0)), r"scales \(2, 0\) do not fit"),
        (lambda: product(scales=torch.ones(2, 4)), "groups of 16 numbers: 32, 64, 128 or a whole row"),
        (lambda: product(scales=torch.ones(2, 2, device="meta")), "scales on meta, the rest on cpu"),
        (lambda: product(x=torch.ones(3, 64).requires_grad_()), r"no gradient.*torch.no_grad\(\)"),
        (lambda: kernels.use("cuda"), "no backend 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_public_names_are_sorted_and_exact() -> None:
    assert kernels.__all__ == sorted(kernels.__all__)
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_use_and_describe() -> None:
    kernels.use("torch")
    assert "asked for" in kernels.describe()
    kernels.use("auto")
    assert torch.__version__ in kernels.describe()


def test_packed_attention_traces_without_graph_breaks() -> None:
    q = normal(1, 9, 2, 4)
    start = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7]], dtype=torch.int32)
    documents = (start, torch.full_like(start, 9))
    compiled = torch.compile(kernels.attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, q, q, documents), kernels.attention(q, q, q, documents))
