"""The training script: recipe, invariance, ranks, resume to the bit, signals, bad input, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert_weights
import generate
import train
from data import loader, prepare, synthesize
from llama import checkpoint, lora_files, nf4, provenance, training_state
from llama.arguments import TrainArguments, parse
from llama.chat import ChatFormat, Dialogue, render
from llama.config import LlamaConfig
from llama.model import Llama
from llama.runlog import draw_loss, read_metrics
from llama.schedule import learning_rate
from llama.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent

# ChatDoctor's README, word for word but for the two paths.
PUBLISHED = """--model_name_or_path {model} --data_path {data} --bf16 True --output_dir {out} --num_train_epochs 3
  --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
  --evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5
  --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1
  --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LLaMADecoderLayer' --tf32 True"""


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """A checkpoint directory to start from: two layers of width 32."""
    config = LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_seq_len=128)
    model = Llama(config)
    model.init_weights(0)
    path = tmp_path_factory.mktemp("start") / "model"
    checkpoint.save_model(path, model.named_parameters(), config, small_tokenizer, ChatFormat("dialogue", ""))
    return path


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty dialogues of unequal length."""
    words = ["pain", "fever", "cough", "rest", "water", "chest", "head", "days", "doctor"]
    records = [
        {
            "instruction": "Answer.",
            "input": " ".join(words[(i + j) % 9] for j in range(1 + i % 7)),
            "output": " ".join(words[(i * j) % 9] for j in range(1, 2 + i % 5)),
        }
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("data") / "dialogues.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def flags(start: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags of a small run into tmp_path / "out", which is also where this process now works."""
    monkeypatch.chdir(tmp_path)
    text = f"--model_name_or_path {start} --data_path {dialogues} --output_dir out --model_max_length 64 --max_steps 12"
    text += " --per_device_train_batch_size 8 --learning_rate 1e-3 --num_workers 1 --save_strategy no"
    return text.split()


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in read_metrics(out / "metrics.jsonl") if "loss" in m]


def launch(
    flags: list[str], cwd: Path, ranks: int = 0, *torchrun: str, script: str = "train.py"
) -> subprocess.Popen[str]:
    """A script in a process of its own, or torchrun of it on so many ranks."""
    run = [sys.executable]
    if ranks:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": str(cwd / "error.json")}
    return subprocess.Popen(
        [*run, str(ROOT / script), *flags], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    _, err = process.communicate(timeout=timeout)
    return process.returncode, err


# --- the recipe -----------------------------------------------------------------------------------


def test_learning_rates_equal_chatdoctors_log(shared: Path) -> None:
    log = json.loads((shared / "data/chatdoctor/chatdoctor_lr.json").read_text())
    rates = log.get("lr") or log["learning_rate"]
    args = TrainArguments(learning_rate=2e-5, warmup_ratio=0.03, lr_scheduler_type="cosine")
    assert len(rates) == 609
    for step, want in enumerate(rates, start=1):
        assert abs(learning_rate(args, step, 609) - want) <= 1e-12


@pytest.mark.parametrize(
    ("kind", "steps", "want"),
    [
        ("linear", (1, 2, 6, 10), (0.5, 1.0, 0.5, 0.0)),
        ("constant_with_warmup", (1, 2, 10), (0.5, 1.0, 1.0)),
        ("constant", (1, 10), (1.0, 1.0)),
        ("cosine", (1, 2, 6, 10), (0.5, 1.0, 0.5, 0.0)),
    ],
)
def test_schedules(kind: str, steps: tuple[int, ...], want: tuple[float, ...]) -> None:
    args = TrainArguments(learning_rate=1.0, warmup_steps=2, lr_scheduler_type=kind)
    assert [learning_rate(args, s, 10) for s in steps] == pytest.approx(want)


def test_help_tells_the_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(["--help"], train.BUILTIN)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    joined = " ".join(text.split())
    for line in (
        "peak learning rate [5e-05]",
        "projections that get adapters: q_proj",
        "[q_proj v_proj]",
        "110m, 1.1b, 7b",
    ):
        assert line in joined
    assert "those of a run without --data_path are: --chat_format dialogue" in joined
    assert "--learning_rate 0.004" in joined
    assert "[False]" not in joined


def test_published_command_parses_word_for_word() -> None:
    text = PUBLISHED.format(model="m", data="./HealthCareMagic-200k.json", out="pretrained")
    args = parse(shlex.split(text), {"learning_rate": 1.0})
    want = {
        "data_path": ("./HealthCareMagic-200k.json",),
        "bf16": True,
        "num_train_epochs": 3.0,
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-5,
        "fsdp": "full_shard auto_wrap",
        "model_max_length": 512,
        "save_total_limit": 1,
        "weight_decay": 0.0,
    }
    assert {k: getattr(args, k) for k in want} == want
    dashed = parse([a.replace("_", "-") if a.startswith("--") else a for a in shlex.split(text)], {})
    assert dashed == args


def test_builtin_defaults_hold_only_without_data() -> None:
    assert parse([], {"max_steps": 7}).max_steps == 7
    assert parse(["--max_steps=3"], {"max_steps": 7}).max_steps == 3
    assert parse(["--data_path", "x.json"], {"max_steps": 7}).max_steps == -1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fp16"], "--fp16 is not supported"),
        (["--eval_fraction", "1.5"], "must be in [0, 1)"),
        (["--learning_rate", "nan"], "--learning_rate is nan"),
        (["--per_device_train_batch_size", "0"], "must be at least 1"),
        (["--data_path", "a", "b", "--data_weights", "1"], "1 numbers for 2 files"),
        (["--data_path", "a", "b", "--data_licences", "MIT"], "1 names for 2 files"),
        (["--fsdp", "zero3"], "zero3 is not supported"),
        (["--optim", "adamw_split"], "needs --bf16 True"),
        (["--lora_alpha", "32"], "--lora_alpha is about LoRA adapters: it needs --lora_r"),
        (["--base_bits", "4"], "--base_bits is about LoRA adapters: it needs --lora_r"),
        (["--lora_r", "-1"], "r is -1; it must be a whole number, 1 or more"),
        (["--lora_r", "8", "--lora_dropout", "1"], "dropout is 1.0; it must be a number in [0, 1)"),
        (
            ["--lora_r", "8", "--lora_target_modules", "q_proj", "lm_head"],
            "'lm_head' is no projection; there are q_proj",
        ),
        (["--lora_r", "8", "--bf16", "--optim", "adamw_split"], "adapters are few, use --optim adamw_torch"),
        (["--lora_r", "8", "--base_bits", "4", "--fsdp", "offload"], "4-bit weights are not sharded"),
        (["--objective", "dpo"], "needs --data_path"),
        (["--beta", "0"], "--beta is 0; it must be above 0"),
        (["--label_smoothing", "0.5"], "must be below 0.5"),
        (["--adam_epsilon", "0"], "--adam_epsilon is 0; it must be above 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs is 0; it must be above 0"),
        (["--seed", str(2**63)], "it must be below 2^63"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--evaluation_strategy", "steps", "--data_path", "a"], "give --eval_fraction"),
        (["--kernels", "triton", "--device", "cpu", "--output_dir", "out/none"], "triton was asked for, but"),
        (
            ["--kernels", "cuda", "--device", "cpu", "--output_dir", "out/none"],
            "no backend 'cuda'; there are auto, triton",
        ),
    ],
)
def test_values_that_cannot_work_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--learning_rat", "1"], ["--packing", "all"], ["--bf16", "maybe"]])
def test_flags_that_are_not_there_end_with_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        train.main(argv)
    assert e.value.code == 2
    assert re.fullmatch(r"error: .*\n", capsys.readouterr().err)


