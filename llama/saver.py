"""Writes `<output_dir>/checkpoint-<step>/`, whole or not at all, while training goes on or before it does.

Called by train.py and rehearsal.py, on all ranks at once. Finding, keeping and reading: training_state.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from llama.files import (
    Staged,
    clean,
    crc32_of,
    full_disk,
    is_plain,
    need_space,
    publish,
    stage,
    trust,
    write_manifest,
)
from llama.together import on_first_rank, ranks, together
from llama.training_state import STATE, prune, reasons


@dataclass(frozen=True)
class Saved:
    """A checkpoint that counts: where, and what it cost. stalled: seconds that the caller waited; seconds: from save()
    until it counted."""

    step: int
    path: Path
    stalled: float
    seconds: float


class Saver:
    """Writes the checkpoints of one run, one at a time and in order. All ranks call every method, at step borders.

    In the background, save() returns once the tensors are copied to the CPU's memory: a thread writes the copies over
    a gloo group of its own (on the default group its collectives met those of training in another order on another
    rank, and deadlocked 2 of 2 times). The checkpoint counts when poll() finds it written on all ranks, or wait() has
    waited for that; save() waits for the one before. An error of the thread is raised there, on all ranks. When the
    copies would not fit into the free memory of a node, save() writes before it returns. done is told of each.
    """

    def __init__(
        self,
        output_dir: str | Path,
        total_limit: int | None = None,
        *,
        background: bool = False,
        done: Callable[[Saved], object] = lambda saved: None,
    ) -> None:
        self._output_dir, self._total_limit, self._done = Path(output_dir), total_limit, done
        self._background = background
        self._group = dist.new_group(backend="gloo") if background and ranks()[1] > 1 else None
        self._pending: _Save | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], files: dict[str, bytes]) -> Path:
        """Begin `<output_dir>/checkpoint-<step>/`; what it will hold is what is given now, whatever changes later.

        tensors: this rank's; a plain tensor of a name that several ranks have is written once, so generator states
        carry their rank in the name. state: JSON values. files: further small files (checkpoint.model_files). On one
        shared file system. An error on any rank is raised on all, and leaves the earlier checkpoints as they were.
        """
        assert all(isinstance(t, Tensor) for t in tensors.values()), "only tensors: anything else would be pickled"
        begin = time.perf_counter()
        self.wait()
        pending = _Save(self._output_dir / f"checkpoint-{step}", step, tensors, state, files)
        background = self._background and _fits(tensors)
        if background:
            pending.copy_tensors()
            pending.start(self._group)
            self._pending = pending
        else:
            pending.write(None)
        pending.begun, pending.stalled = begin, time.perf_counter() - begin
        if not background:
            self._commit(pending)
        return pending.target

    def poll(self) -> None:
        """Commit what the thread has written, if it has on all ranks."""
        if self._pending is None:
            return
        begin = time.perf_counter()
        writing = torch.tensor(float(not self._pending.written()))
        if ranks()[1] > 1:
            dist.all_reduce(writing)
        self._pending.stalled += time.perf_counter() - begin
        if not writing:
            self.wait()

    def wait(self) -> None:
        """Commit what is under way, however long the writing takes."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._commit(pending)

    def _commit(self, pending: _Save) -> None:
        begin = time.perf_counter()
        pending.commit()
        on_first_rank(lambda: prune(self._output_dir, pending.step, self._total_limit))
        end = time.perf_counter()
        self._done(Saved(pending.step, pending.target, pending.stalled + end - begin, end - pending.begun))


def save_training_state(
    output_dir: str | Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    files: dict[str, bytes],
    total_limit: int | None = None,
) -> Path:
    """Write `<output_dir>/checkpoint-<step>/` (see Saver.save), whole or not at all, then prune beyond total_limit."""
    return Saver(output_dir, total_limit).save(step, tensors, state, files)


