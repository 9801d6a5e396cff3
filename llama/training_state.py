"""What a training run needs to go on as if it had not stopped: `<output_dir>/checkpoint-<step>/`.

Called by train.py, on all ranks at once. Tensors (fp32 weights "model.*", optimizer moments "optimizer.*", generator
states "rng.<rank>") are torch.distributed.checkpoint shards, so that they load on another number of ranks; everything
else is JSON in state.json, because that format's other entries are pickles that run whatever they say. Its metadata is
a pickle too and is read through a list of allowed names. A directory counts when its manifest verifies: there is no
pointer file to go stale, and what is newest is found by looking.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from llama import checkpoint
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.files import (
    MANIFEST,
    Staged,
    clean,
    crc32_of,
    full_disk,
    is_plain,
    need_space,
    publish,
    read_json,
    read_manifest,
    remove,
    settle,
    stage,
    trust,
    verified,
    verify,
    write_manifest,
)
from llama.tokenizer import Tokenizer

T = TypeVar("T")
STATE = "state.json"


# --- all ranks together ---------------------------------------------------------------------------


def _ranks() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def together(work: Callable[[], T]) -> list[T]:
    """What work returns on every rank. When it fails on any, all raise that ValueError: none waits for a dead one."""
    rank, size = _ranks()
    outcome: tuple[Any, str | None]
    try:
        outcome = work(), None
    except (Exception, CheckpointException) as e:
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
    return together(lambda: work() if _ranks()[0] == 0 else None)[0]  # type: ignore[return-value]


def verify_together(path: Path) -> None:
    """verify(), the files of a node shared out among its ranks."""
    rank, size = _ranks()
    part, parts = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    together(lambda: verify(path, part % parts, parts))


# --- writing --------------------------------------------------------------------------------------


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
        self._group = dist.new_group(backend="gloo") if background and _ranks()[1] > 1 else None
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
        if _ranks()[1] > 1:
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
        self.thread = threading.Thread(target=self.write, args=(group,), daemon=True)
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
    rank, size = _ranks()
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
    text = _reasons(e)
    try:
        need_space(target, 1 << 20)
    except ValueError:
        full = True
    else:
        full = "unexpected pos" in text or "No space left" in text
    if full:
        return f"{target}: the disk is full; the earlier checkpoints are unchanged ({text})"
    return f"{target}: could not be saved ({text})"


def _reasons(e: BaseException) -> str:
    """What went wrong, in one line; torch wraps the errors of all ranks, with their tracebacks, into one."""
    wrapped = [f[0] if isinstance(f, tuple) else f for f in getattr(e, "failures", {}).values()] or [e]
    return "; ".join(sorted({" ".join(str(r).split("\n", 1)[0].split()) or type(r).__name__ for r in wrapped}))


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


def prune(output_dir: Path, step: int, total_limit: int | None) -> None:
    """Keep the newest total_limit checkpoints up to `step`, counting only verified ones; remove the older ones.

    What is newer than `step`, or was not written here, is left alone.
    """
    if total_limit is None:
        return
    assert total_limit > 0
    kept = 0
    for number, path in _checkpoints(output_dir):
        if number > step:
            continue
        if kept < total_limit:
            kept += not verified(path)
        elif (path / MANIFEST).exists() and (path / STATE).exists():
            remove([path])


def forget(output_dir: Path) -> None:
    """Remove every checkpoint-<step>/ that was written here, so that a run begun anew does not resume from one."""
    remove(p for _, p in _checkpoints(output_dir) if (p / MANIFEST).exists() and (p / STATE).exists())


def save_sharded_model(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    chat_format: ChatFormat | None,
    generation: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> None:
    """checkpoint.save_model, called by all ranks with a stream that they must drain together; rank 0 writes.

    Holds one whole tensor at a time. An error on rank 0 is raised on all, after the stream has ended.
    """
    stream = iter(tensors)

    def work() -> None:
        try:
            if _ranks()[0] == 0:
                checkpoint.save_model(path, stream, config, tokenizer, chat_format, generation, dtype, max_shard_bytes)
        finally:
            for _ in stream:  # gathering is collective: a rank that stops early would leave the others waiting
                pass

    together(work)


# --- finding --------------------------------------------------------------------------------------


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint-<step>, newest first."""
    if not output_dir.is_dir():
        return []
    found = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in output_dir.iterdir() if p.is_dir()]
    return sorted(((int(m[1]), p) for m, p in found if m), reverse=True)


