"""data/evaluation/gate.py: what is worse keeps a model back, what is better or noise does not."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from data.evaluation.figures import Scores, figure
from data.evaluation.gate import compare, refused, table

Better = Literal["higher", "lower", "neither"]


def results(
    right: int, of: int = 100, better: Better = "higher", protocol: str = "p", name: str = "acc"
) -> dict[str, Any]:
    scores = Scores.of([1.0] * right + [0.0] * (of - right))
    made = figure(name, scores, protocol=protocol, better=better)
    return {"parts": [{"name": "medqa", "figures": [made.to_json()]}]}


@pytest.mark.parametrize(
    ("after", "better", "verdict"),
    [
        (50, "higher", "as before"),
        (45, "higher", "as before"),  # Wilson's interval of 50 in 100 is .404 to .596
        (40, "higher", "worse"),
        (60, "higher", "better"),
        (60, "lower", "worse"),
        (40, "lower", "better"),
    ],
)
def test_beyond_the_interval_on_the_bad_side(after: int, better: Better, verdict: str) -> None:
    (change,) = compare(results(50, better=better), results(after, better=better))
    assert change.verdict == verdict
    assert bool(refused([change])) == (verdict == "worse")


def test_what_cannot_be_compared_is_refused() -> None:
    (other_protocol,) = compare(results(50), results(90, protocol="q"))
    gone, new = compare(results(50), results(50, name="other"))
    assert [c.verdict for c in (other_protocol, gone, new)] == ["missing", "missing", "new"]
    assert refused([other_protocol, gone, new]) == [other_protocol, gone]


def test_figures_without_a_good_side_are_left_out() -> None:
    assert compare(results(50, better="neither"), results(0, better="neither")) == []


def test_the_table_names_both_values() -> None:
    text = table(compare(results(50), results(40)))
    assert text.splitlines()[1].split() == [
        "medqa:",
        "acc",
        "50.0",
        "%",
        "40.4",
        "%",
        "to",
        "59.6",
        "%",
        "40.0",
        "%",
        "worse",
    ]
