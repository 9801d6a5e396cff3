"""The answers to one HTTP request, on their way from the engine's thread into the event loop.

app.py opens Choices, reads their happenings and leaves them; leaving cancels what has not ended, whatever the reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

from llama.engine import Begun, Done, Engine, Failed, Happening, Piece, Ticket
from llama.generation import Request
from web.metrics import Metrics


class Choices:
    """The happenings of some requests, as they come, in one stream: (number of the request, happening)."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Happening]] = asyncio.Queue()
        self._open: dict[int, Ticket] = {}
        self._last: dict[int, float] = {}  # when a choice was submitted, or went on last
        self._spoken: set[int] = set()
        self.tokens = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand them to the engine. Full if it has no place for them all."""
        for i, request in enumerate(requests):
            self._open[i] = self._engine.submit(request, self._teller(i))
            self._last[i] = time.perf_counter()

    def _teller(self, i: int) -> Callable[[Happening], None]:
        def tell(happening: Happening) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (i, happening))

        return tell

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for ticket in self._open.values():
            self._engine.cancel(ticket)
            self._metrics.answers.labels("cancelled").inc()
        self._open.clear()

    async def happenings(self, patience: float) -> AsyncIterator[tuple[int, Happening] | None]:
        """Until all have ended; None after so many seconds without any."""
        while self._open:
            try:
                async with asyncio.timeout(patience):  # wait_for of Python 3.11 may swallow a cancellation
                    i, happening = await self._arrived.get()
            except TimeoutError:
                yield None
                continue
            self._count(i, happening)
            if isinstance(happening, Done | Failed):
                del self._open[i]
            yield i, happening

    def _count(self, i: int, happening: Happening) -> None:
        metrics, now = self._metrics, time.perf_counter()
        if isinstance(happening, Begun):
            metrics.prompt_tokens.inc(happening.prompt_tokens)
            metrics.reused_tokens.inc(happening.reused_tokens)
        elif isinstance(happening, Piece):
            n = len(happening.token_ids)
            self.tokens += n
            metrics.tokens.inc(n)
            if i not in self._spoken:
                self._spoken.add(i)
                metrics.first_token.observe(now - self._last[i])
            elif n:
                metrics.between_tokens.observe((now - self._last[i]) / n)
            self._last[i] = now
        else:
            metrics.answers.labels(happening.finish_reason if isinstance(happening, Done) else "failed").inc()
