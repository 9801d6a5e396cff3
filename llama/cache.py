"""The keys and values of the tokens seen so far. Owned by whoever decodes; the model only appends to them.

KVCache holds rows that begin and end together, or end together after beginning at `first`. RaggedCache is for rows that
join and leave while others go on (batching.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.config import LlamaConfig

SLACK = 64  # positions that a RaggedCache can go on, at least, before what lives is moved


class KVCache:
    """Preallocated keys and values of B rows and at most max_len positions, for every layer.

    Stored as (L, B, 2G, S, K), keys in the first G and values in the last, so that one head's positions lie together;
    handed out as (B, S, G, K) views.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layers, batch, 2 * (config.n_kv_heads // config.ranks), max_len, config.head_dim)
        self._kv = torch.zeros(shape, device=device, dtype=dtype)
        self.batch = batch
        self.max_len = max_len
        self.length = 0  # positions filled, the same in every row
        self.place: Tensor | None = None  # see FixedCache
        self.first: Tensor | None = None  # (B,) int32: the position at which each row begins; None: 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write k, v (B, T, G, K) behind what is there; all keys and values (B, length + T, G, K), as views.

        The length stays: the model advances it once all layers have appended. The third is for FixedCache.
        """
        self._check_room(k.shape[1])
        end = self.length + k.shape[1]
        keys, values = self._kv[layer, : self.batch, :, :end].transpose(1, 2).chunk(2, 2)
        keys[:, self.length :] = k
        values[:, self.length :] = v
        return keys, values, None

    def is_plain_row(self) -> bool:
        """Whether next_position() can be asked for."""
        return self.batch == 1 and self.first is None and self._kv.is_cpu and self._kv.dtype == torch.float32

    def next_position(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For each layer: where the row's next keys and values (2G, K) go; and all of them with it, (1, G, S, K) each.

        Views, made for all layers at once: append() takes ten times as long. ValueError where the cache is full.
        """
        self._check_room(1)
        keys, values = self._kv[..., : self.length + 1, :].chunk(2, 2)
        return self._kv[:, 0, :, self.length].unbind(), keys.unbind(), values.unbind()

    def _check_room(self, T: int) -> None:
        if (needed := self.length + T) > self.max_len:
            raise ValueError(f"the KV cache holds {self.max_len} positions; {needed} are needed")

    def advance(self, T: int) -> None:
        """Count T appended positions as filled."""
        self.length += T

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length

    def grown(self, max_len: int) -> KVCache:
        """A cache of max_len positions that holds what this one does."""
        L, B, heads, _, K = self._kv.shape
        other = object.__new__(KVCache)
        other.batch, other.max_len, other.length, other.first = self.batch, max_len, self.length, self.first
        other.place = None
        other._kv = self._kv.new_zeros(L, B, heads, max_len, K)
        other._kv[:, :, :, : self.length] = self._kv[:, :, :, : self.length]
        return other

    def repeated(self, rows: Tensor, max_len: int) -> KVCache:
        """A cache of max_len positions whose rows are those of this one with these numbers, int64 (their number,)."""
        L, _, heads, _, K = self._kv.shape
        other = object.__new__(KVCache)
        other.batch, other.max_len, other.length = len(rows), max_len, self.length
        other.first = None if self.first is None else self.first[rows]
        other.place = None
        other._kv = self._kv.new_zeros(L, len(rows), heads, max_len, K)
        other._kv[:, :, :, : self.length] = self._kv[:, rows, :, : self.length]
        return other

    def keep(self, at: int, n: int) -> None:
        """Forget all but the n positions from `at` on, which become the first."""
        self._kv[:, :, :, :n] = self._kv[:, :, :, at : at + n].clone()
        self.length = n

    def starts(self, T: int) -> Tensor | None:
        """(B, length + T) int32: the first position that each position may see; None when all rows begin at 0."""
        if self.first is None:
            return None
        S = self.length + T
        columns = torch.arange(S, device=self.first.device, dtype=torch.int32)
        first = self.first[:, None]
        return torch.where(columns < first, 0, first).to(torch.int32)


class FixedCache(KVCache):
    """The same storage as a KVCache, for one token at a time, whose place is a number on the device.

    Nothing about a step depends on the host then, so that it can be captured or compiled once and replayed: keys and
    values come whole, and with them how many of them are there.
    """

    def __init__(self, cache: KVCache) -> None:
        self._kv = cache._kv
        self.batch, self.max_len, self.length, self.first = cache.batch, cache.max_len, 0, None
        self.place = torch.zeros(1, dtype=torch.int64, device=cache._kv.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write k, v (B, 1, G, K) at the place; the storage (B, max_len, G, K), and how much counts, int32 (1,)."""
        assert self.place is not None
        keys, values = self._kv[layer].transpose(1, 2).chunk(2, 2)
        keys.index_copy_(1, self.place, k.to(keys.dtype))
        values.index_copy_(1, self.place, v.to(values.dtype))
        return keys, values, (self.place + 1).int()

    def advance(self, T: int) -> None:
        """The place is set from outside."""


class RaggedCache(KVCache):
    """Rows that join and leave, each as long as it is: the rows 0 .. batch - 1 of a storage for at most `rows`.

    All end at the same position and each begins at its own, so that a step appends one slice, and attention needs to
    know no more than where a row begins. Positions wander to the right; where the storage ends, what lives is moved
    back to its front, or into a larger or smaller one. The memory is that of the rows alive times the longest of them,
    and half as much again, whatever the model's context.
    """

    def __init__(
        self, config: LlamaConfig, rows: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, 0, 0, device, dtype)
        self.rows = rows
        self._begins: list[int] = []  # the same as `first`, without asking the device
        self._note()

    def join(self, source: KVCache, at: int, n: int) -> None:
        """A new last row: the n positions from `at` on of a cache of one row."""
        assert self.batch < self.rows, "every row is taken"
        self._make_room(self.batch + 1, n, 0)
        begin = self.length - n
        self._kv[:, self.batch, :, begin : self.length] = source._kv[:, 0, :, at : at + n]
        self._begins.append(begin)
        self._note()

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        begin = self._begins.pop()
        if row < len(self._begins):
            self._kv[:, row, :, begin : self.length] = self._kv[:, len(self._begins), :, begin : self.length]
            self._begins[row] = begin
        self._note()

    def reserve(self, T: int) -> None:
        """Make place for T more positions in every row."""
        self._make_room(self.batch, 0, T)

    def _note(self) -> None:
        self.batch = len(self._begins)
        self.first = torch.tensor(self._begins, dtype=torch.int32, device=self._kv.device)

    def _make_room(self, rows: int, span: int, T: int) -> None:
        """Place for so many rows, for a row of `span` positions before the end, and for T positions behind it."""
        source = self._kv
        L, held, heads, width, K = source.shape
        if rows <= held and span <= self.length and self.length + T <= width:
            return
        live = self.length - min(self._begins, default=self.length)
        end = max(live, span)
        if not rows <= held <= 4 * rows:
            held = min(2 * rows, self.rows)
        if not end + T + SLACK // 2 <= width <= 3 * (end + T) + SLACK:
            width = end + T + max(SLACK, (end + T) // 2)
        old, new = slice(self.length - live, self.length), slice(end - live, end)
        same = source.shape[1] == held and self.max_len == width
        target = source if same else source.new_zeros(L, held, heads, width, K)
        for layer in range(L if live else 0):  # a layer at a time: in one storage, old and new place overlap
            part = source[layer, : self.batch, :, old]
            target[layer, : self.batch, :, new] = part.clone() if same else part
        self._kv = target
        self._begins = [begin + end - self.length for begin in self._begins]
        self.length, self.max_len = end, width
        self._note()
