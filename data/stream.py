"""A file of JSON records, an array or one a line -> its records one by one, in bounded memory.

records.py calls it and gives every fault its sentence. The standard library's decoder does the parsing; this file
only feeds it: text in chunks, a limit on one record, and a way on to the next record after a broken one. Knows
nothing of dialogues.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 20
# One record may have this many characters. The tokenizer takes texts of 2 million, and Python holds up to four
# bytes a character and twice that while a buffer grows: 64 MB at worst.
MAX_RECORD = 8 << 20
KEPT = 1000  # characters of a record over the limit that are kept for the report
MAX_KEYS = 16  # first keys of records that are remembered, to know the start of a record after a broken one

_SPACE = re.compile(r"[ \t\r\n]*")
_QUOTE_OR_BRACKET = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'\\.|"', re.DOTALL)
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:')


@dataclass
class Item:
    """One record of a file: its value, or what is wrong with it.

    index counts records from 1; line (from 1) and byte (from 0) say where it starts. raw is its text, with bytes
    that are not UTF-8 as lone surrogates (Python's "surrogateescape"). fault is (field, reason); after a fatal one
    nothing more can be read, though more is there.
    """

    index: int
    line: int
    byte: int
    value: Any
    raw: str
    fault: tuple[str, str] | None = None
    fatal: bool = False


def read_items(path: Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[Item]:
    """Records of a JSON array or of JSON lines, told apart by the first character.

    on_bytes is told how many bytes were read, as they are. ValueError if the file is neither or cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as e:
        raise ValueError(f"{path}: cannot read it ({e.strerror})") from None
    with file:
        try:
            head = file.read(4096)
            first = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")[:1]
            while not first and (more := file.read(4096)):
                first = more.lstrip(b" \t\r\n")[:1]
            if first not in (b"[", b"{"):
                raise ValueError(f"{path}: not a JSON array and not JSON lines{_looks_like(head)}")
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            yield from (_array if first == b"[" else _lines)(file, on_bytes or (lambda n: None))
        except OSError as e:
            raise ValueError(f"{path}: cannot read it ({e.strerror})") from None


def _looks_like(head: bytes) -> str:
    if not head.strip():
        return " (the file is empty)"
    for start, what in (
        (b"version https://git-lfs", "a Git LFS pointer: fetch the real file with `git lfs pull`"),
        (b"<", "an HTML page: the download went wrong"),
        (b"\x1f\x8b", "gzip: unpack it first"),
        (b"PK\x03\x04", "a zip file: unpack it first"),
        (b"PAR1", "a Parquet file: export it as JSON lines"),
        (b"\xff\xfe", "UTF-16: save it as UTF-8"),
        (b"\xfe\xff", "UTF-16: save it as UTF-8"),
    ):
        if head.lstrip().startswith(start):
            return f" ({what})"
    return f"; it starts with {head[:20]!r}"


class _Decoder:
    """json's decoder, but what Python accepts and JSON does not becomes a fault, with the field where it stands."""

    _BAD = object()

    def __init__(self) -> None:
        self.fault: tuple[str, str] | None = None
        self._raw_decode = json.JSONDecoder(
            parse_constant=self._constant, parse_int=self._int, object_pairs_hook=self._object
        ).raw_decode

    def decode(self, text: str, at: int = 0) -> tuple[Any, int]:
        self.fault = None
        return self._raw_decode(text, at)

    def _constant(self, name: str) -> Any:
        self.fault = self.fault or ("", f"{name} is not JSON")
        return self._BAD

    def _int(self, digits: str) -> Any:
        try:
            return int(digits)
        except ValueError:  # over 4,300 digits: Python refuses, because the conversion is quadratic
            self.fault = self.fault or ("", f"a number of {len(digits):,} digits")
            return self._BAD

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        d = dict(pairs)
        if len(d) != len(pairs) and not self.fault:
            seen: set[str] = set()
            name = next(k for k, _ in pairs if k in seen or seen.add(k))
            self.fault = (name, "stands twice in the record")
        if self.fault and not self.fault[0]:
            name = next((k for k, v in pairs if v is self._BAD or (isinstance(v, list) and self._BAD in v)), "")
            self.fault = (name, self.fault[1])
        return d


def _syntax(e: json.JSONDecodeError, line: int, byte: int) -> str:
    what = e.msg[0].lower() + e.msg[1:]
    return f"not valid JSON: {what.removesuffix(' at')} (line {line}, byte {byte:,})"


_TOO_LONG = f"longer than {MAX_RECORD >> 20} million characters, or a quote is never closed"
_TOO_DEEP = "nested too deeply"
_BAD_UTF8 = "not valid UTF-8"


def _utf8_fault(raw: str) -> tuple[str, str] | None:
    """A fault if the text holds a byte that could not be decoded."""
    if raw.isascii():
        return None
    try:
        raw.encode()
    except UnicodeEncodeError as e:
        byte = ord(raw[e.start]) - 0xDC00
        return "", f"{_BAD_UTF8} (byte 0x{byte:02x} at {len(raw[: e.start].encode()):,} bytes into the record)"
    return None


# --- JSON lines -----------------------------------------------------------------------------------


def _lines(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[Item]:
    decoder, index, line, byte = _Decoder(), 0, 0, file.tell()
    while data := file.readline(MAX_RECORD + 1):
        line, start, byte = line + 1, byte, byte + len(data)
        on_bytes(len(data))
        if data.isspace():
            continue
        index += 1
        if len(data) > MAX_RECORD and not data.endswith(b"\n"):
            raw = data[:KEPT].decode("utf-8", "surrogateescape")
            yield Item(index, line, start, None, raw, ("", _TOO_LONG))
            while data and not data.endswith(b"\n"):
                data = file.readline(CHUNK)
                byte += len(data)
                on_bytes(len(data))
            continue
        raw = data.decode("utf-8", "surrogateescape").strip(" \t\r\n")
        yield _decode_line(decoder, Item(index, line, start, None, raw))


def _decode_line(decoder: _Decoder, item: Item) -> Item:
    item.fault = _utf8_fault(item.raw)
    if item.fault:
        return item
    try:
        item.value, end = decoder.decode(item.raw)
        item.fault = decoder.fault
        if end != len(item.raw) and not item.fault:
            item.fault = ("", "text after the record's closing brace; JSON lines hold one record a line")
    except json.JSONDecodeError as e:
        reason = _syntax(e, item.line, item.byte + len(item.raw[: e.pos].encode()))
        if e.pos >= len(item.raw):
            reason += "; the line ends within the record, JSON lines hold a whole one"
        item.fault = ("", reason)
    except RecursionError:
        item.fault = ("", _TOO_DEEP)
    return item


# --- a JSON array ---------------------------------------------------------------------------------


class _Window:
    """The part of a file's text that is looked at: text[at:] is still to be read, and grows by more()."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self.text, self.at = "", 0
        self._file, self._on_bytes = file, on_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._mark = (0, 1, file.tell())  # a place in text, its line and byte
        self.ended = False

    def more(self) -> bool:
        """Drop what is before `at`, read on; False at the end of the file."""
        if self.ended:
            return False
        self._mark = (0, *self.where(self.at))
        # Twice as much each time, so that a long record is not decoded anew for every chunk of it.
        data = self._file.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not data
        self.text = self.text[self.at :] + self._utf8.decode(data, final=self.ended)
        self.at = 0
        self._on_bytes(len(data))
        return not self.ended

    def where(self, at: int) -> tuple[int, int]:
        """Line and byte of text[at]; counting goes on from where it was asked for last."""
        seen, line, byte = self._mark
        passed = self.text[seen:at]
        line, byte = line + passed.count("\n"), byte + len(passed.encode("utf-8", "surrogateescape"))
        if at <= self.at:
            self._mark = (at, line, byte)
        return line, byte

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more() and self.at >= len(self.text):
                return ""


def _array(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[Item]:
    w, decoder, index = _Window(file, on_bytes), _Decoder(), 0
    keys: set[str] = set()  # first keys of the records so far: how the start of a record looks in this file
    w.peek()
    w.at += 1
    while True:
        fault, c = None, w.peek()
        if index and c == ",":
            w.at += 1
            if (c := w.peek()) == "]":
                fault = ("", "a comma before the closing bracket of the array")
        elif index and c not in ("", "]"):
            fault = ("", "a comma is missing before this record")
        if c == "":
            fault = ("", "the file ends without the closing bracket of the array (truncated?)")
        if c == "]":
            w.at += 1
            if w.peek():
                fault = ("", "text after the closing bracket of the array")
        if c in ("", "]"):
            if fault:
                rest = w.text[w.at : w.at + KEPT] if c else ""
                yield Item(index + 1, *w.where(w.at), None, rest, fault, fatal=bool(rest))
            return
        index += 1
        item, passed = _decode_element(w, decoder, index)
        item.fault = item.fault or fault
        if len(keys) < MAX_KEYS and (first := _FIRST_KEY.match(item.raw)):
            keys.add(first[1])
        if item.fault and item.fault[1] == _TOO_LONG:
            yield item
            _skip(w)
        elif not passed:
            end = _find_end(w, keys)
            if end is None:
                item.raw, item.fatal = w.text[w.at :], not w.ended or len(w.text) - w.at >= MAX_RECORD
                yield item
                return
            item.raw, w.at = w.text[w.at : end], end
            yield item
        else:
            yield item


def _decode_element(w: _Window, decoder: _Decoder, index: int) -> tuple[Item, bool]:
    """The record at w.at, and whether w is past it: not after a syntax error, too deep nesting, too great a length."""
    tried = 0
    while True:
        try:
            value, end = decoder.decode(w.text, w.at)
        except RecursionError:
            return Item(index, *w.where(w.at), None, "", ("", _TOO_DEEP)), False
        except json.JSONDecodeError as e:
            held = len(w.text) - w.at
            # An error at the very end, or a string without an end, may only mean that the rest is not read yet.
            unfinished = e.msg.startswith("Unterminated string") or e.pos >= len(w.text) - 12
            if unfinished and held >= MAX_RECORD:
                return Item(index, *w.where(w.at), None, w.text[w.at : w.at + KEPT], ("", _TOO_LONG)), False
            if unfinished and not w.ended:
                w.more()
                continue
            reason = _syntax(e, *w.where(e.pos))
            if e.pos >= len(w.text) or e.msg.startswith("Unterminated"):
                reason += "; the file ends within this record (truncated, or a quote is missing?)"
            return Item(index, *w.where(w.at), None, w.text[w.at : w.at + KEPT], ("", reason)), False
        if end == len(w.text) and not w.ended and tried != end - w.at:
            tried = end - w.at  # a number at the border may go on
            w.more()
            continue
        raw = w.text[w.at : end]
        item = Item(index, *w.where(w.at), value, raw, decoder.fault or _utf8_fault(raw))
        w.at = end
        return item, True


def _scan(text: str, at: int, depth: int, in_string: bool) -> tuple[int, int, bool]:
    """Follow brackets and strings from text[at] until depth is 0 or the text ends: the place, depth, in a string."""
    while True:
        found = (_STRING_END if in_string else _QUOTE_OR_BRACKET).search(text, at)
        if found is None:
            return len(text) - (in_string and text.endswith("\\") and at < len(text)), depth, in_string
        at, c = found.end(), found[0]
        if c == '"':
            in_string = not in_string
            if depth == 0 and not in_string:
                return at, 0, False
        elif not in_string:
            depth += 1 if c in "{[" else -1
            if depth <= 0:
                return at, 0, False


def _skip(w: _Window) -> None:
    """Move past the record at w.at by its brackets, however long it is, holding one chunk at a time."""
    depth, in_string = 0, False
    while True:
        w.at, depth, in_string = _scan(w.text, w.at, depth, in_string)
        if (depth == 0 and not in_string) or not w.more():
            return


def _find_end(w: _Window, keys: set[str]) -> int | None:
    """Where the broken record at w.at ends, as far as that can be told: the nearer of two signs.

    One is its own closing bracket, if quotes and brackets balance and a comma or bracket follows. The other is what
    looks like the start of another record of this file: comma, brace and one of the first keys seen. A quote inside
    a string is always escaped, so that cannot stand in a text. None if neither comes within MAX_RECORD or the file.
    """
    first_key = "|".join(map(re.escape, sorted(keys)))
    start = re.compile(r",\s*\{\s*(?:" + first_key + r")\s*:") if keys else None
    while True:
        ends: list[int] = []
        end, depth, in_string = _scan(w.text, w.at, 0, False)
        if depth == 0 and not in_string and end < len(w.text):
            follows = _SPACE.match(w.text, end).end()  # type: ignore[union-attr]
            if w.text[follows : follows + 1] in (",", "]"):
                ends.append(end)
        if start and (found := start.search(w.text, w.at)):
            ends.append(found.start())
        if ends:
            return min(ends)
        if len(w.text) - w.at >= MAX_RECORD or not w.more():
            return None
