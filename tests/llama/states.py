"""Training states for the tests that save, find, keep and read them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llama.chat import ChatFormat
from llama.checkpoint import model_files
from llama.config import LlamaConfig
from llama.model import Llama
from llama.saver import Saver, save_training_state

CONFIG = LlamaConfig(32, 2, 4, 2, 48, 259, max_seq_len=64)  # as in ranks.py


def made(seed: int = 0) -> Llama:
    model = Llama(CONFIG)
    model.init_weights(seed)
    return model


def tensors_of(model: Llama, scale: float = 2.0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        found[f"model.{name}"] = p.detach()
        found[f"optimizer.{name}.exp_avg"] = p.detach() * scale
        found[f"optimizer.{name}.step"] = torch.tensor(scale)
    found["rng.0"] = torch.full((16,), 10, dtype=torch.uint8)
    return found


def save(output_dir: Path, step: int, limit: int | None = None, seed: int = 0) -> Path:
    small = model_files(CONFIG, None, ChatFormat("plain"))
    return save_training_state(output_dir, step, tensors_of(made(seed)), {"step": step}, small, limit)


def saved(saver: Saver, step: int, small: dict[str, bytes]) -> None:
    saver.save(step, tensors_of(made()), {"step": step}, small)
    saver.wait()


def steps(output_dir: Path) -> list[str]:
    return sorted(p.name for p in output_dir.iterdir())


def flip(file: Path, where: int = 40, bit: int = 1) -> None:
    with open(file, "r+b") as f:
        f.seek(where)
        byte = f.read(1)[0] ^ bit
        f.seek(where)
        f.write(bytes([byte]))
