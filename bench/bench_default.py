"""How long does `python train.py` take, and how much does its model know?

    python bench/bench_default.py [--threads 2]

Runs it as a user would, in an empty folder. Writes bench/results/default_cpu.json: wall time with everything, time
and speed of the steps, held-out perplexity, and the shares of held-out questions whose condition is named right.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import RESULTS, ROOT, write


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, str(ROOT / "train.py")],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            check=True,
        )
        wall = time.perf_counter() - begin
        out = Path(folder) / "out" / "tiny"
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        result = {
            "wall_seconds": round(wall, 1),
            "step_seconds": round(sum(line["seconds"] for line in steps), 1),
            "steps": len(steps),
            "tokens": steps[-1]["tokens"],
            "tokens_per_s": round(statistics.median(line["tokens_per_s"] for line in steps)),
            "eval_perplexity": next(line["eval_perplexity"] for line in reversed(lines) if "eval_perplexity" in line),
            "named_right": json.loads((out / "examination.json").read_text()),
        }
    print(json.dumps(result, indent=2))
    write(RESULTS / "default_cpu.json", result, train_threads=args.threads)


if __name__ == "__main__":
    main()
