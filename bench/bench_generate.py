"""What does making dialogues through an endpoint cost beside the model? Writes bench/results/generate_cpu.json.

    python bench/bench_generate.py [--requests 1000] [--kills 10]

A stub (tests/data/stub_endpoint.py), a process of its own, answers at once or after a fixed time; so what is measured
is ours: the time of a request beside that of a bare client, how far from ideal 16 requests at a time are, what kill -9
at random moments costs, and how long the filter takes. The near duplicates are those of ChatDoctor's 5k set in
../shared; without it that part is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, write

ROOT = Path(__file__).resolve().parent.parent
FIVE_K = ROOT.parent / "shared/data/chatdoctor/chatdoctor5k.json"
sys.path.insert(0, str(ROOT))

import httpx2

from data.asking.client import Endpoint
from data.asking.filter import Refused, Seen, check_text
from data.asking.journal import Journal
from data.asking.prompts import requests
from data.asking.spending import Tokens
from data.disease_sources import BUILT_IN, find_source, read_source
from data.diseases import build, open_database
from tests.data.stub_endpoint import Stub

DELAY, CONCURRENCY = 0.1, 16


@contextmanager
def stub(delay: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """A stub in a process of its own: its address, and, at the end, what it counted."""
    command = [sys.executable, __file__, "--stub", str(delay)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    counted: dict[str, Any] = {}
    try:
        yield child.stdout.readline().strip(), counted
    finally:
        child.stdin.close()
        counted.update(json.loads(child.stdout.read()))
        child.wait()


def serve(delay: float) -> None:
    with Stub(delay=delay) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        answered = server.answered
        print(json.dumps({"asked": len(server.asked), "prompts": len(answered), "at_a_time": server.at_a_time}))


def command(database: Path, out: Path, url: str, concurrency: int, *flags: str) -> list[str]:
    arguments = [str(database), str(out), "--endpoint", url, "--model", "stub", "--concurrency", str(concurrency)]
    return [sys.executable, "-m", "data.prepare", "generate", *arguments, *flags]


def seconds(line: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(line, check=True, cwd=ROOT, capture_output=True)
    return time.perf_counter() - began


def overhead(database: Path, folder: Path, rows: int) -> dict[str, Any]:
    """One request at a time, answered at once: a bare client's, ours, and the journal's line, in turn; medians."""
    asked = list(requests(open_database(database).diseases()[:rows], 0, 5))
    times: dict[str, list[float]] = {"bare_client_ms": [], "ours_ms": [], "journal_line_ms": []}
    with stub(0) as (url, _), httpx2.Client() as client, Journal(folder / "alone.journal", {}) as journal:
        ours = Endpoint(url)
        for request in asked:
            marks = [time.perf_counter()]
            body = {"model": "stub", "messages": request.messages}
            client.post(ours.url, json=body).json()
            marks.append(time.perf_counter())
            key, reply = request.key("stub", 0), ours.ask(body, lambda _: True)
            marks.append(time.perf_counter())
            journal.reply(key, reply, reply.used or Tokens())
            marks.append(time.perf_counter())
            for name, (begin, end) in zip(times, pairwise(marks), strict=True):
                times[name].append(1000 * (end - begin))
        ours.close()
    return {"requests": len(asked)} | {name: round(median(each), 2) for name, each in times.items()}


def side_by_side(database: Path, folder: Path, rows: int) -> dict[str, Any]:
    n = len(list(requests(open_database(database).diseases()[:rows], 0, 5)))
    with stub(DELAY) as (url, counted):
        line = command(database, folder / "many.jsonl", url, CONCURRENCY, "--rows", str(rows))
        took = seconds(line) - seconds([*line, "--dry_run"])
    ideal = n * DELAY / CONCURRENCY
    result = {"requests": n, "concurrency": CONCURRENCY, "reply_seconds": DELAY, "seconds": round(took, 2)}
    return result | {"ideal_seconds": round(ideal, 2), "share_of_ideal": round(ideal / took, 3), "stub": counted}


def kills(database: Path, folder: Path, rows: int, times: int) -> dict[str, Any]:
    """Killed at random moments until it is through: every prompt answered, and how many of them more than once."""
    rng = random.Random(0)
    out = folder / "killed.jsonl"
    with stub(0.02) as (url, counted):
        line = command(database, out, url, CONCURRENCY, "--rows", str(rows))
        start = seconds([*line, "--dry_run"])
        for _ in range(times):
            run = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
            time.sleep(start + rng.uniform(0, 1.5 / times))
            run.kill()
            run.wait()
        seconds(line)
    with stub(0) as (url, _):
        seconds(command(database, folder / "whole.jsonl", url, CONCURRENCY, "--rows", str(rows)))
    same = out.read_bytes() == (folder / "whole.jsonl").read_bytes()
    most = times * CONCURRENCY
    twice = counted["asked"] - counted["prompts"]
    return {"kills": times, **counted, "asked_twice": twice, "on_their_way_at_most": most, "same_file": same}


def five_k() -> dict[str, Any]:
    """Near duplicates of ChatDoctor's 5k set by what is compared, and what the checks of the text alone refuse."""
    records = json.loads(FIVE_K.read_text())
    found: dict[str, Any] = {"dialogues": len(records)}
    texts = {
        "dialogue": [f"{r['input']} {r['output']}" for r in records],
        "question_alone": [r["input"] for r in records],
        "answer_alone": [r["output"] for r in records],
    }
    for name, each in texts.items():
        seen, began = Seen(), time.perf_counter()
        near = sum(seen.near_duplicate(t) is not None for t in each)
        found[name] = {"near_duplicates": near, "seconds": round(time.perf_counter() - began, 2)}
    refused: dict[str, int] = {}
    began = time.perf_counter()
    for r in records:
        try:
            check_text(r["input"], r["output"])
        except Refused as e:
            refused[str(e)] = refused.get(str(e), 0) + 1
    return found | {"refused_by_text": refused, "check_text_seconds": round(time.perf_counter() - began, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--stub", type=float)
    args = parser.parse_args()
    if args.stub is not None:
        serve(args.stub)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build([read_source(find_source(BUILT_IN))], folder / "d.db")
        rows = round(args.requests / 7)
        results = {
            "overhead": overhead(folder / "d.db", folder, rows // 2),
            "side_by_side": side_by_side(folder / "d.db", folder, rows),
            "killed": kills(folder / "d.db", folder, rows, args.kills),
        }
    if FIVE_K.exists():
        results["chatdoctor5k"] = five_k()
    print(json.dumps(results, indent=1))
    write(RESULTS / "generate_cpu.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
