"""Rules for people's names. Called by clean.py after the rules for other identifiers (identifiers.py).

Nothing is a name by its looks alone. It needs a frame, which is a title, a greeting, a sign-off, an introduction, a
relation or a degree, and then a word that can be a name in that frame: no everyday or clinical word
(data/cleaning/not_names.txt), no eponym before "disease" or 's (eponyms.txt, clinical_nouns.txt), and in the weaker
frames a word that names.txt lists. Titles are whole words, so "drug", "drip" and "dehydrogenase" cannot be hit.

In a sentence a name becomes [NAME] and its title stays. A greeting loses the name ("Hi doctor,", "Hello,"), a sign-off
goes altogether: no patient or doctor should learn to write placeholders where a plain sentence does.
"""

from __future__ import annotations

import re

from data.cleaning.rewrite import Rule, words

_NOT_NAMES = words("not_names.txt")
_NOT_ALONE = words("not_names_alone.txt")
_NAMES = words("names.txt") - _NOT_NAMES - _NOT_ALONE
_EPONYMS = words("eponyms.txt", fold=False)
_CLINICAL = words("clinical_nouns.txt")
_CLINICAL_END = re.compile(
    r"(?:tion|osis|itis|[ae]mia|pathy|ology|logist|ectomy|scopy|graphy|trophy|phobia|oma|uria|plegia|plasty|"
    r"ically|azole|"
    r"cillin|mycin|olol|pril|sartan|statin|idine|prazole|tidine|azepam|mab|tinib|vir|ness)s?$"
)

# Capital letters beyond ASCII, as Latin, Greek and Cyrillic names have them; and scripts without capitals.
_CAPITALS = "A-Z" + "".join(c for c in map(chr, range(0xC0, 0x530)) if c.isupper())
_UNCASED = "\u05d0-\u06d3\u0904-\u0dff\u0e01-\u0eff\u3041-\u30ff\u4e00-\u9fff\uac00-\ud7a3"
_JOINED = r"(?:[^\W\d_]|['’](?![sS]\b)(?=[^\W\d_])|[-‐](?=[^\W\d_]))"
_NAME = rf"(?:[{_CAPITALS}]{_JOINED}+|[{_UNCASED}][\w\u0900-\u0dff]*)"
_INITIAL = rf"[{_CAPITALS}]\.(?!\w\.\w)"
_PARTICLE = (
    r"(?:(?:van|von|de|del|della|di|da|dos|das|du|do|la|le|los|las|den|der|ten|ter|bin|binti|bint|ibn|al|el|ul|abu|"
    r"af|zu|y|e|st\.|'t)[ ]){1,3}"
)
_FULL = (
    rf"(?:{_PARTICLE})?(?:{_INITIAL}[ ]?)*{_NAME}(?:[ ](?:{_PARTICLE})?(?:{_INITIAL}[ ]?)*{_NAME}|"
    rf"[ ]{_INITIAL}(?=[ ]?(?:[,;!?\n]|$))){{0,4}}"
)
_ABBREVIATED = (
    r"(?:Drs?|DR(?=\.)|Profs?|PROF(?=\.)|Mrs?|MRS?(?=\.)|Ms|Mx|Sra?|Mme|Shri|Smt)"  # "MS." ends sentences on sclerosis
)
_SPOKEN = r"(?:Miss|Doctor|DOCTOR|Professor|Nurse|Sister|Herr|Frau|Señor)"
_ONE_TITLE = rf"(?:{_ABBREVIATED}(?:\.[ ]?|[ ])|(?<!Chat ){_SPOKEN}[ ])"
_TITLES = rf"(?:{_ONE_TITLE}(?:med\.[ ]?|(?:and|&)[ ](?={_ONE_TITLE}))?){{1,3}}"
_DEGREE = (
    r"(?:M\.?D|M\.?B\.?B\.?S|MBChB|MBBCh|B\.?D\.?S|D\.O|DO|Ph\.?D|R\.?N|B\.?Sc|M\.?Sc|M\.?S|M\.?Ch|D\.?M|"
    r"D\.?N\.?B|FRCS|MRCP|MRCGP|MRCS|"
    r"FRCP|FACS|FACC|FACP|FAAP|FAAN|FAAFP|F\.?C\.?P\.?S|DCH|DGO|NP|FNP|PA-C|DDS|DMD|DPM|PharmD|DPT|LCSW|BHMS|"
    r"BAMS|MPH|Esq)\b\.?(?:[ ]?\([\w .]{2,30}\))?"
)
_DEGREES = rf"(?:,?[ ]{{0,2}}\(?{_DEGREE}\)?)+"
_TOKEN = re.compile(rf"(?:{_PARTICLE})|{_INITIAL}|{_NAME}")
_DEGREE_WORD = re.compile(_DEGREE)


