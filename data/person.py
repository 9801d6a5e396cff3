"""Who a text is about: ages, sex and pregnancy, read from its words. Called by triage.py; a patient card is one too.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from data.mentions import plain

_NUMBERS = (
    "a=1 one=1 two=2 three=3 four=4 five=5 six=6 seven=7 eight=8 nine=9 ten=10 eleven=11 twelve=12 thirteen=13 "
    "fourteen=14 fifteen=15 sixteen=16 seventeen=17 eighteen=18 nineteen=19 twenty=20 thirty=30 forty=40 fifty=50 "
    "sixty=60 seventy=70 eighty=80 ninety=90"
)
_VALUES: Mapping[str, int] = {word: int(value) for word, value in re.findall(r"(\w+)=(\d+)", _NUMBERS)}
_YEARS = {"y": 1.0, "mo": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25, "h": 1 / 8766}  # by how a unit begins
_OLD = re.compile(
    rf"\b(\d{{1,3}}|{'|'.join(_VALUES)}) ?(years?|yrs?|y|months?|mo|weeks?|wks?|days?|hours?) ?"
    r"(?:of age|o|olds?|boy|girl|man|woman|male|female)\b"
)
_OF = re.compile(
    r"\b(?:baby|boy|girl|son|daughter|child|kid) (?:of|is|aged) (\d{1,2}) ?(years?|months?|weeks?|days?)\b"
)
_AGED = re.compile(
    r"\b(?:aged?|i am|im|hes|shes|(?:he|she|mother|mum|mom|father|dad|wife|husband|gran\w*|nan) is)(?: of| is|:)? "
    r"(\d{1,3})\b"
    r"(?! ?(?:weeks?|months?|days?|hours?|minutes?|%|pounds?|kg|mg|lbs?|st\b|cm|feet|percent|of))"
)
_SHORT = re.compile(r"\b(?:(\d{1,2})(?: ?yo| ?y o)? ?[mf]\b|[mf] ?(\d{1,2})\b|(\d{1,3}) ?yo\b)")
_STAGES = (
    (re.compile(r"\b(?:newborns?|neonates?|just born)\b"), 0.02),
    (re.compile(r"\binfants?\b"), 0.5),
    (re.compile(r"\btoddlers?\b"), 2.0),
    (re.compile(r"\b(?:elderly|frail|grandmother|grandfather|nursing home)\b"), 75.0),
)
_WEEKS = re.compile(
    r"\b(\d{1,2}) ?(?:weeks?|wks?) (?:and \d days? )?"
    r"(?:pregnant|gestation|along|of pregnancy|into (?:my|her) pregnancy)\b|\b(\d) ?months? pregnant\b"
)
_PREGNANT = re.compile(
    r"\b(?:pregnant|expecting a (?:baby|child)|(?:first|second|third) trimester|my pregnancy|her pregnancy|"
    r"weeks gestation|during pregnancy)\b"
)
_NOT_PREGNANT = re.compile(
    r"\b(?:not|isnt|wasnt|never been|no longer|cant be|cannot be|get|getting|becoming|become|was) pregnant\b"
)
_FEMALE = re.compile(
    r"\b(?:woman|female|girl|lady|wife|mother|mum|mom|grandma|daughter|she|shes|vagina\w*|my period|menstrua\w*|"
    r"uterus|ovar\w+|breastfeeding)\b"
)
_MALE = re.compile(
    r"\b(?:man|male|boy|husband|father|dad|grandpa|grandad|son|he|hes|testic\w+|scrotum|penis|prostate)\b"
)


@dataclass(frozen=True)
class Person:
    """Who a text is about, or a card: ages in years that are named, sex and pregnancy where known."""

    ages: tuple[float, ...] = ()
    sex: str | None = None  # "female", "male"
    pregnant: bool | None = None
    weeks: int | None = None  # of the pregnancy

    def or_else(self, other: Person) -> Person:
        """What is unknown here, as the other has it, unless the ages show another person, such as a child."""
        if self.ages and other.ages and min(abs(a - b) for a in self.ages for b in other.ages) > 1:
            return self
        pregnant = other.pregnant if self.pregnant is None else self.pregnant
        return Person(
            self.ages or other.ages,
            self.sex or other.sex,
            pregnant if self.sex != "male" else None,
            self.weeks if self.pregnant else other.weeks,
        )


def person_of(text: str) -> Person:
    """What a text says of its patient."""
    text = plain(text)
    ages = [
        _number(m[1]) * _YEARS[m[2][:2] if m[2][0] == "m" else m[2][0]] for p in (_OLD, _OF) for m in p.finditer(text)
    ]
    ages += [float(m[1]) for m in _AGED.finditer(text) if 0 < int(m[1]) < 120]
    ages += [float(next(g for g in m.groups() if g)) for m in _SHORT.finditer(text)]
    ages = ages or [age for stage, age in _STAGES if stage.search(text)]
    weeks = None
    if m := _WEEKS.search(text):
        weeks = int(m[1]) if m[1] else round(int(m[2]) * 4.35)
    pregnant = weeks is not None or (_PREGNANT.search(_NOT_PREGNANT.sub("", text)) is not None) or None
    if pregnant is None and _NOT_PREGNANT.search(text):
        pregnant = False
    female, male = pregnant or _FEMALE.search(text) is not None, _MALE.search(text) is not None
    sex = None if female and male and not pregnant else "female" if female else "male" if male else None
    return Person(tuple(ages), sex, pregnant, weeks)


def _number(word: str) -> int:
    return _VALUES[word] if word in _VALUES else int(word)
