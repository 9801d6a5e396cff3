"""The sweep of attention tiles: candidates, one kernel alone, what is admissible, what is fastest, time limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is for Linux alone")

import triton

from bench import bench_tiles
from bench.bench_tiles import SHAPES, Candidate, Rows
from bench.kernel_work import Setting
from kernels import flash
from kernels.flash import Tiles

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = Setting(torch.device("cpu"), torch.float32, "eager")
MOST_SPILLED_BY_THE_TABLE = 12  # bytes, as flash.py says
RECORDED = sorted((ROOT / "bench/results").glob("tiles_[0-9]*.json"))


def of(m: int, n: int = 64, kernel: str = "dq", arch: int = 90, head: int = 64, dtype: str = "bf16") -> Candidate:
    return Candidate(kernel, arch, head, dtype, Tiles(m, n, 4, 2))


@pytest.mark.parametrize("kernel", bench_tiles.KERNELS)
@pytest.mark.parametrize(("head", "dtype"), [(128, "bf16"), (64, "fp16"), (128, "fp32")])
def test_candidates_begin_with_the_tables(kernel: str, head: int, dtype: str) -> None:
    found = bench_tiles.candidates(kernel, 90, head, dtype)
    size = 4 if dtype == "fp32" else 2
    assert found[0].tiles == flash.TILES[found[0].entry] == flash.tiles(kernel, 90, head, size)
    assert len(set(found)) == len(found) > 10
    for c in found:
        assert bench_tiles.crowd(kernel, head, c.tiles) <= bench_tiles.LARGEST_CROWD or c is found[0]
        assert c.tiles.m >= (32 if size == 2 else 16)
    chosen = bench_tiles.candidates(kernel, 90, head, dtype, [Tiles(16, 16, 4, 1), found[0].tiles])
    assert [c.tiles for c in chosen] == [found[0].tiles, Tiles(16, 16, 4, 1)]


def test_a_thread_holds_accumulators_and_scores() -> None:
    t = Tiles(64, 128, 8, 2)
    assert bench_tiles.crowd("forward", 32, t) == (64 * 32 + 64 * 128) / 256  # o; scores
    assert bench_tiles.crowd("dkdv", 32, t) == (2 * 128 * 32 + 2 * 64 * 128) / 256  # dk and dv; p and ds
    assert bench_tiles.crowd("dq", 32, t) == (64 * 32 + 2 * 64 * 128) / 256  # dq; p and ds


@pytest.mark.parametrize(
    ("arch", "dtype", "figures", "fit"),
    [
        (90, "bf16", {}, True),
        (90, "bf16", {"spill_stores": 4}, False),
        (90, "bf16", {"spill_loads": 4}, False),
        (90, "bf16", {"shared": 232448}, True),
        (90, "bf16", {"shared": 232449}, False),
        (80, "bf16", {"shared": 99 * 1024}, True),
        (80, "bf16", {"shared": 99 * 1024 + 1}, False),  # an A100 has more; sm_86 shares the entry
        (120, "bf16", {"shared": 99 * 1024 + 1}, False),
        (80, "fp32", {"shared": 99 * 1024 + 1}, False),
        (90, "fp32", {"shared": 99 * 1024 + 1}, True),
    ],
)
def test_admissible_is_no_spill_and_room_for_all_who_share_the_entry(
    arch: int, dtype: str, figures: dict[str, int], fit: bool
) -> None:
    row = {"spill_stores": 0, "spill_loads": 0, "shared": 1024} | figures
    assert bench_tiles.admissible(of(64, arch=arch, dtype=dtype), row) is fit


def test_one_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **constants: launched.append(f"{self.name} {constants.get('BLOCK_M')}")

    for name in ("forward", "delta", "dkdv", "dq"):
        monkeypatch.setattr(flash, f"attention_{name}_kernel", Kernel(name))
    monkeypatch.setattr(flash, "architecture", lambda device: 90)
    q = torch.zeros(1, 32, 2, 64, dtype=torch.bfloat16)
    tensors = [q, q, q, q, q, torch.zeros(1, 2, 32)]
    for kernel, wanted in (
        ("forward", ["forward 16"]),
        ("dkdv", ["delta 64", "dkdv 16"]),
        ("dq", ["delta 64", "dq 16"]),
    ):
        launched.clear()
        results = bench_tiles.results(of(16, kernel=kernel), tensors, None)
        assert launched == wanted
        assert len(results) == (1 if kernel == "dq" else 2)
        assert flash.OVERRIDE == {}
    with pytest.raises(ZeroDivisionError), bench_tiles.only("dq", Tiles(16, 16, 4, 1)):
        _ = 1 / 0
    assert flash.OVERRIDE == {}
    assert isinstance(flash.attention_dkdv_kernel, Kernel)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
def test_a_candidate_is_compiled_by_the_launch_code() -> None:
    _, row = bench_tiles.compile_one(of(64, 32))
    assert row["admissible"]
    assert (row["warps"], row["stages"], row["spill_stores"]) == (4, 2, 0)
    # The tiles of q and of the gradient, and two stages of keys and of values, beside a little.
    tiles = 2 * 64 * (2 * 64 + 2 * 2 * 32)
    assert tiles <= row["shared"] <= 1.3 * tiles
    assert row["programs"] == min(
        65536 // (32 * 4 * -(-row["registers"] // 8) * 8), 228 * 1024 // (row["shared"] + 1024)
    )
    crowded, row = bench_tiles.compile_one(of(64, 64, arch=80, head=128))
    assert row["spill_stores"] > 0
    assert not row["admissible"]
    assert "NOT admissible" in bench_tiles.verdict({crowded: row})


def test_what_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(bench_tiles, "compile_all", broken)
    _, row = bench_tiles.compile_one(of(64))
    assert row == {"failed": "RuntimeError: PassManager::run failed", "admissible": False}


def test_compiling_ends_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = {"registers": 100, "admissible": True}

    def compile_one(c: Candidate) -> tuple[Candidate, dict[str, Any]]:
        if c.tiles.m == 64:
            time.sleep(20)
        return c, figures

    monkeypatch.setattr(bench_tiles, "compile_one", compile_one)
    monkeypatch.setattr(bench_tiles, "CACHE", tmp_path / "cache")
    threads = SimpleNamespace(Pool=ThreadPool)
    monkeypatch.setattr(bench_tiles.multiprocessing, "get_context", lambda how: threads)
    cs = [of(128), of(64), of(32)]
    begin = time.monotonic()
    for limit in ({"deadline": begin + 0.5}, {"deadline": begin + 600}):
        monkeypatch.setattr(bench_tiles, "SLOWEST", 600.0 if limit["deadline"] < begin + 1 else 0.5)
        found = bench_tiles.compile_them(cs, 2, **limit)
        assert list(found) == cs
        assert [row.get("failed") for row in found.values()] == [None, "time was up", None]
        assert not found[cs[1]]["admissible"]
    assert time.monotonic() - begin < 15


# ---- timing, with arithmetic in the kernels' place ----


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rows]:
    """timed(deadline): rows of three tiles, the table's first, after both shapes; the last gives wrong results."""

    def results(c: Candidate, tensors: list[Tensor], documents: object) -> tuple[Tensor, ...]:
        if c.tiles.n == 16:
            raise RuntimeError("out of resource: shared memory")
        time.sleep({128: 0.004, 64: 0.001, 32: 0.0}[c.tiles.m])
        return (tensors[0] * (2.0 if c.tiles.m > 32 else 2.1),)

    monkeypatch.setattr(bench_tiles, "results", results)
    monkeypatch.setattr(flash, "attention_forward", lambda q, *_: (q, torch.zeros(1)))

    def timed(deadline: float = 1e12) -> Rows:
        group: Rows = {of(m, n): {"admissible": True} for m, n in ((128, 64), (64, 64), (32, 64), (128, 16))}
        for name, shape in SHAPES.items():
            bench_tiles.time_them(group, name, shape | bench_tiles.TINY, CPU, deadline)
        return group

    return timed


