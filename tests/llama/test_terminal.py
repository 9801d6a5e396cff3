"""Long chats: what a turn costs, and what becomes of it when the context is full. The rest: tests/test_generate.py."""

from __future__ import annotations

import pytest
import torch

from llama.chat import ChatFormat, Dialogue, Message, render
from llama.config import LlamaConfig
from llama.generation import Answer, Doctor
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.terminal import KEPT, Chat
from llama.tokenizer import Tokenizer

TURNS, ANSWER, CONTEXT = 30, 12, 400


class Counting(Llama):
    """Counts the rows that it is given."""

    rows = 0

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        self.rows += tokens.numel()
        return super().forward(tokens, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def chat(small_tokenizer: Tokenizer) -> Chat:
    """With a random model of varied text that never ends by itself."""
    model = Counting(LlamaConfig(32, 2, 4, 2, 64, small_tokenizer.vocab_size, max_seq_len=CONTEXT))
    model.init_weights(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 15)
        model.head.weight[small_tokenizer.eos_id] = 0
    params = SamplingParams(temperature=1.0, seed=1)
    return Chat(Doctor("m", model.eval(), small_tokenizer, ChatFormat("dialogue", "Be kind."), params, ANSWER))


def test_a_turn_costs_what_is_new_in_it(chat: Chat, small_tokenizer: Tokenizer) -> None:
    """30 turns; nothing before the last answer is read again, but when turns are dropped, which is seldom."""
    model = chat.doctor.model
    assert isinstance(model, Counting)
    before, dropped = 0, []
    for turn in range(TURNS):
        left_out, model.rows = chat.left_out, 0
        chat._ask(f"I have pain in the {('chest', 'head', 'back')[turn % 3]} for two days")
        assert chat.last is not None
        rows, prompt, new = model.rows, chat.last.request.prompt, len(chat.last.token_ids)
        assert new == ANSWER
        if chat.left_out == left_out:
            assert rows < len(prompt) - before + new
        else:
            dropped.append(turn)
            assert len(prompt) <= KEPT * (CONTEXT - ANSWER)
            assert rows < len(prompt) + new
        before = len(prompt)
        opening = chat.doctor.chat_format.opening()
        dialogue = Dialogue((*opening, *chat.turns[2 * chat.left_out : -1]))
        assert prompt == render(dialogue, chat.doctor.chat_format, small_tokenizer)[0], "the instruction stays"
        cold = Answer(chat.last.request, small_tokenizer)
        "".join(cold.stream(model))
        assert cold.token_ids == chat.last.token_ids
    assert len(chat.turns) == 2 * TURNS
    assert 1 < len(dropped) < TURNS / 4


def test_a_retried_question_is_no_part_of_what_was_left_out(chat: Chat) -> None:
    chat.turns = [Message("user", "fever"), Message("assistant", "rest")]
    chat.asked, chat.left_out = "fever", 1
    chat._retry("")
    assert chat.left_out == 0
    assert len(chat.turns) == 2
