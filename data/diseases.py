"""The disease database: one SQLite file of diseases and of passages about them, and the search in it.

`python -m data.prepare diseases` builds it from the sources that data/disease_sources.py reads, as the linter of
data/disease_linter.py leaves them; grounded answers, the server and evaluate.py search it and cite its rows. The file
is written whole or not at all, the same rows and bytes for the same sources, and only ever opened for reading.

An entry's id is its place in the row of all rows, from 1: sources in the order they were given, rows in the order of
their source, quarantined ones counted. So ids stay as long as the sources and their order do.

A Database may be used by several threads: a call takes a connection that none other uses, or opens one, and gives it
back; what is kept in memory is never changed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.disease_linter import Checked, lint
from data.disease_search import SymptomIndex, Words
from data.disease_sources import DISEASE, PASSAGE, Source
from llama.files import atomic_file

SCHEMA = 1
APPLICATION = 0x43444442  # "CDDB" in the header, where SQLite keeps a place to say whose file it is
KINDS = ("diseases", "symptoms", "tests", "medications")
# Of a question for passages: so many of its rarest words, standing in so many passages together. With 12 and 2,500 a
# search of 16,407 passages takes 3.3 ms (p99) of an AMD EPYC core.
_TERMS, _POSTINGS = 8, 2000

_TABLES = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {SCHEMA};
CREATE TABLE source (name TEXT, kind TEXT, file TEXT, sha256 TEXT, rows INTEGER, quarantined INTEGER, mended INTEGER);
CREATE TABLE entry (
    id INTEGER PRIMARY KEY, kind TEXT, source TEXT, source_row TEXT, name TEXT, synonyms TEXT, symptoms TEXT,
    tests TEXT, medications TEXT, text TEXT, url TEXT, urgency TEXT, quarantine TEXT, crc32 INTEGER
);
CREATE TABLE finding (entry INTEGER, action TEXT, reason TEXT);
CREATE TABLE wording (symptom TEXT, phrase TEXT);
CREATE INDEX entry_kind ON entry (kind);
CREATE VIRTUAL TABLE passage_fts USING fts5(
    name, text, content='entry', content_rowid='id', tokenize='porter unicode61'
);
CREATE VIRTUAL TABLE passage_words USING fts5vocab('passage_fts', 'row');
"""
_FIELDS = "id, source, source_row, name, synonyms, symptoms, tests, medications, text, url, urgency, kind"


@dataclass(frozen=True)
class Entry:
    """One row: a disease, or a passage about one (kind), with where it comes from. id is what an answer cites."""

    id: int
    source: str
    source_row: str
    name: str
    synonyms: tuple[str, ...]
    symptoms: tuple[str, ...]
    tests: tuple[str, ...]
    medications: tuple[str, ...]
    text: str
    url: str
    urgency: str
    kind: str = DISEASE


