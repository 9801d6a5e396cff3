"""The learning rate as a pure function of the step: a resumed run needs no replay. train.py calls it."""

from __future__ import annotations

import math

from llama.arguments import TrainArguments


def learning_rate(args: TrainArguments, step: int, total: int) -> float:
    """Rate of update `step`, 1 .. total: linear warm-up, then cosine or linear to 0 at `total`, or constant.

    The warm-up takes ceil(warmup_ratio * total) steps, as transformers' does.
    """
    kind = args.lr_scheduler_type
    warmup = 0 if kind == "constant" else args.warmup_steps or math.ceil(args.warmup_ratio * total)
    if step < warmup:
        return args.learning_rate * step / warmup
    if kind.startswith("constant"):
        return args.learning_rate
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return args.learning_rate * max(0.0, 1.0 - progress)
    return args.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
