"""Does the disease database find the disease, and how fast?

    python bench/bench_retrieval.py [--data ../shared/data] [--triples 5000]

(a) Three symptoms drawn from a row of ChatDoctor's format_dataset.csv: is the row found? The floor is the summed IDF
of symptoms' names over the table as it came, on the same draws. (b) The questions of chatdoctor5k.json that name no
disease and whose answer names exactly one: is that one found? Beside it BM25 over symptoms' names, with plain words and
with stemmed ones without stop words. Diseases are split in two halves by a hash of their name: `development` is what
the search was tuned on, `held_out` was not. (c) Milliseconds a search, with MedQuAD's passages in the file.

Quarantined rows are no candidates, and their draws and questions are left out and counted. Shares come with 95 %
intervals (Wilson's), differences with paired ones. Writes bench/results/retrieval_cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, write

sys.path.insert(0, str(ROOT))

from data.disease_search import Words, words_of
from data.disease_sources import DISEASE, PASSAGE, Row, find_source, read_source
from data.diseases import Database, build, open_database

TOP = (1, 5, 10)
Question = tuple[str, str]  # text, disease in lower case
Ranker = Callable[[str], list[str]]  # text -> diseases in lower case, best first


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    p.add_argument("--triples", type=int, default=5000)
    args = p.parse_args()
    table = args.data / "chatdoctor/format_dataset.csv"
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {}
        for name, extra in (("format_dataset", []), ("format_dataset and the own table", [find_source("sample")])):
            sources = [read_source(p) for p in (table, args.data / "grounding/medquad.jsonl", *extra)]
            out = Path(folder) / f"{len(extra)}.db"
            build(sources, out)
            rows = sources[0].rows
            results[name] = measure(open_database(out), rows, args)
    print(json.dumps(results, indent=2))
    write(RESULTS / "retrieval_cpu.json", results, one_line_each=True)


def measure(database: Database, rows: tuple[Row, ...], args: argparse.Namespace) -> dict[str, Any]:
    poisoned = {f.name.casefold() for f in database.findings() if f.source == "format_dataset"}
    kept = [r for r in rows if r.name.casefold() not in poisoned]
    asked = questions(args.data / "chatdoctor/chatdoctor5k.json", rows)
    fair = [q for q in asked if q[1] not in poisoned]
    return {
        "quarantined": {"rows": len(rows) - len(kept), "questions": len(asked) - len(fair)},
        "triples": triples(database, rows, kept, args.triples),
        "questions": {half: free_text(database, kept, part) for half, part in halves(fair).items()},
        "latency_ms": latency(database, [q for q, _ in fair]),
    }


def names_of(database: Database, hits: Iterable[Any]) -> list[str]:
    """Diseases in the order of the hits, each once: two sources may have the same."""
    return list(dict.fromkeys(h.entry.name.casefold() for h in hits))


# --- symptom triples ------------------------------------------------------------------------------


def triples(database: Database, rows: tuple[Row, ...], kept: list[Row], count: int) -> dict[str, Any]:
    draw = random.Random(0)
    drawn = [
        (draw.sample(r.symptoms, 3), r.name.casefold())
        for r in draw.choices([r for r in kept if len(r.symptoms) > 2], k=count)
    ]
    owners: dict[str, list[str]] = defaultdict(list)
    for r in rows:
        for s in r.symptoms:
            owners[s].append(r.name.casefold())

    def floor(symptoms: list[str]) -> list[str]:
        scores: Counter[str] = Counter()
        for s in symptoms:
            for name in owners[s]:
                scores[name] += math.log(len(rows) / len(owners[s]))
        return sorted(scores, key=lambda n: -scores[n])

    ways: dict[str, Callable[[list[str]], list[str]]] = {
        "floor: IDF of names": floor,
        "by_symptoms": lambda s: names_of(database, database.by_symptoms(s, 20)),
        "search of the text": lambda s: names_of(database, database.search(", ".join(s), 20)),
    }
    return {way: shares([rank_of(find(s), gold) for s, gold in drawn]) for way, find in ways.items()}


# --- free-text questions --------------------------------------------------------------------------


def questions(path: Path, rows: tuple[Row, ...]) -> list[Question]:
    """The questions that name no disease of the table, and whose answer names exactly one; with that one."""
    diseases: dict[str, str] = {}
    others: set[str] = set()  # "removal of ectopic pregnancy" is a procedure and names no disease
    for r in rows:
        diseases.update((form, r.name.casefold()) for form in reversed(forms(r.name)))
        others.update(form for item in r.tests + r.medications for form in forms(item))
    longest_first = sorted(diseases.keys() | others, key=len, reverse=True)
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, filter(None, longest_first))) + r")\b")

    def named(text: str) -> set[str]:
        return {diseases[m] for m in pattern.findall(plain(text)) if m in diseases}

    found = []
    for record in json.loads(path.read_text()):
        golds = named(record["output"])
        if len(golds) == 1 and not named(record["input"]):
            found.append((record["input"], golds.pop()))
    return found


def forms(name: str) -> list[str]:
    """A name whole, without brackets, and what stands in them."""
    return list(dict.fromkeys(map(plain, (name, re.sub(r"\([^)]*\)", "", name), *re.findall(r"\(([^)]*)\)", name)))))


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def halves(asked: list[Question]) -> dict[str, list[Question]]:
    parts: dict[str, list[Question]] = {"development": [], "held_out": []}
    for question in asked:
        odd = hashlib.sha256(question[1].encode()).digest()[0] & 1
        parts["held_out" if odd else "development"].append(question)
    return parts


def free_text(database: Database, kept: list[Row], part: list[Question]) -> dict[str, Any]:
    words = Words()
    baselines: dict[str, Ranker] = {"BM25, plain words": bm25(kept, words_of), "BM25, stemmed": bm25(kept, words.stems)}
    ours = [rank_of(names_of(database, database.search(q, 50)), gold) for q, gold in part]
    result: dict[str, Any] = {}
    for name, ranker in baselines.items():
        theirs = [rank_of(ranker(q), gold) for q, gold in part]
        result[name] = shares(theirs)
        result[f"ours less {name}"] = {f"top_{k}": difference(ours, theirs, k) for k in TOP}
    return {"search": shares(ours)} | result


def bm25(rows: list[Row], tokens: Callable[[str], list[str]]) -> Ranker:
    """BM25 (k1 1.2, b 0.75) over the names of a disease's symptoms."""
    documents = [Counter(t for s in r.symptoms for t in tokens(s)) for r in rows]
    mean = statistics.mean(d.total() for d in documents)
    postings: dict[str, list[int]] = defaultdict(list)
    for i, d in enumerate(documents):
        for token in d:
            postings[token].append(i)

    def rank(text: str) -> list[str]:
        scores: Counter[int] = Counter()
        for token in sorted(set(tokens(text))):
            having = postings.get(token, [])
            idf = math.log(1 + (len(rows) - len(having) + 0.5) / (len(having) + 0.5))
            for i in having:
                n = documents[i][token]
                scores[i] += idf * n * 2.2 / (n + 1.2 * (0.25 + 0.75 * documents[i].total() / mean))
        return [rows[i].name.casefold() for i in sorted(scores, key=lambda i: (-scores[i], i))[:50]]

    return rank


