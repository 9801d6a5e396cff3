"""Fine-tune a LLaMA on dialogues: `python train.py`, or ChatDoctor's own `torchrun ... train.py` line.

The whole run reads downwards: the reference of preference data, one step, the loop, and what stands around it. Every
loss is the sum over the supervised tokens of the global batch divided by their number, so it does not matter how a
batch is split over rows, micro-batches or ranks. Progress goes to stderr, metrics to <output_dir>/metrics.jsonl.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kernels
from data import examination, loader, synthesize
from data.prefetch import Ahead
from data.records import BadRecord
from data.training import open_batches, open_data, origin_of, training_texts
from llama import checkpoint, elastic, lora, parallel, planner, preference, provenance, rehearsal
from llama.arguments import TrainArguments, parse
from llama.batching import answer_greedily
from llama.changes import WeightSample
from llama.elastic import Stop
from llama.optimizer import clipped_step
from llama.parallel import World
from llama.run_state import (
    Training,
    check_output_dir,
    resume,
    save_finished,
    save_state,
    saved_dtype,
    state_tensors,
)
from llama.runlog import RunLog, check_installed, draw_loss, say
from llama.saver import Saved, Saver
from llama.schedule import learning_rate
from llama.source import build_model, build_optimizer, fill_weights, gpu_memory, open_source
from llama.together import on_first_rank
from llama.training_state import forget

# `python train.py`: the tiny model on the built-in sample. What the numbers were chosen by is in docs/log.md.
BUILTIN: dict[str, Any] = {
    "chat_format": synthesize.RECIPE.chat_format,
    "instruction": synthesize.RECIPE.instruction,
    "model_max_length": synthesize.RECIPE.max_len,
    "max_steps": 2850,
    "per_device_train_batch_size": 12,  # dialogues: about 16 questions
    "learning_rate": 4e-3,
    "warmup_steps": 40,
    "adam_beta2": 0.98,
    "weight_decay": 0.05,
    "save_steps": 200,
    "save_total_limit": 1,
}


class NonFinite(ValueError):
    """The loss or the gradient is not a number; the weights are as they were before the step."""


class BadBatch(NonFinite):
    """NonFinite on the rank whose batch it was."""


@dataclass(frozen=True)
class Run(Training):
    """Everything that the loop works with."""

    batches: loader.Loader

    @property
    def reports(self) -> tuple[str, ...]:
        """What the objective reports beside its loss."""
        return preference.REPORTED if self.args.pairs else ()


# --- the reference of preference data -------------------------------------------------------------


def open_reference(run: Run) -> None:
    """Give preference data the starting weights' log-probabilities of all its answers: kept ones, or made now."""
    batches, source = run.batches, run.source
    sets = {"train": batches.dataset, "held_out": batches.evaluation}
    start = source.weights or f"{run.args.model_name_or_path}, random, seed {run.args.seed}"
    base = ["in 4 bits"] if run.args.base_bits == 4 else []
    identity = preference.identity_of(start, [*(d.identity for d in sets.values()), *base])

    def make() -> dict[str, torch.Tensor]:
        say(run.world, "the starting model reads the pairs, once: its log-probabilities are the reference")
        return {
            name: preference.reference_of(
                batches.all_batches(d), len(d), lambda b, weigh: run.model(*model_inputs(b, run.world), weigh=weigh)
            )
            for name, d in sets.items()
        }

    for name, found in preference.kept(run.output_dir / "reference.logprobs", identity, make).items():
        sets[name].reference = found.numpy()
    parallel.reshard(run.model)
    batches.reference = identity


