"""Tokenised records on disk, memory-mapped: made once per file content, tokenizer, prompt format and length.

Called by loader.py. One directory a file: tokens.bin, rows.npy, rejected.jsonl and meta.json with the checksums of
the others. It is written beside its place and renamed, so a half-written one never counts; a damaged one is made anew.
Two processes that build the same one at a time do the work twice, and the first to finish wins.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.records import BadRecord, OnBad, Record, read_records
from data.tokenise import ROW, Job, token_type, tokenise
from llama.chat import ChatFormat
from llama.tokenizer import Tokenizer

VERSION = 3  # of the cache; raise it when the reading of records, the cut or the layout changes
BAR_AFTER = 0.3  # seconds of tokenising that need no progress bar
_DATA = ("tokens.bin", "rows.npy", "rejected.jsonl")
WORKERS_FROM = 4 << 20  # bytes of a file below which starting processes (0.3 s each) costs more than it brings


@dataclass
class TokenFile:
    """The tokenised records of one file. tokens: ids with the top bit for loss (see tokenise.py); key: its identity."""

    name: str
    key: str
    tokens: NDArray[Any]
    rows: NDArray[Any]
    rejected: int


@dataclass(frozen=True)
class Recipe:
    """All that decides the tokens of a file, apart from the file."""

    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_len: int
    answer: str
    pairs: bool = False  # the records are preference pairs

    def key(self, content: str) -> str:
        """Identity of the tokens of a file with this content hash."""
        choices = [self.chat_format.to_json(), self.max_len, self.answer, self.pairs]
        parts = [VERSION, content, self.tokenizer.sha256, *choices]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def job(self) -> Job:
        return Job(self.tokenizer.model_bytes, self.chat_format.to_json(), self.max_len, self.pairs)


def tokenise_file(
    path: Path, recipe: Recipe, *, cache_dir: Path | None, on_bad: OnBad | None, workers: int, progress: bool
) -> TokenFile:
    """The tokens of a data file, from the cache or made now.

    Rejected records are kept in the cache too: a later run tells on_bad of them again, and without on_bad raises the
    first. cache_dir None: made in memory, for this process alone.
    """
    before = _stat(path)
    content = content_hash(path, cache_dir)
    key = recipe.key(content + path.suffix.lower() * (path.suffix.lower() == ".txt"))  # the same bytes, read as text
    place = cache_dir / f"{path.stem[:40]}-{key[:16]}" if cache_dir else None
    if place and (cached := _open(place, str(path), key)):
        _replay(place, str(path), on_bad)
        return cached
    rejected = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115

    def reject(bad: BadRecord, raw: bytes) -> None:
        entry = {"index": bad.index, "field": bad.field, "reason": bad.reason, "where": bad.where}
        rejected.write(json.dumps({**entry, "raw": base64.b64encode(raw).decode()}).encode() + b"\n")
        assert on_bad is not None
        on_bad(bad, raw)

    def whole(records: Iterable[Record]) -> Iterator[Record]:
        yield from records
        if _stat(path) != before:
            raise ValueError(f"{path}: it was changed while it was read; try again when it is complete")

    with (
        rejected,
        _bar(path.name, progress, total=before[0], unit="B") as bar,
    ):
        records = read_records(
            path,
            instruction=recipe.chat_format.instruction,
            answer=recipe.answer,
            on_bad=reject if on_bad else None,
            on_bytes=bar.update,
            pairs=recipe.pairs,
        )
        workers = workers if before[0] >= WORKERS_FROM else 1
        return _make(str(path), key, whole(records), recipe, place, rejected, workers)


def tokenise_records(
    name: str, records: Iterable[Record], recipe: Recipe, *, cache_dir: Path | None, progress: bool
) -> TokenFile:
    """The tokens of records that are in memory, from the cache or made now."""
    records = list(records)
    h = hashlib.sha256()
    for r in records:
        h.update(repr((r.key, r.dialogue)).encode("utf-8", "surrogatepass"))
    key = recipe.key(h.hexdigest())
    place = cache_dir / f"{name[:40]}-{key[:16]}" if cache_dir else None
    if place and (cached := _open(place, name, key)):
        return cached
    bar = _bar(name, progress, records, unit=" records")
    return _make(name, key, bar, recipe, place, io.BytesIO(), 1)


def _bar(name: str, progress: bool, *what: Iterable[Record], **of: Any) -> tqdm[Any]:
    """A progress bar for what takes longer than a blink."""
    return tqdm(*what, desc=f"tokenising {name}", unit_scale=True, delay=BAR_AFTER, disable=not progress, **of)


def content_hash(path: Path, cache_dir: Path | None) -> str:
    """SHA-256 of a file's bytes; remembered in the cache directory for as long as size, times and inode stay."""
    stat = _stat(path)
    note = (
        cache_dir / f"stat-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.json" if cache_dir else None
    )
    if note:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(note.read_text())
            if known["stat"] == stat:
                return str(known["sha256"])
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    # A file changed within the clock tick of its last change has the same times: remember only what has settled.
    if note and time.time() - max(stat[1], stat[2]) / 1e9 > 2:
        _write(note, json.dumps({"file": str(path.resolve()), "stat": stat, "sha256": digest}).encode())
    return digest


