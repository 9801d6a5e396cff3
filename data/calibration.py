"""Dialogues whose tokens show what a model's inputs are like, to round its weights by. Called by convert_weights.py."""

from __future__ import annotations

import itertools
from pathlib import Path

from data.records import read_records
from llama.chat import ChatFormat, Encoder, render

DIALOGUES = 128
LENGTH = 512  # tokens of each at most


def calibration_tokens(file: Path, chat_format: ChatFormat, tokenizer: Encoder) -> list[list[list[int]]]:
    """Ids (1, T) of the first dialogues of a file, in any shape of the loader. ValueError if there are none."""
    records = itertools.islice(read_records(file, instruction=chat_format.instruction), DIALOGUES)
    tokens = [[render(r.dialogue, chat_format, tokenizer)[0][:LENGTH]] for r in records]
    if not tokens:  # an empty JSON array
        raise ValueError(f"{file}: holds no dialogues")
    return tokens
