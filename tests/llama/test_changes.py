"""The share of weights that an update changes: fp32 all of them, bf16 hardly any at a small learning rate."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from llama.changes import NUMBERS, WeightSample
from llama.optimizer import SplitAdamW


def weights() -> nn.Parameter:
    return nn.Parameter(torch.randn(300, 40, generator=torch.Generator().manual_seed(0)))


def test_fp32_moves_where_bf16_stands_still() -> None:
    """A rate of 2e-5 against weights of about 1: 170 steps of fp32, 1/400 of a step of bf16."""
    p = weights()
    optimizer = torch.optim.AdamW([p], lr=2e-5, weight_decay=0.0)
    sample = WeightSample(optimizer, bf16=True)
    before = sample.take()
    assert NUMBERS <= before.numel() <= 2 * NUMBERS
    p.grad = torch.ones_like(p)
    optimizer.step()
    share = sample.changed(before)
    assert share["weights_changed"] > 0.99
    assert 0 < share["bf16_weights_changed"] < 0.05
    exact = (before.bfloat16() != sample.take().bfloat16()).double().mean().item()
    assert share["bf16_weights_changed"] == exact


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_both_halves_of_a_split_weight_count(moments: torch.dtype) -> None:
    values = weights().detach()
    p = nn.Parameter(values.bfloat16())
    groups = [{"params": [p], "weight_decay": 0.0}]
    optimizer = SplitAdamW(groups, {p: "p"}, lr=2e-5, betas=(0.9, 0.999), eps=1e-8, moments=moments)
    optimizer.assign(p, values)
    sample = WeightSample(optimizer, bf16=True)
    before = sample.take()
    assert torch.equal(before, values.view(-1)[:: values.numel() // NUMBERS])
    p.grad = torch.ones_like(p)
    optimizer.step()
    share = sample.changed(before)
    assert share["weights_changed"] > 0.99
    assert 0 < share["bf16_weights_changed"] < 0.05


def test_nothing_changed_is_nought_and_fp32_runs_say_nothing_of_bf16() -> None:
    p = weights()
    sample = WeightSample(torch.optim.AdamW([p]), bf16=False)
    assert sample.changed(sample.take()) == {"weights_changed": 0.0}
