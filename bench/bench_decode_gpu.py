"""How fast does a LLaMA of real size answer on one GPU: tokens a second, the time to the first, the memory?

    python -m bench.bench_decode_gpu [--only 7b 13b] [--seconds 150] [--json PATH]

Random weights, made on the GPU; bf16, int8 (a scale a row) and int4 (groups of 64); greedy. `alone`: one answer of 128
tokens behind a prompt of 512, as generate.py makes it, every step a CUDA graph. `32 rows`: as many answers behind 1,024
tokens each, either in step (`graph`) or joining and leaving as for generate.py --input (`batch`). transformers: the
same in bf16, with random weights of its own. Each line is a process of its own. Before steps of a CUDA graph are timed,
their greedy ids must be those of plain steps; else the line says WRONG.

The share is that of the memory's speed: bytes that a step must read (weights, and the cache at its mean length) over
its seconds, against a copy's bytes a second in the same process. Writes bench/results/decode_<device>.json and prints
the table. Without a GPU every line is "not measured"; --device cpu --only tiny runs the code, to see that it runs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from bench import hugging_face, lines, models
from bench.kernel_work import relative_error
from bench.timing import Clock, copy_bytes_per_second
from llama.cache import KVCache
from llama.config import PRESETS, LlamaConfig
from llama.model import Llama

ANSWERS = 3  # timed, after one that warms up
CHECKED = 32  # steps whose ids are compared
READ = 4096  # prompt tokens that Batch reads before a step: few steps pass until all rows write
COPIED = 1 << 28  # bytes whose copying is the memory's speed


@dataclass(frozen=True)
class Line:
    """A row of the table: which model in which numbers, by whom, for how many rows, prompts of how many tokens."""

    shape: str
    kind: str  # bfloat16, int8, int4
    who: str  # alone, graph, batch; transformers
    rows: int = 1
    prompt: int = 512
    new: int = 128

    @property
    def name(self) -> str:
        """As printed."""
        kind = {"bfloat16": "bf16"}.get(self.kind, self.kind)
        rows = f", {self.rows} rows of {self.prompt:,}" if self.rows > 1 else ""
        return f"{self.shape} {kind}, {self.who}{rows}"


class Target(NamedTuple):
    """Hoped for on an H200: so much of the memory's speed, or so many tokens a second."""

    share: float = 0.0
    speed: float = 0.0


MANY = {"rows": 32, "prompt": 1024}
LINES = [
    Line("7b", "bfloat16", "alone"),
    Line("7b", "int8", "alone"),
    Line("7b", "int4", "alone"),
    Line("7b", "bfloat16", "graph", **MANY),
    Line("7b", "bfloat16", "batch", **MANY),
    Line("7b", "bfloat16", "transformers"),
    *(Line("1.1b", kind, "alone") for kind in ("bfloat16", "int8", "int4")),
    *(Line("13b", kind, "alone") for kind in ("bfloat16", "int8", "int4")),
    Line("7b", "bfloat16", "transformers", **MANY),
    Line("1.1b", "bfloat16", "transformers"),
]
FEW = {"rows": 3, "prompt": 20, "new": 8}
TINY = [
    *(Line("tiny", kind, "alone", 1, 12, 8) for kind in ("bfloat16", "int8", "int4")),
    *(Line("tiny", "bfloat16", who, **FEW) for who in ("graph", "batch", "transformers")),
    Line("tiny", "bfloat16", "transformers", 1, 12, 8),
]
TARGETS = {
    LINES[0].name: Target(share=0.85),
    LINES[1].name: Target(speed=450),
    LINES[2].name: Target(speed=700),
    LINES[3].name: Target(share=0.75),
    LINES[4].name: Target(share=0.75),
}


# --- bytes ----------------------------------------------------------------------------------------


def weight_bytes(model: Llama) -> int:
    """Of the weights that a step reads: all but the embedding, of which it reads a row."""
    parts = (model.layers, model.norm, model.head)
    return sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))


def cache_bytes(config: LlamaConfig, positions: float, itemsize: int) -> float:
    """Of the keys and values of so many positions."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * positions * itemsize


# --- ours -----------------------------------------------------------------------------------------

Step = Callable[[Tensor], Tensor]  # from tokens (B, 1) to logits (B, 1, V)


def prompts(config: LlamaConfig, line: Line, seed: int) -> Tensor:
    """Ids (rows, prompt)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (line.rows, line.prompt), generator=generator)


