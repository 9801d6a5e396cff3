"""The commands on a CUDA device, as their users type them: what they say there agrees with what they say on a CPU.

    python -m pytest -m gpu tests/test_on_gpu.py

ON=cpu in the environment runs them on a CPU instead, to see that the tests themselves are right.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from data.conditions import load_table
from llama import checkpoint

ROOT = Path(__file__).resolve().parent.parent
ON = os.environ.get("ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
STEPS = 300 if ON == "cuda" else 20
SAMPLE = Path(tempfile.gettempdir()) / f"sample_{os.getpid()}.jsonl"
QUESTION = "Doctor, I have a burning pain when I pass urine and go very often."
GREEDY = ["--temperature", "0", "--max_new_tokens", "40", "--triage", "off"]


def run(*argv: object, limit: float = 120) -> tuple[str, str]:
    """stdout and stderr of a Python command that must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def flags_of(out: Path, device: str = ON) -> list[object]:
    """A run of train.py on SAMPLE into a folder; flags behind these count instead."""
    data: list[object] = ["--data_path", SAMPLE, "--chat_format", "dialogue", "--instruction", "", "--num_workers", 1]
    pace = ["--learning_rate", 2e-3, "--lr_scheduler_type", "constant", "--model_max_length", 128, "--max_steps", STEPS]
    return ["--model_name_or_path", "tiny", "--output_dir", out, "--device", device, *data, *pace]


def train(out: Path, *flags: object, device: str = ON) -> tuple[list[float], str]:
    """Losses of a run of train.py, and what it said."""
    _, said = run("train.py", *flags_of(out, device), *flags)
    return losses(out), said


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def answer(model: Path, *flags: object, device: str = ON, question: str = QUESTION) -> str:
    """A greedy answer of generate.py."""
    return run("generate.py", "--checkpoint", model, "--prompt", question, "--device", device, *GREEDY, *flags)[
        0
    ].strip()


@pytest.fixture(scope="module", autouse=True)
def sample() -> Iterator[None]:
    """A record for each two of a condition's symptoms."""
    with SAMPLE.open("w") as f:
        for condition in load_table().conditions:
            for a, b in itertools.combinations(condition.symptoms, 2):
                asked, told = f"Doctor, I have {a} and {b}.", f"That may be {condition.name}."
                record = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
                f.write(json.dumps({"messages": record}) + "\n")
    yield
    SAMPLE.unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], str]:
    """The tiny model after STEPS steps in fp32."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, *train(out)


@pytest.fixture(scope="module")
def model(trained: tuple[Path, list[float], str]) -> Path:
    return trained[0]


TRAINING, ANSWERS, SERVER = (pytest.mark.xdist_group(name) for name in ("training", "answers", "server"))

# --- training -------------------------------------------------------------------------------------


@TRAINING
def test_training_learns_as_on_a_cpu(trained: tuple[Path, list[float], str], tmp_path: Path) -> None:
    _, here, said = trained
    there, _ = train(tmp_path / "cpu", "--max_steps", 10, device="cpu")
    for a, b in zip(here[:5], there[:5], strict=True):
        assert a == pytest.approx(b, rel=2e-3)
    assert here[-1] < 0.7 * here[0]
    if ON == "cuda":
        assert re.search(r"kernels?: .*triton", said), said


@TRAINING
@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16", "True"],
        ["--bf16", "True", "--optim", "adamw_split"],
        ["--bf16", "True", "--optim", "adamw_split_bf16"],
        ["--gradient_checkpointing", "True"],
        ["--packing", "epoch"],
        ["--tf32", "True"],
        ["--torch_compile", "True"],
    ],
    ids=" ".join,
)
def test_ways_to_train(trained: tuple[Path, list[float], str], tmp_path: Path, flags: list[str]) -> None:
    steps = 40 if ON == "cuda" else 6
    here, _ = train(tmp_path / "out", "--max_steps", steps, *flags)
    assert len(here) == steps
    plain = trained[1][:steps]
    if "epoch" not in flags:  # which meets other records
        assert here[0] == pytest.approx(plain[0], rel=1e-2)
        assert sum(here[-5:]) == pytest.approx(sum(plain[-5:]), rel=5e-2)
    assert sum(here[-3:]) < sum(here[:3])


@TRAINING
def test_one_sharded_process_equals_a_plain_one(trained: tuple[Path, list[float], str], tmp_path: Path) -> None:
    flags = [*flags_of(tmp_path / "out"), "--max_steps", 6]
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", *flags)
    assert losses(tmp_path / "out") == pytest.approx(trained[1][:6], rel=1e-3)


@TRAINING
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    more = ["--max_steps", 40, "--save_strategy", "steps", "--save_steps", 10, "--bf16", "True"]
    train(tmp_path / "alone", *more)
    flags = [*flags_of(tmp_path / "out"), *more]
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, flags)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "out/checkpoint-20").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out/config.json").exists()
    _, said = run("train.py", *flags, "--resume_from_checkpoint", "auto")
    assert "resuming after step" in said
    assert losses(tmp_path / "out") == losses(tmp_path / "alone")
    a, b = (checkpoint.load_model(tmp_path / name) for name in ("out", "alone"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@TRAINING
@pytest.mark.parametrize("bits", [16, 4])
def test_adapters_train_and_answer(model: Path, tmp_path: Path, bits: int) -> None:
    here, _ = train(
        tmp_path / "lora", "--model_name_or_path", model, "--max_steps", 20, "--lora_r", 8, "--base_bits", bits,
        "--bf16", "True", "--learning_rate", 1e-3,
    )  # fmt: skip
    assert all(loss < 5 for loss in here)
    assert answer(model, "--adapter", tmp_path / "lora/adapter")


@TRAINING
def test_preferences_train(model: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"I have a cough, day {n}.", "chosen": "Rest and drink.", "rejected": "Surgery."})
            + "\n"
            for n in range(40)
        )
    )
    here, _ = train(
        tmp_path / "dpo", "--model_name_or_path", model, "--data_path", pairs, "--objective", "dpo", "--max_steps", 20,
        "--learning_rate", 1e-3,
    )  # fmt: skip
    assert here[0] == pytest.approx(0.6931, abs=1e-3)
    assert here[-1] < 0.5


@TRAINING
def test_memory_is_as_planned(tmp_path: Path) -> None:
    """What is planned for a GPU's memory, 4.2 GiB of tensors, is near what is used: the rehearsal says both."""
    if ON != "cuda":
        pytest.skip("no GPU")
    full = ["--packing", "epoch", "--data_weights", 8, "--per_device_train_batch_size", 2048]
    _, said = train(tmp_path / "out", *full, "--bf16", "True", "--max_steps", 3)
    used, planned = map(float, re.search(r"at most ([\d.]+) GiB of tensors \(([\d.]+) planned\)", said).groups())  # type: ignore[union-attr]
    assert used == pytest.approx(planned, rel=0.1, abs=0.15)


