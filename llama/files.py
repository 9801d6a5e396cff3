"""Directories that are whole or not there: staging, fsync, rename, and a manifest that finds a changed bit.

Every directory this project writes goes through here (models, training state, converted weights). Nothing here knows
what the files mean, and nothing here ever deletes or overwrites a file that an earlier manifest does not list.

A new directory is written beside its place and renamed into it. Into a directory that exists already (a run's
output, which also holds metrics and training state) the files are staged in a hidden folder inside it; renaming
that folder to `.commit` is the moment the new generation counts, and whoever next opens the directory finishes what
a killed process left undone. Before that moment the earlier generation is whole, after it the new one is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
COMMIT = ".commit"

# What a reader of models or training state would open. One of these that the manifest does not list was added later:
# a stray model.safetensors beside a sharded model would be read in its place.
_READ_BY_NAME = {"config.json", "params.json", "generation_config.json", "chat_format.json", "state.json", ".metadata"}
_READ_BY_SUFFIX = (".safetensors", ".index.json", ".model", ".pth", ".bin", ".distcp")


# --- reading --------------------------------------------------------------------------------------


def looks_like(head: bytes) -> str:
    """What the first bytes of a file show it to be, for error messages; "" when they say nothing."""
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: fetch the real file with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "it is an HTML page: the download went wrong"
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "it is a PyTorch pickle"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file"
    return ""


def read_bytes(path: Path) -> bytes:
    """The bytes of a small file, checked against the manifest beside it if that lists it."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    listed = (read_manifest(path.parent) or {}).get(path.name)
    if listed is not None and (len(data), _hex(zlib.crc32(data))) != (listed.bytes, listed.crc32):
        raise ValueError(_changed(path))
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, checked against the manifest beside it if that lists it."""
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({looks_like(data[:64]) or e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, not an object")
    return value


# --- manifest -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """What the manifest says of one file."""

    bytes: int
    crc32: str  # eight hexadecimal digits


def read_manifest(path: Path) -> dict[str, Listed] | None:
    """The manifest of a directory, or None when it has none. ValueError when it is damaged."""
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_bytes())["files"]
        listed = {name: Listed(f["bytes"], f["crc32"]) for name, f in raw.items()}
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ValueError(f"{file}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file}: damaged; the files beside it cannot be checked") from None
    for name in listed:
        if not is_plain(name):
            raise ValueError(f"{file}: lists {name!r}, which is not a file of this directory")
    return listed


def is_plain(name: object) -> bool:
    """Whether a name read from a file is that of a file right here, not a path to elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def crc32_of(path: Path) -> str:
    """CRC-32 of a file's bytes, as eight hexadecimal digits."""
    crc, buffer = 0, bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            crc = zlib.crc32(view[:n], crc)  # lets go of the interpreter lock: files are checked in parallel
    return _hex(crc)


def _hex(crc: int) -> str:
    return f"{crc:08x}"


def _changed(path: Path) -> str:
    return (
        f"{path}: differs from what was written ({MANIFEST}). Restore it from a copy; if you changed it on purpose, "
        f"delete {path.parent / MANIFEST} to load without checks"
    )


def write_manifest(path: Path, known: dict[str, str] | None = None) -> None:
    """List and fsync every file of a directory. known: checksums that need no second reading."""
    known = known or {}
    files = sorted(p for p in path.iterdir() if p.name != MANIFEST)
    for p in files:
        assert p.is_file(), f"{p}: only plain files go into a saved directory"
    crcs = known | _checksums([p for p in files if p.name not in known])
    listed = {p.name: {"bytes": p.stat().st_size, "crc32": crcs[p.name]} for p in files}
    for p in files:
        fsync(p)
    (path / MANIFEST).write_text(json.dumps({"files": listed}, indent=1) + "\n")
    fsync(path / MANIFEST)
    fsync(path)


