"""Answers grounded in the disease database: rows into the prompt, citations out of the answer, what is unsourced.

generate.py and servers put a Grounding beside the model (llama/attendant.py). with_rows() is the one form in which
rows stand before a question; data/grounded_samples.py trains on it. Knows entries and dialogues, never the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.conditions import listed
from data.disease_search import words_of
from data.diseases import PASSAGE, Database, Entry, Hit, open_database
from llama.attendant import Attendant
from llama.chat import ChatFormat, Dialogue, Encoder, Message, render

ROWS = 3  # diseases before a question: the right one is among the first three of the own table for 100 % of held-out
# questions, for 98 % of those in unseen words
NONE = "No entry."

# When a disease fits a question; bench/bench_grounding.py has the shares of questions on either side.
WORTH, COVERED = 1.75, 0.45

_SYMPTOMS, _ITEMS = 9, 4  # of a row that are put into the prompt
_PASSAGE, _SHORT = 600, 160  # characters of a passage: in the prompt, behind the answer
_BACK = 3  # questions that one without symptoms may go on from
_REMEMBERED = 256  # questions whose rows are kept: each is asked for five times, and in a chat again at every turn
_CITED = re.compile(r"\[DB ?(\d+(?:, ?(?:DB ?)?\d+)*)\]")


def cite(entry: Entry) -> str:
    """A row as an answer names it."""
    return f"{entry.name} [DB {entry.id}]"


def row_text(entry: Entry) -> str:
    """A row as it stands in a prompt, short for small contexts: symptoms, then name and citation, then facts.

    A model that reads from left to right knows a row's symptoms when it meets the name; name, citation and facts stand
    as in an answer, which so can be copied.
    """
    if entry.kind == PASSAGE:
        return f"{' '.join(entry.text.split())[:_PASSAGE]}: {cite(entry)}."
    urgency = f", {entry.urgency}" if entry.urgency else ""
    return " ".join([f"{', '.join(entry.symptoms[:_SYMPTOMS])}: {cite(entry)}{urgency}.", *facts(entry)])


def facts(entry: Entry) -> list[str]:
    """The sentences of a row that an answer may take over."""
    lists = (("Tests", entry.tests), ("Treatment", entry.medications))
    return [f"{title}: {listed(items[:_ITEMS], 'and')}." for title, items in lists if items]


def row_fields(entry: Entry) -> dict[str, Any]:
    """A row as answers in JSON show it."""
    return {
        "id": entry.id,
        "name": entry.name,
        "source": entry.source if entry.source_row == entry.name else f"{entry.source} {entry.source_row}",
        "symptoms": entry.symptoms,
        "tests": entry.tests,
        "medications": entry.medications,
        "text": entry.text,
        "url": entry.url,
    }


def with_rows(question: str, rows: Sequence[Entry]) -> str:
    """A patient's turn with what the database has for it."""
    return "\n".join([*map(row_text, rows), question]) if rows else f"{NONE}\n{question}"


def cited_ids(answer: str) -> list[int]:
    """The ids that an answer cites, each once, in its order."""
    return list(dict.fromkeys(int(n[:18]) for m in _CITED.finditer(answer) for n in re.findall(r"\d+", m[1])))


# --- finding rows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What the database has for a question: rows that fit, those there was room for, what to ask behind them."""

    question: str
    rows: tuple[Entry, ...]
    fitting: tuple[Entry, ...]

    def turn(self) -> str:
        """The patient's turn as the model is shown it."""
        return self.question if self.fitting and not self.rows else with_rows(self.question, self.rows)


def search(database: Database, text: str, limit: int = ROWS) -> list[Entry]:
    """Diseases for a question, best first, if one of them fits; then a passage about something that it names.

    One fits by its symptoms; or where these say too little, by its name, and then comes first. Elsewhere names do not
    come first, for many are symptoms as well: then the right row was first for 95.8 % of held-out questions, not 99.4.
    """
    words = _singular(text)

    def named(hit: Hit) -> bool:
        return any(_holds(words, _singular(name)) for name in (hit.entry.name, *hit.entry.synonyms))

    hits = database.search(text, limit)
    if not any(h.covered >= COVERED and tells(h) for h in hits):
        hits = sorted(hits, key=named, reverse=True) if any(map(named, hits)) else []
    return [*[h.entry for h in hits], *[h.entry for h in database.search(text, limit, PASSAGE) if named(h)][:1]]


