"""How much a request may ask for, and how long a client may take. serve.py and tests make one, all here read it.

Every limit is answered with a status that says which it was: 413 body, 431 headers, 400 for what a request holds,
429 for what does not fit beside the others, 408 or a closed connection for who is slow.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, characters and pieces; times in seconds."""

    body: int = 1 << 20
    headers: int = 1 << 16
    messages: int = 256
    text: int = 100_000  # characters of all texts of a request: 0.2 s of a core for triage and tokenizer
    choices: int = 8
    stops: int = 16
    stop_length: int = 256
    top_logprobs: int = 20
    connections: int = 512
    requests: int = 256  # that are being answered; those beyond are told to come back
    header_time: float = 10.0  # until the headers are there
    body_time: float = 15.0  # from then until the body is there
    idle_time: float = 5.0  # between two requests
    write_time: float = 30.0  # that a client may leave unread what it was sent
    answer_time: float = 600.0
