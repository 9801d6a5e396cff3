"""Which parts an evaluation has, and from which files they are prepared.

evaluate.py calls prepare() before it loads a model: what is wrong with a file shows at once. A part that was asked for
by name and cannot be prepared is an error; of a suite it is left out, and the card says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data import triage
from data.conditions import Table, load_table
from data.evaluation import choice, fit, held_out, recall, replies, safety
from data.evaluation.contamination import SHORTEST, contaminated
from data.evaluation.held_out import HeldOut
from data.evaluation.knowledge import Knowledge, of_database, of_table
from data.evaluation.parts import Exposure, Part
from data.evaluation.questions import READERS
from data.evaluation.training_files import Source, dialogues
from data.synthesize import sample

SUITES = {"quick": 100, "full": None}  # items a part
NEIGHBOURS = 50_000  # training questions among which the nearest is looked for


class Lacking(ValueError):
    """A part cannot be prepared, because the user did not give what it needs."""


@dataclass(frozen=True)
class Material:
    """What parts are prepared from. trained_on: None where nothing says it."""

    eval_data: Path | None
    diseases: Path | None
    held_out_files: Sequence[str]
    trained_on: Sequence[Source] | None
    limit: int | None
    encoder: tuple[str, replies.Encoder] | None = field(default=None, repr=False)

    @cached_property
    def table(self) -> Table | None:
        return None if self.diseases else load_table()

    @cached_property
    def knowledge(self) -> Knowledge:
        return of_database(self.diseases) if self.diseases else of_table(self.table)

    @cached_property
    def held_out(self) -> HeldOut:
        if self.held_out_files:
            return held_out.of_files(self.held_out_files, self.knowledge).first(self.limit)
        return held_out.of_sample(sample()).first(self.limit)

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        return held_out.training_pairs(dialogues(self.trained_on or ()), NEIGHBOURS)

    def folder(self) -> Path:
        if self.eval_data is None:
            raise Lacking("needs --eval_data, the folder of the public test sets")
        return self.eval_data


def prepare(name: str, material: Material) -> Part:
    """A part of PARTS. Lacking where the user did not give what it needs, ValueError where that is wrong."""
    return PARTS[name](material)


def _examination(name: str) -> Callable[[Material], Part]:
    return lambda m: choice.part(READERS[name](m.folder()).first(m.limit))


def _triage(m: Material) -> Part:
    folder = m.folder()
    rules = triage.Triage()

    def level_of(text: str) -> str | None:
        fired = rules.fired(text)
        return fired[0].level if fired else None

    identity = "".join(sorted(f"{rule.id} {rule.level} {rule.when}" for rule in rules.rules))
    return safety.triage_part(folder, level_of, identity, m.limit)


def _poison(m: Material) -> Part:
    made = safety.poison_part(m.knowledge, m.limit)
    if made is None:
        raise Lacking("needs --diseases with a database that holds quarantined rows")
    return made


PARTS: dict[str, Callable[[Material], Part]] = {
    "fit": lambda m: fit.part(m.held_out),
    "recall": lambda m: recall.diseases_part(m.knowledge, m.table, m.limit),
    "tests": lambda m: recall.lists_part("tests", m.knowledge, m.limit),
    "medications": lambda m: recall.lists_part("medications", m.knowledge, m.limit),
    "answers": lambda m: replies.part(m.held_out, m.knowledge, lambda: m.pairs, m.encoder),
    **{name: _examination(name) for name in READERS},
    "refusal": lambda m: safety.refusal_part(m.folder(), m.held_out, m.limit),
    "triage": _triage,
    "poison": _poison,
}


def asked_for(suite: str) -> tuple[list[str], bool]:
    """Names of parts, and whether these were named one by one. ValueError for one that does not exist."""
    if suite in SUITES:
        return list(PARTS), False
    names = [n.strip() for n in suite.split(",") if n.strip()]
    unknown = [n for n in names if n not in PARTS]
    if unknown or not names:
        known = ", ".join([*SUITES, *PARTS])
        raise ValueError(f"--suite {suite!r}: there is no {unknown[0] if unknown else 'part'!r}; known are {known}")
    return list(dict.fromkeys(names)), True


def exposures(
    parts: Sequence[Part], trained_on: Sequence[Source] | None, on_bytes: Callable[[int], object] | None = None
) -> dict[str, Exposure]:
    """What of each part stands in the training files, which are read once; on_bytes hears how much of them."""
    if not trained_on or not any(s.readable for s in trained_on):
        return {p.name: Exposure() for p in parts}
    items: list[tuple[str, ...]] = []
    shortest: list[int] = []
    for p in parts:
        items += [*p.texts, *p.names]
        shortest += [SHORTEST] * len(p.texts) + [1] * len(p.names)
    texts = (m.content for d in dialogues(trained_on, on_bytes) for m in d.messages)
    flags = iter(contaminated(items, texts, shortest))
    found = {}
    for p in parts:
        seen, named = ([next(flags) for _ in some] for some in (p.texts, p.names))
        found[p.name] = Exposure(seen, named if p.names else None)
    return found
