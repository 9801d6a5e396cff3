"""A file of records -> the same file without identifiers, boilerplate and litter, and a report of what was done.

`python -m data.prepare clean IN OUT`. Any shape that records.py reads; every field that is no text of the dialogue
stays as it is, and so does a record in which nothing changes, byte for byte. IN is never written to. OUT appears whole,
after its report and diff, or not at all. The rules live elsewhere: identifiers.py, names.py, tidy.py; faults are named
by
linter.py and repeats by duplicates.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from data.cleaning import identifiers, names, tidy
from data.cleaning.duplicates import Duplicates
from data.cleaning.fields import Field, NoText, fields_of
from data.cleaning.language_tool import LanguageTool
from data.cleaning.linter import faults
from data.cleaning.report import IDENTIFYING, Report
from data.cleaning.rewrite import Change, rewrite
from data.records import BadRecord, RejectedFile
from data.stream import Item, read_items
from llama.command_line import Parser
from llama.files import fsync, full_disk, stage

RULES = (*tidy.TYPOGRAPHY, *tidy.SPACING, *identifiers.RULES, *tidy.BOILERPLATE, *names.RULES)
SUFFIXES = (".report.json", ".report.md", ".diff")  # of what lies beside OUT
REJECTED = ".rejected.jsonl"


def clean(text: str, changes: list[Change] | None = None) -> str:
    """A text after all rules; cleaning it again changes nothing. changes: gets what was done."""
    return rewrite(text, RULES, [] if changes is None else changes)


# --- one record -----------------------------------------------------------------------------------


class Cleaner:
    """Cleans records one after the other and keeps the report."""

    def __init__(self, report: Report, duplicates: float, drop: bool, tool: LanguageTool | None) -> None:
        self.report, self._drop, self._tool = report, drop, tool
        self._duplicates = Duplicates(duplicates) if duplicates else None

    def keep(self, number: int, found: list[Field]) -> tuple[bool, bool]:
        """Clean the fields in place; whether the record is to be written, and whether it was changed."""
        report, before = self.report, [field.text for field in found]
        report.records += 1
        report.characters_before += sum(map(len, before))
        for field in found:
            self._clean(number, field)
        changed = [field.text for field in found] != before
        report.changed += changed
        reason = self._reason_to_drop(number, found)
        if reason:
            report.drop(number, reason)
            return False, changed
        report.written += 1
        report.characters_after += sum(len(field.text) for field in found)
        return True, changed

    def _clean(self, number: int, field: Field) -> None:
        changes: list[Change] = []
        text = clean(field.text, changes)
        if self._tool is not None and text:
            text = clean(self._tool.correct(text, changes), changes)
        if changes:
            self.report.changes(number, field.name, changes)
            field.text = text

    def _reason_to_drop(self, number: int, found: list[Field]) -> str:
        empty = next((field.name for field in found if not field.text), None)
        if empty:
            return f"nothing is left of {empty}"
        wrong = [fault for field in found for fault in faults(field.text, field.answer)]
        for fault in wrong:
            self.report.fault(number, fault)
        if wrong and self._drop:
            return f"fault: {wrong[0].name}"
        if self._duplicates is not None:
            text = "\n".join(field.text for field in found if field.key != "instruction" or len(found) < 3)
            first = self._duplicates.earlier(number, text)
            if first is not None:
                self.report.duplicates.append((number, first))
                return "near-duplicate"
        return ""


# --- a file ---------------------------------------------------------------------------------------


def clean_file(
    source: Path,
    target: Path,
    *,
    more_fields: Sequence[str] = (),
    duplicates: float = 0.9,
    drop: bool = False,
    skip_bad: bool = False,
    languagetool: str = "",
    show: bool = False,
) -> Report:
    """Clean source into target, with report and diff beside it; ValueError for what the user gave and got wrong."""
    _check(source, target)
    tool = LanguageTool(languagetool) if languagetool else None
    staged = stage(target, 2 * source.stat().st_size)
    try:
        places = {suffix: staged.directory / (target.name + suffix) for suffix in ("", *SUFFIXES, REJECTED)}
        with (
            places[".diff"].open("w", encoding="utf-8") as diff,
            RejectedFile(places[REJECTED]) as rejected,
            places[""].open("w", encoding="utf-8", newline="") as out,
        ):
            report = Report(show, diff)
            cleaner = Cleaner(report, duplicates, drop, tool)
            records = _records(source, more_fields, rejected if skip_bad else None, report)
            _write(out, ((item, *cleaner.keep(item.index, found)) for item, found in records), _is_array(source))
        sizes = {"before": source.stat().st_size, "after": places[""].stat().st_size}
        report.write(
            places[".report.json"],
            places[".report.md"],
            source,
            target,
            input=str(source),
            output=str(target),
            bytes=sizes,
        )
        for suffix in (*SUFFIXES, REJECTED, ""):  # OUT last: where it is, the rest is too
            if places[suffix].exists():
                fsync(places[suffix])
                os.rename(places[suffix], target.with_name(target.name + suffix))
        fsync(target.resolve().parent)
        return report
    except OSError as e:
        raise full_disk(e, target) from None
    finally:
        staged.close(remove=True)
        if tool is not None:
            tool.close()


def _check(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if source.suffix.lower() == ".txt":
        raise ValueError(f"{source}: plain text has no records; put it into JSON lines of {{text}}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is IN itself; originals are not overwritten, choose another OUT")
    for suffix in ("", *SUFFIXES, REJECTED):
        place = target.with_name(target.name + suffix)
        if place.exists():
            raise ValueError(f"{place}: exists; move it away or choose another OUT")


def _is_array(source: Path) -> bool:
    with source.open("rb") as f:
        head = f.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[")


def _records(
    source: Path, more: Sequence[str], rejected: RejectedFile | None, report: Report
) -> Iterator[tuple[Item, list[Field]]]:
    """The records of a file with the places of their texts. A bad one goes to rejected, or is raised."""
    with tqdm(total=source.stat().st_size, unit="B", unit_scale=True, disable=None, desc="clean") as bar:
        for item in read_items(source, bar.update):
            fault = item.fault
            if fault is None:
                try:
                    yield item, fields_of(item.value, more)
                    continue
                except NoText as e:
                    fault = (e.field, e.reason)
            bad = BadRecord(source, item.index, *fault, f"line {item.line:,}, byte {item.byte:,}")
            if rejected is None or item.fatal:
                raise bad
            rejected(bad, item.raw.encode("utf-8", "surrogateescape"))
            report.records += 1
            report.drop(item.index, "cannot be read")


def _write(out: TextIO, records: Iterator[tuple[Item, bool, bool]], array: bool) -> None:
    between = "[\n"
    for item, keep, changed in records:
        if not keep:
            continue
        text = _as_json(item) if changed else item.raw
        if array:
            margin = _MARGIN.search(item.raw)
            text = between + (margin[1] if margin else "") + text
            between = ",\n"
        out.write(text if array else text + "\n")
    if array:
        out.write("\n]\n" if between == ",\n" else "[]\n")


_MARGIN = re.compile(r"\n([ \t]*)\}$")
_INDENT = re.compile(r"\{\r?\n([ \t]*)")


def _as_json(item: Item) -> str:
    """The record's JSON, laid out as it was."""
    inner, margin = _INDENT.match(item.raw), _MARGIN.search(item.raw)
    left = margin[1] if margin else ""
    try:
        text = json.dumps(
            item.value,
            ensure_ascii=item.raw.isascii(),
            allow_nan=False,
            indent=inner[1].removeprefix(left) if inner else None,
        )
    except ValueError:
        raise ValueError(f"record {item.index}: holds a number that JSON cannot write") from None
    return text.replace("\n", "\n" + left)