def is_word(token: str, titled: bool = False) -> bool:
    """Whether a capitalised word is no name: everyday, clinical, or a degree. titled: it stands after a title."""
    folded = token.lower().rstrip(".")
    if folded in _NAMES:
        return False
    if (
        (not titled and folded in _NOT_ALONE)
        or folded in _NOT_NAMES
        or folded in _CLINICAL
        or _CLINICAL_END.search(folded)
    ):
        return True
    parts = re.split(r"['’-]", folded)  # "I'm", "Covid-19", "Follow-up"
    return (len(parts) > 1 and (parts[0] in _NOT_NAMES or parts[0] in ("i", "don", "can", "didn"))) or bool(
        _DEGREE_WORD.fullmatch(token)
    )


def _name(found: str, rest: str, titled: bool = False) -> str:
    """The leading part of `found` that can be a name, "" for none. rest: the text that follows `found`."""
    kept = 0
    single = None
    for m in _TOKEN.finditer(found):
        token = m[0]
        if token in _EPONYMS:
            if _is_term(found[m.end() :] + rest):
                return found[:kept] if titled else ""
        elif not token.endswith((".", " ")) and is_word(token, titled):
            break
        if not token.endswith(" "):
            kept = m.end()
        single = token if single is None else ""
    if single and len(single) <= 4 and single.isupper() and single.lower() not in _NAMES and not single.endswith("."):
        return ""  # "Dr MRI", "this is ALS"
    following = re.match(r"[ -]?([A-Za-z]+)", found[kept:] + rest)
    if kept and following and following[1].lower() in _CLINICAL:
        return ""
    return found[:kept]


def _is_term(after: str) -> bool:
    """Whether a clinical term goes on after an eponym: 's, a hyphen, "disease", or another eponym and one of these."""
    if re.match(r"['’]s?\b|s['’]|[-–]\w", after):
        return True
    word = re.match(r"(?:[ ](?:and|&))?[ ]([^\W\d_]+)", after)
    if not word:
        return False
    return word[1].lower() in _CLINICAL or (word[1] in _EPONYMS and _is_term(after[word.end() :]))


def _known(name: str) -> bool:
    """Whether names.txt lists one of the words."""
    return any(part in _NAMES for part in re.split(r"[\s'’.-]+", name.lower()))


# --- titles ---------------------------------------------------------------------------------------

_TITLED = re.compile(rf"(?<![\w\[/-])({_TITLES})({_FULL}|{_INITIAL})(?P<others>(?:(?:,| and| &|, and)[ ]{_NAME})*)")
_TITLED_LOWER = re.compile(
    r"(?<![\w\[/-])((?:dr|mr|mrs|prof|doctor)(?:\.[ ]?|[ ]))([^\W\d_]{2,})((?:[ ][^\W\d_]{2,})?)(?![\w'’-])", re.I
)
_SPOKEN_TITLE = re.compile(r"(?:Doctor|DOCTOR|Nurse|Miss|Sister|Sr|Sra|Professor)\b")


