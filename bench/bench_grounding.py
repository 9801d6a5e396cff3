"""Do answers from rows of the disease database rest on them, and does the model say when there is none?

    python bench/bench_grounding.py --checkpoint out/grounded [--data ../shared/data]

Held-out questions of the built-in sample, its own table as the database, answers greedy. Beside the grounded model
stands the same model without rows (as if it cited the row of the condition that it names) and a template that copies
the first row. For each: the share that names the right condition; citation precision (a citation is right if the
cited row was given, is the condition that the answer names, and holds every test and drug that the answer names); the
share of tests and drugs that no cited row holds; and how often it says "no entry". Then: rows in random order, rows
with other conditions' facts (is it copied?), questions in unseen words; questions whose condition was taken out of the
database, and general and medical ones from elsewhere, to which "no entry" is the honest answer. Intervals are 95 %.
Writes bench/results/grounding_cpu.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, write

sys.path.insert(0, str(ROOT))

from data.conditions import Table, load_table
from data.diseases import Database, Entry
from data.grounded_samples import MIX, Mix, grounded, grounded_answer, sample_database
from data.grounding import Names, cited_ids, search, with_rows
from data.intervals import bootstrap, wilson
from data.metrics import naming
from data.synthesize import Example, examples
from llama import checkpoint
from llama.batching import answer_greedily
from llama.chat import Message
from llama.generation import lay_out_for_decoding

FOLDS = 6
SAYS_NONE = "no entry"
Answer = Callable[[Sequence[str]], list[str]]  # to patients' turns


@dataclass(frozen=True)
class Case:
    """A question, what it is about, and the rows that its answer had."""

    condition: str
    question: str
    rows: tuple[Entry, ...]


def share(hits: float, n: int) -> dict[str, Any]:
    return {"share": round(hits / n, 4) if n else None, "n": n, "interval": [round(x, 3) for x in wilson(hits, n)]}


def ratio(sums: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
    low, high = bootstrap(sums, counts)
    value = sum(sums) / max(1, sum(counts))
    return {"share": round(value, 4), "n": sum(counts), "interval": [round(low, 3), round(high, 3)]}


class Judge:
    """Scores answers against the rows that they had."""

    def __init__(self, table: Table, database: Database) -> None:
        self.named, self.names = naming(table), Names(database)
        self.by_name = {c.name: database.entry(i + 1) for i, c in enumerate(table.conditions)}

    def __call__(self, cases: Sequence[Case], answers: Sequence[str], as_if_cited: bool = False) -> dict[str, Any]:
        right = none = good = invented = citations = 0
        unsourced, entities = [], []
        for case, text in zip(cases, answers, strict=True):
            name = self.named(text)
            right += name == case.condition
            none += SAYS_NONE in text.lower()
            given = {e.id: e for e in case.rows}
            ids = cited_ids(text)
            if as_if_cited:
                given = {self.by_name[name].id: self.by_name[name]} if name else {}
                ids = list(given)
            cited = [given[i] for i in ids if i in given]
            without = self.names.unsourced(text, cited)
            citations += len(ids)
            invented += len(ids) - len(cited)
            good += sum(e.name.lower() in text.lower() and not self.names.unsourced(text, [e]) for e in cited)
            unsourced.append(len(without))
            entities.append(len(self.names.find(text)))
        return {
            "names_the_right_condition": share(right, len(cases)),
            "citation_precision": share(good, citations),
            "citations_invented": share(invented, citations),
            "tests_and_drugs_in_no_cited_row": ratio(unsourced, entities),
            "says_no_entry": share(none, len(cases)),
        }


def with_found(database: Database, asked: Iterable[Example]) -> list[Case]:
    return [Case(e.condition, e.question, tuple(search(database, e.question))) for e in asked]


def turns(cases: Iterable[Case]) -> list[str]:
    return [with_rows(c.question, c.rows) for c in cases]


def in_database(judge: Judge, database: Database, answer: Answer, n: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for split in ("held_out", "unseen_wordings"):
        cases = with_found(database, examples(load_table(), 0, n, split))
        found = [c for c in cases if c.rows]
        template = [grounded_answer(c.rows[0]) if c.rows else SAYS_NONE for c in cases]
        results[split] = {
            "a_row_is_found": share(len(found), n),
            "the_right_row_is_among_them": share(sum(c.condition in [e.name for e in c.rows] for c in cases), n),
            "grounded": judge(cases, answer(turns(cases))),
            "same_model_without_rows": judge(cases, answer([c.question for c in cases]), as_if_cited=True),
            "template_of_the_first_row": judge(cases, template),
        }
        if split == "held_out":
            rng = random.Random(0)
            mixed = [Case(c.condition, c.question, tuple(rng.sample(c.rows, len(c.rows)))) for c in cases]
            results[split]["grounded, rows in random order"] = judge(mixed, answer(turns(mixed)))
    return results


def copied(judge: Judge, database: Database, answer: Answer, n: int) -> dict[str, Any]:
    """Rows under random ids with other conditions' tests, drugs and urgency, which no memory has."""
    mix = Mix(no_rows=0, no_fit=0, fewer=0, shuffled=MIX.shuffled, swapped_facts=1, swapped_rows=0)
    made = list(grounded(database, 0, n, "held_out", mix))
    cases = [Case(g.right.name if g.right else "", g.question, g.rows) for g in made]
    texts = answer(turns(cases))
    right = sum(g.right is not None and cited_ids(t) == [g.right.id] for g, t in zip(made, texts, strict=True))
    return {**judge(cases, texts), "cites_the_right_row": share(right, n)}


