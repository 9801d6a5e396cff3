"""Training state: exact on any number of ranks, whole after any death, and safe to open."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from llama import training_state
from llama.chat import ChatFormat
from llama.checkpoint import load_chat_format, load_config, load_model, save_model
from llama.files import MANIFEST, write_manifest
from llama.optimizer import SplitAdamW
from llama.saver import save_training_state
from llama.training_state import latest_training_state, load_training_state
from tests.llama.states import CONFIG, flip, made, save, steps, tensors_of

HERE = Path(__file__).parent
# --- one process ----------------------------------------------------------------------------------


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    path = save(tmp_path / "out", 20)
    assert path == tmp_path / "out/checkpoint-20"
    wanted, into = tensors_of(made()), {k: torch.zeros_like(v) for k, v in tensors_of(made()).items()}
    assert load_training_state(path, into) == {"step": 20}
    assert all(torch.equal(into[k], wanted[k]) for k in wanted)


def test_the_low_halves_of_split_weights_come_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(40, dtype=torch.bfloat16))
    optimizer = SplitAdamW([{"params": [weight]}], {weight: "w"}, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    optimizer.assign(weight, torch.linspace(-1, 1, 40))
    state = {f"optimizer.w.{name}": t for name, t in optimizer.state[weight].items()}
    path = save_training_state(tmp_path, 1, {"model.w": weight.detach(), **state}, {}, {})
    into = {"model.w": torch.zeros_like(weight), **{name: torch.zeros_like(t) for name, t in state.items()}}
    load_training_state(path, into)
    assert torch.equal(into["model.w"], weight)
    assert state["optimizer.w.low"].any()
    assert all(torch.equal(into[name], t) for name, t in state.items())


def test_a_checkpoint_opens_as_a_model(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    model = load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made().parameters(), strict=True))
    assert model.embed.weight.dtype == torch.float32
    assert load_model(path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    assert load_config(path) == CONFIG
    assert load_chat_format(path) == ChatFormat("plain")


def test_what_does_not_fit_the_run_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    good = tensors_of(made())
    for change, message in (
        (lambda t: t | {"model.more": torch.ones(2)}, r"missing: \['model.more'\]"),
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, r"unexpected: \['model.norm.weight'\]"),
        (lambda t: t | {"model.norm.weight": torch.ones(31)}, r"model.norm.weight is \(32,\) there and \(31,\)"),
    ):
        with pytest.raises(ValueError, match=rf"checkpoint-1: .*{message}"):
            load_training_state(path, change(good))
    with pytest.raises(ValueError, match="no such training checkpoint"):
        load_training_state(tmp_path / "checkpoint-2", good)
    with pytest.raises(ValueError, match="has no manifest"):
        load_training_state(tmp_path, good)


def test_generator_states_of_other_ranks_are_optional(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    into = tensors_of(made()) | {"rng.3": torch.zeros(16, dtype=torch.uint8)}
    load_training_state(path, into)
    assert not into["rng.3"].any()
    del into["rng.3"], into["rng.0"]
    load_training_state(path, into)


# --- keeping and finding --------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latest_training_state(tmp_path / "nowhere") is None
    for step in (9, 10, 200):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").mkdir()
    assert latest_training_state(tmp_path) == tmp_path / "checkpoint-200"
    assert "checkpoint-300: passed over: it is not a training state" in capsys.readouterr().err
    flip(tmp_path / "checkpoint-200/__0_0.distcp")
    assert latest_training_state(tmp_path) == tmp_path / "checkpoint-10"
    assert "__0_0.distcp: differs from what was written" in capsys.readouterr().err


def test_the_limit_counts_only_what_verifies(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, limit=2)
    assert steps(tmp_path) == ["checkpoint-20", "checkpoint-30"]
    flip(tmp_path / "checkpoint-30/__0_0.distcp")
    save(tmp_path, 40, limit=2)
    # 30 is broken and does not count, so 20 stays: it is the last good one before 40.
    assert steps(tmp_path) == ["checkpoint-20", "checkpoint-30", "checkpoint-40"]
    save(tmp_path, 50, limit=2)
    assert steps(tmp_path) == ["checkpoint-40", "checkpoint-50"]
    save(tmp_path, 60, limit=1)
    assert steps(tmp_path) == ["checkpoint-60"]


def test_pruning_leaves_what_is_not_ours_and_what_is_newer(tmp_path: Path) -> None:
    save(tmp_path, 500)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/optimizer.pt").write_text("of another program")
    (tmp_path / "metrics.jsonl").write_text("")
    save(tmp_path, 10, limit=1)
    save(tmp_path, 20, limit=1)
    assert steps(tmp_path) == ["checkpoint-1", "checkpoint-20", "checkpoint-500", "metrics.jsonl"]


def test_a_run_begun_anew_forgets_its_own_checkpoints_only(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "checkpoint-1").mkdir()
    training_state.forget(tmp_path)
    assert steps(tmp_path) == ["checkpoint-1"]
    training_state.forget(tmp_path / "nowhere")


# --- hostile and damaged directories --------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_refused_and_its_file_named(tmp_path: Path) -> None:
    """Unchecked, 196 of 200 flips in a shard loaded as wrong weights."""
    path, into, rng = save(tmp_path, 1), tensors_of(made()), random.Random(0)
    names = sorted(p.name for p in path.iterdir() if p.name != MANIFEST)
    for trial in range(120):
        file = path / names[trial % len(names)]
        where, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
        flip(file, where, bit)
        with pytest.raises(ValueError, match=str(file)):
            load_training_state(path, into)
        flip(file, where, bit)
    load_training_state(path, into)


class Evil:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def hostile(path: Path, mark: Path, kind: str) -> None:
    """Turn a good checkpoint into an attack whose manifest is in order."""
    tensors: dict[str, Any] = {**tensors_of(made())}
    if kind == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    elif "entry" in kind:
        for p in [path / ".metadata", *path.glob("*.distcp")]:
            p.unlink()
        name = "model.norm.weight" if kind == "bytes entry" else "rng.evil"
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(tensors | {name: Evil(mark)}, checkpoint_id=path, no_dist=True)
    else:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            if kind == "traversal":
                info.relative_path = "../../secret"
            elif kind == "transform":
                info.transform_descriptors = ["zstd"]
            elif kind == "beyond the end":
                info.offset += 10**9
        if kind == "half a tensor":
            chunks = metadata.state_dict_metadata["model.embed.weight"].chunks
            chunks[0].sizes = torch.Size([100, 32])
        if kind == "huge":
            metadata.state_dict_metadata["model.embed.weight"].size = torch.Size([2**40, 2**20])
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / MANIFEST).unlink()
    write_manifest(path)


@pytest.mark.parametrize(
    "kind",
    ["metadata", "bytes entry", "added bytes entry", "traversal", "transform", "beyond the end", "half a tensor",
     "huge"],
)  # fmt: skip
def test_a_hostile_checkpoint_runs_no_code_and_reads_nothing_else(tmp_path: Path, kind: str) -> None:
    path, mark = save(tmp_path / "run", 1), tmp_path / "mark"
    (tmp_path / "secret").write_bytes(next(path.glob("*.distcp")).read_bytes())
    hostile(path, mark, kind)
    with pytest.raises(ValueError, match="checkpoint-1: "):
        load_training_state(path, tensors_of(made()))
    with pytest.raises(ValueError, match="checkpoint-1: "):
        load_model(path)
    assert not mark.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """torch's own reader runs the code: if it ever stops, the reader here may go."""
    path, mark = save(tmp_path / "run", 1), tmp_path / "mark"
    hostile(path, mark, "metadata")
    with pytest.raises(CheckpointException), pytest.warns(UserWarning, match="single process"):
        dcp.load(tensors_of(made()), checkpoint_id=path, no_dist=True)
    assert mark.exists()


