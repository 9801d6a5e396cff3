"""Rules that change a text, and the record of what they changed. Used by the cleaning steps; knows none of them.

A rule is a pattern and a function from a match to its replacement; None leaves the match as it is. Placeholders such as
[NAME] are holy: no rule reaches into one, and only a rule that drops text takes one away whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

WORD_LISTS = Path(__file__).parent
CONTEXT = 40  # characters on either side of a change that are kept for the report
MAX_PASSES = 20  # more than any text needed: what one rule uncovers another may take, and every pass leaves less

PLACEHOLDER = re.compile(r"\[(?:NAME|PHONE|EMAIL|URL|RECORD NUMBER|ADDRESS|DATE OF BIRTH)\]")


@dataclass(frozen=True)
class Change:
    """What one rule did in one place: the text before and after, and what stood around it."""

    rule: str
    before: str
    after: str
    left: str
    right: str


@dataclass(frozen=True)
class Rule:
    """A pattern and what becomes of its matches; None from replace leaves one.

    keys, guard: what a text must hold for the pattern to match at all, cheap to look for: one of these texts, in lower
    case unless cased; a pattern; a character beyond ASCII. tail: only so many last characters are looked at.
    """

    name: str
    pattern: re.Pattern[str]
    replace: Callable[[re.Match[str]], str | None]
    keys: tuple[str, ...] = ()
    guard: re.Pattern[str] | None = None
    cased: bool = False
    beyond_ascii: bool = False
    tail: int = 0
    drops: bool = False  # takes whole placeholders along with the sentence they stand in

    def can_match(self, text: str, lower: str, guards: dict[re.Pattern[str], bool]) -> bool:
        """Whether the pattern is worth trying; guards remembers what each guard found in this text."""
        if self.beyond_ascii and text.isascii():
            return False
        if self.guard is not None:
            if self.guard not in guards:
                guards[self.guard] = self.guard.search(text) is not None
            if not guards[self.guard]:
                return False
        where = text if self.cased else lower
        for key in self.keys:  # not any(): a generator costs more than the search
            if key in where:
                return True
        return not self.keys


def words(file: str, fold: bool = True) -> frozenset[str]:
    """A word list of data/cleaning/: words between white space, # begins a comment."""
    text = (WORD_LISTS / file).read_text(encoding="utf-8")
    found = " ".join(line.partition("#")[0] for line in text.splitlines()).split()
    return frozenset(word.lower() for word in found) if fold else frozenset(found)


def rewrite(text: str, rules: Sequence[Rule], changes: list[Change]) -> str:
    """The text after all rules, in turn and again until each has found nothing since the last change.

    So rewriting twice is rewriting once. Changes are appended in the order they are made.
    """
    lower, idle = text.lower(), 0
    guards: dict[re.Pattern[str], bool] = {}
    for _ in range(MAX_PASSES):
        for rule in rules:
            idle += 1
            if rule.can_match(text, lower, guards):
                changed = _apply(rule, text, changes)
                if changed is not text:
                    text, lower, idle, guards = changed, changed.lower(), 0, {}
            if idle == len(rules):
                return text
    return text


def _apply(rule: Rule, text: str, changes: list[Change]) -> str:
    held = [m.span() for m in PLACEHOLDER.finditer(text)] if "[" in text else []
    parts, at = [], 0
    for m in rule.pattern.finditer(text, max(0, len(text) - rule.tail) if rule.tail else 0):
        start, end = m.span()
        touched = [s for s in held if s[0] < end and s[1] > start]
        if touched and not (rule.drops and all(start <= s[0] and s[1] <= end for s in touched)):
            continue
        after = rule.replace(m)
        if after is None or after == m[0]:
            continue
        left, right = text[max(0, start - CONTEXT) : start], text[end : end + CONTEXT]
        changes.append(Change(rule.name, m[0], after, left, right))
        parts += [text[at:start], after]
        at = end
    if not parts:
        return text
    return "".join([*parts, text[at:]])
