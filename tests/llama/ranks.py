"""What test_training_state.py runs on two ranks: python ranks.py RANK SIZE DIRECTORY. Prints what it found as JSON.

One pair of processes goes through all of it, for starting one takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama import saver as saving
from llama.chat import ChatFormat
from llama.checkpoint import load_weights, model_files, save_sharded_model
from llama.config import LlamaConfig
from llama.model import Llama
from llama.saver import Saver, save_training_state
from llama.training_state import latest_training_state, load_training_state

# A vocabulary that two ranks cannot share evenly, and fewer norm values than a rank might expect.
CONFIG = LlamaConfig(32, 2, 4, 2, 48, 259, max_seq_len=64)


def sharded(fill: bool) -> Llama:
    """The model over both ranks; filled with the values one process would give it, or with zeros."""
    with torch.device("meta"):
        model = Llama(CONFIG)
    for layer in model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    whole = Llama(CONFIG)
    whole.init_weights(0)
    values = dict(whole.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            source = values[name] if fill else torch.zeros_like(values[name])
            shard = torch.distributed.tensor.distribute_tensor(source, p.device_mesh, p.placements)
            p.to_local().copy_(shard.to_local())
    return model


def tensors_of(model: Llama, rank: int, scale: float = 2.0) -> dict[str, Tensor]:
    """What a run saves: weights, a moment per weight, a step count that all ranks have, a generator state a rank."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        found[f"model.{name}"] = p.detach()
        found[f"optimizer.{name}.exp_avg"] = p.detach() * scale
        found[f"optimizer.{name}.step"] = torch.tensor(scale)
    found[f"rng.{rank}"] = torch.full((16,), 10 + rank, dtype=torch.uint8)
    return found


def is_filled(model: Llama) -> bool:
    whole = Llama(CONFIG)
    whole.init_weights(0)
    values = dict(whole.named_parameters())
    return all(torch.equal(p.full_tensor(), values[name]) for name, p in model.named_parameters())


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except ValueError as e:
        return str(e)
    return "no error"


def scenario(rank: int, root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    files = model_files(CONFIG, None, ChatFormat("plain"))
    model = sharded(fill=True)
    path = save_training_state(root / "run", 7, tensors_of(model, rank), {"step": 7}, files, 2)
    found["saved"] = sorted(p.name for p in path.iterdir())

    empty = sharded(fill=False)
    into = tensors_of(empty, rank, scale=0.0)
    found["state"] = load_training_state(path, into)
    found["same on two"] = is_filled(empty) and bool((into[f"rng.{rank}"] == 10 + rank).all())
    found["latest"] = str(latest_training_state(root / "run"))

    # Written by one process before this pair started.
    empty = sharded(fill=False)
    into = tensors_of(empty, rank, scale=0.0)
    load_training_state(root / "one/checkpoint-3", into)
    found["one to two"] = is_filled(empty)
    found["generators"] = int(into[f"rng.{rank}"][0])

    with torch.device("meta"):
        empty = Llama(CONFIG)
    for layer in empty.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(empty, mesh=init_device_mesh("cpu", (2,)))
    load_weights(empty, root / "model")
    found["weights from a model"] = is_filled(empty)
    empty = sharded(fill=False)
    load_weights(empty, path)
    found["weights from a checkpoint"] = is_filled(empty)

    def whole() -> object:
        for name, p in model.named_parameters():
            yield name, p.detach().full_tensor()

    save_sharded_model(root / "exported", whole(), CONFIG, None, ChatFormat())

    # What fails on one rank is raised on both, and neither waits.
    save_training_state(root / "torn", 1, tensors_of(model, rank), {}, files)
    if rank == 0:
        shard = root / "torn/checkpoint-1/__1_0.distcp"
        with open(shard, "r+b") as f:
            f.seek(100)
            byte = f.read(1)[0]
            f.seek(100)
            f.write(bytes([byte ^ 1]))
    dist.barrier()
    found["flipped"] = error_of(lambda: load_training_state(root / "torn/checkpoint-1", tensors_of(model, rank)))
    found["latest of torn"] = str(latest_training_state(root / "torn"))
    (root / "file").touch()
    found["not a directory"] = error_of(lambda: save_training_state(root / "file", 1, {}, {}, {}))
    found["not finite"] = error_of(
        lambda: save_sharded_model(root / "nan", ((n, p * float("nan")) for n, p in whole()), CONFIG, None, None)
    )
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    os.environ["LOCAL_RANK"] = str(rank)
    found["shared out"] = error_of(lambda: load_training_state(root / "torn/checkpoint-1", tensors_of(model, rank)))

    found |= in_the_background(model, rank, root / "background", files)
    disk = root / "disk"
    if disk.is_dir():
        big = {f"model.{rank}.{i}": torch.ones(1 << 20) for i in range(4)}  # 16 MiB a rank; the disk has 24
        save_training_state(disk, 1, tensors_of(model, rank), {"step": 1}, files)
        found["no space"] = error_of(lambda: save_training_state(disk, 2, big, {}, files))
        saving.stage = lambda target, needed: stage(target)  # as when the disk fills up during the save
        found["full"] = error_of(lambda: save_training_state(disk, 2, big, {}, files))
        saver = Saver(disk, background=True)
        saver.save(2, big, {}, files)
        found["full in the background"] = error_of(saver.wait)
        found["left"] = sorted(p.name for p in disk.iterdir())
        found["still whole"] = load_training_state(disk / "checkpoint-1", tensors_of(model, rank))
    return found


def in_the_background(model: Llama, rank: int, path: Path, files: dict[str, bytes]) -> dict[str, object]:
    """Saves while both ranks exchange values on the default group, as training does."""
    found: dict[str, object] = {}
    write, saved = dcp.FileSystemWriter.write_data, []

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.3 + 0.2 * rank)
        return write(*args, **options)

    def fails_on_one(*args: Any, **options: Any) -> Any:
        if rank == 1:
            raise OSError(5, "Input/output error")
        return write(*args, **options)

    saver = Saver(path, background=True, done=saved.append)
    tensors = tensors_of(model, rank)
    before = {k: t.clone() for k, t in tensors.items()}
    dcp.FileSystemWriter.write_data = slowly
    saver.save(8, tensors, {"step": 8}, files)
    exchanges = 0
    while not saved:
        for t in tensors.values():
            t.copy_(t + 1)
        dist.all_reduce(torch.ones(1000))
        exchanges += 1
        saver.poll()
    found["while training"] = exchanges
    load_training_state(path / "checkpoint-8", tensors)
    found["values of the call"] = all(
        torch.equal(t.to_local() if isinstance(t, DTensor) else t, b.to_local() if isinstance(b, DTensor) else b)
        for t, b in zip(tensors.values(), before.values(), strict=True)
    )
    dcp.FileSystemWriter.write_data = fails_on_one
    saver.save(9, tensors, {}, files)
    found["one rank fails"] = error_of(saver.wait)
    dcp.FileSystemWriter.write_data = write
    found["left of the background"] = sorted(p.name for p in path.iterdir())
    return found


stage = saving.stage

if __name__ == "__main__":
    rank, size, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), size), rank=rank, world_size=size)
    print(json.dumps(scenario(rank, root)))
    dist.barrier()
    dist.destroy_process_group()
