"""llama/engine.py: many threads, one model; every answer as alone, every request brought to exactly one end."""

from __future__ import annotations

import gc
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.engine import Begun, Done, Engine, Failed, Full, Happening, Piece, Ticket, Usage
from llama.generation import Answer, Doctor, Request
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)
PATIENCE = 60.0  # on a machine with much else to do


def build(tokenizer: Tokenizer, kind: type[Llama] = Llama) -> Llama:
    """A random model with large weights: varied text, and greedy choices that are no close calls."""
    model = kind(LlamaConfig(32, 2, 4, 2, 64, tokenizer.vocab_size, max_seq_len=400))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 15)
    return model.eval()


@pytest.fixture(scope="module")
def doctor(small_tokenizer: Tokenizer) -> Doctor:
    return Doctor("small", build(small_tokenizer), small_tokenizer, ChatFormat("plain", ""), GREEDY, 50)


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(doctor: Doctor, request: Request) -> Answer:
    answer = Answer(request, doctor.tokenizer)
    for _ in answer.stream(doctor.model):
        pass
    return answer


class Listener:
    """Takes down what is told of one request."""

    def __init__(self) -> None:
        self.told: list[Happening] = []
        self.threads: set[str] = set()
        self._arrived: queue.Queue[Happening] = queue.Queue()

    def __call__(self, happening: Happening) -> None:
        self.told.append(happening)
        self.threads.add(threading.current_thread().name)
        self._arrived.put(happening)

    def until(self, kind: Any) -> Any:
        """The next happening of this kind."""
        while not isinstance(happening := self._arrived.get(timeout=PATIENCE), kind):
            pass
        return happening

    def end(self) -> Done | Failed:
        return self.until(Done | Failed)

    @property
    def pieces(self) -> list[Piece]:
        return [h for h in self.told if isinstance(h, Piece)]

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        return [t for p in self.pieces for t in p.token_ids]

    def in_order(self) -> bool:
        kinds = [type(h) for h in self.told]
        middle = kinds[1:-1] if kinds[0] is Begun else kinds[:-1]
        return kinds[-1] in (Done, Failed) and set(middle) <= {Piece}


@pytest.fixture
def engine(doctor: Doctor) -> Iterator[Engine]:
    engine = Engine(doctor, rows=4, queue=100, budget=40)
    yield engine
    engine.close(0)


