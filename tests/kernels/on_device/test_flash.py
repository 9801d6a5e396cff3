"""Attention kernels: forward and every gradient against fp64, packings, grouped queries, caches, odd shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import decode, flash, reference
from kernels.flash import Tiles
from kernels.reference import Documents

Check = Callable[..., None]
Normal = Callable[..., Tensor]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SQUARE, TALL, WIDE = Tiles(32, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(16, 64, 4, 1)


@pytest.fixture(autouse=True)
def tiles() -> Iterator[Callable[[Tiles], None]]:
    """cut(tiles) has every attention kernel use them; on a device the table's own hold, tested there as they are."""
    before = dict(flash.OVERRIDE)

    def cut(tiles: Tiles) -> None:
        flash.OVERRIDE.update(dict.fromkeys(("forward", "dkdv", "dq"), tiles))

    yield cut
    flash.OVERRIDE.clear()
    flash.OVERRIDE.update(before)


def borders(lengths: list[list[int]], device: torch.device) -> Documents:
    """start and end (B, T) of rows packed with documents of these lengths; 0 is an empty document, and leaves none."""
    start, end = [], []
    for row in lengths:
        at, starts, ends = 0, [], []
        for n in row:
            starts += [at] * n
            ends += [at + n] * n
            at += n
        start.append(starts)
        end.append(ends)
    return torch.tensor(start, dtype=torch.int32, device=device), torch.tensor(end, dtype=torch.int32, device=device)


def random_packing(T: int, generator: torch.Generator) -> list[int]:
    """Lengths that sum to T: of a geometric kind whose mean is itself drawn, with empty and single-token ones."""
    mean = int(torch.randint(1, T, (1,), generator=generator))
    lengths: list[int] = []
    while sum(lengths) < T:
        n = int(torch.rand(1, generator=generator).log().neg() * mean)
        lengths.append(min(n, T - sum(lengths)))
    return lengths


Results = dict[str, Tensor]


