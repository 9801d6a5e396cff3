"""What can fail late, tried early: train.py calls these before the first step, and on a resume before the next.

The fullest batch, an evaluation and a save fail in the first minute or not at all; afterwards weights, gradients and
generators are what they were. Knows torch.nn and checkpoints, not data.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from llama import parallel, saver
from llama.together import on_first_rank

PLACE = ".rehearsal"  # within output_dir


@contextlib.contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever runs in this block leaves no gradient, no random number drawn, and the model in training."""
    on_gpu = device.type == "cuda"
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    yield  # an error ends the run: nothing to put back
    if on_gpu:
        torch.cuda.synchronize(device)  # what the kernels have to complain of, they say here
        torch.cuda.set_rng_state(states[1], device)
    torch.set_rng_state(states[0])
    parallel.reshard(model)
    model.zero_grad(set_to_none=True)
    model.train()


def peak_of(device: torch.device) -> int | None:
    """The most bytes that tensors held so far, None on a CPU; counted anew from here on."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def size_on_disk(tensors: dict[str, Tensor], ranks: int) -> int:
    """Bytes of a checkpoint over all ranks: of a sharded tensor the whole, a generator state for each rank."""
    return sum(t.numel() * t.element_size() * (ranks if name.startswith("rng.") else 1) for name, t in tensors.items())


def check_space(output_dir: Path, checkpoint: int, coming: int, limit: int, finished: int) -> None:
    """ValueError on all ranks unless all that the run is yet to write has room, as much of it as exists at a time.

    checkpoint: bytes of one; coming: how many more; limit: how many are kept (0: all), and until an older one goes, one
    more is there; finished: bytes of the finished model.
    """

    def check() -> None:
        there = len(list(output_dir.glob("checkpoint-*")))
        beside = min(coming, limit + 1 - min(there, limit)) if limit else coming
        needed = beside * checkpoint + finished
        free = shutil.disk_usage(next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())).free
        if needed > free:
            raise ValueError(
                f"{output_dir}: the run will write {beside} checkpoint(s) of {checkpoint:,} bytes and "
                f"a model of {finished:,}, but {free:,} are free: make room, or keep fewer (--save_total_limit 1)"
            )

    on_first_rank(check)


def save(
    output_dir: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], files: dict[str, bytes]
) -> None:
    """Write a checkpoint of the smallest weight and all that belongs to it, as the real ones are, and remove it."""
    place = output_dir / PLACE
    weights = {name: t.numel() for name, t in tensors.items() if name.startswith("model.")}
    smallest = min(weights, key=lambda name: weights[name]).removeprefix("model.")
    few = {name: t for name, t in tensors.items() if smallest in name or name.startswith("rng.")}
    on_first_rank(lambda: shutil.rmtree(place, ignore_errors=True))
    try:
        saver.save_training_state(place, step, few, state, files)
    finally:
        shutil.rmtree(place, ignore_errors=True)
