"""An evaluation's results as a card: Markdown for repositories, HTML for people (card_html.py), from one JSON object.

evaluate.py writes both beside results.json. Every line has value, interval, floor, n, contaminated items and protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.evaluation.figures import Figure
from data.evaluation.peers import PEERS, Peer

Results = Mapping[str, Any]  # what evaluate.py writes into results.json
EXAMS = ("medqa", "medmcqa", "pubmedqa", "mmlu")
EXAM_TITLES = ("MedQA-4", "MedMCQA", "PubMedQA", "MMLU-med")
WARNING = "Research only. These figures say nothing about the safety of using the model for care."
COLUMNS = ("figure", "value", "95 %", "floor", "against the floor", "n", "contaminated", "protocol", "what")


def figures_of(part: Mapping[str, Any]) -> list[Figure]:
    return [Figure.from_json(f) for f in part["figures"]]


def shown(value: float, unit: str) -> str:
    """A value as the card shows it."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    return (
        f"{value:.3f} {unit}" if unit in ("nats", "bits") else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    )


def row(f: Figure) -> tuple[str, ...]:
    """The cells of a figure's line."""
    low, high = (shown(v, f.unit) for v in f.interval)
    if f.floor is not None:
        floor = f"{shown(f.floor, f.unit)} ({f.floor_name})"
    else:
        floor = "; ".join(f"{shown(v, f.unit)} ({k})" for k, v in f.floors.items()) or "none"
    clean = ""
    if f.contaminated and f.clean_value is not None:
        clean = f" ({f.n - f.contaminated:,} clean: {shown(f.clean_value, f.unit)})"
    seen = "unknown" if f.contaminated is None else f"{f.contaminated:,}{clean}"
    return f.name, shown(f.value, f.unit), f"{low} to {high}", floor, f.standing, f"{f.n:,}", seen, f.protocol, f.note


def verdict(results: Results) -> str:
    """One sentence: how many figures stand where to their floors."""
    standings = [f.standing for part in results["parts"] for f in figures_of(part)]
    counted = {s: standings.count(s) for s in dict.fromkeys(standings)}
    compared = sum(n for s, n in counted.items() if s != "not compared")
    told = ", ".join(f"{counted.get(s, 0)} {s}" for s in STANDINGS)
    return f"Of {compared} figures that have a floor to beat: {told}."


STANDINGS = ("better than floor", "indistinguishable from floor", "worse than floor")


def facts(results: Results) -> list[tuple[str, str]]:
    """What was examined, and how."""
    checkpoint, trained = results["checkpoint"], results["training_files"]
    speed = results.get("throughput")
    size = f"{checkpoint['parameters']:,} parameters, {checkpoint['weights']} on {checkpoint['device']}"
    told = [
        ("checkpoint", f"{checkpoint['path']} ({size})"),
        ("fingerprint", checkpoint["fingerprint"]),
        ("suite", results["suite"] + (f", at most {results['limit']} items a part" if results["limit"] else "")),
        (
            "trained on",
            ", ".join(f["name"] for f in trained) if trained else "unknown: contamination cannot be counted",
        ),
        ("made", f"{results['made']} with {results['versions']}"),
    ]
    if speed:
        told.append(
            (
                "speed",
                f"{speed['scoring_tokens_per_s']:,.0f} tokens/s scored, {speed['ratio']:.0%} of the model's own "
                f"batched prefill ({speed['prefill_tokens_per_s']:,.0f}), on {speed['device']}",
            )
        )
    return told


def peer_rows(results: Results) -> list[tuple[str, ...]]:
    """This model's accuracies and its floors, then what others published."""
    by_name = {f.name: f for part in results["parts"] for f in figures_of(part)}
    ours = [by_name.get(f"{exam}.labels.acc") for exam in EXAMS]
    if not any(ours):
        return []

    def cell(f: Figure | None, value: float | None) -> str:
        return "-" if f is None or value is None else f"{100 * value:.1f}"

    def published(p: Peer) -> tuple[str, ...]:
        scores = ("-" if v is None else f"{v:.1f}" for v in (p.medqa, p.medmcqa, p.pubmedqa, p.mmlu))
        return p.model, *scores, p.protocol, p.source

    marks = [
        "" if f is None else f"{cell(f, f.value)}{'' if f.standing == STANDINGS[0] else ' (not over the floor)'}"
        for f in ours
    ]
    return [
        ("**this model**", *(m or "-" for m in marks), "zero shots, likelihood of the label", "measured here"),
        ("its floors", *(cell(f, f and f.floor) for f in ours), "best of those measured", "measured here"),
        *map(published, PEERS),
    ]


PEER_COLUMNS = ("model", *EXAM_TITLES, "protocol", "source")


def markdown(results: Results) -> str:
    """The card as Markdown."""
    lines = [f"# Evaluation of {results['checkpoint']['path']}", "", WARNING, "", verdict(results), ""]
    lines += [f"- **{k}**: {v}" for k, v in facts(results)]
    for part in results["parts"]:
        lines += ["", f"## {part['title']}", ""]
        lines += _table(COLUMNS, [row(f) for f in figures_of(part)])
        lines += ["", *(f"- {note}" for note in part["notes"])] if part["notes"] else []
    if peers := peer_rows(results):
        lines += ["", "## Beside published figures (accuracy, %)", ""]
        lines += [*_table(PEER_COLUMNS, peers), "", PEER_NOTE]
    if results["left_out"]:
        lines += ["", "## Left out", "", *(f"- {item['part']}: {item['why']}" for item in results["left_out"])]
    lines += ["", "## How to read this", "", *(f"- {line}" for line in READING)]
    return "\n".join(lines) + "\n"


PEER_NOTE = (
    "Published figures are quoted; shots, prompts and tuning differ, so differences of a few points mean nothing."
)
READING = (
    "**floor**: the best of the answers without knowledge that were measured on the same items: chance, a constant "
    "answer, word counting, the nearest neighbour. A figure that does not beat it shows nothing.",
    "**against the floor**: McNemar's test for right and wrong, else a bootstrap of the difference, at 95 %.",
    "**95 %**: Wilson's interval for shares of right and wrong, else a bootstrap over items.",
    "**contaminated**: items of which 13 words in a row stand in the training files, and the figure without them.",
    "**protocol**: a hash of items, prompts, scoring and decoding. Only figures of equal hashes can be compared.",
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *map(line, rows)]
