"""The next steps' batches, made in a thread while the device computes. Called by train.py; knows no tensors.

Every step is a pure function of its number, so what is made ahead is what would have been made on time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """make(n) for the numbers of begin(), in order, up to `depth` of them made before they are asked for.

    A context: leaving it, by whatever way, waits for the one that is being made and forgets the others. An error in
    make comes out of next(), when its turn comes.
    """

    def __init__(self, make: Callable[[int], T], depth: int = 2) -> None:
        self._make, self._depth = make, depth
        self._numbers: Iterator[int] = iter(())
        self._waiting: deque[Future[T]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def begin(self, numbers: Iterable[int]) -> None:
        """Start on these."""
        self._numbers = iter(numbers)
        for _ in range(self._depth):
            self._ask()

    def _ask(self) -> None:
        for number in self._numbers:
            self._waiting.append(self._pool.submit(self._make, number))
            return

    def next(self) -> T:
        """The next one, waiting until it is there."""
        made = self._waiting.popleft().result()
        self._ask()
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
