"""`python -m data.prepare COMMAND ...`: makes what the other programs read out of files from elsewhere.

    python -m data.prepare diseases sample format_dataset.csv medquad.jsonl diseases.db
    python -m data.prepare clean messy.jsonl clean.jsonl
    python -m data.prepare generate diseases.db dialogues.jsonl --endpoint http://localhost:8000/v1 --model NAME
    python -m data.prepare review feedback.db
    python -m data.prepare feedback feedback.db learn.jsonl
    python -m data.prepare feedback feedback.db --erase 12

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
    return run(arguments(argv[1:])) or 0


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


def generate_arguments(argv: list[str]) -> argparse.Namespace:
    from data.asking import generate as dialogues

    return dialogues.parse(argv)


def generate(args: argparse.Namespace) -> int:
    """A disease database -> dialogues, through an endpoint; 130 when it was stopped before the end."""
    from data.asking import generate as dialogues

    return dialogues.generate(args)


# --- cleaning -------------------------------------------------------------------------------------


def clean_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line after `clean`."""
    from data import clean

    return clean.parse(argv)


def clean(args: argparse.Namespace) -> int:
    """Records -> the same without identifiers, boilerplate and litter; 1 when --check found faults."""
    from data import clean

    return clean.run(args)


# --- feedback -------------------------------------------------------------------------------------


def review_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line after `review`."""
    p = Parser("python -m data.prepare review", "Decide which rated answers a model may learn from.")
    p.add_argument("source", metavar="FILE.db", help="ratings, as `generate.py --feedback FILE.db` keeps them")
    p.add_argument("--reviewer", default="", metavar="NAME", help="who decides, kept with every decision")
    return p.parse_args(argv)


def review(args: argparse.Namespace) -> None:
    """New ratings -> approved or rejected ones, by somebody at the terminal."""
    from data import review

    review.at_terminal(args.source, args.reviewer)


def feedback_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line after `feedback`."""
    p = Parser("python -m data.prepare feedback", "Write what a reviewer approved, without what identifies a person.")
    p.add_argument("source", metavar="FILE.db", help="reviewed ratings")
    p.add_argument("out", metavar="OUT.jsonl", nargs="?", help="records to train on; OUT.pairs.jsonl: pairs for DPO")
    p.add_argument("--erase", metavar="N", nargs="+", help="instead: erase the ratings of these numbers, or all")
    args = p.parse_args(argv)
    if (args.out is None) == (args.erase is None):
        p.error("give either OUT.jsonl or --erase")
    wrong = [n for n in args.erase or () if not (n.isascii() and n.isdigit() and len(n) < 19)]
    if wrong and args.erase != ["all"]:
        p.error(f"--erase takes numbers of ratings, or all alone; {wrong[0]!r} is neither")
    return args


def feedback(args: argparse.Namespace) -> None:
    """Approved ratings -> training records; or ratings erased."""
    from data import review

    if args.erase is None:
        review.write_export(args.source, args.out)
    else:
        review.erase(args.source, None if args.erase == ["all"] else [int(n) for n in args.erase])


Command = tuple[Callable[[list[str]], argparse.Namespace], Callable[[argparse.Namespace], int | None]]
COMMANDS: dict[str, Command] = {
    "diseases": (diseases_arguments, diseases),
    "clean": (clean_arguments, clean),
    "generate": (generate_arguments, generate),
    "review": (review_arguments, review),
    "feedback": (feedback_arguments, feedback),
}

if __name__ == "__main__":
    sys.exit(main())
