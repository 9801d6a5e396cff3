"""GGUF files: names, metadata and row order of llama.cpp's converter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import gguf_files
from llama.config import LlamaConfig, RopeScaling
from llama.gguf_files import GGUF, write_gguf
from llama.layout import entries
from llama.model import Llama
from llama.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")


def write(
    path: Path, c: LlamaConfig, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, scale: float = 1
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {e.name: torch.randn(e.shape, generator=generator).mul(scale).to(dtype) for e in entries(c)}
    write_gguf(path, ((e, weights[e.name]) for e in entries(c)), c, tokenizer, dtype, "test")
    return weights


def contents(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_names_are_llama_cpps(tiny_config: LlamaConfig) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, tiny_config.n_layers)
    for e in entries(tiny_config):
        assert names.get_name(e.hf, try_suffixes=(".weight",)) == e.gguf
        assert names.get_name(e.meta, try_suffixes=(".weight",)) == e.gguf


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_and_metadata(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer, dtype: torch.dtype, tied: bool
) -> None:
    config = dataclasses.replace(tiny_config, tie_embeddings=tied)
    weights = write(tmp_path / "x.gguf", config, small_tokenizer, dtype)
    result = GGUF(tmp_path / "x.gguf", config)
    for e in entries(config):
        read = result.read(e)
        assert read.dtype == (torch.float32 if "norm" in e.name else dtype)
        assert torch.equal(read, weights[e.name].to(read.dtype))
    said = contents(tmp_path / "x.gguf")
    assert said["general.architecture"] == "llama"
    assert said["llama.block_count"] == config.n_layers
    assert said["llama.context_length"] == config.max_seq_len
    assert said["llama.embedding_length"] == config.dim
    assert said["llama.feed_forward_length"] == config.ffn_dim
    assert said["llama.attention.head_count"] == config.n_heads
    assert said["llama.attention.head_count_kv"] == config.n_kv_heads
    assert said["llama.rope.dimension_count"] == config.head_dim
    assert said["llama.rope.freq_base"] == config.rope_theta
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.norm_eps)
    assert said["general.file_type"] == {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype]


def test_q_and_k_rows_are_in_llama_cpps_order(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    """The order of convert_hf_to_gguf.py's LlamaModel.permute, written out."""
    weights = write(tmp_path / "x.gguf", tiny_config, small_tokenizer)
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, heads in (("q", tiny_config.n_heads), ("k", tiny_config.n_kv_heads)):
        w = weights[f"layers.1.attn.{name}.weight"].numpy()
        permuted = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        assert (stored[f"blk.1.attn_{name}.weight"] == permuted).all()


def test_tokenizer_with_a_row_beyond_it(tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer) -> None:
    config = tiny_config.with_vocab(small_tokenizer.vocab_size + 1)
    write(tmp_path / "x.gguf", config, small_tokenizer)
    said = contents(tmp_path / "x.gguf")
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(said["tokenizer.ggml.scores"]) == config.vocab_size
    assert said["llama.vocab_size"] == config.vocab_size
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert tokens[3] == "<0x00>"
    assert tokens[-1] == f"[PAD{small_tokenizer.vocab_size}]"
    assert types[:4] == [2, 3, 3, 6]
    assert types[-1] == 5
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_space_prefix"] is True


def test_scaled_rotary_frequencies(tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer) -> None:
    """Llama 3.1's as a tensor of divisors: 1 for short wavelengths, the factor for long ones; linear as a number."""
    scaling = RopeScaling("llama3", 8.0, original_max_seq_len=64)
    config = LlamaConfig(64, 1, 2, 2, 64, small_tokenizer.vocab_size, rope_theta=500.0, rope_scaling=scaling)
    write(tmp_path / "x.gguf", config, small_tokenizer)
    factors = next(t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors if t.name == "rope_freqs.weight")
    assert factors.shape == (16,)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert (factors[1:] >= factors[:-1]).all()
    linear = dataclasses.replace(config, rope_scaling=RopeScaling("linear", 4.0))
    write(tmp_path / "y.gguf", linear, small_tokenizer)
    said = contents(tmp_path / "y.gguf")
    assert (said["llama.rope.scaling.type"], said["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        gguf_files.package()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "tied", "llama3", "linear"])
def test_llama_cpp_computes_the_same(tmp_path: Path, small_tokenizer: Tokenizer, kind: str) -> None:
    """Logits and token ids of llama.cpp itself (its cache in fp32), where llama-cpp-python is installed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which builds llama.cpp, is not installed")
    config = LlamaConfig(64, 2, 8, 2, 160, small_tokenizer.vocab_size + 1, tie_embeddings=kind == "tied")
    if kind == "llama3":
        scaling = RopeScaling("llama3", 8.0, original_max_seq_len=64)
        config = dataclasses.replace(config, rope_theta=500000.0, rope_scaling=scaling)
    if kind == "linear":
        config = dataclasses.replace(config, rope_scaling=RopeScaling("linear", 4.0))
    model = Llama(config)
    model.load_state_dict(write(tmp_path / "x.gguf", config, small_tokenizer, scale=0.2))
    theirs = llama_cpp.Llama(
        str(tmp_path / "x.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    ids = torch.randint(3, small_tokenizer.vocab_size, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs.eval(ids)
    wanted, got = model(torch.tensor([ids]))[0], torch.from_numpy(theirs.scores[: len(ids)].copy())
    assert (wanted - got).abs().max() <= 1e-4 * wanted.abs().max()
    for text in ("I have pain in the chest", " two  spaces", "na\u00efve \u65e5\u672c\u8a9e"):
        assert theirs.tokenize(text.encode(), add_bos=False) == small_tokenizer.encode(text)
    theirs.close()