# --- one step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    """Global mean loss per supervised token or pair, gradient norm, whether any rank was asked to stop, and means of
    what else the objective reports."""

    loss: float
    grad_norm: float
    stop: bool
    reports: dict[str, float]


def train_step(run: Run, step: loader.Step, rate: float, stopping: bool) -> StepResult:
    """One optimizer step over this rank's micro-batches.

    NonFinite on every rank, before any weight has changed, if the loss or the gradient is not a number.
    """
    sums = torch.zeros(2 + len(run.reports), dtype=torch.float64)  # loss, ranks that were asked to stop, reports
    totals = []
    for i, batch in enumerate(step.micro_batches):
        parallel.sync_gradients(run.model, i == len(step.micro_batches) - 1)
        loss, found = forward(run, batch)
        # FSDP averages gradients over ranks; times world.size, the result is the sum over the global batch.
        (loss * (run.world.size / step.divisor)).backward()
        totals.append(found)
    suspect = None
    for batch, found in zip(step.micro_batches, totals, strict=True):  # not before: the first look waits for the device
        sums += found.cpu()
        if suspect is None and not math.isfinite(sums[0]):
            suspect = batch
    sums[1] = float(stopping)
    norm = parallel.grad_norm(run.model.parameters(), run.world)
    parallel.all_reduce(sums)
    if suspect is not None:
        raise BadBatch(f"the loss is {sums[0]} in the batch of records {record_names([suspect])}; nothing was updated")
    if not (math.isfinite(sums[0]) and math.isfinite(norm.item())):
        names = record_names(step.micro_batches)
        raise NonFinite(f"loss {sums[0]}, gradient norm {norm} in the step of records {names}; nothing was updated")
    update(run, norm, rate)
    loss, _, *reports = (sums / step.divisor).tolist()
    return StepResult(loss, norm.item(), sums[1].item() > 0, dict(zip(run.reports, reports, strict=True)))


def forward(run: Run, batch: loader.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What backward starts from, and sums to report, fp64: the loss, how many it is of, and run.reports."""
    inputs = model_inputs(batch, run.world)
    if not run.args.pairs:
        loss, count = run.model(*inputs)
        return loss, torch.stack([loss.detach().double(), count.double()])
    choices = preference.Preference(run.args.loss_type, run.args.beta, run.args.label_smoothing)
    pair_loss = preference.PairLoss(choices, batch.pairs)
    weighted, _ = run.model(*inputs, weigh=pair_loss)  # not the loss, but with its gradient
    return weighted, pair_loss.totals


def update(run: Run, norm: torch.Tensor, rate: float) -> None:
    """One optimizer step at this learning rate, gradients scaled down to max_grad_norm (0: as they are)."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    clipped_step(run.optimizer, norm, run.args.max_grad_norm)
    run.optimizer.zero_grad(set_to_none=True)


def model_inputs(batch: loader.Batch, world: World) -> tuple[Any, ...]:
    """A batch as Llama.forward's tokens, targets, documents, on this rank's device."""
    tokens, targets, start, end = (
        t.to(world.device, non_blocking=True) for t in (batch.tokens, batch.targets, batch.start, batch.end)
    )
    return tokens, targets, (start, end)


def record_names(batches: list[loader.Batch]) -> str:
    """file:number of the records in batches, for a message."""
    names = [f"{file}:{number}" for batch in batches for file, number in batch.records]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Means over the held-out supervised tokens or pairs: the loss, and run.reports; empty if there are none."""
    run.model.eval()
    sums = torch.zeros(2 + len(run.reports), dtype=torch.float64)
    for batch in run.batches.eval_batches():
        sums += forward(run, batch)[1].cpu()
    run.model.train()
    parallel.reshard(run.model)
    parallel.all_reduce(sums)
    loss, _, *reports = (sums / sums[1]).tolist()
    return dict(zip(("loss", *run.reports), (loss, *reports), strict=True)) if sums[1] else {}


