"""Attendant: who stands beside the model, speaks before an answer, adds to the prompt, and looks at the answer.

Triage, the patient card and grounded answers are attendants (data/). Whoever answers asks them through
llama.generation.Doctor and knows none of them by name. Knows dialogues, never models or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama.chat import Dialogue


@dataclass(frozen=True)
class Command:
    """A command of the chat. run takes what was typed behind its name and returns what to say to it."""

    help: str  # the lines for /help
    run: Callable[[str], str]


class Attendant:
    """Does nothing; who attends overrides what it needs. Every dialogue ends with the question to be answered."""

    commands: Mapping[str, Command] = {}  # by name, with the slash; they are kept out of the history of lines

    def before(self, dialogue: Dialogue) -> str | None:
        """A notice to be seen before anything is generated."""
        return None

    def prepare(self, dialogue: Dialogue) -> Dialogue:
        """What the model is shown instead: the same turns, each changed by nothing that comes after it.

        Then what it has read of a conversation stays read, and the oldest turns can go when the context is full. What
        must survive that belongs into the system message.
        """
        return dialogue

    def after(self, dialogue: Dialogue, answer: str) -> str | None:
        """A notice on the answer, which may have been broken off; `dialogue` is as asked, not as prepared."""
        return None

    def fields(self, dialogue: Dialogue, answer: str) -> Mapping[str, Any]:
        """The same for programs, as JSON: what an answer that is written as an object holds beside its text."""
        return {}
