"""Replies that were paid for are still there after a kill at any byte, a full disk, and with two who want to write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.asking.client import Reply
from data.asking.journal import Journal
from data.asking.spending import Tokens

SETTINGS = {"model": "m", "seed": 0}


def filled(path: Path, replies: int = 3) -> bytes:
    with Journal(path, SETTINGS) as journal:
        for i in range(replies):
            journal.reply(f"k{i}", Reply(f"text {i} \ud800\n", "stop", None), Tokens(10, i))
    return path.read_bytes()


def test_what_was_kept_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    filled(path)
    with Journal(path, SETTINGS) as journal:
        journal.attempt_lost("k9", "cut", Tokens(100, 100))
    with Journal(path, SETTINGS) as journal:
        assert list(journal.replies) == ["k0", "k1", "k2"]
        assert journal.replies["k1"] == Reply("text 1 \ud800\n", "stop", Tokens(10, 1))
        assert (journal.spent, journal.lost) == (Tokens(130, 103), 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_cut_at_any_byte_it_loses_the_torn_line_alone(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    whole = filled(path)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    left = max(0, whole[:cut].count(b"\n") - 1)
    with Journal(path, SETTINGS) as journal:
        assert len(journal.replies) == left
        for i in range(left, 3):
            journal.reply(f"k{i}", Reply(f"text {i} \ud800\n", "stop", None), Tokens(10, i))
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    before = filled(tmp_path / "j")
    with pytest.raises(ValueError, match="model 'm', not 'other'"):
        Journal(tmp_path / "j", {**SETTINGS, "model": "other"})
    with pytest.raises(ValueError, match=r"seed 0, not None|seed 0"):
        Journal(tmp_path / "j", {"model": "m"})
    assert (tmp_path / "j").read_bytes() == before


def test_settings_of_a_journal_without_replies_are_replaced(tmp_path: Path) -> None:
    filled(tmp_path / "j", 0)
    Journal(tmp_path / "j", {**SETTINGS, "model": "other"}).close()
    Journal(tmp_path / "j", {**SETTINGS, "model": "other"}).close()


@pytest.mark.parametrize(
    "content", [b"hello\n", b"[]\n", b'{"a": 1}\n', b"\xff\n", b'{"journal": 2, "settings": {}}\n']
)
def test_other_files_are_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(ValueError, match="j: "):
        Journal(tmp_path / "j", SETTINGS)
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.parametrize(
    "line", [b"{}", b"nonsense", b"[1]", b'{"key": "a", "text": 3, "finish_reason": "", "prompt_tokens": 1, '
             b'"completion_tokens": 1}']
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    lines = filled(tmp_path / "j").splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 3: damaged"):
        Journal(tmp_path / "j", SETTINGS)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", SETTINGS), pytest.raises(ValueError, match="another process"):
        Journal(tmp_path / "j", SETTINGS)
    Journal(tmp_path / "j", SETTINGS).close()


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    before = filled(path)
    with Journal(path, SETTINGS) as journal:

        class Full:
            """Half of what is written fits."""

            def __init__(self, file: Any) -> None:
                self.file, self.room = file, True

            def write(self, data: bytes) -> int:
                if not self.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.room = False
                return int(self.file.write(data[: len(data) // 2]))

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        monkeypatch.setattr(journal, "_file", Full(journal._file))
        with pytest.raises(ValueError, match=r"full; the 3 replies in it are safe"):
            journal.reply("k3", Reply("text", "stop", None), Tokens(1, 1))
        assert "k3" not in journal.replies
    assert path.read_bytes() == before
    assert json.loads(before.splitlines()[0])["settings"] == SETTINGS


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "j", SETTINGS)
