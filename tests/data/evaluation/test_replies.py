"""Free answers to held-out questions: what a perfect model gets, what a wrong one, and the floors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.evaluation import held_out, replies
from data.evaluation.held_out import HeldOut, Item
from data.evaluation.knowledge import Fact, Knowledge
from data.evaluation.parts import Exposure
from llama.chat import ChatFormat, Dialogue, Message

FLU = Fact("flu", "flu", ("influenza",), ("fever",), ("a swab",), ("rest",))
ANGINA = Fact("angina", "angina", (), ("chest pain",), ("an ECG",), ("aspirin",))
KNOWLEDGE = Knowledge("made up", "0", (FLU, ANGINA))


def item(question: str, answer: str, disease: str) -> Item:
    dialogue = Dialogue((Message("user", question), Message("assistant", answer)))
    return Item(dialogue, question, answer, disease, held_out.topic_of(question))


ITEMS = [
    item("I have fever", "You may have influenza. Tests: a swab. Treatment: rest.", "flu"),
    item("I have chest pain", "You may have angina. Tests: an ECG. Treatment: aspirin.", "angina"),
    item("Which tests for pain in the chest?", "You may have angina. Tests: an ECG.", "angina"),
] * 4
HELD_OUT = HeldOut("made up", "0", ITEMS)


def test_a_perfect_model_scores_one(oracle: object) -> None:
    answers = {i.question: i.answer for i in ITEMS}
    oracle.answer = lambda prompt: next(a for q, a in answers.items() if q in prompt)  # type: ignore[attr-defined]
    outcome = replies.part(HELD_OUT, KNOWLEDGE, lambda: []).run(oracle, Exposure())  # type: ignore[arg-type]
    found = {f.name.removeprefix("answers."): f for f in outcome.figures}
    for kind in ("diseases", "tests", "medications"):
        for what in ("precision", "recall"):
            assert found[f"entities.{kind}.{what}"].value == 1
    assert found["disease_named_first"].value == 1
    assert found["rouge_l"].value == 1
    assert found["bertscore_rescaled"].value == pytest.approx(1)
    assert found["bertscore_rescaled"].floors["random pairs"] == 0
    assert found["length_ratio"].value == 1
    assert found["stopped"].value == 1
    assert found["rouge_l"].floors["constant sentence"] < 1


def test_a_wrong_name_costs_precision_and_a_missing_one_recall(oracle: object) -> None:
    oracle.answer = lambda prompt: "Flu. Or angina. Patient: what? Take 5 mg."  # type: ignore[attr-defined]
    outcome = replies.part(HELD_OUT, KNOWLEDGE, lambda: []).run(oracle, Exposure())  # type: ignore[arg-type]
    found = {f.name.removeprefix("answers."): f for f in outcome.figures}
    assert found["entities.diseases.precision"].value == 0.5
    assert found["entities.diseases.recall"].value == 1
    assert found["entities.tests.recall"].value == 0
    assert found["disease_named_first"].value == pytest.approx(1 / 3)
    assert found["role_leak"].value == found["dose_without_source"].value == 1


def test_neighbours_are_training_answers_where_there_are_some() -> None:
    assert replies.nearest_answers(ITEMS[:1], [("cough", "a"), ("a fever", "b")]) == ["b"]
    assert replies.nearest_answers(ITEMS[:3], [])[2] == ITEMS[1].answer
    assert replies.constant_sentence(["a b", "a b c", "x"]) in ("a b", "a b c")


def test_files_become_items(tmp_path: Path) -> None:
    file = tmp_path / "h.json"
    file.write_text(json.dumps([{"instruction": "i", "input": "Is it influenza?", "output": "Maybe."}]))
    [only] = held_out.of_files([file], KNOWLEDGE).items
    assert (only.question, only.disease, only.answer) == ("Is it influenza?", "flu", "Maybe.")
    assert only.dialogue.messages[0].role == "system"
    (tmp_path / "t.txt").write_text("plain text")
    with pytest.raises(ValueError, match="no dialogue to ask"):
        held_out.of_files([tmp_path / "t.txt"], KNOWLEDGE)


def test_a_record_is_asked_with_its_own_instruction_or_the_checkpoint_s(oracle: object, tmp_path: Path) -> None:
    oracle.chat_format = ChatFormat("dialogue", "You are a doctor.")  # type: ignore[attr-defined]
    oracle.answer = lambda prompt: prompt  # type: ignore[attr-defined]
    file = tmp_path / "h.json"
    file.write_text(
        json.dumps([{"input": "fever", "output": "a"}, {"instruction": "Rest in", "input": "cough", "output": "b"}])
    )
    items = replies.part(held_out.of_files([file], KNOWLEDGE), KNOWLEDGE, lambda: []).run(oracle, Exposure()).items  # type: ignore[arg-type]
    assert [i["answer"].partition("\n")[0] for i in items] == ["You are a doctor.", "Rest in"]
