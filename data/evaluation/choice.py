"""Multiple-choice questions put to a model: by the likelihood of letters and of the options' texts, and by asking.

The likelihood measures what a model knows, the generated letter whether it does as told; both are reported. Questions
and prompts are questions.py's. Letters are scored as lm-evaluation-harness does: BOS (which the harness leaves to the
tokenizer), the prompt, and the log-probability of " A" and so on; a prompt that is too long loses its beginning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.conditions import words_of
from data.evaluation.examinee import Examinee, chat_prompt, continued, text_prompt
from data.evaluation.figures import Figure, Floor, Scores, figure
from data.evaluation.neighbours import Neighbours
from data.evaluation.parts import Exposure, Flags, Outcome, Part
from data.evaluation.questions import LETTERS, Question, QuestionSet, cloze_prompt

MAX_NEW_TOKENS = 32  # of a generated answer: a letter, and some words around it
ORDERS = len(LETTERS)


def part(set_: QuestionSet) -> Part:
    """An examination as a part of an evaluation."""
    protocol = {
        "set": set_.files,
        "questions": len(set_.questions),
        "prompt": set_.template,
        "shots": 0,
        "scoring": "BOS + prompt, sum of log p of ' ' + label; acc_norm: divided by UTF-8 bytes of the label",
        "asked": _asked("{prompt}Answer:", set_.labels),
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    texts = [(q.text, q.context) if q.context else (q.text,) for q in set_.questions]

    def work(examinee: Examinee, exposure: Exposure, protocol: str) -> Outcome:
        return _Sitting(examinee, set_, exposure.contaminated, protocol).outcome()

    return Part(set_.name, set_.title, protocol, texts, work)


class _Sitting:
    """One model, one examination."""

    def __init__(self, examinee: Examinee, set_: QuestionSet, contaminated: Flags, protocol: str) -> None:
        self.examinee, self.set, self.questions = examinee, set_, set_.questions
        self.contaminated, self.protocol = contaminated, protocol
        self.right = [q.right for q in self.questions]
        self.floors = floors(set_)
        self.cut = 0

    def outcome(self) -> Outcome:
        letters, by_bytes = self._by_label()
        figures = [self._accuracy("labels.acc", letters, "of the label after the prompt, by likelihood")]
        if len({len(label.encode()) for label in self.set.labels}) > 1:
            figures.append(self._accuracy("labels.acc_norm", by_bytes, "the same per byte of the label"))
        items: list[dict[str, Any]] = [
            {"key": q.key, "right": self.set.labels[q.right], "label": self.set.labels[chosen]}
            for q, chosen in zip(self.questions, letters, strict=True)
        ]
        if self.set.lettered:
            figures += self._in_all_orders(letters)
            plain, normed = self._by_text()
            figures.append(self._accuracy("texts.acc", plain, "of the options' texts, which the prompt does not list"))
            figures.append(self._accuracy("texts.acc_norm", normed, "the same per byte of the text"))
            for item, chosen in zip(items, normed, strict=True):
                item["text"] = LETTERS[chosen]
        figures += self._by_asking(items)
        notes = [f"{self.cut:,} prompts were longer than the context and lost their beginning"] if self.cut else []
        return Outcome(figures, items, notes)

    # --- ways of answering ---

    def _by_label(self) -> tuple[list[int], list[int]]:
        """The likeliest label of every question, and the likeliest per byte."""
        return self._chosen(self.questions, count_cut=True)

    def _chosen(self, questions: Sequence[Question], count_cut: bool = False) -> tuple[list[int], list[int]]:
        endings = [continued(self.examinee, f" {label}") for label in self.set.labels]
        room = max(map(len, endings))
        prompts = [text_prompt(self.examinee, self.set.prompt(q), room) for q in questions]
        if count_cut:
            self.cut = sum(was_cut for _, was_cut in prompts)
        found = self.examinee.continuations([(ids, endings) for ids, _ in prompts])
        sizes = [len(label.encode()) for label in self.set.labels]
        return _likeliest(found, [[1] * len(sizes)] * len(found)), _likeliest(found, [sizes] * len(found))

    def _by_text(self) -> tuple[list[int], list[int]]:
        asked = []
        for q in self.questions:
            endings = [continued(self.examinee, f" {option}") for option in q.options]
            asked.append((text_prompt(self.examinee, cloze_prompt(q), max(map(len, endings)))[0], endings))
        found = self.examinee.continuations(asked)
        sizes = [[max(1, len(o.encode())) for o in q.options] for q in self.questions]
        return _likeliest(found, [[1] * ORDERS] * len(found)), _likeliest(found, sizes)

    def _in_all_orders(self, letters: Sequence[int]) -> list[Figure]:
        """With the options moved on by 0 to 3 places, where a letter that is liked for itself gains nothing."""
        options = [list(letters)]  # chosen options, as places in the file's order
        for by in range(1, ORDERS):
            chosen, _ = self._chosen([q.rotated(by) for q in self.questions])
            options.append([(c - by) % ORDERS for c in chosen])
        per_item = list(zip(*options, strict=True))
        accuracy = [sum(o == right for o in some) / ORDERS for some, right in zip(per_item, self.right, strict=True)]
        same = [len(set(some)) == 1 for some in per_item]
        return [
            self._figure(
                "orders.acc",
                Scores.of(accuracy),
                {"any constant letter": 1 / ORDERS},
                "mean of four orders of the options",
            ),
            self._figure(
                "orders.consistent",
                Scores.of(same),
                {"chance": ORDERS ** (1 - ORDERS)},
                "same option chosen in all four orders",
            ),
        ]

    def _by_asking(self, items: list[dict[str, Any]]) -> list[Figure]:
        prompts = [
            chat_prompt(self.examinee, _asked(self.set.prompt(q), self.set.labels), MAX_NEW_TOKENS)
            for q in self.questions
        ]
        replies = self.examinee.replies(prompts, MAX_NEW_TOKENS)
        chosen = [parse(r.text, q, self.set.labels) for r, q in zip(replies, self.questions, strict=True)]
        for item, reply, place in zip(items, replies, chosen, strict=True):
            item["said"], item["parsed"] = reply.text, None if place is None else self.set.labels[place]
        lost = Scores.of([c is None for c in chosen])
        figures = [self._accuracy("asked.acc", chosen, "of the label in a generated answer; none counts as wrong")]
        figures.append(
            figure(
                f"{self.set.name}.asked.unparseable",
                lost,
                protocol=self.protocol,
                better="neither",
                floors={"constant answer": 0.0},
                contaminated=self.contaminated,
                note="generated answers that name no label or several",
            )
        )
        return figures

    # --- figures ---

    def _accuracy(self, name: str, chosen: Sequence[int | None], note: str) -> Figure:
        scores = Scores.of([c == right for c, right in zip(chosen, self.right, strict=True)])
        groups = [q.subject for q in self.questions] if any(q.subject for q in self.questions) else None
        return self._figure(name, scores, self.floors, note, groups)

    def _figure(
        self, name: str, scores: Scores, floors: Mapping[str, Floor], note: str, groups: Sequence[str] | None = None
    ) -> Figure:
        return figure(
            f"{self.set.name}.{name}", scores, protocol=self.protocol, floors=floors, contaminated=self.contaminated,
            groups=groups, note=note,
        )  # fmt: skip


def _likeliest(found: Sequence[Sequence[Sequence[float]]], sizes: Sequence[Sequence[int]]) -> list[int]:
    """The place of the largest summed log-probability per size; the first one of equals."""
    chosen = []
    for row, by in zip(found, sizes, strict=True):
        scores = [sum(tokens) / size for tokens, size in zip(row, by, strict=True)]
        chosen.append(scores.index(max(scores)))
    return chosen


# --- floors ---------------------------------------------------------------------------------------


def floors(set_: QuestionSet) -> dict[str, Floor]:
    """What answers without knowledge reach on these questions: chance, the best constant answer, and word counting.

    The constant is the label that is right most often in the set, in each of MMLU's subjects. The nearest question's
    answer is that of another question of the set (BM25), or the option that shares most words with it.
    """
    questions, n = set_.questions, len(set_.labels)
    constant = constant_answers(set_)
    answers: dict[str, list[int]] = {"constant answer": constant}
    near = Neighbours([f"{q.context} {q.text}" for q in questions])
    by_neighbour, by_words, longest = [], [], []
    for i, q in enumerate(questions):
        other = questions[near.nearest(f"{q.context} {q.text}", excluded=i)]
        if set_.lettered:
            by_neighbour.append(_most_shared(q, other.options[other.right], near, constant[i]))
            by_words.append(_most_shared(q, q.text, near, constant[i]))
            longest.append(max(range(n), key=lambda k: len(q.options[k])))
        else:
            by_neighbour.append(other.right)
    answers["nearest question's answer"] = by_neighbour
    if set_.lettered:
        answers |= {"words shared with the question": by_words, "longest option": longest}
    right = [q.right for q in questions]
    measured = {k: Scores.of([a == b for a, b in zip(v, right, strict=True)]) for k, v in answers.items()}
    return {"chance": 1 / n, **measured}


def constant_answers(set_: QuestionSet) -> list[int]:
    """For every question the label that is right most often in its examination."""
    groups = [q.subject if set_.by_subject else "" for q in set_.questions]
    counted: dict[str, Counter[int]] = {}
    for q, group in zip(set_.questions, groups, strict=True):
        counted.setdefault(group, Counter())[q.right] += 1
    best = {group: min(c, key=lambda k: (-c[k], k)) for group, c in counted.items()}
    return [best[group] for group in groups]


def _most_shared(q: Question, text: str, near: Neighbours, otherwise: int) -> int:
    words = set(words_of(text))
    shared = [sum(near.idf(w) for w in sorted(words & set(words_of(o)))) for o in q.options]
    return shared.index(max(shared)) if max(shared) > 0 else otherwise


# --- asking ---------------------------------------------------------------------------------------


def _asked(prompt: str, labels: Sequence[str]) -> str:
    """The prompt as a question to a chat model."""
    wanted = (
        "the letter of the right option" if tuple(labels) == LETTERS else f"{', '.join(labels[:-1])} or {labels[-1]}"
    )
    return f"{prompt.removesuffix('Answer:')}Answer with {wanted}."


_LETTER_FIRST = re.compile(r"^\W*(?:option\s+)?\(?([A-D])(?:\)|[.:,;]|\s*$|\s*\n)", re.IGNORECASE)
_LETTER_NAMED = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:|would be)?\s*:?\s*\(?([A-D])\b(?!')", re.IGNORECASE)


def parse(text: str, question: Question, labels: Sequence[str]) -> int | None:
    """The place of the option that a generated answer names, or None: no label, or several.

    A letter counts at the beginning with a mark or the end behind it, or behind "answer", "option" or "choice" ("A
    patient ..." names nothing); else an option's whole text, if only one stands there.
    """
    if tuple(labels) != LETTERS:
        named = [k for k, label in enumerate(labels) if re.search(rf"\b{label}\b", text, re.IGNORECASE)]
        first = re.match(rf"\W*({'|'.join(labels)})\b", text, re.IGNORECASE)
        if first:
            return [x.lower() for x in labels].index(first.group(1).lower())
        return named[0] if len(named) == 1 else None
    if first := _LETTER_FIRST.match(text):
        return LETTERS.index(first.group(1).upper())
    letters = {m.group(1).upper() for m in _LETTER_NAMED.finditer(text) if m.group(1).isupper()}
    if len(letters) == 1:
        return LETTERS.index(letters.pop())
    low = " ".join(text.lower().split())
    whole = [k for k, o in enumerate(question.options) if o.strip() and " ".join(o.lower().split()) in low]
    return whole[0] if len(whole) == 1 and not letters else None