def run(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, do: Tensor, documents: Documents | None) -> Results:
    """f's output and its three gradients."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o = f(q, k, v, documents)
    o.backward(do)
    return {"o": o.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def three(q: Tensor, k: Tensor, v: Tensor, do: Tensor, documents: Documents | None) -> tuple[Results, Results, Results]:
    """By the kernels, by plain torch in the same dtype, by plain torch in fp64."""
    return (
        run(flash.attention, q, k, v, do, documents),
        run(reference.attention, q, k, v, do, documents),
        run(reference.attention, *(t.double() for t in (q, k, v, do)), documents),
    )


@pytest.mark.parametrize(
    ("T", "H", "G", "K", "dtype", "cut", "packed"),
    [
        (200, 4, 4, 64, BF16, SQUARE, True),
        (200, 4, 4, 64, F16, TALL, False),
        (131, 4, 1, 128, BF16, WIDE, True),
        (131, 4, 1, 128, F32, SQUARE, True),
        (97, 8, 1, 32, F16, TALL, True),
        (97, 8, 1, 32, F32, WIDE, False),
        (256, 4, 2, 64, F32, TALL, True),
        (256, 4, 2, 64, BF16, SQUARE, False),
        (77, 4, 1, 96, BF16, SQUARE, True),
        (77, 2, 2, 96, F16, WIDE, False),
        (65, 2, 1, 80, F32, WIDE, True),
        (33, 2, 1, 8, F16, SQUARE, True),
        (17, 3, 1, 16, BF16, SQUARE, True),
    ],
)
def test_forward_and_gradients(
    T: int,
    H: int,
    G: int,
    K: int,
    dtype: torch.dtype,
    cut: Tiles,
    packed: bool,
    normal: Normal,
    no_worse: Check,
    tiles: Callable[[Tiles], None],
    device: torch.device,
) -> None:
    tiles(cut)
    q, k, v = (normal(1, T, heads, K, seed=i, dtype=dtype) for i, heads in enumerate((H, G, G)))
    documents = borders([random_packing(T, torch.Generator().manual_seed(T))], device) if packed else None
    ours, torchs, exact = three(q, k, v, normal(1, T, H, K, seed=9, dtype=dtype), documents)
    for name in exact:
        no_worse(name, ours[name], torchs[name], exact[name])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("seed", range(4))
def test_random_packings(
    seed: int,
    dtype: torch.dtype,
    normal: Normal,
    no_worse: Check,
    tiles: Callable[[Tiles], None],
    device: torch.device,
) -> None:
    """Eight packings a case, 32 in all for each dtype, each row judged by itself."""
    B, T, H, G, K = 8, 83, 2, 1, 32
    tiles((SQUARE, TALL, WIDE, Tiles(16, 16, 4, 1))[seed])
    generator = torch.Generator().manual_seed(seed)
    documents = borders([random_packing(T, generator) for _ in range(B)], device)
    q, k, v = (normal(B, T, heads, K, seed=seed + i, dtype=dtype) for i, heads in enumerate((H, G, G)))
    ours, torchs, exact = three(q, k, v, normal(B, T, H, K, seed=seed + 9, dtype=dtype), documents)
    for name in exact:
        for b in range(B):
            no_worse(f"{name} of row {b}", ours[name][b], torchs[name][b], exact[name][b])


@pytest.mark.parametrize(
    "lengths", [[96], [1] * 96, [0, 95, 0, 1], [1, 95], [32, 32, 32], [31, 33, 1, 31], [64, 0, 0, 32]]
)
def test_borders_on_and_beside_the_tiles(
    lengths: list[int], normal: Normal, no_worse: Check, tiles: Callable[[Tiles], None], device: torch.device
) -> None:
    tiles(SQUARE)
    q, k, v, do = (normal(1, 96, 2, 16, seed=i) for i in range(4))
    ours, torchs, exact = three(q, k, v, do, borders([lengths], device))
    for name in exact:
        no_worse(name, ours[name], torchs[name], exact[name])


def test_packed_is_each_document_by_itself(
    normal: Normal, no_worse: Check, tiles: Callable[[Tiles], None], device: torch.device
) -> None:
    tiles(TALL)
    lengths = [40, 1, 77, 12]
    q, k, v, do = (normal(1, 130, 4 if i in (0, 3) else 2, 32, seed=i) for i in range(4))
    packed = run(flash.attention, q, k, v, do, borders([lengths], device))
    parts = zip(*(t.split(lengths, dim=1) for t in (q, k, v, do)), strict=True)
    alone, torchs, exact = (
        {name: torch.cat([r[name] for r in results], dim=1) for name in packed}
        for results in zip(*(three(*part, None) for part in parts), strict=True)
    )
    for name in exact:
        no_worse(f"{name} packed", packed[name], torchs[name], exact[name])
        no_worse(f"{name} alone", alone[name], torchs[name], exact[name])


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_by_itself(packed: bool, normal: Normal, device: torch.device) -> None:
    """It sees one key: o is its value, and the score, whatever it is, has no gradient."""
    q, do = normal(1, 1, 4, 32), normal(1, 1, 4, 32, seed=9)
    k, v = normal(1, 1, 2, 32, seed=1), normal(1, 1, 2, 32, seed=2)
    ours = run(flash.attention, q, k, v, do, borders([[1]], device) if packed else None)
    assert torch.equal(ours["o"], v.repeat_interleave(2, dim=2))
    rounding = {"rtol": 5e-7, "atol": 5e-7}  # the backward makes the weight of 1 again, from a product of another order
    torch.testing.assert_close(ours["dv"], do.view(1, 1, 2, 2, 32).sum(3), **rounding)
    for name in ("dq", "dk"):
        torch.testing.assert_close(ours[name], torch.zeros_like(ours[name]), **rounding)


def test_no_row_depends_on_the_batch_around_it(normal: Normal, device: torch.device) -> None:
    """Bit for bit: what a row gives alone, in a batch, and on a second run."""
    q, k, v, do = (normal(3, 70, 4 if i in (0, 3) else 2, 32, seed=i, dtype=F16) for i in range(4))
    documents = borders([[70], [10, 60], [1, 1, 30, 38]], device)
    together = run(flash.attention, q, k, v, do, documents)
    again = run(flash.attention, q, k, v, do, documents)
    alone = [
        run(flash.attention, *(t[b : b + 1] for t in (q, k, v, do)), tuple(d[b : b + 1] for d in documents))
        for b in range(3)
    ]
    for name, value in together.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, torch.cat([r[name] for r in alone])), name


def test_a_document_touches_no_other(normal: Normal, device: torch.device) -> None:
    """Other values in one document leave every bit of the others' output and gradients as it was."""
    q, k, v, do = (normal(1, 60, 2, 16, seed=i) for i in range(4))
    documents = borders([[20, 25, 15]], device)
    clean = run(flash.attention, q, k, v, do, documents)
    for t in (q, k, v, do):
        t[:, 20:45] *= -1000
    dirty = run(flash.attention, q, k, v, do, documents)
    for name, value in clean.items():
        assert torch.equal(value[:, :20], dirty[name][:, :20]), name
        assert torch.equal(value[:, 45:], dirty[name][:, 45:]), name
        assert not torch.equal(value[:, 20:45], dirty[name][:, 20:45]), name


