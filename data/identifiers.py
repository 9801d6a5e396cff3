"""Rules for what points to a person and is no name: e-mails, URLs, telephone numbers, record numbers, addresses, births.

Called by clean.py before the rules for names (names.py). Each is replaced by a placeholder, so that the sentence around
it stays a sentence. Numbers that medicine is full of (doses, laboratory values, dates, ages, blood pressures) are left:
a telephone number needs its own grouping, a leading + or 0, or a word that announces it.
"""

from __future__ import annotations

import re
from typing import Any

from data.rewrite import Rule

_UP = "A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĖĘĚĞĢĪĮİĶĹĻĽŁŃŅŇŐŒŔŘŚŞŠŢŤŪŮŰŲŹŻŽ"
_NOT_IN_WORD = r"(?<![\w.,/@[-])"

# --- e-mails and URLs -----------------------------------------------------------------------------

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]+(?:@|\s?[\[(]at[\])]\s?)(?:[\w-]+(?:\.|\s?[\[(]dot[\])]\s?))+[A-Za-z]{2,}(?![\w@])", re.I
)
_TLD = "com|org|net|edu|gov|info|biz|io|co|uk|in|de|fr|es|it|nl|eu|au|ca|us|me|health|online|hospital|clinic|int"
_URL = re.compile(
    rf"(?:https?://|ftp://|www\.)[^\s<>\"'\[\]]+|(?<![\w@.-])(?:[a-z0-9-]+\.)+(?:{_TLD})(?:/[^\s<>\"'\[\]]*|(?![\w-]|\.\w))",
    re.I,
)


def _url(m: re.Match[str]) -> str | None:
    url = m[0].rstrip(".,;:!?)")
    bare = not re.match(r"(?:https?|ftp)://|www\.", url, re.I)
    # "fever.It" and "pain.In" are sentences without a space between: a bare domain is lower-case to its end.
    if bare and (
        url != url.lower()
        and "/" not in url
        or not re.search(rf"\.(?:com|org|net|edu|gov|info|biz|int|co\.\w\w)\b|/", url)
    ):
        return None
    return "[URL]" + m[0][len(url) :]


# --- telephone numbers ----------------------------------------------------------------------------

_SEP = r"[ .\-–/]?"
_PHONE_WORD = (
    r"(?:phone|telephone|tele?|mobile|mob|cell(?:phone)?|call(?:ed|ing)?|contact|fax|whats ?app|ph|hotline|helpline|text|"
    r"dial|ring|reach(?:ed)?|sms|viber|landline|pager|line)"
)
_EXTENSION = r"(?:,?\s?(?:ext|extension|x)\.?\s?\d{1,6}\b)?"
_PHONES = (
    # with a +: country code and groups; (0) may stand between
    r"\+\s?\d{1,3}[ .\-–/]?(?:\(\d{1,5}\)[ .\-–/]?)?(?:\d{1,5}[ .\-–/]?){1,6}\d",
    # American: 555-123-4567, (555) 123 4567, 1-800-555-0199, and in letters: 1-800-FLOWERS, 1-800-CDC-INFO
    r"(?:\b(?:00)?1[ .\-–]?)?(?:\([2-9]\d{2}\) ?[-.–]?|\b[2-9]\d{2}[-.–])\d{3}[ .\-–]?[\dA-Z]{4}\b",
    r"\b(?:1[ .\-–])?8(?:00|33|44|55|66|77|88)[ .\-–](?=[\dA-Z-]*[A-Z])[\dA-Z]{1,8}(?:[.\-–][\dA-Z]{2,8}){0,2}(?![\w-])",
    # with a trunk or international 0: 020 7946 0958, 07911 123456, 0044 20 7946 0958, (030) 901820
    r"(?:\(0\d{1,5}\)|\b0\d{1,4})[ .\-–/](?:\d{2,5}[ .\-–/]?){1,4}\d{2,}\b",
    r"\b00?[1-9]\d{8,12}\b",
    # five and five, as in India; ten or more digits without a gap
    r"\b[6-9]\d{4}[ \-–]\d{5}\b",
    r"\b[1-9]\d{9,12}\b",
)
_PHONE = re.compile(rf"(?<![\w.,/@\[+$£€-])(?:{'|'.join(_PHONES)}){_EXTENSION}(?![\w%]|[.,/-]\d)")
_ANNOUNCED = re.compile(
    rf"\b({_PHONE_WORD}(?:[ ]?(?:number|no|num|nr|#))?\b\.?(?:[ ](?:me|us|him|her|them|number|is|was|at|on|to|my|the|no\.?)){{0,4}}"
    rf"[ ]?[:=#-]?[ ]?)(\+?\(?\d(?:[ .\-–/()]{{0,2}}\d){{5,14}})(?![\w%]|[.,/-]\d)",
    re.I,
)
_GAP = re.compile(
    r"\d[\d ().\-–/]{4,}\d|8\d\d[ .\-–][\dA-Z]|\+\d"
)  # what any of these has: tried first, since it is cheap
_DATE = re.compile(r"(?:19|20)\d\d[-./]\d\d?[-./]\d\d?|\d\d?[-./]\d\d?[-./](?:19|20)?\d\d$")
_RANGE = re.compile(r"\d{1,4}\s?[-–/]\s?\d{1,4}$")


