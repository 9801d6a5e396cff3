"""The database is whole and the same for the same sources; a damaged one is refused; a search survives any text."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from data.diseases import DISEASE, KINDS, PASSAGE, SCHEMA, Database, open_database

ROOT = Path(__file__).resolve().parents[2]
TABLE = """idx,disease,Symptom,reason,TestsAndProcedures,commonMedications
0,Glaucoma,"['Pain in eye', 'Diminished vision', 'Eye redness']",It harms a nerve.,['Eye test'],['Timolol']
1,Gout,"['Joint pain', 'Foot or toe pain', 'Joint swelling']",It is a painful joint.,"['Uric acid']","['Colchicine']"
2,Broken,"['Joint pain', 'Foot",A list that is cut off.,"['None']","['None']"
3,GOUT,"['Joint pain']",The same again.,"['None']","['None']"
4,Influenza,"['Fever', 'Cough', 'Ache all over']",It comes in winter.,[],"['Rest']"
"""
PASSAGES = [
    {
        "id": "g1",
        "focus": "Gout",
        "question": "What is Gout ?",
        "answer": "Crystals in a joint.",
        "url": "https://x/gout",
    },
    {"id": "g2", "focus": "Influenza", "question": "What is Influenza ?", "answer": "A virus.", "url": "https://x/flu"},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "table.csv").write_text(TABLE)
    (folder / "passages.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PASSAGES))
    return [str(folder / "table.csv"), str(folder / "passages.jsonl")]


@pytest.fixture(scope="module")
def path(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "diseases.db"
    assert prepare.main(["diseases", *sources, str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def database(path: Path) -> Database:
    return open_database(path)


def named(database: Database, text: str, **options: object) -> list[str]:
    return [h.entry.name for h in database.search(text, **options)]  # type: ignore[arg-type]


def test_search_finds_by_symptoms_lay_words_and_name(database: Database) -> None:
    assert named(database, "my toe hurts and the joint is swollen")[0] == "Gout"
    assert named(database, "My eyesight got bad, with a sore red eye")[0] == "Glaucoma"
    assert named(database, "What helps against influenza?")[0] == "Influenza"
    hits = database.search("fever and cough")
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert hits[0].entry.id == 5  # rows before it were quarantined, and count
    assert [h.entry.name for h in database.by_symptoms(["joint pain", "FOOT OR TOE PAIN", "nosuch"])] == ["Gout"]


def test_passages_are_entries_with_their_url(database: Database) -> None:
    [hit] = database.search("what is gout", kind=PASSAGE)
    assert (hit.entry.id, hit.entry.kind, hit.entry.source_row) == (6, PASSAGE, "g1")
    assert (hit.entry.url, hit.entry.text) == ("https://x/gout", "What is Gout ?\nCrystals in a joint.")
    assert database.entry(6) == hit.entry
    with pytest.raises(ValueError, match="has no entry 99"):
        database.entry(99)


def test_quarantined_rows_stay_in_the_file_and_out_of_searches(database: Database) -> None:
    assert [(f.entry, f.source_row, f.name) for f in database.findings()] == [(3, "2", "Broken"), (4, "3", "GOUT")]
    assert database.findings()[0].reason.startswith("line 4: Symptom: broken list")
    assert "GOUT" not in named(database, "joint pain", limit=9)
    assert "GOUT" in named(database, "joint pain", limit=9, quarantined=True)
    assert database.entry(4).name == "GOUT"
    assert "GOUT" not in database.names("diseases")
    assert [f.reason for f in database.findings("noted")] == ["no tests"]


def test_names_are_the_lexicon(database: Database) -> None:
    assert {k: len(database.names(k)) for k in KINDS} == {"diseases": 3, "symptoms": 9, "tests": 2, "medications": 3}
    with pytest.raises(ValueError, match="'drugs': names are of"):
        database.names("drugs")


@pytest.mark.parametrize("text", ["", " \n", "the and of", "?!*", "zzzzqqq", "\0", "(((", "🤒"])
def test_a_search_for_nothing_finds_nothing(database: Database, text: str) -> None:
    assert database.search(text) == []
    assert database.search(text, kind=PASSAGE) == []
    assert database.by_symptoms([text]) == []


@pytest.mark.parametrize(
    "extra", ['"', "AND", "OR gout", "NEAR(", "* :", "- ^", "name : x", "'; DROP TABLE entry; --", "{", '""']
)
def test_signs_of_fts5_mean_nothing(database: Database, extra: str) -> None:
    for kind in (DISEASE, PASSAGE):
        for text in (f"gout {extra}", f"{extra} gout", f'"gout" {extra}*'):
            assert named(database, text, kind=kind)[0] == "Gout"


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_is_searched(database: Database, text: str) -> None:
    for kind in (DISEASE, PASSAGE):
        assert all(h.score > 0 for h in database.search(text, kind=kind))


@pytest.mark.parametrize("text", ["gout " * 200_000, "x" * 1_000_000, "gout " + "\ufdfa" * 1_000_000])
def test_a_question_of_a_megabyte_is_no_trouble(database: Database, text: str) -> None:
    assert named(database, text) == (["Gout"] if text.startswith("gout") else [])
    assert len(database.search(text, kind=PASSAGE)) == text.startswith("gout")


def test_threads_search_at_once(database: Database) -> None:
    found: list[list[str]] = []

    def ask() -> None:
        for _ in range(20):
            found.append(named(database, "joint pain")[:1] + named(database, "gout", kind=PASSAGE))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [["Gout", "Gout"]] * 120


def test_the_same_sources_make_the_same_file(sources: list[str], path: Path, tmp_path: Path) -> None:
    """In another process, whose sets are in another order."""
    command = [sys.executable, "-m", "data.prepare", "diseases", *sources, str(tmp_path / "again.db")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"}, stdout=subprocess.DEVNULL)
    assert (tmp_path / "again.db").read_bytes() == path.read_bytes()


def test_the_report_is_printed_and_written(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    for _ in range(2):  # a report takes the place of an earlier one
        assert prepare.main(["diseases", *sources, str(tmp_path / "x.db"), "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "[DB 3] table 2, Broken: line 4: Symptom: broken list" in printed
    written = json.loads(report.read_text())
    assert [(s["name"], s["rows"], s["quarantined"]) for s in written["sources"]] == [
        ("table", 5, 2),
        ("passages", 2, 0),
    ]
    assert [f["name"] for f in written["quarantined"]] == ["Broken", "GOUT"]


# --- what goes wrong ------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert prepare.main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ")
    assert "\n" not in err
    return err


def test_wrong_commands_are_one_line(
    sources: list[str], path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Path(sources[0])
    before = path.read_bytes()
    out = tmp_path / "x.db"
    assert "no command: give one of" in fails(capsys)
    assert "'sample'" in fails(capsys, "diseases", "nosuch.csv", out)
    assert "is a source" in fails(capsys, "diseases", table, table)
    (tmp_path / "link.csv").hardlink_to(table)
    assert "is a source" in fails(capsys, "diseases", table, tmp_path / "link.csv")
    assert "is a source" in fails(capsys, "diseases", table, out, "--report", table)
    assert "is the database" in fails(capsys, "diseases", table, out, "--report", out)
    assert "given twice" in fails(capsys, "diseases", table, table, out)
    assert "cannot be written" in fails(capsys, "diseases", table, table / "x.db")
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not a disease database" in fails(capsys, "diseases", table, tmp_path / "notes.txt")
    assert "is no report" in fails(capsys, "diseases", table, out, "--report", tmp_path / "notes.txt")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert "no column 'disease'" in fails(capsys, "diseases", tmp_path / "bad.csv", path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert table.read_text() == TABLE
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "link.csv", "notes.txt"]


def test_an_earlier_database_is_replaced_damaged_or_not(sources: list[str], tmp_path: Path) -> None:
    out = tmp_path / "x.db"
    for damage in (0, 60, 5000):
        assert prepare.main(["diseases", sources[0], str(out)]) == 0
        whole = out.read_bytes()
        out.write_bytes(whole[:damage] + b"\xff" * bool(damage) + whole[damage + bool(damage) : -damage or None])
    assert prepare.main(["diseases", sources[0], str(out)]) == 0
    assert out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["x.db"]


def test_what_is_no_database_is_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "x.db"
    with pytest.raises(ValueError, match=r"x\.db: cannot be read \(No such file"):
        open_database(other)
    with pytest.raises(ValueError, match="cannot be read"):
        open_database(tmp_path)
    for data in (b"", b"SQLite format 3\0", b"hello" * 100):
        other.write_bytes(data)
        with pytest.raises(ValueError, match=r"is not a disease database; make one with"):
            open_database(other)
    other.unlink()
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE entry (id)")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="SQLite file, but no disease database"):
        open_database(other)
    data = bytearray(path.read_bytes())
    data[60:64] = (SCHEMA + 1).to_bytes(4, "big")
    other.write_bytes(data)
    with pytest.raises(ValueError, match=rf"is of version {SCHEMA + 1}, this program reads {SCHEMA}; build it again"):
        open_database(other)


def test_every_truncation_is_noticed(path: Path, tmp_path: Path) -> None:
    data, cut = path.read_bytes(), tmp_path / "x.db"
    for size in range(100, len(data), 997):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is truncated"):
            open_database(cut)


def test_flipped_bytes_are_noticed_or_harmless(path: Path, tmp_path: Path) -> None:
    """Whatever byte changes: the answers are those of the whole file, or one line says that the file is damaged."""
    data, file = path.read_bytes(), tmp_path / "x.db"

    def answers(p: Path) -> list[object]:
        d = open_database(p)
        entries = [d.entry(i) for i in range(1, 8)]
        return [
            d.search("fever cough"),
            d.search("gout", kind=PASSAGE),
            d.by_symptoms(["Joint pain"]),
            entries,
            d.names("tests"),
        ]

    right, draw, noticed = answers(path), random.Random(0), 0
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 8, 64))):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        try:
            found = answers(file)
        except ValueError as e:
            noticed += 1
            assert str(e).startswith(f"{file}: ")  # noqa: PT017
            assert "\n" not in str(e)  # noqa: PT017
            continue
        assert found[3:] == right[3:]  # no entry comes back changed
    assert noticed > 20
