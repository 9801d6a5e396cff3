"""One process or many: ranks, devices, signals, and FSDP2 over a finished module. Knows torch.nn, not Llama.

train.py calls init() first and shutdown() last. A single fp32 process has no process group and no sharding; every
other run (torchrun, or bf16 on one device) goes through fully_shard, so bf16 compute over fp32 weights is one path.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, its device, and the mesh that shards (None: nothing is sharded)."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None


def init(device: str = "auto", *, sharded: bool = False) -> World:
    """Join the process group that torchrun describes; alone, make a group of one only if `sharded`.

    ValueError if CUDA is asked for and not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device!r} is not auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched() else (0, 1)
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    if not launched() and not sharded:
        return World(0, 1, here, None)
    # gloo beside NCCL: checkpoints and barriers of CPU tensors must not wait for the GPU's stream.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    store = None if launched() else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
    return World(rank, size, here, init_device_mesh(kind, (size,)))


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leave(status: int) -> NoReturn:
    """End a process that torchrun started, all ranks together if all went well, without tearing gloo down.

    Tearing it down ended 1 of 24 runs with "terminate called without an active exception" (torch 2.13, 2 ranks on busy
    cores) after everything was saved, and torchrun then called the run failed.
    """
    if status == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def prepare(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    *,
    bf16: bool,
    reshard_after_forward: bool = True,
    recompute: bool = False,
    compiled: bool = False,
) -> None:
    """Make a module ready to train in place: recompute and compile its blocks, then shard blocks and root.

    bf16: blocks compute in bfloat16 over fp32 shards, and gradients are reduced in fp32.
    """
    assert world.mesh is not None or not bf16, "bf16 compute over fp32 weights needs init(sharded=True)"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    for block in blocks:
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile()
        if world.mesh is not None:
            _shard(block, world.mesh, policy, reshard_after_forward)
    if world.mesh is not None:
        _shard(model, world.mesh, policy, reshard_after_forward)


def _shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None, reshard: bool) -> None:
    options = {} if policy is None else {"mp_policy": policy}
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, **options)


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces gradients over ranks (only the last of a step's needs to)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


@torch.no_grad()
def assign(parameter: nn.Parameter, full: Tensor) -> None:
    """Store a full tensor, equal on all ranks, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device)
        shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(full)


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole and in order, one at a time, on all ranks together (each yields; one may write)."""
    for name, p in model.named_parameters():
        yield name, p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to max_norm (0: leave them); their norm before that, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_reduce(values: Tensor) -> Tensor:
    """Sum over ranks, in place; alone, what it was."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


Result = TypeVar("Result")


def first_alone(world: World, action: Callable[[], Result]) -> Result:
    """Run action on rank 0, then on the others, which find what it left on disk. Its error ends all ranks."""
    result, error = None, None
    if world.rank == 0:
        try:
            result = action()
        except ValueError as e:
            error = e
    failed = all_reduce(torch.tensor(float(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)  # rank 0 says why
    return result if result is not None else action()


class Stop:
    """Notes SIGINT and SIGTERM, so that the loop can save before it ends; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
