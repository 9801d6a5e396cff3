"""Whatever a model, a user or a database row says stays text: nothing runs, nothing is fetched, nothing leads away."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.web.page_server import GOUT, PageServer, Reply
from tests.web.test_page import EMERGENCY, ask

ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror=window.hit=1>",
    '<svg onload="window.hit=1"></svg>',
    "&lt;img src=x onerror=window.hit=1&gt;",
    "[press](javascript:window.hit=1)",
    "![seen](https://attacker.example/pixel.png)",
    "<https://attacker.example/> [shown](https://attacker.example/a_(b))",
    '[a](https://x.example/"onmouseover="window.hit=1)',
    "`</code><script>window.hit=1</script>`",
    "```\n</pre><img src=x onerror=window.hit=1>\n```",
    "[DB 712](javascript:window.hit=1) [DB <b>1</b>]",
    "\u202egnp.exe\u202c \u2067reordered\u2069 \x1b[31mred\x07",
    '<iframe srcdoc="<script>parent.hit=1</script>"></iframe><style>*{display:none}</style>',
    "| <img src=x onerror=window.hit=1> | b |\n|---|---|\n| <a href=javascript:window.hit=1>c</a> | d |",
]
# What an answer may become, and nothing else; attributes are those of buttons, tables and lists.
TAGS = {
    "p",
    "br",
    "h3",
    "hr",
    "pre",
    "code",
    "blockquote",
    "ul",
    "ol",
    "li",
    "div",
    "strong",
    "em",
    "s",
    "span",
    "mark",
}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "button"}
ATTRIBUTES = {"class", "start", "tabindex", "role", "aria-label", "type"}

PIECES = (
    *(
        "*",
        "**",
        "_",
        "`",
        "``",
        "```\n",
        "~~",
        "#",
        "# ",
        "> ",
        "- ",
        "1. ",
        "  ",
        "\n",
        "\n\n",
        "|",
        "|-|-|\n",
        "---",
    ),
    *("[", "]", "(", ")", "!", "\\", "[DB 712]", "[DB 712, 3]", "[DB", "<b>", "&amp;", "a", "gout", "é", "\u202e"),
)

LOOK = """root => [...root.querySelectorAll("*")].map(
  node => [node.tagName.toLowerCase(), ...[...node.attributes].map(a => a.name)])"""


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_attacks_stay_text(page: Any, server: PageServer, attack: str) -> None:
    foreign: list[str] = []
    page.on("request", lambda request: request.url.startswith(server.url) or foreign.append(request.url))
    row = dict.fromkeys(GOUT, attack) | {"id": 712, "symptoms": [attack], "name": f"Gout {attack}"}
    after = [f"Unsourced, for no cited row holds it: {attack}; gout.", f"ALLERGY. {attack}"]
    server.replies = [Reply(f"Gout [DB 712]. {attack}", before=[f"{EMERGENCY} {attack}"], rows=[row], after=after)]
    turn = ask(page, attack)
    turn.locator(".card summary").click()
    page.reload()
    page.locator(".card summary").click()
    assert page.evaluate("window.hit") is None
    assert foreign == []
    text = page.locator(".answer > .text")
    for tag, *attributes in text.evaluate(LOOK):
        assert tag in TAGS
        assert ATTRIBUTES.issuperset(attributes)
    assert page.locator("script, iframe, object, embed, style, form[action], img").count() == 3, "two scripts, one logo"
    links = page.locator("#consultation a").evaluate_all("links => links.map(link => link.href)")
    assert {link for link in links if not link.startswith("tel:")} <= {"https://attacker.example/"}
    shown = page.locator("#consultation").inner_text()
    assert not any(c in shown for c in "\u202e\u202c\u2067\u2069\x1b\x07")


def test_any_markdown_becomes_harmless_nodes(page: Any) -> None:
    """Random runs of marks, rendered whole and word by word: the same nodes both ways, and only known ones."""
    texts: list[str] = []

    @settings(max_examples=300, database=None, derandomize=True)
    @given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    found = page.evaluate(
        """async ([texts, names]) => {
          const { show } = await import("/page/markdown.js");
          const cite = id => id === "712" ? document.createElement("button") : null;
          const context = { cite, unsourced: ["gout", ...names], version: "" };
          return texts.map(text => {
            const [whole, parts] = [document.createElement("div"), document.createElement("div")];
            show(whole, text, context);
            for (let end = 0; end <= text.length; end += 3) show(parts, text.slice(0, end), context);
            show(parts, text, context);
            const nodes = [...whole.querySelectorAll("*")].map(
              node => [node.tagName.toLowerCase(), ...[...node.attributes].map(a => a.name)]);
            return { same: whole.isEqualNode(parts), nodes, text: whole.textContent };
          });
        }""",
        [texts, ["x-ray", *map(chr, range(33, 127))]],
    )
    for text, shown in zip(texts, found, strict=True):
        assert shown["same"], text
        assert "\u202e" not in shown["text"]
        for tag, *attributes in shown["nodes"]:
            assert tag in TAGS, text
            assert ATTRIBUTES.issuperset(attributes), text
        # No letter is lost, but for the language named behind a code block's fence.
        if "```" not in text:
            assert shown["text"].count("é") == text.count("é"), text


def test_markdown_takes_time_in_proportion(page: Any) -> None:
    """Answers of 100,000 marks, the worst of each kind, render within seconds and not minutes."""
    seconds = page.evaluate(
        """async () => {
          const { show } = await import("/page/markdown.js");
          const context = { cite: () => null, unsourced: [], version: "" };
          const worst = ["**a ", "*a ", "_a ", "`a ", "[a](", "![", "> ", "- ", "|a", "~~a", "#", "(", "[DB 1, "];
          const begin = performance.now();
          for (const mark of worst) show(document.createElement("div"), mark.repeat(100000 / mark.length), context);
          return (performance.now() - begin) / 1000;
        }"""
    )
    assert seconds < 30, seconds
