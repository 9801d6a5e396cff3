"""Steps: the same data however it is split over rows, micro-batches and ranks; any step at any time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cache import TokenFile
from data.loader import PACKINGS, Batch, Dataset, InMemory, Loader, Packing, build
from data.tokenise import ROW
from llama.chat import IGNORE, ChatFormat, Dialogue, Message, targets_of
from llama.tokenizer import Tokenizer


def dataset(n: int, seed: int = 0, longest: int = 60, weights: tuple[float, ...] = (1.0,)) -> Dataset:
    """Documents of random length; every token of document i is unlike those of the others."""
    rng = np.random.default_rng(seed)
    files = []
    for f in range(len(weights)):
        lengths = rng.integers(3, longest + 1, n)
        supervised = np.array([int(rng.integers(1, x)) for x in lengths])
        rows = np.zeros(n, ROW)
        rows["index"], rows["key"] = np.arange(1, n + 1), rng.integers(0, 2**63, n)
        rows["at"], rows["length"] = np.cumsum([0, *lengths[:-1]]), lengths
        rows["supervised"], rows["original"] = supervised, lengths
        tokens = np.arange(lengths.sum(), dtype="<u4") + f * 1_000_000
        for row in rows:
            end = row["at"] + row["length"]
            tokens[end - row["supervised"] : end] |= np.uint32(1 << 31)
        files.append(TokenFile(f"f{f}", f"key{f}{seed}{n}", tokens, rows, 0))
    return Dataset(files, [np.arange(n)] * len(weights), weights)


def documents_of(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, targets) of each document in a batch, read back by start and end alone; checks the borders on the way."""
    found = []
    B, T = batch.tokens.shape
    assert batch.targets.shape == batch.start.shape == batch.end.shape == (B, T)
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert (batch.start.dtype, batch.end.dtype) == (torch.int32, torch.int32)
    for b in range(B):
        t = 0
        while t < T:
            start, end = int(batch.start[b, t]), int(batch.end[b, t])
            assert start == t < end <= T
            assert (batch.start[b, start:end] == start).all()
            assert (batch.end[b, start:end] == end).all()
            ids, targets = batch.tokens[b, start:end].tolist(), batch.targets[b, start:end].tolist()
            if end == T and not any(ids):
                assert all(x == IGNORE for x in targets), "padding carries no loss"
            else:
                found.append((tuple(ids), tuple(targets)))
            t = end
    assert len(found) == len(batch.records)
    return found


def expected(data: Dataset, i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids, mask = data.document(i)
    return tuple(ids.tolist()), tuple(targets_of(ids.tolist(), mask.tolist()))


def loaders(data: Dataset, world: int = 1, **kw: Any) -> list[Loader]:
    return [Loader(data, rank=r, world=world, **kw) for r in range(world)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 4),
    packing=st.sampled_from(PACKINGS),
    index=st.integers(0, 9),
    fixed=st.booleans(),
    weights=st.sampled_from([(1.0,), (1.0, 0.5), (2.0, 1.0)]),
)
def test_the_ranks_together_make_the_global_batch(
    n: int,
    batch: int,
    accumulation: int,
    world: int,
    packing: Packing,
    index: int,
    fixed: bool,
    weights: tuple[float, ...],
) -> None:
    data = dataset(n, weights=weights)
    kw: dict[str, Any] = {"batch": batch, "accumulation": accumulation, "max_len": 96, "packing": packing}
    ranks = loaders(data, world, fixed_shape=fixed, **kw)
    steps = [r.step(index) for r in ranks]
    batches = [b for s in steps for b in s.micro_batches]
    got = Counter(d for b in batches for d in documents_of(b))

    if packing == "epoch":
        wanted = Counter(expected(data, i) for row in ranks[0]._grid(index) for docs in row[0] for i in docs.tolist())
    else:
        R = batch * accumulation * world
        stream = ranks[0]._order
        wanted = Counter(expected(data, i) for i in stream.take(index * R, R).tolist())
    assert got == wanted

    for s in steps:  # the counts are of the global batch, the same on every rank
        assert s.supervised_tokens == sum(int((b.targets != IGNORE).sum()) for b in batches)
        assert s.tokens == sum(len(ids) * k for (ids, _), k in got.items())
        assert s.slots == sum(b.tokens.numel() for b in batches)
        assert len(s.micro_batches) == len(steps[0].micro_batches) <= accumulation
    assert all(b.tokens.shape[0] <= batch and b.tokens.shape[1] <= 96 for b in batches)
    if fixed:
        assert {b.tokens.shape for b in batches} == {(batch, 96)}
    if packing == "none":
        assert len(steps[0].micro_batches) == accumulation
    records = Counter(r for b in batches for r in b.records)
    assert sum(records.values()) == sum(got.values())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    world=st.integers(1, 3),
    seed=st.integers(0, 5),
    packing=st.sampled_from(PACKINGS),
    asked=st.lists(st.integers(0, 15), min_size=1, max_size=5),
)
def test_any_step_at_any_time(n: int, world: int, seed: int, packing: Packing, asked: list[int]) -> None:
    """Random access, in a fresh loader, is what going through in order gives."""
    data = dataset(n)
    kw: dict[str, Any] = {
        "batch": 2,
        "accumulation": 2,
        "max_len": 64,
        "packing": packing,
        "seed": seed,
        "world": world,
    }
    in_order = [Loader(data, rank=world - 1, **kw).step(i) for i in range(16)]
    one = Loader(data, rank=world - 1, **kw)
    for i in asked:
        for loader in (one, Loader(data, rank=world - 1, **kw)):
            step = loader.step(i)
            assert (step.supervised_tokens, step.tokens, step.slots) == (
                in_order[i].supervised_tokens, in_order[i].tokens, in_order[i].slots
            )  # fmt: skip
            for a, b in zip(step.micro_batches, in_order[i].micro_batches, strict=True):
                assert torch.equal(a.tokens, b.tokens)
                assert torch.equal(a.targets, b.targets)
                assert torch.equal(a.start, b.start)
                assert torch.equal(a.end, b.end)
                assert a.records == b.records


