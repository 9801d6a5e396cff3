"""Meta's directories: any number of shards, in the three layouts, and what is wrong with others."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.config import PRESETS, LlamaConfig, RopeScaling, from_meta, to_meta
from llama.layout import deinterleave, entries, interleave
from llama.meta_files import Meta, all_entries, check_shards, read_params, vocab_parallel_of, write_meta

LLAMA2 = LlamaConfig(32, 2, 4, 4, 48, 64, max_seq_len=4096)
LLAMA3 = LlamaConfig(32, 2, 8, 4, 48, 64, rope_theta=500000.0, max_seq_len=8192)
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "multiple_of": 16}


def random_weights(c: LlamaConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {e.name: torch.randn(e.shape, generator=generator).to(dtype) for e in all_entries(c)}
    if c.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return weights


def save(path: Path, c: LlamaConfig, shards: int, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    weights = weights or random_weights(c)
    path.mkdir(exist_ok=True)
    write_meta(path, ((e, weights[e.name]) for e in all_entries(c)), c, shards)
    return weights


def change(path: Path, index: int, **new: Any) -> None:
    """Save shard `index` again with tensors changed; None drops one; a dot is written as two underscores."""
    file = path / f"consolidated.{index:02d}.pth"
    tensors = torch.load(file, weights_only=True) | {k.replace("__", "."): v for k, v in new.items()}
    torch.save({k: v for k, v in tensors.items() if v is not None}, file)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("config", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
def test_reads_back_what_it_wrote(tmp_path: Path, config: LlamaConfig, shards: int, mmap: bool) -> None:
    weights = save(tmp_path / "meta", config, shards)
    source = Meta(tmp_path / "meta", mmap)
    assert source.config == config
    assert source.vocab_parallel == (shards > 1 and config is LLAMA3)
    for e in entries(config):
        assert torch.equal(source.read(e), weights[e.name])
        assert source.read(e).is_contiguous()


def test_reads_shards_as_metas_own_code_cuts_them(tmp_path: Path) -> None:
    """Shards made by torch.save, cut by the rules of fairscale's layers, each written out here."""
    config = dataclasses.replace(LLAMA2, ffn_dim=96)
    weights = random_weights(config)
    column = ("wq", "wk", "wv", "w1", "w3", "output")  # ColumnParallelLinear: rows
    row = ("wo", "w2", "tok_embeddings")  # RowParallelLinear and ParallelEmbedding: columns
    shards: list[dict[str, Tensor]] = [{}, {}]
    for e in entries(config):
        w = interleave(weights[e.name], 4) if e.meta.split(".")[-2] in ("wq", "wk") else weights[e.name]
        kind = e.meta.split(".")[-2]
        for i in (0, 1):
            half = w.shape[0] // 2 if kind in column else w.shape[-1] // 2
            cut = w[i * half :][:half] if kind in column else w[:, i * half :][:, :half] if kind in row else w
            shards[i][e.meta] = cut.contiguous()
    for i in (0, 1):
        torch.save(shards[i] | {"rope.freqs": torch.ones(4)}, tmp_path / f"consolidated.{i:02d}.pth")
    (tmp_path / "params.json").write_text(json.dumps(SIZES | {"vocab_size": -1, "multiple_of": 48}))
    source = Meta(tmp_path)
    assert source.config == config
    assert source.ignored == ["rope.freqs"]
    for e in entries(config):
        assert torch.equal(source.read(e), weights[e.name])


def test_interleaved_rows_turn_as_ours(tmp_path: Path) -> None:
    """A head rotated Meta's way (pairs of neighbours, as complex numbers) gives the scores of ours (halves)."""
    K, positions = 8, torch.arange(5).float()
    q, k = torch.randn(K, 6), torch.randn(K, 6)
    x = torch.randn(5, 6)
    angles = torch.outer(positions, 10000.0 ** (-torch.arange(0, K, 2).float() / K))

    def meta(w: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ w.t()).view(5, K // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    def ours(w: Tensor) -> Tensor:
        a, b = (x @ deinterleave(w, 1).t()).chunk(2, 1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], 1)

    torch.testing.assert_close(ours(q) @ ours(k).t(), meta(q) @ meta(k).t())


def test_tied_head_is_found_and_written_twice(tmp_path: Path) -> None:
    for shards in (1, 2):
        for config in (LLAMA2, LLAMA3):
            tied = dataclasses.replace(config, tie_embeddings=True)
            path = tmp_path / f"{shards}{config.n_heads}"
            save(path, tied, shards)
            assert "output.weight" in torch.load(path / "consolidated.00.pth", weights_only=True)
            source = Meta(path)
            assert source.config == tied
            assert source.ignored == ["output.weight"]


def test_every_number_type_and_a_mixture(tmp_path: Path) -> None:
    weights = random_weights(LLAMA2, torch.bfloat16)
    weights["norm.weight"] = weights["norm.weight"].float()
    weights["layers.0.mlp.up.weight"] = weights["layers.0.mlp.up.weight"].half()
    save(tmp_path / "meta", LLAMA2, 2, weights)
    source = Meta(tmp_path / "meta")
    for e in entries(LLAMA2):
        assert source.dtype(e) == source.read(e).dtype == weights[e.name].dtype


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("tiny", "15m", "110m", "1.1b")])
def test_params_of_the_real_models_come_back(name: str) -> None:
    """And hold only keys that Meta's own ModelArgs of that family has; Llama 2's code breaks on max_seq_len."""
    config = dataclasses.replace(PRESETS[name], tie_embeddings=False)
    params = json.loads(json.dumps(to_meta(config)))
    assert from_meta(params, config.vocab_size) == config
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
    if vocab_parallel_of(config):
        known |= {"rope_theta", "use_scaled_rope"}
    assert params.keys() <= known


