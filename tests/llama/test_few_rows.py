"""llama/few_rows.py: the same products as nn.Linear, for any number of rows, threads and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import kernels
from llama import few_rows
from llama.cache import KVCache
from llama.config import LlamaConfig
from llama.generation import lay_out_for_decoding
from llama.model import Llama
from llama.quantize import QuantisedLinear, Scheme, empty, nearest, replace


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
    weight, x = random(96, 64).bfloat16(), random(*rows, 64, seed=1)
    exact = nn.functional.linear(x.double(), weight.double())
    plain = (nn.functional.linear(x.bfloat16(), weight).double() - exact).abs().max()
    for module in (few_rows.PackedLinear(weight), few_rows.NarrowLinear(weight)):
        y = module(x)
        assert y.dtype == torch.float32
        assert (y.double() - exact).abs().max() <= 2 * plain


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (4, 1), (2, 40)])
@pytest.mark.parametrize("piece", [64, 1000, 1 << 20])
def test_fp16_products_err_no_more_than_linears(
    rows: tuple[int, int], piece: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn and not few_rows.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(few_rows, "has_onednn", lambda: onednn)
    monkeypatch.setattr(few_rows, "WIDENED", piece)
    weight, x = random(33, 64).half(), random(*rows, 64, seed=1)
    exact = nn.functional.linear(x.double(), weight.double())
    plain = (nn.functional.linear(x.half(), weight).double() - exact).abs().max()
    y = few_rows.HalfLinear(weight)(x)
    assert y.dtype == torch.float32
    assert y.shape == (*rows, 33)
    assert (y.double() - exact).abs().max() <= (2 * plain if y.numel() <= 3 * 33 else 1e-4)


def test_many_rows_never_meet_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no fast product of them: 64 rows took 15 times as long as in bf16."""
    made: list[torch.dtype] = []
    right = nn.functional.linear

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        made.append(weight.dtype)
        return right(x, weight)

    monkeypatch.setattr(few_rows.F, "linear", counted)
    monkeypatch.setattr(few_rows, "has_onednn", lambda: False)
    module = few_rows.HalfLinear(random(16, 32).half())
    for rows in (1, 3, 4, 65):
        module(random(rows, 32))
    assert made == [torch.float16] * 2 + [torch.float32] * 2


SCHEMES = [Scheme(8, 0), Scheme(4, 32), Scheme(4, 64), Scheme(4, 128)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("out", [16, 48, 64, 192, 33])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, 25), (1, 97), (2, 130)])
def test_quantised_products_err_no_more_than_bf16_linears(scheme: Scheme, out: int, rows: tuple[int, int]) -> None:
    weight, x = random(out, 256), random(*rows, 256, seed=1)
    packed = nearest(weight, scheme)
    module = few_rows.faster([QuantisedLinear(packed, scheme.bits)])
    y = module(x)
    assert y.dtype == torch.float32
    assert y.shape == (*rows, out)
    whole = kernels.dequantise(packed.codes, packed.scales, scheme.bits, torch.float64)
    exact = nn.functional.linear(x.double(), whole)
    plain = nn.functional.linear(x.bfloat16(), whole.bfloat16()).double()
    assert (y.double() - exact).square().mean() <= 1.5 * (plain - exact).square().mean()


def test_the_order_of_4_bit_codes_is_known_here_or_not_used() -> None:
    packed = nearest(random(128, 64), Scheme(4, 32))
    module = few_rows.Int4Linear(packed)
    if not few_rows.int4_order_is_known():
        assert not module.legible
        return
    whole = kernels.dequantise(packed.codes, packed.scales, 4, torch.bfloat16)
    assert module.legible
    assert torch.equal(module._transposed().t(), whole)


