"""What a training run starts from: sizes, tokenizer, format; the model and the optimizer that the flags ask for.

train.py builds with it, top to bottom: open_source, build_model, build_optimizer, fill_weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama import checkpoint, lora, nf4, parallel, planner
from llama.arguments import TrainArguments
from llama.chat import ChatFormat
from llama.config import PRESETS, LlamaConfig
from llama.model import Llama
from llama.optimizer import SplitAdamW
from llama.parallel import World
from llama.runlog import say
from llama.tokenizer import Tokenizer, train_tokenizer


@dataclass(frozen=True)
class Source:
    """What a run starts from: sizes, tokenizer, format, and weights (None: random)."""

    config: LlamaConfig
    tokenizer: Tokenizer
    chat_format: ChatFormat
    weights: Path | None
    generation: dict[str, Any]


def open_source(args: TrainArguments, texts: Callable[[], Iterable[str]]) -> Source:
    """The checkpoint directory or preset that --model_name_or_path names.

    texts() gives the training texts: a small preset without --tokenizer_path learns its tokenizer from them.
    """
    name = args.model_name_or_path
    if Path(name).is_dir():
        chat_format = chosen_format(args, checkpoint.load_chat_format(name))
        generation = checkpoint.load_generation(name) or checkpoint.SAMPLING
        return Source(
            checkpoint.load_config(name), checkpoint.load_tokenizer(name), chat_format, Path(name), generation
        )
    if name not in PRESETS:
        raise ValueError(
            f"--model_name_or_path {name!r} is neither a directory nor a preset ({', '.join(PRESETS)}); "
            "Meta's consolidated.*.pth and GGUF files are imported by convert_weights.py first"
        )
    if args.lora_r:
        raise ValueError(
            f"--lora_r with --model_name_or_path {name}: a preset has random weights, which adapters cannot mend; "
            "give the directory of a trained model"
        )
    preset = PRESETS[name]
    if args.tokenizer_path:
        tokenizer = Tokenizer.load(args.tokenizer_path)
    elif preset.vocab_size <= 8192:
        tokenizer = train_tokenizer(texts(), preset.vocab_size)
    else:
        raise ValueError(f"preset {name} has {preset.vocab_size:,} tokens: give --tokenizer_path tokenizer.model")
    chat_format = chosen_format(args, ChatFormat())
    return Source(preset.with_vocab(tokenizer.vocab_size), tokenizer, chat_format, None, checkpoint.SAMPLING)


def chosen_format(args: TrainArguments, default: ChatFormat) -> ChatFormat:
    """The default format, with what the flags say instead."""
    name = args.chat_format or default.name
    return ChatFormat(name, default.instruction if args.instruction is None else args.instruction)


def build_model(args: TrainArguments, source: Source, world: World) -> Llama:
    """The model on this rank's device, sharded and ready to train, without values yet."""
    with torch.device("meta"):
        model = Llama(source.config)
    if args.split_weights:
        model.to(torch.bfloat16)
    unsharded = None
    if args.lora_r:
        model.to(torch.bfloat16 if args.bf16 else torch.float32)
        if args.base_bits == 4:
            nf4.replace(model.layers)
            unsharded = set(model.parameters())
        lora.apply(model, args.lora)
    offload = "offload" in args.fsdp
    recompute = planner.recompute_for(source.config, args, world.size, gpu_memory(world))
    if args.gradient_checkpointing == "auto" and recompute:
        say(world, f"{recompute} of {source.config.n_layers} blocks are recomputed in backward, so that a step fits")
    parallel.prepare(
        model,
        model.layers,
        world,
        bf16=args.bf16,
        reshard_after_forward="shard_grad_op" not in args.fsdp,
        offload=offload,
        recompute=recompute,
        compiled=args.torch_compile,
        unsharded=unsharded,
    )
    return model.to_empty(device="cpu" if offload else world.device)


def gpu_memory(world: World) -> int | None:
    """Bytes of this rank's GPU; None on a CPU."""
    return torch.cuda.get_device_properties(world.device).total_memory if world.device.type == "cuda" else None


def build_optimizer(args: TrainArguments, model: Llama) -> torch.optim.Optimizer:
    """AdamW, whose state exists from the start, so that a checkpoint can be read into it."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in names if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in names if p.ndim <= 1], "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.split_weights:
        moments = torch.bfloat16 if args.optim == "adamw_split_bf16" else torch.float32
        return SplitAdamW(groups, names, moments=moments, seed=args.seed, **common)
    optimizer = torch.optim.AdamW(groups, fused=True, **common)
    for p in names:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def fill_weights(args: TrainArguments, source: Source, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """The weights that a run starts from: read slice by slice from a checkpoint, or random."""
    assign = optimizer.assign if isinstance(optimizer, SplitAdamW) else checkpoint.copied
    if args.lora_r:
        assert source.weights is not None
        checkpoint.load_weights(model, source.weights, nf4.assigner(model, checkpoint.copied))
        lora.init_weights(model, args.seed, lambda p, full: checkpoint.copied(p, parallel.part_of(full, p)))
    elif source.weights is None:
        model.init_weights(args.seed, lambda p, full: assign(p, parallel.part_of(full, p)))
    else:
        checkpoint.load_weights(model, source.weights, assign)