@pytest.mark.parametrize("world", [1, 2, 3])
def test_packing_a_step_changes_neither_its_records_nor_its_count_of_steps(world: int) -> None:
    data = dataset(300)
    kw: dict[str, Any] = {"batch": 4, "accumulation": 3, "max_len": 128}
    plain, packed = loaders(data, world, packing="none", **kw), loaders(data, world, packing="step", **kw)
    assert plain[0].total_steps(3) == packed[0].total_steps(3)
    for i in range(plain[0].total_steps(2)):
        a = Counter(r for loader in plain for b in loader.step(i).micro_batches for r in b.records)
        b = Counter(r for loader in packed for b in loader.step(i).micro_batches for r in b.records)
        assert a == b
        assert plain[0].step(i).supervised_tokens == packed[0].step(i).supervised_tokens
    assert packed[0].fill() > 1.15 * plain[0].fill()


@pytest.mark.parametrize("packing", PACKINGS)
def test_records_of_a_step_do_not_depend_on_how_it_is_split(packing: Packing) -> None:
    """24 records (or rows) a step, over ranks, micro-batches and accumulation in any way."""
    data = dataset(200)
    seen = []
    for batch, accumulation, world in ((24, 1, 1), (1, 24, 1), (4, 3, 2), (2, 3, 4)):
        ranks = loaders(data, world, batch=batch, accumulation=accumulation, max_len=80, packing=packing)
        seen.append([Counter(r for k in ranks for b in k.step(i).micro_batches for r in b.records) for i in range(12)])
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_every_epoch_brings_every_record_once() -> None:
    data = dataset(48, weights=(1.0, 2.0))
    loader = Loader(data, batch=4, accumulation=3, max_len=64, packing="step")
    assert loader.epoch_length() == 144
    for epoch in range(3):
        steps = [loader.step(i) for i in range(epoch * 12, (epoch + 1) * 12)]
        seen = Counter(r for s in steps for b in s.micro_batches for r in b.records)
        assert seen == {(f"f{f}", i): f + 1 for f in range(2) for i in range(1, 49)}


def test_steps_in_all() -> None:
    data = dataset(1)
    loader = Loader(data, batch=4, accumulation=8, world=8, max_len=64)
    loader._order.count = 52_002  # Alpaca's: ChatDoctor's log of three epochs has 609 steps
    assert [loader.total_steps(e) for e in (3, 1, 0.001)] == [609, 203, 1]
    assert loader.epoch_of(609) == pytest.approx(2.998, abs=1e-3)
    small = Loader(dataset(10), batch=4, max_len=64, packing="step")
    assert [small.total_steps(e) for e in (1, 2, 0.1, 2.8)] == [2, 5, 1, 7]


def test_a_rank_without_rows_gets_an_empty_one() -> None:
    data = dataset(3)
    ranks = loaders(data, 4, batch=1, accumulation=2, max_len=256, packing="step")
    steps = [r.step(0) for r in ranks]
    assert [len(s.micro_batches) for s in steps] == [1] * 4
    empty = [b for s in steps for b in s.micro_batches if not b.records]
    assert empty
    for b in empty:
        assert (b.targets == IGNORE).all()
        assert (b.start == 0).all()
        assert (b.end == b.tokens.shape[1]).all()


