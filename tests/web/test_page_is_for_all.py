"""The page by keyboard, for screen readers, on narrow and low windows, in both schemes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.web.page_server import BURSITIS, PageServer, Reply
from tests.web.test_page import EMERGENCY, GROUNDED, ask, stored, text

DIALOGS = ("patient", "consent", "rating", "key", "privacy", "sure")


def fill(page: Any, server: PageServer) -> None:
    """A consultation with everything in it."""
    long_word = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3
    table = f"| {'|'.join('abcdefghij')} |\n|{'---|' * 10}\n| {long_word} |"
    markdown = f"# Title\n\n{long_word}\n\n> quoted\n\n```\n{'x' * 200}\n```\n\n{table}"
    server.replies = [
        GROUNDED,
        Reply(markdown, before=[EMERGENCY], rows=[BURSITIS]),
        Reply("And", before=["Self-care (rule cold). Rest."], finish_reason="length"),
        Reply("a cut", cut="quiet"),
    ]
    page.evaluate("localStorage['chatdoctor.patient'] = JSON.stringify({age: 34, allergies: ['x'.repeat(80)]})")
    page.reload()
    for question in ("My toe hurts.", long_word, "What\nnow?", "And then?"):
        ask(page, question)
    page.evaluate("for (const card of document.querySelectorAll('details')) card.open = true")


def test_a_consultation_by_keyboard_alone(page: Any, server: PageServer) -> None:
    keys = page.keyboard
    server.replies = [GROUNDED, Reply("Stop me here, please", holds=True)]
    keys.type("My toe")
    keys.press("Shift+Enter")
    keys.type("hurts.")
    keys.press("Enter")
    page.locator(".actions button").first.wait_for()
    assert server.asked[0]["messages"][0]["content"] == "My toe\nhurts."

    def tab_to(name: str, key: str = "Shift+Tab") -> None:
        for _ in range(40):
            keys.press(key)
            focused = page.evaluate(
                "(document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent).trim()"
            )
            if focused == name:
                return
        raise AssertionError(f"{name} cannot be reached")

    tab_to("DB 712, Gout: open the entry")
    keys.press("Enter")
    page.locator("details.card[open]", has_text="Uric acid in the blood").wait_for()
    tab_to("Good answer", "Tab")
    keys.press("Enter")
    page.get_by_role("button", name="I agree").wait_for()
    keys.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Good answer"
    tab_to("Patient card")
    keys.press("Enter")
    keys.type("34")
    keys.press("Enter")
    page.get_by_text("Sent along: 34 years old").wait_for()
    page.reload()
    page.get_by_text("Sent along: 34 years old").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"
    keys.type("And now?")
    keys.press("Enter")
    text(page, "Stop me here,").wait_for()
    keys.press("Escape")
    page.get_by_text("Stopped by you.").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"


def test_a_screen_reader_hears_sentences(page: Any, server: PageServer) -> None:
    server.replies = [Reply("It is a cold. Rest well, and **drink** enough. It", holds=True)]
    assert page.locator("#said").get_attribute("aria-live") == "polite"
    ask(page, "What helps?", ended=False)
    page.locator("#said", has_text="drink enough.").wait_for(state="attached")
    heard = "".join(page.locator("#said p").all_text_contents())
    assert heard.startswith("It is a cold.")
    server.go_on.set()
    page.locator(".actions button").first.wait_for()
    assert "".join(page.locator("#said p").all_text_contents()) == "It is a cold. Rest well, and drink enough. It"
    assert page.locator(".turn [aria-live]").count() == 0


@pytest.mark.parametrize("size", [(320, 640), (320, 240), (640, 360), (1100, 800)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_nothing_is_wider_than_the_window(page: Any, server: PageServer, size: tuple[int, int]) -> None:
    fill(page, server)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate("(box => box.scrollWidth <= box.clientWidth)(document.querySelector('main'))")
    notice = page.locator("#disclaimer")
    box = notice.bounding_box()
    assert notice.is_visible()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= size[1], "the disclaimer is always in view"
    page.locator("#open-patient").click()
    assert page.evaluate("(box => box.scrollWidth <= box.clientWidth)(document.querySelector('#patient'))")


def test_the_list_on_a_phone(page: Any, server: PageServer) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    ask(page, "My nose runs.")
    new = page.get_by_role("button", name="New consultation")
    new.wait_for(state="hidden")
    page.get_by_role("button", name="Consultations", exact=True).click()
    assert new.is_visible()
    assert page.evaluate("document.activeElement.id") == "new"
    assert page.locator("#page").get_attribute("inert") is not None
    page.keyboard.press("Escape")
    new.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "open-sidebar"
    page.get_by_role("button", name="Consultations", exact=True).click()
    new.click()
    page.get_by_role("heading", name="What brings you here?").wait_for()
    new.wait_for(state="hidden")


def test_the_theme_follows_the_system_until_it_is_chosen(page: Any) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert dark != light
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(paper) == light
    page.reload()
    assert page.evaluate(paper) == light
    assert page.get_by_role("button", name="Dark theme").get_attribute("aria-pressed") == "false"
    assert "chatdoctor.theme" in stored(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1100])
def test_axe_finds_nothing(page: Any, server: PageServer, axe: str, scheme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")

    def check(what: str, part: str = "html") -> None:
        page.evaluate(axe)
        result = page.evaluate("part => axe.run(part, {resultTypes: ['violations']})", part)
        found = [(v["id"], v["nodes"][0]["html"], v["nodes"][0]["failureSummary"]) for v in result["violations"]]
        assert found == [], what

    check("the empty page")
    fill(page, server)
    check("a consultation")
    page.locator("main").evaluate("box => { box.scrollTop = 0 }")
    check("its beginning")
    page.get_by_role("button", name="Edit question").first.click()
    check("a question being edited")
    for name in DIALOGS:
        page.evaluate("name => document.getElementById(name).showModal()", name)
        check(f"the dialog {name}")
        page.evaluate("name => document.getElementById(name).close()", name)
    if width == 320:
        page.get_by_role("button", name="Consultations", exact=True).click()
        check("the list, all that can be reached then", "#sidebar")
