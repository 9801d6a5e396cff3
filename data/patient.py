"""The patient card: age, sex, pregnancy, allergies, conditions and medications of who asks, in a file of their own.

generate.py puts a Patient beside the model, the server a PatientCard (llama/attendant.py): the card goes into the
instruction that a prompt begins with, gives triage an age, and an answer that recommends a drug on the allergy list is
flagged. The file is its owner's alone (mode 0600) and goes nowhere else. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data.mentions import Finder, phrase, plain
from data.person import Person
from data.reviewable import numbered_lines
from llama.attendant import Attendant, Command
from llama.chat import Dialogue, Message

ALLERGIES = Path(__file__).parent / "rules" / "allergies.txt"
SEXES = ("female", "male")
LISTS = ("allergies", "conditions", "medications")
KEYS = ("age", "sex", "pregnancy", *LISTS)
MOST, LONGEST = 40, 80  # entries of a list, letters of an entry: a card is a few lines of a prompt

HELP = """\
/patient                          show the card of who asks
/patient age 34                   set age, sex (female, male) or pregnancy (yes, no, 30 weeks); - clears it
/patient allergies + penicillin   add to allergies, conditions or medications; - takes away
/patient erase                    delete the card and its file"""


@dataclass(frozen=True)
class Card:
    """What is known of a patient; None and empty lists are unknown."""

    age: float | None = None  # years
    sex: str | None = None
    pregnancy: bool | int | None = None  # weeks, where they are known
    allergies: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    medications: tuple[str, ...] = ()

    def person(self) -> Person:
        """The part of it that triage asks for."""
        weeks = self.pregnancy if self.pregnancy and not isinstance(self.pregnancy, bool) else None
        pregnant = None if self.pregnancy is None else bool(self.pregnancy)
        return Person(() if self.age is None else (self.age,), self.sex, pregnant, weeks)

    def text(self) -> str:
        """The card in a line, the same for the same card; "" for an empty one."""
        parts = [] if self.age is None else [_age_text(self.age)]
        parts += [self.sex] if self.sex else []
        if self.pregnancy:
            parts.append("pregnant" if self.pregnancy is True else f"{self.pregnancy} weeks pregnant")
        elif self.pregnancy is not None and self.sex != "male":
            parts.append("not pregnant")
        lines = [", ".join(parts)] if parts else []
        lines += [f"{key}: {', '.join(getattr(self, key))}" for key in LISTS if getattr(self, key)]
        return f"About the patient: {'; '.join(lines)}." if lines else ""


def _age_text(age: float) -> str:
    return (
        f"{age:g} years old"
        if age >= 2
        else f"{age * 12:.0f} months old"
        if age >= 0.25
        else f"{age * 52:.0f} weeks old"
    )


def from_json(value: Any, name: str) -> Card:
    """The card in a JSON object. ValueError has a line for every mistake."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: holds {type(value).__name__}, not an object with {', '.join(KEYS)}")
    fields: dict[str, Any] = {}
    wrong = [f"{name}: {k!r} is no part of a card; there are {', '.join(KEYS)}" for k in value if k not in KEYS]
    for key in KEYS:
        if value.get(key) is not None:
            try:
                fields[key] = _checked(key, value[key])
            except ValueError as e:
                wrong.append(f"{name}: {e}")
    if fields.get("pregnancy") and fields.get("sex") == "male":
        wrong.append(f"{name}: pregnancy with sex male; correct one of them")
    if wrong:
        raise ValueError("\n".join(wrong))
    return Card(**fields)


