"""Facts asked in closed form: symptoms -> the disease among all, a disease -> its tests and medications among all.

Every name is put behind the same question and its likelihood ranks it, so that nothing depends on how an answer is
phrased or judged. Floors: ranking by the IDF of the true symptoms, the nearest disease's facts, the commonest, chance.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.conditions import Table
from data.evaluation.examinee import Examinee, chat_prompt, continued
from data.evaluation.figures import Figure, Floor, Scores, figure
from data.evaluation.knowledge import Fact, Knowledge
from data.evaluation.parts import Exposure, Outcome, Part, evenly
from data.synthesize import examples

SYMPTOMS = 3  # in a question about a disease of a database
DISEASE_LEAD = "You may have"
LISTS = {
    "tests": ("I was diagnosed with {}. Which tests do I need?", "Tests:"),
    "medications": ("I was diagnosed with {}. Which medications can help me?", "Treatment:"),
}
SEED = 0


@dataclass(frozen=True)
class _Asked:
    """A question about symptoms, the place of its disease among the facts, and which group it counts in."""

    text: str
    symptoms: tuple[str, ...]
    disease: int
    group: str = ""


def diseases_part(knowledge: Knowledge, table: Table | None, limit: int | None) -> Part:
    """Symptoms -> disease. table: the built-in one, whose questions are those of the sample, seen and held out."""
    asked = _of_table(table, knowledge, limit) if table else _of_facts(knowledge, limit)
    protocol = {
        "knowledge": knowledge.identity,
        "questions": [a.text for a in asked],
        "lead": DISEASE_LEAD,
        "scoring": "prompt format + question + lead, sum of log p of ' ' + name + '.'",
    }

    def work(examinee: Examinee, exposure: Exposure, protocol: str) -> Outcome:
        return _diseases(examinee, knowledge, asked, exposure, protocol)

    names = [(f.name, *f.synonyms) for f in (knowledge.facts[a.disease] for a in asked)]
    return Part("recall", f"Symptoms to disease, {knowledge.title}", protocol, [(a.text,) for a in asked], work, names)


def lists_part(kind: str, knowledge: Knowledge, limit: int | None) -> Part:
    """A disease -> its tests or medications, as R-precision."""
    question, lead = LISTS[kind]
    facts = evenly([f for f in knowledge.facts if getattr(f, kind)], limit)
    protocol = {
        "knowledge": knowledge.identity,
        "diseases": [f.name for f in facts],
        "question": question,
        "lead": lead,
        "scoring": "prompt format + question + lead, sum of log p of ' ' + name; true ones among the first R",
    }

    def work(examinee: Examinee, exposure: Exposure, protocol: str) -> Outcome:
        return _lists(examinee, knowledge, kind, facts, exposure, protocol)

    texts = [(question.format(f.spoken),) for f in facts]
    names = [(f.name, *f.synonyms) for f in facts]
    return Part(kind, f"Disease to {kind}, {knowledge.title}", protocol, texts, work, names)


def _of_table(table: Table, knowledge: Knowledge, limit: int | None) -> list[_Asked]:
    """The sample's questions: symptoms that were combined so in training, that were not, and in unseen words."""
    places = {f.name: i for i, f in enumerate(knowledge.facts)}
    count = len(places) if limit is None else min(limit, len(places))
    groups = (("train", "seen"), ("held_out", "held_out"), ("unseen_wordings", "unseen_words"))
    return [
        _Asked(e.question, e.symptoms, places[e.condition], title)
        for split, title in groups
        for e in examples(table, SEED, count, split)  # type: ignore[arg-type]
    ]


def _of_facts(knowledge: Knowledge, limit: int | None) -> list[_Asked]:
    """Three symptoms of each disease, drawn by a seed."""
    rng = random.Random(SEED)
    asked = []
    for i, fact in enumerate(knowledge.facts):
        if fact.symptoms:
            picked = tuple(rng.sample(fact.symptoms, min(SYMPTOMS, len(fact.symptoms))))
            asked.append(_Asked(f"I have {_joined(picked)}. What could it be?", picked, i))
    return evenly(asked, limit)


def _joined(names: Sequence[str]) -> str:
    low = [n[:1].lower() + n[1:] for n in names]
    return low[0] if len(low) == 1 else f"{', '.join(low[:-1])} and {low[-1]}"


# --- symptoms to disease --------------------------------------------------------------------------


def _diseases(
    examinee: Examinee, knowledge: Knowledge, asked: Sequence[_Asked], exposure: Exposure, protocol: str
) -> Outcome:
    endings = [continued(examinee, f" {f.spoken}.") for f in knowledge.facts]
    ranks = [
        _rank(scores, a.disease)
        for scores, a in zip(_scored(examinee, [a.text for a in asked], DISEASE_LEAD, endings), asked, strict=True)
    ]
    by_idf = symptom_ranker(knowledge.facts)
    idf_ranks = [_rank(by_idf(a.symptoms), a.disease) for a in asked]
    groups = [a.group or exposure.group(i) for i, a in enumerate(asked)]
    figures = []
    for group in dict.fromkeys(groups):
        mine = [i for i, g in enumerate(groups) if g == group]
        flags = exposure.contaminated and [exposure.contaminated[i] for i in mine]
        figures += _of_ranks(
            f"recall.{group}", [ranks[i] for i in mine], [idf_ranks[i] for i in mine], len(endings), flags, protocol
        )
    items = [
        {"question": a.text, "disease": knowledge.facts[a.disease].name, "group": g, "rank": r, "rank_by_idf": s}
        for a, g, r, s in zip(asked, groups, ranks, idf_ranks, strict=True)
    ]
    return Outcome(figures, items)


