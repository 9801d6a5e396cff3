"""Fixtures every test may use. Data under ../shared is optional: tests that need it skip with a reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# One thread a test process: on two cores, OpenMP threads that wait on each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore SIGINT, and so would every program they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from llama.config import LlamaConfig
from llama.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "fever",
    "cough",
    "pain",
    "in",
    "the",
    "chest",
    "head",
    "back",
    "and",
    "I",
    "have",
    "for",
    "two",
    "days",
    "rest",
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    path = ROOT.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("needs the data folder ../shared")
    return path


@pytest.fixture(scope="session")
def llama_tokenizer(shared: Path) -> Tokenizer:
    """LLaMA's own 32,000-piece tokenizer."""
    return Tokenizer.load(shared / "data/chatdoctor/tokenizer.model")


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """A 320-piece tokenizer trained here."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (400, 8), generator=generator).tolist()
    return train_tokenizer([" ".join(WORDS[i] for i in row) for row in picks], 320)


@pytest.fixture
def tiny_config(small_tokenizer: Tokenizer) -> LlamaConfig:
    """A model small enough to run in milliseconds: two layers, grouped queries."""
    return LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_seq_len=128)
