"""Work that all ranks do at once: what fails on one is raised on all, so that none waits for a dead one.

Whatever reads or writes files of a run calls these; alone, they are plain calls. Knows torch.distributed, no models.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from llama.files import verify

T = TypeVar("T")


def ranks() -> tuple[int, int]:
    """This process's rank and their number: 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def together(work: Callable[[], T]) -> list[T]:
    """What work returns on every rank. When it fails on any, all raise that ValueError: none waits for a dead one."""
    rank, size = ranks()
    outcome: tuple[Any, str | None]
    try:
        outcome = work(), None
    except Exception as e:
        if size == 1:
            raise
        outcome = None, str(e) if isinstance(e, ValueError) else f"rank {rank}: {type(e).__name__}: {e}"
    outcomes: list[Any] = [outcome]
    if size > 1:
        outcomes = [None] * size
        dist.all_gather_object(outcomes, outcome)
    for _, error in outcomes:
        if error is not None:
            raise ValueError(error)
    return [result for result, _ in outcomes]


def on_first_rank(work: Callable[[], T]) -> T:
    """What work returns on rank 0, on all ranks; its error too."""
    return together(lambda: work() if ranks()[0] == 0 else None)[0]  # type: ignore[return-value]


def verify_together(path: Path) -> None:
    """verify(), the files of a node shared out among its ranks."""
    rank, size = ranks()
    part, parts = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    together(lambda: verify(path, part % parts, parts))
