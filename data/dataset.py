"""Tokenised documents of several files as one numbered set, and the report on them. Called by loader.py; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import dropwhile, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.cache import TokenFile
from data.packing import Ints
from data.tokenise import supervised_bit
from llama.tokenizer import Tokenizer


class Dataset:
    """Documents 0 .. len - 1: the chosen rows of each file, file after file. Tokens stay on disk until asked for."""

    rows_per_document = 1

    def __init__(self, files: Sequence[TokenFile], chosen: Sequence[Ints], weights: Sequence[float]) -> None:
        """chosen: the row numbers taken of each file; weights: how often each of its documents comes per epoch."""
        self.files, self.weights = list(files), list(weights)
        rows = [f.rows[c] for f, c in zip(files, chosen, strict=True)]
        self._first = np.cumsum([0, *(r.size for r in rows)])
        self._file = np.repeat(np.arange(len(rows)), [r.size for r in rows])

        def column(name: str) -> Ints:
            return np.concatenate([np.zeros(0, np.int64), *(r[name].astype(np.int64) for r in rows)])

        self.lengths, self.supervised = column("length"), column("supervised")
        self._at, self._index = column("at"), column("index")
        h = hashlib.sha256(json.dumps([[f.key for f in files], self.weights]).encode())
        h.update(self._first.astype("<i8").data)
        h.update(self._index.astype("<i8").data)
        self.identity = h.hexdigest()

    def __len__(self) -> int:
        return self.lengths.size

    def by_file(self) -> list[Ints]:
        """The document numbers of each file."""
        return [np.arange(a, b) for a, b in pairwise(self._first)]

    def document(self, i: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Ids (int64) of a document and, for each, whether it carries loss."""
        at = self._at[i]
        stored = self.files[self._file[i]].tokens[at : at + self.lengths[i]]
        bit = supervised_bit(stored.dtype)
        return (stored & stored.dtype.type(bit - 1)).astype(np.int64), stored >= bit

    def parts(self, i: int) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """What of a document is a sequence of its own: all of it; of a pair, two."""
        return [self.document(i)]

    def record(self, i: int) -> tuple[str, int]:
        """File and record number of a document."""
        return self.files[self._file[i]].name, int(self._index[i])


def split(files: Sequence[TokenFile], eval_fraction: float) -> tuple[list[Ints], list[Ints]]:
    """Rows of each file for training and held out; dropped records in neither.

    The side depends on the record's key alone: it does not move when files are added or reordered, and what is held
    out at 1 % is held out at 5 % too.
    """
    train, held = [], []
    for file in files:
        kept = file.rows["length"] > 0
        out = _unit(file.rows["key"]) < eval_fraction
        train.append((kept & ~out).nonzero()[0])
        held.append((kept & out).nonzero()[0])
    return train, held


