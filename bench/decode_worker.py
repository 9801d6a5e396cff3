"""One process that answers with one engine and one number type, for bench_decode.py; commands and times as JSON lines.

    python bench/decode_worker.py ENGINE KIND PATH THREADS

Engines: ours (a model directory), transformers (a directory), llama.cpp (a GGUF file). A process each, so that memory
is a peer's own and no engine's threads are in another's way. stdin: {"prompt": [ids], "new": n}; stdout: seconds of
prefill (to the first token) and of the n - 1 tokens after it, and the ids, greedy.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Run = Callable[[list[int], int], tuple[float, float, list[int]]]


def ours(kind: str, path: str, threads: int, compiled: bool = False) -> Run:
    import torch

    from llama import checkpoint
    from llama.generation import Context, lay_out_for_decoding, stream
    from llama.sampling import SamplingParams

    torch.set_num_threads(threads)
    dtype = None if kind.startswith("int") else getattr(torch, kind)  # quantised: as stored
    model = checkpoint.load_model(path, dtype=dtype).eval()
    lay_out_for_decoding(model)
    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0)

    def run(prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        tokens = stream(model, prompt, greedy, new, context=Context(model, compiled))
        ids = [next(tokens)]
        first = time.perf_counter()
        ids += tokens
        return first - start, time.perf_counter() - first, ids

    return run


def transformers(kind: str, path: str, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, logging

    from bench import hugging_face

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, kind)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def run(prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        first, others, ids = hugging_face.answers(model, torch.tensor([prompt]), new)
        return first, others, ids[0].tolist()

    return run


def llama_cpp(kind: str, path: str, threads: int) -> Run:
    """llama.cpp's C interface by llama-cpp-python's bindings: none of the package's own Python per token."""
    import llama_cpp as lib
    import numpy as np

    silence(lib)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocab,)).argmax())

    def run(prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = time.perf_counter()
        ids = [step(prompt)]
        first = time.perf_counter()
        while len(ids) < new:
            ids.append(step(ids[-1:]))
        return first - start, time.perf_counter() - first, ids

    return run


_kept: list[Any] = []  # what the library calls as long as it lives


def silence(lib: Any) -> None:
    """Keep llama.cpp from writing to stderr what it is doing."""

    @lib.llama_log_callback
    def silent(level: int, text: bytes, data: Any) -> None: ...

    _kept.append(silent)
    lib.llama_log_set(silent, ctypes.c_void_p(0))


ENGINES = {
    "ours": ours,
    "ours compiled": functools.partial(ours, compiled=True),
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}


def peak_bytes() -> int:
    """Most memory that this process held; getrusage's maximum begins with that of the process it was forked from."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    engine, kind, path, threads = sys.argv[1:]
    start = time.perf_counter()
    run = ENGINES[engine](kind, path, int(threads))
    loaded = time.perf_counter() - start
    print(json.dumps({"load_s": loaded}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        prefill, decode, ids = run(command["prompt"], command["new"])
        print(
            json.dumps({"prefill_s": prefill, "decode_s": decode, "ids": ids, "peak_bytes": peak_bytes()}), flush=True
        )


if __name__ == "__main__":
    main()
