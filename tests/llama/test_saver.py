"""Saving: whole or not at all, whatever fails or dies, while training goes on; two ranks: test_training_state.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from llama import files
from llama.chat import ChatFormat
from llama.checkpoint import load_model, model_files
from llama.files import MANIFEST
from llama.saver import Saved, Saver, save_training_state
from llama.training_state import latest_training_state, load_training_state
from tests.llama.states import CONFIG, flip, made, save, saved, steps, tensors_of

HERE = Path(__file__).parent


def test_nothing_but_tensors_is_pickled(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="only tensors"):
        save_training_state(tmp_path, 1, {"model.x": 3}, {}, {})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_training_state(tmp_path, 1, {"model.x": torch.ones(1)}, {"loss": float("nan")}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_prunes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, limit=1)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fails)
    with pytest.raises(ValueError, match=r"checkpoint-20: could not be saved .*Input/output error"):
        save(tmp_path, 20, limit=1)
    assert steps(tmp_path) == ["checkpoint-10"]
    assert latest_training_state(tmp_path) == tmp_path / "checkpoint-10"


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 10, seed=0)
    path = save(tmp_path, 10, seed=1)
    assert torch.equal(load_model(path).embed.weight, made(1).embed.weight)
    flip(path / "__0_0.distcp")
    save(tmp_path, 10, seed=2)
    assert torch.equal(load_model(path).embed.weight, made(2).embed.weight)
    (path / MANIFEST).unlink()
    with pytest.raises(ValueError, match="was not written here"):
        save(tmp_path, 10)
    assert steps(tmp_path) == ["checkpoint-10"]


def test_the_thread_that_writes_is_on_the_runs_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads start on device 0, which of several ranks is another's."""
    chosen: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: chosen.append((i, threading.current_thread().name)))
    saver = Saver(tmp_path, background=True)
    saver.save(1, {"model.x": torch.ones(3)}, {}, {})
    saver.wait()
    assert [i for i, _ in chosen] == [3]
    assert chosen[0][1] != threading.current_thread().name


def test_a_full_disk_says_so_and_leaves_the_earlier_checkpoint(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small_disk, 10)
    big = {f"model.{i}": torch.ones(1 << 20) for i in range(8)}
    with pytest.raises(ValueError, match=r"checkpoint-20: needs [\d,]+ bytes, but .* has [\d,]+ free"):
        save_training_state(small_disk, 20, big, {}, {})
    monkeypatch.setattr(files, "need_space", lambda *_: None)
    with pytest.raises(ValueError, match=r"checkpoint-20: the disk is full; the earlier checkpoints are unchanged"):
        save_training_state(small_disk, 20, big, {}, {})
    assert steps(small_disk) == ["checkpoint-10"]
    assert latest_training_state(small_disk) == small_disk / "checkpoint-10"


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_at_any_point_leaves_the_earlier_checkpoint(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """Ballast leaves room for so much of the save; the free space that was checked first is gone meanwhile."""
    save(small_disk, 10)
    size = sum(p.stat().st_size for p in (small_disk / "checkpoint-10").iterdir())
    monkeypatch.setattr(files, "need_space", lambda *_: None)
    saver = Saver(small_disk, 1, background=background)
    small = model_files(CONFIG, None, ChatFormat("plain"))
    for point in range(5):
        room = size * point // 5 // 4096 * 4096
        with open(small_disk / "ballast", "wb") as f:
            os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(small_disk).free - room)
        with pytest.raises(ValueError, match=r"checkpoint-20: .*disk is full|cannot be written .No space left"):
            saved(saver, 20, small)
        (small_disk / "ballast").unlink()
        assert steps(small_disk) == ["checkpoint-10"], point
    assert load_training_state(small_disk / "checkpoint-10", tensors_of(made())) == {"step": 10}
    saved(saver, 20, small)  # room again: it goes on
    assert steps(small_disk) == ["checkpoint-20"]


