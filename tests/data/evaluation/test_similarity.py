"""ROUGE-L, chrF and greedy matching against references written differently."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.evaluation.similarity import Rescaled, chrf, greedy_matching, longest_common, random_baseline, rouge_l

WORDS = st.lists(st.sampled_from("abcd"), max_size=14)


@given(WORDS, WORDS)
def test_longest_common_is_the_recursion_s(a: list[str], b: list[str]) -> None:
    @cache
    def slow(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + slow(i + 1, j + 1) if a[i] == b[j] else max(slow(i + 1, j), slow(i, j + 1))

    assert longest_common(a, b) == slow(0, 0)


def test_rouge_l_of_lin_s_example() -> None:
    """Lin 2004: "police kill the gunman" has 3 of 4 words in order, "the gunman kill police" 2."""
    reference = "Police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == 0.75
    assert rouge_l("the gunman kill police", reference) == 0.5
    assert rouge_l("", reference) == rouge_l("", "") == 0
    assert rouge_l(reference, reference.upper()) == 1


def test_chrf_is_sacrebleu_s() -> None:
    score = chrf()
    if score is None:
        pytest.skip("needs sacrebleu")
    assert score("You may have asthma.", "You may have asthma.") == pytest.approx(1)
    reference, answer = "abcdef", "abcxyz"
    values = []
    for n in range(1, 7):
        a, r = ({t[i : i + n] for i in range(7 - n)} for t in (answer, reference))
        values.append(len(a & r) / (7 - n))  # precision and recall are equal here, and so is F
    assert score(answer, reference) == pytest.approx(sum(values) / 6, abs=1e-6)


def test_greedy_matching_by_hand() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 0.0]])
    assert greedy_matching(x, y) == pytest.approx((0.5, 1.0, 2 / 3))
    assert greedy_matching(x, x[:0]) == (0, 0, 0)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_greedy_matching_is_the_loop_s(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        return float(u @ v / (u @ u) ** 0.5 / (v @ v) ** 0.5)

    precision, recall, _ = greedy_matching(a, b)
    assert precision == pytest.approx(sum(max(cosine(u, v) for v in b) for u in a) / n)
    assert recall == pytest.approx(sum(max(cosine(u, v) for u in a) for v in b) / m)


def test_the_baseline_of_random_pairs_becomes_zero() -> None:
    vectors = [np.array([[1.0, k]]) for k in range(4)]
    base = random_baseline(vectors)
    assert 0 < base < 1
    assert base == random_baseline(vectors)
    assert Rescaled(base)(base) == 0
    assert Rescaled(base)(1.0) == 1