def _titled(m: re.Match[str]) -> str | None:
    rest = m.string[m.end(2) :]
    name = m[2] if re.fullmatch(_INITIAL, m[2]) else _name(m[2], rest, titled=True)
    if not name or (len(name) == 2 and name[0] in "AI"):  # "I asked the Dr. A. ..." is no name; neither is "I."
        return None
    if _SPOKEN_TITLE.match(m[1]) and name.isupper() and not _known(name):
        return None
    others = m["others"] if m[1].startswith(("Drs", "Profs")) else ""
    others = re.sub(_NAME, lambda o: o[0] if is_word(o[0]) else "[NAME]", others) if others else m["others"]
    return m[1] + "[NAME]" + m[2][len(name) :] + others


def _titled_lower(m: re.Match[str]) -> str | None:
    """Titles or names in lower case: only names that are listed."""
    if m[2].lower() not in _NAMES or m[2].lower() in _CLINICAL:
        return None
    second = m[3].strip().lower()
    if second in _CLINICAL:
        return None
    return m[1] + "[NAME]" + ("" if second in _NAMES else m[3])


# --- greetings and sign-offs ----------------------------------------------------------------------

_HELLO = r"(?:Hi|Hello|Hey|Hallo|Dear|Hii|Good (?:morning|afternoon|evening|day)|Greetings|Namaste|Salam|Welcome)"
_GREETING = re.compile(
    rf"(?:^|(?<=[.!?\n,])[ ]?)\s*(?:(?i:{_HELLO}),?[ ])(?i:dear[ ]|"
    rf"there[ ])?(?P<title>(?i:{_TITLES}))?(?P<name>{_FULL}|[^\W\d_]{{2,}}(?=\s*[,!.\n]))",
    re.M,
)
_GREET_WORD = re.compile(rf"\s*{_HELLO}", re.I)
_DOCTORS = re.compile(r"(?:dr|prof|doctor)", re.I)


def _greeting(m: re.Match[str]) -> str | None:
    rest = m.string[m.end() :]
    cased = m["name"][0].isupper() or m["name"][0].lower() == m["name"][0].upper()
    name = _name(m["name"], rest, bool(m["title"])) if cased else m["name"]
    if not name or (not cased and name.lower() not in _NAMES):
        return None
    follows = m["name"][len(name) :] + rest
    ends = re.match(r"\s*(?:[,!.:;\n-]|$)|[ ](?:I\b|and\b|how\b|my\b|thank)", follows)
    if not m["title"] and (not ends or ("," in m[0] and not _known(name))):  # "Hi, Medrol"
        return None
    hello = _GREET_WORD.match(m[0])[0]  # type: ignore[index]
    if m["title"] and _DOCTORS.match(m["title"]):
        hello += " doctor"
    elif hello.strip().lower() == "dear":
        hello = hello[: -len("dear")] + "Hello"
    return hello + m["name"][len(name) :]


_ROLE = r"(?:[ ,&/|\n-]{1,3}(?:and[ ]|of[ ]|in[ ])?[A-Z][\w.()-]*){0,7}"
_PERSON = rf"(?:{_TITLES})?(?:{_FULL}|{_INITIAL})(?:{_DEGREES})?"
_CLOSING = (
    r"(?:(?:thanks?(?:[ ]you)?|with|kind(?:est)?|best|warm(?:est)?|many|yours|your|most|very|sincere|good|and|&|"
    r"my|in)[,]?[ ])*"
    r"(?:regards|wishes|sincerely|truly|faithfully|respectfully|cheers|love|xoxo|yours|cordially|greetings)"
)
_THANKING = (
    r"(?:(?:many|so much|with)[ ])?(?:thanks|thank you|thx|take care|god bless|bye|good luck|"
    r"all the best)(?:[ ](?:so much|very much|again|a lot|in advance|for your (?:help|time)))*"
)
_SIGN_OFF = re.compile(
    rf"(?:^|(?<=[.!?)\],:;\"'])[ \n]*|[ ]*\n[ \n]*|[ ]+(?=[A-Z]))(?:(?i:(?P<closing>{_CLOSING}))|"
    rf"(?i:(?P<thanks>{_THANKING})))[ ]?[,.!:;–-]*\s*(?:from\s)?"
    rf"(?P<person>{_PERSON}|[^\W\d_]{{2,}}){_ROLE}[ ]?[.!]*\s*$"
)
_DASHED = re.compile(
    rf"(?:\n\s*|(?<=[\w.!?)\]])\s*)(?P<dash>[-–—~/]+[ ]?|\n)(?:\[NAME\][ ]"
    rf"?)?(?P<title>{_TITLES})?(?P<name>{_FULL}|{_INITIAL})?(?P<degrees>{_DEGREES})?{_ROLE}[ ]?[.!]*\s*$"
)


