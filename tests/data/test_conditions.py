"""The table parses, is medically shaped as promised, and a malformed one is refused in one clear line."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from data.conditions import MIN_SYMPTOMS, Table, load_table, rank_by_symptoms, rank_by_text, read_symptoms

SYMPTOMS = "\n".join(f"s{i}: I have sign {i}; sign number {i} | I noticed sign {i}" for i in range(8)) + "\n"
BLOCK = """condition: a test fever
urgency: routine
symptoms: s0; s1; s2; s3; s4; s5
tests: a look
medications: rest
red flags: collapse
"""


@pytest.fixture(scope="module")
def table() -> Table:
    return load_table()


def write(folder: Path, conditions: str = BLOCK, symptoms: str = SYMPTOMS) -> Path:
    (folder / "conditions.txt").write_text(conditions, encoding="utf-8")
    (folder / "symptoms.txt").write_text(symptoms, encoding="utf-8")
    return folder


def test_table_is_large_and_every_symptom_has_wordings_on_both_sides(table: Table) -> None:
    assert len(table.conditions) >= 150
    used = {s for c in table.conditions for s in c.symptoms}
    assert used == set(table.symptoms)
    assert all(len(s.wordings) >= 3 and s.held_out for s in table.symptoms.values())


def test_no_wording_is_on_both_sides_or_in_two_symptoms(table: Table) -> None:
    wordings = [w.lower() for s in table.symptoms.values() for w in s.wordings + s.held_out]
    assert len(wordings) == len(set(wordings))


def test_any_two_conditions_share_less_than_half_of_their_symptoms(table: Table) -> None:
    shared = {(a.name, b.name): len(set(a.symptoms) & set(b.symptoms)) for a, b in combinations(table.conditions, 2)}
    assert max(shared.values()) <= 4, max(shared, key=lambda pair: shared[pair])


def test_most_triples_of_symptoms_name_one_condition(table: Table) -> None:
    triples = [t for c in table.conditions for t in combinations(c.symptoms, 3)]
    unique = sum(len(frozenset.intersection(*(table.owners[s] for s in t))) == 1 for t in triples)
    assert unique / len(triples) > 0.95


def test_every_condition_has_red_flags_and_no_dose(table: Table) -> None:
    for c in table.conditions:
        assert len(c.red_flags) >= 2, c.name
        assert not any(ch.isdigit() for m in c.medications for ch in m.replace("B12", "")), c.name


@pytest.mark.parametrize(
    "name",
    [
        "heart attack",
        "stroke",
        "anaphylaxis",
        "sepsis",
        "ectopic pregnancy",
        "meningitis",
        "pulmonary embolism",
        "appendicitis",
        "testicular torsion",
        "cauda equina syndrome",
        "diabetic ketoacidosis",
        "aortic dissection",
    ],
)
def test_emergencies_are_marked(table: Table, name: str) -> None:
    assert table.condition(name).urgency == "emergency"


def test_ranking(table: Table) -> None:
    ranked = rank_by_symptoms(table)(["painful urination", "frequent urination"])
    assert ranked[0][0].name == "urinary tract infection"
    assert ranked[0][1] > ranked[1][1]
    question = "Doctor, I have a burning pain when I pass urine and go very often."
    assert rank_by_text(table)(question)[0][0].name == "urinary tract infection"
    assert rank_by_text(table)("")[0][1] == 0


def test_article_is_not_part_of_the_name(tmp_path: Path) -> None:
    c = load_table(write(tmp_path)).conditions[0]
    assert (c.name, c.spoken, c.synonyms) == ("test fever", "a test fever", ())


def test_unknown_condition_is_named(table: Table) -> None:
    with pytest.raises(ValueError, match="'nosuch'"):
        table.condition("nosuch")


TWIN = BLOCK.replace("a test fever", "another fever")


@pytest.mark.parametrize(
    ("conditions", "line", "remedy"),
    [
        (BLOCK.replace("tests: a look", "test: a look"), 4, "with a key of"),
        (BLOCK.replace("tests: a look", "just words"), 4, "key: value"),
        (BLOCK.replace("tests: a look\n", ""), 1, "no 'tests' line"),
        (BLOCK.replace("tests: a look", "tests: a look;"), 4, "no semicolon at the end"),
        (BLOCK.replace("tests: a look", "tests: a look\ntests: more"), 5, "empty line between"),
        (BLOCK.replace("routine", "soonish"), 2, "emergency, urgent, routine"),
        (BLOCK.replace("routine", "routine\nfrequency: rare"), 3, "can only be common"),
        (BLOCK.replace("s5", "s9"), 3, "'s9' is not in symptoms.txt"),
        (BLOCK.replace("s5", "s4"), 3, "twice"),
        (BLOCK.replace("; s5", ""), 3, f"name {MIN_SYMPTOMS} to"),
        (BLOCK.replace("a test fever", "a fever; a cold"), 1, "one name"),
        (BLOCK + "\n" + BLOCK.replace("s5", "s6"), 8, "taken by line 1"),
        (BLOCK + "\n" + TWIN, 8, "tell them apart"),
    ],
)
def test_malformed_conditions_name_file_line_and_remedy(
    tmp_path: Path, conditions: str, line: int, remedy: str
) -> None:
    with pytest.raises(ValueError, match=r"conditions\.txt") as error:
        load_table(write(tmp_path, conditions))
    assert f"conditions.txt:{line}:" in str(error.value)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("no colon here", "is not `name: wording"),
        ("s9: a wording without a bar", "is not `name: wording"),
        ("s9: a; ; b | c", "empty value"),
        ("s9: a; b | ", "empty value"),
        ("s0: other | words", "stands twice"),
        ("s9: sign number 3 | new", "line 4 already"),
    ],
)
def test_malformed_symptoms_name_file_line_and_remedy(tmp_path: Path, line: str, remedy: str) -> None:
    path = write(tmp_path, symptoms=SYMPTOMS + line + "\n") / "symptoms.txt"
    with pytest.raises(ValueError, match=r"symptoms\.txt:9: ") as error:
        read_symptoms(path)
    assert remedy in str(error.value)


def test_missing_empty_and_binary_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the table"):
        load_table(tmp_path)
    with pytest.raises(ValueError, match="no conditions"):
        load_table(write(tmp_path, "# nothing\n"))
    (tmp_path / "symptoms.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_table(tmp_path)
