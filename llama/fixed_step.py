"""A step of decoding whose shapes and addresses never change: captured as a CUDA graph or compiled, then replayed.

A step of a small model launches some hundreds of kernels that take a few microseconds each; launching them takes
longer. generation.py keeps one FixedStep to a KV cache. A cache that grows is another one, and is captured anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.cache import FixedCache, KVCache
from llama.few_rows import PackedLinear
from llama.model import Llama

WARM_UPS = 2  # runs before the capture: what compiles or allocates at first use does it there


def can_capture(model: Llama) -> bool:
    """Whether a step of this model can be a CUDA graph: all of it lies on one GPU, and no hooks act between."""
    return model.embed.weight.is_cuda and not has_hooks(model)


def has_hooks(model: Llama) -> bool:
    """Whether something acts between its modules, as offload.py's and tensor_parallel.py's parts do."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class FixedStep:
    """model(tokens (B, 1)) behind what `cache` holds -> logits (B, 1, V), which the next call overwrites."""

    def __init__(self, model: Llama, cache: KVCache, compiled: bool = False) -> None:
        """compiled: by torch.compile, on any device; else a CUDA graph, or on a CPU the plain step, for tests.

        ValueError where the cache is full, or the weights do not compile.
        """
        if compiled and any(isinstance(m, PackedLinear) for m in model.modules()):
            raise ValueError("--compile: bf16 weights in oneDNN's order do not compile; give float32, int8 or int4")
        self.cache = cache
        self._check_room()
        self._model, self._fixed = model, FixedCache(cache)
        self._tokens = torch.zeros(cache.batch, 1, dtype=torch.int64, device=self._fixed.place.device)
        # A graph reads the tables where they lay at its capture, and the model makes others for a longer context.
        self._rotation = model.rotation(cache.max_len, self._tokens.device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._run = torch.compile(self._plain, dynamic=False) if compiled else self._plain
        if self._tokens.is_cuda and not compiled:
            self._capture()

    def __call__(self, tokens: Tensor) -> Tensor:
        """One more token in every row. ValueError where the cache is full."""
        cache = self.cache
        self._check_room()
        self._tokens.copy_(tokens)
        self._fixed.place.fill_(cache.length)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits = self._run()
        cache.advance(1)
        assert self._logits is not None
        return self._logits

    def _check_room(self) -> None:
        if self.cache.length >= self.cache.max_len:
            needed = self.cache.length + 1
            raise ValueError(f"the KV cache holds {self.cache.max_len} positions; {needed} are needed")

    def _plain(self) -> Tensor:
        logits = self._model(self._tokens, cache=self._fixed, last_only=True)
        assert isinstance(logits, Tensor)
        return logits

    def _capture(self) -> None:
        """Runs write a key and a value behind what the cache holds, where the first step writes its own."""
        self._fixed.place.fill_(self.cache.length)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run()
