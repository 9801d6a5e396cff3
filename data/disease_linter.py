"""Poisoned rows of a disease table, found by what they are; data/diseases.py asks it and keeps its findings.

Nothing here knows a disease by name. The rule that finds most: tables made by association pad their lists to a fixed
length with the same items in the same order, whatever the disease. Such a run gives itself away, for its items hardly
ever stand anywhere else. What follows it to the end of a list is padding too. A row whose tests and medications are
mostly padding is quarantined; another loses the padding, and both are reported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.disease_sources import DISEASE, Row, Source
from data.reviewable import numbered_lines

NOT_MEDICATIONS = Path(__file__).parent / "lexicon" / "not_medications.txt"

RUN = 3  # items in the same order make a run ...
RUN_ROWS = 8  # ... that counts as padding when so many rows have it ...
RUN_SHARE = 0.4  # ... and the rarest of its items stands elsewhere in at most the rest of its rows
# Of tests and medications together. Of the 27 rows that a person found in format_dataset.csv the mildest has .44; .4
# takes 11 more, with .41 to .71.
POISONED = 0.4

_LISTS = ("symptoms", "tests", "medications")
_BRACKETS = re.compile(r"\s*\([^)]*\)")

Runs = dict[str, frozenset[tuple[str, ...]]]


@dataclass
class Checked:
    """A row as it goes into the database. quarantine: why no search may return it, or nothing."""

    row: Row
    quarantine: str = ""
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def lint(source: Source) -> list[Checked]:
    """The rows of a source in order, with what is wrong with each."""
    names: dict[str, Row] = {}
    runs = padding_runs(source.rows) if source.kind == DISEASE else {}
    mostly = _mostly_padding(source.rows, runs)
    not_drugs = read_reasons(NOT_MEDICATIONS)
    texts = Counter(row.text for row in source.rows if row.text)
    checked = []
    for row in source.rows:
        result = Checked(row, row.fault)
        if source.kind == DISEASE:
            _unpad(result, runs, mostly)
            _drop_not_drugs(result, not_drugs)
            _check_lists(result)
            _check_text(result, texts)
            first = names.setdefault(row.name.casefold(), row)
            if first is not row and not result.quarantine:
                result.quarantine = f"{row.name!r} stands in row {first.place} already; the first is kept"
        checked.append(result)
    return checked


# --- padding --------------------------------------------------------------------------------------


def padding_runs(rows: Sequence[Row]) -> Runs:
    """Runs of items, by column, that so many rows share because a table was padded with them."""
    found: Runs = {}
    for column in _LISTS:
        lists = [getattr(row, column) for row in rows]
        count = Counter(item for items in lists for item in items)
        runs = Counter(run for items in lists for run in _runs(items))
        found[column] = frozenset(
            run for run, n in runs.items() if n >= RUN_ROWS and n >= RUN_SHARE * min(count[item] for item in run)
        )
    return found


def _runs(items: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (items[i : i + RUN] for i in range(len(items) - RUN + 1))


def _mostly_padding(rows: Sequence[Row], runs: Runs) -> dict[str, set[str]]:
    """Items, by column, that stand in a run of padding about as often as they stand anywhere."""
    mostly = {}
    for column in runs:
        lists = [getattr(row, column) for row in rows]
        count = Counter(item for items in lists for item in items)
        inside = Counter(
            item for items in lists for item in {i for run in _runs(items) if run in runs[column] for i in run}
        )
        mostly[column] = {item for item, n in inside.items() if n >= RUN_SHARE * count[item]}
    return mostly


def _padding_from(items: tuple[str, ...], runs: frozenset[tuple[str, ...]], mostly: set[str]) -> int:
    """Where the padding of a list begins: at a run, or at the beginning of one that the end of the list cuts short."""
    for i in range(len(items)):
        tail = items[i : i + RUN]
        if tail in runs or (len(tail) < RUN and mostly.issuperset(tail) and any(r[: len(tail)] == tail for r in runs)):
            return i
    return len(items)


def _unpad(result: Checked, runs: Runs, mostly: dict[str, set[str]]) -> None:
    """Cut the padding off a row's lists; quarantine the row when too much of it was padding."""
    row, padded, total = result.row, 0, 0
    for column in _LISTS:
        items = getattr(row, column)
        begin = _padding_from(items, runs[column], mostly[column])
        if begin < len(items):
            result.removed.append(
                f"{column}: {len(items) - begin} of {len(items)} are padding: {'; '.join(items[begin:])}"
            )
            result.row = replace(result.row, **{column: items[:begin]})
        if column != "symptoms":
            padded, total = padded + len(items) - begin, total + len(items)
    if total and padded >= POISONED * total and not result.quarantine:
        result.quarantine = f"{padded} of its {total} tests and medications are padding that many unrelated rows share"
        result.row, result.removed = row, []  # kept as it came: evidence, not an answer


# --- the rest -------------------------------------------------------------------------------------


def _drop_not_drugs(result: Checked, not_drugs: dict[str, str]) -> None:
    if result.quarantine:
        return
    keep = []
    for item in result.row.medications:
        why = not_drugs.get(_BRACKETS.sub("", item).casefold())
        if why is None:
            keep.append(item)
        else:
            result.removed.append(f"medications: {item}: {why}")
    result.row = replace(result.row, medications=tuple(keep))


def _check_lists(result: Checked) -> None:
    if not result.row.symptoms and not result.quarantine:
        result.quarantine = "it has no symptoms to find it by"
    result.notes += [f"no {column}" for column in ("tests", "medications") if not getattr(result.row, column)]


def _check_text(result: Checked, texts: Counter[str]) -> None:
    """A description that is none goes; one that several rows share, or that breaks off, is noted."""
    text = result.row.text
    if not text:
        return
    if text[-1] in ",;:":  # the name of a drug, or a list that was cut off
        result.removed.append(f"text: not a description: {text}")
        result.row = replace(result.row, text="")
    elif texts[text] > 1:
        result.notes.append(f"{texts[text]} rows have this text")
    elif text[-1] not in ".!?)\"'":
        result.notes.append("the text breaks off")


def read_reasons(path: Path) -> dict[str, str]:
    """A file of `name: why` lines, by name in lower case."""
    reasons = {}
    for number, line in numbered_lines(path):
        if line.strip():
            name, colon, why = line.partition(": ")
            if not colon or not name.strip() or not why.strip():
                raise ValueError(f"{path}:{number}: {line!r} is not `name: why`")
            reasons[name.strip().casefold()] = why.strip()
    return reasons
