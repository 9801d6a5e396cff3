"""Screen: an answer that comes in pieces -> lines of a terminal, or the bare text where the output is none."""

from __future__ import annotations

import re
import shutil
from typing import TextIO

WIDEST = 100  # columns: longer lines are hard to read

_SPACE = re.compile(r"(\s)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Screen:
    """One answer. On a terminal words stay whole, and control characters, which could steer it, are made visible."""

    def __init__(self, out: TextIO, column: int = 0) -> None:
        """column: how much of the line is taken already."""
        self.out = out
        self.width = min(shutil.get_terminal_size().columns, WIDEST) if out.isatty() else None
        self.column = column
        self._held = ""  # the space before the word that is coming in, and its letters so far

    def write(self, piece: str) -> None:
        """Show what is certain; the last word waits for its end."""
        if self.width is None:
            self.out.write(piece)
        else:
            for part in _SPACE.split(piece):
                if part.isspace():
                    self._flush()
                    self._held = "\n" if part == "\n" else " "
                else:
                    self._held += _CONTROL.sub("\ufffd", part)
        self.out.flush()

    def _flush(self) -> None:
        assert self.width is not None
        word = self._held.lstrip()
        if self._held.startswith("\n") or self.column + len(self._held) > self.width:
            self.out.write("\n" + word)
            self.column = len(word)
        else:
            self.out.write(self._held)
            self.column += len(self._held)
        self._held = ""

    def end(self) -> None:
        """Show the last word and end the line."""
        if self._held.strip():
            self._flush()
        self.out.write("\n")
        self.out.flush()


def show(text: str, out: TextIO) -> None:
    """A text that is whole already."""
    screen = Screen(out)
    screen.write(text)
    screen.end()
