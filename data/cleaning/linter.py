"""Faults that real medical dialogue data are full of, found in a text and named. Called by clean.py; changes
nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

WHERE = 40  # characters around a fault that are shown


@dataclass(frozen=True)
class Fault:
    """What is wrong with one text, and the part that shows it."""

    name: str
    sample: str


_SITE = r"(?:Chat ?Doctor|Health ?Care ?Magic)"
_ROLES = r"(?:Patient|Doctor|ChatDoctor|Human|User|Assistant)"
# fault: (pattern, only in answers)
_FAULTS: dict[str, tuple[re.Pattern[str], bool]] = {
    "role_leak": (re.compile(rf"(?:^|[.!?\"'\n)]\s{{0,3}}|###\s*){_ROLES}\s?: "), True),
    "prompt_leak": (
        re.compile(
            r"generate (?:a |the )?(?:dialogue|conversation)s? between|following diseases? and symptoms|"
            r"### (?:Instruction|Input|Response)|Below is an instruction that describes|"
            r"If you are a doctor, please answer the medical",
            re.I,
        ),
        True,
    ),
    "language_model": (
        re.compile(r"\b(?:as|I am|I'm) (?:just )?an? (?:AI|artificial intelligence|(?:large )?language model)\b", re.I),
        True,
    ),
    "lost_quotes": (re.compile(r"(?<=[a-zA-Z])\?\?(?=[a-z ]*[a-z])|^\?\?\w|\.\?\?|\ufffd"), False),
    # "dehy ChatDoctor", "syn Chat Doctor", "anti-tubercular ChatDoctor": the site's name where a sentence goes on
    "corrupt_scrub": (
        re.compile(
            r"(?<=[a-z,] )(?<!using )(?<!visiting )(?<!choosing )(?<!contacting )(?<!to )(?<!at )(?<!from )(?<!on )"
            r"(?<!by )(?<!with )(?<!the )(?<!in )(?<!am )(?<![rR]egards )(?<![rR]egards, )(?<!a )(?<!for )(?<!and )"
            rf"{_SITE}\b"
        ),
        False,
    ),
    "generator_row": (re.compile(r"(?:^|\W)\d{1,5},\s?[A-Z][\w '-]{2,60},\s?\["), False),
}
_ENDS = re.compile(r"""[.!?…)"'\]:;>*|~`。！？।؟]\s*$|[\U0001F000-\U0001FFFF☀-➿]\s*$""")
_CUT = re.compile(r"(?:\b(?:and|or|the|a|an|of|to|in|with|for|is|are|your|by|from|that|which|but|OR)|[,(\-])\s*$")
_LIST = re.compile(r"\n[ \t]*(?:[-*•]|\d+[.)])\s[^\n]*$")
SHORT = 40  # characters of an answer that may end without a stop: "Asthma"


def faults(text: str, answer: bool) -> Iterator[Fault]:
    """The faults of a text, one of each name at most. answer: it is what a model would learn to say."""
    for name, (pattern, only_answers) in _FAULTS.items():
        if (answer or not only_answers) and (m := pattern.search(text)):
            yield Fault(name, text[max(0, m.start() - WHERE) : m.end() + WHERE])
    if answer and (_CUT.search(text) or (len(text) > SHORT and not _ENDS.search(text) and not _LIST.search(text))):
        yield Fault("truncated", text[-2 * WHERE :])
