"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, strict both ways.

train.py saves them, generate.py opens them over a base; what is saved opens in peft over transformers, and what peft
saved opens here (q and k have Hugging Face's row order, so no number moves). Beside PEFT's two files stand the prompt
format and a manifest. A training state of a LoRA run holds adapters only, and opens here together with its base.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from llama import checkpoint, lora, nf4, parallel, training_state
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.files import MANIFEST, atomic_directory, looks_like, read_json, settle, verify
from llama.layout import entries
from llama.lora_config import LoRAConfig, from_peft, to_peft
from llama.model import Llama
from llama.together import on_first_rank

CONFIG = checkpoint.ADAPTER_CONFIG
TENSORS = "adapter_model.safetensors"
_DTYPES = ("F32", "F16", "BF16")


def _peft_names(config: LlamaConfig, adapter: LoRAConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """Our name of every adapter -> PEFT's, and its shape."""
    names = {}
    for e in entries(config):
        own = e.name.removesuffix(".weight")
        if own.rpartition(".")[2] in adapter.targets:
            out, into = e.shape
            theirs = f"base_model.model.{e.hf.removesuffix('.weight')}"
            names[f"{own}.lora_A"] = f"{theirs}.lora_A.weight", (adapter.r, into)
            names[f"{own}.lora_B"] = f"{theirs}.lora_B.weight", (out, adapter.r)
    return names


# --- writing --------------------------------------------------------------------------------------


def config_file(adapter: LoRAConfig, base: Path) -> dict[str, bytes]:
    """adapter_config.json, by its name."""
    return {CONFIG: _json(to_peft(adapter, str(base.resolve())))}


def _json(d: dict[str, Any]) -> bytes:
    return (json.dumps(d, indent=2, allow_nan=False) + "\n").encode()


def save_adapter(
    path: str | Path,
    model: Llama,
    adapter: LoRAConfig,
    base: Path,
    chat_format: ChatFormat | None = None,
    beside: dict[str, bytes] | None = None,
) -> None:
    """Write the adapters of a model, sharded or not, in fp32, whole or not at all. All ranks call it, rank 0 writes.

    beside: further files of the directory.
    """
    names = _peft_names(model.config, adapter)
    found = {n: parallel.whole(p, parallel.local(p).detach()).cpu() for n, p in lora.adapters(model)}
    assert found.keys() == names.keys(), "these are not the adapters of this model"
    if problem := [n for n, p in found.items() if not bool(torch.isfinite(p).all())]:
        raise ValueError(f"{path}: {problem[0]} has NaN or infinite values; the adapters are not saved")
    files = config_file(adapter, base) | (beside or {})
    if chat_format is not None:
        files["chat_format.json"] = _json(chat_format.to_json())

    def write() -> None:
        tensors = {names[name][0]: p.contiguous() for name, p in found.items()}
        files[TENSORS] = safetensors_bytes(tensors, {"format": "pt"})
        with atomic_directory(path, sum(map(len, files.values())) + (1 << 20)) as directory:
            for name, data in files.items():
                (directory / name).write_bytes(data)

    on_first_rank(write)


def fingerprint(base: Path) -> str:
    """A number that tells one base from another without reading all of it: sizes and both ends of its weight files."""
    crc = 0
    for file in sorted([*base.glob("*.safetensors"), *base.glob("*.distcp")]):
        with open(file, "rb") as f:
            size = f.seek(0, 2)
            crc = zlib.crc32(f"{file.name} {size}".encode(), crc)
            for at in (0, max(0, size - (1 << 20))):
                f.seek(at)
                crc = zlib.crc32(f.read(1 << 20), crc)
    return f"{crc:08x}"


# --- reading --------------------------------------------------------------------------------------


def load_config(path: str | Path) -> LoRAConfig:
    """The settings in an adapter directory."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        what = f"has no {CONFIG}, so it is not an adapter directory" if path.is_dir() else "no such directory"
        raise ValueError(f"{path}: {what}; train.py --lora_r leaves one at <output_dir>/adapter")
    settle(path)
    try:
        return from_peft(read_json(path / CONFIG))
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(str(path)) else f"{path}/{e}") from None


def base_of(path: str | Path) -> Path:
    """The directory of the model that adapters belong to, as their configuration names it."""
    name = read_json(Path(path) / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise ValueError(f"{path}: its base model {name!r} is not a directory here; name it with --checkpoint DIR")
    return Path(name)


@torch.no_grad()
def add_adapter(model: Llama, path: str | Path) -> None:
    """Put the adapters of a directory beside a loaded model's weights; lora.merge() folds them in.

    ValueError, one line, for anything that is not exactly the adapters that the configuration describes.
    """
    path = Path(path)
    adapter = load_config(path)
    if (path / MANIFEST).exists():
        verify(path)
    if (path / ".metadata").exists():
        raise ValueError(f"{path}: a training state; open it as it is: --checkpoint {path}")
    file = path / TENSORS
    if not file.is_file():
        old = next(iter(sorted(path.glob("adapter_model.bin"))), None)
        remedy = "; resave it with peft: save_pretrained(DIR, safe_serialization=True)" if old else ""
        raise ValueError(f"{path}: no {TENSORS}{f', only {old.name}, a pickle' if old else ''}{remedy}")
    names = _peft_names(model.config, adapter)
    try:
        opened = safe_open(file, framework="pt")
        stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not iterable)
    except (SafetensorError, OSError) as e:
        head = file.read_bytes()[:64]
        raise ValueError(f"{file}: not a whole safetensors file ({looks_like(head) or e})") from None
    wanted = dict(names.values())
    missing, unexpected = [n for n in wanted if n not in stored], [n for n in stored if n not in wanted]
    if missing or unexpected:
        shown = [f"{what}: {found[0]} ({len(found)})" for what, found in _named(missing, unexpected) if found]
        raise ValueError(f"{file}: does not fit {CONFIG} and this base; {'; '.join(shown)}")
    for name, part in stored.items():
        if tuple(part.get_shape()) != wanted[name]:
            shapes = " x ".join(map(str, part.get_shape())), " x ".join(map(str, wanted[name]))
            raise ValueError(f"{file}: {name} is {shapes[0]}; {CONFIG} and this base make it {shapes[1]}")
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"{file}: {name} is {part.get_dtype()}; only {', '.join(_DTYPES)} open here")
    lora.apply(model, adapter)
    for name, p in lora.adapters(model):
        values = stored[names[name][0]][:]
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{file}: {names[name][0]} has NaN or infinite values")
        p.copy_(values)


def _named(missing: list[str], unexpected: list[str]) -> tuple[tuple[str, list[str]], ...]:
    return ("missing", missing), ("unexpected", unexpected)


def load_training_state(
    path: Path, config: LlamaConfig, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Llama:
    """The merged model that a LoRA run's `checkpoint-<step>/` stands for: its base, packed if it was, and adapters."""
    adapter, base = load_config(path), base_of(path)
    state = read_json(path / training_state.STATE)
    if state.get("base") not in (None, fingerprint(base)):
        raise ValueError(f"{path}: its base {base} is not the model that it was trained from any more")
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype or checkpoint.stored_dtype(base))
    if state.get("arguments", {}).get("base_bits") == 4:
        nf4.replace(model.layers)
    lora.apply(model, adapter)
    model.to_empty(device=device)
    checkpoint.load_weights(model, base, nf4.assigner(model, checkpoint.copied))
    training_state.read_tensors(path, {f"model.{n}": p for n, p in lora.adapters(model)}, partial=True)
    lora.merge(model)
    return model
