"""How fast does decoding go, beside transformers and llama.cpp on the same random weights? And starting up?

    python bench/bench_decode.py [--shapes 15m 110m 1.1b] [--kinds float32 bfloat16 int8 int4] [--passes 5]

Batch 1, greedy, a prompt of 64 ids, 128 new tokens, every engine once in each pass; medians, and medians of the ratios
within a pass. int8 and int4 stand beside llama.cpp's Q8_0 and Q4_0, and beside transformers in bf16. llama.cpp takes
part where llama-cpp-python is installed. The memory's bandwidth is measured in each pass. Writes
bench/results/decode_cpu.json. On a shared machine run it at high priority: threads that wait on each other make any
figure meaningless.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from report import RESULTS, write

import convert_weights
from llama import checkpoint, layout
from llama.chat import ChatFormat
from llama.config import PRESETS
from llama.model import Llama
from llama.tokenizer import Tokenizer, train_tokenizer
from llama.weights import stored_bytes

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What llama.cpp calls the like of each, and its number among llama_ftype.
GGUF = {
    "float32": ("F32", 0),
    "bfloat16": ("BF16", 32),
    "int8": ("Q8_0", 7),
    "int4": ("Q4_0", 2),
    "float16": ("F16", 1),  # not among the default kinds
}
READ = 256 << 20  # bytes summed to measure the bandwidth


class Worker:
    """A process of decode_worker.py."""

    def __init__(self, engine: str, kind: str, path: Path, threads: int) -> None:
        command = [sys.executable, "-W", "ignore", str(ROOT / "bench/decode_worker.py"), engine, kind, str(path)]
        self.start = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.load_s = self._read()["load_s"]

    def ask(self, prompt: list[int], new: int) -> dict[str, Any]:
        """One answer."""
        assert self._process.stdin is not None
        print(json.dumps({"prompt": prompt, "new": new}), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def small_tokenizer() -> Tokenizer:
    return train_tokenizer([f"fever {i} cough pain in the chest number {i * 37}" for i in range(200)], 300)


def save(path: Path, shape: str, kinds: list[str]) -> None:
    """The shape's random weights, in every layout that is needed, below path."""
    config = PRESETS[shape]
    model = Llama(config)
    model.init_weights(0)
    model.to(torch.float32 if "float32" in kinds else torch.bfloat16)
    tensors = model.state_dict()
    stored = ((e.name, tensors[e.name]) for e in layout.entries(config))
    checkpoint.save_model(path / "float", stored, config, small_tokenizer(), ChatFormat("plain", ""))
    del model, tensors
    for kind in kinds:
        if kind not in FLOATS:
            _convert(path / "float", path / kind, "--dtype", kind)


def save_gguf(path: Path, kinds: list[str]) -> None:
    """The same weights for llama.cpp, quantised by its own hand."""
    import llama_cpp as lib
    from decode_worker import silence

    silence(lib)
    largest = "float32" if "float32" in kinds else "bfloat16"
    _convert(path / "float", path / f"{largest}.gguf", "--to", "gguf", "--dtype", largest)
    for kind in kinds:
        if kind != largest:
            params = lib.llama_model_quantize_default_params()
            params.ftype = GGUF[kind][1]
            params.pure = True  # every matrix in this type, as ours are
            source, target = (str(path / f"{name}.gguf").encode() for name in (largest, kind))
            if lib.llama_model_quantize(source, target, ctypes.byref(params)):
                raise RuntimeError(f"llama.cpp cannot make {kind}")


def _convert(*argv: object) -> None:
    if convert_weights.main([str(a) for a in argv]):
        raise RuntimeError(f"convert_weights.py {argv} failed")


def bandwidth(buffer: torch.Tensor) -> float:
    """Bytes a second that all threads read."""
    start = time.perf_counter()
    buffer.sum()
    return buffer.nbytes / (time.perf_counter() - start)


