"""Requests answered side by side, that join and leave between steps: continuous batching (Orca, Yu et al. 2022).

generate.py, the examination and the benches call this, and a server can. Nothing is computed for padding: prompts are
read one after the other in one packed row, then their keys and values join a cache whose rows have lengths of their
own. No threads, and no decision by the clock: the same submissions make the same steps. Knows no files or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llama.cache import RaggedCache
from llama.chat import ChatFormat, Dialogue, Message, render
from llama.generation import CHUNK, Answer, Request, limits, new_cache, room_for
from llama.model import Llama
from llama.sampling import Sampler, SamplingParams
from llama.tokenizer import Tokenizer

ROWS = 32  # answers side by side


class Event(NamedTuple):
    """One answer has gone on: by this text, which may be empty. At its end answer.finish_reason is set."""

    answer: Answer
    piece: str


@dataclass
class _Row:
    answer: Answer
    token: int  # chosen, or the prompt's last, and not yet run
    room: int  # tokens that the answer may have


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
    ) -> None:
        """budget: prompt tokens read in one step at most, so that a long prompt does not keep the others waiting.

        cache_dtype: of the KV cache; None: as what lies between two products.
        """
        assert rows > 0, rows
        assert budget > 0, budget
        self.rows, self.budget = rows, budget
        self._model, self._tokenizer = model, tokenizer
        weight = model.norm.weight
        self._device = weight.device
        self._limits = limits(tokenizer)
        self._sampler = Sampler([], [], weight.device, self._limits["vocab_size"], self._limits["banned"])
        self._cache = RaggedCache(model.config, rows, weight.device, cache_dtype or weight.dtype)
        self._desk = new_cache(model, 1, 0, cache_dtype)  # where prompts are read
        self._waiting: deque[Answer] = deque()  # of the first, the desk may hold a beginning
        self._open: list[_Row] = []  # in the order of the cache's and the sampler's rows

    def __len__(self) -> int:
        """How many requests have not ended."""
        return len(self._waiting) + len(self._open)

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
        """Read some of the prompts that wait, while there are rows for them; then one token more in every row."""
        self._read()
        return self._write() if self._open else []

    def _read(self) -> None:
        """Run the next `budget` prompt tokens in one row, a document each; prompts that are whole take their rows."""
        held = self._desk.length
        tokens: list[int] = []
        starts = [0] * held
        whole: list[tuple[Answer, int, int]] = []
        rest: tuple[int, int] | None = None
        while self._waiting and len(self._open) + len(whole) < self.rows and rest is None:
            answer = self._waiting[0]
            n = len(answer.request.prompt) - 1
            at, done = (0, held) if held and not whole else (len(starts), 0)
            if not done:
                answer.start_clock()
            some = answer.request.prompt[done : min(n, done + self.budget - len(tokens))]
            tokens += some
            starts += [at] * len(some)
            if done + len(some) < n:
                rest = (at, done + len(some))
            else:
                whole.append((self._waiting.popleft(), at, n))
        if tokens:
            self._run(tokens, starts)
        for answer, at, n in whole:
            request = answer.request
            self._cache.join(self._desk, at, n)
            self._sampler.join(request.params, request.prompt)
            room = room_for(self._model, request.prompt, request.max_new_tokens)
            self._open.append(_Row(answer, request.prompt[-1], room))
        self._desk.keep(*(rest or (0, 0)))

    def _run(self, tokens: list[int], starts: list[int]) -> None:
        """Append tokens to the desk, where position i may see those from starts[i] on."""
        S = len(starts)
        if not S <= self._desk.max_len <= 2 * (S + self.budget):
            self._desk = self._desk.grown(max(S, self.budget))
        start = torch.tensor([starts], dtype=torch.int32, device=self._device)
        documents = (start, torch.full_like(start, S))
        row = torch.tensor([tokens], device=self._device)
        self._model(row, documents=documents, cache=self._desk, last_only=True)

    def _write(self) -> list[Event]:
        tokens = torch.tensor([[row.token] for row in self._open], device=self._device)
        self._cache.reserve(1)
        logits = self._model(tokens, cache=self._cache, last_only=True)
        events = []
        for row, token in zip(self._open, self._sampler(logits[:, -1]).tolist(), strict=True):
            answer, row.token = row.answer, token
            if token in self._limits["stop_ids"]:
                piece = answer.finish("stop")
            else:
                piece = answer.feed(token)
                if answer.finish_reason is None and len(answer.token_ids) == row.room:
                    piece += answer.finish("length")
            events.append(Event(answer, piece))
        for i in reversed(range(len(events))):  # from the last on: a row that closes is replaced by one that was seen
            if events[i].answer.finish_reason:
                self._close(i)
        return events

    def _close(self, row: int) -> None:
        """Free a row; the last takes its place, as in cache and sampler."""
        self._cache.leave(row)
        self._sampler.leave(row)
        last = self._open.pop()
        if row < len(self._open):
            self._open[row] = last


def answer_batch(
    model: Llama,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    rows: int = ROWS,
    cache_dtype: torch.dtype | None = None,
) -> list[Answer]:
    """Answer all requests, so many at a time; the same answers as one by one, up to rounding in the logits' last bits.

    ValueError if one does not fit.
    """
    batch = Batch(model, tokenizer, rows, cache_dtype=cache_dtype)
    answers = [batch.submit(r) for r in requests]
    while batch:
        batch.step()
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