def _singular(text: str) -> list[str]:
    """A text's words without a plural's s. Not stems: with these, a burning pain would name burns."""
    return [w.removesuffix("s") for w in words_of(text)]


def tells(hit: Hit) -> bool:
    """Whether the question that found it names symptoms enough to stand alone."""
    return hit.worth >= WORTH


def _holds(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether words hold others in a row; no words are nowhere."""
    n = len(part)
    return n > 0 and any(list(words[i : i + n]) == list(part) for i in range(len(words) - n + 1))


# --- names in answers -----------------------------------------------------------------------------

_NO_NAMES = "tests treatment medicines medication drugs"  # words that name none by themselves
_CLAUSE = re.compile(r"[.;:!?,\n]+")
_PARTS = re.compile(r" such as | or | and |[(),]")


class Names:
    """Tests and medications of a database, found in texts by whole words: in any number, in lay words or clinical ones,
    the longest name at each place. Of medications their parts count too ("antibiotics such as nitrofurantoin").

    conditions: names of diseases as well, but for those that are symptoms too.
    """

    def __init__(self, database: Database, conditions: bool = False) -> None:
        self._clinical = database.clinical
        self._by_first: dict[str, set[tuple[str, ...]]] = {}
        self._no_names = set(self._clinical(_NO_NAMES))
        medications = database.names("medications")
        for name in (*database.names("tests"), *medications):
            self._add(tuple(self._clinical(name)))
        symptoms, diseases = (
            {tuple(self._clinical(name)) for name in database.names(kind)} for kind in ("symptoms", "diseases")
        )
        # A part that is a word of symptoms or diseases as well ("water") would be found everywhere.
        known = {word for name in symptoms | diseases for word in name}
        for part in {p.strip() for name in medications for p in _PARTS.split(name)}:
            words = tuple(self._clinical(part))
            if not known.issuperset(words):
                self._add(words)
        if conditions:
            for words in diseases - symptoms:
                self._add(words)

    def _add(self, words: tuple[str, ...]) -> None:
        if not self._no_names.issuperset(words):
            self._by_first.setdefault(words[0], set()).add(words)

    def find(self, text: str) -> dict[tuple[str, ...], str]:
        """Names in a text as clinical words, with the clause that each stands in first."""
        found: dict[tuple[str, ...], str] = {}
        for clause in _clauses(text):
            words = tuple(self._clinical(clause))
            i = 0
            while i < len(words):
                options = (n for n in self._by_first.get(words[i], ()) if words[i : i + len(n)] == n)
                name = max(options, key=len, default=())
                if name:
                    found.setdefault(name, clause)
                i += len(name) or 1
        return found

    def unsourced(self, answer: str, rows: Iterable[Entry]) -> list[str]:
        """Names in an answer, as it has them, that none of these rows holds."""
        texts = [t for e in rows for t in (e.name, *e.synonyms, *e.symptoms, *e.tests, *e.medications, e.text)]
        texts += [" and ".join(items) for e in rows for items in (e.tests, e.medications)]  # as an answer lists them
        sourced = [self._clinical(clause) for text in texts for clause in _clauses(text)]
        return [
            self._as_said(name, clause)
            for name, clause in self.find(answer).items()
            if not any(_holds(words, name) for words in sourced)
        ]

    def _as_said(self, name: tuple[str, ...], clause: str) -> str:
        """The shortest run of a clause's words that is the name."""
        words = clause.split()
        runs = (" ".join(words[k : k + n]) for n in range(1, len(words) + 1) for k in range(len(words) - n + 1))
        return next((run for run in runs if tuple(self._clinical(run)) == name), " ".join(name))


def _clauses(text: str) -> Iterator[str]:
    return (clause for part in _CLAUSE.split(text) if (clause := part.strip()))


# --- beside the model -----------------------------------------------------------------------------


def beside(path: Path, tokenizer: Encoder, chat_format: ChatFormat, place: int, cards: bool = False) -> Grounding:
    """The database in a file beside a model whose prompts may have `place` tokens."""
    frame, _ = render(Dialogue((*chat_format.opening(), Message("user", "?"))), chat_format, tokenizer)
    return Grounding(open_database(path), lambda text: len(tokenizer.encode(text)), place - len(frame), cards)


class Grounding(Attendant):
    """A disease database beside the model: rows before each question, and behind the answer what it rests on."""

    def __init__(self, database: Database, size: Callable[[str], int], room: int, cards: bool = False) -> None:
        """size: tokens of a text; room: tokens that a question with its rows may take.

        cards: rows are shown as such, so that what is said behind an answer leaves them out.
        """
        if not (database.names("diseases") or database.search("what", 1, PASSAGE)):
            raise ValueError(f"{database.path}: holds no row to answer from; build it from other sources")
        self.database, self._size, self._room, self._cards = database, size, room, cards
        self._names = Names(database, conditions=True)
        self._search = lru_cache(_REMEMBERED)(lambda text: tuple(search(database, text)))

    def found(self, questions: Sequence[str]) -> Found:
        """Rows for the last of a dialogue's questions.

        One that says too little ("Which tests do I need?") goes on from the one before, and is put behind it, so that
        a turn says all that its answer needs.
        """
        text = " ".join(questions[_begin(questions, self._says_enough) :])
        fitting = rows = self._search(text)
        while rows and self._size(with_rows(text, rows)) > self._room:
            rows = rows[:-1]
        return Found(text, rows, fitting)

    def _says_enough(self, text: str) -> bool:
        return bool(self._search(text)) or any(map(tells, self.database.search(text, 1)))

    def before(self, dialogue: Dialogue) -> str | None:
        """Says that nothing fits."""
        found = self.found(_questions(dialogue))
        if not found.fitting:
            return "No entry in the disease database fits this: nothing in the answer has a source."
        return None if found.rows else "The question is so long that no row of the database fits beside it."

    def prepare(self, dialogue: Dialogue) -> Dialogue:
        """Every question with its rows: they depend on what was said before it alone."""
        messages, questions = [], []
        for m in dialogue.messages:
            if m.role == "user":
                questions.append(m.content)
                m = Message("user", self.found(questions).turn())
            messages.append(m)
        return Dialogue(tuple(messages))

    def fields(self, dialogue: Dialogue, answer: str) -> dict[str, Any]:
        """Ids that were given, rows that are cited, given ones that are named without a citation, ids that were not
        given, and tests, medications and conditions that none of these rows holds."""
        given = {e.id: e for e in self.found(_questions(dialogue)).rows}
        ids, words = cited_ids(answer), _singular(answer)
        cited = [given[i] for i in ids if i in given]
        named = [e for e in given.values() if e not in cited and _holds(words, _singular(e.name))]
        return {
            "given": list(given),
            "cited": [row_fields(e) for e in cited],
            "named": [row_fields(e) for e in named],
            "invented": [i for i in ids if i not in given],
            "unsourced": self._names.unsourced(answer, [*cited, *named]),
        }

    def after(self, dialogue: Dialogue, answer: str) -> str | None:
        """The cited rows in short, and what in the answer has no source."""
        facts_ = self.fields(dialogue, answer)
        lines = [_shown(row) for row in facts_["cited"]]
        lines += [f"Named without a citation: {_shown(row)}" for row in facts_["named"]]
        if facts_["given"] and not lines:
            lines.append(f"The answer rests on none of the rows that it was given ({_ids(facts_['given'])}).")
        if facts_["invented"]:
            lines.append(f"Invented: {_ids(facts_['invented'])}; no such row was given.")
        if facts_["unsourced"]:
            lines.append(f"Unsourced: {'; '.join(facts_['unsourced'])}.")
        return "\n".join(lines) or None


def _begin(questions: Sequence[str], says_enough: Callable[[str], bool]) -> int:
    """Where what the last question is about begins: the latest that says enough, not too far back, or itself."""
    last = len(questions) - 1
    back = range(last, max(last - _BACK, 0) - 1, -1)
    return next((i for i in back if says_enough(questions[i])), last)


def _questions(dialogue: Dialogue) -> list[str]:
    return [m.content for m in dialogue.messages if m.role == "user"]


def _ids(ids: Iterable[int]) -> str:
    return ", ".join(f"[DB {i}]" for i in ids)


def _shown(row: dict[str, Any]) -> str:
    """A cited row in a few lines of a terminal."""
    parts = [f"{key} {', '.join(row[key][:_SYMPTOMS])}" for key in ("symptoms", "tests", "medications") if row[key]]
    if not parts:
        text = " ".join(row["text"].split())
        parts = [text if len(text) <= _SHORT else f"{text[:_SHORT].rsplit(' ', 1)[0]} ..."]
    url = f" {row['url']}" if row["url"] else ""
    return f"[DB {row['id']}] {row['name']} ({row['source']}): {'; '.join(parts)}.{url}"
