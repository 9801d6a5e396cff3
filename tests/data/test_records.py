"""Shapes in the wild -> dialogues; every kind of bad record gets one line with file, number and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import stream
from data.records import MAX_TEXT, BadRecord, Record, RejectedFile, content_key, read_records
from llama.chat import DOCTOR_INSTRUCTION, Dialogue, Message


def write(tmp_path: Path, *values: Any, lines: bool = False) -> Path:
    path = tmp_path / "data.json"
    text = "\n".join(json.dumps(v) for v in values) if lines else json.dumps(values)
    path.write_text(text)
    return path


def talk(*turns: str) -> Dialogue:
    """A dialogue from "s:...", "u:...", "a:..." ."""
    roles: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant"}
    return Dialogue(tuple(Message(roles[t[0]], t[2:]) for t in turns))


S = "s:" + DOCTOR_INSTRUCTION
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"instruction": "i", "input": "q", "output": "a"}, talk("s:i", "u:q", "a:a")),
        ({"instruction": " i\n", "input": "q ", "output": " a\n"}, talk("s: i\n", "u:q ", "a: a\n")),
        ({"instruction": "i", "input": "", "output": "a"}, talk("u:i", "a:a")),
        ({"instruction": "i", "output": "a"}, talk("u:i", "a:a")),
        ({"instruction": "i", "input": None, "output": "a"}, talk("u:i", "a:a")),
        ({"instruction": "i", "input": " ", "output": "a"}, talk("s:i", "u: ", "a:a")),
        ({"input": "q", "answer_icliniq": "x", "answer_chatgpt": "y", "answer_chatdoctor": "z"}, talk(S, "u:q", "a:x")),
        ({"input": "q", "output": "a"}, talk(S, "u:q", "a:a")),
        ({"messages": MESSAGES}, talk(S, "u:q", "a:a")),
        ({"messages": [{"role": "system", "content": "s"}, *MESSAGES, *MESSAGES]}, talk("s:s", *["u:q", "a:a"] * 2)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, talk(S, "u:q", "a:a")),
        (
            {"id": 7, "conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"},
                                        {"from": "chatgpt", "value": "a"}, {"from": "human", "value": "q2"}]},
            talk("s:s", "u:q", "a:a", "u:q2"),
        ),
        ({"text": "t"}, talk("a:t")),
        ({"id": 1, "instruction": "i", "instances": [{"input": "", "output": "a"}]}, talk("u:i", "a:a")),
    ],
)  # fmt: skip
def test_shapes(tmp_path: Path, value: dict[str, Any], wanted: Dialogue, lines: bool) -> None:
    assert list(read_records(write(tmp_path, value, lines=lines))) == [Record(wanted, 1, content_key(wanted))]


def test_the_flags_for_answer_and_instruction(tmp_path: Path) -> None:
    value = {"input": "q", "answer_icliniq": "x", "answer_chatgpt": "y", "answer_mine": "z"}
    path = write(tmp_path, value)
    for answer, text in (("answer_icliniq", "x"), ("answer_chatgpt", "y"), ("answer_mine", "z")):
        (record,) = read_records(path, instruction="be brief", answer=answer)
        assert record.dialogue == talk("s:be brief", "u:q", f"a:{text}")
    (record,) = read_records(path, instruction="")
    assert record.dialogue == talk("u:q", "a:x")
    (record,) = read_records(write(tmp_path, {"input": "q", "output": "a"}), instruction="")
    assert record.dialogue == talk("u:q", "a:a")
    path = write(tmp_path, value)
    with pytest.raises(BadRecord, match="answer_chatdoctor: is missing"):
        list(read_records(path, answer="answer_chatdoctor"))


def test_every_instance_of_a_self_instruct_record(tmp_path: Path) -> None:
    value = {"instruction": "i", "instances": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}
    got = list(read_records(write(tmp_path, value)))
    assert [(r.index, r.dialogue) for r in got] == [(1, talk("s:i", "u:q", "a:a")), (1, talk("s:i", "u:r", "a:b"))]


def bad_turn(**kw: Any) -> dict[str, Any]:
    return {"messages": [MESSAGES[0], {**MESSAGES[1], **kw}]}


ALPACA = {"instruction": "i", "input": "q", "output": "a"}
BAD: list[tuple[Any, str, str]] = [
    ("text", "", "is a text; a record is an object"),
    (3, "", "is a number; a record is an object"),
    (None, "", "is null; a record is an object"),
    ([], "", "is a list; a record is an object"),
    ({}, "", "no known shape (fields: none); wanted"),
    ({"foo": 1, "bar": 2}, "", "no known shape (fields: 'foo', 'bar'); wanted"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "", "is a preference pair; --objective dpo learns from these"),
    ({**ALPACA, "output": ""}, "output", "is empty"),
    ({**ALPACA, "output": " \n"}, "output", "is blank"),
    ({**ALPACA, "output": 3.5}, "output", "is a number; text is wanted"),
    ({**ALPACA, "output": True}, "output", "is a truth value; text is wanted"),
    ({**ALPACA, "output": None}, "output", "is null; text is wanted"),
    ({**ALPACA, "input": ["q"]}, "input", "is a list; text is wanted"),
    ({**ALPACA, "instruction": {"a": 1}}, "instruction", "is an object; text is wanted"),
    ({**ALPACA, "instruction": ""}, "instruction", "is empty"),
    ({"instruction": "i", "input": "q"}, "output", "is missing"),
    ({"output": "a"}, "instruction", "is missing"),
    ({"input": "", "output": "a"}, "input", "is empty"),
    ({**ALPACA, "output": "x\ud800y"}, "output", "is not valid Unicode: lone surrogate \\ud800 at character 1"),
    ({**ALPACA, "output": "x" * (MAX_TEXT + 1)}, "", "has 1,990,003 characters of text; the limit is 1,990,000"),
    ({"input": "q", "answer_chatgpt": "y"}, "answer_icliniq", "is missing"),
    ({"input": "", "answer_icliniq": "y"}, "input", "is empty"),
    ({"text": ""}, "text", "is empty"),
    ({"messages": "hi"}, "messages", "is a text; a list is wanted"),
    ({"messages": []}, "messages", "is empty"),
    ({"messages": [1]}, "messages[0]", "is a number; an object is wanted"),
    ({"messages": MESSAGES[:1]}, "messages", "nobody answers in it"),
    ({"messages": MESSAGES[::-1]}, "messages", "turn 1 is from the assistant; user and assistant must alternate"),
    (bad_turn(role="tool"), "messages[1].role", "is 'tool'; known are"),
    (bad_turn(role=None), "messages[1].role", "is null; text is wanted"),
    (bad_turn(content=[{"type": "text"}]), "messages[1].content", "is a list; text is wanted"),
    (bad_turn(content=""), "messages[1].content", "is empty"),
    ({"messages": [*MESSAGES, {"role": "system", "content": "s"}]}, "messages", "turn 3 is from the system"),
    ({"conversations": [{"from": "human"}]}, "conversations[0].value", "is missing"),
    ({"instruction": "i", "instances": [{"input": ""}]}, "instances[0].output", "is missing"),
]


@pytest.mark.parametrize(("value", "field", "reason"), BAD, ids=[f"{f}-{r[:20]}" for _, f, r in BAD])
def test_bad_records_are_named(tmp_path: Path, value: Any, field: str, reason: str) -> None:
    path = write(tmp_path, ALPACA, value, ALPACA)
    with pytest.raises(BadRecord) as e:
        list(read_records(path))
    bad = e.value
    assert (bad.path, bad.index, bad.field) == (str(path), 2, field)
    assert bad.reason.startswith(reason)
    line = str(bad)
    assert line.startswith(f"{path}: record 2 (line 1, byte ")
    assert field in line
    assert "\n" not in line
    assert len(line) < 400 + len(str(path))

    told: list[tuple[int, bytes]] = []
    good = list(read_records(path, on_bad=lambda b, raw: told.append((b.index, raw))))
    assert [r.index for r in good] == [1, 3]
    assert [i for i, _ in told] == [2]
    assert json.loads(told[0][1]) == value


def test_a_broken_file_says_how_far_it_was_read_even_when_skipping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_RECORD", 500)
    monkeypatch.setattr(stream, "CHUNK", 64)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ALPACA] * 3)[:-1] + ', {"instruction": oops ' + "{" * 5000)
    told: list[BadRecord] = []
    with pytest.raises(BadRecord, match="no record is found after this, 3 usable ones were read before"):
        list(read_records(path, on_bad=lambda b, raw: told.append(b)))
    assert len(told) == 1


def test_rejected_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ALPACA).encode() + b'\n{"instruction": "\xff"}\n{"text": ""}\n')
    out = tmp_path / "out" / "rejected.jsonl"
    out.parent.mkdir()
    out.write_text("of an earlier run")
    with RejectedFile(out) as on_bad:
        assert not out.exists()
        assert len(list(read_records(path, on_bad=on_bad))) == 1
        assert on_bad.count == 2
    first, second = map(json.loads, out.read_text().splitlines())
    assert first == {
        "reason": "not valid UTF-8 (byte 0xff at 17 bytes into the record)",
        "file": str(path),
        "record": 2,
        "field": "",
        "raw": '{"instruction": "\\xff"}',
    }
    assert second["raw"] == '{"text": ""}'
    assert (second["record"], second["field"], second["reason"]) == (3, "text", "is empty")


def test_keys_depend_on_content_alone() -> None:
    assert content_key(talk("u:q", "a:b")) == 2786994796445070995
    keys = {content_key(d) for d in (talk("u:q", "a:b"), talk("u:qa", "a:b"), talk("s:q", "u:q", "a:b"), talk("a:qb"))}
    assert len(keys) == 4


def test_the_real_files(shared: Path) -> None:
    data = shared / "data"
    doctor = list(read_records(data / "chatdoctor/chatdoctor5k.json"))
    raw = json.loads((data / "chatdoctor/chatdoctor5k.json").read_text())
    assert [[m.content for m in r.dialogue.messages] for r in doctor] == [
        [r["instruction"], r["input"], r["output"]] for r in raw
    ]
    for name, n in (
        ("alpaca_gpt4_en_demo_1k.json", 999),
        ("seed_tasks.jsonl", 175),
        ("self_instruct_user_oriented_252.jsonl", 252),
    ):
        assert len(list(read_records(data / "general" / name))) == n


# --- preference pairs -----------------------------------------------------------------------------

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}
B = {"role": "assistant", "content": "bad"}
S = {"role": "system", "content": "sys"}


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ("s:be brief", "u:q")),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, ("s:be brief", "u:q")),
        ({"prompt": [S, U], "chosen": [A], "rejected": "bad"}, ("s:sys", "u:q")),
        ({"chosen": [S, U, A], "rejected": [S, U, B]}, ("s:sys", "u:q")),
        ({"chosen": [U, A], "rejected": [U, B]}, ("s:be brief", "u:q")),
        ({"messages": [U, A, U], "chosen": "good", "rejected": "bad"}, ("s:be brief", "u:q", "a:good", "u:q")),
        ({"instruction": "i", "input": "q", "chosen": "good", "rejected": "bad"}, ("s:i", "u:q")),
        ({"instruction": "i", "input": "", "chosen": "good", "rejected": "bad"}, ("u:i",)),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_pairs_in_trls_shapes(tmp_path: Path, value: dict[str, Any], prompt: tuple[str, ...]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(value) + "\n" + json.dumps({**value, "chosen": value["rejected"]}) + "\n")
    records = list(read_records(path, instruction="be brief", pairs=True))
    assert [r.dialogue for r in records[:2]] == [talk(*prompt, "a:good"), talk(*prompt, "a:bad")]
    assert [r.index for r in records] == [1, 1, 2, 2]
    assert len({r.key for r in records}) == 1, "one prompt falls on one side of the split, whatever its answers"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "q", "chosen": "good"}, "rejected: is missing; a preference pair has prompt, chosen and rejected"),
        ({"chosen": "good", "rejected": "bad"}, "prompt: is missing; so are messages and instruction"),
        ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "chosen: is a number; text is wanted"),
        ({"prompt": "q", "chosen": [U], "rejected": [B]}, "chosen: ends with the user"),
        ({"prompt": [U], "chosen": [U, A], "rejected": [B]}, "chosen: has 2 messages beside prompt"),
        ({"prompt": [A], "chosen": [A], "rejected": [B]}, "prompt: turn 1 is from the assistant"),
        ({"chosen": [U, A], "rejected": [S, U, B]}, "rejected: does not begin with the messages"),
        ({"prompt": "q", "chosen": " ", "rejected": "bad"}, "chosen: is blank"),
        (["q"], "is a list; a record is an object"),
    ],
    ids=str,
)
def test_bad_pairs_are_named(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n" + json.dumps(value) + "\n")
    if isinstance(value, list):
        path.write_text(json.dumps([value]))
    with pytest.raises(BadRecord) as e:
        list(read_records(path, pairs=True))
    assert message in str(e.value)
