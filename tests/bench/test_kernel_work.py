"""What counts as work, and as right: against brute force, and against wrong results."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kernels
from bench import kernel_work as work
from bench.kernel_work import Setting
from kernels import reference

CPU = Setting(torch.device("cpu"), torch.float32, "eager")


@pytest.mark.parametrize("T", [1, 100, 4096, 32768])
def test_document_lengths_fill_the_row(T: int) -> None:
    lengths = work.document_lengths(T)
    assert sum(lengths) == T
    assert min(lengths) >= 1
    assert lengths == work.document_lengths(T)
    assert T <= 100 or lengths != work.document_lengths(T, seed=1)


@pytest.mark.parametrize("mean", [50, work.MEAN_DOCUMENT])
def test_document_lengths_have_the_mean(mean: int) -> None:
    lengths = work.document_lengths(200_000, mean)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.03)
    assert max(lengths) > 2 * mean  # and are spread


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 4], [1, 1, 1]])
def test_flops_are_those_of_the_pairs_that_see_each_other(lengths: list[int]) -> None:
    start, end = work.documents_of(lengths, CPU.device)
    T = sum(lengths)
    pairs = sum(start[0, t] <= s <= t < end[0, s] for t in range(T) for s in range(T))
    forward = pairs * 6 * (2 * 32 + 2 * 32)  # six heads: a product of a query and a key, one with a value
    assert work.attention_flops(lengths, 6, 32, "forward") == forward
    assert work.attention_flops(lengths, 6, 32, "backward") == 2.5 * forward
    assert work.attention_flops(lengths, 6, 32, "both") == 3.5 * forward


def test_documents_are_what_the_seam_takes() -> None:
    start, end = work.documents_of([2, 3], CPU.device)
    assert start.tolist() == [[0, 0, 2, 2, 2]]
    assert end.tolist() == [[2, 2, 5, 5, 5]]
    assert start.dtype == end.dtype == torch.int32


def test_decode_bytes_are_those_of_the_tensors() -> None:
    B, S, H, G, K = 2, 7, 6, 3, 8
    q, k = torch.zeros(B, 1, H, K, dtype=torch.bfloat16), torch.zeros(B, S, G, K, dtype=torch.bfloat16)
    o = kernels.attention(q, k, k)
    assert work.decode_bytes(B, S, H, G, K, 2) == sum(t.nbytes for t in (q, k, k, o))


def test_errors_are_relative_and_nan_is_one() -> None:
    x = torch.tensor([3.0, 4.0])
    assert work.relative_error(x, x) == 0
    assert work.relative_error(x + torch.tensor([0.0, 0.5]), x) == pytest.approx(0.1)
    wrong = torch.tensor([math.nan, 4.0])
    assert math.isnan(work.relative_error(wrong, x))
    assert work.worst_error([(x, x), (2 * x, x)]) == pytest.approx(1.0)
    for pairs in ([(x, x), (wrong, x)], [(wrong, x), (x, x)], [(x, x), (wrong, x), (2 * x, x)]):
        assert math.isnan(work.worst_error(pairs))


@pytest.mark.parametrize("step", ["forward", "backward", "both"])
@pytest.mark.parametrize("lengths", [None, [20, 1, 27]])
def test_a_wrong_attention_is_seen(step: str, lengths: list[int] | None) -> None:
    shape = {"B": 2 if lengths is None else 1, "T": 48, "H": 4, "G": 2, "K": 16}
    row = work.attention(CPU, **shape, step=step, others=(), lengths=lengths)
    outputs = row.calls["ours"]()(0)
    exact = row.exact()
    assert len(exact) == len(outputs) == {"forward": 1, "backward": 3, "both": 4}[step]
    assert work.worst_error((part.pick(outputs), part.exact) for part in exact) <= row.tolerance
    for i in range(len(outputs)):
        spoilt = list(outputs)
        spoilt[i] = outputs[i].detach().clone()
        spoilt[i][-1, -1, -1] += 1  # the last token of the last head
        assert work.worst_error((part.pick(spoilt), part.exact) for part in exact) > row.tolerance


def test_calls_take_the_sets_in_turn() -> None:
    sets = [[torch.full((2,), float(i))] for i in range(3)]
    double = work.forward(lambda x: 2 * x, sets)
    assert [double(i)[0][0].item() for i in range(4)] == [0.0, 2.0, 4.0, 0.0]
    gradients = [(torch.full((2,), 10.0 + i),) for i in range(3)]
    assert [work.backward(lambda x: x * x, sets, gradients)(i)[0][0].item() for i in (1, 1, 2)] == [22.0, 22.0, 48.0]
    assert [t[0].item() for t in work.both(lambda x: x * x, sets, gradients)(2)] == [4.0, 48.0]


def test_exact_results_are_of_the_same_inputs() -> None:
    x, w, g = CPU.normal(3, 8, seed=0), CPU.normal(8, seed=1), CPU.normal(3, 8, seed=2)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return reference.rms_norm(x, w, 1e-5)

    got = work.backward(norm, [[x, w]], [(g,)])(0)
    assert work.worst_error((p.pick(got), p.exact) for p in work.from_reference(norm, [x, w], (g,))) < 1e-6
    (only,) = work.from_reference(norm, [x, w], None)
    assert work.relative_error(only.exact, norm(x, w)) < 1e-6


def test_a_peer_that_cannot_is_absent() -> None:
    with pytest.raises(work.Absent, match="varlen needs a CUDA device"):
        work.peer("varlen", CPU.device, None)
    q = CPU.normal(1, 8, 2, 16, seed=0)
    torch.testing.assert_close(work.peer("sdpa", CPU.device, None)(q, q, q), reference.attention(q, q, q))
