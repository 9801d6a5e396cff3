"""gpu_all.sh: without a GPU it says so; with one (played by a script) every part runs in its time, whatever fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "bench/gpu_all.sh"

PARTS = ("device_tests", "peers", "graph_steps", "commands", "kernels", "training", "decoding", "tiles")

# In the place of python: one GPU, and parts that do what the variables say.
PLAYED = """#!/usr/bin/env bash
case "$*" in
  *device_count*) echo "${GPUS:-1}" ;;
  *find_spec*) for absent in $ABSENT; do [[ $* == *"'$absent'"* ]] && exit 1; done; exit 0 ;;
  "-m pip"*) echo "pip $*" >>"$CALLS" ;;
  "-m pytest"*on_device*) echo "$*" >>"$CALLS"; echo "${DEVICE_SAYS:-12 passed in 3.4s}"; eval "${DO_DEVICE:-true}" ;;
  "-m pytest"*fixed_step*) echo "$*" >>"$CALLS"; echo "3 passed in 1s"; eval "${DO_STEPS:-true}" ;;
  "-m pytest"*on_gpu*) echo "$*" >>"$CALLS"; echo "27 passed in 1s"; eval "${DO_COMMANDS:-true}" ;;
  "-m pytest"*) echo "$*" >>"$CALLS"; echo "5 passed in 1s"; eval "${DO_PEERS:-true}" ;;
  "-m bench.bench_kernels"*)
    echo "$*" >>"$CALLS"
    echo "operation  ours  peer  ratio  hoped  met"
    echo "a row      400 TFLOP/s  cudnn 300 TFLOP/s  1.33x  >= 1.00x  yes"
    echo "           flex 100 TFLOP/s  4.00x"
    echo "1 of 1 rows measured; 1 of 1 targets met"
    eval "${DO_KERNELS:-true}" ;;
  "-m bench.bench_train_gpu"*)
    echo "$*" >>"$CALLS"
    echo "7b adamw_split, packed, nothing recomputed  12,345  55.0%"
    eval "${DO_TRAINING:-true}" ;;
  "-m bench.bench_decode_gpu"*)
    echo "$*" >>"$CALLS"
    echo "7b int4, alone  765.4   61%"
    echo "7b int8, alone  WRONG: ids of step 3 differ from a plain step's"
    eval "${DO_DECODING:-true}" ;;
  "-m bench.bench_tiles"*)
    echo "$*" >>"$CALLS"
    echo '    ("dq", 90, 128, 2): Tiles(64, 64, 8, 2),  # time'
    eval "${DO_TILES:-true}" ;;
  "-") cat >/dev/null; echo "python 3.12.3, torch 2.11.0, triton 3.6.0" ;;
esac
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], Path, list[str]]]:
    """run(VARIABLE=..., ...): the script with the played python; what it printed, its OUT, the commands it ran."""

    def run(**variables: str) -> tuple[subprocess.CompletedProcess[str], Path, list[str]]:
        played, out, calls = tmp_path / "python", tmp_path / "out", tmp_path / "calls"
        played.write_text(PLAYED)
        played.chmod(0o755)
        calls.write_text("")
        environment = {**os.environ, "PYTHON": str(played), "OUT": str(out), "CALLS": str(calls), "ABSENT": ""}
        done = subprocess.run(
            [str(SCRIPT)], env={**environment, **variables}, capture_output=True, text=True, check=False, timeout=120
        )
        return done, out, calls.read_text().splitlines()

    return run


