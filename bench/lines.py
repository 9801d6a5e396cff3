"""A table of one GPU's figures whose lines are a process each, so that none inherits another's memory or its end.

Used by bench_train_gpu.py and bench_decode_gpu.py, whose command line this is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import report

Found = dict[str, Any]


class Line(Protocol):
    """What is to be measured: a dataclass, of one of config.PRESETS."""

    @property
    def shape(self) -> str: ...

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Table:
    """The lines in the order of their worth, and those that run on a CPU to see that they run."""

    module: str  # "bench.bench_..."
    result: str  # how the result file's name begins
    lines: Sequence[Line]
    tiny: Sequence[Line]
    measure: Callable[[Any, torch.device], Found]  # of a Line
    show: Callable[[dict[str, Found]], list[str]]  # of each line by its name: its fields, and what was found
    seconds: float  # begin no line after so long
    line_seconds: float


def main(table: Table, doc: str, argv: list[str] | None = None) -> int:
    """Measure what there is time for, write bench/results/<result>_<device>.json, print the table."""
    shapes = list(dict.fromkeys(line.shape for line in table.lines))
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", help=f"these shapes: {', '.join(shapes)}; tiny")
    p.add_argument("--seconds", type=float, default=table.seconds, help="begin no line after so long")
    p.add_argument("--line-seconds", type=float, default=table.line_seconds, help="a line may take so long")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--json", type=Path)
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.worker:
        worker(table, args.worker, args.device)
        return 0
    lines = [line for line in (*table.lines, *table.tiny) if line.shape in (args.only or shapes)]
    there = args.device == "cpu" or torch.cuda.is_available()
    deadline = time.monotonic() + args.seconds
    found: dict[str, Found] = {}
    for line in lines:
        found[line.name] = asdict(line)  # type: ignore[call-overload]
        if there and time.monotonic() < deadline:
            found[line.name] |= _run(table, line, args)
            print(line.name, file=sys.stderr, flush=True)
    if there and (args.json or args.device == "cuda"):
        name = "".join(c if c.isalnum() else "_" for c in report.device().lower())
        report.write(args.json or report.RESULTS / f"{table.result}_{name}.json", found)
    print("\n".join(table.show(found)))
    return 0


def worker(table: Table, name: str, device: str) -> None:
    """The child: one line, as JSON on stdout."""
    line = next(line for line in (*table.lines, *table.tiny) if line.name == name)
    try:
        found = table.measure(line, torch.device(device))
    except Exception as e:
        found = {"failed": f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]}
    print(json.dumps(found))


def _run(table: Table, line: Line, args: argparse.Namespace) -> Found:
    """What the child found, or why it found nothing."""
    command = [sys.executable, "-m", table.module, "--worker", line.name, "--device", args.device]
    try:
        done = subprocess.run(
            command, cwd=report.ROOT, capture_output=True, text=True, timeout=args.line_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {args.line_seconds:.0f} s"}
    if done.returncode:
        return {"failed": f"status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"[:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])
