"""The built-in sample's questions, put to the model that was trained on it. Called by train.py at the end of a run.

Knows questions and scores; who answers, and who is told, are functions.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable

from data.metrics import retrieval_ceiling, share_named_right
from data.synthesize import Sample
from llama.chat import Message

Answer = Callable[[list[tuple[Message, ...]]], list[str]]  # to dialogues that end in a question


def examine(sample: Sample, answer: Answer, tell: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Ask the held-out questions: three answers beside the reference, and how many are right, told and returned."""
    asked, unseen = sample.held_out_examples, sample.unseen_wordings
    alone = [e.dialogue.messages[:1] for e in asked]
    later = [
        before.dialogue.messages + e.dialogue.messages[:1]
        for before, e in zip([asked[-1], *asked], asked, strict=False)
    ]
    answers = answer(alone)
    columns = shutil.get_terminal_size().columns
    for e, text in list(zip(asked, answers, strict=True))[:3]:
        tell("")
        for who, said in (("Patient:", e.question), ("Model:", text), ("Reference:", e.answer)):
            tell(textwrap.fill(f"{who:11}{said}", columns, subsequent_indent=" " * 11))
    tell(f"\nThe right condition is named in, of {len(asked)} held-out questions each:")
    tell(f"   model   ranking the table by\n{'symptoms':>19}{'words':>9}")
    shares = {}
    for title, examples, texts in (
        ("unseen sentences and sets of symptoms", asked, answers),
        ("the same, as a second question", asked, answer(later)),
        ("and every symptom in unseen words", unseen, answer([e.dialogue.messages[:1] for e in unseen])),
    ):
        named = share_named_right(sample.table, examples, texts)
        by_symptoms, by_words = retrieval_ceiling(sample.table, examples)
        tell(f"  {named:6.1%}{by_symptoms:11.1%}{by_words:9.1%}   {title}")
        shares[title] = {"model": named, "ranking_by_symptoms": by_symptoms, "ranking_by_words": by_words}
    return shares
