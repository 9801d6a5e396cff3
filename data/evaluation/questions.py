"""Multiple-choice examinations on disk -> questions, with lm-evaluation-harness's prompts to the byte.

MedQA (4 options), MedMCQA, PubMedQA and MMLU's six medical subjects, as their authors publish them. choice.py puts
them to a model. The prompts are those of EleutherAI's tasks medqa_4options, medmcqa, pubmedqa and mmlu_*, zero shots.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LETTERS = ("A", "B", "C", "D")
VERDICTS = ("yes", "no", "maybe")
MMLU_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)


@dataclass(frozen=True)
class Question:
    """One item. `options` are texts in the file's order, `right` the place of the right one.

    context stands before the question in the prompt: PubMedQA's abstract. subject: MMLU's and MedMCQA's.
    """

    key: str
    text: str
    options: tuple[str, ...]
    right: int
    subject: str = ""
    context: str = ""

    def rotated(self, by: int) -> Question:
        """The same with the options moved on by so many places."""
        n = len(self.options)
        options = tuple(self.options[(i - by) % n] for i in range(n))
        return Question(self.key, self.text, options, (self.right + by) % n, self.subject, self.context)


@dataclass(frozen=True)
class QuestionSet:
    """An examination: its questions, what comes before them, and what is put behind the prompt (the labels).

    lettered: the labels are letters that stand before the options, so that options can be rotated and texts scored.
    by_subject: each subject is an examination of its own, with a constant answer of its own.
    """

    name: str
    title: str
    questions: Sequence[Question]
    labels: tuple[str, ...]
    prompt: Callable[[Question], str]
    files: Mapping[str, str]  # name -> sha256
    by_subject: bool = False

    @property
    def lettered(self) -> bool:
        return self.labels == LETTERS

    def first(self, limit: int | None) -> QuestionSet:
        """So many questions, taken evenly over the set: a file may be sorted."""
        if limit is None or limit >= len(self.questions):
            return self
        picked = [self.questions[i * len(self.questions) // limit] for i in range(limit)]
        return replace(self, questions=picked)

    @property
    def template(self) -> str:
        """The prompt with names in braces in place of a question."""
        options = tuple(f"{{{letter}}}" for letter in LETTERS) if self.lettered else self.labels
        return self.prompt(Question("", "{question}", options, 0, "{subject}", "{context}"))


# --- prompts --------------------------------------------------------------------------------------


def _lettered(q: Question) -> str:
    return "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, q.options, strict=True))


def medqa_prompt(q: Question) -> str:
    return f"Question: {q.text}\n{_lettered(q)}Answer:"


def medmcqa_prompt(q: Question) -> str:
    return f"Question: {q.text}\nChoices:\n{_lettered(q)}Answer:"


def pubmedqa_prompt(q: Question) -> str:
    return f"Abstract: {q.context}\nQuestion: {q.text}\nAnswer:"


def mmlu_prompt(q: Question) -> str:
    about = q.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return f"{head}{q.text.strip()}\n{_lettered(q)}Answer:"


def cloze_prompt(q: Question) -> str:
    """For scoring the options' texts: they are not listed, each is put behind the prompt."""
    return f"Question: {q.text}\nAnswer:"


# --- files ----------------------------------------------------------------------------------------


def read_medqa(folder: Path) -> QuestionSet:
    path = folder / "medqa_us_4opt_test.jsonl"
    questions = []
    for where, d in _json_lines(path):
        options = _field(d, "options", dict, where)
        if tuple(options) != LETTERS or not all(isinstance(o, str) for o in options.values()):
            raise ValueError(f"{where}: options must be texts under A, B, C and D")
        texts = tuple(options.values())
        answer = _field(d, "answer", str, where)
        letter = d.get("answer_idx", "ABCD"[texts.index(answer)] if answer in texts else None)
        if letter not in LETTERS:
            raise ValueError(f"{where}: the answer is none of the options")
        questions.append(Question(where.rpartition(" ")[2], _field(d, "question", str, where), texts, ord(letter) - 65))
    return QuestionSet("medqa", "MedQA-USMLE, 4 options", questions, LETTERS, medqa_prompt, _hashes(path))