class _Save:
    """One checkpoint on its way: staged when made, then written, in a thread or not, then committed or removed."""

    def __init__(
        self, target: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], files: dict[str, bytes]
    ) -> None:
        self.target, self.step, self.tensors = target, step, {k: t.detach() for k, t in tensors.items()}
        document = (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()
        self.small = {**files, STATE: document}
        self.begun = self.stalled = 0.0
        self.thread: threading.Thread | None = None
        self._staged: Staged | None = None
        self._outcome: dict[str, str] | Exception | None = None
        needed = _bytes(tensors) + sum(map(len, self.small.values())) + (1 << 20)
        self._directory = Path(on_first_rank(lambda: self._stage(needed)))

    def _stage(self, needed: int) -> str:
        if self.target.parent.is_dir():
            clean(self.target.parent, ".checkpoint-")  # of other steps too: a killed run may never save that one again
        self._staged = stage(self.target, needed)
        return str(self._staged.directory)

    def copy_tensors(self) -> None:
        self.tensors = {k: t.clone() if t.device.type == "cpu" else t.to("cpu") for k, t in self.tensors.items()}

    def start(self, group: dist.ProcessGroup | None) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            if device is not None:  # threads start on device 0, and torch's writer waits for the current one
                torch.cuda.set_device(device)
            self.write(group)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def write(self, group: dist.ProcessGroup | None) -> None:
        """Write this rank's shards; what went wrong comes out in commit()."""
        try:
            self._outcome = _write_shards(self._directory, self.tensors, self.target, group)
        except Exception as e:
            self._outcome = e
        except BaseException:
            self._close(remove=True)
            raise
        self.tensors = {}

    def written(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def commit(self) -> None:
        """Put it in its place, on all ranks together; or remove what there is of it and raise what went wrong."""
        if self.thread is not None:
            self.thread.join()
        try:
            crcs: dict[str, str] = {}
            for part in together(self._written):
                crcs |= part
            on_first_rank(lambda: _finish(self._staged, self.small, crcs, self.target))
        except ValueError:  # on all ranks: none goes on before the half-written files are gone
            on_first_rank(lambda: self._close(remove=True))
            raise
        except BaseException:  # on this rank alone
            self._close(remove=True)
            raise
        self._close(remove=False)

    def _written(self) -> dict[str, str]:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def _close(self, *, remove: bool) -> None:
        if self._staged is not None:
            self._staged.close(remove=remove)


def _fits(tensors: dict[str, Tensor]) -> bool:
    """Whether every node has free memory for copies of what its ranks hold, and a tenth of it to spare; no, where
    nothing says what is free."""
    held = sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors.values())
    free = 0
    with contextlib.suppress(OSError):  # not Linux
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    return all(together(lambda: held * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < 0.9 * free))


def _bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes on disk over all ranks: every shard, and a plain tensor once however many ranks have it."""
    shards = sum(t.to_local().nbytes for t in tensors.values() if hasattr(t, "to_local"))
    plain = {name: t.nbytes for name, t in tensors.items() if not hasattr(t, "to_local")}
    once: dict[str, int] = {}
    total = 0
    for part, names in together(lambda: (shards, plain)):
        total += part
        once |= names
    return total + sum(once.values())


def _write_shards(
    directory: Path, tensors: dict[str, Tensor], target: Path, group: dist.ProcessGroup | None = None
) -> dict[str, str]:
    """Write this rank's shards, all ranks of the group together; their checksums."""
    rank, size = ranks()
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it saves in one process
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=size == 1)
        return {p.name: crc32_of(p) for p in directory.glob(f"__{rank}_*")}
    except (CheckpointException, OSError, RuntimeError) as e:
        raise ValueError(_why_not_saved(e, target)) from None


def _why_not_saved(e: BaseException, target: Path) -> str:
    """torch says "unexpected pos 704 vs 598" for a full disk, which nobody reads as one."""
    text = reasons(e)
    try:
        need_space(target, 1 << 20)
    except ValueError:
        full = True
    else:
        full = "unexpected pos" in text or "No space left" in text
    if full:
        return f"{target}: the disk is full; the earlier checkpoints are unchanged ({text})"
    return f"{target}: could not be saved ({text})"


def _finish(staged: Staged | None, small: dict[str, bytes], crcs: dict[str, str], target: Path) -> None:
    assert staged is not None
    absent = [name for name in crcs if not (staged.directory / name).exists()]
    if absent:
        raise ValueError(f"{target}: {absent[0]} is not seen by rank 0; output_dir must be on a shared file system")
    try:
        for name, data in small.items():
            assert is_plain(name)
            (staged.directory / name).write_bytes(data)
        write_manifest(staged.directory, crcs)
        publish(staged)
        trust(target)
    except OSError as e:
        raise full_disk(e, target) from None
