"""data/training.py: texts for a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.records import BadRecord
from data.training import training_texts
from llama.arguments import TrainArguments


def texts_of(*files: Path) -> list[str]:
    return list(training_texts(TrainArguments(data_path=tuple(map(str, files)), instruction="")))


def written(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_bad_records_are_passed_over_where_others_are(tmp_path: Path) -> None:
    bad = written(tmp_path / "bad.jsonl", {"input": 1, "output": "Rest."})
    good = written(tmp_path / "good.jsonl", {"input": "A cough.", "output": "Rest."}, {"neither": 0})
    assert texts_of(bad, good) == texts_of(good) == ["A cough.", "Rest."]


def test_the_first_bad_record_is_named_where_no_other_is(tmp_path: Path) -> None:
    bad = written(tmp_path / "bad.jsonl", {"input": 1, "output": "Rest."}, {"neither": 0})
    worse = written(tmp_path / "worse.jsonl", {"neither": 0})
    with pytest.raises(BadRecord, match=r"bad\.jsonl"):
        texts_of(bad, worse)