@dataclass(frozen=True)
class Hit:
    """An entry that a search found. Scores compare within one search, the best first.

    Of a disease found by a text: worth is the score in units of the IDF that a symptom has which no disease has, so
    that databases of any size compare; covered is the share of the text's symptoms that are the disease's.
    """

    entry: Entry
    score: float
    worth: float = 0.0
    covered: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What the linter did with an entry: quarantined, removed something from it, or only noted it, and why."""

    entry: int
    source: str
    source_row: str
    name: str
    action: str
    reason: str


# --- building -------------------------------------------------------------------------------------


def build(sources: Sequence[Source], out: str | Path, on_row: Callable[[], Any] = lambda: None) -> None:
    """Write the database of some sources. ValueError when `out` is something else than an earlier database.

    One of another version, or a damaged one, is replaced as well: building it again is the remedy for both.
    """
    out = Path(out)
    if out.exists():
        _header(out)
    names = [s.name for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: given twice; rename one file, for answers cite a row by its source's name")
    with atomic_file(out) as file:
        connection = sqlite3.connect(file, isolation_level=None)
        try:
            connection.executescript(
                "PRAGMA page_size = 4096; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES
            )
            connection.execute("BEGIN")
            _fill(connection, sources, on_row)
            connection.execute("COMMIT")
            connection.execute("INSERT INTO passage_fts (passage_fts) VALUES ('optimize')")
            connection.execute("VACUUM")
        except sqlite3.OperationalError as e:
            code = errno.ENOSPC if "full" in str(e) else errno.EIO
            raise OSError(code, str(e)) from None
        finally:
            connection.close()


def _fill(connection: sqlite3.Connection, sources: Sequence[Source], on_row: Callable[[], Any]) -> None:
    id_ = 0
    for source in sources:
        checked = lint(source)
        for c in checked:
            id_ += 1
            _add(connection, id_, source, c)
            on_row()
        counts = (len(checked), sum(bool(c.quarantine) for c in checked), sum(bool(c.removed) for c in checked))
        facts = (source.name, source.kind, source.file, source.sha256, *counts)
        connection.execute("INSERT INTO source VALUES (?, ?, ?, ?, ?, ?, ?)", facts)
        pairs = [(symptom, phrase) for symptom, phrases in source.wordings for phrase in phrases]
        connection.executemany("INSERT INTO wording VALUES (?, ?)", pairs)


def _add(connection: sqlite3.Connection, id_: int, source: Source, c: Checked) -> None:
    row = c.row
    lists = [json.dumps(v, ensure_ascii=False) for v in (row.synonyms, row.symptoms, row.tests, row.medications)]
    values = (id_, source.kind, source.name, row.place, row.name, *lists, row.text, row.url, row.urgency, c.quarantine)
    connection.execute(f"INSERT INTO entry VALUES ({', '.join('?' * 14)})", (*values, _crc(values)))
    if source.kind == PASSAGE and not c.quarantine:
        connection.execute("INSERT INTO passage_fts (rowid, name, text) VALUES (?, ?, ?)", (id_, row.name, row.text))
    told = [("quarantined", c.quarantine)] * bool(c.quarantine)
    told += [("removed", reason) for reason in c.removed] + [("noted", reason) for reason in c.notes]
    connection.executemany("INSERT INTO finding VALUES (?, ?, ?)", [(id_, *t) for t in told])


def _crc(values: Iterable[Any]) -> int:
    """Of a row's fields: SQLite checks its pages' structure, and not what stands in them."""
    return zlib.crc32("\0".join(map(str, values)).encode("utf-8", "surrogatepass"))


# --- opening --------------------------------------------------------------------------------------


def open_database(path: str | Path) -> Database:
    """A database to search. ValueError when it is missing, no database of ours, of another version, or damaged."""
    path = Path(path)
    _check_header(path)
    return Database(path)


def _check_header(path: Path) -> None:
    head, size = _header(path)
    version = int.from_bytes(head[60:64], "big")
    if version != SCHEMA:
        raise ValueError(f"{path}: is of version {version}, this program reads {SCHEMA}; build it again")
    page, pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
    if size != page * pages:
        raise ValueError(f"{path}: is truncated ({size:,} bytes of {page * pages:,}); build it again")


def _header(path: Path) -> tuple[bytes, int]:
    """The first 100 bytes of a disease database, and the file's size. ValueError when it is none."""
    try:
        with path.open("rb") as f:
            head = f.read(100)
            size = os.fstat(f.fileno()).st_size
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    if not head.startswith(b"SQLite format 3\0") or len(head) < 100:
        raise ValueError(f"{path}: is not a disease database; make one with `python -m data.prepare diseases`")
    if int.from_bytes(head[68:72], "big") != APPLICATION:
        raise ValueError(f"{path}: is an SQLite file, but no disease database")
    return head, size


