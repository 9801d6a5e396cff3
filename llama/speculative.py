"""Speculative decoding: cheap guesses at the next ids, which the model checks in one pass over several rows.

generation.stream() runs a Drafter's steps in place of its own. Every id of the answer is the one that the sampler draws
from the model's own logits, with the same random number as without a draft: a guess is right if it is that id. So
neither what is drafted nor how much, which depends on the clock, changes the text. For lookup, whose guess has all of
its draft's probability, this is the rejection sampling of Leviathan et al. 2022 (arXiv:2211.17192). A draft model draws
with the answer's next random numbers (Daliri et al. 2024, arXiv:2408.07978): somewhat fewer guesses are right than
rejection would keep, but seeds go on meaning what they mean.

That holds up to rounding, for a pass over several rows sums in another order. In fp32 logits move by 4e-6, and the text
stays; in bf16, int8 and int4 by up to 0.02, which decides close calls otherwise (110M random weights: 1 or 2 of 64).

Knows ids and seconds; no text, no files, no batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.generation import Context, Drafts, prefill
from llama.model import Llama
from llama.sampling import Sampler

NGRAMS = (3, 2)  # ids that must have occurred before for what followed them to be a guess; the longest first
LENGTHS = (3, 7, 15)  # ids drafted: 4, 8 and 16 rows, the blocks that the products of few_rows.py come in


class Source(Protocol):
    """Where guesses come from."""

    free: bool  # whether a guess takes no time, so that its quality can be watched while nothing is drafted
    prior: float  # the share of right guesses to expect of a kind never tried

    def begin(self, ids: Sequence[int]) -> None:
        """An answer to these ids begins."""

    def kind(self, ids: Sequence[int]) -> int | None:
        """What sort of guess would go on from ids, for statistics by sort; None: there is none."""

    def draft(self, ids: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        """n ids that may follow; kind(ids) was asked before. The sampler is that of the answer and is left as it is."""


class Lookup:
    """Guesses what followed the latest earlier occurrence of the last ids (Saxena 2023, prompt lookup decoding)."""

    free, prior = True, 0.35  # a guess must have been right before one is paid for

    def __init__(self) -> None:
        self.begin(())

    def begin(self, ids: Sequence[int]) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ends
        self._known = 0  # n-grams that end here or before are in it
        self._source = 0
        self.kind(ids)

    def kind(self, ids: Sequence[int]) -> int | None:
        """The length of what occurred before."""
        while self._known < len(ids) - 1:  # the last ids themselves must not be found
            self._known += 1
            for n in NGRAMS:
                if n <= self._known:
                    self._after[tuple(ids[self._known - n : self._known])] = self._known
        for n in NGRAMS:
            if (at := self._after.get(tuple(ids[-n:]))) is not None:
                self._source = at
                return n
        return None

    def draft(self, ids: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        period = len(ids) - self._source  # beyond the last id, the guesses themselves go on: ababab
        return [ids[self._source + i % period] for i in range(n)]


class DraftModel:
    """Guesses what a smaller model with the same tokenizer says, which reads along with a KV cache of its own."""

    free, prior = False, 0.8

    def __init__(self, model: Llama, cache_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.context = Context(model, cache_dtype=cache_dtype)

    def begin(self, ids: Sequence[int]) -> None:
        if len(ids) < self.model.config.max_seq_len:
            self._read(ids, 0)

    def kind(self, ids: Sequence[int]) -> int | None:
        return 0 if len(ids) + LENGTHS[-1] <= self.model.config.max_seq_len else None

    @torch.inference_mode()
    def draft(self, ids: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        sampler = sampler.fork()
        logits, cache = self._read(ids, n)
        guesses = []
        while True:
            new = sampler(logits[:, -1])
            guesses.append(int(new))
            self.context.ids.append(guesses[-1])
            if len(guesses) == n:
                return guesses
            logits = self.model(new[:, None], cache=cache, last_only=True)

    def _read(self, ids: Sequence[int], n: int) -> tuple[Tensor, KVCache]:
        """Logits after ids, of which only those are run that the cache lacks; n more will follow."""
        new = self.context.rewind(ids, len(ids) + n)
        cache = self.context.cache
        assert cache is not None
        return prefill(self.model, torch.tensor([new], device=self.model.embed.weight.device), cache), cache


class Pace:
    """How many ids to draft: as many as yield the most ids per second, by what was measured; none if that is best."""

    RECENT = 64  # passes after which a timing is forgotten: the machine and the context change
    GUESS = 1.5  # a pass not timed yet takes so many times the next shorter one: less than all measured, so it is tried
    MARGIN = 1.1  # what drafting must win to be worth it; also pays for the sampling that the timings leave out
    WEIGHT = 2.0  # of the prior, in judgements
    FADE = 0.95  # of earlier judgements with every new one of their kind
    FORGET = 0.995  # of all judgements with every pass, so that what was given up is tried again some time

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self._passes = 0
        self._seconds: dict[int, deque[tuple[int, float]]] = {n: deque(maxlen=5) for n in (0, *LENGTHS)}
        self._judged: dict[int, tuple[float, float]] = {}  # kind -> right guesses, all guesses

    def choose(self, kind: int, most: int) -> int:
        """0 or one of LENGTHS, at most `most`."""
        if (plain := self._typical(0)) is None:
            return 0
        p = self.chance(kind)
        best, rate = 0, self.MARGIN / plain
        seconds = plain
        for n in LENGTHS:
            seconds = self._typical(n) or seconds * self.GUESS
            # A pass yields its right guesses and the id that the model says after them.
            expected = (1 - p ** (n + 1)) / (1 - p)
            if n <= most and expected / seconds > rate:
                best, rate = n, expected / seconds
        return best

    def chance(self, kind: int) -> float:
        """How likely the next guess of this kind is right."""
        right, all_ = self._judged.get(kind, (0.0, 0.0))
        return (right + self.WEIGHT * self.prior) / (all_ + self.WEIGHT)

    def judge(self, kind: int, right: bool) -> None:
        """A guess was compared with what the model said, the guesses before it being right."""
        hits, all_ = self._judged.get(kind, (0.0, 0.0))
        self._judged[kind] = (hits * self.FADE + right, all_ * self.FADE + 1)

    def passed(self, drafted: int, seconds: float | None) -> None:
        """A pass was made, with so many drafted ids; seconds None: it took what is no measure of the next."""
        self._passes += 1
        if seconds is not None:
            self._seconds[drafted].append((self._passes, seconds))
        self._judged = {k: (hits * self.FORGET, n * self.FORGET) for k, (hits, n) in self._judged.items()}

    def _typical(self, drafted: int) -> float | None:
        timings = self._seconds[drafted]
        while timings and timings[0][0] <= self._passes - self.RECENT:
            timings.popleft()
        return sorted(seconds for _, seconds in timings)[len(timings) // 2] if timings else None


class Drafter:
    """Drafts for one answer at a time, and learns from one to the next what pays."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.pace = Pace(source.prior)
        self.drafts = Drafts()  # the current answer's; whoever wants them by answer puts new ones here

    @torch.inference_mode()
    def steps(self, model: Llama, tokens: Tensor, context: Context, sampler: Sampler, room: int) -> Iterator[list[int]]:
        """Run tokens (1, T), the end of context.ids, then yield [next token] to a caller who asks `room` times at most.

        Whenever it yields, the cache holds nothing but what was said and guesses that may still turn out right.
        """
        source, cache, ids = self.source, context.cache, list(context.ids)
        assert cache is not None
        end = len(ids) + room
        logits = prefill(model, tokens, cache)
        source.begin(ids)
        ids += sampler(logits[:, -1]).tolist()
        yield ids[-1:]
        before = 0  # drafted for the pass before
        while True:
            start = time.perf_counter()
            kind = source.kind(ids)
            n = 0 if kind is None else self.pace.choose(kind, end - len(ids) - 1)
            guesses = source.draft(ids, n or 1, sampler) if kind is not None and (n or source.free) else []
            draft = guesses[:n]
            held = cache.length
            logits = model(torch.tensor([[ids[-1], *draft]], device=tokens.device), cache=cache, last_only=not draft)
            self.drafts.drafted += n
            for i in range(n + 1):
                ids += sampler(logits[:, i]).tolist()
                if i == 0:  # on a GPU, the pass is over only now. The first draft after a pause also catches up
                    self.pace.passed(n, None if n and not before else time.perf_counter() - start)
                right = i < len(guesses) and guesses[i] == ids[-1]
                if kind is not None and i < len(guesses):
                    self.pace.judge(kind, right)
                goes_on = right and i < n
                if goes_on:
                    self.drafts.accepted += 1
                else:
                    cache.truncate(held + i + 1)
                yield ids[-1:]
                if not goes_on:
                    break
            before = n
