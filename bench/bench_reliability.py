"""What does training survive? Kills, restarts, signals, hangs, flipped bits, full disks, in numbers that take a while.

    python bench/bench_reliability.py [--kills 100] [--resumes 3] [--restarts 20] [--signals 2] [--flips 300]
        [--points 10] [--only kills resumes ...] [--out bench/results/reliability_cpu.json]

The tests do the same a few times each. Runs are small (two layers of width 32, dropout-free, on a CPU with gloo); what
counts is whether they end with the same bits. --only keeps the other sections of the result file. tests/faults.py is
train.py with a fault at a given step, tests/llama/kills.py a saver that is killed at random moments. Full disks need
root, to mount a small one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from report import RESULTS, commit, write

from llama import checkpoint, files
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.layout import entries
from llama.model import Llama
from llama.runlog import read_metrics
from llama.saver import Saver
from llama.tokenizer import train_tokenizer
from llama.training_state import latest_training_state, load_training_state

WORDS = ["pain", "fever", "cough", "rest", "water", "chest", "head", "days", "doctor"]
STEPS = 30
BITS = LlamaConfig(64, 2, 4, 2, 128, 512)  # what bits are flipped in and disks fill up with: 1 MB


def prepare(folder: Path) -> list[str]:
    """A model to start from and dialogues, in folder; the flags of a run on them."""
    rng = random.Random(0)
    tokenizer = train_tokenizer([" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(400)], 320)
    config = LlamaConfig(32, 2, 4, 2, 48, tokenizer.vocab_size, max_seq_len=128)
    model = Llama(config)
    model.init_weights(0)
    checkpoint.save_model(folder / "start", model.named_parameters(), config, tokenizer, ChatFormat("dialogue", ""))
    records = [
        {
            "instruction": "Answer.",
            "input": " ".join(rng.choice(WORDS) for _ in range(1 + i % 7)),
            "output": " ".join(rng.choice(WORDS) for _ in range(1 + i % 5)),
        }
        for i in range(60)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    text = f"--model_name_or_path start --data_path data.json --model_max_length 64 --max_steps {STEPS} --save_steps 5"
    return (text + " --learning_rate 1e-3 --num_workers 1 --device cpu").split()


class Run:
    """train.py, or a run with faults, under torchrun; `lines` are those of stderr with the time each came."""

    def __init__(self, folder: Path, flags: list[str], ranks: int, *torchrun: str, faults: str = "") -> None:
        script = "tests/faults.py" if faults else "train.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        batch = ["--per_device_train_batch_size", str(8 // ranks)]
        self.process = subprocess.Popen(
            [*command, *torchrun, str(ROOT / script), *flags, *batch],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FAULTS": faults},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []

    def until(self, pattern: str | None) -> str | None:
        """Read on to a line that matches; None at the end of the run."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip()))
            if pattern and re.search(pattern, line):
                return line
        self.process.wait()
        return None

    def when(self, pattern: str) -> list[float]:
        return [t for t, line in self.lines if re.search(pattern, line)]

    def ranks(self) -> list[int]:
        return [int(c) for c in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in read_metrics(out / "metrics.jsonl") if "loss" in m]


def same(a: Path, b: Path) -> bool:
    """Whether two runs have the same losses, gradient norms and final weights, bit for bit."""
    if losses(a) != losses(b) or len(losses(a)) != STEPS:
        return False
    x, y = checkpoint.load_model(a), checkpoint.load_model(b)
    return all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters(), strict=True))


def alone(folder: Path, flags: list[str], ranks: int) -> Path:
    """The run that nothing happens to, once for each number of ranks."""
    out = folder / f"alone{ranks}"
    if not out.exists():
        Run(folder, [*flags, "--output_dir", out.name], ranks).until(None)
    return out


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# --- the sections ---------------------------------------------------------------------------------


