"""serve.py as a process: a real model behind it, its flags, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

import serve
from data import triage
from llama import checkpoint
from llama.chat import ChatFormat, Dialogue, Message, render
from llama.config import LlamaConfig
from llama.generation import Answer
from llama.model import Llama
from llama.tokenizer import Tokenizer
from web.limits import Limits
from web.service import Service

ROOT = Path(__file__).resolve().parent.parent
KEY = "a-key-of-this-test-s-own"
QUESTION: list[Any] = [{"role": "user", "content": "I have had a cough for two days"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """A random model in a directory."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    model = Llama(LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_seq_len=512))
    greedy = {"do_sample": False, "max_new_tokens": 40}
    checkpoint.save_model(
        path, model.state_dict().items(), model.config, small_tokenizer, ChatFormat("dialogue", ""), greedy
    )
    return path


class Process:
    """serve.py, up."""

    def __init__(self, *flags: str, **environment: str) -> None:
        command = [sys.executable, "serve.py", "--port", "0", *flags]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = re.findall(r"http://\S+/(?= )", self.process.stdout.readline())[0].rstrip("/")
        self.port = int(self.url.rsplit(":", 1)[1])

    def wait(self) -> None:
        """Until the model is there."""
        deadline = time.monotonic() + 60
        while httpx2.get(self.url + "/healthz", timeout=10).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self, seconds: float = 30) -> tuple[int, str]:
        """Exit status and stderr."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


Start = Callable[..., Process]


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    started: list[Process] = []

    def run(*flags: str, **environment: str) -> Process:
        started.append(Process("--checkpoint", str(model), *flags, **environment))
        started[-1].wait()
        return started[-1]

    yield run
    for found in started:
        found.process.kill()
        with contextlib.suppress(ValueError):
            found.process.communicate()


def client(server: Process, key: str = "none needed") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=60)


def test_answers_are_those_of_the_model_alone(start: Start, model: Path) -> None:
    """Greedy and in fp32: streamed or not, alone or among others, the text of generation.py."""
    doctor, engine = serve._load(serve.parse(["--checkpoint", str(model)]), model, Service("chatdoctor", Limits()))
    engine.close(0)
    dialogue = doctor.question(QUESTION[0]["content"])
    answer = Answer(doctor.request(doctor.fit(dialogue)[0]), doctor.tokenizer)
    expected = "".join(answer.stream(doctor.model))
    found = client(start())
    texts: list[str] = []

    def ask(stream: bool) -> None:
        create = found.chat.completions.create
        if stream:
            chunks = create(model="chatdoctor", messages=QUESTION, stream=True)
            texts.append("".join(c.choices[0].delta.content or "" for c in chunks))
        else:
            said = create(model="chatdoctor", messages=QUESTION).choices[0]
            assert said.finish_reason == answer.finish_reason
            texts.append(said.message.content or "")

    threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert texts == [expected] * 8


def test_logprobs_and_what_was_read_before(start: Start) -> None:
    found = client(start())
    ask: dict[str, Any] = {"model": "chatdoctor", "messages": QUESTION, "max_tokens": 5, "logprobs": True}
    answer = found.chat.completions.create(**ask, top_logprobs=3, temperature=0)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 5
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    chunks = list(found.chat.completions.create(**ask, stream=True))
    assert sum(len(c.choices[0].logprobs.content or ()) for c in chunks if c.choices[0].logprobs) == 5
    plain = found.completions.create(model="chatdoctor", prompt="fever and cough", logprobs=2, max_tokens=3)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert [len(t) for t in logprobs.top_logprobs or ()] == [2, 2, 2]
    again = found.chat.completions.create(**ask)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_three_lines_of_the_readme(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example that README gives for the openai client, against this server instead of port 8000."""
    text = (ROOT / "README.md").read_text()
    (snippet,) = [s for s in re.findall(r"```python\n(.*?)```", text, re.S) if "OpenAI(" in s]
    printed: list[str] = []
    exec(snippet.replace("http://127.0.0.1:8000", start().url), {"print": printed.append})
    assert printed


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_finishes_what_runs(start: Start, signal_: signal.Signals) -> None:
    server = start()
    stream = client(server).chat.completions.create(
        model="chatdoctor", messages=QUESTION, stream=True, max_tokens=400, extra_body={"repetition_penalty": 1.0}
    )
    chunks = [next(iter(stream))]
    server.process.send_signal(signal_)
    refused: list[int] = []
    deadline = time.monotonic() + 10
    while not refused and time.monotonic() < deadline:
        with contextlib.suppress(httpx2.HTTPError):
            response = httpx2.post(server.url + "/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 1})
            refused += [response.status_code] if response.status_code != 200 else []
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert refused in ([503], [])  # the answer may have been there before we asked
    assert server.end()[0] == 0


def test_without_patience_what_runs_is_broken_off(start: Start) -> None:
    server = start("--patience", "0")
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        body = b'{"messages": [{"role": "user", "content": "cough"}], "stream": true, "max_tokens": 490}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        s.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        s.recv(100)
        server.process.send_signal(signal.SIGTERM)
        got = b""
        while part := s.recv(65536):
            got += part
    assert server.end()[0] == 0
    assert b"[DONE]" in got or b'"code":"stopping"' in got


def test_ends_while_it_loads(model: Path) -> None:
    server = Process("--checkpoint", str(model))
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] in (0, -signal.SIGTERM)


