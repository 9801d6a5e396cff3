"""How fast are models and training state saved, verified and loaded, and how much memory does that take?

    python bench/bench_checkpoint.py [--out bench/results/checkpoint_cpu.json] [--repeats 3] [--directory DIR]
        [--cases save_model_fp32 ...]

A synthetic model of 271M parameters (1.08 GB in fp32), beside what safetensors and transformers do with the same
tensors; theirs neither fsync nor check anything. Every case runs in its own process. "extra" is what the peak of
resident memory adds to the resident tensors before: anonymous memory, apart from pages of mapped files, which the
kernel takes back when it needs them. "cold" drops the files from the page cache first.

train_*: 100 steps of a 15M-parameter model (0.18 GB of training state), saved after step 50 or never, on one thread;
"stall" is how long training stood still for the save, as a share of the whole. export_sharded: two ranks write the
finished model in files of 200 MB; extra memory is that of the rank that needed more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from report import RESULTS, write

from llama import parallel
from llama.chat import ChatFormat
from llama.checkpoint import load_model, model_files, save_model, save_sharded_model
from llama.config import PRESETS, LlamaConfig, to_hf
from llama.files import MANIFEST, verify
from llama.model import Llama
from llama.saver import Saved, Saver, save_training_state
from llama.training_state import load_training_state

ROOT = Path(__file__).resolve().parent.parent
CONFIG = LlamaConfig(1024, 16, 16, 16, 2816, 32000)
STATE_CONFIG = LlamaConfig(768, 8, 12, 12, 2048, 16000)  # 81M parameters: with two moments, 0.98 GB


def memory() -> tuple[int, int]:
    """Resident bytes of this process: anonymous, and pages of files."""
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return tuple(int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of work, processor seconds of all threads, and how far resident memory rose above where it stood."""
    before, peak, done = memory(), list(memory()), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for i, n in enumerate(memory()):
                peak[i] = max(peak[i], n)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    kept = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    done.set()
    watcher.join()
    del kept
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "extra_anonymous": peak[0] - before[0],
        "extra_file_pages": peak[1] - before[1],
    }


def size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def drop_cache(directory: Path) -> None:
    for p in directory.rglob("*"):
        if p.is_file():
            fd = os.open(p, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def made(config: LlamaConfig) -> Llama:
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.02, 0.02)
    return model


def state_of(model: Llama) -> dict[str, torch.Tensor]:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        tensors |= {f"optimizer.{n}.{k}": p.detach() * f for k, f in (("exp_avg", 0.1), ("exp_avg_sq", 0.01))}
    return tensors


