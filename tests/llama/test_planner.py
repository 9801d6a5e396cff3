"""The plan against a traced step: the tensors that torch and our kernels' own rules make, without a GPU and without
memory. FakeTensors give every operation's result its shape; MemTracker and FSDPMemTracker count the storages alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import sys
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
from llama.config import PRESETS, LlamaConfig
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


def test_loss_is_cut_as_the_kernel_cuts_it() -> None:
    pytest.importorskip("triton")
    from kernels import loss

    assert (planner.LOGITS_BYTES, planner.FEWEST_ROWS) == (loss.LOGITS_BYTES, loss.FEWEST_ROWS)
    for N in (1, 100, 2048, 5000, 16384, 65536):
        for V, D in ((2048, 128), (32000, 4096), (128256, 8192)):
            for e in (2, 4):
                assert planner.rows_per_chunk(N, V, D, e) == loss.rows_per_chunk(N, V, D, e, need_dw=True)


@pytest.mark.parametrize("c", [GROUPED, TIED, PRESETS["7b"], PRESETS["llama3.2-1b"]])
def test_shapes_are_those_of_the_model(c: LlamaConfig) -> None:
    with torch.device("meta"):
        model = Llama(c)
    assert [tuple(p.shape) for p in model.layers[0].parameters()] == [
        *planner.block_shapes(c)[:5],
        *planner.block_shapes(c)[5:],
    ]
    total = c.n_layers * planner.numbers(planner.block_shapes(c)) + planner.numbers(planner.root_shapes(c))
    assert total == c.n_params() == sum(p.numel() for p in model.parameters())
    assert planner.numbers([(5, 3), (7,)], shards=4) == 8 * 3 + 8


def test_seven_billion_on_one_card_and_on_eight() -> None:
    """Sizes that can be checked on paper: 14 bytes a parameter, and an eighth of it."""
    c, GB = PRESETS["7b"], 1e9
    one = planner.plan(c, TrainArguments(bf16=True, optim="adamw_split", per_device_train_batch_size=1))
    assert one.parts["weights"] + one.parts["optimizer"] == 12 * c.n_params()
    assert 94 * GB < one.tensors < 97 * GB
    eight = planner.plan(c, TrainArguments(bf16=True, per_device_train_batch_size=4), world=8)
    assert eight.parts["weights"] == 4 * c.n_params() / 8
    offloaded = planner.plan(c, TrainArguments(bf16=True, fsdp="full_shard offload"), world=8)
    assert offloaded.parts["weights"] == offloaded.parts["optimizer"] == 0
    nodes = planner.plan(c, TrainArguments(bf16=True, fsdp="hybrid_shard"), world=64)
    assert nodes.parts["weights"] == eight.parts["weights"]


def test_more_recomputing_never_needs_more_and_auto_takes_the_fewest() -> None:
    c, args = PRESETS["7b"], TrainArguments(bf16=True, gradient_checkpointing="auto")
    totals = [planner.plan(c, args, 8, n).total for n in range(c.n_layers + 1)]
    assert totals == sorted(totals, reverse=True)
    memory = totals[9]
    n = planner.recompute_for(c, args, 8, memory)
    assert totals[n] <= memory
    assert n == 0 or totals[n - 1] > memory
    assert planner.recompute_for(c, args, 8, totals[0]) == 0
    assert planner.recompute_for(c, args, 8, 1e9) == c.n_layers, "the most that can be done"
    assert planner.recompute_for(c, args, 8, None) == 0, "a CPU"
    fixed = {True: c.n_layers, False: 0, 5: 5, 99: c.n_layers}
    for wanted, blocks in fixed.items():
        assert planner.recompute_for(c, TrainArguments(gradient_checkpointing=wanted), 1, None) == blocks


def test_advice_ends_with_the_first_change_that_fits() -> None:
    c, args = PRESETS["7b"], TrainArguments(bf16=True)
    lines = planner.advice(c, args, 1, planner.CARDS[80] * planner.GIB)
    assert [line.split("--")[1].split()[1] for line in lines] == ["adamw_split", "adamw_split_bf16"]
    sums = planner.advice(c, dataclasses.replace(args, gradient_accumulation_steps=8), 8)
    assert any("--gradient_accumulation_steps 1 " in line for line in sums), (
        "sums over micro-batches are the most of it"
    )
    assert "out of memory" not in planner.out_of_memory(c, args, 1, None)


def test_advice_tells_what_adds_up_from_what_stands_alone() -> None:
    """Figures of lines that are alternatives do not hold the flags of each other, and none asks for more memory."""
    c = PRESETS["7b"]
    for args, world in ((TrainArguments(bf16=True), 1), (TrainArguments(bf16=True, lora_r=8), 2)):
        lines = planner.advice(c, args, world)
        border = lines.index("  and one of these:")
        before, after = ([float(line.split()[0]) for line in part] for part in (lines[:border], lines[border + 1 :]))
        assert max(after) < before[-1], lines
    small = TrainArguments(bf16=True, lora_r=8, base_bits=4)
    assert not any("GPUs" in line for line in planner.advice(c, small, 1)), "4-bit weights are not sharded"
    lines = planner.advice(c, TrainArguments(bf16=True), 1)
    assert [line for line in lines if "--base_bits 4" in line and "--lora_r 8" in line], "4 bits are no flag by itself"


def test_the_account_is_one_column() -> None:
    args = TrainArguments(bf16=True, lora_r=8, base_bits=4)
    account = planner.report(PRESETS["7b"], args, 1).split("GiB a GPU\n")[1].split("\n\n")[0].splitlines()
    assert len({re.search(r" \d+\.\d\d", line).end() for line in account}) == 1, account  # type: ignore[union-attr]


def test_flops_are_six_a_parameter_and_twelve_a_pair() -> None:
    """Counted by torch over a forward and backward of the same documents, products only."""
    from torch.utils.flop_counter import FlopCounterMode

    T = 64
    for c in (GROUPED, TIED):
        model = Llama(dataclasses.replace(c, n_layers=2))
        model.init_weights(0)
        logits = FlopCounterMode(display=False)
        with logits:
            model(torch.zeros(1, T, dtype=torch.int64)).sum().backward()
        products = logits.get_total_flops()
        n = dataclasses.replace(c, n_layers=2)
        norms = 6 * T * c.dim * (2 * 2 + 1)
        assert planner.flops(n, T, 0) - norms == pytest.approx(products - attention(logits), rel=1e-6)
    assert planner.flops(GROUPED, 0, 10) == 12 * 6 * 8 * 32 * 10


def attention(counted: Any) -> int:
    return sum(n for op, n in counted.get_flop_counts()["Global"].items() if "attention" in str(op))


# --- what goes over the wires ---------------------------------------------------------------------

RANKS = """
import json, os, sys
import torch, torch.distributed as dist
rank, size, port, fsdp, bf16, micro = (json.loads(word) for word in sys.argv[1:])
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
torch.set_num_threads(1)
from llama import parallel, planner
from llama.arguments import TrainArguments
from llama.config import LlamaConfig
from llama.model import Llama
c = LlamaConfig(32, 3, 4, 2, 50, 131)
optim = "adamw_split" if bf16 else "adamw_torch"
args = TrainArguments(fsdp=fsdp, bf16=bf16, gradient_accumulation_steps=micro, optim=optim)
world = parallel.init("cpu", sharded=True, hybrid="hybrid_shard" in fsdp)
with torch.device("meta"):
    model = Llama(c)
