"""data/feedback.py: nothing without consent, nothing lost, what is erased is gone; other files are refused."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.feedback import LONGEST, Feedback, Rater
from llama.chat import Dialogue, Message

ASKED = (Message("system", "You are a doctor."), Message("user", "Doctor, I cough."))


@pytest.fixture
def agreed(tmp_path: Path) -> Feedback:
    feedback = Feedback(tmp_path / "feedback.db")
    feedback.agree()
    return feedback


def test_nothing_is_kept_without_consent(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.db")
    with pytest.raises(ValueError, match="has not agreed"):
        feedback.add("m", ASKED, "Rest.", "good")
    assert feedback.ratings() == []
    assert not feedback.consent
    feedback.agree()
    feedback.agree()
    assert Feedback(tmp_path / "feedback.db").consent


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(), st.text(), st.text(), st.text())
def test_texts_come_back(agreed: Feedback, question: str, answer: str, reason: str, correction: str) -> None:
    number = agreed.add("m", [Message("user", question)], answer, "bad", reason, correction)
    rated = agreed.ratings()[-1]
    assert (rated.id, rated.model, rated.rating, rated.status) == (number, "m", "bad", "new")
    assert rated.messages == (Message("user", question),)
    assert (rated.answer, rated.reason, rated.correction) == (answer, reason.strip(), correction.strip())


def test_a_reviewer_decides(agreed: Feedback) -> None:
    first, second = (agreed.add("m", ASKED, f"Answer {i}.", "bad", "", "Better.") for i in range(2))
    agreed.decide(first, "approved", "Dr A", "Best.")
    agreed.decide(second, "rejected", "Dr A")
    assert agreed.ratings("new") == []
    (approved,), (rejected,) = agreed.ratings("approved"), agreed.ratings("rejected")
    assert (approved.correction, approved.reviewer, rejected.correction) == ("Best.", "Dr A", "Better.")
    with pytest.raises(ValueError, match="there is no rating 99"):
        agreed.decide(99, "approved", "Dr A")


def test_what_is_erased_is_not_in_the_file(agreed: Feedback) -> None:
    secret = "my unmistakable secret complaint"
    number = agreed.add("m", [Message("user", secret)], "Rest.", "good")
    assert secret.encode() in agreed.path.read_bytes()
    assert agreed.erase(number) == 1
    assert secret.encode() not in agreed.path.read_bytes()
    agreed.add("m", [Message("user", secret)], "Rest.", "good")
    assert agreed.withdraw() == 1
    assert secret.encode() not in agreed.path.read_bytes()
    assert not agreed.consent


def test_who_has_the_receipt_takes_a_rating_back(agreed: Feedback) -> None:
    for receipt in ("", "a", "b"):
        agreed.add("m", ASKED, f"Answer {receipt}.", "good", receipt=receipt)
    agreed.decide(3, "approved", "Dr A")
    assert [agreed.take_back(receipt) for receipt in ("", "c", "%", "a", "a", "b")] == [0, 0, 0, 1, 0, 1]
    assert [r.id for r in agreed.ratings()] == [1]
    assert agreed.consent


def test_files_of_version_1_are_read_and_kept(agreed: Feedback) -> None:
    agreed.add("m", ASKED, "Rest.", "good")
    with sqlite3.connect(agreed.path) as db:
        db.execute("ALTER TABLE ratings DROP COLUMN receipt")
        db.execute("PRAGMA user_version = 1")
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Feedback(agreed.path), range(4)))
    opened[0].add("m", ASKED, "Sleep.", "good", receipt="r")
    assert [r.answer for r in opened[1].ratings()] == ["Rest.", "Sleep."]
    assert opened[2].take_back("r") == 1


def test_only_its_owner_reads_it(agreed: Feedback) -> None:
    assert stat.S_IMODE(agreed.path.stat().st_mode) == 0o600


def test_threads_and_processes_write_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    with ThreadPoolExecutor(8) as pool:  # made eight times at once
        made = list(pool.map(lambda _: Feedback(path), range(8)))
    made[0].agree()
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda i: made[i % 8].add("m", ASKED, f"Answer {i}.", "good"), range(40)))
    assert sorted(numbers) == list(range(1, 41))
    assert len(made[3].ratings()) == 40


WRITER = """
import sys
from data.feedback import Feedback
from llama.chat import Message
feedback = Feedback(sys.argv[1])
feedback.agree()
while True:
    print(feedback.add("m", [Message("user", "I cough. " * 300)], "Rest.", "good"), flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_was_told_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(random.randrange(2, 9))]
        process.kill()
        rest = process.communicate()[0].splitlines()
        last = int((rest or lines)[-1])
        kept = Feedback(path).ratings()
        assert {r.id for r in kept} >= set(range(1, last + 1))
        assert all(r.messages[0].content == "I cough. " * 300 for r in kept)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no database at all" * 100, "not a database"), (b"SQLite format 3\0" + b"\1" * 500, "feedback.db: ")],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "feedback.db"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Feedback(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_other_databases_and_versions_are_refused(tmp_path: Path, agreed: Feedback) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(ValueError, match="not one of ratings"):
        Feedback(other)
    with sqlite3.connect(agreed.path) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(ValueError, match="of version 9; this program reads version 2"):
        Feedback(agreed.path)
    with pytest.raises(ValueError, match="no such file"):
        Feedback(tmp_path / "absent.db", create=False)
    with pytest.raises(ValueError, match="cannot be opened to write"):
        Feedback(tmp_path / "absent" / "feedback.db")
    os.mkdir(tmp_path / "folder")
    with pytest.raises(ValueError, match="cannot be opened to write"):
        Feedback(tmp_path / "folder")


