"""Attendants as a doctor's company: what they say is heard in order, and a chat's cache survives what they add."""

from __future__ import annotations

import pytest
import torch

from llama.attendant import Attendant, Command
from llama.chat import ChatFormat, Dialogue, Message
from llama.config import LlamaConfig
from llama.generation import Doctor
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.terminal import Chat
from llama.tokenizer import Tokenizer


class Marking(Attendant):
    """Counts the words of every question, in the question."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commands = {f"/{name}": Command(f"/{name}  test", lambda rest: f"{name} heard {rest}")}

    def before(self, dialogue: Dialogue) -> str | None:
        return f"{self.name} before {dialogue.messages[-1].content}"

    def prepare(self, dialogue: Dialogue) -> Dialogue:
        return Dialogue(
            tuple(
                Message(m.role, f"{m.content} {len(m.content.split())} {self.name}") if m.role == "user" else m
                for m in dialogue.messages
            )
        )

    def after(self, dialogue: Dialogue, answer: str) -> str | None:
        return f"{self.name} after {len(answer) > 0}"


@pytest.fixture
def doctor(small_tokenizer: Tokenizer) -> Doctor:
    model = Llama(LlamaConfig(32, 2, 4, 2, 64, small_tokenizer.vocab_size, max_seq_len=256))
    model.init_weights(1)
    with torch.no_grad():  # varied text that does not end by itself
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 15)
        model.head.weight[small_tokenizer.eos_id] = 0
    params = SamplingParams(temperature=1.0, seed=1)
    silent, loud = Attendant(), Marking("pain")
    return Doctor(
        "m", model.eval(), small_tokenizer, ChatFormat("dialogue", "Be kind."), params, 6, attendants=(silent, loud)
    )


def test_they_speak_around_the_answer(doctor: Doctor, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(doctor)
    chat._ask("I cough")
    out = capsys.readouterr().out.splitlines()
    assert (out[0], out[-1]) == ("pain before I cough", "pain after True")
    chat._command("/pain in the chest")
    assert "pain heard in the chest" in capsys.readouterr().err
    chat._command("/help")
    assert capsys.readouterr().err.index("/pain  test") > 0
    chat._command("/cough")
    assert "/cough is not a command" in capsys.readouterr().err


def test_what_they_add_is_read_once(doctor: Doctor) -> None:
    chat = Chat(doctor)
    chat._ask("I have pain")
    assert chat.turns[0] == Message("user", "I have pain"), "the dialogue stays as it was said"
    assert chat.last is not None
    read = len(chat.last.request.prompt)
    chat._ask("and cough")
    assert "and cough 2 pain" in doctor.tokenizer.decode_continued(list(chat.last.request.prompt))
    assert chat.last.reused_tokens >= read


def test_a_notice_comes_also_where_no_answer_fits(doctor: Doctor, capsys: pytest.CaptureFixture[str]) -> None:
    Chat(doctor)._ask("pain " * 300)
    out, err = capsys.readouterr()
    assert out.startswith("pain before pain")
    assert "error: the prompt is" in err