class Database:
    """An open database."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[_Reader] = []
        weakref.finalize(self, _close, self._idle)
        [(state,)] = self._query("PRAGMA quick_check(1)")
        if state != "ok":
            raise self._damaged(state)
        rows = self._query(f"SELECT {_FIELDS}, quarantine, crc32 FROM entry WHERE kind = ? ORDER BY id", DISEASE)
        self._diseases: dict[int, Entry] = {}
        self._quarantined: set[int] = set()
        for row in rows:
            entry = self._entry(row)
            self._diseases[entry.id] = entry
            if row[-2]:
                self._quarantined.add(entry.id)
        kept = [e for e in self._diseases.values() if e.id not in self._quarantined]
        self._lexicon = {
            "diseases": _unique([(e.name, *e.synonyms) for e in kept]),
            **{kind: _unique([getattr(e, kind) for e in kept]) for kind in KINDS[1:]},
        }
        wordings: dict[str, list[str]] = {}
        for symptom, phrase in self._query("SELECT symptom, phrase FROM wording ORDER BY rowid"):
            wordings.setdefault(symptom, []).append(phrase)
        named = {e.id: ((e.name, *e.synonyms), e.symptoms) for e in self._diseases.values()}
        self._index = SymptomIndex(named, wordings, self.clinical)

    def search(self, text: str, limit: int = 5, kind: str = DISEASE, quarantined: bool = False) -> list[Hit]:
        """The entries of a kind (DISEASE or PASSAGE) that fit a question or some symptoms best, none if nothing fits.

        The text is words and nothing else: no quote, star or AND in it means anything. Of a long one only the
        beginning counts. quarantined: take poisoned diseases in as well.
        """
        assert kind in (DISEASE, PASSAGE)
        if kind == PASSAGE:
            return self._passages(text, limit)
        words = self.clinical(text)
        hits = self._hits(self._index.rank(words), limit, quarantined)
        covered = self._index.covered(words, [h.entry.id for h in hits])
        rarest = self._index.rarest
        return [Hit(h.entry, h.score, h.score / rarest, c) for h, c in zip(hits, covered, strict=True)]

    def by_symptoms(self, names: Iterable[str], limit: int = 5, quarantined: bool = False) -> list[Hit]:
        """The diseases that have these symptoms, by their names in the lexicon; unknown names count for nothing."""
        return self._hits(self._index.rank_names(map(self.clinical, names)), limit, quarantined)

    def entry(self, id_: int) -> Entry:
        """The entry of that id, quarantined or not. ValueError if there is none."""
        if id_ in self._diseases:
            return self._diseases[id_]
        rows = self._query(f"SELECT {_FIELDS}, quarantine, crc32 FROM entry WHERE id = ?", id_)
        if not rows:
            raise ValueError(f"{self.path}: has no entry {id_}")
        return self._entry(rows[0])

    def diseases(self) -> list[Entry]:
        """The diseases that are not quarantined, in the order of their ids."""
        return [e for e in self._diseases.values() if e.id not in self._quarantined]

    def names(self, kind: str) -> tuple[str, ...]:
        """All names of a kind (diseases with synonyms, symptoms, tests, medications) in entries not quarantined."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r}: names are of {', '.join(KINDS)}")
        return self._lexicon[kind]

    def findings(self, action: str = "quarantined") -> list[Finding]:
        """What the linter quarantined, removed or noted, in the order of the entries."""
        fields = "entry.id, source, source_row, name, action, reason"
        join = "finding JOIN entry ON entry.id = finding.entry"
        return [
            Finding(*r) for r in self._query(f"SELECT {fields} FROM {join} WHERE action = ? ORDER BY entry.id", action)
        ]

    def report(self) -> dict[str, Any]:
        """Rows by source, and every finding: what --report writes."""
        keys = ("name", "kind", "file", "sha256", "rows", "quarantined", "mended")
        sources = [dict(zip(keys, r, strict=True)) for r in self._query("SELECT * FROM source ORDER BY rowid")]
        actions = ("quarantined", "removed", "noted")
        return {"sources": sources} | {a: [asdict(f) for f in self.findings(a)] for a in actions}

    def _hits(self, ranked: Iterable[tuple[int, float]], limit: int, quarantined: bool) -> list[Hit]:
        hits: list[Hit] = []
        for id_, score in ranked:
            if len(hits) >= limit:
                break
            if quarantined or id_ not in self._quarantined:
                hits.append(Hit(self._diseases[id_], score))
        return hits

    def _passages(self, text: str, limit: int) -> list[Hit]:
        counted = []
        for term in dict.fromkeys(self._stems(text)):
            rows = self._query("SELECT doc FROM passage_words WHERE term = ?", term)
            counted += [(rows[0][0], term)] if rows else []
        terms, budget = [], _POSTINGS
        for count, term in sorted(counted)[:_TERMS]:
            if terms and count > budget:
                break
            terms.append(f'"{term}"')
            budget -= count
        if not terms:
            return []
        rows = self._query(
            "SELECT rowid, bm25(passage_fts, 4.0, 1.0) AS score FROM passage_fts WHERE passage_fts MATCH ? "
            "ORDER BY score, rowid LIMIT ?",
            " OR ".join(terms),
            limit,
        )
        return [Hit(self.entry(id_), -score) for id_, score in rows]

    @contextlib.contextmanager
    def _reader(self) -> Iterator[_Reader]:
        try:
            reader = self._idle.pop()  # atomic, as append is: no two threads get the same
        except IndexError:
            reader = _Reader(self.path)
        try:
            yield reader
        finally:
            self._idle.append(reader)

    def _stems(self, text: str) -> list[str]:
        with self._reader() as reader:
            return reader.words.stems(text)

    def clinical(self, text: str) -> list[str]:
        """The stems of a text's words as the search reads them: no stop words, lay terms as the clinical ones."""
        with self._reader() as reader:
            return reader.words.clinical(text)

    def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            with self._reader() as reader:
                return reader.connection.execute(sql, values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError) as e:
            raise self._damaged(str(e)) from None

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        id_, source, place, name, *lists, text, url, urgency, kind, quarantine, crc = row
        if _crc((id_, kind, source, place, name, *lists, text, url, urgency, quarantine)) != crc:
            raise self._damaged(f"entry {id_} is not what was written")
        return Entry(id_, source, place, name, *(tuple(json.loads(v)) for v in lists), text, url, urgency, kind)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: is damaged ({' '.join(what.split())}); build it again")


class _Reader:
    """What one call needs for itself: a connection, and the words it has met."""

    def __init__(self, path: Path) -> None:
        uri = path.resolve().as_uri() + "?mode=ro&immutable=1"
        self.connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        self.words = Words()


def _close(readers: list[_Reader]) -> None:
    for reader in readers:
        reader.connection.close()
        reader.words.close()


def _unique(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in lists for name in names))
