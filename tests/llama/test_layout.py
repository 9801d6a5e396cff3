"""The table of names, shapes and shard rules."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama.config import LlamaConfig
from llama.layout import deinterleave, entries, interleave
from llama.model import Llama

CONFIG = LlamaConfig(16, 2, 4, 2, 24, 30)


@pytest.mark.parametrize("tied", [False, True])
def test_table_is_the_model(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    assert {e.name: e.shape for e in entries(config)} == parameters


def test_names_of_one_kind_differ() -> None:
    table = list(entries(CONFIG))
    for kind in ("name", "hf", "meta", "gguf"):
        assert len({getattr(e, kind) for e in table}) == len(table)


def test_interleaving_and_back() -> None:
    w = torch.arange(4 * 6 * 5).view(24, 5)
    assert torch.equal(deinterleave(interleave(w, 4), 4), w)
    # Meta's rows of a head go x0 y0 x1 y1 ..., ours x0 x1 ... y0 y1 ...
    assert interleave(w, 4)[:6, 0].tolist() == [0, 15, 5, 20, 10, 25]


def test_parts_of_shards() -> None:
    by_name = {e.name: e for e in entries(CONFIG)}
    assert by_name["embed.weight"].part(2) == (30, 8)
    assert {e.name: e for e in entries(CONFIG, meta_vocab_parallel=True)}["embed.weight"].part(2) == (15, 16)
    assert by_name["layers.0.attn.k.weight"].part(2) == (4, 16)
    assert by_name["layers.0.attn.o.weight"].part(4) == (16, 4)
    assert by_name["norm.weight"].part(4) == (16,)
    with pytest.raises(ValueError, match="30 rows cannot be cut into 4"):
        by_name["head.weight"].part(4)
