"""Preference pairs as documents: chosen and rejected answer side by side in one row. Called by loader.py; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.cache import TokenFile
from data.dataset import Dataset
from data.packing import Ints


class PairDataset(Dataset):
    """Document i is pair i, the sequence with the chosen answer followed by the one with the rejected.

    Being one document they share a row, a micro-batch and a rank, whatever the packing. reference (len, 2): the
    starting model's log-probabilities of both answers, set before training.
    """

    rows_per_document = 2

    def __init__(self, files: Sequence[TokenFile], chosen: Sequence[Ints], weights: Sequence[float]) -> None:
        """chosen: rows of chosen answers; each one's rejected answer is the row after, its tokens follow."""
        super().__init__(files, chosen, weights)
        after = [f.rows[c + 1] for f, c in zip(files, chosen, strict=True)]
        self._border = self.lengths
        self.lengths = self.lengths + np.concatenate([r["length"].astype(np.int64) for r in after])
        self.supervised = self.supervised + np.concatenate([r["supervised"].astype(np.int64) for r in after])
        self.reference = np.full((len(self), 2), np.nan)

    def parts(self, i: int) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Ids and mask of the chosen sequence, and of the rejected one."""
        ids, mask = self.document(i)
        n = self._border[i]
        return [(ids[:n], mask[:n]), (ids[n:], mask[n:])]


def first_rows(file: TokenFile, rows: Ints) -> Ints:
    """Of the kept rows of a file of pairs, those of chosen answers whose rejected answer was kept too."""
    chosen = rows[rows % 2 == 0]
    return chosen[file.rows["length"][chosen + 1] > 0]
