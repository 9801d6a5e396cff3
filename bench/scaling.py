"""How would a training step scale from 8 to 1,024 GPUs: full shard against hybrid? A model on paper, nothing measured.

    python bench/scaling.py [--model llama3-8b] [--tokens 16384] [--row 8192]

Work and bytes are llama/planner.py's. Prints the table of docs/scaling.md, then the check against what torchtitan
published. What the machine is assumed to do stands below, once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama import planner
from llama.config import PRESETS, LlamaConfig


@dataclass(frozen=True)
class Machine:
    """Assumptions. Rates in one direction of one GPU, after what protocols take; hop: seconds a ring's step waits."""

    flops: float = 0.45 * 989e12  # what the products and kernels of a step reach together, of an H200's bf16 rate
    nvlink: float = 0.8 * 450e9
    network: float = 0.8 * 50e9  # a 400 Gb/s InfiniBand card for each GPU
    hop: float = 4e-6
    per_node: int = 8


def collective(nbytes: float, ranks: int, m: Machine, across: bool) -> float:
    """Seconds of a ring all-gather or reduce-scatter of so many bytes in all."""
    rate = m.network if across else m.nvlink
    return 0.0 if ranks == 1 else nbytes * (ranks - 1) / ranks / rate + (ranks - 1) * m.hop


def step_seconds(c: LlamaConfig, gpus: int, hybrid: bool, tokens: int, row: int, m: Machine) -> tuple[float, float]:
    """(seconds of a step, of them computing) with one micro-batch of tokens a GPU in rows of one document.

    A block's traffic runs beside the computing of its neighbour: forward beside one gather, backward beside a gather
    and a reduction. What is longer counts. The root's is waited for. bf16 weights, fp32 gradients.
    """
    shards = min(gpus, m.per_node) if hybrid else gpus
    copies, across = gpus // shards, shards > m.per_node
    work = planner.flops(c, tokens, tokens * (row + 1) // 2) / m.flops
    block = planner.numbers(planner.block_shapes(c), shards)
    root = planner.numbers(planner.root_shapes(c), shards)

    def reduction(numbers: int) -> float:
        seconds = collective(4 * numbers, shards, m, across)
        if copies > 1:  # over nodes, by trees: their depth, not their number, is waited for
            seconds += 2 * 4 * numbers / shards * (copies - 1) / copies / m.network
            seconds += 2 * math.log2(copies) * m.hop
        return seconds

    # The head's part of the work runs beside nothing; a block has its share of the rest.
    share = c.n_layers * block / (c.n_layers * block + root)
    forward, backward = work * share / 3 / c.n_layers, work * share * 2 / 3 / c.n_layers
    gather = collective(2 * block, shards, m, across)
    seconds = c.n_layers * (max(forward, gather) + max(backward, gather + reduction(block)))
    seconds += work * (1 - share) + collective(2 * root, shards, m, across) + reduction(root)
    return seconds, work


def table(c: LlamaConfig, tokens: int, row: int, m: Machine) -> list[str]:
    lines = [
        "| GPUs | full shard, tok/s/GPU | computing | hybrid, tok/s/GPU | computing |",
        "|---:|---:|---:|---:|---:|",
    ]
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        cells = []
        for hybrid in (False, True):
            seconds, work = step_seconds(c, gpus, hybrid, tokens, row, m)
            cells += [f"{tokens / seconds:,.0f}", f"{work / seconds:.0%}"]
        lines.append(f"| {gpus:,} | {' | '.join(cells)} |")
    return lines


def check() -> tuple[float, float]:
    """(predicted, published) tok/s/GPU on 64 H200, the rate of computing being set so that 32 of them agree.

    torchtitan's 2025-06 report: Llama-3.1-8B, rows of 8,192, batch 2, compiled, fp8 products: 10,938 and 10,753.
    """
    c, tokens, row = PRESETS["llama3.1-8b"], 2 * 8192, 8192
    low, high = 1e14, 2e15
    for _ in range(60):
        m = dataclasses.replace(Machine(), flops=(low + high) / 2)
        slow = tokens / step_seconds(c, 32, False, tokens, row, m)[0] < 10938
        low, high = (m.flops, high) if slow else (low, m.flops)
    return tokens / step_seconds(c, 64, False, tokens, row, m)[0], 10753.0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="llama3-8b", choices=sorted(PRESETS))
    p.add_argument("--tokens", type=int, default=16384, help="tokens a GPU and step")
    p.add_argument("--row", type=int, default=8192, help="length of a document")
    args = p.parse_args()
    print("\n".join(table(PRESETS[args.model], args.tokens, args.row, Machine())))
    predicted, published = check()
    print(
        f"\ntorchtitan, 64 H200 from 32: {predicted:,.0f} predicted, {published:,.0f} published "
        f"({predicted / published - 1:+.1%})"
    )


if __name__ == "__main__":
    main()
