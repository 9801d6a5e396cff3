"""Lines of the text files that people review and edit: tables, rules, word lists. A line that begins with # is a
comment.

What the lines mean is for those who read them: conditions.py, triage.py, patient.py, disease_search.py and others.
"""

from __future__ import annotations

from pathlib import Path


def numbered_lines(path: str | Path, what: str = "it") -> list[tuple[int, str]]:
    """(line number, line) without the comments. ValueError, naming `what` it is, if the file cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot read {what} ({getattr(e, 'strerror', None) or 'not UTF-8'})") from None
    return [(i, line) for i, line in enumerate(text.splitlines(), 1) if not line.startswith("#")]
