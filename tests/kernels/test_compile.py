"""The kernels compile for GPUs that are not there, within the baseline; and the check can fail."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import bench_compile
from bench.dry_run import compile_all
from tests.kernels.tritons import ROOT, VERSIONS, run

SECONDS = 900
BASELINES = [ROOT / f"bench/results/compile_{version}.json" for version in VERSIONS]


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("architecture", bench_compile.EVERYDAY_ARCHITECTURES)
@pytest.mark.parametrize("version", VERSIONS)
def test_no_kernel_grew(version: str, architecture: int) -> None:
    arguments = ("--arch", str(architecture), "--processes", "1")
    done = run(version, "bench.bench_compile", *arguments, interpret=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_no_kernel_grew_in_any_scene(version: str) -> None:
    done = run(version, "bench.bench_compile", "--all", interpret=False, timeout=4 * SECONDS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_the_baseline_has_no_faults_and_covers_every_scene(path: Path) -> None:
    rows = json.loads(path.read_text())["results"]
    assert bench_compile.faults(rows) == []
    scenes = {key.partition(":")[0] for key in rows}
    assert scenes == {
        f"{name}, sm_{architecture}"
        for name in bench_compile.scenes(everyday=False)
        for architecture in bench_compile.ARCHITECTURES
    }
    assert set(bench_compile.scenes(everyday=True)) <= set(bench_compile.scenes(everyday=False))


@triton.jit
def crowded_kernel(X: tl.tensor, Y: tl.tensor, M: tl.constexpr, N: tl.constexpr) -> None:
    """A product whose operands and result no one warp can hold in 255 registers a thread."""
    i, j = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + j[None, :])
    o = tl.dot(x, tl.trans(x))
    tl.store(Y + i[:, None] * M + i[None, :], tl.dot(o.to(x.dtype), x.to(tl.float32).to(x.dtype)))


def crowd(size: int, warps: int) -> None:
    x = torch.zeros(size, size, dtype=torch.bfloat16)
    crowded_kernel[(1,)](x, torch.zeros(size, size), size, size, num_warps=warps, enable_fp_fusion=True)


def rows_of(architecture: int, size: int, warps: int) -> bench_compile.Rows:
    (kernel,) = compile_all(architecture, lambda: crowd(size, warps))
    row = {column: getattr(kernel, column) for column in bench_compile.COLUMNS} | kernel.counts
    return {f"crowd, sm_{architecture}: {kernel.name}": row}


def test_a_spilling_kernel_is_reported() -> None:
    slim, crowded = rows_of(80, 32, 4), rows_of(80, 128, 1)
    assert bench_compile.faults(slim) == []
    (fault,) = bench_compile.faults(crowded)
    assert "crowd, sm_80: crowded_kernel: spills" in fault
    grown = bench_compile.growth(crowded, slim)
    assert any("registers grew from" in line for line in grown)
    assert any("spill_stores grew from 0 to" in line for line in grown)


def test_what_the_dry_run_says_is_what_was_launched() -> None:
    def launch(x: Tensor, warps: int) -> None:
        crowded_kernel[(1,)](x, torch.zeros(64, 64), 64, 64, num_warps=warps, enable_fp_fusion=True)

    wide = torch.zeros(64 * 64 + 8, dtype=torch.bfloat16)
    (aligned,) = compile_all(90, lambda: launch(wide, 4))
    assert (aligned.name, aligned.architecture, aligned.warps) == ("crowded_kernel", 90, 4)
    assert aligned.counts["HGMMA"]
    assert aligned.counts["LDG.128"]
    (shifted,) = compile_all(90, lambda: launch(wide[1:], 4))
    assert "LDG.128" not in shifted.counts
    (older,) = compile_all(80, lambda: launch(wide, 8))
    assert older.warps == 8
    assert older.counts["HMMA"]
    assert "HGMMA" not in older.counts
    # Each variant once, however often it is launched; another constant is another variant.
    assert len(compile_all(80, lambda: [launch(wide, w) for w in (4, 8, 4, 8)])) == 2
    with pytest.raises(RuntimeError):  # the stub is gone: a launch on CPU tensors fails as ever
        launch(wide, 4)


@pytest.mark.parametrize(
    ("column", "shift", "message"),
    [
        ("shared", -1, "shared grew from"),
        ("registers", -bench_compile.MORE_REGISTERS - 1, "registers grew from"),
        ("spill_stores", -1, "spill_stores grew from"),
        ("registers", -bench_compile.MORE_REGISTERS, None),
        ("registers", 9, None),
        ("shared", 9, None),
    ],
)
def test_a_doctored_baseline_fails(
    column: str,
    shift: int,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = json.loads(BASELINES[0].read_text())
    rows = document["results"]
    monkeypatch.setattr(bench_compile, "compile_scenes", lambda *_: [copy.deepcopy(rows)])
    key = next(iter(rows))
    document["results"] = {**rows, key: {**rows[key], column: rows[key][column] + shift}}
    doctored = tmp_path / "baseline.json"
    doctored.write_text(json.dumps(document))
    assert bench_compile.main(["--all", "--baseline", str(doctored)]) == (0 if message is None else 1)
    told = capsys.readouterr().err
    assert (told == "") if message is None else (f"{key}: {message}" in told)


def test_faults_and_gaps_are_named() -> None:
    good = {"registers": 9, "spill_stores": 64, "spill_loads": 64, "shared": 101376, "warps": 4, "stages": 2}
    key = "attention bf16 64 packed, sm_90: attention_dq_kernel"
    assert bench_compile.faults({"a, sm_86: k": good, key: {**good, "HGMMA": 1}}) == []
    told = bench_compile.faults(
        {"a, sm_86: k": {**good, "shared": 101377, "spill_loads": 65}, key: good, "b, sm_80": {"error": "no"}}
    )
    assert [line.partition(": ")[2].partition(" ")[0] for line in told] == ["k:", "k:", "attention_dq_kernel:", "does"]
    assert bench_compile.growth({"a, sm_80: k": good}, {}) == ["a, sm_80: k: not in the baseline"]
    assert bench_compile.growth({}, {"a, sm_80: k": good}) == ["a, sm_80: k: in the baseline only"]
    assert bench_compile.growth({}, {"a, sm_80: k": good}, lambda key: False) == []


def test_a_baseline_is_renewed_in_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the named scenes' rows are new; those of scenes that are gone go, and all stand in the scenes' order."""
    document = json.loads(BASELINES[0].read_text())
    rows = document["results"]
    asked: list[list[str]] = []

    def compiled(names: list[str], *_: object) -> list[bench_compile.Rows]:
        asked.append(names)
        return [{f"{name}, sm_80: new_kernel": next(iter(rows.values()))} for name in names]

    monkeypatch.setattr(bench_compile, "compile_scenes", compiled)
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"results": {"a scene of old, sm_80: kernel": {}, **rows}}))
    bench_compile.main(["--update", "--only", "bounded", "rope", "--baseline", str(path)])
    (names,) = asked
    assert "decode bf16 128 bounded" in names
    assert all("bounded" in name or "rope" in name for name in names)
    renewed = json.loads(path.read_text())["results"]
    of_names = {key for key in renewed if bench_compile.scene_of(key) in names}
    assert of_names == {f"{name}, sm_80: new_kernel" for name in names}
    others = {key: row for key, row in renewed.items() if key not in of_names}
    assert others == {key: row for key, row in rows.items() if bench_compile.scene_of(key) not in names}
    order = list(bench_compile.scenes(everyday=False))
    places = [order.index(bench_compile.scene_of(key)) for key in renewed]
    assert places == sorted(places)
    with pytest.raises(SystemExit):
        bench_compile.main(["--only", "no such scene"])
