"""Dialogues on disk, in the shapes found in the wild -> Record; what is wrong is named by file, record and field.

Called by loader.py. Texts are kept as they are, not stripped: the ids must be those of Stanford Alpaca's training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from data.stream import Item, read_items
from data.text import Section, read_sections, sections
from llama.chat import DOCTOR_INSTRUCTION, Dialogue, Message, Role
from llama.tokenizer import MAX_CHARS

ANSWERS = ("answer_icliniq", "answer_chatgpt", "answer_chatdoctor")  # iCliniq's three; which one is a flag
MAX_TEXT = MAX_CHARS - 10_000  # of a dialogue: what the tokenizer takes, less room for the words of the prompt format
_SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}

OnBad = Callable[["BadRecord", bytes], None]


@dataclass(frozen=True)
class Record:
    """A dialogue and where it stood: index is its number in the file, from 1; key a 64-bit hash of its content.

    first, last: of a plain text, whether this is the section that begins it, and that ends it. Of a preference pair
    there are two records, chosen and rejected, of one index and one key, that of the prompt.
    """

    dialogue: Dialogue
    index: int
    key: int
    first: bool = True
    last: bool = True


class BadRecord(ValueError):
    """A record that cannot be used; str() is one line for the user."""

    def __init__(self, path: str | Path, index: int, field: str, reason: str, where: str = "") -> None:
        self.path, self.index, self.field, self.reason, self.where = str(path), index, field, reason, where
        at = f" ({where})" if where else ""
        name = f"{field}: " if field else ""
        super().__init__(f"{path}: record {index}{at}: {name}{reason}")


class RejectedFile:
    """Writes rejected records as JSON lines (reason, file, record, field, raw); an `on_bad` for read_records.

    The file of an earlier run is removed at once; a new one appears with the first rejected record. raw is the
    record's text; bytes that are not UTF-8 stand in it as \\xNN.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.count = Path(path), 0
        self._file: TextIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
        except OSError as e:
            raise ValueError(f"{self.path}: cannot write it ({e.strerror})") from None

    def __call__(self, bad: BadRecord, raw: bytes) -> None:
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        text = raw.decode("utf-8", "backslashreplace")
        line = {"reason": bad.reason, "file": bad.path, "record": bad.index, "field": bad.field, "raw": text}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read_records(
    path: str | Path,
    *,
    instruction: str = DOCTOR_INSTRUCTION,
    answer: str = ANSWERS[0],
    on_bad: OnBad | None = None,
    on_bytes: Callable[[int], None] | None = None,
    pairs: bool = False,
) -> Iterator[Record]:
    """The records of a JSON array or JSON lines file, or the sections of a .txt file, in order, in bounded memory.

    pairs: they are preference pairs; two records come of each, first the chosen answer's, then the rejected one's.
    instruction: system message of records that bring none (input/output, iCliniq, messages, ShareGPT); "" for none.
    answer: the field that is iCliniq's answer. on_bad is given each unusable record and its bytes, and reading goes
    on; without it the first one is raised. BadRecord is raised in any case where nothing after it can be read.
    """
    path = Path(path)
    good = 0
    plain = path.suffix.lower() == ".txt"
    if plain and pairs:
        raise ValueError(f"{path}: plain text holds no preference pairs; give JSON with prompt, chosen and rejected")
    for item in (read_sections if plain else read_items)(path, on_bytes):
        fault, records = item.fault, []
        if fault is None:
            try:
                records = _records(item, instruction, answer, pairs)
            except _Unusable as e:
                fault = (e.field, e.reason)
        if fault is not None:
            _refuse(path, item, fault, on_bad, good)
            continue
        good += 1
        yield from records


def _records(item: Item, instruction: str, answer: str, pairs: bool) -> list[Record]:
    if isinstance(item.value, Section):
        dialogue = _plain(item.value.text)
        return [Record(dialogue, item.index, content_key(dialogue), item.value.first, item.value.last)]
    if pairs:
        dialogues = _pair(item.value, instruction)
        keys = [content_key(Dialogue(dialogues[0].messages[:-1]))] * 2
    else:
        dialogues = _dialogues(item.value, instruction, answer)
        keys = [content_key(dialogue) for dialogue in dialogues]
    if len(dialogues) == 1 and is_plain(dialogues[0]):
        parts = sections(dialogues[0].messages[0].content)
        return [Record(_plain(s.text), item.index, keys[0], s.first, s.last) for s in parts]
    for dialogue in dialogues:
        _check_size(dialogue)
    return [Record(dialogue, item.index, key) for dialogue, key in zip(dialogues, keys, strict=True)]


