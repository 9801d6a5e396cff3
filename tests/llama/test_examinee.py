"""The examinee over a real model: pieces change nothing, hidden states are those that the head reads."""

from __future__ import annotations

import pytest
import torch

from llama import examinee as module
from llama.batching import answer_greedily
from llama.chat import ChatFormat, Message
from llama.config import LlamaConfig
from llama.examinee import Examinee
from llama.likelihood import answer_losses, continuations
from llama.model import Llama
from llama.tokenizer import Tokenizer


@pytest.fixture
def model(tiny_config: LlamaConfig) -> Llama:
    model = Llama(tiny_config)
    model.init_weights(0)
    return model.eval()


@pytest.fixture
def examinee(model: Llama, small_tokenizer: Tokenizer) -> Examinee:
    return Examinee(model, small_tokenizer, ChatFormat("dialogue", ""))


def test_pieces_change_nothing(examinee: Examinee, model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 20)
    documents = [([1, *range(5, 5 + n)], [False] + [True] * n) for n in (3, 12, 1, 30, 7)]
    for ours, theirs in zip(examinee.losses(documents), answer_losses(model, documents), strict=True):
        assert ours == pytest.approx(theirs.tolist(), abs=1e-5)
    questions = [([1, *range(5, 5 + n)], [[7], [8, 9]]) for n in (3, 12, 1, 30)]
    for ours, theirs in zip(examinee.continuations(questions), continuations(model, questions), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b.tolist(), abs=1e-5)
    assert examinee.losses([]) == []


def test_replies_are_greedy_answers(examinee: Examinee, model: Llama, small_tokenizer: Tokenizer) -> None:
    texts = answer_greedily(model, small_tokenizer, examinee.chat_format, [(Message("user", "fever"),)])
    ids = [1, *small_tokenizer.encode("Patient: fever\nDoctor:")]
    [reply] = examinee.replies([ids], 80)
    assert reply.text == texts[0]
    assert reply.stopped == (reply.tokens < 80)


def test_hidden_states_are_what_the_head_reads(examinee: Examinee, model: Llama, small_tokenizer: Tokenizer) -> None:
    [vectors] = examinee.vectors(["fever and cough"])
    ids = [small_tokenizer.bos_id, *small_tokenizer.encode("fever and cough")]
    assert vectors.shape == (len(ids) - 1, model.config.dim)
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0, 1:]
    head = model.embed.weight if model.config.tie_embeddings else model.head.weight
    torch.testing.assert_close(torch.from_numpy(vectors) @ head.T.detach(), logits)


def test_speed_is_measured_of_both(examinee: Examinee) -> None:
    speed = examinee.speed([([1, 5, 6, 7], [False, True, True, True])] * 3, turns=1)
    assert speed.scoring > 0
    assert speed.prefill > 0