def test_hidden_values_of_any_size_count_nothing(normal: Normal, device: torch.device) -> None:
    """A row whose document begins late walks over others' keys first: two weights of 1 there would add up to inf."""
    q, k, v = (normal(1, 40, 1, 16, seed=i) for i in range(3))
    documents = borders([[15, 25]], device)
    clean = flash.attention(q, k, v, documents)[:, 15:]
    v[:, :15] = 3e38
    assert torch.equal(flash.attention(q, k, v, documents)[:, 15:], clean)


@pytest.mark.parametrize("padded", [False, True])
def test_queries_behind_a_cache(
    padded: bool, normal: Normal, no_worse: Check, tiles: Callable[[Tiles], None], device: torch.device
) -> None:
    """T queries at the end of S keys, the cache handed over as views of a longer one; left padding as in a batch."""
    tiles(TALL)
    B, T, S, H, G, K = 2, 45, 110, 4, 2, 32
    held = [normal(B, G, 128, K, seed=i)[:, :, :S].transpose(1, 2) for i in (1, 2)]
    q, do = normal(B, T, H, K), normal(B, T, H, K, seed=9)
    documents = None
    if padded:
        pad = torch.tensor([[13], [0]], device=device)
        start = torch.where(torch.arange(S, device=device) < pad, 0, pad).int()
        documents = (start, torch.full_like(start, S))
    ours, torchs, exact = three(q, *held, do, documents)
    for name in exact:
        no_worse(name, ours[name], torchs[name], exact[name])


def test_strided_inputs_and_an_expanded_gradient(normal: Normal, no_worse: Check) -> None:
    """Heads cut from one fused product, and the gradient of a sum, whose strides are 0."""
    B, T, H, G, K = 2, 50, 4, 2, 16
    fused = normal(B, T, H + 2 * G, K)
    q, k, v = fused.split((H, G, G), dim=2)
    do = torch.ones((), device=fused.device).expand(B, T, H, K)
    assert not q.is_contiguous()
    ours, torchs, exact = three(q, k, v, do, None)
    for name in exact:
        no_worse(name, ours[name], torchs[name], exact[name])


@pytest.mark.parametrize("fewer", [False, True])
def test_rows_beyond_two_to_the_31_elements(fewer: bool, vast: Callable[..., Tensor], normal: Normal) -> None:
    """Batch rows, positions and heads that lie far apart: every offset is 64 bits wide.

    Three of each, 2^30 apart, so that the steps themselves fit 32 bits and only their products do not.
    """
    B, T, H, K = 3, 5, 3, 16
    S = 9 if fewer else T
    for shape_of_steps in range(3):
        near = [normal(B, t, H, K, seed=i, dtype=F16) for i, t in enumerate((T, S, S))]
        far = []
        for t in near:
            order = [0, 1, 2]
            order.insert(0, order.pop(shape_of_steps))
            place = vast(t.shape[order[0]], 64 * t.shape[order[1]] * t.shape[order[2]], dtype=F16)
            view = place.as_strided(
                [t.shape[i] for i in order] + [K], [place.stride(0), t.shape[order[2]] * K, K, 1]
            ).permute(*[order.index(i) for i in range(3)], 3)
            view.copy_(t)
            far.append(view)
        f = decode.attention if fewer else flash.attention
        assert torch.equal(f(*far), f(*near))
        if not fewer:
            do = normal(B, T, H, K, seed=7, dtype=F16)
            ours, want = run(flash.attention, *far, do, None), run(flash.attention, *near, do, None)
            assert all(torch.equal(ours[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("B", "T", "S", "H", "G", "K", "dtype", "padded"),
    [
        (1, 1, 2, 64, 4, 64, F32, False),
        (2, 1, 300, 8, 1, 128, BF16, True),
        (3, 1, 777, 4, 1, 64, F16, True),
        (2, 7, 513, 4, 2, 96, BF16, False),
        (1, 8, 256, 8, 1, 32, F32, True),
        (1, 3, 40, 2, 2, 24, F16, True),
        (1, 1, 4500, 2, 1, 16, F32, False),  # more parts than are joined at a time
    ],
)
def test_decode(
    B: int,
    T: int,
    S: int,
    H: int,
    G: int,
    K: int,
    dtype: torch.dtype,
    padded: bool,
    normal: Normal,
    no_worse: Check,
    device: torch.device,
) -> None:
    q, k, v = (normal(B, t, h, K, seed=i, dtype=dtype) for i, (t, h) in enumerate(((T, H), (S, G), (S, G))))
    documents = None
    if padded:
        pad = torch.randint(0, S - T, (B, 1), generator=torch.Generator().manual_seed(S)).to(device)
        start = torch.where(torch.arange(S, device=device) < pad, 0, pad).int()
        documents = (start, torch.full_like(start, S))
    assert decode.takes(q, k)
    o = decode.attention(q, k, v, documents)
    exact = reference.attention(*(t.double() for t in (q, k, v)), documents)
    no_worse("o", o, reference.attention(q, k, v, documents), exact)
    assert torch.equal(o, decode.attention(q, k, v, documents))
    for b in range(B):
        row = tuple(d[b : b + 1] for d in documents) if documents else None
        assert torch.equal(o[b : b + 1], decode.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], row))


