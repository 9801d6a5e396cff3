"""Compiles every kernel that ordinary code launches, for a GPU that is not there, and says what the code became.

    with dry_run(90) as kernels:
        flash.attention(q, k, v).sum().backward()  # CPU tensors; their numbers are garbage
    for kernel in kernels: print(kernel)

Triton is told that the active device is an sm_90, and each launch is turned into a compilation. As the project's own
launch code runs, forward and backward, what is compiled is what a GPU would run: types, constants, alignment, warps,
stages. There is no table of signatures that could drift. Registers, spills, shared memory and instructions are read
from the machine code with the tools that triton brings along. Used by bench_compile.py; works with triton 3.6 to 3.9.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Shared memory that one program may have, in bytes: what a multiprocessor has, less the 1 KiB that the system takes
# for each program. From sm_90 on, the tools count that KiB in.
SYSTEM_SHARED = 1024
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# What to count in the machine code. HGMMA: Hopper's matrix products; HMMA: those of all others. UTMALDG, UTMASTG:
# bulk copies to and from shared memory by descriptor; LDGSTS: asynchronous ones by address. LDG, STG: loads and
# stores of a thread.
COUNTED = {
    "HGMMA": r"HGMMA\b",
    "HMMA": r"HMMA\b",
    "UTMALDG": r"UTMALDG\b",
    "UTMASTG": r"UTMASTG\b",
    "LDGSTS": r"LDGSTS\b",
    "LDG": r"LDG\b",
    "LDG.128": r"LDG\.[\w.]*128\b",
    "STG": r"STG\b",
    "STG.128": r"STG\.[\w.]*128\b",
}
READING = 2  # of the machine code; to be raised with any change of what read() keeps on disk


@dataclass(frozen=True)
class Compiled:
    """What one kernel became. registers: of a thread; spills and shared memory: bytes of a thread, of a program."""

    name: str
    architecture: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    stages: int
    counts: dict[str, int]


class StubDriver:
    """What the launch code and triton ask a driver before they compile; no more, so that running fails."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # triton keeps compiled kernels by device: here, by architecture

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def dry_run(architecture: int, cache: Path | None = None) -> Iterator[list[Compiled]]:
    """Collect every kernel launched inside, compiled once per variant; autograd on CPU tensors included.

    cache: where compiled kernels are kept, for a second run; triton's key covers sources, options and versions. A
    temporary directory without it. Not to be nested, nor used by two threads at a time.
    """
    assert not os.environ.get("TRITON_INTERPRET"), "an interpreted kernel cannot be compiled: unset TRITON_INTERPRET"
    found: list[Compiled] = []
    seen: set[str] = set()
    launch, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(read(kernel, architecture, folder))
        return kernel

    with tempfile.TemporaryDirectory() as temporary, triton.knobs.cache.scope():
        folder = cache or Path(temporary)
        triton.knobs.cache.dir = str(folder)
        JITFunction.run = compile_only
        driver.set_active(StubDriver(architecture))
        try:
            yield found
        finally:
            JITFunction.run = launch
            driver._active = active


def read(kernel: Any, architecture: int, folder: Path) -> Compiled:
    """The kernel's figures; kept beside triton's own cache under the same key, as disassembling takes half a second."""
    kept = folder / f"{kernel.hash}.read-{READING}.json"
    if kept.exists():
        return Compiled(**json.loads(kept.read_text()))
    metadata = kernel.metadata
    figures = read_machine_code(kernel.asm["cubin"])
    static = max(0, figures["shared"] - (SYSTEM_SHARED if architecture >= 90 else 0))  # a kernel without any has 0
    compiled = Compiled(
        kernel.name,
        architecture,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        **{**figures, "shared": static + metadata.shared},
    )
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as f:
        json.dump(asdict(compiled), f)
    os.replace(f.name, kept)
    return compiled


def read_machine_code(cubin: bytes) -> dict[str, Any]:
    """Registers, spilled bytes, static shared memory and counts of instructions.

    Bytes stored to local memory are what ptxas reports as spill stores (28 kernels with 20 to 88,192 of them compared,
    triton 3.6 and 3.9, sm_80 and sm_90: equal in all), of the very code that a GPU would run.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = tool("cuobjdump", "--dump-resource-usage", file)
        code = tool("nvdisasm", "-c", file)
    registers, shared = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "SHARED"))
    return {
        "registers": registers,
        "spill_stores": moved(code, "STL"),
        "spill_loads": moved(code, "LDL"),
        "shared": shared,
        "counts": {name: n for name, pattern in COUNTED.items() if (n := len(re.findall(rf"\b{pattern}", code)))},
    }


def moved(code: str, instruction: str) -> int:
    """Bytes that all instructions of a kind move, each counted once."""
    widths = {"": 4, "64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    found = re.findall(rf"\b{instruction}(?:\.(?:LU|EL|EF))*(?:\.(64|128|[US]8|[US]16))?\b", code)
    return sum(widths[width] for width in found)


def tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_all(architecture: int, code: Callable[[], object], cache: Path | None = None) -> list[Compiled]:
    """The kernels that code() launches, in the order of their launches."""
    with dry_run(architecture, cache) as kernels:
        code()
    return kernels