def status(stdout: str) -> dict[str, str]:
    """What the summary says of each part."""
    words = [line.split() for line in stdout.splitlines()]
    return {w[0]: " ".join(w[1:3]) if w[1] == "not" else w[1] for w in words if len(w) > 2 and w[0] in PARTS}


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_says_so_and_shows_the_table(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run([str(SCRIPT)], env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "no GPU: nothing is measured"
    assert lines[1].startswith("operation")
    begin, middle = (next(i for i, line in enumerate(lines) if line.startswith(t)) for t in ("training", "decoding"))
    assert done.stdout.count("not measured  no GPU") == begin - 3
    assert all(line.endswith("not measured") for line in lines[begin + 1 : middle] + lines[middle + 1 :])
    assert not (tmp_path / "out").exists()


def test_without_torch_it_names_the_remedy() -> None:
    done = subprocess.run([str(SCRIPT)], env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "set PYTHON" in done.stderr


def test_every_part_runs_in_order(run: Callable[..., tuple]) -> None:
    done, out, calls = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(done.stdout) == dict.fromkeys(PARTS, "ok")
    benches = ["bench.bench_kernels", "bench.bench_train_gpu", "bench.bench_decode_gpu", "bench.bench_tiles"]
    assert [call.split()[1] for call in calls] == ["pytest"] * 4 + benches
    assert "-n " in calls[0]
    assert "--dist loadgroup" in calls[0]
    assert all("-W default" in call for call in calls[:4])
    assert "-m gpu tests/kernels/on_device" in calls[0]
    assert calls[1].endswith("tests/kernels/test_peers.py")
    assert calls[2].endswith("-m gpu tests/llama/test_fixed_step.py")
    assert calls[3].endswith("-m gpu tests/test_on_gpu.py")
    assert "strict-markers" not in calls[0]
    assert "addopts" not in calls[0]
    assert sorted(p.name for p in out.iterdir()) == ["logs.txt", "summary.txt"]
    logs = (out / "logs.txt").read_text()
    for name in ("environment", *PARTS):
        assert f"==> {name}.log <==" in logs
    assert "flex 100 TFLOP/s" in logs
    summary = (out / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    for said in (
        "triton 3.6.0",
        "1.33x",
        "1 of 1 rows measured",
        "Tiles(64, 64, 8, 2)",
        "12 passed in 3.4s",
        "12,345",
        "765.4",
        "WRONG",
    ):
        assert said in summary
    assert "flex" not in summary  # in the log only: it has no target


def test_the_time_is_shared_out(run: Callable[..., tuple]) -> None:
    _, _, calls = run(TIME="480")
    kernels, training, decoding, tiles = (float(call.partition("--seconds ")[2].split()[0]) for call in calls[4:])
    assert 205 < kernels <= 480 - 90 - 100 - 30 - 45  # all that is left but for the last, less what it may take beyond
    assert 295 < training <= 480 - 100 - 30 - 45
    assert 405 < decoding <= 480 - 30 - 35
    assert 440 < tiles <= 480 - 5 - 15
    assert "--head 128 64" in calls[-1]
    _, _, calls = run(TIME="150")
    assert "--head 128 --seconds" in calls[-1]


@pytest.mark.parametrize(
    ("variables", "failed", "code"),
    [
        ({"DO_DEVICE": "exit 1", "DEVICE_SAYS": "1 failed, 11 passed"}, "device_tests", 1),
        ({"DO_DEVICE": "exit 5", "DEVICE_SAYS": "no tests ran"}, "device_tests", 1),
        ({"DO_PEERS": "exit 1"}, "peers", 1),
        ({"DO_STEPS": "exit 1"}, "graph_steps", 1),
        ({"DO_COMMANDS": "exit 1"}, "commands", 1),
        ({"DO_KERNELS": "exit 1"}, "kernels", 0),
        ({"DO_TRAINING": "exit 1"}, "training", 0),
        ({"DO_DECODING": "exit 1"}, "decoding", 0),
        ({"DO_TILES": "kill -SEGV $$"}, "tiles", 0),
    ],
)
def test_a_part_that_fails_stops_nothing(
    run: Callable[..., tuple], variables: dict[str, str], failed: str, code: int
) -> None:
    done, _, calls = run(**variables)
    assert done.returncode == code
    assert len(calls) == len(PARTS)
    found = status(done.stdout)
    assert found.pop(failed) == "FAILED"
    assert set(found.values()) == {"ok"}
    assert variables.get("DEVICE_SAYS", "") in done.stdout


def test_what_failed_is_named_even_where_a_part_was_stopped(run: Callable[..., tuple]) -> None:
    done, _, _ = run(
        DO_DEVICE="echo '[gw3] [ 17%] FAILED tests/kernels/on_device/test_x.py::test_y '; sleep 9", TESTS="2"
    )
    assert "FAILED tests/kernels/on_device/test_x.py::test_y" in done.stdout


def test_a_part_that_hangs_is_stopped_with_what_it_started(run: Callable[..., tuple], tmp_path: Path) -> None:
    child = tmp_path / "child"
    begin = time.monotonic()
    done, _, calls = run(DO_DEVICE=f"sleep 300 & echo $! > {child}; wait", TESTS="2")
    assert time.monotonic() - begin < 60
    assert status(done.stdout) == dict.fromkeys(PARTS, "ok") | {"device_tests": "STOPPED"}
    assert done.returncode == 1
    assert len(calls) == len(PARTS)
    for _ in range(50):
        if not Path(f"/proc/{child.read_text().strip()}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the part started still runs")


def test_what_no_time_is_left_for_is_not_run(run: Callable[..., tuple]) -> None:
    done, _, calls = run(DO_DEVICE="sleep 3", TIME="2", TESTS="2")
    assert status(done.stdout) == dict.fromkeys(PARTS, "not run") | {"device_tests": "STOPPED"}
    assert done.returncode == 1
    assert len(calls) == 1


def test_what_is_missing_is_done_without(run: Callable[..., tuple]) -> None:
    done, _, calls = run(ABSENT="xdist pytest_timeout hypothesis")
    assert done.returncode == 0
    assert "-n " not in calls[0]
    assert "PytestUnknownMarkWarning" in calls[0]
    named = "tests/kernels/on_device/test_flash.py"
    assert f"--ignore={named}" in calls[0]
    assert f"not run, as there is no hypothesis: {named}" in done.stdout