# --- answers --------------------------------------------------------------------------------------


@ANSWERS
def test_answers_are_those_of_a_cpu(model: Path) -> None:
    assert answer(model) == answer(model, device="cpu")


@ANSWERS
@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype", "bfloat16"],
        ["--dtype", "float16"],
        ["--kv_cache", "int8"],
        ["--speculate", "lookup"],
        ["--offload", "2"],
        ["--kernels", "torch"],
        ["--compile"],
    ],
    ids=" ".join,
)
def test_ways_to_answer(model: Path, flags: list[str]) -> None:
    here = answer(model, *flags)
    assert here.startswith("That may be ")
    if flags[0] in ("--speculate", "--offload", "--kernels", "--compile"):
        assert here == answer(model)


@ANSWERS
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_weights_answer(model: Path, tmp_path: Path, kind: str) -> None:
    group = ["--group_size", "32"] if kind == "int4" else []
    run("convert_weights.py", model, tmp_path / kind, "--dtype", kind, *group)
    assert answer(tmp_path / kind).startswith("That may be ")


@ANSWERS
def test_a_file_of_questions(model: Path, tmp_path: Path) -> None:
    """Side by side, each answer is that of the question alone."""
    questions = [QUESTION, "I have a cough.", "My knee hurts when I climb stairs and it is swollen.", "I feel dizzy."]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    run("generate.py", "--checkpoint", model, "--device", ON, "--input", source, "--output", target, *GREEDY)
    answers = [json.loads(line)["text"].strip() for line in target.read_text().splitlines()]
    assert len(answers) == len(questions)
    for question, told in zip(questions[:2], answers, strict=False):
        assert told == answer(model, question=question)


@ANSWERS
def test_figures_are_those_of_a_cpu(model: Path, tmp_path: Path) -> None:
    """How well held-out answers fit, and which name of all is the likeliest."""
    found = []
    for device in (ON, "cpu"):
        out = tmp_path / device
        run(
            "evaluate.py",
            "--checkpoint",
            model,
            "--device",
            device,
            "--suite",
            "fit,recall",
            "--limit",
            60,
            "--out",
            out,
        )
        found.append(re.findall(r'"value": ([\d.]+)', (out / "results.json").read_text()))
    here, there = (list(map(float, values)) for values in found)
    assert len(here) > 3
    assert here == pytest.approx(there, rel=2e-3, abs=0.02)


# --- the server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def server(model: Path) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--checkpoint", str(model), "--device", ON, "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def ask(url: str, question: str) -> str:
    body: dict[str, Any] = {
        "model": "chatdoctor",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 40,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


@SERVER
def test_the_server_answers_many_as_one(model: Path) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    questions = [QUESTION, "I have a cough.", "My knee hurts when I climb stairs.", "I feel dizzy."] * 4
    with server(model) as url:
        alone = [ask(url, q) for q in questions[:4]]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda q: ask(url, q), questions))
    assert together == alone * 4
    assert all(a.startswith("That may be ") for a in alone)