# --- figures --------------------------------------------------------------------------------------


def rank_of(ranked: list[str], gold: str) -> int:
    """Its place from 1; 0 when it is not there."""
    return ranked.index(gold) + 1 if gold in ranked else 0


def shares(ranks: list[int]) -> dict[str, Any]:
    reciprocal = [1 / r if r else 0.0 for r in ranks]
    half = 1.96 * statistics.pstdev(reciprocal) / math.sqrt(len(ranks))
    mrr = statistics.mean(reciprocal)
    figures: dict[str, Any] = {"n": len(ranks)}
    figures |= {f"top_{k}": wilson(sum(0 < r <= k for r in ranks), len(ranks)) for k in TOP}
    return figures | {"mrr": [round(x, 3) for x in (mrr, mrr - half, mrr + half)]}


def wilson(k: int, n: int) -> list[float]:
    """A share and its 95 % interval."""
    z, share = 1.96, k / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [round(x, 3) for x in (share, middle - half, middle + half)]


def difference(ours: list[int], theirs: list[int], k: int) -> list[float]:
    """Ours less theirs in the share of the top k, question by question, and its 95 % interval."""
    pairs = [(0 < a <= k) - (0 < b <= k) for a, b in zip(ours, theirs, strict=True)]
    half = 1.96 * statistics.pstdev(pairs) / math.sqrt(len(pairs))
    mean = statistics.mean(pairs)
    return [round(x, 3) for x in (mean, mean - half, mean + half)]


def latency(database: Database, texts: list[str]) -> dict[str, Any]:
    """Of one search after another: by the clock, and of the processor, which others on the machine do not lengthen."""
    figures = {}
    for kind in (DISEASE, PASSAGE):
        taken: list[tuple[float, float]] = []
        for text in texts[:2000]:
            begin = time.perf_counter(), time.thread_time()
            database.search(text, 5, kind)
            taken.append((time.perf_counter() - begin[0], time.thread_time() - begin[1]))
        figures[kind] = {"n": len(taken)}
        for name, column in zip(("clock", "processor"), zip(*taken, strict=True), strict=True):
            ordered = sorted(1e3 * t for t in column)
            middle, late = ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]
            figures[kind] |= {f"{name}_median": round(middle, 2), f"{name}_p99": round(late, 2)}
    return figures


if __name__ == "__main__":
    main()
