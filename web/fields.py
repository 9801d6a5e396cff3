"""What a field of a request may be: checked here, and described here in JSON Schema for /openapi.json.

requests.py builds its tables of these, so that check and description cannot differ. Knows JSON values, no meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from web.refusal import Refusal, wrong

SHOWN = 40  # characters of a wrong value that an error repeats
LONGEST_NUMBER = 400  # characters; the largest fp64 number has 309 digits


class Kind(Protocol):
    """One kind of value."""

    def check(self, value: Any, name: str) -> Any:
        """The value as it is meant. Refusal says what it must be."""
        ...

    def schema(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        ...


def parse(body: bytes) -> Any:
    """A JSON text, more strictly than Python reads it: UTF-8, no NaN, no key twice, no half of a surrogate pair."""
    try:
        value = json.loads(
            body.decode(),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_without_doubles,
        )
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as e:
        raise Refusal(400, f"the body is not valid UTF-8 at byte {e.start}") from None
    except UnicodeEncodeError:
        raise Refusal(400, "a text of the body holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except json.JSONDecodeError as e:
        raise Refusal(400, f"the body is not JSON: {e.msg} at character {e.pos}") from None
    except ValueError as e:
        raise Refusal(400, f"the body is not JSON: {str(e)[:100]}") from None
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number has over {LONGEST_NUMBER} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Number:
    """A number from low to high; above: low itself is not among them."""

    low: float
    high: float
    above: bool = False

    def check(self, value: Any, name: str) -> float:
        if not _number(value) or not self.low <= value <= self.high or (self.above and value == self.low):
            start = "above" if self.above else "from"
            raise wrong(name, f"{name} is {_shown(value)}; it must be a number {start} {self.low:g} to {self.high:g}")
        return float(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "exclusiveMinimum" if self.above else "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Whole:
    """A whole number from low to high."""

    low: int
    high: int

    def check(self, value: Any, name: str) -> int:
        if not _number(value) or value != int(value) or not self.low <= value <= self.high:
            wanted = f"a whole number from {self.low} to {self.high}"
            raise wrong(name, f"{name} is {_shown(value)}; it must be {wanted}")
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: Any, name: str) -> bool:
        if not isinstance(value, bool):
            raise wrong(name, f"{name} is {_shown(value)}; it must be true or false")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    """A text of so many characters."""

    longest: int
    shortest: int = 0

    def check(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong(name, f"{name} is {_shown(value)}; it must be a text")
        if len(value) > self.longest:
            message = f"{name} has {len(value):,} characters; {self.longest:,} are the most"
            raise wrong(name, message, "string_above_max_length")
        if len(value) < self.shortest:
            raise wrong(name, f"{name} is empty" if not value else f"{name} has too few characters")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": self.shortest, "maxLength": self.longest}


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def check(self, value: Any, name: str) -> Any:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values):
            names = ", ".join(json.dumps(v) for v in self.values)
            raise wrong(name, f"{name} is {_shown(value)}; this server knows {names}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.values)}


@dataclass(frozen=True)
class ListOf:
    """A list of one kind."""

    kind: Kind
    longest: int
    shortest: int = 0

    def check(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong(name, f"{name} is {_shown(value)}; it must be a list")
        if not self.shortest <= len(value) <= self.longest:
            raise wrong(name, f"{name} has {len(value):,} entries; {self.shortest} to {self.longest} may be")
        return [self.kind.check(v, f"{name}[{i}]") for i, v in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        return {
            "type": "array",
            "items": self.kind.schema(),
            "minItems": self.shortest,
            "maxItems": self.longest,
        }


@dataclass(frozen=True)
class OneOrMany:
    """A value of one kind, or a list."""

    one: Kind
    many: ListOf

    def check(self, value: Any, name: str) -> Any:
        return (self.many if isinstance(value, list) else self.one).check(value, name)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [self.one.schema(), self.many.schema()]}


@dataclass(frozen=True)
class FlagOr:
    """true, false, or a value of another kind."""

    other: Kind

    def check(self, value: Any, name: str) -> Any:
        return value if isinstance(value, bool) else self.other.check(value, name)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [Flag().schema(), self.other.schema()]}


@dataclass(frozen=True)
class Anything:
    """What is taken and makes no difference."""

    def check(self, value: Any, name: str) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Record:
    """An object. Fields that are not required may be missing or null, which is the same; others there are none."""

    fields: Mapping[str, Kind]
    required: tuple[str, ...] = ()

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(name, f"{name or 'the body'} is {_shown(value)}; it must be an object")
        for key in value:
            if key not in self.fields:
                raise wrong(_inside(name, key[:SHOWN]), f"there is no field {_shown(key)} here", "unknown_parameter")
        for key in self.required:
            if key not in value:
                place = _inside(name, key)
                raise wrong(place, f"{place} is missing", "missing_required_parameter")
        return {
            key: self.fields[key].check(v, _inside(name, key))
            for key, v in value.items()
            if v is not None or key in self.required
        }

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {k: v.schema() if k in self.required else nullable(v) for k, v in self.fields.items()},
            "required": list(self.required),
            "additionalProperties": False,
        }


def nullable(kind: Kind) -> dict[str, Any]:
    """The schema of a kind that may be null."""
    schema = kind.schema()
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