def verify(path: str | Path, part: int = 0, parts: int = 1) -> None:
    """Check every file of a directory against its manifest.

    ValueError names the file that is missing, resized, changed, or was added where a reader would take it for part
    of the model. part, parts: check the contents of only every parts-th file, to share the work between processes.
    """
    path = Path(path)
    settle(path)
    listed = read_manifest(path)
    if listed is None:
        raise ValueError(f"{path}: has no {MANIFEST}; nothing says what its files should hold")
    for name, entry in listed.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise ValueError(f"{path / name}: missing, though {MANIFEST} lists it") from None
        if size != entry.bytes:
            raise ValueError(f"{path / name}: {size:,} bytes, but {entry.bytes:,} were written (truncated copy?)")
    for p in sorted(path.iterdir()):
        if (p.name in _READ_BY_NAME or p.name.endswith(_READ_BY_SUFFIX)) and p.name not in listed:
            raise ValueError(f"{p}: was added after the save ({MANIFEST} does not list it); move it elsewhere")
    share = sorted(listed, key=lambda name: -listed[name].bytes)[part::parts]
    for name, crc in _checksums([path / name for name in share]).items():
        if crc != listed[name].crc32:
            raise ValueError(_changed(path / name))


def verified(path: Path) -> str:
    """What verify() complains of, or nothing. Files unchanged since a call that found nothing are not read again."""
    if _passed.get(path) != (stats := _stats(path)) or not stats:
        try:
            verify(path)
        except (ValueError, OSError) as e:
            return str(e)
        trust(path)
    return ""


def trust(path: Path) -> None:
    """Spare verified() the reading of a directory whose checksums this process, or its peers, have just computed."""
    _passed[path] = _stats(path)


_passed: dict[Path, tuple[tuple[str, int, int, int], ...]] = {}


def _stats(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Name, size, time and inode of every file: what changes when a program writes to one."""
    try:
        return tuple((p.name, s.st_size, s.st_mtime_ns, s.st_ino) for p in sorted(path.iterdir()) for s in [p.stat()])
    except OSError:
        return ()


def _checksums(files: list[Path]) -> dict[str, str]:
    """Checksums by file name, in parallel where there is enough to read for that to pay."""
    if sum(p.stat().st_size for p in files) < 1 << 22:
        return {p.name: crc32_of(p) for p in files}
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1, len(files)))) as pool:
        return dict(zip((p.name for p in files), pool.map(crc32_of, files), strict=True))


# --- writing --------------------------------------------------------------------------------------


def need_space(path: Path, needed: int) -> None:
    """ValueError when the file system of a path (which need not exist) has fewer free bytes than needed."""
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"{path}: needs {needed:,} bytes, but {place} has {free:,} free; nothing was written")


@dataclass
class Staged:
    """A directory being written. `lock` tells others that its writer lives; close() lets go of it."""

    directory: Path
    target: Path
    lock: int

    def close(self, *, remove: bool) -> None:
        if remove:
            shutil.rmtree(self.directory, ignore_errors=True)
        if self.lock >= 0:
            os.close(self.lock)
        self.lock = -1


def stage(path: str | Path, needed: int = 0) -> Staged:
    """An empty directory on the file system of `path`, in which to write what publish() puts there.

    Removes what killed writers left behind. ValueError when `path` is a file, holds a model that was not written
    here, or has fewer than `needed` bytes free.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{path}: is a file; choose a directory")
    if target.is_dir():
        settle(target)
        if read_manifest(target) is None:
            for p in sorted(target.iterdir()):
                if p.name in _READ_BY_NAME or p.name.endswith(_READ_BY_SUFFIX):
                    raise ValueError(f"{path}: holds {p.name}, which was not written here; choose another directory")
        home, prefix = target, ".staged-"
    else:
        home, prefix = target.parent, f".{target.name}.staged-"
    return _stage(path, home, prefix, needed)


def _stage(path: str | Path, home: Path, prefix: str, needed: int) -> Staged:
    target = Path(path).resolve()
    try:
        home.mkdir(parents=True, exist_ok=True)
        clean(home, prefix)
        need_space(target, needed)
        directory = home / f"{prefix}{secrets.token_hex(4)}"
        directory.mkdir()
        return Staged(directory, target, _lock(directory))
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e.strerror})") from None


