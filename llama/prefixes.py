"""Keys and values of what has been read, by token ids, so that what begins alike is not read again.

batching.py keeps finished rows here and asks for beginnings. What is restored are the bits that were kept. Bounded in
bytes and in number; what was of use longest ago goes. Knows no models and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from llama.cache import Part


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two sequences of ids begin with in common."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def as_array(ids: Sequence[int]) -> np.ndarray:
    """Ids as they are compared."""
    return np.asarray(ids, dtype=np.int64)


class _Kept(NamedTuple):
    ids: np.ndarray
    part: Part

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + sum(t.nbytes for t in self.part)


class Prefixes:
    """At most `most` sequences, and at most `limit` bytes of them."""

    def __init__(self, most: int, limit: int) -> None:
        self.most, self.limit = most, limit
        self.nbytes = 0
        self._kept: list[_Kept] = []  # what was of use last stands last

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, ids: np.ndarray) -> tuple[int, Part]:
        """The longest beginning of ids that is kept: its length, which may be 0, and keys and values, as views."""
        lengths = [shared(kept.ids, ids) for kept in self._kept]
        if not (n := max(lengths, default=0)):
            return 0, ()
        at = len(lengths) - 1 - lengths[::-1].index(n)
        kept = self._kept.pop(at)
        self._kept.append(kept)
        return n, tuple(t[:, :, :n] for t in kept.part)

    def keep(self, ids: np.ndarray, part: Part) -> None:
        """Keep a copy; what is a beginning of it is not needed any more. Nothing happens to one that is kept whole."""
        nbytes = ids.nbytes + sum(t.nbytes for t in part)
        if not self.most or not 0 < nbytes <= self.limit or self.longest(ids)[0] == len(ids):
            return
        for kept in [kept for kept in self._kept if shared(kept.ids, ids) == len(kept.ids)]:
            self._drop(kept)
        while len(self._kept) >= self.most or self.nbytes + nbytes > self.limit:
            self._drop(self._kept[0])
        self._kept.append(_Kept(ids, tuple(t.clone(memory_format=torch.contiguous_format) for t in part)))
        self.nbytes += nbytes

    def clear(self) -> None:
        """Give all the memory back."""
        self._kept.clear()
        self.nbytes = 0

    def _drop(self, kept: _Kept) -> None:
        self._kept = [other for other in self._kept if other is not kept]
        self.nbytes -= kept.nbytes
