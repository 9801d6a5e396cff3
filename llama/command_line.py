"""What the scripts' command lines share: flag spelling, how a wrong one ends, and where the latest model is noted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

LATEST = Path("out/latest")  # train.py writes the path of the model it finished last into this file


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
