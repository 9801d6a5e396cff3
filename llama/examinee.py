"""A model with its tokenizer and prompt format, as the parts of an evaluation ask it: many texts at a time, with a bar.

evaluate.py makes one. It hands on to likelihood.py and batching.py in pieces, so that a bar can move; knows no scores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama.batching import Batch
from llama.cache import KVCache
from llama.chat import ChatFormat
from llama.generation import Request
from llama.likelihood import PASS, answer_losses, continuations, packs
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

Ids = Sequence[int]
Item = TypeVar("Item")
PIECE = 16 * PASS  # tokens between two moves of the bar: enough that pieces cost nothing
ROWS = 64  # answers side by side


class Reply(NamedTuple):
    """A free answer: its text, whether the model ended it itself, and its length in tokens."""

    text: str
    stopped: bool
    tokens: int


class Speed(NamedTuple):
    """Tokens a second, the best of turns that alternate: what else runs on the machine only takes from them."""

    scoring: float
    prefill: float


class Examinee:
    """A model that is examined. `task` stands before the bar."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.max_len = model.config.max_seq_len
        self.task = ""
        self._model = model

    def losses(self, documents: Sequence[tuple[Ids, Sequence[bool]]]) -> list[list[float]]:
        """For each document (ids, mask) the negative log-likelihood of its masked tokens, in nats."""

        def some(part: Sequence[tuple[Ids, Sequence[bool]]]) -> list[list[float]]:
            return [t.tolist() for t in answer_losses(self._model, part)]

        return self._in_pieces(documents, lambda d: len(d[0]), some)

    def continuations(self, questions: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[list[float]]]:
        """For each question (prefix, continuations) the log-probability of each token of each continuation."""

        def some(part: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[list[float]]]:
            return [[t.tolist() for t in row] for row in continuations(self._model, part)]

        return self._in_pieces(questions, lambda q: len(q[0]) + sum(map(len, q[1])), some)

    def replies(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Reply]:
        """Greedy answers without a penalty for repetition, which would hide what the evaluation counts."""
        greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0)
        batch = Batch(self._model, self.tokenizer, ROWS)
        answers = [batch.submit(Request(ids, greedy, max_new_tokens)) for ids in prompts]
        with self._bar(len(answers)) as bar:
            while batch:
                bar.update(sum(event.answer.finish_reason is not None for event in batch.step()))
        return [Reply(a.text, a.finish_reason == "stop", len(a.token_ids)) for a in answers]

    def vectors(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The last hidden state, normalised as the head sees it, of every token of each text, (tokens, width)."""
        return [self._hidden(self.tokenizer.encode(text)[: self.max_len - 1]) for text in texts]

    @torch.inference_mode()
    def _hidden(self, ids: Ids) -> np.ndarray:
        held: list[Tensor] = []
        hook = self._model.layers[-1].register_forward_hook(lambda module, given, made: held.append(made))
        try:
            device = self._model.embed.weight.device
            self._model(torch.tensor([[self.tokenizer.bos_id, *ids]], device=device), last_only=True)
        finally:
            hook.remove()
        return self._model.norm(held[0])[0, 1:].float().cpu().numpy()

    @torch.inference_mode()
    def speed(self, documents: Sequence[tuple[Ids, Sequence[bool]]], turns: int = 5) -> Speed:
        """Tokens a second of scoring these documents, and of reading the same ones as prompts into a KV cache."""
        tokens = sum(len(ids) for ids, _ in documents)
        ways: tuple[Callable[[], Any], ...] = (
            lambda: answer_losses(self._model, documents),
            lambda: prefill(self._model, [ids for ids, _ in documents]),
        )
        taken: list[list[float]] = [[], []]
        for turn in range(turns + 1):  # the first one warms up
            for way, seconds in zip(ways, taken, strict=True):
                self._wait()
                began = time.perf_counter()
                way()
                self._wait()
                if turn:
                    seconds.append(time.perf_counter() - began)
        return Speed(*(tokens / min(seconds) for seconds in taken))

    def _wait(self) -> None:
        if self._model.embed.weight.device.type == "cuda":
            torch.cuda.synchronize()

    def _in_pieces(
        self, items: Sequence[Item], size: Callable[[Item], int], work: Callable[[Sequence[Item]], list[Any]]
    ) -> list[Any]:
        """work() of all items, so many tokens of them at a time, the longest first."""
        order = sorted(range(len(items)), key=lambda i: -size(items[i]))
        results: list[Any] = [None] * len(items)
        with self._bar(len(items)) as bar:
            for piece in packs([size(items[i]) for i in order], PIECE):
                numbers = [order[i] for i in piece]
                for number, result in zip(numbers, work([items[i] for i in numbers]), strict=True):
                    results[number] = result
                bar.update(len(numbers))
        return results

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, desc=self.task, unit=" texts", leave=False, disable=None, file=sys.stderr)


@torch.inference_mode()
def prefill(model: Llama, prompts: Sequence[Ids]) -> None:
    """Read prompts into KV caches, packed as batching.py packs them: what scoring is compared with."""
    weight = model.norm.weight
    for pack in packs([len(ids) for ids in prompts], PASS):
        row, starts = [], []
        for i in pack:
            starts += [len(row)] * len(prompts[i])
            row += prompts[i]
        cache = KVCache(model.config, 1, len(row), weight.device, weight.dtype)
        start = torch.tensor([starts], dtype=torch.int32, device=weight.device)
        ids = torch.tensor([row], device=weight.device)
        model(ids, documents=(start, torch.full_like(start, len(row))), cache=cache, last_only=True)
