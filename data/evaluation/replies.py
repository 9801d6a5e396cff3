"""Free answers to held-out questions: what they name, how they are said, and how like the reference they read.

Names count first: precision and recall of diseases, symptoms, tests and medications against the reference answer.
Likeness (ROUGE-L, chrF, BERTScore) stands beside the same of a constant sentence and of the nearest neighbour's
answer, which such scores reward. How answers are said stands beside the references themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data.conditions import words_of
from data.evaluation import conduct
from data.evaluation.examinee import Examinee, Reply, chat_prompt
from data.evaluation.figures import Figure, Floor, Scores, figure
from data.evaluation.held_out import HeldOut, Item
from data.evaluation.knowledge import Knowledge
from data.evaluation.lexicon import KINDS
from data.evaluation.neighbours import Neighbours
from data.evaluation.parts import Exposure, Outcome, Part, evenly
from data.evaluation.similarity import Rescaled, chrf, greedy_matching, random_baseline, rouge_l
from llama.chat import Dialogue

MAX_NEW_TOKENS = 200
CANDIDATES = 60  # references among which the constant sentence is chosen, and against which
Pairs = Callable[[], Sequence[tuple[str, str]]]  # questions and answers of the training files
Encoder = Callable[[Sequence[str]], list[np.ndarray]]


def part(held_out: HeldOut, knowledge: Knowledge, pairs: Pairs, encoder: tuple[str, Encoder] | None = None) -> Part:
    """Free answers as a part of an evaluation. encoder: its name and itself; None: the model's own hidden states."""
    protocol = {
        "held out": held_out.identity,
        "items": len(held_out.items),
        "knowledge": knowledge.identity,
        "decoding": f"greedy, at most {MAX_NEW_TOKENS} tokens, no repetition penalty",
        "encoder": encoder[0] if encoder else "own hidden states",
        "chrF": chrf() is not None,
    }

    def work(examinee: Examinee, exposure: Exposure, protocol: str) -> Outcome:
        return _Answers(examinee, held_out.items, knowledge, exposure, protocol).outcome(pairs(), encoder)

    texts = [(i.question, i.answer) for i in held_out.items]
    return Part("answers", f"Free answers, {held_out.title}", protocol, texts, work)


