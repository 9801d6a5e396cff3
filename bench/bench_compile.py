"""What do the kernels become on a GPU: registers, spills, shared memory, instructions? Compiled here, without one.

    python -m bench.bench_compile                  # the everyday scenes against the baseline; exit code 1 on growth
    python -m bench.bench_compile --all            # every scene, on sm_86 too
    python -m bench.bench_compile --update         # compile everything and write the baseline anew
    python -m bench.bench_compile --update --only bounded codes    # only scenes with such names; other rows stay
    PYTHONPATH=.venv/triton-3.6 python -m bench.bench_compile    # the same under triton 3.6

A scene is a few lines that call a kernel file's public function, forward and backward, on shapes as in training or
generation; dry_run.py compiles what it launches. The baseline, bench/results/compile_<triton version>.json, holds one
line per kernel and scene. Growth is: a byte more of spills or of shared memory, or more than 8 registers more (fewer
come and go with any rewording). Whatever the baseline says, nothing may spill more than 64 bytes, nor take more shared
memory than the architecture has.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import triton
from torch import Tensor

from bench import report
from bench.dry_run import SHARED_LIMIT, compile_all

CACHE = ROOT / ".cache/triton"
EVERYDAY_ARCHITECTURES = (80, 90)
ARCHITECTURES = (80, 86, 90)
MORE_REGISTERS = 8
MOST_SPILLED = 64  # bytes; a few outside the loops cost nothing that one could measure
KNOWN_SPILLS = {  # of these rows more is known, and why; growth is refused all the same
    # A row of 16,384 with its fp32 weight gradient fills the register file: 4 arrays of 64 KiB. 32 warps and fewer
    # stages were tried and spill 96 to 600 bytes too.
    re.compile(r"(add_)?norm \w+ 16384, sm_\d+: rms_norm_backward_kernel"): 400,
    re.compile(r"add_norm fp32 16384, sm_80: rms_norm_backward_kernel"): 1708,  # triton 3.6
    # fp32 products of heads of 128 on sm_90: the smallest tiles there are (16 x 16), and no number of warps helps.
    re.compile(r"attention fp32 (96|128).*, sm_90: attention_(dq|dkdv)_kernel"): 1044,
}
MUST_HAVE_HGMMA = re.compile(
    r"(attention (bf16|fp16) .*, sm_90: attention_(forward|dkdv|dq)|codes (bf16|fp16) .*, sm_90: quantised_tile)_kernel"
)
COLUMNS = ("registers", "spill_stores", "spill_loads", "shared", "warps", "stages")
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Row = dict[str, Any]
Rows = dict[str, Row]  # "scene, sm_90: kernel" -> its figures


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def borders(B: int, S: int) -> tuple[Tensor, Tensor]:
    start = torch.zeros(B, S, dtype=torch.int32)
    return start, torch.full_like(start, S)


def attention(K: int, dtype: torch.dtype, heads: tuple[int, int], packed: bool) -> None:
    from kernels import flash

    H, G = heads
    q, k, v = (normal(1, 256, n, K, dtype=dtype) for n in (H, G, G))
    flash.attention(q, k, v, borders(1, 256) if packed else None).sum().backward()


def decode(K: int, dtype: torch.dtype, heads: tuple[int, int], how: str) -> None:
    """how: "packed"; "bounded", by a length on the device, over a cache of fixed size as it lies; or ""."""
    from kernels import decode

    H, G = heads
    q = normal(2, 1, H, K, dtype=dtype).detach()
    k, v = (normal(2, G, 300, K, dtype=dtype).detach().transpose(1, 2) for _ in range(2))
    length = torch.ones(1, dtype=torch.int32) if how == "bounded" else None
    decode.attention(q, k, v, borders(2, 300) if how == "packed" else None, length)


def decode_codes(K: int, dtype: torch.dtype, bounded: bool) -> None:
    from kernels import decode, reference

    q, k, v = (normal(2, t, n, K, dtype=dtype).detach() for t, n in ((1, 8), (300, 2), (300, 2)))
    (k, k_scales), (v, v_scales) = reference.to_codes(k), reference.to_codes(v)
    length = torch.full((1,), 300, dtype=torch.int32) if bounded else None
    decode.attention(q, k, v, None if bounded else borders(2, 300), length, (k_scales, v_scales))


def norm(D: int, dtype: torch.dtype, residual: bool) -> None:
    from kernels import norm

    x, s, w = normal(256, D, dtype=dtype), normal(256, D, dtype=dtype), normal(D, dtype=dtype)
    if residual:
        h, y = norm.add_rms_norm(x, s, w, 1e-5)
        (h + y).sum().backward()
    else:
        norm.rms_norm(x, w, 1e-5).sum().backward()


def rope(K: int, dtype: torch.dtype) -> None:
    from kernels import rotary

    q, k = rotary.rope(
        normal(2, 64, 8, K, dtype=dtype),
        normal(2, 64, 2, K, dtype=dtype),
        torch.ones(64, K // 2),
        torch.ones(64, K // 2),
    )
    (q.sum() + k.sum()).backward()


def swiglu(F: int, dtype: torch.dtype) -> None:
    from kernels import gate

    gate.swiglu(normal(64, F, dtype=dtype), normal(64, F, dtype=dtype)).sum().backward()


def loss(V: int, dtype: torch.dtype, weighted: bool) -> None:
    from kernels import loss

    x, w, targets = normal(64, 16, dtype=dtype), normal(V, 16, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    loss.linear_cross_entropy(x, w, targets, token_weights=torch.ones(64) if weighted else None).backward()


def adamw(split: bool, moments: torch.dtype) -> None:
    from kernels import optimizer

    n = 4096
    weight, low = torch.zeros(n, dtype=torch.bfloat16 if split else torch.float32), torch.zeros(n, dtype=torch.int16)
    m, v = (torch.zeros(n, dtype=moments) for _ in range(2))
    numbers = {"keep": 1.0, "rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "root": 1.0, "eps": 1e-8, "seed": 7}
    optimizer.adamw(weight, low if split else None, torch.zeros_like(weight), m, v, torch.ones(()), **numbers)


def codes(bits: int, dtype: torch.dtype, rows: int, group: int, out: int = 512) -> None:
    from kernels import codes

    width = 4096 if group else 4000  # a group of 0 is the row: of a width that no tile divides
    matrix = torch.zeros(out, width * bits // 8, dtype=torch.uint8)
    scales = torch.zeros(out, width // (group or width), dtype=dtype)
    codes.quantised_linear(normal(rows, width, dtype=dtype).detach(), matrix, scales, bits)


def scenes(everyday: bool) -> dict[str, Callable[[], None]]:
    """By name. Everyday: bf16 at the sizes of LLaMA, small enough for each run of the tests."""
    found: dict[str, Callable[[], None]] = {}
    for dtype, short in SHORT.items():
        bf16 = dtype == torch.bfloat16
        for K in (32, 64, 96, 128):
            for packed in (False, True):
                if not everyday or (bf16 and (K, packed) in ((64, True), (128, False), (128, True))):
                    how = " packed" if packed else ""
                    found[f"attention {short} {K}{how}"] = partial(attention, K, dtype, (8, 2), packed)
            for how in ("", "packed", "bounded"):
                if not everyday or (bf16 and K == 128):
                    found[f"decode {short} {K} {how}".strip()] = partial(decode, K, dtype, (8, 2), how)
                    if how:
                        found[f"decode codes {short} {K} {how}"] = partial(decode_codes, K, dtype, how == "bounded")
        if not everyday or bf16:
            found[f"decode {short} 128 bounded, 1 head a group"] = partial(decode, 128, dtype, (2, 2), "bounded")
        if not everyday:
            found[f"attention {short} 128 packed, 1 head a group"] = partial(attention, 128, dtype, (2, 2), True)
        for D in (288, 2048, 4096, 8192, 16384):
            for residual in (False, True):
                if not everyday or (bf16 and D in (4096, 16384)):
                    name = "add_norm" if residual else "norm"
                    found[f"{name} {short} {D}"] = partial(norm, D, dtype, residual)
        if not everyday or bf16:
            found[f"rope {short} 128"] = partial(rope, 128, dtype)
            found[f"swiglu {short} 11008"] = partial(swiglu, 11008, dtype)
            found[f"loss {short} 32000"] = partial(loss, 32000, dtype, False)
        for bits in (4, 8):
            for rows in (1, 16, 64, 512):
                for group in (32, 128, 0):
                    usual = bf16 and group == 128 and rows != 64
                    if usual or (not everyday and (bf16 or (group == 128 and rows != 64))):
                        grouped = f"groups of {group}" if group else "a scale a row"
                        found[f"codes {short} {bits} bits, {rows} rows, {grouped}"] = partial(
                            codes, bits, dtype, rows, group
                        )
            for rows in (1, 16):  # so few rows of codes that each is cut, and the parts added
                if bf16 and (bits == 4 or not everyday):
                    found[f"codes {short} {bits} bits, {rows} rows, split"] = partial(codes, bits, dtype, rows, 128, 24)
        if dtype != torch.float16:
            found[f"adamw split, moments {short}"] = partial(adamw, True, dtype)
        if not everyday:
            found[f"rope {short} 96"] = partial(rope, 96, dtype)
            found[f"loss {short} 128256 weighted"] = partial(loss, 128256, dtype, True)
    return found


def compile_scene(task: tuple[int, str]) -> Rows:
    """The figures of one scene's kernels; of the error that stopped it, under its name."""
    architecture, name = task
    torch.set_num_threads(1)
    rows: Rows = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what triton warns of today fails in its next version
            kernels = compile_all(architecture, scenes(everyday=False)[name], CACHE)
    except Exception as e:  # one kernel that does not compile must not hide the others
        return {f"{name}, sm_{architecture}": {"error": f"{type(e).__name__}: {e}"}}
    for kernel in kernels:
        key = f"{name}, sm_{architecture}: {kernel.name}"
        while key in rows:  # the same kernel again, with other types or constants
            key += "'"
        rows[key] = {column: getattr(kernel, column) for column in COLUMNS} | kernel.counts
    return rows


