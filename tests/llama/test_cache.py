"""llama/cache.py in int8: near to the full cache, smaller, and the same to the bit whatever it went through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama.batching import answer_batch
from llama.cache import KVCache, RaggedCache
from llama.config import LlamaConfig
from llama.fixed_step import FixedStep
from llama.generation import Answer, Context, Request
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.speculative import Drafter, DraftModel, Lookup
from llama.tokenizer import Tokenizer

CONFIG = LlamaConfig(64, 2, 4, 2, 64, 200, max_seq_len=256)
GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(CONFIG)
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 2)
    return model.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(seed))


def coded(rows: int, room: int) -> KVCache:
    return KVCache(CONFIG, rows, room, dtype=torch.int8)


def held(cache: KVCache, begin: int = 0, row: int | None = None) -> list[Tensor]:
    """All that a cache holds of its positions from `begin` on, of all rows or one."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return [t[:, rows, :, begin : cache.length] for t in cache._tensors()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) == 2 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def put(cache: KVCache, T: int, seed: int) -> None:
    """Append T positions of normal numbers to every layer."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(CONFIG.n_layers):
        cache.append(layer, *(torch.randn(cache.batch, T, 2, 16, generator=generator) for _ in "kv"))
    cache.advance(T)


@torch.inference_mode()
def test_logits_are_near_those_of_the_full_cache(model: Llama) -> None:
    """Prompt and steps; two rows, one of which begins later."""
    tokens = ids(2, 60)
    logits = []
    for dtype in (torch.float32, torch.int8):
        cache = KVCache(CONFIG, 2, 60, dtype=dtype)
        cache.first = torch.tensor([0, 9], dtype=torch.int32)
        made = [model(tokens[:, :40], cache=cache), *(model(tokens[:, t : t + 1], cache=cache) for t in range(40, 60))]
        logits.append(torch.cat(made, 1))
    full, rounded = logits
    error = (rounded - full)[0].norm() / full[0].norm()
    assert 0 < error < 0.02
    assert (rounded.argmax(-1) == full.argmax(-1)).float().mean() > 0.95


def test_memory_is_a_byte_a_number_and_four_a_head() -> None:
    L, B, G, S, K = 2, 3, 2, 50, 16
    assert coded(B, S).nbytes == L * B * 2 * G * S * (K + 4)
    assert KVCache(CONFIG, B, S).nbytes == L * B * 2 * G * S * K * 4
    assert KVCache(CONFIG, B, S, dtype=torch.bfloat16).nbytes == L * B * 2 * G * S * K * 2


@torch.inference_mode()
def test_what_a_cache_went_through_does_not_show() -> None:
    """Grown, truncated, cut at the front: to the bit what a fresh one holds that was given only what is left."""
    fresh, cache = coded(1, 64), coded(1, 12)
    put(fresh, 6, seed=1)
    put(cache, 5, seed=0)
    put(cache, 6, seed=1)
    put(cache, 1, seed=2)
    cache.keep(5, 7)
    cache = cache.grown(64)
    cache.truncate(6)
    assert same(held(cache), held(fresh))
    for c in (cache, fresh):
        put(c, 30, seed=3)
    assert same(held(cache), held(fresh))


@torch.inference_mode()
def test_rows_that_join_and_leave_keep_their_bits() -> None:
    ragged, sources = RaggedCache(CONFIG, 4, dtype=torch.int8), []
    for n in (50, 3, 90, 20):
        source = coded(1, 100)
        put(source, n, seed=n)
        ragged.join(source, 2, n - 2)
        sources.append(held(source, 2))
    ragged.leave(1)
    sources[1] = sources.pop()
    ragged.reserve(200)
    ragged.leave(1)
    sources[1] = sources.pop()
    for row, source in enumerate(sources):
        assert same(held(ragged, int(ragged.first[row]), row), source)


@torch.inference_mode()
def test_steps_at_a_place_on_the_device_write_the_same(model: Llama) -> None:
    plain, fixed = coded(2, 40), coded(2, 40)
    for cache in (plain, fixed):
        model(ids(2, 10), cache=cache)
    step = FixedStep(model, fixed)
    for i in range(20):
        tokens = ids(2, 1, seed=i)
        torch.testing.assert_close(step(tokens), model(tokens, cache=plain), rtol=1e-5, atol=1e-5)
    codes, scales = zip(held(plain), held(fixed), strict=True)
    torch.testing.assert_close(*scales)
    assert (codes[0].int() - codes[1].int()).abs().max() <= 1  # a last bit decides where a number is half-way
    assert (codes[0] != codes[1]).float().mean() < 1e-3


def test_answers_are_the_same_whoever_gives_them(model: Llama, small_tokenizer: Tokenizer) -> None:
    """Alone, in a second turn, beside others, guessed ahead; and long enough that every cache has to grow."""
    model = Llama(LlamaConfig(64, 2, 4, 2, 64, small_tokenizer.vocab_size, max_seq_len=256))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 6)
    model.eval()
    requests = [Request(ids(n, seed=n).tolist(), GREEDY, 60) for n in (5, 70, 23)]

    def alone(request: Request, context: Context, drafter: Drafter | None = None) -> Answer:
        answer = Answer(request, small_tokenizer)
        for _ in answer.stream(model, context, drafter):
            pass
        assert context.cache._kv.dtype == torch.int8
        return answer

    def context() -> Context:
        return Context(model, cache_dtype=torch.int8)

    want = [alone(r, context()).token_ids for r in requests]
    assert len({i for answer in want for i in answer}) > 20
    assert [a.token_ids for a in answer_batch(model, small_tokenizer, requests, 2, torch.int8)] == want
    for source in (Lookup(), DraftModel(model, torch.int8)):
        drafter = Drafter(source)
        drafter.pace.choose = lambda kind, most: 3 if most >= 3 else 0
        assert [alone(r, context(), drafter).token_ids for r in requests] == want
    talk = context()
    assert alone(requests[1], talk).token_ids == want[1]
    again = Request([*requests[1].prompt, *want[1][:20]], GREEDY, 40)
    assert alone(again, talk).token_ids == want[1][20:]
    assert talk.reused > 70