def read_medmcqa(folder: Path) -> QuestionSet:
    path = folder / "medmcqa_dev.jsonl"
    questions = []
    for where, d in _json_lines(path):
        options = tuple(_field(d, f"op{letter}", str, where) for letter in "abcd")
        right = _field(d, "cop", int, where)
        if not 1 <= right <= 4:
            raise ValueError(f"{where}: cop is {right}; it must be 1 to 4")
        text, subject = _field(d, "question", str, where), d.get("subject_name") or ""
        questions.append(Question(str(d.get("id", where)), text, options, right - 1, subject))
    return QuestionSet("medmcqa", "MedMCQA, dev", questions, LETTERS, medmcqa_prompt, _hashes(path))


def read_pubmedqa(folder: Path) -> QuestionSet:
    """The 500 test items: those that the ground-truth file names."""
    path, truth = folder / "pubmedqa_pqal.json", folder / "pubmedqa_test_ground_truth.json"
    items, verdicts = _json(path), _json(truth)
    questions = []
    for key, verdict in verdicts.items():
        where = f"{path} item {key}"
        if verdict not in VERDICTS:
            raise ValueError(f"{truth}: {key} is {verdict!r}; it must be yes, no or maybe")
        if not isinstance(items.get(key), dict):
            raise ValueError(
                f"{path}: has no item {key}, which {truth.name} names; the two files do not belong together"
            )
        contexts = _field(items[key], "CONTEXTS", list, where)
        if not all(isinstance(c, str) for c in contexts):
            raise ValueError(f"{where}: CONTEXTS must be texts")
        text = _field(items[key], "QUESTION", str, where)
        questions.append(Question(key, text, VERDICTS, VERDICTS.index(verdict), context="\n".join(contexts)))
    return QuestionSet("pubmedqa", "PubMedQA, test", questions, VERDICTS, pubmedqa_prompt, _hashes(path, truth))


def read_mmlu(folder: Path) -> QuestionSet:
    paths = [folder / "mmlu_med" / f"{subject}_test.csv" for subject in MMLU_SUBJECTS]
    questions = []
    for subject, path in zip(MMLU_SUBJECTS, paths, strict=True):
        for n, row in enumerate(csv.reader(_text(path).splitlines(keepends=True)), 1):
            if len(row) != 6 or row[5] not in LETTERS:
                raise ValueError(f"{path} row {n}: wanted question, four options and a letter A to D")
            questions.append(Question(f"{subject} {n}", row[0], tuple(row[1:5]), LETTERS.index(row[5]), subject))
    return QuestionSet("mmlu", "MMLU, six medical subjects", questions, LETTERS, mmlu_prompt, _hashes(*paths), True)


READERS: dict[str, Callable[[Path], QuestionSet]] = {
    "medqa": read_medqa,
    "medmcqa": read_medmcqa,
    "pubmedqa": read_pubmedqa,
    "mmlu": read_mmlu,
}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or "not UTF-8"
        raise ValueError(f"{path}: cannot be read ({why}); --eval_data names the folder that holds it") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} line {e.lineno}: not valid JSON ({e.msg}); fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of every line that is not blank. ValueError for one that is broken, or none at all."""
    empty = True
    for n, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} line {n}: not valid JSON ({e.msg}); fetch the file again") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path} line {n}: holds {type(value).__name__}, not an object")
        empty = False
        yield f"{path} line {n}", value
    if empty:
        raise ValueError(f"{path}: holds no questions")


def _field(d: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = d.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{where}: {name} is {'missing' if name not in d else repr(value)[:40]}; wanted {kind.__name__}"
        )
    return value


def _hashes(*paths: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
