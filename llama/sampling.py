"""Logits -> next token.

generation.py calls a Sampler once per step for a whole batch. Order and meaning of the filters are those of
transformers (repetition penalty, temperature, top-k, top-p, min-p), so that published settings carry over; two things
differ on purpose: the penalty leaves the prompt alone unless asked, and top-k keeps exactly k tokens when values tie.
The presence and frequency penalties are OpenAI's, and come right behind the repetition penalty, as in vLLM.
Knows nothing of models, text or stopping.
"""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TOP_LOGPROBS = 20
GROUP = 64  # logits whose largest is looked at first


class NotFinite(ValueError):
    """The logits of these rows hold NaN or +inf or nothing but -inf; nothing was drawn."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__("the model's logits are not finite; the weights are damaged or overflow in this dtype")
        self.rows = rows


class TokenLogprobs(NamedTuple):
    """A token's log-probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are those of ChatDoctor's chat.py.

    temperature 0 takes the likeliest token; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch a filter off.
    The penalty divides positive and multiplies negative logits of tokens seen before (Keskar et al. 2019,
    arXiv:1909.05858): of the answer only, because punishing the prompt's tokens keeps the doctor from naming the
    patient's own symptoms; penalize_prompt adds the prompt, as transformers does. seed None draws a fresh one.

    Of every token of the answer so far, presence_penalty is taken from the logit once and frequency_penalty as often
    as the token stands there. logprobs, top_logprobs: tell the chosen tokens' log-probabilities and those of so many
    likeliest ones, by the model's own distribution, before anything is filtered.
    """

    temperature: float = 0.5
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    penalize_prompt: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0 <= _real(self.temperature) < math.inf, "0 or more")
        _check_number("top_p", self.top_p, 0 < _real(self.top_p) <= 1, "over 0 and at most 1")
        _check_number("min_p", self.min_p, 0 <= _real(self.min_p) <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check_number("repetition_penalty", penalty, 0 < _real(penalty) < math.inf, "over 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check_number(name, value, -2 <= _real(value) <= 2, "from -2 to 2")
        if not _whole(self.top_logprobs) or not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ValueError(
                f"top_logprobs is {self.top_logprobs!r}; it must be a whole number from 0 to {MOST_TOP_LOGPROBS}"
            )
        if not _whole(self.top_k) or not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {self.top_k!r}; it must be a whole number, 0 or more (0 is off)")
        if self.seed is not None and (not _whole(self.seed) or not 0 <= self.seed < 2**63):
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def _real(value: object) -> float:
    """The value as a number; NaN, which fails every comparison, for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; it must be a number {wanted}")


