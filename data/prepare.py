"""`python -m data.prepare COMMAND ...`: makes what the other programs read out of files from elsewhere.

    python -m data.prepare diseases sample format_dataset.csv medquad.jsonl diseases.db

A command is a pair of functions: its arguments, and what it does, which imports what it needs when it is called. Exit
code 2 and one line for anything wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from llama.command_line import Parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except ValueError as e:
        return _fail(str(e))
    except OSError as e:
        return _fail(f"{e.filename or argv[-1]}: {e.strerror or e}")
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written")


def _run(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        if argv and argv[0] in ("-h", "--help"):
            print((__doc__ or "").strip())
            return 0
        raise ValueError(f"{argv[0] if argv else 'no command'}: give one of {', '.join(COMMANDS)}")
    arguments, run = COMMANDS[argv[0]]
    run(arguments(argv[1:]))
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


# --- diseases -------------------------------------------------------------------------------------


def diseases_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line after `diseases`."""
    p = Parser("python -m data.prepare diseases", "Build the disease database.")
    about = "'sample' (the built-in table), a folder like it, ChatDoctor's .csv table, MedQuAD's .jsonl passages"
    p.add_argument("sources", nargs="+", metavar="SRC", help=about)
    p.add_argument("out", metavar="OUT", help="the database to write; an earlier one is replaced")
    p.add_argument("--report", metavar="FILE.json", help="write every finding of the linter here as well")
    return p.parse_args(argv)


def diseases(args: argparse.Namespace) -> None:
    """Tables and passages -> a disease database."""
    from data import disease_report

    disease_report.prepare(args)


Command = tuple[Callable[[list[str]], argparse.Namespace], Callable[[argparse.Namespace], None]]
COMMANDS: dict[str, Command] = {"diseases": (diseases_arguments, diseases)}

if __name__ == "__main__":
    sys.exit(main())
