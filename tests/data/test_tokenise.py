"""Truncation, the loss bit, and processes that give what one process gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.records import Record, content_key
from data.tokenise import BATCH, Job, _Process, encode, last_answer, supervised_bit, token_type, tokenise
from llama.chat import ChatFormat, Dialogue, Message, render
from llama.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def record(i: int, question: str, answer: str) -> Record:
    d = Dialogue((Message("user", question), Message("assistant", answer)))
    return Record(d, i, content_key(d))


def test_the_type_of_stored_tokens_leaves_a_bit() -> None:
    assert [token_type(v).str for v in (1024, 32000, 32768, 32769, 128256)] == ["<u2", "<u2", "<u2", "<u4", "<u4"]
    assert supervised_bit(np.dtype("<u2")) == 32768
    assert supervised_bit(np.dtype("<u4")) == 1 << 31


P, A = False, True  # prompt, answer
CASES = [
    ("as it is", [P, P, A, A, A], 5, 5),
    ("the end of the answer is cut, and EOS with it", [P, P, A, A, A], 4, 4),
    ("one token of the answer is left", [P, P, A, A, A], 3, 3),
    ("the prompt alone fills it: dropped", [P, P, A, A, A], 2, 0),
    ("cut in the first answer", [P, A, A, P, P, A], 2, 2),
    ("cut in the second question: it goes too", [P, A, A, P, P, A], 5, 3),
    ("cut at the end of the first answer", [P, A, A, P, P, A], 3, 3),
    ("a last question without an answer goes", [P, A, A, P, P], 9, 3),
    ("nobody answers: dropped", [P, P, P], 9, 0),
]


@pytest.mark.parametrize(("why", "mask", "max_len", "kept"), CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("dtype", [np.dtype("<u2"), np.dtype("<u4")])
def test_truncation(why: str, mask: list[bool], max_len: int, kept: int, dtype: np.dtype) -> None:
    ids = [32767 - i for i in range(len(mask))]
    stored = encode(ids, mask, max_len, dtype)
    assert stored.dtype == dtype
    bit = supervised_bit(dtype)
    assert (stored & (bit - 1)).tolist() == ids[:kept]
    assert (stored >= bit).tolist() == mask[:kept]


def test_processes_give_what_one_process_gives(small_tokenizer: Tokenizer) -> None:
    records = [record(i, f"pain in the chest {i}", "rest " * (i % 13 + 1)) for i in range(1, 3 * BATCH + 40)]
    job = Job(small_tokenizer.model_bytes, ChatFormat("dialogue").to_json(), 40)
    alone, two = list(tokenise(records, job, 1)), list(tokenise(records, job, 2))
    assert len(alone) == len(two) == 4
    for (a, b), (c, d) in zip(alone, two, strict=True):
        assert (a == c).all()
        assert (b == d).all()
    rows = np.concatenate([b for _, b in alone])
    assert rows["index"].tolist() == list(range(1, 3 * BATCH + 40))
    ids, mask = render(records[5].dialogue, ChatFormat("dialogue"), small_tokenizer)
    first, row = alone[0][0], rows[5]
    stored = first[row["at"] : row["at"] + row["length"]]
    assert (stored & 0x7FFF).tolist() == ids[:40]
    assert row["supervised"] == sum(mask[:40])
    assert row["original"] == len(ids)


def test_an_error_while_reading_ends_the_processes(small_tokenizer: Tokenizer) -> None:
    def records() -> object:
        yield from (record(i, "fever", "rest") for i in range(BATCH))
        raise ValueError("broken file")

    job = Job(small_tokenizer.model_bytes, ChatFormat().to_json(), 40)
    with pytest.raises(ValueError, match="broken file"):
        list(tokenise(records(), job, 2))  # type: ignore[arg-type]


def test_a_process_that_dies_is_reported(small_tokenizer: Tokenizer) -> None:
    with _Process(Job(small_tokenizer.model_bytes, ChatFormat().to_json(), 40)) as process:
        process._child.kill()
        with pytest.raises(RuntimeError, match="a tokenising process ended early"):
            process.receive()


def test_processes_do_not_import_torch() -> None:
    code = "import sys, data.tokenise, data.cache, data.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_of_a_pair_the_last_answer_alone_carries_loss() -> None:
    assert last_answer([P, A, A, P, A, A]) == [P, P, P, P, A, A]
    assert last_answer([P, A]) == [P, A]
    assert last_answer([P, P]) == [P, P]
