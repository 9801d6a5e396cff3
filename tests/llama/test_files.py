"""Directories that are whole or not there."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama import files
from llama.files import COMMIT, MANIFEST, atomic_directory, atomic_file, looks_like, read_json, settle, stage, verify


def write(path: Path, **contents: str) -> None:
    """A generation: a__txt="..." becomes the file a.txt."""
    with atomic_directory(path) as directory:
        for name, text in contents.items():
            (directory / name.replace("__", ".")).write_text(text)


def contents(path: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in path.iterdir() if p.is_file() and p.name != MANIFEST}


def test_a_directory_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    write(tmp_path / "deep/out", a__txt="one", b__bin="two")
    verify(tmp_path / "deep/out")
    listed = json.loads((tmp_path / "deep/out" / MANIFEST).read_text())["files"]
    assert listed["a.txt"] == {"bytes": 3, "crc32": "7a6c86f1"}
    assert set(listed) == {"a.txt", "b.bin"}
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop_halfway() -> None:
        with atomic_directory(out) as directory:
            (directory / "a.txt").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_halfway()
    assert os.listdir(tmp_path) == []
    write(out, a__txt="first")
    with pytest.raises(RuntimeError, match="stop"):
        stop_halfway()
    verify(out)
    assert contents(out) == {"a.txt": "first"}
    assert sorted(os.listdir(out)) == ["a.txt", MANIFEST]


def test_a_single_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "x.db"
    for text in ("first", "second"):
        with atomic_file(target) as file:
            file.write_text(text)
        assert target.read_text() == text

    def write_and_fail() -> None:
        with atomic_file(target) as file:
            file.write_text("half")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_and_fail()
    assert target.read_text() == "second"
    assert [p.name for p in target.parent.iterdir()] == ["x.db"]
    with pytest.raises(ValueError, match=r"x\.db/y: cannot be written"), atomic_file(target / "y"):
        pass


def test_a_new_generation_replaces_its_own_files_and_touches_no_other(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoint-5").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("{}\n")
    write(out, config__json="{}", a__safetensors="1", b__safetensors="1")
    write(out, config__json="{}", a__safetensors="22")
    verify(out)
    assert contents(out) == {"config.json": "{}", "a.safetensors": "22", "metrics.jsonl": "{}\n"}
    assert (out / "checkpoint-5").is_dir()


def test_what_was_not_written_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "file", a__txt="1")
    foreign = tmp_path / "downloaded"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match=r"downloaded: holds model.safetensors, which was not written here"):
        write(foreign, a__txt="1")
    assert contents(foreign) == {"model.safetensors": "precious"}
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"a\.txt: exists and was not written here"):
        write(notes, a__txt="1")
    assert contents(notes) == {"a.txt": "mine"}
    assert os.listdir(notes) == ["a.txt"]


def test_leftovers_of_dead_writers_go_and_live_ones_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    dead = tmp_path / ".out.staged-dead"
    dead.mkdir()
    (dead / "half").write_text("")
    live = stage(out)
    assert not dead.exists()
    write(out, a__txt="1")
    assert live.directory.is_dir()
    live.close(remove=True)
    assert os.listdir(tmp_path) == ["out"]


def test_one_line_when_the_disk_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out: needs 1,000,000,000,000,000 bytes, but .* has [\d,]+ free"):
        stage(tmp_path / "out", 10**15)
    assert os.listdir(tmp_path) == []


# --- verification ---------------------------------------------------------------------------------


def flip(file: Path, where: int, bit: int) -> None:
    with open(file, "r+b") as f:
        f.seek(where)
        byte = f.read(1)[0] ^ bit
        f.seek(where)
        f.write(bytes([byte]))


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    """Without a manifest 196 of 200 flips loaded as wrong weights."""
    out, rng = tmp_path / "out", random.Random(0)
    write(out, config__json='{"a": 1}', model__safetensors="".join(rng.choices("abcdef", k=5000)), x__txt="z")
    names = [*contents(out), MANIFEST]
    for trial in range(300):
        file = out / names[trial % len(names)]
        where, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
        flip(file, where, bit)
        with pytest.raises(ValueError, match=str(out)) as caught:
            verify(out)
        named = names if file.name == MANIFEST else [file.name]  # a size changed in the manifest looks like a cut file
        assert any(name in str(caught.value) for name in named)
        flip(file, where, bit)
    verify(out)


def test_missing_truncated_and_added_files_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, config__json="{}", model__safetensors="0123456789")
    (out / "README.md").write_text("a note may be added")
    verify(out)
    (out / "adapter.safetensors").write_text("x")
    with pytest.raises(ValueError, match=r"adapter.safetensors: was added after the save"):
        verify(out)
    (out / "adapter.safetensors").unlink()
    (out / "model.safetensors").write_text("012345678")
    with pytest.raises(ValueError, match=r"model.safetensors: 9 bytes, but 10 were written"):
        verify(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: missing"):
        verify(out)
    (out / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has no manifest.json"):
        verify(out)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": 1}', '{"files": {"a": 1}}', '{"files": {"../a": {"bytes": 1, "crc32": "0"}}}', "\xff",
     "[" * 100_000],
    ids=range(8),
)  # fmt: skip
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest.json: (damaged|lists)"):
        verify(tmp_path)


def test_a_small_file_is_checked_when_it_is_read_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, config__json='{"a": 1}')
    assert read_json(out / "config.json") == {"a": 1}
    (out / "config.json").write_text('{"a": 2}')
    with pytest.raises(ValueError, match=r"config.json: differs from what was written"):
        read_json(out / "config.json")
    (out / MANIFEST).unlink()
    assert read_json(out / "config.json") == {"a": 2}
    for text, why in (("", "empty"), ("<html>", "HTML"), ("version https://git-lfs.github", "LFS"), ("[1]", "list")):
        (out / "config.json").write_text(text)
        with pytest.raises(ValueError, match=why):
            read_json(out / "config.json")


def test_unchanged_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", a__txt="1")
    assert files.verified(tmp_path / "out") == ""
    monkeypatch.setattr(files, "verify", lambda path: pytest.fail("read again"))
    assert files.verified(tmp_path / "out") == ""
    monkeypatch.undo()
    (tmp_path / "out/a.txt").write_text("2")
    assert "a.txt" in files.verified(tmp_path / "out")
    assert "missing" in files.verified(tmp_path / "nowhere") or "no manifest" in files.verified(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("head", "word"),
    [(b"", "empty"), (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"<!DOCTYPE html>", "HTML"),
     (b"PK\x03\x04", "pickle"), (b"GGUF", "GGUF")],
)  # fmt: skip
def test_first_bytes_say_what_a_file_is(head: bytes, word: str) -> None:
    assert word in looks_like(head)
    assert looks_like(b"\x10\0\0\0\0\0\0\0{") == ""


# --- killed in the middle -------------------------------------------------------------------------


@pytest.fixture
def quick_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: hundreds of fsyncs take seconds on a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def run_until(step: int, path: Path, generation: str) -> bool:
    """Write a generation in a child that dies before its step-th change of the disk; whether it got to the end."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(call: object) -> object:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return call(*args, **kwargs)  # type: ignore[operator]

            return wrapped

        for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            shard = "b__safetensors" if generation == "1" else "c__safetensors"
            write(path, config__json=generation, a__safetensors=generation, **{shard: generation})
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of every fork
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_death_before_any_change_of_the_disk_leaves_a_whole_generation(quick_dir: Path, replacing: bool) -> None:
    for step in range(1, 200):
        out = quick_dir / f"run{step}"
        if replacing:
            out.mkdir()
            (out / "metrics.jsonl").write_text("kept")
            write(out, config__json="1", a__safetensors="1", b__safetensors="1")
        finished = run_until(step, out, "2" if replacing else "1")
        if replacing or out.exists():
            verify(out)
            found = contents(out)
            assert not replacing or found.pop("metrics.jsonl") == "kept"
            assert found in (
                {"config.json": "1", "a.safetensors": "1", "b.safetensors": "1"},
                {"config.json": "2", "a.safetensors": "2", "c.safetensors": "2"},
            )
        write(out, config__json="3")  # the next save works and leaves nothing of the dead one
        assert contents(out).pop("config.json") == "3"
        assert not [p for p in [*out.iterdir(), *quick_dir.iterdir()] if ".staged-" in p.name or p.name == COMMIT]
        if finished:
            break
    else:
        pytest.fail("never finished")
    assert step >= 10


def test_a_commit_that_cannot_be_finished_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", a__txt="1")
    (tmp_path / "out" / COMMIT).mkdir()
    (tmp_path / "out" / COMMIT / MANIFEST).write_text('{"files": {"a.txt": {"bytes": 1, "crc32": "00000000"}}}')

    def read_only(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(ValueError, match=r"interrupted save could not be finished \(Read-only"):
        settle(tmp_path / "out")
