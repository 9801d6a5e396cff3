"""What a training run needs to go on as if it had not stopped: `<output_dir>/checkpoint-<step>/`, found, kept, read.

Called on all ranks at once; saver.py writes it. Tensors (fp32 weights "model.*", optimizer moments "optimizer.*",
generator states "rng.<rank>") are torch.distributed.checkpoint shards, so that they load on another number of ranks;
everything else is JSON in state.json, because that format's other entries are pickles that run whatever they say. Its
metadata is a pickle too and is read through a list of allowed names. A directory counts when its manifest verifies:
there is no pointer file to go stale, and what is newest is found by looking.
"""

from __future__ import annotations

import math
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from llama.files import MANIFEST, is_plain, read_json, read_manifest, remove, settle, verified
from llama.together import on_first_rank, together, verify_together

STATE = "state.json"


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


# --- keeping --------------------------------------------------------------------------------------


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
        raise ValueError(f"{path}: cannot be read: {reasons(e)}") from None


def reasons(e: BaseException) -> str:
    """What went wrong, in one line; torch wraps the errors of all ranks, with their tracebacks, into one."""
    wrapped = [f[0] if isinstance(f, tuple) else f for f in getattr(e, "failures", {}).values()] or [e]
    return "; ".join(sorted({" ".join(str(r).split("\n", 1)[0].split()) or type(r).__name__ for r in wrapped}))


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
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "uint8")),
    *(("torch", name) for name in ("int16", "int32", "int64", "bool")),
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
