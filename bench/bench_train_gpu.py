"""How fast does a LLaMA of real size train on one GPU, in how much memory, beside transformers and Liger?

    python -m bench.bench_train_gpu [--only 7b 3b] [--seconds 240] [--json PATH]

Full fine-tuning with random weights on records of ChatDoctor's lengths (mean 170 tokens). `packed`: rows of 2,048 that
are full of records, which ours keeps apart and the others run through each other (they know no packing without
FlashAttention; it costs them nothing). `padded`: 4 records a micro-batch, padded to their longest, as ChatDoctor
trained. `lora`: ChatDoctor's adapters over a frozen base, in 16 or 4 bits. Each line is a process of its own: it tries
micro-batches from large to small until one fits, warms up, and times whole steps (forward, backward, clip, update).
Tokens are real ones, without padding. Ours keeps exact fp32 weights in 14 or 10 bytes a parameter; the others fp32
weights under bf16 autocast, in 16, as ChatDoctor did.

Writes bench/results/train_<device>.json and prints the table. Without a GPU every line is "not measured"; --device cpu
--only tiny runs the code on small shapes, to see that it runs.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from bench import hugging_face, lines
from bench.kernel_work import document_lengths
from llama import lora, nf4, parallel, planner
from llama.arguments import TrainArguments
from llama.chat import IGNORE
from llama.config import PRESETS, LlamaConfig
from llama.lora_config import LoRAConfig
from llama.model import Llama
from llama.optimizer import SplitAdamW, clipped_step
from llama.parallel import World

ROW, SUPERVISED, PADDED_RECORDS = 2048, 0.37, 4
WARM_UP, STEPS = 2, 5
ALPACA_TOKENS = 52_002 * 3 * 110  # records, epochs, mean LLaMA tokens of an Alpaca record with its template


@dataclass(frozen=True)
class Line:
    """A row of the table: who trains what, and the micro-batches (rows) to try."""

    shape: str
    who: str  # ours: adamw_split, adamw_split_bf16, lora, lora_4bit; transformers, liger
    content: str  # packed, padded
    recompute: bool
    rows: tuple[int, ...]

    @property
    def adapters(self) -> bool:
        """Adapters train, not the weights."""
        return self.who.startswith("lora")

    @property
    def is_ours(self) -> bool:
        return self.adapters or self.who.startswith("adamw")

    @property
    def name(self) -> str:
        """As printed."""
        how = "every block recomputed" if self.recompute else "nothing recomputed"
        return f"{self.shape} {self.who}, {self.content}, {how}"


LINES = [
    Line("7b", "adamw_split", "packed", False, (5, 4, 2, 1)),
    Line("7b", "liger", "packed", True, (8, 4, 2)),
    Line("7b", "adamw_split_bf16", "packed", False, (8, 4, 2)),
    Line("7b", "lora", "packed", True, (8, 4, 2)),
    Line("7b", "transformers", "packed", True, (8, 4, 2)),
    Line("7b", "lora_4bit", "packed", True, (8, 4, 2)),
    Line("7b", "adamw_split_bf16", "packed", True, (32, 16)),
    Line("7b", "transformers", "padded", True, (PADDED_RECORDS,)),
    Line("llama3.2-3b", "adamw_split", "packed", False, (16, 8, 4)),
    Line("llama3.2-3b", "liger", "packed", False, (8, 4, 2)),
    Line("llama3.2-1b", "adamw_split", "packed", False, (32, 16, 8)),
    Line("llama3.2-1b", "liger", "packed", False, (16, 8, 4)),
]
TINY = [
    Line("tiny", who, content, recompute, (2,))
    for who, content, recompute in (
        ("adamw_split", "packed", False),
        ("adamw_split_bf16", "packed", True),
        ("lora", "packed", True),
        ("lora_4bit", "packed", False),
        ("transformers", "packed", True),
        ("transformers", "padded", False),
    )
]


@dataclass
class Batch:
    """A micro-batch: ids, targets (IGNORE: no loss), borders of documents, and how many ids are real."""

    tokens: Tensor
    targets: Tensor
    documents: tuple[Tensor, Tensor]
    mask: Tensor  # 1 where an id is no padding
    lengths: list[int]

    @property
    def real(self) -> int:
        """Tokens that are no padding."""
        return sum(self.lengths)


def batch(config: LlamaConfig, line: Line, rows: int, seed: int, device: torch.device) -> Batch:
    """Random ids in documents of ChatDoctor's lengths."""
    row = min(ROW, config.max_seq_len)
    if line.content == "packed":
        per_row = [document_lengths(row, seed=1000 * seed + i) for i in range(rows)]
        width = row
    else:
        per_row = [[n] for n in document_lengths(rows * 400, seed=seed)[:rows]]
        width = max(n for lengths in per_row for n in lengths)
    start = torch.zeros(rows, width, dtype=torch.int32)
    end = torch.full((rows, width), width, dtype=torch.int32)
    real = torch.zeros(rows, width, dtype=torch.bool)
    for i, lengths in enumerate(per_row):
        at = 0
        for n in lengths:
            start[i, at : at + n], end[i, at : at + n], real[i, at : at + n] = at, at + n, True
            at += n
        start[i, at:] = at
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, width), generator=generator)
    counted = real & (torch.rand(rows, width, generator=generator) < SUPERVISED)
    targets = torch.where(counted, tokens.roll(-1, 1), IGNORE)
    return Batch(
        tokens.to(device),
        targets.to(device),
        (start.to(device), end.to(device)),
        real.long().to(device),
        [n for lengths in per_row for n in lengths],
    )


