"""The recipes in runs/ are executed, the large one with torchrun replaced by a program that prints its arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.feedback import Feedback
from llama import checkpoint, layout, provenance
from llama.arguments import TrainArguments, parse
from llama.chat import ChatFormat, Message
from llama.config import PRESETS, LlamaConfig
from llama.lora_config import LoRAConfig
from llama.model import Llama
from llama.tokenizer import Tokenizer

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


def test_the_grounded_stages_in_small(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    config = PRESETS["tiny"].with_vocab(small_tokenizer.vocab_size)
    model = Llama(config)
    model.init_weights(0)
    weights, chat_format = model.state_dict(), ChatFormat("dialogue", "")
    tensors = ((e.name, weights[e.name]) for e in layout.entries(config))
    checkpoint.save_model(tmp_path / "base", tensors, config, small_tokenizer, chat_format)
    options = {
        "BASE": str(tmp_path / "base"),
        "OUT": str(tmp_path),
        "STEPS": "1 1",
        "SAMPLES": "20 20 20 20 20",
        "PYTHON": sys.executable,
    }
    done = run("grounded_tiny.sh", **options)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load_chat_format(tmp_path / "copy") == chat_format
    assert run("grounded_tiny.sh", **options).stderr.count("is finished") == 2


def recorder(folder: Path, *names: str) -> str:
    """A PATH on which programs of these names print their arguments, one a line, and END."""
    for name in names:
        program = folder / name
        program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" END\n')
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def commands(output: str) -> list[list[str]]:
    return [lines.split("\n") for lines in output.strip().removesuffix("END").strip().split("\nEND\n")]


def flags_of(command: list[str]) -> TrainArguments:
    return parse(command[command.index("train.py") + 1 :], {})


@pytest.mark.parametrize("gpus", [1, 4, 6, 8])
def test_the_7b_recipe_is_chatdoctors(tmp_path: Path, gpus: int) -> None:
    path = recorder(tmp_path, "torchrun")
    done = run("chatdoctor_7b.sh", PATH=path, OUT=str(tmp_path / "out"), GPUS=str(gpus))
    assert done.returncode == 0, done.stderr
    args = [flags_of(stage) for stage in commands(done.stdout)]
    assert len(args) == 2
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


@pytest.mark.parametrize(("gpus", "bits"), [(1, "4"), (4, "16"), (8, "4")])
def test_the_lora_recipe_is_chatdoctors(tmp_path: Path, gpus: int, bits: str) -> None:
    """The defaults of its train_lora.py, and transformers' for what it leaves out."""
    out = tmp_path / "out"
    options = {"OUT": str(out), "GPUS": str(gpus), "BITS": bits, "PATH": recorder(tmp_path, "torchrun")}
    done = run("lora_7b.sh", **options)
    assert done.returncode == 0, done.stderr
    (words,) = commands(done.stdout)
    assert f"--nproc_per_node={gpus}" in words
    a = flags_of(words)
    assert a.lora == LoRAConfig(r=8, alpha=16, dropout=0.05, targets=("q", "v"))
    assert a.per_device_train_batch_size == 4
    assert 4 * a.gradient_accumulation_steps * gpus == 128
    assert (a.learning_rate, a.num_train_epochs, a.model_max_length, a.warmup_steps) == (3e-4, 3.0, 256, 100)
    assert (a.lr_scheduler_type, a.weight_decay, a.save_steps, a.eval_steps) == ("linear", 0.0, 200, 200)
    assert (a.bf16, a.base_bits) == (True, int(bits))
    out.mkdir()
    (out / "config.json").touch()
    assert "is finished" in run("lora_7b.sh", **options).stderr


@pytest.mark.parametrize(("recipe", "gpus", "of"), [("chatdoctor_7b.sh", 5, 48), ("lora_7b.sh", 6, 32)])
def test_a_number_of_gpus_that_cannot_make_the_batch_is_refused(recipe: str, gpus: int, of: int) -> None:
    done = run(recipe, GPUS=str(gpus))
    assert done.returncode == 2
    assert f"GPUS={gpus} does not divide {of}" in done.stderr


@pytest.mark.parametrize(("memory", "optimizer"), [(141, "adamw_split"), (80, "adamw_split_bf16")])
def test_the_7b_recipe_of_one_gpu(tmp_path: Path, memory: int, optimizer: str) -> None:
    path = recorder(tmp_path, "python")
    done = run("chatdoctor_7b_one_gpu.sh", PATH=path, MEMORY=str(memory), PYTHON="python")
    assert done.returncode == 0, done.stderr
    (command,) = commands(done.stdout)
    a = flags_of(command)
    assert a.per_device_train_batch_size * a.gradient_accumulation_steps == 128
    assert (a.bf16, a.optim, a.gradient_checkpointing) == (True, optimizer, "auto")
    assert a.learning_rate == 2e-5
    wrong = run("chatdoctor_7b_one_gpu.sh", MEMORY="16")
    assert wrong.returncode == 2
    assert "MEMORY=16: 141 or 80" in wrong.stderr


