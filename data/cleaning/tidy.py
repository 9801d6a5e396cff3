"""Rules for typography, for the phrases that question sites put around answers, and for spacing. Called by clean.py.

Letters and words stay: quotes become straight, what a wrong decoding made of a character becomes that character again,
invisible characters go. Line breaks and the indentation of lines stay, since lists and code live by them.
"""

from __future__ import annotations

import re

from data.cleaning.rewrite import WORD_LISTS, Rule
from data.reviewable import numbered_lines

# --- typography -----------------------------------------------------------------------------------

_STRAIGHT = {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "´": "'", "ʼ": "'"}
_SPACES = dict.fromkeys(
    "\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
)
_INVISIBLE = dict.fromkeys("\u200b\u2060\ufeff\xad\u200e\u200f", "")
_CHARACTERS = {**_STRAIGHT, **_SPACES, **_INVISIBLE, "\u2028": "\n", "\u2029": "\n\n"}
_CHARACTER = re.compile("[" + "".join(map(re.escape, _CHARACTERS)) + "]")
_RETURN = re.compile("\r\n?")
# Zero-width joiners belong to emoji, Persian and Indic words; between Latin letters they are litter.
_JOINER = re.compile(r"(?<=[\x00-\u024f])[\u200c\u200d]+(?=[\x00-\u024f]|$)|^[\u200c\u200d]+")

# UTF-8 read as Windows-1252: two to four characters, the first of them a lead byte's, the others continuation bytes'.
_HIGH = bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "\x81\x8d\x8f\x90\x9d"
_MOJIBAKE = re.compile(f"[ÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖ×ØÙÚÛÜÝÞß][{_HIGH}]|[à-ï][{_HIGH}]{{2}}|[ð-ô][{_HIGH}]{{3}}")
_MOJIBAKE_CUT = re.compile("â€(?=[ ,.;:!?)]|$)")  # a closing quote whose last byte was lost


def _decoded(m: re.Match[str]) -> str | None:
    try:
        data = b"".join(bytes([ord(c)]) if ord(c) < 0x100 else c.encode("cp1252") for c in m[0])
        return data.decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        return None


# --- spacing --------------------------------------------------------------------------------------

_RUN = re.compile(r"  (?<=[^\s] {2}) *(?=\S)")
_LINE_END = re.compile(r"[ \t]+\n")
_BLANK_LINES = re.compile(r"\n{4,}")
_START, _END = re.compile(r"\A\s+"), re.compile(r"\s+\Z")
_BEFORE_STOP = re.compile(r" (?<=\w )([,;.])(?=[ \n]|\Z)")
# "abdomen.The": small letters, stop, a capitalised word that goes on; no name of a file, a site or a variable.
_GLUED = re.compile(r"[.?!](?<=[a-z]{2}[.?!])(?=[A-Z][a-z]*(?:'[a-z]+)?[ ,:])")
_SMALL_WORD = re.compile(r"(?:^|[\s\"'(\-])[a-z]+$")


def _unless_code(m: re.Match[str]) -> str | None:
    return None if "```" in m.string or "\t" in m.string else " "


def _unglued(m: re.Match[str]) -> str | None:
    return m[0] + " " if _SMALL_WORD.search(m.string[max(0, m.start() - 30) : m.start()]) else None


# --- boilerplate ----------------------------------------------------------------------------------

LONGEST = 160  # characters of a sentence that is dropped unless its phrase ends with $


_LINE = re.compile(r"(\w+) \[(.+?)\]: (.+)")


def _load() -> tuple[Rule, ...]:
    rules, site = [], ""
    for number, line in numbered_lines(WORD_LISTS / "boilerplate.txt"):
        if not line.strip():
            continue
        if line.startswith("site: "):
            site = line.removeprefix("site: ")
            continue
        parts = _LINE.fullmatch(line)
        assert parts, f"data/cleaning/boilerplate.txt, line {number}: wanted name [keys]: phrase"
        rules.append(_phrase(parts[1], tuple(parts[2].split(", ")), parts[3].replace("{site}", f"(?:{site})")))
    return tuple(rules)


def _phrase(name: str, keys: tuple[str, ...], phrase: str) -> Rule:
    """A sentence that begins with a phrase: from the stop before it to its own."""
    whole = phrase.endswith("$")
    phrase = phrase.removesuffix("$").replace(" ", r"\s")
    rest = "" if whole else rf"(?:\.(?=\w)|[^.!?\n]){{0,{LONGEST}}}?"
    end = r"\s*(?:[.!?:]+|-->|(?=\n)|,?\s*\Z)(?=\s|\Z|[A-Z\"'])"
    pattern = re.compile(rf"(\A|(?<=[.!?\n>)]))(\s*)(?:{phrase})\b{rest}{end}", re.I)
    return Rule(f"boilerplate_{name}", pattern, _without, keys, drops=True)


def _without(m: re.Match[str]) -> str:
    return "\n" if "\n" in m[2] and m.start() else ""


TYPOGRAPHY = (
    Rule("mojibake", _MOJIBAKE, _decoded, beyond_ascii=True),
    Rule("mojibake", _MOJIBAKE_CUT, lambda m: '"', ("â€",)),
    Rule("characters", _CHARACTER, lambda m: _CHARACTERS[m[0]], beyond_ascii=True),
    Rule("characters", _RETURN, lambda m: "\n", ("\r",)),
    Rule("zero_width", _JOINER, lambda m: "", ("\u200c", "\u200d")),
)
SPACING = (
    Rule("spaces", _START, lambda m: ""),
    Rule("spaces", _END, lambda m: "", tail=100),
    Rule("spaces", _LINE_END, lambda m: "\n", (" \n", "\t\n")),
    Rule("spaces", _RUN, _unless_code, ("  ",)),
    Rule("spaces", _BEFORE_STOP, lambda m: m[1], (" ,", " ;", " .")),
    Rule("spaces", _BLANK_LINES, lambda m: "\n\n", ("\n\n\n\n",)),
    Rule("glued_sentences", _GLUED, _unglued),
)
BOILERPLATE = _load()
