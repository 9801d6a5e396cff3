"""llama/chat.py: the texts written out, the mask, and Stanford Alpaca's own preprocessing as the judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.chat import (
    DOCTOR_INSTRUCTION,
    FORMATS,
    IGNORE,
    ChatFormat,
    Dialogue,
    Message,
    fit,
    render,
    targets_of,
)
from llama.tokenizer import Tokenizer

USER, DOCTOR = Message("user", "I cough."), Message("assistant", "Rest.")
SYSTEM = Message("system", "Be kind.")

# ChatDoctor's and Stanford Alpaca's train.py, PROMPT_DICT.
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def text_of(*messages: Message, name: Any = "alpaca") -> str:
    return "".join(text for text, _ in ChatFormat(name).segments(Dialogue(messages)))


def test_alpaca_with_input() -> None:
    assert text_of(SYSTEM, USER, DOCTOR) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nBe kind.\n\n### Input:\nI cough.\n\n"
        "### Response:Rest."
    )


def test_alpaca_without_input() -> None:
    assert text_of(USER, DOCTOR) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nI cough.\n\n### Response:Rest."
    )


def test_alpaca_later_turns() -> None:
    later = (Message("user", "How long?"), Message("assistant", "A week."))
    assert text_of(SYSTEM, USER, DOCTOR, *later).endswith(
        "\n\n### Response:Rest.\n\n### Input:\nHow long?\n\n### Response:A week."
    )
    assert text_of(USER, DOCTOR, *later).endswith("Rest.\n\n### Instruction:\nHow long?\n\n### Response:A week.")


def test_dialogue_and_plain() -> None:
    turns = (USER, DOCTOR, USER)
    assert text_of(*turns, name="dialogue") == "Patient: I cough.\nDoctor:Rest.\nPatient: I cough.\nDoctor:"
    assert text_of(SYSTEM, USER, name="dialogue") == "Be kind.\nPatient: I cough.\nDoctor:"
    assert text_of(*turns, name="plain") == "I cough.\nRest.\nI cough.\n"
    assert text_of(SYSTEM, USER, name="plain") == "Be kind.\nI cough.\n"


@pytest.mark.parametrize("name", FORMATS)
def test_text_to_be_learnt_whole_has_no_words_around_it(name: Any) -> None:
    assert ChatFormat(name).segments(Dialogue((DOCTOR,))) == [("Rest.", True)]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ((), "at least one"),
        ((SYSTEM,), "at least one"),
        ((USER, USER), "turn 2 is from the user"),
        ((DOCTOR, USER), "turn 1 is from the assistant"),
        ((USER, SYSTEM), "turn 2 is from the system"),
        ((SYSTEM, DOCTOR), "turn 1 is from the assistant"),
        ((Message("patient", "x"),), "role 'patient' is not one of"),  # type: ignore[arg-type]
    ],
)
def test_dialogues_out_of_order(messages: tuple[Message, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Dialogue(messages)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(TEXT, min_size=1, max_size=5), system=st.none() | TEXT, name=st.sampled_from(FORMATS))
def test_the_mask_covers_answers_and_their_eos_exactly(
    contents: list[str], system: str | None, name: Any, small_tokenizer: Tokenizer
) -> None:
    tokenizer = small_tokenizer
    turns = [Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]  # type: ignore[arg-type]
    head = [] if system is None else [Message("system", system)]
    ids, mask = render(Dialogue((*head, *turns)), ChatFormat(name), tokenizer)
    assert len(ids) == len(mask)
    assert (ids[0], mask[0], ids.count(tokenizer.bos_id)) == (tokenizer.bos_id, False, 1)
    answers = contents[1::2]
    assert ids.count(tokenizer.eos_id) == len(answers)
    supervised = [i for i, m in zip(ids, mask, strict=True) if m]
    want = [[*tokenizer.encode(a, continued=True), tokenizer.eos_id] for a in answers]
    assert supervised == [i for answer in want for i in answer]
    targets = targets_of(ids, mask)
    assert len(targets) == len(ids)
    assert targets[-1] == IGNORE
    assert [t for t in targets if t != IGNORE] == supervised
    assert all(t in (IGNORE, n) for t, n in zip(targets, [*ids[1:], IGNORE], strict=True))


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(TEXT, min_size=3, max_size=6), name=st.sampled_from(FORMATS))
def test_a_prompt_is_a_prefix_of_the_training_ids(contents: list[str], name: Any, small_tokenizer: Tokenizer) -> None:
    """So that a chat speaks to the model as it was trained, and its cache serves the next turn."""
    turns = [Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]  # type: ignore[arg-type]
    whole, _ = render(Dialogue(tuple(turns)), ChatFormat(name), small_tokenizer)
    for n in range(1, len(turns)):
        part, _ = render(Dialogue(tuple(turns[:n])), ChatFormat(name), small_tokenizer)
        assert whole[: len(part)] == part


def test_fit_drops_the_oldest_turns_and_keeps_the_system_message(small_tokenizer: Tokenizer) -> None:
    fmt = ChatFormat("dialogue")
    pairs = [(Message("user", f"pain {i}"), Message("assistant", f"rest {i}")) for i in range(5)]
    last = Message("user", "cough")
    dialogue = Dialogue((SYSTEM, *(m for pair in pairs for m in pair), last))
    whole, _ = render(dialogue, fmt, small_tokenizer)
    assert fit(dialogue, fmt, small_tokenizer, len(whole)) == (whole, 0)
    ids, dropped = fit(dialogue, fmt, small_tokenizer, len(whole) - 1)
    assert dropped == 1
    assert ids == render(Dialogue((SYSTEM, *(m for p in pairs[1:] for m in p), last)), fmt, small_tokenizer)[0]
    assert fit(dialogue, fmt, small_tokenizer, len(whole), 0) == (whole, 0)  # kept counts only when turns must go
    shorter = [
        render(Dialogue((SYSTEM, *(m for p in pairs[n:] for m in p), last)), fmt, small_tokenizer)[0] for n in range(6)
    ]
    for most in range(len(whole)):  # the fewest turns that will do
        dropped = next((n for n in range(1, 5) if len(shorter[n]) <= most), 5)
        assert fit(dialogue, fmt, small_tokenizer, len(whole) - 1, most) == (shorter[dropped], dropped)
    ids, dropped = fit(dialogue, fmt, small_tokenizer, 0)  # the last question is never dropped
    assert (ids, dropped) == (render(Dialogue((SYSTEM, last)), fmt, small_tokenizer)[0], 5)


def test_opening_is_the_instruction() -> None:
    assert ChatFormat().opening() == (Message("system", DOCTOR_INSTRUCTION),)
    assert ChatFormat("plain", "").opening() == ()


@pytest.mark.parametrize("name", FORMATS)
def test_json_round_trip(name: Any) -> None:
    fmt = ChatFormat(name, "Ünlike «others»\n")
    assert ChatFormat.from_json(json.loads(json.dumps(fmt.to_json()))) == fmt


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "alpaca",
        {},
        {"version": 2, "name": "alpaca", "instruction": ""},
        {"version": 1, "name": "llama3", "instruction": ""},
        {"version": 1, "name": "alpaca"},
        {"version": 1, "name": "alpaca", "instruction": 3},
        {"version": 1, "name": ["alpaca"], "instruction": ""},
    ],
)
def test_json_of_something_else(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"chat_format\.json"):
        ChatFormat.from_json(bad)