def _of_ranks(
    name: str, ranks: Sequence[int], by_idf: Sequence[int], n: int, contaminated: Sequence[bool] | None, protocol: str
) -> list[Figure]:
    figures = []
    for k in (1, 5, 10):
        floors: dict[str, Floor] = {
            "chance": min(1.0, k / n),
            "IDF of the true symptoms": Scores.of([r <= k for r in by_idf]),
        }
        figures.append(
            figure(
                f"{name}.top{k}", Scores.of([r <= k for r in ranks]), floors=floors, protocol=protocol,
                contaminated=contaminated, note=f"right disease among the {k} likeliest of {n}",
            )
        )  # fmt: skip
    floors = {
        "chance": math.fsum(1 / r for r in range(1, n + 1)) / n,
        "IDF of the true symptoms": Scores.of([1 / r for r in by_idf]),
    }
    reciprocal = Scores.of([1 / r for r in ranks])
    figures.append(
        figure(
            f"{name}.mrr", reciprocal, floors=floors, protocol=protocol, contaminated=contaminated, unit="score",
            note="mean reciprocal rank",
        )
    )  # fmt: skip
    return figures


def _scored(
    examinee: Examinee, questions: Sequence[str], lead: str, endings: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Log-probability of every ending behind every question."""
    begin = continued(examinee, lead)
    room = len(begin) + max(map(len, endings))
    asked = [([*chat_prompt(examinee, text, room), *begin], endings) for text in questions]
    return [[math.fsum(tokens) for tokens in row] for row in examinee.continuations(asked)]


def _rank(scores: Sequence[float], place: int) -> int:
    """The rank of one among all, 1 the best; of equals the first one counts, as when sorting."""
    mine = scores[place]
    return 1 + sum(s > mine for s in scores) + sum(s == mine for s in scores[:place])


def symptom_ranker(facts: Sequence[Fact]) -> Callable[[Sequence[str]], list[float]]:
    """A function from symptoms to a score for each fact: the summed IDF of those that it has."""
    owners: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        for s in dict.fromkeys(fact.symptoms):
            owners.setdefault(s, []).append(i)

    def score(symptoms: Sequence[str]) -> list[float]:
        scores = [0.0] * len(facts)
        for s in sorted(set(symptoms) & owners.keys()):  # sorted: sums of floats must not depend on hash order
            for i in owners[s]:
                scores[i] += math.log(len(facts) / len(owners[s]))
        return scores

    return score


# --- disease to lists -----------------------------------------------------------------------------


def _lists(
    examinee: Examinee, knowledge: Knowledge, kind: str, facts: Sequence[Fact], exposure: Exposure, protocol: str
) -> Outcome:
    question, lead = LISTS[kind]
    names = knowledge.all(kind)
    endings = [continued(examinee, f" {name}") for name in names]
    scored = _scored(examinee, [question.format(f.spoken) for f in facts], lead, endings)
    common = Counter(name for f in knowledge.facts for name in set(getattr(f, kind)))
    near = symptom_ranker(knowledge.facts)
    hits: list[float] = []
    by_common: list[float] = []
    by_nearest: list[float] = []
    items: list[Mapping[str, Any]] = []
    for f, scores in zip(facts, scored, strict=True):
        true = set(getattr(f, kind))
        first = [names[i] for i in sorted(range(len(names)), key=lambda i, s=scores: -s[i])[: len(true)]]
        order = sorted(names, key=lambda name: -common[name] + (name in true))  # its own row does not count
        similar = near(f.symptoms)
        nearest = max(
            (i for i, g in enumerate(knowledge.facts) if g is not f), key=lambda i, s=similar: s[i], default=None
        )
        theirs = () if nearest is None else getattr(knowledge.facts[nearest], kind)
        hits.append(_precision(first, true))
        by_common.append(_precision(order, true))
        by_nearest.append(_precision([*dict.fromkeys([*theirs, *order])], true))
        items.append({"disease": f.name, "true": sorted(true), "first": first})
    chance = math.fsum(len(set(getattr(f, kind))) for f in facts) / len(facts) / len(names)
    floors: dict[str, Floor] = {
        "chance": chance,
        "the commonest": Scores.of(by_common),
        "nearest disease by symptoms": Scores.of(by_nearest),
    }
    groups = [exposure.group(i) for i in range(len(facts))]
    made = figure(
        f"{kind}.r_precision",
        Scores.of(hits),
        floors=floors,
        protocol=protocol,
        contaminated=exposure.contaminated,
        groups=groups if exposure.named is not None else None,
        note=f"of {len(names)} names, the true ones among the first R",
    )
    return Outcome([made], items)


def _precision(ranked: Sequence[str], true: set[str]) -> float:
    return sum(name in true for name in ranked[: len(true)]) / len(true)
