"""Data files -> batches: tokenise once, hold some out, order by seed, pack, share over ranks.

train.py and evaluate.py call build() and Loader. Every step is a pure function of (data, seed, step number): no
state is kept, a run resumes by asking for the next step. The only file under data/ that knows torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.cache import Recipe, tokenise_file, tokenise_records
from data.dataset import Dataset, Report, make_report, preview, split
from data.packing import EpochRows, Ints, Order, Rows, pack
from data.pairs import PairDataset, first_rows
from data.records import ANSWERS, OnBad, Record, content_key
from llama.chat import IGNORE, ChatFormat, Dialogue
from llama.tokenizer import Tokenizer

__all__ = ["Batch", "Dataset", "InMemory", "Loader", "Report", "Step", "build", "preview"]

Packing = Literal["none", "step", "epoch"]
PACKINGS: tuple[Packing, ...] = ("none", "step", "epoch")


@dataclass(frozen=True)
class InMemory:
    """Dialogues that do not come from a file. A Record's own key decides on which side of the split it falls."""

    name: str
    dialogues: Sequence[Dialogue | Record]

    def records(self) -> list[Record]:
        return [
            d if isinstance(d, Record) else Record(d, i, content_key(d)) for i, d in enumerate(self.dialogues, start=1)
        ]


def build(
    sources: Sequence[str | Path | InMemory],
    *,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    max_len: int,
    weights: Sequence[float] | None = None,
    eval_fraction: float = 0.0,
    answer: str = ANSWERS[0],
    on_bad: OnBad | None = None,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    pairs: bool = False,
) -> tuple[Dataset, Dataset, Report]:
    """Read and tokenise the sources: the training set, the held-out set and the report.

    weights: how often each record of a source comes per epoch of training (1 if not given; 0.5: half of them).
    eval_fraction: share held out, by the hash of each record. on_bad: told of every unusable record; without it the
    first is raised as BadRecord. cache_dir: where tokens are kept for the next run; None keeps them in memory.
    workers: processes that tokenise; None: one a core, at most 8. With several ranks let one build first and the
    others after a barrier: they then find the cache. pairs: the files hold preference pairs, the sets are PairDatasets.
    """
    weights = [1.0] * len(sources) if weights is None else [float(w) for w in weights]
    _check(sources, weights, eval_fraction, max_len)
    recipe = Recipe(tokenizer, chat_format, max_len, answer, pairs)
    cache = Path(cache_dir) if cache_dir is not None else None
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    files = []
    for source in sources:
        if isinstance(source, InMemory):
            files.append(tokenise_records(source.name, source.records(), recipe, cache_dir=cache, progress=progress))
        else:
            files.append(
                tokenise_file(Path(source), recipe, cache_dir=cache, on_bad=on_bad, workers=workers, progress=progress)
            )
    chosen, held = split(files, eval_fraction)
    if pairs:
        chosen, held = ([first_rows(f, rows) for f, rows in zip(files, side, strict=True)] for side in (chosen, held))
    kind = PairDataset if pairs else Dataset
    train, evaluation = kind(files, chosen, weights), kind(files, held, [1.0] * len(files))
    report = make_report(files, train, evaluation, max_len)
    if not sum(w * c.size for w, c in zip(weights, chosen, strict=True)):
        raise ValueError(f"no record is left to train on\n{report.text()}")
    if eval_fraction and not len(evaluation):
        report.notes.append(f"nothing is held out: no record falls into a share of {eval_fraction:g}; raise it")
    return train, evaluation, report


def _check(
    sources: Sequence[str | Path | InMemory], weights: Sequence[float], eval_fraction: float, max_len: int
) -> None:
    if not sources:
        raise ValueError("no data file is given")
    if len(weights) != len(sources):
        raise ValueError(f"{len(weights)} weights for {len(sources)} data files; give one for each")
    for w in weights:
        if not 0 <= w < 1e6:
            raise ValueError(f"mixing weight {w:g} is not a number from 0 up")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"the held-out share is {eval_fraction:g}; it must be at least 0 and below 1")
    if max_len < 2:
        raise ValueError(f"a length limit of {max_len} tokens leaves no room for an answer")


