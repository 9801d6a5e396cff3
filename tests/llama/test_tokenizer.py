"""llama/tokenizer.py: round trips, streaming, text that looks like control, files that are damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.tokenizer import MAX_CHARS, Tokenizer, train_tokenizer

HARD = [
    "",
    " ",
    "   two  spaces   ",
    "fever\n\n\tand cough\r\n",
    "37.5°C, 1.000,50 €",
    "你好，医生。我发烧了",
    "👩‍⚕️ says 👍🏽",
    "İstanbul ǅ ﬁ é é",
    "\u2581\u2581marker",
    "<0x41> <unk> <s> </s> [INST]",
    "\x00\x01\x7f",
    "\ufeffbom \u202e rtl עברית",
    "\U0010ffff\ufffd",
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(text: str, small_tokenizer: Tokenizer) -> None:
    check_round_trip(small_tokenizer, text)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back_from_llamas_tokenizer(text: str, llama_tokenizer: Tokenizer) -> None:
    check_round_trip(llama_tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(text=UNICODE)
def test_any_text_comes_back(text: str, small_tokenizer: Tokenizer) -> None:
    check_round_trip(small_tokenizer, text)


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    # The word-boundary marker is a letter of its own in Unicode, and SentencePiece takes it for a space.
    want = text.replace("\u2581", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == want
    assert tokenizer.decode_continued(tokenizer.encode(text, continued=True)) == want


@settings(max_examples=100, deadline=None)
@given(a=UNICODE, b=UNICODE)
def test_joined_ids_are_joined_text(a: str, b: str, small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode(a) + small_tokenizer.encode(b, continued=True)
    if a:  # without a, nothing carries the marker that decode() takes off
        assert small_tokenizer.decode(ids) == (a + b).replace("\u2581", " ")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streaming_any_ids_gives_the_whole_text_and_no_half_character(
    data: st.DataObject, small_tokenizer: Tokenizer
) -> None:
    tokenizer = small_tokenizer
    byte_ids = [i for i in range(tokenizer.vocab_size) if len(tokenizer._bytes[i]) == 1]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(byte_ids), max_size=40))
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in ids]
    whole = "".join(pieces) + stream.end()
    assert whole == tokenizer.decode_continued(ids)
    assert whole == b"".join(tokenizer._bytes[i] for i in ids).decode("utf-8", "replace")


def test_a_character_over_several_tokens_comes_once_it_is_whole(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("a👩é你", continued=True)
    stream = small_tokenizer.stream()
    pieces = [stream.feed(i) for i in ids]
    assert "".join(pieces) == "a👩é你"
    assert [p for p in pieces if p] == ["a", "👩", "é", "你"]
    assert stream.end() == ""
    cut = small_tokenizer.stream()
    assert "".join(cut.feed(i) for i in ids[:3]) == "a"
    assert cut.end() == "\ufffd"


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "a</s>b"])
def test_control_text_is_text(text: str, small_tokenizer: Tokenizer, llama_tokenizer: Tokenizer) -> None:
    for tokenizer in (small_tokenizer, llama_tokenizer):
        for continued in (False, True):
            ids = tokenizer.encode(text, continued=continued)
            assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_ids_are_no_text(small_tokenizer: Tokenizer) -> None:
    ids = [small_tokenizer.bos_id, *small_tokenizer.encode("rest"), small_tokenizer.eos_id]
    assert small_tokenizer.decode(ids) == "rest"


def test_ids_are_llamas(llama_tokenizer: Tokenizer) -> None:
    t = llama_tokenizer
    assert (t.vocab_size, t.unk_id, t.bos_id, t.eos_id) == (32000, 0, 1, 2)
    assert t.encode("Hello world") == [15043, 3186]
    assert t.encode("Hello", continued=True) == [10994]
    assert t.encode("1234") == [29871, 29896, 29906, 29941, 29946]  # digits one by one


@pytest.mark.parametrize("token", [-1, 10**9])
def test_an_id_outside_the_vocabulary_is_an_error(token: int, small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        small_tokenizer.decode([token])


def test_text_that_is_no_unicode_is_an_error(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode at character 2"):
        small_tokenizer.encode("ab\udcff")


def test_a_text_too_long_is_an_error(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="over the limit"):
        small_tokenizer.encode("a" * (MAX_CHARS + 1))


# --- training ---


def test_training_is_deterministic_and_splits_digits() -> None:
    texts = ["take 500 mg twice a day", "take 250 mg once a day", "rest a day or two"] * 20
    a, b = train_tokenizer(texts, 290), train_tokenizer(iter(texts), 290)
    assert a.model_bytes == b.model_bytes
    assert (a.unk_id, a.bos_id, a.eos_id, a.vocab_size) == (0, 1, 2, 290)
    digits = [a.decode_continued([i]) for i in a.encode("500", continued=True)]
    assert digits == ["5", "0", "0"]


def test_too_little_text_for_the_vocabulary_is_an_error() -> None:
    wanted = r"a tokenizer of 5,000 pieces: these texts hold \d+; give .*--tokenizer_path"
    with pytest.raises(ValueError, match=wanted):
        train_tokenizer(["a few words"], 5000)


# --- files ---


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b'{"version": "1.0", "model": {}}', "JSON"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "tiktoken"),
        (b"\x80\x02}q\x00.", "damaged"),
        (bytes(1000), "damaged"),
    ],
)
def test_what_is_no_model_is_named(content: bytes, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.model: not a SentencePiece model.*{hint}"):
        Tokenizer.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.model: cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "nowhere.model")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)


def test_damaged_files_load_or_give_one_clear_error(small_tokenizer: Tokenizer) -> None:
    """Truncated anywhere, bytes flipped, inserted or cut out: never a crash, and what loads can be used."""
    model, r = small_tokenizer.model_bytes, random.Random(0)
    errors: list[str] = []
    for n in range(300):
        data = bytearray(model)
        at = r.randrange(len(data))
        kind = n % 4
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << r.randrange(8)
        elif kind == 2:
            data[at:at] = r.randbytes(r.randrange(1, 20))
        else:
            del data[at : at + r.randrange(1, 50)]
        try:
            tokenizer = Tokenizer(bytes(data), "x.model")
        except ValueError as e:
            errors.append(str(e))
            continue
        ids = tokenizer.encode("I have pain 你")
        tokenizer.decode(ids)
        tokenizer.decode_continued(range(tokenizer.vocab_size))
    assert len(errors) > 50
    assert all(e.startswith("x.model: ") and "\n" not in e for e in errors)
