"""The questions at the end of the built-in run: what is told, and what is counted."""

from __future__ import annotations

import dataclasses

from data import synthesize
from data.examination import examine
from llama.chat import Message


def test_reference_answers_are_all_right_and_silence_is_not() -> None:
    sample = synthesize.sample(dataclasses.replace(synthesize.RECIPE, n_train=500, n_held_out=6))
    known = {e.question: e.answer for e in (*sample.held_out_examples, *sample.unseen_wordings)}
    told: list[str] = []

    def knows(dialogues: list[tuple[Message, ...]]) -> list[str]:
        return [known[d[-1].content] for d in dialogues]

    shares = examine(sample, knows, told.append)
    assert [s["model"] for s in shares.values()] == [1.0, 1.0, 1.0]
    assert sum("Reference: " in text for text in told) == 3
    silent = examine(sample, lambda dialogues: [""] * len(dialogues), told.append)
    assert [s["model"] for s in silent.values()] == [0.0, 0.0, 0.0]
