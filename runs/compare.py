"""Draw the loss curves of several runs into one picture: `python runs/compare.py out/a out/b --x tokens`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama.command_line import Parser
from llama.runlog import AXES, draw_comparison


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "compare.py", "Draw the losses of several runs: smoothed over each step's, held-out ones as points."
    )
    parser.add_argument("runs", nargs="+", help="output_dir of a run, or a metrics.jsonl")
    parser.add_argument("--x", choices=tuple(AXES), default="tokens", help="horizontal axis (tokens)")
    parser.add_argument("--output", default="out/compare.png", help="the picture (out/compare.png)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        draw_comparison(args.runs, Path(args.output), args.x)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
