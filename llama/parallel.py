"""One process or many: ranks, devices, and FSDP2 over a finished module. Knows torch.nn, not Llama.

train.py calls init() first and shutdown() last. A single process whose weights have the number type that it computes in
has no process group and no sharding; every other run (torchrun, or bf16 over fp32 weights on one device) goes through
fully_shard, so that mixed precision is one path.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from llama import elastic


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, its device, and the mesh that shards (None: nothing is sharded).

    A mesh of two dimensions shards along its second, the ranks of a node, and holds copies along its first. restarted:
    torchrun started this run again after it had begun; store: what its ranks share (None: started without torchrun).
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    restarted: bool = False
    store: dist.Store | None = None


def init(device: str = "auto", *, sharded: bool = False, hybrid: bool = False, timeout: float = 600) -> World:
    """Join the process group that torchrun describes; alone, make a group of one only if `sharded`.

    hybrid: weights are sharded within a node (LOCAL_WORLD_SIZE ranks) and copied from node to node. timeout: seconds
    that elastic.Watch will wait, less than collectives do. ValueError if CUDA is asked for and not there, a node
    has fewer GPUs than ranks, or the nodes are of different sizes.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device!r} is not auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched() else (0, 1)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if hybrid and size % per_node:
        raise ValueError(f"--fsdp hybrid_shard: {size} ranks are no whole number of nodes of {per_node}")
    if launched() and not all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT")):
        raise ValueError(
            "RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: unset them, or use torchrun"
        )
    if kind == "cuda" and per_node > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"{per_node} processes on a machine with {found} GPU(s): torchrun --nproc_per_node={found}")
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    if launched():
        elastic.die_with_launcher()
    if not launched() and not sharded:
        return World(0, 1, here, None)
    # gloo beside NCCL: checkpoints and barriers of CPU tensors must not wait for the GPU's stream.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    wait = timedelta(seconds=max(1800.0, 2 * timeout))
    shared = elastic.store_of_run(rank, size) if launched() else None
    store = dist.HashStore() if shared is None else elastic.of_attempt(shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    restarted = shared is not None and elastic.has_begun(shared)
    if not hybrid:
        return World(rank, size, here, init_device_mesh(kind, (size,)), restarted, shared)
    names = ("replicate", "shard")
    mesh = init_device_mesh(kind, (size // per_node, per_node), mesh_dim_names=names)
    return World(rank, size, here, mesh, restarted, shared)


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
    cores) after everything was saved, and torchrun then called the run failed. Ctrl-C ends it where it stands, for
    there is nothing more to do; whoever waits for such a rank ends with status 1, for torchrun has said why.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0 and dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as e:
            if not elastic.lost_peer(e):
                raise
            status = 1
    os._exit(status)


def prepare(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    *,
    bf16: bool,
    reshard_after_forward: bool = True,
    offload: bool = False,
    recompute: int = 0,
    compiled: bool = False,
    unsharded: set[nn.Parameter] | None = None,
) -> None:
    """Make a module ready to train in place: recompute and compile its blocks, then shard blocks and root.

    recompute: so many blocks keep only their input and are computed again in backward, the first ones: their turn comes
    when what the others kept is gone already. bf16: blocks compute in bfloat16 over shards of any type, and gradients
    are reduced in fp32. offload: shards, gradients and optimizer live in the CPU's memory. unsharded: parameters that
    every rank holds whole, and that stay in their number type; they must be equal on all ranks and not train.
    """
    blocks = list(blocks)
    for i, block in enumerate(blocks):
        if i < recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile()
    if world.mesh is None:
        plain = {p.dtype for p in model.parameters() if p.is_floating_point()} == {
            torch.bfloat16 if bf16 else torch.float32
        }
        assert plain, "mixed precision needs init(sharded=True)"
        assert not offload, "offload needs init(sharded=True)"
        return
    options: dict[str, Any] = {"mesh": world.mesh, "ignored_params": unsharded}
    if bf16:
        # Inputs stay what they are: the stream is bf16 from the embedding on, and casting would round rotary tables.
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    # What the root holds itself, embedding and head, is needed again at once by the backward: it stays gathered.
    fully_shard(model, reshard_after_forward=False, **options)
    # Each block's weights are on their way while the one before computes: forward by order of calling, backward too.
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces gradients over ranks (only the last of a step's needs to)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def reshard(model: nn.Module) -> None:
    """After a forward without a backward: what is still gathered goes, and parameters() are the shards again.

    Else a model that was evaluated last is saved as gathered, rounded to bf16, and its shards' gradients are not found.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(full: Tensor, parameter: nn.Parameter) -> Tensor:
    """Of a full tensor, equal on all ranks, what this rank holds of a parameter that may be sharded."""
    if not isinstance(parameter, DTensor):
        return full
    full = full.to(parameter.device_mesh.device_type)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def full_tensors(model: nn.Module, values: Callable[[nn.Parameter], Tensor] = local) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole and in order, one at a time, on all ranks together (each yields; one may write).

    values(parameter): this rank's part of what is meant by it, where that is not the parameter itself.
    """
    for name, p in model.named_parameters():
        yield name, whole(p, values(p).detach())


def whole(p: nn.Parameter, part: Tensor) -> Tensor:
    """All ranks' parts of a parameter put together, on every rank; what is not sharded is its part."""
    if not isinstance(p, DTensor):
        return part
    part = part.to(p.device_mesh.device_type)  # from the CPU's memory under offload
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter], world: World) -> Tensor:
    """The L2 norm of all gradients over all ranks, an fp32 scalar on this rank's device."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square().sum().to(world.device)
    if world.mesh is not None and world.size > 1:
        shards = world.mesh if world.mesh.ndim == 1 else world.mesh["shard"]
        dist.all_reduce(squares, group=shards.get_group())
    return squares.sqrt()


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
