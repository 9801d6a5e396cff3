"""Verdicts and the table, on results made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernel_table import Verdict, readme_rows, speed, table, verdicts

CEILINGS = {"copy_bytes_per_second": 4e12, "product_flops": 800e12}
Result = dict[str, Any]


def result(unit: str = "TFLOP/s", targets: list[tuple[str, float, bool]] = (), **implementations: Result) -> Result:
    """A row that was measured; ours at 100 units if not given."""
    found = {"ours": ran(100, unit)} | implementations
    named = [{"versus": versus, "factor": factor, "memory": memory} for versus, factor, memory in targets]
    return {"op": "attention", "name": "a row", "unit": unit, "implementations": found, "targets": named}


def ran(units: float, unit: str = "TFLOP/s", right: bool = True, **more: object) -> Result:
    return {"per_second": units * {"TFLOP/s": 1e12, "GB/s": 1e9}[unit], "right": right, **more}


def only(r: Result, ceilings: dict[str, float] | None = CEILINGS) -> Verdict:
    (verdict,) = verdicts(r, ceilings)
    return verdict


@pytest.mark.parametrize(
    ("theirs", "factor", "ratio", "met"),
    [(80, 1.0, "1.25x", "yes"), (100, 1.0, "1.00x", "yes"), (101, 1.0, "0.99x", "no"), (110, 0.9, "0.91x", "yes")],
)
def test_faster_or_slower_than_a_peer(theirs: float, factor: float, ratio: str, met: str) -> None:
    v = only(result(targets=[("peer", factor, False)], peer=ran(theirs)))
    expected = Verdict("a row", "100 TFLOP/s", f"peer {theirs} TFLOP/s", ratio, f">= {factor:.2f}x", met)
    assert v == expected


def test_a_wrong_result_meets_nothing_however_fast() -> None:
    targets = [("peer", 1.0, False), ("copy", 0.1, False), ("peer", 0.5, True)]
    ours = ran(3000, "GB/s", right=False, peak_bytes=2**20)
    lines = verdicts(result("GB/s", targets, ours=ours, peer=ran(1, "GB/s", peak_bytes=2**30)), CEILINGS)
    assert [v.met for v in lines] == ["no", "no", "no"]
    assert lines[0].ours == "WRONG 3,000 GB/s"


def test_a_wrong_peer_is_nothing_to_be_measured_by() -> None:
    v = only(result(targets=[("peer", 1.0, False)], peer=ran(50, right=False)))
    assert (v.peer, v.met) == ("peer WRONG 50 TFLOP/s", "no peer")


@pytest.mark.parametrize("theirs", [{"absent": "not installed"}, {"failed": "RuntimeError: no"}, None])
def test_a_peer_that_did_not_run_is_no_peer(theirs: Result | None) -> None:
    peers = {} if theirs is None else {"peer": theirs}
    v = only(result(targets=[("peer", 1.0, False)], **peers))
    assert (v.ratio, v.met) == ("", "no peer")
    assert v.peer.startswith("peer " + next(iter(theirs or {"absent": 0})))


@pytest.mark.parametrize(("factor", "met"), [(0.8, "yes"), (0.9, "yes"), (0.91, "no")])
def test_a_share_of_the_copy(factor: float, met: str) -> None:
    v = only(result("GB/s", [("copy", factor, False)], ours=ran(3600, "GB/s")))
    assert (v.peer, v.ratio, v.hoped, v.met) == ("copy 4,000 GB/s", "90%", f">= {factor:.0%}", met)


def test_without_ceilings_there_is_no_copy() -> None:
    v = only(result("GB/s", [("copy", 0.8, False)], ours=ran(3600, "GB/s")), None)
    assert (v.peer, v.ratio, v.met) == ("copy: not measured", "", "no peer")


@pytest.mark.parametrize(("ours", "met"), [(300, "yes"), (334, "no"), (None, "no peer")])
def test_memory_is_hoped_to_be_less(ours: int | None, met: str) -> None:
    mine = ran(100, peak_bytes=None if ours is None else ours * 2**20)
    v = only(result(targets=[("plain", 1 / 3, True)], ours=mine, plain=ran(1, peak_bytes=1000 * 2**20)))
    assert (v.ours, v.peer) == ("-" if ours is None else f"{ours} MiB", "plain 1,000 MiB")
    assert (v.hoped, v.met) == ("<= 0.33x", met)


def test_peers_without_a_target_are_shown_and_not_judged() -> None:
    lines = verdicts(result(targets=[("peer", 1.0, False)], peer=ran(50), other=ran(200), gone={"absent": "x"}), None)
    assert [(v.peer, v.ratio, v.met) for v in lines] == [
        ("peer 50 TFLOP/s", "2.00x", "yes"),
        ("other 200 TFLOP/s", "0.50x", ""),
    ]
    assert only(result()) == Verdict("a row", "100 TFLOP/s", "", "", "", "")


NOT_MEASURED = {"op": "norm", "name": "unmeasured", "unit": "GB/s", "not_measured": "no GPU"}
CRASHED = {"op": "norm", "name": "crashed", "unit": "GB/s", "failed": "the process ended with status -11"}
UNBUILT = {**CRASHED, "name": "unbuilt", "failed": "OutOfMemoryError", "implementations": {}, "targets": []}


def test_what_was_not_measured_and_what_failed() -> None:
    assert only(NOT_MEASURED) == Verdict("unmeasured", "not measured", "no GPU", "", "", "")
    assert only(CRASHED).ours == "failed: the process ended with status -11"
    assert only(UNBUILT).met == only(CRASHED).met == "no"
    for ours, why in (({"failed": "ValueError: no"}, "ValueError: no"), ({"absent": "gone"}, "gone")):
        v = only(result(targets=[("peer", 1.0, False)], ours=ours, peer=ran(1)))
        assert (v.ours, v.met) == (f"failed: {why}", "no")


def test_launch_bound_figures_are_marked() -> None:
    assert speed(ran(2, launches_hidden=False), "TFLOP/s") == "2 TFLOP/s (launch-bound)"
    assert speed(ran(1234.4, "GB/s", launches_hidden=True), "GB/s") == "1,234 GB/s"


def test_the_table_counts_and_lines_up() -> None:
    good = result(targets=[("peer", 1.0, False), ("other", 1.0, False)], peer=ran(50), other=ran(200))
    launches = {"rope": {"ours": 7.5, "torch": 30.0}, "swiglu": {"ours failed": "x", "torch": 4.0}}
    lines = table([good, NOT_MEASURED, CRASHED, UNBUILT], CEILINGS, launches)
    assert lines[-1] == "1 of 4 rows measured; 1 of 4 targets met"
    assert lines[-2] == "CPU microseconds to ask for one, ours / torch: rope 7.5 / 30.0, swiglu - / 4.0"
    assert lines[-3] == "ceilings in this run: copy 4,000 GB/s, matrix product 800 TFLOP/s"
    first, second = (next(line for line in lines if name in line) for name in ("peer 50", "other 200"))
    assert first.startswith("a row")
    assert second.startswith(" " * len("a row"))  # the name stands once
    assert "100 TFLOP/s" in first
    assert "100 TFLOP/s" not in second
    assert first.index("peer 50") == second.index("other 200") == lines[0].index("peer")


def test_a_table_of_nothing() -> None:
    assert table([], None, None)[-1] == "0 of 0 rows measured; 0 of 0 targets met"


def test_rows_of_readme_have_the_same_cells() -> None:
    good = result(targets=[("peer", 1.0, False)], peer=ran(50))
    head, rule, *rows = readme_rows([good, NOT_MEASURED], CEILINGS, None)
    assert rows[0] == "| a row | 100 TFLOP/s | peer 50 TFLOP/s | 2.00x | >= 1.00x | yes |"
    assert all(row.count("|") == head.count("|") == rule.count("|") for row in rows)
