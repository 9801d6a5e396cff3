"""A tokenizer through GGUF's tokens, scores and types and back: the same ids."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama.gguf_tokenizer import CONTROL, UNKNOWN, USER_DEFINED, padding, pieces_of, tokenizer_of
from llama.tokenizer import Tokenizer

PATH = Path("x.gguf")
TEXTS = (
    "I have pain in the chest",
    " two  spaces ",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600",
    "</s><s><unk> <0x41>",
    "a\n\tb\r\n",
    "\u2581 \ufb01 \uff21",
    "",
)


def values_of(t: Tokenizer, rows: int = 0) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer."""
    pieces = pieces_of(t) + [padding(i) for i in range(t.vocab_size, rows)]
    return {
        "tokenizer.ggml.model": b"llama",
        "tokenizer.ggml.tokens": [p.text for p in pieces],
        "tokenizer.ggml.scores": np.array([p.score for p in pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([p.kind for p in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": t.bos_id,
        "tokenizer.ggml.eos_token_id": t.eos_id,
        "tokenizer.ggml.unknown_token_id": t.unk_id,
    }


def made(values: dict[str, Any]) -> Tokenizer:
    tokenizer = tokenizer_of(PATH, values)
    assert tokenizer is not None
    return tokenizer


def assert_same(a: Tokenizer, b: Tokenizer) -> None:
    assert (a.vocab_size, a.bos_id, a.eos_id, a.unk_id) == (b.vocab_size, b.bos_id, b.eos_id, b.unk_id)
    assert pieces_of(a) == pieces_of(b)
    for text in TEXTS:
        for continued in (False, True):
            assert a.encode(text, continued=continued) == b.encode(text, continued=continued), text
        assert a.decode(a.encode(text)) == b.decode(a.encode(text))


def test_the_same_pieces_and_ids(small_tokenizer: Tokenizer) -> None:
    assert_same(made(values_of(small_tokenizer)), small_tokenizer)


def test_padding_is_taken_off_again(small_tokenizer: Tokenizer) -> None:
    values = values_of(small_tokenizer, small_tokenizer.vocab_size + 3)
    assert_same(made(values), small_tokenizer)
    values["tokenizer.ggml.token_type"][-3:] = UNKNOWN  # as older converters have them
    assert_same(made(values), small_tokenizer)


def test_the_same_ids_for_a_corpus(shared: Path, llama_tokenizer: Tokenizer) -> None:
    """LLaMA's own tokenizer over every answer of ChatDoctor's 5k set."""
    mine = made(values_of(llama_tokenizer, 32001))
    assert_same(mine, llama_tokenizer)
    records = json.loads((shared / "data/chatdoctor/chatdoctor5k.json").read_text())
    texts = [r[k] for r in records for k in ("input", "output")]
    assert len(texts) > 10000
    for text in texts:
        assert mine.encode(text) == llama_tokenizer.encode(text)


def test_what_llama_cpps_converter_changes_is_put_right(small_tokenizer: Tokenizer) -> None:
    """Control type and score -1000 for what tokenizer_config.json lists, <unk> too; spaces in user-defined tokens."""
    values = values_of(small_tokenizer)
    values["tokenizer.ggml.token_type"][:3] = CONTROL
    values["tokenizer.ggml.scores"][:3] = -1000
    del values["tokenizer.ggml.unknown_token_id"]
    tokenizer = made(values)
    assert tokenizer.unk_id == 0
    for text in TEXTS:
        assert tokenizer.encode(text) == small_tokenizer.encode(text)
    n = small_tokenizer.vocab_size
    values["tokenizer.ggml.tokens"].append(b"<a b>")
    values["tokenizer.ggml.scores"] = np.append(values["tokenizer.ggml.scores"], np.float32(-1000))
    values["tokenizer.ggml.token_type"] = np.append(values["tokenizer.ggml.token_type"], np.int32(USER_DEFINED))
    tokenizer = made(values)
    assert tokenizer.encode("in<a b>the") == [
        *small_tokenizer.encode("in"),
        n,
        *tokenizer.encode("the", continued=True),
    ]
    assert tokenizer.decode([n]) == "<a b>"
    assert pieces_of(tokenizer)[-1].kind == USER_DEFINED


def test_the_space_in_front_can_be_off(small_tokenizer: Tokenizer) -> None:
    tokenizer = made(values_of(small_tokenizer) | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("pain") == small_tokenizer.encode("pain", continued=True)


def test_text_that_looks_like_the_end_is_text(small_tokenizer: Tokenizer) -> None:
    values = values_of(small_tokenizer)
    values["tokenizer.ggml.token_type"][1:3] = USER_DEFINED
    assert made(values).encode("</s>") == small_tokenizer.encode("</s>")


def test_other_kinds_are_no_sentencepiece_models(small_tokenizer: Tokenizer) -> None:
    assert tokenizer_of(PATH, values_of(small_tokenizer) | {"tokenizer.ggml.model": b"gpt2"}) is None
    assert tokenizer_of(PATH, {}) is None


BAD: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": None},
    "tokens that are numbers": {"tokens": np.zeros(320, np.float32)},
    "no scores": {"scores": None},
    "fewer scores": {"scores": np.zeros(319, np.float32)},
    "scores that are whole": {"scores": np.zeros(320, np.int32)},
    "a score that is none": {"scores": np.full(320, np.nan, np.float32)},
    "types that are not": {"token_type": np.zeros(320, np.float32)},
    "eos beyond": {"eos_token_id": 320},
    "bos in words": {"bos_token_id": b"<s>"},
    "negative": {"unknown_token_id": -1},
    "all empty": {"tokens": [b""] * 320},
    "all the same": {"tokens": [b"a"] * 320},
    "not UTF-8": {"tokens": [b"%d\xff" % i for i in range(320)]},
    "bytes that are none": {"token_type": np.full(320, 6, np.int32)},
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_tokenizer(small_tokenizer: Tokenizer, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    values = values_of(small_tokenizer) | {f"tokenizer.ggml.{k}": v for k, v in BAD[case].items()}
    with pytest.raises(ValueError, match=r"x.gguf: .*; give the original with --tokenizer FILE"):
        tokenizer_of(PATH, values)
    assert capfd.readouterr().err == ""


def test_pieces_with_the_defaults_left_out() -> None:
    """A proto writer leaves out what is 0 or the default: no score, no type."""
    pieces = b"".join(
        bytes([10, len(p) + 2 + len(rest), 10, len(p)]) + p + rest
        for p, rest in ((b"<unk>", b"\x18\x02"), (b"<s>", b"\x18\x03"), (b"</s>", b"\x18\x03"), (b"a", b""),
                        (b"b", b"\x15" + struct.pack("<f", -2)))
    )  # fmt: skip
    assert [(p.text, p.score, p.kind) for p in pieces_of(Tokenizer(pieces))] == [
        (b"<unk>", 0, 2),
        (b"<s>", 0, 3),
        (b"</s>", 0, 3),
        (b"a", 0, 1),
        (b"b", -2, 1),
    ]
