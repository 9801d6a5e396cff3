"""Which tiles should each attention kernel use? The sweep behind flash.TILES.

    python -m bench.bench_tiles                    # without a GPU: compile the candidates for sm_80 and sm_90
    python -m bench.bench_tiles                    # on a GPU: compile them for it, then time what is admissible
    python -m bench.bench_tiles --kernels dq --arch 90 --head 128 --tiles 128x64x8x2 64x64x4x3    # only these

Compiled by the launch code itself, run dry, on a packed shape with four heads a group and on a causal one with one. A
candidate is admissible if neither spills and both stay within shared memory: for sm_80's entries, within the 99 KiB of
sm_86, sm_89 and sm_120, which share them. Timed on the same shapes, one kernel at a time (and the small one for delta,
where it is needed), interleaved, medians; the table's own tiles are the yardstick of speed and of what is right.
Writes bench/results/tiles_<triton version or device>.json and prints entries to paste. --device cpu, under
TRITON_INTERPRET=1, takes tiny shapes to see that it runs: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import triton
from torch import Tensor

from bench import report, timing
from bench.bench_compile import CACHE, COLUMNS, SHORT, programs
from bench.bench_kernels import device_name, one_line
from bench.dry_run import SHARED_LIMIT, compile_all
from bench.kernel_work import Setting, document_lengths, documents_of, worst_error
from kernels import flash, launch
from kernels.flash import Tiles
from kernels.reference import Documents

KERNELS = ("forward", "dkdv", "dq")
SHAPES = {"packed": {"B": 1, "T": 16384, "H": 32, "G": 8}, "causal": {"B": 4, "T": 4096, "H": 16, "G": 16}}
COMPILED = {"B": 1, "T": 256}  # as good as any: what is compiled depends on the heads
TINY = {"B": 1, "T": 64, "H": 2, "G": 1}
LARGEST_CROWD = 208  # numbers that a thread may hold besides all else, of its 255 registers
PASSES = 9
COMPILING = 0.6  # of the time, where there is timing to follow
SLOWEST = 120.0  # seconds without a compiled candidate, after which the rest is given up
DTYPES = {short: dtype for dtype, short in SHORT.items()}
MUTED = defaultdict(lambda: lambda *args, **constants: None)  # a kernel that, whatever the grid, does nothing


class Candidate(NamedTuple):
    """Tiles of a kernel for an architecture as in sm_90, a head size and a number type as in bf16."""

    kernel: str
    arch: int
    head: int
    dtype: str
    tiles: Tiles

    @property
    def entry(self) -> tuple[str, int, int, int]:
        return flash.entry(self.kernel, self.arch, self.head, DTYPES[self.dtype].itemsize)

    def __str__(self) -> str:
        return f"{self.kernel} sm_{self.arch} {self.dtype} {self.head}: {shown(self.tiles)}"


Row = dict[str, Any]
Rows = dict[Candidate, Row]


def shown(t: Tiles) -> str:
    return "x".join(map(str, t))


def crowd(kernel: str, head: int, t: Tiles) -> float:
    """How many numbers of accumulators and scores a thread holds at once, at least."""
    of = {"forward": t.m * (head + t.n), "dkdv": 2 * t.n * (head + t.m), "dq": t.m * (head + 2 * t.n)}
    return of[kernel] / (32 * t.warps)


def candidates(kernel: str, arch: int, head: int, dtype: str, chosen: list[Tiles] | None = None) -> list[Candidate]:
    """The table's tiles, then the chosen; by default powers of two, less what is sure to spill and slow to compile."""
    size = DTYPES[dtype].itemsize
    if chosen is None:
        sides, stages = ((16, 32, 64), (1, 2)) if size == 4 else ((32, 64, 128), (2, 3))
        rows = sides if kernel == "dkdv" else sides[1:]  # few queries to a program never pay
        cuts = [Tiles(*t) for t in product(rows, sides, (4, 8), stages)]
        chosen = [t for t in cuts if crowd(kernel, flash.padded(head), t) <= LARGEST_CROWD]
    own = flash.tiles(kernel, arch, head, size)
    return [Candidate(kernel, arch, head, dtype, t) for t in dict.fromkeys((own, *chosen))]