def publish(staged: Staged) -> None:
    """Put a staged directory, manifest and all, in its place. Whole or not at all."""
    target, directory = staged.target, staged.directory
    if directory.parent != target:
        try:
            os.rename(directory, target)
        except OSError as e:
            raise ValueError(
                f"{target}: cannot be put in place ({e.strerror}); did another process write it?"
            ) from None
        fsync(target.parent)
        return
    earlier = read_manifest(target) or {}
    for name in read_manifest(directory) or {}:
        if name not in earlier and (target / name).exists():
            raise ValueError(f"{target / name}: exists and was not written here; choose another directory")
    os.rename(directory, target / COMMIT)
    fsync(target)
    settle(target)


def settle(path: Path) -> None:
    """Finish a save that was killed after it counted and before its last file was in place."""
    commit = path / COMMIT
    if not (commit / MANIFEST).is_file():
        return
    try:
        earlier, new = read_manifest(path) or {}, read_manifest(commit) or {}
        for name in new:
            with contextlib.suppress(FileNotFoundError):  # in place already
                os.replace(commit / name, path / name)
        for name in earlier.keys() - new.keys():
            (path / name).unlink(missing_ok=True)
        fsync(path)
        with contextlib.suppress(FileNotFoundError):  # another process that opened the directory was faster
            os.replace(commit / MANIFEST, path / MANIFEST)
            os.rmdir(commit)
        fsync(path)
    except OSError as e:
        raise ValueError(f"{path}: an interrupted save could not be finished ({e.strerror})") from None


@contextlib.contextmanager
def atomic_directory(path: str | Path, needed: int = 0) -> Iterator[Path]:
    """A directory to write plain files into; leaving the block puts them at `path` with a manifest, all or none.

    needed: bytes that will be written, checked against the free space first. On any error the staged files are
    removed and what was at `path` stays as it was; a full disk is a ValueError that says so.
    """
    staged = stage(path, needed)
    done = False
    try:
        yield staged.directory
        write_manifest(staged.directory)
        publish(staged)
        done = True
    except OSError as e:
        raise full_disk(e, Path(path)) from None
    finally:
        staged.close(remove=not done)


@contextlib.contextmanager
def atomic_file(path: str | Path, needed: int = 0) -> Iterator[Path]:
    """A file to write; leaving the block puts it at `path`, in place of an earlier one, whole or not at all.

    needed: as for atomic_directory. On any error what was at `path` stays as it was.
    """
    target = Path(path).resolve()
    staged = _stage(path, target.parent, f".{target.name}.staged-", needed)
    file = staged.directory / target.name
    try:
        yield file
        fsync(file)
        os.replace(file, target)
        fsync(target.parent)
    except OSError as e:
        raise full_disk(e, Path(path)) from None
    finally:
        staged.close(remove=True)


def full_disk(e: OSError, path: Path) -> OSError | ValueError:
    """The error itself, or one line for the user when it came from a full disk."""
    if e.errno not in (errno.ENOSPC, errno.EDQUOT):
        return e
    return ValueError(f"{path}: the disk is full; nothing was saved and what was there before is unchanged")


def clean(home: Path, prefix: str) -> None:
    """Remove the leftovers of killed writers: directories with this prefix that no live process holds."""
    for p in home.iterdir():
        if not p.name.startswith(prefix):
            continue
        try:
            lock = _lock(p)
        except OSError:
            continue
        shutil.rmtree(p, ignore_errors=True)
        os.close(lock)


def remove(paths: Iterable[Path]) -> None:
    """Delete directories so that a kill in between never leaves half a one under its own name."""
    for p in paths:
        gone = p.with_name(f".{p.name}.staged-{secrets.token_hex(4)}")
        os.rename(p, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _lock(directory: Path) -> int:
    """A descriptor that holds the directory's lock. OSError when a live process has it."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def fsync(path: Path) -> None:
    """Have the kernel write a file's, or a directory's, contents to the disk now."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
