"""train.py with something that goes wrong: what test_train.py and bench_reliability.py start in its place.

FAULTS names what happens, "kind:step:rank:attempt" each, separated by spaces: in the middle of that optimizer step, on
that rank, in that attempt of torchrun's (0 is the first). kill: SIGKILL; sleep: for ever; freeze: SIGSTOP.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from llama import elastic, parallel


def fail(kind: str) -> None:
    if kind == "sleep":
        time.sleep(10_000)
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


def main() -> int:
    faults = [f.split(":") for f in os.environ.get("FAULTS", "").split()]
    mine = {int(s): k for k, s, r, a in faults if (r, a) == (os.environ.get("RANK", "0"), str(elastic.attempt()))}
    number, grad_norm, learning_rate = 0, parallel.grad_norm, train.learning_rate

    def noted(args: Any, step: int, total: int) -> float:  # called at the beginning of a step
        nonlocal number
        number = step
        return learning_rate(args, step, total)

    def faulty(*args: Any) -> Any:  # called between backward and update
        if number in mine:
            fail(mine[number])
        return grad_norm(*args)

    train.learning_rate, parallel.grad_norm = noted, faulty
    return train.main()


if __name__ == "__main__":
    status = main()
    if parallel.launched():
        parallel.leave(status)
    sys.exit(status)
