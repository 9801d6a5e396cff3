"""An engine that keeps llama/engine.py's contract and answers with whatever a test wants, at the pace it wants."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama.engine import Begun, Done, Failed, Full, Happening, Piece
from llama.generation import Request


@dataclass
class FakeStats:
    """What the engine says of itself."""

    queued: int
    running: int
    rows: int
    healthy: bool


@dataclass(eq=False)
class FakeTicket:
    """One request."""

    number: int
    request: Request
    cancelled: threading.Event = field(default_factory=threading.Event)
    pieces: int = 0
    ended: bool = False


class FakeEngine:
    """A thread a request. Every answer is `words`, over and over, up to the request's length."""

    def __init__(self, words: tuple[str, ...] = ("You ", "may ", "have ", "a cold. "), pace: float = 0.0) -> None:
        self.words, self.pace = words, pace
        self.places = 10_000
        self.fails_after: int | None = None
        self.fatal, self.healthy = False, True
        self.tickets: list[FakeTicket] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def submit(self, request: Request, tell: Callable[[Happening], None]) -> Any:
        with self._lock:
            if self._closing.is_set() or len(self.running()) >= self.places:
                raise Full(3.0)
            ticket = FakeTicket(len(self.tickets), request)
            self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(ticket, tell), daemon=True).start()
        return ticket

    def running(self) -> list[FakeTicket]:
        return [t for t in self.tickets if not t.ended]

    def _answer(self, ticket: FakeTicket, tell: Callable[[Happening], None]) -> None:
        tell(Begun(len(ticket.request.prompt), 0))
        for i, word in zip(range(ticket.request.max_new_tokens), itertools.cycle(self.words), strict=False):
            time.sleep(self.pace)
            if ticket.cancelled.is_set():
                ticket.ended = True
                return
            if i == self.fails_after:
                ticket.ended, self.healthy = True, not self.fatal
                tell(Failed("the logits are not finite", self.fatal))
                return
            ticket.pieces += 1
            tell(Piece(word, (i % 300 + 3,), None))
        ticket.ended = True
        tell(Done("length", None))

    def cancel(self, ticket: FakeTicket) -> None:
        ticket.cancelled.set()

    def stats(self) -> FakeStats:
        return FakeStats(0, len(self.running()), self.places, self.healthy)

    def close(self, patience: float) -> None:
        self._closing.set()
        deadline = time.monotonic() + patience
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        for ticket in self.running():
            ticket.cancelled.set()