def left_out(answer: Answer, n: int) -> dict[str, Any]:
    """Questions whose condition is not in the database: every fold of the conditions is taken out once."""
    names = [c.name for c in load_table().conditions]
    asked = list(examples(load_table(), 0, n, "held_out"))
    cases: list[Case] = []
    for fold in range(FOLDS):
        out = set(names[fold::FOLDS])
        with tempfile.TemporaryDirectory() as folder:
            cases += with_found(sample_database(Path(folder), tuple(out)), [e for e in asked if e.condition in out])
    texts = answer(turns(cases))
    said = [not c.rows or SAYS_NONE in t.lower() for c, t in zip(cases, texts, strict=True)]
    return {
        "no_entry_by_search": share(sum(not c.rows for c in cases), n),
        "no_entry_by_search_or_model": share(sum(said), n),
        "model_says_so_when_rows_are_given": share(
            sum(SAYS_NONE in t.lower() for c, t in zip(cases, texts, strict=True) if c.rows),
            sum(bool(c.rows) for c in cases),
        ),
    }


def elsewhere(database: Database, data: Path) -> dict[str, Any]:
    """Questions that are not about the table: "no entry" by the search alone."""
    general = [json.loads(x)["instruction"] for x in (data / "general/seed_tasks.jsonl").read_text().splitlines()]
    general += [r["instruction"] for r in json.loads((data / "general/alpaca_gpt4_en_demo_1k.json").read_text())]
    known = [database.clinical(n) for n in database.names("diseases")]
    passages = [json.loads(x) for x in (data / "grounding/medquad.jsonl").read_text().splitlines()][::8]
    medical = []
    for p in passages:
        words = database.clinical(p["question"])
        if not any(set(k) <= set(words) for k in known):  # names no disease of the table
            medical.append(p["question"])
    return {
        "general instructions": share(sum(not search(database, q) for q in general), len(general)),
        "MedQuAD on other diseases": share(sum(not search(database, q) for q in medical), len(medical)),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, default=ROOT / "out/grounded")
    p.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    p.add_argument("--n", type=int, default=636, help="questions of a set")
    p.add_argument("--output", type=Path, default=RESULTS / "grounding_cpu.json")
    args = p.parse_args()
    model = checkpoint.load_model(args.checkpoint).eval()
    lay_out_for_decoding(model)
    tokenizer, chat_format = checkpoint.load_tokenizer(args.checkpoint), checkpoint.load_chat_format(args.checkpoint)
    ask = functools.partial(answer_greedily, model, tokenizer, chat_format)

    def answer(asked: Sequence[str]) -> list[str]:
        return ask([(Message("user", text),) for text in asked])

    with tempfile.TemporaryDirectory() as folder:
        database = sample_database(Path(folder))
        judge = Judge(load_table(), database)
        results = {"in_the_database": in_database(judge, database, answer, args.n)}
        results["rows with other conditions' facts"] = copied(judge, database, answer, args.n)
        results["condition left out of the database"] = left_out(answer, args.n)
        if args.data.is_dir():
            results["questions from elsewhere, by search alone"] = elsewhere(database, args.data)
    print(json.dumps(results, indent=1))
    write(args.output, results, one_line_each=True, checkpoint=str(args.checkpoint))


if __name__ == "__main__":
    main()
