"""THE prompt format: a dialogue -> token ids and loss mask, together.

Training, chat, evaluation and serving all call render(); the format is stored beside the weights as
`chat_format.json`, so a model is always spoken to as it was trained. Knows text and ids, never files or tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")

IGNORE = -100  # target of a token that carries no loss

DOCTOR_INSTRUCTION = "If you are a doctor, please answer the medical questions based on the patient's description."


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """A dialogue: at most one system message, first; then user and assistant in turn.

    The system message is the instruction of the Alpaca template; without one, the first user message is.
    A lone assistant message is plain text to be learnt whole. ValueError says what is out of order.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        roles = [m.role for m in self.messages]
        for role in roles:
            if role not in ROLES:
                raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns:
            raise ValueError("a dialogue needs at least one user or assistant message")
        if turns == ["assistant"] and len(roles) == 1:
            return
        for i, role in enumerate(turns):
            wanted = ("user", "assistant")[i % 2]
            if role != wanted:
                raise ValueError(f"turn {i + 1} is from the {role}; user and assistant must alternate, user first")


class Encoder(Protocol):
    """What render needs of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of the text; `continued` says that it goes on from text before it (no leading-space marker)."""
        ...


@dataclass(frozen=True)
class ChatFormat:
    """How turns become text. `instruction` is the system message that a chat or a bare record starts with.

    "alpaca" is Stanford Alpaca's template as ChatDoctor trains it (train.py, PROMPT_DICT); "dialogue" is a short
    Patient/Doctor form for small models; "plain" adds no words at all.
    """

    name: Literal["alpaca", "dialogue", "plain"] = "alpaca"
    instruction: str = DOCTOR_INSTRUCTION

    def to_json(self) -> dict[str, Any]:
        return {"version": 1, **asdict(self)}

    @staticmethod
    def from_json(d: Any) -> ChatFormat:
        """The format of a `chat_format.json`. ValueError names what it does not know."""
        if not isinstance(d, dict) or d.get("version") != 1:
            raise ValueError(f"chat_format.json: version {d.get('version') if isinstance(d, dict) else d!r} is not 1")
        if d.get("name") not in FORMATS or not isinstance(d.get("instruction"), str):
            raise ValueError(f"chat_format.json: name must be one of {', '.join(FORMATS)} and instruction a text")
        return ChatFormat(d["name"], d["instruction"])

    def opening(self) -> tuple[Message, ...]:
        """The messages that a new chat starts with."""
        return (Message("system", self.instruction),) if self.instruction else ()

    def segments(self, dialogue: Dialogue) -> list[tuple[str, bool]]:
        """The dialogue as (text, supervised) pieces; a supervised piece is an answer and is followed by EOS."""
        messages = dialogue.messages
        system = messages[0].content if messages[0].role == "system" else None
        turns = messages[1:] if system is not None else messages
        pieces: list[tuple[str, bool]] = []
        for i, m in enumerate(turns):
            if m.role == "assistant":
                pieces.append((m.content, True))
            else:
                pieces.append((_PROMPTS[self.name](system, m.content, i == 0), False))
        return pieces


def _alpaca(system: str | None, text: str, first: bool) -> str:
    if not first:
        head = "Input" if system is not None else "Instruction"
        return f"\n\n### {head}:\n{text}\n\n### Response:"
    if system is None:
        return (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{text}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{system}\n\n### Input:\n{text}\n\n### Response:"
    )


def _dialogue(system: str | None, text: str, first: bool) -> str:
    head = f"{system}\n" if first and system else ""
    return f"{head if first else chr(10)}Patient: {text}\nDoctor:"


def _plain(system: str | None, text: str, first: bool) -> str:
    return f"{system}\n{text}\n" if first and system else f"{text}\n" if first else f"\n{text}\n"


_PROMPTS = {"alpaca": _alpaca, "dialogue": _dialogue, "plain": _plain}
FORMATS: tuple[str, ...] = tuple(_PROMPTS)


def render(dialogue: Dialogue, chat_format: ChatFormat, tokenizer: Encoder) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue and, for each, whether it carries loss.

    BOS first; every answer ends in a supervised EOS. A dialogue that ends with the user's turn is a prompt: its ids
    end where the assistant begins. Pieces are encoded one by one and joined as ids: no token spans the border of
    prompt and answer, so the mask is exact and a chat's ids are a prefix of the training ids.
    """
    ids, mask = [tokenizer.bos_id], [False]
    for i, (text, supervised) in enumerate(chat_format.segments(dialogue)):
        piece = tokenizer.encode(text, continued=i > 0)
        if supervised:
            piece.append(tokenizer.eos_id)
        ids += piece
        mask += [supervised] * len(piece)
    return ids, mask


def render_text(text: str, tokenizer: Encoder, *, first: bool = True, last: bool = True) -> list[int]:
    """Token ids of plain text, or of a section of one: BOS, text, EOS if it is the last. All but BOS carry loss.

    A whole text (first and last) has the ids that render() gives a lone assistant message. Every section begins with
    BOS, as everything does that a model is asked.
    """
    return [tokenizer.bos_id, *tokenizer.encode(text, continued=not first), *([tokenizer.eos_id] if last else [])]


def fit(
    dialogue: Dialogue, chat_format: ChatFormat, tokenizer: Encoder, limit: int, kept: int | None = None
) -> tuple[list[int], int]:
    """Prompt ids of a dialogue that ends with the user's turn, and how many of its oldest turns were left out.

    A turn is a question with its answer. When the ids number more than `limit`, turns go, oldest first, until they
    number at most `kept` (None: limit) or only the last question is left; the system message stays.
    """
    messages = dialogue.messages
    system = messages[:1] if messages[0].role == "system" else ()
    turns = messages[len(system) :]

    def without(dropped: int) -> list[int]:
        return render(Dialogue((*system, *turns[2 * dropped :])), chat_format, tokenizer)[0]

    ids = without(0)
    if len(ids) <= limit or len(turns) == 1:
        return ids, 0
    most = limit if kept is None else kept
    # The fewest; halving, for a dialogue of a thousand turns would be encoded a thousand times.
    dropped = bisect_left(range(len(turns) // 2), True, lo=1, key=lambda n: len(without(n)) <= most)
    return without(dropped), dropped


def targets_of(ids: Sequence[int], mask: Sequence[bool]) -> list[int]:
    """Next-token targets: targets[t] = ids[t + 1] where that token carries loss, else IGNORE; same length as ids."""
    shifted = [token if keep else IGNORE for token, keep in zip(ids[1:], mask[1:], strict=True)]
    return [*shifted, IGNORE]
