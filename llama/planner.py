"""What a training run takes, before it starts: bytes of a GPU's memory, FLOPs and bytes on the wire of a step.

train.py --plan prints it; --gradient_checkpointing auto asks it; its advice ends a run that was out of memory. Plain
arithmetic over sizes and flags, no torch: it plans 7B on 8 GPUs on a laptop. What it counts is the path through the
Triton kernels (what each saves for its backward) and torch's FSDP2 (what it gathers, copies and reduces);
tests/llama/test_planner.py holds it against the tensors of a traced step. Never looks at a device.

Letters as in llama/model.py; e is the bytes of a number in the forward, b the numbers of one block's weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama.arguments import TrainArguments
from llama.config import PRESETS, LlamaConfig, from_hf

GIB = 2**30
# GiB that torch reports for cards of so many GB (4090 or A10, A100-40, H100 or A100-80, H200).
CARDS = {24: 23.5, 40: 39.4, 80: 79.1, 141: 139.7}
# Dense bf16 rates of the data sheets in FLOP/s, for the share of them that a run reaches (mfu).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# What no tensor of ours holds. Assumptions, to be replaced by measured figures: CUDA context, modules and cuBLAS
# workspace; NCCL's buffers; and the share of all tensors that the allocator cannot use for want of one piece.
CONTEXT, NCCL, FRAGMENTATION = 0.75 * GIB, 1.0 * GIB, 0.05
PER_NODE = 8  # GPUs, where torchrun does not say
# Of kernels/loss.py, which this file cannot import; a test holds them equal.
LOGITS_BYTES, FEWEST_ROWS = 256 * 2**20, 2048


@dataclass(frozen=True)
class Plan:
    """Bytes of one GPU by what they are for, at the moment of the step when they are most."""

    moment: str
    parts: dict[str, float]
    alone: bool  # one GPU, so no NCCL

    @property
    def tensors(self) -> float:
        """Without what is reserved for the context, NCCL and fragmentation."""
        return sum(self.parts.values())

    @property
    def reserve(self) -> float:
        return CONTEXT + (0.0 if self.alone else NCCL) + FRAGMENTATION * self.tensors

    @property
    def total(self) -> float:
        return self.tensors + self.reserve


def config_of(args: TrainArguments) -> LlamaConfig:
    """Sizes of the preset or checkpoint directory that --model_name_or_path names, weights unread."""
    name = args.model_name_or_path
    if name in PRESETS and not Path(name).is_dir():
        return PRESETS[name]
    try:
        found = json.loads((Path(name) / "config.json").read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not an object")
    except (OSError, ValueError) as e:
        raise ValueError(
            f"--model_name_or_path {name!r} is neither a preset ({', '.join(PRESETS)}) nor a directory with a "
            f"config.json that can be read ({e})"
        ) from None
    return from_hf(found)


# --- sizes ----------------------------------------------------------------------------------------


def block_shapes(c: LlamaConfig) -> list[tuple[int, ...]]:
    """Shapes of one block's weights."""
    q, k, D, F = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.dim, c.ffn_dim
    return [(D,), (q, D), (k, D), (k, D), (D, q), (D,), (F, D), (F, D), (D, F)]


def root_shapes(c: LlamaConfig) -> list[tuple[int, ...]]:
    """Shapes of what is in no block: embedding, final norm, head."""
    ends = [(c.vocab_size, c.dim)] * (1 if c.tie_embeddings else 2)
    return [*ends, (c.dim,)]


