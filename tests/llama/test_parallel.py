"""Every way to shard a model trains like one process that holds all of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import parallel
from llama.parallel import World
from tests.llama import sharded

HERE = Path(__file__).parent


def on_ranks(size: int, folder: Path) -> list[dict[str, Any]]:
    """What sharded.py found on each of so many ranks."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "sharded.py"), str(folder / f"store{size}")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [p.communicate(timeout=280) for p in processes]
    for p, (_, errors) in zip(processes, outputs, strict=True):
        assert p.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without sharding in fp32; in bf16 a group of one."""
    (grouped,) = on_ranks(1, tmp_path_factory.mktemp("one"))
    plain = {way: sharded.run(way, World(0, 1, torch.device("cpu"), None)) for way in ("full_shard", "tied")}
    return {"grouped": grouped, "plain": plain}


def difference(a: dict[str, list[float]], b: dict[str, list[float]], what: str) -> float:
    return max(abs(x - y) for x, y in zip(a[what], b[what], strict=True))


def test_a_group_of_one_is_no_group(alone: dict[str, Any]) -> None:
    for way in ("full_shard", "tied"):
        grouped, plain = alone["grouped"][way], alone["plain"][way]
        assert grouped["losses"] == plain["losses"], way
        assert grouped["end"] == plain["end"], way


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("way", sharded.WAYS)
def test_four_ranks_are_one(way: str, alone: dict[str, Any], four: list[dict[str, Any]]) -> None:
    """fp32: within 3e-6 over 20 steps, the norm too. bf16: within 5e-3."""
    one = alone["plain"]["tied" if way == "tied" else "full_shard"]
    bf16 = way in ("bf16", "split")
    for rank in four:
        assert rank[way]["losses"] == four[0][way]["losses"], "ranks disagree"
        assert difference(rank[way], one, "losses") <= (5e-3 if bf16 else 3e-6)
        assert difference(rank[way], one, "norms") <= (5e-2 if bf16 else 3e-5)
        assert difference(rank[way], one, "end") <= (5e-1 if bf16 else 1e-3)
        share = rank[way]["kept"][0]
        assert 0.4 < share < 0.6 if way == "hybrid_shard" else 0.2 < share < 0.3


def test_norms_are_those_of_torch() -> None:
    model = torch.nn.Linear(7, 5)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    want = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    got = parallel.grad_norm(model.parameters(), World(0, 1, torch.device("cpu"), None))
    torch.testing.assert_close(got, want)


def test_nodes_of_different_sizes_cannot_be_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks on nodes of two."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="hybrid_shard: 3 ranks are no whole number of nodes of 2"):
        parallel.init("cpu", hybrid=True)


def test_ranks_without_a_launcher_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="but not MASTER_ADDR and MASTER_PORT: unset them, or use torchrun"):
        parallel.init("cpu")


def test_more_ranks_than_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes on a machine with 2 GPU\(s\): torchrun --nproc_per_node=2"):
        parallel.init("auto")


LEAVING = """
import sys
from llama import parallel
parallel.init("cpu")
print("there", flush=True)
sys.stdin.readline()
parallel.leave(0)
"""


def test_a_rank_that_is_interrupted_while_leaving_leaves_no_traceback() -> None:
    """Nor does the one that comes to meet it afterwards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    pipe = subprocess.PIPE
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", LEAVING],
            cwd=HERE.parents[1],
            env={**os.environ, **shared, "RANK": rank, "OMP_NUM_THREADS": "1"},
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for rank in "01"
    )
    for process in (first, second):
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
    assert first.stdin is not None
    first.stdin.write("\n")
    first.stdin.flush()
    deadline = time.monotonic() + 60
    while caught(first.pid, signal.SIGINT):  # until it is in leave()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    assert first.communicate(timeout=60) == ("", "")
    assert first.returncode == -signal.SIGINT
    assert second.communicate("\n", timeout=60) == ("", "")
    assert second.returncode == 1


def caught(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> number - 1 & 1)
