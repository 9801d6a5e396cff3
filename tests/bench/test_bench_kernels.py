"""bench_kernels end to end on a CPU; what is wrong, fails, dies or hangs is reported and loses nothing else."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from bench import bench_kernels, kernel_rows, timing
from bench.kernel_table import table
from bench.kernel_work import Absent, Part, Row, Setting, Target, Work

CPU = Setting(torch.device("cpu"), torch.float32, "eager")


@pytest.fixture(autouse=True)
def auto_again() -> Iterator[None]:
    yield
    kernels.use("auto")


def test_end_to_end_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    assert bench_kernels.main(["--device", "cpu", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    results = {r["name"]: r for r in document["results"]}
    assert list(results) == [row.name for row in kernel_rows.rows("tiny")]
    for name, r in results.items():
        assert "failed" not in r, name
        for who in {"ours", "compiled", "plain"} & set(r["implementations"]):
            found = r["implementations"][who]
            assert found["right"], (name, who, found)
            assert found["per_second"] == pytest.approx(r["work"] / found["seconds"])
    operations = {"attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy", "quantised_linear"}
    assert set(document["launches"]) == operations
    assert all("ours" in t and "torch" in t for t in document["launches"].values())
    assert document["ceilings"]["copy_bytes_per_second"] > 0
    assert document["kernels"].startswith("kernels: torch")
    assert f"{len(results)} of {len(results)} rows measured" in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_every_row_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    assert bench_kernels.main(["--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = kernel_rows.rows("full")
    assert sum("not measured  no GPU" in line for line in lines) == len(rows)
    assert lines[-1] == f"0 of {len(rows)} rows measured; 0 of 0 targets met"
    assert not path.exists()
    bench_kernels.main(["--quick", "--only", "rope", "--markdown"])
    assert capsys.readouterr().out.count("| not measured | no GPU |") == 2


# ---- one row ----


def row_of(**calls: Callable[[], Callable[[int], tuple[Tensor, ...]]]) -> Row:
    """A row whose results should be 1 and 2."""
    exact = [Part(lambda o, i=i: o[i], torch.tensor([i + 1.0])) for i in range(2)]
    return Row("op", "name", "GB/s", lambda s: Work(calls, lambda: exact, 1e9, 1e-4), [Target("copy", 0.5)], True)


def giving(*numbers: float) -> Callable[[], Callable[[int], tuple[Tensor, ...]]]:
    return lambda: lambda i: tuple(torch.tensor([n]) for n in numbers)


def raising(error: Exception, after: int = 0) -> Callable[[], Callable[[int], tuple[Tensor, ...]]]:
    """A call that is right until so many calls were made."""
    made: list[int] = []

    def call(i: int) -> tuple[Tensor, ...]:
        made.append(i)
        if len(made) > after:
            raise error
        return torch.tensor([1.0]), torch.tensor([2.0])

    return lambda: call


def measured(row: Row) -> dict[str, Any]:
    return bench_kernels.measure(row, CPU, timing.Clock(CPU.device), 3)


def test_right_and_wrong_implementations() -> None:
    found = measured(
        row_of(ours=giving(1, 2), wrong=giving(1, 2.1), nan=giving(1, math.nan), first=giving(math.nan, 2))
    )["implementations"]
    assert {name: f["right"] for name, f in found.items()} == {
        "ours": True,
        "wrong": False,
        "nan": False,
        "first": False,
    }
    assert math.isnan(found["nan"]["error"])
    assert all(len(f["passes"]) == 3 and f["peak_bytes"] is None for f in found.values())
    assert found["ours"]["per_second"] == pytest.approx(1e9 / found["ours"]["seconds"])


def test_a_wrong_result_is_shown_as_wrong() -> None:
    lines = table(
        [measured(row_of(ours=giving(1, math.nan)))], {"copy_bytes_per_second": 1.0, "product_flops": 1}, None
    )
    assert "WRONG" in lines[1]
    assert lines[-1] == "1 of 1 rows measured; 0 of 1 targets met"


def test_what_fails_is_named_and_loses_nothing_else() -> None:
    def nowhere() -> Callable[[int], tuple[Tensor, ...]]:
        raise Absent("not installed: pip install it")

    found = measured(
        row_of(
            ours=giving(1, 2),
            at_once=raising(ValueError("bad\n  shape " + "x" * 500)),
            later=raising(RuntimeError("worn out"), after=5),
            gone=nowhere,
            last=giving(1, 2),
        )
    )["implementations"]
    assert found["at_once"]["failed"].startswith("ValueError: bad shape x")
    assert len(found["at_once"]["failed"]) == 200
    assert found["later"]["failed"] == "RuntimeError: worn out"
    assert found["later"]["right"]  # it was, before it failed
    assert found["gone"] == {"absent": "not installed: pip install it"}
    assert [name for name, f in found.items() if "per_second" in f] == ["ours", "last"]


def test_a_row_that_cannot_be_built_is_a_failed_row() -> None:
    def build(s: Setting) -> Work:
        raise torch.OutOfMemoryError("no room")

    result = measured(Row("op", "name", "GB/s", build))
    assert result["failed"] == "OutOfMemoryError: no room"
    assert "failed: OutOfMemoryError: no room" in table([result], None, None)[1]


def test_a_lost_device_ends_the_row_and_says_by_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    result = {"implementations": {"ours": {"right": True}, "peer": {}}}
    with pytest.raises(bench_kernels.DeviceLost) as caught:
        bench_kernels._failed("peer", RuntimeError("x"), Setting(torch.device("cuda")), result)
    carried = json.loads(str(caught.value))
    assert carried["failed"] == "the device was lost by peer"
    assert carried["implementations"] == {"ours": {"right": True}, "peer": {"failed": "RuntimeError: x"}}


def test_launches_are_asked_of_both_and_the_backend_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: 1 / 0)
    found = bench_kernels.launches(CPU, timing.Clock(CPU.device), "torch")
    assert found["swiglu"] == {f"{who} failed": "ZeroDivisionError: division by zero" for who in ("ours", "torch")}
    assert found["rope"]["ours"] > 0
    assert found["rope"]["torch"] > 0
    assert "torch" in kernels.describe()


# ---- children ----

# Stands in for the interpreter that runs a child: no torch, and each row does what its name says.
CHILD = """#!{python} -SE
import json, os, sys, time
at = sys.argv.index
path, names = sys.argv[at("--worker") + 1], sys.argv[at("--rows") + 1 :]
with open(path, "a", buffering=1) as lines:
    def say(**what):
        lines.write(json.dumps(what) + "\\n")
    say(begin="ceilings")
    if "{early}" == "die":
        sys.exit(5)
    say(ceilings={{"copy_bytes_per_second": float(os.getpid()), "product_flops": 1.0}})
    if "{early}" == "no kernels":
        sys.exit(6)
    say(kernels="kernels: none")
    for name in names:
        say(begin=name)
        if name.startswith("dies"):
            os.abort()
        if name.startswith("hangs"):
            time.sleep(600)
        found = {{"op": "op", "name": name, "unit": "GB/s", "targets": []}}
        if name.startswith("loses"):
            say(row=found | {{"failed": "the device was lost by ours", "implementations": {{}}}})
            sys.exit(3)
        say(row=found | {{"implementations": {{"ours": {{"per_second": 1.0, "right": True}}}}}})
    say(begin="launches")
    say(launches={{}})
