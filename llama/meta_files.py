"""Meta's checkpoint directories: `params.json` and `consolidated.NN.pth`, one file per model-parallel rank.

Called by convert_weights.py. Reads LLaMA 1, 2 and 3 with any number of shards, writes the same for any number.
Meta's own runtime splits every matrix evenly and needs n_kv_heads to be a multiple of the number of shards (70B: 8
heads on 8 ranks, one each); no key/value head is ever held twice, so shards are cut and joined alike for all.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import files
from llama.config import LlamaConfig, from_meta, to_meta
from llama.hf_files import check_names, wanted
from llama.layout import Entry, deinterleave, entries, interleave
from llama.torch_files import DTYPES, Stored, TorchFile, TorchFileWriter, same_bits

_EMBED, _HEAD, _ROPE = "tok_embeddings.weight", "output.weight", "rope.freqs"

# params.json: key -> (kinds, least, most). A number outside is nonsense or an attack, never a model.
_INT, _NUMBER = (int,), (int, float)
_PARAMS: dict[str, tuple[tuple[type, ...], float, float]] = {
    "dim": (_INT, 2, 1 << 17),
    "n_layers": (_INT, 1, 1000),
    "n_heads": (_INT, 1, 1 << 12),
    "n_kv_heads": (_INT, 1, 1 << 12),
    "vocab_size": (_INT, -1, 1 << 24),
    "ffn_dim": (_INT, 1, 1 << 20),
    "multiple_of": (_INT, 1, 1 << 20),
    "ffn_dim_multiplier": (_NUMBER, 1e-3, 1e3),
    "norm_eps": (_NUMBER, 1e-12, 0.1),
    "rope_theta": (_NUMBER, 1, 1e12),
    "rope_scaling_factor": (_NUMBER, 1, 1e6),
    "use_scaled_rope": ((bool,), 0, 1),
    "max_seq_len": (_INT, 1, 1 << 27),
}


def read_params(file: Path) -> dict[str, Any]:
    """The sizes in `params.json`, each of a sensible type and range. ValueError names the one that is not."""
    if not file.exists():
        raise ValueError(f"{file}: missing; it comes with the weights, copy it beside them")
    params = files.read_json(file)
    for key, (kinds, least, most) in _PARAMS.items():
        value = params.get(key)
        if value is None:
            continue
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not (right and least <= value <= most) or (key == "vocab_size" and value == 0):
            raise ValueError(f"{file}: {key} is {str(value)[:40]!r}; that is not a LLaMA's {key}")
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if params.get(key) is None:
            raise ValueError(f"{file}: {key} is missing")
    return params


class Meta:
    """A directory of Meta's as a source of tensors in our names and layout."""

    kind = "meta"

    def __init__(self, path: Path, mmap: bool = True) -> None:
        """Checks everything that can be known without reading the data. ValueError names file, reason and remedy."""
        self.path = path
        params = read_params(path / "params.json")
        self.files = [TorchFile(p, mmap) for p in shard_paths(path)]
        n = len(self.files)
        self.label = f"Meta, {n} {'shard' if n == 1 else 'shards'}"
        self.ignored = sorted({name for f in self.files for name in f.stored if name == _ROPE})
        vocab_size, self.vocab_parallel = self._vocabulary(params["dim"])
        try:
            self.config = from_meta(params, vocab_size)
        except ValueError as e:
            raise ValueError(f"{path / 'params.json'}: {e}") from None
        tensors = len(self.files[0].stored)
        self._entries = {e.name: e for e in wanted(path / "params.json", self.config, tensors)}
        self._entries = {e.name: e for e in entries(self.config, meta_vocab_parallel=self.vocab_parallel)}
        for f in self.files:
            check_names(f.path, f.stored.keys() - {_ROPE}, (e.meta for e in self._entries.values()))
            for e in self._entries.values():
                _check(f, e, n, self.files[0].stored[e.meta])
        # Llama 3.2 ties its head to the embedding and stores both.
        if self._equal_ends():
            self.config = dataclasses.replace(self.config, tie_embeddings=True)
            self.ignored.append(_HEAD)

    def _vocabulary(self, dim: int) -> tuple[int, bool]:
        """Rows of the whole embedding, and whether the shards split those rows (Llama 3) or the width (1 and 2)."""
        f, n = self.files[0], len(self.files)
        for name in (_EMBED, _HEAD):
            if name not in f.stored or len(f.stored[name].shape) != 2:
                raise ValueError(f"{f.path}: {name} is missing or not a matrix; not a LLaMA of Meta's")
        rows, width = f.stored[_EMBED].shape
        head_rows = f.stored[_HEAD].shape[0]
        if width == dim and rows == head_rows:
            return rows * n, n > 1
        if width * n == dim and rows == head_rows * n:
            return rows, False
        many = f"one of {dim // width} shards" if dim % width == 0 and dim // width > n else "another model"
        raise ValueError(
            f"{f.path}: its embedding is {rows}x{width}, its head has {head_rows} rows, params.json's dim is {dim}: "
            f"it looks like {many}, but {n} of consolidated.NN.pth are there; fetch what is missing"
        )

    def _equal_ends(self) -> bool:
        """Whether the head is the embedding, bit for bit. Most heads differ in the first row already."""
        embed, head = self._entries["embed.weight"], self._entries["head.weight"]
        if len(self.files) == 1 or self.vocab_parallel:  # cut alike
            pairs = [(f.read(_EMBED), f.read(_HEAD)) for f in self.files]
            return all(same_bits(a[:1], b[:1]) for a, b in pairs) and all(same_bits(a, b) for a, b in pairs)
        first = torch.cat([f.read(_EMBED)[:1] for f in self.files], 1)
        return same_bits(first, self.files[0].read(_HEAD)[:1]) and same_bits(self.read(embed), self.read(head))

    def dtype(self, e: Entry) -> torch.dtype:
        """Number type in which the tensor is stored."""
        return self.files[0].stored[e.meta].dtype

    def read(self, e: Entry) -> Tensor:
        """One whole tensor, joined from the shards; do not write into it. Replicated ones must agree."""
        e = self._entries[e.name]
        first = self.files[0].read(e.meta)
        if len(self.files) == 1:
            whole = first
        elif e.meta_split is None:
            for f in self.files[1:]:
                if not same_bits(f.read(e.meta), first):
                    name = self.files[0].path.name
                    raise ValueError(f"{f.path}: {e.meta} differs from that of {name}; every shard must hold the same")
            return first
        else:  # into place one after the other: torch.cat would need all parts in memory beside the whole
            whole = first.new_empty(e.shape)
            for f, place in zip(self.files, whole.chunk(len(self.files), e.meta_split), strict=True):
                place.copy_(f.read(e.meta))
        del first
        return deinterleave(whole, e.rope_heads) if e.rope_heads else whole

    def check_unchanged(self) -> None:
        """ValueError if any file is not as it was when opened."""
        for f in self.files:
            f.unchanged.check()