def _checked(key: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "age":
        if not number or not 0 <= value <= 130:
            raise ValueError(f"age is {value!r}; it must be a number of years, 0 to 130 (0.1 for five weeks)")
    elif key == "sex":
        if value not in SEXES:
            raise ValueError(f"sex is {value!r}; it must be {' or '.join(SEXES)}")
    elif key == "pregnancy":
        if not isinstance(value, bool) and not (isinstance(value, int) and 1 <= value <= 45):
            raise ValueError(f"pregnancy is {value!r}; it must be true, false or a number of weeks, 1 to 45")
    else:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{key} must be a list of texts")
        if len(value) > MOST:
            raise ValueError(f"{key} has {len(value)} entries; {MOST} are the most")
        for v in value:
            if not v.strip() or len(v) > LONGEST or not v.isprintable():
                raise ValueError(f"{key}: {v[:LONGEST]!r} is not one line of 1 to {LONGEST} letters")
        return tuple(v.strip() for v in value)
    return value


def load(path: Path) -> Card:
    """The card in a file. ValueError has a line for every mistake."""
    try:
        return from_json(json.loads(path.read_bytes()), str(path))
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not valid UTF-8 at byte {e.start}") from None
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from None


def save(path: Path, card: Card) -> None:
    """Write the card, whole or not at all, for its owner's eyes only."""
    known = {k: v for k, v in asdict(card).items() if v not in (None, ())}
    whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as f:
            f.write(json.dumps(known, ensure_ascii=False, indent=1) + "\n")
            f.flush()
            os.fsync(f.fileno())
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


class PatientCard(Attendant):
    """A card beside the model."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def person(self) -> Person:
        return self.card.person()

    def prepare(self, dialogue: Dialogue) -> Dialogue:
        """The card behind the instruction, which stays when turns must go.

        A model that was trained without an instruction is not shown it: a line before the question that it never saw
        in training costs it right answers (docs/log.md, 2026-11-26).
        """
        first, *rest = dialogue.messages
        text = self.card.text()
        if first.role != "system" or not text:
            return dialogue
        return Dialogue((Message("system", f"{first.content}\n{text}"), *rest))

    def after(self, dialogue: Dialogue, answer: str) -> str | None:
        """A flag for drugs that the answer recommends and the card has an allergy to."""
        found = flagged(answer, self.card.allergies)
        if not found:
            return None
        drugs = "; ".join(f"{drug} (your card: allergy to {allergy})" for drug, allergy in found)
        return f"ALLERGY. The answer names {drugs}. Do not take it before a doctor or pharmacist has agreed."


class Patient(PatientCard):
    """The card in a file, beside the model."""

    def __init__(self, path: Path, begin: bool = False) -> None:
        """begin: a file that is not there is an empty card, written when something is put on it."""
        super().__init__(Card() if begin and not path.exists() else load(path))
        self.path = path
        self.commands = {"/patient": Command(HELP, self._command)}

    # --- /patient ---

    def _command(self, rest: str) -> str:
        try:
            if rest == "erase":
                return self._erase()
            if rest:
                self._put(changed(self.card, rest))
        except (ValueError, OSError) as e:
            return f"error: {getattr(e, 'strerror', None) or e}; the card stays as it was"
        text = self.card.text() or "The card is empty; /patient age 34 begins it."
        return f"{text} ({self.path}, on this machine only)"

    def _put(self, card: Card) -> None:
        save(self.path, card)
        self.card = card

    def _erase(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.card = Card()
        return f"The card and {self.path} are deleted."


def changed(card: Card, text: str) -> Card:
    """The card after `age 34`, `allergies + penicillin` or `conditions - asthma`. ValueError says what is wrong."""
    key, _, value = text.partition(" ")
    value = value.strip()
    if key not in KEYS or not value:
        raise ValueError(f"write one of {', '.join(KEYS)}, then its value, or erase")
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(card).items()}
    if key in LISTS:
        sign, entry = value[0], value[1:].strip()
        if sign not in "+-" or not entry:
            raise ValueError(f"write {key} + something or {key} - something")
        kept = [v for v in known[key] if v.lower() != entry.lower()]
        if sign == "-" and kept == known[key]:
            raise ValueError(f"{entry!r} is not among the {key}")
        known[key] = kept + [entry] * (sign == "+")
    elif value == "-":
        known[key] = None
    elif key == "age":
        known[key] = _number(value)
    elif key == "pregnancy":
        weeks = re.fullmatch(r"(\d+)(?: weeks?)?", value)
        known[key] = int(weeks[1]) if weeks else {"yes": True, "no": False}.get(value, value)
    else:
        known[key] = value
    return from_json(known, "/patient")


def _number(text: str) -> Any:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


# --- allergies ------------------------------------------------------------------------------------


def flagged(answer: str, allergies: tuple[str, ...]) -> list[tuple[str, str]]:
    """(drug, allergy) of the drugs that an answer recommends and an allergy concerns, in the order of the allergies."""
    if not allergies:
        return []
    found: list[tuple[str, str]] = []
    for allergy in allergies:
        finder = Finder([phrase(f"{drug.rstrip('*')}?", drug) for drug in _drugs(allergy)])
        found += [(drug, allergy) for drug in sorted(finder.present(answer))]
    return found


def _drugs(allergy: str) -> tuple[str, ...]:
    """The drugs that an allergy concerns, as phrases."""
    name = " ".join(re.findall(r"[a-z]+", plain(allergy)))
    for names, drugs in classes():
        if name in names or name in drugs or any(d.endswith("*") and name.startswith(d[:-1]) for d in drugs):
            return drugs
    return (name,) if name else ()


@cache
def classes(path: Path = ALLERGIES) -> tuple[tuple[frozenset[str], tuple[str, ...]], ...]:
    """(names of an allergy, drugs) of the lines of allergies.txt. ValueError names file and line."""
    found = []
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        names, colon, drugs = line.partition(":")
        parts = tuple(d.strip() for d in drugs.split(";"))
        try:
            for part in parts:
                phrase("", part)
        except ValueError as e:
            raise ValueError(f"{path}:{number}: {e}") from None
        if not colon:
            raise ValueError(f"{path}:{number}: not `allergy; other name: drug; drug`")
        found.append((frozenset(n.strip() for n in names.split(";")), parts))
    return tuple(found)
