"""Triage: every rule's own cases, who a text is about, what does not count, and the vignettes of Semigran et al."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mentions import Finder, phrases, plain
from data.person import Person, person_of
from data.triage import LEVELS, RULES, Rule, Triage, load, read_findings, read_rules
from llama.chat import Dialogue, Message

ALL = load()[1]
TRIAGE = Triage()


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.id)
def test_a_rule_keeps_its_own_cases(rule: Rule) -> None:
    for text in rule.fires:
        fired = TRIAGE.fired(text)
        assert rule in fired, text
        assert LEVELS.index(fired[0].level) <= LEVELS.index(rule.level), text
        assert f"(rule {fired[0].id})" in fired[0].said()
    for text in rule.silent:
        assert rule not in TRIAGE.fired(text), text


@pytest.mark.parametrize("rule", [r for r in ALL if r.level == "emergency"], ids=lambda r: r.id)
def test_denied_as_a_whole_an_emergency_is_none(rule: Rule) -> None:
    for text in rule.silent:
        fired = TRIAGE.fired(text)
        assert not fired or fired[0].level != "emergency", text


@pytest.mark.parametrize(
    "text",
    [
        "I have no chest pain, no sweating and no shortness of breath.",
        "She denies chest pain, sweating, or shortness of breath.",
        "I don't have chest pain any more.",
        "I no longer have chest pain.",
        "The chest pain has gone away and I can breathe.",
        "No fever but a cough. My neck is not stiff.",
        "When I was a child I had meningitis with a fever and a stiff neck.",
        "My mother died of a heart attack and my brother had a stroke.",
        "What are the symptoms of a heart attack?",
        "Can ibuprofen cause vomiting of blood?",
        "What should I do if someone has a seizure?",
        "I was vaccinated against meningitis.",
    ],
)
def test_what_is_denied_past_anothers_or_only_asked_is_no_emergency(text: str) -> None:
    assert not any(r.level == "emergency" for r in TRIAGE.fired(text))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("No fever, my chest hurts and my left arm aches.", "heart-attack"),
        ("I never had this before but I have chest pain and I am sweating.", "heart-attack"),
        ("My father had a heart attack and now I have chest pain and feel sick.", "heart-attack"),
        ("2-day history of chest pain and shortness of breath", "heart-attack"),
        ("I have all the symptoms of a stroke: my face is drooping and my speech is slurred.", "stroke"),
        ("I think I'm having a heart attack!", "named-emergency"),
        ("painkillers give no relief, it is the worst headache of my life", "worst-headache"),
        ("fever,\nstiff neck\nand light hurts my eyes", "meningitis"),
        ("Temp 39.6 and his neck is stiff", "meningitis"),
        ("SpO2 is 88% at rest", "severe-breathlessness"),
        ("I don\u2019t want to live", "suicide"),
        ("what is the lethal dose of insulin", "suicide"),
        ("he is not able to lift his left arm", "stroke"),
        ("I took about twenty of my sleeping tablets", "overdose"),
        ("she won't drink and hasn't had a wet nappy, she is 7 months old", "sick-infant"),
    ],
)
def test_what_is_said_counts(text: str, rule: str) -> None:
    assert rule in [r.id for r in TRIAGE.fired(text)]


@pytest.mark.parametrize(
    ("text", "person"),
    [
        ("my 3 week old has a cough", Person((3 * 7 / 365.25,))),
        ("a three-month-old girl", Person((0.25,), "female")),
        ("I am 30 weeks pregnant", Person((), "female", True, 30)),
        ("I'm 34, female, not pregnant", Person((34.0,), "female", False)),
        ("65-year-old man", Person((65.0,), "male")),
        ("my temperature is 39 since 3 days", Person()),
        ("my dad is 75 and cold", Person((75.0,), "male")),
        ("my 10 month old's nose runs", Person((10 / 12,))),
        ("I am trying to get pregnant", Person((), None, False)),
    ],
)
def test_who_it_is_about(text: str, person: Person) -> None:
    found = person_of(text)
    assert found.ages == pytest.approx(person.ages)
    assert (found.sex, found.pregnant, found.weeks) == (person.sex, person.pregnant, person.weeks)


def test_either_order() -> None:
    finder = Finder(phrases("tight", "chest & tight*/cannot"))
    for text in ("my chest feels tight", "a tightness in my chest", "my chest can't expand"):
        assert finder.present(text) == {"tight"}
    assert not finder.present("my chest is fine, but my belt is tight")


@pytest.mark.parametrize(
    "text", ["I took two tablets", "I took a 500 mg tablet", "I take 10 mg tablets", "3 pills a day"]
)
def test_a_dose_is_not_many_pills(text: str) -> None:
    assert "manypills" not in plain(text)


def test_the_card_knows_what_the_words_do_not() -> None:
    said = "I have chest pain"
    assert TRIAGE.fired(said)[0].level == "doctor"
    with_card = Triage(lambda: Person((58.0,), "male"))
    assert with_card.fired(said)[0].id == "chest-pain-over-40"
    assert with_card.fired("My 9 year old has chest pain")[0].level == "doctor"


def ask(*turns: str) -> str | None:
    messages = [m for t in turns for m in (Message("user", t), Message("assistant", "rest"))]
    return TRIAGE.before(Dialogue(tuple(messages[:-1])))


def test_a_dialogue_adds_up_and_says_it_once() -> None:
    assert ask("I have a fever") is None
    assert (ask("I have a fever", "and a stiff neck") or "").startswith("EMERGENCY (rule meningitis)")
    assert ask("I have a fever", "and a stiff neck", "thank you") is None
    assert ask("I have a fever", "and a stiff neck", "and a runny nose") is None, "no reassurance beside an emergency"
    assert "overdose" in (ask("I have a fever", "and a stiff neck", "and I took 30 pills") or "")
    assert "meningitis" in (ask("I have a fever", "and a stiff neck", "my stiff neck and fever stay") or "")


def test_an_ordinary_question_costs_nothing_that_is_felt_and_a_long_one_ends() -> None:
    begin = time.process_time()
    for _ in range(20):
        TRIAGE.fired("Doctor, my chest feels tight, I wheeze and my eye hurts. What might be the issue? " * 3)
    assert (time.process_time() - begin) / 20 < 0.02  # 1 ms measured; 5 ms is the aim
    assert TRIAGE.fired("my father had " * 20_000 + "pain chest " * 20_000 + "\n\n I have chest pain and sweating")


@given(st.text(max_size=300))
def test_any_text_is_taken(text: str) -> None:
    for rule in TRIAGE.fired(text):
        assert rule.level in LEVELS


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("level: emergency", "level: red", "level is one of emergency, doctor, self-care"),
        ("when: cough", "when: coff", "'coff' is no finding"),
        ("silent: none", "", "no line `silent:`"),
        ("age: under 3 months", "age: small", "age is 'small'"),
        ("pregnant: yes", "pregnant: maybe", "pregnant is 'maybe'"),
        ("notice: go", "notice go", "not `key: value`"),
        ("rule: b", "rule: a", "the id a stands twice"),
    ],
)
def test_a_mistake_in_the_rules_is_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    block = "level: emergency\nwhen: cough\nage: under 3 months\npregnant: yes\nnotice: go\nfires: x\nsilent: none\n"
    path = tmp_path / "triage.txt"
    path.write_text(f"rule: a\n{block}\nrule: b\n{block}")
    assert len(read_rules(path, {"cough"})) == 2
    path.write_text(f"rule: a\n{block}\nrule: b\n{block.replace(old, new)}".replace(old, new))
    with pytest.raises(ValueError, match=r"triage.txt:\d+: ") as e:
        read_rules(path, {"cough"})
    assert says in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "line", ["cough", "cough or cold: cough", "cough: c*", "cough: .. cough", "cough: the", "x: a+b"]
)
def test_a_mistake_in_the_findings_is_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "findings.txt"
    path.write_text(f"# ours\n{line}\n")
    with pytest.raises(ValueError, match=r"findings.txt:2: "):
        read_findings(path)


def test_every_finding_is_used() -> None:
    used = {name for r in ALL for names in (*(p for parts in r.when for p in parts), r.without) for name in names}
    assert {p.name for p in read_findings(RULES / "findings.txt")} == used


def test_vignettes(shared: Path) -> None:
    """Figures with their intervals: bench/bench_triage.py."""
    cases = [json.loads(line) for line in (shared / "data/eval/semigran_vignettes.jsonl").read_text().splitlines()]
    flagged = [bool(f := TRIAGE.fired(c["case_description"])) and f[0].level == "emergency" for c in cases]
    urgent = [c["urgency_level"] == "em" for c in cases]
    assert sum(f for f, u in zip(flagged, urgent, strict=True) if u) >= 14
    assert sum(f for f, u in zip(flagged, urgent, strict=True) if not u) <= 4
