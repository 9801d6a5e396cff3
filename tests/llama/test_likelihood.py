"""llama/likelihood.py: packed and shared, the same log-probabilities as one text at a time; nothing is run twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.config import LlamaConfig
from llama.generation import lay_out_for_decoding
from llama.likelihood import answer_losses, continuations
from llama.model import Llama

V = 50
IDS = st.integers(0, V - 1)


def random_model(laid_out: bool = True) -> Llama:
    model = Llama(LlamaConfig(32, 2, 4, 2, 48, V, max_seq_len=48, tie_embeddings=laid_out))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 6)
    if laid_out:
        lay_out_for_decoding(model)
    return model.eval()


MODEL = random_model()


@torch.inference_mode()
def log_probabilities(model: Llama, ids: Sequence[int]) -> torch.Tensor:
    """Of every id but the first, one text alone."""
    logits = model(torch.tensor([list(ids)]))[0].log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(list(ids))[1:, None])[:, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(IDS, st.booleans()), min_size=1, max_size=20), max_size=12),
    st.sampled_from([1, 20, 64, 2048]),
)
def test_losses_of_answers(texts: list[list[tuple[int, bool]]], room: int) -> None:
    documents = [([i for i, _ in text], [False, *(m for _, m in text[1:])]) for text in texts]
    found = answer_losses(MODEL, documents, room)
    assert len(found) == len(documents)
    for (ids, mask), losses in zip(documents, found, strict=True):
        wanted = -log_probabilities(MODEL, ids)[torch.tensor(mask[1:], dtype=torch.bool)]
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(IDS, min_size=1, max_size=20),
            st.lists(st.lists(IDS, min_size=1, max_size=6), min_size=1, max_size=5),
        ),
        max_size=8,
    ),
    st.sampled_from([1, 30, 2048]),
)
def test_continuations(questions: list[tuple[list[int], list[list[int]]]], room: int) -> None:
    found = continuations(MODEL, questions, room)
    assert [len(row) for row in found] == [len(endings) for _, endings in questions]
    for (prefix, endings), row in zip(questions, found, strict=True):
        for ending, part in zip(endings, row, strict=True):
            wanted = log_probabilities(MODEL, prefix + ending)[len(prefix) - 1 :]
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("laid_out", [True, False])
def test_a_model_as_trained_and_as_laid_out(laid_out: bool) -> None:
    model = random_model(laid_out)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = log_probabilities(model, ids)
    (losses,) = answer_losses(model, [(ids, [False] * 4 + [True] * 4)])
    torch.testing.assert_close(losses, -wanted[3:], rtol=1e-4, atol=1e-4)
    ((ending,),) = continuations(model, [(ids[:4], [ids[4:]])])
    torch.testing.assert_close(ending, wanted[3:], rtol=1e-4, atol=1e-4)


def test_a_prefix_is_run_once_and_no_last_token_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int] = []
    forward = Llama.forward

    def counted(self: Llama, tokens: torch.Tensor, **options: object) -> object:
        run.append(tokens.numel())
        return forward(self, tokens, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Llama, "forward", counted)
    continuations(MODEL, [([1] * 30, [[2], [3], [4]])])
    assert run == [30]
    run.clear()
    continuations(MODEL, [([1] * 30, [[2, 5], [3, 6], [4, 7, 8]])])
    assert run == [30 + 1 + 1 + 2]
    run.clear()
    continuations(MODEL, [([1] * 30, [[2, 5, 6, 7]] * 30)], 60)
    assert run == [30 + 10 * 3] * 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="document 1 is 49 tokens long; the model's context holds 48"):
        answer_losses(MODEL, [([1, 2], [False, True]), ([1] * 49, [False] * 49)])
    with pytest.raises(ValueError, match="question 0 takes 49 tokens; the model's context holds 48"):
        continuations(MODEL, [([1] * 40, [[2], [3] * 9])])
    for question in (([], [[1]]), ([1], []), ([1], [[2], []])):
        with pytest.raises(ValueError, match="question 0: a prefix or a continuation is empty"):
            continuations(MODEL, [question])
