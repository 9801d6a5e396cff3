"""Grammar corrections from a LanguageTool server that the user runs. Called by clean.py when a server is named.

Only what is certain enough to apply unseen: one suggestion, in grammar, punctuation, capitals or typography. Spelling
is
left alone, since LanguageTool's dictionaries know few drugs and would "correct" them; so are words in capitals or with
digits, and whatever touches a placeholder.
"""

from __future__ import annotations

import re
from typing import Any

from data.cleaning.rewrite import CONTEXT, PLACEHOLDER, Change

_CATEGORIES = {"GRAMMAR", "PUNCTUATION", "CASING", "TYPOGRAPHY", "CONFUSED_WORDS", "REDUNDANCY", "REPETITIONS_STYLE"}
_CLINICAL = re.compile(r"\d|[A-Z]{2,}")


class LanguageTool:
    """A connection to one server."""

    def __init__(self, url: str, language: str = "en-US") -> None:
        """ValueError with the remedy when the package is not installed or the server does not answer."""
        try:
            import language_tool_python
        except ImportError:
            raise ValueError(
                "--languagetool needs the package language_tool_python: pip install language_tool_python"
            ) from None
        self.url = url
        try:
            self._tool: Any = language_tool_python.LanguageTool(language, remote_server=url)
        except Exception as e:  # the package raises its own, requests' and urllib3's
            raise ValueError(f"--languagetool {url}: no LanguageTool server answers there ({_short(e)})") from None

    def correct(self, text: str, changes: list[Change]) -> str:
        """The text with the server's certain corrections; they are appended to changes. ValueError if it fails."""
        try:
            matches = self._tool.check(text)
        except Exception as e:
            raise ValueError(f"--languagetool {self.url}: the server failed on a text ({_short(e)})") from None
        held = [m.span() for m in PLACEHOLDER.finditer(text)]
        for match in sorted(matches, key=lambda m: m.offset, reverse=True):
            start, end = match.offset, match.offset + match.error_length
            before = text[start:end]
            if (
                match.category not in _CATEGORIES
                or len(match.replacements) != 1
                or _CLINICAL.search(before)
                or any(a < end and start < b for a, b in held)
            ):
                continue
            after = match.replacements[0]
            changes.append(
                Change("languagetool", before, after, text[max(0, start - CONTEXT) : start], text[end : end + CONTEXT])
            )
            text = text[:start] + after + text[end:]
        return text

    def close(self) -> None:
        self._tool.close()


def _short(e: Exception) -> str:
    return str(e).splitlines()[0][:120] if str(e) else type(e).__name__