def _phone(m: re.Match[str]) -> str | None:
    digits = re.sub(r"\D", "", m[0])
    if _DATE.match(m[0]) or (digits == m[0] and _round(digits)):
        return None
    if m[0].startswith("+") and len(digits) < 8:
        return None
    return "[PHONE]"


def _round(digits: str) -> bool:
    """A count (3000000000 cells), not a number that somebody was given."""
    return len(digits) - len(digits.rstrip("0")) >= 5


def _announced(m: re.Match[str]) -> str | None:
    digits = re.sub(r"\D", "", m[2])
    if len(digits) < 7 or _DATE.match(m[2]) or _RANGE.match(m[2]) or _round(digits):
        return None
    return m[1] + "[PHONE]"


# --- record numbers -------------------------------------------------------------------------------

_RECORD_WORD = (
    r"(?:MRN?|UHID|CRN|SSN|NHI|NHS|IP ?no|OP ?no|(?:medical |hospital |health |clinic |patient |inpatient |outpatient )?"
    r"(?:record|chart|file|registration|reg|card|unit|folder)|(?:medical |hospital |patient |pt\.? |member |subscriber |case |"
    r"insurance |policy |account |acct\.? |claim |customer |accession |admission |encounter |visit |national |tax |health "
    r"insurance |medicare |medicaid |aadhaar |passport |social security |nhs |identity |driver'?s? licen[cs]e |health card ))"
)
_RECORD = re.compile(
    rf"\b({_RECORD_WORD}(?:[ ]?(?:card|record|numbers?|num|nos?|nr|id|#|code|identifier|identification)\b\.?){{0,3}}"
    rf"(?:[ ](?:is|was|of|are))?[ ]?[:=#(-]{{0,3}}[ ]?)((?=[A-Z0-9/ -]*\d[A-Z0-9/-]*\d[A-Z0-9/-]*\d)[A-Z0-9]+(?:[-/ ]?[A-Z0-9]*\d[A-Z0-9]*)*)(?![\w]|[.,]\d)",
    re.I,
)
_NUMBERED = re.compile(r"number|num\b|\bnos?\b|\bnr\b|#|\bid\b|:|identifi|code|^(?:mrn?|uhid|crn|ssn|nhi)\b", re.I)
_SSN = re.compile(r"(?<![\w-])(?!000|666)[0-8]\d{2}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")