@pytest.mark.parametrize(("n", "world", "batch"), [(37, 1, 4), (37, 3, 4), (2, 4, 8), (1, 2, 1)])
def test_evaluation_covers_the_held_out_set_once(n: int, world: int, batch: int) -> None:
    data = dataset(n)
    ranks = loaders(dataset(5, seed=1), world, batch=2, max_len=64, evaluation=data, eval_batch=batch)
    shares = [list(r.eval_batches()) for r in ranks]
    assert len({len(s) for s in shares}) == 1, "as many forward passes on every rank"
    got = Counter(d for s in shares for b in s for d in documents_of(b))
    assert got == Counter(expected(data, i) for i in range(n))
    again = [list(r.eval_batches()) for r in ranks]
    assert all(
        torch.equal(a.tokens, b.tokens) for s, t in zip(shares, again, strict=True) for a, b in zip(s, t, strict=True)
    )


def test_no_evaluation_set_no_batches() -> None:
    assert list(Loader(dataset(5), batch=2, max_len=64).eval_batches()) == []


@pytest.mark.parametrize("packing", PACKINGS)
def test_state_survives_another_split_and_refuses_another_order(packing: Packing) -> None:
    data = dataset(100)
    kw: dict[str, Any] = {"batch": 4, "accumulation": 2, "max_len": 64, "packing": packing}
    state = Loader(data, **kw).state(7)
    assert Loader(data, **kw).restore(state) == 7
    assert Loader(data, **{**kw, "accumulation": 1}, world=2, rank=1).restore(state) == 7
    assert Loader(dataset(100), **kw).restore(state) == 7, "the same data, read again"
    for change, says in (
        ({"batch": 2}, "per step changed: 8 in the checkpoint, 4 now"),
        ({"world": 2}, "per step changed: 8 in the checkpoint, 16 now"),
        ({"seed": 1}, "seed changed: 42 in the checkpoint, 1 now"),
    ):
        with pytest.raises(ValueError, match=says):
            Loader(data, **{**kw, **change}).restore(state)
    for other in (dataset(101), dataset(100, seed=1), dataset(100, weights=(1.0, 1.0))):
        with pytest.raises(ValueError, match=r"the data set \(files, weights"):
            Loader(other, **kw).restore(state)
    if packing == "epoch":
        with pytest.raises(ValueError, match="row length changed: 64 in the checkpoint, 128 now"):
            Loader(data, **{**kw, "max_len": 128}).restore(state)
        with pytest.raises(ValueError, match="cannot resume in the same order"):
            Loader(data, **{**kw, "packing": "none"}).restore(state)
    else:
        other_packing: Packing = "none" if packing == "step" else "step"
        assert Loader(data, **{**kw, "packing": other_packing}).restore(state) == 7


def test_wrong_arguments() -> None:
    data = dataset(20)
    for kw, says in (
        ({"packing": "best"}, "packing 'best' is not one of none, step, epoch"),
        ({"max_len": 30}, "the longest record has 59 tokens, the rows only 30"),
        ({"seed": -1}, "seed must not be negative"),
        ({"batch": 0}, "at least 1"),
        ({"accumulation": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            Loader(data, **{"batch": 2, "max_len": 64, **kw})
    with pytest.raises(ValueError, match="mixing weights round to nothing"):
        Loader(dataset(3, weights=(0.1,)), batch=2, max_len=64)


def test_lines_for_the_report() -> None:
    data = dataset(400)
    for packing, says in (("none", "no packing"), ("step", "within each step"), ("epoch", "over the epoch")):
        loader = Loader(data, batch=8, max_len=256, packing=packing)
        first, second = loader.report()
        assert says in first
        assert f"{100 * loader.fill():.1f} %" in first
        assert "8 rows a step" in second if packing == "epoch" else "8 records a step, 50.0 steps an epoch" in second
    assert Loader(data, batch=8, max_len=256, packing="epoch").fill() > 0.97


def test_processes_and_progress(
    small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """build() gives the same with two processes; the bar is on stderr, nothing on stdout."""
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"text": f"fever for {i} days"} for i in range(1000)]))
    kw: dict[str, Any] = {"tokenizer": small_tokenizer, "chat_format": ChatFormat(), "max_len": 32}
    alone, _, _ = build([path], workers=1, progress=False, **kw)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("data.cache.WORKERS_FROM", 0)
    monkeypatch.setattr("data.cache.BAR_AFTER", 0)
    two, _, _ = build([path], workers=2, **kw)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenising d.json" in err
    assert "100%" in err
    assert two.identity == alone.identity
    assert all((two.document(i)[0] == alone.document(i)[0]).all() for i in range(1000))


def test_dialogues_in_memory_are_cached_too(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = InMemory("sample", [Dialogue((Message("assistant", f"rest {i}"),)) for i in range(9)])
    kw: dict[str, Any] = {
        "tokenizer": small_tokenizer,
        "chat_format": ChatFormat("plain"),
        "max_len": 32,
        "progress": False,
    }
    plain, _, _ = build([source], **kw)
    for _ in range(2):
        cached, _, _ = build([source], cache_dir=tmp_path, **kw)
        assert cached.identity == plain.identity
        assert all((cached.document(i)[0] == plain.document(i)[0]).all() for i in range(9))
    assert len(list(tmp_path.glob("sample-*"))) == 1
