"""What the scripts' command lines share: flag spelling, how a wrong one ends, and where the latest model is noted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

LATEST = Path("out/latest")  # train.py writes the path of the model it finished last into this file


def latest() -> Path:
    """The model that train.py finished last. ValueError, with the remedy, if there is none."""
    remedy = "train one with `python train.py` or `make demo`, or name one with --checkpoint DIR"
    try:
        path = Path(LATEST.read_text().strip())
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"no model yet ({LATEST} is not there): {remedy}") from None
    if not path.is_dir():
        raise ValueError(f"{LATEST} names {path}, which is not there any more: {remedy}")
    return path


def checkpoint_at(given: str | None) -> Path:
    """The model that --checkpoint names, or without it the latest. ValueError if it is not there."""
    if given is None:
        return latest()
    if not Path(given).exists():
        raise ValueError(f"--checkpoint {given}: no such directory or file")
    return Path(given)


class Parser(argparse.ArgumentParser):
    """Takes dashes for underscores in flag names, no abbreviations; a wrong flag ends with one line and status 2."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_args([_underscored(a) for a in args], namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
