"""The load on serve.py: a small model twice, as itself and as its own peer, and the shape of the table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import bench_serve
from bench.models import tokenizer_of_size

FIGURES = [f"{what}_ms_p{p}" for what in ("first", "between") for p in (50, 95)]


def test_a_row_for_each_server_and_number_of_clients(tmp_path: Path) -> None:
    args = bench_serve.arguments(["--clients", "1", "2", "--tokens", "4", "--each", "1", "--passes", "1"])
    args.least, args.llama_server = 2, None
    bench_serve.save(tmp_path, "tiny", "float32")
    (command, environment) = bench_serve.commands(tmp_path, "float32", args)["ours"]
    with (
        bench_serve.running("ours", command, environment) as ours,
        bench_serve.running("peer", command, environment) as peer,
    ):
        rows = bench_serve.measure([ours, peer], args)
    assert [server.process.returncode for server in (ours, peer)] == [0, 0], "both end in good order"
    assert [(row["server"], row["clients"]) for row in rows] == [("ours", 1), ("peer", 1), ("ours", 2), ("peer", 2)]
    for row in rows:
        assert 100 < row["prompt_tokens"] < 300
        assert row["tokens_per_s"] > 0
        assert row["first_ms_p50"] <= row["first_ms_p95"]
        assert all(row[figure] > 0 for figure in FIGURES)
        assert len(row["times_one_client"]) == 1
    by = {(row["server"], row["clients"]): row for row in rows}
    assert by["ours", 1]["times_one_client"] == [1.0]
    ratio = by["ours", 2]["tokens_per_s"] / by["peer", 2]["tokens_per_s"]
    assert by["ours", 2]["times_peer"] == [pytest.approx(ratio, abs=0.02)]
    assert by["peer", 2]["answers_like_ours"] == 1.0, "the same model answers the same"


def test_peers_have_the_same_weights_and_threads(tmp_path: Path) -> None:
    args = bench_serve.arguments(["--llama_server", "llama-server", "--llama_cpp_python", "a:b", "--threads", "3"])
    found = bench_serve.commands(tmp_path, "float32", args)
    assert list(found) == ["ours", "llama.cpp", "llama-cpp-python"]
    for name, (command, environment) in found.items():
        model = tmp_path / ("model" if name == "ours" else "model.gguf")
        assert str(model) in command
        assert environment["OMP_NUM_THREADS"] == "3"
    assert found["llama-cpp-python"][1]["PYTHONPATH"] == "a:b"


def test_a_server_that_does_not_start_says_why() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match="peer does not answer:\nno such model"):  # noqa: SIM117
        with bench_serve.running("peer", command, {}):
            pass


def test_a_tokenizer_of_any_size() -> None:
    texts = [f"I have had a cough and fever {i} for {i * 37} days" for i in range(300)]
    tokenizer, first = tokenizer_of_size(3000, texts, trained=320)
    assert (tokenizer.vocab_size, first) == (3000, 259)
    assert tokenizer.decode(tokenizer.encode(texts[7])) == texts[7]
    assert all(tokenizer.piece_bytes(i).decode() for i in range(first, 3000)), "whole characters"
