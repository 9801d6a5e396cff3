"""What does quantising cost? Held-out perplexity and right answers of a trained model in bf16, int8 and int4.

    python bench/bench_quantised.py [--checkpoint out/tiny] [--groups 32 64 128] [--calibration 128]

The embedded default (`python train.py`): its held-out questions, and calibration by its training dialogues. For each
number type: naive rounding (a group's largest number sets its scale), nearest by searched scales, and compensated by
calibration; the head in int8 as decoding has it. Before them, bf16 weights with an int8 KV cache, through which
dialogues are read in small chunks. Ratios are of perplexity to bf16's. Writes bench/results/quantised_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from report import RESULTS, write

from data import synthesize
from data.metrics import share_named_right
from llama import checkpoint, quantize
from llama.batching import answer_greedily
from llama.chat import ChatFormat, render
from llama.generation import lay_out_for_decoding, new_cache
from llama.model import IGNORE, Llama
from llama.quantize import Packed, Scheme
from llama.tokenizer import Tokenizer

CHUNK = 16  # tokens read at a time through a cache: most of what a token sees was held before


def naive(weight: torch.Tensor, scheme: Scheme) -> Packed:
    """Rounding to the nearest, as it is mostly done: the largest magnitude of a group is the largest whole number."""
    top = 2 ** (scheme.bits - 1) - 1
    groups = weight.float().view(len(weight), scheme.groups(weight.shape[1]), -1)
    scales = (groups.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12).bfloat16()
    q = (groups / scales.float()).round().clamp(-top - 1, top).to(torch.int8)
    return Packed(quantize.pack(q.view(weight.shape), scheme.bits), scales.squeeze(-1))


@torch.inference_mode()
def mean_loss(model: Llama, rows: list[tuple[list[int], list[bool]]], cache_dtype: torch.dtype | None = None) -> float:
    """Of all supervised tokens; with a cache_dtype, each read from such a cache."""
    total, count = 0.0, 0
    for ids, mask in rows:
        tokens = torch.tensor([ids])
        if cache_dtype is None:
            logits = model(tokens)
        else:
            cache = new_cache(model, 1, len(ids), cache_dtype)
            logits = torch.cat([model(some, cache=cache) for some in tokens.split(CHUNK, 1)], 1)
        logits = logits[0, :-1].float()
        targets = torch.tensor([i if m else IGNORE for i, m in zip(ids[1:], mask[1:], strict=True)])
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
        count += int((targets != IGNORE).sum())
    return total / count


def share_right(
    model: Llama,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    sample: synthesize.Sample,
    cache_dtype: torch.dtype | None = None,
) -> float:
    """Of the held-out questions, how many name the right condition."""
    asked = sample.held_out_examples
    answers = answer_greedily(model, tokenizer, chat_format, [e.dialogue.messages[:1] for e in asked], cache_dtype)
    return share_named_right(sample.table, asked, answers)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", default="out/tiny")
    p.add_argument("--groups", type=int, nargs="*", default=[32, 64, 128])
    p.add_argument("--calibration", type=int, default=128, help="training dialogues to calibrate with")
    p.add_argument("--output", type=Path, default=RESULTS / "quantised_cpu.json")
    args = p.parse_args()
    model = checkpoint.load_model(args.checkpoint, dtype=torch.bfloat16).eval()
    tokenizer, chat_format = checkpoint.load_tokenizer(args.checkpoint), checkpoint.load_chat_format(args.checkpoint)
    sample = synthesize.sample()
    held_out = [render(d, chat_format, tokenizer) for d in sample.held_out]
    batches = [torch.tensor([render(d, chat_format, tokenizer)[0]]) for d in sample.train[: args.calibration]]

    def by(rounded: Callable[[torch.Tensor, Scheme], Packed], scheme: Scheme) -> Llama:
        made = copy.deepcopy(model)
        quantize.replace(made.layers, lambda _, linear: rounded(linear.weight.detach(), scheme), scheme.bits)
        return made

    def calibrated(scheme: Scheme) -> Llama:
        made = copy.deepcopy(model)
        quantize.calibrate(made, list(made.layers), batches, scheme)
        return made

    results: list[dict[str, Any]] = []

    def measure(name: str, rounding: str, group: int, made: Llama, cache_dtype: torch.dtype | None = None) -> None:
        lay_out_for_decoding(made)
        loss = mean_loss(made, held_out, cache_dtype)
        base = results[0]["loss"] if results else loss
        right = share_right(made, tokenizer, chat_format, sample, cache_dtype)
        row = {"weights": name, "rounding": rounding, "group": group, "loss": loss}
        results.append(row | {"perplexity_ratio": math.exp(loss - base), "named_right": right})
        print(f"{name:9} {rounding:11} {group:4}  x{math.exp(loss - base):.4f}  {right:.1%}", flush=True)

    measure("bfloat16", "", 0, copy.deepcopy(model))
    measure("bfloat16", "int8 cache", 0, copy.deepcopy(model), torch.int8)
    for bits, group in ((8, 0), *((4, g) for g in args.groups)):
        scheme = Scheme(bits, group)
        measure(f"int{bits}", "naive", group, by(naive, scheme))
        measure(f"int{bits}", "nearest", group, by(quantize.nearest, scheme))
        measure(f"int{bits}", "compensated", group, calibrated(scheme))
    write(args.output, results, held_out_dialogues=len(held_out), calibration_dialogues=len(batches))


if __name__ == "__main__":
    main()
