"""How likely a model finds given texts: the log-probability of each token, for many texts at a time.

evaluate.py calls it. Knows ids, not text or scores. A model that was laid out for decoding will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.chat import IGNORE, targets_of
from llama.model import Llama

Ids = Sequence[int]
PASS = 2048  # tokens a pass: enough to keep a GPU busy; a CPU's speed is the same from 256 on
HELD = 4  # times as many positions are held as may be new in a pass, where rows continue a prefix


@torch.inference_mode()
def answer_losses(
    model: Llama, documents: Sequence[tuple[Ids, Sequence[bool]]], tokens_per_pass: int = PASS
) -> list[Tensor]:
    """For each document (ids, mask) the negative log-likelihood of its masked tokens, fp32 (their number,), on the CPU.

    Documents are packed one behind the other, each seeing itself only; logits are made where they are needed. The
    first id has nothing before it and must not be masked. ValueError for a document longer than the model's context.
    """
    losses: list[Tensor] = [torch.empty(0)] * len(documents)
    for numbers in _packs([len(ids) for ids, _ in documents], tokens_per_pass, model.config.max_seq_len):
        targets = [t for number in numbers for t in targets_of(*documents[number])]
        wanted = [i for i, target in enumerate(targets) if target != IGNORE]
        if not wanted:
            continue
        logits = _packed(model, [documents[number][0] for number in numbers], wanted)
        found = -_chosen(logits, torch.tensor(targets, device=logits.device)[wanted]).cpu()
        counts = [sum(documents[number][1][1:]) for number in numbers]
        for number, part in zip(numbers, found.split(counts), strict=True):
            losses[number] = part
    return losses


@torch.inference_mode()
def continuations(
    model: Llama, questions: Sequence[tuple[Ids, Sequence[Ids]]], tokens_per_pass: int = PASS
) -> list[list[Tensor]]:
    """For each question (prefix, continuations) the log-probabilities of every continuation's ids, fp32, on the CPU.

    A prefix is run once, whatever the number of its continuations. Prefixes are packed where every continuation is one
    id; else they stand side by side with others of about their length.
    Every prefix and continuation holds one id or more. ValueError where one does not fit into the model's context.
    """
    most = model.config.max_seq_len
    for number, (prefix, endings) in enumerate(questions):
        if not (prefix and endings and all(endings)):
            raise ValueError(f"question {number}: a prefix or a continuation is empty")
        if (length := len(prefix) + max(map(len, endings))) > most:
            raise ValueError(f"question {number} takes {length:,} tokens; the model's context holds {most:,}")
    results: list[list[Tensor]] = [[torch.empty(0)] * len(endings) for _, endings in questions]
    long = [number for number, (_, endings) in enumerate(questions) if max(map(len, endings)) > 1]
    short = [number for number, (_, endings) in enumerate(questions) if max(map(len, endings)) == 1]
    for some in _packs([len(questions[number][0]) for number in short], tokens_per_pass, most):
        numbers = [short[i] for i in some]
        prefixes = [questions[number][0] for number in numbers]
        ends = [end - 1 for end in accumulate(map(len, prefixes))]
        for number, found in zip(numbers, _packed(model, prefixes, ends).float().log_softmax(-1), strict=True):
            results[number] = [found[list(ending)].cpu() for ending in questions[number][1]]
    for batch in _batches([len(questions[number][0]) for number in long], tokens_per_pass):
        numbers = [long[i] for i in batch]
        cache, logits = _read(model, [questions[number][0] for number in numbers])
        rows = [(i, j) for i, number in enumerate(numbers) for j in range(len(questions[number][1]))]
        for some in _rows(rows, [[len(e) for e in questions[number][1]] for number in numbers], cache, tokens_per_pass):
            endings = [questions[numbers[i]][1][j] for i, j in some]
            found = _continued(model, cache, logits, [i for i, _ in some], endings)
            for (i, j), part in zip(some, found, strict=True):
                results[numbers[i]][j] = part
    return results


def _packed(model: Llama, documents: Sequence[Ids], only: Sequence[int]) -> Tensor:
    """Logits (n, V) at these n places of the documents, which stand one behind the other, each seeing itself only."""
    device = model.embed.weight.device
    lengths = torch.tensor([len(ids) for ids in documents])
    ends = lengths.cumsum(0)
    bounds = tuple(t.repeat_interleave(lengths)[None].to(device, torch.int32) for t in (ends - lengths, ends))
    ids = torch.tensor([[i for some in documents for i in some]], device=device)
    return model(ids, documents=bounds, only=torch.tensor(only, device=device))


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (N,) of ids (N,) by logits (N, V)."""
    return logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def _packs(lengths: Sequence[int], room: int, longest: int) -> Iterator[list[int]]:
    """Numbers of the documents that share a pass, in their order."""
    pack: list[int] = []
    held = 0
    for number, length in enumerate(lengths):
        if length > longest:
            raise ValueError(f"document {number} is {length:,} tokens long; the model's context holds {longest:,}")
        if pack and held + length > room:
            yield pack
            pack, held = [], 0
        pack.append(number)
        held += length
    if pack:
        yield pack


def _batches(lengths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Numbers of the prefixes that are read side by side, the longest first: what does not fit shows at once."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > room:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _rows(
    rows: Sequence[tuple[int, int]], lengths: Sequence[Sequence[int]], cache: KVCache, room: int
) -> Iterator[list[tuple[int, int]]]:
    """Continuations (i, j), i.e. the j-th of prefix i, that are run side by side: those of one length together."""
    batch: list[tuple[int, int]] = []
    for i, j in sorted(rows, key=lambda row: lengths[row[0]][row[1]]):
        n, length = len(batch) + 1, lengths[i][j]
        if batch and (n * length > room or n * (cache.length + length) > HELD * room):
            yield batch
            batch = []
        batch.append((i, j))
    if batch:
        yield batch


def _read(model: Llama, prefixes: Sequence[Ids]) -> tuple[KVCache, Tensor]:
    """A cache that holds the prefixes, ending together, and the logits (B, V) after each."""
    weight = model.norm.weight  # its number type is that of everything between two products
    T = max(map(len, prefixes))
    cache = KVCache(model.config, len(prefixes), T, weight.device, weight.dtype)
    missing = [T - len(prefix) for prefix in prefixes]
    if any(missing):
        cache.first = torch.tensor(missing, dtype=torch.int32, device=weight.device)
    tokens = torch.tensor([[0] * n + list(p) for n, p in zip(missing, prefixes, strict=True)], device=weight.device)
    return cache, model(tokens, cache=cache, last_only=True)[:, -1]


def _continued(
    model: Llama, cache: KVCache, logits: Tensor, rows: Sequence[int], endings: Sequence[Ids]
) -> list[Tensor]:
    """Log-probabilities of the ids of each ending, behind the row of the cache with its number."""
    device = logits.device
    numbers = torch.tensor(rows, device=device)
    T = max(map(len, endings))
    ids = torch.tensor([list(e) + [0] * (T - len(e)) for e in endings], device=device)
    found = [_chosen(logits[numbers], ids[:, 0])[:, None]]
    if T > 1:
        # What stands behind an ending is seen by no token of it.
        after = model(ids[:, :-1], cache=cache.repeated(rows, cache.length + T - 1))
        found.append(_chosen(after.flatten(0, 1), ids[:, 1:].flatten()).view(len(rows), T - 1))
    table = torch.cat(found, 1).cpu()
    return [row[: len(e)] for row, e in zip(table, endings, strict=True)]
