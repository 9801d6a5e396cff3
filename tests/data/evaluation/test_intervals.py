"""Intervals and McNemar's test: known values, and what holds for any scores."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.evaluation.intervals import bootstrap, bootstrap_difference, mcnemar, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (15, 15, 0.7961, 1.0)],
)
def test_wilson_is_the_textbook_s(k: int, n: int, low: float, high: float) -> None:
    """81 of 263: Newcombe 1998, table I; the others by R's prop.test(correct = FALSE)."""
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_stays_inside(pair: tuple[int, int]) -> None:
    k, n = pair
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))
    wider = wilson(k, n)[1] - wilson(k, n)[0]
    assert wilson(4 * k, 4 * n)[1] - wilson(4 * k, 4 * n)[0] < wider


SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(SCORES)
def test_bootstrap_stays_between_the_scores_and_repeats(scores: list[float]) -> None:
    ones = [1.0] * len(scores)
    low, high = bootstrap(scores, ones)
    assert min(scores) - 1e-9 <= low <= high <= max(scores) + 1e-9
    assert (low, high) == bootstrap(scores, ones)


@settings(max_examples=25, deadline=None)
@given(SCORES, st.floats(-1, 1))
def test_a_constant_difference_has_no_width(scores: list[float], shift: float) -> None:
    ones = [1.0] * len(scores)
    low, high = bootstrap_difference([s + shift for s in scores], ones, scores, ones)
    assert (low, high) == pytest.approx((shift, shift), abs=1e-9)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 2000)
    low, high = bootstrap(values.tolist(), [1.0] * 2000)
    half = 1.96 * values.std() / 2000**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_documents_stay_together() -> None:
    """One long document among short ones: a ratio of sums, not a mean of ratios."""
    sums, counts = [100.0, *[0.0] * 9], [100.0, *[1.0] * 9]
    low, high = bootstrap(sums, counts)
    assert low == 0
    assert high > 0.9


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_is_the_exact_binomial_s(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    b, c = sum(a and not t for a, t in pairs), sum(t and not a for a, t in pairs)
    n = b + c
    expected = min(1.0, 2 * sum(comb(n, i) for i in range(min(b, c) + 1)) / 2**n) if n else 1.0
    assert mcnemar(ours, theirs) == pytest.approx(expected)
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours)
