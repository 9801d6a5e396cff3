"""llama/fixed_step.py: the same tokens as the plain step, wherever the cache stands; no step depends on the host."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from llama import few_rows
from llama.cache import KVCache
from llama.config import LlamaConfig
from llama.fixed_step import FixedStep
from llama.generation import lay_out_for_decoding
from llama.model import Llama

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def random_model(device: str, heads: int = 2, dtype: torch.dtype = torch.float32) -> Llama:
    model = Llama(LlamaConfig(32, 2, 4, heads, 48, 100, max_seq_len=96))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 6)
    return model.to(device, dtype).eval()


def cache_of(model: Llama, rows: int, room: int) -> KVCache:
    weight = model.norm.weight
    return KVCache(model.config, rows, room, weight.device, weight.dtype)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("rows", "heads", "prompt"), [(1, 2, 5), (1, 4, 1), (3, 1, 17)])
@torch.inference_mode()
def test_steps_are_those_of_the_model(device: str, rows: int, heads: int, prompt: int) -> None:
    model = random_model(device, heads)
    tokens = torch.randint(0, 100, (rows, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    plain, fixed = cache_of(model, rows, 64), cache_of(model, rows, 64)
    a, b = (model(tokens, cache=cache, last_only=True) for cache in (plain, fixed))
    step = FixedStep(model, fixed)
    for _ in range(20):
        new = a[:, -1].argmax(-1, keepdim=True)
        a, b = model(new, cache=plain, last_only=True), step(new)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert fixed.length == plain.length == prompt + 20
    for layer in range(2):
        torch.testing.assert_close(fixed._kv[layer][:, :, : fixed.length], plain._kv[layer][:, :, : plain.length])


@torch.inference_mode()
def test_a_cache_that_is_rewound_and_read_into_goes_on() -> None:
    model = random_model("cpu")
    cache = cache_of(model, 1, 40)
    model(torch.arange(10)[None], cache=cache)
    step = FixedStep(model, cache)
    for i in range(5):
        step(torch.tensor([[i]]))
    cache.truncate(8)
    model(torch.tensor([[50, 51, 52]]), cache=cache)
    got = step(torch.tensor([[7]])).clone()
    whole = model(torch.tensor([[*range(8), 50, 51, 52, 7]]))[:, -1:]
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_lies_behind_the_length_is_not_seen() -> None:
    model = random_model("cpu")
    cache = cache_of(model, 1, 40)
    model(torch.arange(10)[None], cache=cache)
    cache._kv[:, :, :, 10:] = 1e4
    torch.testing.assert_close(
        FixedStep(model, cache)(torch.tensor([[3]])),
        model(torch.tensor([[*range(10), 3]]))[:, -1:],
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_full_cache_is_refused_and_left_alone() -> None:
    model = random_model("cpu")
    cache = cache_of(model, 1, 4)
    with torch.inference_mode():
        model(torch.arange(3)[None], cache=cache)
        step = FixedStep(model, cache)
        step(torch.tensor([[3]]))
        before = cache._kv.clone()
        for attempt in (lambda: step(torch.tensor([[3]])), lambda: FixedStep(model, cache)):
            with pytest.raises(ValueError, match="holds 4 positions; 5 are needed"):
                attempt()
    assert torch.equal(cache._kv, before)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@torch.inference_mode()
def test_a_longer_context_elsewhere_leaves_a_step_as_it_was(device: str) -> None:
    """The model makes longer rotary tables for it; those that a graph reads must not be given to anyone else."""
    model = random_model(device)
    plain, fixed = cache_of(model, 1, 40), cache_of(model, 1, 40)
    for cache in (plain, fixed):
        model(torch.arange(10, device=device)[None], cache=cache)
    step = FixedStep(model, fixed)
    tables = [weakref.ref(t) for t in model.rotation(40, fixed._kv.device)]
    model.rotation(600, fixed._kv.device)
    assert all(t() is not None for t in tables)
    noise = [torch.full((512, 4), 9.0, device=device) for _ in range(8)]
    for i in range(5):
        new = torch.tensor([[i]], device=device)
        torch.testing.assert_close(step(new), model(new, cache=plain), rtol=1e-4, atol=1e-4)
    del noise


@torch.inference_mode()
def test_the_host_decides_nothing_about_a_step() -> None:
    """A step traced at one place, with its numbers frozen, is right at every other: what a graph's capture needs."""
    model = random_model("cpu")
    cache = cache_of(model, 1, 40)
    model(torch.arange(10)[None], cache=cache)
    step = FixedStep(model, cache)
    model.rotation(40, torch.device("cpu"))

    def run(tokens: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        step._tokens, step._fixed.place = tokens, place
        return step._plain()

    graph = make_fx(run)(torch.tensor([[3]]), torch.tensor([10]))
    for token, at in ((4, 11), (60, 25), (5, 12)):
        there = torch.tensor([[token]]), torch.tensor([at])
        torch.testing.assert_close(graph(*there), run(*there))


@pytest.mark.skipif(not few_rows.has_packed(), reason="this torch or CPU has no packed bf16 products")
def test_packed_bf16_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "SMALLEST", 0)
    model = random_model("cpu", dtype=torch.bfloat16)
    lay_out_for_decoding(model)
    with pytest.raises(ValueError, match="bf16 weights in oneDNN's order do not compile"):
        FixedStep(model, cache_of(model, 1, 8), compiled=True)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_steps_are_those_of_the_model() -> None:
    model = random_model("cpu")
    lay_out_for_decoding(model)
    plain, fixed = cache_of(model, 1, 64), cache_of(model, 1, 64)
    tokens = torch.arange(9)[None]
    a, b = (model(tokens, cache=cache, last_only=True) for cache in (plain, fixed))
    step = FixedStep(model, fixed, compiled=True)
    for _ in range(20):
        new = a[:, -1].argmax(-1, keepdim=True)
        a, b = model(new, cache=plain, last_only=True), step(new)
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
