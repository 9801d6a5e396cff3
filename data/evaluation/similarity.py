"""How alike two texts are: ROUGE-L, chrF, and BERTScore's greedy matching over whatever vectors are given.

replies.py prints them only beside the same scores of a constant sentence and of the nearest neighbour's answer, for
they reward saying what everybody says. Numbers and words only; who makes the vectors is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.conditions import words_of


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words (Lin 2004, with beta 1 as in Google's rouge_score).

    Words are runs of letters, digits and apostrophes, unstemmed. Two empty texts have nothing in common: 0.
    """
    a, b = words_of(answer), words_of(reference)
    if not a or not b:
        return 0.0
    common = longest_common(a, b)
    return 2 * common / (len(a) + len(b))


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of whole numbers (Hyyrö 2004): rows of the table at once."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()


def chrf() -> Callable[[str, str], float] | None:
    """Sentence-level chrF of sacrebleu (0..1), or None where sacrebleu is not installed (extra `eval`)."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        return None
    metric = CHRF()
    return lambda answer, reference: metric.sentence_score(answer, [reference]).score / 100


# --- BERTScore ------------------------------------------------------------------------------------


def greedy_matching(answer: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall, F1 of BERTScore (Zhang et al. 2020, without IDF weights) over two (tokens, width) arrays."""
    if not len(answer) or not len(reference):
        return 0.0, 0.0, 0.0
    likeness = _unit(answer) @ _unit(reference).T
    precision, recall = float(likeness.max(1).mean()), float(likeness.max(0).mean())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total > 0 else 0.0


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Rescaled:
    """F1 with a measured baseline taken off: 0 is what two texts that have nothing to do with each other reach."""

    baseline: float

    def __call__(self, f1: float) -> float:
        return (f1 - self.baseline) / max(1 - self.baseline, 1e-9)


def random_baseline(vectors: Sequence[np.ndarray], pairs: int = 200, seed: int = 0) -> float:
    """The mean F1 of random pairs of different texts; what BERTScore's rescaling takes off."""
    rng = np.random.default_rng(seed)
    n = len(vectors)
    assert n > 1, "a baseline needs two texts"
    first = rng.integers(n, size=pairs)
    second = (first + rng.integers(1, n, size=pairs)) % n
    return float(np.mean([greedy_matching(vectors[i], vectors[j])[2] for i, j in zip(first, second, strict=True)]))
