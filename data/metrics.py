"""Answers -> scores: does an answer name the right condition, and how often could plain retrieval.

Called by examination.py. Words only, no model. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from data.conditions import Table, rank_by_symptoms, rank_by_text
from data.synthesize import Example


def naming(table: Table) -> Callable[[str], str | None]:
    """A function from a text to the name of the condition that it names first (by name or synonym), or None.

    Of names that begin at the same place the longest counts: "acute glaucoma" is not also "glaucoma". The first counts
    because an answer opens with its diagnosis and may warn of other conditions later.
    """
    names = {name.lower(): c.name for c in table.conditions for name in (c.name, *c.synonyms)}
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])", re.IGNORECASE)

    def named(text: str) -> str | None:
        found = pattern.search(text)
        return names[found.group().lower()] if found else None

    return named


def share_named_right(table: Table, examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Share of answers that name the condition of their example and no other one before it."""
    named = naming(table)
    right = [named(text) == e.condition for e, text in zip(examples, answers, strict=True)]
    return sum(right) / len(right)


def retrieval_ceiling(table: Table, examples: Sequence[Example]) -> tuple[float, float]:
    """Share of examples whose condition IDF ranks first, given (the true symptoms, only the question's words)."""
    by_symptoms, by_text = rank_by_symptoms(table), rank_by_text(table)
    n = len(examples)
    return (
        sum(by_symptoms(e.symptoms)[0][0].name == e.condition for e in examples) / n,
        sum(by_text(e.question)[0][0].name == e.condition for e in examples) / n,
    )
