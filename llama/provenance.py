"""Where a model comes from: `provenance.json` in its directory, a stage for each command that made it.

train.py and convert_weights.py write it, evaluate.py reads it; a GGUF file has the same document under a key of its
own (gguf_files.py). A stage says which command ran with which versions, what it started from (with a hash), and which
data files it saw (with a hash, how many records, licence when known, and what their cleaning reported). The stages of
the model that a run starts from come first. Knows JSON and files, no tensors.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llama.files import MANIFEST, read_json

NAME = "provenance.json"
VERSION = 1
_PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "safetensors")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.distcp")

Stages = list[dict[str, Any]]


def stages_of(path: str | Path) -> Stages:
    """The stages in a model directory, oldest first; none where it carries no provenance. ValueError if damaged."""
    file = Path(path) / NAME
    if not file.is_file():
        return []
    stages = stages_in(read_json(file))
    if stages is None:
        raise ValueError(f"{file}: not a provenance of version {VERSION}; remove it to go on without one")
    return stages


def stages_in(document: Any) -> Stages | None:
    """The stages of a document; None if it is none."""
    if not isinstance(document, dict) or document.get("version") != VERSION:
        return None
    stages = document.get("stages")
    return stages if isinstance(stages, list) and all(map(_is_stage, stages)) else None


def _is_stage(stage: Any) -> bool:
    return isinstance(stage, dict) and isinstance(stage.get("data"), list) and all(map(_is_data, stage["data"]))


def _is_data(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def stage(base: dict[str, Any], data: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What this process is making, from what and of which data; more: further facts of it."""
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **_versions()},
        "base": base,
        "data": list(data),
        **more,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def converted(source: Path, before: Stages, calibration: Path | None) -> Stages:
    """The stages of what a conversion makes of a source with stages, rounded by the records of a calibration file if
    any. Of a foreign source every weight file is hashed, which reads it once more.
    """
    data = [] if calibration is None else [{"name": str(calibration), "sha256": sha256_of(calibration)}]
    return [*before, stage(base_of(source), data)]


def document_of(stages: Stages) -> dict[str, Any]:
    """The stages as they are stored."""
    return {"version": VERSION, "stages": stages}


def file_of(stages: Stages) -> dict[str, bytes]:
    """The stages as a file of a model directory."""
    return {NAME: (json.dumps(document_of(stages), indent=2, ensure_ascii=False) + "\n").encode()}


def sha256_of(file: Path) -> str:
    """Of its bytes, read now."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def base_of(path: str | Path, hashed: Callable[[Path], str] = sha256_of) -> dict[str, Any]:
    """What tells the weights at a path, a file or a directory, from others.

    A directory that was saved here has a manifest with a checksum of every file: its hash stands for all of them. Of
    others every weight file is hashed.
    """
    path = Path(path)
    if (manifest := path / MANIFEST).is_file():
        return {"name": str(path), "manifest_sha256": sha256_of(manifest)}
    files = [path] if path.is_file() else sorted({f for pattern in _WEIGHTS for f in path.glob(pattern)})
    return {"name": str(path), "files": [{"name": f.name, "sha256": hashed(f)} for f in files]}
