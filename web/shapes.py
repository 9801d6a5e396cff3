"""Answers as OpenAI's API words them: whole, or in the chunks of a stream; for chats and for plain completions.

app.py fills them. Knows no engine and no HTTP. What is ours beside the API is an object `chatdoctor`.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from llama.sampling import TokenLogprobs
from llama.tokenizer import Tokenizer


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class Usage:
    """Tokens of a request: its prompts once each, its answers all."""

    prompt: int = 0
    reused: int = 0
    answer: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


class Chat:
    """A chat completion."""

    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}

    def whole(self, choices: list[Choice], usage: Usage, beside: dict[str, Any] | None) -> dict[str, Any]:
        """The response to a request without streaming."""
        found = [
            {"index": i, **self._said(c.text, c), "logprobs": self.logprobs(c.logprobs), "finish_reason": c.reason}
            for i, c in enumerate(choices)
        ]
        extension = {} if beside is None else {"chatdoctor": beside}
        return {**self._head, "object": self.whole_object, "choices": found, "usage": usage.to_json(), **extension}

    def chunk(
        self,
        index: int,
        text: str | None,
        logprobs: list[TokenLogprobs] | None = None,
        reason: str | None = None,
        beside: dict[str, Any] | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        """A part of a choice. text None: none, at its end."""
        choice = {
            "index": index,
            **self._part(text, first),
            "logprobs": self.logprobs(logprobs or []),
            "finish_reason": reason,
        }
        extension = {} if beside is None else {"chatdoctor": beside}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **extension}

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk behind all choices, which only counts."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage.to_json()}

    def logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        """The log-probabilities of some tokens."""
        if not tokens:
            return None
        return {
            "content": [
                {**self._token(t.token, t.logprob), "top_logprobs": [self._token(*other) for other in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }

    def _said(self, text: str, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str | None, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        return {"delta": delta if text is None else {**delta, "content": text}}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._tokenizer.piece_bytes(token)
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}


class Completion(Chat):
    """A plain completion."""

    whole_object = chunk_object = "text_completion"
    prefix = "cmpl-"

    def _said(self, text: str, choice: Choice) -> dict[str, Any]:
        return {"text": text}

    def _part(self, text: str | None, first: bool) -> dict[str, Any]:
        return {"text": text or ""}

    def logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not tokens:
            return None
        texts = [self._text(t.token) for t in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self._text(token): logprob for token, logprob in t.top} for t in tokens],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.piece_bytes(token).decode(errors="replace")