"""


@pytest.fixture
def supervise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """supervise(name, ..., early="", seconds=60): what the parent finds for rows of these names."""

    def supervise(*names: str, early: str = "", seconds: float = 60.0) -> dict[str, Any]:
        child = tmp_path / "child"
        child.write_text(CHILD.format(python=os.path.realpath(sys.executable), early=early))
        child.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(child))
        rows = [Row("op", name, "GB/s", lambda s: None) for name in names]
        args = bench_kernels.parse(["--device", "cpu", "--seconds", str(seconds)])
        return bench_kernels.supervise(rows, args)

    return supervise


def test_a_child_that_dies_or_loses_the_device_loses_only_its_row(supervise: Callable[..., dict[str, Any]]) -> None:
    found = supervise("a", "dies first", "b", "loses the device", "c", "dies last")
    rows = found["rows"]
    assert rows["dies first"]["failed"] == rows["dies last"]["failed"] == "the process ended with status -6"
    assert rows["loses the device"]["failed"] == "the device was lost by ours"
    assert all("failed" not in rows[name] and "implementations" in rows[name] for name in "abc")
    assert "3 of 6 rows measured" in table(list(rows.values()), found["ceilings"], None)[-1]
    assert "failed" not in found


def test_a_child_that_hangs_loses_only_its_row(
    supervise: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "SILENCE", 1.0)
    begin = time.monotonic()
    rows = supervise("a", "hangs", "b")["rows"]
    assert rows["hangs"]["failed"].startswith("hung for")
    assert "implementations" in rows["a"]
    assert "implementations" in rows["b"]
    assert time.monotonic() - begin < 30


def test_a_row_that_outlasts_the_time_is_stopped(
    supervise: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "GRACE", 0.5)
    rows = supervise("a", "hangs", "b", seconds=1.0)["rows"]
    assert rows["hangs"]["not_measured"] == bench_kernels.STOPPED
    assert rows["b"]["not_measured"] == "time was up"
    assert "implementations" in rows["a"]


@pytest.mark.parametrize(
    ("early", "why"),
    [("die", "ceilings: the process ended with status 5"), ("no kernels", "start: the process ended with status 6")],
)
def test_where_no_row_begins_no_second_child_is_tried(
    supervise: Callable[..., dict[str, Any]], early: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []
    child = bench_kernels._child
    monkeypatch.setattr(bench_kernels, "_child", lambda *args: children.append(0) or child(*args))
    found = supervise("a", "b", early=early)
    assert len(children) == 1
    assert {r["not_measured"] for r in found["rows"].values()} == {why}
    assert found["failed"] == why


def test_the_first_ceilings_stay(supervise: Callable[..., dict[str, Any]]) -> None:
    found = supervise("a", "dies", "b")
    assert found["ceilings"]["product_flops"] == 1.0
    assert found["kernels"] == "kernels: none"
    assert found["launches"] == {}