def test_damaged_metadata_is_one_line(tmp_path: Path) -> None:
    path, rng = save(tmp_path, 1), random.Random(1)
    good = (path / ".metadata").read_bytes()
    (path / MANIFEST).unlink()
    complaints = []
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (path / ".metadata").write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        try:
            training_state.read_tensors(path, tensors_of(made()))
        except ValueError as e:
            complaints.append(str(e))
    assert len(complaints) > 100
    assert not [c for c in complaints if "\n" in c]
    (path / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no \.metadata"):
        training_state.read_tensors(path, {})


# --- two ranks ------------------------------------------------------------------------------------


def test_two_ranks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """1 -> 2 -> 1 resharding, sharded fills and exports, and errors that reach every rank; see ranks.py."""
    save(tmp_path / "one", 3)
    save_model(tmp_path / "model", made().named_parameters(), CONFIG, None, ChatFormat())
    if os.geteuid() == 0:
        (tmp_path / "disk").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path / "disk")]
        if subprocess.run(mount, capture_output=True).returncode:
            (tmp_path / "disk").rmdir()
        else:
            request.addfinalizer(lambda: subprocess.run(["umount", str(tmp_path / "disk")], check=True))
    command = [sys.executable, str(HERE / "ranks.py")]
    pair = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [p.communicate(timeout=300) for p in pair]
    for p, (_, errors) in zip(pair, outputs, strict=True):
        assert p.returncode == 0, errors
    for rank, (out, _) in enumerate(outputs):
        found = json.loads(out.splitlines()[-1])
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "config.json"} < set(found["saved"])
        assert found["state"] == {"step": 7}
        assert found["same on two"]
        assert found["latest"].endswith("run/checkpoint-7")
        assert found["one to two"]
        assert found["generators"] == 10 + rank  # rank 0's was stored; rank 1 keeps what it had
        assert found["weights from a model"]
        assert found["weights from a checkpoint"]
        assert "__1_0.distcp: differs from what was written" in found["flipped"]
        assert "__1_0.distcp: differs from what was written" in found["shared out"]
        assert found["latest of torn"] == "None"
        assert "cannot be written" in found["not a directory"]
        assert "embed.weight has NaN" in found["not finite"]
        assert found["while training"] > 20
        assert found["values of the call"]
        assert re.fullmatch(r".*checkpoint-9: could not be saved \(.*Input/output error.*\)", found["one rank fails"])
        assert found["left of the background"] == ["checkpoint-8"]
        if (tmp_path / "disk").exists():
            assert "checkpoint-2: needs " in found["no space"]
            for how in ("full", "full in the background"):
                assert "checkpoint-2: the disk is full; the earlier checkpoints are unchanged" in found[how]
            assert found["left"] == ["checkpoint-1"]
            assert found["still whole"] == {"step": 1}
    assert not (tmp_path / "nan").exists()
    # And back on one.
    into = {k: torch.zeros_like(v) for k, v in tensors_of(made()).items()}
    assert load_training_state(tmp_path / "run/checkpoint-7", into) == {"step": 7}
    assert all(torch.equal(into[k], v) for k, v in tensors_of(made()).items())
    for path in ("run/checkpoint-7", "exported"):
        model = load_model(tmp_path / path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made().parameters(), strict=True))
