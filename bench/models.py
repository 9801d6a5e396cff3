"""What the benches run: our model with random weights made in place, tokenizers for any vocabulary.

Knows no clocks and no tables; transformers' model is hugging_face.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from llama import quantize
from llama.config import LlamaConfig
from llama.model import Llama
from llama.quantize import QuantisedLinear, Scheme

if TYPE_CHECKING:  # needs sentencepiece, which the training bench does without
    from llama.tokenizer import StreamDecoder, Tokenizer

SCHEMES = {"int8": Scheme(8, 0), "int4": Scheme(4, 64)}  # convert_weights.py's
EOS = 2
STD = 0.02  # of random weights


class Pieces:
    """Stands in for a tokenizer of any size: every id is a word."""

    bos_id, eos_id, unk_id = 1, EOS, 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._bytes = [f" w{i}".encode() for i in range(vocab_size)]

    def stream(self) -> StreamDecoder:
        from llama.tokenizer import StreamDecoder

        return StreamDecoder(self._bytes)


def tokenizer_of_size(vocab_size: int, texts: Sequence[str], trained: int = 2048) -> tuple[Tokenizer, int]:
    """A real tokenizer: so many pieces trained on texts, filled up with words that no text has; and its first word.

    For what needs a tokenizer.model or a GGUF file. Ids below the number are controls and bytes.
    """
    from llama.gguf_tokenizer import NORMAL, Piece, pieces_of, tokenizer_of
    from llama.tokenizer import train_tokenizer

    pieces = pieces_of(train_tokenizer(texts, trained))
    base = sum(p.kind != NORMAL for p in pieces)  # unknown, BOS, EOS and the bytes come first
    pieces += [Piece(f"\u2581w{i}".encode(), -1e5 - i, NORMAL) for i in range(len(pieces), vocab_size)]
    key = "tokenizer.ggml."
    values = {
        f"{key}model": b"llama",
        f"{key}tokens": [p.text for p in pieces],
        f"{key}scores": np.array([p.score for p in pieces], np.float32),
        f"{key}token_type": np.array([p.kind for p in pieces], np.int32),
    }
    tokenizer = tokenizer_of(Path("bench"), values)
    assert tokenizer is not None
    return tokenizer, base


@torch.no_grad()
def random_decoder(config: LlamaConfig, kind: str, device: torch.device) -> Llama:
    """A model that is ready to decode and never says EOS, its random weights made where they will lie.

    kind: int8, int4 or the name of a number type.
    """
    from llama.generation import lay_out_for_decoding

    scheme = SCHEMES.get(kind)
    dtype = torch.bfloat16 if scheme else getattr(torch, kind)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    if scheme:
        quantize.replace(model.layers, lambda _, linear: quantize.empty(linear, scheme, "meta", dtype), scheme.bits)
    model.to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(0.0, STD)
    for packed in (m for m in model.modules() if isinstance(m, QuantisedLinear)):
        packed.codes.random_(0, 256)
        packed.scales.fill_(STD * 12**0.5 / 2**packed.bits)  # codes are spread evenly
    (model.embed if config.tie_embeddings else model.head).weight[EOS] = 0
    lay_out_for_decoding(model)
    return model
