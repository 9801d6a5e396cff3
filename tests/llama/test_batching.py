"""llama/batching.py: each request as alone, whatever runs beside it; rows join, leave, are cancelled in any order."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama.batching import Batch, answer_batch
from llama.cache import KVCache, RaggedCache
from llama.config import LlamaConfig
from llama.generation import Answer, Request
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer, train_tokenizer

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)


def build(tokenizer: Tokenizer, kv_heads: int = 2) -> Llama:
    """A random model with large weights: varied text, and greedy choices that are no close calls."""
    model = Llama(LlamaConfig(32, 2, 4, kv_heads, 64, tokenizer.vocab_size, max_seq_len=400))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 15)
    return model.eval()


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Llama:
    return build(small_tokenizer)


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Llama, tokenizer: Tokenizer, request: Request) -> Answer:
    answer = Answer(request, tokenizer)
    for _ in answer.stream(model):
        pass
    return answer


def same(a: Answer, b: Answer) -> bool:
    return (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)


# --- answers ---


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("rows", "budget"), [(1, 256), (3, 16), (32, 7), (8, 10_000)])
def test_a_batch_answers_as_each_alone(
    rows: int, budget: int, separate: bool, model: Llama, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 1 to 300 ids, greedy and sampled, ended by length, context, stop text or EOS."""
    monkeypatch.setattr("kernels.reference.CALL", 0 if separate else 10**9)
    lengths = (1, 300, 2, 77, 16, 17, 130, 1, 7, 8, 395)
    requests = [
        Request(
            ids(n, i),
            SamplingParams(temperature=0.8, seed=i, top_k=5 * (i % 3), penalize_prompt=i % 4 == 1) if i % 2 else GREEDY,
            max_new_tokens=3 + 5 * (i % 5),
            stop=("e",) if i == 3 else (),
        )
        for i, n in enumerate(lengths)
    ]
    batch = Batch(model, small_tokenizer, rows, budget)
    answers = [batch.submit(r) for r in requests]
    pieces = dict.fromkeys(answers, "")
    while batch:
        for answer, piece, *_ in batch.step():
            pieces[answer] += piece
    for answer, request in zip(answers, requests, strict=True):
        assert same(answer, alone(model, small_tokenizer, request))
        assert pieces[answer] == answer.text


def test_answers_keep_the_order_of_the_requests(model: Llama, small_tokenizer: Tokenizer) -> None:
    requests = [Request([1, 9 + i] * (i + 1), SamplingParams(temperature=0.8, seed=i), 25 - 5 * i) for i in range(4)]
    for some in (requests, requests[1:3], []):
        for got, request in zip(answer_batch(model, small_tokenizer, some), some, strict=True):
            assert same(got, alone(model, small_tokenizer, request))


def test_a_prompt_that_does_not_fit_is_refused_and_the_others_go_on(model: Llama, small_tokenizer: Tokenizer) -> None:
    batch = Batch(model, small_tokenizer, 2)
    good = batch.submit(Request(ids(5, 0), GREEDY, 4))
    for bad in ([], ids(400, 1)):
        with pytest.raises(ValueError, match="prompt is"):
            batch.submit(Request(bad, GREEDY, 4))
    while batch:
        batch.step()
    assert same(good, alone(model, small_tokenizer, good.request))


class Counting(Llama):
    """Counts the tokens that are run."""

    run: tuple[int, ...] = ()

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        self.run += (tokens.numel(),)
        return super().forward(tokens, **kwargs)  # type: ignore[arg-type]


def test_every_token_is_run_once_and_a_long_prompt_lets_the_others_go_on(small_tokenizer: Tokenizer) -> None:
    counting = Counting(LlamaConfig(16, 1, 2, 1, 32, small_tokenizer.vocab_size, max_seq_len=400))
    counting.init_weights(0)
    batch = Batch(counting, small_tokenizer, 3, budget=50)
    answers = [batch.submit(Request(ids(20, 0), GREEDY, 15))]
    batch.step()
    answers += [batch.submit(Request(ids(n, n), GREEDY, 4)) for n in (300, 1, 9)]
    for _ in range(5):
        assert [event.answer for event in batch.step()] == answers[:1]  # 250 of the 299 tokens are read
    while batch:
        batch.step()
    assert max(counting.run) <= 50
    assert sum(counting.run) == sum(len(a.request.prompt) + len(a.token_ids) - 1 for a in answers)


