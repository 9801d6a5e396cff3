"""What is asked: three passes in the order of the rows, the same for the same seed, with the row in the prompt."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from data.asking.prompts import EMERGENCY, requests, symptom_subsets
from tests.data.rows import BARE, FLU, ROWS, STROKE


def test_passes_come_one_after_the_other() -> None:
    asked = list(requests(ROWS, 0, 2))
    assert [(r.about, r.entry.id) for r in asked] == [
        ("tests", 1),
        ("tests", 2),
        ("medications", 1),
        ("medications", 2),
        ("medications", 3),
        ("symptoms", 1),
        ("symptoms", 1),
        ("symptoms", 2),
        ("symptoms", 2),
        ("symptoms", 3),  # two symptoms have one subset
    ]
    assert not any(r.entry == BARE for r in asked)  # a row with one symptom and nothing else is asked nothing about


def test_the_row_is_in_the_prompt() -> None:
    for request in requests(ROWS, 0, 3):
        row = request.entry
        for text in (row.name, *row.synonyms, *row.symptoms, *row.tests, *row.medications):
            assert text in request.prompt
        assert all(s in request.prompt.split("Facts:")[0] for s in request.symptoms)
        assert "{" not in request.prompt
        assert (EMERGENCY in request.prompt) == (request.about == "symptoms" and row == STROKE)


def test_keys_follow_all_that_decides_a_reply() -> None:
    (request, *_) = requests([FLU], 0, 1)
    key = request.key("m", 0)
    assert key == request.key("m", 0)
    changed = [request.key("other", 0), request.key("m", 1)]
    for row in (replace(FLU, id=9), replace(FLU, tests=("Biopsy",))):
        changed.append(replace(request, entry=row).key("m", 0))
    assert len({key, *changed}) == 5
    every = [r.key("m", 0) for r in requests(ROWS, 0, 5)]
    assert len(set(every)) == len(every)


@given(st.integers(), st.integers(0, 12), st.integers(0, 8))
def test_subsets(seed: int, size: int, n: int) -> None:
    symptoms = tuple(f"s{i}" for i in range(size))

    def draw(n: int) -> list[tuple[str, ...]]:
        return list(symptom_subsets(random.Random(seed), symptoms, n))

    drawn = draw(n)
    assert len(drawn) <= n
    assert len({frozenset(d) for d in drawn}) == len(drawn)
    assert all(2 <= len(set(d)) == len(d) <= 5 and set(d) <= set(symptoms) for d in drawn)
    assert draw(n + 3)[: len(drawn)] == drawn
    if size >= 6:
        assert len(drawn) == n


def test_more_subsets_leave_the_first_ones_as_they_are() -> None:
    few, many = ([r.key("m", 0) for r in requests([FLU], 3, n) if r.about == "symptoms"] for n in (2, 5))
    assert many[:2] == few
    assert [r.prompt for r in requests([FLU], 4, 5)] != [r.prompt for r in requests([FLU], 3, 5)]


def test_a_row_has_its_own_draws() -> None:
    """Rows that are added or taken away change nothing for the others."""
    alone = {r.key("m", 0) for r in requests([STROKE], 0, 3)}
    assert alone == {r.key("m", 0) for r in requests(ROWS, 0, 3) if r.entry == STROKE}
