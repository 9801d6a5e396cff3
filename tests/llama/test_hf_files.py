"""Hugging Face directories of strangers: both formats, single and sharded, and what is wrong with others."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama.config import LlamaConfig, to_hf
from llama.hf_files import HuggingFace, SafetensorsFile
from llama.layout import entries

CONFIG = LlamaConfig(32, 2, 4, 2, 48, 64)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


def random_weights(c: LlamaConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """By Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)
    return {e.hf: torch.randn(e.shape, generator=generator).to(dtype) for e in entries(c)}


def save(path: Path, c: LlamaConfig, tensors: dict[str, Tensor], kind: str, parts: int = 1) -> None:
    """A directory as transformers lays it out; kind is "safetensors" or "bin"."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(to_hf(c)))
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    write = save_file if kind == "safetensors" else torch.save
    names = list(tensors)
    if parts == 1:
        write(tensors, path / f"{stem}.{suffix}")
        return
    where = {}
    for i in range(parts):
        file = f"{stem}-{i + 1:05d}-of-{parts:05d}.{suffix}"
        write({n: tensors[n] for n in names[i::parts]}, path / file)
        where |= dict.fromkeys(names[i::parts], file)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_reads_every_kind(tmp_path: Path, kind: str, parts: int, mmap: bool) -> None:
    tensors = random_weights(CONFIG, torch.bfloat16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float16)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    save(tmp_path / "hf", CONFIG, tensors, kind, parts)
    source = HuggingFace(tmp_path / "hf", mmap)
    assert source.config == CONFIG
    assert len(source.ignored) == 2
    for e in entries(CONFIG):
        assert source.dtype(e) == torch.bfloat16
        assert torch.equal(source.read(e), tensors[e.hf])
    source.check_unchanged()


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    tensors = random_weights(TIED)
    save(
        tmp_path / "hf", TIED, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, "safetensors"
    )
    assert HuggingFace(tmp_path / "hf").ignored == ["lm_head.weight"]
    save(tmp_path / "hf", TIED, tensors | {"lm_head.weight": torch.ones(64, 32)}, "safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        HuggingFace(tmp_path / "hf")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ({"model.norm.weight": None}, r"1 missing \('model.norm.weight'\)"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "1 unknown"),
        ({"model.norm.weight": torch.ones(31)}, "model.norm.weight is 31; config.json makes it 32"),
        ({"model.norm.weight": torch.ones(32).double()}, "float64|F64"),
    ],
)
def test_tensors_must_be_those_of_the_config(tmp_path: Path, kind: str, new: dict[str, Any], reason: str) -> None:
    tensors = {k: v for k, v in (random_weights(CONFIG) | new).items() if v is not None}
    save(tmp_path / "hf", CONFIG, tensors, kind)
    with pytest.raises(ValueError, match=reason) as error:
        HuggingFace(tmp_path / "hf")
    assert "\n" not in str(error.value)


def test_config_must_be_there_and_sane(tmp_path: Path) -> None:
    save(tmp_path, CONFIG, random_weights(CONFIG), "safetensors")
    good = to_hf(CONFIG)
    for change in ({"num_hidden_layers": 10**9}, {"hidden_size": "32"}, {"head_dim": 7}, {"model_type": "gpt2"}):
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=r"config"):
            HuggingFace(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        HuggingFace(tmp_path)


def test_index_and_parts_must_agree(tmp_path: Path) -> None:
    save(tmp_path, CONFIG, random_weights(CONFIG), "safetensors", 2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    part = tmp_path / "model-00002-of-00002.safetensors"
    last = next(name for name, file in good.items() if file == part.name)
    moved = good | {last: "model-00001-of-00002.safetensors"}
    for where, reason in (
        (moved, "not of one set"),
        (good | {"model.norm.weight": "../../etc/passwd"}, "not in this directory"),
        (good | {"model.norm.weight": 7}, "not in this directory"),
        ({}, "no weight_map"),
        ([1], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": where}))
        with pytest.raises(ValueError, match=reason):
            HuggingFace(tmp_path)
    index.write_text(json.dumps({"weight_map": good}))
    part.unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: missing"):
        HuggingFace(tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>", "HTML"),
        (b"PK\x03\x04abcdefghijk", "zip file"),
        (struct.pack("<Q", 1 << 62) + b"{}", "truncated or damaged"),
        (struct.pack("<Q", 2) + b"[]", "neither|damaged"),
    ],
)
def test_what_is_not_safetensors_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_mutated_safetensors_load_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5).half()}, path)
    good, rng, complaints = path.read_bytes(), random.Random(0), []
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
        for mmap in (True, False):
            try:
                file = SafetensorsFile(path, mmap)
                for name, s in file.stored.items():
                    assert file.read(name).shape == s.shape
            except ValueError as e:
                complaints.append(str(e))
    assert complaints
    assert all(c.startswith(str(path)) and "\n" not in c for c in complaints)
