"""What a run trains on, as train.py's flags say: texts for a tokenizer, the data sets, this rank's batches.

Called by train.py; knows flags and files, no model and no process group.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data import loader, synthesize
from data.cache import content_hash
from data.conditions import SAMPLE
from data.records import BadRecord, RejectedFile, read_records
from llama import provenance
from llama.arguments import TrainArguments
from llama.chat import ChatFormat
from llama.tokenizer import Tokenizer

TOKEN_CACHE = ".cache/tokens"


def training_texts(args: TrainArguments) -> Iterable[str]:
    """What a tokenizer is trained on: every message of the first 50,000 records of each file, bad ones passed over.

    Of long texts no more than 50 million characters a file; SentencePiece passes over lines of more than 4,192 bytes.
    BadRecord, the first one, if no file has a usable record: why they are bad says more than that there are no texts.
    """
    first_bad: BadRecord | None = None
    some = False

    def pass_over(bad: BadRecord, raw: bytes) -> None:
        nonlocal first_bad
        first_bad = first_bad or bad

    for file in args.data_path:
        left, choices = 50_000_000, {"answer": args.answer, "pairs": args.pairs}
        records = read_records(file, instruction=args.instruction or "", on_bad=pass_over, **choices)
        for _, record in zip(range(50_000), records, strict=False):
            some = True
            for text in (m.content for m in record.dialogue.messages):
                yield from (text[i : i + 1000] for i in range(0, len(text), 1000)) if len(text) > 4000 else (text,)
                left -= len(text)
            if left < 0:
                break
    if first_bad and not some:
        raise first_bad


def open_data(
    args: TrainArguments, tokenizer: Tokenizer, chat_format: ChatFormat, sample: synthesize.Sample | None, rank: int
) -> tuple[loader.Dataset, loader.Dataset, loader.Report]:
    """Training and held-out records, and the report on them; tokenised now, or opened from the cache.

    Called by rank 0 first, which says how far it is and writes down the rejected records, then by the others.
    """
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "chat_format": chat_format,
        "max_len": args.model_max_length,
        "cache_dir": args.cache_dir or TOKEN_CACHE,
        "progress": rank == 0,
        "workers": args.num_workers or None,
    }
    if sample is not None:
        held, _, _ = loader.build([loader.InMemory("built-in sample, held out", sample.held_out)], **common)
        train, _, report = loader.build([loader.InMemory("built-in sample", sample.train)], **common)
        return train, held, dataclasses.replace(report, held_out=len(held))
    choices: dict[str, Any] = {"weights": args.data_weights or None, "answer": args.answer, "pairs": args.pairs}
    choices["eval_fraction"] = args.eval_fraction
    if not args.skip_bad_records:
        return loader.build(args.data_path, **choices, **common)
    if rank != 0:
        return loader.build(args.data_path, on_bad=lambda bad, raw: None, **choices, **common)
    with RejectedFile(Path(args.output_dir) / "rejected.jsonl") as rejected:
        return loader.build(args.data_path, on_bad=rejected, **choices, **common)


def origin_of(args: TrainArguments, base: Path | None, report: loader.Report) -> provenance.Stages:
    """The stages of the model that a run makes: those of its base, and what the run starts from and learns from.

    Hashes are remembered with the tokens, so that a restart reads nothing again.
    """
    cache = Path(args.cache_dir or TOKEN_CACHE)

    def hashed(file: Path) -> str:
        return content_hash(file, cache)

    if base is None:
        start, before = {"name": args.model_name_or_path, "seed": args.seed}, []
    else:
        start, before = provenance.base_of(base, hashed), provenance.stages_of(base)
    kept = ("records", "rejected", "dropped", "truncated", "weight")
    counts = [{key: f[key] for key in kept} for f in report.files]
    if args.data_path:
        licences = args.data_licences or ("unknown",) * len(args.data_path)
        data = [
            {"name": file, "sha256": hashed(Path(file)), "licence": licence, **count, **cleaning_of(Path(file))}
            for file, licence, count in zip(args.data_path, licences, counts, strict=True)
        ]
    else:
        sources = {file.name: hashed(file) for file in sorted(SAMPLE.glob("*.txt"))}
        data = [{"name": "built-in sample", "made_of": sources, "licence": "this project's", **counts[0]}]
    records = {"train": report.documents, "held_out": report.held_out}
    stage = provenance.stage(start, data, records=records, objective=args.objective, seed=args.seed)
    return [*before, stage]


def cleaning_of(file: Path) -> dict[str, Any]:
    """What `python -m data.prepare clean` reported of the file that it wrote, where its report lies beside it."""
    report = Path(f"{file}.report.json")
    if not report.is_file():
        return {}
    try:
        found = json.loads(report.read_bytes())
        counts = {
            "records": found["records"],
            "rules": {name: rule["count"] for name, rule in found["rules"].items()},
            "dropped": {reason: len(numbers) for reason, numbers in found["dropped"].items()},
            "faults": {name: len(fault["records"]) for name, fault in found["faults"].items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{report}: not a report of cleaning; move it away from {file}") from None
    return {"cleaning": {"report": str(report), "sha256": provenance.sha256_of(report), **counts}}


def open_batches(
    args: TrainArguments, train: loader.Dataset, held: loader.Dataset, rank: int, world: int
) -> loader.Loader:
    """The batches of one rank of world: a pure function of the seed and the step."""
    return loader.Loader(
        train,
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_len=args.row_length,
        rank=rank,
        world=world,
        packing=args.packing,
        seed=args.seed,
        evaluation=held,
        eval_batch=args.per_device_eval_batch_size,
        fixed_shape=args.torch_compile,
    )
