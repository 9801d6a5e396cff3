"""Does cleaning find identifiers, and leave everything else alone? How fast?

    python bench/bench_clean.py [--each 300] [--seed 0] [--list]

Reads ../shared/data. Recall: identifiers in sentence frames (bench/clean_frames.py), injected into MedQuAD answers and
ChatDoctor's 5k; one is found when no word of it is left. Damage: words that the rules change in MedQuAD's 16,407
answers and that are no identifier, of all words. MedQuAD does hold telephone numbers, addresses and names;
bench/clean_judged.txt lists the hashes of those replacements that a person read and found to be identifiers, and
everything else counts as damage and is printed (--list prints every replacement, to judge). Clinical words: every word
with "dr" in MedQuAD and in format_dataset.csv, in several sentences. Throughput: process time of one core. Writes
bench/results/clean_cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from clean_frames import FRAMES, filled, makers, people
from report import RESULTS, write

from data.clean import clean
from data.cleaning.duplicates import Duplicates
from data.cleaning.linter import faults
from data.cleaning.rewrite import PLACEHOLDER, Change

DATA = ROOT.parent / "shared/data"
JUDGED = ROOT / "bench/clean_judged.txt"
WORD = re.compile(r"\w+")
CARRIERS = (
    "{}",
    "The {} was given.",
    "my {} is low",
    "Dr. {} therapy",
    "I take {}, daily",
    "This is {}.",
    "Hi, {}",
    "{} - {}",
)
TYPOGRAPHY = ("spaces", "characters", "zero_width")  # change no word


def medquad() -> list[str]:
    with (DATA / "grounding/medquad.jsonl").open(encoding="utf-8") as f:
        return [json.loads(line)["answer"] for line in f]


def chatdoctor() -> list[dict[str, str]]:
    return json.loads((DATA / "chatdoctor/chatdoctor5k.json").read_text())


def recall(half: str, hosts: list[str], each: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """The share found by kind, and the frames that were missed."""
    rng = random.Random(f"{seed} {half}")
    make, person = makers(half), people(half)
    found: dict[str, Any] = {}
    missed: list[str] = []
    for kind, frames in FRAMES[half].items():
        hits = 0
        for i in range(each):
            sentence, identifier = filled(kind, frames[i % len(frames)], rng, make, person)
            host = rng.choice(hosts)
            cleaned = clean(injected(host, sentence, rng))
            left = Counter(WORD.findall(cleaned)) - Counter(WORD.findall(clean(host)))
            own = Counter(WORD.findall(sentence.replace(identifier, " ")))
            leaked = [w for w in WORD.findall(identifier) if left[w] > own[w] and len(w) > 1]
            hits += not leaked
            if leaked:
                missed.append(f"{kind}: {sentence!r} leaves {' '.join(leaked)}")
        found[kind] = {"found": hits, "of": each, "recall": round(hits / each, 4)}
    total = sum(f["found"] for f in found.values()) / (each * len(found))
    return {"recall": round(total, 4), "by_kind": found}, missed


def injected(host: str, sentence: str, rng: random.Random) -> str:
    if sentence.startswith("^"):
        return sentence[1:] + host
    if sentence.startswith("$"):
        return f"{host}\n{sentence[1:]}" if rng.random() < 0.5 or sentence[1] in "-D" else f"{host} {sentence[1:]}"
    ends = [m.end() for m in re.finditer(r"[.?!] (?=[A-Z])", host)] or [0]
    at = rng.choice(ends)
    return f"{host[:at]}{sentence} {host[at:]}"


def _words(text: str) -> Counter[str]:
    return Counter(WORD.findall(PLACEHOLDER.sub(" ", text)))


def damage(answers: list[str], list_all: bool) -> dict[str, Any]:
    """Words changed that were no identifier, and the speed."""
    judged = set(JUDGED.read_text().split())
    changes: list[Change] = []
    started = time.process_time()
    for answer in answers:
        clean(answer, changes)
    seconds = time.process_time() - started
    real, wrong, words_lost = 0, [], 0
    for c in changes:
        lost = sum((_words(c.before) - _words(c.after)).values())
        if c.rule in TYPOGRAPHY or not lost:
            continue
        key = hashlib.sha256(f"{c.rule}|{c.before}".encode()).hexdigest()[:16]
        if list_all:
            print(key, c.rule, repr(c.before), "->", repr(c.after), "|", repr(c.left[-30:]), repr(c.right[:30]))
        if key in judged:
            real += 1
        else:
            words_lost += lost
            wrong.append(f"{c.rule}: {c.before!r} -> {c.after!r}")
    words = sum(len(WORD.findall(a)) for a in answers)
    size = sum(len(a.encode()) for a in answers) / 1e6
    for line in wrong:
        print("damage:", line)
    return {
        "answers": len(answers), "words": words, "identifiers_really_there": real, "words_damaged": words_lost,
        "damage": words_lost / words, "damage_list": wrong,
        "spaces_and_quotes": sum(c.rule in TYPOGRAPHY for c in changes),
        "mb_per_s": round(size / seconds, 2),
    }  # fmt: skip


def clinical_words(answers: list[str]) -> dict[str, Any]:
    table = (DATA / "chatdoctor/format_dataset.csv").read_text()
    found = {
        w for text in (*answers, table) for w in re.findall(r"[A-Za-z]+(?:[-'][A-Za-z]+)*", text) if "dr" in w.lower()
    }
    found -= {"Dr", "Drs", "DR"}
    # Not in the third carrier's place of a person, where a capitalised word is read as one.
    changed = [t for w in sorted(found) for c in CARRIERS if not (c.startswith("Dr.") and w[0].isupper())
               for t in [c.format(w, w)] if clean(t) != t]  # fmt: skip
    for t in changed:
        print("changed:", repr(t), "->", repr(clean(t)))
    return {"words": len(found), "sentences": len(found) * len(CARRIERS), "changed": changed}


def wild(records: list[dict[str, str]]) -> dict[str, Any]:
    """Records with each fault in ChatDoctor's 5k, and the speed of everything but the file."""
    counts: Counter[str] = Counter()
    duplicates, size, started = Duplicates(0.9), 0, time.process_time()
    repeats = 0
    for i, r in enumerate(records):
        texts = [clean(r["input"]), clean(r["output"])]
        counts.update({f.name for text, answer in zip(texts, (False, True), strict=True) for f in faults(text, answer)})
        repeats += duplicates.earlier(i, "\n".join(texts)) is not None
        size += len(r["input"]) + len(r["output"])
    seconds = time.process_time() - started
    return {"faults": dict(counts), "near_duplicates": repeats, "mb_per_s": round(size / 1e6 / seconds, 2)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--each", type=int, default=300, help="identifiers of each kind and half")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--list", action="store_true", help="print every replacement in MedQuAD with its hash, to judge it")
    p.add_argument("--only", choices=("recall", "damage", "words", "wild"), help="one part, nothing written")
    p.add_argument("--output", type=Path, default=RESULTS / "clean_cpu.json")
    args = p.parse_args()
    answers, records = medquad(), chatdoctor()
    hosts = (
        [a for a in answers if 100 < len(a) < 1500][:4000]
        + [r["input"] for r in records]
        + [r["output"] for r in records]
    )
    results: dict[str, Any] = {}
    if args.only in (None, "recall"):
        for half in FRAMES:
            results[half], missed = recall(half, hosts, args.each, args.seed)
            print(half, json.dumps(results[half]["by_kind"]), results[half]["recall"])
            if half == "seen":
                print(*missed[:60], sep="\n")
    if args.only in (None, "damage"):
        results["medquad"] = damage(answers, args.list)
    if args.only in (None, "words"):
        results["clinical_words"] = clinical_words(answers)
    if args.only in (None, "wild"):
        results["chatdoctor5k"] = wild(records)
        print(results["chatdoctor5k"])
    if args.only is None:
        write(args.output, results, each=args.each, seed=args.seed)


if __name__ == "__main__":
    main()
