"""BM25 against its formula."""

from __future__ import annotations

import numpy as np
import pytest

from data.evaluation.neighbours import K1, B, Neighbours


def test_bm25_is_the_formula_s() -> None:
    texts = ["fever and cough", "cough cough cough", "a red eye"]
    near = Neighbours(texts)
    lengths = [3, 3, 3]
    idf = np.log(1 + (3 - 2 + 0.5) / 2.5)
    expected = [
        idf * n * (K1 + 1) / (n + K1 * (1 - B + B * length / 3)) for n, length in zip([1, 3, 0], lengths, strict=True)
    ]
    assert near.scores("Cough? cough!") == pytest.approx(expected)
    assert near.nearest("cough") == 1
    assert near.nearest("cough", excluded=1) == 0