def shard_paths(path: Path) -> list[Path]:
    """consolidated.00.pth ... in order. ValueError names the first that is missing."""
    found = {int(m[1]): p for p in path.iterdir() if (m := re.fullmatch(r"consolidated\.(\d{2})\.pth", p.name))}
    for i in range(max(found, default=0)):
        if i not in found:
            raise ValueError(f"{path / f'consolidated.{i:02d}.pth'}: missing, though later shards are there; fetch it")
    return [found[i] for i in sorted(found)]


def _check(f: TorchFile, e: Entry, shards: int, first: Stored) -> None:
    """One tensor of one shard: shape by the shard rule, a number type that is read, the same one in all shards."""
    s, right = f.stored[e.meta], e.part(shards)
    if s.shape != right:
        sizes = "x".join(map(str, s.shape)), "x".join(map(str, right)), "x".join(map(str, e.shape))
        rule = f"{sizes[2]} cut into {shards}" if shards > 1 and e.meta_split is not None else "by params.json"
        raise ValueError(f"{f.path}: {e.meta} is {sizes[0]}; it must be {sizes[1]} ({rule})")
    if s.dtype not in DTYPES:
        raise ValueError(f"{f.path}: {e.meta} is {s.dtype}; only {', '.join(DTYPES.values())} are read")
    if s.dtype != first.dtype:
        raise ValueError(f"{f.path}: {e.meta} is {DTYPES[s.dtype]}, but {DTYPES[first.dtype]} in the first shard")


# --- writing --------------------------------------------------------------------------------------


def vocab_parallel_of(c: LlamaConfig) -> bool:
    """Whether Meta's code for this family splits the embedding by rows: Llama 3, known by its rotary base."""
    return c.rope_theta == 500000.0


def all_entries(c: LlamaConfig) -> Iterable[Entry]:
    """What Meta's files hold: a tied model's head is stored a second time, as in Llama 3.2's."""
    untied = dataclasses.replace(c, tie_embeddings=False)
    return entries(untied, meta_vocab_parallel=vocab_parallel_of(c))


def write_meta(path: Path, tensors: Iterable[tuple[Entry, Tensor]], c: LlamaConfig, shards: int) -> None:
    """Write params.json and the shards into an existing directory, one tensor at a time.

    tensors: those of all_entries(c), in our layout. All shard files are open at once and grow together.
    """
    (path / "params.json").write_text(json.dumps(to_meta(c), indent=1) + "\n")
    with ExitStack() as stack:
        writers = [TorchFileWriter(path / f"consolidated.{i:02d}.pth") for i in range(shards)]
        for w in writers:
            stack.callback(w.abandon)
        for e, t in tensors:
            whole = interleave(t, e.rope_heads) if e.rope_heads else t
            parts = [whole] * shards if e.meta_split is None else whole.chunk(shards, e.meta_split)
            for w, part in zip(writers, parts, strict=True):
                assert tuple(part.shape) == e.part(shards)
                w.add(e.meta, part)
            del t, whole, parts, part  # or they would live on while the next one is made
        for w in writers:
            w.close()


def check_shards(c: LlamaConfig, shards: int) -> None:
    """ValueError when the model cannot be cut into this many shards."""
    if shards > 100:
        raise ValueError(f"--shards {shards}: Meta's file names count to 99")
    for e in all_entries(c):
        try:
            e.part(shards)
        except ValueError as error:
            raise ValueError(f"--shards {shards}: {error}; choose a divisor") from None
    if c.n_kv_heads % shards:
        raise ValueError(
            f"--shards {shards}: {c.n_kv_heads} key/value heads do not divide by it, which Meta's code needs"
        )
