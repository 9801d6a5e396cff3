"""A model in a directory -> the same ready to answer: on one device, partly on its way there, or over several ranks.

generate.py and serve.py call it with what their flags say; how a model is split or travels is tensor_parallel.py's and
offload.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

import kernels
from llama import checkpoint
from llama.generation import lay_out_for_decoding
from llama.model import Llama
from llama.offload import free_memory, offload, travellers
from llama.sampling import SamplingParams

# What an answer needs beside the weights: a context of so many tokens (a longer one finds its own room or fails), and
# what CUDA, kernels and activations take. An assumed figure, to be measured.
POSITIONS, MARGIN = 2048, 512 << 20
SMALLER = "`python convert_weights.py {} SMALLER --dtype int4` makes a model of about a quarter of 16 bits' size"
Offload = int | Literal["auto"] | None  # how many blocks travel; "auto": as few as must; None: none may
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


def settings(path: Path, flags: Mapping[str, Any]) -> tuple[SamplingParams, int]:
    """Sampling settings and length: flags first, then the checkpoint's generation_config.json, then ChatDoctor's."""
    stored = checkpoint.load_generation(path)
    stored = {k: stored[k] for k in (*SETTINGS, "do_sample") if stored.get(k) is not None}
    if stored.pop("do_sample", True) is False:
        stored["temperature"] = 0.0
    try:
        SamplingParams(**{k: v for k, v in stored.items() if k != "max_new_tokens"})
    except ValueError as e:
        raise ValueError(f"{path}/generation_config.json: {e}") from None
    defaults = {k: v for k, v in checkpoint.SAMPLING.items() if k in SETTINGS}
    copying = (
        {"temperature": 0.0, "repetition_penalty": 1.0} if flags.get("diseases") else {}
    )  # citations are not drawn
    values = {**defaults, **stored, **copying, **{k: flags[k] for k in SETTINGS if flags.get(k) is not None}}
    max_new_tokens = values.pop("max_new_tokens")
    return SamplingParams(**values, seed=flags.get("seed")), max_new_tokens


def found(device: str) -> str:
    """The device of that name; auto: a GPU where there is one. ValueError if it is not to be had.

    A GPU with a number becomes this thread's current one: there Triton launches, and there graphs are captured.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {device} is not to be had here ({str(e).splitlines()[0]}); try cpu") from None
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)
    return device


def on_device(
    path: Path, device: str, dtype: torch.dtype | None, backend: str, adapter: Path | None, asked: Offload
) -> Llama:
    """The whole model, an adapter merged into it. ValueError if it does not fit and nothing may travel."""
    kernels.use(backend, device)
    count = count_travelling(path, device, dtype, asked)
    model = checkpoint.load_model(path, "cpu" if count else device, dtype).eval()
    if adapter:
        from llama import lora, lora_files

        lora_files.add_adapter(model, adapter)
        lora.merge(model)
    if not count:
        lay_out_for_decoding(model)
        return model
    offload(model, list(model.layers), device, count)
    print(f"{count} of {len(model.layers)} blocks travel to {device} for every token", file=sys.stderr)
    return model


def count_travelling(path: Path, device: str, dtype: torch.dtype | None, asked: Offload) -> int:
    """How many of the model's blocks are to travel. ValueError, one line with the remedy, if that is not to be had."""
    free = free_memory(device)
    if free is None:
        if asked is not None:
            raise ValueError(f"--offload spares a GPU's memory, and --device is {device}: leave it out")
        return 0
    layers = checkpoint.load_config(path).n_layers
    if isinstance(asked, int):
        if asked > layers:
            raise ValueError(f"--offload {asked}: the model has {layers} blocks")
        return asked
    block, rest, cache = checkpoint.sizes(path, dtype, POSITIONS)
    rest += cache + MARGIN
    count = travellers(layers, block, rest, free)
    if count is None or (count and asked is None):
        first = "--offload keeps blocks in the CPU's memory (slow), or " if count else "even with --offload; "
        needed, there = (f"{n / 1e9:.1f} GB" for n in (rest + layers * block, free))
        raise ValueError(f"{path} needs {needed} and {device} has {there} free: {first}{SMALLER.format(path)}")
    return count


def over_ranks(path: Path, device: str, dtype: torch.dtype | None, backend: str) -> tuple[Llama, str, int, int]:
    """This rank's part of the model, its device, and which rank of how many this is. torchrun started it."""
    from llama import tensor_parallel

    world = tensor_parallel.start(device)
    here = str(world.device)
    kernels.use(backend, here)
    model = tensor_parallel.load(path, world, dtype).eval()
    lay_out_for_decoding(model)
    tensor_parallel.join(model, world.rank, world.size)
    return model, here, world.rank, world.size
