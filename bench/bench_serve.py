"""How many tokens a second does serve.py give 1, 4 and 16 clients over HTTP, and how long do they wait, beside peers?

    python bench/bench_serve.py [--shapes 15m 110m] [--dtypes float32] [--passes 3] [--clients 1 4 16] [--threads 1]
        [--llama_server FILE] [--llama_cpp_python PATHS]

Random weights and a tokenizer of the shape's size; every server has the same model (the peers as GGUF, keys and values
in the same type) and so many threads, is a process of its own and is asked in turn within a pass: the same questions
about the built-in table's conditions, new ones in every pass, behind ChatDoctor's template (170 tokens together, of
which all share 115); greedy; every answer goes on to --tokens. A client streams /v1/chat/completions and sends its next
question when it has its answer; all clients are one process, which needs a core beside the servers' threads. Figures
are the clients': tokens of all answers over the whole time, seconds to the first text, and between two pieces of an
answer; "own" counts the seconds of processor that the server used, which other work on the machine disturbs less.
Medians of the passes; ratios within a pass.

The peers are llama.cpp's own server, which batches continuously (--llama_server; default: the one on PATH), and
llama-cpp-python's, which answers one request after the other (--llama_cpp_python: the PYTHONPATH that it is found
under). Writes bench/results/serve_cpu.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx2
import torch

import convert_weights
from bench import report
from bench.models import tokenizer_of_size
from data.conditions import load_table
from data.synthesize import examples
from llama import checkpoint, layout
from llama.chat import ChatFormat
from llama.config import PRESETS
from llama.model import Llama

CONTEXT = 512  # tokens of a row, prompt and answer
KV = {"float32": ("f32", 0), "float16": ("f16", 1), "bfloat16": ("bf16", 30)}  # llama.cpp's names and numbers of types
# llama-cpp-python's server punishes repetition unless told otherwise; ours takes the model's word for it, GREEDY.
UNPUNISHED = {"llama.cpp": {"repeat_penalty": 1.0}, "llama-cpp-python": {"repeat_penalty": 1.0}}
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
START_TIME = 120.0  # seconds that a server gets until it answers


@dataclass
class Server:
    """One that is up."""

    name: str
    url: str
    process: subprocess.Popen[str]

    def own_seconds(self) -> float:
        """Of processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Heard:
    """An answer as its client heard it; times in seconds."""

    text: str = ""
    first: float = 0.0  # to the first text
    between: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None  # where the server says so


# --- servers --------------------------------------------------------------------------------------


def save(folder: Path, shape: str, dtype: str) -> None:
    """Random weights that never end an answer: as a directory, and as GGUF."""
    config = PRESETS[shape]
    texts = [text for e in examples(load_table(), 0, 2000) for text in (e.question, e.answer)]
    tokenizer, first = tokenizer_of_size(config.vocab_size, texts)
    model = Llama(config)
    model.init_weights(0)
    with torch.no_grad():  # neither the end nor half a character
        (model.embed if config.tie_embeddings else model.head).weight[:first] = 0
    stored = [(e.name, model.state_dict()[e.name]) for e in layout.entries(config)]
    kind = getattr(torch, dtype)
    checkpoint.save_model(folder / "model", stored, config, tokenizer, ChatFormat(), GREEDY, dtype=kind)
    argv = [str(folder / "model"), str(folder / "model.gguf"), "--to", "gguf", "--dtype", dtype]
    if convert_weights.main(argv):
        raise RuntimeError("convert_weights.py failed")


def commands(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The servers: name -> command, but for its port, and what it has in its environment."""
    rows, threads = max(args.clients), str(args.threads)
    name, number = KV[dtype]
    single = {"OMP_NUM_THREADS": threads}
    gguf = str(folder / "model.gguf")
    ours = [sys.executable, str(ROOT / "serve.py"), "--checkpoint", str(folder / "model"), "--rows", str(rows)]
    found = {"ours": (ours, single)}
    if args.llama_server:
        command = [args.llama_server, "-m", gguf, "-t", threads, "-tb", threads, "-np", str(rows)]
        command += ["-c", str(rows * CONTEXT), "-ctk", name, "-ctv", name, "--no-ui", "--offline"]
        found["llama.cpp"] = (command, single)
    if args.llama_cpp_python:
        command = [sys.executable, "-m", "llama_cpp.server", "--model", gguf, "--n_ctx", str(CONTEXT)]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--type_k", str(number)]
        command += ["--type_v", str(number), "--interrupt_requests", "False"]
        found["llama-cpp-python"] = (command, {**single, "PYTHONPATH": args.llama_cpp_python})
    return found


@contextmanager
def running(name: str, command: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """Start it; it has answered once. RuntimeError with the end of its log if it does not."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env={**os.environ, **environment}, stdout=log, stderr=log, text=True
        )
        server = Server(name, f"http://127.0.0.1:{port}", process)
        try:
            deadline = time.monotonic() + START_TIME
            while not answers(server):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{name} does not answer:\n{log.read()[-2000:]}")
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait(60)


def answers(server: Server) -> bool:
    try:
        return httpx2.post(server.url + "/v1/chat/completions", json=body("Hello.", 2), timeout=60).status_code == 200
    except httpx2.TransportError:
        return False


# --- clients --------------------------------------------------------------------------------------


