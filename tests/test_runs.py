"""The recipes in runs/ are executed, the large one with torchrun replaced by a program that prints its arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama import checkpoint
from llama.arguments import parse

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "runs" / script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_both_stages_in_small(shared: Path, tmp_path: Path) -> None:
    options = {"DATA": str(shared / "data"), "OUT": str(tmp_path), "STEPS": "2", "PYTHON": sys.executable}
    first = run("chatdoctor_tiny.sh", **options)
    assert first.returncode == 0, first.stderr
    general, doctor = tmp_path / "general", tmp_path / "doctor"
    assert checkpoint.load_tokenizer(general).sha256 == checkpoint.load_tokenizer(doctor).sha256
    a, b = checkpoint.load_model(general), checkpoint.load_model(doctor)
    moved = (a.embed.weight - b.embed.weight).abs().max()
    assert 0 < moved < 0.1, "the second stage starts from the first"
    again = run("chatdoctor_tiny.sh", **options)
    assert again.returncode == 0
    assert again.stderr.count("is finished") == 2


@pytest.mark.parametrize("gpus", [1, 4, 6, 8])
def test_the_7b_recipe_is_chatdoctors(tmp_path: Path, gpus: int) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" END\n')
    torchrun.chmod(0o755)
    done = run("chatdoctor_7b.sh", PATH=f"{tmp_path}:{os.environ['PATH']}", OUT=str(tmp_path / "out"), GPUS=str(gpus))
    assert done.returncode == 0, done.stderr
    stages = [lines.split("\n") for lines in done.stdout.strip().removesuffix("END").strip().split("\nEND\n")]
    assert len(stages) == 2
    args = [parse(stage[stage.index("train.py") + 1 :], {}) for stage in stages]
    for a in args:
        assert a.per_device_train_batch_size * a.gradient_accumulation_steps * gpus == 192
        assert (a.learning_rate, a.num_train_epochs, a.model_max_length, a.warmup_ratio) == (2e-5, 3.0, 512, 0.03)
        assert (a.weight_decay, a.lr_scheduler_type, a.bf16, a.adam_beta2) == (0.0, "cosine", True, 0.999)
    assert args[0].data_path == ("data_files/alpaca_data.json",)
    assert args[1].model_name_or_path == args[0].output_dir
    assert [Path(p).name for p in args[1].data_path] == [
        "HealthCareMagic-200k.json",
        "iCliniq.json",
        "chatdoctor5k.json",
    ]


def test_a_number_of_gpus_that_cannot_make_192_is_refused() -> None:
    done = run("chatdoctor_7b.sh", GPUS="5")
    assert done.returncode == 2
    assert "GPUS=5 does not divide 48" in done.stderr