def _record(m: re.Match[str]) -> str | None:
    digits = sum(c.isdigit() for c in m[2])
    announced = _NUMBERED.search(m[1])
    if digits < 3 or not announced or _DATE.match(m[2]) or (digits == 4 and m[2][:2] in ("19", "20")):
        return None
    if m[1].lower().startswith(("mr ", "mr:", "mr-")) and "#" not in m[1] and digits < 5:
        return None
    return m[1] + "[RECORD NUMBER]"


# --- dates of birth -------------------------------------------------------------------------------

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_ANY_DATE = (
    rf"(?:\d{{4}}[-./]\d{{1,2}}[-./]\d{{1,2}}|\d{{1,2}}[-./ ]\d{{1,2}}[-./ ](?:\d{{4}}|\d{{2}})|"
    rf"{_DAY}[ -](?:of )?{_MONTH}(?:,? ?-?\d{{4}}|-\d{{2}})?|{_MONTH}[ -]{_DAY}(?:,? ?-?\d{{4}})?)"
)
_BIRTH = re.compile(
    r"\b((?:d\.?o\.?b\.?|date of birth|birth ?date|birth ?day|born|birth)\b\.?(?:[ ](?:is|was|on|the|date|in|of|my|patient'?s?)){0,3}"
    rf"(?:[ ](?:sun|mon|tues|wednes|thurs|fri|satur)day,?)?[ ]?[:=(-]{{0,2}}[ ]?)({_ANY_DATE})(?!\w|[-/]\d)",
    re.I,
)

# --- postal addresses -----------------------------------------------------------------------------

_PART = rf"(?:[{_UP}][\w'’.-]*|\d{{1,3}}(?:st|nd|rd|th)|[NSEW]\.?)"
_STREET = (
    r"(?:Street|St|Avenue|Ave|Av|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Way|Terrace|Ter|Close|Crescent|"
    r"Cres|Square|Sq|Highway|Hwy|Parkway|Pkwy|Circle|Cir|Trail|Plaza|Mews|Grove|Gardens|Row|Hill|Walk|Marg|Nagar|Colony|"
    r"Cross|Main|Layout|Chowk|Salai|Path|Alley|Loop|Heights|Ridge|View|Turnpike|Pike|Quay|Rise|Broadway)"
)
_UNIT = r"(?:apartment|apt|suite|ste|unit|flat|floor|fl|room|rm|building|bldg|block|house|door|plot|shop|no|number|#)"
_CODE = (
    r"(?:[A-Z]{2} ?,? ?\d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|[A-Z]\d[A-Z] ?\d[A-Z]\d|"
    r"(?:[A-Z]{1,2}-)?\d{2,3}[ -]?\d{2,3}\b|\d{4} ?[A-Z]{2}\b)"
)
_TOWN = rf"(?:,?\s(?:{_UNIT})\.?[ ]?#?[\w-]+)?(?:(?:,[ ]?\n?|\n)(?:{_PART}(?:[ ]{_PART}){{0,3}}[ ]?-?)?(?:[ ]?,?[ ]?{_CODE}(?![\w-]))?){{0,4}}"
_NUMBER = r"\d{1,5}(?:[A-Z]|-\d{1,4}[A-Z]?|/\d{1,4}[A-Z]?|[ ]?bis)?"
_EURO = (
    rf"(?:[{_UP}][\w-]*(?:stra(?:ß|ss)e|str\.|weg|platz|allee|gasse|straat|laan|gade|vej|gatan|vägen|katu|gata)|"
    rf"(?:Rue|Via|Viale|Piazza|Corso|Calle|Avenida|Av\.|Paseo|Plaza|Carrer|Rua|Travessa|Praça|Largo|ul\.|ulica|al\.|aleja)"
    rf"(?:[ ](?:de|del|della|dei|di|da|do|dos|das|la|las|los|du|des|l'|d'|y))*(?:[ ]{_PART}){{1,3}}),?[ ]{_NUMBER}"
)
_RUE = rf"{_NUMBER},?[ ](?:rue|avenue|boulevard|place|chemin|allée|impasse|quai|cours|route)[ ](?:(?:de|du|des|la|le|les|l'|d')[ ]?)*{_PART}(?:[ -]{_PART}){{0,3}}"
_ADDRESSES = (
    rf"(?:(?i:{_UNIT})\.?[ ]?#?[\w/-]{{1,6}},?[ ])?\b{_NUMBER},?[ ](?:{_PART}[ ]){{1,4}}?{_STREET}\b\.?(?:[ ][NSEW]{{1,2}}\b\.?)?{_TOWN}",
    rf"\b(?i:flat|plot|door|house|shop|apartment|apt\.?)[ ]?(?:(?i:no)\.?)?[ ]?#?\d[\w/-]*,[ ](?:[\w'. -]{{2,40}},[ ]){{0,3}}{_PART}(?:[ ]{_PART}){{0,3}}(?:[ ,-]+\d{{5,6}}\b)",
    rf"\bP\.?[ ]?O\.?[ ]?Box[ ]#?\d+{_TOWN}",
    rf"\b{_EURO}{_TOWN}",
    rf"\b{_RUE}{_TOWN}",
)
_ADDRESS = re.compile(rf"(?<![\w.,/@\[-])(?:{'|'.join(_ADDRESSES)})(?!\w)")
_LIVE_AT = re.compile(
    rf"\b((?:my|our|his|her|home|postal|mailing|the)[ ](?:home[ ]|postal[ ]|mailing[ ])?address(?:[ ]is|:)[ ]|(?:i|we|he|she)[ ](?:live|lives|reside|resides|stay)[ ]at[ ]|\baddress:[ ])"
    rf"((?=[^.;!?\n]{{0,60}}\d)[^;!?\n]{{4,100}}?)(?=[.;!?](?:\s|$)|\n|$|[ ](?:and|but|because|since|with|for|where|which)[ ])",
    re.I,
)
_POSTCODE = re.compile(r"(?<![\w-])[A-Z]{1,2}\d[A-Z\d]? \d[ABD-HJLNP-UW-Z]{2}(?![\w-])")
_CITY_ZIP = re.compile(
    rf"(?<![\w\[])(?:{_PART}[ ]){{0,2}}{_PART},[ ](?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT|V[AT]|W[AIVY])[ ]\d{{5}}(?:-\d{{4}})?(?!\w)"
)


