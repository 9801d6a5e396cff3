"""What every result file says besides its results: command, commit, versions, device. Used by the benches."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def device() -> str:
    """The GPU's name, or the CPU's with its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """The checked-out commit, marked when there are changes beside it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def write(path: Path, results: Any, one_line_each: bool = False, **facts: Any) -> None:
    """Write a result file and print where it is. one_line_each: a line for each innermost object, for long lists."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "numpy", "sentencepiece", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    document = {
        "command": " ".join(["python", str(shown), *sys.argv[1:]]),
        "commit": commit(),
        "device": device(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        **facts,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2)
    if one_line_each:
        text = re.sub(r"\{[^{}]*\}", lambda innermost: " ".join(innermost.group().split()), text)
    path.write_text(text + "\n")
    print(f"written to {path}")


def percentile(values: Sequence[float], p: int) -> float:
    """The value that p of a hundred do not exceed; of at most 20 values, p95 is the largest."""
    return sorted(values)[min(len(values) - 1, len(values) * p // 100)]


def parser(doc: str, shapes: list[str], dtypes: list[str], passes: int) -> argparse.ArgumentParser:
    """The flags of a bench that has a result for every shape and number type; these are their defaults."""
    from llama.config import PRESETS

    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="*", default=shapes, choices=sorted(PRESETS))
    p.add_argument("--dtypes", nargs="*", default=dtypes)
    p.add_argument("--passes", type=int, default=passes)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--output", type=Path, help="where the results go; default: bench/results/")
    return p


def run(
    args: argparse.Namespace, bench: Callable[[str, str, argparse.Namespace], Any], name: str, **facts: Any
) -> None:
    """bench(shape, dtype, args) for all that parser()'s flags name: each result printed, all of them written."""
    torch.set_num_threads(args.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    results = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            results.append(bench(shape, dtype, args))
            print(json.dumps(results[-1]), flush=True)
            gc.collect()
    write(args.output or RESULTS / name, results, **facts, passes=args.passes)
