"""data/review.py: what a reviewer decides is kept at once; only that is exported, scrubbed, in shapes that train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data import prepare
from data.feedback import Feedback
from data.records import read_records
from data.review import export, pairs_file, review, show
from llama.chat import Message

ASKED = (Message("user", "Doctor Brown, I cough."),)

REMAINS = "what was exported before still holds them"


@pytest.fixture
def feedback(tmp_path: Path) -> Feedback:
    made = Feedback(tmp_path / "feedback.db")
    made.agree()
    made.add("m", ASKED, "Rest.", "good")
    made.add("m", ASKED, "Run.", "bad", "wrong", "Rest, Brown.")
    made.add("m", ASKED, "Jump.", "bad")
    return made


def typed(*lines: str) -> Callable[[str], str]:
    waiting = list(lines)

    def ask(_: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return ask


def scrub(text: str) -> str:
    return text.replace("Brown", "[NAME]")


def test_every_rating_is_decided(feedback: Feedback) -> None:
    told: list[str] = []
    assert review(feedback, "Dr A", typed("a", "what", "A", "a", "e", "", "e", "Lie down."), told.append) == 3
    assert [r.status for r in feedback.ratings()] == ["approved"] * 3
    assert [r.correction for r in feedback.ratings()] == ["", "Rest, Brown.", "Lie down."]
    text = "\n".join(told)
    assert "teaches nothing" in text
    assert "nothing was changed" in text
    assert "(2 of 3: a approve" in text


def test_breaking_off_keeps_what_was_decided(feedback: Feedback) -> None:
    assert review(feedback, "Dr A", typed("a", "s"), lambda _: None) == 1
    assert review(feedback, "Dr A", typed("r", "q"), lambda _: None) == 1
    assert review(feedback, "Dr A", typed("d"), lambda _: None) == 1
    assert [(r.answer, r.status) for r in feedback.ratings()] == [("Rest.", "approved"), ("Run.", "rejected")]


def test_a_rating_is_shown_whole(feedback: Feedback) -> None:
    text = show(feedback.ratings()[1])
    for part in (
        "rating 2",
        "user: Doctor Brown, I cough.",
        "answer: Run.",
        "reason: wrong",
        "correction: Rest, Brown.",
    ):
        assert part in text
    assert "reason" not in show(feedback.ratings()[0])


def test_only_what_was_approved_is_exported(feedback: Feedback, tmp_path: Path) -> None:
    feedback.decide(1, "approved", "Dr A")
    feedback.decide(2, "approved", "Dr A")
    again = feedback.add("other", ASKED, "Rest.", "good")
    feedback.decide(again, "approved", "Dr A")
    found = export(feedback.ratings(), scrub)
    assert found.left_out == {"not reviewed": 1, "rejected": 0, "twice": 1}
    assert "Brown" not in "".join([*found.records, *found.pairs])
    out = tmp_path / "learn.jsonl"
    out.write_text("".join(found.records))
    pairs_file(out).write_text("".join(found.pairs))
    learnt = [r.dialogue.messages for r in read_records(out, instruction="")]
    assert [[m.content for m in messages] for messages in learnt] == [
        ["Doctor [NAME], I cough.", "Rest."],
        ["Doctor [NAME], I cough.", "Rest, [NAME]."],
    ]
    pair = read_records(pairs_file(out), pairs=True, instruction="")
    assert tuple(r.dialogue.messages[-1].content for r in pair) == ("Rest, [NAME].", "Run.")
    assert json.loads(found.pairs[0])["source"] == {"rating": 2, "model": "m", "reviewer": "Dr A"}


def test_an_administrator_erases_by_number(
    feedback: Feedback, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> tuple[int, str]:
        try:
            status = prepare.main(["feedback", *argv])
        except SystemExit as e:
            status = int(e.code or 0)
        said = capsys.readouterr()
        return status, said.out + said.err

    source = str(feedback.path)
    for argv in (["x"], ["all", "1"], ["-1"], ["1", "٣"], ["9" * 30], []):
        status, said = run(source, "--erase", *argv)
        assert (status, said.count("\n")) == (2, 1), said
    assert "give either" in run(source)[1]
    assert "give either" in run(source, str(tmp_path / "out.jsonl"), "--erase", "1")[1]
    assert "no such file" in run(str(tmp_path / "absent.db"), "--erase", "1")[1]
    status, said = run(source, "--erase", "1", "99")
    assert (status, "there is no rating 99; nothing was erased" in said) == (2, True)
    assert len(feedback.ratings()) == 3
    assert run(source, "--erase", "1", "3", "1") == (0, f"{source}: ratings erased: 2; {REMAINS}\n")
    assert [r.id for r in feedback.ratings()] == [2]
    assert feedback.consent
    assert run(source, "--erase", "all") == (0, f"{source}: ratings erased: 1; {REMAINS}\n")
    assert feedback.ratings() == []
    assert not feedback.consent
