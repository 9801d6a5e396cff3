"""Which items of an examination stand in the training files: 13 words in a row that occur in both (GPT-3's measure).

evaluate.py asks once for all items; training files are read once, in bounded memory. An item of fewer words than 13
counts when all of it stands there; one of fewer than SHORTEST words would match by chance and never counts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

WORDS, SHORTEST = 13, 8
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BATCH = 1 << 20  # words of training text that are looked at together


def contaminated(
    items: Sequence[Iterable[str]], texts: Iterable[str], shortest: int | Sequence[int] = SHORTEST
) -> list[bool]:
    """For each item, which is one or more texts, whether a run of its words occurs in one of `texts`.

    shortest: of how few words a text may be (a number for each item) to be looked for as a whole; 1 finds names.
    """
    least = [shortest] * len(items) if isinstance(shortest, int) else shortest
    hashes: dict[int, list[np.ndarray]] = {}  # of all runs of words, by their length
    owners: dict[int, list[np.ndarray]] = {}  # the item that each belongs to
    for i, parts in enumerate(items):
        for part in parts:
            codes = _codes(part)
            length = min(WORDS, len(codes))
            if length >= least[i]:
                mine = _hashes(codes, length)
                hashes.setdefault(length, []).append(mine)
                owners.setdefault(length, []).append(np.full(len(mine), i))
    wanted = {length: (np.concatenate(hashes[length]), np.concatenate(owners[length])) for length in hashes}
    found = np.zeros(len(items), bool)
    for codes in _batches(texts):
        for length, (runs, items_of) in wanted.items():
            found[items_of[np.isin(runs, _hashes(codes, length))]] = True
    return found.tolist()


_BORDER = 1  # a code that no word has: windows do not reach from one text into the next


def _batches(texts: Iterable[str]) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    size = 0
    for text in texts:
        codes = _codes(text)
        held += [codes, np.array([_BORDER], np.uint64)]
        size += len(codes) + 1
        if size >= _BATCH:
            yield np.concatenate(held)
            held, size = [], 0
    if held:
        yield np.concatenate(held)


def _codes(text: str) -> np.ndarray:
    """A 64-bit number for each word, whatever its case."""
    return np.array([_code(w) for w in _WORD.findall(text.lower())], np.uint64)


@lru_cache(1 << 18)
def _code(word: str) -> int:
    data = word.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data) | 2  # never _BORDER


def _hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit polynomial hash of each run of `length` words."""
    n = len(codes) - length + 1
    if n <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(n, np.uint64)
    for i in range(length):
        total = total * _BASE + codes[i : i + n]
    return total ^ total >> np.uint64(29)
