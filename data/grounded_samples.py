"""The table -> questions with rows of the database before them, and answers that cite: to learn grounded answers from.

    python -m data.grounded_samples --output grounded.jsonl

writes dialogues in the shape that train.py reads, grounded ones and, replayed, plain ones (runs/grounded_tiny.sh).
Ids are drawn at random and facts are swapped between rows, so that copying from the row is the only way to be right.
Questions are the training side of data/synthesize.py's split.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.conditions import SAMPLE, listed, load_table
from data.disease_sources import read_source
from data.diseases import Database, Entry, build, open_database
from data.grounding import ROWS, cite, facts, with_rows
from data.synthesize import DISCLAIMER, EMERGENCY, RECIPE, SOON, Example, Split, examples, in_turns
from llama.command_line import Parser

LARGEST_IDS = (400, 20_000)  # the own table has 318 rows, with ChatDoctor's and MedQuAD's there are 17,521
NO_ENTRY = "The database has no entry that fits this. Please ask a doctor."


@dataclass(frozen=True)
class Mix:
    """Shares of the grounded samples; what is left has three rows, the right one among them."""

    no_rows: float = 0.06  # nothing was found
    no_fit: float = 0.10  # rows that do not fit
    fewer: float = 0.25  # one or two rows
    shuffled: float = 0.5  # rows in random order instead of best first: the first is mostly right, not always
    swapped_facts: float = 0.35  # tests, drugs and urgency of other conditions
    swapped_rows: float = 0.15  # ... and their names


MIX = Mix()


@dataclass(frozen=True)
class Grounded:
    """A question with its rows, the one that fits (None: none does), and the answer."""

    question: str
    rows: tuple[Entry, ...]
    right: Entry | None
    answer: str

    def messages(self) -> list[dict[str, str]]:
        turns = (("user", with_rows(self.question, self.rows)), ("assistant", self.answer))
        return [{"role": role, "content": content} for role, content in turns]


def sample_database(folder: Path, without: Sequence[str] = ()) -> Database:
    """The built-in table as a database in a folder; `without` some conditions, whose ids stay theirs."""
    source = read_source(SAMPLE)
    rows = tuple(replace(r, fault="left out") if r.name in without else r for r in source.rows)
    build([replace(source, rows=rows)], folder / "sample.db")
    return open_database(folder / "sample.db")


def grounded_answer(entry: Entry, disclaimer: bool = False) -> str:
    """An answer straight from a row."""
    soon = {"emergency": EMERGENCY, "urgent": SOON}.get(entry.urgency, "")
    text = f"This fits {cite(entry)}.{soon} {' '.join(facts(entry))}"
    return text + DISCLAIMER * disclaimer


def grounded(database: Database, seed: int, n: int, split: Split = "train", mix: Mix = MIX) -> Iterator[Grounded]:
    """n samples; the same for the same seed."""
    rng = random.Random(f"grounded {split} {seed}")
    everyone = [database.entry(i + 1) for i in range(len(load_table().conditions))]
    by_name = {e.name: e for e in everyone}
    for example in examples(load_table(), seed, n, split):
        found = [h.entry for h in database.search(example.question, ROWS + 2)]
        yield _sample(rng, example, by_name[example.condition], found, everyone, mix)


def _sample(
    rng: random.Random, example: Example, gold: Entry, found: list[Entry], everyone: list[Entry], mix: Mix
) -> Grounded:
    others = [e for e in found if e.name != gold.name]
    kind = rng.random()
    if kind < mix.no_rows:
        return Grounded(example.question, (), None, NO_ENTRY)
    count = rng.randint(1, ROWS - 1) if rng.random() < mix.fewer else ROWS
    fits = kind >= mix.no_rows + mix.no_fit
    rows = [gold, *others][:count] if fits else others[:count] or [rng.choice(everyone)]
    if fits and gold in found:  # the order in which they were found
        rows.sort(key=lambda e: found.index(e))
    if rng.random() < mix.shuffled:
        rng.shuffle(rows)
    at = rows.index(gold) if fits and gold in rows else None
    shown = _disguised(rng, rows, everyone, mix)
    if at is None:
        return Grounded(example.question, tuple(shown), None, NO_ENTRY)
    return Grounded(example.question, tuple(shown), shown[at], grounded_answer(shown[at], rng.random() < 0.3))


def _disguised(rng: random.Random, rows: Sequence[Entry], everyone: Sequence[Entry], mix: Mix) -> list[Entry]:
    """The rows under random ids, perhaps with what other rows say of tests and drugs, and under their names."""
    ids = _ids(rng, len(rows))
    kind = rng.random()
    shown = []
    for entry, id_ in zip(rows, ids, strict=True):
        other = rng.choice(everyone) if kind < mix.swapped_rows + mix.swapped_facts else entry
        name = other.name if kind < mix.swapped_rows else entry.name
        shown.append(
            replace(entry, id=id_, name=name, tests=other.tests, medications=other.medications, urgency=other.urgency)
        )
    return shown


def _ids(rng: random.Random, n: int) -> list[int]:
    return rng.sample(range(1, rng.choice(LARGEST_IDS) + 1), n)


def drills(database: Database, seed: int, n: int) -> Iterator[list[dict[str, str]]]:
    """n dialogues that only teach to copy: many short rows, and an answer that takes over what they say of each.

    Grounded samples alone did not: of 250 tokens they copy ten, and after 2.8 million tokens the model named the right
    row and made up its id.
    """
    rng = random.Random(f"drill {seed}")
    everyone = [database.entry(i + 1) for i in range(len(load_table().conditions))]
    for _ in range(n):
        with_facts = rng.random() < 0.5
        picked = rng.sample(everyone, rng.randint(2, 3) if with_facts else rng.randint(3, 6))
        rows = []
        for entry, id_ in zip(picked, _ids(rng, len(picked)), strict=True):
            other = rng.choice(everyone)
            tests, medications = (other.tests, other.medications) if with_facts else ((), ())
            symptoms = tuple(rng.sample(entry.symptoms, 2))
            rows.append(replace(entry, id=id_, symptoms=symptoms, urgency="", tests=tests, medications=medications))
        asked = rng.sample(rows, len(rows))
        question = f"What of {listed([e.name for e in asked], 'and')}?"
        answer = " ".join(" ".join([f"{cite(e)}.", *facts(e)]) for e in asked)
        yield Grounded(question, tuple(rows), None, answer).messages()


# --- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Write the dialogues to a file; exit status 2 and one line on stderr for bad input."""
    p = Parser("python -m data.grounded_samples", "Make dialogues with rows of the database, and plain ones.")
    p.add_argument("--grounded", type=int, default=9000, metavar="N", help="dialogues with rows (9000)")
    p.add_argument("--drills", type=int, default=0, metavar="N", help="dialogues that only teach to copy rows (0)")
    p.add_argument("--plain", type=int, default=6000, metavar="N", help="questions without, replayed (6000)")
    p.add_argument("--seed", type=int, default=1, help="same seed, same dialogues (1; train.py's sample has 0)")
    p.add_argument("--output", required=True, metavar="F.jsonl", help="JSON lines to write")
    args = p.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        n = _write(args)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: --output {args.output}: cannot write ({e.strerror}); choose another path", file=sys.stderr)
        return 2
    print(f"{n:,} dialogues in {args.output}, {args.grounded:,} of them grounded", file=sys.stderr)
    return 0


def _write(args: argparse.Namespace) -> int:
    if args.grounded < 1 or min(args.plain, args.drills) < 0:
        raise ValueError(f"--grounded {args.grounded}: at least 1; --plain and --drills: 0 or more")
    plain = list(in_turns(list(examples(load_table(), args.seed, args.plain)), RECIPE.turns, args.seed))
    with tempfile.TemporaryDirectory() as folder, Path(args.output).open("w", encoding="utf-8") as out:
        database = sample_database(Path(folder))
        records = [g.messages() for g in grounded(database, args.seed, args.grounded)]
        records += drills(database, args.seed, args.drills)
        records += [[{"role": m.role, "content": m.content} for m in d.messages] for d in plain]
        random.Random(args.seed).shuffle(records)
        for messages in records:
            out.write(json.dumps({"messages": messages}) + "\n")
    return len(records)


if __name__ == "__main__":
    sys.exit(main())
