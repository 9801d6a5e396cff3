"""The model against transformers, against a really trained LLaMA, and against itself cached and packed."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig as HFConfig

from llama.cache import KVCache
from llama.chat import IGNORE
from llama.config import PRESETS, LlamaConfig, RopeScaling, from_hf, to_hf
from llama.layout import entries
from llama.model import Llama, rotation_table

BASE = LlamaConfig(64, 3, 4, 4, 172, 301, max_seq_len=256)
CASES = {
    "mha": BASE,
    "gqa": dataclasses.replace(BASE, n_kv_heads=2),
    "mqa-tied": dataclasses.replace(BASE, n_kv_heads=1, tie_embeddings=True),
    "odd-sizes": LlamaConfig(60, 2, 6, 3, 101, 257, head_dim=14, norm_eps=1e-6, max_seq_len=256),
    "linear-rope": dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", 4.0)),
    "llama3-rope": dataclasses.replace(
        BASE, n_kv_heads=2, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    ),
}


def pair(c: LlamaConfig, seed: int = 0) -> tuple[LlamaForCausalLM, Llama]:
    """transformers' model with random weights, large enough that errors show, and ours with the same."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(HFConfig.from_dict(to_hf(c))).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(3)
    ours = Llama(c).eval()
    state = theirs.state_dict()
    ours.load_state_dict({e.name: state[e.hf] for e in entries(c)}, strict=True)
    return theirs, ours


def ids(c: LlamaConfig, B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, c.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers(case: str) -> None:
    theirs, ours = pair(CASES[case])
    tokens = ids(CASES[case], 2, 200)
    want = theirs(tokens).logits
    assert (ours(tokens) - want).abs().max() <= 1e-4
    theirs_bf16 = theirs.bfloat16()(tokens).logits.float()
    ours_bf16 = ours.bfloat16()(tokens).float()
    assert (ours_bf16 - want).norm() <= 2 * (theirs_bf16 - want).norm()
    assert (ours_bf16 - want).abs().max() <= 2 * (theirs_bf16 - want).abs().max()


@pytest.mark.parametrize("case", ["gqa", "mqa-tied"])
def test_loss_and_gradients_equal_transformers(case: str) -> None:
    c = CASES[case]
    theirs, ours = pair(c)
    tokens = ids(c, 2, 40)
    targets = torch.where(ids(c, 2, 40, seed=1) % 3 == 0, IGNORE, tokens.roll(-1, 1))
    loss, count = ours(tokens, targets)
    loss.backward()
    want = torch.nn.functional.cross_entropy(
        theirs(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    want.backward()
    assert count == (targets != IGNORE).sum()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
    grads = dict(theirs.named_parameters())
    for e in entries(c):
        torch.testing.assert_close(ours.get_parameter(e.name).grad, grads[e.hf].grad, rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_trained_llama_gives_llama2c_logits(shared: Path) -> None:
    folder = shared / "data/stories260K"
    c = from_hf(json.loads((folder / "config.json").read_text()))
    model = Llama(c).eval()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({e.name: weights[e.hf] for e in entries(c)}, strict=True)
    tokens = torch.tensor(json.loads((folder / "greedy_ids.json").read_text())["input_ids"])
    want = torch.from_numpy(np.load(folder / "greedy_logits.npy"))
    got = model(tokens[None, : len(want)])[0]
    assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("case", ["mha", "gqa", "llama3-rope"])
@torch.no_grad()
def test_cached_decoding_equals_full_forward(case: str) -> None:
    c = CASES[case]
    _, model = pair(c)
    tokens = ids(c, 2, 150)
    full = model(tokens)
    cache = KVCache(c, 2, 160)
    pieces = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 130), (130, 137), (137, 138))]
    pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(138, 150)]
    assert (torch.cat(pieces, 1) - full).abs().max() <= 2e-5
    cache.truncate(100)
    assert (model(tokens[:, 100:120], cache=cache) - full[:, 100:120]).abs().max() <= 2e-5


@torch.no_grad()
def test_cache_refuses_to_overflow(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 1, 4)
    with pytest.raises(ValueError, match="holds 4 positions; 5 are needed"):
        Llama(tiny_config)(ids(tiny_config, 1, 5), cache=cache)


@torch.no_grad()
def test_left_padded_rows_equal_rows_alone() -> None:
    c = CASES["gqa"]
    _, model = pair(c)
    long, short = ids(c, 1, 20), ids(c, 1, 7, seed=3)
    rows = torch.cat((long, torch.cat((torch.zeros(1, 13, dtype=torch.int64), short), 1)))
    cache = KVCache(c, 2, 32)
    cache.first = torch.tensor([0, 13], dtype=torch.int32)
    got = [
        model(rows[:, :15], cache=cache)[:, -1:],
        model(rows[:, 15:19], cache=cache),
        model(rows[:, 19:], cache=cache),
    ]
    got = torch.cat(got, 1)
    assert (got[0] - model(long)[0, 14:]).abs().max() <= 2e-5
    assert (got[1] - model(short)[0, 1:]).abs().max() <= 2e-5


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """start, end of rows of documents with these lengths."""
    starts, ends = [], []
    for row in lengths:
        border = [sum(row[:i]) for i in range(len(row) + 1)]
        starts.append([a for a, n in zip(border, row, strict=False) for _ in range(n)])
        ends.append([a + n for a, n in zip(border, row, strict=False) for _ in range(n)])
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("case", ["mha", "gqa", "mqa-tied"])
def test_packed_documents_equal_documents_alone(case: str) -> None:
    c = CASES[case]
    _, model = pair(c)
    lengths = [[1, 130, 60, 9, 100], [150, 150], [299, 1]]  # tiles of 128 straddle documents
    tokens = ids(c, 3, 300)
    targets = tokens.roll(-1, 1)
    documents = packed(lengths)
    logits = model(tokens, documents=documents)
    loss, _ = model(tokens, targets, documents)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    total = torch.zeros(())
    for b, row in enumerate(lengths):
        at = 0
        for n in row:
            alone = model(tokens[b : b + 1, at : at + n])
            assert (alone[0] - logits[b, at : at + n]).abs().max() <= 2e-5
            total = total + model(tokens[b : b + 1, at : at + n], targets[b : b + 1, at : at + n])[0]
            at += n
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=1e-3)
    for got, want in zip(grads, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_meta_construction_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = Llama(PRESETS["65b"])
    assert sum(p.numel() for p in model.parameters()) == PRESETS["65b"].n_params() == 65_285_660_672
    assert all(p.is_meta for p in model.parameters())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_initial_weights_depend_on_name_and_seed_only(tiny_config: LlamaConfig) -> None:
    a, b, other = Llama(tiny_config), Llama(tiny_config), Llama(tiny_config)
    a.init_weights(0)
    b.init_weights(0)
    other.init_weights(1)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert name.endswith("norm.weight") or not torch.equal(p, r), name


def test_rotation_is_fp32_whatever_the_weights(tiny_config: LlamaConfig) -> None:
    model = Llama(tiny_config).bfloat16()
    model(ids(tiny_config, 1, 3))
    cos, sin = rotation_table(tiny_config, 512)
    assert model._rotation is not None
    assert torch.equal(model._rotation[0], cos)
    assert torch.equal(model._rotation[1], sin)
    assert not [name for name, _ in model.named_buffers()]