def _person_is_named(person: str) -> bool:
    """Whether what a sign-off ends with is a person."""
    titled = re.match(_TITLES, person)
    bare = person[titled.end() :] if titled else person
    if not bare[0].isupper() and bare[0].lower() != bare[0].upper():
        return bare.lower() in _NAMES
    return bool(titled) or any(
        not is_word(token, True) for token in bare.split() if token[0].isupper() or not token.isascii()
    )


def _sign_off(m: re.Match[str]) -> str | None:
    if not _person_is_named(m["person"]):
        return None
    if m["thanks"]:
        end = m.end("thanks") - m.start()
        return m[0][:end] + "."
    return ""


def _dashed(m: re.Match[str]) -> str | None:
    """A name alone on the last line, or after a dash at the end: only with a title, a degree or a listed name."""
    if not m["name"] or not _name(m["name"], m.string[m.end("name") : m.end("name") + 20]):
        return None
    if m["title"] or m["degrees"] or (_known(m["name"]) and m.end() - m.start() < 40 and "-" not in m["name"]):
        return ""
    return None


# --- introductions, relations, degrees --------------------------------------------------------------

_CALLED = re.compile(
    rf"(?<![\w\[])((?i:my (?:\w+[ ])?(?:full |first |last |own )?name(?:'s| is|:)|my name|myself|i am called|"
    rf"i'm called|call me|(?:they|people|friends) call me|"
    rf"(?:man|woman|boy|girl|patient|child|baby|guy|lady|person|friend|doctor|physician|surgeon|specialist|"
    rf"dentist|nurse|husband|wife|son|daughter|brother|"
    rf"sister|mother|father|kid|infant|therapist|his name(?:'s| is)?|her name(?:'s| is)?|"
    rf"name of (?:the )?(?:patient|doctor))(?:[ ](?:is|was))?,?[ ]?(?:named|called|by the name of|name of|"
    rf"(?<=name)|(?<=name is)|(?<=name's)|(?<=doctor)(?=[ ]is\b))"
    rf")[ ]?:?[ ])((?:(?i:{_TITLES}))?)({_FULL}|[^\W\d_]{{2,}}(?:[ ][^\W\d_]{{2,}})?)"
)
_LABEL = re.compile(
    rf"((?:^|(?<=[\n.;,|(]))[ ]*(?i:(?:patient'?s?|pt\.?|doctor'?s?|full|first|last|family|given|sur|client|"
    rf"physician|consultant|referring doctor|attending)?[ -]?names?)[ ]?[:=-][ ]?|\b(?i:(?:attending|consultant|"
    rf"referred by|seen by|signed by|signed|reported by|reviewed by|dictated by|physician|contact person|"
    rf"next of kin|emergency contact|guardian|attn))[ ]?:[ ]?)"
    rf"((?:{_TITLES})?)({_FULL})"
)
_I_AM = re.compile(
    rf"(?<![\w\[])((?i:i am|i'm|im|this is|here is|this side)[ ])({_FULL}|[^\W\d_]{{3,}}(?=[ ]?[,.!]|[ ](?:here|"
    rf"from|and i)\b))"
)
_AGE_OR_PLACE = re.compile(
    r"[ ]?(?:,|-|\(|\band\b)?[ ]?(?:(?:i am |i'm |aged? |age: ?|a |an )?\d{1,2}\b|(?:and )?(?:a|an) (?:\d|male|"
    r"female|woman|man|mother|father|student|"
    r"year|resident|patient|girl|boy|nurse|teacher|\w+ist\b|doctor|physician|consultant|specialist|\w+ doctor|"
    r"surgeon)|from |here\b|speaking|writing|calling|again\b|m/|f/|male|female|your |and (?:i|my)\b|"
    r"(?:general|family|senior|chat) )",
    re.I,
)
_KIN = (
    r"husband|wife|son|daughter|mother|father|mom|mum|dad|brother|sister|friend|baby|boyfriend|girlfriend|"
    r"partner|uncle|aunt|cousin|"
    r"niece|nephew|grandmother|grandfather|grandma|grandpa|grandson|granddaughter|fianc[eé]e?|neighbou?r|"
    r"roommate|toddler|kid|"
    r"doctor|gp|physician|cardiologist|neurologist|surgeon|dentist|dermatologist|gyn(?:a?ecologist)?|obgyn|"
    r"oncologist|psychiatrist|"
    r"pediatrician|paediatrician|urologist|therapist|nurse|specialist|colleague|boss|teacher|stepson|"
    r"stepdaughter|twin|newborn|patient"
)
_RELATION = re.compile(
    rf"([MmOoHhTt](?<![\w\[].)(?i:y|ur|is|er|heir)[ ](?:[\w-]+[ ]){{0,3}}?(?i:{_KIN})(?:,[ ]|"
    rf"[ ]\(|[ ])(?i:named[ ]|called[ ])?)({_FULL})"
)
_WITH_DEGREE = re.compile(rf"(?<![\w\[.'’-])({_FULL})((?:,[ ]?|[ ])\(?{_DEGREE}(?:{_DEGREES})?\)?)(?![\w-]|[ ]\d{{5}})")


