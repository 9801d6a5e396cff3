"""What others have published on the same examinations, in %, with protocol and source, to stand beside a model's own.

Quoted, never measured here. Protocols differ (shots, prompts, tuning on each set), so a column says what it is.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """Accuracy in %; None where not published."""

    model: str
    medqa: float | None
    medmcqa: float | None
    pubmedqa: float | None
    mmlu: float | None
    protocol: str
    source: str


_IN_CONTEXT, _TUNED = "in context, mean over seeds", "tuned on each set"
_MEDITRON, _BIOMISTRAL, _PMC = "Meditron paper, table {}", "BioMistral README", "PMC-LLaMA README"

PEERS = (
    Peer("LLaMA-2-7B", 35.4, 37.9, 49.1, 41.4, _IN_CONTEXT, _MEDITRON.format(4)),
    Peer("PMC-LLaMA-7B", 27.8, 27.4, 57.0, 26.2, _IN_CONTEXT, _MEDITRON.format(4)),
    Peer("Meditron-7B", 37.4, 36.3, 69.3, 42.3, _IN_CONTEXT, _MEDITRON.format(4)),
    Peer("Mistral-7B-inst", 41.1, 40.2, 17.8, 55.8, "zero shots, likeliest token", _MEDITRON.format(5)),
    Peer("LLaMA-2-7B", 49.6, 54.4, 61.8, 56.3, _TUNED, _MEDITRON.format(5)),
    Peer("PMC-LLaMA-7B", 49.2, 57.6, 59.2, 59.7, _TUNED, _MEDITRON.format(5)),
    Peer("Meditron-7B", 52.0, 59.2, 74.4, 55.6, _TUNED, _MEDITRON.format(5)),
    Peer("ChatDoctor-7B", 33.93, 31.10, 54.3, None, "not said", _PMC),
    Peer("medAlpaca-7B", 40.1, 37.0, 73.6, 55.0, "tuned, 3 shots; MMLU rounded from six columns", _BIOMISTRAL),
    Peer("PMC-LLaMA-7B", 25.5, 26.6, 72.9, 26.0, "tuned, 3 shots; MMLU rounded from six columns", _BIOMISTRAL),
    Peer("Meditron-7B", 41.6, 41.3, 74.9, 40.0, "tuned, 3 shots; MMLU rounded from six columns", _BIOMISTRAL),
    Peer("BioMistral-7B", 50.6, 48.1, 77.5, 59.0, "tuned, 3 shots; MMLU rounded from six columns", _BIOMISTRAL),
    Peer("LLaMA-2-13B", 42.7, 37.4, 68.0, None, "not said", _PMC),
    Peer("Med-Alpaca-13B", 30.9, 31.1, 53.2, None, "not said", _PMC),
    Peer("PMC-LLaMA-13B", 56.4, 56.0, 77.9, None, "not said", _PMC),
    Peer("OpenBioLLM-8B", 59.0, 56.9, 74.1, None, "not said", "OpenBioLLM model card"),
    Peer("GPT-3.5", 57.7, 53.8, 72.7, None, "not said", "OpenBioLLM model card"),
    Peer("GPT-4", 78.9, 69.5, 75.2, None, "not said", "OpenBioLLM model card"),
)
