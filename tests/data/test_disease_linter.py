"""The linter finds padding, doubles and what is no drug, by what they are; measured on the table that has them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data.disease_linter import NOT_MEDICATIONS, RUN_ROWS, lint, padding_runs, read_reasons
from data.disease_sources import DISEASE, PASSAGE, Row, Source, find_source, read_source

# What a person found in format_dataset.csv (at least half placeholder), before there was a linter.
POISONED = {
    *("Congenital rubella", "Lead poisoning", "Dengue fever", "West Nile virus", "Leishmaniasis", "Chagas disease"),
    *("Scurvy", "Chancroid", "Vitamin A deficiency", "Rabies", "Fat embolism", "Leptospirosis", "Typhoid fever"),
    *("Trichinosis", "Pick disease", "Blastomycosis", "Sporotrichosis", "Meckel diverticulum", "Malaria", "Mumps"),
    *("Cytomegalovirus infection", "Reactive arthritis", "Gas gangrene", "Lymphogranuloma venereum", "Air embolism"),
    *("Hemorrhagic fever", "Rocky Mountain spotted fever"),
}
FILLER = tuple(f"filler {i}" for i in range(6))


def source(rows: list[Row], kind: str = DISEASE) -> Source:
    return Source("t", kind, "t.csv", "", tuple(rows))


def row(number: int, **fields: object) -> Row:
    draw = random.Random(number)
    own = {k: tuple(f"{k} {i}" for i in draw.sample(range(40), 6)) for k in ("symptoms", "tests", "medications")}
    text = f"Disease number {number} is described here at some length."
    given = {"place": str(number), "line": number + 2, "name": f"disease {number}", "text": text}
    return Row(**{**given, **own, **fields})  # type: ignore[arg-type]


def test_rows_without_padding_are_left_alone() -> None:
    rows = [row(i) for i in range(60)]
    checked = lint(source(rows))
    assert [c.row for c in checked] == rows
    assert not any(c.quarantine or c.removed or c.notes for c in checked)


def test_mostly_padded_rows_are_quarantined_whole_and_others_lose_the_padding() -> None:
    rows = [row(i) for i in range(60)]
    rows += [row(i, tests=FILLER, medications=FILLER) for i in range(60, 60 + RUN_ROWS)]
    rows += [row(99, tests=(*row(99).tests, *FILLER[:2]))]
    checked = lint(source(rows))
    assert [bool(c.quarantine) for c in checked] == [False] * 60 + [True] * RUN_ROWS + [False]
    assert checked[60].quarantine == "12 of its 12 tests and medications are padding that many unrelated rows share"
    assert checked[60].row.medications == FILLER  # kept as evidence
    assert checked[-1].row.tests == row(99).tests
    assert checked[-1].removed == ["tests: 2 of 8 are padding: filler 0; filler 1"]


def test_what_many_rows_share_out_of_order_or_often_is_no_padding() -> None:
    common = ("blood count", "glucose", "electrolytes")  # together in every ninth row, and in the others apart
    rows = [row(i, tests=(*(common if i % 9 == 0 else common[i % 3 :][:1]), *row(i).tests)) for i in range(120)]
    assert not padding_runs(rows)["tests"]


@pytest.mark.parametrize(
    ("fields", "attribute", "reason"),
    [
        ({"symptoms": ()}, "quarantine", "no symptoms"),
        ({"fault": "line 9: broken"}, "quarantine", "line 9: broken"),
        ({"tests": ()}, "notes", "no tests"),
        ({"medications": ()}, "notes", "no medications"),
        ({"text": "bacitracin (septa),"}, "removed", "not a description: bacitracin"),
        ({"text": row(1).text}, "notes", "2 rows have this text"),
        ({"text": "It is a disease of the"}, "notes", "breaks off"),
        ({"medications": ("Air", "Rest")}, "removed", "Air: not a drug"),
        ({"medications": ("Grepafloxacin (Raxar)",)}, "removed", "withdrawn in 1999"),
        ({"name": "DISEASE 1"}, "quarantine", "stands in row 1 already"),
    ],
)
def test_each_fault_has_its_reason(fields: dict[str, object], attribute: str, reason: str) -> None:
    checked = lint(source([row(1), row(2, **fields)]))
    found = getattr(checked[1], attribute)
    assert reason in (found if isinstance(found, str) else " ".join(found))
    assert not checked[0].quarantine


def test_passages_are_not_held_to_a_tables_rules() -> None:
    passages = [Row(str(i), i, "Gout", text="What is gout ?") for i in range(3)]
    assert not any(c.quarantine or c.removed or c.notes for c in lint(source(passages, PASSAGE)))


def test_the_own_table_is_clean() -> None:
    assert not any(c.quarantine or c.removed for c in lint(read_source(find_source("sample"))))


def test_reasons_are_checked(tmp_path: Path) -> None:
    assert read_reasons(NOT_MEDICATIONS)["air"] == "not a drug"
    (tmp_path / "x.txt").write_text("# fine\nair\n")
    with pytest.raises(ValueError, match=r"x\.txt:2: 'air' is not"):
        read_reasons(tmp_path / "x.txt")


def test_the_poison_of_format_dataset_is_found(shared: Path) -> None:
    checked = lint(read_source(shared / "data/chatdoctor/format_dataset.csv"))
    found = {c.row.name for c in checked if c.quarantine}
    recall, precision = len(found & POISONED) / len(POISONED), len(found & POISONED) / len(found)
    print(f"recall {recall:.2f}, precision {precision:.2f}: beside the list {sorted(found - POISONED)}")
    assert recall == 1
    assert precision >= 0.7  # 11 others: two fifths to three quarters of their tests and drugs are the same padding
    kept = [c.row for c in checked if not c.quarantine]
    assert not any("Air" in r.medications or "Coronary thrombolysis" in r.tests for r in kept)
    assert any("Malathion Topical" in r.medications for r in kept if r.name == "Lice")  # where it belongs
