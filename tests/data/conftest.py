"""An examinee that knows what it should score: likelihood and answers are functions of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from llama.chat import ChatFormat
from llama.tokenizer import Tokenizer


@dataclass
class Said:
    text: str
    stopped: bool = True
    tokens: int = 5


@dataclass
class Oracle:
    """log p of a continuation and the answer to a prompt are `score(prompt, continuation)` and `answer(prompt)`."""

    tokenizer: Tokenizer
    score: Callable[[str, str], float] = lambda prompt, ending: 0.0
    answer: Callable[[str], str] = lambda prompt: "Rest."
    nats: float = 0.5
    max_len: int = 4096
    chat_format: ChatFormat = field(default_factory=lambda: ChatFormat("dialogue", ""))

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> list[list[float]]:
        return [[self.nats] * sum(mask) for _, mask in documents]

    def continuations(
        self, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
    ) -> list[list[list[float]]]:
        assert all(len(p) + max(map(len, e)) <= self.max_len for p, e in questions)
        return [
            [
                [self.score(self._text(prefix), self.tokenizer.decode_continued(e))] + [0.0] * (len(e) - 1)
                for e in endings
            ]
            for prefix, endings in questions
        ]

    def replies(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Said]:
        return [Said(self.answer(self._text(p))) for p in prompts]

    def vectors(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.eye(self.tokenizer.vocab_size)[self.tokenizer.encode(t)] for t in texts]


@pytest.fixture
def oracle(small_tokenizer: Tokenizer) -> Oracle:
    return Oracle(small_tokenizer)