def compile_scenes(names: list[str], architectures: tuple[int, ...], processes: int) -> Iterator[Rows]:
    """All scenes on all architectures, in that many processes; in order, each as it is done."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tasks = [(architecture, name) for name in names for architecture in architectures]
    if processes == 1:
        yield from map(compile_scene, tasks)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_scene, tasks)


def architecture_of(key: str) -> int:
    return int(re.search(r", sm_(\d+)", key)[1])


def scene_of(key: str) -> str:
    return key.partition(", sm_")[0]


def faults(rows: Rows) -> list[str]:
    """What is wrong whatever the baseline says."""
    found = []
    for key, row in rows.items():
        if "error" in row:
            found.append(f"{key}: does not compile: {row['error']}")
            continue
        spilled, limit = max(row["spill_stores"], row["spill_loads"]), SHARED_LIMIT[architecture_of(key)]
        most = max([MOST_SPILLED] + [known for pattern, known in KNOWN_SPILLS.items() if pattern.fullmatch(key)])
        if spilled > most:
            found.append(f"{key}: spills {spilled} bytes, at most {most} are allowed: smaller tiles?")
        if row["shared"] > limit:
            found.append(f"{key}: {row['shared']} bytes of shared memory, a program can have {limit}")
        if MUST_HAVE_HGMMA.match(key) and not row.get("HGMMA"):
            found.append(f"{key}: its products do not use Hopper's Tensor Core instructions (HGMMA)")
    return found


def growth(rows: Rows, baseline: Rows, scope: Callable[[str], bool] = lambda key: True) -> list[str]:
    """What is worse than in the baseline, or not in both. scope: which of the baseline's rows were compiled."""
    found = [f"{key}: not in the baseline" for key in rows if key not in baseline and "error" not in rows[key]]
    found += [f"{key}: in the baseline only" for key in baseline if key not in rows and scope(key)]
    slack = {"registers": MORE_REGISTERS, "spill_stores": 0, "spill_loads": 0, "shared": 0}
    for key in rows.keys() & baseline.keys():
        for column, more in slack.items():
            before, after = baseline[key][column], rows[key].get(column, 0)
            if after > before + more:
                found.append(f"{key}: {column} grew from {before} to {after}")
    return sorted(found)