def speed(run: Run, step: loader.Step, seconds: float) -> dict[str, float]:
    """What a step cost: real tokens per second, seconds, FLOPs a token, and on a GPU its peak memory and mfu.

    mfu: the FLOPs of planner.flops, of real tokens and what they see alone, over the data sheet's dense bf16 rate.
    """
    flops = planner.flops(run.source.config, step.tokens, step.attended, frozen=run.args.lora_r > 0)
    line = {"tokens_per_s": step.tokens / seconds, "seconds": seconds, "flops_per_token": flops / step.tokens}
    if run.world.device.type == "cuda":
        line["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        name = torch.cuda.get_device_name()
        peak = next((rate for key, rate in planner.PEAK_FLOPS.items() if key in name), None)
        if peak is not None:
            line["mfu"] = flops / seconds / run.world.size / peak
    return line


# --- the loop -------------------------------------------------------------------------------------


def due(strategy: str, every: int, run: Run, step: int) -> bool:
    """Whether what has this strategy happens after so many steps."""
    if strategy == "epoch":
        return int(run.batches.epoch_of(step) + 1e-9) > int(run.batches.epoch_of(step - 1) + 1e-9)
    return strategy == "steps" and step % every == 0


def with_true_rows(args: TrainArguments, longest: loader.Batch) -> TrainArguments:
    """The flags for the planner: of a micro-batch the rows and their length that packing leaves at the most."""
    B, T = longest.tokens.shape
    return dataclasses.replace(args, per_device_train_batch_size=B, model_max_length=T)


def rehearse(run: Run, done: int, total: int) -> None:
    """Before the next step: the largest batch that may come, forward and backward, an evaluation batch, and a save.

    Whatever is short (memory, disk, a right to write) is so now. The run then goes on as if this had not been.
    """
    begin, args, source = time.perf_counter(), run.args, run.source
    tensors = state_tensors(run)
    coming = sum(due(args.save_strategy, args.save_steps, run, number) for number in range(done + 1, total + 1))
    size = rehearsal.size_on_disk(tensors, run.world.size)
    finished = saved_dtype(args).itemsize * source.config.n_params()
    rehearsal.check_space(run.output_dir, size, coming, args.save_total_limit, finished)
    batch, times = run.batches.longest()
    with rehearsal.untouched(run.model, run.world.device):
        for last in (False, True)[-times:]:
            parallel.sync_gradients(run.model, last)
            loss, _ = run.model(*model_inputs(batch, run.world))
            (loss / batch.tokens.numel()).backward()
        held_out = next(run.batches.eval_batches(), None)
        if held_out is not None:
            run.model.eval()
            with torch.no_grad():
                run.model(*model_inputs(held_out, run.world))
    state = {"order": run.batches.state(done), "arguments": dataclasses.asdict(args)}
    files = checkpoint.model_files(source.config, source.tokenizer, source.chat_format, source.generation)
    rehearsal.save(run.output_dir, done, tensors, state, files)
    peak = rehearsal.peak_of(run.world.device)
    used = ""
    if peak is not None:
        c, flags, size = source.config, with_true_rows(args, batch), run.world.size
        recompute = planner.recompute_for(c, flags, size, gpu_memory(run.world))
        planned = planner.plan(c, flags, size, recompute).tensors
        used = f"; at most {peak / planner.GIB:.1f} GiB of tensors ({planned / planner.GIB:.1f} planned)"
    shape = " x ".join(map(str, batch.tokens.shape))
    say(run.world, f"rehearsed a batch of {shape}, evaluation and saving in {time.perf_counter() - begin:.1f} s{used}")


def train(run: Run, stop: Stop, steps: Ahead[loader.Step]) -> bool:
    """The loop; whether it reached its end (else it was asked to stop, and saved where it was)."""
    args = run.args
    total = args.max_steps if args.max_steps > 0 else run.batches.total_steps(args.num_train_epochs)
    done, tokens = resume(run, run.batches.restore)
    if args.rehearse and done < total:
        rehearse(run, done, total)
    settings = dataclasses.asdict(args)
    log = RunLog(run.output_dir, done, args.report_to, settings) if run.world.rank == 0 else None
    interval = 0.2 if sys.stderr.isatty() else 20.0  # a log file is not redrawn
    options: dict[str, Any] = {"unit": "step", "disable": run.world.rank != 0, "mininterval": interval}

    def saved(s: Saved) -> None:
        if log is not None:
            log.write({"step": s.step, "save_seconds": s.stalled, "save_write_seconds": s.seconds})

    saver = Saver(run.output_dir, args.save_total_limit or None, background=args.async_save, done=saved)
    run.model.train()
    sample, stopped = WeightSample(run.optimizer, args.bf16), False
    steps.begin(range(done, total))
    with tqdm(total=total, initial=done, **options) as bar:
        for number in range(done + 1, total + 1):
            begin = time.perf_counter()
            step, rate = steps.next(), learning_rate(args, number, total)
            waited = time.perf_counter() - begin
            if args.lora_r:
                lora.seed_dropout(args.seed, number, run.world.rank)
            before = sample.take() if number % args.logging_steps == 0 else None
            try:
                result = train_step(run, step, rate, stop.signal != 0)
            except NonFinite:
                saver.wait()  # it is from before
                raise
            changed = sample.changed(before) if before is not None else {}
            seconds = time.perf_counter() - begin
            tokens += step.tokens
            if log is not None and changed:
                counts = {"tokens": tokens, "supervised_tokens": step.supervised_tokens, "data_seconds": waited}
                line = {"step": number, "epoch": run.batches.epoch_of(number), "loss": result.loss, "lr": rate}
                line |= {**result.reports, "grad_norm": result.grad_norm, **changed, **counts}
                log.write({**line, **speed(run, step, seconds)})
            bar.set_postfix_str(f"loss {result.loss:.3f}, {step.tokens / seconds:,.0f} tok/s", refresh=False)
            bar.update()
            stopped = result.stop and number < total
            saver.poll()
            if stopped or due(args.save_strategy, args.save_steps, run, number):
                path = save_state(run, saver, number, run.batches.state(number), tokens)
            if stopped:
                break
            if number == total or due(args.evaluation_strategy, args.eval_steps, run, number):
                report_held_out(run, number, log)
        saver.wait()
    if log is not None:
        log.close()
        if not draw_loss(log.path, run.output_dir / "loss.png"):
            say(run.world, "the loss is not drawn: pip install matplotlib")
    if stopped:
        say(run.world, f"stopped after step {number}; {path} holds the run.")
        say(run.world, f"Go on with: {stop.command}")
    return not stopped


def report_held_out(run: Run, step: int, log: RunLog | None) -> None:
    """Evaluate, say and log the held-out loss."""
    found = evaluate(run)
    if not found:
        return
    if not run.args.pairs:
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    rest = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items() if name != "loss")
    say(run.world, f"step {step}: held-out loss {found['loss']:.4f}, {rest}")
    if log is not None:
        log.write({"step": step, **{f"eval_{name}": value for name, value in found.items()}})


