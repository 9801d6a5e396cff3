"""What a run leaves and goes on from: the contents of its checkpoints, and the finished model.

Called by train.py on all ranks at once. Checkpoints are written by saver.py and read by training_state.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama import checkpoint, lora, lora_files, parallel
from llama.arguments import TrainArguments, changed_flags
from llama.command_line import LATEST
from llama.model import Llama
from llama.parallel import World
from llama.runlog import say
from llama.saver import Saver
from llama.source import Source
from llama.training_state import latest_training_state, load_training_state


@dataclass(frozen=True)
class Training:
    """A model that trains, what it was made from, and where it goes: a run without its data."""

    args: TrainArguments
    world: World
    source: Source
    model: Llama
    optimizer: torch.optim.Optimizer
    output_dir: Path
    origin: dict[str, bytes]  # provenance.json, this run's stage included


def check_output_dir(args: TrainArguments, path: Path) -> None:
    """ValueError if the run could not write there, or would write over an earlier one that nobody said may go, or over
    what it starts from."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise ValueError(f"--output_dir {path}: {there} {why}")
    start = Path(args.model_name_or_path).resolve()
    forgotten = {p.resolve() for p in path.glob("checkpoint-*")} if args.overwrite_output_dir else set()
    if forgotten & {start, *start.parents} and not args.resume_from_checkpoint:
        raise ValueError(f"--overwrite_output_dir would remove {start}, which this run starts from: move one of them")
    if args.lora_r and start == path.resolve():
        raise ValueError(f"{path}: the merged model would replace the adapters' base; choose another --output_dir")
    if args.resume_from_checkpoint or args.overwrite_output_dir or not path.is_dir():
        return
    if (path / "config.json").exists() or any(path.glob("checkpoint-*")):
        raise ValueError(
            f"{path} already holds a trained model: talk to it with `python generate.py --checkpoint {path}`, go on "
            "with --resume_from_checkpoint auto, train anew with --overwrite_output_dir, or choose another --output_dir"
        )


def state_tensors(run: Training) -> dict[str, torch.Tensor]:
    """Everything of a run that trains and is a tensor: weights, moments, step counts, this rank's generator."""
    tensors: dict[str, torch.Tensor] = {}
    for name, p in run.model.named_parameters():
        if not p.requires_grad:
            continue
        tensors[f"model.{name}"] = p.detach()
        for key, value in run.optimizer.state[p].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors[f"rng.{run.world.rank}"] = torch.get_rng_state()
    return tensors


def save_state(run: Training, saver: Saver, step: int, order: dict[str, Any], tokens: int) -> Path:
    """checkpoint-<step>/: everything that the next step depends on, and the files that make it a model directory.

    order: the state of the batches.
    """
    source = run.source
    adapter, base = run_adapter(run)
    return saver.save(
        step,
        state_tensors(run),
        {
            "order": order,
            "tokens": tokens,
            "arguments": dataclasses.asdict(run.args),
            "world": run.world.size,
            "torch": torch.__version__,
            "base": base,
        },
        checkpoint.model_files(source.config, source.tokenizer, source.chat_format, source.generation)
        | adapter
        | run.origin,
    )


def run_adapter(run: Training) -> tuple[dict[str, bytes], str | None]:
    """The adapters' configuration as a file, and what tells their base from others; of a run without, nothing."""
    if not run.args.lora_r:
        return {}, None
    assert run.source.weights is not None
    return lora_files.config_file(run.args.lora, run.source.weights), lora_files.fingerprint(run.source.weights)


def resume(run: Training, restore: Callable[[dict[str, Any]], int]) -> tuple[int, int]:
    """Steps done and tokens seen: those of the checkpoint that --resume_from_checkpoint means, or 0 and 0.

    When torchrun has started the run again it is the newest in output_dir, whatever the flags say. restore(order):
    the step that batches of this order go on with.
    """
    wanted, path = run.args.resume_from_checkpoint, None
    if wanted == "auto" or run.world.restarted:
        path = latest_training_state(run.output_dir)
    if path is None and wanted not in ("", "auto"):
        path = Path(wanted)
    if path is None:
        return 0, 0
    tensors = state_tensors(run)
    state = load_training_state(path, tensors)
    if state.get("base") != run_adapter(run)[1]:
        raise ValueError(f"{path}: its adapters belong to another base than {run.args.model_name_or_path}")
    for name in ("lora_alpha", "lora_dropout", "base_bits") if run.args.lora_r else ():
        if (before := state["arguments"][name]) != (now := getattr(run.args, name)):
            raise ValueError(f"{path}: {name} changed: {before} in the checkpoint, {now} now")
    torch.set_rng_state(tensors[f"rng.{run.world.rank}"])
    step = restore(state["order"])
    say(run.world, f"resuming after step {step} from {path}")
    if changed := changed_flags(state["arguments"], run.args):
        say(run.world, f"  changed since then: {', '.join(changed)}")
    return step, int(state["tokens"])


def saved_dtype(args: TrainArguments) -> torch.dtype:
    """The number type of the finished model."""
    return getattr(torch, args.save_dtype if args.save_dtype != "auto" else "bfloat16" if args.bf16 else "float32")


def save_finished(run: Training) -> None:
    """The finished model at output_dir, in the Hugging Face layout; out/latest names it. Adapters folded in, and by
    themselves in output_dir/adapter."""
    args, source = run.args, run.source
    tensors = parallel.full_tensors(run.model, run.optimizer.master if args.split_weights else parallel.local)
    if args.lora_r:
        assert source.weights is not None
        lora_files.save_adapter(
            run.output_dir / "adapter",
            run.model,
            args.lora,
            source.weights,
            source.chat_format,
            run.origin,
        )
        tensors = lora.merged_tensors(run.model)
    checkpoint.save_sharded_model(
        run.output_dir,
        tensors,
        source.config,
        source.tokenizer,
        source.chat_format,
        source.generation,
        saved_dtype(args),
        beside=run.origin,
    )
    if run.world.rank != 0:
        return
    draft = LATEST.with_suffix(f".{os.getpid()}")
    try:
        LATEST.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(f"{run.output_dir.resolve()}\n")
        draft.replace(LATEST)
    except OSError as e:  # the model is there, whatever this directory allows
        say(run.world, f"{LATEST} does not name the model: it cannot be written ({e.strerror})")
