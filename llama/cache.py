"""The keys and values of the tokens seen so far. Owned by whoever decodes; the model only appends to them.

KVCache holds rows that begin and end together, or end together after beginning at `first`. RaggedCache is for rows that
join and leave while others go on (batching.py). With dtype int8 they hold codes: each head of a position is rounded as
it is appended, with a scale of its own, and even the tokens that come with it attend to what was rounded. So nothing
that a cache goes through later changes a bit of what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.config import LlamaConfig

SLACK = 64  # positions that a RaggedCache can go on, at least, before what lives is moved
ALIGNED = 64  # bytes: a line of the CPU's cache

# Keys, values, how many of them are there (see FixedCache), and where they are codes, the scales of both.
Held = tuple[Tensor, Tensor, Tensor | None, kernels.Scales | None]
# Some positions of one row, as they are stored: (L, 2G, n, K), and where they are codes, their scales (L, 2G, n).
Part = tuple[Tensor, ...]


class Seen(NamedTuple):
    """Some positions of a row in all layers, as views: keys and values (L, G, n, K)."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.zeros; on a CPU what is never touched takes no memory, and no time: 35 ms for 100 MB."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNED, np.uint8)  # pages of zeros from the system, where torch writes them itself
    begin = -memory.ctypes.data % ALIGNED
    return torch.from_numpy(memory[begin : begin + size]).view(dtype).view(*shape)


