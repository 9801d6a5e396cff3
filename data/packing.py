"""Which records come in which order, and which share a row: pure functions of lengths, weights and a seed.

Called by loader.py. Numpy alone, no token is looked at. Random numbers are raw bits of PCG64, which numpy promises
never to change, so that a run resumes in the same order under another version.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def shuffled(n: int, *seed: int) -> Ints:
    """A permutation of range(n) that depends on the seed numbers alone."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(bits, kind="stable")


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """Pack documents into rows, best fit decreasing: the row of each document, rows numbered from 0.

    Longest document first, each into the fullest row that still holds it. Rows wait in one list per free space; the
    bits of one integer say which lists are not empty, so a fit is found in a few machine words.
    200,000 documents into rows of 2,048: 0.15-0.3 s (bench/results/loader_cpu.json, two cores, 2026-11-24).
    """
    assert lengths.size == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    by_length = np.argsort(-lengths, kind="stable")
    row_of = [0] * lengths.size
    waiting: list[list[int]] = [[] for _ in range(capacity)]
    free = 0
    rows = 0
    for document, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        fits = free >> length
        if fits:
            space = length + (fits & -fits).bit_length() - 1
            row = waiting[space].pop()
            if not waiting[space]:
                free ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        row_of[document] = row
        left = space - length
        if left:
            if not waiting[left]:
                free |= 1 << left
            waiting[left].append(row)
    return np.array(row_of, dtype=np.int64)


class Rows:
    """Documents grouped into rows: rows[i] are the documents of row i, in the order they were given."""

    def __init__(self, documents: Ints, lengths: Ints, row_of: Ints) -> None:
        order = np.argsort(row_of, kind="stable")
        self.count = int(row_of.max()) + 1 if row_of.size else 0
        self._documents = documents[order]
        self._starts = np.searchsorted(row_of[order], np.arange(self.count + 1))
        self.used = np.bincount(row_of, lengths, minlength=self.count).astype(np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Ints:
        return self._documents[self._starts[i] : self._starts[i + 1]]


def pack(documents: Ints, lengths: Ints, capacity: int) -> Rows:
    """Documents (their numbers and lengths) into rows, best fit."""
    return Rows(documents, lengths, best_fit(lengths, capacity))


class Order:
    """The endless stream of epochs: every epoch holds each file's documents `weight` times, in a new order.

    files: the document numbers of each file. The whole part of a weight repeats every document; of the fractional
    part each epoch takes the next stretch of one fixed permutation, so that all documents have their turn.
    """

    def __init__(self, files: list[Ints], weights: list[float], seed: int) -> None:
        assert len(files) == len(weights)
        self._files, self._seed = files, seed
        self._whole = [int(w) for w in weights]
        self._part = [round((w - int(w)) * f.size) for f, w in zip(files, weights, strict=True)]
        self.count = sum(f.size * n + p for f, n, p in zip(files, self._whole, self._part, strict=True))
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> Ints:
        """Document numbers of one epoch, in order."""
        parts = []
        for i, (documents, whole, part) in enumerate(zip(self._files, self._whole, self._part, strict=True)):
            parts += [documents] * whole
            if part:
                turn = (np.arange(part) + epoch * part) % documents.size
                parts.append(documents[shuffled(documents.size, self._seed, 1, i)[turn]])
        return np.concatenate(parts)[shuffled(self.count, self._seed, 0, epoch)]

    def take(self, start: int, n: int) -> Ints:
        """Documents start .. start + n of the stream."""
        parts = []
        while n:
            epoch, at = divmod(start, self.count)
            parts.append(self.epoch(epoch)[at : at + n])
            start, n = start + parts[-1].size, n - parts[-1].size
        return np.concatenate(parts)


class EpochRows:
    """The endless stream of packed epochs: each epoch's documents best-fit into rows, the rows in a new order."""

    def __init__(self, order: Order, lengths: Ints, capacity: int, seed: int) -> None:
        self._order, self._lengths, self._capacity, self._seed = order, lengths, capacity, seed
        self._ends = [0]  # rows before each epoch; epochs of a fractional weight differ in their number of rows
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[Rows, Ints]:
        """An epoch's rows and the order they come in."""
        documents = self._order.epoch(epoch)
        rows = pack(documents, self._lengths[documents], self._capacity)
        return rows, shuffled(len(rows), self._seed, 2, epoch)

    def before(self, epoch: int) -> int:
        """Rows in all epochs before this one."""
        while len(self._ends) <= epoch:
            self._ends.append(self._ends[-1] + len(self.epoch(len(self._ends) - 1)[0]))
        return self._ends[epoch]

    def take(self, start: int, n: int) -> list[Ints]:
        """Rows start .. start + n of the stream, each as its documents."""
        epoch = start // max(1, self.before(1))
        while self.before(epoch) > start:
            epoch -= 1
        taken: list[Ints] = []
        while len(taken) < n:
            while self.before(epoch + 1) <= start + len(taken):
                epoch += 1
            rows, order = self.epoch(epoch)
            at = start + len(taken) - self.before(epoch)
            taken += [rows[i] for i in order[at : at + n - len(taken)].tolist()]
        return taken
