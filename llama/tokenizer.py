"""Text <-> token ids, by a SentencePiece model file.

Ids of BOS, EOS and unknown come from the model file, never from a config.json (ChatDoctor's own says 0/1 where its
tokenizer says 1/2). Text is always text: "</s>" typed by a user does not become the EOS id.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

# A ModelProto that only says normalizer_spec { add_dummy_prefix: false }. Protocol buffers merge a message that is
# given twice, so these four bytes after a model file make a second processor that puts no space before the text.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

MAX_CHARS = 2_000_000  # SentencePiece holds about 48 bytes per character of one text; 2 MB take 100 MB


class Tokenizer:
    """A SentencePiece model: encode, decode, and the ids of its special pieces."""

    def __init__(self, model: bytes, name: str = "tokenizer.model") -> None:
        """model: the bytes of the model file; name: what errors call it. ValueError if it is not one."""
        self.model_bytes = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._whole = _processor(model, name)
        self._continued = _processor(model + _NO_DUMMY_PREFIX, name)
        self.vocab_size: int = self._whole.vocab_size()
        self.bos_id: int = self._whole.bos_id()
        self.eos_id: int = self._whole.eos_id()
        self.unk_id: int = self._whole.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{name}: the model has no BOS or EOS piece; it cannot mark where an answer ends")
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Tokenizer of a `tokenizer.model` file."""
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as e:
            raise ValueError(f"{path}: cannot read the tokenizer ({e.strerror})") from None
        return cls(model, str(path))

    def _piece_bytes(self, i: int) -> bytes:
        """What piece i stands for; control pieces stand for nothing."""
        p = self._whole
        if p.IsControl(i):
            return b""
        if p.IsUnknown(i):
            return " \u2047 ".encode()  # SentencePiece's own surface of the unknown piece
        if p.IsByte(i):
            return bytes([int(p.IdToPiece(i)[3:5], 16)])
        return p.IdToPiece(i).replace("\u2581", " ").encode()

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of the text, without BOS or EOS.

        continued: the text goes on from text before it, so no leading-space marker is put in front. ValueError for
        a text that is not valid Unicode (a lone surrogate) or longer than MAX_CHARS.
        """
        if len(text) > MAX_CHARS:
            raise ValueError(f"a text of {len(text):,} characters is over the limit of {MAX_CHARS:,}; split it")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"the text is not valid Unicode at character {e.start}: {text[e.start]!r}") from None
        return (self._continued if continued else self._whole).encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a whole sequence that encode() made: the leading-space marker is taken off again."""
        text = self.decode_continued(ids)
        return text[1:] if text.startswith(" ") else text

    def decode_continued(self, ids: Iterable[int]) -> str:
        """Text of ids that go on from text before them: nothing is taken off. Same text as stream() gives."""
        stream = self.stream()
        return "".join(stream.feed(i) for i in ids) + stream.end()

    def piece_bytes(self, token: int) -> bytes:
        """What one id stands for; a part of a character, maybe."""
        return self._bytes[token]

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self._bytes)


class StreamDecoder:
    """Ids one at a time -> text, holding back bytes until they make whole UTF-8 characters."""

    def __init__(self, piece_bytes: list[bytes]) -> None:
        self._piece_bytes = piece_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Text that is certain once this id is known; may be empty. ValueError for an id out of range."""
        if not 0 <= token < len(self._piece_bytes):
            raise ValueError(f"token id {token} is outside the vocabulary of {len(self._piece_bytes)}")
        return self._utf8.decode(self._piece_bytes[token])

    def end(self) -> str:
        """What an unfinished character at the end comes to: the replacement character, or nothing."""
        return self._utf8.decode(b"", final=True)


def _processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        ok = processor.vocab_size() > 0
    except (RuntimeError, UnicodeDecodeError, ValueError):
        ok = False
    if not ok:
        raise ValueError(f"{name}: not a SentencePiece model{_looks_like(model)}")
    return processor


def _looks_like(head: bytes) -> str:
    if not head:
        return " (the file is empty)"
    if head.startswith(b"version https://git-lfs"):
        return " (a Git LFS pointer: fetch the real file with `git lfs pull`)"
    if head.lstrip()[:1] in (b"{", b"["):
        return " (it is JSON: a Hugging Face tokenizer; only SentencePiece models open here)"
    if head.lstrip()[:1] == b"<":
        return " (an HTML page: the download went wrong)"
    first = head.split(b"\n", 1)[0].split()
    if len(first) == 2 and first[1].isdigit():
        return " (a tiktoken file, as Llama 3 has: only SentencePiece models open here)"
    return " (damaged or truncated?)"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a SentencePiece BPE model the way LLaMA's was: byte fallback, digits split one by one, text unchanged.

    Deterministic: one thread, the texts in their order. ValueError if the texts cannot fill vocab_size pieces.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as e:
        remedy = "give more text, a trained tokenizer (--tokenizer_path) or a trained model (--model_name_or_path)"
        most = re.search(r"Please set it to a value <= (\d+)", str(e))
        why = f"these texts hold {int(most[1]):,}" if most else str(e).splitlines()[-1]
        raise ValueError(f"cannot train a tokenizer of {vocab_size:,} pieces: {why}; {remedy}") from None
    return Tokenizer(out.getvalue(), "trained tokenizer")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.splitlines() if line)