# --- one step -------------------------------------------------------------------------------------


def gradient(start: Path, dialogues: Path, **geometry: Any) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient of the first step, its batch split as geometry says."""
    model = checkpoint.load_model(start)
    tokenizer, chat_format = checkpoint.load_tokenizer(start), checkpoint.load_chat_format(start)
    data, _, _ = loader.build([dialogues], tokenizer=tokenizer, chat_format=chat_format, max_len=64, workers=1)
    batches = loader.Loader(data, max_len=64, **geometry)
    step, total = batches.step(0), 0.0
    for batch in step.micro_batches:
        loss, _ = model(batch.tokens, batch.targets, (batch.start, batch.end))
        (loss / step.supervised_tokens).backward()
        total += loss.item()
    return total / step.supervised_tokens, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "geometry",
    [
        {"batch": 12, "accumulation": 2, "packing": "none"},
        {"batch": 1, "accumulation": 24, "packing": "none"},
        {"batch": 24, "accumulation": 1, "packing": "step"},
        {"batch": 4, "accumulation": 6, "packing": "step"},
        {"batch": 24, "accumulation": 1, "packing": "step", "fixed_shape": True},
    ],
    ids=str,
)
def test_gradient_does_not_depend_on_how_the_batch_is_split(
    start: Path, dialogues: Path, geometry: dict[str, Any]
) -> None:
    want_loss, want = gradient(start, dialogues, batch=24, accumulation=1, packing="none")
    loss, got = gradient(start, dialogues, **geometry)
    assert loss == pytest.approx(want_loss, abs=1e-6)
    scale = max(g.abs().max().item() for g in want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max().item() <= 2e-6 * scale


def test_loss_falls_and_the_model_opens_in_transformers(flags: list[str], small_tokenizer: Tokenizer) -> None:
    assert train.main([*flags, "--max_steps", "60", "--learning_rate", "1e-2", "--eval_fraction", "0.1"]) == 0
    out = Path("out")
    series = [loss for _, loss, _ in losses(out)]
    assert len(series) == 60
    assert sum(series[-5:]) / 5 < 0.6 * series[0]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_metrics(out / "metrics.jsonl")[-1]["eval_perplexity"] > 1
    assert Path("out/latest").read_text().strip() == str(out.resolve())
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = small_tokenizer.encode("pain in the chest")
    assert AutoTokenizer.from_pretrained(out).encode("pain in the chest", add_special_tokens=False) == ids
    with torch.no_grad():
        ours = checkpoint.load_model(out)(torch.tensor([ids]))
        assert (ours - theirs(torch.tensor([ids])).logits).abs().max() <= 1e-4


def test_a_model_says_where_it_comes_from(flags: list[str], start: Path, dialogues: Path) -> None:
    saved = ["--save_strategy", "steps", "--save_steps", "4", "--max_steps", "4", "--data_licences", "CC0-1.0"]
    assert train.main([*flags, *saved, "--eval_fraction", "0.1"]) == 0
    (stage,) = provenance.stages_of("out")
    assert stage == provenance.stages_of("out/checkpoint-4")[0]
    (data,) = stage["data"]
    assert data["name"] == str(dialogues)
    assert data["sha256"] == hashlib.sha256(dialogues.read_bytes()).hexdigest()
    assert (data["records"], data["licence"]) == (60, "CC0-1.0")
    assert sum(stage["records"].values()) == 60
    assert stage["base"] == provenance.base_of(start)
    # A second stage, and a conversion of it, keep what came before.
    assert train.main([*flags, *LORA, "--model_name_or_path", "out", "--output_dir", "second", "--max_steps", "2"]) == 0
    assert [s["base"]["name"] for s in provenance.stages_of("second")] == [str(start), "out"]
    assert provenance.stages_of("second/adapter") == provenance.stages_of("second")
    convert = ["second", "quantised", "--to", "hf", "--dtype", "int8", "--calibration", str(dialogues)]
    assert convert_weights.main(convert) == 0
    first, second, third = provenance.stages_of("quantised")
    assert [first, second] == provenance.stages_of("second")
    assert third["base"]["manifest_sha256"] == hashlib.sha256(Path("second/manifest.json").read_bytes()).hexdigest()
    assert third["data"][0]["sha256"] == data["sha256"]


def test_how_its_data_was_cleaned_goes_along(
    flags: list[str], dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["clean", str(dialogues), "cleaned.json", "--duplicates", "0"]) == 0
    flags = [*flags, "--data_path", "cleaned.json", "--max_steps", "2"]
    assert train.main(flags) == 0
    cleaning = provenance.stages_of("out")[0]["data"][0]["cleaning"]
    assert cleaning["records"] == {"read": 60, "changed": cleaning["records"]["changed"], "written": 60}
    assert cleaning["sha256"] == provenance.sha256_of(Path("cleaned.json.report.json"))
    Path("cleaned.json.report.json").write_text("[]")
    capsys.readouterr()
    assert train.main([*flags, "--overwrite_output_dir"]) == 2
    assert "not a report of cleaning" in capsys.readouterr().err


def test_metrics_lines_hold_what_they_promise(flags: list[str]) -> None:
    assert train.main([*flags, "--max_steps", "4", "--logging_steps", "2", "--weight_decay", "0.1"]) == 0
    lines = read_metrics(Path("out/metrics.jsonl"))
    assert [line["step"] for line in lines] == [2, 4]
    speeds = ("tokens_per_s", "seconds", "data_seconds")
    for key in ("epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", *speeds):
        assert all(isinstance(line[key], int | float) for line in lines), key
    assert lines[1]["tokens"] > lines[0]["tokens"] > 0
    assert lines[0]["weights_changed"] > 0.9
    assert "bf16_weights_changed" not in lines[0]


def test_bf16_runs_say_how_little_moves_at_a_small_rate(flags: list[str]) -> None:
    small = ["--max_steps", "3", "--bf16", "True", "--lr_scheduler_type", "constant", "--learning_rate", "1e-6"]
    for optimizer in ("adamw_torch", "adamw_split"):
        assert train.main([*flags, *small, "--optim", optimizer, "--output_dir", optimizer]) == 0
        for line in read_metrics(Path(optimizer) / "metrics.jsonl"):
            assert line["weights_changed"] > 0.8
            assert line["bf16_weights_changed"] < 0.05


def test_an_output_dir_that_cannot_be_is_refused_before_anything_is_read(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    for name in ("file", "file/out"):
        assert train.main([*flags, "--output_dir", name]) == 2
        assert capsys.readouterr().err == f"error: --output_dir {name}: {Path('file').absolute()} is a file\n"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert train.main([*flags, "--output_dir", "new/out"]) == 2
    assert capsys.readouterr().err == f"error: --output_dir new/out: {Path.cwd()} may not be written to\n"


def test_a_missing_package_is_found_before_anything_is_read(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train.main([*flags, "--report_to", "wandb"]) == 2
    assert capsys.readouterr().err == "error: --report_to wandb needs the package: pip install wandb\n"
    assert not Path("out").exists()


def test_tensorboard_events_are_written(flags: list[str]) -> None:
    assert train.main([*flags, "--max_steps", "2", "--report_to", "tensorboard"]) == 0
    assert list(Path("out/tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "extra",
    [
        "--bf16 True",
        "--gradient_checkpointing True",
        "--packing epoch --max_steps 3",
        "--bf16 True --optim adamw_split",
        "--bf16 True --optim adamw_split_bf16",
        "--fsdp offload",
    ],
)
def test_ways_to_compute_agree(flags: list[str], extra: str) -> None:
    assert train.main([*flags, "--output_dir", "plain"]) == 0
    assert train.main([*flags, *extra.split()]) == 0
    if "epoch" in extra:
        assert len(losses(Path("out"))) == 3
        return
    tolerance = 3e-2 if "bf16" in extra else 0
    for (_, a, _), (_, b, _) in zip(losses(Path("plain")), losses(Path("out")), strict=True):
        assert abs(a - b) <= tolerance


def test_preview_marks_what_carries_loss(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*flags, "--preview", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("[[") == text.count("]]") == 2
    assert "Patient: " in text
    assert not Path("out/config.json").exists()


# --- ranks ----------------------------------------------------------------------------------------


def test_two_ranks_equal_one(flags: list[str], tmp_path: Path) -> None:
    """20 steps, fp32, masked prompts of unequal length, accumulation: ranks whose shares of tokens differ."""
    flags = [*flags, "--max_steps", "20", "--packing", "none"]
    one = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    assert train.main([*flags, *one, "--output_dir", "one"]) == 0
    two = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    code, err = finish(launch([*flags, *two, "--output_dir", "two"], tmp_path, ranks=2))
    assert code == 0, err
    ours, theirs = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(ours) == len(theirs) == 20
    assert max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) <= 3e-6
    a, b = checkpoint.load_model(tmp_path / "one"), checkpoint.load_model(tmp_path / "two")
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


# --- resume ---------------------------------------------------------------------------------------


def wait_for(condition: Any, process: subprocess.Popen[str], timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_run_resumes_bit_for_bit(flags: list[str], tmp_path: Path, ranks: int) -> None:
    """SIGKILL in the middle of a step, then the same flags: losses and weights equal those of a run left alone."""
    flags = [*flags, "--max_steps", "30", "--save_strategy", "steps", "--save_steps", "10", "--save_total_limit", "2"]
    code, err = finish(launch([*flags, "--output_dir", "alone"], tmp_path, ranks))
    assert code == 0, err
    process = launch(flags, tmp_path, ranks)
    metrics = tmp_path / "out/metrics.jsonl"
    saved = tmp_path / "out/checkpoint-10"
    wait_for(lambda: saved.exists() and metrics.read_text().count("\n") >= 13, process)
    if ranks:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out/config.json").exists()
    code, err = finish(launch([*flags, "--resume_from_checkpoint", "auto"], tmp_path, ranks))
    assert code == 0, err
    assert "resuming after step" in err
    assert losses(tmp_path / "out") == losses(tmp_path / "alone")
    a, b = checkpoint.load_model(tmp_path / "out"), checkpoint.load_model(tmp_path / "alone")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optim", ["adamw_split", "adamw_split_bf16"])
def test_split_weights_resume_bit_for_bit(flags: list[str], optim: str) -> None:
    flags = [*flags, "--bf16", "True", "--optim", optim, "--save_strategy", "steps", "--save_steps", "3"]
    assert train.main([*flags, "--max_steps", "6", "--output_dir", "alone"]) == 0
    assert train.main([*flags, "--max_steps", "6"]) == 0
    shutil.rmtree("out/checkpoint-6")
    assert train.main([*flags, "--max_steps", "6", "--resume_from_checkpoint", "auto"]) == 0
    assert losses(Path("out"))[-3:] == losses(Path("alone"))[-3:]
    a, b = checkpoint.load_model(Path("out")), checkpoint.load_model(Path("alone"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_kill_in_the_middle_of_a_save_loses_only_that_save(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--max_steps", "30", "--save_strategy", "steps", "--save_steps", "4"]
    process = launch(flags, tmp_path)
    out = tmp_path / "out"
    # The third save has begun when its staging directory appears; it is not done until checkpoint-12 does.
    wait_for(lambda: (out / "checkpoint-8").exists() and list(out.glob(".checkpoint-12*")), process)
    process.kill()
    process.communicate()
    code, err = finish(launch([*flags, "--resume_from_checkpoint", "auto"], tmp_path))
    assert code == 0, err
    assert re.search(r"resuming after step (8|12) ", err)
    assert not list(out.glob(".checkpoint-*"))
    assert train.main([*flags, "--output_dir", "alone"]) == 0
    assert losses(out) == losses(tmp_path / "alone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_print_the_command_that_goes_on(
    flags: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """Pasted into a shell as it is, the printed line ends the run with the losses of one that was left alone."""
    flags = [*flags, "--max_steps", "200", "--overwrite_output_dir", "True"]
    process = launch(flags, tmp_path)
    metrics = tmp_path / "out/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(number)
    code, err = finish(process)
    assert code == 0, err
    assert "Traceback" not in err
    done = len(losses(tmp_path / "out"))
    assert 3 <= done < 200
    assert f"stopped after step {done}; out/checkpoint-{done} holds the run" in err
    said = "stopping: this step is finished, then saved"
    assert err.count(said) == 1
    assert err.index(said) < err.index(f"stopped after step {done}")
    assert ("once more ends at once" in err) == (number == signal.SIGINT)
    command = re.search(r"^Go on with: (.*)$", err, re.M)[1]  # type: ignore[index]
    assert command.endswith(" --resume_from_checkpoint auto")
    assert "overwrite" not in command
    if number == signal.SIGTERM:
        assert subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=120).returncode == 0
        assert train.main([*flags, "--output_dir", "alone"]) == 0
        assert losses(tmp_path / "out") == losses(tmp_path / "alone")


def test_flags_that_changed_since_the_checkpoint_are_named(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--save_strategy", "steps", "--save_steps", "6", "--resume_from_checkpoint", "auto"]
    assert train.main(flags) == 0
    capsys.readouterr()
    assert train.main(flags) == 0
    assert "resuming after step 12" in (err := capsys.readouterr().err)
    assert "changed since then" not in err
    assert train.main([*flags, "--max_steps", "14", "--learning_rate", "2e-3"]) == 0
    err = capsys.readouterr().err
    assert "\n  changed since then: --max_steps 12 -> 14, --learning_rate 0.001 -> 0.002\n" in err


def test_ctrl_c_before_the_loop_ends_without_a_traceback(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While data is tokenised, for instance."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_data", interrupt)
    assert train.main(flags) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")


# --- under torchrun -------------------------------------------------------------------------------


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_killed_rank_is_restarted_and_the_run_goes_on_bit_for_bit(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flag asks for it. Killed before the first checkpoint it starts over, after that it goes on from the newest.

    What an earlier run left, which --overwrite_output_dir removes, must not be taken for this one's.
    """
    flags = [*flags, "--max_steps", "24", "--save_strategy", "steps", "--save_steps", "8"]
    code, err = finish(launch([*flags, "--output_dir", "alone"], tmp_path, 2))
    assert code == 0, err
    flags += ["--overwrite_output_dir", "True"]
    assert train.main([*flags, "--max_steps", "20", "--save_steps", "20", "--seed", "1"]) == 0
    monkeypatch.setenv("FAULTS", "kill:5:1:0 kill:19:0:1")
    code, err = finish(launch(flags, tmp_path, 2, "--max-restarts=2", script="tests/faults.py"))
    assert code == 0, err
    assert re.findall(r"resuming after step (\d+)", err) in (["8"], ["16"])  # 16 was under way
    assert "another rank is gone" in err
    assert losses(tmp_path / "out") == losses(tmp_path / "alone")
    a, b = checkpoint.load_model(tmp_path / "out"), checkpoint.load_model(tmp_path / "alone")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_rank_that_hangs_is_named_and_restarted(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*flags, "--save_strategy", "steps", "--save_steps", "4", "--async_save", "False", "--timeout", "4"]
    monkeypatch.setenv("FAULTS", "sleep:6:1:0")
    begin = time.monotonic()
    code, err = finish(launch(flags, tmp_path, 2, "--max-restarts=1", script="tests/faults.py"))
    assert code == 0, err
    assert time.monotonic() - begin < 60
    assert re.search(r"error: rank 1 \(\S+, process \d+\) did not arrive: it is in tests/faults.py:\d+ \(fail\)", err)
    assert err.count("did not arrive") == 1
    assert "resuming after step 4 " in err
    assert len(losses(tmp_path / "out")) == 12


