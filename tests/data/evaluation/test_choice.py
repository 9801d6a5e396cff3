"""Multiple choice: a model that knows, one that likes a letter, and how generated answers are read."""

from __future__ import annotations

import re

import pytest

from data.evaluation import choice
from data.evaluation.figures import Figure
from data.evaluation.parts import Exposure
from data.evaluation.questions import LETTERS, VERDICTS, Question, QuestionSet, medqa_prompt, pubmedqa_prompt

QUESTIONS = [
    Question(str(i), f"Whose number is {i}?", tuple(f"w{i + (k - i) % 4}" for k in range(4)), i % 4) for i in range(20)
]
SET = QuestionSet("medqa", "Numbers", QUESTIONS, LETTERS, medqa_prompt, {"f": "0"})
VERDICT_SET = QuestionSet(
    "pubmedqa", "Verdicts", [Question(str(i), f"Is {i} even?", VERDICTS, i % 2, context="c") for i in range(12)],
    VERDICTS, pubmedqa_prompt, {},
)  # fmt: skip


def figures(set_: QuestionSet, examinee: object, exposure: Exposure | None = None) -> dict[str, Figure]:
    outcome = choice.part(set_).run(examinee, exposure or Exposure())  # type: ignore[arg-type]
    assert len(outcome.items) == len(set_.questions)
    return {f.name.partition(".")[2]: f for f in outcome.figures}


def knows(prompt: str, ending: str) -> float:
    """The right letter where options are listed, the right text where they are not."""
    wanted = "w" + re.search(r"number is (\d+)\?", prompt)[1]  # type: ignore[index]
    listed = re.search(rf"^([A-D])\. {wanted}$", prompt, re.M)
    return 0.0 if ending.strip() == (listed[1] if listed else wanted) else -5.0


def test_a_model_that_knows_is_right_in_every_order(oracle: object) -> None:
    oracle.score = knows  # type: ignore[attr-defined]
    found = figures(SET, oracle)
    for name in ("labels.acc", "orders.acc", "orders.consistent", "texts.acc", "texts.acc_norm"):
        assert (found[name].value, found[name].standing) == (1.0, "better than floor"), name
    assert found["asked.acc"].value == 0
    assert found["asked.unparseable"].value == 1


def test_liking_a_letter_gains_nothing_over_all_orders(oracle: object) -> None:
    oracle.score = lambda prompt, ending: float(ending == " B")  # type: ignore[attr-defined]
    oracle.answer = lambda prompt: "B. That one."  # type: ignore[attr-defined]
    found = figures(SET, oracle)
    assert found["labels.acc"].indistinguishable_from_floor
    assert found["orders.acc"].value == 0.25
    assert found["orders.acc"].indistinguishable_from_floor
    assert found["orders.consistent"].value == 0
    assert found["asked.acc"].value == 0.25
    assert found["asked.unparseable"].value == 0


def test_verdicts_are_scored_as_they_are_and_per_byte(oracle: object) -> None:
    oracle.score = lambda prompt, ending: {" yes": -3.0, " no": -2.5, " maybe": -4.0}[ending]  # type: ignore[attr-defined]
    found = figures(VERDICT_SET, oracle)
    assert found["labels.acc"].value == 0.5  # no; per byte -1, -1.25, -0.8: maybe
    assert found["labels.acc_norm"].value == 0.0
    assert "orders.acc" not in found


def test_contaminated_questions_are_told_apart(oracle: object) -> None:
    oracle.score = knows  # type: ignore[attr-defined]
    flags = [i < 5 for i in range(20)]
    f = figures(SET, oracle, Exposure(flags))["labels.acc"]
    assert (f.contaminated, f.clean_value) == (5, 1.0)


def test_prompts_too_long_lose_their_beginning(oracle: object) -> None:
    oracle.max_len = 16  # type: ignore[attr-defined]
    outcome = choice.part(SET).run(oracle, Exposure())  # type: ignore[arg-type]
    assert outcome.notes == ["20 prompts were longer than the context and lost their beginning"]


def test_floors_know_the_set() -> None:
    questions = [
        Question("0", "red eye", ("a red eye drop", "b", "c", "a much longer option"), 0),
        Question("1", "red eye again", ("b", "red", "c", "a much longer option"), 0),
        Question("2", "cough", ("b", "x", "c", "a much longer option"), 3),
    ]
    floors = choice.floors(QuestionSet("x", "X", questions, LETTERS, medqa_prompt, {}))
    values = {k: f if isinstance(f, float) else f.value for k, f in floors.items()}
    assert values == {
        "chance": 0.25,
        "constant answer": pytest.approx(2 / 3),
        "longest option": pytest.approx(1 / 3),
        "words shared with the question": pytest.approx(1 / 3),
        "nearest question's answer": pytest.approx(1 / 3),
    }


def test_the_hash_follows_the_protocol() -> None:
    assert choice.part(SET).hash == choice.part(SET).hash != choice.part(SET.first(3)).hash


Q = Question("1", "?", ("aspirin", "rest", "A new drug", "surgery"), 0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(c)", "C"), ("D. surgery", "D"), ("b) rest", "B"), ("The answer is C.", "C"), ("Answer: D", "D"),
        ("Option B", "B"), ("\n A\n", "A"), ("I would choose aspirin here", "A"),
        ("A patient like you should see someone", None), ("aspirin and rest", None), ("", None),
        ("answer is A or the answer is B", None), ("Take care", None), ("The answer is a pill", None),
    ],
)  # fmt: skip
def test_letters_in_answers(text: str, letter: str | None) -> None:
    found = choice.parse(text, Q, LETTERS)
    assert (None if found is None else LETTERS[found]) == letter


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes, it does.", 0),
        ("no", 1),
        ("It may, or maybe not", 2),
        ("yes and no", 0),
        ("nothing", None),
        ("I say no or yes", None),
    ],
)
def test_verdicts_in_answers(text: str, verdict: int | None) -> None:
    assert choice.parse(text, Question("1", "?", VERDICTS, 0), VERDICTS) == verdict
