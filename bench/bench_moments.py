"""Does training with split weights, and with moments in bf16, learn as well as with fp32?

    python bench/bench_moments.py [--steps 400] [--threads 1]

The built-in tiny model in bf16, the same data and seed, one run an optimizer. Reported: training loss over the last
50 steps, held-out loss, the share of weights that a step changes, and the largest distance of the smoothed loss curves
from fp32's. Writes bench/results/moments_cpu.json, and the curves to
bench/results/moments_cpu.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from report import RESULTS, write

from llama.runlog import read_metrics

OPTIMIZERS = {"fp32": "adamw_torch", "split": "adamw_split", "split, bf16 moments": "adamw_split_bf16"}
WINDOW = 50


def train(optim: str, out: Path, steps: int, threads: int) -> list[dict[str, Any]]:
    """The metrics of a whole run."""
    command = [sys.executable, str(ROOT / "train.py"), "--bf16", "True", "--optim", optim, "--max_steps", str(steps)]
    command += ["--output_dir", str(out), "--save_strategy", "no", "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=out.parent, env=environment, check=True)
    return read_metrics(out / "metrics.jsonl")


def smoothed(lines: list[dict[str, Any]]) -> list[float]:
    losses = [line["loss"] for line in lines if "loss" in line]
    return [statistics.mean(losses[i : i + WINDOW]) for i in range(len(losses) - WINDOW + 1)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--output", type=Path, default=RESULTS / "moments_cpu.json")
    args = p.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        curves = {}
        for name, optim in OPTIMIZERS.items():
            out = Path(folder) / name
            lines = train(optim, out, args.steps, args.threads)
            curves[name] = smoothed(lines)
            last = [line for line in lines if "loss" in line][-WINDOW:]
            results[name] = {
                "loss": round(statistics.mean(line["loss"] for line in last), 4),
                "held_out_loss": round(next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), 4),
                "weights_changed": round(statistics.mean(line["weights_changed"] for line in last), 4),
                "bf16_weights_changed": round(statistics.mean(line["bf16_weights_changed"] for line in last), 4),
                "farthest_from_fp32": round(
                    max(abs(a - b) for a, b in zip(curves[name], curves["fp32"], strict=True)), 4
                ),
            }
            print(name, json.dumps(results[name]), flush=True)
        picture = args.output.with_suffix(".png")
        compare = [sys.executable, str(ROOT / "runs/compare.py"), "--output", str(picture)]
        subprocess.run([*compare, *(str(Path(folder) / name) for name in OPTIMIZERS)], check=True)
    write(args.output, results, steps=args.steps)


if __name__ == "__main__":
    main()
