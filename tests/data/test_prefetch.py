"""Steps made ahead: in order, bounded, errors where they belong, and no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from data.loader import Loader
from data.prefetch import Ahead
from tests.data.test_loader import dataset


def threads() -> int:
    return sum(t.name.startswith("batches") for t in threading.enumerate())


def test_batches_are_the_same_bit_for_bit() -> None:
    def batches() -> Loader:
        return Loader(dataset(60), batch=4, max_len=64, packing="epoch", seed=3)

    plain = batches()
    want = [plain.step(i) for i in range(2, 12)]
    with Ahead(batches().step) as ahead:
        ahead.begin(range(2, 12))
        got = [ahead.next().pinned(torch.device("cpu")) for _ in want]
    for a, b in zip(want, got, strict=True):
        assert (a.supervised_tokens, a.tokens, a.slots) == (b.supervised_tokens, b.tokens, b.slots)
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert x.records == y.records
            assert all(torch.equal(getattr(x, k), getattr(y, k)) for k in ("tokens", "targets", "start", "end"))


def test_at_most_two_are_made_ahead_while_the_caller_works() -> None:
    made: list[int] = []
    with Ahead(lambda n: made.append(n) or n) as ahead:
        ahead.begin(range(100))
        end = time.monotonic() + 10
        while len(made) < 2 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1], "made without being asked, but no more"
        assert [ahead.next() for _ in range(3)] == [0, 1, 2]
    assert len(made) <= 5
    assert not threads()


def test_an_error_comes_out_in_its_turn_with_its_message() -> None:
    def make(n: int) -> int:
        if n == 2:
            raise ValueError("book.txt: it was changed while it was read")
        return n

    with Ahead(make) as ahead:
        ahead.begin(range(5))
        assert [ahead.next(), ahead.next()] == [0, 1]
        with pytest.raises(ValueError, match="changed while it was read"):
            ahead.next()
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_the_loop_ends_the_thread(error: type[BaseException]) -> None:
    def loop() -> None:
        with Ahead(lambda n: time.sleep(0.01)) as ahead:
            ahead.begin(range(1_000_000))
            ahead.next()
            raise error

    with pytest.raises(error):
        loop()
    assert not threads()


def test_nothing_to_make_is_fine() -> None:
    with Ahead(lambda n: n) as ahead:
        ahead.begin(range(0))