@pytest.mark.parametrize("scheme", SCHEMES[:3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_model_laid_out_gives_the_same_logits(scheme: Scheme, tied: bool) -> None:
    config = LlamaConfig(64, 2, 4, 2, 128, 100, tie_embeddings=tied)
    model = Llama(config)
    model.init_weights(0)
    model = model.to(torch.bfloat16)
    replace(model.layers, lambda _, linear: nearest(linear.weight, scheme), scheme.bits)
    tokens = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        before = model(tokens)
        exact = wide(model)(tokens)
        lay_out_for_decoding(model)
        after = model(tokens)
    assert type(model.head) is few_rows.Int8Linear
    assert type(model.layers[0].attn.joined) is not QuantisedLinear
    assert after.dtype == torch.float32
    assert (after - exact).square().mean() <= 2 * (before - exact).square().mean()


@pytest.mark.parametrize("scheme", SCHEMES[:3])
@torch.inference_mode()
def test_a_prompt_is_read_without_a_row_of_logits(scheme: Scheme) -> None:
    """As batching reads all of a prompt but its end: the last block then has no row for its products."""
    config = LlamaConfig(64, 2, 4, 2, 128, 100)
    model = Llama(config)
    model.init_weights(0)
    replace(model.layers, lambda _, linear: nearest(linear.weight, scheme), scheme.bits)
    lay_out_for_decoding(model)
    tokens = torch.arange(12)[None]
    read, whole = (KVCache(config, 1, 12, "cpu", torch.float32) for _ in range(2))
    assert model(tokens, cache=read, only=torch.empty(0, dtype=torch.int64)).shape == (0, 100)
    model(tokens, cache=whole, last_only=True)
    for a, b in zip(read._kv, whole._kv, strict=True):
        assert torch.equal(a, b)


def wide(model: Llama) -> Llama:
    """A quantised model in fp32 with the numbers that its codes stand for."""
    other = Llama(model.config)
    for name, m in model.named_modules():
        if isinstance(m, QuantisedLinear):
            weight = kernels.dequantise(m.codes, m.scales, m.bits, torch.float32)
            other.get_submodule(name).weight.data = weight
        elif hasattr(m, "weight"):
            other.get_submodule(name).weight.data = m.weight.data.float()
    return other


def test_linears_of_several_kinds_are_not_joined() -> None:
    parent = nn.Module()
    parent.a, parent.b = nn.Linear(64, 8, bias=False), QuantisedLinear(nearest(random(8, 64), Scheme(4, 32)), 4)
    few_rows.join(parent, ("a", "b"))
    assert not hasattr(parent, "joined")
    assert type(parent.a) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_laid_out_once(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    right = few_rows.SplitLinear.__init__

    def counted(self: few_rows.SplitLinear, weight: torch.Tensor) -> None:
        made.append(tuple(weight.shape))
        right(self, weight)

    monkeypatch.setattr(few_rows.SplitLinear, "__init__", counted)
    lay_out_for_decoding(Llama(LlamaConfig(32, 1, 4, 2, 48, 100, tie_embeddings=tied)))
    assert sorted(made) == [(32, 32), (32, 48), (64, 32), (96, 32), (100, 32)]


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


@pytest.mark.parametrize("scheme", [None, Scheme(8, 0), Scheme(4, 32)])
def test_off_the_cpu_weights_are_joined_and_the_others_stay(scheme: Scheme | None) -> None:
    """On meta, which stands in for a GPU: a lone weight gains nothing, and a quantised one would be copied."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(64, 2, 4, 2, 128, 100))
    if scheme:
        replace(model.layers, lambda _, linear: empty(linear, scheme, "meta", torch.bfloat16), scheme.bits)
    lone = [m for layer in model.layers for m in (layer.attn.o, layer.mlp.down)]
    lay_out_for_decoding(model)
    assert [m for layer in model.layers for m in (layer.attn.o, layer.mlp.down)] == lone
    kind = QuantisedLinear if scheme else nn.Linear
    assert {type(layer.attn.joined) for layer in model.layers} == {kind}
    assert type(model.head) is kind
