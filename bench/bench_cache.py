"""How fast is decoding from an int8 KV cache, beside a full one, and how large is it? Random weights of 110M.

    python bench/bench_cache.py [--positions 128 512 1000] [--kinds int8] [--threads 2] [--passes 9]

Single steps behind so many positions, and reading as many at once; in each pass every cache has its turn. Medians, and
medians of the ratios within a pass. Writes bench/results/cache_cpu.json. What the rounding costs in quality is
bench_quantised.py's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from report import RESULTS, write

from llama import quantize
from llama.cache import KVCache
from llama.config import PRESETS
from llama.generation import lay_out_for_decoding, new_cache, prefill
from llama.model import Llama
from llama.quantize import Scheme

STEPS = 16  # in a row
CACHES = {"full": None, "int8": torch.int8}


def build(kind: str) -> Llama:
    model = Llama(PRESETS["110m"])
    model.init_weights(0)
    if kind == "int8":
        scheme = Scheme(8, 0)
        quantize.replace(model.layers, lambda _, linear: quantize.nearest(linear.weight.detach(), scheme), 8)
    else:
        model.to(getattr(torch, kind))
    lay_out_for_decoding(model)
    return model.eval()


@torch.inference_mode()
def timed(model: Llama, cache: KVCache, prompt: torch.Tensor) -> tuple[float, float]:
    """Seconds to read the prompt, and of one step behind it."""
    cache.truncate(0)
    start = time.perf_counter()
    prefill(model, prompt, cache)
    read = time.perf_counter()
    for _ in range(STEPS):
        model(prompt[:, :1], cache=cache, last_only=True)
    return read - start, (time.perf_counter() - read) / STEPS


def measure(model: Llama, kind: str, positions: int, passes: int) -> dict[str, Any]:
    prompt = torch.randint(3, 1000, (1, positions), generator=torch.Generator().manual_seed(0))
    room = positions + STEPS
    caches = {name: new_cache(model, 1, room, dtype) for name, dtype in CACHES.items()}
    found = [{name: timed(model, cache, prompt) for name, cache in caches.items()} for _ in range(passes + 1)][1:]
    row: dict[str, Any] = {"weights": kind, "positions": positions}
    for name, cache in caches.items():
        seconds = statistics.median(f[name][1] for f in found)
        row[name] = {"bytes_per_token": cache.nbytes // room, "decode_tokens_per_s": round(1 / seconds, 1)}
    for i, what in enumerate(("prefill", "decode")):
        row[f"{what}_ratio"] = round(statistics.median(f["full"][i] / f["int8"][i] for f in found), 3)
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--positions", type=int, nargs="+", default=[128, 512, 1000])
    p.add_argument("--kinds", nargs="+", default=["int8"], choices=["float32", "bfloat16", "int8"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--passes", type=int, default=9)
    p.add_argument("--output", type=Path, default=RESULTS / "cache_cpu.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for kind in args.kinds:
        model = build(kind)
        for positions in args.positions:
            results.append(measure(model, kind, positions, args.passes))
            print(results[-1], flush=True)
    write(args.output, results, threads=args.threads, passes=args.passes)


if __name__ == "__main__":
    main()
