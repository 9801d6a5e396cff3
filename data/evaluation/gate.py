"""Whether a model has become worse: two evaluations, figure by figure. evaluate.py --against calls it.

A figure is worse when it lies beyond the earlier one's 95 % interval, on the bad side. One that was measured before and
is no longer there is worse too, and so is one by another protocol, for nothing can be said of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.evaluation.card import figures_of, shown
from data.evaluation.figures import Figure


@dataclass(frozen=True)
class Change:
    """One figure before and after; None: not measured. verdict: "worse", "better", "as before", "new" or "missing"."""

    part: str
    name: str
    before: Figure | None
    after: Figure | None
    verdict: str


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Two results.json, figure by figure, in the order of the earlier one; figures that are no better or worse left
    out."""
    old, new = _by_name(before), _by_name(after)
    names = [*old, *(key for key in new if key not in old)]
    changes = [Change(*key, old.get(key), new.get(key), _verdict(old.get(key), new.get(key))) for key in names]
    return [c for c in changes if c.verdict]


def _by_name(results: Mapping[str, Any]) -> dict[tuple[str, str], Figure]:
    return {(part["name"], f.name): f for part in results["parts"] for f in figures_of(part)}


def _verdict(before: Figure | None, after: Figure | None) -> str:
    figure = before or after
    assert figure is not None
    if figure.better == "neither":
        return ""
    if before is None or after is None:
        return "new" if before is None else "missing"
    if before.protocol != after.protocol:
        return "missing"
    low, high = before.interval
    worse, better = (after.value < low, after.value > high)[:: 1 if before.better == "higher" else -1]
    return "worse" if worse else "better" if better else "as before"


def refused(changes: list[Change]) -> list[Change]:
    """Those that keep a model from being published."""
    return [c for c in changes if c.verdict in ("worse", "missing")]


def table(changes: list[Change]) -> str:
    """Before, its interval, and after, a line for each figure."""
    rows = [("figure", "before", "95 % interval", "after", "")]
    for c in changes:
        before, interval = ("-", "-") if c.before is None else _shown(c.before)
        rows.append(
            (f"{c.part}: {c.name}", before, interval, "-" if c.after is None else _shown(c.after)[0], c.verdict)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _shown(f: Figure) -> tuple[str, str]:
    low, high = f.interval
    return shown(f.value, f.unit), f"{shown(low, f.unit)} to {shown(high, f.unit)}"