def is_plain(dialogue: Dialogue) -> bool:
    """Whether it is plain text, to be learnt whole."""
    return len(dialogue.messages) == 1 and dialogue.messages[0].role == "assistant"


def _plain(text: str) -> Dialogue:
    return Dialogue((Message("assistant", text),))


def _refuse(path: Path, item: Item, fault: tuple[str, str], on_bad: OnBad | None, good: int) -> None:
    field, reason = fault
    if item.fatal:
        reason += f"; no record is found after this, {good:,} usable ones were read before"
    bad = BadRecord(path, item.index, field, reason, f"line {item.line:,}, byte {item.byte:,}")
    if on_bad is not None:
        on_bad(bad, item.raw.encode("utf-8", "surrogateescape"))
    if on_bad is None or item.fatal:
        raise bad


def content_key(dialogue: Dialogue) -> int:
    """A 64-bit hash of what is said and by whom; the same on every machine and in every run."""
    h = hashlib.blake2b(digest_size=8)
    for m in dialogue.messages:
        text = m.content.encode("utf-8", "surrogatepass")
        h.update(f"{m.role} {len(text)} ".encode() + text)
    return int.from_bytes(h.digest(), "little")


# --- shapes ---------------------------------------------------------------------------------------


class _Unusable(Exception):
    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason


def _dialogues(value: Any, instruction: str, answer: str) -> list[Dialogue]:
    """The dialogues of one record: one, or as many as a self-instruct record has instances."""
    if not isinstance(value, dict):
        raise _Unusable("", f"is {_kind(value)}; a record is an object")
    if "messages" in value:
        return [_turns(value, "messages", "role", "content", instruction)]
    if "conversations" in value:
        return [_turns(value, "conversations", "from", "value", instruction)]
    if "instruction" in value and "instances" in value:
        return _instances(value)
    if "input" in value and "output" not in value and any(a in value for a in {*ANSWERS, answer}):
        system = _text(value, "instruction") if "instruction" in value else instruction
        return [_exchange(system, _text(value, "input"), _text(value, answer))]
    if "chosen" in value and "rejected" in value and "output" not in value:
        raise _Unusable("", "is a preference pair; --objective dpo learns from these")
    if "instruction" in value or "output" in value:
        if "input" in value and "instruction" not in value:
            return [_exchange(instruction, _text(value, "input"), _text(value, "output"))]
        return [_alpaca(value)]
    if "text" in value:
        return [_plain(_text(value, "text"))]
    keys = ", ".join(repr(k)[:40] for k in list(value)[:6]) or "none"
    raise _Unusable(
        "", f"no known shape (fields: {keys}); wanted instruction/input/output, input/{answer}, messages, "
        "conversations or text"
    )  # fmt: skip


def _alpaca(value: dict[str, Any], at: str = "") -> Dialogue:
    """{instruction, input, output}; as in Alpaca an input that is "" or missing means the template without one."""
    instruction = _text(value, "instruction")
    question = _text(value, "input", may_lack=True)
    answer = _text(value, "output", at)
    return _exchange(instruction, question, answer) if question else _exchange("", instruction, answer)


def _instances(value: dict[str, Any]) -> list[Dialogue]:
    """Self-instruct's {instruction, instances: [{input, output}]}."""
    instances = _items(value, "instances")
    return [
        _alpaca({"instruction": value["instruction"], **instance}, f"instances[{i}].")
        for i, instance in enumerate(instances)
    ]


def _exchange(system: str, question: str, answer: str) -> Dialogue:
    head = (Message("system", system),) if system else ()
    return Dialogue((*head, Message("user", question), Message("assistant", answer)))


