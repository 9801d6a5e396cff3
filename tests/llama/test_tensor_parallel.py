"""Two ranks answer as one process does, each holding half; through generate.py under torchrun as well."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import checkpoint, layout, tensor_parallel
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.model import Llama
from llama.quantize import Scheme, nearest
from llama.tokenizer import Tokenizer
from llama.weights import is_quantised
from tests.llama import split

ROOT = Path(__file__).resolve().parents[2]


def save(path: Path, config: LlamaConfig, tokenizer: Tokenizer, dtype: torch.dtype, scheme: Scheme | None) -> Path:
    """A random model in a directory, with weights so large that no choice is a close call."""
    model = Llama(config)
    model.init_weights(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 12)
        (model.embed if config.tie_embeddings else model.head).weight[tokenizer.eos_id] = 0
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    named = (
        (e.name, nearest(tensors[e.name], scheme) if scheme and is_quantised(e) else tensors[e.name])
        for e in layout.entries(config)
    )
    fmt = ChatFormat("dialogue", "Be kind.")
    checkpoint.save_model(path, named, config, tokenizer, fmt, dtype=dtype, scheme=scheme)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """Grouped queries, and a vocabulary that no number of ranks shares evenly."""
    folder = tmp_path_factory.mktemp("models")
    size: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "max_seq_len": 160}
    V = small_tokenizer.vocab_size + 1
    plain, tied = LlamaConfig(**size, vocab_size=V), LlamaConfig(**size, vocab_size=V, tie_embeddings=True)
    save(folder / "fp32", plain, small_tokenizer, torch.float32, None)
    save(folder / "tied", tied, small_tokenizer, torch.float32, None)
    save(folder / "bf16", plain, small_tokenizer, torch.bfloat16, None)
    save(folder / "int8", plain, small_tokenizer, torch.bfloat16, Scheme(8, 0))
    save(folder / "int4", plain, small_tokenizer, torch.bfloat16, Scheme(4, 32))
    odd = LlamaConfig(**{**size, "n_kv_heads": 1}, vocab_size=V)
    save(folder / "odd", odd, small_tokenizer, torch.float32, None)
    return folder


@pytest.fixture(scope="module")
def ranks(models: Path) -> list[dict[str, Any]]:
    """What split.py found on each of two ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "tests/llama/split.py"), str(models)]
        environment = {**os.environ, **env, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    outputs = [p.communicate(timeout=280) for p in processes]
    for p, (_, errors) in zip(processes, outputs, strict=True):
        assert p.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize("name", ["fp32", "tied", "bf16", "int8", "int4"])
def test_two_ranks_answer_as_one(name: str, models: Path, ranks: list[dict[str, Any]]) -> None:
    """fp32: the same ids. Else the same on both ranks, and logits within what 16 bits and the int8 head round off."""
    one, two = split.alone(models / name), [r[name] for r in ranks]
    assert two[0]["ids"] == two[1]["ids"]
    assert two[0]["from_codes"] == two[1]["from_codes"]
    assert two[0]["from_codes"][:3] == one["from_codes"][:3]
    assert two[0]["logits"] == two[1]["logits"]
    logits, want = torch.tensor(two[0]["logits"]), torch.tensor(one["logits"])
    error = (logits - want).abs().max() / want.abs().max()
    if name in ("fp32", "tied"):
        assert two[0]["ids"] == one["ids"]
        assert error < 1e-5
    else:
        assert error < 0.05
        assert two[0]["ids"][0][:3] == one["ids"][0][:3]
    for rank in two:
        assert rank["cache_heads"] == 1
        assert one["held"] / 2 <= rank["held"] < 0.53 * one["held"]  # norms are whole
        if name in ("fp32", "tied", "bf16"):
            assert rank["read"] == rank["held"]


def test_heads_that_do_not_divide(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        says = "2 ranks cannot share 1 key/value heads, a width of 64 and an MLP of 128 evenly: --nproc_per_node 1"
        assert rank["odd"]["error"] == says


def test_counts_that_may_share() -> None:
    config = LlamaConfig(64, 2, 8, 4, 192, 100)
    tensor_parallel.check(config, 4)
    tensor_parallel.check(config, 2, Scheme(4, 32))
    with pytest.raises(ValueError, match=r"8 ranks cannot share 4 key/value heads.* evenly: --nproc_per_node 1, 2, 4"):
        tensor_parallel.check(config, 8)
    with pytest.raises(ValueError, match="in groups of 64 evenly: --nproc_per_node 1"):
        tensor_parallel.check(config, 2, Scheme(4, 64))


# --- the command line -----------------------------------------------------------------------------


def launch(argv: list[str], cwd: Path, ranks: int = 2) -> subprocess.Popen[bytes]:
    """generate.py alone (ranks 0) or under torchrun."""
    run = [sys.executable]
    if ranks:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": str(cwd / "error.json")}
    pipe = subprocess.PIPE
    command = [*run, str(ROOT / "generate.py"), *argv]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


def generate(argv: list[str], cwd: Path, ranks: int = 2, stdin: bytes = b"") -> tuple[int, str, str]:
    process = launch(argv, cwd, ranks)
    out, err = process.communicate(stdin, timeout=280)
    return process.returncode, out.decode(), err.decode()


def test_a_chat_and_a_file(models: Path, tmp_path: Path) -> None:
    """Sampled; the terminal and the files are rank 0's alone."""
    flags = ["--checkpoint", str(models / "fp32"), "--seed", "3", "--max_new_tokens", "12"]
    results = []
    for ranks in (0, 2):
        here = tmp_path / str(ranks)
        here.mkdir()
        stdin = b"I cough\nmy head\n/retry\n" + b"and the back and the chest have pain\n" * 6 + b"/save chat.json\n"
        code, out, err = generate(flags, here, ranks, stdin)
        assert code == 0, err
        assert err.count("not medical advice") == 1
        assert err.count("saved 16 messages to chat.json") == 1
        assert "turns are left out" in err
        assert (", split over 2 ranks" in err) == (ranks == 2)
        results.append((out, (here / "chat.json").read_text()))
    assert results[0] == results[1]
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "I cough"}\n{}\n{"prompt": "pain in the back and the head"}\n{"prompt": "fever"}\n')
    for ranks in (0, 2):
        argv = ["--input", str(source), "--output", f"out{ranks}.jsonl", "--batch_size", "2"]
        code, out, err = generate([*flags, *argv], tmp_path, ranks)
        assert code != 0
        assert "3 of 4 lines answered, 1 rejected" in err
        assert err.count("line 2: ") == 1
    one, two = ([json.loads(s) for s in (tmp_path / f"out{r}.jsonl").read_text().splitlines()] for r in (0, 2))
    assert [a.get("token_ids") for a in one] == [a.get("token_ids") for a in two]
    assert len(two) == 4


def test_a_mistake_is_said_once(models: Path, tmp_path: Path) -> None:
    code, out, err = generate(["--checkpoint", str(models / "odd"), "--prompt", "x"], tmp_path)
    assert (code, out) == (1, "")  # torchrun's own way to say that a rank failed
    assert err.count("error: 2 ranks cannot share") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "generate.py") not in err


@pytest.mark.parametrize("when", ["answering", "waiting", "leaving"])
def test_ctrl_c_ends_every_rank(when: str, models: Path, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    config = LlamaConfig(64, 2, 4, 2, 128, small_tokenizer.vocab_size, max_seq_len=60_000)
    path = save(tmp_path / "long", config, small_tokenizer, torch.float32, None)
    process = launch(["--checkpoint", str(path), "--max_new_tokens", "50000", "--temperature", "1"], tmp_path)
    stdin, process.stdin = process.stdin, None  # or communicate() would close it: the end of the chat, before Ctrl-C
    assert stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    if when == "answering":
        stdin.write(b"I cough\n")
        stdin.flush()
        process.stdout.read(20)
    else:
        while b"local emergency number" not in process.stderr.readline():
            assert process.poll() is None
    if when == "leaving":
        stdin.close()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - begin < 29, "torchrun had to kill"
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in children)
    assert b'generate.py", line' not in err  # torchrun's own traceback alone
    stdin.close()
