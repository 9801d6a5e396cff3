"""How sure a measured figure is: 95 % intervals and whether two sets of answers to the same questions differ.

figures.py puts these beside every value that evaluate.py reports. Numbers only; seeded, so that the same scores have
the same interval on every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5 % point
RESAMPLES = 2000
_AT_A_TIME = 1 << 22  # counts drawn at once: 32 MiB

Interval = tuple[float, float]


def wilson(successes: float, n: int) -> Interval:
    """Wilson's 95 % interval of a proportion (JASA 22, 1927); unlike p +- z s it stays in 0..1 at both ends."""
    assert 0 <= successes <= n, (successes, n)
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, Z * Z / n
    middle, half = p + zz / 2, Z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (middle - half) / (1 + zz), (middle + half) / (1 + zz)
    return (0.0 if successes == 0 else low, 1.0 if successes == n else high)


def bootstrap(sums: Sequence[float], counts: Sequence[float], seed: int = 0) -> Interval:
    """The 95 % percentile interval of sum(sums) / sum(counts), items drawn with replacement.

    Items are what is independent: a document brings its sum and its count, so that tokens of one document stay
    together. With counts of 1 it is the interval of a mean.
    """
    ratios = _resampled(np.asarray([sums, counts], float), seed)
    low, high = np.quantile(ratios[0] / ratios[1], (0.025, 0.975))
    return float(low), float(high)


def bootstrap_difference(
    ours: Sequence[float],
    our_counts: Sequence[float],
    theirs: Sequence[float],
    their_counts: Sequence[float],
    seed: int = 0,
) -> Interval:
    """The same for the difference of two such ratios over the same items, which are drawn together."""
    a, b, c, d = _resampled(np.asarray([ours, our_counts, theirs, their_counts], float), seed)
    low, high = np.quantile(a / b - c / d, (0.025, 0.975))
    return float(low), float(high)


def _resampled(columns: np.ndarray, seed: int) -> np.ndarray:
    """Sums of each row of `columns` over items drawn with replacement, once per resample.

    A draw that leaves a denominator at 0 tells nothing of its ratio: the item sums are smoothed away from 0 by a tiny
    amount, which gives 0 / tiny = 0.
    """
    n = columns.shape[1]
    assert n > 0
    rng = np.random.default_rng(seed)
    parts = []
    step = max(1, _AT_A_TIME // n)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=size)
        parts.append(columns @ drawn.T)
    sums = np.concatenate(parts, axis=1)
    sums[1::2] = np.maximum(sums[1::2], 1e-12)
    return sums


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """The two-sided exact p of McNemar's test: do two ways to answer the same questions differ in accuracy?"""
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    n, k = only_ours + only_theirs, min(only_ours, only_theirs)
    if n == 0:
        return 1.0
    log_half = -n * math.log(2)
    terms = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half for i in range(k + 1))
    return min(1.0, 2 * math.fsum(math.exp(t) for t in terms))
