"""The seam of loader and model: however a step is split and packed, the loss and the gradient are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data.loader import Dataset, InMemory, Loader, build
from llama.chat import IGNORE, ChatFormat, Dialogue, Message
from llama.config import LlamaConfig
from llama.model import Llama
from llama.tokenizer import Tokenizer

TEXT = "fever cough pain in the chest head back and I have for two days rest"


@pytest.fixture
def dialogues(small_tokenizer: Tokenizer) -> Dataset:
    """60 dialogues of one to three turns and very different lengths."""
    rng = np.random.default_rng(0)

    def words() -> str:
        return " ".join(rng.choice(TEXT.split(), int(rng.integers(1, 9))))

    def dialogue() -> Dialogue:
        turns = [
            m for _ in range(int(rng.integers(1, 4))) for m in (Message("user", words()), Message("assistant", words()))
        ]
        return Dialogue(tuple(turns))

    source = InMemory("a", [dialogue() for _ in range(60)])
    kw: dict[str, Any] = {"chat_format": ChatFormat("dialogue", ""), "max_len": 96, "progress": False}
    return build([source], tokenizer=small_tokenizer, **kw)[0]


def gradient(model: Llama, loaders: list[Loader], index: int) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step as train.py takes them: sums over micro-batches and ranks, one division."""
    model.zero_grad()
    total = 0.0
    for loader in loaders:
        step = loader.step(index)
        for batch in step.micro_batches:
            loss, count = model(batch.tokens, batch.targets, (batch.start, batch.end))
            assert int(count) == int((batch.targets != IGNORE).sum())
            (loss / step.supervised_tokens).backward()
            total += float(loss.detach()) / step.supervised_tokens
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_gradient_does_not_depend_on_the_split(dialogues: Dataset, tiny_config: LlamaConfig) -> None:
    torch.manual_seed(0)
    model = Llama(tiny_config)
    model.init_weights(0)
    results = {}
    for packing in ("none", "step"):
        for batch, accumulation, world, max_len in ((12, 1, 1, 96), (1, 12, 1, 96), (2, 3, 2, 128), (3, 1, 4, 96)):
            kw: dict[str, Any] = {"batch": batch, "accumulation": accumulation, "max_len": max_len, "packing": packing}
            loaders = [Loader(dialogues, rank=r, world=world, **kw) for r in range(world)]
            results[packing, batch, accumulation, world] = gradient(model, loaders, 2)
    loss, grad = results["none", 1, 12, 1]
    for case, (other_loss, other_grad) in results.items():
        assert other_loss == pytest.approx(loss, abs=2e-6), case
        assert (other_grad - grad).abs().max() <= 2e-6 * max(1.0, float(grad.abs().max())), case
    # The test can fail: another step has another gradient.
    assert (gradient(model, [Loader(dialogues, batch=12, max_len=96)], 3)[1] - grad).abs().max() > 1e-3


def test_padding_and_neighbours_leave_no_trace(dialogues: Dataset, tiny_config: LlamaConfig) -> None:
    """Logits of a packed document equal those of the document alone."""
    model = Llama(tiny_config)
    model.init_weights(0)
    batch = Loader(dialogues, batch=4, accumulation=2, max_len=128).step(0).micro_batches[0]
    logits = model(batch.tokens, documents=(batch.start, batch.end))
    checked = 0
    for b in range(batch.tokens.shape[0]):
        t = 0
        while t < batch.tokens.shape[1]:
            end = int(batch.end[b, t])
            alone = model(batch.tokens[b : b + 1, t:end])
            assert (alone[0] - logits[b, t:end]).abs().max() < 1e-4
            t, checked = end, checked + 1
    assert checked > batch.tokens.shape[0]
