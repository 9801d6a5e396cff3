"""Sizes: presets against the published parameter counts, and both spellings on disk there and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.configuration_llama import LlamaConfig as HFConfig

from llama.config import PRESETS, LlamaConfig, RopeScaling, ffn_dim_of, from_hf, from_meta, to_hf, to_meta

# Parameters as the model cards and papers count them.
PUBLISHED = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "30b": 32_528_943_616,
    "65b": 65_285_660_672,
    "1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name: str) -> None:
    assert PRESETS[name].n_params() == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_there_and_back(name: str) -> None:
    c = PRESETS[name]
    assert from_hf(to_hf(c)) == c
    back = from_meta(to_meta(c), c.vocab_size)
    assert dataclasses.replace(back, tie_embeddings=c.tie_embeddings) == c  # params.json does not say whether tied


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_5_reads_and_writes_the_same_sizes(name: str) -> None:
    """Our transformers 4 spelling opens in transformers 5, and what 5 writes (rope_parameters) opens here."""
    theirs = HFConfig.from_dict(to_hf(PRESETS[name])).to_dict()
    assert "rope_parameters" in theirs
    assert from_hf(theirs) == PRESETS[name]


def test_transformers_4_spelling() -> None:
    d = to_hf(PRESETS["llama3.1-8b"])
    assert d["rope_theta"] == 500000.0
    assert d["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


META = {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6, "vocab_size": -1, "multiple_of": 256}


@pytest.mark.parametrize(
    ("params", "vocab", "preset"),
    [
        (META, 32000, "7b"),
        ({**META, "norm_eps": 1e-5}, 32000, "llama2-7b"),
        (
            {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": -1}
            | {"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
            32000,
            "llama2-70b",
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5}
            | {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "use_scaled_rope": True},
            128256,
            "llama3.1-8b",
        ),
    ],
)
def test_metas_own_params_files(params: dict[str, Any], vocab: int, preset: str) -> None:
    assert from_meta(params, vocab) == PRESETS[preset]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(1, 40000))
def test_meta_spelling_keeps_any_mlp_width(heads: int, ffn: int) -> None:
    c = LlamaConfig(heads * 2, 1, heads, heads, ffn, 100)
    p = to_meta(c)
    assert ffn_dim_of(c.dim, p["multiple_of"], p.get("ffn_dim_multiplier")) == ffn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": -1}, "n_layers is -1"),
        ({"num_key_value_heads": 3}, "not a multiple of n_kv_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": [1]}, "rope parameters are"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 2**40}, "vocab_size is"),
    ],
)
def test_config_that_cannot_be_used_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(to_hf(PRESETS["tiny"]) | change)


def test_meta_cannot_say_everything() -> None:
    with pytest.raises(ValueError, match="no head_dim"):
        to_meta(LlamaConfig(64, 1, 4, 4, 100, 100, head_dim=32))
    with pytest.raises(ValueError, match="no linear rope"):
        to_meta(LlamaConfig(64, 1, 4, 4, 100, 100, rope_scaling=RopeScaling("linear", 2.0)))
    with pytest.raises(ValueError, match="vocab_size is 7, but the embedding has 8 rows"):
        from_meta({**META, "vocab_size": 7}, 8)
