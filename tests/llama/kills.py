"""What test_training_state.py and bench_reliability.py run to kill savers: python kills.py DIRECTORY TRIALS [KIND ...].

Prints counts as JSON.

A child saves one generation after another into the same place, every value of generation g being g, and is killed
with SIGKILL at a random moment. What is left must be one whole generation: the last it reported, or the one after.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama.chat import ChatFormat
from llama.checkpoint import load_model, model_files, save_model
from llama.config import LlamaConfig
from llama.layout import entries
from llama.saver import Saver
from llama.training_state import latest_training_state, load_training_state

CONFIG = LlamaConfig(128, 4, 4, 4, 512, 512)  # 4.7 MB: writing takes most of a save


def weights(g: int) -> dict[str, Tensor]:
    return {e.name: torch.full(e.shape, float(g)) for e in entries(CONFIG)}


def save_models(path: Path, report: Callable[[int], object]) -> None:
    for g in itertools.count(1):
        save_a_model(path, g)
        report(g)


def save_a_model(path: Path, g: int) -> None:
    save_model(path, weights(g).items(), CONFIG, None, ChatFormat(), max_shard_bytes=1_500_000)


def values_of_model(path: Path) -> list[float]:
    return sorted({v for p in load_model(path).parameters() for v in p.unique().tolist()})


def save_states(path: Path, report: Callable[[int], object], background: bool = False) -> None:
    """In the background the tensors change at once, and a step border comes every millisecond."""
    saver = Saver(path, 1, background=background, done=lambda saved: report(saved.step))
    files = model_files(CONFIG, None, ChatFormat())
    tensors = {f"model.{k}": v for k, v in weights(0).items()}
    for g in itertools.count(1):
        for t in tensors.values():
            t.fill_(g)
        saver.save(g, tensors, {"step": g}, files)
        for t in tensors.values():
            t.fill_(-1)
        for _ in range(g % 7):
            time.sleep(0.001)
            saver.poll()


def save_in_background(path: Path, report: Callable[[int], object]) -> None:
    save_states(path, report, background=True)


def save_on_two_ranks(path: Path, report: Callable[[int], object]) -> None:
    """Two processes with half of every tensor each, that exchange values all the time as training does."""
    path.mkdir(parents=True)
    rank = 0 if os.fork() else 1
    store = dist.FileStore(str(path / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = {f"model.{k}": v for k, v in weights(0).items()}
    tensors = {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in whole.items()}
    files = model_files(CONFIG, None, ChatFormat())
    saver = Saver(path, 1, background=True, done=lambda saved: rank == 0 and report(saved.step))
    for g in itertools.count(1):
        for t in tensors.values():
            t.to_local().fill_(g)
        saver.save(g, tensors, {"step": g}, files)
        for t in tensors.values():
            t.to_local().fill_(-1)
        for _ in range(g % 7):
            dist.all_reduce(torch.ones(1000))
            saver.poll()


def values_of_state(path: Path) -> list[float]:
    latest = latest_training_state(path)
    assert latest is not None
    tensors = {f"model.{k}": v for k, v in weights(0).items()}
    state = load_training_state(latest, tensors)
    return sorted({float(state["step"])} | {v for p in tensors.values() for v in p.unique().tolist()})


def killed(path: Path, save: Callable[[Path, Callable[[int], object]], None], delay: float) -> int:
    """The last generation that a child reported before it was killed, `delay` seconds after its second."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        save(path, lambda g: os.write(write, g.to_bytes(4, "little")))
        os._exit(1)
    os.close(write)
    with open(read, "rb", buffering=0) as f:
        last = [f.read(4), f.read(4)][-1]
        time.sleep(delay)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := f.read(4):
            last = more
    return int.from_bytes(last, "little")


def main() -> None:
    root, trials, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
    torch.set_num_threads(1)
    kinds = (
        ("model", save_models, values_of_model),
        ("training state", save_states, values_of_state),
        ("training state, in the background", save_in_background, values_of_state),
        ("training state, in the background, two ranks", save_on_two_ranks, values_of_state),
    )
    found = {}
    for kind, save, values in kinds:
        if sys.argv[3:] and kind not in sys.argv[3:]:
            continue
        whole = 0
        for trial in range(trials):
            path = root / kind.replace(" ", "-") / str(trial)
            last = killed(path, save, rng.uniform(0, 0.2))
            left = values(path)
            if len(left) == 1 and left[0] in (last, last + 1):
                whole += 1
            else:
                print(f"{kind}: generation {last} was the last, found {left}", file=sys.stderr)
        found[kind] = {"trials": trials, "whole": whole}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
