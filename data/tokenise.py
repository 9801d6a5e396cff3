"""Dialogues -> token ids with the loss mask in them, cut to length; in this process or in several.

Called by cache.py. The other processes are plain children, not multiprocessing's: they import neither torch nor the
script that is running, and talk in pickles over their own pipes. Results come back in order, and are the same
whatever the number of processes. (Threads do not help: SentencePiece 0.2 holds the interpreter lock.)
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from data.records import Record, is_plain
from llama.chat import ChatFormat, render, render_text
from llama.tokenizer import Tokenizer

BATCH = 256  # records that travel together

# One row a record, or several of a plain text. length: tokens kept (0: dropped); supervised: how many of them carry
# loss; original: tokens before the cut, 0 where a row goes on with the text of the row before; at: place of the first
# in tokens.
ROW = np.dtype(
    [("index", "<i8"), ("key", "<u8"), ("at", "<i8"), ("length", "<i4"), ("supervised", "<i4"), ("original", "<i4")]
)


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The type of stored tokens: its top bit says "carries loss", the rest is the id."""
    return np.dtype("<u2") if vocab_size <= 1 << 15 else np.dtype("<u4")


def supervised_bit(dtype: np.dtype[Any]) -> int:
    return 1 << (8 * dtype.itemsize - 1)


def encode(ids: list[int], mask: list[bool], max_len: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Stored tokens of a rendered dialogue. What is over max_len is cut off the end, and with it what no loss
    follows: a whole question whose answer is gone, or that never had one. Nothing is left if the prompt alone is
    too long.
    """
    kept = np.array(ids[:max_len], dtype)
    loss = np.array(mask[:max_len], bool)
    kept[loss] |= supervised_bit(dtype)
    return kept[: int(loss.nonzero()[0][-1]) + 1] if loss.any() else kept[:0]


def encode_text(ids: list[int], max_len: int, dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    """Stored tokens of plain text in rows of max_len. Each row begins with the token that the one before ended with,
    without loss, so that every token but the first of all is learnt once, from what stood before it.
    """
    rows = [ids[at : at + max_len] for at in range(0, max(1, len(ids) - 1), max_len - 1)]
    return [encode(row, [False] + [True] * (len(row) - 1), max_len, dtype) for row in rows]


def last_answer(mask: list[bool]) -> list[bool]:
    """The mask with the last answer alone: of a preference pair, what was chosen or rejected."""
    prompt = next((i for i in range(len(mask), 0, -1) if not mask[i - 1]), 0)
    return [False] * prompt + mask[prompt:]


@dataclass
class Job:
    """What a process needs to tokenise."""

    tokenizer: bytes
    chat_format: dict[str, Any]
    max_len: int
    pairs: bool = False

    def start(self) -> Worker:
        return Worker(Tokenizer(self.tokenizer), ChatFormat.from_json(self.chat_format), self.max_len, self.pairs)


@dataclass
class Worker:
    """Tokenises batches of records in this process."""

    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_len: int
    pairs: bool = False

    def __call__(self, records: list[Record]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Tokens of the records end to end, and their rows (`at` counts from the first)."""
        dtype = token_type(self.tokenizer.vocab_size)
        rows: list[tuple[int, ...]] = []
        parts, at = [np.zeros(0, dtype)], 0
        for record in records:
            for part, original in self._encoded(record, dtype):
                supervised = int((part >= supervised_bit(dtype)).sum())
                rows.append((record.index, record.key, at, part.size, supervised, original))
                parts.append(part)
                at += part.size
        return np.concatenate(parts), np.array(rows, ROW)

    def _encoded(self, record: Record, dtype: np.dtype[Any]) -> list[tuple[NDArray[Any], int]]:
        """Stored tokens of each row of a record, and ROW's `original`."""
        if is_plain(record.dialogue):
            text = record.dialogue.messages[0].content
            ids = render_text(text, self.tokenizer, first=record.first, last=record.last)
            rows = encode_text(ids, self.max_len, dtype)
            return [(row, row.size if record.first and i == 0 else 0) for i, row in enumerate(rows)]
        ids, mask = render(record.dialogue, self.chat_format, self.tokenizer)
        return [(encode(ids, last_answer(mask) if self.pairs else mask, self.max_len, dtype), len(ids))]


def tokenise(records: Iterable[Record], job: Job, workers: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Batches of (tokens, rows), in the order of the records. At most one batch per process is held."""
    records = iter(records)
    batches = iter(lambda: list(islice(records, BATCH)), [])
    if workers <= 1:
        yield from map(job.start(), batches)
        return
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(_Process(job)) for _ in range(workers)]
        sent = 0
        for batch in batches:
            process = pool[sent % workers]
            if sent >= workers:
                yield process.receive()
            process.send(batch)
            sent += 1
        for i in range(max(0, sent - workers), sent):
            yield pool[i % workers].receive()


class _Process:
    """A child that tokenises one batch at a time. It reads a whole batch before it answers: no deadlock."""

    def __init__(self, job: Job) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from data.tokenise import serve; serve()"
        # In a process group of its own: Ctrl-C is the parent's to handle, the child ends when its pipe does.
        self._child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        self._stdin: BinaryIO = self._child.stdin  # type: ignore[assignment]
        self._stdout: BinaryIO = self._child.stdout  # type: ignore[assignment]
        self.send(job)

    def send(self, what: Any) -> None:
        try:
            pickle.dump(what, self._stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._stdin.flush()
        except BrokenPipeError:
            self._died()

    def receive(self) -> Any:
        try:
            return pickle.load(self._stdout)
        except (EOFError, pickle.UnpicklingError):
            self._died()

    def _died(self) -> None:
        raise RuntimeError(f"a tokenising process ended early (exit code {self._child.wait()}); out of memory?")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._child.terminate()
        self._child.wait()


def serve() -> None:
    """What a child does: a Job from stdin, then batches of records until stdin ends, each answered on stdout."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        work = pickle.load(source).start()
        while True:
            pickle.dump(work(pickle.load(source)), sink, protocol=pickle.HIGHEST_PROTOCOL)
            sink.flush()
