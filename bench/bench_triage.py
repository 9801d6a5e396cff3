"""How often does triage (data/triage.py) see an emergency, and how often does it see one that is none?

    python bench/bench_triage.py [--data ../shared/data]

Writes bench/results/triage_cpu.json:
- the 45 vignettes of Semigran et al. (BMJ 2015), each with its level: recall of emergencies, false alarms on the
  others, the whole table of levels, and the same for plain keywords, which read no negation;
- 80 lines of everyday language (bench/triage_lay.txt) and 80 harder ones (bench/triage_lay2.txt), both held out: recall
  and false alarms; and 80 that were seen;
- ChatDoctor's 5,452 questions: the share flagged as an emergency, of all and of those whose answer names a condition
  of an emergency list (the sample table's, with its synonyms);
- MedQuAD's questions ("What is ...?"), which describe nobody: each flag is a false one;
- minimal pairs out of the rules' own findings: "I have X." and five sentences that deny X, or put it in the past, to
  someone else or into a question;
- milliseconds a question, and seconds for one of a megabyte.
Intervals are Wilson's, 95 %. The vignettes were looked at while the rules were written: docs/log.md says how often.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, write

sys.path.insert(0, str(ROOT))
from data.conditions import load_table
from data.metrics import naming
from data.triage import LEVELS, RULES, Triage, read_findings

# What a first attempt would look for; measured in the same run.
KEYWORDS = re.compile(
    r"chest pain|shortness of breath|difficulty breathing|stroke|seizure|unconscious|severe|sudden|bleeding|suicid|"
    r"overdose|poison|stiff neck|confus|altered mental|faint|paralys|slurred|anaphyla|blue lips|vomiting blood",
    re.IGNORECASE,
)
DENIALS = (
    "I do not have any {}.",
    "The patient denies {}.",
    "My grandfather had {} many years ago.",
    "What is {}?",
    "I was afraid of {}.",
)
LAY = Path(__file__).parent
TRUTH = {"em": "emergency", "ne": "doctor", "sc": "self-care"}


def interval(hits: int, n: int) -> dict[str, Any]:
    """A share with Wilson's 95 % interval."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"share": round(p, 4), "hits": hits, "n": n, "interval": [round(max(0.0, low), 3), round(high, 3)]}


def level(triage: Triage, text: str) -> str:
    fired = triage.fired(text)
    return fired[0].level if fired else "none"


def vignettes(triage: Triage, path: Path) -> dict[str, Any]:
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    table = Counter((TRUTH[c["urgency_level"]], level(triage, c["case_description"])) for c in cases)
    said = (*LEVELS, "none")
    urgent = [c["case_description"] for c in cases if c["urgency_level"] == "em"]
    others = [c["case_description"] for c in cases if c["urgency_level"] != "em"]
    under = sum(table[t, s] for i, t in enumerate(LEVELS) for s in said[i + 1 :])
    over = sum(table[t, s] for i, t in enumerate(LEVELS) for s in said[:i])
    return {
        "emergency_recall": interval(table["emergency", "emergency"], len(urgent)),
        "false_alarms": interval(table["doctor", "emergency"] + table["self-care", "emergency"], len(others)),
        "under_triaged": interval(under, len(cases)),
        "over_triaged": interval(over, len(cases)),
        "level_right": interval(sum(table[t, t] for t in LEVELS), len(cases)),
        "rows_truth_columns_said": {t: {s: table[t, s] for s in said} for t in LEVELS},
        "keywords": {
            "emergency_recall": interval(sum(bool(KEYWORDS.search(t)) for t in urgent), len(urgent)),
            "false_alarms": interval(sum(bool(KEYWORDS.search(t)) for t in others), len(others)),
        },
    }


