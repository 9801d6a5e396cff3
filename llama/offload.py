"""Blocks that do not fit into the device's memory stay in the CPU's and travel to the device one ahead of their use.

generate.py --offload calls offload() on a finished module, and asks here what fits. While a block computes, the next
one's weights are on their way into the other of two berths, on a stream of their own and from pinned memory; a token
costs one reading of all that travels over the bus. Two berths are all that blocks on their way ever take of the device.
Knows torch.nn, not Llama. Nothing here trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

BERTHS = 2


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that are free on a device; None for the CPU, whose system swaps before it fails."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def travellers(n_blocks: int, block: int, rest: int, free: int) -> int | None:
    """How many of a model's blocks must travel; None: it does not fit even so.

    block, rest: bytes of one block, and of all that is on the device anyway.
    """
    if rest + n_blocks * block <= free:
        return 0
    resident = (free - rest) // block - BERTHS
    return n_blocks - resident if resident >= 0 else None


def offload(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device | str, count: int) -> Ferry:
    """Move a model to the device in place, but for the weights of its last `count` blocks, which travel from now on."""
    travelling = blocks[len(blocks) - count :]
    there = {module for block in travelling for module in block.modules()}
    for module in model.modules():
        if module not in there:
            for name, tensor in own_tensors(module):
                _put(module, name, _like(tensor, tensor.to(device)))
    return Ferry(travelling, torch.device(device))


class Ferry:
    """Carries the weights of blocks that run one after the other, again and again in the same order, to a device."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.aboard: list[int | None] = [None] * BERTHS  # whose weights each berth holds
        self.loads = 0
        self._device = device
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._places = [[(m, name) for m in block.modules() for name, _ in own_tensors(m)] for block in blocks]
        self._homes: list[list[Tensor]] = []
        for places in self._places:
            tensors = [getattr(module, name) for module, name in places]
            self._homes.append([_like(t, t.detach().pin_memory()) if on_gpu else t for t in tensors])
            self._moor(len(self._homes) - 1, self._homes[-1])
        first = self._homes[0] if blocks else []
        assert all([t.shape for t in home] == [t.shape for t in first] for home in self._homes), "blocks are alike"
        self.berths = [[_like(t, torch.empty_like(t, device=device)) for t in first] for _ in range(BERTHS)]
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self._enter(i))
            block.register_forward_hook(lambda *_, i=i: self._moor(i, self._homes[i]), always_call=True)

    def _enter(self, i: int) -> None:
        """Give block i its weights, and send for the next one's: after the last, the first of the next token."""
        if i not in self.aboard:
            self._load(i, 0)
        berth = self.aboard.index(i)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._moor(i, self.berths[berth])
        following = (i + 1) % len(self._homes)
        if following not in self.aboard:
            self._load(following, 1 - berth)

    def _load(self, i: int, berth: int) -> None:
        on_stream: Any = contextlib.nullcontext()
        if self._stream is not None:
            # The block that was in this berth has been launched already, and must have run.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            on_stream = torch.cuda.stream(self._stream)
        with on_stream, torch.no_grad():
            for there, home in zip(self.berths[berth], self._homes[i], strict=True):
                there.copy_(home, non_blocking=True)
        self.aboard[berth] = i
        self.loads += 1

    def _moor(self, i: int, tensors: Sequence[Tensor]) -> None:
        for (module, name), tensor in zip(self._places[i], tensors, strict=True):
            _put(module, name, tensor)


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters and buffers."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """setattr() without its checks, which for nine tensors, twice a block, would be most of what this costs."""
    (module._parameters if name in module._parameters else module._buffers)[name] = tensor
