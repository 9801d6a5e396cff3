"""The card: every figure is on it with all that it needs, in Markdown and in HTML that a parser accepts."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from data.evaluation import card, card_html
from data.evaluation.figures import Scores, figure

VOID = {"meta"}


def results(**changed: Any) -> dict[str, Any]:
    acc = figure(
        "medqa.labels.acc",
        Scores.of([1, 0, 0, 1] * 10),
        protocol="abc",
        floors={"chance": 0.25, "<A>": Scores.of([1, 0, 0, 0] * 10)},
        contaminated=[True] * 8 + [False] * 32,
        groups=["x|y", "z"] * 20,
        note="a <b> note",
    )
    loss = figure(
        "fit.nll", Scores([1.0, 2.0], [2.0, 3.0]), protocol="abd", floors={"uniform": 5.0}, better="lower", unit="nats"
    )
    rate = figure(
        "answers.stopped", Scores.of([1, 1]), protocol="abe", floors={"reference answers": 1.0}, better="neither"
    )
    part = {
        "name": "medqa",
        "title": "MedQA & more",
        "figures": [f.to_json() for f in (acc, loss, rate)],
        "notes": ["3 prompts | cut"],
    }
    base = {
        "checkpoint": {"path": "out/<demo>", "fingerprint": "f0", "parameters": 9, "weights": "int8", "device": "cpu"},
        "suite": "quick", "limit": 40, "made": "2026", "versions": "python", "training_files": [{"name": "t.json"}],
        "throughput": {"scoring_tokens_per_s": 10.0, "prefill_tokens_per_s": 11.0, "ratio": 0.909, "device": "a CPU"},
        "parts": [part], "left_out": [{"part": "poison", "why": "needs --diseases"}],
    }  # fmt: skip
    return base | changed


def test_markdown_has_every_column() -> None:
    text = card.markdown(results())
    line = next(line for line in text.splitlines() if line.startswith("| medqa.labels.acc"))
    for cell in ("50.0 %", "35.2 % to 64.8 %", "25.0 % (", "better than floor", "| 40 |", "8 (32 clean: 50.0 %)"):
        assert cell in line, cell
    assert "Of 2 figures that have a floor to beat: 2 better than floor" in text
    assert "| answers.stopped | 100.0 % |" in text
    assert "100.0 % (reference answers) | not compared" in text
    assert "poison: needs --diseases" in text
    assert "| ChatDoctor-7B | 33.9 | 31.1 | 54.3 | - |" in text
    assert "3 prompts | cut" in text


def test_what_is_unknown_is_said() -> None:
    text = card.markdown(results(training_files=None, parts=[]))
    assert "unknown: contamination cannot be counted" in text
    assert "ChatDoctor-7B" not in text


class Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        assert not any(k in ("src", "href") for k, _ in attrs), "it must need nothing else"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("changed", [{}, {"training_files": None, "parts": [], "left_out": [], "throughput": {}}])
def test_html_is_whole_and_escaped(changed: dict[str, Any]) -> None:
    page = card_html.page(results(**changed))
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert "out/<demo>" in checker.text
    assert "prefers-color-scheme: dark" in page
    if not changed:
        assert page.count("<svg") == 2
        assert page.count('class="range"') == 3  # two shares of the part, and the examination beside its peers
        assert "a <b> note" in checker.text
        assert "x|y" in checker.text
