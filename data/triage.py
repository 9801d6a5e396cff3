"""Triage: how urgent is what a patient says, by rules that a clinician can read (data/rules/), before a model answers.

generate.py and servers put a Triage beside the model (llama/attendant.py). Three levels: emergency, doctor, self-care;
no rule, no notice. Knows findings and people, never the model. Standard library only. A rule list is no triage nurse,
and no clinician has reviewed this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data.mentions import Finder, Phrase, phrases
from data.person import Person, person_of
from data.reviewable import numbered_lines
from llama.attendant import Attendant
from llama.chat import Dialogue

RULES = Path(__file__).parent / "rules"
LEVELS = ("emergency", "doctor", "self-care")  # most urgent first

_SAID = {
    "emergency": "EMERGENCY (rule {id}). {notice} Call your local emergency number now (112 in the European Union, 999 "
    "in the United Kingdom, 911 in the United States and Canada) or go to an emergency department. Do not wait for an "
    "answer here.",
    "doctor": "See a doctor (rule {id}). {notice}",
    "self-care": "Self-care (rule {id}). {notice} See a doctor if it gets worse or does not pass.",
}
_KEYS = ("rule", "level", "when", "without", "age", "sex", "pregnant", "notice", "fires", "silent")
_UNITS = {"days": 1 / 365.25, "weeks": 7 / 365.25, "months": 1 / 12, "years": 1.0}


@dataclass(frozen=True)
class Rule:
    """One rule. Each of `when` is a list of parts, all of which must be present, by one of their findings."""

    id: str
    level: str
    when: tuple[tuple[frozenset[str], ...], ...]
    without: frozenset[str]
    ages: tuple[float, float] | None  # years: from, and below
    sex: str | None
    weeks: int | None  # of pregnancy, at least; 0: pregnant at all
    notice: str
    fires: tuple[str, ...]
    silent: tuple[str, ...]

    def applies(self, findings: Collection[str], person: Person) -> bool:
        """Whether it fires for someone with these findings."""
        if self.ages and not any(self.ages[0] <= age < self.ages[1] for age in person.ages):
            return False
        if self.sex and person.sex not in (self.sex, None):
            return False
        if self.weeks is not None and not (person.pregnant and (person.weeks or self.weeks) >= self.weeks):
            return False
        if not self.without.isdisjoint(findings):
            return False
        return any(all(not part.isdisjoint(findings) for part in parts) for parts in self.when)

    def said(self) -> str:
        """The notice with its id and whom to call."""
        return _SAID[self.level].format(id=self.id, notice=self.notice)


class Triage(Attendant):
    """The rules, put to what a patient has said so far; `card` knows age, sex and pregnancy where the words do not."""

    def __init__(self, card: Callable[[], Person] = Person) -> None:
        self.finder, self.rules = load()
        self.card = card

    def fired(self, text: str) -> list[Rule]:
        """The rules that fire for a text, most urgent first."""
        findings = self.finder.present(text)
        if not findings:
            return []
        person = person_of(text).or_else(self.card())
        return [rule for rule in self.rules if rule.applies(findings, person)]

    def before(self, dialogue: Dialogue) -> str | None:
        """The first rule's notice. In a longer dialogue what is said adds up, and only what the last question sets off
        is said, if nothing more urgent was said before."""
        said = [m.content for m in dialogue.messages if m.role == "user"]
        fired = self.fired("\n\n".join(said))
        if len(said) > 1:
            known, last = self.fired("\n\n".join(said[:-1])), self.fired(said[-1])
            fired = [r for r in fired if r.level == fired[0].level and (r in last or r not in known)]
        return fired[0].said() if fired else None


@cache
def load(folder: Path = RULES) -> tuple[Finder, tuple[Rule, ...]]:
    """The finder of findings.txt and the rules of triage.txt, most urgent first. ValueError names file and line."""
    known = read_findings(folder / "findings.txt")
    rules = read_rules(folder / "triage.txt", {p.name for p in known})
    return Finder(known), tuple(sorted(rules, key=lambda r: LEVELS.index(r.level)))


def read_findings(path: Path) -> list[Phrase]:
    """Phrases of a file of `name: phrase; phrase` lines."""
    found: list[Phrase] = []
    for number, line in _lines(path):
        name, colon, rest = line.partition(":")
        if not line:
            continue
        if not colon or " or " in name or "+" in name:
            raise ValueError(f"{path}:{number}: not `name: phrase; phrase`, with no + or `or` in the name")
        try:
            found += [p for text in rest.split(";") for p in phrases(name.strip(), text.strip())]
        except ValueError as e:
            raise ValueError(f"{path}:{number}: {e}") from None
    return found


def read_rules(path: Path, findings: Collection[str]) -> list[Rule]:
    """Rules of a file of blocks, checked: unique ids, known findings, cases on both sides."""
    rules: list[Rule] = []
    block: dict[str, list[str]] = {}
    start = 0
    for number, line in [*_lines(path), (0, "")]:
        if line:
            start = start if block else number
            key, colon, value = (part.strip() for part in line.partition(":"))
            if not colon or key not in _KEYS or not value:
                raise ValueError(f"{path}:{number}: not `key: value` with a key of {', '.join(_KEYS)}")
            block.setdefault(key, []).append(value)
        elif block:
            try:
                rules.append(_rule(block, findings))
            except ValueError as e:
                raise ValueError(f"{path}:{start}: {e}") from None
            if rules[-1].id in {r.id for r in rules[:-1]}:
                raise ValueError(f"{path}:{start}: the id {rules[-1].id} stands twice")
            block = {}
    return rules


def _rule(block: dict[str, list[str]], findings: Collection[str]) -> Rule:
    for key in ("rule", "level", "when", "notice", "fires", "silent"):
        if key not in block:
            raise ValueError(f"the rule has no line `{key}:`")
    for key in ("rule", "level", "age", "sex", "pregnant", "notice"):
        if len(block.get(key, ())) > 1:
            raise ValueError(f"`{key}:` stands twice in one rule; blocks are apart by a blank line")
    (level,), sex = block["level"], block.get("sex", [None])[0]
    if level not in LEVELS or sex not in (None, "female", "male"):
        raise ValueError(f"level is one of {', '.join(LEVELS)}, sex female or male")
    when = tuple(tuple(_any_of(part, findings) for part in line.split("+")) for line in block["when"])
    without = frozenset().union(*(_any_of(line, findings) for line in block.get("without", ())))
    ages = _ages(block["age"][0]) if "age" in block else None
    weeks = _weeks(block["pregnant"][0]) if "pregnant" in block else None
    return Rule(
        block["rule"][0],
        level,
        when,
        without,
        ages,
        sex,
        weeks,
        block["notice"][0],
        tuple(block["fires"]),
        tuple(block["silent"]),
    )


def _any_of(text: str, findings: Collection[str]) -> frozenset[str]:
    names = [name.strip() for name in text.split(" or ")]
    for name in names:
        if name not in findings:
            raise ValueError(f"{name!r} is no finding; add a line for it to findings.txt")
    return frozenset(names)


def _ages(text: str) -> tuple[float, float]:
    if m := re.fullmatch(r"under (\d+) (days|weeks|months|years)", text):
        return 0.0, int(m[1]) * _UNITS[m[2]]
    if m := re.fullmatch(r"(\d+) and over", text):
        return float(m[1]), float("inf")
    if m := re.fullmatch(r"(\d+) to (\d+) years", text):
        return float(m[1]), float(m[2])
    raise ValueError(f"age is {text!r}; write `under 3 months`, `60 and over` or `2 to 5 years`")


def _weeks(text: str) -> int:
    if text == "yes":
        return 0
    if m := re.fullmatch(r"(\d+) weeks and over", text):
        return int(m[1])
    raise ValueError(f"pregnant is {text!r}; write `yes` or `20 weeks and over`")


def _lines(path: Path) -> list[tuple[int, str]]:
    """(line number, stripped line) without the comment lines."""
    return [(i, line.strip()) for i, line in numbered_lines(path)]
