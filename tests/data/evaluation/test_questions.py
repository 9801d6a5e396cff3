"""The examinations: lm-evaluation-harness's prompts to the byte, the real files' counts and floors, broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.evaluation import choice
from data.evaluation.questions import (
    MMLU_SUBJECTS,
    READERS,
    Question,
    QuestionSet,
    medmcqa_prompt,
    medqa_prompt,
    mmlu_prompt,
    pubmedqa_prompt,
    read_medmcqa,
    read_medqa,
    read_mmlu,
    read_pubmedqa,
)
from llama.tokenizer import Tokenizer

Q = Question("1", " Which one? ", ("a b", "c", "d", "e"), 2, "college_medicine", "First.\nSecond.")


def test_prompts_are_the_harness_s() -> None:
    """Worked out by hand from lm_eval/tasks: medqa, medmcqa (whose list has a head), mmlu (stripped), pubmedqa."""
    options = "A. a b\nB. c\nC. d\nD. e\n"
    assert medqa_prompt(Q) == f"Question:  Which one? \n{options}Answer:"
    assert medmcqa_prompt(Q) == f"Question:  Which one? \nChoices:\n{options}Answer:"
    assert mmlu_prompt(Q) == (
        "The following are multiple choice questions (with answers) about college medicine.\n\n"
        f"Which one?\n{options}Answer:"
    )
    assert pubmedqa_prompt(Q) == "Abstract: First.\nSecond.\nQuestion:  Which one? \nAnswer:"


def test_rotating_takes_the_right_option_along() -> None:
    for by in range(5):
        turned = Q.rotated(by)
        assert turned.options[turned.right] == "d"
    assert Q.rotated(1).options == ("e", "a b", "c", "d")
    assert Q.rotated(4) == Q


@pytest.fixture(scope="module")
def sets(shared: Path) -> dict[str, QuestionSet]:
    return {name: read(shared / "data/eval") for name, read in READERS.items()}


@pytest.mark.parametrize(
    ("name", "n", "constant"),
    [("medqa", 1273, 0.277), ("medmcqa", 4183, 0.322), ("pubmedqa", 500, 0.552), ("mmlu", 1089, 0.342)],
)
def test_constant_answers_on_the_real_sets(sets: dict[str, QuestionSet], name: str, n: int, constant: float) -> None:
    """Always A, A, yes, and the best letter of each subject."""
    assert len(sets[name].questions) == n
    answers = choice.constant_answers(sets[name])
    right = sum(a == q.right for a, q in zip(answers, sets[name].questions, strict=True))
    assert right / n == pytest.approx(constant, abs=5e-4)


def test_labels_are_tokens_of_their_own(sets: dict[str, QuestionSet], llama_tokenizer: Tokenizer) -> None:
    """The ids of prompt and label joined are those that the harness gets from the whole text."""
    for set_ in sets.values():
        for q in set_.first(25).questions:
            for label in set_.labels:
                whole = llama_tokenizer.encode(f"{set_.prompt(q)} {label}")
                assert whole == llama_tokenizer.encode(set_.prompt(q)) + llama_tokenizer.encode(
                    f" {label}", continued=True
                )


def test_first_is_spread_over_the_set() -> None:
    questions = [Question(str(i), "?", ("a", "b", "c", "d"), 0) for i in range(10)]
    set_ = QuestionSet("x", "X", questions, ("A", "B", "C", "D"), medqa_prompt, {})
    assert [q.key for q in set_.first(3).questions] == ["0", "3", "6"]
    assert set_.first(99) is set_


def medqa_line(**changed: object) -> str:
    d = {"question": "q", "answer": "x", "options": {"A": "x", "B": "y", "C": "z", "D": "w"}, "answer_idx": "A"}
    return json.dumps({**d, **changed})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{broken\n", "line 1: not valid JSON"),
        (medqa_line() + "\n[1]\n", "line 2: holds list"),
        (medqa_line(question=None), "line 1: question is None; wanted str"),
        (medqa_line(options={"A": "x"}), "options must be texts"),
        (medqa_line(answer="v", answer_idx=None), "none of the options"),
        ("\n", "holds no questions"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "medqa_us_4opt_test.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_medqa(tmp_path)


def test_other_sets_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"medmcqa_dev.jsonl: cannot be read .*--eval_data"):
        read_medmcqa(tmp_path)
    line = {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 5}
    (tmp_path / "medmcqa_dev.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="cop is 5"):
        read_medmcqa(tmp_path)
    (tmp_path / "pubmedqa_pqal.json").write_text("{}")
    (tmp_path / "pubmedqa_test_ground_truth.json").write_text('{"1": "yes"}')
    with pytest.raises(ValueError, match="has no item 1"):
        read_pubmedqa(tmp_path)
    (tmp_path / "mmlu_med").mkdir()
    for subject in MMLU_SUBJECTS:
        (tmp_path / "mmlu_med" / f"{subject}_test.csv").write_text("q,a,b,c,d,E\n")
    with pytest.raises(ValueError, match="row 1: wanted question"):
        read_mmlu(tmp_path)