class KVCache:
    """Preallocated keys and values of B rows and at most max_len positions, for every layer.

    Stored as (L, B, 2G, S, K), keys in the first G and values in the last, so that one head's positions lie together;
    handed out as (B, S, G, K) views. The scales of codes, fp32, are stored likewise, without the last dimension.
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
        self._kv = _zeros(shape, dtype, device)
        self._scales = _zeros(shape[:-1], torch.float32, device) if dtype == torch.int8 else None
        self.batch = batch
        self.max_len = max_len
        self.length = 0  # positions filled, the same in every row
        self.place: Tensor | None = None  # see FixedCache
        self.first: Tensor | None = None  # (B,) int32: the position at which each row begins; None: 0

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in self._tensors())

    def append(self, layer: int, k: Tensor, v: Tensor) -> Held:
        """Write k, v (B, T, G, K) behind what is there; all keys and values (B, length + T, G, K), as views.

        The length stays: the model advances it once all layers have appended.
        """
        self._check_room(k.shape[1])
        parts, held = self._parts(layer, self.length + k.shape[1], k, v)
        for t, new in parts:
            t[:, self.length :] = new
        return *held[:2], None, held[2]

    def _parts(
        self, layer: int, end: int, k: Tensor, v: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor, kernels.Scales | None]]:
        """What holds the first `end` positions, each part with what k and v add to it; keys, values and scales."""
        kv = self._kv[layer, : self.batch, :, :end].transpose(1, 2)
        keys, values = kv.chunk(2, 2)
        if self._scales is None:
            return [(keys, k), (values, v)], (keys, values, None)
        scales = self._scales[layer, : self.batch, :, :end].transpose(1, 2)
        new = kernels.to_codes(torch.cat((k, v), 2))
        return list(zip((kv, scales), new, strict=True)), (keys, values, scales.chunk(2, 2))

    def _replace(self, tensors: list[Tensor]) -> None:
        self._kv, self._scales = tensors[0], tensors[1] if len(tensors) > 1 else None

    def _tensors(self) -> tuple[Tensor, ...]:
        """All that is stored; the fourth dimension is that of the positions."""
        return (self._kv,) if self._scales is None else (self._kv, self._scales)

    def is_plain(self) -> bool:
        """Whether next_positions() can be asked for."""
        return self._kv.is_cpu and self._kv.dtype == torch.float32

    def next_positions(self, common: int = 0) -> tuple[tuple[Tensor, ...], list[Seen], Seen | None]:
        """For each layer, where the next keys and values (B, 2G, K) of all rows go; for each row, all with these.

        common: positions that all rows begin with alike: the rows are given without them, and the first row's beside.
        Views, made for all layers at once: append() takes ten times as long. ValueError where the cache is full.
        """
        self._check_room(1)
        places = self._kv[:, : self.batch, :, self.length].unbind()
        begins, end = self.begins(), self.length + 1
        rows = [self._seen(row, begin + common, end) for row, begin in enumerate(begins)]
        return places, rows, self._seen(0, begins[0], begins[0] + common) if common else None

    def _seen(self, row: int, begin: int, end: int) -> Seen:
        return Seen(*self._kv[:, row, :, begin:end].chunk(2, 1))

    def begins(self) -> list[int]:
        """The position at which each row begins."""
        return [0] * self.batch if self.first is None else self.first.tolist()

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
        other = object.__new__(KVCache)
        other.batch, other.max_len, other.length, other.first = self.batch, max_len, self.length, self.first
        other.place = None
        stored = [t.new_empty(t.shape[0], self.batch, t.shape[2], max_len, *t.shape[4:]) for t in self._tensors()]
        for new, old in zip(stored, self._tensors(), strict=True):
            new[:, :, :, : self.length] = old[:, : self.batch, :, : self.length]
            new[:, :, :, self.length :] = 0  # a step of fixed size reads it all, and NaN times 0 is NaN
        other._replace(stored)
        return other

    def keep(self, at: int, n: int) -> None:
        """Forget all but the n positions from `at` on, which become the first."""
        for t in self._tensors():
            t[:, :, :, :n] = t[:, :, :, at : at + n].clone()
        self.length = n

    def part(self, row: int, at: int, n: int) -> Part:
        """The n positions of a row from `at` on, as views."""
        return tuple(t[:, row, :, at : at + n] for t in self._tensors())

    def put(self, part: Part) -> None:
        """Hold these positions in every row, and nothing else."""
        n = part[0].shape[2]
        assert n <= self.max_len, (n, self.max_len)
        for mine, theirs in zip(self._tensors(), part, strict=True):
            mine[:, :, :, :n] = theirs[:, None]
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
        self._kv, self._scales = cache._kv, cache._scales
        self.batch, self.max_len, self.length, self.first = cache.batch, cache.max_len, 0, None
        self.place = torch.zeros(1, dtype=torch.int64, device=cache._kv.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> Held:
        """Write k, v (B, 1, G, K) at the place; the storage (B, max_len, G, K), and how much counts, int32 (1,)."""
        assert self.place is not None
        parts, held = self._parts(layer, self.max_len, k, v)
        for t, new in parts:
            t.index_copy_(1, self.place, new.to(t.dtype))
        return *held[:2], (self.place + 1).int(), held[2]

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

    def begins(self) -> list[int]:
        """The position at which each row begins."""
        return self._begins

    def join(self, source: KVCache, at: int, n: int) -> None:
        """A new last row: the n positions from `at` on of a cache of one row."""
        assert self.batch < self.rows, "every row is taken"
        self._make_room(self.batch + 1, n, 0)
        begin = self.length - n
        for mine, theirs in zip(self.part(self.batch, begin, n), source.part(0, at, n), strict=True):
            mine.copy_(theirs)
        self._begins.append(begin)
        self._note()

    def held(self, row: int) -> Part:
        """All that a row holds, as views."""
        begin = self._begins[row]
        return self.part(row, begin, self.length - begin)

    def leave(self, row: int, wipe: bool = False) -> None:
        """Forget a row; the last one takes its place.

        wipe: leave zeros, not what it held: NaN would reach whoever comes next, for 0 times NaN is NaN.
        """
        if wipe:
            for t in self._tensors():
                t[:, row] = 0
        begin = self._begins.pop()
        if row < len(self._begins):
            for t in self._tensors():
                t[:, row, :, begin : self.length] = t[:, len(self._begins), :, begin : self.length]
            self._begins[row] = begin
        self._note()

    def reserve(self, T: int) -> None:
        """Make place for T more positions in every row."""
        self._make_room(self.batch, 0, T)

    def _note(self) -> None:
        self.batch = len(self._begins)
        self.first = torch.tensor(self._begins, dtype=torch.int32, device=self._kv.device)

    def _make_room(self, rows: int, span: int, T: int) -> None:
        """Place for so many rows, for a row of `span` positions before the end, and for T positions behind it.

        Memory is taken before anything is moved: where there is none, nothing has changed.
        """
        L, held, _, width, _ = self._kv.shape
        if rows <= held and span <= self.length and self.length + T <= width:
            return
        live = self.length - min(self._begins, default=self.length)
        end = max(live, span)
        if not rows <= held <= 4 * rows:
            held = min(2 * rows, self.rows)
        if not end + T + SLACK // 2 <= width <= 3 * (end + T) + SLACK:
            width = end + T + max(SLACK, (end + T) // 2)
        old, new = slice(self.length - live, self.length), slice(end - live, end)
        same = self._kv.shape[1] == held and self.max_len == width
        sources = self._tensors()
        if same:  # a layer at a time by way of a copy, for old and new place overlap
            targets, copies = sources, [torch.empty_like(t[0, : self.batch, :, old]) for t in sources]
        else:
            shapes = [(L, held, t.shape[2], width, *t.shape[4:]) for t in sources]
            targets = tuple(_zeros(shape, t.dtype, t.device) for shape, t in zip(shapes, sources, strict=True))
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            for layer in range(L if live else 0):
                part = source[layer, : self.batch, :, old]
                target[layer, : self.batch, :, new] = copies[i].copy_(part) if same else part
        self._replace(list(targets))
        self._begins = [begin + end - self.length for begin in self._begins]
        self.length, self.max_len = end, width
        self._note()
