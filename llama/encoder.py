"""A text encoder that the user supplies (RoBERTa and the like, through transformers) -> vectors for BERTScore.

evaluate.py loads one for --encoder. Nothing is downloaded: the directory holds it, or it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch


def load_encoder(path: Path, device: str) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """A function from texts to the last hidden states of their tokens, special tokens left out.

    ValueError where transformers is not installed or the directory holds no encoder.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise ValueError("--encoder needs transformers: pip install 'transformers>=5'") from None
    if not path.is_dir():
        raise ValueError(f"--encoder {path}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModel.from_pretrained(path, local_files_only=True).eval().to(device)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"--encoder {path}: cannot be loaded ({str(e).splitlines()[0]})") from None

    @torch.inference_mode()
    def vectors(texts: Sequence[str]) -> list[np.ndarray]:
        made = []
        for text in texts:
            given = tokenizer(text, return_tensors="pt", truncation=True, return_special_tokens_mask=True)
            special = given.pop("special_tokens_mask")[0].bool()
            hidden = model(**{k: v.to(device) for k, v in given.items()}).last_hidden_state[0].float().cpu()
            made.append(hidden[~special].numpy())
        return made

    return vectors