@contextmanager
def only(kernel: str, cut: Tiles) -> Iterator[None]:
    """The launch code uses these tiles for this kernel, and leaves out the backward's other large one."""
    other = {"dkdv": "attention_dq_kernel", "dq": "attention_dkdv_kernel"}.get(kernel)
    mute = mock.patch.object(flash, other, MUTED) if other else nullcontext()
    with mock.patch.dict(flash.OVERRIDE, {kernel: cut}), mute:
        yield


def inputs(s: Setting, K: int, seed: int, B: int, T: int, H: int, G: int) -> list[Tensor]:
    """q, k, v and the gradient of o."""
    return [s.normal(B, T, n, K, seed=4 * seed + i) for i, n in enumerate((H, G, G, H))]


def results(c: Candidate, tensors: list[Tensor], documents: Documents | None) -> tuple[Tensor, ...]:
    """What the kernel computes of q, k, v, the gradient, o and lse."""
    (q, k, v, do, o, lse), (start, end) = tensors, documents or (None, None)
    with only(c.kernel, c.tiles):
        if c.kernel == "forward":
            return flash.attention_forward(q, k, v, start, end)
        dq, *dkdv = flash.attention_backward(do, q, k, v, o, lse, start, end)
        return (dq,) if c.kernel == "dq" else tuple(dkdv)


def admissible(c: Candidate, row: Row) -> bool:
    shared = SHARED_LIMIT[86 if c.entry[1] == 80 else 90]
    return row["spill_stores"] == row["spill_loads"] == 0 and row["shared"] <= shared


def compile_one(c: Candidate) -> tuple[Candidate, Row]:
    """The worse figures of the two shapes; of the first alone if they rule the candidate out."""
    torch.set_num_threads(1)
    s, row = Setting(torch.device("cpu"), DTYPES[c.dtype]), {}
    for name, shape in SHAPES.items():
        q, k, v, do = inputs(s, c.head, 0, **{**shape, **COMPILED})
        tensors = [q, k, v, do, q, torch.zeros(q.shape[0], q.shape[2], q.shape[1])]
        documents = documents_of([q.shape[1]], s.device) if name == "packed" else None
        try:
            compiled = compile_all(c.arch, lambda t=tensors, d=documents: results(c, t, d), CACHE)
        except Exception as e:
            return c, {"failed": one_line(e), "admissible": False}
        (it,) = (x for x in compiled if x.name == f"attention_{c.kernel}_kernel")
        row = {column: max(row.get(column, 0), getattr(it, column)) for column in COLUMNS}
        if not admissible(c, row):
            break
    return c, row | {"programs": programs(c.arch, row), "admissible": admissible(c, row)}


def compile_them(cs: list[Candidate], processes: int, deadline: float) -> Rows:
    """In that many processes. What kills its process, or takes beyond the deadline, is given up."""
    found: Rows = {}
    CACHE.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.imap_unordered(compile_one, cs)
        while len(found) < len(cs):
            try:
                c, row = done.next(timeout=max(0.0, min(SLOWEST, deadline - time.monotonic())))
            except multiprocessing.TimeoutError:
                break
            found[c] = row
            figures = ", ".join(f"{name} {figure}" for name, figure in row.items())
            print(f"{len(found)} of {len(cs)}: {c}: {figures}", file=sys.stderr, flush=True)
    return {c: found.get(c, {"failed": "time was up", "admissible": False}) for c in cs}


def time_them(group: Rows, name: str, shape: dict[str, int], s: Setting, deadline: float) -> None:
    """Add to the rows of one kernel, of which the first is the table's, what this shape shows."""
    documents = documents_of(document_lengths(shape["T"]), s.device) if name == "packed" else None
    sets = s.sets(lambda seed: inputs(s, next(iter(group)).head, seed, **shape))
    for tensors in sets:
        tensors += flash.attention_forward(*tensors[:3], *(documents or (None, None)))
    clock, wanted, timed = timing.Clock(s.device), None, {}
    for c, row in group.items():
        found = row[name] = {}
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("time was up")
            timing.poison(s.device, 2**28)
            got = results(c, sets[0], documents)
            wanted = got if wanted is None else wanted
            found["error"] = worst_error(zip(got, wanted, strict=True))
            found["right"] = found["error"] <= s.tolerance  # False for NaN
            timed[c] = timing.Timed(clock, lambda i, c=c: results(c, sets[i % len(sets)], documents))
        except Exception as e:
            found["failed"] = one_line(e)
    for _ in range(PASSES):
        for t in timed.values():
            t.once()
    for c, t in timed.items():
        group[c][name] |= {"seconds": t.seconds, "launches_hidden": t.queued}


