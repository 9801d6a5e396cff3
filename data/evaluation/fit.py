"""How likely a model finds held-out answers: loss a token, perplexity, and bits a byte, which no tokenizer sways.

Only answers count (with their EOS), never prompts. Floors: all tokens equally likely, the frequencies of these very
answers' tokens (the best that a constant distribution can reach), and the same answers to another patient's question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from data.evaluation.examinee import Examinee, opened
from data.evaluation.figures import Figure, Scores, figure, transformed
from data.evaluation.held_out import HeldOut, Item
from data.evaluation.parts import Exposure, Outcome, Part
from llama.chat import Dialogue, render


def part(held_out: HeldOut) -> Part:
    """Held-out loss as a part of an evaluation."""
    protocol = {
        "held out": held_out.identity,
        "items": len(held_out.items),
        "scoring": "prompt format of the checkpoint; nats of the answer's tokens and EOS, over tokens or UTF-8 bytes",
    }

    def work(examinee: Examinee, exposure: Exposure, protocol: str) -> Outcome:
        return _fit(examinee, held_out.items, exposure, protocol)

    texts = [(i.question, i.answer) for i in held_out.items]
    return Part(
        "fit", f"Held-out answers, {held_out.title}", protocol, texts, work, [(i.disease,) for i in held_out.items]
    )


def _fit(examinee: Examinee, items: Sequence[Item], exposure: Exposure, protocol: str) -> Outcome:
    documents = [render(opened(examinee, i.dialogue), examinee.chat_format, examinee.tokenizer) for i in items]
    swapped = [
        render(opened(examinee, _asked_by(other.dialogue, i.dialogue)), examinee.chat_format, examinee.tokenizer)
        for i, other in zip(items, [*items[1:], *items[:1]], strict=True)
    ]
    fits = [
        max(len(a), len(b)) <= examinee.max_len and any(mask)
        for (a, mask), (b, _) in zip(documents, swapped, strict=True)
    ]
    kept = [k for k, fit in enumerate(fits) if fit]
    if not kept:
        return Outcome([], [], ["no held-out dialogue fits the model's context"])
    ours = examinee.losses([documents[k] for k in kept])
    theirs = examinee.losses([swapped[k] for k in kept])
    tokens = [float(len(row)) for row in ours]
    sums = [math.fsum(row) for row in ours]
    nats = {
        "": sums,
        "uniform": [n * math.log(examinee.tokenizer.vocab_size) for n in tokens],
        "these answers' token frequencies": _unigram([documents[k] for k in kept]),
        "another patient's question": [math.fsum(row) for row in theirs],
    }
    flags = exposure.contaminated and [exposure.contaminated[k] for k in kept]

    def made(name: str, counts: Sequence[float], unit: str, groups: Sequence[str] | None, note: str) -> Figure:
        scale = 1 / math.log(2) if unit == "bits" else 1.0
        scores = {k: Scores([scale * n for n in some], counts) for k, some in nats.items()}
        ours = scores.pop("")
        return figure(
            name,
            ours,
            floors=scores,
            protocol=protocol,
            better="lower",
            unit=unit,
            contaminated=flags,
            groups=groups,
            note=note,
        )

    seen = [exposure.group(k) for k in kept] if exposure.named is not None else None
    sizes = [float(len(items[k].answer.encode())) for k in kept]
    diseases = [items[k].disease or "unknown" for k in kept]
    loss = made("fit.nll", tokens, "nats", [items[k].topic for k in kept], "a token of held-out answers")
    perplexity = transformed(made("", tokens, "nats", seen, ""), "fit.perplexity", math.exp, "score", "exp of the loss")
    per_byte = made("fit.bits_per_byte", sizes, "bits", diseases, "a byte of held-out answers")
    rows = [
        {"question": items[k].question, "disease": items[k].disease, "nll": s, "tokens": int(n)}
        for k, s, n in zip(kept, sums, tokens, strict=True)
    ]
    lost = len(items) - len(kept)
    notes = [f"{lost:,} of {len(items):,} dialogues do not fit the context and are left out"] if lost else []
    return Outcome([loss, perplexity, per_byte], rows, notes)


def _asked_by(other: Dialogue, dialogue: Dialogue) -> Dialogue:
    """The other's question with this one's answer."""
    return Dialogue((*other.messages[:-1], dialogue.messages[-1]))


def _unigram(documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> list[float]:
    """Each document's loss under the frequencies of all documents' answer tokens."""
    answers = [[t for t, keep in zip(ids, mask, strict=True) if keep] for ids, mask in documents]
    counts = Counter(t for row in answers for t in row)
    total = sum(counts.values())
    return [-math.fsum(math.log(counts[t] / total) for t in row) for row in answers]
