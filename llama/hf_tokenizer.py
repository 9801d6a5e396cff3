"""Hugging Face tokenizer files of a SentencePiece model, so that transformers and vLLM give the same ids as we do.

Called by checkpoint.py when a model is saved, and by gguf_files.py for the chat template; never read back: our own
tokenizer is `tokenizer.model`.

Left to convert `tokenizer.model` by itself, transformers 5.23 gives other ids: it ranks merges by piece id where
SentencePiece ranks by score ("a  b"), and puts no marker before a text that starts with a space. tokenizer.json says
both exactly.

A rendered chat becomes ids at once there, turn by turn with us (render()). So in tokenizer.json the marker stands
before the first turn alone, and no piece spans the end of a prompt. What stays different: "</s>", "<s>", "<unk>" or a
prompt's end ("\n\n### Response:") in a message's own words, which nothing tells from ours once all is one text.
"""

from __future__ import annotations

import json
import re
from typing import Any

import sentencepiece

from llama.chat import ChatFormat, Dialogue, Message
from llama.tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece's mark of a space


def tokenizer_files(tokenizer: Tokenizer, chat_format: ChatFormat, max_seq_len: int) -> dict[str, bytes]:
    """tokenizer.model, tokenizer_config.json, special_tokens_map.json, and tokenizer.json where one can be written."""
    pieces = _pieces(tokenizer)
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    names = {role: pieces.IdToPiece(i) for role, i in special.items()}
    files: dict[str, Any] = {"special_tokens_map.json": names}
    if document := _tokenizer_json(tokenizer, pieces, chat_format):
        files["tokenizer.json"] = document
    files["tokenizer_config.json"] = {
        # LlamaTokenizer would throw away the normalizer of tokenizer.json and make its own.
        "tokenizer_class": "PreTrainedTokenizerFast" if document else "LlamaTokenizer",
        **names,
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": chat_template(chat_format),
    }
    encoded = {name: (json.dumps(d, ensure_ascii=False, indent=1) + "\n").encode() for name, d in files.items()}
    return {"tokenizer.model": tokenizer.model_bytes, **encoded}


def _pieces(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizer.model_bytes)
    return processor


def _tokenizer_json(
    tokenizer: Tokenizer, p: sentencepiece.SentencePieceProcessor, chat_format: ChatFormat
) -> dict[str, Any] | None:
    """The model as a byte-fallback BPE, or None when it is not one or rewrites text before splitting it."""
    V = tokenizer.vocab_size
    normal = [i for i in range(V) if not (p.IsControl(i) or p.IsUnknown(i) or p.IsByte(i) or p.IsUnused(i))]
    scores = {p.IdToPiece(i): p.GetScore(i) for i in normal}
    # BPE scores are ranks, a unigram model's are log-probabilities. The probe has what other rules would change:
    # a ligature, a full-width letter, a run of spaces, spaces at both ends.
    probe = " a  \ufb01\uff21\t "
    if not all(s.is_integer() for s in scores.values()) or p.Normalize(probe) != SPACE + probe.replace(" ", SPACE):
        return None
    vocab = {p.IdToPiece(i): i for i in range(V)}
    special = {p.IdToPiece(i): i for i in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)}
    bos = p.IdToPiece(tokenizer.bos_id)
    start: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    # The normalizer sees what lies between two special pieces, one by one, unless they are "normalized": then it sees
    # them in their text, and by themselves when the file is opened. So the text after BOS gets its marker, that after
    # EOS none, and EOS by itself stays as it is, or it would not be found.
    eos = re.escape(p.IdToPiece(tokenizer.eos_id))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece, **plain, "normalized": i == tokenizer.eos_id}
            for piece, i in sorted(special.items(), key=lambda x: x[1])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": rf"\A(?!{eos}\z|\z)"}, "content": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": _split_after_prompts(chat_format),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": start,
            "pair": start + second,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": p.IdToPiece(tokenizer.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in _merges(scores)],
        },
    }


def _split_after_prompts(chat_format: ChatFormat) -> dict[str, Any] | None:
    """Cuts a text where an answer begins: it may start with what would make one piece with the prompt's colon."""
    (prompt, _), *_ = chat_format.segments(Dialogue((Message("user", SPACE),)))
    ending = prompt.rpartition(SPACE)[2]
    if not ending.strip():  # nothing to know a prompt by; nor do pieces span a line's end in the models that we train
        return None
    found = re.escape(ending.replace(" ", SPACE))
    return {"type": "Split", "pattern": {"Regex": f"(?<={found})"}, "behavior": "Isolated", "invert": False}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best first. SentencePiece merges the pair that makes the highest score.

    Pieces of equal score (runs of spaces) are ordered as transformers' converter orders them: longer parts first.
    """
    found = [
        (-score, -cut, cut - len(piece), piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(found)]


# --- chat template --------------------------------------------------------------------------------

# What llama/chat.py does, in Jinja. {system} is the instruction that a chat opens with. Tests hold the two together.
_TEMPLATES = {
    "alpaca": (
        "{% if loop.first and system %}"
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ system }}\n\n### Input:\n{{ m['content'] }}\n\n### Response:"
        "{% elif loop.first %}"
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ m['content'] }}\n\n### Response:"
        "{% else %}"
        "{{ '\\n\\n' }}### {{ 'Input' if system else 'Instruction' }}:\n{{ m['content'] }}\n\n### Response:"
        "{% endif %}"
    ),
    "dialogue": (
        "{% if not loop.first %}{{ '\\n' }}{% elif system %}{{ system + '\\n' }}{% endif %}"
        "Patient: {{ m['content'] }}{{ '\\n' }}Doctor:"
    ),
    "plain": (
        "{% if not loop.first %}{{ '\\n' }}{% elif system %}{{ system + '\\n' }}{% endif %}{{ m['content'] + '\\n' }}"
    ),
}


def chat_template(chat_format: ChatFormat) -> str:
    """The prompt format as transformers' apply_chat_template renders it: the text of our render(), BOS and EOS in it.

    A dialogue without a system message gets the format's instruction, as our chat gives it.
    """
    instruction = json.dumps(chat_format.instruction, ensure_ascii=False)
    return (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        f"{{% else %}}{{% set system = {instruction} %}}{{% set turns = messages %}}{{% endif %}}"
        "{{ bos_token }}"
        "{% for m in turns %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}"
        + _TEMPLATES[chat_format.name]
        + "{% endif %}{% endfor %}"
    )