def _unit(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Keys spread over [0, 1) (splitmix64's finish), so that keys a caller counts from 0 serve as well as hashes."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53


@dataclass
class Report:
    """What the data is and what was left out of it; text() is for the terminal."""

    files: list[dict[str, Any]]
    max_len: int
    documents: int
    held_out: int
    tokens: int
    supervised: int
    histogram: list[tuple[int, int, int]]  # from, to (inclusive), documents
    tokens_per_epoch: int = 0
    notes: list[str] = field(default_factory=list)

    def text(self, width: int = 40) -> str:
        lines = [f"data: {self.documents:,} records to train on, {self.held_out:,} held out"]
        for f in self.files:
            weight = f", weight {f['weight']:g}" if f["weight"] != 1 else ""
            lines.append(f"  {f['name']}: {f['records']:,} records read{weight}")
            dropped, truncated = _some(f["dropped_examples"]), _some(f["truncated_examples"])
            for count, what in (
                (f["rejected"], "rejected, with the reasons in rejected.jsonl"),
                (f["dropped"], f"dropped: the prompt alone does not fit into {self.max_len} tokens{dropped}"),
                (f["truncated"], f"truncated: the end of the answer is over {self.max_len} tokens{truncated}"),
                (f["continued"], f"rows go on with a text of more than {self.max_len} tokens: nothing of it is lost"),
                (f["trimmed"], "without their last question, which has no answer"),
            ):
                if count:
                    lines.append(f"    {count:,} {what}")
        most = max((n for *_, n in self.histogram), default=0)
        lines.append("  tokens a record:")
        for low, high, n in dropwhile(lambda bar: not bar[2], self.histogram):
            lines.append(f"    {low:>5}-{high:<5} {'#' * max(bool(n), round(width * n / max(1, most))):<{width}} {n:,}")
        share = 100 * self.supervised / max(1, self.tokens)
        mean = self.tokens / max(1, self.documents)
        learnt = f"{self.supervised:,} supervised ({share:.1f} %)"
        lines.append(f"  {self.tokens:,} tokens (mean {mean:.1f} a record), {learnt}")
        if self.tokens_per_epoch != self.tokens:
            lines.append(f"  {self.tokens_per_epoch:,} tokens an epoch, by the weights")
        return "\n".join([*lines, *(f"  {n}" for n in self.notes)])


def _some(numbers: list[int]) -> str:
    return f" (records {', '.join(map(str, numbers))}{', ...' if len(numbers) == 5 else ''})" if numbers else ""


def make_report(files: Sequence[TokenFile], train: Dataset, held: Dataset, max_len: int) -> Report:
    """The report on freshly built sets."""
    entries = []
    for file, weight in zip(files, train.weights, strict=True):
        rows = file.rows
        dropped, kept = rows["length"] == 0, rows["length"] > 0
        truncated = kept & (rows["original"] > max_len)
        entries.append(
            {
                "name": file.name,
                "records": int((rows["original"] > 0).sum()) // train.rows_per_document + file.rejected,
                "continued": int((rows["original"] == 0).sum()),
                "rejected": file.rejected,
                "dropped": int(dropped.sum()),
                "dropped_examples": rows["index"][dropped][:5].tolist(),
                "truncated": int(truncated.sum()),
                "truncated_examples": rows["index"][truncated][:5].tolist(),
                "trimmed": int((kept & (rows["original"] <= max_len) & (rows["length"] < rows["original"])).sum()),
                "weight": weight,
            }
        )
    per_file = [int(train.lengths[d].sum()) for d in train.by_file()]
    return Report(
        entries,
        max_len,
        len(train),
        len(held),
        int(train.lengths.sum()),
        int(train.supervised.sum()),
        _histogram(train.lengths),
        round(sum(w * t for w, t in zip(train.weights, per_file, strict=True))),
    )


def _histogram(lengths: Ints, bars: int = 12) -> list[tuple[int, int, int]]:
    if not lengths.size:
        return []
    most = int(lengths.max()) + 1
    width = next(w for e in range(10) for w in (10**e, 2 * 10**e, 5 * 10**e) if w * bars >= most)
    counts = np.bincount(lengths // width, minlength=1)
    return [(i * width, (i + 1) * width - 1, int(n)) for i, n in enumerate(counts)]


# --- preview --------------------------------------------------------------------------------------


def preview(dataset: Dataset, n: int, tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """The first n documents as text, with what carries loss marked: in green if colour, else in [[ ]]; EOS shown."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    blocks = []
    for i in range(min(n, len(dataset))):
        ids, mask = dataset.document(i)
        name, number = dataset.record(i)
        head = f"--- {name}, record {number}: {ids.size} tokens, {int(mask.sum())} supervised ---"
        borders = [0, *((mask[1:] != mask[:-1]).nonzero()[0] + 1).tolist(), ids.size]
        pieces = []
        for a, b in pairwise(borders):
            text = _shown(ids[a:b].tolist(), tokenizer)
            pieces.append(f"{before}{text}{after}" if mask[a] else text)
        blocks.append(f"{head}\n{''.join(pieces)}")
    return "\n\n".join(blocks)


def _shown(ids: list[int], tokenizer: Tokenizer) -> str:
    special = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"}
    out, run = "", []
    for i in [*ids, None]:
        if i is not None and i not in special:
            run.append(i)
            continue
        out += tokenizer.decode_continued(run) + (special[i] if i is not None else "")
        run = []
    return out
