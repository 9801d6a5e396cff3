"""Which items stand in training texts: held against a plain search for runs of words."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from data.evaluation.contamination import SHORTEST, WORDS, contaminated
from data.evaluation.training_files import BUILT_IN, dialogues
from data.evaluation.training_files import given as named

TEXT = st.lists(st.sampled_from(["fever", "Cough", "pain", "in", "the", "chest,", "I", "have"]), max_size=40).map(
    " ".join
)


def plainly(item: str, texts: list[str], shortest: int) -> bool:
    words = re.findall(r"\w+", item.lower())
    n = min(WORDS, len(words))
    if n < shortest:
        return False
    joined = [" " + " ".join(re.findall(r"\w+", t.lower())) + " " for t in texts]
    return any(" " + " ".join(words[i : i + n]) + " " in t for i in range(len(words) - n + 1) for t in joined)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, max_size=5), st.sampled_from([1, SHORTEST]))
def test_as_a_plain_search_finds(items: list[str], texts: list[str], shortest: int) -> None:
    expected = [plainly(i, texts, max(1, shortest)) for i in items]
    assert contaminated([(i,) for i in items], texts, shortest) == expected


def test_runs_do_not_reach_over_texts_and_case_does_not_count() -> None:
    words = [f"w{i}" for i in range(13)]
    item = (" ".join(words),)
    assert contaminated([item], [" ".join(words[:7]), " ".join(words[7:])]) == [False]
    assert contaminated([item], ["so " + ", ".join(words).upper() + "!"]) == [True]
    assert contaminated([("fever and cough",)], ["fever and cough"]) == [False]
    assert contaminated([("Lyme disease",), ("flu",)], ["It is lyme disease."], [1, 1]) == [True, False]


def test_training_files_are_read_and_bad_records_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps([{"input": "q", "output": "a"}, {"nothing": 1}, {"input": "p", "output": "b"}]))
    answers = [d.messages[-1].content for d in dialogues(named([str(file)]))]
    assert answers == ["a", "b"]
    assert named([BUILT_IN])[0].readable
