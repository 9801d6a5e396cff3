"""llama/batching.py: each request as alone, whatever runs beside it; rows join, leave, are cancelled in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama.batching import ALIKE, ALIKE_ROWS, OUT_OF_MEMORY, WORTH, Batch, answer_batch
from llama.cache import KVCache, RaggedCache
from llama.config import LlamaConfig
from llama.generation import Answer, Request, lay_out_for_decoding
from llama.model import Llama
from llama.prefixes import Prefixes
from llama.row_step import RowStep
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer, train_tokenizer

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)
POISON = 99  # an id that the tests' prompts do not hold unless they are to fail


def build(tokenizer: Tokenizer, kv_heads: int = 2, kind: type[Llama] = Llama) -> Llama:
    """A random model with large weights: varied text, and greedy choices that are no close calls."""
    model = kind(LlamaConfig(32, 2, 4, kv_heads, 64, tokenizer.vocab_size, max_seq_len=400))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 15)
    return model.eval()


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Llama:
    return build(small_tokenizer)


@pytest.fixture(scope="module")
def laid_out(small_tokenizer: Tokenizer) -> Llama:
    """The same, with steps of rows in few operations."""
    model = build(small_tokenizer)
    lay_out_for_decoding(model)
    return model


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, POISON, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Llama, tokenizer: Tokenizer, request: Request) -> Answer:
    answer = Answer(request, tokenizer)
    for _ in answer.stream(model):
        pass
    return answer


def same(a: Answer, b: Answer) -> bool:
    return (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)


# --- answers ---


@pytest.mark.parametrize("kind", ["attention by row", "attention masked", "steps of rows"])
@pytest.mark.parametrize(("rows", "budget"), [(1, 256), (3, 16), (32, 7), (8, 10_000)])
def test_a_batch_answers_as_each_alone(
    rows: int,
    budget: int,
    kind: str,
    model: Llama,
    laid_out: Llama,
    small_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts of 1 to 300 ids, greedy and sampled, ended by length, context, stop text or EOS."""
    monkeypatch.setattr("kernels.reference.CALL", 0 if kind == "attention by row" else 10**9)
    model = laid_out if kind == "steps of rows" else model
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


