"""One model over several processes: each holds a slice of every large weight and computes its share of the heads.

generate.py, started by torchrun, runs the same program on every rank: start(), load(), and after the layout for
decoding join(). What comes from outside (the terminal, files, seeds) comes from rank 0 (Doctor.shared), the rest is a
function of it. Acts on a finished module; training's sharding is parallel.py's.

q, k, v, gate and up are cut by outputs, o and down by inputs (Megatron, arXiv:1909.08053), so attention and MLP take
one sum over ranks each. Embedding and head are cut along the model's width: no vocabulary need divide by the ranks,
and a tied head is the same slice. parallelize_module decides who holds what, and loading reads slices by it. For
decoding the DTensors become their local parts: a product through DTensor's dispatch takes 0.46 ms, 560 of them make a
token of a 70B (MLP of width 256 in one process, EPYC (Zen 4), torch 2.13: 1.42 ms against 0.04).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from llama import checkpoint, few_rows, parallel
from llama.config import LlamaConfig
from llama.model import Llama
from llama.offload import own_tensors
from llama.parallel import World
from llama.quantize import Scheme
from llama.together import together

PATIENCE = 7 * 24 * 3600.0  # seconds that ranks wait for a person at rank 0 to ask the next question
GRACE = 2.0  # seconds that rank 0 has to leave what it shares with the others after Ctrl-C


class Slices(ParallelStyle):
    """Cuts a linear or an embedding along one dimension of its weight (out, in); a packed weight with its scales."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, tensor in own_tensors(module):
            # One scale for a whole row is every slice's.
            where = Replicate() if tensor.shape[self.dim] == 1 else Shard(self.dim)
            _set(module, name, distribute_tensor(tensor, device_mesh, [where], src_data_rank=None))
        return module


BY_OUTPUT = ("layers.*.attn.q", "layers.*.attn.k", "layers.*.attn.v", "layers.*.mlp.gate", "layers.*.mlp.up")
BY_INPUT = ("layers.*.attn.o", "layers.*.mlp.down", "embed", "head")


def start(device: str) -> World:
    """Join the ranks that torchrun started; Ctrl-C ends all of them from here on."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "cpu" and torch.cuda.is_available() and here > (cards := torch.cuda.device_count()):
        raise ValueError(f"{here} ranks for {cards} CUDA devices: start torchrun with --nproc_per_node {cards}")
    world = parallel.init(device, timeout=PATIENCE)
    _end_on_interrupt(world.rank)
    return world


def _end_on_interrupt(rank: int) -> None:
    """torchrun passes Ctrl-C on to every rank: the first leaves as soon as Python can, the others a little later.

    A rank that is gone would keep the first in a collective, where no handler runs, until torchrun kills it after 30 s.
    """

    def leave(*_: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it comes twice: from the terminal and from torchrun
        raise SystemExit(128 + signal.SIGINT)

    if rank == 0:
        signal.signal(signal.SIGINT, leave)
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def follow() -> None:
        while os.read(reader, 1)[0] != signal.SIGINT:
            pass
        time.sleep(GRACE)
        os._exit(128 + signal.SIGINT)

    threading.Thread(target=follow, daemon=True).start()


def check(config: LlamaConfig, ranks: int, scheme: Scheme | None = None) -> None:
    """ValueError unless so many ranks can share the model's weights and heads evenly."""
    group = 1 if scheme is None else scheme.group or 1  # inputs that no slice may part
    widths = (config.dim, config.n_heads * config.head_dim // group, config.ffn_dim // group)
    most = gcd(config.n_kv_heads, *widths)
    if most % ranks:
        counts = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        raise ValueError(
            f"{ranks} ranks cannot share {config.n_kv_heads} key/value heads, a width of {config.dim} and an MLP of "
            f"{config.ffn_dim}{f' in groups of {group}' if group > 1 else ''} evenly: --nproc_per_node {counts}"
        )


def load(path: Path, world: World, dtype: torch.dtype | None) -> Llama:
    """This rank's part of the model in a directory; only its slices are read. join() must follow."""
    assert world.mesh is not None
    loaded: list[Llama] = []

    def work() -> None:
        check(checkpoint.load_config(path), world.size, checkpoint.load_scheme(path))
        loaded.append(checkpoint.load_model(path, world.device, dtype, lambda model: split(model, world.mesh)))

    together(work)
    (model,) = loaded
    keep_local(model, world.size)
    return model


def split(model: Llama, mesh: DeviceMesh) -> None:
    """Make the large weights of a model, which may be on meta, DTensors over the ranks of a mesh, in place."""
    plan: dict[str, ParallelStyle] = {name: Slices(0) for name in BY_OUTPUT} | {name: Slices(1) for name in BY_INPUT}
    if not hasattr(model, "head"):
        del plan["head"]
    parallelize_module(model, mesh, plan)


def keep_local(model: Llama, ranks: int) -> None:
    """Put every DTensor's local part in its place; a tied head becomes a module of its own, over the same slice."""
    for module in model.modules():
        for name, tensor in own_tensors(module):
            if isinstance(tensor, DTensor):
                _set(module, name, tensor.to_local())
    if model.config.tie_embeddings:
        model.head = few_rows.linear(model.embed.weight)
    model.config = replace(model.config, ranks=ranks)


def join(model: Llama, rank: int, ranks: int) -> None:
    """Have a model of local parts add them up over ranks. Its modules must stay what they are from here on."""
    D = model.config.dim
    mine = slice(rank * D // ranks, (rank + 1) * D // ranks)

    def add_up(_: nn.Module, args: Any, part: Tensor) -> Tensor:
        part = part.contiguous()
        dist.all_reduce(part)
        return part

    def spread(module: nn.Module, args: Any, part: Tensor) -> Tensor:
        whole = part.new_zeros(*part.shape[:-1], D)
        whole[..., mine] = part
        return add_up(module, args, whole)

    def narrow(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][..., mine].contiguous(),)

    def agree(_: nn.Module, args: Any, part: Tensor) -> Tensor:
        """fp32 logits, the same bits on every rank: what is drawn from them decides what all run next."""
        logits = part.float().contiguous()
        dist.reduce(logits, 0)
        dist.broadcast(logits, 0)
        return logits

    model.embed.register_forward_hook(spread)
    for layer in model.layers:
        layer.attn.register_forward_hook(add_up)
        layer.mlp.register_forward_hook(add_up)
    model.head.register_forward_pre_hook(narrow)
    model.head.register_forward_hook(agree)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    is_parameter = name in module._parameters
    setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