class Sampler:
    """The state of sampling for the rows of one batch: settings, random generators, tokens seen.

    Every row has settings and a generator of its own, on the CPU whatever the device: a row's draws depend on its
    seed alone, not on its neighbours. Rows may join and leave between two calls.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        vocab_size: int | None = None,
        banned: Sequence[int] = (),
    ) -> None:
        """One entry of params and prompts per row. Ids in `banned` and ids from `vocab_size` on are never chosen."""
        self.vocab_size = vocab_size
        self._device = device
        self._banned = torch.tensor(sorted(set(banned)), dtype=torch.int64, device=device) if banned else None
        self._rows: list[SamplingParams] = []
        self._generators: list[torch.Generator] = []
        self._seen = _Seen(device)  # what the repetition penalty applies to
        self._counts: Tensor | None = None  # (B, V) fp32: how often they stand in the answer; made when it is asked for
        for p, prompt in zip(params, prompts, strict=True):
            self._add(p, prompt)
        self._arrange()

    def join(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        """A new last row. Memory is taken before anything has changed."""
        counts = self._counts
        if counts is not None:
            counts = torch.cat((counts, torch.zeros_like(counts[:1])))
        self._add(params, prompt)
        self._counts = counts
        self._arrange()

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        for kept in (self._rows, self._generators):
            last = kept.pop()
            if row < len(kept):
                kept[row] = last
        self._seen.leave(row)
        if self._counts is not None:
            if row < len(self._rows):
                self._counts[row] = self._counts[-1]
            self._counts = self._counts[:-1] if self._rows else None
        self._arrange()

    def _add(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._seen.join(prompt if params.penalize_prompt else ())
        self._rows.append(params)
        self._generators.append(torch.Generator().manual_seed(_seed(params)))

    def _arrange(self) -> None:
        """Settings as columns (B, 1), or None where every row has the filter off."""
        params, device = self._rows, self._device

        def column(values: list[float], off: float) -> Tensor | None:
            used = any(v != off for v in values)
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None] if used else None

        # A greedy row among others is a row with one candidate.
        top_ks = [1 if p.greedy else p.top_k for p in params]
        all_few = min(top_ks, default=0) > 0
        self._greedy = all(p.greedy for p in params)
        self._sorted = any(top_ks) or any(p.top_p < 1 for p in params)
        self._n_candidates = max(top_ks) if all_few else None  # None: all
        self._temperature = column([p.temperature or 1.0 for p in params], 1.0)
        self._top_k = column([float(k or 2**31) for k in top_ks], top_ks[0]) if len(set(top_ks)) > 1 else None
        self._top_p = column([p.top_p for p in params], 1.0)
        self._min_p = column([p.min_p for p in params], 0.0)
        self._penalty = column([p.repetition_penalty for p in params], 1.0)
        self._presence = column([p.presence_penalty for p in params], 0.0)
        self._frequency = column([p.frequency_penalty for p in params], 0.0)
        self._telling = [i for i, p in enumerate(params) if p.logprobs]

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """Next tokens (B,) int64 for logits (B, V), which are left as they are. NotFinite before any row draws."""
        x = logits[:, : self.vocab_size].float()
        if self._presence is not None or self._frequency is not None:
            x = x.clone()
        ids = self._touched(len(x))
        before = x.gather(1, ids)
        try:
            tokens = self._choose(self._adjust(x))
        finally:
            x.scatter_(1, ids, before)  # a copy of all takes longer: 0.1 to 0.3 ms of (16, 32000), by what is cached
        if self._penalty is not None:
            self._seen.add(tokens)
        if self._counts is not None:
            self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(self._counts[:, :1]))
        return tokens

    def _choose(self, x: Tensor) -> Tensor:
        """Tokens (B,) for adjusted logits."""
        if self._greedy:
            top, tokens = x.max(-1)
            _check_finite(top)
            return tokens
        values, ids = self.candidates(x)
        if ids is None:
            return self._draw(values)[:, 0]
        # Draw in the order of the vocabulary always: a row must not notice that its neighbours need sorting.
        ids, order = ids.sort()
        return ids.gather(1, self._draw(values.gather(1, order)))[:, 0]

    @torch.inference_mode()
    def logprobs(self, logits: Tensor, tokens: Sequence[int]) -> dict[int, TokenLogprobs]:
        """What the rows that ask for it are told about the tokens drawn from these logits, by row."""
        found = {}
        for row in self._telling:  # one at a time: there may be no memory for more
            p = logits[row, : self.vocab_size].float().log_softmax(-1)
            values, ids = p.topk(min(self._rows[row].top_logprobs, len(p)))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            found[row] = TokenLogprobs(tokens[row], float(p[tokens[row]]), top)
        return found

    def fork(self) -> Sampler:
        """A sampler in the same state: it draws what this one would draw next, and this one does not notice."""
        other = copy.copy(self)
        other._generators = [g.clone_state() for g in self._generators]
        other._seen = self._seen.fork()
        other._counts = None if self._counts is None else self._counts.clone()
        return other

    def adjust(self, logits: Tensor) -> Tensor:
        """fp32 logits after the ban and the penalties."""
        return self._adjust(logits[:, : self.vocab_size].float().clone())

    def _adjust(self, x: Tensor) -> Tensor:
        """adjust(), in place."""
        if self._banned is not None:
            x.index_fill_(1, self._banned, -math.inf)
        if self._penalty is not None:
            # Few tokens have been seen: (32, 32000) takes 0.2 ms so, and 8 by torch.where over all (a core of an EPYC).
            ids, penalty = self._seen.ids, self._seen.where_any(self._penalty)
            seen = x.gather(1, ids)
            x.scatter_(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        if self._presence is not None or self._frequency is not None:
            if self._counts is None:
                self._counts = torch.zeros_like(x)
            rows, ids = self._counts.nonzero(as_tuple=True)
            less = torch.zeros(len(rows), device=x.device)
            if self._presence is not None:
                less += self._presence[rows, 0]
            if self._frequency is not None:
                less += self._frequency[rows, 0] * self._counts[rows, ids]
            x.index_put_((rows, ids), -less, accumulate=True)
        return x

    def _touched(self, rows: int) -> Tensor:
        """Ids (B, n) of all logits that the ban and the repetition penalty change."""
        ids = self._seen.ids if self._penalty is not None else self._seen.ids[:, :0]
        if self._banned is not None:
            ids = torch.cat((self._banned.expand(rows, -1), ids), 1)
        return ids

    def candidates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Adjusted logits -> scaled logits (B, C) with -inf where a filter struck, and their ids (B, C).

        In falling order when a filter needs one; else in the order of the vocabulary and the ids are None.
        """
        ids = None
        if self._sorted:
            C = min(self._n_candidates or x.shape[1], x.shape[1])
            x, ids = _largest(x, C)
        if self._temperature is not None:
            x = x / self._temperature
        _check_finite(x[:, 0] if self._sorted else x.amax(-1))
        if self._top_k is not None:
            x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= self._top_k, -math.inf)
        if self._top_p is not None:
            p = x.softmax(-1)
            # The tokens above this one already hold top_p; the first has none above it and stays.
            x = x.masked_fill(p.cumsum(-1) - p >= self._top_p, -math.inf)
        if self._min_p is not None:
            p = x.softmax(-1)
            x = x.masked_fill(p < self._min_p * p.amax(-1, keepdim=True), -math.inf)
        return x, ids

    def _draw(self, values: Tensor) -> Tensor:
        """Column (B, 1) drawn from softmax(values) by inverting the cumulative distribution, one uniform per row."""
        cumulative = values.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        draws = [torch.rand(1, 1, dtype=torch.float64, generator=g) for g in self._generators]
        u = torch.cat(draws).to(values.device)
        # Strictly below the total, so that the column found has a probability above 0 even if the product rounds up.
        x = torch.minimum(u.to(values.device) * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, x, right=True)


