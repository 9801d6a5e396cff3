"""How many tokens a second do 32 answers side by side make, beside one at a time and transformers' left-padded batches?

    python bench/bench_batch.py [--shapes tiny 15m 110m] [--dtypes float32 bfloat16 int8] [--passes 3] [--threads 2]

Random weights, greedy. Prompts of 20 to 200 ids, answers of 16 to 128, all drawn evenly; every figure counts the tokens
of the answers over the whole time, reading the prompts included. "alone" answers the first requests one by one;
transformers pads each 32 requests on the left and goes on until the longest of them ends (it has no int8 for a CPU).
Passes of all interleaved; medians. Writes bench/results/batch_cpu.json. On a shared machine run it at high priority.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench import hugging_face, report
from bench.models import EOS, Pieces
from llama import quantize
from llama.batching import Batch
from llama.config import PRESETS
from llama.generation import Answer, Request, lay_out_for_decoding
from llama.model import Llama
from llama.quantize import Scheme
from llama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)
CHATDOCTOR = SamplingParams(seed=0)


def build(shape: str, dtype: str) -> tuple[Llama, Any]:
    """A model that never says EOS, laid out for decoding, and transformers' with the same weights (none for int8)."""
    model = Llama(PRESETS[shape])
    model.init_weights(0)
    with torch.no_grad():
        (model.embed if model.config.tie_embeddings else model.head).weight[EOS] = 0
    stored = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
    model = model.to(stored).eval()
    theirs = None
    if dtype != "int8":
        theirs = hugging_face.model_of(model.config, model.state_dict(), dtype=stored).eval()
    if dtype == "int8":
        scheme = Scheme(8, 0)
        quantize.replace(model.layers, lambda _, linear: quantize.nearest(linear.weight.detach(), scheme), 8)
    lay_out_for_decoding(model)
    return model, theirs


def draw(count: int, vocab_size: int, params: SamplingParams) -> list[Request]:
    g = torch.Generator().manual_seed(0)
    asked = torch.randint(20, 201, (count,), generator=g).tolist()
    wanted = torch.randint(16, 129, (count,), generator=g).tolist()
    prompts = [torch.randint(3, vocab_size, (n,), generator=g).tolist() for n in asked]
    return [Request(ids, params, n, stop=("###",)) for ids, n in zip(prompts, wanted, strict=True)]


def alone(model: Llama, tokenizer: Any, requests: list[Request]) -> int:
    for request in requests:
        for _ in Answer(request, tokenizer).stream(model):
            pass
    return sum(r.max_new_tokens for r in requests)


def together(model: Llama, tokenizer: Any, requests: list[Request], rows: int) -> int:
    batch = Batch(model, tokenizer, rows)
    answers = [batch.submit(r) for r in requests]
    while batch:
        batch.step()
    assert all(len(a.token_ids) == a.request.max_new_tokens for a in answers)
    return sum(r.max_new_tokens for r in requests)


@torch.inference_mode()
def padded(hf: Any, requests: list[Request], rows: int) -> int:
    for at in range(0, len(requests), rows):
        some = requests[at : at + rows]
        longest, n = max(len(r.prompt) for r in some), max(r.max_new_tokens for r in some)
        ids = torch.tensor([[0] * (longest - len(r.prompt)) + list(r.prompt) for r in some])
        mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in some])
        hf.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return sum(r.max_new_tokens for r in requests)


def bench(shape: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    model, hf = build(shape, dtype)
    tokenizer = Pieces(model.config.vocab_size)
    count = args.requests if shape != "110m" else args.requests // 4
    requests, sampled = (draw(count, model.config.vocab_size, params) for params in (GREEDY, CHATDOCTOR))
    ways: dict[str, Callable[[], int]] = {
        "alone": lambda: alone(model, tokenizer, requests[: max(4, count // 16)]),
        "together": lambda: together(model, tokenizer, requests, args.rows),
        "together, sampled": lambda: together(model, tokenizer, sampled, args.rows),
    }
    if hf is not None:
        ways["transformers"] = lambda: padded(hf, requests, args.rows)
    together(model, tokenizer, requests[:4], args.rows)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.passes):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens = way()
            speeds[name].append(tokens / (time.perf_counter() - start))
    result: dict[str, Any] = {"shape": shape, "dtype": dtype, "requests": count}
    for name, values in speeds.items():
        result[name] = {"tokens_per_s": round(statistics.median(values), 1), "passes": [round(v, 1) for v in values]}
    for name in ("alone", "transformers"):
        if name in speeds:
            ratios = [a / b for a, b in zip(speeds["together"], speeds[name], strict=True)]
            result[f"times_{name}"] = round(statistics.median(ratios), 2)
    return result


def main() -> None:
    p = report.parser(__doc__, shapes=["tiny", "15m", "110m"], dtypes=["float32", "bfloat16", "int8"], passes=3)
    p.add_argument("--rows", type=int, default=32)
    p.add_argument("--requests", type=int, default=192, help="a quarter of them at 110m")
    args = p.parse_args()
    report.run(args, bench, "batch_cpu.json", rows=args.rows)


if __name__ == "__main__":
    main()