def train_with_saves(case: str, folder: Path) -> dict[str, float]:
    """Seconds of 100 training steps with a save, and for how many of them training stood still."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = made(PRESETS["15m"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, 32000, (1, 129))
    told: list[Saved] = []
    run = folder / case
    shutil.rmtree(run, ignore_errors=True)
    saver = Saver(run, 1, background=case == "train_saves_in_background", done=told.append)
    files = model_files(PRESETS["15m"], None, ChatFormat("plain"))
    steps: list[float] = []

    def work() -> None:
        for step in range(1, 101):
            begin = time.perf_counter()
            loss, count = model(tokens[:, :-1], tokens[:, 1:])
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps.append(time.perf_counter() - begin)
            saver.poll()
            if case != "train_saves_never" and step == 50:
                tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
                for n, p in model.named_parameters():
                    tensors |= {f"optimizer.{n}.{k}": v for k, v in optimizer.state[p].items()}
                saver.save(step, tensors, {"step": step}, files)
        saver.wait()

    result = measured(work)
    stalled = sum(s.stalled for s in told)
    result |= {"stall_seconds": stalled, "stall_percent": 100 * stalled / result["seconds"]}
    result |= {"save_seconds": sum(s.seconds for s in told), "step_seconds": statistics.median(steps)}
    return result


def export_of_rank(folder: Path) -> NoReturn:
    """What export_sharded runs on each of two ranks."""
    from torch.distributed.fsdp import fully_shard

    world = parallel.init("cpu")
    model = made(CONFIG)
    for block in model.layers:
        fully_shard(block, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    result = measured(
        lambda: save_sharded_model(
            folder / "sharded", parallel.full_tensors(model), CONFIG, None, ChatFormat(), max_shard_bytes=200_000_000
        )
    )
    (folder / f"export-{world.rank}.json").write_text(json.dumps(result))  # their lines on stdout may run into another
    parallel.leave(0)


def export_sharded(folder: Path) -> dict[str, float]:
    shutil.rmtree(folder / "sharded", ignore_errors=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, __file__, "--directory", str(folder), "--case", "export_of_rank"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    ranks = [json.loads((folder / f"export-{rank}.json").read_text()) for rank in range(2)]
    return {key: max(r[key] for r in ranks) for key in ranks[0]}


def run_case(case: str, folder: Path) -> dict[str, float]:
    """One case in this process; `folder` keeps what the cases before it wrote."""
    ours, theirs, run = folder / "ours", folder / "theirs", folder / "run"
    if case == "export_of_rank":
        export_of_rank(folder)
    if case.startswith("train_"):
        path = folder / case
        result = train_with_saves(case, folder)
    elif case == "export_sharded":
        path = folder / "sharded"
        result = export_sharded(folder)
    elif case.startswith("save_model"):
        model = made(CONFIG)
        path = ours if case == "save_model_fp32" else folder / "bf16"
        dtype = torch.float32 if case == "save_model_fp32" else torch.bfloat16
        shutil.rmtree(path, ignore_errors=True)
        result = measured(
            lambda: save_model(path, model.named_parameters(), CONFIG, None, ChatFormat("plain"), dtype=dtype)
        )
    elif case == "verify":
        path = ours
        verify(path)  # warms the page cache
        result = measured(lambda: verify(path))
    elif case.startswith("load_model"):
        path = ours
        if case == "load_model_cold":
            drop_cache(path)
        elif case == "load_model_unverified":
            path = folder / "unverified"
            if not path.exists():
                shutil.copytree(ours, path)
                (path / MANIFEST).unlink()
            load_model(path)
        else:
            verify(path)
        result = measured(lambda: load_model(path))
    elif case.startswith("safetensors"):
        from safetensors.torch import load_file, save_file

        path = theirs
        path.mkdir(exist_ok=True)
        if case == "safetensors_save_file":
            tensors = {n: p.detach() for n, p in made(CONFIG).named_parameters()}
            result = measured(lambda: save_file(tensors, path / "model.safetensors"))
        else:
            result = measured(lambda: {k: v.clone() for k, v in load_file(path / "model.safetensors").items()})
    elif case.startswith("transformers"):
        import transformers

        path = folder / "transformers"
        if case == "transformers_save_pretrained":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf(CONFIG)))
            result = measured(lambda: model.save_pretrained(path))
        else:
            result = measured(lambda: transformers.AutoModelForCausalLM.from_pretrained(path))
    else:
        path = run / "checkpoint-1"
        tensors = state_of(made(STATE_CONFIG))
        if case == "save_training_state":
            shutil.rmtree(run, ignore_errors=True)
            files = model_files(STATE_CONFIG, None, ChatFormat("plain"))
            result = measured(lambda: save_training_state(run, 1, tensors, {"step": 1}, files))
        else:
            result = measured(lambda: load_training_state(path, tensors))
    result["bytes"] = size_of(path)
    return result


CASES = (
    "save_model_fp32",
    "save_model_bf16",
    "verify",
    "load_model_warm",
    "load_model_cold",
    "load_model_unverified",
    "safetensors_save_file",
    "safetensors_load_file",
    "transformers_save_pretrained",
    "transformers_from_pretrained",
    "save_training_state",
    "load_training_state",
    "train_saves_never",
    "train_saves_in_foreground",
    "train_saves_in_background",
    "export_sharded",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_cpu.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/bench_checkpoint"), help="needs 8 GB of free disk")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--case", choices=(*CASES, "export_of_rank"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.directory)))
        return
    args.directory.mkdir(parents=True, exist_ok=True)
    results = {}
    command = [sys.executable, __file__, "--directory", str(args.directory), "--case"]
    for case in args.cases:
        runs = []
        for _ in range(args.repeats):
            done = subprocess.run([*command, case], stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        seconds = statistics.median(r["seconds"] for r in runs)
        results[case] = {
            "seconds": round(seconds, 3),
            "seconds_of_each": [round(r["seconds"], 3) for r in runs],
            "cpu_seconds": round(statistics.median(r["cpu_seconds"] for r in runs), 3),
            "gigabytes": round(runs[0]["bytes"] / 1e9, 3),
            "gigabytes_per_second": round(runs[0]["bytes"] / 1e9 / seconds, 2),
            "extra_anonymous_megabytes": round(max(r["extra_anonymous"] for r in runs) / 1e6),
            "extra_file_pages_megabytes": round(max(r["extra_file_pages"] for r in runs) / 1e6),
        }
        for key in ("stall_seconds", "stall_percent", "save_seconds", "step_seconds"):
            if key in runs[0]:
                results[case][key] = round(statistics.median(r[key] for r in runs), 3)
        print(f"{case:30} {json.dumps(results[case])}", file=sys.stderr)
    shutil.rmtree(args.directory)
    write(args.out, results, repeats=args.repeats)


if __name__ == "__main__":
    main()
