"""Streaming JSON: the same records as json.load, whatever the chunks; faults placed; bounded reading."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import stream
from data.stream import Item, read_items

ROOT = Path(__file__).resolve().parents[2]


# Peak memory of a child: VmHWM, because ru_maxrss starts from that of the process that forked it.
PEAK = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10"


def items_of(path: Path, content: str | bytes) -> list[Item]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_items(path))


def records(n: int) -> list[dict[str, Any]]:
    return [{"instruction": f"a {i}", "input": 'é "q" \\ \U0001f600', "output": "x" * (i % 7)} for i in range(n)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=4), max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_an_array_reads_as_json_load_reads_it(
    values: list[Any],
    chunk: int,
    indent: int | None,
    ascii_only: bool,
    bom: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", chunk)
        items = items_of(path, (b"\xef\xbb\xbf" if bom else b"") + content)
    assert [i.value for i in items] == values
    assert [i.fault for i in items] == [None] * len(values)
    for item in items:  # raw is the record's own text and byte its place
        assert json.loads(item.raw) == item.value
        at = item.byte - (3 if bom else 0)
        assert content[at:].startswith(item.raw.encode())
        assert item.line == content[:at].count(b"\n") + 1


def test_lines_with_blank_ones_between(tmp_path: Path) -> None:
    values = records(5)
    text = "\ufeff" + "\r\n\n".join(json.dumps(v, ensure_ascii=False) for v in values)
    items = items_of(tmp_path / "a.jsonl", text)
    assert [(i.index, i.value, i.line) for i in items] == [(n + 1, v, 2 * n + 1) for n, v in enumerate(values)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"instruction": "a", "output": oops}', "not valid JSON: expecting value"),
        ('{"instruction": "a" "output": "b"}', "not valid JSON: expecting ',' delimiter"),
        ('{"instruction": "he said "no"", "output": "b"}', "not valid JSON: expecting"),
        ('{"instruction": "a, "output": "b"}', "not valid JSON: expecting"),
        ('{"instruction": "a", "output": "b"', "not valid JSON: expecting"),
        ('{"instruction": "a", "output": "b\nc"}', "not valid JSON: invalid control character"),
        ('{"instruction": "a\\x", "output": "b"}', "not valid JSON: invalid \\escape"),
        ('{"instruction": "a", "output": {"b": ["c"}}', "not valid JSON: expecting ','"),
        ("oops", "not valid JSON: expecting value"),
        ('{"instruction": NaN}', "NaN is not JSON"),
        ('{"instruction": [1, -Infinity]}', "-Infinity is not JSON"),
        ('{"instruction": ' + "7" * 5000 + "}", "a number of 5,000 digits"),
        ('{"instruction": "a", "input": "b", "instruction": "c"}', "stands twice"),
        ('{"instruction": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_a_broken_record_in_an_array_is_named_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, broken: str, reason: str
) -> None:
    if chunk > 1 or len(broken) < 1000:
        monkeypatch.setattr(stream, "CHUNK", chunk)
    good = [json.dumps(r) for r in records(6)]
    content = "[\n" + ",\n".join([*good[:3], broken, *good[3:]]) + "\n]"
    items = items_of(tmp_path / "a.json", content)
    assert [i.index for i in items] == list(range(1, 8))
    assert [i.value for i in items if not i.fault] == records(6)
    bad = items[3]
    assert bad.fault is not None
    assert bad.fault[1].startswith(reason)
    assert bad.raw == broken
    assert (bad.line, bad.byte) == (5, content.encode().index(broken.encode()))


@pytest.mark.parametrize("spoken", ["NaN", "9" * 5000])
def test_the_field_of_a_fault_is_named(tmp_path: Path, spoken: str) -> None:
    (item,) = items_of(tmp_path / "a.json", f'[{{"a": 1, "score": {spoken}, "b": 2}}]')
    assert item.fault is not None
    assert item.fault[0] == "score"


def test_a_broken_record_does_not_take_a_conversation_apart(tmp_path: Path) -> None:
    talk = {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    broken = '{"id": 2, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "a"}]}'
    items = items_of(tmp_path / "a.json", f"[{json.dumps(talk)}, {broken}, {json.dumps(talk)}]")
    assert [i.value for i in items] == [talk, None, talk]
    assert items[1].raw == broken


@pytest.mark.parametrize("shape", ["array", "lines"])
def test_invalid_utf8_is_placed_and_kept(tmp_path: Path, shape: str) -> None:
    a, b = b'{"output": "ok"}', '{"output": "é'.encode() + b"\xff\xfe" + b'"}'
    content = b"[" + a + b"," + b + b"," + a + b"]" if shape == "array" else b"\n".join([a, b, a])
    items = items_of(tmp_path / "a.json", content)
    assert [i.fault and i.fault[1] for i in items] == [
        None,
        "not valid UTF-8 (byte 0xff at 14 bytes into the record)",
        None,
    ]
    assert items[1].raw.encode("utf-8", "surrogateescape") == b


@pytest.mark.parametrize(
    ("content", "good", "reason"),
    [
        ('[{"a": 1}, {"a": 2}', 2, "the file ends without the closing bracket of the array (truncated?)"),
        ('[{"a": 1}, {"a": 2', 1, "the file ends within this record (truncated, or a quote is missing?)"),
        ('[{"a": 1}, {"a": "2', 1, "the file ends within this record (truncated, or a quote is missing?)"),
        ('[{"a": 1},', 1, "the file ends without the closing bracket of the array (truncated?)"),
        ('[{"a": 1}, ]\n', 1, "a comma before the closing bracket of the array"),
        ('[{"a": 1}] {"a": 2}', 1, "text after the closing bracket of the array"),
        ('{"a": 1}\n{"a": 2', 1, "the line ends within the record"),
        ('{"a": 1} {"a": 2}', 0, "text after the record's closing brace"),
        ('{\n"a": 1\n}', 0, "the line ends within the record"),
    ],
)
def test_wrong_ends(tmp_path: Path, content: str, good: int, reason: str) -> None:
    items = items_of(tmp_path / "a.json", content)
    assert sum(i.fault is None for i in items) == good
    assert any(reason in i.fault[1] for i in items if i.fault)


def test_text_after_the_array_is_fatal(tmp_path: Path) -> None:
    """More records may stand there: a run that skips bad records must stop, too."""
    last = items_of(tmp_path / "a.json", '[{"a": 1}]\n[{"a": 2}]')[-1]
    assert last.fatal
    assert not items_of(tmp_path / "a.json", '[{"a": 1},]\n')[-1].fatal


def test_a_missing_comma_before_null(tmp_path: Path) -> None:
    items = items_of(tmp_path / "a.json", '[{"a": 1} null, {"a": 3}]')
    assert [(i.value, bool(i.fault)) for i in items] == [({"a": 1}, False), (None, True), ({"a": 3}, False)]


def test_a_missing_comma_costs_one_record(tmp_path: Path) -> None:
    items = items_of(tmp_path / "a.json", '[{"a": 1} {"a": 2}, {"a": 3}]')
    assert [bool(i.fault) for i in items] == [False, True, False]
    assert items[1].fault == ("", "a comma is missing before this record")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04rest", "a zip file"),
        (b"PAR1rest", "a Parquet file"),
        ("[1]".encode("utf-16"), "UTF-16"),
        (b"instruction,input,output\n", "it starts with b'instruction,input,ou'"),
    ],
)
def test_other_files_are_told_by_their_first_bytes(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match="not a JSON array and not JSON lines") as e:
        items_of(tmp_path / "a.json", content)
    assert says in str(e.value)
    assert str(tmp_path / "a.json") in str(e.value)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read it"):
        list(read_items(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="cannot read it"):
        list(read_items(tmp_path))


def test_long_white_space_before_the_array(tmp_path: Path) -> None:
    assert [i.value for i in items_of(tmp_path / "a.json", " " * 10_000 + '[{"a": 1}]')] == [{"a": 1}]


@pytest.mark.parametrize("lines", [False, True])
def test_a_record_over_the_limit_is_refused_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: bool
) -> None:
    monkeypatch.setattr(stream, "MAX_RECORD", 2000)
    monkeypatch.setattr(stream, "CHUNK", 100)
    long = json.dumps({"a": 'x\\"{[' * 3000})
    a, b = '{"a": 1}', '{"a": 2}'
    items = items_of(tmp_path / "a.json", "\n".join([a, long, b]) if lines else f"[{a}, {long}, {b}]")
    assert [i.value for i in items] == [{"a": 1}, None, {"a": 2}]
    assert items[1].fault is not None
    assert items[1].fault[1].startswith("longer than")
    assert 0 < len(items[1].raw) <= stream.KEPT


def test_where_no_next_record_can_be_found_the_item_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_RECORD", 500)
    monkeypatch.setattr(stream, "CHUNK", 64)
    items = items_of(tmp_path / "a.json", '[{"a": 1}, {"a": oops "' + "{" * 2000)
    assert [i.fatal for i in items] == [False, True]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), chunk=st.sampled_from([16, 64, 1 << 20]), lines=st.booleans())
def test_damage_anywhere_loses_nothing_silently(
    data: st.DataObject, chunk: int, lines: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Change, drop or add bytes: reading ends, every item has a value or a fault, and every byte of the file is in
    some item or between items, where only separators may be (else it is said that text follows the array)."""
    content = bytearray("\n".join(map(json.dumps, records(8))).encode() if lines else json.dumps(records(8)).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"}", b"]", b",", b"\\", b"[[", b'{"instruction":'])
        )
        content[at : at + data.draw(st.integers(0, 3))] = new
    path = tmp_path_factory.mktemp("damage") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", chunk)
        try:
            items = items_of(path, bytes(content))
        except ValueError as e:
            assert "not a JSON array" in str(e)  # noqa: PT017
            return
    assert all(i.fault for i in items if i.value is None)
    assert [i.index for i in items] == list(range(1, len(items) + 1))
    left, between = bytes(content), b""
    for item in items:
        if item.raw:
            gap, _, left = left.partition(item.raw.encode("utf-8", "surrogateescape"))
            between += gap
    assert not any(i.fatal for i in items[:-1])
    if not items[-1].fatal:
        assert not (between + left).strip(b" \t\r\n,[]")


