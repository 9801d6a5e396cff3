"""How much memory and time does a conversion take? A synthetic 4 GB checkpoint of Meta's, in two shards.

    python bench/bench_convert.py [--gigabytes 4] [--folder /tmp]

Writes bench/results/convert_cpu.json. Anonymous memory (RssAnon) is what a conversion needs; resident memory
(VmHWM) also counts pages of the mapped source, which the kernel takes back whenever it wants them, so it is measured
with --no-mmap as well. `base` is the same process stopped before it opens anything: Python, torch, the package.
Needs about three times the checkpoint in free disk space.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import safetensors
import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.layout import Entry
from llama.meta_files import all_entries, write_meta

CASES = {
    "meta (2 shards) -> hf, one file": ["--to", "hf"],
    "meta (2 shards) -> hf, one file, --no-mmap": ["--to", "hf", "--no-mmap"],
    "meta (2 shards) -> hf, files of 500 MB": ["--to", "hf", "--max_shard_size", "500MB"],
    "meta (2 shards) -> hf, files of 500 MB, --no-mmap": ["--to", "hf", "--max_shard_size", "500MB", "--no-mmap"],
    "meta (2 shards) -> hf, float32": ["--to", "hf", "--dtype", "float32", "--no-mmap"],
    "meta (2 shards) -> meta (4 shards)": ["--to", "meta", "--shards", "4", "--no-mmap"],
    "meta (2 shards) -> gguf": ["--to", "gguf", "--tokenizer", "TOKENIZER", "--no-mmap"],
}


def config_of(gigabytes: float) -> LlamaConfig:
    """A LLaMA of 7B's vocabulary, half its width, and as many layers as make up the size in bfloat16."""
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / (4 * 2048**2 + 3 * 2048 * 5504)))
    return LlamaConfig(2048, layers, 16, 16, 5504, 32000, norm_eps=1e-6)


def make_source(path: Path, config: LlamaConfig) -> None:
    """Random weights in bfloat16; every tensor another part of one random block, which is quick to make."""
    block = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def tensors() -> Iterator[tuple[Entry, Tensor]]:
        for i, e in enumerate(all_entries(config)):
            n = int(torch.tensor(e.shape).prod())
            yield e, block.roll(997 * i + 1).repeat(n // len(block) + 1)[:n].view(e.shape)

    path.mkdir()
    write_meta(path, tensors(), config, 2)


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; its wall time and the peaks of its memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    anonymous = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        values = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.count(" kB")}
        anonymous = max(anonymous, 1024 * int(values.get("RssAnon", 0)))
        resident = max(resident, 1024 * int(values.get("VmHWM", 0)))
        time.sleep(0.005)
    if process.wait():
        sys.exit(f"error: {' '.join(command)} failed")
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_anonymous_mb": anonymous / 1e6, "peak_resident_mb": resident / 1e6}


def run(folder: Path, config: LlamaConfig) -> Iterator[dict[str, Any]]:
    """Each case once, the files in the page cache."""
    base = measure([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import convert_weights"])
    yield {"case": "base", **base}
    tokenizer = folder / "tokenizer.model"
    for case, flags in CASES.items():
        flags = [str(tokenizer) if f == "TOKENIZER" else f for f in flags]
        if "--tokenizer" in flags and not tokenizer.exists():
            continue
        out = folder / ("out.gguf" if "gguf" in flags else "out")
        result = measure([sys.executable, str(ROOT / "convert_weights.py"), str(folder / "meta"), str(out), *flags])
        files = [out] if out.is_file() else list(out.iterdir())
        sizes = [f.stat().st_size for f in files]
        result["output_gb"] = round(sum(sizes) / 1e9, 3)
        result["largest_output_file_mb"] = round(max(sizes) / 1e6, 1)
        result["gb_per_s"] = round(result["output_gb"] / result["seconds"], 3)
        for kind in ("anonymous", "resident"):
            result[f"{kind}_over_largest_file"] = round(result[f"peak_{kind}_mb"] * 1e6 / max(sizes), 3)
        result["anonymous_above_base_mb"] = round(result["peak_anonymous_mb"] - base["peak_anonymous_mb"], 1)
        yield {"case": case, **result}
        out.unlink() if out.is_file() else shutil.rmtree(out)


def main() -> None:
    """Make the source, run every case, write the results."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--gigabytes", type=float, default=4.0)
    p.add_argument("--folder", type=Path, default=None, help="where the files go for the while (default: the temp dir)")
    p.add_argument("--output", type=Path, default=ROOT / "bench/results/convert_cpu.json")
    args = p.parse_args()
    config = config_of(args.gigabytes)
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        shared = ROOT.parent / "shared/data/chatdoctor/tokenizer.model"
        if shared.exists():
            shutil.copyfile(shared, folder / "tokenizer.model")
        make_source(folder / "meta", config)
        for result in run(folder, config):
            results.append({k: round(v, 1) if k.endswith("_mb") else v for k, v in result.items()})
            print(json.dumps(results[-1]), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    report = {
        "command": " ".join(["python", "bench/bench_convert.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS=1",
        "load_average": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        "source": f"{config.n_params() * 2 / 1e9:.2f} GB of bfloat16 in 2 shards, {config.n_layers} layers, dim 2048",
        "seconds_include": "starting Python, checking, writing, fsync, reading back and comparing every tensor",
        "results": results,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
