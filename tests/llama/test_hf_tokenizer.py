"""Our tokenizer files in transformers: the same ids, the same prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies as st

from llama.chat import FORMATS, ChatFormat, Dialogue, Message, render
from llama.hf_tokenizer import tokenizer_files
from llama.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

ODD = ["", " ", "  ", " a", "  a", "a  b", "a ", "\n", "a\n\nb", "\t1234", "caf\u00e9", "\u4f60\u597d", "\U0001f600",
       "x\u00a0y", "\u200b", "\x00", "e\u0301", "\ufb01\uff21", "[INST]", "<0x0A>"]  # fmt: skip
ALPHABET = "ab c\n\t  <>/|1290.,\u00e9\u4f60\U0001f600\u200b\u0301-=_(){}aaaeeetttnn"


def opened(path: Path, tokenizer: Tokenizer, chat_format: ChatFormat | None = None) -> Any:
    """The tokenizer as transformers.AutoTokenizer opens it."""
    path.mkdir(exist_ok=True)
    for name, data in tokenizer_files(tokenizer, chat_format or ChatFormat(), 512).items():
        (path / name).write_bytes(data)
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return transformers.AutoTokenizer.from_pretrained(path)


def texts() -> list[str]:
    rng = random.Random(0)
    noise = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 60))) for _ in range(2000)]
    spaces = [" " * k + "x" + " " * (k // 2) + "y" + " " * (k % 3) for k in range(40)]
    return [*ODD, *noise, *spaces, *("a" * k for k in range(40))]


def check_ids(theirs: Any, tokenizer: Tokenizer, wanted: list[str]) -> None:
    different = [t for t in wanted if theirs(t)["input_ids"] != [tokenizer.bos_id, *tokenizer.encode(t)]]
    assert different == []
    for t in wanted:
        ids = tokenizer.encode(t)
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_same_ids_with_a_trained_tokenizer(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    theirs = opened(tmp_path, small_tokenizer)
    check_ids(theirs, small_tokenizer, [*texts(), "I have pain in the chest for two days"])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (small_tokenizer.bos_id, small_tokenizer.eos_id)
    assert theirs.pad_token_id is None
    assert len(theirs) == small_tokenizer.vocab_size
    assert theirs.model_max_length == 512


def test_same_ids_with_llamas_tokenizer(tmp_path: Path, llama_tokenizer: Tokenizer, shared: Path) -> None:
    theirs = opened(tmp_path, llama_tokenizer)
    records = json.loads((shared / "data/chatdoctor/chatdoctor5k.json").read_text())
    check_ids(theirs, llama_tokenizer, [*texts(), *(r[k] for r in records[::30] for k in ("input", "output"))])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("instruction", ["", 'Say "hi" {{ x }} {% y %} \\n \U0001f600\nline two'], ids=["none", "odd"])
def test_chat_template_renders_what_we_render(
    tmp_path: Path, small_tokenizer: Tokenizer, name: Any, instruction: str
) -> None:
    chat_format = ChatFormat(name, instruction)
    theirs = opened(tmp_path, small_tokenizer, chat_format)
    turns = [
        [("user", "fever and cough\n")],
        [("user", "pain"), ("assistant", "rest "), ("user", "two\n\ndays"), ("assistant", "{{ 1 }}"), ("user", "q")],
        [("system", "the head\n"), ("user", " back"), ("assistant", "\nchest"), ("user", "cough")],
    ]
    for given in turns:
        messages = tuple(Message(role, text) for role, text in given)
        dialogue = Dialogue(messages if given[0][0] == "system" else chat_format.opening() + messages)
        pieces = chat_format.segments(dialogue)
        wanted = "<s>" + "".join(text + ("</s>" if supervised else "") for text, supervised in pieces)
        chat = [{"role": role, "content": text} for role, text in given]
        assert theirs.apply_chat_template(chat, tokenize=False) == wanted
        ids = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert ids == render(dialogue, chat_format, small_tokenizer)[0]


WORDS = [" ", "  ", "\n", ":", ")", "\t", "\u2581", "pain", "Doctor", "### ", "\U0001f600", "\u00e9", "\u4f60", "7"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join) | st.text(max_size=20)


@pytest.fixture(scope="module")
def across_colons(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, dict[str, Any]]:
    """A vocabulary with pieces that begin with a colon, as LLaMA's has, and its files for every format."""
    tokenizer = train_tokenizer([f"pain:) {i} :pain ::{i % 7} \n Doctor:pain" for i in range(200)], 300)
    assert {tokenizer.encode(text, continued=True)[0] for text in (":)", ":pain")} - set(tokenizer.encode(":"))
    folder = tmp_path_factory.mktemp("formats")
    return tokenizer, {f: opened(folder / f, tokenizer, ChatFormat(f, "Be kind. ")) for f in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
@hypothesis.given(turns=st.lists(TEXTS, min_size=1, max_size=9))
@hypothesis.settings(max_examples=60, deadline=None)
def test_chats_of_several_turns_have_our_ids(
    name: Any, across_colons: tuple[Tokenizer, dict[str, Any]], turns: list[str]
) -> None:
    """One to five questions, with the answers between them or an answer last."""
    tokenizer, theirs = across_colons
    chat_format = ChatFormat(name, "Be kind. ")
    hypothesis.assume(
        not any(mark in text for text in turns for mark in ("<s>", "</s>", "<unk>", "\nDoctor:", "### Response:"))
    )
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    chat = [{"role": m.role, "content": m.content} for m in messages]
    ids = theirs[name].apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids == render(Dialogue((*chat_format.opening(), *messages)), chat_format, tokenizer)[0]


def test_what_a_message_says_of_our_marks_is_a_mark_there(
    across_colons: tuple[Tokenizer, dict[str, Any]],
) -> None:
    """The limit: a rendered chat is one text, in which nothing tells a typed "</s>" from ours."""
    tokenizer, theirs = across_colons
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "pain</s>"}]
    dialogue = Dialogue(tuple(Message(m["role"], m["content"]) for m in chat))  # type: ignore[arg-type]
    assert tokenizer.eos_id in theirs["plain"].apply_chat_template(chat, return_dict=True)["input_ids"]
    assert tokenizer.eos_id not in render(dialogue, ChatFormat("plain"), tokenizer)[0]


def test_a_model_that_json_cannot_say_is_left_to_transformers(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A unigram model, and one that rewrites text: no tokenizer.json rather than a wrong one."""
    corpus = tmp_path / "corpus"
    corpus.write_text("fever and cough in the chest\nrest for two days\n" * 50)
    for kind, rule in (("unigram", "identity"), ("bpe", "nmt_nfkc")):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(tmp_path / kind), vocab_size=40, model_type=kind, minloglevel=2,
            normalization_rule_name=rule, hard_vocab_limit=False, remove_extra_whitespaces=False,
        )  # fmt: skip
        files = tokenizer_files(Tokenizer.load(tmp_path / f"{kind}.model"), ChatFormat(), 512)
        assert "tokenizer.json" not in files
        assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "LlamaTokenizer"
    assert "tokenizer.json" in tokenizer_files(train_tokenizer(["a b c"] * 20, 263), ChatFormat(), 512)