def kills(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """SIGKILL at a random moment of saving over and over: one whole generation must be left, the last or the next."""
    command = [sys.executable, str(ROOT / "tests/llama/kills.py"), str(folder / "kills"), str(count)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def resumes(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """All ranks killed by one's SIGKILL in the middle of a random step; the same flags and `auto` go on."""
    rng, found = random.Random(1), {}
    for ranks in (1, 2, 4):
        equal = 0
        for trial in range(count):
            out = folder / f"resumed{ranks}-{trial}"
            mine = [*flags, "--output_dir", out.name]
            Run(folder, mine, ranks, faults=f"kill:{rng.randrange(7, STEPS)}:{rng.randrange(ranks)}:0").until(None)
            Run(folder, [*mine, "--resume_from_checkpoint", "auto"], ranks).until(None)
            equal += same(out, alone(folder, flags, ranks))
        found[f"{ranks} ranks"] = {"trials": count, "bit_identical": equal}
    return found


def worlds(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """Saved by two ranks after 10 steps, gone on with on one and on four."""
    kept, found = alone(folder, flags, 2), {}
    for ranks in (1, 4):
        out = folder / f"world{ranks}"
        mine = [*flags, "--output_dir", out.name, "--resume_from_checkpoint", f"{kept.name}/checkpoint-10"]
        Run(folder, mine, ranks).until(None)
        pairs = list(zip(losses(out), losses(kept)[10:], strict=True))
        found[f"2 -> {ranks}"] = {"steps": len(pairs), "max_loss_difference": max(abs(a[1] - b[1]) for a, b in pairs)}
    return found


def restarts(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """torchrun --max-restarts: a random rank of two killed in the middle of a step, in each of five attempts a run."""
    rng = random.Random(2)
    done = first = equal = runs = 0
    seconds: list[float] = []
    while done < count:
        each = min(5, count - done)
        steps = sorted(rng.sample(range(6, STEPS), each))
        faults = " ".join(f"kill:{s}:{rng.randrange(2)}:{a}" for a, s in enumerate(steps))
        out = folder / f"restarted{runs}"
        run = Run(folder, [*flags, "--output_dir", out.name], 2, f"--max-restarts={each}", faults=faults)
        run.until(None)
        dead, back = run.when(r"failed \(exitcode: "), run.when(r"^model: ")[1:]
        first += each if len(dead) == len(back) == each else 0  # as many restarts as deaths
        seconds += [b - d for d, b in zip(dead, back, strict=False)]
        equal += same(out, alone(folder, flags, 2))
        done, runs = done + each, runs + 1
    return {
        "kills": done,
        "came_back_at_the_first_restart": first,
        "runs": runs,
        "bit_identical": equal,
        "seconds_from_death_to_ready_median": round(statistics.median(seconds), 1),
        "seconds_from_death_to_ready_max": round(max(seconds), 1),
    }


def signals(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """Sent after a few steps; then the printed command is run as it is."""
    found = {}
    for name, number, options, to_launcher in (
        ("SIGTERM to torchrun", signal.SIGTERM, (), True),
        ("SIGTERM to one rank", signal.SIGTERM, (), False),
        ("SIGUSR1 to torchrun", signal.SIGUSR1, ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",), True),
        ("SIGUSR1 to one rank", signal.SIGUSR1, (), False),
    ):
        lost, equal, codes = [], 0, []
        for trial in range(count):
            out = folder / f"{name.replace(' ', '-')}{trial}"
            run = Run(folder, [*flags, "--output_dir", out.name], 2, *options, faults="none:0:0:9")
            while len(losses(out)) < 3 and run.process.poll() is None:
                time.sleep(0.005)
            os.kill(run.process.pid if to_launcher else run.ranks()[1], number)
            run.until(None)
            codes.append(run.process.returncode)
            latest = latest_training_state(out)
            lost.append(len(losses(out)) - int(latest.name.split("-")[1]) if latest else -1)
            command = next((line for _, line in run.lines if line.startswith("Go on with: ")), "")
            if command:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                words = shlex.split(command.removeprefix("Go on with: "))
                subprocess.run(words, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
            equal += same(out, alone(folder, flags, 2))
        found[name] = {"trials": count, "steps_lost": lost, "exit_codes": codes, "bit_identical_after": equal}
    return found


def hangs(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """A rank that sleeps, one that is frozen, and a launcher that is killed."""
    found: dict[str, Any] = {}
    for kind in ("sleep", "freeze"):
        out = folder / kind
        run = Run(
            folder, [*flags, "--output_dir", kind, "--timeout", "10"], 2, "--max-restarts=1", faults=f"{kind}:13:1:0"
        )
        while len(losses(out)) < 12 and run.process.poll() is None:
            time.sleep(0.01)
        stood = time.monotonic()
        run.until(None)
        found[f"rank that {kind}s"] = {
            "named": bool(run.when(r"error: rank 1 \(")),
            "timeout": 10,
            "seconds_to_be_named": round(run.when("error: rank")[0] - stood, 1),
            "seconds_to_be_ready_again": round(run.when("^model: ")[1] - stood, 1),
            "bit_identical": same(out, alone(folder, flags, 2)),
        }
    left = []
    for trial in range(count):
        out = folder / f"orphans{trial}"
        run = Run(folder, [*flags, "--output_dir", out.name, "--max_steps", "5000"], 2)
        while len(losses(out)) < 5 and run.process.poll() is None:
            time.sleep(0.01)
        ranks, begin = run.ranks(), time.monotonic()
        run.process.kill()
        while any(map(running, ranks)) and time.monotonic() - begin < 10:
            time.sleep(0.05)
        left.append(sum(map(running, ranks)))
        run.until(None)
    found["ranks 10 s after the kill -9 of torchrun"] = left
    return found


def state_tensors(g: int) -> dict[str, torch.Tensor]:
    return {f"model.{e.name}": torch.full(e.shape, float(g)) for e in entries(BITS)}


def save_state(path: Path, g: int, background: bool = False) -> None:
    saver = Saver(path, background=background)
    saver.save(g, state_tensors(g), {"step": g}, checkpoint.model_files(BITS, None, ChatFormat()))
    saver.wait()


def save_export(path: Path, g: int) -> None:
    tensors = ((k.removeprefix("model."), v) for k, v in state_tensors(g).items())
    checkpoint.save_model(path / "export", tensors, BITS, None, ChatFormat(), max_shard_bytes=200_000)


def fails(work: Callable[[], object]) -> str:
    try:
        work()
    except ValueError as e:
        return str(e)
    return ""


def flips(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """One bit of one file, anywhere in a training state or an exported model; loading must refuse and name the file."""
    rng, found = random.Random(3), {}
    save_state(folder / "bits", 1)
    save_export(folder / "bits", 1)
    into = state_tensors(0)
    for kind, path, load in (
        ("training state", folder / "bits/checkpoint-1", lambda p: load_training_state(p, into)),
        ("exported model", folder / "bits/export", checkpoint.load_model),
    ):
        names = sorted(p for p in path.iterdir() if p.name != files.MANIFEST)
        refused = 0
        for trial in range(count):
            file = names[trial % len(names)]
            data = bytearray(file.read_bytes())
            where, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
            data[where] ^= bit
            file.write_bytes(data)
            refused += str(file) in fails(lambda path=path, load=load: load(path))
            data[where] ^= bit
            file.write_bytes(data)
        load(path)
        found[kind] = {"flips": count, "refused_and_named": refused}
    return found


def disks(folder: Path, flags: list[str], count: int) -> dict[str, Any]:
    """The disk fills up when so many tenths of a save are written, after the check of free space."""
    disk = folder / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        return {"not measured": done.stderr.strip()}
    need_space, found = files.need_space, {}
    try:
        for kind, work in (
            ("save", lambda: save_state(disk, 2)),
            ("save in the background", lambda: save_state(disk, 2, background=True)),
            ("export", lambda: save_export(disk, 2)),
        ):
            save_state(disk, 1)
            save_export(disk, 1)
            before = sorted(str(p.relative_to(disk)) for p in disk.rglob("*"))
            size = sum(p.stat().st_size for p in (disk / "checkpoint-1").iterdir())
            stopped = whole = 0
            for point in range(count):
                files.need_space = lambda *_: None
                with open(disk / "ballast", "wb") as f:
                    room = size * point // count // 4096 * 4096
                    os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(disk).free - room)
                stopped += bool(re.search("the disk is full|No space left", fails(work)))
                (disk / "ballast").unlink()
                files.need_space = need_space
                left = sorted(str(p.relative_to(disk)) for p in disk.rglob("*"))
                load_training_state(disk / "checkpoint-1", tensors := state_tensors(0))
                model = checkpoint.load_model(disk / "export")
                values = {v for t in (*tensors.values(), *model.parameters()) for v in t.unique().tolist()}
                whole += left == before and values == {1.0}
            found[kind] = {"points": count, "stopped_and_said_so": stopped, "earlier_whole_and_nothing_left": whole}
            shutil.rmtree(disk / "checkpoint-1")
            shutil.rmtree(disk / "export")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return found


# Section, its flag, and what the flag is when not given.
SECTIONS: dict[str, tuple[Callable[[Path, list[str], int], dict[str, Any]], str, int]] = {
    "kills": (kills, "kills", 100),
    "resumes": (resumes, "resumes", 3),
    "worlds": (worlds, "resumes", 3),
    "restarts": (restarts, "restarts", 20),
    "signals": (signals, "signals", 2),
    "hangs": (hangs, "signals", 2),
    "flips": (flips, "flips", 300),
    "disks": (disks, "points", 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {flag: default for _, flag, default in SECTIONS.values()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if args.only != list(SECTIONS) and args.out.exists():
        results = json.loads(args.out.read_text())["results"]
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        flags = prepare(Path(name))
        for section in args.only:
            work, flag, _ = SECTIONS[section]
            begin = time.perf_counter()
            results[section] = {"commit": commit(), **work(Path(name), flags, getattr(args, flag))}
            took = time.perf_counter() - begin
            print(f"{section} ({took:.0f} s): {json.dumps(results[section])}", file=sys.stderr, flush=True)
            write(args.out, results)


if __name__ == "__main__":
    main()
