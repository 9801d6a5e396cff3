"""What an evaluation consists of: parts that are prepared from files first, and run over a model after that.

choice.py, recall.py, fit.py, replies.py and safety.py make parts; evaluate.py prepares all of them, so that a wrong
file shows before hours of work, asks once which items are contaminated, and runs those that have no result yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.evaluation.examinee import Examinee
from data.evaluation.figures import Figure, protocol_hash


@dataclass(frozen=True)
class Outcome:
    """What a part found: figures, one row per item for whoever wants to look, and remarks that belong on the card."""

    figures: Sequence[Figure]
    items: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()


Flags = Sequence[bool] | None  # one per item of the part; None: nothing says what the model was trained on


@dataclass(frozen=True)
class Exposure:
    """What of a part the training files hold: items that are contaminated, items whose subject is named there."""

    contaminated: Flags = None
    named: Flags = None

    def group(self, i: int) -> str:
        """Which group an item counts in, by whether its subject is named in the training files."""
        if self.named is None:
            return "all"
        return "named_in_training" if self.named[i] else "not_named_in_training"


@dataclass(frozen=True)
class Part:
    """One part. protocol: all that its figures depend on besides the model. texts: of each item, to look for it in the
    training files; names: of what it is about, where it matters whether these are named there at all.
    """

    name: str
    title: str
    protocol: Mapping[str, Any]
    texts: Sequence[tuple[str, ...]]
    work: Callable[[Examinee, Exposure, str], Outcome] = field(repr=False)
    names: Sequence[tuple[str, ...]] = ()

    @property
    def hash(self) -> str:
        return protocol_hash({"part": self.name, **self.protocol})

    def run(self, examinee: Examinee, exposure: Exposure) -> Outcome:
        assert exposure.contaminated is None or len(exposure.contaminated) == len(self.texts), self.name
        return self.work(examinee, exposure, self.hash)


def evenly(items: Sequence[Any], limit: int | None) -> list[Any]:
    """So many items, taken evenly over all: files may be sorted."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
