"""What counts as naming the right condition, and the retrieval ceiling."""

from __future__ import annotations

import random

import pytest

from data.conditions import Table, load_table
from data.metrics import naming, retrieval_ceiling, share_named_right
from data.synthesize import answer, examples


@pytest.fixture(scope="module")
def table() -> Table:
    return load_table()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("This sounds like a heart attack.", "heart attack"),
        ("You may have a UTI.", "urinary tract infection"),
        ("Myocardial infarction is likely.", "heart attack"),
        ("This sounds like acute glaucoma.", "acute glaucoma"),
        ("Type 2 diabetes.", "type 2 diabetes"),
        ("Your symptoms suggest COVID-19.", "COVID-19"),
        ("You may have angina. A heart attack is possible too.", "angina"),
        ("This sounds like strokes of luck.", None),
        ("", None),
    ],
)
def test_naming(table: Table, text: str, name: str | None) -> None:
    assert naming(table)(text) == name


def test_every_answer_of_the_generator_names_its_condition(table: Table) -> None:
    named = naming(table)
    for c in table.conditions:
        assert all(named(answer(random.Random(seed), c)) == c.name for seed in range(12)), c.name


def test_share_counts_another_name_first_as_wrong(table: Table) -> None:
    two = list(examples(table, 0, 2))
    wrong = f"This sounds like {two[0].condition}, not {two[1].condition}."
    assert share_named_right(table, two, [two[0].answer, wrong]) == 0.5


def test_retrieval_ceiling_is_far_above_what_is_asked_of_the_model(table: Table) -> None:
    by_symptoms, by_text = retrieval_ceiling(table, list(examples(table, 0, 214, "held_out")))
    assert by_symptoms > 0.99
    assert by_text > 0.95
    _, by_unseen_text = retrieval_ceiling(table, list(examples(table, 0, 214, "unseen_wordings")))
    assert by_unseen_text > 0.8
