"""Rows before a question are those that fit; behind the answer stands what it rests on, and what it made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from data.diseases import PASSAGE, Database, Entry, open_database
from data.grounding import (
    NONE,
    ROWS,
    Grounding,
    Names,
    cite,
    cited_ids,
    facts,
    row_text,
    search,
    with_rows,
)
from llama.chat import ChatFormat, Dialogue, Message, render
from llama.tokenizer import Tokenizer

URINE = "I have a burning pain when I pass urine and go very often."
PASSAGES = [
    {"id": "m1", "focus": "Marfan syndrome", "answer": "A disorder of connective tissue.", "url": "https://x/marfan"}
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder = tmp_path_factory.mktemp("grounding")
    (folder / "passages.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PASSAGES))
    assert prepare.main(["diseases", "sample", str(folder / "passages.jsonl"), str(folder / "d.db")]) == 0
    return open_database(folder / "d.db")


@pytest.fixture(scope="module")
def names(database: Database) -> Names:
    return Names(database)


def grounding(database: Database, room: int = 10_000) -> Grounding:
    return Grounding(database, len, room)


def asked(*texts: str) -> Dialogue:
    """Questions, each but the last answered."""
    messages: list[Message] = []
    for text in texts:
        messages += [Message("user", text), Message("assistant", "Yes.")]
    return Dialogue(tuple(messages[:-1]))


def row(database: Database, name: str) -> Entry:
    return next(h.entry for h in database.search(name, 20) if h.entry.name == name)


# --- rows ---


def test_a_question_gets_rows_that_fit(database: Database) -> None:
    rows = search(database, URINE)
    assert rows[0].name == "urinary tract infection"
    assert len(rows) == ROWS


@pytest.mark.parametrize("text", ["What is the capital of France?", "Write a poem about the sea.", "", "xyzzy " * 50])
def test_what_is_not_in_the_database_gets_none(database: Database, text: str) -> None:
    assert search(database, text) == []


def test_a_disease_that_is_named_comes_first(database: Database) -> None:
    assert search(database, "How is gout treated?")[0].name == "gout"
    assert search(database, "I have burns on my hand")[0].name == "burn"
    assert search(database, URINE)[0].name != "burn"  # "burning"


def test_a_passage_is_found_by_the_name_of_what_it_is_about(database: Database) -> None:
    (passage,) = search(database, "What is Marfan syndrome and who gets it?")
    assert (passage.kind, passage.url) == (PASSAGE, "https://x/marfan")
    assert "connective tissue" in row_text(passage)
    assert cite(passage) in row_text(passage)


def test_a_row_holds_what_an_answer_copies(database: Database) -> None:
    entry = row(database, "gout")
    text = row_text(entry)
    for sentence in facts(entry):
        assert sentence in text
    assert f"gout [DB {entry.id}], {entry.urgency}." in text
    assert with_rows("Why?", [entry]) == f"{text}\nWhy?"
    assert with_rows("Why?", []) == f"{NONE}\nWhy?"


# --- citations and names ---


def test_citations_are_read_in_their_ways() -> None:
    assert cited_ids("A [DB 712]. B [DB 3, 4] [DB5] [DB 6, DB 7] [DB 3].") == [712, 3, 4, 5, 6, 7]
    assert cited_ids("DB 7, [7], [DB x], [DB -1] [DB]") == []
    assert cited_ids(f"[DB {'9' * 5000}]") == [int("9" * 18)]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300))
def test_any_answer_can_be_looked_through(database: Database, names: Names, answer: str) -> None:
    cited_ids(answer)
    names.unsourced(answer, [row(database, "gout")])


def test_names_are_whole_words_in_any_number_the_longest_counts(database: Database, names: Names) -> None:
    gout = row(database, "gout")
    other = row(database, "urinary tract infection")
    assert names.unsourced("Take nitrofurantoin and have urine cultures.", [gout]) == [
        "nitrofurantoin",
        "urine cultures",
    ]
    assert names.unsourced("Take nitrofurantoin and have urine cultures.", [other]) == []
    assert names.unsourced("Antinitrofurantoins do not exist.", [gout]) == []
    for entry in (gout, other):
        assert names.unsourced(" ".join(facts(entry)), [entry]) == []
        assert names.unsourced(" ".join(facts(entry)), []) != []


def test_a_sentence_does_not_run_into_the_next(names: Names) -> None:
    assert names.find("We look at the urine. Culture is something else.") == {}


# --- beside the model ---


def test_rows_come_before_each_question_and_what_was_read_stays(database: Database, small_tokenizer: Tokenizer) -> None:
    attendant = grounding(database)
    first, both = asked(URINE), asked(URINE, "And my nose runs, I sneeze and my eyes itch.")
    shown, longer = attendant.prepare(first), attendant.prepare(both)
    assert longer.messages[0] == shown.messages[0]
    assert shown.messages[0].content.endswith(URINE)
    assert "hay fever [DB" in longer.messages[2].content
    for chat_format in (ChatFormat("dialogue", ""), ChatFormat("alpaca")):
        system = chat_format.opening()
        prompt = render(Dialogue((*system, *shown.messages)), chat_format, small_tokenizer)[0]
        answered = Dialogue((*system, *shown.messages, Message("assistant", "Yes.")))
        trained, mask = render(answered, chat_format, small_tokenizer)
        assert trained[: len(prompt)] == prompt
        assert not any(mask[: len(prompt)])
        chat = render(Dialogue((*system, *longer.messages)), chat_format, small_tokenizer)[0]
        assert chat[: len(trained)] == trained


def test_a_question_without_symptoms_goes_on_from_the_one_before(database: Database) -> None:
    attendant = grounding(database)
    for text in ("Which tests do I need?", "What can I take for it?"):
        found = attendant.found([URINE, text])
        assert found.rows[0].name == "urinary tract infection"
        assert found.question == f"{URINE} {text}"
        assert attendant.found([text]).rows == ()
    found = attendant.found([URINE, "And my nose runs, I sneeze and my eyes itch."])
    assert found.rows[0].name == "hay fever"
    attendant.found(["Why?"] * 5000)  # no recursion


def test_rows_fit_the_room(database: Database) -> None:
    whole = grounding(database).found([URINE])
    for room in range(0, 1200, 100):
        found = grounding(database, room).found([URINE])
        assert found.rows == whole.rows[: len(found.rows)]
        assert not found.rows or len(found.turn()) <= room
    attendant = grounding(database, 10)
    assert attendant.prepare(asked(URINE)) == asked(URINE)
    assert "so long that no row" in (attendant.before(asked(URINE)) or "")


def test_no_entry_is_said_and_shown_to_the_model(database: Database) -> None:
    attendant, dialogue = grounding(database), asked("What is the capital of France?")
    assert "No entry" in (attendant.before(dialogue) or "")
    assert attendant.prepare(dialogue).messages[0].content == with_rows("What is the capital of France?", [])
    assert attendant.before(asked(URINE)) is None


def test_behind_an_answer_stand_the_cited_rows_and_what_has_no_source(database: Database) -> None:
    attendant = grounding(database)
    entry = attendant.found([URINE]).rows[0]
    answer = f"This fits {cite(entry)}, as [DB 99999] says. Tests: a urine culture. Treatment: colchicine."
    fields = attendant.fields(asked(URINE), answer)
    assert [r["id"] for r in fields["cited"]] == [entry.id]
    assert (fields["invented"], fields["unsourced"]) == ([99999], ["colchicine"])
    json.dumps(fields)
    after = attendant.after(asked(URINE), answer) or ""
    for part in (
        f"[DB {entry.id}] urinary tract infection (sample): ",
        "tests a urine dipstick",
        "[DB 99999]",
        "colchicine",
    ):
        assert part in after
    named = attendant.fields(asked(URINE), "This is a urinary tract infection: a urine culture, colchicine.")
    assert ([r["id"] for r in named["named"]], named["cited"]) == ([entry.id], [])
    assert named["unsourced"] == ["colchicine"]
    assert "rests on none" in (attendant.after(asked(URINE), "Rest.") or "")
    other = attendant.after(asked(URINE), f"This fits gout [DB {entry.id}]. Tests: a urine culture.") or ""
    assert "Unsourced: gout." in other
    url = attendant.after(asked("What is Marfan syndrome?"), f"See [DB {search(database, 'Marfan syndrome')[0].id}].")
    assert "https://x/marfan" in (url or "")


def test_a_megabyte_is_a_question_like_any_other(database: Database) -> None:
    attendant = grounding(database, 1000)
    dialogue = asked(f"{URINE} " + "word " * 200_000)
    assert attendant.found([dialogue.messages[0].content]).rows == ()
    attendant.before(dialogue)
    attendant.prepare(dialogue)


def test_a_database_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('disease,Symptom\nBroken,"[\'Joint"\n')
    assert prepare.main(["diseases", str(tmp_path / "t.csv"), str(tmp_path / "d.db")]) == 0
    with pytest.raises(ValueError, match=r"d\.db: holds no row to answer from"):
        grounding(open_database(tmp_path / "d.db"))


def test_rows_do_not_depend_on_ids(database: Database) -> None:
    entry = row(database, "gout")
    assert row_text(replace(entry, id=7)) == row_text(entry).replace(f"[DB {entry.id}]", "[DB 7]")
