"""How many tokens a second do 16 streams get out of the engine, beside one; how long does the first token take?

    python bench/bench_engine.py [--shapes 15m] [--dtypes float32] [--passes 3] [--streams 16] [--threads 1]

Random weights. A stream is a client that sends its next request when it has its answer. Sizes are about those of
ChatDoctor's 5k dialogues (106 ids of prompt, 70 of them the template, which all share, and 62 of answer): 10 to 80 ids
behind a beginning of 70, answers of 16 to 128; ChatDoctor's sampling. "one" is one such client, "alone" the same
requests without an engine (Answer.stream, its cache fresh for each), "steps" the engine's step without reading any
prompt, with 1 row and with all. Clients take their requests from one list; figures count the tokens of the answers and
the time, reading the prompts included, from the start until one finds the list empty, so that all are at it; "whole"
until the last has its answer, which fewer and fewer wait for. By the clock and by the process's own seconds, which
other work on the machine disturbs less; other times are from submitting. Passes of all interleaved; medians. Writes
bench/results/engine_cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections import deque
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
class Moment:
    """The clock, this process's own seconds, and the tokens that have come."""

    clock: float
    own: float
    tokens: int

    def rates(self, since: Moment, prefix: str = "") -> dict[str, float]:
        tokens = self.tokens - since.tokens
        return {
            f"{prefix}tokens_per_s": tokens / (self.clock - since.clock),
            f"{prefix}tokens_per_own_s": tokens / (self.own - since.own),
        }


@dataclass
class Clients:
    """Who sends the requests of a list, one after the other each, and what they see."""

    engine: Engine
    requests: deque[Request]
    first: list[float] = field(default_factory=list)  # seconds from submitting to the first token
    between: list[float] = field(default_factory=list)  # and from one to the next
    tokens: int = 0  # only the engine's thread counts
    reused: int = 0
    empty: Moment | None = None  # when one of them found no request any more

    def moment(self) -> Moment:
        return Moment(time.perf_counter(), time.process_time(), self.tokens)

    def run(self) -> None:
        """One client."""
        while True:
            try:
                request = self.requests.popleft()
            except IndexError:
                self.empty = self.empty or self.moment()
                return
            self.ask(request)

    def ask(self, request: Request) -> None:
        ended = threading.Event()
        last, begun = time.perf_counter(), False

        def tell(happening: Happening) -> None:
            nonlocal last, begun
            now = time.perf_counter()
            if isinstance(happening, Begun):
                self.reused += happening.reused_tokens
            elif isinstance(happening, Piece):
                (self.between if begun else self.first).append(now - last)
                last, begun = now, True
                self.tokens += len(happening.token_ids)
            elif isinstance(happening, Done | Failed):
                assert isinstance(happening, Done), happening
                ended.set()

        self.engine.submit(request, tell)
        ended.wait()


def draw(count: int, vocab_size: int, seed: int) -> list[Request]:
    """Requests that no other pass has, but for what all share."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randint(3, vocab_size, (SHARED,), generator=g).tolist()
    g.manual_seed(seed)
    asked = torch.randint(10, 81, (count,), generator=g).tolist()
    wanted = torch.randint(16, 129, (count,), generator=g).tolist()
    prompts = [[*shared, *torch.randint(3, vocab_size, (n,), generator=g).tolist()] for n in asked]
    return [Request(ids, CHATDOCTOR, n) for ids, n in zip(prompts, wanted, strict=True)]


def streams(doctor: Doctor, requests: list[Request], n: int) -> dict[str, float]:
    """So many clients at once."""
    engine = Engine(doctor, rows=n)
    clients = Clients(engine, deque(requests))
    threads = [threading.Thread(target=clients.run) for _ in range(n)]
    began = clients.moment()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole, busy = clients.moment(), clients.empty
    engine.close(0)
    assert busy is not None
    return {
        **busy.rates(began),
        **whole.rates(began, "whole_"),
        "first_token_ms_p50": 1e3 * statistics.median(clients.first),
        "first_token_ms_p95": 1e3 * report.percentile(clients.first, 95),
        "between_tokens_ms_p50": 1e3 * statistics.median(clients.between),
        "between_tokens_ms_p95": 1e3 * report.percentile(clients.between, 95),
        "reused_share": clients.reused / sum(len(r.prompt) for r in requests),
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
        ("many", "one", "whole_tokens_per_s"),
        ("many", "one", "whole_tokens_per_own_s"),
        ("many", "alone", "tokens_per_own_s"),
        ("steps of many", "steps of one", "tokens_per_own_s"),
    ):
        ratios = [a[by] / b[by] for a, b in zip(passes[of], passes[way], strict=True)]
        result[f"{of} / {way}, {by}"] = {
            "median": round(statistics.median(ratios), 2),
            "passes": [round(r, 2) for r in sorted(ratios)],
        }
    return result


def main() -> None:
    p = report.parser(__doc__, shapes=["15m"], dtypes=["float32"], passes=3)
    p.set_defaults(threads=1)
    p.add_argument("--streams", type=int, default=16)
    p.add_argument("--each", type=int, default=8, help="requests of a stream")
    args = p.parse_args()
    report.run(args, bench, "engine_cpu.json", streams=args.streams, each=args.each)


if __name__ == "__main__":
    main()
