"""Held-out loss: values that can be counted by hand, and the floors."""

from __future__ import annotations

import math

import pytest

from data.evaluation import fit
from data.evaluation.held_out import HeldOut, Item
from data.evaluation.parts import Exposure
from llama.chat import Dialogue, Message


def item(question: str, answer: str, disease: str, topic: str) -> Item:
    dialogue = Dialogue((Message("user", question), Message("assistant", answer)))
    return Item(dialogue, question, answer, disease, topic)


ITEMS = [
    item("I have fever", "Rest.", "flu", "diagnosis"),
    item("Which test?", "You need an ECG.", "angina", "tests"),
] * 5
HELD_OUT = HeldOut("made up", "0", ITEMS)


def test_loss_perplexity_and_bits(oracle: object) -> None:
    outcome = fit.part(HELD_OUT).run(oracle, Exposure())  # type: ignore[arg-type]
    loss, perplexity, bits = outcome.figures
    tokens = sum(i["tokens"] for i in outcome.items)
    size = sum(len(i.answer) for i in ITEMS)
    assert loss.value == pytest.approx(0.5)
    assert perplexity.value == pytest.approx(math.exp(0.5))
    assert bits.value == pytest.approx(0.5 * tokens / math.log(2) / size)
    assert loss.floors["uniform"] == pytest.approx(math.log(oracle.tokenizer.vocab_size))  # type: ignore[attr-defined]
    assert loss.floors["another patient's question"] == pytest.approx(0.5)
    assert loss.indistinguishable_from_floor  # a model that does not look at the question
    assert set(loss.groups) == {"diagnosis", "tests"}
    assert set(bits.groups) == {"flu", "angina"}


def test_token_frequencies_are_the_best_constant(oracle: object) -> None:
    documents = [([0, 7, 7], [False, True, True]), ([0, 8], [False, True])]
    expected = [-2 * math.log(2 / 3), -math.log(1 / 3)]
    assert fit._unigram(documents) == pytest.approx(expected)


def test_what_does_not_fit_is_said(oracle: object) -> None:
    oracle.max_len = 8  # type: ignore[attr-defined]
    outcome = fit.part(HELD_OUT).run(oracle, Exposure())  # type: ignore[arg-type]
    assert not outcome.figures
    assert "no held-out dialogue fits" in outcome.notes[0]