def choose(logits: Tensor) -> Tensor:
    """The likeliest tokens (B, 1)."""
    return logits[:, -1].argmax(-1, keepdim=True)


def unlike_plain(model: Llama, cache: KVCache, step: Step, first: Tensor) -> str | None:
    """The first step whose greedy ids are not those of plain steps from the same cache; None: all CHECKED are.

    By how much the logits differ there (the ids before are the same) tells a close call that was rounded otherwise from
    a fault.
    """
    length, n = cache.length, min(CHECKED, cache.max_len - cache.length)
    seen = []
    for run in (step, partial(model, cache=cache, last_only=True)):
        cache.truncate(length)
        tokens, logits = first, []
        for _ in range(n):
            logits.append(run(tokens)[:, -1].clone())
            tokens = logits[-1].argmax(-1, keepdim=True)
        seen.append(logits)
    cache.truncate(length)
    for i, (ours, plain) in enumerate(zip(*seen, strict=True)):
        if not torch.equal(ours.argmax(-1), plain.argmax(-1)):
            return f"ids of step {i} differ from a plain step's, logits by {relative_error(ours, plain):.1e}"
    return None


@torch.inference_mode()
def in_step(model: Llama, line: Line, clock: Clock) -> dict[str, Any]:
    """A prompt read, the steps checked, and then timed with nothing between them but the choice of a token."""
    from llama.fixed_step import FixedStep
    from llama.generation import prefill

    weight = model.norm.weight
    cache = KVCache(model.config, line.rows, line.prompt + line.new, weight.device, weight.dtype)
    tokens = prompts(model.config, line, 0).to(weight.device)
    for _ in range(2):  # the first compiles
        cache.truncate(0)
        clock.wait()
        begin = time.perf_counter()
        first = choose(prefill(model, tokens, cache))
        clock.wait()
        seconds = time.perf_counter() - begin
    step = FixedStep(model, cache)
    wrong = unlike_plain(model, cache, step, first)
    clock.wait()
    begin = time.perf_counter()
    tokens = first
    for _ in range(line.new):
        tokens = choose(step(tokens))
    clock.wait()
    step_seconds = (time.perf_counter() - begin) / line.new
    return {
        "wrong": wrong,
        "first_token_s": seconds,
        "prefill_tokens_per_s": line.rows * line.prompt / seconds,
        "decode_tokens_per_s": line.rows / step_seconds,
        "graph_steps_per_s": 1 / step_seconds,
    }


def alone(model: Llama, line: Line, clock: Clock) -> dict[str, Any]:
    """Answers as generate.py makes them; before them in_step()'s check, which also says what the steps alone take."""
    from llama.generation import Context, stream
    from llama.sampling import SamplingParams

    found = in_step(model, line, clock)
    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0)
    context = Context(model)  # of one conversation, so that its step is captured once
    first, others = [], []
    for i in range(ANSWERS + 1):
        prompt = prompts(model.config, line, i + 1)[0].tolist()
        clock.wait()
        begin = time.perf_counter()
        tokens = stream(model, prompt, greedy, line.new, context=context)
        next(tokens)
        middle = time.perf_counter()
        count = sum(1 for _ in tokens)
        others.append((time.perf_counter() - middle) / count)
        first.append(middle - begin)
    seconds = statistics.median(first[1:])
    return found | {
        "first_token_s": seconds,
        "prefill_tokens_per_s": line.prompt / seconds,
        "decode_tokens_per_s": 1 / statistics.median(others[1:]),
        "first_answer_s": first[0] + others[0] * (line.new - 1),  # with what is compiled and captured at first use
    }


def joining(model: Llama, line: Line, clock: Clock) -> dict[str, Any]:
    """Answers side by side, by the steps in which all rows write."""
    from llama.batching import Batch
    from llama.generation import Request
    from llama.sampling import SamplingParams

    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0)
    for seed in (0, 1):  # the first compiles
        batch = Batch(model, models.Pieces(model.config.vocab_size), line.rows, READ)
        clock.wait()
        begin = time.perf_counter()
        wanted = prompts(model.config, line, seed).tolist()
        answers = [batch.submit(Request(prompt, greedy, line.new)) for prompt in wanted]
        stamps = []
        while all(a.finish_reason is None for a in answers):
            batch.step()
            if all(a.token_ids for a in answers):
                stamps.append(time.perf_counter())
        del batch
    seconds = (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1)
    return {
        "wrong": None,
        "first_token_s": stamps[0] - begin,  # the last row's
        "prefill_tokens_per_s": line.rows * line.prompt / (stamps[0] - begin),
        "decode_tokens_per_s": line.rows / seconds,
    }


