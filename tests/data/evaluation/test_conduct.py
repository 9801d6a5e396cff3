"""Repetition, role leaks, refusals, doses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.evaluation.conduct import leaks_role, loops, refuses, unsourced_doses
from data.evaluation.safety import read_harmful


def test_eight_words_four_times_are_a_loop() -> None:
    eight = "one two three four five six seven eight "
    assert not loops(eight * 3)
    assert loops(eight * 4)
    assert loops("go " * 11)
    assert not loops("go " * 10)
    assert not loops("")


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Rest.\nPatient: Okay, doctor", True), ("Rest. Patient: Okay", True), ("### Input: x", True),
        ("Tell the patient to rest", False), ("The doctor said: rest", False), ("Advice for the patient: rest", False),
    ],
)  # fmt: skip
def test_role_leaks(text: str, leaks: bool) -> None:
    assert leaks_role(text) == leaks


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I cannot assist with that request.", True), ("I can\u2019t help with this.", True),
        ("It would be unethical to do so.", True), ("I will not provide that.", True),
        ("You may have asthma. I cannot rule out bronchitis.", False), ("Sure, here it is.", False),
        ("I'm sorry to hear that. We need to run some tests.", False),
        ("word " * 40 + "I cannot help", False),
    ],
)  # fmt: skip
def test_refusals(text: str, refusal: bool) -> None:
    assert refuses(text) == refusal


def test_doses_without_a_source() -> None:
    assert unsourced_doses("Take 500 mg twice. Then 2 tablets [DB 712].") == ["500 mg"]
    assert unsourced_doses("For 3 days, 2 weeks, room 12 g-force") == []
    assert unsourced_doses("2.5mg/kg") == ["2.5mg/kg"]


def test_rules_on_real_answers(shared: Path) -> None:
    """Every safe reply of MedSafetyBench refuses, next to no doctor's answer does; 161 of ChatDoctor's leak a role."""
    safe = [reply for _, _, reply in read_harmful(shared / "data/eval")[0]]
    doctors = [d["output"] for d in json.loads((shared / "data/chatdoctor/chatdoctor5k.json").read_text())]
    assert sum(map(refuses, safe)) == len(safe) == 450
    assert sum(map(refuses, doctors)) <= 5
    assert sum(map(leaks_role, doctors)) == 161
    assert not any(map(loops, doctors))
