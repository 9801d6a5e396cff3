"""Grounded samples: the answer is in the rows, the rows are disguised, and held-out questions stay held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.diseases import Database
from data.grounded_samples import LARGEST_ID, NO_ENTRY, Mix, grounded, main, sample_database
from data.grounding import Names, cited_ids, with_rows
from data.records import read_records


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return sample_database(tmp_path_factory.mktemp("sample"))


def test_answers_rest_on_the_row_that_they_cite(database: Database) -> None:
    names = Names(database)
    samples = list(grounded(database, 3, 300))
    without = [s for s in samples if s.right is None]
    assert 0 < len(without) < 100
    assert {s.answer for s in without} == {NO_ENTRY}
    for s in samples:
        if s.right is not None:
            assert s.right in s.rows
            assert cited_ids(s.answer) == [s.right.id]
            assert names.unsourced(s.answer, [s.right]) == []
            assert s.right.name in s.answer
        assert s.messages()[0]["content"] == with_rows(s.question, s.rows)


def test_rows_are_disguised(database: Database) -> None:
    samples = list(grounded(database, 3, 300))
    own = {database.entry(i + 1).name: database.entry(i + 1) for i in range(len(database.names("diseases")) // 4)}
    rows = [r for s in samples for r in s.rows]
    assert len({r.id for r in rows}) > 0.95 * len(rows)
    assert max(r.id for r in rows) <= LARGEST_ID
    known = [r for r in rows if r.name in own]
    assert any(r.tests != own[r.name].tests for r in known)
    assert any(r.symptoms != own[r.name].symptoms for r in known)
    firsts = [s.rows[0] == s.right for s in samples if s.right and len(s.rows) > 1]
    assert 0.4 < sum(firsts) / len(firsts) < 0.9


def test_they_are_a_function_of_the_seed(database: Database) -> None:
    assert list(grounded(database, 5, 20)) == list(grounded(database, 5, 20))
    assert list(grounded(database, 5, 20)) != list(grounded(database, 6, 20))


def test_a_mix_without_disguise_shows_the_table(database: Database) -> None:
    plain = Mix(no_rows=0, no_fit=0, fewer=0, shuffled=0, swapped_facts=0, swapped_rows=0)
    for s in grounded(database, 1, 50, "held_out", plain):
        assert s.right is not None
        assert (
            s.right.tests
            == next(h.entry for h in database.search(s.right.name, 20) if h.entry.name == s.right.name).tests
        )


def test_conditions_can_be_left_out(database: Database, tmp_path: Path) -> None:
    shorter = sample_database(tmp_path, ("gout",))
    assert "gout" in database.names("diseases")
    assert "gout" not in shorter.names("diseases")
    assert [h.entry.id for h in shorter.search("asthma", 1)] == [h.entry.id for h in database.search("asthma", 1)]


def test_the_file_is_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "g.jsonl"
    assert main(["--grounded", "20", "--plain", "10", "--output", str(out)]) == 0
    records = list(read_records(out, instruction=""))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [[m.content for m in r.dialogue.messages] for r in records] == [
        [m["content"] for m in line["messages"]] for line in lines
    ]
    assert "20 of them grounded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--grounded", "0", "--output", "x.jsonl"], "at least 1"), (["--output", "/nowhere/x.jsonl"], "cannot write")],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err
