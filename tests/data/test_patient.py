"""The patient card: read, changed, erased, shown to models that have an instruction, held against an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.patient import Card, Patient, changed, classes, flagged, from_json, load, save
from llama.chat import Dialogue, Message

FULL = Card(34, "female", 30, ("penicillin",), ("asthma",), ("salbutamol",))


def test_a_card_comes_back_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text("{}")
    path.chmod(0o644)
    save(path, FULL)
    assert load(path) == FULL
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]
    assert json.loads(path.read_text())["pregnancy"] == 30


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"age": 340}, "age is 340; it must be a number of years"),
        ({"age": "old"}, "age is 'old'"),
        ({"sex": "f"}, "sex is 'f'; it must be female or male"),
        ({"pregnancy": 60}, "pregnancy is 60"),
        ({"pregnancy": "yes"}, "pregnancy is 'yes'"),
        ({"sex": "male", "pregnancy": True}, "pregnancy with sex male"),
        ({"allergies": "nuts"}, "allergies must be a list of texts"),
        ({"allergies": ["a\nb"]}, "is not one line"),
        ({"allergies": [""]}, "is not one line"),
        ({"conditions": ["x"] * 41}, "41 entries"),
        ({"alergies": []}, "'alergies' is no part of a card; there are age, sex"),
        ([], "holds list, not an object"),
    ],
)
def test_a_mistake_is_one_line(value: object, says: str) -> None:
    with pytest.raises(ValueError, match=r"^card.json: ") as e:
        from_json(value, "card.json")
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: ") as e:
        from_json({"age": -1, "sex": "x", "foo": 1}, "x")
    assert len(str(e.value).splitlines()) == 3
    for content, says in ((b"{", "not JSON"), (b'"\xff"', "not valid UTF-8"), (b"[" * 100_000, "not JSON")):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(ValueError, match=says):
            load(tmp_path / "c")


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("age 35", Card(35, "female", 30, ("penicillin",), ("asthma",), ("salbutamol",))),
        ("age -", Card(None, "female", 30, ("penicillin",), ("asthma",), ("salbutamol",))),
        ("pregnancy no", Card(34, "female", False, ("penicillin",), ("asthma",), ("salbutamol",))),
        ("pregnancy 31 weeks", Card(34, "female", 31, ("penicillin",), ("asthma",), ("salbutamol",))),
        ("allergies + nuts", Card(34, "female", 30, ("penicillin", "nuts"), ("asthma",), ("salbutamol",))),
        ("allergies + Penicillin", Card(34, "female", 30, ("Penicillin",), ("asthma",), ("salbutamol",))),
        ("conditions - Asthma", Card(34, "female", 30, ("penicillin",), (), ("salbutamol",))),
    ],
)
def test_commands_change_one_thing(text: str, card: Card) -> None:
    assert changed(FULL, text) == card


@pytest.mark.parametrize(
    "text", ["age", "age x", "height 3", "allergies nuts", "allergies +", "allergies - nuts", "sex x"]
)
def test_a_wrong_command_changes_nothing(tmp_path: Path, text: str) -> None:
    save(tmp_path / "c", FULL)
    patient = Patient(tmp_path / "c")
    assert patient.commands["/patient"].run(text).startswith("error: ")
    assert patient.card == load(tmp_path / "c") == FULL


def test_begun_shown_and_erased(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    with pytest.raises(ValueError, match=r"card.json: cannot be read \(No such file"):
        Patient(path)
    patient = Patient(path, begin=True)
    run = patient.commands["/patient"].run
    assert "empty" in run("")
    assert not path.exists()
    assert "34 years old" in run("age 34")
    assert "allergies: penicillin" in run("allergies + penicillin")
    assert load(path) == Card(34, allergies=("penicillin",))
    assert "deleted" in run("erase")
    assert (path.exists(), patient.card) == (False, Card())
    patient.path = tmp_path / "no/where"
    assert run("age 34") == "error: No such file or directory; the card stays as it was"


def test_only_a_model_with_an_instruction_is_shown_it(tmp_path: Path) -> None:
    save(tmp_path / "c", FULL)
    patient = Patient(tmp_path / "c")
    asked = Message("user", "I cough")
    assert patient.prepare(Dialogue((asked,))) == Dialogue((asked,))
    shown = patient.prepare(Dialogue((Message("system", "Be kind."), asked)))
    assert shown.messages == (
        Message(
            "system",
            "Be kind.\nAbout the patient: 34 years old, female, 30 weeks pregnant; allergies: penicillin; "
            "conditions: asthma; medications: salbutamol.",
        ),
        asked,
    )


@pytest.mark.parametrize(
    ("answer", "drugs"),
    [
        ("Take amoxicillin for five days.", ["amoxicillin"]),
        ("Treatment: antibiotics such as Co-Amoxiclav.", ["co amoxiclav"]),
        ("What helps: penicillin V.", ["penicillin"]),
        ("Since you are allergic to penicillin, amoxicillin is a good choice.", ["amoxicillin"]),
        ("You are allergic to penicillin, so take azithromycin.", []),
        ("Avoid penicillin and amoxicillin.", []),
        ("Do not take amoxicillin.", []),
        ("Amoxicillin should be avoided.", []),
        ("Take azithromycin instead of amoxicillin.", []),
        ("Penicillamine is something else.", []),
    ],
)
def test_recommended_drugs_of_an_allergy_are_flagged(answer: str, drugs: list[str]) -> None:
    assert [drug for drug, _ in flagged(answer, ("Penicillin",))] == drugs


def test_classes_and_other_words() -> None:
    assert flagged("Try ibuprofen.", ("aspirin",)) == [("ibuprofen", "aspirin")]
    assert flagged("Try ibuprofen.", ("naproxen", "nuts")) == [("ibuprofen", "naproxen")]
    assert flagged("Eat quinoa.", ("Quinoa!",)) == [("quinoa", "Quinoa!")]
    assert flagged("Eat.", ("!?",)) == []
    names = [n for names, _ in classes() for n in names]
    assert len(names) == len(set(names))
