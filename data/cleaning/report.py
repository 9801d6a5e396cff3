"""What cleaning did, for people and programs: counts, samples, drops and faults as JSON and Markdown, and a diff.

Called by clean.py. What was an identifier is masked ("Dr S…") unless asked for, in samples and diff alike: a report is
passed around more freely than the data it speaks of.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from data.cleaning import identifiers, names
from data.cleaning.linter import Fault
from data.cleaning.names import is_word
from data.cleaning.rewrite import PLACEHOLDER, Change

SAMPLES = 5  # of each rule and each fault
LISTED = 20  # record numbers of a fault or reason that the Markdown names; the JSON has all

_WORD = re.compile(r"[^\W_]+(?:['’.@-]?[^\W_]+)*")
IDENTIFYING = frozenset(rule.name for rule in (*identifiers.RULES, *names.RULES))
ABOUT = {
    "email": "e-mail addresses", "url": "web addresses", "date_of_birth": "dates of birth",
    "record_number": "record, insurance and social security numbers", "address": "postal addresses",
    "phone": "telephone numbers", "sign_off": "a person's sign-off at the end, dropped",
    "greeting": "a name after a greeting, dropped", "name_after_title": "a name after Dr, Mr, Mrs, Ms, Prof",
    "name_with_degree": "a name before MD, PhD, ...", "introduction": "a name after \"my name is\", \"I am\"",
    "relation": "a name after \"my son\", \"her doctor\"", "mojibake": "characters that were decoded wrongly",
    "characters": "curly quotes, odd spaces, invisible characters", "zero_width": "joiners between Latin letters",
    "spaces": "repeated and outer spaces, blank lines", "glued_sentences": "a missing space between sentences",
    "languagetool": "grammar, as LanguageTool suggests",
}  # fmt: skip


def masked(text: str, kept: str = "") -> str:
    """The text with numbers and what may be a name cut to its first character; words of `kept` stay.

    In text that was replaced, kept being the replacement, everything else is cut, small words too.
    """
    words = set(_WORD.findall(kept))
    spans = [m.span() for m in PLACEHOLDER.finditer(text)]

    def mask(m: re.Match[str]) -> str:
        word = m[0]
        if word in words or any(a <= m.start() < b for a, b in spans):
            return word
        harmless = word.islower() and word.isalpha() if not kept else False
        return word if harmless or (word.isalpha() and is_word(word)) else word[0] + "…"

    return _WORD.sub(mask, text)


def shown(change: Change, show: bool) -> tuple[str, str]:
    """Before and after in their context, on one line each, masked unless show."""
    if show:
        before, left, right = change.before, change.left, change.right
    else:
        before = masked(change.before, change.after or "-") if change.rule in IDENTIFYING else change.before
        left, right = masked(change.left), masked(change.right)
    line = [" ".join(part.split("\n")) for part in (left + before + right, left + change.after + right)]
    return line[0], line[1]


@dataclass
class Report:
    """Counts up while records pass."""

    show: bool
    diff: TextIO
    records: int = 0
    written: int = 0
    changed: int = 0
    characters_before: int = 0
    characters_after: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    rule_records: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    faults: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    fault_samples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def changes(self, number: int, name: str, changes: list[Change]) -> None:
        """Note what the rules did in one field of a record."""
        for change in changes:
            self.rules[change.rule] += 1
            before, after = shown(change, self.show)
            samples = self.samples[change.rule]
            if len(samples) < SAMPLES and (before, after) not in samples:
                samples.append((before, after))
            self.diff.write(f"record {number} {name} {change.rule}\n- {before}\n+ {after}\n")
        self.rule_records.update({change.rule for change in changes})

    def fault(self, number: int, fault: Fault) -> None:
        """Note a fault; several of one kind in a record count once."""
        numbers = self.faults[fault.name]
        if not numbers or numbers[-1] != number:
            numbers.append(number)
            if len(self.fault_samples[fault.name]) < SAMPLES:
                sample = fault.sample if self.show else masked(fault.sample)
                self.fault_samples[fault.name].append(" ".join(sample.split("\n")))

    def drop(self, number: int, reason: str) -> None:
        self.dropped[reason].append(number)

    def as_json(self, **facts: Any) -> dict[str, Any]:
        """Everything, as plain values; facts come first."""
        rules = {
            name: {"count": n, "fields": self.rule_records[name], "samples": self.samples[name]}
            for name, n in self.rules.most_common()
        }
        faults = {
            name: {"records": numbers, "samples": self.fault_samples[name]} for name, numbers in self.faults.items()
        }
        return {
            **facts,
            "records": {"read": self.records, "changed": self.changed, "written": self.written},
            "characters_of_text": {"before": self.characters_before, "after": self.characters_after},
            "rules": rules,
            "dropped": self.dropped,
            "duplicates": [{"record": n, "repeats": first} for n, first in self.duplicates],
            "faults": faults,
        }

    def as_markdown(self, source: Path, target: Path, sizes: tuple[int, int]) -> str:
        """The same for a reader, with the first record numbers only."""
        dropped = sum(map(len, self.dropped.values()))
        lines = [
            f"# Cleaning of {source.name}", "",
            "| | before | after |", "|---|---|---|",
            f"| file | {source.name} | {target.name} |",
            f"| records | {self.records:,} | {self.written:,} |",
            f"| bytes | {sizes[0]:,} | {sizes[1]:,} |",
            f"| characters of text | {self.characters_before:,} | {self.characters_after:,} |", "",
            f"{self.changed:,} records were changed, {dropped:,} dropped. "
            + ("Samples are shown as they are." if self.show else "In samples, names and numbers are cut to their "
               "first character; `--show` prints them."),
        ]  # fmt: skip
        lines += ["", "## What the rules changed", ""]
        lines += _table(("rule", "what", "places", "texts"), [
            (name, ABOUT.get(name, "a phrase of question sites"), f"{n:,}", f"{self.rule_records[name]:,}")
            for name, n in self.rules.most_common()
        ]) if self.rules else ["Nothing."]  # fmt: skip
        lines += ["", "## Records dropped", ""]
        lines += _table(("reason", "records", "numbers"), [
            (reason, f"{len(numbers):,}", _some(numbers)) for reason, numbers in self.dropped.items()
        ]) if self.dropped else ["None."]  # fmt: skip
        lines += ["", "## Faults found", ""]
        lines += _table(("fault", "records", "numbers"), [
            (name, f"{len(numbers):,}", _some(numbers)) for name, numbers in self.faults.items()
        ]) if self.faults else ["None."]  # fmt: skip
        lines += ["", "## Samples", ""]
        for name in (n for n, _ in self.rules.most_common()):
            lines += [f"**{name}**", "", "```diff"]
            lines += [line for before, after in self.samples[name] for line in (f"- {before}", f"+ {after}")]
            lines += ["```", ""]
        for name, samples in self.fault_samples.items():
            lines += [f"**fault: {name}**", "", "```", *samples, "```", ""]
        return "\n".join(lines).rstrip() + "\n"

    def write(self, json_file: Path, markdown_file: Path, source: Path, target: Path, **facts: Any) -> None:
        """Write both; facts holds the sizes of the files in bytes, before and after."""
        json_file.write_text(json.dumps(self.as_json(**facts), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sizes = (facts["bytes"]["before"], facts["bytes"]["after"])
        markdown_file.write_text(self.as_markdown(source, target, sizes), encoding="utf-8")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _some(numbers: list[int]) -> str:
    first = ", ".join(map(str, numbers[:LISTED]))
    return first + (", ..." if len(numbers) > LISTED else "")
