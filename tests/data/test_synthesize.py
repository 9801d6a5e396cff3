"""The generator is a pure function of its seed, its held-out questions are held out, and its answers are safe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data.conditions import Table, load_table
from data.records import read_records
from data.synthesize import (
    DISCLAIMER,
    EMERGENCY,
    HELD_OUT_FRAMES,
    RECIPE,
    SPLITS,
    TRAIN_FRAMES,
    Example,
    Recipe,
    examples,
    main,
    sample,
    symptom_sets,
)


@pytest.fixture(scope="module")
def table() -> Table:
    return load_table()


@pytest.fixture(scope="module")
def made(table: Table) -> dict[str, list[Example]]:
    return {split: list(examples(table, 0, 3000, split)) for split in SPLITS}


def test_same_seed_same_dialogues_and_a_longer_run_begins_with_a_shorter_one(table: Table) -> None:
    first = list(examples(table, 7, 50))
    assert first == list(examples(table, 7, 80))[:50]
    assert first != list(examples(table, 8, 50))


def test_every_condition_is_asked_equally_often_and_in_training_common_ones_twice(table: Table) -> None:
    names, common = [c.name for c in table.conditions], [c.name for c in table.conditions if c.common]
    held_out = [e.condition for e in examples(table, 0, 2 * len(names), "held_out")]
    assert sorted(held_out) == sorted(names * 2)
    train = [e.condition for e in examples(table, 0, len(names) + len(common))]
    assert sorted(train) == sorted(names + common)


def test_sets_of_symptoms_are_disjoint(table: Table, made: dict[str, list[Example]]) -> None:
    for c in table.conditions:
        train, held = symptom_sets(table, c)
        both = {frozenset(p) for sets in train.values() for p in sets} & {
            frozenset(p) for sets in held.values() for p in sets
        }
        assert not both, c.name
        assert held
    seen = {(e.condition, frozenset(e.symptoms)) for e in made["train"]}
    for split in ("held_out", "unseen_wordings"):
        assert not seen & {(e.condition, frozenset(e.symptoms)) for e in made[split]}


def test_sentence_frames_are_disjoint() -> None:
    for field in ("openings", "closings", "durations", "joints"):
        common = set(getattr(TRAIN_FRAMES, field)) & set(getattr(HELD_OUT_FRAMES, field))
        assert common <= {""}, field


def test_unseen_wordings_are_unseen(table: Table, made: dict[str, list[Example]]) -> None:
    for e in made["unseen_wordings"]:
        for name in e.symptoms:
            known = table.symptoms[name].wordings
            assert any(_core(w) in _core(e.question) for w in table.symptoms[name].held_out), e.question
            assert name in e.question or len(known) >= 3
    trained = " ".join(_core(e.question) for e in made["train"])
    held = [w for s in table.symptoms.values() for w in s.held_out if len(w.split()) > 6]
    assert not [w for w in held if _core(w) in trained]


def test_questions_have_one_right_answer(table: Table, made: dict[str, list[Example]]) -> None:
    for split in SPLITS:
        for e in made[split]:
            assert frozenset.intersection(*(table.owners[s] for s in e.symptoms)) == {e.condition}


def test_questions_read_like_sentences(made: dict[str, list[Example]]) -> None:
    for split in SPLITS:
        for e in made[split]:
            assert re.match(r"[A-Z]", e.question), e.question
            assert not re.search(r"[=;:,.] ?[.,]|  |=|I have I|\{", e.question), e.question


def test_answers_name_the_condition_first_and_emergencies_say_go_now(
    table: Table, made: dict[str, list[Example]]
) -> None:
    for e in made["train"]:
        condition = table.condition(e.condition)
        assert condition.spoken in e.answer.split(".")[0] or "." in condition.name
        assert (EMERGENCY in e.answer) == (condition.urgency == "emergency")
    assert any(e.answer.endswith(DISCLAIMER) for e in made["train"])


def test_red_flags_reach_the_answers(table: Table, made: dict[str, list[Example]]) -> None:
    warned = {e.condition for e in made["train"] if "emergency department" in e.answer}
    assert warned == {c.name for c in table.conditions}


def test_a_bad_split_is_named(table: Table) -> None:
    with pytest.raises(ValueError, match="'test' is not one of train"):
        next(examples(table, 0, 1, "test"))  # type: ignore[arg-type]


def test_sample_is_the_recipe() -> None:
    s = sample(Recipe(n_train=300, n_held_out=30))
    turns = [len(d.messages) // 2 for d in s.train]
    assert (sum(turns), len(s.held_out), len(s.unseen_wordings)) == (300, 30, 30)
    assert turns.count(1) > turns.count(2) > 0
    assert max(turns) == len(RECIPE.turns) == 3
    assert s.train[0].messages[0].role == "user"
    assert sum(1 for _ in s.texts()) == 600
    assert RECIPE.chat_format == "dialogue"


def test_command_writes_records_that_the_reader_reads(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    assert main(["--n", "20", "--seed", "3", "--output", str(file)]) == 0
    first = json.loads(file.read_text().splitlines()[0])
    assert set(first) == {"instruction", "input", "output", "condition"}
    records = list(read_records(file))
    assert len(records) == 20
    assert records[0].dialogue.messages[-1].content == first["output"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "0", "--output", "F"], "--n is 0"),
        (["--output", "nosuch/folder/f.jsonl"], "cannot write"),
        (["--table", "nosuch", "--output", "F"], "cannot read the table"),
    ],
)
def test_command_refuses_bad_input_in_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def _core(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))
