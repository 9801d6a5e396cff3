"""What a model was trained on, as its provenance.json or the user names it, and the texts in it.

evaluate.py looks for its items there and takes the nearest training answer as a floor. A file that is named and is not
there is said to be so: what cannot be read cannot be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import read_records
from data.synthesize import sample
from llama.chat import Dialogue
from llama.provenance import Stages, sha256_of

BUILT_IN = "built-in sample"  # as train.py names its own data


@dataclass(frozen=True)
class Source:
    """One of the things that a model was trained on. state: "read", or why it cannot be."""

    name: str
    sha256: str
    state: str

    @property
    def readable(self) -> bool:
        return self.state == "read"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "state": self.state}


def named_in(stages: Stages) -> list[Source] | None:
    """The sources that the stages of a model learnt from; None where they name none."""
    named = {d["name"]: d.get("sha256", "") for stage in stages for d in stage["data"]}
    return [_source(name, sha256, strict=False) for name, sha256 in named.items()] if named else None


def given(names: Sequence[str]) -> list[Source]:
    """The sources that a user names; ValueError for one that is not there."""
    return [_source(name, "", strict=True) for name in names]


def _source(name: str, sha256: str, strict: bool) -> Source:
    if name.startswith(BUILT_IN):
        return Source(BUILT_IN, sha256, "read")
    path = Path(name)
    if not path.is_file():
        if strict:
            raise ValueError(f"--train_files {name}: no such file")
        return Source(name, sha256, "not there any more")
    found = sha256_of(path)
    if sha256 and found != sha256:
        return Source(name, sha256, "changed since training")
    return Source(name, found, "read")


def dialogues(sources: Sequence[Source], on_bytes: Callable[[int], object] | None = None) -> Iterator[Dialogue]:
    """All dialogues of the readable ones; records that train.py could not use are passed over."""
    for source in sources:
        if source.name == BUILT_IN:
            yield from sample().train
        elif source.readable:
            for record in read_records(source.name, on_bad=lambda bad, raw: None, on_bytes=on_bytes):
                yield record.dialogue