class _Seen:
    """For each row the ids that its repetition penalty applies to, in one table: a look at all logits costs more.

    A row's own ids stand last. What stands before them changes nothing: the first of them again, or in a row that has
    none yet, 0.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._counts: list[int] = []  # how many of a row are its own

    def where_any(self, penalty: Tensor) -> Tensor:
        """The rows' penalties (B, 1), 1 where nothing has been seen yet."""
        return penalty if all(self._counts) else penalty.masked_fill(self._bare(), 1.0)

    def join(self, own: Sequence[int]) -> None:
        """A new last row."""
        own = sorted(set(own))
        table = self.ids
        if (more := len(own) - table.shape[1]) > 0:
            first = table[:, :1] if table.shape[1] else table.new_zeros(len(table), 1)
            table = torch.cat((first.expand(-1, more), table), 1)
        row = [own[0] if own else 0] * (table.shape[1] - len(own)) + own
        self.ids = torch.cat((table, table.new_tensor([row])))
        self._counts.append(len(own))

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self._counts.pop()
        rows = list(range(len(self._counts)))
        if row < len(rows):
            rows[row], self._counts[row] = len(rows), last
        self.ids = self.ids[rows, self.ids.shape[1] - max(self._counts, default=0) :]

    def add(self, tokens: Tensor) -> None:
        """One more id in every row (B,)."""
        ids, token = self.ids, tokens[:, None]
        if not all(self._counts):
            ids = torch.where(self._bare(), token, ids)
        self.ids = torch.cat((ids, token), 1)
        self._counts = [n + 1 for n in self._counts]

    def fork(self) -> _Seen:
        """The same again; what is added to one does not reach the other."""
        other = copy.copy(self)  # every change makes a new table
        other._counts = [*self._counts]
        return other

    def _bare(self) -> Tensor:
        return torch.tensor([not n for n in self._counts], device=self.ids.device)[:, None]


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x.topk(k) of the last dimension of x (B, V): what is among the k largest is in one of the k best groups.

    (16, 32000), k 50, one thread of an EPYC (Zen 5): 0.36 ms instead of 0.55.
    """
    groups = x.shape[1] // GROUP
    if not x.is_cpu or groups < 4 * k:
        return x.topk(k)
    # Number j is in group j % groups: a maximum over the first of two dimensions reads whole lines.
    parts = x[:, : GROUP * groups].view(-1, GROUP, groups)
    best = parts.amax(1).topk(k, sorted=False).indices
    rest = torch.arange(GROUP * groups, x.shape[1]).expand(len(x), -1)
    ids = torch.cat(((best[:, None] + groups * torch.arange(GROUP)[:, None]).flatten(1), rest), 1)
    values, at = x.gather(1, ids).topk(k)
    return values, ids.gather(1, at)


def _seed(params: SamplingParams) -> int:
    return params.seed if params.seed is not None else secrets.randbits(62)


def _check_finite(top: Tensor) -> None:
    """top: the largest logit of each row; topk and max put NaN first."""
    if bad := [i for i, value in enumerate(top.tolist()) if not math.isfinite(value)]:
        raise NotFinite(bad)