def everyday(triage: Triage, path: Path) -> dict[str, Any]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    kinds = [(kind, text.strip()) for kind, _, text in (line.partition(":") for line in lines)]
    result = {}
    for name, wanted in (("emergency_recall", "emergency"), ("false_alarms", "other")):
        texts = [text for kind, text in kinds if kind == wanted]
        flagged = sum(level(triage, text) == "emergency" for text in texts)
        words = sum(bool(KEYWORDS.search(text)) for text in texts)
        result[name] = interval(flagged, len(texts)) | {"keywords": interval(words, len(texts))}
    return result


def questions(triage: Triage, path: Path) -> dict[str, Any]:
    table = load_table()
    urgent = {c.name for c in table.conditions if c.urgency == "emergency"}
    named = naming(table)
    flagged: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for record in json.loads(path.read_text()):
        condition = named(record["output"])
        kind = "unnamed" if condition is None else "emergency" if condition in urgent else "other"
        is_flagged = level(triage, record["input"]) == "emergency"
        for k in (kind, "all"):
            number[k] += 1
            flagged[k] += is_flagged
    return {k: interval(flagged[k], number[k]) for k in ("all", "emergency", "other", "unnamed")}


def pairs(triage: Triage) -> dict[str, Any]:
    """Minimal pairs of the phrases that are plain words; a phrase that is itself a denial has no opposite."""
    texts = []
    for line in (RULES / "findings.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, phrases = line.partition(":")
        for p in phrases.split(";"):
            words = " ".join(w.split("/")[0] for w in p.split())
            if re.fullmatch(r"[a-z ]+", words) and not re.search(
                r"\b(?:not|no|cant|cannot|wont|never|unable)\b", words
            ):
                texts.append((name.removesuffix("?"), words))
    held = [(name, words) for name, words in texts if name in triage.finder.present(f"I have {words}.")]
    wrong = {d: sum(name in triage.finder.present(d.format(words)) for name, words in held) for d in DENIALS}
    return {
        "phrases": len(texts),
        "found_as_said": interval(len(held), len(texts)),
        "fire_though_denied": {d: interval(n, len(held)) for d, n in wrong.items()},
    }


def speed(triage: Triage, texts: list[str]) -> dict[str, Any]:
    seconds = []
    for text in texts:
        begin = time.process_time()
        triage.fired(text)
        seconds.append(time.process_time() - begin)
    long = (" ".join(texts) + " ") * (1_000_000 // sum(map(len, texts)) + 1)
    begin = time.process_time()
    triage.fired(long[:1_000_000])
    return {
        "questions": len(texts),
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "p99_ms": round(1e3 * sorted(seconds)[int(0.99 * len(seconds))], 3),
        "megabyte_s": round(time.process_time() - begin, 2),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    args = p.parse_args()
    triage = Triage()
    asked = [r["input"] for r in json.loads((args.data / "chatdoctor/chatdoctor5k.json").read_text())]
    quad = [json.loads(line)["question"] for line in (args.data / "grounding/medquad.jsonl").read_text().splitlines()]
    flagged = sum(level(triage, q) == "emergency" for q in quad)
    results = {
        "rules": Counter(r.level for r in triage.rules),
        "findings": len({f.name for f in read_findings(RULES / "findings.txt")}),
        "vignettes": vignettes(triage, args.data / "eval/semigran_vignettes.jsonl"),
        "everyday_language": everyday(triage, LAY / "triage_lay.txt"),
        "everyday_language_2": everyday(triage, LAY / "triage_lay2.txt"),
        "everyday_language_seen": everyday(triage, LAY / "triage_lay_seen.txt"),
        "chatdoctor5k_flagged": questions(triage, args.data / "chatdoctor/chatdoctor5k.json"),
        "medquad_flagged": interval(flagged, len(quad)),
        "minimal_pairs": pairs(triage),
        "speed": speed(triage, asked[::5]),
    }
    print(json.dumps(results, indent=2))
    write(RESULTS / "triage_cpu.json", results)


if __name__ == "__main__":
    main()
