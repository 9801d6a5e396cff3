"""The nearest text by words: BM25 over a collection. The retrieval floor beside a model's answers.

Lexical and small, on purpose: what a search in the training data reaches without any model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from data.conditions import words_of

K1, B = 1.2, 0.75  # Robertson's usual constants


class Neighbours:
    """BM25 over texts, which are known by their place."""

    def __init__(self, texts: Sequence[str]) -> None:
        counted = [Counter(words_of(t)) for t in texts]
        lengths = np.array([sum(c.values()) for c in counted], float)
        self._norm = K1 * (1 - B + B * lengths / max(lengths.mean() if len(texts) else 0.0, 1e-9))
        postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, words in enumerate(counted):
            for word, n in words.items():
                postings[word].append((i, n))
        self._postings = {
            w: (np.array([i for i, _ in p]), np.array([n for _, n in p], float)) for w, p in postings.items()
        }
        self._n = len(texts)

    def idf(self, word: str) -> float:
        n = len(self._postings[word][0]) if word in self._postings else 0
        return math.log(1 + (self._n - n + 0.5) / (n + 0.5))

    def scores(self, text: str) -> np.ndarray:
        """A score for every text; 0 where no word is shared."""
        total = np.zeros(self._n)
        for word in sorted(set(words_of(text))):
            if word in self._postings:
                places, counts = self._postings[word]
                total[places] += self.idf(word) * counts * (K1 + 1) / (counts + self._norm[places])
        return total

    def nearest(self, text: str, excluded: int | None = None) -> int:
        """The place of the nearest text; the first one of equals. excluded: a place that does not count (its own)."""
        scores = self.scores(text)
        if excluded is not None:
            scores[excluded] = -1.0
        return int(scores.argmax())
