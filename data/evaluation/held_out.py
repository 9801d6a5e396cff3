"""Dialogues that a model was not trained on, with what each is about: the built-in sample's, or those of files.

fit.py asks how likely a model finds their answers, replies.py has it answer their questions, safety.py takes the
questions as benign ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.evaluation.knowledge import Knowledge
from data.evaluation.parts import evenly
from data.records import content_key, is_plain, read_records
from data.synthesize import Sample
from llama.chat import Dialogue, Message

_TOPICS = (
    ("tests", re.compile(r"\btests?\b|\bscans?\b|\bx-?rays?\b|\bdiagnostic", re.IGNORECASE)),
    ("medications", re.compile(r"\bmedic(?:ations?|ines?)\b|\bdrugs?\b|\btreat|\btake\b", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Item:
    """A question with its reference answer; the dialogue holds both, and what stood before them.

    disease: what it is about, where known. topic: what the question asks for.
    """

    dialogue: Dialogue
    question: str
    answer: str
    disease: str
    topic: str


@dataclass(frozen=True)
class HeldOut:
    """Held-out items of one source."""

    title: str
    identity: str
    items: Sequence[Item]

    def first(self, limit: int | None) -> HeldOut:
        return HeldOut(self.title, self.identity, evenly(self.items, limit))


def of_sample(sample: Sample) -> HeldOut:
    """The sample's held-out questions, and those in unseen words."""
    examples = [*sample.held_out_examples, *sample.unseen_wordings]
    items = [Item(e.dialogue, e.question, e.answer, e.condition, topic_of(e.question)) for e in examples]
    return HeldOut("the built-in sample's held-out questions", _identity(items), items)


def of_files(paths: Sequence[str | Path], knowledge: Knowledge) -> HeldOut:
    """The first exchange of every dialogue in these files; the disease is the first one that is named in it.

    ValueError for a file that cannot be read or a record that cannot be used, and where there are none.
    """
    items = []
    for path in paths:
        for record in read_records(path, instruction=""):  # the checkpoint's own is put in front
            if not is_plain(record.dialogue):
                items.append(_item(record.dialogue, knowledge))
    if not items:
        raise ValueError(f"{', '.join(map(str, paths))}: no dialogue to ask; --held_out needs questions with answers")
    return HeldOut(", ".join(Path(p).name for p in paths), _identity(items), items)


def _item(dialogue: Dialogue, knowledge: Knowledge) -> Item:
    system = dialogue.messages[0].content if dialogue.messages[0].role == "system" else ""
    turns = [m.content for m in dialogue.messages if m.role != "system"]
    question, answer = turns[0] or system, turns[1] if len(turns) > 1 else ""
    named = [name for text in (question, answer) for kind, name in knowledge.lexicon.find(text) if kind == "diseases"]
    head = dialogue.messages[:1] if system else ()
    kept = Dialogue((*head, Message("user", turns[0]), Message("assistant", answer)))
    return Item(kept, question, answer, named[0] if named else "", topic_of(question))


def topic_of(question: str) -> str:
    """What a question asks for, by its words."""
    return next((topic for topic, pattern in _TOPICS if pattern.search(question)), "diagnosis and other")


def training_pairs(dialogues: Iterable[Dialogue], limit: int) -> list[tuple[str, str]]:
    """Question and answer of the first `limit` training dialogues: where neighbours are looked for."""
    pairs: list[tuple[str, str]] = []
    for d in dialogues:
        turns = [m.content for m in d.messages if m.role != "system"]
        if len(turns) > 1:
            pairs.append((turns[0], turns[1]))
        if len(pairs) == limit:
            break
    return pairs


def _identity(items: Sequence[Item]) -> str:
    keys = b"".join(content_key(i.dialogue).to_bytes(8, "little") for i in items)
    return hashlib.sha256(keys).hexdigest()[:12]
