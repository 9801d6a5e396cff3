"""terminal/screen.py: words stay whole, nothing in an answer can steer the terminal, pipes get the bare text."""

from __future__ import annotations

import io
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.screen import Screen


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(pieces: list[str], width: int, column: int = 0) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((width, 24)))
        out = Tty()
        screen = Screen(out, column)
    for piece in pieces:
        screen.write(piece)
    screen.end()
    return out.getvalue()


def test_words_stay_whole_however_they_come() -> None:
    text = "You may have a headache; rest and drink water."
    want = "You may have a\nheadache; rest and\ndrink water.\n"
    assert shown([text], 18) == want
    assert shown(list(text), 18) == want
    assert shown(["You may have a hea", "dache; rest and", " drink water."], 18) == want


def test_the_label_counts_as_part_of_the_line() -> None:
    assert shown(["aaaa bbbb cccc"], 12, column=8) == "aaaa\nbbbb cccc\n"


def test_lines_and_paragraphs_of_the_answer_stay() -> None:
    assert shown(["one\n\ntwo", "\n- three"], 40) == "one\n\ntwo\n- three\n"


def test_a_word_wider_than_the_screen_is_shown() -> None:
    assert shown(["a", " ", "b" * 30, " c"], 10) == "a\n" + "b" * 30 + "\nc\n"


def test_control_characters_are_made_visible() -> None:
    got = shown(["\x1b[2Jgone\x07 \x9b1m \u202etxt\r\nend"], 80)
    assert "\x1b" not in got
    assert "\x07" not in got
    assert "\u202e" not in got
    assert "\r" not in got
    assert got.replace("\ufffd", "") == "[2Jgone 1m txt \nend\n"


@settings(max_examples=200)
@given(pieces=st.lists(st.text("ab \n", max_size=8), max_size=8), width=st.integers(1, 12))
def test_nothing_is_lost_but_space(pieces: list[str], width: int) -> None:
    got = shown(pieces, width)
    assert got.split() == "".join(pieces).split()
    assert all(len(line.rstrip()) <= width or " " not in line.strip() for line in got.split("\n"))


def test_a_pipe_gets_the_text_as_it_is() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.write("a" * 200 + " \x1b")
    screen.end()
    assert out.getvalue() == "a" * 200 + " \x1b\n"