def test_a_cancelled_row_makes_room_at_once(model: Llama, small_tokenizer: Tokenizer) -> None:
    """Also when others have to move into its place, outside a step."""
    batch = Batch(model, small_tokenizer, 2)
    answers = [batch.submit(Request(ids(9 + i, i), GREEDY, 8)) for i in range(3)]
    batch.step()
    batch.cancel(answers[0])
    assert [event.answer for event in batch.step()] == answers[1:]
    while batch:
        batch.step()
    assert all(same(a, alone(model, small_tokenizer, a.request)) for a in answers[1:])


# --- any order of events ---


class Traffic(RuleBasedStateMachine):
    """Requests come, go on, are cancelled: nothing is lost, and every answer is that of the request alone."""

    tokenizer = train_tokenizer([f"fever {i} cough pain in the chest number {i * 37}" for i in range(200)], 300)
    model = build(tokenizer, kv_heads=1)
    known: ClassVar[dict[str, Answer]] = {}

    def alone(self, request: Request) -> Answer:
        if repr(request) not in self.known:
            self.known[repr(request)] = alone(self.model, self.tokenizer, request)
        return self.known[repr(request)]

    @initialize(rows=st.integers(1, 4), budget=st.integers(1, 40))
    def begin(self, rows: int, budget: int) -> None:
        self.batch = Batch(self.model, self.tokenizer, rows, budget)
        self.open: list[Answer] = []
        self.cancelled: list[Answer] = []

    @rule(
        n=st.sampled_from([1, 2, 9, 30, 60]),
        seed=st.integers(0, 2),
        new=st.sampled_from([1, 2, 7]),
        params=st.sampled_from([GREEDY, SamplingParams(temperature=1.0, seed=3), SamplingParams(top_k=0, seed=9)]),
    )
    def submit(self, n: int, seed: int, new: int, params: SamplingParams) -> None:
        self.open.append(self.batch.submit(Request(ids(n, seed), params, new)))

    @precondition(lambda self: self.open)
    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for answer, *_ in self.batch.step():
                assert answer in self.open
                if answer.finish_reason:
                    self.open.remove(answer)
                    assert same(answer, self.alone(answer.request))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        answer = data.draw(st.sampled_from(self.open))
        self.batch.cancel(answer)
        self.batch.cancel(answer)
        self.open.remove(answer)
        self.cancelled.append(answer)
        whole = self.alone(answer.request)
        assert answer.finish_reason is None
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "batch"):
            assert len(self.batch) == len(self.open)

    def teardown(self) -> None:
        if hasattr(self, "batch"):
            for _ in range(2000):
                if not self.batch:
                    break
                self.step(1)
            assert not self.open
            assert not self.batch


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


# --- the cache ---


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ragged_rows_keep_what_was_put_in_and_memory_follows_them(data: st.DataObject) -> None:
    config = LlamaConfig(8, 2, 2, 1, 8, 10)
    cache, held = RaggedCache(config, 6), []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["join", "leave", "step", "step"]))
        if action == "join" and len(held) < 6:
            n = data.draw(st.integers(0, 90))
            source = KVCache(config, 1, 100)
            source._kv.normal_()
            cache.join(source, 3, n)
            held.append(source._kv[:, 0, :, 3 : 3 + n])
        elif action == "leave" and held:
            row = data.draw(st.integers(0, len(held) - 1))
            cache.leave(row)
            last = held.pop()
            if row < len(held):
                held[row] = last
        elif action == "step" and held:
            T = data.draw(st.integers(1, 70))
            cache.reserve(T)
            new = torch.randn(2, len(held), 2, T, 4)
            for layer in range(2):
                k, v = new[layer].transpose(1, 2).chunk(2, 2)
                cache.append(layer, k, v)
            cache.advance(T)
            held = [torch.cat((row, new[:, i]), 2) for i, row in enumerate(held)]
        assert cache.batch == len(held)
        for i, kv in enumerate(held):
            begin = int(cache.first[i])
            assert torch.equal(cache._kv[:, i, :, begin : cache.length], kv)


def test_memory_shrinks_when_a_long_row_has_left() -> None:
    config = LlamaConfig(8, 1, 2, 1, 8, 10)
    cache = RaggedCache(config, 32)
    for n in (2000, *[20] * 10):
        cache.join(KVCache(config, 1, n), 0, n)
    assert cache.max_len <= 3100
    cache.leave(0)
    while cache.length < cache.max_len:
        cache.reserve(1)
        cache.advance(1)
        if cache.max_len < 2000:
            break
    cache.leave(0)
    for row in [20] * 5:
        cache.join(KVCache(config, 1, row), 0, row)
    assert cache._kv.shape[1] <= 32
