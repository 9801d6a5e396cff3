"""llama/few_rows.py: the same products as nn.Linear, for any number of rows, threads and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from llama import few_rows
from llama.config import LlamaConfig
from llama.generation import lay_out_for_decoding
from llama.model import Llama


@pytest.fixture(autouse=True)
def every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are laid out as well."""
    monkeypatch.setattr(few_rows, "SMALLEST", 0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (3, 2), (9, 1), (1, 40)])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(7, 12), (40, 30), (1, 2)])
def test_split_products_are_linears(
    rows: tuple[int, int], threads: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, x = random(*shape), random(*rows, shape[1], seed=1)
    got = few_rows.SplitLinear(weight)(x)
    torch.testing.assert_close(got, nn.functional.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not few_rows.has_packed(), reason="this torch or CPU has no packed bf16 products")
@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (1, 40)])
def test_packed_products_err_no_more_than_linears(rows: tuple[int, int]) -> None:
    weight, x = random(96, 64).bfloat16(), random(*rows, 64, seed=1).bfloat16()
    exact = nn.functional.linear(x.double(), weight.double())
    plain = (nn.functional.linear(x, weight).double() - exact).abs().max()
    packed = (few_rows.PackedLinear(weight)(x).double() - exact).abs().max()
    assert packed <= 2 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_laid_out_gives_the_same_logits(dtype: torch.dtype, tied: bool) -> None:
    config = LlamaConfig(32, 2, 4, 2, 48, 100, tie_embeddings=tied)
    model = Llama(config)
    model.init_weights(0)
    model = model.to(dtype)
    tokens = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        exact = Llama.forward(copied(model).float(), tokens)
        before = model(tokens)
        lay_out_for_decoding(model)
        after = model(tokens)
    assert not any(type(m) is nn.Linear for m in model.modules()) or not few_rows.has_packed()
    assert (after - exact).abs().max() <= 2 * (before - exact).abs().max() + 1e-5


def copied(model: Llama) -> Llama:
    other = Llama(model.config)
    other.load_state_dict(model.state_dict())
    return other


def test_a_tied_fp32_head_takes_no_memory_of_its_own() -> None:
    model = Llama(LlamaConfig(32, 1, 4, 2, 48, 100, tie_embeddings=True))
    lay_out_for_decoding(model)
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert model.embed.weight.shape == (100, 32)


def test_small_biased_and_foreign_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "SMALLEST", 100)
    layers = nn.ModuleList([nn.Linear(5, 5, bias=False), nn.Linear(20, 20), nn.Linear(20, 20, bias=False).double()])
    few_rows.lay_out(layers)
    assert all(type(m) is nn.Linear for m in layers)
