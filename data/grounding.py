"""Answers grounded in the disease database: rows into the prompt, citations out of the answer, what is unsourced.

generate.py and servers put a Grounding beside the model (llama/attendant.py). with_rows() is the one form in which
rows stand before a question; data/grounded_samples.py trains on it. Knows entries and dialogues, never the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.conditions import listed
from data.disease_search import Words
from data.diseases import PASSAGE, Database, Entry, Hit
from llama.attendant import Attendant
from llama.chat import Dialogue, Message

ROWS = 3  # diseases before a question: the right one is among the first three of the own table for 100 % of held-out
# questions, for 98 % of those in unseen words
NONE = "No entry."

# When a disease fits a question: measured by bench/bench_grounding.py, which has the shares of questions on either side.
WORTH, COVERED = 1.75, 0.45

_SYMPTOMS, _ITEMS = 9, 4  # of a row that are put into the prompt
_PASSAGE, _SHORT = 600, 160  # characters of a passage: in the prompt, behind the answer
_CITED = re.compile(r"\[DB ?(\d+(?:, ?(?:DB ?)?\d+)*)\]")


def cite(entry: Entry) -> str:
    """A row as an answer names it."""
    return f"{entry.name} [DB {entry.id}]"


def row_text(entry: Entry) -> str:
    """A row as it stands in a prompt, as short as a small context wants it: symptoms, then name and citation, then facts.

    A model that reads from left to right knows a row's symptoms when it meets the name; name, citation and facts stand
    as in an answer, which so can be copied.
    """
    if entry.kind == PASSAGE:
        return f"{' '.join(entry.text.split())[:_PASSAGE]}: {cite(entry)}."
    urgency = f", {entry.urgency}" if entry.urgency else ""
    return " ".join([f"{', '.join(entry.symptoms[:_SYMPTOMS])}: {cite(entry)}{urgency}.", *facts(entry)])


def facts(entry: Entry) -> list[str]:
    """The sentences of a row that an answer may take over."""
    lists = (("Tests", entry.tests), ("Treatment", entry.medications))
    return [f"{title}: {listed(items[:_ITEMS], 'and')}." for title, items in lists if items]


def with_rows(question: str, rows: Sequence[Entry]) -> str:
    """A patient's turn with what the database has for it."""
    return "\n".join([*map(row_text, rows), question]) if rows else f"{NONE}\n{question}"
