"""Does the engine stay what it is for a long time: memory flat, every row free at the end, every answer right?

    python bench/bench_soak.py [--seconds 60] [--shape tiny] [--clients 12] [--threads 2]

Random weights, greedy. Clients submit chats that go on or begin anew (a beginning of 40 ids that all share), listen,
and cancel a third of their answers at a random token, or before the first. Finished answers are compared with those of
the same request alone (one in ten). Resident memory is read four times a second; "drift" is the median of its last
quarter over that of its second, the first being warm-up. Writes bench/results/soak_cpu.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench import report
from bench.models import Pieces, random_decoder
from llama.chat import ChatFormat
from llama.config import PRESETS
from llama.engine import Done, Engine, Failed, Full, Happening, Piece
from llama.generation import Answer, Doctor, Request
from llama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)
SHARED = 40  # ids that every chat begins with


def resident() -> float:
    """MiB of memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Client(threading.Thread):
    """Submits one request after the other until the time is over."""

    def __init__(self, engine: Engine, doctor: Doctor, number: int, until: float) -> None:
        super().__init__()
        self.engine, self.doctor, self.until = engine, doctor, until
        self.chance = random.Random(number)
        self.counts = dict.fromkeys(("finished", "cancelled", "refused", "failed", "compared", "differ"), 0)

    def run(self) -> None:
        chat: list[int] = []
        while time.monotonic() < self.until:
            if not chat or len(chat) > 380 or self.chance.random() < 0.3:
                chat = [5 + i for i in range(SHARED)]
            vocabulary = self.doctor.model.config.vocab_size
            chat += [self.chance.randrange(3, vocabulary) for _ in range(self.chance.randint(5, 60))]
            request = Request(tuple(chat), GREEDY, self.chance.randint(1, 60))
            chat += self._ask(request, self.chance.randint(0, 60) if self.chance.random() < 1 / 3 else None)

    def _ask(self, request: Request, patience: int | None) -> list[int]:
        """The ids of the answer, which is cancelled after so many tokens."""
        ids: list[int] = []
        ends: list[Done | Failed] = []
        ended, enough = threading.Event(), threading.Event()

        def tell(happening: Happening) -> None:
            if isinstance(happening, Piece):
                ids.extend(happening.token_ids)
            elif isinstance(happening, Done | Failed):
                ends.append(happening)
                ended.set()
            if ends or (patience is not None and len(ids) >= patience):
                enough.set()

        try:
            ticket = self.engine.submit(request, tell)
        except Full:
            self.counts["refused"] += 1
            time.sleep(0.01)
            return []
        if patience is not None:
            if patience:
                enough.wait()
            self.engine.cancel(ticket)
        ended.wait()
        (end,) = ends
        if isinstance(end, Failed):
            self.counts["failed"] += 1
        elif end.finish_reason == "cancelled":
            self.counts["cancelled"] += 1
        else:
            self.counts["finished"] += 1
            if self.chance.random() < 0.1:
                self._compare(request, ids)
        return ids

    def _compare(self, request: Request, ids: list[int]) -> None:
        answer = Answer(request, self.doctor.tokenizer)
        for _ in answer.stream(self.doctor.model):
            pass
        self.counts["compared"] += 1
        self.counts["differ"] += answer.token_ids != ids


def soak(args: argparse.Namespace) -> dict[str, Any]:
    model = random_decoder(PRESETS[args.shape], "float32", torch.device("cpu"))
    pieces: Any = Pieces(model.config.vocab_size)
    doctor = Doctor(args.shape, model, pieces, ChatFormat("plain", ""), GREEDY, 60)
    engine = Engine(doctor, rows=8, queue=2, cached_chats=32, cached_bytes=16 * 2**20)
    until = time.monotonic() + args.seconds
    clients = [Client(engine, doctor, i, until) for i in range(args.clients)]
    for client in clients:
        client.start()
    memory = []
    while time.monotonic() < until:
        memory.append(resident())
        time.sleep(0.25)
    for client in clients:
        client.join()
    stats = engine.stats()
    engine.close(0)
    quarter, tenth = len(memory) // 4, max(1, len(memory) // 10)
    second, last = (statistics.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    return {
        "seconds": args.seconds,
        **{name: sum(client.counts[name] for client in clients) for name in clients[0].counts},
        "rows_taken_at_the_end": stats.running + stats.queued,
        "tokens": stats.generated_tokens,
        "reused_share": round(stats.reused_tokens / max(1, stats.prompt_tokens), 3),
        "cached_bytes": stats.cached_bytes,
        "cached_bytes_most": stats.cached_bytes_most,
        "memory_mib_by_tenths": [round(statistics.median(memory[i * tenth : (i + 1) * tenth]), 1) for i in range(10)],
        "drift": round(last / second - 1, 4),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--shape", default="tiny", choices=sorted(PRESETS))
    p.add_argument("--clients", type=int, default=12)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--output", type=Path, default=report.RESULTS / "soak_cpu.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    result = soak(args)
    print(result)
    report.write(args.output, result, shape=args.shape, clients=args.clients)
    if result["rows_taken_at_the_end"] or result["failed"]:
        sys.exit("a row was lost or an answer failed")


if __name__ == "__main__":
    main()