# --- batches --------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """The P pairs of a micro-batch: their numbers in the data set (P,), the reference's log-probabilities (P, 2), and
    for each token its answer (B, T) int64, 2p (chosen) or 2p + 1 (rejected) of pair p; 2P in padding.
    """

    numbers: torch.Tensor
    reference: torch.Tensor
    answers: torch.Tensor


@dataclass
class Batch:
    """One micro-batch: tokens and targets (B, T) int64, start and end (B, T) int32 of each token's document.

    Padding is a document of its own, without targets. records: file and record number of every document, by rows.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    records: list[tuple[str, int]]
    pairs: Pairs | None = None

    def pinned(self) -> Batch:
        """The batch in page-locked memory."""
        tensors = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


@dataclass
class Step:
    """What one rank does in one optimizer step; the counts are of the global batch, all ranks together.

    supervised_tokens: targets that carry loss; tokens: real ones; slots: tokens with padding; attended: pairs of real
    tokens with each token that they see, themselves among them (attention's work); pairs: of preference data.
    """

    micro_batches: list[Batch]
    supervised_tokens: int
    tokens: int
    slots: int
    pairs: int = 0
    attended: int = 0

    @property
    def divisor(self) -> int:
        """What the sum of losses is divided by: pairs, or else supervised tokens."""
        return self.pairs or self.supervised_tokens

    def pinned(self, device: torch.device) -> Step:
        """The step in memory that a GPU reads while it computes; for another device, as it is."""
        if device.type != "cuda":
            return self
        torch.cuda.set_device(device)  # threads start on device 0, whose memory this rank must not touch
        return replace(self, micro_batches=[b.pinned() for b in self.micro_batches])


Grid = list[tuple[list[Ints], int]]  # micro-batches, each as its rows of documents and its width


