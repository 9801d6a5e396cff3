"""How long does a training step take, beside transformers on the same weights and records, padded and packed?

    python bench/bench_train.py [--shapes tiny 15m] [--dtypes float32 bfloat16] [--passes 5] [--threads 2]

A step is one global batch of 32 records in micro-batches of 8: forward, backward, clip, fused AdamW. Records have the
token lengths of ChatDoctor's 5k set (mean 168, 37 % supervised). `padded`: the same micro-batches, padded to their
longest record, in both; `packed`: the same records by our loader's packing within the step. Passes of all three
interleaved in one run; medians. transformers runs SDPA attention, bf16 by autocast over fp32 weights, as ours does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench import hugging_face, report
from data import loader
from llama import checkpoint, parallel
from llama.chat import IGNORE, ChatFormat, Dialogue, Message
from llama.config import PRESETS, LlamaConfig
from llama.model import Llama
from llama.optimizer import clipped_step
from llama.tokenizer import train_tokenizer

RECORDS, MICRO_BATCH = 32, 8


def records(seed: int = 0) -> list[Dialogue]:
    """Dialogues whose token lengths are spread like the 5k set's: prompts of 75-150 tokens, answers of 5-185."""
    rng = random.Random(seed)
    out = []
    for _ in range(4 * RECORDS):
        question = max(10, min(80, round(rng.lognormvariate(3.5, 0.4))))
        answer = max(4, min(200, round(rng.lognormvariate(3.9, 0.65))))
        words = [" ".join(rng.choice("abcdefgh") for _ in range(n)) for n in (question + 70, answer)]
        out.append(Dialogue((Message("user", words[0]), Message("assistant", words[1]))))
    return out


def batches(config: LlamaConfig, packing: str) -> loader.Step:
    tokenizer = train_tokenizer(["a b c d e f g h"] * 20, 272)
    data, _, _ = loader.build(
        [loader.InMemory("bench", records())],
        tokenizer=tokenizer,
        chat_format=ChatFormat("plain", ""),
        max_len=512,
        workers=1,
        progress=False,
    )
    step = loader.Loader(
        data, batch=MICRO_BATCH, accumulation=RECORDS // MICRO_BATCH, max_len=512, packing=packing, seed=0
    ).step(0)
    # The words above use few ids; spread them over the vocabulary, as text would.
    spread = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(0))[: tokenizer.vocab_size]
    for batch in step.micro_batches:
        batch.tokens = spread[batch.tokens]
        batch.targets = torch.where(batch.targets == IGNORE, IGNORE, spread[batch.targets.clamp(min=0)])
    return step


class Ours:
    def __init__(self, config: LlamaConfig, bf16: bool) -> None:
        self.world = parallel.init("cpu", sharded=bf16)
        with torch.device("meta"):
            self.model = Llama(config)
        parallel.prepare(self.model, self.model.layers, self.world, bf16=bf16)
        self.model.to_empty(device="cpu")
        self.model.init_weights(0, lambda p, full: checkpoint.copied(p, parallel.part_of(full, p)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, step: loader.Step) -> float:
        total = 0.0
        for i, b in enumerate(step.micro_batches):
            parallel.sync_gradients(self.model, i == len(step.micro_batches) - 1)
            loss, _ = self.model(b.tokens, b.targets, (b.start, b.end))
            (loss / step.supervised_tokens).backward()
            total += loss.item()
        clipped_step(self.optimizer, parallel.grad_norm(self.model.parameters(), self.world), 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        return total / step.supervised_tokens


class Theirs:
    def __init__(self, config: LlamaConfig, bf16: bool) -> None:
        ours = Llama(config)
        ours.init_weights(0)
        self.model = hugging_face.model_of(config, ours.state_dict()).train()
        self.bf16 = bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, step: loader.Step) -> float:
        total = 0.0
        for b in step.micro_batches:
            mask = (b.end != b.tokens.shape[1]) | (b.start == 0)  # the padding is the document that ends the row
            labels = torch.cat((torch.full_like(b.targets[:, :1], IGNORE), b.targets[:, :-1]), 1)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                out = self.model(
                    input_ids=b.tokens,
                    attention_mask=mask.long(),
                    labels=labels,
                    num_items_in_batch=step.supervised_tokens,
                )
            out.loss.backward()
            total += out.loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def bench(shape: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    config, bf16 = PRESETS[shape], dtype == "bfloat16"
    ours, theirs = Ours(config, bf16), Theirs(config, bf16)
    padded, packed = batches(config, "none"), batches(config, "step")
    runs = {
        "transformers padded": (theirs, padded),
        "ours padded": (ours, padded),
        "ours packed": (ours, packed),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = {name: peer.step(step) for name, (peer, step) in runs.items() if name != "ours packed"}
    for i in range(args.passes + 1):
        for name, (peer, step) in runs.items():
            begin = time.perf_counter()
            peer.step(step)
            if i:
                times[name].append(time.perf_counter() - begin)
    parallel.shutdown()
    peer_times = times["transformers padded"]
    result: dict[str, Any] = {"shape": shape, "dtype": dtype, "real_tokens": padded.tokens}
    for name, seconds in times.items():
        result[name] = {
            "seconds": round(statistics.median(seconds), 3),
            "real_tokens_per_s": round(padded.tokens / statistics.median(seconds)),
            "slots": (packed if "packed" in name else padded).slots,
            "loss_of_first_step": round(first[name], 5) if name in first else None,
            "speedup": round(statistics.median(p / s for p, s in zip(peer_times, seconds, strict=True)), 2),
        }
    return result


def main() -> None:
    args = report.parser(__doc__, shapes=["tiny", "15m"], dtypes=["float32", "bfloat16"], passes=5).parse_args()
    report.run(args, bench, "train_cpu.json", records=RECORDS, micro_batch=MICRO_BATCH)


if __name__ == "__main__":
    main()