@pytest.mark.parametrize(
    ("B", "T", "S", "length", "H", "G", "K", "dtype"),
    [
        (1, 1, 600, 1, 8, 2, 64, F32),
        (2, 1, 600, 256, 4, 4, 32, F32),  # a part that is full, and two that are empty
        (1, 3, 600, 257, 4, 1, 64, BF16),
        (1, 1, 600, 600, 8, 1, 128, F16),
        (2, 2, 40, 33, 2, 2, 24, F32),
    ],
)
def test_decode_within_a_length_on_the_device(
    B: int,
    T: int,
    S: int,
    length: int,
    H: int,
    G: int,
    K: int,
    dtype: torch.dtype,
    normal: Normal,
    no_worse: Check,
    device: torch.device,
) -> None:
    """What lies behind the length is not read: it may be NaN."""
    q, k, v = (normal(B, t, h, K, seed=i, dtype=dtype) for i, (t, h) in enumerate(((T, H), (S, G), (S, G))))
    there = torch.tensor([length], dtype=torch.int32, device=device)
    exact = reference.attention(*(t.double() for t in (q, k[:, :length], v[:, :length])))
    plain = reference.attention_bounded(q, k, v, there)
    k[:, length:], v[:, length:] = float("nan"), float("nan")
    o = decode.attention(q, k, v, None, there)
    no_worse("o", o, plain, exact)
    assert (plain.double() - exact).abs().max() <= 0.02
    torch.library.opcheck(decode.attention_decode, (q, k, v, None, there), test_utils="test_schema")


@pytest.mark.parametrize(
    ("B", "T", "S", "length", "H", "G", "K", "dtype"),
    [
        (2, 1, 300, None, 8, 2, 64, BF16),
        (3, 1, 513, None, 4, 1, 128, F16),
        (1, 8, 256, None, 8, 1, 32, F32),
        (2, 3, 40, None, 2, 2, 24, F16),
        (1, 1, 600, 257, 8, 2, 64, F32),
        (2, 2, 300, 33, 4, 4, 32, BF16),
    ],
)
def test_decode_over_codes(
    B: int,
    T: int,
    S: int,
    length: int | None,
    H: int,
    G: int,
    K: int,
    dtype: torch.dtype,
    normal: Normal,
    no_worse: Check,
    fenced: Callable[[Tensor], Tensor],
    device: torch.device,
) -> None:
    """Rows that begin where they like, or a length on the device, behind which scales are NaN; values of many sizes."""
    q, k, v = (normal(B, t, h, K, seed=i, dtype=dtype) for i, (t, h) in enumerate(((T, H), (S, G), (S, G))))
    sizes = normal(B, S, G, 1, seed=3).mul(3).exp() * 1e-3
    (k, k_scales), (v, v_scales) = reference.to_codes(k), reference.to_codes(v * sizes)
    k, v, *scales = (fenced(t) for t in (k, v, k_scales, v_scales))
    documents = there = None
    if length is None:
        pad = torch.randint(0, S - T, (B, 1), generator=torch.Generator().manual_seed(S)).to(device)
        start = torch.where(torch.arange(S, device=device) < pad, 0, pad).int()
        documents = (start, torch.full_like(start, S))
    else:
        there = torch.tensor([length], dtype=torch.int32, device=device)
    exact_k, exact_v = (t[:, :length].double() * s[:, :length, :, None] for t, s in zip((k, v), scales, strict=True))
    exact = reference.attention(q.double(), exact_k, exact_v, documents)
    peer = reference.attention(q, exact_k.to(dtype), exact_v.to(dtype), documents)
    no_worse("plain", reference.attention_of_codes(q, k, v, tuple(scales), documents, there), peer, exact)
    for s in scales:
        s[:, length if length is not None else S :] = float("nan")
    o = decode.attention(q, k, v, documents, there, tuple(scales))
    no_worse("o", o, peer, exact)
    for b in range(B):
        row = tuple(d[b : b + 1] for d in documents) if documents else None
        of_row = (t[b : b + 1] for t in (q, k, v))
        assert torch.equal(o[b : b + 1], decode.attention(*of_row, row, there, tuple(s[b : b + 1] for s in scales)))
    arguments = (q, k, v, documents and documents[0], there, *scales)
    torch.library.opcheck(decode.attention_decode, arguments, test_utils="test_schema")


