"""Fixtures of the kernel tests, which run with the same bodies in Triton's interpreter and on a CUDA device.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/on_device     # interpreter, CPU tensors
    python -m pytest tests/kernels/on_device                        # on a machine with a CUDA device

Where there is neither, nothing here is collected: tests/kernels/test_interpreter.py then starts the interpreted runs,
each in a process of its own, because triton decides at its import whether it interprets.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.on_device.fences import Fences

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HERE = os.path.dirname(__file__)
FEW = 64  # numbers; below that a relative L2 error is a matter of luck
SUMS = 8 * 2.0**-23  # relative error of fp32 results on a device (measured on an H200: 1.0e-7 to 8.4e-7; TF32 has 3e-4)
ZERO = 1e-14  # root mean square of what is nothing but fp64's rounding, where inputs are of size 1

collect_ignore_glob = [] if INTERPRETING or torch.cuda.is_available() else ["test_*.py"]

zeros = torch.zeros  # torch's own: its name in torch is replaced while a test runs
Normal = Callable[..., Tensor]


# Triton 3.6 makes integers of arrays of one number, which the newest numpy that it works with deprecates.
QUIET = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a device, each of these tests is a gpu test: `-m "not gpu"` leaves them out, `-m gpu` picks them. Those with
    vast tensors follow each other, as device_only's do (--dist loadgroup): two together may need more than 80 GB."""
    for item in items:
        if not str(item.path).startswith(HERE):
            continue
        item.add_marker(QUIET if INTERPRETING else pytest.mark.gpu)
        if not INTERPRETING and "vast" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("memory"))


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """Where kernels are interpreted: bf16 made right, and tensors not copied onto themselves after each launch."""
    if not INTERPRETING:
        yield
        return
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    assert isinstance(sum_of_triton(), InterpretedFunction), "triton was imported before TRITON_INTERPRET was set"
    from tests.kernels.on_device import bf16_shim

    bf16_shim.install()
    # The copy back from host to "device" would touch every page of a tensor that is vast and mostly unmapped.
    restore = GridExecutor._restore_args_dev
    GridExecutor._restore_args_dev = lambda *_: None
    # A kernel may overflow to inf or meet inf - inf where it masks: numpy's warnings about it would fail tests.
    with np.errstate(all="ignore"):
        yield
    GridExecutor._restore_args_dev = restore
    bf16_shim.remove()


def sum_of_triton() -> object:
    import triton.language as tl

    return tl.sum


@pytest.fixture(autouse=True)
def fences(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fences]:
    """All memory that torch.empty and the like give during a test is poisoned and fenced; checked at its end."""
    fences = Fences()
    for owner, name, replacement in fences.patches():
        monkeypatch.setattr(owner, name, replacement)
    yield fences
    monkeypatch.undo()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    fences.verify()


@pytest.fixture
def fenced(fences: Fences) -> Callable[[Tensor], Tensor]:
    """fenced(tensor): a copy with the same strides in fenced memory; reading past it gives NaN or -1."""
    return fences.copy


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CPU where kernels are interpreted, else the CUDA device."""
    return torch.device("cpu" if INTERPRETING else "cuda")


@pytest.fixture
def normal(device: torch.device, fences: Fences) -> Normal:
    """normal(*shape, seed=0, dtype=torch.float32): fp64 normal numbers, cast; in fenced memory on the device."""

    def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: object = device) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return fences.copy(drawn.to(device), "a normal tensor")

    return normal


@pytest.fixture
def vast(device: torch.device) -> Iterator[Callable[..., Tensor]]:
    """vast(*shape, dtype): zeros whose rows (all but the last dimension) reach beyond 2^31 elements.

    On a CPU for free: the memory is reserved, not committed, and only pages that are touched cost anything. On a device
    it is taken, without fences, which would take it twice, and given back to the other processes that test there.
    """

    def vast(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = 1
        for n in shape[:-1]:
            rows *= n
        assert rows > 1, "one row cannot reach far"
        # Aligned rows, the last of which starts just beyond 2^31.
        stride = -(-(2**31 + 1) // (rows - 1) // 64) * 64 + 64
        strides = [1]
        for n in reversed(shape[:-1]):
            strides.insert(0, stride)
            stride *= n
        count = (rows - 1) * strides[-2] + shape[-1]
        if device.type == "cuda":
            return zeros(count, dtype=dtype, device=device).as_strided(shape, strides)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)

    yield vast
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """no_worse(name, got, peer, exact, factor=1.3, floor=0): got's relative L2 error is <= factor times peer's.

    exact: the fp64 result; peer: plain torch's in the same dtype. No tolerance besides but the floor: where peer is
    exact, got must be. Where the ratio of two errors is luck, a unit in the last place is granted: of the result itself
    below FEW numbers; of a number of size 4 where sums cancel and the result is 0 (the gradient of a query that sees
    one key). On a device, fp32 sums are granted SUMS: ours are one chain of fused multiply-adds, cuBLAS's are many.
    """

    def no_worse(name: str, got: Tensor, peer: Tensor, exact: Tensor, factor: float = 1.3, floor: float = 0.0) -> None:
        assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}"
        assert got.dtype == peer.dtype, f"{name}: {got.dtype}, torch gives {peer.dtype}"
        assert got.shape == peer.shape == exact.shape, f"{name}: {got.shape}, {peer.shape}, {exact.shape}"
        exact = exact.detach()
        zero = exact.norm().item() <= ZERO * exact.numel() ** 0.5
        scale = exact.numel() ** 0.5 if zero else exact.norm().item()
        ours = ((got.detach().double() - exact).norm() / scale).item()
        theirs = ((peer.detach().double() - exact).norm() / scale).item()
        bound = max(factor * theirs, floor)
        if got.is_cuda and got.dtype == torch.float32:
            bound = max(bound, SUMS)
        if zero or exact.numel() < FEW:
            bound = max(bound, (4 if zero else 1) * torch.finfo(got.dtype).eps)
        assert ours <= bound, f"{name} ({got.dtype}): error {ours:.3e}, torch {theirs:.3e}, allowed {bound:.3e}"

    return no_worse
