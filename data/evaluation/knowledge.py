"""Facts that a model is asked for: diseases with their symptoms, tests and medications, from the table or a database.

recall.py makes closed questions of them, replies.py a lexicon, safety.py a probe for what was quarantined.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.conditions import Table, load_table
from data.diseases import Entry, open_database
from data.evaluation.lexicon import Lexicon

_BRACKETS = re.compile(r" \(([^()]+)\)")
SHARED_BY = 0.5  # share of the quarantined rows that hold a placeholder


@dataclass(frozen=True)
class Fact:
    """A disease. `spoken` is its name in a sentence ("a heart attack")."""

    name: str
    spoken: str
    synonyms: tuple[str, ...]
    symptoms: tuple[str, ...]
    tests: tuple[str, ...]
    medications: tuple[str, ...]


@dataclass(frozen=True)
class Knowledge:
    """All facts of one source, those that a linter quarantined apart. `identity` tells one source from another."""

    title: str
    identity: str
    facts: tuple[Fact, ...]
    quarantined: tuple[Fact, ...] = ()
    other_names: Mapping[str, str] = field(default_factory=dict)  # of tests and medications -> the name in the facts

    def all(self, kind: str) -> tuple[str, ...]:
        """Every symptom, test or medication, once, in order."""
        return tuple(dict.fromkeys(name for f in self.facts for name in getattr(f, kind)))

    @cached_property
    def lexicon(self) -> Lexicon:
        """Names of all kinds; synonyms of diseases, tests and medications count as these."""
        names = {kind: self._with_others(self.all(kind)) for kind in ("symptoms", "tests", "medications")}
        diseases = {said: f.name for f in reversed(self.facts) for said in (*f.synonyms, f.name)}
        return Lexicon({"diseases": diseases, **names})

    @property
    def placeholders(self) -> Lexicon | None:
        """What the quarantined rows share and no sound row has: tests and medications that stand for nothing.

        A name of three letters ("Air") is left out: it stands in ordinary sentences.
        """
        if not self.quarantined:
            return None
        names = {}
        for kind in ("tests", "medications"):
            held = Counter(n for f in self.quarantined for n in set(getattr(f, kind)))
            sound = set(self.all(kind))
            shared = [n for n, k in held.items() if k >= SHARED_BY * len(self.quarantined) and n not in sound]
            names[kind] = self._with_others([n for n in shared if len(n) > 3])
        return Lexicon(names) if any(names.values()) else None

    def _with_others(self, names: Iterable[str]) -> dict[str, str]:
        meant = {n: n.lower() for n in names}
        return {other: meant[n] for other, n in self.other_names.items() if n in meant} | meant


def of_table(table: Table | None = None) -> Knowledge:
    """The project's own table of conditions."""
    table = table or load_table()
    facts = tuple(Fact(c.name, c.spoken, c.synonyms, c.symptoms, c.tests, c.medications) for c in table.conditions)
    return Knowledge("the built-in table of conditions", _identity(facts), facts)


def of_database(path: str | Path) -> Knowledge:
    """A disease database (data/diseases.py). ValueError where it is none."""
    database = open_database(path)

    others: dict[str, str] = {}

    def fact(e: Entry) -> Fact:
        tests, medications = (_plain(names, others) for names in (e.tests, e.medications))
        return Fact(e.name, e.name[:1].lower() + e.name[1:], e.synonyms, e.symptoms, tests, medications)

    bad = {f.entry for f in database.findings("quarantined")}
    entries = {e.id: e for e in (database.entry(i) for i in bad)}
    hits = database.by_symptoms(database.names("symptoms"), limit=1 << 30, quarantined=True)
    entries |= {h.entry.id: h.entry for h in hits}
    diseases = [e for _, e in sorted(entries.items()) if e.kind == "disease"]
    sound = tuple(fact(e) for e in diseases if e.id not in bad)
    if not sound:
        raise ValueError(f"{path}: holds no disease with symptoms; nothing can be asked about it")
    poisoned = tuple(fact(e) for e in diseases if e.id in bad)
    return Knowledge(str(path), _identity((*sound, *poisoned)), _merged(sound), poisoned, others)


def _plain(names: Iterable[str], others: dict[str, str]) -> tuple[str, ...]:
    """The names without what stands in brackets behind them, which goes to `others`: "Grepafloxacin (Raxar)"."""
    plain = []
    for name in names:
        head = name.partition(" (")[0]
        plain.append(head)
        others.update((other, head) for other in _BRACKETS.findall(name))
    return tuple(dict.fromkeys(plain))


def _merged(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """One fact a name: two sources may each have a row for a disease."""
    by_name: dict[str, Fact] = {}
    for f in facts:
        key = f.name.lower()
        old = by_name.get(key)
        if old is None:
            by_name[key] = f
            continue
        joined = [
            tuple(dict.fromkeys(getattr(old, k) + getattr(f, k)))
            for k in ("synonyms", "symptoms", "tests", "medications")
        ]
        by_name[key] = Fact(old.name, old.spoken, *joined)
    return tuple(by_name.values())


def _identity(facts: tuple[Fact, ...]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