def test_what_is_no_conversation_is_refused(agreed: Feedback) -> None:
    for messages in ((), (Message("user", "Hi."), Message("assistant", "Hello."))):
        with pytest.raises(ValueError, match="ends with the question"):
            agreed.add("m", messages, "Rest.", "good")
    with pytest.raises(ValueError, match="200,001 characters"):
        agreed.add("m", ASKED, "x" * (LONGEST + 1), "good")


# --- in the chat ----------------------------------------------------------------------------------


def rater(feedback: Feedback) -> Rater:
    rater = Rater(feedback, "tiny")
    assert rater.after(Dialogue(ASKED), "Rest.") is None
    return rater


def test_a_rating_asks_for_consent_first(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.db")
    chat = rater(feedback)
    said = chat.commands["/good"].run("")
    assert "Nothing was stored" in said
    assert "/consent yes" in said
    assert "are kept" in chat.commands["/consent"].run("yes")
    assert chat.commands["/good"].run("short") == "(kept as rating 1)"
    (rated,) = feedback.ratings()
    assert (rated.messages, rated.answer, rated.rating, rated.reason) == (ASKED, "Rest.", "good", "short")
    assert chat.commands["/consent"].run("no") == "(1 ratings erased; no more are kept)"
    assert feedback.ratings() == []
    assert chat.commands["/consent"].run("perhaps") == "/consent yes or /consent no"


def test_the_last_word_on_an_answer_counts(agreed: Feedback) -> None:
    chat = rater(agreed)
    chat.commands["/good"].run("")
    chat.commands["/bad"].run("too short")
    chat.commands["/correct"].run("Rest, and drink.")
    (rated,) = agreed.ratings()
    assert (rated.rating, rated.reason, rated.correction) == ("bad", "too short", "Rest, and drink.")
    chat.after(Dialogue(ASKED), "Sleep.")
    chat.commands["/good"].run("")
    assert [r.answer for r in agreed.ratings()] == ["Rest.", "Sleep."]


def test_without_an_answer_there_is_nothing_to_rate(agreed: Feedback) -> None:
    chat = Rater(agreed, "tiny")
    assert "no answer" in chat.commands["/good"].run("")
    chat.after(Dialogue(ASKED), " \n")
    assert "no answer" in chat.commands["/bad"].run("")
    assert "/correct what?" in chat.commands["/correct"].run("")
    assert agreed.ratings() == []


def test_what_goes_wrong_in_the_file_does_not_end_the_chat(agreed: Feedback) -> None:
    chat = rater(agreed)
    agreed.path.write_bytes(b"overwritten by something else entirely" * 50)
    for command, word in (("/good", ""), ("/correct", "x"), ("/consent", "no")):
        assert chat.commands[command].run(word).startswith("error: ")
