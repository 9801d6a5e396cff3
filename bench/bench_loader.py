"""How fast, how lean and how full is the loader? Writes bench/results/loader_cpu.json.

    python bench/bench_loader.py [--records 200000] [--gigabyte]

Makes records of HealthCareMagic's shape (which cannot be had here): a constant instruction, a question of about 100
tokens, an answer of about 180. Every run is a process of its own; peak memory is its VmHWM. The tokenizer and the 5k
set are those of ../shared; without it a small tokenizer is trained here and the fill table is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import RESULTS, write

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data" / "chatdoctor"
sys.path.insert(0, str(ROOT))

TEXT = (
    "I have had a severe pain in my chest and left arm for the last two weeks since then the doctor gave me some "
    "antibiotics but it did not help at all please tell me what should be done about this problem because my mother "
    "is worried hello thanks for your query it seems that you are suffering from gastritis or acid reflux disease so "
    "avoid spicy food take plenty of water and an ultrasound of the abdomen blood sugar thyroid profile hypertension "
    "medication paracetamol infection inflammation headache dizziness vomiting fever cough breathing asthma allergy "
    "swelling knee shoulder spine urine kidney liver surgery consult physician regards hope this helps take care"
)
WORDS = TEXT.split()


def sentence(rng: random.Random, mean: float) -> str:
    """Words, about 1.3 tokens each, their number spread as that of real messages."""
    n = max(8, int(rng.lognormvariate(0, 0.45) * mean * 0.9))
    words = [w + ("." if rng.random() < 0.08 else "") for w in rng.choices(WORDS, k=n)]
    return " ".join(words).capitalize()


def health_care_magic(n: int) -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    instruction = "If you are a doctor, please answer the medical questions based on the patient's description."
    for _ in range(n):
        yield {"instruction": instruction, "input": sentence(rng, 74), "output": sentence(rng, 132)}


def write_array(path: Path, records: Iterator[dict[str, str]], size: int | None = None) -> int:
    """A JSON array in one line; at least `size` bytes if given."""
    n = written = 0
    with path.open("w", encoding="utf-8") as f:
        f.write("[")
        for record in records:
            written += f.write((", " if n else "") + json.dumps(record))
            n += 1
            if size and written >= size:
                break
        f.write("]")
    return n


def status(field: str) -> int:
    """A field of /proc/self/status in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) >> 10


def peak_mib() -> int:
    return status("VmHWM")


def child(kind: str, *args: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    t = time.time()
    out = subprocess.run(
        [sys.executable, __file__, "--child", kind, *args], stdout=subprocess.PIPE, check=True, text=True
    )
    return {**json.loads(out.stdout), "process_s": round(time.time() - t, 2)}


def tokenizer_bytes() -> bytes:
    if (SHARED / "tokenizer.model").exists():
        return (SHARED / "tokenizer.model").read_bytes()
    from llama.tokenizer import train_tokenizer

    return train_tokenizer([" ".join(WORDS)] * 50, 400).model_bytes


def child_load(data: str, cache: str, model: str, workers: str) -> dict[str, Any]:
    """build() to the first batch, then 200 steps of 192 records, as a training run would take them."""
    t0 = time.time()
    from data.loader import Loader, build
    from llama.chat import ChatFormat
    from llama.tokenizer import Tokenizer

    t1 = time.time()
    train, _, report = build(
        [data],
        tokenizer=Tokenizer.load(model),
        chat_format=ChatFormat(),
        max_len=512,
        eval_fraction=0.01,
        cache_dir=cache,
        workers=int(workers),
        progress=False,
    )
    t2 = time.time()
    loader = Loader(train, batch=4, accumulation=48, max_len=512)
    report.notes += loader.report()
    report.text()
    loader.step(0)
    t3 = time.time()
    after_build = peak_mib()
    for i in range(200):
        loader.step(i)
    t4 = time.time()
    loader = Loader(train, batch=4, accumulation=8, max_len=2048, packing="epoch")
    loader.step(0)
    t5 = time.time()
    return {
        "records": len(train),
        "mean_tokens": round(float(train.lengths.mean()), 1),
        "import_s": round(t1 - t0, 2),
        "build_s": round(t2 - t1, 2),
        "report_and_first_batch_s": round(t3 - t2, 2),
        "step_ms_192_records": round(1000 * (t4 - t3) / 200, 2),
        "pack_whole_epoch_2048_s": round(t5 - t4, 2),
        "epoch_fill_2048": round(loader.fill(), 4),
        "peak_mib_first_batch": after_build,
        "peak_mib_after_200_steps": peak_mib(),  # grows by the pages of the mapped cache, which the system may drop
        "own_mib_after_200_steps": status("RssAnon"),
    }


def child_read(data: str) -> dict[str, Any]:
    """Read and check every record of a file, without tokenising."""
    from data.records import read_records

    t = time.time()
    n = sum(1 for _ in read_records(data))
    return {"records": n, "bytes": Path(data).stat().st_size, "s": round(time.time() - t, 2), "peak_mib": peak_mib()}


def child_refuse(data: str) -> dict[str, Any]:
    """The first record of a file that is one endless string."""
    from data.records import BadRecord, read_records

    t = time.time()
    try:
        next(read_records(data))
    except BadRecord as e:
        return {"says": str(e).replace(data, "FILE"), "s": round(time.time() - t, 3), "peak_mib": peak_mib()}
    raise AssertionError("not refused")


def fills(model: str) -> dict[str, Any]:
    """Share of slots that hold tokens on the 5k set: micro-batches of 4 rows, 192 records (or 24 rows) a step."""
    from data.loader import PACKINGS, Loader, build
    from llama.chat import ChatFormat
    from llama.tokenizer import Tokenizer

    train, _, _ = build(
        [SHARED / "chatdoctor5k.json"],
        tokenizer=Tokenizer.load(model),
        chat_format=ChatFormat(),
        max_len=512,
        progress=False,
    )
    table = {}
    for length in (512, 2048):
        for packing in PACKINGS:
            loader = Loader(
                train, batch=4, accumulation=6 if packing == "epoch" else 48, max_len=length, packing=packing
            )
            table[f"{packing} {length}"] = round(loader.fill(10_000), 4)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gigabyte", action="store_true", help="read a 1 GB array in one line as well")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child
        print(json.dumps({"load": child_load, "read": child_read, "refuse": child_refuse}[kind](*rest)))
        return
    result: dict[str, Any] = {"load_average_at_start": os.getloadavg()[0]}  # other work lengthens every time below
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        model = tmp / "tokenizer.model"
        model.write_bytes(tokenizer_bytes())
        if SHARED.is_dir():
            result["fill_chatdoctor5k"] = fills(str(model))
        data = tmp / "healthcaremagic.json"
        write_array(data, health_care_magic(args.records))
        result["bytes"] = data.stat().st_size
        for name in ("first_run", "second_run"):
            result[name] = child("load", str(data), str(tmp / "cache"), str(model), str(args.workers))
            print(name, json.dumps(result[name]), file=sys.stderr)
        result["cache_bytes"] = sum(f.stat().st_size for f in (tmp / "cache").rglob("*") if f.is_file())
        if args.gigabyte:
            write_array(data, health_care_magic(10**9), 1 << 30)
            result["one_line_of_1_gib"] = child("read", str(data))
        with data.open("wb") as f:
            f.write(b'[{"input": "' + b"a" * (32 << 20))
            f.truncate(1 << 30)
        result["one_string_of_1_gib"] = child("refuse", str(data))
    print(json.dumps(result, indent=2))
    write(RESULTS / "loader_cpu.json", result)


if __name__ == "__main__":
    main()
