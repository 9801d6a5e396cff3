"""The page as the real server gives it, in a real browser: headers, routes and streams that fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.web.fake_engine import FakeEngine
from tests.web.running import Running
from web.guard import Access

Serve = Callable[..., Running]
URGENT = "My father has crushing chest pain and cannot breathe"


@pytest.fixture
def tab(browser: Any) -> Any:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    yield context.new_page()
    context.close()


def test_a_consultation(serve: Serve, tab: Any) -> None:
    complaints: list[str] = []
    tab.on("console", lambda line: line.type == "error" and complaints.append(line.text))
    tab.goto(serve(FakeEngine(("Call ", "now. "), pace=0.02)).url)
    tab.get_by_label("Your question", exact=True).fill(URGENT)
    tab.keyboard.press("Enter")
    tab.locator(".turn").get_by_text("Emergency").first.wait_for()
    tab.locator(".turn").get_by_text("Call now. Call now.").first.wait_for()
    assert complaints == []


def test_stop_frees_the_row(serve: Serve, tab: Any) -> None:
    engine = FakeEngine(("Rest. ",), pace=0.2)
    tab.goto(serve(engine).url)
    tab.get_by_label("Your question", exact=True).fill("I cough")
    tab.keyboard.press("Enter")
    tab.get_by_text("Rest.").first.wait_for()
    tab.get_by_role("button", name="Stop the answer").click()
    assert engine.tickets[0].cancelled.wait(3)


def test_with_a_key_the_page_asks_for_it(serve: Serve, tab: Any) -> None:
    tab.goto(serve(access=Access(key="a key of this test")).url)
    tab.locator("input[type=password]").first.wait_for()