@pytest.mark.parametrize("kept", [None, 10**7])
def test_what_rows_begin_with_is_read_once_for_all(
    kept: int | None, laid_out: Llama, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share 40 or 55 ids, then one that does not, then again; the answers are those alone."""
    seen: list[tuple[int, int]] = []
    step = RowStep.__call__

    def watched(self: RowStep, tokens: torch.Tensor, common: int = 0) -> torch.Tensor:
        seen.append((len(tokens), common))
        return step(self, tokens, common)

    monkeypatch.setattr(RowStep, "__call__", watched)
    batch = Batch(laid_out, small_tokenizer, 6, prefixes=None if kept is None else Prefixes(9, kept))
    prompts = [[*ids(40, 0), *ids(15, 1), *ids(3 + i, 2 + i)] for i in range(4)]
    prompts += [[*ids(40, 0), *ids(5 + i, 20 + i)] for i in range(4)]
    prompts += [ids(9, 30), *prompts[:5]]
    sampled = SamplingParams(temperature=0.8, seed=5)
    requests = [Request(p, sampled if i % 3 == 1 else GREEDY, 4 + 3 * (i % 4)) for i, p in enumerate(prompts)]
    answers = finish(batch, *requests)
    monkeypatch.undo()
    assert all(same(a, alone(laid_out, small_tokenizer, a.request)) for a in answers)
    assert {common for _, common in seen} >= {0, 40}
    assert all(rows >= ALIKE_ROWS and common >= ALIKE for rows, common in seen if common)
    assert any(rows >= ALIKE_ROWS and not common for rows, common in seen)


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


# --- what is not read again ---


def finish(batch: Batch, *requests: Request) -> list[Answer]:
    answers = [batch.submit(r) for r in requests]
    while batch:
        batch.step()
    return answers


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_a_turn_or_a_shared_beginning_is_read_once(small_tokenizer: Tokenizer, cache_dtype: torch.dtype | None) -> None:
    """Three chats with one beginning, at once; then a second turn of each, and a third."""
    counting = build(small_tokenizer, kind=Counting)
    batch = Batch(counting, small_tokenizer, 8, 50, cache_dtype, Prefixes(10, 10**7))
    system, own = ids(40, 0), [ids(9, i) for i in (1, 2, 3)]
    prompts = [[*system, *some] for some in own]
    reused = [0, 40, 40]
    for turn in range(3):
        counting.run = ()
        answers = finish(batch, *(Request(prompt, GREEDY, 8) for prompt in prompts))
        assert [a.reused_tokens for a in answers] == reused
        assert sum(counting.run) == sum(len(a.request.prompt) + len(a.token_ids) - 1 - a.reused_tokens for a in answers)
        if cache_dtype is None:  # codes are what they are, but here close calls of the rounding fall otherwise
            assert all(same(a, alone(counting, small_tokenizer, a.request)) for a in answers)
        prompts = [[*a.request.prompt, *a.token_ids, *ids(5, turn)] for a in answers]
        reused = [len(a.request.prompt) + len(a.token_ids) - 1 for a in answers]


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_what_is_restored_is_what_was_kept_to_the_bit(
    model: Llama, small_tokenizer: Tokenizer, cache_dtype: torch.dtype | None
) -> None:
    prefixes = Prefixes(10, 10**7)
    batch = Batch(model, small_tokenizer, 2, 50, cache_dtype, prefixes)
    (first,) = finish(batch, Request(ids(60, 0), GREEDY, 8))
    _, kept = prefixes.longest(np.array(first.request.prompt))
    batch.submit(Request([*ids(60, 0), 5], GREEDY, 3))
    batch.step()
    row = tuple(t[:, :, :60] for t in batch._cache.held(0))
    assert len(row) == (1 if cache_dtype is None else 2)
    assert all(torch.equal(a, b) for a, b in zip(row, kept, strict=True))


def test_several_answers_to_one_prompt_read_it_once(model: Llama, small_tokenizer: Tokenizer) -> None:
    batch = Batch(model, small_tokenizer, 8, prefixes=Prefixes(0, 0))  # from the rows that live
    requests = [Request(ids(50, 0), SamplingParams(temperature=1.0, seed=i), 9) for i in range(4)]
    answers = finish(batch, *requests)
    assert [a.reused_tokens for a in answers] == [0, 49, 49, 49]
    assert all(same(a, alone(model, small_tokenizer, a.request)) for a in answers)


def test_a_few_ids_in_common_do_not_part_prompts(model: Llama, small_tokenizer: Tokenizer) -> None:
    batch = Batch(model, small_tokenizer, 8, prefixes=Prefixes(9, 10**7))
    a, b = finish(batch, *(Request([*ids(WORTH - 1, 0), 5 + i, 9], GREEDY, 2) for i in range(2)))
    assert a.reused_tokens == b.reused_tokens == 0


# --- what fails ends one answer ---


def build_poisoned(tokenizer: Tokenizer, kind: type[Llama] = Llama) -> Llama:
    """A model that makes NaN of one id, and never says it."""
    model = build(tokenizer, kind=kind)
    with torch.no_grad():
        model.embed.weight[POISON] = torch.nan
        model.head.weight[POISON] = 0
    return model


@pytest.mark.parametrize("budget", [10, 500])
def test_a_prompt_that_makes_nan_fails_alone(small_tokenizer: Tokenizer, budget: int) -> None:
    """Also packed into one row with its neighbours, and before one that takes its place."""
    poisoned = build_poisoned(small_tokenizer)
    batch = Batch(poisoned, small_tokenizer, 3, budget, prefixes=Prefixes(9, 10**7))
    prompts = [ids(20, 1), [*ids(7, 2), POISON, *ids(20, 2)], ids(30, 3), [POISON, 7], ids(40, 4), [5, POISON], [5, 8]]
    answers = finish(batch, *(Request(prompt, GREEDY, 12) for prompt in prompts))
    for answer in answers:
        if POISON in answer.request.prompt:
            assert "not finite" in str(answer.failure)
            assert answer.token_ids == []
        else:
            assert same(answer, alone(poisoned, small_tokenizer, answer.request))


def test_an_answer_that_comes_to_nan_fails_alone(model: Llama, small_tokenizer: Tokenizer) -> None:
    requests = [Request(ids(20, i), GREEDY, 40) for i in range(5)]
    wanted = [alone(model, small_tokenizer, r) for r in requests]
    fatal = next(t for t in wanted[1].token_ids if all(t not in w.token_ids for w in (wanted[0], *wanted[2:])))
    poisoned = build(small_tokenizer)
    with torch.no_grad():
        poisoned.embed.weight[fatal] = torch.nan
    batch = Batch(poisoned, small_tokenizer, 2)
    answers = finish(batch, *(r for r in requests if fatal not in r.prompt))
    for answer in answers:
        want = wanted[requests.index(answer.request)]
        if answer.request is requests[1]:
            assert "not finite" in str(answer.failure)
            assert answer.token_ids == want.token_ids[: want.token_ids.index(fatal) + 1]
        else:
            assert same(answer, want)


def test_a_list_of_requests_says_what_failed(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not finite"):
        answer_batch(build_poisoned(small_tokenizer), small_tokenizer, [Request([POISON, 5], GREEDY, 3)])


class Hungry(Llama):
    """Has no memory for more than so many positions of a row, nor while `fails` counts down."""

    most, fails = 10**9, 0

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        cache = kwargs["cache"]
        assert isinstance(cache, KVCache)
        live = cache.length - (0 if cache.first is None else int(cache.first.min()))
        self.fails -= 1
        if live + tokens.shape[1] > self.most or self.fails >= 0:
            logits = super().forward(tokens, **kwargs)  # type: ignore[arg-type]
            cache.truncate(cache.length - tokens.shape[1])
            del logits
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(tokens, **kwargs)  # type: ignore[arg-type]


def test_without_memory_the_longest_answer_goes(small_tokenizer: Tokenizer) -> None:
    hungry = build(small_tokenizer, kind=Hungry)
    hungry.most = 60
    prefixes = Prefixes(9, 10**7)
    batch = Batch(hungry, small_tokenizer, 3, 40, prefixes=prefixes)
    lengths = (20, 90, 30, 50, 10)  # the second cannot be read, the fourth not brought to its end
    answers = finish(batch, *(Request(ids(n, n), GREEDY, 20) for n in lengths))
    hungry.most = 10**9
    for n, answer in zip(lengths, answers, strict=True):
        want = alone(hungry, small_tokenizer, answer.request)
        if n in (90, 50):
            assert answer.failure == OUT_OF_MEMORY
            assert answer.token_ids == want.token_ids[: len(answer.token_ids)]
        else:
            assert same(answer, want)
    assert len(answers[3].token_ids) == 11


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
        "Triton Error [CUDA]: out of memory",
    ],
    ids=["torch on a CPU", "triton"],
)
def test_a_row_without_memory_is_not_half_there(
    words: str, model: Llama, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts in one pass, of which the second finds no place in the cache."""
    join = RaggedCache.join

    def narrow(self: RaggedCache, source: KVCache, at: int, n: int) -> None:
        if n == 24:
            raise RuntimeError(words)
        join(self, source, at, n)

    monkeypatch.setattr(RaggedCache, "join", narrow)
    batch = Batch(model, small_tokenizer, 8)
    params = SamplingParams(temperature=1.0, seed=4, penalize_prompt=True, presence_penalty=0.3)
    answers = finish(batch, *(Request(ids(n, n), params, 9) for n in (10, 25, 12)))
    assert [a.failure for a in answers] == [None, OUT_OF_MEMORY, None]
    assert all(same(a, alone(model, small_tokenizer, a.request)) for a in answers[::2])


def test_what_is_kept_is_given_up_before_an_answer_is(small_tokenizer: Tokenizer) -> None:
    hungry, prefixes = build(small_tokenizer, kind=Hungry), Prefixes(9, 10**7)
    batch = Batch(hungry, small_tokenizer, 3, prefixes=prefixes)
    finish(batch, Request(ids(20, 0), GREEDY, 5))
    for steps in (0, 3):  # while reading, while answering
        assert len(prefixes) == 1
        answer = batch.submit(Request(ids(30, 1), GREEDY, 9))
        for _ in range(steps):
            batch.step()
        hungry.fails = 1
        batch.step()
        assert len(prefixes) == 0
        while batch:
            batch.step()
        assert same(answer, alone(hungry, small_tokenizer, answer.request))


def test_an_error_of_another_kind_is_raised(model: Llama, small_tokenizer: Tokenizer) -> None:
    batch = Batch(model, small_tokenizer, 3)
    batch.submit(Request(ids(30, 1), GREEDY, 9))
    for steps in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "forward", raiser(RuntimeError("CUDA error: device-side assert triggered")))
            with pytest.raises(RuntimeError, match="CUDA error"):
                batch.step()
        for _ in range(2 * (1 - steps)):
            batch.step()


