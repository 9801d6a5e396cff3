"""Facts of the table and of a database: names in brackets, one fact a name, placeholders."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.disease_sources import read_source
from data.diseases import build
from data.evaluation.knowledge import Fact, _merged, of_database, of_table


def test_the_table_and_its_lexicon() -> None:
    knowledge = of_table()
    assert len(knowledge.facts) > 200
    assert not knowledge.quarantined
    assert knowledge.placeholders is None
    found = knowledge.lexicon.find("You may have a UTI. Tests: a urine dipstick.")
    assert found == [("diseases", "urinary tract infection"), ("tests", "a urine dipstick")]


def test_two_rows_of_one_name_are_one_fact() -> None:
    one, two = Fact("Flu", "flu", (), ("a",), ("t",), ()), Fact("flu", "flu", ("f",), ("b", "a"), (), ("m",))
    assert _merged([one, two]) == (Fact("Flu", "flu", ("f",), ("a", "b"), ("t",), ("m",)),)


def test_chatdoctor_s_table(shared: Path, tmp_path: Path) -> None:
    """27 rows or more are poisoned; their placeholders are found under both of their names, and Air is not one."""
    build([read_source(shared / "data/chatdoctor/format_dataset.csv")], tmp_path / "d.db")
    knowledge = of_database(tmp_path / "d.db")
    assert len(knowledge.quarantined) >= 27
    assert len(knowledge.facts) + len(knowledge.quarantined) == 796
    placeholders = knowledge.placeholders
    assert placeholders is not None
    for text in (
        "You need a corneal transplant",
        "Transurethral resection of prostate",
        "a TURP",
        "grepafloxacin",
        "Raxar",
    ):
        assert placeholders.find(text), text
    for text in ("Get some fresh air", "Take penicillin", "blood test"):
        assert not placeholders.find(text), text
    assert knowledge.identity == of_database(tmp_path / "d.db").identity


def test_what_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("text")
    with pytest.raises(ValueError, match=r"x\.db: is not a disease database"):
        of_database(tmp_path / "x.db")
