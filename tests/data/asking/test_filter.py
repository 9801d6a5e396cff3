"""Which replies are kept: every reason of refusal with a reply that has it, and ROUGE-L against its definition."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.asking.client import Reply
from data.asking.filter import Lexicon, Refused, Seen, check_row, check_text, judge, names_of, split
from data.asking.prompts import FORM, SYSTEM, Request
from tests.data.rows import BURN, FLU, ROWS, STROKE
from tests.data.stub_endpoint import write_dialogue

LEXICON = Lexicon(ROWS)
QUESTION = "Doctor, I have the flu. What can I do about it?"


def reply(text: str, finish_reason: str = "stop") -> Reply:
    return Reply(text, finish_reason, None)


@pytest.mark.parametrize(
    "text",
    [
        "Patient: Hello there.\nDoctor: Good day to you.",
        "Sure, here it is:\n\nPatient: Hello there.\n\nDoctor: Good day\nto you.\n",
        "**Patient:** Hello there.\n**Doctor:** Good day to you.",
        "**Patient**: Hello there.\r\n**Doctor**: Good day to you.",
        "<think>\nPatient: what?\n</think>\n\nPATIENT:Hello there.\ndoctor:   Good day to you.",
        "### Patient:\nHello there.\n\n### Doctor:\nGood day to you.",
        "```\nPatient: Hello there.\nDoctor: Good day to you.\n```",
    ],
)
def test_forms_that_models_write(text: str) -> None:
    assert split(reply(text)) == ("Hello there.", "Good day to you.")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("<think>only thoughts</think>", "empty"),
        ("Hello. Good day.", "not a dialogue"),
        ("Doctor: Good day.\nPatient: Hello.", "not a dialogue"),
        ("Patient: Hello.", "not a dialogue"),
        ("I'm sorry, but I cannot do that.", "refusal"),
        ("Patient: Hello.\nDoctor: Good day.\nPatient: Thanks.", "role leak"),
    ],
)
def test_replies_of_another_form(text: str, reason: str) -> None:
    with pytest.raises(Refused, match=f"^{reason}$"):
        split(reply(text))


def test_a_reply_that_was_cut_off() -> None:
    with pytest.raises(Refused, match="truncated"):
        split(reply("Patient: Hello.\nDoctor: Good day.", "length"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Rest.", "empty"),
        ("Rest a lot, drink enough and", "truncated"),
        ("Rest and drink enough. Patient: Okay, doctor.", "role leak"),
        ("Rest and drink enough. ### Instruction", "role leak"),
        ("Rest and drink enough.<|im_end|>", "role leak"),
        ("As an AI language model, I would rest and drink.", "speaks as a language model"),
        ("I'm a virtual assistant, but rest and drink.", "speaks as a language model"),
        ("I cannot provide medical advice, see a doctor.", "refusal"),
        ("Rest and drink enough, says ['Fever', 'Cough'].", "prompt leak"),
        ("Rest and drink enough, [Name].", "prompt leak"),
        ("According to the facts given, rest and drink enough.", "prompt leak"),
        ("Disease: influenza. Rest and drink enough.", "prompt leak"),
        (SYSTEM, "prompt leak"),
        (FORM.split("\n")[0].rstrip(":") + ".", "prompt leak"),
        ("Rest and drink enough \ud800.", "not valid Unicode"),
        ("Rest and drink enough\0 again.", "not valid Unicode"),
    ],
)
def test_what_no_dialogue_may_hold(answer: str, reason: str) -> None:
    with pytest.raises(Refused, match=f"^{reason}$"):
        check_text(QUESTION, answer)


@pytest.mark.parametrize(
    "answer",
    [
        'Your immune system: it fights. "Rest," as they say, and drink enough.',
        "As a doctor, I would rest. I am an old friend of fluids!",
        "Rest (and drink) enough…",
        "Is it worse at night?",
        "Two medications: oseltamivir and acetaminophen. Tests: none.",
    ],
)
def test_ordinary_answers_pass(answer: str) -> None:
    check_text(QUESTION, answer)


OTHERS = "names a test or medication of other rows: "


def check(about: str, row: object, question: str, answer: str, symptoms: tuple[str, ...] = ("Fever", "Cough")) -> str:
    try:
        check_row(Request(about, row, symptoms, ""), question, answer, LEXICON)  # type: ignore[arg-type]
    except Refused as e:
        return str(e)
    return ""


@pytest.mark.parametrize(
    ("about", "question", "answer", "reason"),
    [
        ("tests", "I have influenza.", "You need a chest X-ray.", ""),
        ("tests", "I have the flu.", "Two rapid influenza tests, please.", ""),
        ("tests", "I am ill.", "For the flu you need an X-ray.", ""),
        ("tests", "I am ill.", "You need an X-ray.", "does not name the disease"),
        ("tests", "I have the flu.", "You need tests.", "answer names no test of the row"),
        ("tests", "I have the flu.", "An X-ray, and a CAT scan of the head.", ""),  # not the lexicon's words for it
        ("tests", "I have the flu.", "An X-ray and a CAT scan of head.", OTHERS + "cat scan of head"),
        ("medications", "I have the flu.", "Take Tamiflu or acetaminophen.", ""),
        ("medications", "I have the flu.", "Take oseltamivir.", ""),
        ("medications", "I have the flu.", "Take something.", "answer names no medication of the row"),
        ("medications", "I have the flu.", "Take Tamiflu and aspirin.", OTHERS + "aspirin"),
        ("medications", "I have the flu.", "Take Tamiflu and aloe vera.", OTHERS + "aloe vera"),
        ("medications", "I have the flu.", "Take Tamiflu, and mind your glucose.", ""),  # a word of tests as well
        ("medications", "I have the flu.", "Take 75 mg of Tamiflu.", "names a dose"),
        ("symptoms", "I cough.", "It may be influenza.", ""),
        ("symptoms", "I cough.", "It may be the flu: drink and rest.", ""),
        ("symptoms", "I cough. Is it flu?", "It may be the flu.", "question names the disease"),
        ("symptoms", "I cough.", "It may be a cold.", "answer does not name the disease"),
    ],
)  # fmt: skip
def test_answers_agree_with_the_row(about: str, question: str, answer: str, reason: str) -> None:
    assert check(about, FLU, question, answer) == reason


def test_an_emergency_is_said() -> None:
    assert check("symptoms", STROKE, "My speech is slurred.", "It may be a stroke.") == "emergency not said"
    assert check("symptoms", STROKE, "My speech is slurred.", "It may be a stroke: call an ambulance.") == ""


def test_a_disease_called_like_its_symptom_may_be_said() -> None:
    asked = "My skin hurts, it is a skin burn."
    assert check("symptoms", BURN, asked, "It may be sunburn.") == "question names the disease"
    assert check("symptoms", BURN, asked, "It may be sunburn.", ("Skin burn", "Redness")) == ""


@pytest.mark.parametrize(
    ("term", "names"),
    [
        ("Alprazolam (Xanax)", {"alprazolam", "xanax"}),
        ("Lidocaine Topical", {"lidocaine", "lidocaine topical"}),
        ("a heart attack", {"heart attack"}),
        ("Sigmoidoscopy; biopsy", {"sigmoidoscopy biopsy", "sigmoidoscopy", "biopsy"}),
        ("Plain x-rays (X ray)", {"plain x ray", "x ray"}),
        ("()", set()),
    ],
)
def test_names(term: str, names: set[str]) -> None:
    assert {" ".join(n) for n in names_of(term)} == names


# --- near duplicates ------------------------------------------------------------------------------


def rouge_l(a: str, b: str) -> float:
    """By the table of longest common subsequences, as rouge_score does."""
    x, y = (re.findall(r"[a-z0-9]+", t.lower()) for t in (a, b))
    row = [0] * (len(y) + 1)
    for word in x:
        before = row
        row = [0]
        for j, other in enumerate(y):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return 2 * row[-1] / (len(x) + len(y))


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12).map(" ".join), max_size=12))
def test_near_duplicates_are_those_of_rouge_l(texts: list[str]) -> None:
    seen = Seen(0.7)
    kept: list[str] = []
    for text in texts:
        near = [i for i, k in enumerate(kept) if rouge_l(k, text) >= 0.7 - 1e-9]
        found = seen.near_duplicate(text)
        assert (found is not None) == bool(near)
        if found is None:
            kept.append(text)
        else:
            assert found in near


def test_words_count_not_letters() -> None:
    seen = Seen()
    assert seen.near_duplicate("I have a bad cough, doctor.") is None
    assert seen.near_duplicate("I HAVE a very bad cough - doctor") == 0
    assert seen.near_duplicate("Ihaveabadcough doctor") is None


def test_more_words_than_there_are_letters_below_the_surrogates() -> None:
    seen = Seen()
    for i in range(0, 70_000, 1000):
        assert seen.near_duplicate(" ".join(f"w{n}" for n in range(i, i + 1000))) is None
    assert seen.near_duplicate(" ".join(f"w{n}" for n in range(60_000, 61_000))) == 60


def test_judge_keeps_the_first_of_near_duplicates_and_says_why_not() -> None:
    asked = [Request("symptoms", FLU, ("Fever", "Cough"), m) for m in ("a", "b", "c")]
    same = reply("Patient: I have a fever and I cough.\nDoctor: It may be influenza, so rest.")
    other = reply("Patient: My whole body is hot.\nDoctor: Perhaps it is the flu. Let us see you today.")
    judged = list(judge(zip(asked, [same, same, other], strict=True), LEXICON))
    assert [j[3] for j in judged] == ["", "near duplicate", ""]
    assert judged[0][:3] == (asked[0], "I have a fever and I cough.", "It may be influenza, so rest.")


def test_what_the_stub_writes_is_kept() -> None:
    from data.asking.prompts import requests

    asked = list(requests(ROWS, 0, 3))
    reasons = [j[3] for j in judge(((r, reply(write_dialogue(r.prompt))) for r in asked), LEXICON)]
    assert reasons.count("") > len(asked) / 2
    assert set(reasons) <= {"", "near duplicate"}
