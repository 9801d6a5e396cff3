"""What do two ranks cost beside one? Weak scaling of train.py under torchrun with gloo, one core a rank.

    python bench/bench_ranks.py [--preset 15m] [--steps 12] [--rounds 3]

The same records a rank and step (as many tokens each), fully sharded in fp32; runs of one and two ranks interleaved,
medians of the steps after the third. Efficiency: tokens/s of two ranks over twice those of one. gloo goes over loopback
and both ranks share caches and memory, so this is a bound for machines of one core, not a figure for GPUs. Writes
bench/results/ranks_cpu.json.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from report import RESULTS, write

from llama.runlog import read_metrics
from llama.tokenizer import train_tokenizer

WORDS = "abcdefgh"
WARM_UP = 3


def records(path: Path, count: int) -> None:
    """JSON lines of dialogues, each of the same length, so that every rank has the same work."""
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        question, answer = (" ".join(rng.choice(WORDS) for _ in range(n)) for n in (60, 60))
        lines.append(f'{{"instruction": "{question}", "output": "{answer}"}}')
    path.write_text("\n".join(lines))


def run(folder: Path, ranks: int, args: argparse.Namespace) -> list[float]:
    """Tokens/s of each step after the warm-up, all ranks together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [
        str(ROOT / "train.py"),
        "--model_name_or_path",
        args.preset,
        "--tokenizer_path",
        str(folder / "tokenizer.model"),
    ]
    command += [
        "--data_path",
        str(folder / "data.jsonl"),
        "--output_dir",
        str(folder / "out"),
        "--overwrite_output_dir",
    ]
    command += ["--max_steps", str(args.steps), "--per_device_train_batch_size", "8", "--packing", "none"]
    command += ["--save_strategy", "no", "--rehearse", "False", "--cache_dir", str(folder / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return [m["tokens_per_s"] for m in read_metrics(folder / "out/metrics.jsonl") if m.get("step", 0) > WARM_UP]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="15m")
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--output", type=Path, default=RESULTS / "ranks_cpu.json")
    args = p.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records(folder / "data.jsonl", 400)
        (folder / "tokenizer.model").write_bytes(train_tokenizer([" ".join(WORDS)] * 20, 272).model_bytes)
        for _ in range(args.rounds):
            for ranks, speeds in found.items():
                speeds += run(folder, ranks, args)
                print(ranks, round(statistics.median(speeds)), flush=True)
    one, two = (statistics.median(speeds) for speeds in found.values())
    results = {"preset": args.preset, "tokens_per_s": {"1 rank": round(one), "2 ranks": round(two)}}
    results["efficiency"] = round(two / (2 * one), 3)
    print(results)
    write(args.output, results, rounds=args.rounds, steps=args.steps)


if __name__ == "__main__":
    main()