def test_params_of_llama_1_as_meta_wrote_them() -> None:
    params = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
    assert from_meta(params, 32000) == PRESETS["7b"]
    params = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
    params |= {"n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}
    assert from_meta(params, 32000) == PRESETS["llama2-70b"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": "32"}, "dim is '32'"),
        ({"dim": 10**9}, "dim"),
        ({"dim": True}, "dim is 'True'"),
        ({"dim": None}, "dim is missing"),
        ({"n_layers": -1}, "n_layers"),
        ({"n_layers": 10**9}, "n_layers"),
        ({"n_layers": 1.5}, "n_layers"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_kv_heads": [4]}, "n_kv_heads"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": -2}, "vocab_size"),
        ({"norm_eps": math.nan}, "norm_eps"),
        ({"norm_eps": math.inf}, "norm_eps"),
        ({"norm_eps": "small"}, "norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": {}}, "rope_theta"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope"),
    ],
)
def test_nonsense_in_params_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    (tmp_path / "params.json").write_text(json.dumps(SIZES | change))
    with pytest.raises(ValueError, match=reason) as error:
        read_params(tmp_path / "params.json")
    assert "params.json: " in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"dim": ', "[" * 10**5, "\xff", "<html>"])
def test_params_that_are_not_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"params\.json"):
        read_params(tmp_path / "params.json")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    for missing, reason in ((0, r"consolidated\.00\.pth: missing"), (1, r"consolidated\.01\.pth: missing")):
        path = tmp_path / str(missing)
        save(path, LLAMA2, 4)
        (path / f"consolidated.{missing:02d}.pth").unlink()
        with pytest.raises(ValueError, match=reason):
            Meta(path)
    for config in (LLAMA2, LLAMA3):
        path = tmp_path / f"last{config.n_heads}"
        save(path, config, 4)
        (path / "consolidated.03.pth").unlink()
        with pytest.raises(ValueError, match=r"consolidated|params"):
            Meta(path)
    save(tmp_path / "half", LLAMA2, 2)
    (tmp_path / "half/consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="looks like one of 2 shards"):
        Meta(tmp_path / "half")


@pytest.mark.parametrize(
    ("index", "new", "reason"),
    [
        (
            0,
            {"layers__0__attention__wq__weight": torch.ones(15, 32)},
            r"00.pth: .*wq.weight is 15x32; it must be 16x32",
        ),
        (1, {"layers__1__feed_forward__w1__weight": torch.ones(23, 32)}, r"01.pth: .*w1.weight is 23x32"),
        (1, {"norm__weight": None}, r"01.pth: tensors 1 missing \('norm.weight'\)"),
        (1, {"extra__weight": torch.ones(2)}, r"01.pth: tensors 1 unknown \('extra.weight'\)"),
        (0, {"layers__0__attention__wq__bias": torch.ones(16)}, "unknown"),
        (0, {"tok_embeddings__weight": None}, "tok_embeddings.weight is missing"),
        (1, {"norm__weight": torch.ones(32).double()}, "float64"),
        (1, {"norm__weight": torch.ones(32).half()}, "float16, but float32 in the first shard"),
        (1, {"norm__weight": torch.ones(32, dtype=torch.int64)}, "int64"),
    ],
)
def test_wrong_shards_are_refused(tmp_path: Path, index: int, new: dict[str, Any], reason: str) -> None:
    path = tmp_path / "meta"
    save(path, LLAMA2, 2)
    change(path, index, **new)
    with pytest.raises(ValueError, match=reason) as error:
        Meta(path)
    assert "\n" not in str(error.value)


def test_replicated_tensors_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    save(path, LLAMA2, 2)
    change(path, 1, layers__1__ffn_norm__weight=torch.ones(32))
    source, wanted = Meta(path), next(e for e in entries(LLAMA2) if e.name == "layers.1.mlp_norm.weight")
    with pytest.raises(ValueError, match=r"01.pth: layers.1.ffn_norm.weight differs from that of consolidated.00.pth"):
        source.read(wanted)


def test_shards_that_cannot_be_are_refused() -> None:
    check_shards(LLAMA2, 4)
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        check_shards(LLAMA2, 3)
    with pytest.raises(ValueError, match="key/value heads do not divide"):
        check_shards(dataclasses.replace(LLAMA2, n_kv_heads=2), 4)
    with pytest.raises(ValueError, match="cannot be cut into 2"):
        check_shards(dataclasses.replace(LLAMA2, vocab_size=32001), 2)


def test_scaling_that_meta_cannot_say() -> None:
    linear = dataclasses.replace(LLAMA2, rope_scaling=RopeScaling("linear", 2.0))
    with pytest.raises(ValueError, match="linear"):
        to_meta(linear)