class _Answers:
    """One model's answers and those of the floors."""

    def __init__(
        self, examinee: Examinee, items: Sequence[Item], knowledge: Knowledge, exposure: Exposure, protocol: str
    ) -> None:
        self.examinee, self.items, self.knowledge = examinee, items, knowledge
        self.exposure, self.protocol = exposure, protocol

    def outcome(self, pairs: Sequence[tuple[str, str]], encoder: tuple[str, Encoder] | None) -> Outcome:
        room = min(MAX_NEW_TOKENS, self.examinee.max_len // 2)
        prompts = [chat_prompt(self.examinee, Dialogue(i.dialogue.messages[:-1]), room) for i in self.items]
        replies = self.examinee.replies(prompts, room)
        answers = [r.text for r in replies]
        references = [i.answer for i in self.items]
        floors = {"constant sentence": [constant_sentence(references)] * len(references)}
        where = "of the training files" if pairs else "of the other questions"
        floors[f"nearest neighbour's answer, {where}"] = nearest_answers(self.items, pairs)
        figures = [*self._names(answers, floors), *self._conduct(replies, references), *self._likeness(answers, floors)]
        vectors_of, title = (
            (encoder[1], encoder[0]) if encoder else (self.examinee.vectors, "the model's own hidden states")
        )
        matched = self._matching(answers, floors, vectors_of, title)
        rows = [
            {"question": i.question, "reference": i.answer, "answer": r.text, "stopped": r.stopped, "tokens": r.tokens}
            for i, r in zip(self.items, replies, strict=True)
        ]
        notes = [] if chrf() else ["chrF is left out: sacrebleu is not installed (extra `eval`)"]
        return Outcome([*figures, *matched], rows, notes)

    # --- what is named ---

    def _names(self, answers: Sequence[str], floors: Mapping[str, Sequence[str]]) -> list[Figure]:
        wanted = [set(self.knowledge.lexicon.find(i.answer)) for i in self.items]
        named = {
            k: [set(self.knowledge.lexicon.find(t)) for t in texts] for k, texts in {"": answers, **floors}.items()
        }
        figures = []
        for kind in KINDS:
            if not any(name[0] == kind for names in wanted for name in names):
                continue
            counted = {
                k: [_counts(w, f, kind) for w, f in zip(wanted, found, strict=True)] for k, found in named.items()
            }
            for what, place in (("precision", 1), ("recall", 2)):
                scores = {k: Scores([c[0] for c in rows], [c[place] for c in rows]) for k, rows in counted.items()}
                ours = scores.pop("")
                of = "named in the answer" if place == 1 else "named in the reference"
                figures.append(self._figure(f"entities.{kind}.{what}", ours, scores, f"of {kind} {of}"))
        if any(i.disease for i in self.items):
            figures.append(self._right_disease(answers, floors))
        return figures

    def _right_disease(self, answers: Sequence[str], floors: Mapping[str, Sequence[str]]) -> Figure:
        def right(texts: Sequence[str]) -> Scores:
            found = [
                next((name for kind, name in self.knowledge.lexicon.find(t) if kind == "diseases"), None) for t in texts
            ]
            known = [(i.disease.lower(), name) for i, name in zip(self.items, found, strict=True)]
            return Scores(
                [float(bool(d) and name is not None and name.lower() == d) for d, name in known],
                [float(bool(d)) for d, _ in known],
            )

        return self._figure(
            "disease_named_first", right(answers), {k: right(t) for k, t in floors.items()},
            "the first disease named in the answer is the item's",
        )  # fmt: skip

    # --- how it is said ---

    def _conduct(self, replies: Sequence[Reply], references: Sequence[str]) -> list[Figure]:
        texts = [r.text for r in replies]
        figures = [
            self._figure(
                "stopped",
                Scores.of([r.stopped for r in replies]),
                {"reference answers": 1.0},
                "ended by the model itself",
                None,
            )
        ]
        measures: tuple[tuple[str, Callable[[str], bool], str], ...] = (
            ("repetition", conduct.loops, "one run of 8 words 4 times or more in an answer"),
            ("role_leak", conduct.leaks_role, "the answer goes on as another turn of the dialogue"),
            (
                "dose_without_source",
                lambda t: bool(conduct.unsourced_doses(t)),
                "an amount of medicine, and no citation",
            ),
        )
        for name, measure, note in measures:
            ours, theirs = (Scores.of([measure(t) for t in some]) for some in (texts, references))
            figures.append(self._figure(name, ours, {"reference answers": theirs}, note, None))
        words = [float(len(words_of(t))) for t in texts]
        longs = [float(len(words_of(t))) for t in references]
        figures.append(
            self._figure(
                "length_ratio",
                Scores(words, longs),
                {"reference answers": 1.0},
                "words, to the references'",
                None,
                "score",
            )
        )
        return figures

    # --- how like the reference it reads ---

    def _likeness(self, answers: Sequence[str], floors: Mapping[str, Sequence[str]]) -> list[Figure]:
        measures: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l}
        if (of_characters := chrf()) is not None:
            measures["chrf"] = of_characters
        figures = []
        for name, measure in measures.items():
            scores = {
                k: Scores.of([measure(t, i.answer) for t, i in zip(texts, self.items, strict=True)])
                for k, texts in {"": answers, **floors}.items()
            }
            ours = scores.pop("")
            figures.append(self._figure(name, ours, scores, "likeness to the reference, 0 to 1", unit="score"))
        return figures

    def _matching(
        self, answers: Sequence[str], floors: Mapping[str, Sequence[str]], vectors_of: Encoder, title: str
    ) -> list[Figure]:
        if len(self.items) < 2:
            return []
        places = evenly(range(len(self.items)), 10 * CANDIDATES)  # vectors take memory
        references = vectors_of([self.items[i].answer for i in places])
        rescaled = Rescaled(random_baseline(references))
        flags = self.exposure.contaminated and [self.exposure.contaminated[i] for i in places]
        scores = {}
        for k, texts in {"": answers, **floors}.items():
            vectors = vectors_of([texts[i] for i in places])
            f1 = [greedy_matching(v, r)[2] for v, r in zip(vectors, references, strict=True)]
            scores[k] = Scores.of([rescaled(f) for f in f1])
        ours = scores.pop("")
        note = f"F1 over {title}, rescaled by the {rescaled.baseline:.3f} of random pairs of references"
        return [
            figure(
                "answers.bertscore_rescaled", ours, protocol=self.protocol, floors={**scores, "random pairs": 0.0},
                unit="score", contaminated=flags, note=note,
            )
        ]  # fmt: skip

    def _figure(
        self,
        name: str,
        scores: Scores,
        floors: Mapping[str, Floor],
        note: str,
        better: Any = "higher",
        unit: str = "share",
    ) -> Figure:
        return figure(
            f"answers.{name}", scores, protocol=self.protocol, floors=floors, better=better or "neither", unit=unit,
            contaminated=self.exposure.contaminated, note=note,
        )  # fmt: skip


def _counts(wanted: set[tuple[str, str]], found: set[tuple[str, str]], kind: str) -> tuple[float, float, float]:
    """Names of a kind in both, in what was found, in what was wanted."""
    w, f = ({name for k, name in names if k == kind} for names in (wanted, found))
    return float(len(w & f)), float(len(f)), float(len(w))


def constant_sentence(references: Sequence[str]) -> str:
    """The reference that is most like the others by ROUGE-L, of some candidates: the best answer to everything."""
    candidates = evenly(list(dict.fromkeys(references)), CANDIDATES)
    others = evenly(references, CANDIDATES)
    return max(candidates, key=lambda c: sum(rouge_l(c, r) for r in others))


def nearest_answers(items: Sequence[Item], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The answer to the nearest question (BM25) of the training files; without these, of the other items."""
    if pairs:
        near = Neighbours([q for q, _ in pairs])
        return [pairs[near.nearest(i.question)][1] for i in items]
    near = Neighbours([i.question for i in items])
    return [items[near.nearest(i.question, excluded=k)].answer for k, i in enumerate(items)]
