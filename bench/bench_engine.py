"""How many tokens a second do 16 streams get out of the engine, beside one; how long does the first token take?

    python bench/bench_engine.py [--shapes 15m] [--dtypes float32] [--passes 3] [--streams 16] [--threads 1]

Random weights. A stream is a client that sends its next request when it has its answer. Sizes are about those of
ChatDoctor's 5k dialogues (106 ids of prompt, 70 of them the template, which all share, and 62 of answer): 10 to 80 ids
behind a beginning of 70, answers of 16 to 128; ChatDoctor's sampling. "one" is one such client, "alone" the same
requests without an engine (Answer.stream, its cache fresh for each), "steps" the engine's step without reading any
prompt, with 1 row and with all. Figures count the tokens of the answers over the whole time, reading the prompts
included, by the clock and by the process's own seconds, which other work on the machine disturbs less; other times are
from submitting. Passes of all interleaved; medians. Writes bench/results/engine_cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench import report
from bench.models import Pieces, random_decoder
from llama.batching import Batch
from llama.chat import ChatFormat
from llama.config import PRESETS
from llama.engine import Begun, Done, Engine, Failed, Happening, Piece
from llama.generation import Answer, Doctor, Request
from llama.sampling import SamplingParams

CHATDOCTOR = SamplingParams(seed=0)
SHARED = 70  # ids that every prompt begins with


@dataclass
class Times:
    """Seconds from submitting to the first token, and from one to the next."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    reused: int = 0


def draw(count: int, vocab_size: int, seed: int) -> list[Request]:
    """Requests that no other pass has, but for what all share."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randint(3, vocab_size, (SHARED,), generator=g).tolist()
    g.manual_seed(seed)
    asked = torch.randint(10, 81, (count,), generator=g).tolist()
    wanted = torch.randint(16, 129, (count,), generator=g).tolist()
    prompts = [[*shared, *torch.randint(3, vocab_size, (n,), generator=g).tolist()] for n in asked]
    return [Request(ids, CHATDOCTOR, n) for ids, n in zip(prompts, wanted, strict=True)]


def client(engine: Engine, requests: list[Request], times: Times) -> None:
    """Send one after the other."""
    for request in requests:
        ended = threading.Event()
        last, begun = time.perf_counter(), False

        def tell(happening: Happening, ended: threading.Event = ended) -> None:
            nonlocal last, begun
            now = time.perf_counter()
            if isinstance(happening, Begun):
                times.reused += happening.reused_tokens
            elif isinstance(happening, Piece):
                (times.between if begun else times.first).append(now - last)
                last, begun = now, True
                times.tokens += len(happening.token_ids)
            elif isinstance(happening, Done | Failed):
                assert isinstance(happening, Done), happening
                ended.set()

        engine.submit(request, tell)
        ended.wait()


def streams(doctor: Doctor, requests: list[Request], n: int) -> dict[str, float]:
    """So many clients at once."""
    engine = Engine(doctor, rows=n)
    found = [Times() for _ in range(n)]
    threads = [threading.Thread(target=client, args=(engine, requests[i::n], found[i])) for i in range(n)]
    began, used = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, used = time.perf_counter() - began, time.process_time() - used
    engine.close(0)
    firsts, between = ([t for f in found for t in getattr(f, kind)] for kind in ("first", "between"))
    tokens = sum(f.tokens for f in found)
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_per_own_s": tokens / used,
        "first_token_ms_p50": 1e3 * statistics.median(firsts),
        "first_token_ms_p95": 1e3 * report.percentile(firsts, 95),
        "between_tokens_ms_p50": 1e3 * statistics.median(between),
        "between_tokens_ms_p95": 1e3 * report.percentile(between, 95),
        "reused_share": sum(f.reused for f in found) / sum(len(r.prompt) for r in requests),
    }


def alone(doctor: Doctor, requests: list[Request]) -> dict[str, float]:
    began, used = time.perf_counter(), time.process_time()
    for request in requests:
        for _ in Answer(request, doctor.tokenizer).stream(doctor.model):
            pass
    tokens = sum(r.max_new_tokens for r in requests)
    used, seconds = time.process_time() - used, time.perf_counter() - began
    return {"tokens_per_s": tokens / seconds, "tokens_per_own_s": tokens / used}


def steps(doctor: Doctor, rows: int) -> dict[str, float]:
    """So many rows going on."""
    batch = Batch(doctor.model, doctor.tokenizer, rows)
    for request in draw(rows, doctor.model.config.vocab_size, 0):
        batch.submit(replace(request, max_new_tokens=200))
    while batch.running < rows:
        batch.step()
    taken = []
    for _ in range(60):
        used = time.process_time()
        batch.step()
        taken.append(time.process_time() - used)
    return {"tokens_per_own_s": rows / statistics.median(taken)}


def bench(shape: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    model = random_decoder(PRESETS[shape], dtype, torch.device("cpu"))
    pieces: Any = Pieces(model.config.vocab_size)
    doctor = Doctor(shape, model, pieces, ChatFormat("plain", ""), CHATDOCTOR, 128)
    ways = ("alone", "one", "many", "steps of one", "steps of many")
    passes: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    streams(doctor, draw(args.streams, model.config.vocab_size, 1), args.streams)  # oneDNN compiles
    for i in range(args.passes):
        requests = draw(args.streams * args.each, model.config.vocab_size, 2 + i)
        few = requests[: max(4, len(requests) // 8)]
        passes["alone"].append(alone(doctor, few))
        passes["one"].append(streams(doctor, few, 1))
        passes["many"].append(streams(doctor, requests, args.streams))
        passes["steps of one"].append(steps(doctor, 1))
        passes["steps of many"].append(steps(doctor, args.streams))
    result: dict[str, Any] = {"shape": shape, "dtype": dtype, "streams": args.streams}
    for way, figures in passes.items():
        result[way] = {name: round(statistics.median(f[name] for f in figures), 2) for name in figures[0]}
    for of, way, by in (
        ("many", "one", "tokens_per_s"),
        ("many", "one", "tokens_per_own_s"),
        ("many", "alone", "tokens_per_own_s"),
        ("steps of many", "steps of one", "tokens_per_own_s"),
    ):
        ratios = [a[by] / b[by] for a, b in zip(passes[of], passes[way], strict=True)]
        result[f"{of} / {way}, {by}"] = [round(r, 2) for r in sorted(ratios)]
    return result


def main() -> None:
    p = report.parser(__doc__, shapes=["15m"], dtypes=["float32"], passes=3)
    p.set_defaults(threads=1)
    p.add_argument("--streams", type=int, default=16)
    p.add_argument("--each", type=int, default=4, help="requests of a stream")
    args = p.parse_args()
    report.run(args, bench, "engine_cpu.json", streams=args.streams, each=args.each)


if __name__ == "__main__":
    main()
