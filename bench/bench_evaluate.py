"""How many tokens a second does evaluate.py score, beside the same model reading them as prompts in a batch?

    python bench/bench_evaluate.py [--shapes tiny 15m 110m] [--passes 5] [--threads 1]

Random weights, fp32, laid out as for answering. Documents are dialogues of 100 to 300 ids, 40 of which at the end are
an answer; questions are prefixes of 100 to 300 ids with four continuations, of one id (letters) and of 2 to 12 (texts).
Tokens are those of documents, and of prefixes and continuations: a prefix counts once. Prefill reads the same
documents, or the prefixes alone, packed into a KV cache. Turns alternate, the best counts. Writes
bench/results/evaluate_cpu.json. On a shared machine run it at high priority.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from report import RESULTS, write

from llama.config import PRESETS
from llama.examinee import prefill
from llama.generation import lay_out_for_decoding
from llama.likelihood import answer_losses, continuations
from llama.model import Llama

COUNTS = {"tiny": 128, "15m": 48, "110m": 12}  # documents


def best(ways: dict[str, Callable[[], Any]], passes: int) -> dict[str, float]:
    """The shortest time of each, all of them in turn."""
    taken = {name: float("inf") for name in ways}
    for turn in range(passes + 1):  # the first warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                taken[name] = min(taken[name], time.perf_counter() - began)
    return taken


def measure(shape: str, passes: int) -> dict[str, Any]:
    config = PRESETS[shape]
    model = Llama(config)
    model.init_weights(0)
    model.eval()
    lay_out_for_decoding(model)
    rng = random.Random(0)
    limit = min(300, config.max_seq_len - 20)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, config.vocab_size) for _ in range(n)]

    prefixes = [ids(rng.randint(100, limit)) for _ in range(COUNTS[shape])]
    documents = [(p, [i >= len(p) - 40 for i in range(len(p))]) for p in prefixes]
    letters = [(p, [ids(1) for _ in range(4)]) for p in prefixes]
    texts = [(p, [ids(rng.randint(2, 12)) for _ in range(4)]) for p in prefixes]
    taken = best(
        {
            "prefill": lambda: prefill(model, prefixes),
            "documents": lambda: answer_losses(model, documents),
            "letters": lambda: continuations(model, letters),
            "texts": lambda: continuations(model, texts),
        },
        passes,
    )
    read = sum(map(len, prefixes))
    tokens = {
        "prefill": read,
        "documents": read,
        "letters": read + 4 * len(prefixes),
        "texts": read + sum(len(e) for _, endings in texts for e in endings),
    }
    speeds = {name: tokens[name] / taken[name] for name in taken}
    return {
        "shape": shape,
        "tokens": read,
        **{f"{name}_tokens_per_s": round(s, 1) for name, s in speeds.items()},
        **{f"{name}_to_prefill": round(s / speeds["prefill"], 3) for name, s in speeds.items() if name != "prefill"},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=list(COUNTS), choices=list(COUNTS))
    p.add_argument("--passes", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for shape in args.shapes:
        results.append(measure(shape, args.passes))
        print(results[-1], file=sys.stderr)
    write(RESULTS / "evaluate_cpu.json", results)


if __name__ == "__main__":
    main()
