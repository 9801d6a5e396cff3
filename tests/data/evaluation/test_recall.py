"""Closed-form recall: a model that knows the table, one that does not, and the floors."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.conditions import load_table
from data.evaluation import recall
from data.evaluation.knowledge import Fact, Knowledge, of_table
from data.evaluation.parts import Exposure

FACTS = tuple(
    Fact(
        f"disease{i}", f"a disease{i}", (), (f"sign{i}", f"sign{i + 1}", "fever"), (f"test{i}", "blood"), (f"drug{i}",)
    )
    for i in range(12)
)
KNOWLEDGE = Knowledge("made up", "0", FACTS)


def test_a_model_that_knows_ranks_first(oracle: object) -> None:
    def score(prompt: str, ending: str) -> float:
        asked = set(re.findall(r"sign\d+", prompt))
        name = re.search(r"disease\d+", ending)[0]  # type: ignore[index]
        return float(len(asked & {s for f in FACTS if f.name == name for s in f.symptoms}))

    oracle.score = score  # type: ignore[attr-defined]
    outcome = recall.diseases_part(KNOWLEDGE, None, None).run(oracle, Exposure())  # type: ignore[arg-type]
    found = {f.name: f for f in outcome.figures}
    assert found["recall.all.top1"].value == 1
    assert found["recall.all.mrr"].value == 1
    assert found["recall.all.top1"].floors["IDF of the true symptoms"] == 1
    assert found["recall.all.top5"].floors["chance"] == pytest.approx(5 / 12)
    assert found["recall.all.mrr"].floors["chance"] == pytest.approx(sum(1 / r for r in range(1, 13)) / 12)


def test_diseases_of_the_training_files_stand_apart(oracle: object) -> None:
    named = [i < 4 for i in range(12)]
    outcome = recall.diseases_part(KNOWLEDGE, None, None).run(oracle, Exposure([False] * 12, named))  # type: ignore[arg-type]
    counts = {f.name: f.n for f in outcome.figures if f.name.endswith("top1")}
    assert counts == {"recall.named_in_training.top1": 4, "recall.not_named_in_training.top1": 8}


def test_equal_scores_rank_in_order(oracle: object) -> None:
    """A model without knowledge is no better than the order of the names."""
    outcome = recall.diseases_part(KNOWLEDGE, None, None).run(oracle, Exposure())  # type: ignore[arg-type]
    assert [i["rank"] for i in outcome.items] == list(range(1, 13))


def test_r_precision(oracle: object) -> None:
    def score(prompt: str, ending: str) -> float:
        number = re.search(r"disease(\d+)", prompt)[1]  # type: ignore[index]
        return {f" test{number}": 2.0, " blood": 1.0}.get(ending, 0.0)

    oracle.score = score  # type: ignore[attr-defined]
    [f] = recall.lists_part("tests", KNOWLEDGE, None).run(oracle, Exposure()).figures  # type: ignore[arg-type]
    assert f.value == 1
    assert f.floors["chance"] == pytest.approx(2 / 13)
    assert f.floors["the commonest"] == 0.5
    assert f.floors["nearest disease by symptoms"] == 0.5
    [f] = recall.lists_part("medications", KNOWLEDGE, 6).run(oracle, Exposure()).figures  # type: ignore[arg-type]
    assert (f.n, f.floors["the commonest"]) == (6, pytest.approx(0.0))


def test_the_built_in_questions_are_seen_and_held_out() -> None:
    table = load_table()
    part = recall.diseases_part(of_table(table), table, 5)
    assert len(part.texts) == 15
    assert len(set(part.texts)) == 15


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_ranks_are_those_of_a_stable_sort(scores: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(scores) - 1))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert recall._rank(scores, place) == order.index(place) + 1
