"""How fast are the kernels, beside other implementations and what the machine can do at best, in one run?

    python -m bench.bench_kernels [--only attention norm ...] [--quick] [--seconds 280] [--json PATH]

Every row is built, checked against fp64 or fp32 on its own inputs (a wrong result shows as WRONG, however fast), and
timed: all implementations interleaved, medians of CUDA events around queued calls, buffers past the L2 cache. Copy
bandwidth and a plain matrix product, the ceilings, are measured first. What fails is reported as failed and loses no
other row: rows run in a child process, which is started again when the device is lost or a row hangs. Writes
bench/results/kernels_<device>.json and prints the table. Without a GPU every row is "not measured".

Work is counted from the shapes (kernel_work.py). FlexAttention's mask and varlen's borders are made beforehand and not
timed. --device cpu runs tiny shapes with the wall clock, to see that the code runs: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch._functorch.config

import kernels
from bench import kernel_rows, report, timing
from bench.kernel_table import readme_rows, table
from bench.kernel_work import Absent, Row, Setting, Work, worst_error

SILENCE = 100.0  # seconds without a word from the child, after which its row counts as hung
GRACE = 30.0  # seconds that a row begun in time may take beyond it
STOPPED = f"stopped {GRACE:.0f} s after time was up"
PASSES = {"full": 9, "quick": 7, "tiny": 2}
COPY_BYTES, PRODUCT_SIZE = 2**30, 8192
LOST = 3  # exit status of a child whose device answers no more


class DeviceLost(Exception):
    """Nothing runs on the device any more in this process; carries what was measured of the row."""


def one_line(error: BaseException) -> str:
    """An exception in at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


# ---- one row ----


def measure(row: Row, setting: Setting, clock: timing.Clock, passes: int) -> dict[str, Any]:
    """Check and time every implementation of a row."""
    result: dict[str, Any] = {"op": row.op, "name": row.name, "unit": row.unit, "implementations": {}}
    result["targets"] = [t._asdict() for t in row.targets]
    try:
        work = row.build(setting)
        result["work"] = work.amount
        _measure(row, work, result, setting, clock, passes)
    except DeviceLost:
        raise
    except Exception as e:
        result["failed"] = one_line(e)
        _still_there("building the row", setting, result)
    return result


def _measure(row: Row, work: Work, result: dict[str, Any], setting: Setting, clock: timing.Clock, passes: int) -> None:
    exact = work.exact()
    timed: dict[str, timing.Timed] = {}
    for name, make in work.calls.items():
        found: dict[str, Any] = {}
        result["implementations"][name] = found
        try:
            call = make()
            timing.poison(setting.device, 2**28)
            outputs = call(0)
            found["error"] = worst_error((part.pick(outputs), part.exact) for part in exact)
            found["right"] = found["error"] <= work.tolerance  # False for NaN
            del outputs
            if row.memory:
                found["peak_bytes"] = timing.peak_bytes(call, setting.device)
            timed[name] = timing.Timed(clock, call)
        except Absent as e:
            found["absent"] = str(e)
        except Exception as e:
            _failed(name, e, setting, result)
    del exact
    for _ in range(passes):
        for name in list(timed):
            try:
                timed[name].once()
            except Exception as e:
                del timed[name]
                _failed(name, e, setting, result)
    for name, t in timed.items():
        result["implementations"][name] |= {
            "seconds": t.seconds,
            "per_second": work.amount / t.seconds,
            "passes": [p.seconds for p in t.passes],
            "calls_of_a_pass": t.n,
            "launches_hidden": t.queued,
        }


def _failed(name: str, error: Exception, setting: Setting, result: dict[str, Any]) -> None:
    result["implementations"][name]["failed"] = one_line(error)
    gc.collect()
    _still_there(name, setting, result)


def _still_there(culprit: str, setting: Setting, result: dict[str, Any]) -> None:
    if setting.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(setting.device)
        torch.cuda.empty_cache()
        torch.ones(1, device=setting.device).item()
    except Exception as e:
        result.setdefault("failed", f"the device was lost by {culprit}")
        raise DeviceLost(json.dumps(result)) from e