def test_the_fastest_right_tiles_are_named(timed: Callable[..., Rows]) -> None:
    group = timed()
    own, fast, wrong, failing = group.values()
    for name in SHAPES:
        assert own[name]["right"]
        assert own[name]["error"] == 0
        assert fast[name]["seconds"] < own[name]["seconds"]
        assert wrong[name]["right"] is False
        assert failing[name] == {"failed": "RuntimeError: out of resource: shared memory"}
    said = bench_tiles.fastest(group)
    assert said.startswith('    ("dq", 90, 64, 2): Tiles(64, 64, 4, 2),  # time beside the table\'s: packed 0.')
    entry, _, tiles = said.partition("#")[0].strip().rstrip(",").partition(": ")
    assert flash.TILES.keys() >= {eval(entry)}
    assert eval(tiles) == Tiles(64, 64, 4, 2)


def test_nothing_is_fastest_where_nothing_was_timed(timed: Callable[..., Rows]) -> None:
    group = timed(deadline=0.0)
    assert all(row["causal"] == {"failed": "TimeoutError: time was up"} for row in group.values())
    assert "was not timed" in bench_tiles.fastest(group)


def test_what_was_found_before_the_device_is_lost_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def time_them(group: Rows, name: str, *_: object) -> None:
        if name == "causal":
            raise RuntimeError("CUDA error: an illegal memory access")
        for c, row in group.items():
            row[name] = {"seconds": 1.0, "right": c.tiles != Tiles(16, 16, 4, 1)}

    monkeypatch.setattr(bench_tiles.launch, "interpreting", lambda: True)
    monkeypatch.setattr(bench_tiles, "time_them", time_them)
    path = tmp_path / "tiles.json"
    arguments = ["--device", "cpu", "--kernels", "dq", "--head", "64", "--json", str(path)]
    with triton.knobs.cache.scope():
        assert bench_tiles.main([*arguments, "--tiles", "16x16x4x1"]) == 1
        assert bench_tiles.main([*arguments, "--tiles", "16x16x4x2"]) == 0
    own, other = json.loads(path.read_text())["results"].values()
    assert own == other == {"admissible": True, "packed": {"seconds": 1.0, "right": True}}
    said = capsys.readouterr().out
    assert said.count("causal: RuntimeError: CUDA error: an illegal memory access") == 2
    assert said.count("WRONG") == 1
    assert "WRONG: dq sm_0 bf16 64: 16x16x4x1" in said


