"""A model's tensors on their way into a quantised directory, and the check that they arrived.

Called by convert_weights.py. What a quantised weight is: quantize.py; how it lies in a file: weights.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.layout import Entry, entries
from llama.model import Llama
from llama.quantize import Packed, QuantisedLinear, Scheme, calibrate, nearest
from llama.weights import Weights, is_quantised, write_weights

DTYPE = torch.bfloat16  # of scales and of what is not quantised: PyTorch's CPU kernels take no other
Read = Callable[[Entry], Tensor]
Named = Iterator[tuple[str, Tensor | Packed]]


def scheme_for(config: LlamaConfig, bits: int, group: int | None) -> Scheme:
    """The scheme of so many bits; group None: the largest that all weights can be cut into, but at most 64, which
    loses little and takes a quarter of a bit for scales. ValueError where there is none."""
    if bits == 8 and group is not None:
        raise ValueError(f"--group_size {group}: int8 has one scale for each row; leave it out")
    widths = {e.shape[1]: e.hf for e in entries(config) if is_quantised(e)}
    fits = [g for g in (64, 32) if not any(width % g for width in widths)]
    scheme = Scheme(bits, 0 if bits == 8 else group or (fits[0] if fits else 32))
    for width, name in widths.items():
        scheme.check(name, width)
    return scheme


def by_rounding(read: Read, config: LlamaConfig, scheme: Scheme, done: Callable[[], object]) -> Named:
    """Every tensor of a model, one at a time, its blocks' linears rounded to the nearest.

    read(e): one in floats. done() is called after each that was rounded.
    """
    for e in entries(config):
        weight = read(e)
        if is_quantised(e):
            yield e.name, nearest(weight, scheme, DTYPE)
            done()
        else:
            yield e.name, weight


def by_calibration(
    read: Read, config: LlamaConfig, scheme: Scheme, done: Callable[[], object], batches: Iterable[Tensor]
) -> Named:
    """The same, each weight rounded for the inputs that the batches' tokens make. Holds the whole model in bf16."""
    with torch.device("meta"):
        model = Llama(config)
    for e in entries(config):
        parent, _, last = e.name.rpartition(".")
        weight = torch.nn.Parameter(read(e).to(DTYPE, copy=True), requires_grad=False)
        setattr(model.get_submodule(parent), last, weight)
    calibrate(model, list(model.layers), batches, scheme, done)
    for e in entries(config):
        module = model.get_submodule(e.name.rpartition(".")[0])
        yield e.name, Packed(module.codes, module.scales) if isinstance(module, QuantisedLinear) else module.weight


def write(directory: Path, named: Named, config: LlamaConfig, scheme: Scheme, max_shard: int) -> None:
    """Write the tensors, read them back, and compare. ValueError if other bits come back."""
    sums: dict[str, list[int]] = {}

    def noted() -> Named:
        for name, tensor in named:
            sums[name] = _sums(tensor)
            yield name, tensor
            del tensor  # or it would live on while the next one is made

    write_weights(directory, noted(), config, DTYPE, max_shard, scheme)
    weights = Weights(directory, config, scheme)
    for e in entries(config):
        read = weights.read_packed(e.name) if is_quantised(e) else weights.read(e.name)
        if _sums(read) != sums[e.name]:
            raise ValueError(f"{e.name}: reading it back gives other bits than were written; is the disk failing?")


def _sums(tensor: Tensor | Packed) -> list[int]:
    parts = tensor if isinstance(tensor, Packed) else (tensor.to(DTYPE),)
    return [zlib.crc32(part.contiguous().view(torch.uint8).numpy()) for part in parts]
