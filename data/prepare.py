"""Commands that prepare data: `python -m data.prepare clean IN OUT`. Each imports its module when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def clean(argv: Sequence[str]) -> int:
    """De-identify, tidy, deduplicate and lint a file of records."""
    from data.clean import main

    return main(argv)


COMMANDS = {"clean": clean}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command; exit status 2 and one line on stderr when there is none."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        for command, function in COMMANDS.items():
            print(f"python -m data.prepare {command} --help    {function.__doc__}")
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[name](rest)


if __name__ == "__main__":
    sys.exit(main())
