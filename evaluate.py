#!/usr/bin/env python
"""Measure a checkpoint honestly: every figure with its floor, n, 95 % interval and contaminated items, as a card.

The parts are in data/ (suite.py lists them), what is asked of the model is llama/examinee.py. A part whose protocol,
checkpoint and training files are those of an earlier run into the same --out is not run again. stdout carries the
verdict, stderr the rest.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.command_line import LATEST, Parser, checkpoint_at

if TYPE_CHECKING:  # torch takes seconds to import: --help and wrong flags must not wait for it
    from data.evaluation.parts import Part
    from data.evaluation.replies import Encoder
    from data.evaluation.suite import Material
    from data.evaluation.training_files import Source
    from llama.examinee import Examinee

SCHEMA = 1
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf")
BESIDE = ("config.json", "params.json", "tokenizer.model", "chat_format.json")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    p = Parser("evaluate.py", __doc__)
    add = p.add_argument
    add("--checkpoint", metavar="DIR", help=f"model directory or GGUF file; default: the one named in {LATEST}")
    add("--out", required=True, metavar="DIR", help="where results.json, card.md and card.html go; run again to go on")
    add("--suite", default="quick", metavar="S", help="quick (100 items a part), full, or names of parts, by commas")
    add("--eval_data", metavar="DIR", help="folder of the public test sets: MedQA, MedMCQA, PubMedQA, MMLU, ...")
    add("--diseases", metavar="F.db", help="disease database to ask facts of; default: the built-in table")
    add("--held_out", nargs="+", default=[], metavar="F", help="dialogues it was not trained on; default: the sample's")
    add(
        "--train_files",
        nargs="+",
        metavar="F",
        help="what it was trained on, 'built-in sample' for train.py's default; default: as its provenance.json says",
    )
    add(
        "--against",
        metavar="DIR",
        help="an earlier --out: ends with 1 if a figure is worse than its 95 %% interval there",
    )
    add("--encoder", metavar="DIR", help="encoder for BERTScore (transformers); default: the model's own hidden states")
    add("--limit", type=int, metavar="N", help="at most N items a part, taken evenly")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the weights are stored")
    add("--kernels", default="auto", metavar="K", help="auto (our Triton kernels on a GPU), triton, torch, ...")
    args = p.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        p.error(f"--limit is {args.limit}; it must be 1 or more")
    return args


# --- one run --------------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    args = parse(argv)
    from data.evaluation import suite

    earlier = None if args.against is None else _results_in(Path(args.against))
    names, by_name = suite.asked_for(args.suite)
    path = checkpoint_at(args.checkpoint)
    out = _folder(Path(args.out))
    trained_on = _trained_on(args, path)
    fingerprint = fingerprint_of(path)
    _same_checkpoint(out, fingerprint)
    limit = args.limit or suite.SUITES.get(args.suite)
    material = suite.Material(
        eval_data=_existing(args.eval_data, "--eval_data"),
        diseases=_existing(args.diseases, "--diseases"),
        held_out_files=args.held_out,
        trained_on=trained_on,
        limit=limit,
        encoder=_encoder(args),
    )
    parts, left_out = _prepare(names, by_name, material)
    key = {"schema": SCHEMA, "checkpoint": fingerprint, "dtype": args.dtype, "trained_on": _identity(trained_on)}
    examinee, facts = _load(args, path)
    measured = _measure(parts, out, key, examinee, trained_on)
    results = {
        "schema": SCHEMA,
        "command": " ".join(["python", "evaluate.py", *argv]),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": facts.pop("versions"),
        "checkpoint": {"path": str(path), "fingerprint": fingerprint, **facts},
        "suite": args.suite,
        "limit": limit,
        "training_files": None if trained_on is None else [s.to_json() for s in trained_on],
        "throughput": _throughput(examinee, material, facts["device"]),
        "parts": measured,
        "left_out": left_out + _unread(trained_on),
    }
    _publish(out, results)
    return 0 if earlier is None else _compare(earlier, results)


def _measure(
    parts: list[Part], out: Path, key: dict[str, Any], examinee: Examinee, trained_on: list[Source] | None
) -> list[dict[str, Any]]:
    """The parts' results, each kept as soon as it is there; those of an earlier run with the same key as they are."""
    from tqdm import tqdm

    from data.evaluation import suite

    stored = {p.name: kept for p in parts if (kept := _stored(out, p, key))}
    missing = [p for p in parts if p.name not in stored]
    if missing and not trained_on:
        _say("no training files are named: contamination is not counted")
    sizes = [Path(s.name).stat().st_size for s in trained_on or () if s.readable and Path(s.name).is_file()]
    with tqdm(
        total=sum(sizes), desc="training files", unit="B", unit_scale=True, leave=False, disable=None, file=sys.stderr
    ) as bar:
        exposures = suite.exposures(missing, trained_on, bar.update)
    for number, part in enumerate(parts, 1):
        examinee.task = f"[{number}/{len(parts)}] {part.name}"
        if part.name in stored:
            _say(f"{examinee.task}: kept from an earlier run")
            continue
        began = time.perf_counter()
        outcome = part.run(examinee, exposures[part.name])
        stored[part.name] = {
            "name": part.name,
            "title": part.title,
            "protocol_hash": part.hash,
            "protocol": part.protocol,
            "seconds": round(time.perf_counter() - began, 1),
            "notes": list(outcome.notes),
            "figures": [f.to_json() for f in outcome.figures],
        }
        _write(out / "items" / f"{part.name}.jsonl", "".join(json.dumps(i) + "\n" for i in outcome.items))
        _write(out / "parts" / f"{part.name}.json", _json({"key": key, "part": stored[part.name]}))
        _say(f"{examinee.task}: {stored[part.name]['seconds']} s")
    return [stored[p.name] for p in parts]