def flops(config: LlamaConfig, lengths: list[int], frozen: bool = False) -> float:
    """Forward and backward of documents of these lengths, as train.py counts."""
    return planner.flops(config, sum(lengths), sum(n * (n + 1) // 2 for n in lengths), frozen)


Step = Callable[[Batch], None]


def ours(config: LlamaConfig, line: Line, device: torch.device) -> Step:
    world, unsharded = World(0, 1, device, None), None
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
    if line.adapters:
        world = parallel.init(device.type, sharded=True)
        if line.who == "lora_4bit":
            nf4.replace(model.layers)
            unsharded = set(model.parameters())
        lora.apply(model, LoRAConfig(8, 16, 0.05, ("q", "v")))
    parallel.prepare(
        model, model.layers, world, bf16=True, recompute=config.n_layers if line.recompute else 0, unsharded=unsharded
    )
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point():
                part = parallel.local(p)
                part.fill_(1.0) if name.endswith("norm.weight") else part.normal_(0.0, 0.02)
        for packed in (m for m in model.modules() if isinstance(m, nf4.NF4Linear)):
            packed.fill(0.02 * torch.randn(packed.out_features, packed.in_features, device=device))
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    optimizer: torch.optim.Optimizer
    moments = torch.bfloat16 if line.who == "adamw_split_bf16" else torch.float32
    if line.adapters:
        optimizer = torch.optim.AdamW(names, lr=1e-5, fused=True)
    else:
        optimizer = SplitAdamW([{"params": list(names)}], names, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, moments=moments)

    def step(b: Batch) -> None:
        loss, count = model(b.tokens, b.targets, b.documents)
        (loss / count).backward()
        clipped_step(optimizer, parallel.grad_norm(model.parameters(), world), 1.0)
        optimizer.zero_grad(set_to_none=True)

    return step


def theirs(config: LlamaConfig, line: Line, device: torch.device) -> Step:
    """transformers as its Trainer runs it: fp32 weights, bf16 autocast, SDPA, fused AdamW; with Liger's patches."""
    if line.who == "liger":
        if find_spec("liger_kernel") is None:
            raise ImportError("liger_kernel is not installed")
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = hugging_face.model_of(config, device=device, use_cache=False).train()
    if line.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(b: Batch) -> None:
        padding = {} if line.content == "packed" else {"attention_mask": b.mask}
        labels = torch.cat((torch.full_like(b.targets[:, :1], IGNORE), b.targets[:, :-1]), 1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=b.tokens, labels=labels, **padding).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(line: Line, device: torch.device) -> dict[str, Any]:
    """The first micro-batch that fits: seconds of a step, tokens a second, memory."""
    config = PRESETS[line.shape]
    failed = ""
    for rows in line.rows:
        try:
            return _measure(config, line, rows, device)
        except RuntimeError as e:
            if not planner.is_out_of_memory(e):
                raise
            failed = f"out of memory with {rows} rows"
        parallel.shutdown()  # the next try joins a process group of its own
        gc.collect()
        torch.cuda.empty_cache()
    return {"failed": failed}


def _measure(config: LlamaConfig, line: Line, rows: int, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = (ours if line.is_ours else theirs)(config, line, device)
    batches = [batch(config, line, rows, i, device) for i in range(WARM_UP + STEPS)]
    seconds = []
    for b in batches:
        begin = time.perf_counter()
        step(b)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    timed = batches[WARM_UP:]
    total, tokens = sum(seconds[WARM_UP:]), sum(b.real for b in timed)
    return {
        "rows": rows,
        "seconds_a_step": total / len(timed),
        "real_tokens_per_s": tokens / total,
        "slots_per_s": sum(b.tokens.numel() for b in timed) / total,
        "mfu": sum(flops(config, b.lengths, line.adapters) for b in timed) / total / planner.PEAK_FLOPS["H200"]
        if cuda
        else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "planned_bytes": planned(config, line, rows),
        "first_step_seconds": seconds[0],
    }


def planned(config: LlamaConfig, line: Line, rows: int) -> float | None:
    """The tensors that train.py --plan expects for such a run of ours."""
    if not line.is_ours:
        return None
    adapters = {"lora_r": 8, "lora_dropout": 0.05, "lora_target_modules": ("q", "v")}
    how = {"optim": line.who}
    if line.adapters:
        how = {**adapters, "base_bits": 4 if line.who == "lora_4bit" else 16}
    args = TrainArguments(
        data_path=("bench",),
        bf16=True,
        **how,
        packing="epoch",
        model_max_length=min(ROW, config.max_seq_len),
        per_device_train_batch_size=rows,
        gradient_checkpointing=line.recompute,
    )
    return planner.plan(config, args, 1).tensors


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each row, and against ours of the same shape the others' speed."""
    best: dict[str, float] = {}
    for line in found.values():
        if line["who"].startswith("adamw") and "real_tokens_per_s" in line:
            best[line["shape"]] = max(best.get(line["shape"], 0.0), line["real_tokens_per_s"])
    rows = [f"{'training':62} {'tokens/s':>9} {'MFU':>6} {'memory':>9} {'planned':>9}  our best is"]
    for name, line in found.items():
        if "real_tokens_per_s" not in line:
            rows.append(f"{name:62} {line.get('failed', 'not measured')}")
            continue
        mfu = "-" if line["mfu"] is None else f"{line['mfu']:.1%}"
        memory = "-" if line["peak_memory_bytes"] is None else f"{line['peak_memory_bytes'] / 2**30:.1f} GiB"
        plan = f"{line['planned_bytes'] / 2**30:.1f} GiB" if line.get("planned_bytes") else "-"
        against = best.get(line["shape"], 0.0) / line["real_tokens_per_s"]
        ratio = "" if line["who"].startswith("adamw") or not against else f"{against:.2f}x"
        if line["who"].startswith("lora") and against:
            ratio = f"{1 / against:.2f}x of full fine-tuning's speed"
        rows.append(f"{name:62} {line['real_tokens_per_s']:9,.0f} {mfu:>6} {memory:>9} {plan:>9}  {ratio}".rstrip())
    if (seven := best.get("7b")) is not None:
        hours = ALPACA_TOKENS / seven / 3600
        rows.append(
            f"Alpaca's stage (52,002 x 3 records) projected: {hours:.2f} GPU-hours; ChatDoctor's log says 25.96"
        )
    return rows


TABLE = lines.Table("bench.bench_train_gpu", "train", LINES, TINY, measure, table, seconds=240.0, line_seconds=90.0)


def main(argv: list[str] | None = None) -> int:
    return lines.main(TABLE, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
