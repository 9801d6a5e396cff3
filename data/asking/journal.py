"""Replies that were paid for, kept as they come: a JSON lines file that survives kill -9 at any moment.

Called by generate.py. The first line holds the settings that all replies share; then one line a reply, on the
disk before its thread asks again. A last line that a kill cut short is dropped. One process at a time, any threads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any, Self

from data.asking.client import Reply
from data.asking.spending import Tokens
from llama.files import fsync

VERSION = 1


class Journal:
    """replies: by key, of this run and those before it. spent: tokens of all of them, and of `lost` attempts."""

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        """Open or begin it. ValueError: written with other settings, damaged, in use, or not to be written."""
        self.path = Path(path)
        self.replies: dict[str, Reply] = {}
        self.spent, self.lost = Tokens(), 0
        self._lock = threading.Lock()
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as e:
            raise ValueError(f"{self.path}: cannot be written ({e.strerror})") from None
        try:
            self._begin(settings)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.path}: another process writes to it; wait for it or choose another OUT") from None
        self._file.seek(0)
        content = self._file.read()
        self._size = content.rfind(b"\n") + 1
        if self._size < len(content):
            self._file.truncate(self._size)
        lines = content[: self._size].splitlines()
        if not lines:
            self._append({"journal": VERSION, "settings": settings})
            fsync(self.path.absolute().parent)
            return
        other = self._other_settings(lines[0], settings)
        if other and len(lines) == 1:  # nothing was answered yet: a model's name was wrong, say
            self._size = 0
            self._file.truncate(0)
            self._append({"journal": VERSION, "settings": settings})
        elif other:
            raise ValueError(
                f"{self.path}: its replies were made with {other}; give the same settings or choose another OUT"
            )
        for number, line in enumerate(lines[1:], 2):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                what = f"{self.path} line {number}: damaged; delete the line to have it asked again"
                raise ValueError(what) from None

    def _other_settings(self, line: bytes, settings: dict[str, Any]) -> str:
        """Which settings the journal was begun with, where they are not these."""
        try:
            first = json.loads(line)
            version, before = first["journal"], dict(first["settings"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: is no journal of replies; move it or choose another OUT") from None
        if version != VERSION:
            raise ValueError(f"{self.path}: has version {version}, this program reads {VERSION}")
        names = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
        return "; ".join(f"{k} {before.get(k)!r}, not {settings.get(k)!r}" for k in names)

    def _take(self, line: dict[str, Any]) -> None:
        tokens = Tokens(int(line["prompt_tokens"]), int(line["completion_tokens"]))
        self.spent += tokens
        if "lost" in line:
            self.lost += 1
        else:
            text, finish_reason = line["text"], line["finish_reason"]
            if not isinstance(text, str) or not isinstance(finish_reason, str):
                raise TypeError
            self.replies.setdefault(str(line["key"]), Reply(text, finish_reason, tokens))

    def reply(self, key: str, reply: Reply, tokens: Tokens) -> None:
        """Keep a reply. tokens: as counted by the server, or the most that it can have been."""
        line = {"key": key, "text": reply.text, "finish_reason": reply.finish_reason}
        with self._lock:
            self._append({**line, "prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion})
            self.spent += tokens
            self.replies[key] = reply

    def attempt_lost(self, key: str, reason: str, tokens: Tokens) -> None:
        """Note an attempt that brought nothing and may have cost so many tokens at most."""
        line = {"key": key, "lost": reason}
        with self._lock:
            self._append({**line, "prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion})
            self.spent += tokens
            self.lost += 1

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
            os.fsync(self._file.fileno())
        except OSError as e:
            with contextlib.suppress(OSError):  # half a line would be dropped at the next start as well
                os.ftruncate(self._file.fileno(), self._size)
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(
                    f"{self.path}: the disk is full; the {len(self.replies):,} replies in it are safe, make room and "
                    "run the same command again"
                ) from None
            raise ValueError(f"{self.path}: cannot be written ({e.strerror})") from None
        self._size += len(data)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