def numbers(shapes: list[tuple[int, ...]], shards: int = 1) -> int:
    """How many numbers shapes hold once each is padded along its first dimension to a multiple of shards."""
    return sum(-(-s[0] // shards) * shards * math.prod(s[1:]) for s in shapes)


def saved_per_token(c: LlamaConfig, e: int) -> int:
    """Bytes that one block keeps of one token for its backward, its input among them.

    attn_norm: x, r (fp32). q, k, v: their input. rope: only its tables. attention: q and k turned, v, o, log-sum-exp
    (fp32 a head). o: attention's own. mlp_norm: the sum h, r. gate, up: their input. swiglu: both. down: its input.
    """
    D, F, heads = c.dim, c.ffn_dim, 2 * c.n_heads + 2 * c.n_kv_heads
    return e * (4 * D + heads * c.head_dim + 3 * F) + 4 * (2 + c.n_heads)


def backward_per_token(c: LlamaConfig, e: int) -> int:
    """Bytes of one token beyond saved_per_token while a block's backward holds most.

    Mostly when swiglu's backward has its own three gradients beside gate and up, and down's input is gone; the stream's
    gradient waits. In attention's backward: all of q, k, v once more, and the MLP's part of what was saved is gone.
    """
    D, F, q, k = c.dim, c.ffn_dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return e * max(D + 2 * F, D + 3 * q + 3 * k - (3 * F + D))


def rows_per_chunk(N: int, V: int, D: int, e: int) -> int:
    """kernels.loss.rows_per_chunk, with gradients of the head."""
    most = max(FEWEST_ROWS, LOGITS_BYTES // (V * e), D)
    if most + (4 // e - 1) * D >= N:
        return max(N, 1)
    chunks = -(-N // most)
    return -(-N // (chunks * 128)) * 128


# --- memory ---------------------------------------------------------------------------------------


def per_node() -> int:
    """Ranks of a node, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", PER_NODE))


def shards_of(args: TrainArguments, world: int) -> int:
    """Ranks that share one copy of the weights."""
    return min(world, per_node()) if "hybrid_shard" in args.fsdp else world


def recomputed(args: TrainArguments, layers: int) -> int:
    """Blocks that --gradient_checkpointing True, False or a number recompute; auto counts as none."""
    wanted = args.gradient_checkpointing
    if isinstance(wanted, bool):
        return layers if wanted else 0
    return min(wanted, layers) if isinstance(wanted, int) else 0


def plan(c: LlamaConfig, args: TrainArguments, world: int = 1, recompute: int | None = None) -> Plan:
    """The most that a training step holds on one of world GPUs, rows of full length, `recompute` blocks recomputed."""
    n = recomputed(args, c.n_layers) if recompute is None else recompute
    if args.lora_r:
        return with_adapters(c, args, world, n)
    return max(moments(c, args, world, n), key=lambda p: p.tensors)


def with_adapters(c: LlamaConfig, args: TrainArguments, world: int, recompute: int) -> Plan:
    """The plan where adapters train: a bound from above, as if frozen layers kept their inputs too.

    The base has the number type of the forward, sharded, or lies in NF4 whole on every rank: 4 bits a number, 8 a block
    of 64, 32 a group of 256 of those. Adapters and their moments are fp32, with copies in the forward's type.
    """
    e, four = 2 if args.bf16 else 4, args.base_bits == 4
    sharded = world > 1 or args.sharded
    shards = 1 if four else shards_of(args, world)
    shapes = dict(zip(("norm", "q", "k", "v", "o", "norm2", "gate", "up", "down"), block_shapes(c), strict=True))
    matrices = sum(math.prod(s) for s in shapes.values() if len(s) == 2)
    block, root, L = numbers(block_shapes(c), shards), numbers(root_shapes(c), shards), c.n_layers
    packed = matrices * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + e * 2 * c.dim
    base = L * packed + e * root if four else e * (L * block + root) / shards
    trained = L * sum(args.lora_r * sum(shapes[t]) for t in args.lora.targets)
    tokens = args.per_device_train_batch_size * args.model_max_length
    beside = tokens * sum(
        e * shapes[t][1] * (2 if args.lora_dropout else 1) + 2 * e * args.lora_r for t in args.lora.targets
    )
    whole, light = tokens * saved_per_token(c, e) + beside, tokens * e * c.dim
    stream, rows = tokens * e * c.dim, rows_per_chunk(tokens, c.vocab_size, c.dim, e)
    parts = {
        "weights": base,
        "adapters, their gradients and optimizer": trained * (16 + 2 * e) / (shards_of(args, world) if sharded else 1),
        "activations": min(L, recompute) * light
        + (L - min(L, recompute)) * whole
        + (whole if recompute else 0)
        + tokens * (24 + 4 * c.head_dim)
        + stream,
        "loss": 2 * stream + 4 * tokens + min(rows, tokens) * -(-c.vocab_size // 64) * 64 * e,
        "work of the backward": tokens * backward_per_token(c, e) + (e * c.dim * c.ffn_dim if four else 0),
    }
    if sharded and not four:
        parts["gathered weights"] = e * (root + (L if "shard_grad_op" in args.fsdp else 2) * block)
    return Plan("some block's backward", parts, world == 1)


def moments(c: LlamaConfig, args: TrainArguments, world: int, recompute: int) -> Iterator[Plan]:
    """A plan for each moment of a step that may be the fullest."""
    sharded, shards = world > 1 or args.sharded, shards_of(args, world)
    e = 2 if args.bf16 else 4
    stored = 2 if args.split_weights else 4
    state = {"adamw_split": 10, "adamw_split_bf16": 6}.get(args.optim, 8)
    block, root, L = numbers(block_shapes(c), shards), numbers(root_shapes(c), shards), c.n_layers
    part = (L * block + root) / shards
    home = 0 if "offload" in args.fsdp else 1  # with offload it is the CPU's memory that holds what is sharded
    tokens = args.per_device_train_batch_size * args.model_max_length
    accumulated = args.gradient_accumulation_steps > 1
    keeps_gathered = "shard_grad_op" in args.fsdp

    # Sums over micro-batches: whole and in fp32 under FSDP, until the last backward reduces them block by block.
    waiting = 4 * int(accumulated and sharded)
    table = tokens * (24 + 4 * c.head_dim)  # ids, targets, borders; cosines and sines
    whole, light = tokens * saved_per_token(c, e), tokens * e * c.dim
    head, rows = c.vocab_size * c.dim, rows_per_chunk(tokens, c.vocab_size, c.dim, e)
    sum_bytes = e if rows >= tokens else 4

    def kept(blocks: int) -> float:
        """Activations of the first blocks, of which the first `recompute` keep their input only."""
        return min(blocks, recompute) * light + max(0, blocks - recompute) * whole

    def at(moment: str, gathered: float, gradients: float, activations: float, loss: float, work: float) -> Plan:
        parts = {
            "weights": home * stored * part,
            "optimizer": home * state * part,
            "gradients": gradients,
            "activations": activations + table,
            "loss": loss,
            "work of the backward": work,
        }
        if sharded:
            parts["gathered weights"] = e * (gathered + (L * block if keeps_gathered else 0))
        return Plan(moment, parts, world == 1)

    # Of gathered blocks, one computes and, over several ranks, the next one is on its way.
    ahead = 0 if keeps_gathered else block * int(shards > 1)
    now = 0 if keeps_gathered else block
    done = home * stored / shards if sharded else e  # bytes of a gradient once it is where it stays

    def gradients_at(i: int) -> float:
        """When blocks i and later have theirs, and of the root the head has its own."""
        if not sharded:
            before = e if accumulated else 0
            return before * (i * block + root - head) + e * ((L - i) * block + head)
        return waiting * (i * block + root) + (L - i) * block * done

    stream = tokens * e * c.dim
    last = stream + 4 * tokens  # the final norm's x and r
    forward = waiting * (L * block + root) if sharded else e * (L * block + root) * int(accumulated)
    logits = min(rows, tokens) * -(-c.vocab_size // 64) * 64 * e
    # The normed stream, its gradient, the losses; a chunk of logits; the head's gradient.
    yield at("loss", root, forward, kept(L) + last, 2 * stream + 4 * tokens + logits + sum_bytes * head, 0)
    # Both gradients, and both times the factor that the backward is given.
    both = (sum_bytes + e) * head + 2 * stream
    yield at("backward of the loss", root + ahead, forward, kept(L) + last, both, 0)
    own_head = e * head if sharded else 0  # unreduced until the root's turn
    for i in reversed(range(L)):
        reducing = 4 * block if sharded else 0
        before = 0 if i == L - 1 else reducing
        work = tokens * backward_per_token(c, e) + before + e * c.dim * c.ffn_dim * int(sharded or not accumulated)
        gathered = root + now + (ahead if i else 0)
        yield at(f"backward of block {i}", gathered, gradients_at(i + 1) + own_head, kept(i) + whole, 0, work)
        work = 2 * stream + reducing + e * block * int(sharded)
        gathered = root + (ahead if i else 0)
        yield at(f"end of block {i}'s backward", gathered, gradients_at(i) + own_head, kept(i), 0, work)
    # The root's own at last. A tied weight has two gradients, and then their sum; a sum over micro-batches the new one.
    extra = e * head * (2 if c.tie_embeddings else int(accumulated))
    ends = max((4 + e) * root, e * root + extra) if sharded else extra
    yield at("end of the backward", 0, L * block * done if sharded else e * (L * block + root), 0, 0, ends)


def fewest_recomputed(c: LlamaConfig, args: TrainArguments, world: int, memory: float) -> int | None:
    """The fewest blocks to recompute so that a step fits; None where it fits with none of the numbers."""
    return next((n for n in range(c.n_layers + 1) if plan(c, args, world, n).total <= memory), None)


def recompute_for(c: LlamaConfig, args: TrainArguments, world: int, memory: float | None) -> int:
    """How many blocks the run recomputes; memory: a GPU's bytes, None on a CPU, where auto means none."""
    if args.gradient_checkpointing != "auto":
        return recomputed(args, c.n_layers)
    if memory is None:
        return 0
    fewest = fewest_recomputed(c, args, world, memory)
    return c.n_layers if fewest is None else fewest


# --- what to change -------------------------------------------------------------------------------


def changes(c: LlamaConfig, args: TrainArguments, world: int) -> Iterator[tuple[str, str, TrainArguments, int, bool]]:
    """(flag, its price, arguments, GPUs, whether alone): one change after another, cheapest first.

    Each on top of those before; alone: on top of those that are not alone.
    """

    def change(**new: object) -> TrainArguments:
        nonlocal args
        args = dataclasses.replace(args, **new)  # type: ignore[arg-type]
        return args

    if not args.bf16:
        yield "--bf16 True", "none on a GPU: bf16 products over fp32 weights", change(bf16=True), world, False
    if world > 1 and ("shard_grad_op" in args.fsdp or (world > per_node() and "hybrid_shard" in args.fsdp)):
        offload = " offload" if "offload" in args.fsdp else ""
        yield "--fsdp full_shard", "weights are gathered more often", change(fsdp="full_shard" + offload), world, False
    if not args.split_weights and not args.lora_r:
        price = "none: the same fp32 weights, in two halves"
        yield "--optim adamw_split", price, change(optim="adamw_split"), world, False
    if args.optim != "adamw_split_bf16" and not args.lora_r:
        price = "moments rounded to bf16, at random"
        yield "--optim adamw_split_bf16", price, change(optim="adamw_split_bf16"), world, False
    if recomputed(args, c.n_layers) < c.n_layers:
        price = "up to a third more work; auto takes the fewest blocks that fit"
        yield "--gradient_checkpointing True", price, change(gradient_checkpointing=True), world, False
    rows, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    splits = [(n, rows * times // n) for n in range(1, rows * times + 1) if rows * times % n == 0]
    flags = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": m} for n, m in splits]
    best = min(flags, key=lambda new: plan(c, dataclasses.replace(args, **new), world).total)
    if best["per_device_train_batch_size"] != rows:
        price = "shorter products" if best["per_device_train_batch_size"] < rows else "none: no sum over micro-batches"
        yield " ".join(f"--{k} {v}" for k, v in best.items()), price, change(**best), world, False
    if "offload" not in args.fsdp:
        for gpus in (2 * world, 4 * world, 8 * world):
            fewer = max(1, args.gradient_accumulation_steps * world // gpus)
            more = dataclasses.replace(args, gradient_accumulation_steps=fewer)
            text = f" and --gradient_accumulation_steps {fewer}" if args.gradient_accumulation_steps > 1 else ""
            yield f"{gpus} GPUs{text}", "GPUs", more, gpus, True
    if not args.lora_r:
        adapted = dataclasses.replace(args, lora_r=8, optim="adamw_torch")
        yield "--lora_r 8 --optim adamw_torch", "adapters are trained, not the weights", adapted, world, True
        if "offload" not in args.fsdp:
            packed = dataclasses.replace(adapted, base_bits=4)
            price = "as before, and the frozen weights rounded to 4 bits"
            yield "--lora_r 8 --optim adamw_torch --base_bits 4", price, packed, world, True
    if "offload" not in args.fsdp and args.base_bits != 4:
        yield (
            '--fsdp "full_shard offload"',
            "slow: the CPU's memory and update",
            change(fsdp="full_shard offload"),
            world,
            True,
        )


def advice(c: LlamaConfig, args: TrainArguments, world: int, memory: float | None = None) -> list[str]:
    """Lines: what each further change brings the step down to, until it fits into memory bytes (None: all).

    Changes that stand alone and bring nothing are left out.
    """
    lines: list[str] = []
    least, alternatives = plan(c, args, world).total, False
    for flag, price, changed, gpus, alone in changes(c, args, world):
        needed = plan(c, changed, gpus).total
        if alone and round(needed / GIB, 1) >= round(least / GIB, 1):
            continue
        if alone and not alternatives:
            lines.append("  and one of these:" if lines else "  one of these:")
        least, alternatives = (least, True) if alone else (needed, False)
        card = next((f"{gb} GB card" for gb, gib in CARDS.items() if needed <= gib * GIB), "no card")
        lines.append(f"  {needed / GIB:7.1f} GiB  {card:11}  {flag}   (cost: {price})")
        if memory is not None and needed <= memory:
            break
    return lines


def is_out_of_memory(e: BaseException) -> bool:
    """Whether an error is lack of memory: Python's, torch's for a GPU, the driver's ("CUDA error: out of memory", and
    Triton's, where a kernel has no room to be loaded), cuBLAS's, or torch's CPU allocator's."""
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return True
    return any(s in str(e) for s in ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def first_line(e: BaseException) -> str:
    """An error's first two sentences: CUDA's goes on for a paragraph."""
    return ". ".join((str(e) or type(e).__name__).split("\n")[0].split(". ")[:2]).rstrip(".")


def out_of_memory(c: LlamaConfig, args: TrainArguments, world: int, memory: float | None) -> str:
    """What to say when a run was out of memory: what was planned, and the changes up to the first that fits."""
    p = plan(c, args, world)
    has = "" if memory is None else f", the card has {memory / GIB:.1f}"
    most = max(p.parts, key=lambda k: p.parts[k])
    lines = [f"planned: {p.total / GIB:.1f} GiB a GPU{has}, most of it {most}. To need less, add one after another:"]
    return "\n".join([*lines, *advice(c, args, world, memory), "  --plan prints the whole account"])


def report(c: LlamaConfig, args: TrainArguments, world: int) -> str:
    """What --plan prints: the account at the fullest moment, the cards it fits, and the flags to change."""
    p, sizes = plan(c, args, world), f"{args.per_device_train_batch_size} x {args.model_max_length}"
    accumulation = args.gradient_accumulation_steps
    n = recomputed(args, c.n_layers)
    width = max(22, *map(len, p.parts))
    lines = [
        f"plan: {args.model_name_or_path}, {c.n_params():,} parameters on {world} GPU{'s' * (world > 1)} ({args.fsdp}, "
        f"{'bf16' if args.bf16 else 'fp32'}, {args.optim})",
        f"  micro-batches of {sizes} tokens, up to {accumulation} a step; {n} of {c.n_layers} blocks recomputed",
        f"  fullest moment: {p.moment}",
        "",
        "GiB a GPU",
        *(f"  {name:{width}} {size / GIB:8.2f}" for name, size in p.parts.items() if size),
        f"  {'context and reserve':{width}} {p.reserve / GIB:8.2f}   (assumed: context {CONTEXT / GIB}, "
        + ("" if p.alone else f"NCCL {NCCL / GIB}, ")
        + f"fragmentation {FRAGMENTATION:.0%})",
        f"  {'total':{width}} {p.total / GIB:8.2f}",
        "",
        "card      as it is   blocks to recompute (--gradient_checkpointing auto)",
    ]
    for gb, gib in CARDS.items():
        fewest = fewest_recomputed(c, args, world, gib * GIB)
        cure = "does not fit with all of them" if fewest is None else f"{fewest} of {c.n_layers}"
        lines.append(f"  {gb:3} GB   {'fits' if p.total <= gib * GIB else 'no':8}   {cure}")
    down, up = (n / GIB for n in traffic(c, args, world, accumulation))
    wires = "" if p.alone else f"; each GPU receives {down:.1f} GiB of weights and sends {up:.1f} GiB of gradients"
    attended = args.model_max_length * (args.model_max_length + 1) // 2
    per_token = flops(c, args.model_max_length, attended, frozen=args.lora_r > 0) / args.model_max_length
    lines += [
        "",
        f"a step: {per_token:.3g} FLOP a token, one document a row" + wires,
        "",
        "to need less, in order of cost, each with those above it:",
        *(advice(c, args, world) or ["  no flag makes it less"]),
    ]
    return "\n".join(lines)


# --- work and traffic -----------------------------------------------------------------------------


def flops(c: LlamaConfig, tokens: int, pairs: int, frozen: bool = False) -> float:
    """FLOPs of forward and backward of real tokens that see `pairs` keys in all (each itself and those before it).

    6 a parameter and token (4 where they are frozen under adapters, whose own are not counted), none for looking up the
    embedding (a tied one counts, as head); attention 12 L H K a pair: two products of 2 K in the forward, twice that in
    the backward. After PaLM (arXiv:2204.02311, appendix B), which counts 12 L H K T a token, also for what no query
    sees. Nothing that is computed again counts.
    """
    looked_up = 0 if c.tie_embeddings else c.vocab_size * c.dim
    return (4.0 if frozen else 6.0) * (
        c.n_params() - looked_up
    ) * tokens + 12.0 * c.n_layers * c.n_heads * c.head_dim * pairs


def traffic(c: LlamaConfig, args: TrainArguments, world: int, micro_batches: int) -> tuple[float, float]:
    """Bytes of a step on one of world GPUs: weights received by all-gathers, gradients sent by reductions.

    A ring's share, (s - 1) / s of a group's bytes. A block is gathered in each forward and again in each backward
    (shard_grad_op: once a micro-batch), the root once a micro-batch. Gradients are reduced once a step, in fp32 (in
    fp32 runs that is their own type); hybrid_shard adds the sum over nodes, 2 (r - 1) / r of the shard.
    """
    if world == 1:
        return 0.0, 0.0
    shards = shards_of(args, world)
    e, share = 2 if args.bf16 else 4, (shards - 1) / shards
    block, root = numbers(block_shapes(c), shards), numbers(root_shapes(c), shards)
    times = 1 if "shard_grad_op" in args.fsdp else 2
    gathered = e * share * micro_batches * (times * c.n_layers * block + root)
    copies, whole = world // shards, 4 * (c.n_layers * block + root)
    return gathered, share * whole + 2 * (copies - 1) / copies * whole / shards
