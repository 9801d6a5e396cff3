"""Rated and corrected answers, kept in one SQLite file on this machine until somebody has reviewed them.

The chat (generate.py --feedback FILE.db) and a server write, review.py reads, decides and exports. Nothing is stored
before its user has agreed. Knows dialogues and files, no models.
"""

from __future__ import annotations

import datetime
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama.attendant import Attendant, Command
from llama.chat import Dialogue, Message

VERSION = 2
APPLICATION = 0x43444642  # "CDFB": what SQLite's header says the file is
LONGEST = 200_000  # characters of a text that is kept

Rating = Literal["good", "bad"]
Status = Literal["new", "approved", "rejected"]

_TABLES = (
    """CREATE TABLE ratings (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  made TEXT NOT NULL,
  model TEXT NOT NULL,
  messages TEXT NOT NULL,
  answer TEXT NOT NULL,
  rating TEXT NOT NULL CHECK (rating IN ('good', 'bad')),
  reason TEXT NOT NULL,
  correction TEXT NOT NULL,
  status TEXT NOT NULL DEFAULT 'new' CHECK (status IN ('new', 'approved', 'rejected')),
  reviewer TEXT NOT NULL DEFAULT '',
  reviewed TEXT NOT NULL DEFAULT '',
  receipt TEXT NOT NULL DEFAULT ''
)""",
    "CREATE TABLE consent (agreed TEXT NOT NULL)",
)
# What files of version 1 lack.
_SINCE_1 = "ALTER TABLE ratings ADD COLUMN receipt TEXT NOT NULL DEFAULT ''"
_COLUMNS = "id, made, model, messages, answer, rating, reason, correction, status, reviewer"


@dataclass(frozen=True)
class Rated:
    """One rated answer. messages end with the question; correction: what the answer should have been, or ""."""

    id: int
    made: str
    model: str
    messages: tuple[Message, ...]
    answer: str
    rating: Rating
    reason: str
    correction: str
    status: Status
    reviewer: str


class Feedback:
    """The file. One connection a call, so any thread and several processes may use it; readable by its owner alone."""

    def __init__(self, path: str | Path, create: bool = True) -> None:
        """ValueError, one line, if it is no such file, damaged, of another version, or cannot be made."""
        self.path = Path(path)
        self._lock = threading.Lock()
        if not self.path.exists() and not create:
            raise ValueError(f"{self.path}: no such file; ratings come from `generate.py --feedback {self.path}`")
        self._create()
        with self._open() as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if application != APPLICATION:
                raise ValueError(f"{self.path}: is an SQLite file, but not one of ratings; choose another name")
            if version not in (1, VERSION):
                raise ValueError(f"{self.path}: ratings of version {version}; this program reads version {VERSION}")
        if version == 1:
            self._upgrade()

    def _create(self) -> None:
        """The tables, where the file is not there or empty; two processes may do so at a time."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
            size = os.fstat(handle).st_size
            os.close(handle)
        except OSError as e:
            raise ValueError(f"{self.path}: cannot be opened to write ({e.strerror})") from None
        if size == 0:
            with self._open() as db:
                db.execute("BEGIN IMMEDIATE")
                if db.execute("PRAGMA application_id").fetchone() != (APPLICATION,):
                    marks = (f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {VERSION}")
                    for statement in (*_TABLES, *marks):
                        db.execute(statement)

    def _upgrade(self) -> None:
        """Version 1 -> 2, unless another process has done so in the meantime."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            if db.execute("PRAGMA user_version").fetchone() == (1,):
                for statement in (_SINCE_1, f"PRAGMA user_version = {VERSION}"):
                    db.execute(statement)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is stored when the block ends, or nothing."""
        try:
            with self._lock, closing(sqlite3.connect(self.path, timeout=10)) as db, db:
                db.execute("PRAGMA secure_delete = ON")  # what was erased is overwritten
                yield db
        except sqlite3.Error as e:
            raise ValueError(f"{self.path}: {e}; nothing was stored") from None

    # --- consent ---

    @property
    def consent(self) -> bool:
        """Whether the user has agreed that rated conversations are kept."""
        with self._open() as db:
            return db.execute("SELECT 1 FROM consent").fetchone() is not None

    def agree(self) -> None:
        """From now on rated conversations are kept."""
        if not self.consent:
            with self._open() as db:
                db.execute("INSERT INTO consent VALUES (?)", (_now(),))

    def withdraw(self) -> int:
        """No longer; everything that was kept is erased. How many ratings that were."""
        n = self.erase()
        with self._open() as db:
            db.execute("DELETE FROM consent")
        return n

    # --- ratings ---

    def add(
        self,
        model: str,
        messages: Sequence[Message],
        answer: str,
        rating: Rating,
        reason: str = "",
        correction: str = "",
        receipt: str = "",
    ) -> int:
        """Keep a rated answer; its number. ValueError without consent, or if a text is too long or empty.

        receipt: a secret of who rated it, who can take it back with it.
        """
        if not self.consent:
            raise ValueError("the user has not agreed to keep conversations; nothing was stored")
        if not messages or messages[-1].role != "user":
            raise ValueError("a rated conversation ends with the question")
        texts = (*(m.content for m in messages), answer, reason, correction)
        if (longest := max(map(len, texts))) > LONGEST:
            raise ValueError(f"a text of {longest:,} characters is too long to be kept (at most {LONGEST:,})")
        document = json.dumps([{"role": m.role, "content": m.content} for m in messages], ensure_ascii=False)
        row = (_now(), model, document, answer, rating, reason.strip(), correction.strip(), receipt)
        with self._open() as db:
            found = db.execute(
                "INSERT INTO ratings (made, model, messages, answer, rating, reason, correction, receipt) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [text.encode("utf-8", "replace").decode() for text in row],
            )
            assert found.lastrowid is not None
            return found.lastrowid

    def ratings(self, status: Status | None = None) -> list[Rated]:
        """All, or those of a status, oldest first."""
        condition, values = ("", ()) if status is None else (" WHERE status = ?", (status,))
        with self._open() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM ratings{condition} ORDER BY id", values).fetchall()
        return [_rated(row) for row in rows]

    def decide(self, number: int, status: Status, reviewer: str, correction: str | None = None) -> None:
        """A reviewer's word on a rating; correction: a new one, "" for none. ValueError if there is no such rating."""
        changes = {"status": status, "reviewer": reviewer, "reviewed": _now()}
        if correction is not None:
            changes["correction"] = correction.strip()
        with self._open() as db:
            sets = ", ".join(f"{name} = ?" for name in changes)
            done = db.execute(f"UPDATE ratings SET {sets} WHERE id = ?", (*changes.values(), number))
            if done.rowcount == 0:
                raise ValueError(f"{self.path}: there is no rating {number}")

    def erase(self, number: int | None = None) -> int:
        """Overwrite a rating, or all; how many that were."""
        condition, values = ("", ()) if number is None else (" WHERE id = ?", (number,))
        with self._open() as db:
            return db.execute(f"DELETE FROM ratings{condition}", values).rowcount

    def take_back(self, receipt: str) -> int:
        """Overwrite what was rated with that receipt, reviewed or not; how many ratings that were."""
        with self._open() as db:
            return db.execute("DELETE FROM ratings WHERE receipt = ? AND receipt != ''", (receipt,)).rowcount


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _rated(row: Sequence[str | int]) -> Rated:
    number, made, model, document, *rest = row
    messages = tuple(Message(m["role"], m["content"]) for m in json.loads(str(document)))
    return Rated(int(number), str(made), str(model), messages, *map(str, rest))  # type: ignore[arg-type]


