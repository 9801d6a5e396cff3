"""Ids and labels of the 5k set against Stanford Alpaca's preprocess(), written out here from its source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

from data.loader import build
from llama.chat import IGNORE, ChatFormat
from llama.tokenizer import Tokenizer

# stanford_alpaca/train.py, PROMPT_DICT
PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
MAX_LEN = 512


def preprocess(
    example: dict[str, str], processor: sentencepiece.SentencePieceProcessor, max_len: int
) -> tuple[list[int], list[int]]:
    """Source and target tokenised together, cut, and the first len(source) labels masked."""
    prompt = PROMPT_INPUT if example.get("input", "") != "" else PROMPT_NO_INPUT
    source = prompt.format_map(example)
    ids = [processor.bos_id(), *processor.encode(source + example["output"]), processor.eos_id()][:max_len]
    masked = len([processor.bos_id(), *processor.encode(source)][:max_len])
    return ids, [IGNORE] * masked + ids[masked:]


def compare(path: Path, shared: Path, tokenizer: Tokenizer, max_len: int) -> dict[int, tuple[list[int], list[int]]]:
    """Records where (ids, labels) of the two differ -> ours, by record number."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(shared / "data/chatdoctor/tokenizer.model"))
    train, _, _ = build(
        [path], tokenizer=tokenizer, chat_format=ChatFormat(), max_len=max_len, workers=1, progress=False
    )
    ours = {}
    for i in range(len(train)):
        ids, mask = train.document(i)
        ours[train.record(i)[1]] = (ids.tolist(), [t if m else IGNORE for t, m in zip(ids.tolist(), mask, strict=True)])
    differ = {}
    for number, example in enumerate(json.loads(path.read_text()), start=1):
        if ours.get(number) != preprocess(example, processor, max_len):
            differ[number] = ours.get(number, ([], []))
    return differ


def test_the_5k_set_equals_alpaca_but_for_one_row(shared: Path, llama_tokenizer: Tokenizer) -> None:
    differ = compare(shared / "data/chatdoctor/chatdoctor5k.json", shared, llama_tokenizer, MAX_LEN)
    # Record 3373: the answer opens with a quotation mark, which Alpaca merges with the template's colon into one
    # piece, so that its model is never taught to produce it. Here the border of prompt and answer stays a border:
    # one token more, and the mark is supervised.
    assert sorted(differ) == [3373]
    ids, labels = differ[3373]
    at = next(i for i, label in enumerate(labels) if label != IGNORE)
    pieces = [llama_tokenizer._whole.id_to_piece(i) for i in ids[at - 1 : at + 2]]
    assert pieces == [":", "'", "B"]


def test_truncated_rows_equal_alpaca_too(shared: Path, llama_tokenizer: Tokenizer) -> None:
    """Cut at 128 tokens, rows with a supervised token left are as Alpaca cuts them. The 203 without one, which Alpaca
    keeps and learns nothing from, are dropped here."""
    path = shared / "data/chatdoctor/chatdoctor5k.json"
    differ = compare(path, shared, llama_tokenizer, 128)
    dropped = {n for n, (ids, _) in differ.items() if not ids}
    assert set(differ) - dropped == {3373}
    assert len(dropped) == 203


def test_general_instructions_equal_alpaca_but_at_the_border(shared: Path, llama_tokenizer: Tokenizer) -> None:
    """The first stage's data, 587 of 999 without input: both templates. 57 answers open with a mark that LLaMA has a
    piece for together with the colon; there, and only there, the border differs as in the 5k set."""
    path = shared / "data/general/alpaca_gpt4_en_demo_1k.json"
    differ = compare(path, shared, llama_tokenizer, MAX_LEN)
    examples = json.loads(path.read_text())
    assert Counter(examples[n - 1]["output"][0] for n in differ) == {'"': 51, "-": 3, "(": 2, "'": 1}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(shared / "data/chatdoctor/tokenizer.model"))
    for n, (ids, labels) in differ.items():
        theirs, _ = preprocess(examples[n - 1], processor, MAX_LEN)
        at = next(i for i, label in enumerate(labels) if label != IGNORE)
        assert ids[: at - 1] == theirs[: at - 1]
        assert processor.id_to_piece(theirs[at - 1]) == "".join(processor.id_to_piece(ids[at - 1 : at + 1]))
        assert ids[at + 1 :] == theirs[at : len(ids) - 1]


def test_the_comparison_is_not_blind(
    shared: Path, llama_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a", "input": "b", "output": "c"}]))
    assert compare(path, shared, llama_tokenizer, MAX_LEN) == {}
    monkeypatch.setitem(globals(), "PROMPT_INPUT", PROMPT_INPUT + " ")
    assert list(compare(path, shared, llama_tokenizer, MAX_LEN)) == [1]
