"""Names in a text: which diseases, symptoms, tests and medications of a lexicon an answer mentions.

replies.py takes precision and recall of these in place of shared words. Names are matched as whole words, the longest
first; the inflections that matter in plain English (a plural) are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from data.conditions import singular

KINDS = ("diseases", "symptoms", "tests", "medications")
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_ARTICLES = {"a", "an", "the"}
_LONGEST = 12  # words of a name that are looked at


class Lexicon:
    """Names by kind, each with what it is counted as: synonyms count as one."""

    def __init__(self, names: Mapping[str, Mapping[str, str]]) -> None:
        """names: by kind, from a name or synonym to the name that it counts as."""
        self._names: dict[tuple[str, ...], set[tuple[str, str]]] = {}
        for kind, mapping in names.items():
            for said, meant in mapping.items():
                words = _words(said)
                if words and sum(map(len, words)) > 2:  # a name of one or two letters is in every text
                    self._names.setdefault(words, set()).add((kind, meant))
        self._longest = min(_LONGEST, max(map(len, self._names), default=0))

    def find(self, text: str) -> list[tuple[str, str]]:
        """(kind, name) of what the text mentions, in order, each once. Of overlapping names the longest counts."""
        words = _words(text)
        found: dict[tuple[str, str], None] = {}
        at = 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                if hits := self._names.get(words[at : at + length]):
                    found.update(dict.fromkeys(sorted(hits)))
                    at += length
                    break
            else:
                at += 1
        return list(found)


def _words(text: str) -> tuple[str, ...]:
    """Lower-case words, plurals as singulars, articles left out."""
    words = _WORD.findall(text.lower().replace("\u2019", "'"))
    return tuple(singular(w) for w in words if w not in _ARTICLES)
