"""Attention by other implementations: what runs on a CPU agrees with the reference, the rest is asked for rightly."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import peers, reference

B, T, H, G, K = 2, 37, 4, 2, 16
CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No remembered answers from one test to the next."""

    def clear() -> None:
        for f in (peers.why_not, peers._varlen, peers._flex, peers._causal_blocks):
            f.cache_clear()

    clear()
    yield
    clear()


def inputs(t: int = T, dtype: torch.dtype = torch.float32, groups: int = G) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, t, H, K), (B, T, groups, K), (B, T, groups, K))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def documents() -> tuple[Tensor, Tensor]:
    start = torch.tensor([[0] * 20 + [20] + [21] * 16, [0] * 5 + [5] * 32], dtype=torch.int32)
    end = torch.tensor([[20] * 20 + [21] + [37] * 16, [5] * 5 + [37] * 32], dtype=torch.int32)
    return start, end


@pytest.mark.parametrize("t", [1, 5, T])
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_is_the_reference(t: int, packed: bool) -> None:
    tensors, docs = inputs(t), documents() if packed else None
    torch.testing.assert_close(peers.attention("sdpa", *tensors, docs), reference.attention(*tensors, docs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packed", [False, True])
def test_flex_is_the_reference(packed: bool) -> None:
    tensors, docs = inputs(), documents() if packed else None
    torch.testing.assert_close(peers.attention("flex", *tensors, docs), reference.attention(*tensors, docs))


@pytest.mark.parametrize("t", [1, T])
def test_flash_of_torch_is_the_reference(t: int) -> None:
    """torch has a flash kernel for CPUs too: the call as on CUDA."""
    tensors = inputs(t, torch.bfloat16, groups=H)
    got, want = peers.sdpa_flash(*tensors), reference.attention(*tensors)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def varlen_by_reference(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int) -> Tensor:
    assert borders.dtype == torch.int32
    at = borders.tolist()
    assert longest == max(b - a for a, b in pairwise(at))
    parts = [tuple(x[a:b][None] for x in (q, k, v)) for a, b in pairwise(at)]
    return torch.cat([reference.attention(*part)[0] for part in parts])


def check_against_reference(name: str) -> None:
    tensors, docs = inputs(dtype=torch.bfloat16), documents()
    for each in (None, docs):
        got, want = peers.PEERS[name].attend(*tensors, each), reference.attention(*tensors, each)
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("version", ["2.10", "2.11", "2.13"])
def test_varlen_of_every_torch_is_asked_rightly(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def v210(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool = False) -> Tensor:
        assert is_causal
        assert cu_q is cu_k
        assert max_q == max_k
        return varlen_by_reference(q, k, v, cu_q, max_q)

    def v211(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor:
        assert window_size == (-1, 0)
        return v210(q, k, v, cu_q, cu_k, max_q, max_k, True)

    def v213(
        q: Any,
        k: Any,
        v: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return v211(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size)

    stand_in = {"2.10": v210, "2.11": v211, "2.13": v213}[version]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    check_against_reference("varlen")


def test_flash_attn_package_is_asked_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("flash_attn")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        assert causal
        return reference.attention(q, k, v)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool = False
    ) -> Tensor:
        assert causal
        return varlen_by_reference(q, k, v, cu_q, max_q)

    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    check_against_reference("flash_attn")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_made_of_documents_is_made_once_and_goes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(peers, "_mask", lambda start, t, make=peers._mask: made.append(t) or make(start, t))
    tensors, docs, before = inputs(), documents(), len(peers._plans)
    for _ in range(3):
        peers.attention("sdpa", *tensors, docs)
    assert made == [T]
    docs[0][0, 20] = 0  # another packing in the same tensor
    torch.testing.assert_close(peers.attention("sdpa", *tensors, docs), reference.attention(*tensors, docs))
    assert made == [T, T]
    peers.attention("flex", *tensors, docs)
    assert len(peers._plans) == before + 1
    del docs
    gc.collect()
    assert len(peers._plans) == before


def test_documents_in_inference_mode() -> None:
    with torch.inference_mode():
        tensors, docs = inputs(), documents()
        torch.testing.assert_close(peers.attention("sdpa", *tensors, docs), reference.attention(*tensors, docs))


@pytest.mark.parametrize("name", ["sdpa_flash", "cudnn", "varlen", "flash_attn"])
def test_a_cpu_is_refused_in_one_sentence(name: str) -> None:
    why = peers.why_not(name, torch.device("cpu"))
    assert why is not None
    assert why.endswith("needs a CUDA device, and the tensors are on cpu: use --device cuda, or sdpa")
    with pytest.raises(ValueError, match=f"^attention: {name} needs a CUDA device"):
        peers.attention(name, *inputs(dtype=torch.bfloat16))


def test_refusals_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peers, "_installed", lambda module: module == "torch")
    cuda = torch.device("cuda")
    assert peers.why_not("sdpa_flash", cuda) is None
    assert peers.why_not("flash_attn", cuda) == "flash_attn is not installed: pip install flash-attn, or use sdpa"
    assert peers.why_not("varlen", cuda) == "varlen is not installed: install torch 2.10 or newer, or use sdpa"
    assert peers.why_not("cudnn", cuda, documents=True) == (
        "cudnn knows no packed documents: use varlen or flex, or train with --packing none"
    )
    with pytest.raises(ValueError, match="no attention called 'fa9'; there are sdpa, sdpa_flash, cudnn"):
        peers.why_not("fa9")


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="takes float16 and bfloat16, not float32; use sdpa"):
        peers.sdpa_flash(*inputs())
    with pytest.raises(ValueError, match="5 queries over 37 positions: it takes whole rows or one query; use sdpa"):
        peers.sdpa_flash(*inputs(5, torch.bfloat16))
    for f in (peers.varlen, peers.flex):
        with pytest.raises(ValueError, match="5 queries over 37 positions: it takes whole rows only; use sdpa"):
            f(*inputs(5, torch.bfloat16), None)
    with pytest.raises(ValueError, match="knows no packed documents"):
        peers.cudnn(*inputs(dtype=torch.bfloat16), documents())


def test_by_name_through_the_seam() -> None:
    """kernels.use(NAME) sends attention there and nothing else; refused at once where the device is named."""
    tensors, docs = inputs(), documents()
    try:
        kernels.use("sdpa", "cpu")
        torch.testing.assert_close(kernels.attention(*tensors, docs), reference.attention(*tensors, docs))
        assert kernels.describe("cpu").startswith("kernels: attention by sdpa, the rest by torch")
        kernels.use("cudnn")
        with pytest.raises(ValueError, match=r"attention: cudnn needs a CUDA device.*use --device cuda, or sdpa"):
            kernels.attention(*tensors)
        with pytest.raises(ValueError, match="cudnn was asked for, but cudnn needs a CUDA device"):
            kernels.use("cudnn", "cpu")
    finally:
        kernels.use("auto")
