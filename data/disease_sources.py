"""Tables of diseases and texts about them, in the shapes found in the wild -> Row, one shape for all.

data/diseases.py puts them into the database, after data/disease_linter.py has looked for poison. A row that cannot be
read is a Row with its fault, never an error and never left out; a file that cannot be read at all is a ValueError.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.conditions import SAMPLE, load_table
from data.stream import Item, read_items

DISEASE, PASSAGE = "disease", "passage"
BUILT_IN = "sample"  # on the command line: the project's own table

_MAX_LIST = 100_000  # characters of a list column; ast.literal_eval takes memory in proportion
_COLUMNS = {  # ours: ChatDoctor's format_dataset.csv and the names its API variant gives them
    "name": ("disease",),
    "symptoms": ("Symptom",),
    "text": ("reason",),
    "tests": ("TestsAndProcedures", "Medical Tests"),
    "medications": ("commonMedications", "Medications"),
}
_LISTS = ("symptoms", "tests", "medications")
_BYTES = re.compile(r"(?:\\x[0-9a-fA-F]{2})+")


@dataclass(frozen=True)
class Row:
    """One row of a source. `place` is its name there (idx, id), `line` where it ends; fault: why it cannot be used."""

    place: str
    line: int
    name: str
    synonyms: tuple[str, ...] = ()
    symptoms: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    medications: tuple[str, ...] = ()
    text: str = ""
    url: str = ""
    urgency: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """All rows of a file or folder, in its order. `wordings` are lay phrases by symptom, where the source has some."""

    name: str
    kind: str  # DISEASE or PASSAGE
    file: str
    sha256: str
    rows: tuple[Row, ...]
    wordings: tuple[tuple[str, tuple[str, ...]], ...] = ()


def find_source(argument: str) -> Path:
    """The file or folder that a command line names. ValueError when there is none."""
    path = Path(argument)
    if argument == BUILT_IN and not path.exists():
        return SAMPLE
    if not path.exists():
        raise ValueError(f"{argument}: does not exist; give a table (.csv), passages (.jsonl), or {BUILT_IN!r}")
    return path


def read_source(path: Path) -> Source:
    """The rows of ChatDoctor's CSV, MedQuAD's JSON lines, or a folder like data/sample. ValueError names file, line."""
    if path.is_dir():
        return _read_conditions(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() in (".jsonl", ".json"):
        return _read_passages(path)
    raise ValueError(f"{path}: is none of a .csv table, .jsonl passages, a folder with conditions.txt")


def _read_conditions(folder: Path) -> Source:
    """The project's own table: checked by its own reader, so there is nothing left to quarantine."""
    table = load_table(folder)
    rows = [
        Row(
            place=c.name,
            line=0,
            name=c.name,
            synonyms=c.synonyms,
            symptoms=c.symptoms,
            tests=c.tests,
            medications=c.medications,
            text=f"Go to an emergency department in case of {'; '.join(c.red_flags)}.",
            urgency=c.urgency,
        )
        for c in table.conditions
    ]
    digest = hashlib.sha256(b"".join((folder / f"{n}.txt").read_bytes() for n in ("conditions", "symptoms")))
    # Held-out wordings stay out: they ask whether a model understands what it has not seen.
    wordings = tuple((s.name, tuple(w.removeprefix("=") for w in s.wordings)) for s in table.symptoms.values())
    return Source(
        BUILT_IN if folder == SAMPLE else folder.name, DISEASE, folder.name, digest.hexdigest(), tuple(rows), wordings
    )


# --- ChatDoctor's table ---------------------------------------------------------------------------


