"""The training bench for a GPU, on tiny shapes: its batches, what counts as work, its table, lines that fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import bench_train_gpu as bench
from bench import lines
from llama import parallel
from llama.chat import IGNORE
from llama.config import PRESETS, LlamaConfig

CPU = torch.device("cpu")
PACKED, PADDED = (next(line for line in bench.TINY if line.content == c) for c in ("packed", "padded"))


def test_packed_rows_are_full_of_documents() -> None:
    b = bench.batch(PRESETS["tiny"], PACKED, 3, 0, CPU)
    assert b.real == b.tokens.numel()
    assert (b.mask == 1).all()
    start, end = b.documents
    sizes = []
    for i in range(3):
        for s in start[i].unique():
            (where,) = (start[i] == s).nonzero(as_tuple=True)
            assert (end[i][where] == where[-1] + 1).all()
            assert where[0] == s
            sizes.append(len(where))
    assert sizes == b.lengths
    share = (b.targets != IGNORE).float().mean().item()
    assert share == pytest.approx(bench.SUPERVISED, abs=0.1)


def test_padded_rows_hold_a_record_each() -> None:
    b = bench.batch(PRESETS["tiny"], PADDED, 4, 1, CPU)
    assert b.tokens.shape == (4, max(b.lengths))
    assert b.mask.sum(1).tolist() == b.lengths
    assert (b.targets[b.mask == 0] == IGNORE).all()


def test_work_is_counted_from_the_shapes() -> None:
    config = PRESETS["llama3.2-1b"]
    matrices = sum(
        2 * a * b * n
        for a, b, n in (
            (2048, 2048, 2 * 16),  # q, o
            (2048, 512, 2 * 16),  # k, v
            (2048, 8192, 3 * 16),
            (2048, 128256, 1),  # the tied head
        )
    )
    norms = 2 * 2048 * (2 * 16 + 1)
    pairs = sum(i + 1 for i in range(30)) + sum(i + 1 for i in range(7))
    want = 3 * (37 * (matrices + norms) + 2 * 2 * 64 * 32 * 16 * pairs)
    assert bench.flops(config, [30, 7]) == pytest.approx(want)


def test_tiny_lines_are_measured_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--only", "tiny", "--json", str(tmp_path / "t.json")]) == 0
    found = json.loads((tmp_path / "t.json").read_text())["results"]
    assert len(found) == len(bench.TINY)
    for name, line in found.items():
        assert line["real_tokens_per_s"] > 0, (name, line)
    assert "tiny adamw_split, packed" in capsys.readouterr().out


def test_what_does_not_fit_is_tried_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process group of its own, where the first try has joined one."""
    line = replace(next(line for line in bench.TINY if line.adapters), rows=(2, 1))
    ours, tried = bench.ours, []

    def short(config: LlamaConfig, line: bench.Line, device: torch.device) -> bench.Step:
        step = ours(config, line, device)
        tried.append(torch.distributed.is_initialized())
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        return step

    monkeypatch.setattr(bench, "ours", short)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    try:
        found = bench.measure(line, CPU)
    finally:
        parallel.shutdown()
    assert tried == [True, True]
    assert found["rows"] == 1


def test_a_line_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_memory(*_: object) -> bench.Step:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bench, "ours", no_memory)
    lines.worker(bench.TABLE, PACKED.name, "cpu")
    assert json.loads(capsys.readouterr().out) == {"failed": "out of memory with 2 rows"}


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + len(bench.LINES)
    assert all(line.endswith("not measured") for line in shown[1:])


def test_the_table_compares_with_our_best_of_the_shape() -> None:
    common = {"mfu": 0.5, "peak_memory_bytes": 2**30}
    found = {
        "a": {"shape": "7b", "who": "adamw_split", "real_tokens_per_s": 10_000.0, **common},
        "b": {"shape": "7b", "who": "adamw_split_bf16", "real_tokens_per_s": 12_000.0, **common},
        "c": {"shape": "7b", "who": "liger", "real_tokens_per_s": 8_000.0, **common},
        "d": {"shape": "7b", "who": "transformers", "failed": "out of memory"},
    }
    text = bench.table(found)
    assert text[3].endswith("1.50x")
    assert text[4].endswith("out of memory")
    assert "0.40 GPU-hours" in text[5]
