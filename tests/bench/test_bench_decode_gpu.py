"""The decoding bench for a GPU, on tiny shapes: its bytes, its check of the ids, its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import bench_decode_gpu as bench
from bench import hugging_face, models
from llama.cache import KVCache
from llama.config import PRESETS
from llama.model import Llama

CPU = torch.device("cpu")


def test_tiny_lines_are_measured_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--only", "tiny", "--json", str(tmp_path / "t.json")]) == 0
    found = json.loads((tmp_path / "t.json").read_text())["results"]
    assert len(found) == len(bench.TINY)
    for name, line in found.items():
        assert line["decode_tokens_per_s"] > 0, (name, line)
        assert line["first_token_s"] > 0
        assert line.get("wrong") is None
    assert "tiny int4, alone" in capsys.readouterr().out


def test_every_line_is_asked_for_once_and_the_issues_come_first() -> None:
    names = [line.name for line in bench.LINES]
    assert len(set(names)) == len(names)
    assert set(names[: len(bench.TARGETS)]) == set(bench.TARGETS)
    assert {(line.shape, line.kind) for line in bench.LINES if line.who == "alone"} == {
        (shape, kind) for shape in ("1.1b", "7b", "13b") for kind in ("bfloat16", "int8", "int4")
    }


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_bytes_are_those_of_the_shapes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """7B: 6.48e9 weights in the blocks, 131e6 in the head, which is 8 bits wide where the blocks are quantised."""
    monkeypatch.setattr("llama.generation.lay_out_for_decoding", lambda model: None)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda self, device: self)  # no memory is needed to count
    with torch.device("meta"):
        model = models.random_decoder(PRESETS["7b"], kind, torch.device("meta"))
    linears, norms, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 65 * 4096, 4096 * 32000
    rows = 32 * (5 * 4096 + 2 * 11008)  # of the linears, each with a scale
    of_linears = {"bfloat16": 2 * linears, "int8": linears + 2 * rows, "int4": linears // 2 + 2 * linears // 64}[kind]
    assert bench.weight_bytes(model) == of_linears + 2 * norms + 2 * head
    assert bench.cache_bytes(PRESETS["7b"], 1, 2) == 2**19


@torch.inference_mode()
def test_steps_that_go_another_way_are_seen() -> None:
    model = models.random_decoder(PRESETS["tiny"], "float32", CPU)
    cache = KVCache(model.config, 2, 30)
    first = bench.choose(model(torch.randint(3, 2000, (2, 5)), cache=cache, last_only=True))

    def run(wrong_at: int | None) -> bench.Step:
        taken = iter(range(1000))

        def step(tokens: torch.Tensor) -> torch.Tensor:
            logits = model(tokens, cache=cache, last_only=True)
            if next(taken) == wrong_at:
                logits[1, -1, 7] = logits.max() + 1
            return logits

        return step

    assert bench.unlike_plain(model, cache, run(None), first) is None
    assert cache.length == 5
    said = bench.unlike_plain(model, cache, run(3), first)
    assert said is not None
    assert said.startswith("ids of step 3 differ from a plain step's, logits by")


def test_random_models_compute_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales give quantised weights the spread of the others."""
    from llama.quantize import QuantisedLinear

    monkeypatch.setattr("llama.generation.lay_out_for_decoding", lambda model: None)
    for kind in ("int8", "int4"):
        model = models.random_decoder(PRESETS["tiny"], kind, CPU)
        linear = model.layers[0].mlp.gate
        assert isinstance(linear, QuantisedLinear)
        weight = linear(torch.eye(128, dtype=torch.bfloat16)).float()
        assert weight.std().item() == pytest.approx(models.STD, rel=0.05)


def test_transformers_has_our_weights() -> None:
    config = PRESETS["tiny"]
    model = Llama(config)
    model.init_weights(0)
    theirs = hugging_face.model_of(config, model.state_dict()).eval()
    tokens = torch.randint(3, 2000, (1, 9))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
        _, _, ids = hugging_face.answers(theirs, tokens, 4)
        for i in range(4):
            assert model(torch.cat((tokens, ids[:, :i]), 1))[0, -1].argmax() == ids[0, i]


def test_the_table_compares_with_targets_and_transformers() -> None:
    lines = {line.name: asdict(line) for line in bench.LINES}
    common = {"first_token_s": 0.01, "prefill_tokens_per_s": 1e4, "share_of_graph": None, "peak_memory_bytes": 2**34}
    lines["7b bf16, alone"] |= {"decode_tokens_per_s": 300.0, "share": 0.86, **common}
    lines["7b int8, alone"] |= {"decode_tokens_per_s": 449.0, "share": 0.6, **common}
    lines["7b int4, alone"] |= {"decode_tokens_per_s": 700.0, "share": 0.5, "wrong": "ids of step 3 differ", **common}
    lines["7b bf16, transformers"] |= {"decode_tokens_per_s": 30.0, "share": None, **common}
    lines["13b int4, alone"] |= {"failed": "not done in 35 s"}
    text = bench.table(lines)
    assert len(text) == 1 + len(bench.LINES)
    assert ">= 85%       yes  10.00x transformers in bf16" in text[1]
    assert ">= 450 tok/s no  14.97x transformers in bf16" in text[2]
    assert text[3].endswith(">= 700 tok/s yes  23.33x transformers in bf16  WRONG: ids of step 3 differ")
    assert next(line for line in text if line.startswith("13b int4")).endswith("not done in 35 s")
    assert sum(line.endswith("not measured") for line in text) == len(bench.LINES) - 5


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + len(bench.LINES)
    assert all(line.endswith("not measured") for line in shown[1:])