# --- command line ---------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Any:
    """The flags of `python -m data.prepare clean`."""
    p = Parser("python -m data.prepare clean", __doc__)
    p.add_argument("source", metavar="IN", type=Path, help="records as JSON or JSON lines; never written to")
    p.add_argument("target", metavar="OUT", type=Path, help="must not exist; OUT.report.md says what was done")
    p.add_argument("--fields", nargs="+", default=[], help="further fields that hold text to clean")
    p.add_argument(
        "--duplicates", type=_share, default=0.9, metavar="X", help="drop near-duplicates over this; 0: keep"
    )
    p.add_argument("--drop", action="store_true", help="drop records with faults instead of naming them only")
    p.add_argument("--check", action="store_true", help="exit status 1 if a fault was found, for CI")
    p.add_argument("--skip_bad_records", action="store_true", help="set unreadable records aside in OUT.rejected.jsonl")
    p.add_argument("--languagetool", default="", metavar="URL", help="correct grammar by the LanguageTool server there")
    p.add_argument("--show", action="store_true", help="print identifiers in report and diff as they were")
    return p.parse_args(argv)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def run(args: Any) -> int:
    """Clean a file as the flags say and say what was done; 1 when --check found faults."""
    report = clean_file(
        args.source,
        args.target,
        more_fields=args.fields,
        duplicates=args.duplicates,
        drop=args.drop,
        skip_bad=args.skip_bad_records,
        languagetool=args.languagetool,
        show=args.show,
    )
    print(_summary(report, args.target))
    return 1 if args.check and report.faults else 0


def _summary(report: Report, target: Path) -> str:
    places = {"identifiers": 0, "boilerplate": 0, "typography and spacing": 0}
    for name, n in report.rules.items():
        kind = "identifiers" if name in IDENTIFYING else "boilerplate" if name.startswith("boiler") else None
        places[kind or "typography and spacing"] += n
    lines = [f"{report.records:,} records read, {report.changed:,} changed, {report.written:,} written to {target}"]
    lines += [f"  {n:,} places: {what}" for what, n in places.items()]
    lines += [f"  {len(numbers):,} dropped: {reason}" for reason, numbers in report.dropped.items()]
    lines += [f"  {len(numbers):,} records with a fault: {name}" for name, numbers in report.faults.items()]
    return "\n".join([*lines, f"what was done, with samples: {target}.report.md; every change: {target}.diff"])