def bench_shape(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every engine and kind."""
    config = PRESETS[shape]
    prompt = torch.randint(3, config.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    buffer = torch.ones(READ // 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save(path, shape, args.kinds)
        engines = [("ours", k, path / ("float" if k in FLOATS else k)) for k in args.kinds]
        if args.compiled:
            engines += [("ours compiled", k, where) for _, k, where in engines if k != "bfloat16"]
        engines += [("transformers", k, path / "float") for k in args.kinds if k in FLOATS]
        if importlib.util.find_spec("llama_cpp"):
            save_gguf(path, args.kinds)
            engines += [("llama.cpp", k, path / f"{k}.gguf") for k in args.kinds]
        rows, workers = [], []
        for engine, kind, where in engines:
            worker = Worker(engine, kind, where, args.threads)
            first = worker.ask(prompt, 2)
            warm = time.perf_counter() - worker.start  # process, imports, load and the first answer's two tokens
            workers.append(worker)
            rows.append({"shape": shape, "engine": engine, "kind": kind, "warm_up_s": round(warm, 2), "passes": []})
            del first
        speeds = []
        for _ in range(args.passes):
            speeds.append(max(bandwidth(buffer) for _ in range(3)))
            for row, worker in zip(rows, workers, strict=True):
                row["passes"].append(worker.ask(prompt, args.new))
        for worker in workers:
            worker.close()
    for row in rows:
        _summarise(row, config, args, statistics.median(speeds))
    _compare(rows)
    return rows


def _summarise(row: dict[str, Any], config: Any, args: argparse.Namespace, bytes_per_s: float) -> None:
    passes = row.pop("passes")
    decode = [(args.new - 1) / p["decode_s"] for p in passes]
    row["prefill_tokens_per_s"] = round(statistics.median(args.prompt / p["prefill_s"] for p in passes), 1)
    row["decode_tokens_per_s"] = round(statistics.median(decode), 1)
    row["first_token_ms"] = round(1e3 * statistics.median(p["prefill_s"] for p in passes), 1)
    row["peak_MiB"] = round(passes[-1]["peak_bytes"] / 2**20)
    row["decode_passes"] = [round(d, 1) for d in decode]
    row["times"] = [(p["prefill_s"], p["decode_s"]) for p in passes]
    row["ids"] = passes[-1]["ids"]
    # Bytes that a token must read: every weight but the embedding's other rows; a tied one is the head.
    if row["kind"] in FLOATS:
        weights = stored_bytes(config, FLOATS[row["kind"]])
        weights -= 0 if config.tie_embeddings else weights // config.n_params() * config.vocab_size * config.dim
        row["share_of_bandwidth"] = round(row["decode_tokens_per_s"] * weights / bytes_per_s, 2)
    row["bandwidth_GB_per_s"] = round(bytes_per_s / 1e9, 1)


def _compare(rows: list[dict[str, Any]]) -> None:
    """Into our rows: how many times a peer's speed, the median over passes."""
    found = {(row["engine"], row["kind"]): row for row in rows}
    for row in rows:
        if row["engine"].startswith("ours"):
            theirs = row["kind"] if row["kind"] in FLOATS else "bfloat16"
            for peer, kind in (("transformers", theirs), ("llama.cpp", row["kind"])):
                other = found.get((peer, kind))
                if other:
                    for i, what in enumerate(("prefill", "decode")):
                        ratios = [b[i] / a[i] for a, b in zip(row["times"], other["times"], strict=True)]
                        row[f"{what}_ratio_to_{peer}"] = round(statistics.median(ratios), 2)
                    same = [a == b for a, b in zip(row["ids"], other["ids"], strict=True)]
                    row[f"ids_like_{peer}"] = same.index(False) if False in same else len(same)
    for row in rows:
        del row["times"], row["ids"]


def bench_startup(passes: int) -> dict[str, Any]:
    """Wall time of one question to a model of the tiny preset, beyond that of `import torch`."""
    tokenizer = small_tokenizer()
    config = PRESETS["tiny"].with_vocab(tokenizer.vocab_size)
    model = Llama(config)
    model.init_weights(0)
    tensors = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny"
        stored = ((e.name, tensors[e.name]) for e in layout.entries(config))
        checkpoint.save_model(path, stored, config, tokenizer, ChatFormat("dialogue", ""))
        ask = [str(ROOT / "generate.py"), "--checkpoint", str(path), "--prompt", "I have a fever."]
        ask += ["--temperature", "0", "--max_new_tokens", "60"]
        bare, whole = [], []
        for _ in range(passes):
            bare.append(seconds([sys.executable, "-c", "import torch"]))
            whole.append(seconds([sys.executable, *ask]))
    return {
        "import_torch_s": round(statistics.median(bare), 2),
        "answer_s": round(statistics.median(whole), 2),
        "beyond_import_torch_s": round(statistics.median(w - b for w, b in zip(whole, bare, strict=True)), 2),
    }


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="*", default=["15m", "110m", "1.1b"], choices=sorted(PRESETS))
    p.add_argument("--kinds", nargs="*", default=list(GGUF)[:4], choices=list(GGUF))
    p.add_argument("--passes", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compiled", action="store_true", help="our steps by torch.compile as well")
    p.add_argument("--prompt", type=int, default=64, help="ids of the prompt")
    p.add_argument("--new", type=int, default=128, help="new tokens")
    p.add_argument("--output", type=Path, default=RESULTS / "decode_cpu.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for shape in args.shapes:
        kinds = args.kinds
        if PRESETS[shape].n_params() > 5e8:  # fp32 would not fit beside its peers
            args.kinds = [k for k in kinds if k != "float32"]
        for row in bench_shape(shape, args):
            results.append(row)
            print(json.dumps(row), flush=True)
        args.kinds = kinds
    startup = bench_startup(args.passes)
    print(json.dumps(startup))
    facts = {"prompt_tokens": args.prompt, "new_tokens": args.new, "passes": args.passes, "startup": startup}
    write(args.output, results, one_line_each=True, **facts)


if __name__ == "__main__":
    main()
