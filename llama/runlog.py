"""What a training run leaves to look at: metrics.jsonl, TensorBoard events, a W&B run, pictures of the loss.

train.py writes through RunLog on rank 0; runs/compare.py draws several runs. Lines of metrics.jsonl are whole at any
moment; a resumed run cuts off what came after its checkpoint, so the file reads like one uninterrupted run.
matplotlib, tensorboard and wandb are extras.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:  # runs/compare.py need not wait for torch
    from llama.parallel import World

AXES = {"tokens": "tokens", "steps": "step", "seconds": "seconds"}


def say(world: World, text: str) -> None:
    """Text on stderr, from rank 0, above the progress bar."""
    if world.rank == 0:
        tqdm.write(text, file=sys.stderr)


def check_installed(report_to: str) -> None:
    """ValueError if a package that --report_to names is not here; a run asks before it loads anything."""
    for name in report_to.split(","):
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ValueError(f"--report_to {name} needs the package: pip install {name}")


class RunLog:
    """Metrics of one run in output_dir. first_step: lines of later steps, from before a resume, are dropped."""

    def __init__(self, output_dir: Path, first_step: int, report_to: str, settings: dict[str, Any]) -> None:
        """report_to: names of train.py's flag. settings: what the run was told, for those who show it."""
        self.path = output_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= first_step] if first_step else []
        draft = self.path.with_suffix(".tmp")
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(draft, self.path)
        except OSError as e:
            raise ValueError(f"{self.path}: cannot write it ({e.strerror})") from None
        names = report_to.split(",")
        self._events = _event_writer(output_dir / "tensorboard", first_step) if "tensorboard" in names else None
        self._wandb = _wandb_run(output_dir, first_step, settings) if "wandb" in names else None
        self._file = self.path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Add one object; `step` says which update it describes."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
        if self._events is not None:
            for key, value in numbers.items():
                self._events.add_scalar(f"train/{key}", value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _event_writer(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _wandb_run(output_dir: Path, first_step: int, settings: dict[str, Any]) -> Any:
    """The run's W&B run, offline unless WANDB_MODE says otherwise. A resumed run goes on under the same id: W&B drops
    steps that it has, which are the same to the bit.
    """
    import wandb

    note = output_dir / "wandb_run_id"
    known = note.read_text().strip() if first_step and note.exists() else ""
    run_id = known or secrets.token_hex(4)
    note.write_text(run_id + "\n")
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "chatdoctor"),
        name=output_dir.name,
        id=run_id,
        resume="allow",
        dir=str(output_dir),
        mode=os.environ.get("WANDB_MODE", "offline"),
        config=settings,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl up to the first line that is none, as a kill may have left the last one."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
            break
        lines.append(line)
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
    per = "pair" if any("reward_margin" in line for line in lines) else "supervised token"
    axes.set(xlabel="step", ylabel=f"loss per {per} (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, rates, color="C2", linestyle=":", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles = [*axes.get_lines(), *rate.get_lines()]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="upper right")
    _save(figure, picture)
    return True


def draw_comparison(runs: Sequence[str | Path], picture: Path, x: str = "tokens") -> None:
    """Draw the losses of several runs, directories or metrics.jsonl files, over AXES[x]; held-out losses as points.

    Seconds are those of the logged steps, times the steps from one line to the next. ValueError for a file without
    losses.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs the package: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (at, losses, held)) in enumerate(zip(_names(runs), [_curve(r, x) for r in runs], strict=True)):
        axes.plot(at, losses, color=f"C{i % 10}", linewidth=0.6, alpha=0.25)
        axes.plot(at, _smooth(losses), color=f"C{i % 10}", label=name)
        if held:
            axes.plot(
                *zip(*held, strict=True), "o", color=f"C{i % 10}", markeredgecolor="black", label=f"{name}, held out"
            )
    axes.set(xlabel=x, ylabel="loss (nats), smoothed", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    _save(figure, picture)


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The name of each run's directory; its path where two have the same name."""
    folders = [p.parent if p.suffix == ".jsonl" else p for p in map(Path, runs)]
    count = Counter(p.resolve().name for p in folders)
    return [p.resolve().name if count[p.resolve().name] == 1 else str(p) for p in folders]


def _curve(run: str | Path, x: str) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """Places and losses of a run's lines, and (place, loss) of its evaluations."""
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the output_dir of a run, or its metrics.jsonl")
    at, losses, held, steps, seconds = [], [], [], 0, 0.0
    for line in read_metrics(path):
        if "loss" in line:
            seconds += line.get("seconds", 0.0) * (line["step"] - steps)
            steps = line["step"]
            at.append(seconds if x == "seconds" else line[AXES[x]])
            losses.append(line["loss"])
        elif "eval_loss" in line and at:
            held.append((at[-1], line["eval_loss"]))
    if not losses:
        raise ValueError(f"{path}: holds no losses yet")
    return at, losses, held


def _save(figure: Any, picture: Path) -> None:
    """Write a picture, whole or not at all."""
    draft = picture.with_suffix(".tmp.png")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(draft, dpi=150)
        os.replace(draft, picture)
    except OSError as e:
        raise ValueError(f"{picture}: cannot write it ({e.strerror})") from None


def _smooth(values: list[float]) -> list[float]:
    """Running mean over the last 2 % of the run, 5 values at least."""
    width = max(5, len(values) // 50)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