def free(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.queued == 0 and stats.submitted == stats.finished + stats.cancelled + stats.failed


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_answers_under_load_are_those_of_each_request_alone(engine: Engine, doctor: Doctor) -> None:
    """Submitted from eight threads at once, greedy and sampled, with stop texts, penalties and log-probabilities."""
    requests = [
        Request(
            ids(n, n),
            SamplingParams(temperature=0.9, seed=i, presence_penalty=0.5, top_k=0, logprobs=i % 3 == 0)
            if i % 2
            else GREEDY,
            3 + 5 * (i % 5),
            stop=("e",) if i % 4 == 1 else (),
        )
        for i, n in enumerate((1, 300, 2, 77, 16, 17, 130, 1, 7, 8, 380, 40) * 2)
    ]
    listeners = [Listener() for _ in requests]

    def submit(some: int) -> None:
        for i in range(some, len(requests), 8):
            engine.submit(requests[i], listeners[i])

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for request, listener in zip(requests, listeners, strict=True):
        done, want = listener.end(), alone(doctor, request)
        assert listener.in_order()
        assert listener.threads == {"engine"}
        assert (listener.text, listener.token_ids) == (want.text, want.token_ids)
        begun = listener.told[0]
        assert isinstance(begun, Begun)
        usage = Usage(len(request.prompt), len(want.token_ids), begun.reused_tokens)
        assert done == Done(str(want.finish_reason), usage)
        for piece in listener.pieces:
            assert (piece.logprobs is None) is not request.params.logprobs
            if piece.logprobs is not None:
                assert tuple(p.token for p in piece.logprobs) == piece.token_ids
    assert free(engine)
    assert engine.stats().generated_tokens == sum(len(listener.token_ids) for listener in listeners)


def test_a_chats_next_turn_reads_only_what_is_new(engine: Engine, doctor: Doctor) -> None:
    first = Listener()
    engine.submit(Request(ids(60, 0), GREEDY, 20), first)
    first.end()
    prompt = [*ids(60, 0), *first.token_ids, *ids(15, 1)]
    second, request = Listener(), Request(prompt, GREEDY, 20)
    engine.submit(request, second)
    done = second.end()
    assert isinstance(done, Done)
    assert done.usage.reused_tokens == 60 + len(first.token_ids) - 1  # the last token was never run
    assert second.token_ids == alone(doctor, request).token_ids


def test_cancelling_frees_the_row_and_says_so_once(engine: Engine) -> None:
    listeners = [Listener() for _ in range(6)]
    tickets = [engine.submit(Request(ids(5 + i, i), GREEDY, 390), listener) for i, listener in enumerate(listeners)]
    listeners[0].until(Piece)
    for _ in range(2):
        for ticket in tickets:
            engine.cancel(ticket)
    for listener in listeners:
        done = listener.end()
        assert isinstance(done, Done)
        assert done.finish_reason in ("cancelled", "length")
        assert listener.in_order()
    assert free(engine)
    told = [len(listener.told) for listener in listeners]
    after = Listener()
    engine.submit(Request([5], GREEDY, 1), after)
    after.end()
    assert told == [len(listener.told) for listener in listeners]


class Held(Llama):
    """Stops before every step until it is let go on."""

    gate = threading.Semaphore(0)
    steps = 0

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        self.gate.acquire()
        Held.steps += 1
        return super().forward(tokens, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def held(small_tokenizer: Tokenizer) -> Iterator[Engine]:
    Held.gate, Held.steps = threading.Semaphore(0), 0
    model = build(small_tokenizer, Held)
    engine = Engine(Doctor("held", model, small_tokenizer, ChatFormat("plain", ""), GREEDY, 50), rows=1, queue=2)
    yield engine
    Held.gate.release(10_000)
    engine.close(0)


def test_a_row_is_free_one_step_after_its_answer_was_cancelled(held: Engine) -> None:
    running, waiting = Listener(), Listener()
    ticket = held.submit(Request([5], GREEDY, 300), running)
    Held.gate.release(3)
    wait_for(lambda: Held.steps == 3)
    held.submit(Request([6], GREEDY, 1), waiting)
    held.cancel(ticket)
    Held.gate.release(2)  # the step that is under way, and the one after it
    assert waiting.end() == Done("length", Usage(1, 1, 0))
    assert isinstance(running.end(), Done)
    assert len(running.token_ids) <= 4


def test_a_full_queue_is_refused_with_a_time_to_come_back(held: Engine) -> None:
    tickets = [held.submit(Request([5], GREEDY, 3), Listener()) for _ in range(3)]
    with pytest.raises(Full) as refused:
        held.submit(Request([5], GREEDY, 3), Listener())
    assert 1 <= refused.value.retry_after <= 60
    Held.gate.release(10_000)
    held.cancel(tickets[0])
    wait_for(lambda: free(held))
    held.submit(Request([5], GREEDY, 3), last := Listener())
    assert isinstance(last.end(), Done)


def test_a_prompt_that_does_not_fit_is_refused_at_the_door(engine: Engine) -> None:
    with pytest.raises(ValueError, match="context holds 400"):
        engine.submit(Request(ids(400, 0), GREEDY, 5), Listener())


def test_an_answer_that_takes_too_long_fails(held: Engine) -> None:
    late, patient = Listener(), Listener()
    held.submit(Request([5], GREEDY, 300), late, seconds=0.0)
    held.submit(Request([6], GREEDY, 2), patient)
    Held.gate.release(10_000)
    assert late.end() == Failed("the answer took too long")
    assert isinstance(patient.end(), Done)


def test_closing_lets_answers_end_and_breaks_off_what_takes_longer(held: Engine) -> None:
    listener = Listener()
    held.submit(Request([5], GREEDY, 3), listener)
    Held.gate.release(10_000)
    held.close(PATIENCE)
    assert isinstance(listener.end(), Done)
    with pytest.raises(Full, match="closed"):
        held.submit(Request([5], GREEDY, 3), Listener())


def test_closing_without_patience(held: Engine) -> None:
    listeners = [Listener() for _ in range(3)]
    for listener in listeners:
        held.submit(Request([5], GREEDY, 300), listener)
    closer = threading.Thread(target=held.close, args=(0.0,))
    closer.start()
    Held.gate.release(3)
    for listener in listeners:
        assert listener.end() == Failed("the engine has been closed")
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_a_listener_that_fails_harms_no_one_else(engine: Engine, doctor: Doctor) -> None:
    def broken(happening: Happening) -> None:
        raise OSError("gone")

    engine.submit(Request([5], GREEDY, 300), broken)
    good, request = Listener(), Request(ids(9, 0), GREEDY, 30)
    engine.submit(request, good)
    assert isinstance(good.end(), Done)
    assert good.token_ids == alone(doctor, request).token_ids
    wait_for(lambda: free(engine))
    assert engine.stats().cancelled == 1


def test_what_is_not_the_requests_fault_makes_the_engine_unhealthy(
    engine: Engine, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(doctor.model, "forward", fail)
    listeners = [Listener() for _ in range(6)]
    accepted = 0
    for listener in listeners:
        try:
            engine.submit(Request([5], GREEDY, 3), listener)
            accepted += 1
        except Full:
            break
    assert accepted
    for listener in listeners[:accepted]:
        failed = listener.end()
        assert isinstance(failed, Failed)
        assert failed.fatal
        assert failed.message.endswith("illegal memory access was encountered")
    assert not engine.stats().healthy
    with pytest.raises(Full, match="CUDA error"):
        engine.submit(Request([5], GREEDY, 3), Listener())


def test_a_soak_with_random_cancels_ends_with_every_row_free(doctor: Doctor) -> None:
    """Four threads that submit, cancel and give up on what they hear; chats that go on."""
    others = {id(o) for o in gc.get_objects() if type(o) is Answer}  # of other tests in this process
    engine = Engine(doctor, rows=5, queue=8, cached_chats=7, cached_bytes=400_000, budget=64)
    ends: list[bool] = []

    def traffic(seed: int) -> None:
        chance = random.Random(seed)
        history = ids(20, 0)
        open_: list[tuple[Ticket, Listener]] = []
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            listener = Listener()
            params = SamplingParams(
                seed=seed, frequency_penalty=chance.choice([0.0, 0.5]), logprobs=chance.random() < 0.2
            )
            request = Request(
                [*history, *ids(chance.randint(1, 60), chance.randint(0, 9))], params, chance.randint(1, 30)
            )
            try:
                open_.append((engine.submit(request, listener), listener))
            except Full:
                time.sleep(0.005)
            if open_ and chance.random() < 0.4:
                engine.cancel(chance.choice(open_)[0])
            if open_ and chance.random() < 0.3:
                listener = open_.pop(0)[1]
                listener.end()
                ends.append(listener.in_order())
        for _, listener in open_:
            listener.end()
            ends.append(listener.in_order())

    threads = [threading.Thread(target=traffic, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = engine.stats()
    assert free(engine)
    assert len(ends) == stats.submitted
    assert all(ends)
    assert min(stats.finished, stats.cancelled, stats.reused_tokens) > 0
    assert stats.cached_chats <= 7
    assert stats.cached_bytes <= 400_000
    engine.close(0)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Answer and id(o) not in others]