def test_larger_tiles_are_named() -> None:
    fit = {"admissible": True}
    assert "larger: 128x64x4x2" in bench_tiles.verdict({of(64): fit, of(128): fit, of(64, 128): {"admissible": False}})
    said = bench_tiles.verdict({of(64): fit, of(32, 128): fit})
    assert said == "dq sm_90 bf16 64: 64x64x4x2, the table's: admissible; of 2 tiles 2 are; larger: none"


def test_end_to_end_interpreted(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    command = [sys.executable, "-m", "bench.bench_tiles", "--device", "cpu", "--dtype", "fp32", "--head", "16"]
    done = subprocess.run(
        [*command, "--kernels", "dkdv", "--tiles", "32x64x4x1", "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["results"]
    assert list(rows) == ["dkdv sm_0 fp32 16: 32x32x8x1", "dkdv sm_0 fp32 16: 32x64x4x1"]
    for row in rows.values():
        assert all(row[name]["right"] and row[name]["seconds"] > 0 for name in SHAPES)
    assert '("dkdv", 80, 128, 4): Tiles(' in done.stdout


def test_the_cpu_only_interprets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_tiles.parse(["--device", "cpu"])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


# ---- the recorded sweeps ----


def test_sweeps_are_recorded_under_both_tritons() -> None:
    assert [path.stem for path in RECORDED] == ["tiles_3.6.0", "tiles_3.9.0"]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_tables_tiles_are_admissible_but_for_a_few_bytes(path: Path) -> None:
    rows = json.loads(path.read_text())["results"]
    for (kernel, arch, head, size), t in flash.TILES.items():
        if size == 2:
            c = Candidate(kernel, arch, head, "bf16", t)
            row = rows[str(c)]
            assert max(row["spill_stores"], row["spill_loads"]) <= MOST_SPILLED_BY_THE_TABLE, f"{c}: {row}"
            assert bench_tiles.admissible(c, row | {"spill_stores": 0, "spill_loads": 0}), f"{c}: {row}"
