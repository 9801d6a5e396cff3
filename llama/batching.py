"""Requests answered side by side, that join and leave between steps: continuous batching (Orca, Yu et al. 2022).

generate.py, the examination, the benches and engine.py call this. Nothing is computed for padding: prompts are read
one after the other in one packed row, then their keys and values join a cache whose rows have lengths of their own.
With Prefixes, what a prompt begins with is taken from there, or from a row that lives, and not read again. What fails
for one request ends that one. No threads, and no decision by the clock: the same submissions make the same steps. Knows
no files or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama import row_step
from llama.cache import Part, RaggedCache
from llama.chat import ChatFormat, Dialogue, Message, render
from llama.generation import CHUNK, Answer, Request, limits, new_cache, room_for
from llama.model import Llama
from llama.planner import is_out_of_memory
from llama.prefixes import Prefixes, as_array, shared
from llama.row_step import RowStep
from llama.sampling import NotFinite, Sampler, SamplingParams, TokenLogprobs
from llama.tokenizer import Tokenizer

ROWS = 32  # answers side by side
WORTH = 16  # ids known already for which a prompt is read in a pass of its own: about what a pass costs in tokens
ALIKE, ALIKE_ROWS = 32, 4  # ids and rows from which on what all begin with is read once for all
OUT_OF_MEMORY = "there is not enough memory for this answer beside the others; ask for less at a time"


class Event(NamedTuple):
    """One answer has gone on: by this text, which may be empty.

    token None: by none, it only ended. At its end answer.finish_reason is set, or answer.failure.
    """

    answer: Answer
    piece: str
    token: int | None = None
    logprobs: TokenLogprobs | None = None


@dataclass
class _Row:
    answer: Answer
    token: int  # chosen, or the prompt's last, and not yet run
    room: int  # tokens that the answer may have
    read: np.ndarray  # ids of the prompt, without its last


class Batch:
    """A bounded number of rows, each answering one request; the others wait in their order.

    A prompt is read without its last token, which is the first that the row runs among the others: so reading needs no
    logits, and every token of every answer comes out of the same step.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        rows: int = ROWS,
        budget: int = CHUNK,
        cache_dtype: torch.dtype | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        """budget: prompt tokens read in one step at most, so that a long prompt does not keep the others waiting.

        cache_dtype: of the KV cache; None: as what lies between two products. prefixes: where rows are kept when they
        end, and found again; None: every prompt is read whole.
        """
        assert rows > 0, rows
        assert budget > 0, budget
        self.rows, self.budget = rows, budget
        self._model, self._tokenizer, self._prefixes = model, tokenizer, prefixes
        weight = model.norm.weight
        self._device = weight.device
        self._limits = limits(tokenizer)
        self._sampler = Sampler([], [], weight.device, self._limits["vocab_size"], self._limits["banned"])
        self._cache = RaggedCache(model.config, rows, weight.device, cache_dtype or weight.dtype)
        self._step = RowStep(model, self._cache) if row_step.takes(model, self._cache) else None
        self._desk = new_cache(model, 1, 0, cache_dtype)  # where prompts are read
        self._nothing = torch.empty(0, dtype=torch.int64, device=weight.device)  # tokens of a prompt whose logits count
        self._waiting: deque[Answer] = deque()  # of the first, the desk may hold a beginning
        self._alike: int | None = 0  # see _common(); None: not known
        self._open: list[_Row] = []  # in the order of the cache's and the sampler's rows

    def __len__(self) -> int:
        """How many requests have not ended."""
        return len(self._waiting) + len(self._open)

    @property
    def running(self) -> int:
        """How many rows are taken."""
        return len(self._open)

    def submit(self, request: Request) -> Answer:
        """Take a request in; its answer grows with every step. ValueError if it does not fit the model's context."""
        room_for(self._model, request.prompt, request.max_new_tokens)
        answer = Answer(request, self._tokenizer)
        self._waiting.append(answer)
        return answer

    @torch.inference_mode()
    def cancel(self, answer: Answer) -> None:
        """Break an answer off: its place is free at once. Nothing happens to one that has ended."""
        if answer in self._waiting:
            if answer is self._waiting[0]:
                self._desk.truncate(0)
            self._waiting.remove(answer)
        elif (row := next((i for i, r in enumerate(self._open) if r.answer is answer), None)) is not None:
            self._close(row)
        else:
            return
        answer.finish(None)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read some of the prompts that wait, while there are rows for them; then one token more in every row.

        Without memory, or with logits that are not finite, an answer fails and the others go on. Other errors are
        raised, and then nothing is known of the batch.
        """
        return [*self._read(), *(self._write() if self._open else [])]

    def _read(self) -> list[Event]:
        """Run the next `budget` prompt tokens; prompts that are whole take their rows. The answers that failed."""
        failed: list[Event] = []
        left, most = self.budget, self.rows
        while left > 0 and self._waiting and len(self._open) < self.rows:
            first, held = self._waiting[0], self._desk.length
            try:
                if not held:
                    self._begin(first)
                    held = self._desk.length
                left -= self._read_some(left, min(most, self.rows - len(self._open)))
            except (RuntimeError, MemoryError, NotFinite) as e:
                why = _trouble(e)
                same = bool(self._waiting) and self._waiting[0] is first
                self._desk.truncate(held if same else 0)
                if (why == OUT_OF_MEMORY and self._give_back()) or most > 1:
                    most = 1  # one by one, to see which it is
                else:
                    self._desk.truncate(0)
                    failed.append(self._fail(self._waiting.popleft(), why))
        return failed

    def _read_some(self, budget: int, most: int) -> int:
        """Run at most `budget` tokens of at most `most` prompts in one row, a document each; how many it were.

        Only of the first can there be a beginning on the desk. NotFinite if it makes keys or values that are not.
        """
        held = done = self._desk.length
        tokens: list[int] = []
        starts = [0] * held
        whole: list[tuple[Answer, int]] = []
        rest = (0, 0)
        for answer in islice(self._waiting, most):
            prompt, at = answer.request.prompt, len(starts) if whole else 0
            n = len(prompt) - 1
            if whole:
                if self._known(as_array(prompt[:-1]), [other for other, _ in whole])[0]:
                    break  # it is the first of the next pass
                answer.start_clock()
            some = prompt[done : min(n, done + budget - len(tokens))]
            tokens += some
            starts += [at] * len(some)
            if done + len(some) < n:
                rest = (at, done + len(some))
                break
            whole.append((answer, at))
            done = 0
        if tokens:
            self._run(tokens, starts)
            if not _finite(self._desk.part(0, held, len(tokens))):
                raise NotFinite([0])
        for answer, at in whole:
            self._enter(answer, at)
            self._waiting.popleft()
        self._desk.keep(*rest)
        return len(tokens)

    def _begin(self, answer: Answer) -> None:
        """Put what is known of its prompt on the desk."""
        answer.start_clock()
        n, part = self._known(as_array(answer.request.prompt[:-1]), [])
        if n:
            if n > self._desk.max_len:
                self._desk = self._desk.grown(n + self.budget)
            self._desk.put(part)
        answer.reused_tokens = n

    def _known(self, ids: np.ndarray, beside: Sequence[Answer]) -> tuple[int, Part]:
        """How many of these ids have been read, if that is worth anything, and their keys and values.

        Answers beside it, which are read in the same pass, count, but theirs are not there yet.
        """
        if self._prefixes is None:
            return 0, ()
        n, part = self._prefixes.longest(ids)
        for i, row in enumerate(self._open):
            if (m := shared(row.read, ids)) > n:
                n, part = m, tuple(t[:, :, :m] for t in self._cache.held(i))
        n = max([n, *(shared(as_array(other.request.prompt[:-1]), ids) for other in beside)])
        return (n, part) if n >= WORTH else (0, ())

    def _enter(self, answer: Answer, at: int) -> None:
        """Give an answer its row; its prompt lies on the desk from `at` on."""
        request = answer.request
        read = as_array(request.prompt[:-1])
        room = room_for(self._model, request.prompt, request.max_new_tokens)
        self._sampler.join(request.params, request.prompt)
        try:
            self._cache.join(self._desk, at, len(read))
        except (RuntimeError, MemoryError):
            self._sampler.leave(len(self._open))
            raise
        self._open.append(_Row(answer, request.prompt[-1], room, read))
        self._alike = None

    def _run(self, tokens: list[int], starts: list[int]) -> None:
        """Append tokens to the desk, where position i may see those from starts[i] on."""
        S = len(starts)
        if not S <= self._desk.max_len <= 2 * (S + self.budget):
            self._desk = self._desk.grown(max(S, self.budget))
        start = torch.tensor([starts], dtype=torch.int32, device=self._device)
        documents = (start, torch.full_like(start, S))
        row = torch.tensor([tokens], device=self._device)
        self._model(row, documents=documents, cache=self._desk, only=self._nothing)

    def _write(self) -> list[Event]:
        events: list[Event] = []
        tokens = torch.tensor([[row.token] for row in self._open], device=self._device)
        held = self._cache.length
        try:
            self._cache.reserve(1)
            held = self._cache.length
            if self._step:
                logits = self._step(tokens, self._common())[:, -1]
            else:
                logits = self._model(tokens, cache=self._cache, last_only=True)[:, -1]
            drawn, logits = self._draw(logits, events)
        except (RuntimeError, MemoryError) as e:
            why = _trouble(e)
            self._cache.truncate(held)
            if self._open and not self._give_back():  # what runs is tried again with the next step, with more room
                sizes = [len(row.read) + len(row.answer.token_ids) for row in self._open]
                events.append(self._fail_row(sizes.index(max(sizes)), why))
            return events
        told = self._sampler.logprobs(logits, drawn)
        ended = []
        for i, (row, token) in enumerate(zip(self._open, drawn, strict=True)):
            answer, row.token = row.answer, token
            if token in self._limits["stop_ids"]:
                events.append(Event(answer, answer.finish("stop")))
            else:
                piece = answer.feed(token)
                if answer.finish_reason is None and len(answer.token_ids) == row.room:
                    piece += answer.finish("length")
                events.append(Event(answer, piece, token, told.get(i)))
            if answer.finish_reason:
                ended.append(i)
        for i in reversed(ended):  # from the last on: a row that closes is replaced by one that was seen
            self._close(i)
        return events

    def _common(self) -> int:
        """With how many ids all rows begin alike, where that saves enough of reading them."""
        if self._alike is None:
            first = self._open[0].read
            n = min(shared(first, row.read) for row in self._open)
            self._alike = n if n >= ALIKE and len(self._open) >= ALIKE_ROWS else 0
        return self._alike

    def _draw(self, logits: Tensor, events: list[Event]) -> tuple[list[int], Tensor]:
        """The next tokens of the rows, and their logits; the answers of rows without finite ones fail first."""
        while self._open:
            try:
                return self._sampler(logits).tolist(), logits
            except NotFinite as e:
                for row in reversed(e.rows):
                    events.append(self._fail_row(row, str(e)))
                    if row < len(self._open):
                        logits[row] = logits[-1]
                    logits = logits[:-1]
        return [], logits

    def _close(self, row: int, failed: bool = False) -> None:
        """Free a row; the last takes its place, as in cache and sampler. What it has read is kept, unless it failed."""
        if self._prefixes is not None and not failed:
            part, answer = self._cache.held(row), self._open[row].answer
            ids = as_array([*answer.request.prompt, *answer.token_ids][: part[0].shape[2]])
            try:
                self._prefixes.keep(ids, part)
            except (RuntimeError, MemoryError) as e:
                _trouble(e)
                self._prefixes.clear()
        self._cache.leave(row, wipe=failed)
        self._sampler.leave(row)
        self._alike = None
        last = self._open.pop()
        if row < len(self._open):
            self._open[row] = last

    def _fail_row(self, row: int, why: str) -> Event:
        answer = self._open[row].answer
        self._close(row, failed=True)
        return self._fail(answer, why)

    def _fail(self, answer: Answer, why: str) -> Event:
        piece = answer.finish(None)
        answer.failure = why
        return Event(answer, piece)

    def _give_back(self) -> bool:
        """Give up what is kept of ended rows, for memory; whether there was anything."""
        if self._prefixes is None or not len(self._prefixes):
            return False
        self._prefixes.clear()
        return True


def _finite(part: Part) -> bool:
    return all(bool(t.isfinite().all()) for t in part if t.is_floating_point())


def _trouble(e: Exception) -> str:
    """What is said of an error that ends one answer; any other is raised again."""
    if isinstance(e, NotFinite):
        return str(e)
    if is_out_of_memory(e):
        return OUT_OF_MEMORY
    raise e


def answer_batch(
    model: Llama,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    rows: int = ROWS,
    cache_dtype: torch.dtype | None = None,
) -> list[Answer]:
    """Answer all requests, so many at a time; the same answers as one by one, up to rounding in the logits' last bits.

    ValueError if one does not fit, or fails.
    """
    batch = Batch(model, tokenizer, rows, cache_dtype=cache_dtype)
    answers = [batch.submit(r) for r in requests]
    while batch:
        for event in batch.step():
            if event.answer.failure:
                raise ValueError(event.answer.failure)
    return answers


def answer_greedily(
    model: Llama,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    questions: Sequence[tuple[Message, ...]],
    cache_dtype: torch.dtype | None = None,
) -> list[str]:
    """Greedy answers of at most 80 tokens to dialogues that end in a question."""
    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0)
    prompts = [render(Dialogue((*chat_format.opening(), *q)), chat_format, tokenizer)[0] for q in questions]
    requests = [Request(ids, greedy, 80) for ids in prompts]
    return [a.text for a in answer_batch(model, tokenizer, requests, 64, cache_dtype)]
