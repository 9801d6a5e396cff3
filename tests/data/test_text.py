"""Plain text: nothing lost, bounded sections, and rows in which every token is learnt once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import text
from data.loader import Dataset, Loader, build
from data.records import BadRecord, read_records
from data.text import END, Section, read_sections, sections
from data.tokenise import encode_text, supervised_bit
from llama.chat import IGNORE, ChatFormat
from llama.tokenizer import Tokenizer

WORDS = ["fever", "cough", "pain", "in", "the", "chest", "and", "I", "have", "rest", "for", "two", "days\n"]


def book(words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    lines = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 12)) for _ in range(words // 12)]
    return "\n".join(lines) + "\n"


def documents(path: Path) -> list[str]:
    found: list[str] = []
    for item in read_sections(path):
        assert isinstance(item.value, Section)
        assert 0 < len(item.value.text) <= text.SECTION
        found.append(item.value.text) if item.value.first else found.append(found.pop() + item.value.text)
    return found


def test_blank_sections_at_the_start_do_not_take_the_beginning_away(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n" * (2 * text.SECTION) + "Chapter one.")
    (item,) = read_sections(path)
    assert (item.value.text.strip(), item.value.first, item.value.last) == ("Chapter one.", True, True)


@pytest.fixture
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SECTION", 16)


@given(st.lists(st.text("ab \né€", max_size=70).map(lambda t: "x" + t), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sections_joined_are_the_documents(small_sections: None, tmp_path: Path, wanted: list[str]) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(f"{END}\n".join(wanted).encode())
    assert documents(path) == wanted
    for document in wanted:
        parts = sections(document)
        assert "".join(p.text for p in parts) == document
        assert [p.first for p in parts] == [True] + [False] * (len(parts) - 1)
        assert [p.last for p in parts] == [False] * (len(parts) - 1) + [True]


def test_blank_lines_belong_to_the_document_and_blank_documents_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(f"\ufeffOne.\n\nStill one.\r\n{END}\n\n{END}Two.{END}\n".encode())
    assert documents(path) == ["One.\n\nStill one.\r\n", "Two."]


def test_sections_end_where_a_line_does(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(book(30_000))
    items = list(read_sections(path))
    assert len(items) > 3
    assert all(i.value.text.endswith("\n") for i in items)
    assert items[2].byte == sum(len(i.value.text) for i in items[:2])
    assert items[2].line == 1 + sum(i.value.text.count("\n") for i in items[:2])


def test_memory_is_bounded_by_sections_not_by_the_file(tmp_path: Path) -> None:
    """A line of 4 MB without a space, which has no border to be cut at."""
    path = tmp_path / "line.txt"
    path.write_text("x" * 4_000_000)
    assert len(list(read_sections(path))) == -(-4_000_000 // text.SECTION)


def test_a_section_that_is_not_utf8_is_named_and_can_be_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(book(10_000).encode() + b"caf\xe9 " + book(10_000).encode())
    with pytest.raises(BadRecord, match=r"latin\.txt: record \d+ .*is not UTF-8: byte 0xe9 after"):
        list(read_records(path))
    told: list[BadRecord] = []
    kept = list(read_records(path, on_bad=lambda bad, raw: told.append(bad)))
    assert len(told) == 1
    assert len(kept) > 1
    with pytest.raises(ValueError, match="holds no preference pairs"):
        list(read_records(path, pairs=True))


@pytest.mark.parametrize("n", [2, 8, 9, 15, 16, 100])
def test_rows_overlap_by_the_token_that_the_next_is_predicted_from(n: int) -> None:
    ids = list(range(n))
    rows = encode_text(ids, 8, np.dtype("<u2"))
    bit = supervised_bit(np.dtype("<u2"))
    assert all(2 <= r.size <= 8 for r in rows)
    assert all(r[0] < bit and (r[1:] >= bit).all() for r in rows)
    assert [int(i) & (bit - 1) for r in rows for i in r[1:]] == ids[1:]
    assert all(int(a[-1]) & (bit - 1) == b[0] for a, b in itertools.pairwise(rows))


def learnt(data: Dataset, loader: Loader) -> list[int]:
    """Every target of an epoch that is learnt, sorted."""
    steps = [loader.step(i) for i in range(loader.total_steps(1))]
    targets = [b.targets[b.targets != IGNORE] for s in steps for b in s.micro_batches]
    return sorted(int(t) for ts in targets for t in ts)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_token_of_a_long_text_is_learnt_once(kind: str, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    texts = [book(9000), book(50, 1), book(700, 2)]
    path = tmp_path / f"book.{kind}"
    path.write_text(END.join(texts) if kind == "txt" else "".join(json.dumps({"text": t}) + "\n" for t in texts))
    data, _, report = build([path], tokenizer=small_tokenizer, chat_format=ChatFormat(), max_len=32, progress=False)
    want = []
    for t in texts:
        for s in sections(t):
            want += small_tokenizer.encode(s.text, continued=not s.first)
        want.append(small_tokenizer.eos_id)
    assert len(sections(texts[0])) > 1
    loader = Loader(data, batch=1, max_len=32, packing="epoch")
    assert learnt(data, loader) == sorted(want)
    assert loader.fill() > 0.98
    entry = report.files[0]
    assert (entry["records"], entry["truncated"], entry["dropped"]) == (3, 0, 0)
    assert entry["continued"] == len(data) - 3
    assert "nothing of it is lost" in report.text()


def test_held_out_texts_are_whole_documents_of_json_and_sections_of_txt(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    lines, book_ = tmp_path / "t.jsonl", tmp_path / "t.txt"
    lines.write_text("".join(json.dumps({"text": book(300, i)}) + "\n" for i in range(20)))
    book_.write_text(book(60_000))
    common = {"tokenizer": small_tokenizer, "chat_format": ChatFormat(), "max_len": 64, "progress": False}
    train, held, _ = build([lines], eval_fraction=0.3, **common)
    sides = [{d.record(i)[1] for i in range(len(d))} for d in (train, held)]
    assert sides[0] | sides[1] == set(range(1, 21))
    assert not sides[0] & sides[1]
    train, held, _ = build([book_], eval_fraction=0.3, **common)
    assert len(held) > 0
    assert not {train.record(i) for i in range(len(train))} & {held.record(i) for i in range(len(held))}


def test_the_same_bytes_as_text_and_as_json_are_not_one_cache(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    content = json.dumps({"text": "fever and cough"}) + "\n"
    sizes = []
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(content)
        common = {"tokenizer": small_tokenizer, "chat_format": ChatFormat(), "max_len": 64, "progress": False}
        data, _, _ = build([tmp_path / name], cache_dir=tmp_path / "cache", **common)
        sizes.append(int(data.lengths.sum()))
    assert sizes[0] < sizes[1]