# --- in the background ----------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Shards are written only once it is set."""
    opened, write = threading.Event(), dcp.FileSystemWriter.write_data

    def waits(*args: Any, **options: Any) -> Any:
        assert opened.wait(60)
        return write(*args, **options)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", waits)
    return opened


def begun(saver: Saver, step: int, seed: int = 0) -> dict[str, Tensor]:
    tensors = tensors_of(made(seed))
    saver.save(step, tensors, {"step": step}, model_files(CONFIG, None, ChatFormat("plain")))
    return tensors


def test_a_background_save_holds_the_values_of_the_call(tmp_path: Path, gate: threading.Event) -> None:
    told: list[Saved] = []
    saver = Saver(tmp_path, background=True, done=told.append)
    tensors = begun(saver, 10)
    for t in tensors.values():  # training goes on while the shards are written
        t.add_(1)
    saver.poll()
    assert told == []
    assert latest_training_state(tmp_path) is None
    time.sleep(0.3)
    gate.set()
    while not told:
        saver.poll()
    into = {k: torch.zeros_like(v) for k, v in tensors.items()}
    assert load_training_state(tmp_path / "checkpoint-10", into) == {"step": 10}
    assert all(torch.equal(into[k], v) for k, v in tensors_of(made()).items())
    assert (told[0].step, told[0].path) == (10, tmp_path / "checkpoint-10")
    assert 0 < told[0].stalled < told[0].seconds - 0.25
    saver.poll()
    saver.wait()
    assert len(told) == 1


def test_background_saves_come_one_after_the_other(tmp_path: Path, gate: threading.Event) -> None:
    told: list[Saved] = []
    saver = Saver(tmp_path, 1, background=True, done=told.append)
    begun(saver, 10)
    assert steps(tmp_path)[0].startswith(".checkpoint-10.staged-")
    threading.Timer(0.3, gate.set).start()
    begun(saver, 20)  # waits for the first, which counts before the second begins
    assert [s.step for s in told] == [10]
    assert told[0].stalled > 0.2
    saver.wait()
    assert [s.step for s in told] == [10, 20]
    assert steps(tmp_path) == ["checkpoint-20"]


@pytest.mark.parametrize("how", ["poll", "wait", "save"])
def test_an_error_in_the_background_comes_out_and_prunes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    save(tmp_path, 10, limit=1)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fails)
    saver = Saver(tmp_path, 1, background=True)
    begun(saver, 20)

    def until_it_fails() -> None:
        while True:
            begun(saver, 30) if how == "save" else getattr(saver, how)()

    with pytest.raises(ValueError, match=r"checkpoint-20: the disk is full; the earlier checkpoints are unchanged"):
        until_it_fails()
    assert steps(tmp_path) == ["checkpoint-10"]
    monkeypatch.undo()
    begun(saver, 30)
    saver.wait()
    assert steps(tmp_path) == ["checkpoint-30"]


@pytest.mark.parametrize("known", [True, False])
def test_copies_that_do_not_fit_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event, known: bool
) -> None:
    read = Path.read_text

    def memory(path: Path) -> str:
        if str(path) != "/proc/meminfo":
            return read(path)
        if not known:
            raise FileNotFoundError(path)  # as on macOS
        return "MemAvailable: 100 kB\n"

    monkeypatch.setattr(Path, "read_text", memory)
    gate.set()
    begun(Saver(tmp_path, background=True), 10)
    assert steps(tmp_path) == ["checkpoint-10"]


def test_what_a_killed_run_left_of_another_step_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-7.staged-00000000").mkdir()
    save(tmp_path, 10)
    assert steps(tmp_path) == ["checkpoint-10"]


# --- killed while saving --------------------------------------------------------------------------


def test_sigkill_at_random_moments_leaves_a_whole_generation(tmp_path: Path) -> None:
    """kills.py saves over and over and is killed; see there for what it checks after each of 32 deaths."""
    done = subprocess.run(
        [sys.executable, HERE / "kills.py", tmp_path, "8"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4
    assert all(kind == {"trials": 8, "whole": 8} for kind in found.values()), found