# ---- besides the rows ----


def ceilings(setting: Setting, clock: timing.Clock, passes: int) -> dict[str, float]:
    size, n = (COPY_BYTES, PRODUCT_SIZE) if clock.cuda else (2**16, 64)
    return {
        "copy_bytes_per_second": timing.copy_bytes_per_second(clock, size, passes),
        "product_flops": timing.product_flops(clock, n, setting.dtype, passes),
    }


def launches(setting: Setting, clock: timing.Clock, backend: str) -> dict[str, dict[str, float]]:
    """Microseconds of the CPU to ask for one operation on small tensors, no gradients: ours and torch's."""
    x, w = setting.normal(64, 128, seed=0), setting.normal(128, seed=1)
    q = setting.normal(1, 64, 4, 32, seed=2)
    cos, sin = torch.ones(64, 16, device=setting.device), torch.zeros(64, 16, device=setting.device)
    targets = torch.zeros(64, dtype=torch.int64, device=setting.device)
    codes, scales = torch.zeros(64, 64, dtype=torch.uint8, device=setting.device), w[:64, None]
    calls = {
        "attention": lambda i: kernels.attention(q, q, q),
        "rms_norm": lambda i: kernels.rms_norm(x, w, 1e-5),
        "rope": lambda i: kernels.rope(q, q, cos, sin),
        "swiglu": lambda i: kernels.swiglu(x, x),
        "linear_cross_entropy": lambda i: kernels.linear_cross_entropy(x, x, targets),
        "quantised_linear": lambda i: kernels.quantised_linear(x[:1], codes, scales, 4),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in calls}
    for who, used in (("ours", backend), ("torch", "torch")):
        kernels.use(used)
        for name, call in calls.items():
            try:
                call(0)
                found[name][who] = round(min(clock.asking(call, 20) for _ in range(3)) * 1e6, 1)
            except Exception as e:
                found[name][f"{who} failed"] = one_line(e)
    kernels.use(backend)
    return found


# ---- child and parent ----


def setting_of(device: str) -> Setting:
    if device == "cuda":
        return Setting(torch.device("cuda", 0))
    return Setting(torch.device("cpu"), torch.float32, "eager")


def work_off(rows: list[Row], args: argparse.Namespace) -> int:
    """The child: measure these rows, a JSON line in args.worker for each thing begun and each thing found."""
    deadline = time.monotonic() + args.seconds
    setting = setting_of(args.device)
    clock = timing.Clock(setting.device)
    # Compiled backwards may otherwise write over what the next call of the same graph needs.
    torch._functorch.config.donated_buffer = False
    with args.worker.open("a") as lines:

        def say(**what: Any) -> None:
            lines.write(json.dumps(what) + "\n")
            lines.flush()

        say(begin="ceilings")
        say(ceilings=ceilings(setting, clock, PASSES[args.size]))
        kernels.use(args.backend)
        say(kernels=kernels.describe())
        for row in rows:
            if time.monotonic() > deadline:
                return 0
            say(begin=row.name)
            print(row.name, file=sys.stderr, flush=True)
            try:
                begin = time.monotonic()
                result = measure(row, setting, clock, PASSES[args.size])
                say(row=result | {"took": round(time.monotonic() - begin, 1)})
            except DeviceLost as lost:
                say(row=json.loads(str(lost)))
                return LOST
            gc.collect()
            torch.compiler.reset()
            if clock.cuda:
                torch.cuda.empty_cache()
        say(begin="launches")
        say(launches=launches(setting, clock, args.backend))
    return 0