def test_a_rank_that_is_frozen_is_named(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS", "freeze:6:0:0")
    process = launch([*flags, "--timeout", "3"], tmp_path, 2, script="tests/faults.py")
    wait_for(lambda: len(children(process)) == 2, process)
    frozen, _ = children(process)
    lines = []
    for line in process.stderr:  # type: ignore[union-attr]
        lines.append(line)
        if line.startswith("error: ") or "error: rank" in line:
            break
    os.kill(frozen, signal.SIGKILL)  # torchrun would wait 30 s before it does
    code, _ = finish(process)
    assert code != 0
    assert re.search(rf"error: rank 0 \(\S+, process {frozen}\) does not answer any more; it was last in", lines[-1])


def test_signal_to_torchrun_saves_once_on_all_ranks(flags: list[str], tmp_path: Path) -> None:
    """SIGTERM to the launcher and to every other process of the job, as systemd and SLURM send it."""
    flags = [*flags, "--max_steps", "300"]
    process = launch(flags, tmp_path, 2)
    metrics = tmp_path / "out/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    for pid in (*children(process), process.pid):
        os.kill(pid, signal.SIGTERM)
    code, err = finish(process)
    assert code == 1  # torchrun's own way to say that it was signalled
    done = len(losses(tmp_path / "out"))
    assert f"out/checkpoint-{done} holds the run" in err
    command = re.search(r"^Go on with: (.*)$", err, re.M)[1]  # type: ignore[index]
    want = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    assert shlex.split(command) == [*want, *flags, "--resume_from_checkpoint", "auto"]


def test_no_rank_outlives_a_killed_torchrun(flags: list[str], tmp_path: Path) -> None:
    process = launch([*flags, "--max_steps", "5000"], tmp_path, 2)
    metrics = tmp_path / "out/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    ranks = children(process)
    process.kill()
    end = time.monotonic() + 10
    while any(map(running, ranks)):
        assert time.monotonic() < end, "a rank trains on"
        time.sleep(0.05)
    finish(process)
    done = len(losses(tmp_path / "out"))
    assert (tmp_path / f"out/checkpoint-{done}/manifest.json").exists()


def test_a_second_signal_ends_a_rank_that_waits_for_another(flags: list[str], tmp_path: Path) -> None:
    """In a collective no Python handler runs; torchrun would wait 30 s and then kill."""
    process = launch([*flags, "--max_steps", "5000"], tmp_path, 2)
    metrics = tmp_path / "out/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    waiting, frozen = children(process)
    os.kill(frozen, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(waiting, signal.SIGTERM)
    time.sleep(1.2)
    assert running(waiting)
    os.kill(waiting, signal.SIGTERM)
    end = time.monotonic() + 5
    while running(waiting):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(frozen, signal.SIGKILL)
    code, _ = finish(process)
    assert code != 0


def test_a_run_of_two_ranks_goes_on_on_one_and_on_four(flags: list[str], tmp_path: Path) -> None:
    """The node is lost, or a larger one is there: at most rounding apart from the run that stayed on two."""
    flags = [*flags, "--save_strategy", "steps", "--save_steps", "8"]
    code, err = finish(launch([*flags, "--max_steps", "16", "--per_device_train_batch_size", "4"], tmp_path, 2))
    assert code == 0, err
    kept = tmp_path / "out/checkpoint-8"
    for ranks, batch in ((0, "8"), (4, "2")):
        more = ["--max_steps", "16", "--per_device_train_batch_size", batch, "--output_dir", f"on{ranks}"]
        more += ["--resume_from_checkpoint", str(kept)]
        code, err = finish(launch([*flags, *more], tmp_path, ranks)) if ranks else (train.main([*flags, *more]), "")
        assert code == 0, err
        ours, theirs = losses(tmp_path / "out")[8:], losses(tmp_path / f"on{ranks}")
        assert len(ours) == len(theirs) == 8
        assert max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) <= 2e-6


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*flags, "--save_strategy", "steps", "--save_steps", "4"]
    assert train.main(flags) == 0
    want = losses(Path("out"))
    shard = Path("out/checkpoint-12/__0_0.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    capsys.readouterr()
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    err = capsys.readouterr().err
    assert "out/checkpoint-12: passed over: out/checkpoint-12/__0_0.distcp: differs from what was written" in err
    assert "resuming after step 8 from out/checkpoint-8" in err
    assert losses(Path("out")) == want


@pytest.mark.parametrize("background", ["True", "False"])
def test_what_a_save_costs_is_logged(flags: list[str], background: str) -> None:
    assert train.main([*flags, "--save_strategy", "steps", "--save_steps", "6", "--async_save", background]) == 0
    lines = [line for line in read_metrics(Path("out/metrics.jsonl")) if "save_seconds" in line]
    assert [line["step"] for line in lines] == [6, 12]
    assert all(0 < line["save_seconds"] <= line["save_write_seconds"] for line in lines)


def test_resume_refuses_another_order(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*flags, "--save_strategy", "steps", "--save_steps", "6"]) == 0
    assert train.main([*flags, "--resume_from_checkpoint", "auto", "--seed", "1"]) == 2
    assert "seed changed: 42 in the checkpoint, 1 now" in capsys.readouterr().err