def _read_csv(path: Path) -> Source:
    data = _read(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte {data[e.start]:#04x}); save the table as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        columns = _columns(path, header)
        rows = tuple(
            _csv_row(record, reader.line_num, number, columns) for number, record in enumerate(_records(reader))
        )
    except csv.Error as e:
        raise ValueError(f"{path}:{reader.line_num}: broken CSV ({e}); is a quote missing above?") from None
    if not rows:
        raise ValueError(f"{path}: has a header and no rows")
    return Source(mend(path.stem), DISEASE, mend(path.name), hashlib.sha256(data).hexdigest(), rows)


def _records(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    return (record for record in reader if any(record))


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    """Where each of our fields stands, with the number of columns as "width"."""
    stripped = [h.strip() for h in header]
    twice = sorted({h for h in stripped if stripped.count(h) > 1})
    if twice:
        raise ValueError(f"{path}:1: the column {twice[0]!r} stands twice")
    found = {field: stripped.index(n) for field, names in _COLUMNS.items() for n in names if n in stripped}
    for field in ("name", "symptoms"):
        if field not in found:
            missing, there = _COLUMNS[field][0], ", ".join(stripped[:8])
            raise ValueError(f"{path}:1: no column {missing!r} (there are {there or 'none'}); is this a disease table?")
    if "idx" in stripped:
        found["place"] = stripped.index("idx")
    return found | {"width": len(header)}


def _csv_row(record: list[str], line: int, number: int, columns: dict[str, int]) -> Row:
    def field(name: str) -> str:
        at = columns.get(name)
        return record[at] if at is not None and at < len(record) else ""

    faults = []
    if len(record) != columns["width"]:
        faults.append(f"{len(record)} fields where the header has {columns['width']}")
    name = mend(field("name"))
    if not name:
        faults.append("no disease name")
    lists = dict.fromkeys(_LISTS, ())
    for key in _LISTS:
        if key in columns and field(key).strip():
            try:
                lists[key] = parse_list(field(key))
            except ValueError as e:
                faults.append(f"{_COLUMNS[key][0]}: {e}")
    fault = f"line {line}: {'; '.join(faults)}" if faults else ""
    place = mend(field("place")) or str(number)
    return Row(place, line, name, text=mend(field("text")), fault=fault, **lists)


def parse_list(text: str) -> tuple[str, ...]:
    """The strings of a Python list as repr() writes it; nothing is run. ValueError says what else it is."""
    if len(text) > _MAX_LIST:
        raise ValueError(f"a list of {len(text):,} characters; {_MAX_LIST:,} at most")
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise ValueError(f"broken list {_short(text)}") from None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"not a list of texts: {_short(text)}")
    return tuple(dict.fromkeys(v for v in map(mend, value) if v))


def mend(text: str) -> str:
    r"""A text with the escapes undone that repr() of bytes left in it (\xc3\xa9, \', \n), and its spaces collapsed.

    Half characters (lone surrogates, which JSON's escapes can make) go: no file can hold them.
    """
    if "\\" in text:
        text = _BYTES.sub(lambda m: bytes.fromhex(m[0].replace("\\x", "")).decode("utf-8", "ignore"), text)
        text = re.sub(r"\\[nrt]", " ", text)
        text = re.sub(r"\\+(['\"])", r"\1", text)
    return " ".join(text.encode("utf-8", "ignore").decode().replace("\0", " ").split())


# --- passages -------------------------------------------------------------------------------------


def _read_passages(path: Path) -> Source:
    rows = tuple(_passage(item) for item in read_items(path))
    if not rows:
        raise ValueError(f"{path}: holds no records")
    return Source(mend(path.stem), PASSAGE, mend(path.name), hashlib.sha256(_read(path)).hexdigest(), rows)


def _passage(item: Item) -> Row:
    """One record with `focus` (what it is about), `answer`, and perhaps `question`, `url`, `id`."""
    value = item.value if isinstance(item.value, dict) else {}
    texts = {k: v for k in ("id", "focus", "question", "answer", "url") if isinstance(v := value.get(k), str)}
    focus, question, answer, url = (mend(texts.get(k, "")) for k in ("focus", "question", "answer", "url"))
    faults = []
    if item.fault is not None:
        faults.append(": ".join(filter(None, item.fault)))
    elif not isinstance(item.value, dict):
        faults.append("not an object")
    else:
        faults += [f"no text in {k!r}" for k, v in (("focus", focus or question), ("answer", answer)) if not v]
        if url and not url.startswith(("https://", "http://")):
            faults.append(f"the url is {_short(url)}")
    text = "\n".join(filter(None, (question, answer)))
    fault = f"line {item.line}: {'; '.join(faults)}" if faults else ""
    return Row(
        mend(texts.get("id", "")) or str(item.index), item.line, focus or question, text=text, url=url, fault=fault
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ValueError(f"{path}: cannot read it ({e.strerror})") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
