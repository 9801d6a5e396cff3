"""How fast does decoding go, beside transformers' generate on the same random weights? And starting up?

    python bench/bench_decode.py [--shapes 15m 110m] [--dtypes float32 bfloat16] [--passes 5] [--threads 2]

Batch 1, greedy, prompt of 64 ids, 128 new tokens, passes of both interleaved; medians. Writes
bench/results/decode_cpu.json. On a shared machine run it at high priority: OpenMP threads that wait on each other
make any figure meaningless.
"""

from __future__ import annotations

import argparse
import gc
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

from llama import layout
from llama.config import PRESETS, LlamaConfig, to_hf
from llama.generation import lay_out_for_decoding, stream
from llama.model import Llama
from llama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)


def ours(model: Llama, prompt: list[int], n: int) -> tuple[float, float, list[int]]:
    """(prefill seconds, decode seconds of the n - 1 tokens after the first, ids)."""
    start = time.perf_counter()
    tokens = stream(model, prompt, GREEDY, n)
    ids = [next(tokens)]
    first = time.perf_counter()
    ids += tokens
    return first - start, time.perf_counter() - first, ids


def theirs(model: Any, prompt: list[int], n: int) -> tuple[float, float, list[int]]:
    """The same by transformers' generate, its own clock read when the first token arrives."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    clock = Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n, do_sample=False, streamer=clock
        )
    # The streamer first gets the prompt, then one token at a time.
    return clock.times[1] - start, clock.times[-1] - clock.times[1], out[0, len(prompt) :].tolist()


def hugging_face(config: LlamaConfig, model: Llama, dtype: torch.dtype) -> Any:
    """transformers' model with our weights."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    hf = LlamaForCausalLM(HFConfig(**to_hf(config), pad_token_id=0)).to(dtype).eval()
    tensors = model.state_dict()
    hf.load_state_dict({e.hf: tensors[e.name] for e in layout.entries(config)}, strict=not config.tie_embeddings)
    hf.tie_weights()
    hf.generation_config.eos_token_id = None
    return hf


def bench_shape(shape: str, dtype_name: str, passes: int, prompt_tokens: int, new: int) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    config = PRESETS[shape]
    model = Llama(config)
    model.init_weights(0)
    model = model.to(dtype).eval()
    hf = hugging_face(config, model, dtype)
    lay_out_for_decoding(model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, config.vocab_size, (prompt_tokens,), generator=generator).tolist()
    same = ours(model, prompt, 8)[2] == theirs(hf, prompt, 8)[2]
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "transformers": []}
    for _ in range(passes):
        runs["ours"].append(ours(model, prompt, new)[:2])
        runs["transformers"].append(theirs(hf, prompt, new)[:2])
    result: dict[str, Any] = {"shape": shape, "dtype": dtype_name, "first_8_ids_equal": same}
    for name, times in runs.items():
        result[name] = {
            "prefill_tokens_per_s": round(statistics.median(prompt_tokens / p for p, _ in times), 1),
            "decode_tokens_per_s": round(statistics.median((new - 1) / d for _, d in times), 1),
            "decode_passes": [round((new - 1) / d, 1) for _, d in times],
        }
    for what in ("prefill", "decode"):
        ratios = [b[what == "decode"] / a[what == "decode"] for a, b in zip(*runs.values(), strict=True)]
        result[f"{what}_ratio"] = round(statistics.median(ratios), 2)
    return result


def bench_startup(passes: int) -> dict[str, Any]:
    """Wall time of one question to a model of the tiny preset, beyond that of `import torch`."""
    from llama import checkpoint
    from llama.chat import ChatFormat
    from llama.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([f"fever {i} cough pain in the chest number {i * 37}" for i in range(200)], 300)
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
    p.add_argument("--shapes", nargs="*", default=["15m", "110m"], choices=sorted(PRESETS))
    p.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    p.add_argument("--passes", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--output", type=Path, default=RESULTS / "decode_cpu.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    results = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            results.append(bench_shape(shape, dtype, args.passes, 64, 128))
            print(json.dumps(results[-1]), flush=True)
            gc.collect()
    startup = bench_startup(args.passes)
    print(json.dumps(startup))
    write(args.output, results, prompt_tokens=64, new_tokens=128, passes=args.passes, startup=startup)


if __name__ == "__main__":
    main()