# --- adapters -------------------------------------------------------------------------------------

LORA = ["--lora_r", "4", "--lora_dropout", "0.1", "--learning_rate", "1e-2"]
LORA += ["--lora_target_modules", "q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("bits", ["16", "4"])
def test_adapters_learn_and_leave_themselves_and_a_merged_model(
    flags: list[str], start: Path, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*flags, *LORA, "--base_bits", bits, "--max_steps", "60"]) == 0
    assert "LoRA: 1,536 parameters train" in capsys.readouterr().err
    series = [loss for _, loss, _ in losses(Path("out"))]
    assert sum(series[-5:]) / 5 < 0.9 * series[0]
    base, merged = checkpoint.load_model(start), checkpoint.load_model("out")
    for (name, before), after in zip(base.named_parameters(), merged.parameters(), strict=True):
        adapted = name.endswith(("q.weight", "v.weight", "down.weight"))
        packed = bits == "4" and name.startswith("layers.") and "norm" not in name
        assert torch.equal(before, after) != (adapted or packed), name
    over_base = checkpoint.load_model(start)
    nf4.replace(over_base.layers) if bits == "4" else None
    lora_files.add_adapter(over_base, "out/adapter")
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert (over_base.eval()(tokens) - merged(tokens)).abs().max() <= 1e-5
    asked = ["--prompt", "pain", "--temperature", "0", "--max_new_tokens", "4", "--json"]
    assert generate.main(asked) == 0  # the merged model, which out/latest names
    answer = json.loads(capsys.readouterr().out)["token_ids"]
    if bits == "16":
        assert generate.main(["--checkpoint", str(start), "--adapter", "out/adapter", *asked]) == 0
        assert json.loads(capsys.readouterr().out)["token_ids"] == answer


