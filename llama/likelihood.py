"""How likely a model finds given texts: the log-probability of each token, for many texts at a time.

evaluate.py calls it. Knows ids, not text or scores. A model that was laid out for decoding will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from llama.chat import IGNORE, targets_of
from llama.model import Llama

Ids = Sequence[int]
PASS = 2048  # tokens a pass: enough to keep a GPU busy; a CPU's speed is the same from 256 on
ROWS = 16  # of logits that a CPU normalises at a time: 300 of 32,000 take a quarter of the time of all at once


@torch.inference_mode()
def answer_losses(
    model: Llama, documents: Sequence[tuple[Ids, Sequence[bool]]], tokens_per_pass: int = PASS
) -> list[Tensor]:
    """For each document (ids, mask) the negative log-likelihood of its masked tokens, fp32 (their number,), on the CPU.

    Documents are packed one behind the other, each seeing itself only; logits are made where they are needed. The
    first id has nothing before it and must not be masked. ValueError for a document longer than the model's context.
    """
    most = model.config.max_seq_len
    for number, (ids, _) in enumerate(documents):
        if len(ids) > most:
            raise ValueError(f"document {number} is {len(ids):,} tokens long; the model's context holds {most:,}")
    losses: list[Tensor] = [torch.empty(0)] * len(documents)
    for numbers in packs([len(ids) for ids, _ in documents], tokens_per_pass):
        targets = torch.tensor([t for number in numbers for t in targets_of(*documents[number])])
        wanted = (targets != IGNORE).nonzero()[:, 0]
        if not len(wanted):
            continue
        row = [i for number in numbers for i in documents[number][0]]
        lengths = [len(documents[number][0]) for number in numbers]
        ends = list(accumulate(lengths))
        borders = [(end - n, end) for n, end in zip(lengths, ends, strict=True) for _ in range(n)]
        logits = _logits(model, row, borders, wanted)
        found = -_chosen(logits, torch.arange(len(wanted)), targets[wanted])
        counts = [sum(documents[number][1][1:]) for number in numbers]
        for number, part in zip(numbers, found.split(counts), strict=True):
            losses[number] = part
    return losses


@torch.inference_mode()
def continuations(
    model: Llama, questions: Sequence[tuple[Ids, Sequence[Ids]]], tokens_per_pass: int = PASS
) -> list[list[Tensor]]:
    """For each question (prefix, continuations) the log-probabilities of every continuation's ids, fp32, on the CPU.

    Continuations branch from their prefix, and questions are packed one behind the other. A prefix is run once for as
    many continuations as fit into a pass with it.
    Every prefix and continuation holds one id or more. ValueError where one does not fit into the model's context.
    """
    most = model.config.max_seq_len
    for number, (prefix, endings) in enumerate(questions):
        if not (prefix and endings and all(endings)):
            raise ValueError(f"question {number}: a prefix or a continuation is empty")
        if (length := len(prefix) + max(map(len, endings))) > most:
            raise ValueError(f"question {number} takes {length:,} tokens; the model's context holds {most:,}")
    results: list[list[Tensor]] = [[torch.empty(0)] * len(endings) for _, endings in questions]
    trees = [tree for number, question in enumerate(questions) for tree in _trees(number, *question, tokens_per_pass)]
    for pack in packs([tree.size for tree in trees], tokens_per_pass):
        some = [trees[i] for i in pack]
        found = iter(_grown(model, some))
        for tree in some:
            for place in tree.places:
                results[tree.number][place] = next(found)
    return results


class _Tree(NamedTuple):
    """A question's prefix, and some of its continuations, which branch from it."""

    number: int
    prefix: Ids
    places: list[int]
    endings: list[Ids]

    @property
    def size(self) -> int:
        """Tokens to run: what stands behind the last id of a continuation is asked by nobody."""
        return len(self.prefix) + sum(len(ending) - 1 for ending in self.endings)


def _trees(number: int, prefix: Ids, endings: Sequence[Ids], room: int) -> Iterator[_Tree]:
    """A question in parts that fit into a pass, or that are half continuations where its prefix leaves less room."""
    room = max(room - len(prefix), len(prefix))
    for places in packs([len(ending) - 1 for ending in endings], room):
        yield _Tree(number, prefix, places, [endings[i] for i in places])


def _grown(model: Llama, trees: Sequence[_Tree]) -> Sequence[Tensor]:
    """For every ending of one tree after the other the log-probabilities of its ids; all of them run in one row."""
    row: list[int] = []
    borders: list[tuple[int, int, int, int]] = []  # start, end, fork, own
    only: list[int] = []  # places whose logits are needed
    chosen: list[tuple[int, int]] = []  # one of these, and the id behind it
    for tree in trees:
        start, fork = len(row), len(row) + len(tree.prefix)
        end, root = start + tree.size, len(only)
        row += tree.prefix
        borders += [(start, end, start, start)] * len(tree.prefix)
        only.append(fork - 1)
        for ending in tree.endings:
            own, n = len(row), len(ending) - 1
            chosen += zip((root, *range(len(only), len(only) + n)), ending, strict=True)
            only += range(own, own + n)
            row += ending[:-1]
            borders += [(start, end, fork, own)] * n
    logits = _logits(model, row, borders, torch.tensor(only))
    lengths = [len(ending) for tree in trees for ending in tree.endings]
    return _chosen(logits, *torch.tensor(chosen).t()).split(lengths)


def _logits(model: Llama, row: Ids, borders: Sequence[tuple[int, ...]], only: Tensor) -> Tensor:
    """Logits (n, V) at these n places of a row, of whose documents every position knows the borders."""
    device = model.embed.weight.device
    documents = torch.tensor(borders, dtype=torch.int32, device=device).t().contiguous()[:, None]
    return model(torch.tensor([row], device=device), documents=documents.unbind(), only=only.to(device))


def _chosen(logits: Tensor, places: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (N,) of ids (N,), each by the row of logits (n, V) with the number at its place; on the CPU."""
    step = ROWS if logits.is_cpu else len(logits)
    order = places.argsort()
    counts = (places // step).bincount(minlength=-(-len(logits) // step)).tolist()
    pieces = zip(logits.split(step), places[order].split(counts), ids[order].split(counts), strict=True)
    found = torch.empty(len(places))
    found[order] = torch.cat([some.float().log_softmax(-1)[row % step, i].cpu() for some, row, i in pieces])
    return found


def packs(lengths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Numbers of what goes together, in their order: as many as have room, and one at least."""
    pack: list[int] = []
    held = 0
    for number, length in enumerate(lengths):
        if pack and held + length > room:
            yield pack
            pack, held = [], 0
        pack.append(number)
        held += length
    if pack:
        yield pack