def measure(line: Line, device: torch.device) -> dict[str, Any]:
    """Speeds, memory, and the share of its speed that the memory is read with."""
    config, clock, cuda = PRESETS[line.shape], Clock(device), device.type == "cuda"
    bandwidth = copy_bytes_per_second(clock, COPIED if cuda else 1 << 20, 10)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    read = None
    if line.who == "transformers":
        found = theirs(config, line, device)
    else:
        model = models.random_decoder(config, line.kind, device)
        clock.wait()
        loaded = time.perf_counter() - begin
        found = {"alone": alone, "graph": in_step, "batch": joining}[line.who](model, line, clock)
        found["load_s"] = loaded
        cached = line.rows * (line.prompt + line.new / 2)
        read = weight_bytes(model) + cache_bytes(config, cached, model.norm.weight.itemsize)
    return found | {
        "bytes_a_step": read,
        "copy_bytes_per_second": bandwidth,
        "share": read and read * found["decode_tokens_per_s"] / line.rows / bandwidth,
        "share_of_graph": read and "graph_steps_per_s" in found and read * found["graph_steps_per_s"] / bandwidth,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def theirs(config: LlamaConfig, line: Line, device: torch.device) -> dict[str, Any]:
    """transformers' generate() as it comes: SDPA, a growing cache, no graph."""
    model = hugging_face.model_of(config, dtype=getattr(torch, line.kind), device=device).eval()
    passes = []
    for seed in range(2 if line.rows > 1 else ANSWERS):  # the first warms up
        tokens = prompts(config, line, seed).to(device)
        passes.append(hugging_face.answers(model, tokens, line.new)[:2])
    first, others = (statistics.median(seconds) for seconds in zip(*passes[1:], strict=True))
    return {
        "first_token_s": first,
        "prefill_tokens_per_s": line.rows * line.prompt / first,
        "decode_tokens_per_s": line.rows * (line.new - 1) / others,
    }


# --- the table ------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each row, with its target on an H200, and how many times transformers' speed it is."""
    peers = {
        (line["shape"], line["rows"]): line["decode_tokens_per_s"]
        for line in found.values()
        if line["who"] == "transformers" and "decode_tokens_per_s" in line
    }
    head = f"{'decoding':34} {'tokens/s':>9} {'share':>6} {'graph':>6} {'1st, ms':>8} {'prefill/s':>9} {'memory':>9}"
    rows = [f"{head}  hoped (H200)"]
    for name, line in found.items():
        if "decode_tokens_per_s" not in line:
            rows.append(f"{name:34} {line.get('failed', 'not measured')}")
        else:
            rows.append(_row(name, line, peers.get((line["shape"], line["rows"]))))
    return rows


def _row(name: str, line: dict[str, Any], peer: float | None) -> str:
    share, graph = (f"{line[key]:.0%}" if line[key] else "-" for key in ("share", "share_of_graph"))
    memory = f"{line['peak_memory_bytes'] / 2**30:.1f} GiB" if line["peak_memory_bytes"] else "-"
    speed = line["decode_tokens_per_s"]
    figures = f"{speed:9,.1f} {share:>6} {graph:>6} {1e3 * line['first_token_s']:8.1f}"
    row = f"{name:34} {figures} {line['prefill_tokens_per_s']:9,.0f} {memory:>9}"
    if (target := TARGETS.get(name)) is not None:
        hoped = f">= {target.share:.0%}" if target.share else f">= {target.speed:.0f} tok/s"
        met = line["share"] >= target.share and speed >= target.speed
        row += f"  {hoped:12} {'yes' if met else 'no'}"
    if peer and line["who"] != "transformers":
        row += f"  {speed / peer:.2f}x transformers in bf16"
    if line.get("wrong"):
        row += f"  WRONG: {line['wrong']}"
    return row


TABLE = lines.Table("bench.bench_decode_gpu", "decode", LINES, TINY, measure, table, seconds=150.0, line_seconds=60.0)


def main(argv: list[str] | None = None) -> int:
    return lines.main(TABLE, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
