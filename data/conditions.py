"""The table of conditions (data/sample/) -> frozen dataclasses, and which condition fits some symptoms best.

data/synthesize.py makes dialogues out of it, data/metrics.py finds its names in answers. Never talks to the model: the
ranking here is plain word counting, the ceiling that a model's answers are held against. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.reviewable import numbered_lines

SAMPLE = Path(__file__).parent / "sample"
URGENCIES = ("emergency", "urgent", "routine")
MIN_SYMPTOMS, MAX_SYMPTOMS = 6, 9

_KEYS = ("condition", "synonyms", "urgency", "frequency", "symptoms", "tests", "medications", "red flags")
_OPTIONAL = ("synonyms", "frequency")
_WORD = re.compile(r"[a-z0-9']+")


@dataclass(frozen=True)
class Symptom:
    """A symptom and how patients say it. `held_out` wordings are never used for training."""

    name: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """One condition. `article` is what it is spoken with ("a", "an", "the" or nothing); `symptoms` are names."""

    name: str
    article: str
    synonyms: tuple[str, ...]
    urgency: str
    common: bool
    symptoms: tuple[str, ...]
    tests: tuple[str, ...]
    medications: tuple[str, ...]
    red_flags: tuple[str, ...]

    @property
    def spoken(self) -> str:
        """The name as it stands in a sentence: "a heart attack"."""
        return f"{self.article} {self.name}".strip()


@dataclass(frozen=True)
class Table:
    """All conditions in file order, and the symptoms they refer to by name."""

    conditions: tuple[Condition, ...]
    symptoms: dict[str, Symptom]

    @cached_property
    def owners(self) -> dict[str, frozenset[str]]:
        """Names of the conditions that have each symptom."""
        return {s: frozenset(c.name for c in self.conditions if s in c.symptoms) for s in self.symptoms}

    def condition(self, name: str) -> Condition:
        """The condition of that name. ValueError if there is none."""
        for c in self.conditions:
            if c.name == name:
                return c
        raise ValueError(f"no condition is called {name!r}")


def load_table(folder: str | Path = SAMPLE) -> Table:
    """Table of `conditions.txt` and `symptoms.txt` in a folder. ValueError names file, line and remedy."""
    symptoms = read_symptoms(Path(folder) / "symptoms.txt")
    conditions = read_conditions(Path(folder) / "conditions.txt", symptoms)
    return Table(tuple(conditions), symptoms)


def read_symptoms(path: str | Path) -> dict[str, Symptom]:
    """Symptoms of a file of `name: wording; wording | held-out wording` lines, by name."""
    symptoms: dict[str, Symptom] = {}
    seen: dict[str, int] = {}  # wording -> line
    for number, line in _lines(path):
        if not line:
            continue
        name, colon, rest = line.partition(":")
        known, bar, held_out = rest.partition("|")
        name = name.strip()
        if not name or not colon or not bar:
            raise _at(path, number, f"{_short(line)} is not `name: wording; wording | held-out wording`")
        if name in symptoms:
            raise _at(path, number, f"symptom {name!r} stands twice; join the two lines")
        symptom = Symptom(name, _values(path, number, known), _values(path, number, held_out))
        for wording in symptom.wordings + symptom.held_out:
            if wording.lower() in seen:
                first = seen[wording.lower()]
                raise _at(path, number, f"wording {wording!r} stands in line {first} already; give it to one symptom")
            seen[wording.lower()] = number
        symptoms[name] = symptom
    return symptoms


def read_conditions(path: str | Path, symptoms: dict[str, Symptom]) -> list[Condition]:
    """Conditions of a file of blocks, checked: unique names, known symptoms, enough of them, no two sets equal."""
    conditions: list[Condition] = []
    names: dict[str, int] = {}  # name or synonym -> line
    sets: dict[frozenset[str], str] = {}
    block: dict[str, tuple[int, str]] = {}
    start = 0
    for number, line in [*_lines(path), (0, "")]:  # a last empty line ends the last block
        if line:
            start = start or number
            key, colon, value = line.partition(":")
            if not colon or key not in _KEYS:
                raise _at(path, number, f"{_short(line)} is not `key: value; value` with a key of {', '.join(_KEYS)}")
            if key in block:
                raise _at(path, number, f"{key!r} stands twice in one block; put an empty line between conditions")
            block[key] = (number, value)
        elif block:
            condition = _condition(path, start, block, symptoms)
            for name in (condition.name, *condition.synonyms):
                if name.lower() in names:
                    raise _at(path, start, f"the name {name!r} is taken by line {names[name.lower()]}; rename one")
                names[name.lower()] = start
            twin = sets.setdefault(frozenset(condition.symptoms), condition.name)
            if twin != condition.name:
                raise _at(path, start, f"{condition.name!r} has the symptoms of {twin!r}; tell them apart")
            conditions.append(condition)
            block, start = {}, 0
    if not conditions:
        raise ValueError(f"{path}: no conditions; it needs at least one block that begins with `condition: NAME`")
    return conditions


def _condition(
    path: str | Path, start: int, block: dict[str, tuple[int, str]], symptoms: dict[str, Symptom]
) -> Condition:
    for key in _KEYS:
        if key not in block and key not in _OPTIONAL:
            raise _at(path, start, f"the block has no {key!r} line; add one")
    fields = {key: _values(path, number, value) for key, (number, value) in block.items()}
    if len(fields["condition"]) != 1:
        raise _at(path, block["condition"][0], "a condition has one name; further ones go to `synonyms`")
    head, _, rest = fields["condition"][0].partition(" ")
    article, name = (head, rest) if head in ("a", "an", "the") and rest else ("", fields["condition"][0])
    if fields["urgency"][0] not in URGENCIES or len(fields["urgency"]) != 1:
        raise _at(path, block["urgency"][0], f"urgency must be one of {', '.join(URGENCIES)}")
    if fields.get("frequency", ("common",)) != ("common",):
        raise _at(path, block["frequency"][0], "frequency can only be common; leave the line out otherwise")
    mine, number = fields["symptoms"], block["symptoms"][0]
    for symptom in mine:
        if symptom not in symptoms:
            raise _at(path, number, f"symptom {symptom!r} is not in symptoms.txt; add its wordings there")
    if len(set(mine)) != len(mine):
        raise _at(path, number, "a symptom stands twice; name it once")
    if not MIN_SYMPTOMS <= len(mine) <= MAX_SYMPTOMS:
        raise _at(path, number, f"{len(mine)} symptoms; name {MIN_SYMPTOMS} to {MAX_SYMPTOMS}")
    return Condition(
        name,
        article,
        fields.get("synonyms", ()),
        fields["urgency"][0],
        "frequency" in fields,
        mine,
        fields["tests"],
        fields["medications"],
        fields["red flags"],
    )


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """(line number, stripped line) without the comment lines."""
    numbered = ((i, line.strip()) for i, line in numbered_lines(path, "the table"))
    return [(i, line) for i, line in numbered if not line.startswith("#")]


def _values(path: str | Path, number: int, text: str) -> tuple[str, ...]:
    values = tuple(part.strip() for part in text.split(";"))
    if not all(values):
        raise _at(path, number, "an empty value; write `value; value` with no semicolon at the end")
    return values


def _at(path: str | Path, number: int, message: str) -> ValueError:
    return ValueError(f"{path}:{number}: {message}")


def _short(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")


def listed(parts: Sequence[str], word: str) -> str:
    """Parts as a sentence lists them: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


