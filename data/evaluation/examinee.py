"""What the parts of evaluate.py need of a model: how likely it finds texts, and what it answers.

llama/examinee.py is one over a real model; tests have ones that know what they should score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llama.chat import ChatFormat, Dialogue, Message, render
from llama.tokenizer import Tokenizer

Ids = Sequence[int]


class Reply(Protocol):
    """A free answer: its text, whether the model ended it itself, and its length in tokens."""

    @property
    def text(self) -> str: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def tokens(self) -> int: ...


class Examinee(Protocol):
    """A model that is examined."""

    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_len: int  # tokens that its context holds

    def losses(self, documents: Sequence[tuple[Ids, Sequence[bool]]]) -> list[list[float]]:
        """For each document (ids, mask) the negative log-likelihood of its masked tokens, in nats."""
        ...

    def continuations(self, questions: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[list[float]]]:
        """For each question (prefix, continuations) the log-probability of each token of each continuation."""
        ...

    def replies(self, prompts: Sequence[Ids], max_new_tokens: int) -> Sequence[Reply]:
        """Greedy answers."""
        ...

    def vectors(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The last hidden state of every token of each text, (tokens, width)."""
        ...


def opened(examinee: Examinee, dialogue: Dialogue) -> Dialogue:
    """With the checkpoint's own instruction in front, as in a chat, where the dialogue brings none."""
    if dialogue.messages[0].role == "system":
        return dialogue
    return Dialogue((*examinee.chat_format.opening(), *dialogue.messages))


def chat_prompt(examinee: Examinee, asked: str | Dialogue, room: int) -> list[int]:
    """Ids of a question in the model's own prompt format, cut from the left to leave `room` tokens."""
    dialogue = Dialogue((Message("user", asked),)) if isinstance(asked, str) else asked
    ids = render(opened(examinee, dialogue), examinee.chat_format, examinee.tokenizer)[0]
    return cut(ids, max(2, examinee.max_len - room))[0]


def text_prompt(examinee: Examinee, text: str, room: int) -> tuple[list[int], bool]:
    """Ids of BOS and a text as it is, and whether it had to be cut for `room` tokens to follow."""
    return cut([examinee.tokenizer.bos_id, *examinee.tokenizer.encode(text)], max(2, examinee.max_len - room))


def cut(ids: list[int], limit: int) -> tuple[list[int], bool]:
    """The first id (BOS) and the last ones, as lm-evaluation-harness cuts; and whether any was left out."""
    assert limit > 1, limit
    return (ids, False) if len(ids) <= limit else ([ids[0], *ids[1 - limit :]], True)


def continued(examinee: Examinee, text: str) -> list[int]:
    """Ids of a text that goes on from a prompt, leading space and all; of half the model's context at most."""
    return examinee.tokenizer.encode(text, continued=True)[: examinee.max_len // 2]
