"""KVCache: the keys and values of the tokens seen so far. Owned by whoever decodes; the model only appends to it."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.config import LlamaConfig


class KVCache:
    """Preallocated keys and values of B rows and at most max_len positions, for every layer.

    Stored as (L, B, G, S, K), so that one head's positions lie together; handed out as (B, S, G, K) views.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads // config.ranks, max_len, config.head_dim)
        self._k = torch.zeros(shape, device=device, dtype=dtype)
        self._v = torch.zeros(shape, device=device, dtype=dtype)
        self.batch = batch
        self.max_len = max_len
        self.length = 0  # positions filled, the same in every row
        self.place: Tensor | None = None  # see FixedCache
        self.pad: Tensor | None = None  # (B,) int32: how many positions at a row's left are padding

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write k, v (B, T, G, K) behind what is there; all keys and values (B, length + T, G, K), as views.

        The length stays: the model advances it once all layers have appended. The third is for FixedCache.
        """
        T = k.shape[1]
        end = self.length + T
        if end > self.max_len:
            raise ValueError(f"the KV cache holds {self.max_len} positions; {end} are needed")
        self._k[layer, :, :, self.length : end] = k.transpose(1, 2)
        self._v[layer, :, :, self.length : end] = v.transpose(1, 2)
        return self._k[layer, :, :, :end].transpose(1, 2), self._v[layer, :, :, :end].transpose(1, 2), None

    def advance(self, T: int) -> None:
        """Count T appended positions as filled."""
        self.length += T

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length

    def grown(self, max_len: int) -> KVCache:
        """A cache of max_len positions that holds what this one does."""
        L, B, G, _, K = self._k.shape
        other = object.__new__(KVCache)
        other.batch, other.max_len, other.length, other.pad = self.batch, max_len, self.length, self.pad
        other.place = None
        other._k, other._v = self._k.new_zeros(L, B, G, max_len, K), self._v.new_zeros(L, B, G, max_len, K)
        other._k[:, :, :, : self.length] = self._k[:, :, :, : self.length]
        other._v[:, :, :, : self.length] = self._v[:, :, :, : self.length]
        return other

    def starts(self, T: int) -> Tensor | None:
        """(B, length + T) int32: the first position that each position may see; None when no row is padded."""
        if self.pad is None:
            return None
        S = self.length + T
        columns = torch.arange(S, device=self.pad.device, dtype=torch.int32)
        pad = self.pad[:, None]
        return torch.where(columns < pad, 0, pad).to(torch.int32)


class FixedCache(KVCache):
    """The same storage as a KVCache, for one token at a time, whose place is a number on the device.

    Nothing about a step depends on the host then, so that it can be captured or compiled once and replayed: keys and
    values come whole, and with them how many of them are there.
    """

    def __init__(self, cache: KVCache) -> None:
        self._k, self._v = cache._k, cache._v
        self.batch, self.max_len, self.length, self.pad = cache.batch, cache.max_len, 0, None
        self.place = torch.zeros(1, dtype=torch.int64, device=cache._k.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write k, v (B, 1, G, K) at the place; the storage (B, max_len, G, K), and how much counts, int32 (1,)."""
        assert self.place is not None
        keys, values = self._k[layer], self._v[layer]
        keys.index_copy_(2, self.place, k.transpose(1, 2).to(keys.dtype))
        values.index_copy_(2, self.place, v.transpose(1, 2).to(values.dtype))
        return keys.transpose(1, 2), values.transpose(1, 2), (self.place + 1).int()

    def advance(self, T: int) -> None:
        """The place is set from outside."""
