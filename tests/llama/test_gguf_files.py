"""GGUF files: names, metadata and row order of llama.cpp's converter, and the same model back."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama.config import LlamaConfig, RopeScaling
from llama.gguf_files import GGUF, as_stored, bytes_in_gguf, dtype_in_gguf, kind_in_gguf, write_gguf
from llama.gguf_format import FLOAT_KINDS
from llama.layout import entries
from llama.model import Llama
from llama.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
LLAMA31 = RopeScaling("llama3", 8.0)


def made(c: LlamaConfig, dtype: torch.dtype = torch.float32, scale: float = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {e.name: torch.randn(e.shape, generator=generator).mul(scale).to(dtype) for e in entries(c)}


def write(
    path: Path, c: LlamaConfig, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, scale: float = 1
) -> dict[str, Any]:
    weights = made(c, dtype, scale)
    write_gguf(path, ((e, weights[e.name]) for e in entries(c)), c, tokenizer, FLOAT_KINDS[dtype], "test")
    return weights


def write_packed(path: Path, c: LlamaConfig, tokenizer: Tokenizer, scale: float = 1) -> dict[str, torch.Tensor]:
    weights = made(c, scale=scale)
    stream = ((e, weights[e.name].to(dtype_in_gguf(e, "Q8_0"))) for e in entries(c))
    write_gguf(path, stream, c, tokenizer, "Q8_0", "test")
    return weights


def as_llama_cpp_writes(
    path: Path, c: LlamaConfig, kinds: Callable[[str], str], change: Callable[[Any], None] = lambda writer: None
) -> dict[str, torch.Tensor]:
    """A file by the gguf package alone, without anything that may be left out; every tensor of the type kinds(name)
    says. What is in it, packed and unpacked, in our layout."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.ffn_dim)
    writer.add_head_count(c.n_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    change(writer)
    held = {}
    for e in entries(c):
        t = made(c)[e.name]
        if e.rope_heads:  # LlamaModel.permute of convert_hf_to_gguf.py
            t = t.view(e.rope_heads, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
        number = gguf.GGMLQuantizationType[kinds(e.gguf)]
        packed = gguf.quants.quantize(t.numpy(), number)
        writer.add_tensor(e.gguf, packed, raw_dtype=number)
        t = torch.from_numpy(gguf.quants.dequantize(packed, number).copy())
        if e.rope_heads:
            t = t.view(e.rope_heads, -1, 2, t.shape[1]).transpose(1, 2).reshape(t.shape)
        held[e.name] = t
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


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
    result = GGUF(tmp_path / "x.gguf")
    assert result.config == config
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


# --- reading --------------------------------------------------------------------------------------


def mixed(name: str) -> str:
    """As llama.cpp's quantiser: norms whole, another type for some."""
    if "norm" in name:
        return "F32"
    return {"token_embd.weight": "Q4_1", "output.weight": "Q8_0", "blk.1.ffn_up.weight": "BF16"}.get(name, "Q4_0")


def test_mixed_types_in_one_file(tmp_path: Path) -> None:
    config = LlamaConfig(64, 2, 4, 4, 96, 50, max_seq_len=77, norm_eps=1e-6)
    held = as_llama_cpp_writes(tmp_path / "x.gguf", config, mixed)
    source = GGUF(tmp_path / "x.gguf")
    assert source.config == config
    assert source.label == "GGUF BF16/F32/Q4_0/Q4_1/Q8_0"
    assert source.tokenizer() is None
    assert source.tokenizer_kind() == "missing"
    for e in entries(config):
        read = source.read(e)
        assert torch.equal(read.float(), held[e.name]), e.name
        assert source.dtype(e) == torch.float16


def test_a_packed_norm_makes_a_packed_file(tmp_path: Path) -> None:
    config = LlamaConfig(64, 1, 4, 4, 96, 50)
    as_llama_cpp_writes(tmp_path / "x.gguf", config, lambda name: "Q8_0" if name == "output_norm.weight" else "F32")
    assert {GGUF(tmp_path / "x.gguf").dtype(e) for e in entries(config)} == {torch.float16}


@pytest.mark.parametrize(
    ("matrices", "norm", "dtypes"),
    [
        ("F16", 1.5, {torch.float16}),
        ("BF16", 1.5, {torch.bfloat16}),
        ("F16", 1 + 2**-20, {torch.float16, torch.float32}),
        ("BF16", 1 + 2**-9, {torch.bfloat16, torch.float32}),
        ("F32", 1.5, {torch.float32}),
    ],
)
def test_norms_count_as_the_matrices_if_that_holds_them(
    tmp_path: Path, small_tokenizer: Tokenizer, tiny_config: LlamaConfig, matrices: str, norm: float, dtypes: Any
) -> None:
    weights = made(tiny_config) | {e.name: torch.full(e.shape, norm) for e in entries(tiny_config) if "norm" in e.name}
    stream = ((e, weights[e.name]) for e in entries(tiny_config))
    write_gguf(tmp_path / "x.gguf", stream, tiny_config, small_tokenizer, matrices, "test")
    source = GGUF(tmp_path / "x.gguf")
    assert {source.dtype(e) for e in entries(tiny_config)} == dtypes


SCALINGS = {
    "linear": (RopeScaling("linear", 2.5), 16),
    "3.1": (LLAMA31, 128),
    "3.2": (RopeScaling("llama3", 32.0), 64),
    "another context": (RopeScaling("llama3", 8.0, original_max_seq_len=4096), 128),
    "other borders": (RopeScaling("llama3", 3.3, 1.0, 2.5, 4000), 128),
    "a small head": (RopeScaling("llama3", 8.0, original_max_seq_len=64), 8),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling_comes_back(tmp_path: Path, small_tokenizer: Tokenizer, case: str) -> None:
    scaling, head_dim = SCALINGS[case]
    config = LlamaConfig(
        64, 1, 2, 2, 64, small_tokenizer.vocab_size, head_dim, rope_theta=500000.0, rope_scaling=scaling
    )
    write(tmp_path / "x.gguf", config, small_tokenizer)
    assert GGUF(tmp_path / "x.gguf").config == config
    path = tmp_path / "y.gguf"  # other programs do not say the original context
    data = (tmp_path / "x.gguf").read_bytes()
    path.write_bytes(
        data.replace(b"rope.scaling.original_context_length", b"rope.scaling.original_context_unknown"[:36])
    )
    if case != "a small head":  # of whose four frequencies fewer than two lie between the borders
        assert GGUF(path).config == config


def test_numbers_are_those_before_fp32(small_tokenizer: Tokenizer, tiny_config: LlamaConfig, tmp_path: Path) -> None:
    """1e-5 comes back as 1e-5; what is no short decimal comes back as as_stored() says."""
    config = dataclasses.replace(tiny_config, norm_eps=1.23456789e-5, rope_theta=12345.678901)
    write(tmp_path / "x.gguf", config, small_tokenizer)
    assert GGUF(tmp_path / "x.gguf").config == as_stored(config) != config


def key(name: str, value: Any) -> Callable[[Any], None]:
    add = {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array", bool: "add_bool"}
    return lambda writer: getattr(writer, add[type(value)])(f"llama.{name}", value)


def replace(name: str, value: Any) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        del writer.kv_data[-1][f"llama.{name}" if "general" not in name else name]
        if value is not None:
            key(name, value)(writer)

    return change


def tensor(name: str, *shape: int) -> Callable[[Any], None]:
    return lambda writer: writer.add_tensor(name, np.zeros(shape, np.float32))


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "another architecture": (
        lambda w: setattr(w.kv_data[0]["general.architecture"], "value", "qwen2"),
        "its architecture is 'qwen2'; only llama",
    ),
    "no architecture": (replace("general.architecture", None), "its architecture is 'missing'"),
    "a size missing": (replace("block_count", None), "llama.block_count is missing"),
    "999 layers": (replace("block_count", 999), "asks for 999 layers"),
    "2**31 layers": (replace("block_count", 1 << 31), "block_count is 2147483648"),
    "0 heads": (replace("attention.head_count", 0), "head_count is 0"),
    "5 heads": (replace("attention.head_count", 5), "dim 64 is not a multiple of n_heads 5"),
    "heads by layer": (replace("attention.head_count", [4, 2]), "head_count is a list"),
    "no epsilon": (replace("attention.layer_norm_rms_epsilon", float("nan")), "epsilon is nan"),
    "experts": (key("expert_count", 8), "mixture of 8 experts"),
    "another head size": (key("rope.dimension_count", 8), "rope.dimension_count is 8, the head size 16"),
    "yarn": (key("rope.scaling.type", "yarn"), "rope scaling 'yarn' is not supported"),
    "a vocabulary too large": (key("vocab_size", 51), "token_embd.weight is 50x64; its metadata makes it 51x64"),
    "another width": (replace("feed_forward_length", 97), "ffn_gate.weight is 96x64; its metadata makes it 97x64"),
    "a bias": (tensor("blk.0.attn_q.bias", 64), "1 unknown .'blk.0.attn_q.bias'"),
    "a layer missing": (replace("block_count", 3), "9 missing"),
    "factors of another size": (tensor("rope_freqs.weight", 3), "rope_freqs.weight is F32 of"),
    "factors of 0": (tensor("rope_freqs.weight", 8), "values below 1"),
    "factors of another rule": (
        lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 3, 1, 2, 5, 1, 1, 2], np.float32)),
        "no rule of Llama 3's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_llama_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    change, reason = WRONG[case]
    as_llama_cpp_writes(tmp_path / "x.gguf", LlamaConfig(64, 2, 4, 4, 96, 50), lambda name: "F32", change)
    with pytest.raises(ValueError, match=reason) as error:
        GGUF(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in str(error.value)
    assert "\n" not in str(error.value)


def test_factors_of_one_scale_nothing(tmp_path: Path) -> None:
    ones = np.ones(8, np.float32)
    config = LlamaConfig(64, 1, 4, 4, 96, 50)
    as_llama_cpp_writes(tmp_path / "x.gguf", config, mixed, lambda w: w.add_tensor("rope_freqs.weight", ones))
    assert GGUF(tmp_path / "x.gguf").config == config


def test_numbers_that_cannot_be_unpacked(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        del writer.kv_data[0]["llama.block_count"]
        writer.add_block_count(1)
        writer.add_tensor("output.weight", np.zeros((50, 64), np.int8))

    as_llama_cpp_writes(tmp_path / "x.gguf", LlamaConfig(64, 1, 4, 4, 96, 50, tie_embeddings=True), mixed, change)
    with pytest.raises(ValueError, match="holds I8 numbers, which the gguf package cannot unpack"):
        GGUF(tmp_path / "x.gguf")


# --- Q8_0 -----------------------------------------------------------------------------------------


def test_q8_0(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    """Vectors F32, matrices Q8_0, rows of no whole blocks F16; every value within half a step (itself rounded)."""
    config = LlamaConfig(64, 1, 4, 2, 80, small_tokenizer.vocab_size + 1)
    weights = write_packed(tmp_path / "x.gguf", config, small_tokenizer)
    assert contents(tmp_path / "x.gguf")["general.file_type"] == 7
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    source = GGUF(tmp_path / "x.gguf")
    for e in entries(config):
        kind = "F32" if "norm" in e.name else "F16" if e.name.endswith("down.weight") else "Q8_0"
        assert stored[e.gguf].tensor_type.name == kind == kind_in_gguf(e, "Q8_0")
        assert stored[e.gguf].n_bytes == bytes_in_gguf(e, "Q8_0")
        assert source.holds(e, weights[e.name].to(dtype_in_gguf(e, "Q8_0")), "Q8_0")
        assert not source.holds(e, weights[e.name] * 1.5, "Q8_0")
        assert not source.holds(e, weights[e.name], "BF16") or kind == "F32"
        read = source.read(e).float()
        if kind == "Q8_0":
            steps = weights[e.name].view(-1, 32).abs().amax(1, keepdim=True).div(127).expand(-1, 32).reshape(e.shape)
            assert ((read - weights[e.name]).abs() <= steps * 0.57 + 1e-6).all()
        else:
            assert torch.equal(read, weights[e.name].to(dtype_in_gguf(e, "Q8_0")).float())


# --- beside llama.cpp -----------------------------------------------------------------------------


CONFIGS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": RopeScaling("llama3", 8.0, original_max_seq_len=64)},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
}


@pytest.fixture
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python, which builds llama.cpp, is not installed")


def opened(llama_cpp: Any, path: Path) -> Any:
    return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)


def logits(theirs: Any, ids: list[int]) -> torch.Tensor:
    theirs.eval(ids)
    return torch.from_numpy(theirs.scores[: len(ids)].copy())


def ours(path: Path) -> Llama:
    source = GGUF(path)
    model = Llama(source.config)
    model.load_state_dict({e.name: source.read(e) for e in entries(source.config)})
    return model


def ids_below(vocab_size: int) -> list[int]:
    return torch.randint(3, vocab_size, (100,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_the_same(tmp_path: Path, small_tokenizer: Tokenizer, kind: str, llama_cpp: Any) -> None:
    """Logits and token ids of llama.cpp itself (its cache in fp32), where llama-cpp-python is installed."""
    config = LlamaConfig(64, 2, 8, 2, 160, small_tokenizer.vocab_size + 1, **CONFIGS[kind])
    model = Llama(config)
    model.load_state_dict(write(tmp_path / "x.gguf", config, small_tokenizer, scale=0.2))
    theirs, ids = opened(llama_cpp, tmp_path / "x.gguf"), ids_below(small_tokenizer.vocab_size)
    wanted, got = model(torch.tensor([ids]))[0], logits(theirs, ids)
    assert (wanted - got).abs().max() <= 1e-4 * wanted.abs().max()
    for text in ("I have pain in the chest", " two  spaces", "na\u00efve \u65e5\u672c\u8a9e"):
        assert theirs.tokenize(text.encode(), add_bos=False) == small_tokenizer.encode(text)
    theirs.close()


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_opens_our_q8_0(tmp_path: Path, small_tokenizer: Tokenizer, kind: str, llama_cpp: Any) -> None:
    """llama.cpp rounds what it multiplies packed weights by to 8 bits too: it agrees within that."""
    config = LlamaConfig(64, 2, 8, 2, 160, small_tokenizer.vocab_size + 1, **CONFIGS[kind])
    model = Llama(config)
    model.load_state_dict(write_packed(tmp_path / "x.gguf", config, small_tokenizer, 0.2))
    theirs, ids = opened(llama_cpp, tmp_path / "x.gguf"), ids_below(small_tokenizer.vocab_size)
    got, tokens = logits(theirs, ids), torch.tensor([ids])
    assert (ours(tmp_path / "x.gguf")(tokens)[0] - got).abs().max() <= 0.05 * got.abs().max()
    assert (model(tokens)[0] - got).abs().max() <= 0.05 * got.abs().max()
    theirs.close()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K_M", "Q6_K"])
def test_files_that_llama_cpp_packed(tmp_path: Path, small_tokenizer: Tokenizer, kind: str, llama_cpp: Any) -> None:
    """Its own quantiser's files open here, and compute what they compute there; of Q8_0 the bytes are ours."""
    config = LlamaConfig(256, 2, 4, 2, 256, small_tokenizer.vocab_size, **CONFIGS["llama3"])
    weights = write(tmp_path / "whole.gguf", config, small_tokenizer, scale=0.1)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    path = tmp_path / "packed.gguf"
    assert not llama_cpp.llama_model_quantize(bytes(tmp_path / "whole.gguf"), bytes(path), ctypes.byref(settings))
    assert GGUF(path).config == config
    theirs, ids = opened(llama_cpp, path), ids_below(small_tokenizer.vocab_size)
    got = logits(theirs, ids)
    theirs.close()
    assert (ours(path)(torch.tensor([ids]))[0] - got).abs().max() <= 0.05 * got.abs().max()
    if kind == "Q8_0":
        source = GGUF(path)
        assert all(source.holds(e, weights[e.name], "Q8_0") for e in entries(config))
