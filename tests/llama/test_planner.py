"""The plan against a traced step: the tensors that torch and our kernels' own rules make, without a GPU and without
memory. FakeTensors give every operation's result its shape; MemTracker and FSDPMemTracker count the storages alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import kernels
from kernels import launch
from llama import parallel, planner
from llama.arguments import TrainArguments
from llama.config import LlamaConfig
from llama.model import Llama
from llama.source import build_optimizer

ROOT = Path(__file__).resolve().parents[2]
GROUPED = LlamaConfig(256, 6, 8, 2, 704, 3000, max_seq_len=512)
TIED = LlamaConfig(256, 6, 4, 4, 688, 8000, max_seq_len=512, tie_embeddings=True)


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Triton kernels' operators are called on CPU tensors, of which only shapes are asked."""
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "why_not", lambda device: None)
    kernels.use("triton")
    yield
    kernels.use("auto")


@pytest.fixture
def open_loss(triton_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear cross-entropy's own buffers are seen too: its code runs, but for the kernel and the sum in fp32."""
    from kernels import loss

    class Open(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            value, dx, dw = loss.compute(x, weight, targets, None, -100, True, True)
            ctx.save_for_backward(dx, dw)
            ctx.dtype = weight.dtype
            return value

        @staticmethod
        def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            dx, dw = ctx.saved_tensors
            return torch.empty_like(dx), torch.empty_like(dw, dtype=ctx.dtype), None

    monkeypatch.setattr(loss, "launch", lambda *_: None)
    monkeypatch.setattr(loss, "_add_product", lambda *_, first: None)
    monkeypatch.setattr(loss, "_linear_cross_entropy", lambda x, w, t, *_: (Open.apply(x, w, t),))


@contextlib.contextmanager
def process_group(world: int) -> Iterator[parallel.World]:
    """A world whose other ranks are not there and whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield parallel.World(0, world, torch.device("cpu"), init_device_mesh("cpu", (world,)))
    finally:
        dist.destroy_process_group()


def inputs(args: TrainArguments) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    B, T = args.per_device_train_batch_size, args.model_max_length
    ids = torch.zeros(B, T, dtype=torch.int64)
    return ids, ids.clone(), (torch.zeros(B, T, dtype=torch.int32), torch.full((B, T), T, dtype=torch.int32))


def built(c: LlamaConfig, args: TrainArguments, world: parallel.World) -> tuple[Llama, torch.optim.Optimizer]:
    torch.set_default_dtype(torch.bfloat16 if args.split_weights else torch.float32)
    try:
        model = Llama(c)  # train.py builds on meta and moves, which FakeTensors do not allow
    finally:
        torch.set_default_dtype(torch.float32)
    parallel.prepare(
        model,
        model.layers,
        world,
        bf16=args.bf16,
        reshard_after_forward="shard_grad_op" not in args.fsdp,
        recompute=planner.recomputed(args, c.n_layers),
    )
    return model, build_optimizer(args, model)


def traced_peak(c: LlamaConfig, args: TrainArguments, world: int) -> int:
    """Bytes of all storages alive at the fullest moment of a step, inputs and weights and optimizer among them."""
    sharded = world > 1 or args.sharded
    alone = contextlib.nullcontext(parallel.World(0, 1, torch.device("cpu"), None))
    with process_group(world) if sharded else alone as w, FakeTensorMode():
        model, optimizer = built(c, args, w)
        tokens, targets, documents = inputs(args)
        if sharded:
            tracker: MemTracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((tokens, targets, *documents))
        else:
            tracker = MemTracker()
            tracker.track_external(model, optimizer, tokens, targets, *documents)
        micro_batches = min(2, args.gradient_accumulation_steps)
        with tracker:
            for i in range(micro_batches):
                tracker.reset_mod_stats()
                parallel.sync_gradients(model, i == micro_batches - 1)
                model(tokens, targets, documents)[0].backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("c", [GROUPED, TIED], ids=["grouped", "tied"])
@pytest.mark.parametrize("flags", [{}, {"bf16": True, "optim": "adamw_split"}], ids=["fp32", "split"])
@pytest.mark.parametrize("recompute", [0, 4, 6])
def test_saved_for_backward_is_counted_exactly(
    triton_path: None, c: LlamaConfig, flags: dict[str, Any], recompute: int
) -> None:
    """Every storage that autograd holds after a forward, but for weights and what the loss keeps."""
    args = TrainArguments(per_device_train_batch_size=3, model_max_length=128, **flags)
    world = parallel.World(0, 1, torch.device("cpu"), None)
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with FakeTensorMode():
        model, _ = built(c, dataclasses.replace(args, gradient_checkpointing=recompute > 0 and recompute), world)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss, _ = model(*inputs(args))
    for p in model.parameters():
        found.pop(p.untyped_storage()._cdata, None)
    assert loss.requires_grad
    N, e = 3 * 128, 2 if args.bf16 else 4
    kept = (c.n_layers - recompute) * planner.saved_per_token(c, e) + recompute * e * c.dim
    head = c.vocab_size * c.dim * e
    tables = 2 * 4 * (c.head_dim // 2) + 4 + 4 + 8  # cosines, sines, borders, ids of the embedding
    if recompute == c.n_layers:
        tables -= 2 * 4 * (c.head_dim // 2) + 4 + 4  # blocks that recompute hold them without autograd's knowing
    want = N * (kept + 2 * e * c.dim + 4 + tables) + head
    assert sum(found.values()) == want


CASES: list[tuple[str, LlamaConfig, dict[str, Any], int]] = [
    ("fp32, one process", GROUPED, {}, 1),
    ("fp32, tied, recomputed", TIED, {"gradient_checkpointing": True}, 1),
    ("split, one process", GROUPED, {"bf16": True, "optim": "adamw_split"}, 1),
    ("split, tied, some recomputed", TIED, {"bf16": True, "optim": "adamw_split_bf16", "gradient_checkpointing": 4}, 1),
    ("bf16 over fp32, group of one", GROUPED, {"bf16": True}, 1),
    ("bf16 over fp32, 8 ranks", GROUPED, {"bf16": True}, 8),
    ("fp32, 2 ranks, tied", TIED, {}, 2),
    ("split, 8 ranks, recomputed", GROUPED, {"bf16": True, "optim": "adamw_split", "gradient_checkpointing": True}, 8),
    ("split, 4 ranks, kept gathered", TIED, {"bf16": True, "optim": "adamw_split", "fsdp": "shard_grad_op"}, 4),
    ("accumulated, 8 ranks", GROUPED, {"bf16": True, "optim": "adamw_split", "gradient_accumulation_steps": 4}, 8),
    ("accumulated, fp32, one process", TIED, {"gradient_accumulation_steps": 2}, 1),
]


@pytest.mark.parametrize(("name", "c", "flags", "world"), CASES, ids=[case[0] for case in CASES])
def test_peak_is_that_of_a_traced_step(
    open_loss: None, name: str, c: LlamaConfig, flags: dict[str, Any], world: int
) -> None:
    args = TrainArguments(per_device_train_batch_size=4, model_max_length=256, **flags)
    traced, planned = traced_peak(c, args, world), planner.plan(c, args, world).tensors
    print(f"{name}: planned {planned / 2**20:.2f} MiB, traced {traced / 2**20:.2f}, {planned / traced - 1:+.1%}")
    assert abs(planned / traced - 1) <= 0.1
