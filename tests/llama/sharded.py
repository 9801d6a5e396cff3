"""What test_parallel.py runs on several ranks: python sharded.py STORE; RANK and WORLD_SIZE as torchrun sets them.

Trains a small model for some steps in every way there is to shard it and prints losses and gradient norms as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama import parallel
from llama.chat import IGNORE
from llama.checkpoint import copied
from llama.config import LlamaConfig
from llama.model import Llama
from llama.optimizer import SplitAdamW, clipped_step
from llama.parallel import World

STEPS, ROWS, LENGTH = 20, 8, 24
# A vocabulary that no number of ranks shares evenly.
CONFIG = LlamaConfig(32, 2, 4, 2, 48, 259, max_seq_len=64)
TIED = LlamaConfig(32, 2, 4, 2, 48, 259, max_seq_len=64, tie_embeddings=True)

# name: (configuration, what parallel.prepare is told, micro-batches of a step, split weights)
WAYS: dict[str, tuple[LlamaConfig, dict[str, Any], int, bool]] = {
    "full_shard": (CONFIG, {}, 1, False),
    "accumulation": (CONFIG, {}, 2, False),
    "shard_grad_op": (CONFIG, {"reshard_after_forward": False}, 1, False),
    "offload": (CONFIG, {"offload": True}, 1, False),
    "recompute": (CONFIG, {"recompute": True}, 1, False),
    "tied": (TIED, {}, 1, False),
    "bf16": (CONFIG, {"bf16": True}, 1, False),
    "split": (CONFIG, {"bf16": True}, 2, True),
    "hybrid_shard": (CONFIG, {}, 1, False),
}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step: rows with very different numbers of supervised tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH), generator=generator)
    keep = torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0.05, 1, ROWS)[:, None]
    return tokens, torch.where(keep, tokens.roll(-1, 1), IGNORE)


def run(way: str, world: World) -> dict[str, list[float]]:
    """Losses, gradient norms, and the weights' sum at the end."""
    config, how, parts, split = WAYS[way]
    how = {"bf16": False, **how}
    if world.mesh is None:
        how.pop("offload", None)
    with torch.device("meta"):
        model = Llama(config)
    if split:
        model.to(torch.bfloat16)
    parallel.prepare(model, model.layers, world, **how)
    model.to_empty(device="cpu")
    names = {p: name for name, p in model.named_parameters()}
    optimizer: torch.optim.Optimizer
    if split:
        optimizer = SplitAdamW([{"params": list(names)}], names, lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    else:
        optimizer = torch.optim.AdamW(names, lr=3e-3, weight_decay=0.0, fused=True)
    assign = optimizer.assign if split else copied
    model.init_weights(0, lambda p, full: assign(p, parallel.part_of(full, p)))
    losses, norms = [], []
    for step in range(STEPS):
        tokens, targets = batch(step)
        supervised = (targets != IGNORE).sum().item()
        # Micro-batch i of this rank; what a rank has of a step differs in its number of supervised tokens.
        share = ROWS // world.size // parts
        total = torch.zeros(1, dtype=torch.float64)
        for i in range(parts):
            rows = slice((world.rank * parts + i) * share, (world.rank * parts + i + 1) * share)
            parallel.sync_gradients(model, i == parts - 1)
            loss, _ = model(tokens[rows], targets[rows])
            (loss * (world.size / supervised)).backward()
            total += loss.item()
        norm = parallel.grad_norm(model.parameters(), world)
        clipped_step(optimizer, norm, 1.0)
        optimizer.zero_grad(set_to_none=True)
        losses.append((parallel.all_reduce(total) / supervised).item())
        norms.append(norm.item())
    values = optimizer.master if split else parallel.local
    end = [tensor.double().sum().item() for _, tensor in parallel.full_tensors(model, values)]
    return {"losses": losses, "norms": norms, "end": end, "kept": kept(model)}


def kept(model: nn.Module) -> list[float]:
    """Share of the parameters that this rank holds."""
    parts = sum(parallel.local(p).numel() for p in model.parameters())
    return [parts / sum(p.numel() for p in model.parameters())]


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[1], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    cpu = torch.device("cpu")
    flat = World(rank, size, cpu, init_device_mesh("cpu", (size,)))
    found = {}
    for way in WAYS:
        world = flat
        if way == "hybrid_shard" and size > 2:
            mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
            world = World(rank, size, cpu, mesh)
        found[way] = run(way, world)
    print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
