"""What a training run leaves to look at: metrics.jsonl, TensorBoard events, a picture of the loss.

train.py writes through RunLog on rank 0. Lines of metrics.jsonl are whole at any moment; a resumed run cuts off what
came after its checkpoint, so the file reads like one uninterrupted run. matplotlib and tensorboard are extras.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class RunLog:
    """Metrics of one run in output_dir. first_step: lines of later steps, from before a resume, are dropped."""

    def __init__(self, output_dir: Path, first_step: int, tensorboard: bool) -> None:
        self.path = output_dir / "metrics.jsonl"
        output_dir.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= first_step] if first_step else []
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(draft, self.path)
        self._file = self.path.open("a")
        self._events = _event_writer(output_dir / "tensorboard", first_step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Add one object; `step` says which update it describes."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in line.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._events.add_scalar(f"train/{key}", value, line["step"])

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--report_to tensorboard needs the package: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that a kill left unfinished is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def draw_loss(metrics: Path, picture: Path) -> bool:
    """Draw training loss, held-out loss and learning rate over the steps; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = read_metrics(metrics)
    train = [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]
    held = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses, rates = ([line[i] for line in train] for i in range(3))
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each step")
    axes.plot(steps, _smooth(losses), color="C0", label="training, smoothed")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="loss per supervised token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, rates, color="C2", linestyle=":", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles = [*axes.get_lines(), *rate.get_lines()]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="upper right")
    draft = picture.with_suffix(".tmp.png")
    figure.savefig(draft, dpi=150)
    os.replace(draft, picture)
    return True


def _smooth(values: list[float]) -> list[float]:
    """Running mean over the last 2 % of the run, 5 values at least."""
    width = max(5, len(values) // 50)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