def test_decode_takes_few_queries_behind_a_cache(normal: Normal) -> None:
    q, k = normal(1, 8, 8, 16), normal(1, 20, 1, 16)
    assert decode.takes(q, k)
    assert not decode.takes(normal(1, 9, 8, 16), k), "72 rows"
    assert not decode.takes(q, normal(1, 8, 1, 16)), "no cache"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 70),
    past=st.integers(0, 40),
    heads=st.sampled_from([(1, 1), (4, 1), (8, 1), (4, 4), (6, 2)]),
    K=st.sampled_from([16, 20, 32]),
    cut=st.sampled_from([SQUARE, TALL, WIDE]),
    data=st.data(),
)
def test_any_shape_and_packing(
    T: int,
    past: int,
    heads: tuple[int, int],
    K: int,
    cut: Tiles,
    data: st.DataObject,
    normal: Normal,
    no_worse: Check,
    device: torch.device,
    tiles: Callable[[Tiles], None],
) -> None:
    tiles(cut)
    (H, G), S = heads, T + past
    borders_at = sorted(data.draw(st.sets(st.integers(1, S), max_size=8)) | {S})
    lengths = [b - a for a, b in zip([0, *borders_at], borders_at, strict=False)]
    q, k, v = (normal(1, t, h, K, seed=T + i) for i, (t, h) in enumerate(((T, H), (S, G), (S, G))))
    ours, torchs, exact = three(q, k, v, normal(1, T, H, K, seed=9), borders([lengths], device))
    for name in exact:
        # Few numbers and sums of a few terms: single cases have single roundings, so both have a floor of a few units.
        no_worse(name, ours[name], torchs[name], exact[name], floor=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cut", [SQUARE, TALL, WIDE])
def test_documents_that_branch(
    cut: Tiles,
    dtype: torch.dtype,
    normal: Normal,
    no_worse: Check,
    tiles: Callable[[Tiles], None],
    device: torch.device,
) -> None:
    """Beginnings of 1 to 50 positions, each with up to six branches, and one document without any."""
    tiles(cut)
    places: list[tuple[int, int, int, int]] = []
    for beginning, branches in ((50, [7, 1, 40, 3]), (1, [2, 2]), (33, []), (20, [1] * 6)):
        start, end = len(places), len(places) + beginning + sum(branches)
        places += [(start, end, start, start)] * beginning
        for n in branches:
            places += [(start, end, start + beginning, len(places))] * n
    T, H, G, K = len(places), 4, 2, 32
    q, k, v = (normal(1, T, heads, K, seed=i, dtype=dtype) for i, heads in enumerate((H, G, G)))
    documents = torch.tensor(places, dtype=torch.int32, device=device).t().contiguous()[:, None].unbind()
    ours, torchs = (f.attention(q, k, v, documents) for f in (flash, reference))
    no_worse("o", ours, torchs, reference.attention(q.double(), k.double(), v.double(), documents))


@pytest.mark.parametrize("packed", [False, True])
def test_operators_keep_torch_contracts(packed: bool, normal: Normal, device: torch.device) -> None:
    q, k, v = (normal(1, 9, h, 16, seed=i).requires_grad_() for i, h in enumerate((4, 2, 2)))
    documents = borders([[4, 5]], device) if packed else (None, None)
    torch.library.opcheck(flash.attention_forward, (q, k, v, *documents))
    o, lse = (t.detach() for t in flash.attention_forward(q, k, v, *documents))
    q, k, v = (t.detach() for t in (q, k, v))
    torch.library.opcheck(flash.attention_backward, (o, q, k, v, o, lse, *documents))
    torch.library.opcheck(decode.attention_decode, (q[:, 8:], k, v, documents[0], None))


def test_compiles_without_graph_breaks(normal: Normal, device: torch.device) -> None:
    q, k, v, do = (normal(1, 20, 4 if i in (0, 3) else 2, 16, seed=i) for i in range(4))
    documents = borders([[8, 12]], device)
    compiled = torch.compile(flash.attention, fullgraph=True, backend="aot_eager")
    plain, traced = run(flash.attention, q, k, v, do, documents), run(compiled, q, k, v, do, documents)
    assert all(torch.equal(plain[name], traced[name]) for name in plain)