def _pair(value: Any, instruction: str) -> list[Dialogue]:
    """trl's preference shapes (prompt as text, as messages, or in both answers), and instruction/input as in Alpaca:
    the dialogue with the chosen answer and the one with the rejected.
    """
    if not isinstance(value, dict):
        raise _Unusable("", f"is {_kind(value)}; a record is an object")
    where = next((f for f in ("prompt", "messages", "instruction") if f in value), None)
    dialogues, before = [], None
    for field in ("chosen", "rejected"):
        if field not in value:
            raise _Unusable(field, "is missing; a preference pair has prompt, chosen and rejected")
        if isinstance(value[field], list):
            *head, answer = _messages(value, field, "role", "content", "")
        else:
            head, answer = [], Message("assistant", _text(value, field))
        if answer.role != "assistant":
            raise _Unusable(field, f"ends with the {answer.role}; an answer of the assistant is wanted")
        if where is not None and head:
            raise _Unusable(field, f"has {len(head) + 1} messages beside {where}; one answer is wanted")
        prompt = head if where is None else _prompt(value, where, instruction)
        if not prompt:
            raise _Unusable("prompt", "is missing; so are messages and instruction")
        if before is not None and prompt != before:
            raise _Unusable(field, "does not begin with the messages that chosen begins with")
        before = prompt
        opening = [Message("system", instruction)] if instruction and prompt[0].role != "system" else []
        try:
            bare = where == "instruction"  # as in Alpaca, whose template without an input has no system message
            dialogues.append(Dialogue((*(() if bare else opening), *prompt, answer)))
        except ValueError as e:
            raise _Unusable(where or field, str(e)) from None
    return dialogues


def _prompt(value: dict[str, Any], field: str, instruction: str) -> list[Message]:
    if field == "instruction":
        system, question = _text(value, "instruction"), _text(value, "input", may_lack=True)
        return [Message("system", system), Message("user", question)] if question else [Message("user", system)]
    if isinstance(value[field], str):
        return [Message("user", _text(value, field))]
    return _messages(value, field, "role", "content", instruction)


def _messages(value: dict[str, Any], field: str, who: str, what: str, instruction: str) -> list[Message]:
    messages: list[Message] = []
    for i, turn in enumerate(_items(value, field)):
        at = f"{field}[{i}]."
        name = _text(turn, who, at)
        role = _SPEAKERS.get(name)
        if role is None:
            raise _Unusable(at + who, f"is {name[:40]!r}; known are {', '.join(_SPEAKERS)}")
        messages.append(Message(role, _text(turn, what, at)))
    if messages[0].role != "system" and instruction:
        messages.insert(0, Message("system", instruction))
    return messages


def _turns(value: dict[str, Any], field: str, who: str, what: str, instruction: str) -> Dialogue:
    messages = _messages(value, field, who, what, instruction)
    if all(m.role != "assistant" for m in messages):
        raise _Unusable(field, "nobody answers in it: no turn of the assistant")
    try:
        return Dialogue(tuple(messages))
    except ValueError as e:
        raise _Unusable(field, str(e)) from None


def _check_size(dialogue: Dialogue) -> None:
    size = sum(len(m.content) for m in dialogue.messages)
    if size > MAX_TEXT:
        raise _Unusable("", f"has {size:,} characters of text; the limit is {MAX_TEXT:,}")


def _items(value: dict[str, Any], field: str) -> list[dict[str, Any]]:
    items = value[field]
    if not isinstance(items, list):
        raise _Unusable(field, f"is {_kind(items)}; a list is wanted")
    if not items:
        raise _Unusable(field, "is empty")
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise _Unusable(f"{field}[{i}]", f"is {_kind(item)}; an object is wanted")
    return items


def _text(value: dict[str, Any], field: str, at: str = "", may_lack: bool = False) -> str:
    """A field that must be text, valid and not blank; may_lack: missing, null and "" come out as ""."""
    text = value.get(field)
    if may_lack and (text is None or text == ""):
        return ""
    if field not in value:
        raise _Unusable(at + field, "is missing")
    if not isinstance(text, str):
        raise _Unusable(at + field, f"is {_kind(text)}; text is wanted")
    if not text.strip() and not may_lack:
        raise _Unusable(at + field, "is empty" if not text else "is blank")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as e:
            code = f"\\u{ord(text[e.start]):04x}"
            raise _Unusable(at + field, f"is not valid Unicode: lone surrogate {code} at character {e.start}") from None
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)