# --- in the chat ----------------------------------------------------------------------------------


class Rater(Attendant):
    """Commands of the chat that rate or correct its last answer."""

    def __init__(self, feedback: Feedback, model: str) -> None:
        self._feedback, self._model = feedback, model
        self._last: tuple[Dialogue, str] | None = None
        self._kept: tuple[int, str] | None = None  # the last answer's rating: its number and reason
        self.commands = {
            "/good": Command("/good [WHY] the last answer was good", lambda why: self._rate("good", why)),
            "/bad": Command("/bad [WHY]  it was bad", lambda why: self._rate("bad", why)),
            "/correct": Command("/correct TEXT  what it should have been", self._correct),
            "/consent": Command("/consent yes|no  may rated conversations be kept? no erases them", self._agree),
        }

    def after(self, dialogue: Dialogue, answer: str) -> str | None:
        self._last, self._kept = (dialogue, answer) if answer.strip() else None, None
        return None

    def _rate(self, rating: Rating, why: str, correction: str = "") -> str:
        if self._last is None:
            return "there is no answer to rate yet"
        dialogue, answer = self._last
        try:
            if not self._feedback.consent:
                return (
                    f"Nothing was stored: a rating keeps this conversation in {self._feedback.path}, on this machine;\n"
                    "reviewed and without names, a model may learn from it. To agree, type /consent yes"
                )
            before = self._kept
            number = self._feedback.add(self._model, dialogue.messages, answer, rating, why, correction)
            self._kept = number, why
            if before is not None:  # the last word on an answer is what counts
                self._feedback.erase(before[0])
        except ValueError as e:
            return f"error: {e}"
        return f"(kept as rating {number})"

    def _correct(self, text: str) -> str:
        if not text:
            return "/correct what? Give the answer that it should have been"
        return self._rate("bad", self._kept[1] if self._kept else "", text)

    def _agree(self, word: str) -> str:
        try:
            if word == "yes":
                self._feedback.agree()
                return f"(ratings are kept in {self._feedback.path}; /consent no erases them)"
            if word == "no":
                return f"({self._feedback.withdraw()} ratings erased; no more are kept)"
        except ValueError as e:
            return f"error: {e}"
        return "/consent yes or /consent no"
