"""Numbering, the held-out split, the report and the preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import Dataset, InMemory, Report, build, preview
from data.records import Record
from data.tokenise import BATCH
from llama.chat import ChatFormat, Dialogue, Message, render
from llama.tokenizer import Tokenizer


def dialogue(i: int, n: int = 5) -> Dialogue:
    return Dialogue((Message("user", f"pain {i}"), Message("assistant", "rest " * n)))


def make(tokenizer: Tokenizer, *sources: Any, **kw: Any) -> tuple[Dataset, Dataset, Report]:
    options: dict[str, Any] = {
        "chat_format": ChatFormat("dialogue", ""),
        "max_len": 64,
        "workers": 1,
        "progress": False,
    }
    return build(sources, tokenizer=tokenizer, **{**options, **kw})


def test_documents_are_the_rendered_dialogues(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    n = 2 * BATCH + 30  # more than travel together
    a = InMemory("a", [dialogue(i, i % 5 + 1) for i in range(n)])
    path = tmp_path / "b.json"
    path.write_text(json.dumps([{"instruction": f"fever {i}", "output": "for two days"} for i in range(20)]))
    train, held, _ = make(small_tokenizer, a, path)
    assert (len(train), len(held)) == (n + 20, 0)
    assert [d.tolist() for d in train.by_file()] == [list(range(n)), list(range(n, n + 20))]
    for i in range(n):
        ids, mask = train.document(i)
        assert (ids.tolist(), mask.tolist()) == render(dialogue(i, i % 5 + 1), ChatFormat("dialogue"), small_tokenizer)
        assert (train.lengths[i], train.supervised[i]) == (ids.size, mask.sum())
    assert [train.record(i) for i in (0, n - 1, n, n + 19)] == [("a", 1), ("a", n), (str(path), 1), (str(path), 20)]


def side_of(held: Dataset) -> set[tuple[str, int]]:
    return {held.record(i) for i in range(len(held))}


def test_the_held_out_side_is_stable(small_tokenizer: Tokenizer) -> None:
    dialogues = [dialogue(i) for i in range(2000)]
    train, held, report = make(small_tokenizer, InMemory("a", dialogues), eval_fraction=0.05)
    assert 60 <= len(held) <= 140
    assert (len(train), report.held_out) == (2000 - len(held), len(held))
    held_text = {held.document(i)[0].tobytes() for i in range(len(held))}
    assert not held_text & {train.document(i)[0].tobytes() for i in range(len(train))}

    # The same records in another file, in another order, with others beside them: the same side.
    other = InMemory("b", [dialogue(i + 5000) for i in range(500)] + dialogues[::-1])
    _, again, _ = make(small_tokenizer, other, eval_fraction=0.05)
    text = {again.document(i)[0].tobytes() for i in range(len(again))}
    assert held_text <= text
    assert len(text - held_text) < 60, "those of the other 500"
    _, more, _ = make(small_tokenizer, InMemory("a", dialogues), eval_fraction=0.2)
    assert side_of(held) < side_of(more)


def test_a_repeated_record_is_not_on_both_sides(small_tokenizer: Tokenizer) -> None:
    twice = InMemory("a", [dialogue(i % 100) for i in range(200)])
    train, held, _ = make(small_tokenizer, twice, eval_fraction=0.3)
    assert len(train) + len(held) == 200
    sides = [{d.record(i)[1] % 100 for i in range(len(d))} for d in (train, held)]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_an_empty_held_out_side_is_not_silent(small_tokenizer: Tokenizer) -> None:
    dialogues = [dialogue(i) for i in range(3)]
    for fraction, silent in ((0.0, True), (1e-6, False)):
        _, held, report = make(small_tokenizer, InMemory("a", dialogues), eval_fraction=fraction)
        assert not len(held)
        assert ("nothing is held out" not in report.text()) == silent


def test_keys_given_by_the_caller_decide_the_side(small_tokenizer: Tokenizer) -> None:
    """Small numbers as keys: groups of ten records stay together, and their share comes out."""
    records = [Record(dialogue(i), i + 1, key=i // 10) for i in range(3000)]
    train, held, _ = make(small_tokenizer, InMemory("a", records), eval_fraction=0.2)
    groups = [{(d.record(i)[1] - 1) // 10 for i in range(len(d))} for d in (train, held)]
    assert not groups[0] & groups[1]
    assert 0.12 < len(held) / 3000 < 0.28


def test_identity_follows_what_is_in_the_set(small_tokenizer: Tokenizer) -> None:
    a, b = InMemory("a", [dialogue(i) for i in range(50)]), InMemory("b", [dialogue(i) for i in range(51)])
    first = make(small_tokenizer, a)[0].identity
    assert make(small_tokenizer, InMemory("other name", a.dialogues))[0].identity == first
    others = [
        make(small_tokenizer, b)[0].identity,
        make(small_tokenizer, a, b)[0].identity,
        make(small_tokenizer, b, a)[0].identity,
        make(small_tokenizer, a, eval_fraction=0.1)[0].identity,
        make(small_tokenizer, a, eval_fraction=0.1)[1].identity,
        make(small_tokenizer, a, weights=[2])[0].identity,
        make(small_tokenizer, a, max_len=32)[0].identity,
    ]
    assert len({first, *others}) == 1 + len(others)


def test_the_report_counts_what_was_left_out(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    long = "pain " * 100
    values: list[dict[str, Any]] = [{"instruction": "fever", "output": "rest"} for _ in range(10)]
    values += [{"instruction": "fever", "output": long}, {"instruction": long, "output": "rest"}, {"text": 5}]
    turns = [("user", "cough"), ("assistant", "rest"), ("user", "and?")]
    values.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    path.write_text(json.dumps(values))
    told: list[int] = []
    train, _, report = make(small_tokenizer, path, on_bad=lambda bad, raw: told.append(bad.index), weights=[2])
    assert told == [13]
    assert len(train) == 12
    text = report.text()
    for line in (
        "data: 12 records to train on, 0 held out",
        f"{path}: 14 records read, weight 2",
        "1 rejected, with the reasons in rejected.jsonl",
        "1 dropped: the prompt alone does not fit into 64 tokens (records 12)",
        "1 truncated: the end of the answer is over 64 tokens (records 11)",
        "1 without their last question, which has no answer",
    ):
        assert line in text
    assert sum(n for *_, n in report.histogram) == 12
    tokens, supervised = int(train.lengths.sum()), int(train.supervised.sum())
    assert f"{tokens:,} tokens (mean {tokens / 12:.1f} a record), {supervised:,} supervised" in text
    assert f"({100 * supervised / tokens:.1f} %)\n  {2 * tokens:,} tokens an epoch, by the weights" in text
    for low, high, n in report.histogram:
        assert n == ((train.lengths >= low) & (train.lengths <= high)).sum()
    assert train.lengths.max() == 64, "cut at the limit"
    assert not np.isin(small_tokenizer.eos_id, train.document(10)[0]), "no EOS where the answer was cut"


def test_the_report_fits_a_terminal() -> None:
    bars = [(0, 49, 0), (50, 99, 24_000), (100, 149, 0), (150, 199, 1)]
    report = Report([], 512, 24_001, 428, 22_856_532, 11_236_069, bars, tokens_per_epoch=22_856_532)
    lines = report.text().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:5]] == ["50-99", "100-149", "150-199"], "empty bars before the first"
    assert "an epoch" not in report.text(), "the same number twice"


def test_nothing_left_to_train_on(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="no record is left to train on") as e:
        make(small_tokenizer, path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"weights": [1, 2]}, "2 weights for 1 data files"),
        ({"weights": [-1]}, "mixing weight -1"),
        ({"weights": [float("nan")]}, "mixing weight nan"),
        ({"weights": [float("inf")]}, "mixing weight inf"),
        ({"eval_fraction": 1.0}, "held-out share is 1"),
        ({"eval_fraction": -0.1}, "held-out share is -0.1"),
        ({"max_len": 1}, "leaves no room"),
    ],
)
def test_wrong_arguments(small_tokenizer: Tokenizer, kw: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(small_tokenizer, InMemory("a", [dialogue(1)]), **kw)


def test_preview_marks_what_is_learnt(small_tokenizer: Tokenizer) -> None:
    train, _, _ = make(small_tokenizer, InMemory("a", [dialogue(1, 2), dialogue(2, 1)]))
    text = preview(train, 5, small_tokenizer)
    assert text.count("--- a, record") == 2
    ids, mask = train.document(0)
    assert text.startswith(
        f"--- a, record 1: {ids.size} tokens, {mask.sum()} supervised ---\n"
        "<BOS> Patient: pain 1\nDoctor:[[rest rest <EOS>]]"
    )
    assert "\x1b[32mrest <EOS>\x1b[0m" in preview(train, 2, small_tokenizer, colour=True)
    assert preview(train, 1, small_tokenizer).count("--- a, record") == 1