def body(question: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": tokens, **more}


async def ask(client: httpx2.AsyncClient, server: Server, question: str, tokens: int) -> Heard:
    """One answer, streamed. RuntimeError if it has not all its tokens."""
    heard, times, reason = Heard(), [time.perf_counter()], None
    more = UNPUNISHED.get(server.name, {})
    asked = body(question, tokens, stream=True, stream_options={"include_usage": True}, **more)
    async with client.stream("POST", server.url + "/v1/chat/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event.get("choices", ()):
                if text := choice["delta"].get("content"):
                    times.append(time.perf_counter())
                    heard.text += text
                reason = choice["finish_reason"] or reason
            if usage := event.get("usage"):
                heard.prompt_tokens = usage["prompt_tokens"]
    if reason != "length" or len(times) < 2:
        raise RuntimeError(f"{server.name} ended an answer by {reason} after {heard.text[-80:]!r}")
    heard.first, *heard.between = [b - a for a, b in pairwise(times)]
    return heard


async def load(server: Server, questions: Sequence[str], clients: int, tokens: int) -> tuple[float, list[Heard]]:
    """So many clients, each with its share of the questions: the seconds that took, and the answers in order."""
    heard: dict[int, Heard] = {}
    # A connection a question: llama.cpp's server closes one behind a stream without a word, ours would keep it.
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as connections:

        async def one(first: int) -> None:
            for i in range(first, len(questions), clients):
                heard[i] = await ask(connections, server, questions[i], tokens)

        began = time.perf_counter()
        await asyncio.gather(*map(one, range(clients)))
        return time.perf_counter() - began, [heard[i] for i in range(len(questions))]


def once(server: Server, questions: Sequence[str], clients: int, tokens: int) -> tuple[dict[str, float], list[Heard]]:
    """A load's figures."""
    used = server.own_seconds()
    seconds, heard = asyncio.run(load(server, questions, clients, tokens))
    used = server.own_seconds() - used
    made = tokens * len(questions)
    figures = {"tokens_per_s": made / seconds, "tokens_per_own_s": made / max(used, 1e-9)}
    for what, times in (("first", [h.first for h in heard]), ("between", [t for h in heard for t in h.between])):
        figures |= {f"{what}_ms_p{p}": 1e3 * report.percentile(times, p) for p in (50, 95)}
    return figures, heard


# --- the table ------------------------------------------------------------------------------------


def measure(servers: Sequence[Server], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each server and number of clients; the first server is compared with the others."""
    passes: dict[tuple[str, int], list[dict[str, float]]] = {}
    alike: dict[str, list[bool]] = {server.name: [] for server in servers}
    prompts: dict[str, list[int]] = {server.name: [] for server in servers}
    for i in range(args.passes):
        for clients in args.clients:
            drawn = examples(load_table(), 1000 * i + clients, max(args.least, clients * args.each))
            questions = [e.question for e in drawn]
            texts: list[str] = []
            for server in servers:
                figures, heard = once(server, questions, clients, args.tokens)
                passes.setdefault((server.name, clients), []).append(figures)
                texts = texts or [h.text.strip() for h in heard]
                alike[server.name] += [a == h.text.strip() for a, h in zip(texts, heard, strict=True)]
                prompts[server.name] += [h.prompt_tokens for h in heard if h.prompt_tokens is not None]
    first, *peers = (server.name for server in servers)
    rows: list[dict[str, Any]] = []
    for (name, clients), found in passes.items():
        row: dict[str, Any] = {"server": name, "clients": clients}
        row["prompt_tokens"] = round(statistics.mean(prompts[name])) if prompts[name] else None
        row |= {figure: round(statistics.median(f[figure] for f in found), 2) for figure in found[0]}
        row["times_one_client"] = ratios(found, passes[name, args.clients[0]])
        if name == first:
            row |= {f"times_{peer}": ratios(found, passes[peer, clients]) for peer in peers}
        else:
            row[f"answers_like_{first}"] = round(sum(alike[name]) / len(alike[name]), 3)
        rows.append(row)
    return rows


def ratios(a: list[dict[str, float]], b: list[dict[str, float]]) -> list[float]:
    """Of tokens a second, pass by pass, in order of size."""
    return sorted(round(x["tokens_per_s"] / y["tokens_per_s"], 2) for x, y in zip(a, b, strict=True))


def bench(shape: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        save(Path(name), shape, dtype)
        found = commands(Path(name), dtype, args)
        servers = [stack.enter_context(running(name, *how)) for name, how in found.items()]
        for server in servers:  # what is made or compiled at first use
            once(server, ["I have a cough."] * max(args.clients), max(args.clients), 8)
        rows = measure(servers, args)
    return {"shape": shape, "dtype": dtype, "rows": rows}


def versions(args: argparse.Namespace) -> dict[str, str]:
    """What the peers call themselves."""
    found = {}
    if args.llama_server:
        done = subprocess.run([args.llama_server, "--version"], capture_output=True, text=True, check=True)
        found["llama.cpp"] = " ".join((done.stdout + done.stderr).split())
    if args.llama_cpp_python:
        code = "import llama_cpp; print(llama_cpp.__version__)"
        environment = {**os.environ, "PYTHONPATH": args.llama_cpp_python}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found["llama-cpp-python"] = re.sub(r"\s+", " ", done.stdout).strip()
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = report.parser(__doc__, shapes=["15m", "110m"], dtypes=["float32"], passes=3)
    p.set_defaults(threads=1)
    p.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16])
    p.add_argument("--tokens", type=int, default=64, help="of an answer")
    p.add_argument("--each", type=int, default=2, help="questions of a client")
    p.add_argument("--least", type=int, default=6, help="questions of all clients, where there are few clients")
    p.add_argument("--llama_server", metavar="FILE", default=shutil.which("llama-server"))
    p.add_argument("--llama_cpp_python", metavar="PATHS")
    return p.parse_args(argv)


def main() -> None:
    args = arguments()
    facts = {"tokens": args.tokens, "each": args.each, "least": args.least, "peers": versions(args)}
    report.run(args, bench, "serve_cpu.json", **facts)


if __name__ == "__main__":
    main()
