"""Every file of on_device/ in Triton's interpreter, in a process of its own, under each triton version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernels.tritons import ROOT, VERSIONS, run, tail

FILES = sorted(Path(__file__).parent.glob("on_device/test_*.py"))
SECONDS = 900  # two cores may be shared by many


def complaint(code: int, output: str) -> str | None:
    """What is wrong with an inner run; None when it ran some tests, all of them passed, and skips need a device."""
    if code:
        return f"exit code {code}"
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", output.splitlines()[-1])}
    if not counts.get("passed"):
        return "no test ran"
    skips = re.findall(r"^SKIPPED \[(\d+)\] (.*)", output, re.MULTILINE)
    if counts.get("skipped", 0) != sum(int(n) for n, _ in skips):
        return "a skipped test without a reason"
    unexplained = [reason for _, reason in skips if not re.search(r"needs a .*device", reason)]
    return f"skipped: {unexplained}" if unexplained else None


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("triton", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_are_right(file: Path, triton: str) -> None:
    inner = ["-q", "-p", "no:cacheprovider", str(file.relative_to(ROOT))]
    done = run(triton, "pytest", *inner, interpret=True, timeout=SECONDS)
    wrong = complaint(done.returncode, done.stdout)
    assert wrong is None, f"{file.name}, triton {triton}: {wrong}\n{tail(done.stdout)}"


@pytest.mark.parametrize(
    ("code", "output", "wrong"),
    [
        (0, "....\n4 passed in 0.1s", None),
        (0, "SKIPPED [2] a.py:1: needs a CUDA device\n4 passed, 2 skipped in 0.1s", None),
        (1, "4 passed, 1 failed in 0.1s", "exit code 1"),
        (-11, "Fatal Python error", "exit code -11"),
        (0, "no tests ran in 0.1s", "no test ran"),
        (0, "SKIPPED [1] a.py:1: too slow\n4 passed, 1 skipped in 0.1s", "skipped: ['a.py:1: too slow']"),
        (0, "4 passed, 1 skipped in 0.1s", "a skipped test without a reason"),
    ],
)
def test_an_inner_run_is_judged(code: int, output: str, wrong: str | None) -> None:
    assert complaint(code, output) == wrong
