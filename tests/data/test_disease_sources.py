"""Tables and passages are read whole, and what is broken is named by file, line and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.conditions import SAMPLE
from data.disease_sources import DISEASE, PASSAGE, find_source, mend, parse_list, read_source

HEADER = "idx,disease,Symptom,reason,TestsAndProcedures,commonMedications\n"
GOOD = """7,Test fever,"['Fever', 'Chills']","A fever made for tests, described.","['Blood test']","['Rest']"\n"""


def table(folder: Path, *lines: str, header: str = HEADER, encoding: str = "utf-8") -> Path:
    path = folder / "table.csv"
    path.write_bytes((header + "".join(lines)).encode(encoding))
    return path


def test_a_row_is_read_as_it_stands(tmp_path: Path) -> None:
    source = read_source(table(tmp_path, GOOD))
    assert (source.name, source.kind, source.file) == ("table", DISEASE, "table.csv")
    [row] = source.rows
    assert (row.place, row.line, row.name, row.fault) == ("7", 2, "Test fever", "")
    assert (row.symptoms, row.tests, row.medications) == (("Fever", "Chills"), ("Blood test",), ("Rest",))


def test_the_names_of_the_api_variant_are_known(tmp_path: Path) -> None:
    header = "idx,disease,Symptom,Medical Tests,Medications\n"
    [row] = read_source(table(tmp_path, "0,Cold,['Cough'],['None'],['Tea']\n", header=header)).rows
    assert (row.tests, row.medications, row.text) == (("None",), ("Tea",), "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("""1,Cold,"['Cough', 'Fever","A.",[],[]\n""", "line 3: Symptom: broken list \"['Cough', 'Fever\""),
        ("1,Cold,Cough,A.,[],[]\n", "broken list 'Cough'"),
        ("1,Cold,{'a': 1},A.,[],[]\n", "not a list of texts"),
        ("1,Cold,[1],A.,[],[]\n", "not a list of texts"),
        ("""1,Cold,"__import__('os').system('false')",A.,[],[]\n""", "broken list"),
        (f"1,Cold,{'[' * 5000},A.,[],[]\n", "broken list"),
        ("1,Cold,['Cough'],A.,[]\n", "5 fields where the header has 6"),
        ("1,Cold,['Cough'],A.,[],[],more\n", "7 fields where the header has 6"),
        ("1,,['Cough'],A.,[],[]\n", "no disease name"),
        ("1,Cold,['Cough'],A.,[oops],[]\n", "TestsAndProcedures: broken list"),
    ],
)
def test_a_broken_row_is_kept_with_its_fault(tmp_path: Path, line: str, reason: str) -> None:
    good, bad, after = read_source(table(tmp_path, GOOD, line, GOOD)).rows
    assert reason in bad.fault
    assert bad.fault.startswith("line 3: ")
    assert not good.fault
    assert not after.fault


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "table.csv:1: no column 'disease'"),
        (b"idx,name,Symptom\n", "table.csv:1: no column 'disease' (there are idx, name, Symptom)"),
        (b"disease,reason\n", "table.csv:1: no column 'Symptom'"),
        (b"disease,Symptom,disease\n", "'disease' stands twice"),
        (HEADER.encode(), "a header and no rows"),
        (HEADER.encode() + b"1,Caf\xe9,['Cough'],A.,[],[]\n", "table.csv:2: not UTF-8 (byte 0xe9)"),
        ((HEADER + GOOD).encode("utf-16"), "not UTF-8"),
        (HEADER.encode() + b"1,Cold,\"['Cough']\" x,A.,[],[]\n", "table.csv:2: broken CSV"),
        (HEADER.encode() + b"1,Cold,\"['Cough'],A.,[],[]\n" + b"x" * 200_000, "broken CSV"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "table.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"table\.csv") as error:
        read_source(tmp_path / "table.csv")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = table(tmp_path, GOOD.replace("\n", "\r\n"), header="\ufeff" + HEADER.replace("\n", "\r\n"))
    assert read_source(path).rows[0].name == "Test fever"


@given(st.lists(st.text()))
def test_a_list_comes_back_from_its_repr(texts: list[str]) -> None:
    assert parse_list(repr(texts)) == tuple(dict.fromkeys(t for t in map(mend, texts) if t))


@given(st.text())
def test_no_text_breaks_the_reading_of_a_list(text: str) -> None:
    line = ""
    try:
        parse_list(text)
    except ValueError as e:
        line = str(e)
    assert "\n" not in line


def test_escaped_bytes_are_mended() -> None:
    assert mend(r"Caf\xc3\xa9 and Devil\\'S Claw\n  twice") == "Café and Devil'S Claw twice"


def test_half_characters_go() -> None:
    assert mend("a\ud800b\0c") == "ab c"


def test_passages_keep_their_url_and_their_faults(tmp_path: Path) -> None:
    records = [
        {
            "id": "a-1",
            "focus": "Gout",
            "question": "What is Gout ?",
            "answer": "A  pain.\nIn toes.",
            "url": "https://x/y",
        },
        {"focus": "", "question": "What is it ?", "answer": "Something."},
        {"focus": "Gout", "answer": " "},
        {"focus": "Gout", "answer": "A pain.", "url": "javascript:alert(1)"},
        ["no object"],
    ]
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"focus": "Gout", "answer"\n')
    source = read_source(path)
    assert source.kind == PASSAGE
    rows = source.rows
    assert (rows[0].place, rows[0].url, rows[0].text) == ("a-1", "https://x/y", "What is Gout ?\nA pain. In toes.")
    assert (rows[1].name, rows[1].fault) == ("What is it ?", "")
    faults = ["no text in 'answer'", "the url is 'javascript", "not an object", "not valid JSON"]
    assert all(fault in row.fault for fault, row in zip(faults, rows[2:], strict=True))
    assert rows[2].fault.startswith("line 3: ")


def test_the_own_table_is_a_source() -> None:
    source = read_source(find_source("sample"))
    assert (source.name, source.kind) == ("sample", DISEASE)
    row = next(r for r in source.rows if r.name == "heart attack")
    assert row.urgency == "emergency"
    assert row.text.startswith("Go to an emergency department in case of ")
    held_out = {line.partition("|")[2].strip() for line in (SAMPLE / "symptoms.txt").read_text().splitlines()}
    assert not held_out & {w for _, wordings in source.wordings for w in wordings}


def test_what_is_no_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nosuch\.csv: does not exist"):
        find_source(str(tmp_path / "nosuch.csv"))
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"table.xlsx: is none of a .csv"):
        read_source(tmp_path / "table.xlsx")
    with pytest.raises(ValueError, match="cannot read the table"):
        read_source(tmp_path)