def _prepare(names: list[str], by_name: bool, material: Material) -> tuple[list[Part], list[dict[str, str]]]:
    """The parts, and those left out with the reason. ValueError where one was asked for by name, or a file is bad."""
    from data.evaluation import suite

    parts: list[Part] = []
    left_out = []
    for name in names:
        try:
            parts.append(suite.prepare(name, material))
        except suite.Lacking as e:
            if by_name:
                raise ValueError(f"--suite {name}: {e}") from None
            left_out.append({"part": name, "why": str(e)})
            _say(f"{name} is left out: {e}")
    return parts, left_out


def _load(args: argparse.Namespace, path: Path) -> tuple[Examinee, dict[str, Any]]:
    """The model, and what the card says of it."""
    import numpy
    import torch

    from llama import checkpoint, placement
    from llama.examinee import Examinee

    device = placement.found(args.device)
    tokenizer, chat_format = checkpoint.load_tokenizer(path), checkpoint.load_chat_format(path)
    model = placement.on_device(path, device, args.dtype and getattr(torch, args.dtype), args.kernels, None, None)
    scheme = checkpoint.load_scheme(path)
    kind = f"int{scheme.bits}" if scheme else str(model.norm.weight.dtype).removeprefix("torch.")
    facts = {
        "parameters": model.config.n_params(),
        "weights": kind,
        "device": device,
        "context": model.config.max_seq_len,
        "chat_format": chat_format.to_json(),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}",
    }
    return Examinee(model, tokenizer, chat_format), facts


def _throughput(examinee: Examinee, material: Material, device: str) -> dict[str, Any]:
    """Scoring beside the model's own batched prefill, of the same held-out dialogues."""
    import torch

    from llama.chat import render

    documents = [render(i.dialogue, examinee.chat_format, examinee.tokenizer) for i in material.held_out.items]
    documents = [d for d in documents if len(d[0]) <= examinee.max_len][:256]
    if not documents:
        return {}
    speed = examinee.speed(documents)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    return {
        "scoring_tokens_per_s": round(speed.scoring, 1),
        "prefill_tokens_per_s": round(speed.prefill, 1),
        "ratio": round(speed.scoring / speed.prefill, 3),
        "tokens": sum(len(ids) for ids, _ in documents),
        "device": f"{name}, {torch.get_num_threads()} threads",
    }


# --- what is given --------------------------------------------------------------------------------


def _existing(given: str | None, flag: str) -> Path | None:
    if given is not None and not Path(given).exists():
        raise ValueError(f"{flag} {given}: is not there")
    return None if given is None else Path(given)