def _called(m: re.Match[str]) -> str | None:
    found, rest = m[3], m.string[m.end() :]
    if found[0].islower() and not re.match(_PARTICLE, found):
        first, _, second = found.partition(" ")
        weak = not re.search(r"name|myself|call", m[1], re.I) or re.search(r"myself|call me", m[1], re.I)
        if first in _NOT_NAMES or first in _NOT_ALONE or first in _CLINICAL or (weak and first not in _NAMES):
            return None
        if first not in _NAMES and not re.search(r"my (?:\w+ )?(?:full |first |last )?name(?:'s| is|:)", m[1], re.I):
            return None
        two = second and (
            second in _NAMES
            or (first in _NAMES and second not in _NOT_NAMES and not rest[:1].isalnum() and rest[:1] in ",.")
        )
        return m[1] + m[2] + "[NAME]" + ("" if two or not second else " " + second)
    name = _name(found, rest)
    return m[1] + m[2] + "[NAME]" + found[len(name) :] if name else None


def _label(m: re.Match[str]) -> str | None:
    name = _name(m[3], m.string[m.end() :])
    return m[1] + m[2] + "[NAME]" + m[3][len(name) :] if name else None


def _i_am(m: re.Match[str]) -> str | None:
    found, rest = m[2], m.string[m.end() :]
    if found[0].islower():
        return m[1] + "[NAME]" if found in _NAMES and re.match(r"i|this is|here", m[1], re.I) else None
    name = _name(found, rest)
    if not name:
        return None
    after = found[len(name) :] + rest
    if not (_known(name) or _AGE_OR_PLACE.match(after)):
        return None
    return m[1] + "[NAME]" + found[len(name) :]


def _relation(m: re.Match[str]) -> str | None:
    found, rest = m[2], m.string[m.end() :]
    name = _name(found, rest)
    if not name or (name.isupper() and not _known(name)):
        return None
    return m[1] + "[NAME]" + found[len(name) :]


