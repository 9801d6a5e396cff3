"""What requests cost, in tokens and money, and a budget that is not exceeded. Called by generate.py."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """Tokens that a provider counts: of prompts and of what was written."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __mul__(self, times: int) -> Tokens:
        return Tokens(self.prompt * times, self.completion * times)


@dataclass(frozen=True)
class Prices:
    """In any currency, for a million tokens."""

    per_million_in: float = 0.0
    per_million_out: float = 0.0

    def cost(self, tokens: Tokens) -> float:
        return (tokens.prompt * self.per_million_in + tokens.completion * self.per_million_out) / 1e6


class Budget:
    """Money spent and money set aside for requests on their way; their sum never passes the limit. Thread-safe.

    Every request sets aside the most that it can cost before it is sent, and settles for what it did cost.
    """

    def __init__(self, limit: float, spent: float = 0.0) -> None:
        self.limit, self.spent = limit, spent
        self._set_aside = 0.0
        self._lock = threading.Lock()

    def set_aside(self, cost: float) -> bool:
        """Whether there is room for a request of this cost at most; if so it is taken."""
        with self._lock:
            if self.spent + self._set_aside + cost > self.limit:
                return False
            self._set_aside += cost
            return True

    def settle(self, set_aside: float, cost: float) -> None:
        """A request for which so much was set aside has ended, and cost this."""
        with self._lock:
            self._set_aside -= set_aside
            self.spent += cost