def _trained_on(args: argparse.Namespace, path: Path) -> list[Source] | None:
    from data.evaluation import training_files
    from llama import checkpoint

    if args.train_files is not None:
        return training_files.given(args.train_files)
    return training_files.named_in(checkpoint.load_stages(path))


def _identity(trained_on: list[Source] | None) -> list[tuple[str, str, str]] | None:
    return None if trained_on is None else sorted((s.name, s.sha256, s.state) for s in trained_on)


def _unread(trained_on: list[Source] | None) -> list[dict[str, str]]:
    unread = [s for s in trained_on or [] if not s.readable]
    return [
        {"part": f"training file {s.name}", "why": f"{s.state}; contamination by it is not counted"} for s in unread
    ]


def _encoder(args: argparse.Namespace) -> tuple[str, Encoder] | None:
    if args.encoder is None:
        return None
    from llama.encoder import load_encoder

    path = Path(args.encoder)
    encode = load_encoder(path, "cpu" if args.device == "auto" else args.device)
    return f"{path.name} ({fingerprint_of(path)})", encode


def fingerprint_of(path: Path) -> str:
    """Tells one checkpoint from another without reading all of it: names, sizes and both ends of its files."""
    files = [path] if path.is_file() else sorted(f for pattern in (*WEIGHTS, *BESIDE) for f in path.glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            digest.update(f"{file.name} {size}\n".encode())
            for at in (0, max(0, size - (1 << 20))):
                f.seek(at)
                digest.update(f.read(1 << 20))
    return digest.hexdigest()[:16]


# --- what is written ------------------------------------------------------------------------------


def _folder(out: Path) -> Path:
    try:
        for folder in (out, out / "parts", out / "items"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written ({e.strerror}); choose another directory") from None
    return out


def _same_checkpoint(out: Path, fingerprint: str) -> None:
    """ValueError where the folder holds results of another checkpoint."""
    from llama.files import read_json

    file = out / "results.json"
    if file.exists():
        earlier = read_json(file).get("checkpoint")
        if not isinstance(earlier, dict) or earlier.get("fingerprint") != fingerprint:
            raise ValueError(f"--out {out}: holds the results of another checkpoint; choose another directory")


def _stored(out: Path, part: Part, key: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run with the same protocol, checkpoint and training files; None without one."""
    from llama.files import read_json

    file = out / "parts" / f"{part.name}.json"
    if not file.exists():
        return None
    try:
        kept = read_json(file)
    except ValueError:  # torn by a full disk or an editor: measured again
        return None
    same = json.loads(json.dumps(key)) == kept.get("key") and kept.get("part", {}).get("protocol_hash") == part.hash
    return kept["part"] if same else None


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    """The file, whole or not at all."""
    from llama.files import atomic_file

    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")


def _publish(out: Path, results: dict[str, Any]) -> None:
    from data.evaluation import card, card_html

    _write(out / "results.json", _json(results))
    _write(out / "card.md", card.markdown(results))
    _write(out / "card.html", card_html.page(results))
    print(card.verdict(results))
    print(f"{out / 'card.html'}, {out / 'card.md'}, {out / 'results.json'}")


def _results_in(out: Path) -> dict[str, Any]:
    from llama.files import read_json

    file = out / "results.json"
    if not file.exists():
        raise ValueError(f"--against {out}: no results.json in it; give the --out of a finished evaluation")
    results = read_json(file)
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{file}: results of schema {results.get('schema')!r}, not {SCHEMA}; measure that model anew")
    return results


def _compare(earlier: dict[str, Any], results: dict[str, Any]) -> int:
    """Say what has changed; 1 if something is worse."""
    from data.evaluation import gate

    changes = gate.compare(earlier, results)
    worse = gate.refused(changes)
    print(gate.table(changes))
    print(f"{len(worse)} of {len(changes)} figures worse or missing" if worse else "no figure is worse")
    return 1 if worse else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except RuntimeError as e:
        from llama.planner import is_out_of_memory

        if not is_out_of_memory(e):
            raise
        print(f"error: {str(e).splitlines()[0]}; finished parts are kept", file=sys.stderr)
        return 2
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("stopped; the same command goes on after the last finished part")
        return 130


if __name__ == "__main__":
    sys.exit(main())
