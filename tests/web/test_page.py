"""The page in headless Chromium: consultations, what is kept, the patient card, ratings, and what goes wrong."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.web.page_server import BURSITIS, GOUT, PageServer, Reply

EMERGENCY = (
    "EMERGENCY (rule meningitis). Fever with a stiff neck can be meningitis; minutes count. Call your local emergency "
    "number now (112 in the European Union). Do not wait for an answer here."
)
GROUNDED = Reply(
    "This sounds like **gout** [DB 712].\n\n1. Measure *uric acid* [DB 712, 9].\n2. Colchicine or ibuprofen may help.",
    rows=[GOUT, BURSITIS],
    after=[
        "[DB 712] Gout (sample 3): symptoms Sudden pain\nUnsourced, for no cited row holds it: ibuprofen; X-ray.",
        "ALLERGY. The answer names colchicine (your card: allergy to colchicine). Do not take it.",
    ],
)


WHEN_KEPT = """new Promise(done => {
    const kept = () => localStorage["chatdoctor.patient"];
    const look = () => kept() ? done(kept()) : setTimeout(look, 10);
    look();
})"""


def ask(page: Any, question: str, ended: bool = True) -> Any:
    """Type and send; the turn that it becomes, when its answer has ended or failed, or at once."""
    turns = page.locator(".turn").count()
    page.get_by_label("Your question", exact=True).fill(question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").nth(turns)
    if ended:
        turn.locator(".actions button, .error:not([hidden])").first.wait_for()
    return turn


def text(page: Any, words: str) -> Any:
    """Where the consultation says this; a screen reader is given it elsewhere as well."""
    return page.locator("#consultation").get_by_text(words)


def answers(page: Any) -> list[str]:
    return [answer.strip() for answer in page.locator(".answer > .text").all_inner_texts()]


def stored(page: Any, prefix: str = "chatdoctor.") -> list[str]:
    return page.evaluate("prefix => Object.keys(localStorage).filter(name => name.startsWith(prefix))", prefix)


def test_a_consultation(page: Any, server: PageServer) -> None:
    assert page.get_by_role("heading", name="What brings you here?").is_visible()
    assert page.get_by_role("list", name="Example questions").get_by_role("button").count() == 3
    server.replies = [Reply("This sounds like a cold."), Reply("Two weeks at most.")]
    ask(page, "My nose runs.")
    ask(page, "How long does it last?")
    assert answers(page) == ["This sounds like a cold.", "Two weeks at most."]
    assert not page.get_by_role("heading", name="What brings you here?").is_visible()
    assert server.asked[0] == {
        "model": "stub",
        "stream": True,
        "messages": [{"role": "user", "content": "My nose runs."}],
    }
    assert server.asked[1]["messages"] == [
        {"role": "user", "content": "My nose runs."},
        {"role": "assistant", "content": "This sounds like a cold."},
        {"role": "user", "content": "How long does it last?"},
    ]
    assert page.title() == "My nose runs. · ChatDoctor"
    assert page.locator("#disclaimer").inner_text() == "Not medical advice, and not a doctor."


def test_the_disclaimer_needs_no_server(page: Any, server: PageServer) -> None:
    page.route("**/api/about", lambda route: route.abort())
    page.reload()
    page.get_by_text("The server cannot be reached.").first.wait_for()
    assert page.get_by_text("A research model, not a doctor").is_visible()


def test_a_server_without_ratings(page: Any, server: PageServer) -> None:
    server.about["feedback"] = False
    page.reload()
    turn = ask(page, "My nose runs.")
    assert turn.get_by_role("button", name="Copy answer").is_visible()
    assert turn.get_by_role("button", name="Good answer").count() == 0


def test_an_example_is_a_question(page: Any, server: PageServer) -> None:
    page.get_by_role("button", name="stiff neck").click()
    page.locator(".actions button").first.wait_for()
    assert server.asked[0]["messages"][0]["content"] == "I have a fever, a stiff neck and light hurts my eyes."


def test_an_emergency_is_seen_before_a_word_of_the_answer(page: Any, server: PageServer) -> None:
    server.replies = [Reply("Meningitis.", before=[EMERGENCY], holds=True)]
    ask(page, "fever, stiff neck", ended=False)
    notice = page.get_by_role("alert").filter(has_text="Emergency")
    notice.wait_for()
    assert answers(page) == [""]
    assert "rule meningitis" in notice.inner_text()
    assert notice.get_by_role("link", name="112").get_attribute("href") == "tel:112"
    server.go_on.set()
    page.locator(".actions button").first.wait_for()
    assert answers(page) == ["Meningitis."]
    page.reload()
    page.locator(".emergency").wait_for()
    assert page.locator(".turn [role=alert]").count() == 0, "what was said before is not said again"


@pytest.mark.parametrize("height", [568, 800])
def test_an_emergency_stays_in_view_above_a_long_answer(page: Any, server: PageServer, height: int) -> None:
    page.set_viewport_size({"width": 320, "height": height})
    server.replies = [Reply("Go now.\n\n" * 60, before=[EMERGENCY])]
    ask(page, "fever, stiff neck")
    top = page.locator(".emergency .headline").bounding_box()["y"]
    assert page.locator("main").bounding_box()["y"] <= top < height / 2


def test_cited_rows_are_cards(page: Any, server: PageServer) -> None:
    server.replies = [GROUNDED]
    turn = ask(page, "My toe hurts.")
    assert turn.locator(".text strong").inner_text() == "gout"
    assert turn.locator("ol li").count() == 2
    assert turn.locator(".missing").all_inner_texts() == ["[DB 9: not given]"]
    card = turn.locator("details.card", has_text="Gout")
    assert not card.locator("dl").is_visible()
    turn.get_by_role("button", name="DB 712, Gout: open the entry").first.click()
    assert card.locator("dl").is_visible()
    assert "Uric acid in the blood" in card.inner_text()
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    ask(page, "Thank you.")
    assert card.locator("dl").is_visible(), "what is open stays open"
    link = card.get_by_role("link")
    assert (link.inner_text(), link.get_attribute("href")) == (GOUT["url"], GOUT["url"])
    assert "noopener" in link.get_attribute("rel")
    turn.get_by_text("Looked up, not cited: 1").click()
    turn.locator("summary", has_text="Bursitis").click()
    assert turn.get_by_text("javascript:alert(1)").is_visible()
    assert turn.locator("a").count() == 1, "only addresses of the web can be followed"
    assert turn.locator("mark").all_text_contents() == ["ibuprofen (unsourced)"]
    heads = turn.locator(".answer .headline").all_inner_texts()
    assert heads == ["Unsourced, for no cited row holds it", "Allergy"], "a row that is a card is not said again"


def test_stop_in_mid_stream(page: Any, server: PageServer) -> None:
    server.replies = [Reply("Drink enough and never come to the end.", holds=True)]
    ask(page, "What helps?", ended=False)
    text(page, "Drink enough and never").wait_for()
    page.get_by_role("button", name="Stop the answer").click()
    page.get_by_text("Stopped by you.").wait_for()
    assert server.gone.wait(5), "the server is told"
    assert answers(page) == ["Drink enough and never come to the"]
    assert page.get_by_role("button", name="Send").is_visible()
    ask(page, "And then?")
    assert [m["content"] for m in server.asked[1]["messages"]][1] == "Drink enough and never come to the"


def test_reload_keeps_history_and_erasing_ends_it(page: Any, server: PageServer) -> None:
    ask(page, "My nose runs.")
    page.get_by_role("button", name="New consultation").click()
    ask(page, "My knee hurts.")
    page.reload()
    text(page, "This sounds like a cold.").wait_for()
    assert page.locator(".question .text").all_inner_texts() == ["My knee hurts."]
    page.get_by_role("button", name="My nose runs.", exact=True).click()
    assert page.locator(".question .text").all_inner_texts() == ["My nose runs."]
    page.get_by_role("button", name="Erase “My nose runs.”").click()
    page.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_role("heading", name="What brings you here?").wait_for()
    assert len(stored(page, "chatdoctor.consultation.")) == 1
    page.get_by_role("button", name="Privacy and data").click()
    page.get_by_role("button", name="Erase everything in this browser").click()
    page.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_text("Everything in this browser is erased.").wait_for()
    assert stored(page) == []
    page.reload()
    page.get_by_role("heading", name="What brings you here?").wait_for()
    assert server.asked
    assert all(path.startswith(("/page/", "/api/", "/v1/")) or path == "/" for path in server.paths)


def test_a_page_left_in_mid_stream_keeps_what_had_come(page: Any, server: PageServer) -> None:
    server.replies = [Reply("Half an answer is kept whole.", holds=True)]
    ask(page, "Well?", ended=False)
    text(page, "Half an answer is kept").wait_for()
    page.reload()
    page.locator(".error", has_text="before the answer was complete").wait_for()
    assert answers(page) == ["Half an answer is kept"]


def test_what_is_stored_may_be_anything(page: Any) -> None:
    page.evaluate("""() => {
        localStorage["chatdoctor.consultation.a"] = "{";
        localStorage["chatdoctor.consultation.b"] = '{"turns": [{"question": 3}]}';
        localStorage["chatdoctor.consultation.c"] = '{"turns": [{"question": "Q", "rows": [null, 3], "after": 1}]}';
        localStorage["chatdoctor.patient"] = "[1]";
    }""")
    page.reload()
    page.locator(".question .text", has_text="Q").wait_for()
    assert page.locator("#consultations li").count() == 1


def test_a_browser_that_keeps_nothing_says_so(page: Any, server: PageServer) -> None:
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('full') } }")
    ask(page, "My nose runs.")
    ask(page, "How long?")
    page.get_by_role("alert").filter(has_text="This browser keeps no more").wait_for()
    page.get_by_role("button", name="New consultation").click()
    page.get_by_role("button", name="My nose runs.", exact=True).click()
    assert page.locator(".question .text").all_inner_texts() == ["My nose runs.", "How long?"]


def test_edit_and_retry(page: Any, server: PageServer) -> None:
    server.replies = [Reply("First."), Reply("Second."), Reply("Third."), Reply("Fourth.")]
    ask(page, "My nose runs.")
    ask(page, "Why?")
    page.get_by_role("button", name="Answer anew").click()
    text(page, "Third.").wait_for()
    assert answers(page) == ["First.", "Third."]
    assert server.asked[2] == server.asked[1]
    page.get_by_role("button", name="Edit question").first.click()
    box = page.get_by_role("textbox", name="Edit question")
    assert page.get_by_text("Sending it removes the turn below.").is_visible()
    box.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit question"
    page.keyboard.press("Enter")
    box.fill("My nose bleeds.")
    box.press("Enter")
    text(page, "Fourth.").wait_for()
    assert answers(page) == ["Fourth."]
    assert server.asked[3]["messages"] == [{"role": "user", "content": "My nose bleeds."}]


def test_copy(page: Any, server: PageServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.replies = [Reply("**Rest**, and drink.")]
    ask(page, "What helps?").get_by_role("button", name="Copy answer").click()
    page.get_by_text("Copied").wait_for(state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == "**Rest**, and drink."


def test_the_patient_card_goes_along_and_can_be_erased(page: Any, server: PageServer) -> None:
    page.get_by_role("button", name="Patient card").click()
    page.get_by_label("Age in years").fill("340")
    page.get_by_label("Sex").select_option("Female")
    page.get_by_label("Pregnancy", exact=True).select_option("Pregnant")
    page.get_by_label("Week of pregnancy").fill("30")
    page.get_by_label("Allergies").fill("penicillin\n\n latex ")
    page.get_by_role("button", name="Save").click()
    assert page.get_by_text("A number of years, 0 to 130").is_visible()
    assert page.get_by_label("Age in years").get_attribute("aria-invalid") == "true"
    page.get_by_label("Age in years").fill("34")
    page.get_by_role("button", name="Save").click()
    card = {"age": 34, "sex": "female", "pregnancy": 30, "allergies": ["penicillin", "latex"]}
    line = page.get_by_text("Sent along: 34 years old, female, 30 weeks pregnant; allergies: penicillin, latex")
    line.wait_for()
    page.reload()
    line.wait_for()
    ask(page, "May I take amoxicillin?")
    assert server.asked[0]["patient"] == card
    line.click()
    assert page.get_by_label("Week of pregnancy").input_value() == "30"
    page.get_by_label("Sex").select_option("Male")
    assert not page.get_by_label("Pregnancy", exact=True).is_visible()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Patient card").click()
    page.get_by_role("button", name="Erase card").click()
    page.locator("#patient-line").wait_for(state="hidden")
    ask(page, "And now?")
    assert "patient" not in server.asked[1]
    assert "chatdoctor.patient" not in stored(page)


def test_the_page_and_the_server_agree_on_cards(page: Any) -> None:
    """Every kind of card that data/patient.py knows comes out of the form as it went in."""
    from data.patient import from_json

    for card in (
        {"age": 0.5},
        {"sex": "male", "conditions": ["asthma"]},
        {"sex": "female", "pregnancy": False, "medications": ["metformin", "ASS 100"]},
        {"pregnancy": True},
        {"age": 61, "pregnancy": 12, "allergies": ["NSAID"]},
    ):
        from_json(card, "card")
        page.evaluate("card => { localStorage['chatdoctor.patient'] = JSON.stringify(card); }", card)
        page.get_by_role("button", name="Patient card").click()
        page.evaluate("localStorage.clear()")
        page.get_by_role("button", name="Save").click()
        assert json.loads(page.evaluate(WHEN_KEPT)) == card


def test_ratings_need_consent(page: Any, server: PageServer) -> None:
    server.replies = [Reply("It is a cold."), Reply("Two weeks.")]
    ask(page, "My nose runs.")
    turn = ask(page, "How long?")
    turn.get_by_role("button", name="Good answer").click()
    page.get_by_role("button", name="No, store nothing").click()
    assert server.ratings == []
    turn.get_by_role("button", name="Good answer").click()
    page.get_by_role("button", name="I agree").click()
    turn.get_by_text("Kept as rating 1").wait_for()
    assert turn.get_by_role("button", name="Good answer").get_attribute("aria-pressed") == "true"
    assert server.ratings[0] == {
        "consent": True,
        "messages": [
            {"role": "user", "content": "My nose runs."},
            {"role": "assistant", "content": "It is a cold."},
            {"role": "user", "content": "How long?"},
        ],
        "answer": "Two weeks.",
        "rating": "good",
        "reason": "",
        "correction": "",
    }
    turn.get_by_role("button", name="Bad answer").click()
    page.get_by_label("What is wrong with the answer").fill("too short")
    page.get_by_label("What it should have been").fill("A cold lasts ten days.")
    page.get_by_role("button", name="Send rating").click()
    turn.get_by_text("Kept as rating 2").wait_for()
    turn.get_by_role("button", name="Bad answer").click()
    page.get_by_role("button", name="Send rating").click()
    turn.get_by_text("Kept as rating 3").wait_for()
    kept = server.ratings[1]
    assert (kept["rating"], kept["reason"], kept["correction"]) == ("bad", "too short", "A cold lasts ten days.")


def test_ratings_of_this_browser_are_erased_and_no_others(page: Any, server: PageServer) -> None:
    server.kept["of somebody else"] = {}
    turn = ask(page, "My nose runs.")
    turn.get_by_role("button", name="Good answer").click()
    page.get_by_role("button", name="I agree").click()
    turn.get_by_text("Kept as rating 1").wait_for()
    page.get_by_role("button", name="New consultation").click()
    turn = ask(page, "My knee hurts.")
    turn.get_by_role("button", name="Good answer").click()
    turn.get_by_text("Kept as rating 2").wait_for()
    page.get_by_role("button", name="Erase “My nose runs.”").click()
    page.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_text("Erased", exact=True).wait_for()
    page.reload()
    assert len(stored(page, "chatdoctor.receipt.")) == 2, "also of a consultation that is erased here"
    page.get_by_role("button", name="Privacy and data").click()
    page.get_by_role("button", name="Erase everything in this browser").click()
    page.get_by_text("Ratings that you sent stay on the server").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.route("**/api/feedback/receipt-2", lambda route: route.abort())
    page.get_by_role("button", name="Erase my ratings on the server").click()
    page.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_text("1 rating is erased. The server cannot be reached.").wait_for()
    assert len(stored(page, "chatdoctor.receipt.")) == 1, "what could not be erased can be erased later"
    page.unroute("**/api/feedback/receipt-2")
    page.get_by_role("button", name="Erase my ratings on the server").click()
    page.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_text("1 rating is erased.", exact=True).wait_for()
    assert list(server.kept) == ["of somebody else"]
    assert stored(page, "chatdoctor.receipt.") == []
    assert "chatdoctor.consent" not in stored(page)
    page.get_by_role("button", name="Close", exact=True).click()
    turn = page.locator(".turn")
    assert turn.get_by_role("button", name="Good answer").get_attribute("aria-pressed") == "false"
    page.reload()
    turn.get_by_role("button", name="Good answer").wait_for()
    assert turn.get_by_text("Kept as rating").count() == 0


@pytest.mark.parametrize(
    ("reply", "line", "kept"),
    [
        (Reply(status=503), "The server is not ready to answer.", ""),
        (Reply(status=400, error="n is 3;\nit must be 1"), "n is 3; it must be 1", ""),
        (Reply("Drink a lot.", cut="abrupt", holds=True), "The connection was cut", "Drink a"),
        (Reply("Drink a lot.", cut="quiet", holds=True), "The connection was cut", "Drink a"),
        (Reply("Drink a lot.", cut="error", holds=True), "The model's numbers are not finite.", "Drink a"),
    ],
    ids=["503", "400", "cut abruptly", "ended early", "error in the stream"],
)
def test_what_goes_wrong_is_one_line_with_a_retry(
    page: Any, server: PageServer, reply: Reply, line: str, kept: str
) -> None:
    server.replies = [reply, Reply("All is well.")]
    turn = ask(page, "What helps?", ended=not kept)
    if kept:  # seen before the cut, or the browser may drop it
        text(page, kept).wait_for()
        server.go_on.set()
        turn.locator(".error:not([hidden])").wait_for()
    assert line in turn.locator(".error").inner_text()
    assert answers(page) == [kept]
    turn.get_by_role("button", name="Try again").click()
    text(page, "All is well.").wait_for()
    assert server.asked[1] == server.asked[0]
    assert page.locator(".error:visible").count() == 0


def test_a_busy_server_names_the_time(page: Any, server: PageServer) -> None:
    server.replies = [Reply(status=429, retry_after="2"), Reply("All is well.")]
    turn = ask(page, "What helps?")
    again = turn.get_by_role("button", name=re.compile("Try again in [12] s"))
    assert again.is_disabled()
    turn.get_by_role("button", name="Try again", exact=True).click()
    text(page, "All is well.").wait_for()


def test_a_server_that_is_gone(page: Any, server: PageServer) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    turn = ask(page, "Anyone?")
    assert "The server cannot be reached." in turn.locator(".error").inner_text()


def test_a_long_conversation_and_a_long_answer_say_so(page: Any, server: PageServer) -> None:
    server.replies = [Reply("And so on", left_out_turns=2, finish_reason="length")]
    status = ask(page, "What helps?").locator(".status").inner_text()
    assert "The oldest 2 turns were left out" in status
    assert "cut off at its greatest length" in status


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Any, server: PageServer) -> None:
    server.key = "right"
    page.reload()
    for key, why in (("wrong", "This server asks for a key."), ("right", "The server does not accept this key.")):
        page.get_by_text(why).wait_for()
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
    page.get_by_text("0.9M parameters").wait_for()
    ask(page, "What helps?")
    assert answers(page) == ["This sounds like a cold. Rest, and drink enough."]
    assert "right" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.get_by_text("0.9M parameters").wait_for()
    assert not page.locator("#key").is_visible()


def test_two_tabs_do_not_lose_each_others_consultations(page: Any, server: PageServer) -> None:
    other = page.context.new_page()
    other.goto(server.url)
    ask(other, "My knee hurts.")
    ask(page, "My nose runs.")
    page.get_by_role("button", name="My knee hurts.", exact=True).wait_for()
    assert len(stored(page, "chatdoctor.consultation.")) == 2