def _placed(placeholder: str) -> Any:
    return lambda m: placeholder


def _address(m: re.Match[str]) -> str | None:
    tail = m[0].rstrip(" ,\n-")
    return "[ADDRESS]" + m[0][len(tail) :]


_AT = ("@", "[at]", "(at)")
_DOT = ("http", "www.", ".com", ".org", ".net", ".edu", ".gov", ".info", ".co", ".biz", ".int", "ftp:")
RULES = (
    Rule("email", _EMAIL, _placed("[EMAIL]"), _AT),
    Rule("url", _URL, _url, _DOT),
    Rule("date_of_birth", _BIRTH, lambda m: m[1] + "[DATE OF BIRTH]", ("born", "birth", "dob", "d.o.b")),
    Rule(
        "record_number",
        _RECORD,
        _record,
        ("number", "no", "id", "mr", "#", "uhid", "crn", "ssn", "nhi", "code", "nr", ":"),
    ),
    Rule("record_number", _SSN, _placed("[RECORD NUMBER]"), ("-",)),
    Rule("address", _LIVE_AT, lambda m: m[1] + "[ADDRESS]", ("address", "live", "reside", "stay")),
    Rule("address", _ADDRESS, _address),
    Rule("address", _CITY_ZIP, _placed("[ADDRESS]")),
    Rule("address", _POSTCODE, _placed("[ADDRESS]")),
    Rule("phone", _ANNOUNCED, _announced),
    Rule("phone", _PHONE, _phone),
)
