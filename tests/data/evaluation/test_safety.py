"""Refusals, triage and the probe for quarantined rows, with models whose conduct is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.evaluation import safety
from data.evaluation.held_out import HeldOut, Item
from data.evaluation.knowledge import Fact, Knowledge
from data.evaluation.parts import Exposure
from llama.chat import Dialogue, Message

BENIGN = HeldOut(
    "b",
    "0",
    [
        Item(Dialogue((Message("user", f"cough {i}"), Message("assistant", "Rest."))), f"cough {i}", "Rest.", "", "")
        for i in range(18)
    ],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "med_safety").mkdir()
    for c in safety.CATEGORIES:
        rows = "".join(f'{i},Forge record {c} {i}.,"I\'m sorry, no. It is unethical."\n' for i in range(2))
        (tmp_path / "med_safety" / f"gpt4_category_{c}.csv").write_text(
            ",harmful_medical_request,safe_response\n" + rows
        )
    lines = [{"urgency_level": u, "case_description": f"{u} case"} for u in ("em", "ne", "sc")]
    (tmp_path / "semigran_vignettes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def run(part: object, oracle: object) -> dict[str, object]:
    return {f.name: f for f in part.run(oracle, Exposure()).figures}  # type: ignore[attr-defined]


def test_a_model_that_tells_harm_apart(folder: Path, oracle: object) -> None:
    oracle.score = lambda prompt, ending: 0.0 if ("Forge" in prompt) == ending.startswith("I'm sorry") else -9.0  # type: ignore[attr-defined]
    oracle.answer = lambda prompt: "I'm sorry, I cannot help with that." if "Forge" in prompt else "Rest."  # type: ignore[attr-defined]
    found = run(safety.refusal_part(folder, BENIGN, None), oracle)
    for name in ("safe_reply_likelier", "refusal_likelier", "generated"):
        assert (found[f"refusal.{name}"].value, found[f"refusal.{name}"].standing) == (1, "better than floor")  # type: ignore[attr-defined]
    assert found["refusal.benign.generated"].value == found["refusal.benign.refusal_likelier"].value == 0  # type: ignore[attr-defined]
    assert len(found["refusal.generated"].groups) == 9  # type: ignore[attr-defined]


def test_a_model_that_refuses_everything_is_not_safe(folder: Path, oracle: object) -> None:
    oracle.answer = lambda prompt: "I am sorry."  # type: ignore[attr-defined]
    found = run(safety.refusal_part(folder, BENIGN, None), oracle)
    assert found["refusal.generated"].value == 1  # type: ignore[attr-defined]
    assert found["refusal.generated"].indistinguishable_from_floor  # type: ignore[attr-defined]
    assert found["refusal.benign.generated"].value == 1  # type: ignore[attr-defined]


def test_the_first_sentence() -> None:
    assert safety.first_sentence(" I'm sorry, no. It is. ") == "I'm sorry, no."
    assert safety.first_sentence("2.5 mg? No.") == "2.5 mg?"
    assert safety.first_sentence("no end") == "no end"


def test_triage_of_rules_and_model(folder: Path, oracle: object) -> None:
    oracle.answer = lambda prompt: "Go to an emergency department now."  # type: ignore[attr-defined]
    level = {"em case": "emergency", "ne case": None, "sc case": None}.get
    found = run(safety.triage_part(folder, level, "r", None), oracle)
    values = {name.removeprefix("triage."): f.value for name, f in found.items()}  # type: ignore[attr-defined]
    assert values["rules.emergency_recall"] == 1
    assert values["rules.false_alarm"] == 0
    assert values["rules.accuracy"] == pytest.approx(2 / 3)
    assert values["rules.under_triage"] == 0.5
    assert values["model.false_alarm"] == 1


@pytest.mark.parametrize(
    ("text", "urgent"),
    [
        ("Go to an emergency department in case of fever", False),
        ("Call an ambulance", True),
        ("This is an emergency: go", True),
        ("Rest at home", False),
    ],
)
def test_urgent_answers(text: str, urgent: bool) -> None:
    assert bool(safety._URGENT.search(text)) == urgent


def test_placeholders_are_what_only_quarantined_rows_share(oracle: object) -> None:
    sound = (Fact("flu", "flu", (), ("fever",), ("swab",), ("rest",)),)
    bad = tuple(Fact(f"p{i}", f"p{i}", (), ("fever",), ("transplant", "swab", f"own{i}"), ("Air",)) for i in range(4))
    assert safety.poison_part(Knowledge("k", "0", sound), None) is None
    knowledge = Knowledge("k", "0", sound, bad, {"graft": "transplant"})
    part = safety.poison_part(knowledge, None)
    for answer, share in (("A graft.", 1.0), ("A transplant", 1.0), ("A swab, own1, fresh air", 0.0)):
        oracle.answer = lambda prompt, a=answer: a  # type: ignore[attr-defined]
        assert run(part, oracle)["poison.placeholder_named"].value == share  # type: ignore[attr-defined]


def test_broken_files_are_named(folder: Path) -> None:
    file = folder / "semigran_vignettes.jsonl"
    file.write_text('{"urgency_level": "soon", "case_description": "x"}')
    with pytest.raises(ValueError, match="line 1: wanted urgency_level"):
        safety.read_vignettes(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*--eval_data"):
        safety.read_vignettes(folder)
    (folder / "med_safety" / "gpt4_category_3.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"category_3.csv row 1: wanted harmful"):
        safety.read_harmful(folder)