class Loader:
    """Batches of a data set for one rank.

    batch: rows (packing "none": records) in a micro-batch; accumulation: micro-batches in a step; world: ranks.
    packing "none": a record a row, padded to the longest of the micro-batch. "step": the same records in each step,
    but packed into rows of max_len, so that loss and gradient are those of "none" with less computation; a step then
    has fewer micro-batches, the same number on every rank. "epoch": the whole epoch packed, a step is
    batch * accumulation * world rows. fixed_shape: every batch is (batch, max_len), for a compiled model.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: int,
        max_len: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        packing: Packing = "step",
        seed: int = 42,
        evaluation: Dataset | None = None,
        eval_batch: int | None = None,
        fixed_shape: bool = False,
    ) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"packing {packing!r} is not one of {', '.join(PACKINGS)}")
        if seed < 0 or min(batch, accumulation, eval_batch or 1) < 1:
            raise ValueError("the seed must not be negative, batch sizes and accumulation must be at least 1")
        longest = max((int(d.lengths.max(initial=0)) for d in (dataset, evaluation) if d is not None), default=0)
        if longest > max_len:
            raise ValueError(f"the longest record has {longest} tokens, the rows only {max_len}; build with that limit")
        assert 0 <= rank < world
        self.dataset, self.evaluation, self.max_len, self.packing, self.seed = (
            dataset,
            evaluation,
            max_len,
            packing,
            seed,
        )
        self.batch, self.accumulation, self.rank, self.world = batch, accumulation, rank, world
        self.eval_batch, self.fixed_shape = eval_batch or batch, fixed_shape
        self.global_batch = batch * accumulation * world  # records a step; rows when an epoch is packed
        self.reference = ""  # of preference data: what its log-probabilities were made from
        self._order = Order(dataset.by_file(), dataset.weights, seed)
        if not self._order.count:
            raise ValueError("no record to train on: the data is empty, or its mixing weights round to nothing")
        self._epoch_rows = EpochRows(self._order, dataset.lengths, max_len, seed)

    def epoch_length(self) -> int:
        """Records of an epoch; rows of the first when epochs are packed."""
        return self._epoch_rows.before(1) if self.packing == "epoch" else self._order.count

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs: whole global batches, at least one."""
        return max(1, int(epochs * self.epoch_length() / self.global_batch + 1e-9))

    def epoch_of(self, step: int) -> float:
        """Epochs done before this step."""
        return step * self.global_batch / self.epoch_length()

    def step(self, index: int) -> Step:
        """Step number index, from 0; any step at any time."""
        grid = self._grid(index)
        documents = np.concatenate([row for rows, _ in grid for row in rows])
        lengths = self.dataset.lengths[documents].astype(np.int64)
        return Step(
            [self._assemble(self.dataset, *grid[i]) for i in range(self.rank, len(grid), self.world)],
            int(self.dataset.supervised[documents].sum()),
            int(lengths.sum()),
            sum(len(rows) * width for rows, width in grid),
            documents.size if isinstance(self.dataset, PairDataset) else 0,
            int((lengths * (lengths + 1) // 2).sum()),
        )

    def longest(self) -> tuple[Batch, int]:
        """A micro-batch as large as any that a step can have, all of it supervised; the most micro-batches of a step.

        As many of the longest records as a step takes are packed, each as often as a step can have it: no other step
        needs more rows. The rows' tokens are a record's, over and over.
        """
        # A step that does not begin with an epoch may touch one epoch more than hold its records.
        epochs = 1 + -(-(self.global_batch - 1) // self._order.count)
        times_each = [min(self.global_batch, epochs * math.ceil(w)) for w in self.dataset.weights]
        repeats = np.repeat(times_each, [d.size for d in self.dataset.by_file()])
        longest = np.argsort(-self.dataset.lengths, kind="stable")[: self.global_batch]
        lengths = np.repeat(self.dataset.lengths[longest], repeats[longest])[: self.global_batch]
        B, T, times = self.batch, self.max_len, self.accumulation
        if self.packing == "none":
            T = self._width(int(lengths[0]))
        elif self.packing == "step":
            rows = pack(np.arange(lengths.size), lengths, self.max_len)
            most = -(-len(rows) // self.world)
            B, times = min(B, most), min(times, -(-most // self.batch))
            T = self._width(int(lengths.sum()))
        if self.fixed_shape:
            B, T = self.batch, self.max_len
        ids, _ = self.dataset.document(0)
        tokens = torch.from_numpy(np.resize(np.asarray(ids, np.int64), (B, T)).copy())
        start, end = torch.zeros(B, T, dtype=torch.int32), torch.full((B, T), T, dtype=torch.int32)
        return Batch(tokens, tokens.clone(), start, end, []), times

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of the held-out set, packed, always the same; as many batches on every rank."""
        return self.all_batches(self.evaluation)

    def all_batches(self, dataset: Dataset | None) -> Iterator[Batch]:
        """This rank's share of any data set, each document once, in the same way."""
        if dataset is None or not len(dataset):
            return
        rows = pack(np.arange(len(dataset)), dataset.lengths, self.max_len)
        grid = self._deal(dataset, rows, self.eval_batch)
        for i in range(self.rank, len(grid), self.world):
            yield self._assemble(dataset, *grid[i])

    def fill(self, steps: int = 64) -> float:
        """Share of slots that hold real tokens, over the first epoch or as many of its steps."""
        taken = min(steps, self.total_steps(1))
        grids = [self._grid(i) for i in range(taken)]
        real = sum(int(self.dataset.lengths[row].sum()) for grid in grids for rows, _ in grid for row in rows)
        return real / sum(len(rows) * width for grid in grids for rows, width in grid)

    def report(self) -> list[str]:
        """Lines on order and packing for Report.notes."""
        what = {"none": "no packing", "step": "packed within each step", "epoch": "packed over the epoch"}[self.packing]
        unit = "rows" if self.packing == "epoch" else "records"
        return [
            f"{what}, rows of {self.max_len}: {100 * self.fill():.1f} % of the slots hold tokens",
            f"{self.global_batch:,} {unit} a step, {self.epoch_length() / self.global_batch:,.1f} steps an epoch",
        ]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` steps: the next step, and what the order depends on."""
        state: dict[str, Any] = {"step": step, "seed": self.seed, "data": self.dataset.identity}
        if self.reference:
            state["reference"] = self.reference
        if self.packing == "epoch":
            return {**state, "rows_per_step": self.global_batch, "row_length": self.max_len}
        return {**state, "records_per_step": self.global_batch}

    def restore(self, state: dict[str, Any]) -> int:
        """The step to go on with. ValueError if the records would come in another order than in the saved run.

        Ranks, micro-batch and accumulation may change as long as their product stays; so may "none" and "step".
        """
        mine = self.state(int(state["step"]))
        names = {
            "reference": "the starting model, which is the reference, or the data set",
            "data": "the data set (files, weights, held-out share, tokenizer, prompt format or length limit)",
        }
        for key in sorted(mine.keys() | state.keys()):
            if mine.get(key) != state.get(key):
                now, then = mine.get(key, "not set"), state.get(key, "not set")
                what = names.get(key, key.replace("_", " "))
                detail = "" if key in names else f": {then} in the checkpoint, {now} now"
                raise ValueError(f"cannot resume in the same order: {what} changed{detail}")
        return int(mine["step"])

    def _grid(self, index: int) -> Grid:
        """All micro-batches of a step: the j-th of rank r is number j * world + r."""
        first, n = index * self.global_batch, self.global_batch
        if self.packing == "step":
            documents = self._order.take(first, n)
            return self._deal(self.dataset, pack(documents, self.dataset.lengths[documents], self.max_len), self.batch)
        packed = self.packing == "epoch"
        rows = self._epoch_rows.take(first, n) if packed else list(self._order.take(first, n)[:, None])
        return [self._shape(self.dataset, rows[i : i + self.batch], self.batch) for i in range(0, n, self.batch)]

    def _deal(self, dataset: Dataset, rows: Rows, batch: int) -> Grid:
        """Rows over ranks and as few micro-batches as hold them, evenly: sizes differ by one row at most.

        The fullest rows are dealt first, so the ranks' shares differ little in tokens too.
        """
        bins = self.world * -(-len(rows) // (self.world * batch))
        fullest_first = np.argsort(-rows.used, kind="stable").tolist()
        return [self._shape(dataset, [rows[i] for i in fullest_first[b::bins]], batch) for b in range(bins)]

    def _shape(self, dataset: Dataset, rows: list[Ints], batch: int) -> tuple[list[Ints], int]:
        """Rows with their width: that of the longest, up to a multiple of 8; an empty one for a rank without any."""
        if self.fixed_shape:
            return rows + [np.zeros(0, np.int64)] * (batch - len(rows)), self.max_len
        rows = rows or [np.zeros(0, np.int64)]
        widest = max(int(dataset.lengths[row].sum()) for row in rows)
        return rows, self._width(widest)

    def _width(self, widest: int) -> int:
        return min(self.max_len, max(8, -(-widest // 8) * 8))

    def _assemble(self, dataset: Dataset, rows: list[Ints], width: int) -> Batch:
        B, T = len(rows), width
        tokens, targets = np.zeros((B, T), np.int64), np.full((B, T), IGNORE, np.int64)
        start, end = np.zeros((B, T), np.int32), np.full((B, T), T, np.int32)
        answers = np.full((B, T), -1, np.int64)
        records, numbers, count = [], [], 0
        for b, row in enumerate(rows):
            at = 0
            for document in row.tolist():
                for ids, mask in dataset.parts(document):
                    to = at + ids.size
                    tokens[b, at:to] = ids
                    targets[b, at : to - 1] = np.where(mask[1:], ids[1:], IGNORE)
                    start[b, at:to], end[b, at:to] = at, to
                    answers[b, at:to] = count
                    at, count = to, count + 1
                records.append(dataset.record(document))
                numbers.append(document)
            start[b, at:] = at
        batch = Batch(*(torch.from_numpy(a) for a in (tokens, targets, start, end)), records)
        if isinstance(dataset, PairDataset):
            answers[answers < 0] = count
            reference = torch.from_numpy(dataset.reference[numbers].reshape(-1, 2))
            batch.pairs = Pairs(torch.tensor(numbers, dtype=torch.int64), reference, torch.from_numpy(answers))
        return batch