def supervise(rows: list[Row], args: argparse.Namespace) -> dict[str, Any]:
    """The parent: children until every row is measured, has failed, or time is up."""
    deadline = time.monotonic() + args.seconds
    found: dict[str, Any] = {"ceilings": None, "kernels": None, "launches": None, "rows": {}}
    left = list(rows)
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(len(rows) + 1):
            remaining = deadline - time.monotonic()
            if not left or remaining <= 0:
                break
            path = Path(folder) / f"{attempt}.jsonl"
            path.touch()
            ended = _child(path, left, remaining, args)
            begun = None
            for line in path.read_text().splitlines():
                said = json.loads(line)
                begun = said.get("begin", begun)
                if "row" in said:
                    found["rows"][said["row"]["name"]] = said["row"]
                    begun = None
                for key in ("ceilings", "kernels", "launches"):
                    if key in said:
                        found[key] = found[key] or said[key]
                        begun = None
            if begun is not None and (row := next((r for r in left if r.name == begun), None)):
                how = "not_measured" if ended == STOPPED else "failed"
                found["rows"][begun] = {"op": row.op, "name": begun, "unit": row.unit, how: ended}
            before, left = left, [r for r in left if r.name not in found["rows"]]
            if ended and len(left) == len(before):
                found["failed"] = f"{begun or 'start'}: {ended}"
                break  # not one row: the next child would do no better
            if ended == "":
                break
    for row in rows:
        missing = {"op": row.op, "name": row.name, "unit": row.unit, "not_measured": found.get("failed", "time was up")}
        found["rows"].setdefault(row.name, missing)
    return found


def _child(path: Path, rows: list[Row], seconds: float, args: argparse.Namespace) -> str:
    """Run one child for so long; why it ended early, or "" when it did not."""
    last = time.monotonic() + seconds + GRACE
    command = [sys.executable, "-m", "bench.bench_kernels", "--worker", str(path), "--seconds", str(seconds)]
    command += ["--size", args.size, "--device", args.device, "--backend", args.backend]
    command += ["--rows", *(row.name for row in rows)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        size, changed = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            if (now := path.stat().st_size) != size:
                size, changed = now, time.monotonic()
            if time.monotonic() - changed > SILENCE:
                return f"hung for {SILENCE:.0f} s"
            if time.monotonic() > last:
                return STOPPED
    finally:
        process.kill()
        process.wait()
    return "" if process.returncode == 0 else f"the process ended with status {process.returncode}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", default=kernel_rows.OPS, choices=kernel_rows.OPS, metavar="OP")
    p.add_argument("--quick", dest="size", action="store_const", const="quick", help="one shape of each operation")
    p.add_argument("--seconds", type=float, default=280.0, help="begin no row after so long")
    p.add_argument("--json", type=Path, help="default: bench/results/kernels_<device>.json")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--backend", default=None, help="who is ours: triton; on the CPU torch")
    p.add_argument("--markdown", action="store_true", help="print README's rows instead of the table")
    for hidden in ("--size", "--worker", "--rows"):
        kind = {"--worker": {"type": Path}, "--rows": {"nargs": "*"}}.get(hidden, {})
        p.add_argument(hidden, help=argparse.SUPPRESS, **kind)
    args = p.parse_args(argv)
    args.size = args.size or ("full" if args.device == "cuda" else "tiny")
    args.backend = args.backend or ("triton" if args.device == "cuda" else "torch")
    return args


def device_name() -> str:
    """The GPU at hand, as a part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name().lower())


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows = kernel_rows.rows(args.size, args.only)
    if args.worker:
        return work_off([r for r in rows if r.name in set(args.rows)], args)
    if args.device == "cuda" and not torch.cuda.is_available():
        found = {r.name: {"op": r.op, "name": r.name, "unit": r.unit, "not_measured": "no GPU"} for r in rows}
        found = {"rows": found, "ceilings": None, "kernels": None, "launches": None}
    else:
        found = supervise(rows, args)
        if args.json or args.device == "cuda":
            facts = {k: v for k, v in found.items() if k != "rows"} | {"triton": timing.installed("triton")}
            report.write(
                args.json or report.RESULTS / f"kernels_{device_name()}.json", list(found["rows"].values()), **facts
            )
    show = readme_rows if args.markdown else table
    print("\n".join(show(list(found["rows"].values()), found["ceilings"], found["launches"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
