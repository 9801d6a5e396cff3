"""Which records nearly repeat an earlier one: MinHash to find candidates, exact overlap to decide. Called by clean.py.

A text is the set of its runs of three words. Signatures of 128 minima in bands of 4 (Broder 1997; banding as in
Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4): two texts that share 80 % of their runs meet in a band
with a probability of 1 - (1 - .8^4)^32 > .9999999, 50 % with .87. Whoever meets is compared run by run, so nothing is
called a duplicate by chance.
"""

from __future__ import annotations

import re
import zlib

import numpy as np

RUN = 3  # words
BANDS, ROWS = 32, 4
SEED = 0

_WORD = re.compile(r"\w+")


class Duplicates:
    """Texts one after the other; the first of near-duplicates is the one that counts."""

    def __init__(self, threshold: float) -> None:
        """threshold: share of the runs of both texts, taken together, that two near-duplicates have in common."""
        self.threshold = threshold
        rng = np.random.default_rng(SEED)
        self._multiply = (rng.integers(1, 1 << 63, BANDS * ROWS, dtype=np.uint64) << np.uint64(1)) | np.uint64(1)
        self._add = rng.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)
        self._words: dict[str, int] = {}
        self._kept: list[tuple[int, np.ndarray]] = []  # number of the record and its runs, hashed and sorted
        self._bands: dict[bytes, list[int]] = {}  # band and its minima -> places in _kept

    def earlier(self, number: int, text: str) -> int | None:
        """The number of an earlier text that this one nearly repeats; else None, and it is remembered."""
        runs = self._runs(text)
        keys = self._keys(runs)
        seen: set[int] = set()
        for key in keys:
            for place in self._bands.get(key, ()):
                if place not in seen:
                    seen.add(place)
                    if self._overlap(runs, self._kept[place][1]) >= self.threshold:
                        return self._kept[place][0]
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._kept))
        self._kept.append((number, runs))
        return None

    def _runs(self, text: str) -> np.ndarray:
        found = _WORD.findall(text.lower())
        hashes = self._words
        ids = np.fromiter(
            (
                hashes[w] if w in hashes else hashes.setdefault(w, zlib.crc32(w.encode("utf-8", "surrogatepass")))
                for w in found
            ),
            np.uint64,
            len(found),
        )
        runs = ids[: max(1, len(ids) - RUN + 1)].copy()
        for i in range(1, min(RUN, len(ids))):
            runs = runs * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + len(runs)]
        return np.unique(runs)

    def _keys(self, runs: np.ndarray) -> list[bytes]:
        if not len(runs):
            return [b""]
        mixed = (runs[None, :] * self._multiply[:, None] + self._add[:, None]) >> np.uint64(32)
        minima = mixed.min(axis=1).astype(np.uint32).reshape(BANDS, ROWS)
        return [bytes([band]) + minima[band].tobytes() for band in range(BANDS)]

    @staticmethod
    def _overlap(a: np.ndarray, b: np.ndarray) -> float:
        """The Jaccard index of two sorted sets."""
        if not len(a) and not len(b):
            return 1.0
        common = len(np.intersect1d(a, b, assume_unique=True))
        return common / (len(a) + len(b) - common)
