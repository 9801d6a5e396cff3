"""Where the texts stand in a record of any shape that records.py reads, to change them in place. Called by clean.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.records import ANSWERS

# Fields that hold a text, and whether it is one that a model learns to say.
_TEXTS = {
    "instruction": False, "input": False, "output": True, **dict.fromkeys(ANSWERS, True), "text": False,
    "prompt": False, "chosen": True, "rejected": True,
}  # fmt: skip
# Fields that hold turns: whose key names the speaker, whose key is the text.
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ANSWERING = ("assistant", "gpt", "chatgpt")


@dataclass
class Field:
    """One text of a record: holder[key]. name is its place in the record, for people."""

    holder: dict[str, Any]
    key: str
    name: str
    answer: bool

    @property
    def text(self) -> str:
        return self.holder[self.key]

    @text.setter
    def text(self, text: str) -> None:
        self.holder[self.key] = text


class NoText(ValueError):
    """A record, or a field of it, that holds no text; str() says why."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(f"{field}: {reason}")


def fields_of(record: Any, more: Sequence[str] = ()) -> list[Field]:
    """The texts of a record that are not blank, in its own order. more: names of further fields that hold text.

    NoText if there is none, or if a field that should be text is not, or is not valid Unicode.
    """
    if not isinstance(record, dict):
        raise NoText("", "is not an object")
    found = list(_fields(record, dict.fromkeys(more, True), ""))
    if not found:
        names = ", ".join(repr(k)[:40] for k in list(record)[:6]) or "none"
        raise NoText("", f"holds no text to clean (fields: {names}); name the fields with --fields")
    for field in found:
        try:
            field.text.encode()
        except UnicodeEncodeError as e:
            code = f"\\u{ord(field.text[e.start]):04x}"
            raise NoText(field.name, f"is not valid Unicode: lone surrogate {code} at character {e.start}") from None
    return [field for field in found if field.text.strip()]


def _fields(record: dict[str, Any], more: dict[str, bool], at: str) -> Iterator[Field]:
    for key, value in record.items():
        name = at + key
        if key in _TURNS or (key in ("prompt", "chosen", "rejected") and isinstance(value, list)):
            yield from _turns(value, *_TURNS.get(key, ("role", "content")), name)
        elif key == "instances" and isinstance(value, list):
            for i, instance in enumerate(value):
                if isinstance(instance, dict):
                    yield from _fields(instance, more, f"{name}[{i}].")
        elif key in _TEXTS or key in more:
            if isinstance(value, str):
                yield Field(record, key, name, _TEXTS.get(key, False))
            elif value is not None:
                raise NoText(name, f"is {type(value).__name__}; text is wanted")


def _turns(turns: Any, who: str, what: str, name: str) -> Iterator[Field]:
    if not isinstance(turns, list):
        raise NoText(name, f"is {type(turns).__name__}; a list is wanted")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(what), str):
            raise NoText(f"{name}[{i}].{what}", "is no text")
        yield Field(turn, what, f"{name}[{i}].{what}", turn.get(who) in _ANSWERING)