def latest_training_state(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Says on stderr which newer ones it passed over, and why."""

    def find() -> str | None:
        for _, path in _checkpoints(Path(output_dir)):
            settle(path)
            problem = "it is not a training state" if not (path / STATE).exists() else verified(path)
            if not problem:
                return str(path)
            print(f"{path}: passed over: {problem}", file=sys.stderr)
        return None

    found = on_first_rank(find)
    return None if found is None else Path(found)


# --- reading --------------------------------------------------------------------------------------


def load_training_state(path: str | Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill tensors in place from a checkpoint-<step>/, saved on any number of ranks; returns its state.json.

    "rng.*" tensors of ranks that did not exist at the time are left as they are; any other difference in names or
    shapes is a ValueError, and so is anything the manifest does not vouch for. All ranks call it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such training checkpoint")
    on_first_rank(lambda: settle(path))
    verify_together(path)
    together(lambda: read_tensors(path, tensors))
    return read_json(path / STATE)


def read_tensors(path: Path, tensors: dict[str, Tensor], *, partial: bool = False) -> None:
    """Fill tensors (plain or DTensor) in place, each rank its own part, without talking to the others.

    partial: the checkpoint may hold more than is asked for. ValueError for what is not there or of another shape.
    """
    if not (path / ".metadata").exists():
        raise ValueError(f"{path}: no .metadata; this is not a training checkpoint")
    reader = _Reader(path)
    try:
        stored = reader.read_metadata().state_dict_metadata
        wanted = {k: t.detach() for k, t in tensors.items() if k in stored or not k.startswith("rng.")}
        missing = [k for k in wanted if k not in stored]
        extra = [] if partial else [k for k in stored if k not in wanted and not k.startswith("rng.")]
        if missing or extra:
            raise ValueError(f"does not fit this run; missing: {missing[:4]}, unexpected: {extra[:4]}")
        for k, t in wanted.items():
            if tuple(stored[k].size) != tuple(t.shape):
                raise ValueError(f"{k} is {tuple(stored[k].size)} there and {tuple(t.shape)} in this run")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it loads in one process
            dcp.load(wanted, storage_reader=reader, planner=_Planner(), no_dist=True)
    except (Exception, CheckpointException) as e:  # a damaged or hostile file may raise anything; all of it ends here
        raise ValueError(f"{path}: cannot be read: {_reasons(e)}") from None


_METADATA = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "uint8", "int32", "int64", "bool")),
}


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata`, which is a pickle, but only names of the kinds of thing that belong there."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which does not belong there; not opened")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, without its pickle.load, and without leaving the directory."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as f:
            metadata = _Unpickler(f).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(".metadata is not that of a checkpoint")
        listed = read_manifest(Path(self.path))
        for info in metadata.storage_data.values():
            name = info.relative_path
            if not is_plain(name) or (listed is not None and name not in listed):
                raise ValueError(f".metadata names {name!r}, which is not a file of this checkpoint")
        for name, stored in metadata.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"{name} is not a tensor; pickled values are not opened")
            if sum(math.prod(c.sizes) for c in stored.chunks) != math.prod(stored.size):
                raise ValueError(f"{name} is not wholly there")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    """torch's planner, which unpickles whatever an entry that is no tensor holds: here none is opened."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor; pickled values are not opened")
