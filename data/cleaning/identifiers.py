"""Rules for what points to a person and is no name: e-mails, URLs, telephone numbers, record numbers, addresses,
births.

Called by clean.py before the rules for names (names.py). Each is replaced by a placeholder, so that the sentence around
it stays a sentence. Numbers that medicine is full of (doses, laboratory values, dates, ages, blood pressures) are left:
a telephone number needs its own grouping, a leading + or 0, or a word that announces it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from data.cleaning.rewrite import Rule

_UP = "A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĖĘĚĞĢĪĮİĶĹĻĽŁŃŅŇŐŒŔŘŚŞŠŢŤŪŮŰŲŹŻŽ"

# --- e-mails and URLs -----------------------------------------------------------------------------

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]+(?:@|\s?[\[(]at[\])]\s?)(?:[\w-]+(?:\.|\s?[\[(]dot[\])]\s?))+[A-Za-z]{2,}(?![\w@])", re.I
)
_TLD = "com|org|net|edu|gov|info|biz|io|co|uk|in|de|fr|es|it|nl|eu|au|ca|us|me|health|online|hospital|clinic|int"
_URL = re.compile(
    rf"(?:https?://|ftp://|www\.)[^\s<>\"'\[\]]+|(?<![\w@.-])(?:[a-z0-9-]+\.)+(?:{_TLD})(?:/[^\s<>\"'\[\]]*|"
    rf"(?![\w-]|\.\w))",
    re.I,
)


def _url(m: re.Match[str]) -> str | None:
    url = m[0].rstrip(".,;:!?)")
    bare = not re.match(r"(?:https?|ftp)://|www\.", url, re.I)
    # "fever.It" and "pain.In" are sentences without a space between: a bare domain is lower-case to its end.
    if bare and (
        (url != url.lower() and "/" not in url)
        or not re.search(r"\.(?:com|org|net|edu|gov|info|biz|int|co\.\w\w)\b|/", url)
    ):
        return None
    return "[URL]" + m[0][len(url) :]


# --- numbers: telephone, record, birth ------------------------------------------------------------
#
# These patterns begin with the number, which is rare and quickly found, and look back for the words that announce it.

_BEFORE = 60  # characters before a number in which its announcement stands
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE_NUMBERS = r"\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ](?:\d{4}|\d{2})"
_BIRTH = re.compile(rf"(?:{_DATE_NUMBERS}|{_DAY}[ -](?:of )?{_MONTH}(?:,? ?-?\d{{4}}|-\d{{2}})?)(?!\w|[-/]\d)", re.I)
_BIRTH_IN_WORDS = re.compile(rf"\b{_MONTH}[ -]{_DAY}(?:,? ?-?\d{{4}})?(?!\w|[-/]\d)", re.I)
_BORN = re.compile(
    r"\b(?:d\.?o\.?b\b\.?|date of birth|birth ?date|birth ?day|born|birth)(?:[ ](?:is|was|on|the|date|in|of|my|"
    r"falls|patient'?s?)){0,3}"
    r"(?:[ ](?:sun|mon|tues|wednes|thurs|fri|satur)day,?)?[ ]?[:=(-]{0,2}[ ]?$",
    re.I,
)

_DIGITS = r"(?:[-/ ]?[A-Z]{0,3}\d[A-Z]?)*(?!\w|[.,]\d)"
_RECORD_NUMBER = re.compile(rf"\d(?<![\w/-]\d){_DIGITS}")
_LETTERED_NUMBER = re.compile(rf"[A-Za-z](?<![\w/-][A-Za-z])[A-Za-z]{{0,5}}[-/]?\d{_DIGITS}")
_RECORD_WORD = re.compile(
    r"\b(?:(?:MRN|UHID|CRN|SSN|NHI|MR[ ]?(?:no|number|#)|[IO]P[ ]?(?:no|number))\b|"
    r"(?:(?:record|chart|file|registration|reg|card|unit|folder|patient|pt|hospital|member|subscriber|case|"
    r"insurance|policy|account|acct|claim|"
    r"customer|accession|admission|encounter|visit|national|tax|medicare|medicaid|aadhaar|passport|"
    r"social security|security|nhs|identity|"
    r"identification|licen[cs]e|health card|medical|clinic|group|reference|ref|sample|specimen|lab|report|"
    r"invoice|order|booking|ticket)\.?'?s?[ ]?"
    r"(?:card[ ]?|record[ ]?)?(?:numbers?|num|nos?|nr|id|#|code|identifier)))\.?"
    r"(?:[ ](?:is|was|of|are|no|number|#))?[ ]?[:=#(-]{0,3}[ ]?$",
    re.I,
)
_SSN = re.compile(r"(?<![\w-])(?!000|666)[0-8]\d{2}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")

_PHONE_WORD = re.compile(
    r"\b(?:(?:tele)?phone|tele?|mobile|mob|cell(?:phone)?|call(?:ed|ing)?|phoned|contact(?:ed|able)?|fax|"
    r"whats ?app|ph|hotline|helpline|text|dial|ring|"
    r"reach(?:ed)?|sms|viber|landline|pager|line|tty|toll[ -]free|(?:my|our|his|"
    r"her)(?:[ ]\w+)?(?=[ ]number))(?:[ ]?(?:number|no|num|nr|#))?\b\.?"
    r"(?:[ ](?:me|us|him|her|them|number|is|was|at|on|to|my|the|no\.?|directly|back|or)){0,4}[ ]?[:=#(-]{0,2}[ ]?$",
    re.I,
)
_EXTENSION = r"(?:,?\s?(?:ext|extension|x)\.?\s?\d{1,6}\b)?"
_PHONES = (
    # with a +: country code and groups; (0) may stand between
    r"\+\s?\d{1,3}[ .\-–/]?(?:\(\d{1,5}\)[ .\-–/]?)?(?:\d{1,5}[ .\-–/]?){1,6}\d",
    # American: 555-123-4567, (555) 123 4567, 1-800-555-0199, and in letters: 1-800-FLOWERS
    r"(?:(?:00)?1[ .\-–]?)?(?:\([2-9]\d{2}\) ?[-.–]?|[2-9]\d{2}[-.–])\d{3}[ .\-–]?[\dA-Z]{4}",
    r"(?:1[ .\-–])?8(?:00|33|44|55|66|77|88)[ .\-–](?=[\dA-Z-]*[A-Z])[\dA-Z]{1,8}(?:[.\-–][\dA-Z]{2,8}){0,2}(?![\w-])",
    # with a trunk or international 0: 020 7946 0958, 07911 123456, 0044 20 7946 0958, (030) 901820
    r"(?:\(0\d{1,5}\)|0\d{1,4})[ .\-–/](?:\d{2,5}[ .\-–/]?){1,4}\d{2,}\b",
    r"00?[1-9]\d{8,12}\b",
    # five and five, as in India; ten or more digits without a gap
    r"[6-9]\d{4}[ \-–]\d{5}\b",
    r"[1-9]\d{9,12}\b",
)
_PHONE = re.compile(rf"(?=[+(\d])(?<![\w.,/@\[+$£€-])(?:{'|'.join(_PHONES)}){_EXTENSION}(?![\w%]|[.,/-]\d)")
_ANY_PHONE = re.compile(rf"\+?\(?\d(?:[ .\-–/()]{{0,3}}\d){{6,14}}{_EXTENSION}(?![\w%]|[.,/-]\d)")
_GAPPED = re.compile(r"\d[\d ().\-–/]{5,}\d|8\d\d[ .\-–][\dA-Z]")
_CODE = re.compile(r"\d[A-Z]? ?-?\d")
_FIGURE, _FIVE = re.compile(r"\d"), re.compile(r"\d{5}")
_THREE = re.compile(r"\d[\dA-Za-z/ -]{0,2}\d[\dA-Za-z/ -]{0,2}\d")
_DATE = re.compile(r"(?:19|20)\d\d[-./]\d\d?[-./]\d\d?|\d\d?[-./]\d\d?[-./](?:19|20)?\d\d$")
_RANGE = re.compile(r"\d{1,3}\s?[-–/]\s?\d{1,3}$|(?:19|20)\d\d\s?[-–/]\s?(?:19|20)\d\d$")


def _announced(by: re.Pattern[str], m: re.Match[str]) -> bool:
    return by.search(m.string[max(0, m.start() - _BEFORE) : m.start()]) is not None


def _round(digits: str) -> bool:
    """A count (3000000000 cells), not a number that somebody was given."""
    return len(digits) - len(digits.rstrip("0")) >= 5


def _birth(m: re.Match[str]) -> str | None:
    return "[DATE OF BIRTH]" if _announced(_BORN, m) else None


def _record(m: re.Match[str]) -> str | None:
    digits = sum(c.isdigit() for c in m[0])
    year = digits == 4 and m[0][:2] in ("19", "20")
    if digits < 3 or year or _DATE.match(m[0]) or m.string[max(0, m.start() - 1) : m.start()].strip("#:(=-. "):
        return None
    return "[RECORD NUMBER]" if _announced(_RECORD_WORD, m) else None


def _phone(m: re.Match[str]) -> str | None:
    digits = re.sub(r"\D", "", m[0])
    if _DATE.match(m[0]) or (digits == m[0] and _round(digits)) or (m[0].startswith("+") and len(digits) < 8):
        return None
    return "[PHONE]"


def _announced_phone(m: re.Match[str]) -> str | None:
    if _DATE.match(m[0]) or _RANGE.match(m[0]) or _round(re.sub(r"\D", "", m[0])):
        return None
    return "[PHONE]" if _announced(_PHONE_WORD, m) else None


# --- postal addresses -----------------------------------------------------------------------------

_PART = rf"(?:[{_UP}][\w'’.-]*|\d{{1,3}}(?:st|nd|rd|th)|[NSEW]\.?)"
# A full stop behind a town ends the sentence, but for St. and its like.
_TOWN_WORD = rf"(?:(?:Ste?|Sta|Sto|Mt|Ft|Bad)\.|[{_UP}](?:[^\W\d_]|['’-]|\.(?=\w))*)"
_STREET = (
    r"(?:Street|St|Avenue|Ave|Av|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Way|Terrace|Ter|"
    r"Close|Crescent|"
    r"Cres|Square|Sq|Highway|Hwy|Parkway|Pkwy|Circle|Cir|Trail|Plaza|Mews|Grove|Gardens|Row|Hill|Walk|Marg|"
    r"Nagar|Colony|"
    r"Cross|Main|Layout|Chowk|Salai|Path|Alley|Loop|Heights|Ridge|View|Turnpike|Pike|Quay|Rise|Broadway|Extension)"
)
_UNIT = (
    r"(?:apartment|apt|studio|suite|ste|unit|flat|floor|fl|room|rm|building|bldg|block|house|door|plot|shop|no|"
    r"number|#)"
)
_STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT|"
    r"V[AT]|W[AIVY])"
)
_POST_CODE = (
    r"(?:[A-Z]{2} ?,? ?\d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|[A-Z]\d[A-Z] ?\d[A-Z]\d|"
    r"[A-Z]\d[\dW] ?[A-Z\d]{4})"
)
_TOWN_CODE = (
    r"(?:(?:[A-Z]{1,2}-)?\d{5}(?:-\d{3})?|\d{3} \d{2}|\d{2}-\d{3}|\d{6,8}|(?!(?:19|20)\d\d\b)\d{4}(?: ?[A-Z]{2}\b)?)\b"
)
# Small words in the names of streets and towns: "Frankfurt an der Oder", "Stoke on Trent", "Calle de la Paz".
_SMALL = (
    r"(?:(?:de|del|da|do|dos|das|la|las|los|le|les|du|des|y|e|nad|pod|na|u|v|am|an|der|im|in|bei|ob|sur|sous|en|on|"
    r"upon|aan|op|van|den|ter)[ -])"
)
_NAMED = rf"(?:{_TOWN_WORD}(?:[ -]{_SMALL}{{0,2}}{_TOWN_WORD}){{0,5}})"
_TOWN = (
    rf"(?:[ ]{_POST_CODE}(?:[ ]{_TOWN_WORD}){{1,3}})?"
    rf"(?:,?\s(?i:{_UNIT})\.?[ ]?#?[\w-]+)?"
    rf"(?:(?:,[ ]?\n?|\n)(?:{_TOWN_WORD}(?:[ ]{_TOWN_WORD}){{0,3}}[ ]?-?)?(?:[ ]?,?[ ]?{_POST_CODE}(?![\w-])|"
    rf"[ ]?{_TOWN_CODE}(?:,?[ ]{_TOWN_WORD}(?:[ -]{_TOWN_WORD}){{0,2}})?)?){{0,4}}"
)
_NUMBER = r"\d{1,5}(?:[A-Z]|[a-z]\b(?:/\d{1,4})?|-\d{1,4}[A-Z]?|/\d{1,4}[A-Z]?|[ ]?bis)?"
_HOUSE = re.compile(
    rf"(?<![\w.,/@\[-]){_NUMBER},?[ ](?:(?:{_PART}[ ]){{1,4}}?{_STREET}\b\.?(?:[ ][NSEW]{{1,2}}\b\.?|[ ]Extension)?|"
    rf"(?:rue|avenue|boulevard|place|chemin|allée|impasse|quai|cours|route)[ ](?:(?:de|du|des|la|le|les|l'|d')[ ]?)*"
    rf"{_PART}(?:[ -]{_PART}){{0,3}}){_TOWN}(?!\w)"
)
_FLAT = re.compile(
    rf"\b(?i:flat|plot|door|house|shop|apartment|apt\.?)[ ]?(?:(?i:no)\.?)?[ ]?#?\d[\w/-]*,[ ]"
    rf"(?:[\w'. -]{{2,40}},[ ]){{0,3}}{_PART}(?:[ ]{_PART}){{0,3}}[ ,-]+\d{{5,6}}\b"
)
_BOX = re.compile(rf"\b(?i:P\.?[ ]?O\.?[ ]?Box)[ ]#?\d+{_TOWN}")
_FOREIGN = re.compile(
    rf"\b(?:[{_UP}][\w-]*(?:stra(?:ß|ss)e|str\.|weg|platz|allee|gasse|straat|laan|gade|vej|gatan|vägen|katu|tie|"
    rf"kuja|polku|gata|stigen|gränd|ufer|damm|graben|torget|backen|puisto|bulevardi)|"
    rf"(?:Rue|Via|Viale|Piazza|Corso|Calle|Avenida|Av\.|Paseo|Plaza|Carrer|Rua|Travessa|Praça|Largo|ul\.|ulica|"
    rf"aleja|al\.|plac|pl\.|osiedle|os\.|Fazenda|Vereda|Sítio|Ladeira|Alameda|Condomínio|Conjunto|Estrada|"
    rf"Rodovia|Quadra|Beco|Viela|Camino|Pasaje|Urbanización|Callejón|Ronda|Glorieta|Cuesta|Strada|Bulevardul|"
    rf"Aleea|Calea|"
    rf"Intrarea|Jalan|Jl\.|Gang|Gg\.|Vicolo|Contrada|Borgo|Piazzale|Stretto|Rotonda|Calzada|Andador|Privada|"
    rf"Prolongación|Diagonal|Periférico|Eje vial|Boulevard)"
    rf"(?:[ ](?:de|del|della|dei|di|da|do|dos|das|la|las|los|du|des|l'|d'|"
    rf"y))*(?:[ ]{_PART}){{1,3}}),?[ ](?:(?:No|Nr)[.:]?[ ]?)?{_NUMBER}(?:[ ][A-Z][ ]?\d{{1,3}}\b)?"
    rf"(?:,?[ ](?:Bl|Sc|Et|Ap|Int|Depto|piso|sc)\.?[ ]?\w{{1,4}}\b)*{_TOWN}(?:[ ]?\([A-Z]{{2}}\))?(?!\w)"
)
_FOREIGN_KEYS = (
    "straße", "strasse", "str.", "weg ", "platz", "allee", "gasse", "straat", "laan ", "gade ", "vej ", "gatan",
    "vägen", "katu ",
    "gata ", "Rue ", "Via ", "Viale ", "Piazza", "Corso ", "Calle ", "Avenida", "Av. ", "Paseo", "Plaza ", "Carrer",
    "Rua ",
    "Travessa", "Praça", "Largo ", "ul.", "ulica", "aleja", " al. ", "plac ", " pl. ", "osiedle", " os. ", "Fazenda",
    "Vereda", "Sítio", "Ladeira", "Alameda",
    "Condomínio", "Conjunto", "Estrada", "Rodovia", "Quadra", "Beco", "Viela", "Camino", "Pasaje", "Urbaniz", "Callej",
    "Ronda",
    "Glorieta", "Cuesta", "Strada", "Bulevardul", "Aleea", "Calea", "Intrarea", "Jalan", "Jl.", "Gang ", "Gg.",
    "Vicolo",
    "Contrada", "Borgo", "Piazzale", "Stretto", "Rotonda", "Calzada", "Andador", "Privada", "Prolonga", "Diagonal",
    "Perif", "Eje ",
    "Boulevard ", "ufer ", "damm ", "graben ", "torget", "backen", "gränd", "puisto", "bulevardi", "tie ", "kuja ",
    "polku ", "stigen", "gränd",
)  # fmt: skip
_LIVE_AT = re.compile(
    r"\b((?:my|our|his|her|home|postal|mailing|the)[ ](?:home[ ]|postal[ ]|mailing[ ])?address(?:[ ]is|:)[ ]|"
    r"(?:i|we|he|she)[ ](?:live|lives|reside|resides|stay)[ ]at[ ]|\baddress:[ ])"
    r"((?=[^;!?\n]{0,60}\d)[^;!?\n]{4,140}?)"
    r"(?=(?<!\bapt)(?<!\bste)(?<!\bno)(?<!\bst)(?<!\bave)(?<!\brd)(?<!\bul)(?<!\bal)(?<!\bos)(?<!\bpl)(?<!\bbldg)(?<!str)(?<!\bjl)"
    r"(?<!\bnr)(?<!\bbl)(?<!\bsc)(?<!\bet)(?<!\bap)(?<!\bcad)(?<!\bsok)(?<!\bsk)(?<!\bmah)(?<!\bgg)(?<!\bh)(?<!\bbd)"
    r"(?<!\bp)(?<!\bo)[.;!?](?:\s|$)|\n|$|[ ](?:and|but|because|since|with|for|where|which)[ ])",
    re.I,
)
_BRITISH_CODE = re.compile(r"(?<![\w-])[A-Z]{1,2}\d[A-Z\d]? \d[ABD-HJLNP-UW-Z]{2}(?![\w-])")
_CODE_AND_TOWN = re.compile(
    rf"(?<![\w\[])(?:{_PART}[ ]){{1,4}}{_NUMBER}(?:[ ,]+(?i:{_UNIT})\.?[ ]?[\w/-]+)?[ ]?,[ ](?:{_TOWN_WORD},?[ ]"
    rf")?{_TOWN_CODE},?[ ]"
    rf"{_TOWN_WORD}(?:[ -]{_SMALL}{{0,2}}{_TOWN_WORD}){{0,2}}|"
    rf"(?<![\w.,/@\[-]){_NUMBER}[ ](?:{_PART}[ ]?){{1,4}}(?:(?i:{_UNIT})\.?[ ]?[\w/-]+)?,[ ](?:{_TOWN_WORD}[ ]"
    rf"?){{1,3}},[ ]{_STATE}[ ]\d{{5}}"
)
# From a number to a postal code, over a few short parts: the house number, then street and town in any words.
_TO_CODE = re.compile(
    rf"(?<![\w.,/@\[-])\d{{1,5}}(?:[A-Z]|[/-]\d{{1,4}})?,?[ ](?:[\w'’.-]+[ ]){{0,4}}[\w'’.-]+[ ]?,[ ]"
    rf"(?:[\w'’.-]+(?:[ ][\w'’.-]+){{0,3}}[ ]?,[ ]){{0,3}}"
    rf"(?:{_TOWN_WORD}[ ]){{0,3}}(?:{_TOWN_WORD}-)?"
    r"(?:[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|(?:[A-Z]{2},? ?)?[A-Z]\d[A-Z] ?\d[A-Z]\d|"
    r"[A-Z]{2,3},? \d{4,5}(?:-\d{4})?|(?<=[a-z][ -])\d{6})(?![\w-])"
)
# No kind of street names these; the order does, and a code that is no round count: Spain's "street number, town, code",
# Brazil's "street, number, district, code town / state", France's "kind street, code town", Croatia's "Street small 7,
# code town", New Zealand's "number street, town code"; then lots of the Philippines, and American forces abroad.
_CODE5, _CODE4 = r"(?!\d\d000)\d{5}", r"(?!(?:19|20)\d\d|\d\d00)\d{4}"
_KIND = rf"(?:rue|avenue|boulevard|place|chemin|allée|impasse|quai|cours|route)[ ]{_SMALL}{{0,2}}"
_DISTRICT = rf"(?:{_NAMED}(?:[ ]\d{{1,3}}ª?)?(?:[ ]{_NAMED})?,[ ])"
_ORDERS = (
    rf"(?<![\w\[])(?:C\.[ ](?:de[ ])?)?{_NAMED}[ ]{_NUMBER}"
    rf"(?:[ ](?i:apt|puerta|piso|unit|dep|esc)\.?[ ]?\w{{1,4}})?[ ]?,[ ]{_NAMED},[ ]{_CODE5}(?![\w-]|[ ][{_UP}])",
    rf"(?<![\w\[]){_NAMED},[ ](?:(?:s/n|{_NUMBER}),[ ])?{_DISTRICT}{{0,2}}\d{{5}}-?\d{{3}}[ ]{_SMALL}?{_NAMED}[ ]/[ ]"
    rf"[A-Z]{{2}}\b",
    rf"(?<![\w.,/@\[-])(?:{_NUMBER},[ ])?{_KIND}{_NAMED}(?:[ ]{_NUMBER})?,[ ](?:{_CODE5}|{_CODE4})[ ]{_NAMED}",
    rf"(?<![\w\[]){_NAMED}(?:,[ ](?:S/N|{_NUMBER}))?,[ ]\d{{4}}-\d{{3}}[ ]{_NAMED}",
    rf"(?<![\w\[]){_NAMED}[ ](?:cesta|ulica|pot|trg)[ ]{_NUMBER},[ ]{_CODE4}[ ]{_NAMED}",
    rf"(?<![\w\[]){_TOWN_WORD}[ ][^\W\d_A-Z]{{3,12}}[ ]{_NUMBER},[ ]{_CODE5}[ ]{_NAMED}",
    rf"(?<![\w.,/@\[-]){_NUMBER}[ ]{_NAMED},[ ](?:RD[ ]\d{{1,2}},[ ])?{_NAMED}[ ]{_CODE4}"
    r"(?![\w%-]|[.,]\d|[ ](?:mg|mcg|ml|IU|units?)\b)",
    rf"\b(?:B\d{{1,3}}[ ]L\d{{1,3}}|Block[ ]\d{{1,3}},?[ ]Lot[ ]\d{{1,3}})"
    rf"(?:,?[ ](?:{_NAMED}|\d{{1,3}}th[ ]{_NAMED})(?:[ ]\d{{1,3}})?){{1,5}},[ ]\d{{4}}(?:[ ]{_NAMED})?",
    r"\b(?:(?:PSC|CMR|Unit)[ ]\d{3,5},?[ ]Box[ ]\d{1,5}|US[A-Z]{1,3}[ ]\w+),[ ][ADF]PO,?[ ]A[AEP][ ]\d{5}(?!\d)",
)
_BY_ORDER = re.compile("|".join(_ORDERS))
# Elsewhere: short parts between commas, a house number in the first ones, and a code at the end or before a town.
_TOKEN = rf"(?:{_TOWN_WORD}|[A-Z]\w{{0,3}}\.|N°|#|S/N|\d{{1,4}}(?:[a-zª°]|[-/]\d{{1,4}})?)"
_SHORT_PART = rf"(?:{_KIND})?{_TOKEN}(?:[ ]{_SMALL}{{0,2}}{_TOKEN}){{0,5}}"
_CHAIN = re.compile(
    rf"(?<![\w\[./,-])(?P<street>{_SHORT_PART}(?:,[ ]{_SHORT_PART}){{0,4}}),[ ](?!(?:19|20)\d\d\b|\d+00\b)\d{{4,7}}"
    rf"(?:-\d{{3}})?(?![\w-]|[.,]\d)(?:(?P<town>[ ]{_NAMED})|(?=,|[.;)\n]|$))(?:,[ ]{_SMALL}?{_NAMED}){{0,2}}"
)
_MEASURE = re.compile(
    r"\b(?:Grade|Stage|Vitamin|Type|Units?|Tablets?|Table|Fig|Figure|Chapter|Vol|Dose)\b|" + _MONTH, re.I
)
# Streets that are named before their kind: Turkish, and Hungarian after the town.
_BEFORE_KIND = re.compile(
    rf"(?<![\w\[])(?:(?:{_PART}[ ]){{1,3}}(?:Caddesi|Cad\.|Sokağı|Sokak|Sok\.|Mahallesi|Mah\.|Bulvarı|"
    rf"Blv\.)(?:,?[ ](?:No[:.]?[ ]?)?{_NUMBER})?|"
    rf"(?:\d{{4}}[ ]{_PART},?[ ])?(?:{_PART}[ ]){{1,3}}(?:utca|út|tér|köz|körút|sétány|sor|park)[ ]\d{{1,4}}\.?){_TOWN}"
)
# What stands around an address that was found: a flat before it, a town or a region after it.
_AROUND = re.compile(
    rf"(?:(?:\b(?i:{_UNIT}|level)\.?[ ]?#?(?:\d[\w/-]{{0,5}}|[A-Z]\d{{0,4}})|\b\d{{1,3}}(?:F|(?:st|nd|rd|th)[ ]Floor))"
    rf"(?:[ ]{_NAMED}(?:[ ]\d{{1,3}})?)?,?[ ])?\[ADDRESS\](?:[ ]?,?[ ]\[ADDRESS\])*"
    rf"(?:[ ]?,[ ](?!I\b|[TM]h?ank|My|Please|And|But)(?:\d{{4,6}}[ ])?(?:RD[ ]\d{{1,2}}|"
    rf"{_TOWN_WORD}(?:[ ](?:del[ ])?(?:[A-Z]\.|{_TOWN_WORD})){{0,3}}(?:[ ]\d{{1,2}}|[ ](?!(?:19|20)\d\d)\d{{4}})?)"
    rf"(?=[,;)\n]|\.(?:\s|$)|$))*"
)
_TOWN_ZIP = re.compile(rf"(?<![\w\[])(?:{_PART}[ ]){{0,2}}{_PART},[ ]{_STATE}[ ]\d{{5}}(?:-\d{{4}})?(?!\w)")


def _placed(placeholder: str) -> Callable[[re.Match[str]], str]:
    return lambda m: placeholder


def _address(m: re.Match[str]) -> str | None:
    tail = m[0].rstrip(" ,\n-")
    return "[ADDRESS]" + m[0][len(tail) :]


def _chain(m: re.Match[str]) -> str | None:
    """A chain with words enough: "Hemoglobin 12, Creatinine, 1345" has no town behind its code, and two words."""
    street = m["street"]
    named = sum(w[0].isupper() for w in re.findall(r"[^\W\d_]{4,}", street))
    enough = named > 1 and (m["town"] or named > 2 or street[0].isdigit())
    return _address(m) if enough and _FIGURE.search(street) and not _MEASURE.search(street) else None


_AT = ("@", "[at]", "(at)", "[ at ]", "( at )")
_BY_ORDER_GUARD = re.compile(r", \d{4}| / [A-Z]{2}\b|\w \d{4}\b|\bB\d+ L\d|\bLot \d|PO,? A[AEP] \d")
_CHAIN_GUARD = re.compile(r", \d{4}")
_DOT = ("http", "www.", ".com", ".org", ".net", ".edu", ".gov", ".info", ".co", ".biz", ".int", "ftp:")
_RECORD_KEYS = (
    "mrn", "uhid", "crn", "ssn", "nhi", "mr no", "mr number", "ip no", "op no", " number", " num", " no ", " no.",
    " no:", " nos",
    "#", " id ", " id:", "id is", " code", " nr", "identifier",
)  # fmt: skip
_BIRTH_KEYS = ("born", "birth", "dob", "d.o.b")
RULES = (
    Rule("email", _EMAIL, _placed("[EMAIL]"), _AT),
    Rule("url", _URL, _url, _DOT),
    Rule("date_of_birth", _BIRTH, _birth, _BIRTH_KEYS),
    Rule("date_of_birth", _BIRTH_IN_WORDS, _birth, _BIRTH_KEYS),
    Rule("record_number", _RECORD_NUMBER, _record, _RECORD_KEYS, guard=_THREE),
    Rule("record_number", _LETTERED_NUMBER, _record, _RECORD_KEYS, guard=_THREE),
    Rule("record_number", _SSN, _placed("[RECORD NUMBER]"), guard=_GAPPED),
    Rule("address", _LIVE_AT, lambda m: m[1] + "[ADDRESS]", ("address", "live at", "lives at", "reside", "stay at")),
    Rule("address", _BY_ORDER, _address, guard=_BY_ORDER_GUARD),
    Rule("address", _CHAIN, _chain, guard=_CHAIN_GUARD),
    Rule("address", _HOUSE, _address, guard=re.compile(r"\d[\w/-]{0,15},? [A-Zracbpiq]")),
    Rule("address", _BOX, _address, ("box",)),
    Rule("address", _FOREIGN, _address, _FOREIGN_KEYS, guard=_FIGURE, cased=True),
    Rule("address", _CODE_AND_TOWN, _address, guard=_CODE),
    Rule("address", _TO_CODE, _address, guard=_CODE),
    Rule("address", _FLAT, _address, ("flat", "plot", "door", "house", "shop", "apart", "apt"), guard=_FIVE),
    Rule(
        "address",
        _BEFORE_KIND,
        _address,
        ("caddesi", "cad.", "soka", "sok.", "mahallesi", "mah.", "bulvar", "utca ", "út ", "tér ", "köz "),
    ),
    Rule("address", _TOWN_ZIP, _placed("[ADDRESS]"), guard=re.compile(r", [A-Z]{2} \d{5}")),
    Rule("address", _BRITISH_CODE, _placed("[ADDRESS]"), guard=re.compile(r"\d[A-Z\d]? \d[A-Z]{2}")),
    Rule("address", _AROUND, _placed("[ADDRESS]"), ("[address]",), drops=True),
    Rule("phone", _ANY_PHONE, _announced_phone, guard=_GAPPED),
    Rule("phone", _PHONE, _phone, guard=_GAPPED),
)
