"""The cost model: what docs/scaling.md prints, and limits that hold for any machine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from bench import scaling
from llama.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
C = PRESETS["llama3-8b"]


@pytest.mark.parametrize("flags", [[], ["--model", "7b", "--tokens", "4096", "--row", "512"]])
def test_the_page_holds_what_the_script_prints(flags: list[str]) -> None:
    done = subprocess.run([sys.executable, "bench/scaling.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n\n")[0] in (ROOT / "docs/scaling.md").read_text()


def test_published_rows_are_met_within_six_percent() -> None:
    predicted, published = scaling.check()
    assert abs(predicted / published - 1) <= 0.06
    assert f"{predicted:,.0f} for 64" in (ROOT / "docs/scaling.md").read_text()


def test_no_traffic_no_loss_and_hybrid_is_full_within_a_node() -> None:
    fast = dataclasses.replace(scaling.Machine(), nvlink=1e18, network=1e18, hop=0.0)
    for gpus in (8, 64, 1024):
        for hybrid in (False, True):
            seconds, work = scaling.step_seconds(C, gpus, hybrid, 4096, 4096, fast)
            assert seconds == pytest.approx(work, rel=1e-6)
    machine = scaling.Machine()
    one_node = [scaling.step_seconds(C, 8, hybrid, 4096, 4096, machine) for hybrid in (False, True)]
    assert one_node[0] == one_node[1]
    slower = [scaling.step_seconds(C, n, False, 4096, 4096, machine)[0] for n in (8, 16, 64, 512)]
    assert slower == sorted(slower)