# --- ranking --------------------------------------------------------------------------------------

Rank = list[tuple[Condition, float]]


def words_of(text: str) -> list[str]:
    """The lower-case words of a text."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def singular(word: str) -> str:
    """A lower-case word without the s of a plural."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "sui" else word


def rank_by_symptoms(table: Table) -> Callable[[Iterable[str]], Rank]:
    """A function that ranks all conditions by the summed IDF of the symptoms (names) that they share; best first."""
    return _ranker(table, {c.name: set(c.symptoms) for c in table.conditions})


def rank_by_text(table: Table) -> Callable[[str], Rank]:
    """The same over words: a condition's document is its symptoms' names and training wordings."""
    documents: dict[str, set[str]] = {}
    for c in table.conditions:
        texts = [t for s in c.symptoms for t in (s, *table.symptoms[s].wordings)]
        documents[c.name] = {word for t in texts for word in words_of(t)}
    ranker = _ranker(table, documents)
    return lambda text: ranker(words_of(text))


def _ranker(table: Table, documents: dict[str, set[str]]) -> Callable[[Iterable[str]], Rank]:
    frequency = Counter(term for terms in documents.values() for term in terms)
    idf = {term: math.log(len(documents) / n) for term, n in frequency.items()}

    def rank(terms: Iterable[str]) -> Rank:
        asked = sorted(set(terms))  # sorted: sums of floats must not depend on hash order
        scored = [(c, sum(idf[t] for t in asked if t in documents[c.name])) for c in table.conditions]
        return sorted(scored, key=lambda pair: -pair[1])  # stable: ties stay in table order

    return rank