def test_one_gigabyte_in_one_string_is_refused_at_once_in_bounded_memory(tmp_path: Path) -> None:
    """Made sparse; a process of its own, so that its peak is only that of reading."""
    for name, head in (("a.json", b'[{"input": "'), ("a.jsonl", b'{"input": "')):
        path = tmp_path / name
        with path.open("wb") as f:
            f.write(head + b"a" * (32 << 20))
            f.truncate(1 << 30)
        code = (
            "import sys, time; from pathlib import Path; from data.stream import read_items; t = time.time();"
            "item = next(read_items(Path(sys.argv[1])));"
            f"print(item.fault[1], time.time() - t, {PEAK}, sep='|')"
        )
        out = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
        reason, seconds, peak = out.stdout.split("|")
        assert reason.startswith("longer than 8 million characters")
        assert float(seconds) < 2
        assert int(peak) < 100


def test_an_array_of_one_line_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """16 MB in one line, with multi-byte text; bench/bench_loader.py reads 1 GB."""
    path = tmp_path / "a.json"
    record = json.dumps({"instruction": "q" * 500, "input": "é" * 200, "output": "a" * 500}, ensure_ascii=False)
    with path.open("w") as f:
        f.write("[" + record)
        for _ in itertools.repeat(None, 11_000):
            f.write(", " + record)
        f.write("]")
    code = (
        "import sys; from pathlib import Path; from data.stream import read_items;"
        "n = sum(1 for _ in read_items(Path(sys.argv[1])));"
        f"print(n, {PEAK})"
    )
    out = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    n, peak = map(int, out.stdout.split())
    assert n == 11_001
    assert peak < 100
