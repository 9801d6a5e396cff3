"""What every Triton launch of this package asks first: can a kernel run on this device, what machine is it, and how do
the rows of a tensor lie.

Called by the seam and the kernel files. Imports triton only inside functions: on a CPU it is never loaded.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = 80  # sm_80, the A100: the first with bf16 products and asynchronous copies
# What every launch asks of the compiler: a * b + c in one rounding, which from triton 3.10 on is not its default (3.9
# warns of it).
OPTIONS = {"enable_fp_fusion": True}
STAND_IN_MULTIPROCESSORS = 4  # where no device says: the interpreter, a compile check


def interpreting() -> bool:
    """Triton's interpreter runs the kernels, on CPU tensors. The variable counts only if set before triton's import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Why no Triton kernel can run on this device, as a clause with the remedy; None when they can."""
    if device.type == "cuda":
        return _why_not_cuda(device.index or 0)
    if device.type == "cpu" and interpreting():
        return None if find_spec("triton") else "triton is not installed: pip install triton"
    return f"the tensors are on {device.type}, and Triton needs a CUDA device: use --device cuda, or the torch backend"


# What torch.compiler.assume_constant_result does, which would import all of Dynamo here: a device does not change, so
# a traced call is answered while tracing.
why_not._dynamo_marked_constant = True


@cache
def _why_not_cuda(index: int) -> str | None:
    if torch.version.hip is not None:
        return "this is a ROCm build of torch, on which the kernels were never run: use the torch backend"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    arch = _capability(index)
    if arch < OLDEST:
        return f"this GPU is sm_{arch}, and the kernels need sm_{OLDEST} (A100) or newer: use the torch backend"
    return None


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """Compute capability as in sm_90: of the device, of a compile check's target, or 0 in the interpreter."""
    if device.type == "cuda":
        return _capability(device.index or 0)
    if interpreting():
        return 0
    from triton.runtime.driver import driver

    return driver.active.get_current_target().arch


def family(arch: int) -> int:
    """90 where a program may take 227 KiB of shared memory (sm_90 to sm_103), else 80: what tiles are chosen by."""
    return 90 if 90 <= arch < 120 else 80


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors share the work."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else STAND_IN_MULTIPROCESSORS


def with_workspace() -> None:
    """Let the next launch make tensor descriptors on the device, which need a little global memory.

    To be called before every such launch: triton keeps the allocator in a context variable, and autograd runs
    backward passes in threads that do not inherit it.
    """
    import triton

    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    # The caching allocator aligns to 512 bytes, and reuses the block only behind this launch on its stream.
    return torch.empty(size, dtype=torch.int8, device="cuda")


def rows(operation: str, name: str, x: Tensor) -> Tensor:
    """x (..., D) as (N, D), never a copy; ValueError where the rows are not evenly spaced."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{operation}: the rows of {name} {tuple(x.shape)} with strides {x.stride()} are not evenly spaced, which "
            "the kernel needs: pass a contiguous copy"
        ) from None