def verdict(group: Rows) -> str:
    """Are the table's tiles admissible, and are there larger ones?"""
    own, fit = next(iter(group)), [c for c, row in group.items() if row["admissible"]]
    larger = [shown(c.tiles) for c in fit if c.tiles.m * c.tiles.n > own.tiles.m * own.tiles.n]
    known = "admissible" if own in fit else "NOT admissible"
    return f"{own}, the table's: {known}; of {len(group)} tiles {len(fit)} are; larger: {', '.join(larger) or 'none'}"


def fastest(group: Rows) -> str:
    """The entry to paste: of the tiles right on every shape, those with the least time beside the table's."""
    own, whole = next(iter(group)), [c for c, r in group.items() if all(r.get(n, {}).get("seconds") for n in SHAPES)]
    if own not in whole:
        return f"    # {own}, the table's, was not timed"
    ratios = {c: [group[c][n]["seconds"] / group[own][n]["seconds"] for n in SHAPES] for c in whole}
    best = min((c for c in whole if all(group[c][n]["right"] for n in SHAPES)), key=lambda c: sum(ratios[c]))
    beside = ", ".join(f"{name} {ratio:.2f}" for name, ratio in zip(SHAPES, ratios[best], strict=True))
    entry = f"{best.entry}: Tiles{tuple(best.tiles)},".replace("'", '"')
    return f"    {entry}  # time beside the table's: {beside}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    p.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT), help="to compile for")
    p.add_argument("--head", type=int, nargs="+", default=[128, 64])
    p.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    p.add_argument("--tiles", type=lambda t: Tiles(*map(int, t.split("x"))), nargs="+", metavar="MxNxWARPSxSTAGES")
    p.add_argument("--seconds", type=float, default=900.0, help="for all of it")
    p.add_argument("--processes", type=int, default=os.cpu_count())
    p.add_argument("--device", choices=["none", "cuda", "cpu"], help="to time on; default: cuda where there is one")
    p.add_argument("--json", type=Path, help="where to write the results")
    args = p.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "none")
    if args.device == "cpu" and not launch.interpreting():
        p.error("--device cpu interprets the kernels: set TRITON_INTERPRET=1")
    if args.device != "none":
        args.arch = [launch.architecture(torch.device(args.device))]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    start, timed = time.monotonic(), args.device != "none"
    parted = [candidates(*which, args.dtype, args.tiles) for which in product(args.kernels, args.arch, args.head)]
    rows: Rows = {c: {"admissible": True} for group in parted for c in group}
    if args.device != "cpu":
        until = start + args.seconds * (COMPILING if timed else 1.0)
        rows = compile_them(list(rows), args.processes, until)
    if timed:
        triton.knobs.cache.dir = str(CACHE)  # where they lie compiled
    s = Setting(torch.device("cpu" if args.device == "none" else args.device), DTYPES[args.dtype])
    for group in parted:
        print(verdict({c: rows[c] for c in group}), flush=True)
        fit = {c: rows[c] for c in group if c is group[0] or rows[c]["admissible"]}
        if timed:
            for name, shape in SHAPES.items():
                try:
                    time_them(fit, name, shape | (TINY if args.device == "cpu" else {}), s, start + args.seconds)
                except Exception as e:  # as when the device is lost: what was found before is written
                    print(f"    # {group[0]}, {name}: {one_line(e)}")
            print(fastest(fit), flush=True)
    name = device_name() if args.device == "cuda" else triton.__version__
    path = args.json or report.RESULTS / f"tiles_{name}.json"
    report.write(path, {str(c): row for c, row in rows.items()}, one_line_each=True)
    wrong = [c for c, row in rows.items() if any(row.get(n, {}).get("right") is False for n in SHAPES)]
    print("".join(f"WRONG: {c}\n" for c in wrong), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
