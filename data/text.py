"""Plain text, a .txt file or one long text -> sections of bounded size. Called by records.py.

A .txt file is one document; a line or mark `<|endoftext|>` ends a document and begins the next. Blank lines do not:
in a book they stand between paragraphs, which belong together. A document is handed on in sections, cut where a
paragraph, a line or a word ends, so that memory stays bounded whatever its size. Nothing is lost or changed: the
sections of a document, joined, are the document.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.stream import Item

SECTION = 1 << 15  # characters; about 8,000 tokens of English
END = "<|endoftext|>"


@dataclass(frozen=True)
class Section:
    """A part of a document, and whether it is its first and its last."""

    text: str
    first: bool
    last: bool


def sections(text: str) -> list[Section]:
    """One text in sections."""
    parts = []
    while len(text) > SECTION:
        cut = _border(text)
        parts.append(text[:cut])
        text = text[cut:]
    parts.append(text)
    return [Section(part, i == 0, i == len(parts) - 1) for i, part in enumerate(parts)]


def read_sections(path: Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[Item]:
    """The sections of a UTF-8 text file, numbered from 1; Item.value is a Section. Blank documents are left out,
    and blank sections that a document begins with.

    A section that is not UTF-8 has a fault; the next ones can be read. ValueError if the file cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, done, first = "", False, True
    index, line, byte = 0, 1, 0
    try:
        with path.open("rb") as file:
            while text or not done:
                if not done and len(text) <= SECTION + len(END):
                    chunk = file.read(4 * SECTION)
                    done = not chunk
                    text += decoder.decode(chunk, final=done)
                    if on_bytes:
                        on_bytes(len(chunk))
                    continue
                end = text.find(END)
                last = 0 <= end <= SECTION or (end < 0 and len(text) <= SECTION)
                cut = _border(text) if not last else end if end >= 0 else len(text)
                part, rest = text[:cut], cut + (len(END) if last and end >= 0 else 0)
                if last and end >= 0 and text[rest : rest + 1] == "\n":
                    rest += 1  # of the mark's own line
                if part.strip() or not first:
                    index += 1
                    yield Item(index, line, byte, Section(part, first, last), part, _fault(part))
                line, byte = line + text.count("\n", 0, rest), byte + len(_bytes(text[:rest]))
                text, first = text[rest:], last or (first and not part.strip())
    except OSError as e:
        raise ValueError(f"{path}: cannot read it ({e.strerror})") from None


def _border(text: str) -> int:
    """Where to cut a text of more than SECTION characters: at the last paragraph, line or word in its second half."""
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, SECTION // 2, SECTION)
        if at >= 0:
            return at + len(mark.strip(" "))  # a space goes with the word after it, as tokens have it
    return SECTION


def _fault(text: str) -> tuple[str, str] | None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        what = f"byte 0x{ord(text[e.start]) - 0xDC00:02x}"
        return "", f"is not UTF-8: {what} after {len(_bytes(text[: e.start])):,} bytes of this section"
    return None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
