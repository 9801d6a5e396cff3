"""How likely a model finds held-out answers: loss a token, perplexity, and bits a byte, which no tokenizer sways.

Only answers count (with their EOS), never prompts. Floors: all tokens equally likely, the frequencies of these very
answers' tokens (the best that a constant distribution can reach), and the same answers to another patient's question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from data.examinee import Examinee
from data.figures import Figure, Scores, figure, transformed
from data.held_out import HeldOut, Item
from data.parts import Exposure, Outcome, Part
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
    documents = [render(_opened(examinee, i.dialogue), examinee.chat_format, examinee.tokenizer) for i in items]
    swapped = [
        render(_opened(examinee, _asked_by(other.dialogue, i.dialogue)), examinee.chat_format, examinee.tokenizer)
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
    floor_sums = {
        "uniform": [n * math.log(examinee.tokenizer.vocab_size) for n in tokens],
        "these answers' token frequencies": _unigram([documents[k] for k in kept]),
        "another patient's question": [math.fsum(row) for row in theirs],
    }
    flags = exposure.contaminated and [exposure.contaminated[k] for k in kept]

    def loss(groups: Sequence[str] | None) -> Figure:
        floors = {name: Scores(nats, tokens) for name, nats in floor_sums.items()}
        return figure(
            "fit.nll",
            Scores(sums, tokens),
            floors=floors,
            protocol=protocol,
            better="lower",
            unit="nats",
            contaminated=flags,
            groups=groups,
            note="a token of held-out answers",
        )

    seen = [exposure.group(k) for k in kept] if exposure.named is not None else None
    perplexity = transformed(loss(seen), "fit.perplexity", math.exp, "score", "exp of the loss")
    sizes = [float(len(items[k].answer.encode())) for k in kept]

    def in_bits(nats: Sequence[float]) -> Scores:
        return Scores([n / math.log(2) for n in nats], sizes)

    per_byte = figure(
        "fit.bits_per_byte",
        in_bits(sums),
        floors={name: in_bits(nats) for name, nats in floor_sums.items()},
        protocol=protocol,
        better="lower",
        unit="bits",
        contaminated=flags,
        groups=[items[k].disease or "unknown" for k in kept],
        note="a byte of held-out answers",
    )
    rows = [
        {"question": items[k].question, "disease": items[k].disease, "nll": s, "tokens": int(n)}
        for k, s, n in zip(kept, sums, tokens, strict=True)
    ]
    lost = len(items) - len(kept)
    notes = [f"{lost:,} of {len(items):,} dialogues do not fit the context and are left out"] if lost else []
    return Outcome([loss([items[k].topic for k in kept]), perplexity, per_byte], rows, notes)


def _opened(examinee: Examinee, dialogue: Dialogue) -> Dialogue:
    """With the checkpoint's own instruction in front, as in a chat, where the dialogue brings none."""
    if dialogue.messages[0].role == "system":
        return dialogue
    return Dialogue((*examinee.chat_format.opening(), *dialogue.messages))


def _asked_by(other: Dialogue, dialogue: Dialogue) -> Dialogue:
    """The other's question with this one's answer."""
    return Dialogue((*other.messages[:-1], dialogue.messages[-1]))


def _unigram(documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> list[float]:
    """Each document's loss under the frequencies of all documents' answer tokens."""
    answers = [[t for t, keep in zip(ids, mask, strict=True) if keep] for ids, mask in documents]
    counts = Counter(t for row in answers for t in row)
    total = sum(counts.values())
    return [-math.fsum(math.log(counts[t] / total) for t in row) for row in answers]
