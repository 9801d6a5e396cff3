"""How many tokens a second does evaluate.py score, beside the same model reading them as prompts in a batch?

    python bench/bench_evaluate.py [--shapes tiny 15m 110m] [--passes 5] [--threads 1]

Random weights, fp32, laid out as for answering. Documents are dialogues of 100 to 300 ids, 40 of which at the end are
an answer; questions are prefixes of 100 to 300 ids with four continuations, of one id (letters) and of 2 to 12 (texts).
Tokens are those that a model must read: documents, prefixes once, and continuations without their last id, behind which
nothing is asked. Prefill reads the same documents, or the prefixes alone, packed into a KV cache, and makes no logits.
Scoring must: "limit" is what prefill would reach if it also multiplied as many rows by the vocabulary, which is timed
alone, as one product. Turns alternate; each ratio is the median over them of prefill's time to that of the same turn.
Writes bench/results/evaluate_cpu.json. On a shared machine run it at high priority.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
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


@torch.inference_mode()
def in_turn(ways: dict[str, Callable[[], Any]], passes: int) -> dict[str, list[float]]:
    """Seconds of each, all of them in turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(passes + 1):  # the first warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                taken[name].append(time.perf_counter() - began)
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
    read = sum(map(len, prefixes))
    more = sum(len(e) - 1 for _, endings in texts for e in endings)
    tokens = {"prefill": read, "documents": read, "letters": read, "texts": read + more}
    scored = {"documents": 40 * len(prefixes), "letters": len(prefixes), "texts": len(prefixes) + more}
    rows = torch.randn(max(scored.values()), config.dim)
    taken = in_turn(
        {
            "prefill": lambda: prefill(model, prefixes),
            "documents": lambda: answer_losses(model, documents),
            "letters": lambda: continuations(model, letters),
            "texts": lambda: continuations(model, texts),
            "head": lambda: [model.head(some) for some in rows.split(256)],
        },
        passes,
    )
    result: dict[str, Any] = {"shape": shape, "tokens": read}
    for name, count in tokens.items():
        result[f"{name}_tokens_per_s"] = round(count / min(taken[name]), 1)
    for name, n in scored.items():
        turns = zip(taken["prefill"], taken[name], strict=True)
        result[f"{name}_to_prefill"] = round(median(p / read / (s / tokens[name]) for p, s in turns), 3)
        head = median(taken["head"]) * n / len(rows)
        result[f"{name}_limit"] = round(1 / (1 + head / (median(taken["prefill"]) * tokens[name] / read)), 3)
    return result


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