def raiser(error: Exception) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


# --- any order of events ---


class Traffic(RuleBasedStateMachine):
    """Requests come, go on, are cancelled or fail: nothing is lost, and every answer is that of the request alone."""

    tokenizer = train_tokenizer([f"fever {i} cough pain in the chest number {i * 37}" for i in range(200)], 300)
    model = build_poisoned(tokenizer, kind=Hungry)
    known: ClassVar[dict[str, Answer]] = {}

    def alone(self, request: Request) -> Answer:
        if repr(request) not in self.known:
            self.known[repr(request)] = alone(self.model, self.tokenizer, request)
        return self.known[repr(request)]

    @initialize(
        rows=st.integers(1, 4),
        budget=st.integers(1, 40),
        kept=st.sampled_from([None, (0, 0), (1, 10**6), (3, 60_000), (50, 10**6)]),
    )
    def begin(self, rows: int, budget: int, kept: tuple[int, int] | None) -> None:
        self.prefixes = None if kept is None else Prefixes(*kept)
        self.batch = Batch(self.model, self.tokenizer, rows, budget, prefixes=self.prefixes)
        self.open: list[Answer] = []
        self.ended: list[Answer] = []
        self.model.fails = 0

    @rule(
        n=st.sampled_from([1, 2, 9, 30, 60]),
        seed=st.integers(0, 2),
        new=st.sampled_from([1, 2, 7]),
        params=st.sampled_from([GREEDY, SamplingParams(temperature=1.0, seed=3), SamplingParams(top_k=0, seed=9)]),
    )
    def submit(self, n: int, seed: int, new: int, params: SamplingParams) -> None:
        self.open.append(self.batch.submit(Request(ids(n, seed), params, new)))

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), n=st.sampled_from([1, 8]), new=st.sampled_from([1, 7]))
    def go_on(self, data: st.DataObject, n: int, new: int) -> None:
        """Of an answer that has ended or was broken off."""
        before = data.draw(st.sampled_from(self.ended))
        prompt = [*before.request.prompt, *before.token_ids, *ids(n, 5)]
        if len(prompt) < 300:
            self.open.append(self.batch.submit(Request(prompt, GREEDY, new)))

    @rule(at=st.integers(0, 30))
    def submit_poison(self, at: int) -> None:
        self.open.append(self.batch.submit(Request([*ids(at, 1), POISON, *ids(30 - at, 2)], GREEDY, 5)))

    @rule(times=st.integers(1, 3))
    def run_out_of_memory(self, times: int) -> None:
        self.model.fails = times

    @precondition(lambda self: self.open)
    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for answer, *_ in self.batch.step():
                assert answer in self.open
                if answer.failure:
                    self.open.remove(answer)
                    assert answer.failure == OUT_OF_MEMORY or POISON in answer.request.prompt
                elif answer.finish_reason:
                    self.open.remove(answer)
                    self.ended.append(answer)
                    self.model.fails, fails = 0, self.model.fails
                    assert same(answer, self.alone(answer.request))
                    self.model.fails = fails

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        answer = data.draw(st.sampled_from(self.open))
        self.batch.cancel(answer)
        self.batch.cancel(answer)
        self.open.remove(answer)
        assert answer.finish_reason is None
        if POISON not in answer.request.prompt:
            self.ended.append(answer)
            self.model.fails, fails = 0, self.model.fails
            whole = self.alone(answer.request)
            self.model.fails = fails
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "batch"):
            assert len(self.batch) == len(self.open)
            if self.prefixes is not None:
                assert self.prefixes.nbytes <= self.prefixes.limit
                assert len(self.prefixes) <= self.prefixes.most

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


class TrafficOfRows(Traffic):
    """The same through steps of rows, where memory runs out while prompts are read."""

    model = build_poisoned(Traffic.tokenizer, kind=Hungry)
    lay_out_for_decoding(model)
    known: ClassVar[dict[str, Answer]] = {}


TestTrafficOfRows = TrafficOfRows.TestCase
TestTrafficOfRows.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


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
