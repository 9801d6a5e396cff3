"""Requests from many threads, answered side by side by one: the thread that owns the model.

serve.py's server submits here. Steps, rows and memory are batching.py's; this adds the thread, a bounded queue, and
what is told of each request, in order: Begun, then Pieces, then one Done or Failed, and nothing after it. Knows no
sockets, and no text but that of the answers.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from llama.batching import ROWS, Batch, Event
from llama.generation import CHUNK, Answer, Doctor, Request, room_for
from llama.prefixes import Prefixes
from llama.sampling import TokenLogprobs

CACHED_BYTES = 2**30  # of the keys and values of chats that may go on
LATEST = 32  # answers by whose time the next ones are estimated
CLOSED = "the engine has been closed"

log = logging.getLogger(__name__)


class Full(Exception):
    """There is no place for another request; in so many seconds there may be."""

    def __init__(self, retry_after: float, why: str = "too many requests wait") -> None:
        super().__init__(why)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Usage:
    """The tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int  # of the prompt, not read again


@dataclass(frozen=True)
class Begun:
    """The prompt has been read."""

    prompt_tokens: int
    reused_tokens: int


@dataclass(frozen=True)
class Piece:
    """The answer has gone on by this text and these tokens.

    The text may be empty at the end, where tokens make none, or a stop text. logprobs: of these tokens, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Done:
    """The answer has ended: "stop", "length", or "cancelled" by cancel(), perhaps before it had begun."""

    finish_reason: str
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """The answer could not be brought to an end. fatal: the engine answers nothing any more."""

    message: str
    fatal: bool = False


Happening = Begun | Piece | Done | Failed


@dataclass(frozen=True)
class Stats:
    """The engine at a moment; the counts are since its start."""

    healthy: bool
    queued: int  # requests that have no row yet
    running: int
    rows: int
    queue: int  # places to wait in
    cached_chats: int
    cached_bytes: int
    cached_bytes_most: int
    submitted: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int


@dataclass(eq=False)
class Ticket:
    """A request that was submitted."""

    request: Request
    _tell: Callable[[Happening], None]
    _deadline: float
    _answer: Answer | None = None  # None until the engine's thread has it
    _begun: float | None = None  # when its first token came
    _tokens: list[int] = field(default_factory=list)  # not told yet
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _left: bool = False  # cancel() was called


class Engine:
    """Answers requests until it is closed, or something fails that is not the request's."""

    def __init__(
        self,
        doctor: Doctor,
        rows: int = ROWS,
        queue: int = 64,
        cached_chats: int = 64,
        cached_bytes: int = CACHED_BYTES,
        budget: int = CHUNK,
    ) -> None:
        """rows: answers side by side; queue: requests that may wait beside them; budget: prompt tokens in one step.

        cached_chats, cached_bytes: bounds of what is kept of ended answers, so that the next turn, or another chat
        with the same beginning, does not read it again. ValueError for a model that is split over ranks.
        """
        if doctor.ranks > 1:
            raise ValueError("a model that is split over ranks cannot serve; start the server as one process")
        if rows < 1 or queue < 0 or cached_chats < 0 or cached_bytes < 0:
            raise ValueError(
                f"rows {rows}, queue {queue}, cached_chats {cached_chats}, cached_bytes {cached_bytes}: "
                "rows must be 1 or more, the others 0 or more"
            )
        self.rows, self.queue = rows, queue
        self._doctor = doctor
        self._prefixes = Prefixes(cached_chats, cached_bytes)
        self._batch = Batch(doctor.model, doctor.tokenizer, rows, budget, doctor.cache_dtype, self._prefixes)
        self._changed = threading.Condition()  # guards all that follows
        self._new: deque[Ticket] = deque()  # submitted, not in the batch yet
        self._leaving: list[Ticket] = []  # cancelled, and not told yet
        self._tickets: dict[Answer, Ticket] = {}  # in the batch
        names = ("submitted", "finished", "cancelled", "failed", "prompt", "reused", "generated")
        self._counts = dict.fromkeys(names, 0)
        self._seconds: deque[float] = deque(maxlen=LATEST)  # that answers took from their first token
        self._closed = False
        self._deadline = math.inf  # when what still runs is broken off
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, tell: Callable[[Happening], None], seconds: float | None = None) -> Ticket:
        """Take a request in. tell is called from the engine's thread and must not wait for anything.

        seconds: the answer fails if it has not ended by then. Full if there is no place or the engine has been closed;
        ValueError if the request does not fit the model's context. From any thread, as all that follows.
        """
        room_for(self._doctor.model, request.prompt, request.max_new_tokens)
        ticket = Ticket(request, tell, math.inf if seconds is None else time.monotonic() + seconds)
        with self._changed:
            if self._closed or self._fault:
                raise Full(60.0, self._fault or CLOSED)
            if len(self._new) + len(self._tickets) >= self.rows + self.queue:
                raise Full(self._until_a_place())
            self._new.append(ticket)
            self._counts["submitted"] += 1
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End an answer before the next step; Done says so. Nothing happens to one that has ended."""
        with self._changed:
            if not ticket._left:
                ticket._left = True
                self._leaving.append(ticket)
                self._changed.notify_all()

    def stats(self) -> Stats:
        """How it goes."""
        with self._changed:
            counts, running = self._counts, self._batch.running
            return Stats(
                healthy=self._fault is None,
                queued=len(self._new) + max(0, len(self._tickets) - running),
                running=running,
                rows=self.rows,
                queue=self.queue,
                cached_chats=len(self._prefixes),
                cached_bytes=self._prefixes.nbytes,
                cached_bytes_most=self._prefixes.limit,
                submitted=counts["submitted"],
                finished=counts["finished"],
                cancelled=counts["cancelled"],
                failed=counts["failed"],
                prompt_tokens=counts["prompt"],
                reused_tokens=counts["reused"],
                generated_tokens=counts["generated"],
            )

    def close(self, patience: float) -> None:
        """Take nothing more in; what runs or waits may end for so many seconds, then it fails. Returns when all has."""
        with self._changed:
            self._closed = True
            self._deadline = min(self._deadline, time.monotonic() + patience)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _until_a_place(self) -> float:
        """Seconds in which one of the running answers is likely to end."""
        typical = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return min(60.0, max(1.0, typical / self.rows))

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            device = self._doctor.model.embed.weight.device
            if device.type == "cuda":
                torch.cuda.set_device(device)  # threads start on device 0, and Triton launches on the current one
            while self._take_in():
                for event in self._batch.step():
                    self._happened(event)
                self._mind_the_time()
        except Exception as e:
            # A CUDA error leaves nothing usable behind, and of any other nothing is known.
            log.exception("the engine has failed")
            said = str(e).strip().partition("\n")[0]
            self._break(f"the model has failed: {type(e).__name__}: {said}")

    def _take_in(self) -> bool:
        """Wait until there is something to do, and take in what was submitted and cancelled; False: it is over."""
        with self._changed:
            while not (self._new or self._leaving or self._batch or self._closed):
                self._changed.wait()
            new, self._new = self._new, deque()
            leaving, self._leaving = self._leaving, []
            for ticket in new:
                ticket._answer = self._batch.submit(ticket.request)
                self._tickets[ticket._answer] = ticket
            over = self._closed and not self._tickets
        for ticket in leaving:
            if ticket._answer is not None and ticket._answer in self._tickets:
                self._batch.cancel(ticket._answer)
                self._end(ticket, "cancelled", Done("cancelled", self._usage(ticket._answer)))
        return not over

    def _mind_the_time(self) -> None:
        """Break off what has run out of time."""
        now = time.monotonic()
        for ticket in list(self._tickets.values()):
            if now > min(ticket._deadline, self._deadline):
                assert ticket._answer is not None
                self._batch.cancel(ticket._answer)
                late = now > ticket._deadline
                self._end(ticket, "failed", Failed("the answer took too long" if late else CLOSED))

    def _happened(self, event: Event) -> None:
        answer = event.answer
        ticket = self._tickets[answer]
        if answer.failure:
            self._end(ticket, "failed", Failed(answer.failure), event.piece)
            return
        if ticket._begun is None:
            ticket._begun = time.monotonic()
            self._counts["prompt"] += len(answer.request.prompt)
            self._counts["reused"] += answer.reused_tokens
            self._say(ticket, Begun(len(answer.request.prompt), answer.reused_tokens))
        if event.token is not None:
            ticket._tokens.append(event.token)
            self._counts["generated"] += 1
        if event.logprobs is not None:
            ticket._logprobs.append(event.logprobs)
        if answer.finish_reason:
            with self._changed:  # _until_a_place() must not meet it half changed
                self._seconds.append(time.monotonic() - ticket._begun)
            self._end(ticket, "finished", Done(answer.finish_reason, self._usage(answer)), event.piece)
        elif event.piece:
            self._go_on(ticket, event.piece)

    def _go_on(self, ticket: Ticket, text: str) -> None:
        """Tell a piece of text, with the tokens that have come since the last."""
        logprobs = tuple(ticket._logprobs) if ticket.request.params.logprobs else None
        self._say(ticket, Piece(text, tuple(ticket._tokens), logprobs))
        ticket._tokens, ticket._logprobs = [], []

    def _end(self, ticket: Ticket, how: str, last: Done | Failed, text: str = "") -> None:
        if text or ticket._tokens:
            self._go_on(ticket, text)
        assert ticket._answer is not None
        with self._changed:
            del self._tickets[ticket._answer]
            self._counts[how] += 1
        self._say(ticket, last)

    def _say(self, ticket: Ticket, happening: Happening) -> None:
        try:
            ticket._tell(happening)
        except Exception:  # whoever listens has a fault of his own; the others must not hear of it
            log.exception("a listener of the engine has failed")
            self.cancel(ticket)

    @staticmethod
    def _usage(answer: Answer) -> Usage:
        return Usage(len(answer.request.prompt), len(answer.token_ids), answer.reused_tokens)

    def _break(self, why: str) -> None:
        """End everything: the engine cannot go on."""
        with self._changed:
            self._fault = why
            lost = [*self._tickets.values(), *self._new]
            self._counts["failed"] += len(lost)
            self._tickets.clear()
            self._new.clear()
        for ticket in lost:
            self._say(ticket, Failed(why, fatal=True))
