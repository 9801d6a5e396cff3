"""llama/row_step.py: the logits and the cache of model.py's modules, and only where they can be had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from llama import few_rows
from llama.cache import KVCache, RaggedCache
from llama.config import LlamaConfig, RopeScaling
from llama.generation import Context, lay_out_for_decoding, stream
from llama.model import Llama
from llama.quantize import QuantisedLinear, Scheme, nearest
from llama.row_step import RowStep, takes
from llama.sampling import SamplingParams

SMALL = LlamaConfig(64, 2, 4, 2, 160, 300, max_seq_len=96)
WIDE = LlamaConfig(288, 2, 6, 6, 768, 1000, max_seq_len=96, tie_embeddings=True)
SCALED = dataclasses.replace(SMALL, n_kv_heads=1, rope_scaling=RopeScaling("linear", 4.0))


def random_model(config: LlamaConfig, kind: str = "fp32") -> Llama:
    """Laid out for decoding; weights large enough that attention is not flat."""
    model = Llama(config)
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.linspace(0.5, 1.5, len(p)) if "norm" in name else 4 * p)
    if kind != "fp32":
        model.to(torch.bfloat16)
    if kind in ("int8", "int4"):
        scheme = Scheme(8, 0) if kind == "int8" else Scheme(4, 32)
        for layer in model.layers:
            for parent, names in ((layer.attn, ("q", "k", "v", "o")), (layer.mlp, ("gate", "up", "down"))):
                for name in names:
                    packed = nearest(getattr(parent, name).weight.detach(), scheme)
                    setattr(parent, name, QuantisedLinear(packed, scheme.bits))
    lay_out_for_decoding(model)
    return model.eval()


def cache_of(model: Llama, room: int = 64) -> KVCache:
    return KVCache(model.config, 1, room, dtype=model.norm.weight.dtype)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("config", [SMALL, WIDE, SCALED], ids=["grouped", "wide, tied", "one head of keys, scaled"])
@torch.inference_mode()
def test_steps_are_those_of_the_model(config: LlamaConfig, kind: str) -> None:
    model = random_model(config, kind)
    plain, quick = cache_of(model), cache_of(model)
    prompt = torch.randint(0, config.vocab_size, (1, 17), generator=torch.Generator().manual_seed(0))
    a, b = (model(prompt, cache=cache, last_only=True) for cache in (plain, quick))
    assert takes(model, quick)
    step = RowStep(model, quick)
    # What lies between the products is fp32; where a 16-bit product's input lies on the border between two numbers,
    # a difference in the last bit of fp32 becomes one of bf16's (2^-9 of it, in one of `dim` summands).
    tolerance = 2e-5 if kind == "fp32" else 5e-3
    for _ in range(20):
        token = a[:, -1].argmax(-1, keepdim=True)
        a, b = model(token, cache=plain, last_only=True), step(token)
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * a.abs().max().item())
    assert quick.length == plain.length == 37
    torch.testing.assert_close(quick._kv, plain._kv, rtol=tolerance, atol=tolerance * plain._kv.abs().max().item())


@pytest.mark.parametrize("common", [0, 1, 16, 17])
@pytest.mark.parametrize("config", [SMALL, WIDE, SCALED], ids=["grouped", "wide, tied", "one head of keys, scaled"])
@torch.inference_mode()
def test_rows_of_any_length_with_a_common_beginning(config: LlamaConfig, common: int) -> None:
    """The rows begin with the same 17 tokens; how many of these are read once for all makes no difference."""
    model = random_model(config)
    g = torch.Generator().manual_seed(0)
    beginning = torch.randint(0, config.vocab_size, (1, 17), generator=g)
    plain, quick = (RaggedCache(config, 4) for _ in range(2))
    for n in (17, 40, 18, 23):
        row = cache_of(model)
        rest = torch.randint(0, config.vocab_size, (1, n - 17), generator=g)
        model(torch.cat((beginning, rest), 1), cache=row)
        for cache in (plain, quick):
            cache.join(row, 0, n)
    assert takes(model, quick)
    step = RowStep(model, quick)
    for i in range(8):
        for cache in (plain, quick):
            if i == 5:
                cache.leave(1)
            cache.reserve(1)
        tokens = torch.randint(0, config.vocab_size, (plain.batch, 1), generator=g)
        want, got = model(tokens, cache=plain, last_only=True), step(tokens, common)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * want.abs().max().item())
    assert quick.begins() == plain.begins()
    for row in range(3):
        for a, b in zip(quick.held(row), plain.held(row), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


@torch.inference_mode()
def test_a_cache_that_is_rewound_and_read_into_goes_on() -> None:
    model = random_model(SMALL)
    cache = cache_of(model)
    model(torch.arange(10)[None], cache=cache)
    step = RowStep(model, cache)
    for i in range(5):
        step(torch.tensor([[i]]))
    cache.truncate(8)
    model(torch.tensor([[50, 51, 52]]), cache=cache)
    got = step(torch.tensor([[7]]))
    whole = model(torch.tensor([[*range(8), 50, 51, 52, 7]]))[:, -1:]
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-4)


def test_a_full_cache_is_refused_and_left_alone() -> None:
    model = random_model(SMALL)
    cache = cache_of(model, 4)
    with torch.inference_mode():
        model(torch.arange(3)[None], cache=cache)
        step = RowStep(model, cache)
        step(torch.tensor([[3]]))
        before = cache._kv.clone()
        with pytest.raises(ValueError, match="holds 4 positions; 5 are needed"):
            step(torch.tensor([[3]]))
    assert torch.equal(cache._kv, before)
    assert cache.length == 4


def no_layout() -> tuple[Llama, KVCache]:
    model = Llama(SMALL)
    return model, cache_of(model)


def codes() -> tuple[Llama, KVCache]:
    model = random_model(SMALL)
    return model, KVCache(model.config, 1, 64, dtype=torch.int8)


def double_precision() -> tuple[Llama, KVCache]:
    model = Llama(SMALL).double()
    lay_out_for_decoding(model)
    return model, cache_of(model)


def hooked() -> tuple[Llama, KVCache]:
    model = random_model(SMALL)
    model.layers[1].attn.register_forward_hook(lambda *_: None)
    return model, cache_of(model)


@pytest.mark.parametrize("case", [no_layout, codes, double_precision, hooked])
def test_what_it_cannot_run_is_left_to_the_model(case: Callable[[], tuple[Llama, KVCache]]) -> None:
    model, cache = case()
    assert not takes(model, cache)


def test_answers_come_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SMALL)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0)
    quick = Context(model)
    with_it = list(stream(model, [5, 6, 7], params, 30, context=quick))
    assert isinstance(quick.step(), RowStep)
    monkeypatch.setattr("llama.row_step.takes", lambda *_: False)
    assert list(stream(model, [5, 6, 7], params, 30)) == with_it


def test_small_products_are_joined_too() -> None:
    model = random_model(SMALL)
    assert model.layers[0].attn.joined.weight.numel() < few_rows.SMALLEST
