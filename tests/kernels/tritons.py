"""The triton versions that the kernels are proven under: the installed one, and 3.6 where it lies beside."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BESIDE = Path(sys.prefix) / "triton-3.6"  # where the Makefile puts it, with a numpy that it can work with
pytest.importorskip("triton", reason="triton is for Linux alone")
INSTALLED = version("triton")
VERSIONS = [INSTALLED, "3.6.0"]


def run(triton: str, module: str, *arguments: str, interpret: bool, timeout: float) -> subprocess.CompletedProcess[str]:
    """python -m module arguments, in a process of its own with that triton; stderr goes into stdout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    if triton != INSTALLED:
        if not (BESIDE / "triton").is_dir():
            pytest.skip(f"triton {triton} is not beside: make test puts it into {BESIDE}")
        environment["PYTHONPATH"] = str(BESIDE)
    # That the version is the wanted one is part of the proof.
    code = f"import runpy, sys, triton; assert triton.__version__ == {triton!r}, triton.__file__; "
    code += f"sys.argv[1:] = {list(arguments)!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=environment,
        timeout=timeout,
        check=False,
    )


def tail(text: str, lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-lines:])
