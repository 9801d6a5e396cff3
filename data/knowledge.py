"""Facts that a model is asked for: diseases with their symptoms, tests and medications, from the table or a database.

recall.py makes closed questions of them, replies.py a lexicon, safety.py a probe for what was quarantined.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.conditions import Table, load_table
from data.diseases import Entry, open_database
from data.lexicon import Lexicon

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

    def all(self, kind: str) -> tuple[str, ...]:
        """Every symptom, test or medication, once, in order."""
        return tuple(dict.fromkeys(name for f in self.facts for name in getattr(f, kind)))

    @cached_property
    def lexicon(self) -> Lexicon:
        """Names of all kinds; a disease's synonyms count as the disease."""
        names = {kind: {n: n.lower() for n in self.all(kind)} for kind in ("symptoms", "tests", "medications")}
        diseases = {said: f.name for f in reversed(self.facts) for said in (*f.synonyms, f.name)}
        return Lexicon({"diseases": diseases, **names})

    @property
    def placeholders(self) -> Lexicon | None:
        """What the quarantined rows share and no sound row has: tests and medications that stand for nothing."""
        if not self.quarantined:
            return None
        names = {}
        for kind in ("tests", "medications"):
            held = Counter(n for f in self.quarantined for n in set(getattr(f, kind)))
            sound = set(self.all(kind))
            names[kind] = [n for n, k in held.items() if k >= SHARED_BY * len(self.quarantined) and n not in sound]
        return Lexicon.of(names) if any(names.values()) else None


def of_table(table: Table | None = None) -> Knowledge:
    """The project's own table of conditions."""
    table = table or load_table()
    facts = tuple(Fact(c.name, c.spoken, c.synonyms, c.symptoms, c.tests, c.medications) for c in table.conditions)
    return Knowledge("the built-in table of conditions", _identity(facts), facts)


def of_database(path: str | Path) -> Knowledge:
    """A disease database (data/diseases.py). ValueError where it is none."""
    database = open_database(path)

    def fact(e: Entry) -> Fact:
        return Fact(e.name, e.name, e.synonyms, e.symptoms, e.tests, e.medications)

    bad = {f.entry for f in database.findings("quarantined")}
    entries = {e.id: e for e in (database.entry(i) for i in bad)}
    hits = database.by_symptoms(database.names("symptoms"), limit=1 << 30, quarantined=True)
    entries |= {h.entry.id: h.entry for h in hits}
    diseases = [e for _, e in sorted(entries.items()) if e.kind == "disease"]
    sound = tuple(fact(e) for e in diseases if e.id not in bad)
    if not sound:
        raise ValueError(f"{path}: holds no disease with symptoms; nothing can be asked about it")
    poisoned = tuple(fact(e) for e in diseases if e.id in bad)
    return Knowledge(str(path), _identity((*sound, *poisoned)), _merged(sound), poisoned)


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