# --- what vLLM would serve ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpaca", "dialogue", "plain"])
def test_transformers_answers_alike(
    name: str, start: Start, model: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    """docs/serving.md: of one directory the same prompt, logits and greedy answer; the same ids of more turns."""
    import transformers

    ours = checkpoint.load_model(model).eval()
    chat_format = ChatFormat(name)  # type: ignore[arg-type]
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 30}
    checkpoint.save_model(tmp_path / "m", ours.state_dict().items(), ours.config, small_tokenizer, chat_format, greedy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    system = {"role": "system", "content": chat_format.instruction}
    prompt = tokenizer.apply_chat_template([system, *QUESTION], return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        logits = theirs(prompt["input_ids"]).logits
        assert (logits - ours(prompt["input_ids"])).abs().max() < 1e-4
        made = theirs.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
    server = Process("--checkpoint", str(tmp_path / "m"))
    try:
        server.wait()
        answer = client(server).chat.completions.create(model="chatdoctor", messages=QUESTION, logprobs=True)
    finally:
        server.process.terminate()
        server.end()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt["input_ids"].shape[1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    expected = [list(small_tokenizer.piece_bytes(i)) for i in made.tolist() if i != small_tokenizer.eos_id]
    assert [token.bytes for token in logprobs.content or ()] == expected

    turns = [*QUESTION, {"role": "assistant", "content": "Rest."}, {"role": "user", "content": "And the fever?"}]
    ids = tokenizer.apply_chat_template([system, *turns], return_dict=True)["input_ids"]
    dialogue = Dialogue(tuple(Message(m["role"], m["content"]) for m in [system, *turns]))
    assert ids == render(dialogue, chat_format, small_tokenizer)[0]


# --- flags ----------------------------------------------------------------------------------------


def failed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    try:
        status = serve.main(list(flags))
    except SystemExit as e:
        status = e.code  # type: ignore[assignment]
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_the_first_question_waits_for_no_rules(model: Path) -> None:
    """They are there before the server is ready; one without triage leaves them."""
    for wanted in (True, False):
        service = Service("chatdoctor", Limits())
        service.triage = wanted
        triage.load.cache_clear()
        serve._load(serve.parse(["--checkpoint", str(model)]), model, service)[1].close(0)
        triage.Triage()
        assert triage.load.cache_info().hits == wanted


def test_a_public_address_needs_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    monkeypatch.delenv(serve.KEY, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        assert "give the server a key" in failed(capsys, "--host", host, "--checkpoint", str(model))
    monkeypatch.setenv(serve.KEY, "short")
    assert "16 characters" in failed(capsys, "--host", "0.0.0.0", "--checkpoint", str(model))
    assert "cannot be read" in failed(capsys, "--api_key_file", str(tmp_path / "none"))


def test_a_public_address_with_a_key(start: Start, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    server = start("--host", "0.0.0.0", "--api_key_file", str(tmp_path / "key"))
    server.url = f"http://127.0.0.1:{server.port}"
    with pytest.raises(openai.AuthenticationError):
        client(server).models.list()
    assert client(server, KEY).models.list().data
    assert KEY not in " ".join(Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0"))


def test_mistakes_end_with_one_line(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    assert "no such directory" in failed(capsys, "--checkpoint", str(tmp_path / "none"))
    assert "--rows is 0" in failed(capsys, "--rows", "0")
    assert "--port is 99999" in failed(capsys, "--port", "99999")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = str(s.getsockname()[1])
        error = failed(capsys, "--checkpoint", str(model), "--port", port)
        assert f"cannot listen on 127.0.0.1, port {port}: another program does" in error


def test_a_model_that_does_not_load_ends_it(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"no")
    status, errors = Process("--checkpoint", str(tmp_path / "broken")).end(60)
    assert status == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


# --- a client that is not Python ------------------------------------------------------------------


def test_a_client_from_npm(start: Start) -> None:
    """`npm install --prefix .cache/npm openai` brings it; it is no part of make."""
    folder = ROOT / ".cache/npm"
    if shutil.which("node") is None or not (folder / "node_modules/openai").is_dir():
        pytest.skip("needs node and the npm package: npm install --prefix .cache/npm openai")
    program = """
    import OpenAI from "openai";
    const client = new OpenAI({ baseURL: process.argv[1] + "/v1", apiKey: "none", maxRetries: 0 });
    const messages = [{ role: "user", content: "I cough" }];
    const ask = { model: "chatdoctor", messages, max_tokens: 5, temperature: 0 };
    const whole = await client.chat.completions.create(ask);
    let text = "", usage = null;
    const streamed = { ...ask, stream: true, stream_options: { include_usage: true } };
    const stream = await client.chat.completions.create(streamed);
    for await (const chunk of stream) { text += chunk.choices[0]?.delta?.content ?? ""; usage = chunk.usage ?? usage; }
    let status = 0;
    try { await client.chat.completions.create({ ...ask, max_tokens: -1 }); } catch (e) { status = e.status; }
    const models = []; for await (const m of client.models.list()) models.push(m.id);
    const same = text === whole.choices[0].message.content;
    console.log(JSON.stringify([same, usage.completion_tokens, status, models]));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", program, start().url],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == '[true,5,400,["chatdoctor"]]', done.stderr