if bf16:
    model.to(torch.bfloat16)
parallel.prepare(model, model.layers, world, bf16=bf16, reshard_after_forward="shard_grad_op" not in fsdp, recompute=1)
model.to_empty(device="cpu")
model.init_weights(0, lambda p, full: parallel.local(p).data.copy_(parallel.part_of(full, p)))
sent = {"gathered": 0.0, "reduced": 0.0}
def counting(names, key, factor):
    # torch 2.13 calls by the first of the names, older ones by the second; of the tensors given the largest is whole.
    name = next(n for n in names if hasattr(dist, n))
    original = getattr(dist, name)
    def call(*a, **k):
        n = dist.get_world_size(k.get("group"))
        sizes = [t.nbytes for t in (*a, *k.values()) if isinstance(t, torch.Tensor)]
        sent[key] += factor * (n - 1) / n * max(sizes)
        return original(*a, **k)
    setattr(dist, name, call)
counting(["all_gather_single", "all_gather_into_tensor"], "gathered", 1)
counting(["reduce_scatter_single", "reduce_scatter_tensor"], "reduced", 1)
counting(["all_reduce"], "reduced", 2)
ids = torch.arange(32).view(2, 16)
for i in range(micro):
    parallel.sync_gradients(model, i == micro - 1)
    model(ids, ids)[0].backward()
print(json.dumps([sent["gathered"], sent["reduced"], *planner.traffic(c, args, size, micro)]), flush=True)
parallel.leave(0)
"""


@pytest.mark.parametrize(
    ("ranks", "fsdp", "bf16", "micro_batches"),
    [
        (2, "full_shard", False, 1),
        (2, "shard_grad_op", True, 2),
        (4, "full_shard", True, 2),
        (4, "hybrid_shard", True, 1),
    ],
)
def test_collectives_move_what_the_theory_says(ranks: int, fsdp: str, bf16: bool, micro_batches: int) -> None:
    """gloo; every collective's bytes, times the share that a ring sends of them, on each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [json.dumps(word) for word in (ranks, port, fsdp, bf16, micro_batches)]
    processes = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=200)
        gathered, reduced, gathered_in_theory, reduced_in_theory = json.loads(out)
        assert gathered == pytest.approx(gathered_in_theory)
        assert reduced == pytest.approx(reduced_in_theory)


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 4.4e9, 4.93e9), (16, 14.0e9, 15.5e9)])
def test_adapters_are_planned_from_above(bits: int, least: float, most: float) -> None:
    """ChatDoctor's LoRA run: over 4 bits 4.93 GB in plain PyTorch (test_nf4.py), which keeps more."""
    args = TrainArguments(
        bf16=True,
        lora_r=8,
        lora_dropout=0.05,
        lora_target_modules=("q_proj", "v_proj"),
        base_bits=bits,
        per_device_train_batch_size=4,
        model_max_length=256,
        gradient_checkpointing=True,
    )
    assert least <= planner.plan(PRESETS["7b"], args).tensors <= most
    shared = [planner.plan(PRESETS["7b"], args, world).parts["weights"] for world in (1, 4)]
    assert shared[1] == pytest.approx(shared[0] / (4 if bits == 16 else 1), rel=1e-3)
    report = planner.report(PRESETS["7b"], args, 1)
    assert "--lora_r" not in report
    per_token = float(re.search(r"a step: (\S+) FLOP a token", report)[1])  # type: ignore[index]
    assert per_token == pytest.approx(4 * 6.61e9, rel=0.03), "frozen weights have no gradient of their own"