def _with_degree(m: re.Match[str]) -> str | None:
    """ "John Smith, MD" and, without a comma, "John Smith MD"; no places ("Silver Spring, MD")."""
    tokens = [t for t in _TOKEN.findall(m[1]) if not t.endswith(" ")]
    first = next((i for i, t in enumerate(tokens) if not is_word(t)), None)
    if first is None or any(is_word(t) for t in tokens[first:]):
        return None
    start = m[1].find(tokens[first])
    name = m[1][start:]
    if len(tokens) - first < 2 and not _known(name):
        return None
    if (
        re.fullmatch(r",?[ ]?\(?M\.?[DS]\)?", m[2].rstrip("."))
        and not m[2].startswith(",")
        and (len(tokens) - first < 2 or not _known(name))
    ):  # "Becker MD" is a dystrophy
        return None
    return m[1][:start] + "[NAME]" + m[2]


_TITLE_KEYS = (
    "Dr", "DR.", "Prof", "PROF.", "Mr", "MR", "Ms", "Mx", "Miss", "Doctor", "DOCTOR", "Nurse", "Sister", "Herr",
    "Frau", "Señor",
    "Sr", "Mme", "Shri", "Smt",
)  # fmt: skip
_HI_KEYS = ("hi ", "hi, ", "hii ", "hello", "hey ", "hallo", "dear ", "greetings", "namaste", "salam", "welcome ")
_HELLO_KEYS = (*_HI_KEYS, "good m", "good a", "good e", "good d")
_CLOSING_KEYS = (
    "regards", "wishes", "sincerely", "truly", "faithfully", "respectfully", "cheers", "love", "yours", "cordially",
    "thank", "thx", "take care", "bless", "bye", "luck", "all the best", "xoxo", "greetings",
)  # fmt: skip
_DEGREE_KEYS = (
    " MD", " M.D", " MB", " M.B", " BDS", " B.D.S", " D.O", " DO", " Ph.D", " PhD", " Pharm", " RN", " R.N", " BSc",
    " B.Sc",
    " MSc", " M.Sc", " MS", " M.S", " M.Ch", " MCh", " DM", " D.M", " DNB", " D.N.B", " FR", " MRC", " FAC", " FAA",
    " FCPS",
    " F.C", " DCH", " DGO", " NP", " FNP", " PA-C", " DDS", " DPM", " DPT", " LCSW", " BHMS", " BAMS", " MPH", " Esq",
    "(MD", ",MD", ",M.D", ",MB", ",PhD",
)  # fmt: skip
_CALLED_KEYS = (
    "named ", "name is", "name's", "my name", "her name", "name:", "name of", "myself ", "call me", "am called",
    "'m called",
)  # fmt: skip
_LABEL_KEYS = (
    "name:", "name :", "names:", "name=", "name-", "name -", "attending", "consultant", "referred by", "seen by",
    "signed by", "signed:",     "reported by", "reviewed by", "dictated by", "physician:", "contact person", "kin:",
    "emergency contact", "guardian", "attn",
)  # fmt: skip
_KIN_KEYS = tuple(word + " " for word in ("my", "our", "his", "her", "their"))
RULES = (
    Rule("sign_off", _SIGN_OFF, _sign_off, _CLOSING_KEYS, tail=250, drops=True),
    Rule("sign_off", _DASHED, _dashed, tail=150, drops=True),
    Rule("greeting", _GREETING, _greeting, _HELLO_KEYS),
    Rule("name_after_title", _TITLED, _titled, _TITLE_KEYS, cased=True),
    Rule(
        "name_after_title",
        _TITLED_LOWER,
        _titled_lower,
        ("dr ", "dr.", "mr ", "mr.", "mrs", "prof. ", "prof ", "doctor "),
    ),
    Rule("name_with_degree", _WITH_DEGREE, _with_degree, _DEGREE_KEYS, cased=True),
    Rule("introduction", _CALLED, _called, _CALLED_KEYS),
    Rule("introduction", _LABEL, _label, _LABEL_KEYS),
    Rule("introduction", _I_AM, _i_am, ("i am ", "i'm ", "im ", "this is ", "here is ", "this side ")),
    Rule("relation", _RELATION, _relation, _KIN_KEYS),
)