def _stat(path: Path) -> list[int]:
    try:
        s = path.stat()
        with path.open("rb"):
            pass
    except OSError as e:
        raise ValueError(f"{path}: cannot read it ({e.strerror})") from None
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]


# --- writing --------------------------------------------------------------------------------------


def _make(
    name: str,
    key: str,
    records: Iterable[Record],
    recipe: Recipe,
    place: Path | None,
    rejected: IO[bytes],
    workers: int,
) -> TokenFile:
    dtype = token_type(recipe.tokenizer.vocab_size)
    if place is None:
        parts, rows = [], []
        for tokens, batch in _placed(tokenise(records, recipe.job(), workers)):
            parts.append(tokens)
            rows.append(batch)
        return TokenFile(name, key, np.concatenate([np.zeros(0, dtype), *parts]), _join(rows), _count_lines(rejected))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        tmp = Path(tempfile.mkdtemp(prefix=f"{place.name}.tmp-", dir=place.parent))
    except OSError as e:
        raise ValueError(f"{place.parent}: cannot make the token cache there ({e.strerror})") from None
    try:
        rows = []
        with (tmp / "tokens.bin").open("wb") as f:
            for tokens, batch in _placed(tokenise(records, recipe.job(), workers)):
                f.write(tokens.data)
                rows.append(batch)
        np.save(tmp / "rows.npy", _join(rows))
        rejected.seek(0)
        with (tmp / "rejected.jsonl").open("wb") as f:
            shutil.copyfileobj(rejected, f)
        files = {n: {"bytes": (tmp / n).stat().st_size, "crc32": _crc32(tmp / n)} for n in _DATA}
        _write(tmp / "meta.json", json.dumps({"key": key, "name": name, "dtype": dtype.str, "files": files}).encode())
        _into_place(tmp, place)
    except OSError as e:
        raise ValueError(f"{place}: cannot write the token cache ({e.strerror})") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    made = _open(place, name, key)
    assert made is not None, f"{place} does not read back"
    return made


def _into_place(tmp: Path, place: Path) -> None:
    """Rename tmp to place; what stands there already goes, unless another process has just put it there whole."""
    for name in (*_DATA, "meta.json"):
        with (tmp / name).open("rb") as f:
            os.fsync(f.fileno())
    for _ in range(3):
        try:
            tmp.rename(place)
            return
        except OSError:
            if _damage(place) is None:
                return
            shutil.rmtree(place, ignore_errors=True)
    tmp.rename(place)


def _sweep(place: Path) -> None:
    """Remove what a killed process left half-written here; a day old, so that nobody is still writing it."""
    for left in place.parent.glob(f"{glob.escape(place.name)}.tmp-*"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)


def _placed(batches: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The batches with `at` counted from the first token of the file."""
    at = 0
    for tokens, rows in batches:
        rows["at"] += at
        at += tokens.size
        yield tokens, rows


def _join(rows: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, ROW), *rows])


def _write(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.tmp-", delete=False) as f:
            f.write(content)
        os.replace(f.name, path)
    except OSError as e:
        raise ValueError(f"{path}: cannot write the token cache ({e.strerror})") from None


# --- reading --------------------------------------------------------------------------------------


def _crc32(path: Path) -> str:
    crc = 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _damage(place: Path, key: str | None = None) -> str | None:
    """What is wrong with a cache directory, None if it is whole."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        if key is not None and meta["key"] != key:
            return "meta.json is of another file"
        for name in _DATA:
            stated = meta["files"][name]
            if (place / name).stat().st_size != stated["bytes"] or _crc32(place / name) != stated["crc32"]:
                return f"{name} is changed"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{type(e).__name__}: {e}"
    return None


def _open(place: Path, name: str, key: str) -> TokenFile | None:
    """The cache at this place, None if there is none or it is damaged."""
    if not place.exists():
        return None
    if why := _damage(place, key):
        print(f"{place}: the token cache is damaged ({why}); it is made anew", file=sys.stderr)
        return None
    rows = np.load(place / "rows.npy", allow_pickle=False)
    dtype = np.dtype(json.loads((place / "meta.json").read_bytes())["dtype"])
    file = place / "tokens.bin"
    # As a plain array over the mapping: slicing a memmap object costs four times as much.
    tokens = np.memmap(file, dtype, mode="r").view(np.ndarray) if file.stat().st_size else np.zeros(0, dtype)
    with (place / "rejected.jsonl").open("rb") as f:
        return TokenFile(name, key, tokens, rows, _count_lines(f))


def _count_lines(file: IO[bytes]) -> int:
    file.seek(0)
    return sum(1 for _ in file)


def _replay(place: Path, name: str, on_bad: OnBad | None) -> None:
    """Tell of the rejected records that a cached file has."""
    with (place / "rejected.jsonl").open("rb") as f:
        for line in f:
            r = json.loads(line)
            bad = BadRecord(name, r["index"], r["field"], r["reason"], r["where"])
            if on_bad is None:
                raise bad
            on_bad(bad, base64.b64decode(r["raw"]))