def examine(run: Run, sample: synthesize.Sample) -> None:
    """Ask the finished model the held-out questions; what comes of it is said, and kept in examination.json."""
    run.model.eval()
    answer = functools.partial(answer_greedily, run.model, run.source.tokenizer, run.source.chat_format)
    shares = examination.examine(sample, answer, lambda text: say(run.world, text))
    (run.output_dir / "examination.json").write_text(json.dumps(shares, indent=2) + "\n")
    run.model.train()


def execute(args: TrainArguments, world: World) -> int:
    """The run that the flags describe; its exit status."""
    output_dir = Path(args.output_dir)
    if not world.restarted:
        check_output_dir(args, output_dir)
    check_installed(args.report_to)
    kernels.use(args.kernels, world.device)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    sample = None if args.data_path else synthesize.sample()
    texts = (lambda: training_texts(args)) if sample is None else sample.texts
    source = open_source(args, texts)
    train_set, held_out, report = parallel.first_alone(
        world, lambda: open_data(args, source.tokenizer, source.chat_format, sample, world.rank)
    )
    batches = open_batches(args, train_set, held_out, world.rank, world.size)
    report.notes.extend(batches.report())
    say(world, report.text())
    if args.preview:
        if world.rank == 0:
            print(loader.preview(train_set, args.preview, source.tokenizer, colour=sys.stdout.isatty()))
        return 0
    if args.overwrite_output_dir and not args.resume_from_checkpoint and not world.restarted:
        on_first_rank(lambda: forget(output_dir))
    on_first_rank(lambda: elastic.begin(world.store))
    model = build_model(with_true_rows(args, batches.longest()[0]), source, world)
    optimizer = build_optimizer(args, model)
    fill_weights(args, source, model, optimizer)
    origin = on_first_rank(lambda: provenance.file_of(origin_of(args, source.weights, report)))
    run = Run(args, world, source, model, optimizer, output_dir, origin, batches)
    if args.pairs:
        open_reference(run)
    where = f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
    say(world, f"model: {source.config.n_params():,} parameters on {where}; {kernels.describe(world.device)}")
    if args.lora_r:
        count = sum(p.numel() for _, p in lora.adapters(model))
        say(world, f"LoRA: {count:,} parameters train ({count / source.config.n_params():.2%} of the model's number)")
    watch = elastic.Watch(world.store, world.rank, world.size, args.timeout)
    with Stop() as stop, watch, Ahead(lambda number: batches.step(number).pinned(world.device)) as steps:
        if not train(run, stop, steps):
            return 0
    save_finished(run)
    if sample is not None and world.mesh is None:
        examine(run, sample)
    say(world, f"saved {output_dir}; talk to it: python generate.py --checkpoint {output_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    rank = int(os.environ.get("RANK", 0))
    try:
        args = parse(sys.argv[1:] if argv is None else argv, BUILTIN)
        if args.plan:
            if rank == 0:
                gpus = args.plan_gpus or int(os.environ.get("WORLD_SIZE", 1))
                print(planner.report(planner.config_of(args), args, gpus))
            return 0
        world = parallel.init(
            args.device, sharded=args.sharded, hybrid="hybrid_shard" in args.fsdp, timeout=args.timeout
        )
        return execute(args, world)
    except ValueError as e:
        remedy = " (--skip_bad_records sets such records aside and goes on)" if isinstance(e, BadRecord) else ""
        # What one node alone lacks, a file or a device, its first rank says.
        if rank == 0 or os.environ.get("LOCAL_RANK") == "0" or isinstance(e, BadBatch):
            print(f"error: {e}{remedy}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if elastic.lost_peer(e):
            print(f"error: rank {rank}: another rank is gone, in the middle of an exchange with it", file=sys.stderr)
            return 1
        if not planner.is_out_of_memory(e):
            raise
        memory = gpu_memory(world)
        size = world.size if world.device.type == "cuda" else 1
        why = planner.out_of_memory(planner.config_of(args), args, size, memory)
        print(f"error: rank {rank} is out of memory ({planner.first_line(e)}); {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the loop or after it; within, elastic.Stop takes Ctrl-C
        if rank == 0:
            print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        if not parallel.launched():
            parallel.shutdown()


if __name__ == "__main__":
    status = main()
    if parallel.launched():
        parallel.leave(status)
    sys.exit(status)
