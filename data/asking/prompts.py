"""What an endpoint is asked: for every row of the disease database, dialogues about its tests, medications, symptoms.

Called by generate.py. The three passes are those in which GenMedGPT-5k was made (disease -> tests, disease ->
medications, some symptoms -> disease, about 5 a disease). Other than there the whole row is in the prompt, so that the
answer can be held against it. A pure function of rows and seed; knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from data.diseases import Entry

Pass = Literal["tests", "medications", "symptoms"]
PASSES: tuple[Pass, ...] = ("tests", "medications", "symptoms")

SIZES = (2, 3, 4, 5)  # symptoms in a question

SYSTEM = (
    "You write short, realistic dialogues between a patient and a doctor, for research on medical language models. "
    "You keep to the facts that you are given."
)
FORM = (
    "Write a dialogue of exactly two messages, one of the patient and one of the doctor, in this form, with nothing "
    "before or after it:\nPatient: ...\nDoctor: ..."
)
TASKS: dict[Pass, str] = {
    "tests": (
        "The patient has {name}, says so, and asks which tests or procedures are needed. The doctor names some of the "
        "tests listed below, by these names, in two to four sentences."
    ),
    "medications": (
        "The patient has {name}, says so, and asks which medications help. The doctor names some of the medications "
        "listed below, by these names, in two to four sentences."
    ),
    "symptoms": (
        "The patient has these symptoms and no others: {symptoms}. The patient describes them without naming any "
        "disease. The doctor says that this may be {name}, why, and what to do next, in two to four sentences."
    ),
}
RULES = (
    "The doctor names no test, medication or dose that is not in the facts. Nobody mentions that there are such facts."
)
EMERGENCY = "This is an emergency, and the doctor says so: the patient must go to an emergency department at once."
MANNERS = (  # of the patient: the same disease is asked about in many voices
    "The patient writes one short sentence.",
    "The patient writes politely, in two or three sentences.",
    "The patient is worried and writes in plain words.",
    "The patient says since when, in two sentences.",
    "The patient writes in a hurry.",
    "The patient is matter-of-fact and precise.",
)


@dataclass(frozen=True)
class Request:
    """One dialogue to ask for. symptoms: what the patient has, in the pass of that name."""

    about: Pass
    entry: Entry
    symptoms: tuple[str, ...]
    manner: str

    @cached_property
    def prompt(self) -> str:
        task = TASKS[self.about].format(name=self.entry.name, symptoms="; ".join(self.symptoms))
        urgent = [EMERGENCY] if self.about == "symptoms" and self.entry.urgency == "emergency" else []
        return "\n\n".join([FORM, " ".join([task, *urgent, self.manner, RULES]), "Facts:\n" + facts(self.entry)])

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.prompt}]

    def key(self, model: str, seed: int) -> str:
        """Identity of the reply: what was asked, about which row, of whom."""
        parts = [self.about, self.entry.id, self.messages, model, seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def facts(entry: Entry) -> str:
    """A row as lines of `Name: values`, without what is empty."""
    lines = {
        "Disease": entry.name,
        "Other names": "; ".join(entry.synonyms),
        "Symptoms": "; ".join(entry.symptoms),
        "Tests": "; ".join(entry.tests),
        "Medications": "; ".join(entry.medications),
        "Urgency": entry.urgency or "",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items() if value)


def requests(entries: Iterable[Entry], seed: int, subsets: int) -> Iterator[Request]:
    """All requests, pass by pass in the order of the rows. A row without what a pass asks about is left out of it."""
    entries = list(entries)
    for about in PASSES:
        for entry in entries:
            rng = random.Random(f"{seed} {entry.id} {about}")
            if about == "symptoms":
                for picked in symptom_subsets(rng, entry.symptoms, subsets):
                    yield Request(about, entry, picked, rng.choice(MANNERS))
            elif getattr(entry, about):
                yield Request(about, entry, (), rng.choice(MANNERS))


def symptom_subsets(rng: random.Random, symptoms: tuple[str, ...], n: int) -> Iterator[tuple[str, ...]]:
    """At most n different subsets of 2 to 5 symptoms each; none for fewer than two symptoms.

    Lazy: whatever n, the first ones are the same, also when the caller draws from rng in between.
    """
    sizes = [size for size in SIZES if size <= len(symptoms)]
    seen: set[frozenset[str]] = set()
    for _ in range(10 * n if sizes else 0):
        if len(seen) == n:
            return
        picked = tuple(rng.sample(symptoms, rng.choice(sizes)))
        if frozenset(picked) not in seen:
            seen.add(frozenset(picked))
            yield picked