def test_the_7b_recipe_of_several_nodes(tmp_path: Path) -> None:
    path = recorder(tmp_path, "torchrun")
    done = run("chatdoctor_7b_nodes.sh", PATH=path, HOST="node7", NODES="3:4", GPUS="8")
    assert done.returncode == 0, done.stderr
    (command,) = commands(done.stdout)
    assert {"--nnodes=3:4", "--nproc_per_node=8", "--rdzv_endpoint=node7:29400", "--max-restarts=20"} <= set(command)
    a = flags_of(command)
    assert "hybrid_shard" in a.fsdp
    assert a.resume_from_checkpoint == "auto"
    unnamed = run("chatdoctor_7b_nodes.sh", PATH=path)
    assert unnamed.returncode != 0
    assert "the name of the first node" in unnamed.stderr


@pytest.mark.parametrize("finished", [False, True])
def test_the_slurm_job_goes_on_until_the_model_is_there(tmp_path: Path, finished: bool) -> None:
    path = recorder(tmp_path, "srun")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/usr/bin/env bash\n[[ $1 = show ]] && printf "node7\\nnode8\\n" || echo "$@" >&2\n')
    scontrol.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    if finished:
        (out / "config.json").touch()
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5"}
    done = run("chatdoctor_7b.sbatch", PATH=path, OUT=str(out), **slurm)
    assert done.returncode == 0, done.stderr
    assert "runs/chatdoctor_7b_nodes.sh" in done.stdout
    assert ("requeue 5" in done.stderr) is not finished
    outside = run("chatdoctor_7b.sbatch", SLURM_SUBMIT_DIR="")
    assert outside.returncode != 0
    assert "without SLURM: runs/chatdoctor_7b_nodes.sh" in outside.stderr


def test_compare_draws_runs_and_names_what_is_missing(tmp_path: Path) -> None:
    metrics = tmp_path / "a" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text('{"step": 1, "loss": 2.0, "tokens": 10}\n{"step": 2, "loss": 1.0, "tokens": 20}\n')
    command = [sys.executable, str(ROOT / "runs/compare.py"), "--output", "c.png", "a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "c.png\n"), done.stderr
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    done = subprocess.run([*command, "b"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: b: no such file")


@pytest.fixture
def rated(tmp_path: Path, small_tokenizer: Tokenizer) -> dict[str, str]:
    """The settings of learn.sh for a small model and two approved answers."""
    config = LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_seq_len=384)
    model = Llama(config)
    model.init_weights(0)
    checkpoint.save_model(
        tmp_path / "model", model.named_parameters(), config, small_tokenizer, ChatFormat("dialogue", "")
    )
    feedback = Feedback(tmp_path / "feedback.db")
    feedback.agree()
    for question, answer in (("I cough.", "Rest."), ("My head hurts.", "Drink water.")):
        feedback.decide(feedback.add("model", [Message("user", question)], answer, "good"), "approved", "Dr A")
    replay = tmp_path / "replay.jsonl"
    replay.write_text('{"input": "I sneeze.", "output": "It is a cold."}\n' * 8)
    places = {name.upper(): str(tmp_path / name) for name in ("model", "out")}
    evaluation = {"SUITE": "fit", "EVAL": "--limit 20 --train_files " + str(replay)}
    return {**places, **evaluation, "FEEDBACK": str(feedback.path), "REPLAY": str(replay), "PYTHON": sys.executable}


def test_a_model_that_is_no_worse_is_published(rated: dict[str, str]) -> None:
    done = run("learn.sh", **rated, TRAIN="--max_steps 2 --model_max_length 64")
    assert done.returncode == 0, done.stderr
    assert "no figure is worse" in done.stdout
    out = Path(rated["OUT"])
    (stage,) = provenance.stages_of(out)
    assert [(Path(d["name"]).name, d["weight"]) for d in stage["data"]] == [("feedback.jsonl", 4), ("replay.jsonl", 1)]
    assert Path(ROOT / "out/latest").read_text().strip() == str(out.resolve())
    again = run("learn.sh", **rated)
    assert (again.returncode, again.stderr) == (2, f"error: {out} is there already; choose another OUT\n")


def test_a_model_that_is_worse_is_not(rated: dict[str, str]) -> None:
    before = (ROOT / "out/latest").read_text() if (ROOT / "out/latest").exists() else None
    done = run("learn.sh", **rated, TRAIN="--max_steps 20 --model_max_length 64 --learning_rate 1.0")
    assert done.returncode == 1, done.stderr
    assert "worse" in done.stdout
    assert not Path(rated["OUT"]).exists()
    assert ((ROOT / "out/latest").read_text() if (ROOT / "out/latest").exists() else None) == before