def baseline_path() -> Path:
    return report.RESULTS / f"compile_{triton.__version__}.json"


def merged(path: Path, rows: Rows, names: list[str]) -> Rows:
    """The rows of the scenes with these names, and of the others what the baseline has, in the order of the scenes."""
    order = {name: i for i, name in enumerate(scenes(everyday=False))}
    kept = json.loads(path.read_text())["results"] if path.exists() else {}
    kept = {key: row for key, row in kept.items() if scene_of(key) in order and scene_of(key) not in names}
    whole = kept | rows
    return {key: whole[key] for key in sorted(whole, key=lambda key: order[scene_of(key)])}


def programs(architecture: int, row: Row) -> int:
    """How many of a kernel's programs one multiprocessor holds at a time."""
    warps, shared = (48, 100) if architecture in (86, 89, 120) else (64, 164 if architecture == 80 else 228)
    of_a_warp = -(-row["registers"] * 32 // 256) * 256
    by_registers = 65536 // (of_a_warp * row["warps"])
    return min(by_registers, warps // row["warps"], shared * 1024 // (row["shared"] + 1024))


HEADER = f"{'scene, architecture: kernel':74} {'regs':>4} {'spill st/ld':>11} {'shared':>7} warps stages programs/SM"


def line(key: str, row: Row) -> str:
    """One line of the table; counts of instructions at its end."""
    if "error" in row:
        return f"{key:74} {row['error']}"
    counts = " ".join(f"{name} {n}" for name, n in row.items() if name not in COLUMNS)
    spills, held = f"{row['spill_stores']}/{row['spill_loads']}", programs(architecture_of(key), row)
    sizes = f"{row['registers']:4} {spills:>11} {row['shared']:7} {row['warps']:5} {row['stages']:6} {held:11}"
    return f"{key:74} {sizes}  {counts}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every scene, on sm_86 too")
    parser.add_argument("--update", action="store_true", help="write the baseline of this triton version anew")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only scenes with such a word in their names")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), help="only these architectures")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--baseline", type=Path, default=baseline_path(), help="compare with another file")
    args = parser.parse_args(argv)
    if args.update and args.arch:
        parser.error("--update writes the whole baseline, without --arch")
    everyday = not (args.all or args.update)
    architectures = tuple(args.arch or (EVERYDAY_ARCHITECTURES if everyday else ARCHITECTURES))
    names = [name for name in scenes(everyday) if not args.only or any(word in name for word in args.only)]
    if not names:
        parser.error(f"--only {' '.join(args.only)}: no scene has such a name")
    start = time.perf_counter()
    rows: Rows = {}
    print(HEADER)
    for some in compile_scenes(names, architectures, args.processes):
        rows |= some
        print("\n".join(line(key, row) for key, row in some.items()), flush=True)
    print(f"triton {triton.__version__}: {len(rows)} kernels in {time.perf_counter() - start:.0f} s")
    found = faults(rows)
    if args.update:
        report.write(args.baseline, merged(args.baseline, rows, names), one_line_each=True)
    elif not args.baseline.exists():
        found.append(f"there is no baseline {args.baseline}: python -m bench.bench_compile --update")
    else:
        baseline = json.loads(args.baseline.read_text())["results"]
        found += growth(rows, baseline, lambda key: architecture_of(key) in architectures and scene_of(key) in names)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