@pytest.mark.parametrize("extra", ["", "--bf16 True --base_bits 4 --gradient_checkpointing True"])
def test_adapter_run_resumes_bit_for_bit(flags: list[str], extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Dropout too; a checkpoint holds adapters and their moments alone, and opens with its base."""
    flags = [*flags, *LORA, *extra.split(), "--lr_scheduler_type", "constant"]
    save = ["--save_strategy", "steps", "--save_steps", "6"]
    assert train.main([*flags, "--output_dir", "alone", *save]) == 0
    assert train.main([*flags, *save, "--max_steps", "6"]) == 0
    saved = Path("out/checkpoint-6")
    stored = training_state._Reader(saved).read_metadata().state_dict_metadata
    assert {name.partition(".lora_")[2][:1] or name.partition(".")[0] for name in stored} == {"A", "B", "rng"}
    assert sum(name.startswith("model.") for name in stored) == 12
    opened, finished = checkpoint.load_model(saved), checkpoint.load_model("out")
    for a, b in zip(opened.parameters(), finished.parameters(), strict=True):
        assert torch.equal(a.to(b.dtype), b) if extra == "" else (a - b).abs().max() <= 2e-2 * b.abs().max()
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert "resuming after step 6" in capsys.readouterr().err
    assert losses(Path("out")) == losses(Path("alone"))
    a, b = (load_file(Path(run) / "adapter/adapter_model.safetensors") for run in ("out", "alone"))
    assert all(torch.equal(a[key], b[key]) for key in b)
    for change, message in (
        (["--lora_alpha", "32"], "lora_alpha changed: 16 in the checkpoint, 32 now"),
        (["--lora_r", "2"], "lora_A is (4, 32) there and (2, 32) in this run"),
        (["--lora_target_modules", "all"], "does not fit this run; missing: "),
        (["--model_name_or_path", "alone"], "its adapters belong to another base than alone"),
    ):
        assert train.main([*flags, "--resume_from_checkpoint", str(saved), *change]) == 2
        assert message in capsys.readouterr().err


def test_ways_to_train_adapters_agree(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*flags, *LORA, "--lora_dropout", "0"]
    assert train.main([*flags, "--output_dir", "plain"]) == 0
    for extra in ("--gradient_checkpointing True", "--bf16 True", "--fsdp offload"):
        assert train.main([*flags, *extra.split(), "--output_dir", extra.split()[0][2:]]) == 0
        for (_, a, _), (_, b, _) in zip(losses(Path("plain")), losses(Path(extra.split()[0][2:])), strict=True):
            assert abs(a - b) <= (3e-2 if "bf16" in extra else 1e-6)
    assert train.main([*flags, "--model_name_or_path", "plain/adapter"]) == 2
    assert "has no config.json" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------


def test_non_finite_loss_stops_before_the_update(flags: list[str], start: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = checkpoint.load_model(start)
    with torch.no_grad():
        model.norm.weight.mul_(1e38)
    parts = checkpoint.load_config(start), checkpoint.load_tokenizer(start), checkpoint.load_chat_format(start)
    checkpoint.save_model(broken, model.named_parameters(), *parts)
    code, err = finish(launch([*flags, "--model_name_or_path", str(broken)], tmp_path))
    assert code == 2
    assert re.search(r"^error: the loss is (inf|nan) in the batch of records \S+dialogues\.json:\d+, ", err, re.M)
    assert "nothing was updated" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out/config.json").exists()


def test_bad_records_are_named_or_set_aside(
    flags: list[str], dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(dialogues.read_text())
    records[4]["output"] = 7
    bad = Path("bad.json")
    bad.write_text(json.dumps(records))
    flags = [*flags, "--data_path", str(bad), "--max_steps", "2"]
    assert train.main(flags) == 2
    assert re.search(r"error: bad\.json: record 5.*output", capsys.readouterr().err)
    assert train.main([*flags, "--skip_bad_records", "True"]) == 0
    rejected = [json.loads(line) for line in Path("out/rejected.jsonl").read_text().splitlines()]
    assert [r["record"] for r in rejected] == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model_name_or_path", "nowhere"], "neither a directory nor a preset"),
        (["--model_name_or_path", "7b"], "give --tokenizer_path"),
        (["--model_name_or_path", "tiny", "--lora_r", "8"], "--model_name_or_path tiny: a preset has random weights"),
        (["--data_path", "nowhere.json"], "nowhere.json"),
        (["--device", "tpu"], "not auto, cpu or cuda"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--output_dir", __file__], "test_train.py is a file"),
        (["--tokenizer_path", __file__, "--model_name_or_path", "tiny"], "not a SentencePiece model"),
    ],
)
def test_what_cannot_be_opened_is_named(
    flags: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*flags, *change]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_finished_model_is_not_overwritten_by_accident(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    save = ["--save_strategy", "steps", "--save_steps", "6"]
    assert train.main([*flags, *save]) == 0
    assert train.main(flags) == 2
    assert "already holds a trained model" in capsys.readouterr().err
    assert train.main([*flags, "--overwrite_output_dir", "--max_steps", "3"]) == 0
    assert len(losses(Path("out"))) == 3
    assert not list(Path("out").glob("checkpoint-*")), "a later resume must not find the earlier run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model_name_or_path out/checkpoint-2 --overwrite_output_dir", "--overwrite_output_dir would remove "),
        ("--model_name_or_path out --overwrite_output_dir --lora_r 4", "would replace the adapters' base"),
    ],
)
def test_what_a_run_starts_from_is_not_overwritten_by_it(
    flags: list[str], change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*flags, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]) == 0
    assert train.main([*flags, *change.split()]) == 2
    assert message in capsys.readouterr().err
    for kept in ("out/checkpoint-2", "out"):
        checkpoint.load_model(kept)


def test_a_model_that_cannot_be_named_latest_is_saved_all_the_same(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").touch()
    assert train.main([*flags, "--max_steps", "2", "--output_dir", "other"]) == 0
    assert "out/latest does not name the model: it cannot be written (File exists)" in capsys.readouterr().err
    assert checkpoint.load_model("other")


@pytest.mark.parametrize("line", ['{"loss": 1.0}', "5", "\udcff"])
def test_foreign_lines_in_the_metrics_do_not_stop_a_resume(flags: list[str], line: str) -> None:
    assert train.main([*flags, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "4"]) == 0
    with Path("out/metrics.jsonl").open("a", errors="surrogateescape") as f:
        f.write(line + "\n")
    assert train.main([*flags, "--max_steps", "6", "--resume_from_checkpoint", "auto"]) == 0
    assert [step for step, *_ in losses(Path("out"))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("rank", "local", "speaks"), [(0, 0, True), (1, 1, False), (4, 0, True)])
def test_errors_are_said_once_a_node(
    rank: int, local: int, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing on the second node alone is no error of rank 0."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert train.main(["--fp16"]) == 2
    assert ("error: --fp16" in capsys.readouterr().err) == speaks


# --- plain text and preference pairs --------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty pairs: "rest" is always chosen over "pain"."""
    path = tmp_path / "pairs.jsonl"
    lines = []
    for i in range(40):
        question, end = "fever and cough in the chest"[: 8 + i % 9], " for two days" * (i % 3)
        lines.append(json.dumps({"prompt": question, "chosen": f"rest{end}", "rejected": f"pain{end} {end}"}))
    path.write_text("\n".join(lines))
    return path


def test_a_small_preset_is_trained_from_scratch_on_a_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = synthesize.sample(dataclasses.replace(synthesize.RECIPE, n_train=1500, n_held_out=4))
    text = "\n\n".join(m.content for d in sample.train for m in d.messages)
    Path("book.txt").write_text(text)
    flags = "--model_name_or_path tiny --data_path book.txt --packing epoch --model_max_length 64 --max_steps 6"
    more = "--eval_fraction 0.2 --learning_rate 1e-3 --per_device_train_batch_size 4 --output_dir out --num_workers 1"
    assert train.main([*flags.split(), *more.split()]) == 0
    lines = read_metrics(Path("out/metrics.jsonl"))
    assert lines[-1]["eval_perplexity"] < 2000
    assert lines[0]["supervised_tokens"] > 0.9 * lines[0]["tokens"]
    assert checkpoint.load_tokenizer("out").vocab_size == checkpoint.load_config("out").vocab_size


def test_pairs_move_the_model_to_the_chosen_answers(
    flags: list[str], pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--objective", "dpo", "--data_path", str(pairs), "--eval_fraction", "0.2", "--max_steps", "30"]
    assert train.main([*flags, *more]) == 0
    assert "log-probabilities are the reference" in capsys.readouterr().err
    *lines, held = read_metrics(Path("out/metrics.jsonl"))
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "the starting model prefers nothing to itself"
    assert lines[-1]["loss"] < 0.4
    assert lines[-1]["reward_margin"] > 1
    assert lines[-1]["reward_accuracy"] == held["eval_reward_accuracy"] == 1
    assert lines[-1]["reward_margin"] == pytest.approx(lines[-1]["reward_chosen"] - lines[-1]["reward_rejected"])
    assert "eval_perplexity" not in held
    assert Path("out/reference.logprobs").exists()
    assert train.main([*flags, *more, "--overwrite_output_dir"]) == 0
    assert "log-probabilities are the reference" not in capsys.readouterr().err, "they were kept"


def test_the_reference_is_the_base_in_the_bits_that_it_has(
    flags: list[str], pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an output_dir where a run over the 16-bit base has left its reference."""
    flags = [*flags, "--objective", "dpo", "--data_path", str(pairs), "--lora_r", "4", "--max_steps", "1"]
    for bits in ("16", "4"):
        assert train.main([*flags, "--base_bits", bits, "--overwrite_output_dir"]) == 0
        assert "log-probabilities are the reference" in capsys.readouterr().err
        assert losses(Path("out"))[0][1] == pytest.approx(0.693147, abs=1e-5)


def test_two_ranks_learn_from_pairs_as_one(flags: list[str], pairs: Path, tmp_path: Path) -> None:
    flags = [*flags, "--objective", "dpo", "--data_path", str(pairs), "--max_steps", "8"]
    assert train.main([*flags, "--output_dir", "one"]) == 0
    two = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--output_dir", "two"]
    code, err = finish(launch([*flags, *two], tmp_path, ranks=2))
    assert code == 0, err
    for a, b in zip(losses(Path("one")), losses(Path("two")), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_pairs_resume_to_the_bit_and_from_the_same_reference_only(
    flags: list[str], pairs: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--objective", "dpo", "--data_path", str(pairs), "--save_strategy", "steps", "--save_steps", "4"]
    assert train.main([*flags, "--output_dir", "alone"]) == 0
    assert train.main(flags) == 0
    for path in (Path("out/checkpoint-12"), Path("out/checkpoint-8")):
        shutil.rmtree(path)
    Path("out/reference.logprobs").unlink()
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert "resuming after step 4" in capsys.readouterr().err
    assert losses(Path("out")) == losses(Path("alone"))
    other = tmp_path / "other"
    model = checkpoint.load_model(start)
    model.init_weights(1)
    parts = checkpoint.load_config(start), checkpoint.load_tokenizer(start), checkpoint.load_chat_format(start)
    checkpoint.save_model(other, model.named_parameters(), *parts)
    assert train.main([*flags, "--resume_from_checkpoint", "auto", "--model_name_or_path", str(other)]) == 2
    assert "the starting model, which is the reference, or the data set changed" in capsys.readouterr().err


# --- planned, and rehearsed -----------------------------------------------------------------------


def test_plan_is_printed_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "--plan --plan_gpus 8 --model_name_or_path 7b --data_path not_there.json --bf16 True"
    assert train.main(text.split()) == 0
    out = capsys.readouterr().out
    assert "6,738,415,616 parameters on 8 GPUs" in out
    for words in ("optimizer", "activations", "gathered weights", "141 GB   fits", "--optim adamw_split_bf16"):
        assert words in out, words
    assert list(tmp_path.iterdir()) == []
    assert train.main(["--plan", "--model_name_or_path", "nowhere"]) == 2
    assert re.fullmatch(r"error: --model_name_or_path 'nowhere' is neither a preset .*\n", capsys.readouterr().err)
    (tmp_path / "config.json").write_text("[]")
    assert train.main(["--plan", "--model_name_or_path", str(tmp_path)]) == 2
    assert "(it holds list, not an object)" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("True", True), ("no", False), ("1", True), ("3", 3), ("auto", "auto")])
def test_blocks_to_recompute_are_said_in_four_ways(text: str, value: bool | int | str) -> None:
    assert parse(["--gradient_checkpointing", text], {}).gradient_checkpointing is value or value == 3
    assert parse(["--gradient_checkpointing"], {}).gradient_checkpointing is True
    with pytest.raises(ValueError, match="must be True, False, auto or a number"):
        TrainArguments(gradient_checkpointing="some")


@pytest.mark.parametrize(
    "extra",
    ["", "--packing none --gradient_accumulation_steps 2", "--bf16 True --gradient_accumulation_steps 3"],
)
def test_rehearsal_leaves_no_trace(flags: list[str], extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses, weights and what lies in output_dir are those of a run without, on a resume too."""
    flags = [*flags, *extra.split(), "--eval_fraction", "0.1", "--gradient_checkpointing", "auto"]
    for out, rehearse in (("with", "True"), ("without", "False")):
        run = [*flags, "--output_dir", out, "--rehearse", rehearse]
        assert (
            train.main([*run, "--max_steps", "4", "--lr_scheduler_type", "constant", "--save_strategy", "epoch"]) == 0
        )
        first = capsys.readouterr().err
        again = [
            "--save_strategy",
            "steps",
            "--save_steps",
            "3",
            "--resume_from_checkpoint",
            "auto",
            "--max_steps",
            "6",
        ]
        assert train.main([*run, *again, "--lr_scheduler_type", "constant"]) == 0
        assert (
            ("rehearsed a batch of" in first) == ("rehearsed a batch of" in capsys.readouterr().err) == (out == "with")
        )
    assert losses(Path("with")) == losses(Path("without"))
    assert len(losses(Path("with"))) == 6
    a, b = checkpoint.load_model("with"), checkpoint.load_model("without")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    left = [sorted(p.name for p in Path(out).iterdir()) for out in ("with", "without")]
    assert left[0] == left[1]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_split --gradient_accumulation_steps 2"])
def test_an_evaluated_model_is_saved_with_all_its_bits(flags: list[str], optim: str) -> None:
    """The evaluation at the end leaves embedding and head gathered in bf16; what is saved are the fp32 shards."""
    text = f"--bf16 True --eval_fraction 0.1 --save_dtype float32 --max_steps 2 --optim {optim}"
    assert train.main([*flags, *text.split()]) == 0
    model = checkpoint.load_model("out")
    for p in (model.embed.weight, model.head.weight, model.layers[0].attn.q.weight):
        assert not torch.equal(p, p.bfloat16().float())


@pytest.mark.parametrize("packing", ["none", "step", "epoch"])
def test_no_batch_is_larger_than_the_rehearsed_one(start: Path, dialogues: Path, packing: Any) -> None:
    tokenizer, chat_format = checkpoint.load_tokenizer(start), checkpoint.load_chat_format(start)
    data, _, _ = loader.build([dialogues], tokenizer=tokenizer, chat_format=chat_format, max_len=64, workers=1)
    for batch, accumulation, world in ((4, 1, 1), (2, 3, 2), (32, 2, 1), (3, 2, 4)):
        parts = [
            loader.Loader(
                data, max_len=64, batch=batch, accumulation=accumulation, packing=packing, rank=rank, world=world
            )
            for rank in range(world)
        ]
        longest, times = parts[0].longest()
        for index in range(12):
            steps = [part.step(index) for part in parts]
            assert all(len(step.micro_batches) <= times for step in steps)
            for b in (b for step in steps for b in step.micro_batches):
                assert b.tokens.shape[0] <= longest.tokens.shape[0]
                assert b.tokens.shape[1] <= longest.tokens.shape[1]


@pytest.mark.parametrize("weight", [1.0, 2.0, 1.5])
def test_a_step_may_hold_its_longest_record_twice(start: Path, tmp_path: Path, weight: float) -> None:
    """At the border of two epochs, or within one of a weight above 1: it then needs a row more."""
    lines = [{"instruction": "pain " * n, "output": "rest"} for n in (72, 1, 1, 1, 1)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer, chat_format = checkpoint.load_tokenizer(start), checkpoint.load_chat_format(start)
    source = {"tokenizer": tokenizer, "chat_format": chat_format, "max_len": 160, "workers": 1}
    data, _, _ = loader.build([tmp_path / "d.jsonl"], weights=[weight], **source)
    assert 2 * data.lengths.max() > 160 > data.lengths.max() + 3 * data.lengths.min()
    part = loader.Loader(data, max_len=160, batch=4, packing="step")
    rows = [sum(b.tokens.shape[0] for b in part.step(i).micro_batches) for i in range(40)]
    assert max(rows) >= 2
    longest, times = part.longest()
    assert longest.tokens.shape[0] * times >= max(rows)


@pytest.mark.parametrize("packing", ["none", "step"])
def test_pairs_are_those_that_attention_sees(start: Path, dialogues: Path, packing: Any) -> None:
    """Counted one by one in the batches of all ranks; padding, the document after a row's last token, is none."""
    tokenizer, chat_format = checkpoint.load_tokenizer(start), checkpoint.load_chat_format(start)
    data, _, _ = loader.build([dialogues], tokenizer=tokenizer, chat_format=chat_format, max_len=64, workers=1)
    pairs, tokens = 0, 0
    for rank in range(2):
        step = loader.Loader(data, max_len=64, batch=4, accumulation=2, packing=packing, rank=rank, world=2).step(1)
        for b in step.micro_batches:
            for row, ids in zip(b.start, b.tokens, strict=True):
                real = [t for t in range(len(row)) if int(ids[t:].abs().sum())]  # padding is id 0 up to the end
                tokens += len(real)
                pairs += sum(1 for t in real for key in range(t + 1) if key >= int(row[t]))
    assert (step.attended, step.tokens) == (pairs, tokens)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=["cuda", "triton", "cublas", "python", "torch on a CPU"],
)
def test_lack_of_memory_ends_with_advice(
    flags: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(train, "train_step", fail)
    assert train.main(flags) == 2
    err = capsys.readouterr().err
    message = err[err.index("error: ") :].splitlines()
    assert message[0].startswith("error: rank 0 is out of memory (")
    assert "planned: " in message[0]
    assert any("--optim adamw_split" in line for line in message)
    assert len(message) < 14
    assert "Traceback" not in err


def test_other_errors_are_not_taken_for_it(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(train, "rehearse", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train.main(flags)


def test_a_disk_too_small_for_the_run_is_found_before_it(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for six checkpoints, and not for the model: one at a time (and the next before it goes) does."""
    one = 3 * 4 * checkpoint.load_config(flags[1]).n_params()
    usage = train.rehearsal.shutil.disk_usage(".")
    monkeypatch.setattr(train.rehearsal.shutil, "disk_usage", lambda path: usage._replace(free=int(6 * one)))
    flags = [*flags, "--save_strategy", "steps", "--save_steps", "2"]
    assert train.main(flags) == 2
    assert re.search(r"error: out: the run will write 6 checkpoint.*--save_total_limit 1", capsys.readouterr().err)
    assert not list(Path("out").glob("checkpoint-*"))
    assert train.main([*flags, "--save_total_limit", "1"]) == 0


# --- the picture ----------------------------------------------------------------------------------


def test_metrics_with_an_unfinished_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0, "lr": 0.1}]
    assert draw_loss(path, tmp_path / "loss.png")


# --- the built-in sample --------------------------------------------------------------------------


def test_builtin_model_is_asked_as_it_was_trained() -> None:
    """The prompt of a chat is what every training dialogue begins with: no instruction slips in between."""
    sample = synthesize.sample(dataclasses.replace(synthesize.RECIPE, n_train=2000, n_held_out=4))
    source = train.open_source(parse([], train.BUILTIN), sample.texts)
    dialogue = sample.train[0]
    ids, mask = render(dialogue, source.chat_format, source.tokenizer)
    asked = Dialogue((*source.chat_format.opening(), dialogue.messages[0]))
    prompt, _ = render(asked, source.chat_format, source.tokenizer)
    assert prompt == ids[: mask.index(True)]


def test_no_flags_train_the_builtin_sample_and_examine_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = dataclasses.replace(synthesize.RECIPE, n_train=2000, n_held_out=6)
    monkeypatch.setattr(synthesize.sample, "__defaults__", (small,))
    monkeypatch.setenv("COLUMNS", "80")
    assert train.main(["--max_steps", "2"]) == 0
    err = capsys.readouterr().err
    assert err.count("Patient:   ") == err.count("Reference: ") == 3
    assert len(re.findall(r"^ +0\.0% +\d+\.\d% +\d+\.\d%   \w", err, re.M)) == 3
    report = err[err.index("Patient:") :].replace(str(tmp_path), "").splitlines()
    assert max(map(len, report)) <= 80, "it wraps on a terminal of 80 columns"
    assert "held-out loss" in err
    assert len(json.loads(Path("out/tiny/examination.json").read_text())) == 3
    assert Path("out/tiny/config.json").exists()
    assert Path("out/latest").read_text().strip() == str(tmp_path / "out/tiny")
