"""An encoder directory of transformers -> vectors of its tokens; what is none ends with one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama.encoder import load_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fever", "and", "cough"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A BERT of random weights."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_vector_for_each_token_and_none_for_the_special_ones(directory: Path) -> None:
    one, two, empty = load_encoder(directory, "cpu")(["fever and cough", "fever", ""])
    assert one.shape == (3, 16)
    assert two.shape == (1, 16)
    assert empty.shape == (0, 16)
    assert not np.allclose(one[0], two[0])  # hidden states, not embeddings


def test_what_is_no_encoder_is_said(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--encoder .*cannot be loaded"):
        load_encoder(tmp_path, "cpu")
    with pytest.raises(ValueError, match="no such directory"):
        load_encoder(tmp_path / "nowhere", "cpu")
