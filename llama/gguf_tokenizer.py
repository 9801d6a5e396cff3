"""A SentencePiece model <-> the tokens, scores and types of a GGUF file, so that the same text gives the same ids.

Called by gguf_files.py. `tokenizer.model` is a protocol buffer (sentencepiece_model.proto); the few fields that matter
are read and written here by hand, because the protobuf package is needed for nothing else. GGUF's token types are
SentencePiece's own, number for number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
SPACE = "\u2581".encode()  # SentencePiece's mark of a space
_KEY = "tokenizer.ggml."
_REMEDY = "give the original with --tokenizer FILE"

# ModelProto, SentencePiece, TrainerSpec and NormalizerSpec: the numbers of their fields.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_IDS = {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47)}  # role: fields of its id and its piece
_PAD_ID = 43
_NAME, _DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 1, 3, 4, 5
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: bytes
    score: float
    kind: int


def pieces_of(tokenizer: Tokenizer) -> list[Piece]:
    """The vocabulary of a SentencePiece model. Its Python interface does not tell which pieces are user-defined."""
    found = []
    for number, message in _fields(tokenizer.model_bytes):
        if number == _PIECES:
            fields = dict(_fields(message))
            (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
            found.append(Piece(fields[_PIECE], score, fields.get(_TYPE, NORMAL)))
    return found


def padding(row: int) -> Piece:
    """The unused piece of a row of the embedding beyond the vocabulary, named as llama.cpp's converter names it."""
    return Piece(f"[PAD{row}]".encode(), -10000.0, UNUSED)


def tokenizer_of(path: Path, values: dict[str, Any]) -> Tokenizer | None:
    """The SentencePiece model that a file's metadata describes, made anew; None when its tokenizer is another kind."""
    if values.get(f"{_KEY}model") != b"llama":
        return None
    pieces = _pieces(path, values)
    special = _special(path, values, pieces)
    model = b"".join(_message(_PIECES, _encode(p)) for p in pieces)
    trainer: list[tuple[int, int | float | bytes]] = [
        (_MODEL_TYPE, _BPE),
        (_VOCAB_SIZE, len(pieces)),
        (_BYTE_FALLBACK, 1),
    ]
    for role, (id_field, piece_field) in _IDS.items():
        trainer += [(id_field, special[role]), (piece_field, pieces[special[role]].text)]
    trainer.append((_PAD_ID, -1))
    normalizer = [
        (_NAME, b"identity"),
        (_DUMMY_PREFIX, int(_flag(values, "add_space_prefix", True))),
        (_REMOVE_EXTRA_WHITESPACES, int(_flag(values, "remove_extra_whitespaces", False))),
        (_ESCAPE_WHITESPACES, 1),
    ]
    model += _message(_TRAINER, _messages(trainer)) + _message(_NORMALIZER, _messages(normalizer))
    try:
        return Tokenizer(model, f"{path}: its tokenizer")
    except ValueError:
        raise ValueError(f"{path}: its tokens make no SentencePiece model (one empty or twice?); {_REMEDY}") from None


def _pieces(path: Path, values: dict[str, Any]) -> list[Piece]:
    """Tokens, scores and types, without the padding at their end."""
    tokens, scores, types = (values.get(_KEY + k) for k in ("tokens", "scores", "token_type"))
    if not (
        isinstance(tokens, list)
        and isinstance(scores, np.ndarray)
        and isinstance(types, np.ndarray)
        and len(tokens) == len(scores) == len(types)
        and (scores.dtype, types.dtype) == (np.float32, np.int32)
        and np.isfinite(scores).all()
    ):
        raise ValueError(f"{path}: lacks tokens, or a score and a type for each; {_REMEDY}")
    pieces = [Piece(t, s, k) for t, s, k in zip(tokens, scores.tolist(), types.tolist(), strict=True)]
    while pieces and pieces[-1].text == padding(len(pieces) - 1).text and pieces[-1].kind in (UNKNOWN, UNUSED):
        pieces.pop()  # older converters call them unknown
    return pieces


def _special(path: Path, values: dict[str, Any], pieces: list[Piece]) -> dict[str, int]:
    """Ids by role, and those pieces put right: llama.cpp's converter makes control pieces of whatever a
    tokenizer_config.json lists, <unk> too, and writes spaces in user-defined ones.

    BOS and EOS become control pieces, whatever the file says: "</s>" that a user types is text.
    """
    ids = {}
    for role, key, usual in (("unk", "unknown", 0), ("bos", "bos", 1), ("eos", "eos", 2)):  # llama.cpp's defaults
        ids[role] = values.get(f"{_KEY}{key}_token_id", usual)
        if not isinstance(ids[role], int) or not 0 <= ids[role] < len(pieces):
            raise ValueError(f"{path}: {key}_token_id is {str(ids[role])[:40]}, which is no token; {_REMEDY}")
    kinds = {ids["unk"]: UNKNOWN, ids["bos"]: CONTROL, ids["eos"]: CONTROL}
    for i, p in enumerate(pieces):
        text = p.text.replace(b" ", SPACE) if p.kind == USER_DEFINED else p.text
        pieces[i] = Piece(text, p.score, kinds.get(i, UNUSED if p.kind == UNKNOWN else p.kind))
    return ids


def _flag(values: dict[str, Any], name: str, usual: bool) -> bool:
    value = values.get(_KEY + name)
    return value if isinstance(value, bool) else usual


# --- protocol buffers -----------------------------------------------------------------------------


def _encode(p: Piece) -> bytes:
    return _messages([(_PIECE, p.text), (_SCORE, float(p.score)), (_TYPE, p.kind)])


def _messages(fields: list[tuple[int, int | float | bytes]]) -> bytes:
    return b"".join(_message(number, value) for number, value in fields)


def _message(number: int, value: int | float | bytes) -> bytes:
    """One field: a number, an fp32 number, or bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))  # negative ones as two's complement
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(n: int) -> bytes:
    if n <= 0x7F:  # nearly all of the 220,000 that a vocabulary of 32,000 takes
        return n.to_bytes(1)
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field: whole numbers, or bytes. `data` is a message that sentencepiece has read."""

    def varint() -> int:
        nonlocal at
        n = shift = 0
        while True:
            byte = data[at]
            at += 1
            n |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return n

    at = 0
    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
        else:
            n = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            yield key >> 3, data[at : at + n]
            at += n
