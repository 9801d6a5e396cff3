"""What a run leaves: W&B (faked: the real one is no dependency of the tests), and pictures of several runs."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llama import runlog
from llama.runlog import RunLog, check_installed, draw_comparison, read_metrics


class FakeRun:
    """What wandb.init gives: notes what it is told."""

    def __init__(self, **options: Any) -> None:
        self.options, self.lines, self.finished = options, [], False

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.lines.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []
    module = types.ModuleType("wandb")
    module.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return runs


def test_wandb_is_offline_by_default_and_a_resume_goes_on_with_the_run(tmp_path: Path, started: list[FakeRun]) -> None:
    out = tmp_path / "run"
    for first in (0, 1):
        log = RunLog(out, first, "wandb", {"learning_rate": 1e-3})
        log.write({"step": first + 1, "loss": 2.0, "note": "text"})
        log.close()
    again = RunLog(out, 0, "tensorboard,wandb", {})
    again.close()
    one, two, three = started
    assert one.options["mode"] == "offline"
    assert one.options["config"] == {"learning_rate": 1e-3}
    assert (one.options["dir"], one.options["name"], one.options["resume"]) == (str(out), "run", "allow")
    assert one.lines == [(1, {"loss": 2.0})]
    assert one.options["id"] == two.options["id"] != three.options["id"]
    assert one.finished
    assert list((out / "tensorboard").iterdir())


def test_wandb_mode_is_the_users(tmp_path: Path, started: list[FakeRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    RunLog(tmp_path, 0, "wandb", {}).close()
    assert (started[0].options["mode"], started[0].options["project"]) == ("online", "mine")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_installed("none")
    check_installed("tensorboard")
    with pytest.raises(ValueError, match="--report_to wandb needs the package: pip install wandb"):
        check_installed("tensorboard,wandb")


def run_of(path: Path, rate: float, steps: int = 100, every: int = 2) -> Path:
    """A run's metrics.jsonl."""
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as f:
        for step in range(every, steps + 1, every):
            loss = 1 + 3 * 2.0 ** (-rate * step) + 0.2 * (step * 7919 % 13 - 6) / 6
            f.write(json.dumps({"step": step, "loss": loss, "lr": 1e-3, "tokens": 900 * step, "seconds": 0.5}) + "\n")
            if step % 20 == 0:
                f.write(json.dumps({"step": step, "eval_loss": loss + 0.1, "eval_perplexity": 2.0}) + "\n")
    return path


@pytest.mark.parametrize(("x", "last"), [("tokens", 90_000), ("steps", 100), ("seconds", 50.0)])
def test_curves_of_several_runs(tmp_path: Path, x: str, last: float) -> None:
    a, b = run_of(tmp_path / "a", 0.05), run_of(tmp_path / "b", 0.1)
    at, losses, held = runlog._curve(a, x)
    assert (at[-1], len(losses), len(held)) == (last, 50, 5)
    assert held[-1] == (last, pytest.approx(losses[-1] + 0.1))
    picture = tmp_path / "new" / "compare.png"
    draw_comparison([a, b / "metrics.jsonl"], picture, x)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in picture.parent.iterdir()] == ["compare.png"]


def test_runs_are_named_by_their_directory(tmp_path: Path) -> None:
    assert runlog._names(["out/a", "out/b/metrics.jsonl"]) == ["a", "b"]
    assert runlog._names(["x/run", "y/run", "z"]) == ["x/run", "y/run", "z"]


def test_metrics_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl: no such file"):
        draw_comparison([tmp_path / "empty"], tmp_path / "x.png")
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl: holds no losses yet"):
        draw_comparison([tmp_path / "empty"], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_resume_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    run_of(tmp_path / "a", 0.1, steps=10)
    RunLog(tmp_path / "a", 6, "none", {}).close()
    assert [line["step"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl")] == [2, 4, 6]
