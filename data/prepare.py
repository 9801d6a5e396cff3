"""python -m data.prepare COMMAND ...: what is done to data before training. Each command has its own --help."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": (
        "data.generate_dialogues",
        "diseases -> dialogues, through any OpenAI-compatible endpoint",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the line to the command's own main(); its module is imported now, not before."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        asked_for_help = argv[:1] in (["-h"], ["--help"])
        lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
        out = sys.stdout if asked_for_help else sys.stderr
        print("\n".join(["usage: python -m data.prepare COMMAND ...", *lines]), file=out)
        return 0 if asked_for_help else 2
    return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
