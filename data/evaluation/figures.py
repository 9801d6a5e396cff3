"""A measured figure with what makes it honest: floors, n, a 95 % interval, contaminated items, a protocol hash.

Every part of evaluate.py makes its figures here, out of one score per item, so that none can lack any of these.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from data.evaluation.intervals import Interval, bootstrap, bootstrap_difference, mcnemar, wilson

SIGNIFICANT = 0.05
Standing = Literal["better than floor", "indistinguishable from floor", "worse than floor", "not compared"]


@dataclass(frozen=True)
class Scores:
    """One score per item, as a sum and a count: the figure is the ratio of their totals.

    A plain mean has counts of 1. A perplexity has a document's loss and its tokens, a precision has what was right and
    what was named.
    """

    sums: Sequence[float]
    counts: Sequence[float]

    @staticmethod
    def of(values: Sequence[float]) -> Scores:
        """The mean of these."""
        return Scores([float(v) for v in values], [1.0] * len(values))

    @property
    def value(self) -> float:
        total = math.fsum(self.counts)
        return math.fsum(self.sums) / total if total else 0.0

    @property
    def binary(self) -> bool:
        return all(c == 1 for c in self.counts) and all(s in (0, 1) for s in self.sums)

    def interval(self) -> Interval:
        """Wilson's where every item is right or wrong, else the bootstrap's."""
        if self.binary:
            return wilson(sum(self.sums), len(self.sums))
        return bootstrap(self.sums, self.counts)

    def only(self, keep: Sequence[bool]) -> Scores:
        pairs = [(s, c) for s, c, k in zip(self.sums, self.counts, keep, strict=True) if k]
        return Scores([s for s, _ in pairs], [c for _, c in pairs])


Floor = Scores | float  # what a constant answer, the nearest neighbour or chance reaches; scores of the same items


@dataclass(frozen=True)
class Figure:
    """One line of the card. `floor` is the best of the floors, and what `standing` is about."""

    name: str
    value: float
    n: int
    interval: Interval
    unit: str  # "share" (shown in %), "bits", "nats", "score", ...
    better: Literal["higher", "lower", "neither"]
    floors: Mapping[str, float]
    floor: float | None
    floor_name: str
    standing: Standing
    contaminated: int | None  # None: nothing says what the model was trained on
    clean_value: float | None  # over the items that are not contaminated
    protocol: str
    note: str = ""
    groups: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # of subject or disease: value, n

    @property
    def indistinguishable_from_floor(self) -> bool:
        return self.standing == "indistinguishable from floor"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "indistinguishable_from_floor": self.indistinguishable_from_floor}

    @staticmethod
    def from_json(d: Mapping[str, Any]) -> Figure:
        given = {k: v for k, v in d.items() if k != "indistinguishable_from_floor"}
        given["interval"] = tuple(given["interval"])
        given["groups"] = {k: (v, n) for k, (v, n) in given["groups"].items()}
        return Figure(**given)


def figure(
    name: str,
    scores: Scores,
    *,
    protocol: str,
    floors: Mapping[str, Floor] | None = None,
    better: Literal["higher", "lower", "neither"] = "higher",
    unit: str = "share",
    contaminated: Sequence[bool] | None = None,
    groups: Sequence[str] | None = None,
    note: str = "",
) -> Figure:
    """A figure of these scores. floors: by name; contaminated, groups: one per item."""
    assert len(scores.sums) > 0, name
    floors = floors or {}
    values = {k: f.value if isinstance(f, Scores) else float(f) for k, f in floors.items()}
    best, standing = "", "not compared"
    if values and better != "neither":
        best = (max if better == "higher" else min)(values, key=lambda k: values[k])
        standing = against(scores, floors[best], better)
    clean = [not c for c in contaminated] if contaminated is not None else []
    return Figure(
        name=name,
        value=scores.value,
        n=len(scores.sums),
        interval=scores.interval(),
        unit=unit,
        better=better,
        floors=values,
        floor=values.get(best),
        floor_name=best,
        standing=standing,
        contaminated=None if contaminated is None else sum(contaminated),
        clean_value=scores.only(clean).value if any(clean) else None,
        protocol=protocol,
        note=note,
        groups=_grouped(scores, groups) if groups is not None else {},
    )


def transformed(f: Figure, name: str, change: Callable[[float], float], unit: str, note: str) -> Figure:
    """The same figure through an increasing function: a perplexity of a loss."""
    return replace(
        f,
        name=name,
        unit=unit,
        note=note,
        value=change(f.value),
        interval=(change(f.interval[0]), change(f.interval[1])),
        floors={k: change(v) for k, v in f.floors.items()},
        floor=None if f.floor is None else change(f.floor),
        clean_value=None if f.clean_value is None else change(f.clean_value),
        groups={k: (change(v), n) for k, (v, n) in f.groups.items()},
    )


def against(scores: Scores, floor: Floor, better: Literal["higher", "lower"]) -> Standing:
    """Where scores stand to a floor at 95 %: McNemar's test for right and wrong, else a bootstrap of the difference.

    A floor that is a number (chance) is compared with the interval.
    """
    if isinstance(floor, Scores) and scores.binary and floor.binary:
        apart = mcnemar([s == 1 for s in scores.sums], [s == 1 for s in floor.sums]) < SIGNIFICANT
        difference = scores.value - floor.value
    elif isinstance(floor, Scores):
        low, high = bootstrap_difference(scores.sums, scores.counts, floor.sums, floor.counts)
        apart, difference = not low <= 0 <= high, scores.value - floor.value
    else:
        low, high = scores.interval()
        apart, difference = not low <= floor <= high, scores.value - floor
    if not apart:
        return "indistinguishable from floor"
    return "better than floor" if (difference > 0) == (better == "higher") else "worse than floor"


def _grouped(scores: Scores, groups: Sequence[str]) -> dict[str, tuple[float, int]]:
    found = {}
    for group in dict.fromkeys(groups):
        mine = scores.only([g == group for g in groups])
        found[group] = (mine.value, len(mine.sums))
    return found


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of what was asked and how it is scored; equal hashes are comparable figures."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
