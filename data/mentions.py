"""What a text says that someone has now: phrases found in it, less what is denied, past, someone else's or only asked.

A text is cut into sentences and these into clauses ("... but ...", "... and I ..."). Phrases are matched word by word
inside a sentence; a clause says of what stands in it whether it counts. The rules for that are NegEx's (Chapman et al.
2001) idea, word lists with a scope, widened to history, other people and questions. Triage and the patient card read
texts through this; knows words, never rules or levels. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import permutations

from data.measurements import measured


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


GAP = 4  # words that ".." stands for at most

# Left out of texts and phrases before they are compared.
_FILLERS = _words("a an the my his her your our their its this that these those very really quite so some")

_DENY = _words(
    "no not without denies deny denied denying never neither nor none isnt arent wasnt werent dont doesnt didnt hasnt "
    "havent hadnt absent negative"
)
# Not denials, though they hold a word of denial: "no relief", "not only", "has not gone away".
_NO_DENIAL = _words(
    "relief better improvement improving improve sure only just doubt idea change changed helping help helped matter "
    "certain know think stop stopping stopped going gone go able responding settle settling working"
)
# "not" and its kin deny a whole list only with these ("do not have fever, cough or pain"), else the next words.
_HAVE = _words(
    "have had has any feel feeling felt report experience experienced notice noticed complain having got seem suffer "
    "suffering show with"
)
_LISTING = _words("no without denies deny denied denying neither nor none negative")
# What begins something new after a comma or "and": a subject, a verb, a stress.
_AFRESH = _words(
    "i im ive id he hes she shes we they it its there is are am was were has have had started began feels feel hurts "
    "hurt got gets developed noticed woke became becomes keeps now presents complains reports says can cant cannot "
    "wont isnt doesnt dont hasnt havent seems looks severe sudden suddenly terrible horrible worst excruciating"
)
# A clause that is about the past or about someone else, unless something in it is of now.
_PAST = re.compile(
    r"\b(?:last year|years? ago|decades? ago|months ago|in (?:19|20)\d\d|in the past|as a (?:child|kid|teenager|baby)|"
    r"when (?:i|he|she) was (?:a |young|little|\d|\w+ years|five|six|seven|eight|nine|ten|\w+teen|twelve|twenty)|"
    r"in childhood|used to|previously|long ago|once had|already treated|"
    r"recovered from|fully recovered)\b"
)
_RELATIVE = re.compile(
    r"\b(?:(?:father|mother|dad|mum|mom|brother|sister|uncle|aunt|grand\w+|cousin|friend|neighbou?r|colleague|coworker|"
    r"boss|teacher|actor|singer)s?\b.*\b(?:had|died|suffered|passed|survived|committed|lost)|"
    r"my (?:dog|cat|horse|puppy|kitten) (?:is|was|has|had|got)|family history|in (?:my|the|our) family|runs in)\b"
)
_NOW = re.compile(
    r"\b(?:now|today|tonight|still|again|currently|this (?:morning|afternoon|evening|week)|just|suddenly|minutes?|"
    r"hours?|right away|keeps|worse|worsening|since then|at the moment|right this|yesterday|presents|presenting)\b"
)
# A question about no one in particular.
_ASKS = re.compile(
    r"^(?:(?:doctor|dr|hi|hello|please|so|and|also|can you|could you)\b[ ,]*)*(?:what|how|why|which|when|where|who|"
    r"tell|explain|describe|define|is|are|can|could|does|do|should|would|will)\b"
)
_SOMEONE = re.compile(
    r"\b(?:i|im|ive|id|my|me|mine|he|hes|him|his|she|shes|her|we|our|us|son|daughter|baby|wife|husband|child|patient)\b"
)
# What comes behind these does not count: the past, up to a new subject or verb ...
_HISTORY = re.compile(
    r"(?<!day )(?<!days )(?<!week )(?<!weeks )(?<!hour )(?<!hours )(?<!month )(?<!months )\bhistory "
    r"(?:of|includes|is significant for)\b|\bdiagnosed (?:with|as)\b|\b(?:previous|prior|past)\b"
)
_RENEWED = re.compile(r"\b(?:presents?|presenting|comes|complains|complaining|who|developed|is|has|had|started)\b")
# ... what is only supposed or feared, up to the clause's end ...
_SUPPOSED = re.compile(
    r"\bif (?:i|he|she|we)(?: ever| should)? (?:get|got|had|have|has|were|develop|take|took)\b|"
    r"\bif (?:someone|somebody|anyone|you|one|a person|people)\b|\bwhat if\b|\bin case (?:of|i|he|she)\b|"
    r"\b(?:afraid|scared|fear|risks?|chances?|dangers?) of\b|"
    r"\b(?:prevent|prevents|preventing|prevention|avoid|avoiding|screened|screening|vaccine|vaccinated|"
    r"vaccination|insurance)\b|\b(?:read|book|article|film|movie|exam|essay|homework|lecture|course|"
    r"dream|dreamt|dreamed|documentary|programme)\b(?: \w+)? ?(?:about|on|of)\b|\bdifference between\b|"
    r"\b(?:ruled|rule|ruling) out\b|\b(?:worried|worry|anxious) about (?:getting|having|losing|ever)\b"
)
# ... or what is left out, up to a comma.
_SPARED = re.compile(r"\b(?:instead of|rather than|allerg(?:ic|y) to)\b")
# In a question these hold back what follows, and elsewhere where the patient has not claimed to have it.
_ABOUT = re.compile(r"\b(?:signs?|symptoms?|causes?|treatment|cure|complications?) (?:of|for)\b")
_CAUSES = re.compile(
    r"\b(?:cause|causes|causing|lead to|leads to|result in|trigger|bring on)\b(?! (?:my|his|her|this))"
)
_OWN = re.compile(r"\b(?:i|im|ive|he|hes|she|shes|having|have|has|got)\b")
# Behind a phrase: it is gone, or not to be.
_GONE = re.compile(
    r"^(?:\w+ ){0,2}?(?:(?:is|are|was|were|has|have|had|should|must|be|now|been|all|completely|totally) )*(?:absent|"
    r"denied|avoided|contraindicated|negative|gone|resolved|went away|gone away|ruled out|not present|no longer|"
    r"not (?:suitable|safe|recommended|advised|allowed|for you)|stopped|subsided|disappeared|passed|"
    r"never (?:came|happened))\b(?! (?:out|by|urine|stool|gas|wind|clots?|blood))|^(?:no|none|nil)$"
)

_SENTENCE = re.compile(r"[.!?;]+(?!\d)|\n\s*\n\s*")  # a single line break is only a wrapped line
_LONGEST = re.compile(r".{1,1000}(?:\s|$)|.{1000}", re.DOTALL)  # a sentence without an end is cut
_CLAUSE = re.compile(
    r"\b(?:but|however|although|though|yet|whereas|except|apart from|and (?=i |im |ive |my |now |he |hes |she |shes |"
    r"has |his |her |today |then )|which|because)\b|"
    r",\s*(?=i |im |ive |my |he |she |now |so |take |use |try |please |therefore )"
)
_UNABLE = re.compile(
    r"\b(?:can not|cant|could not|couldnt|can no longer|unable to|incapable of|"
    r"(?:not|isnt|arent|im not|wasnt|werent|hasnt been|havent been) able to)\b"
)
_WORD = re.compile(r"[a-z]+|\d+(?:\.\d+)?|,")


@dataclass
class _Sentence:
    """Its words for matching, and for each whether what begins there counts."""

    words: list[str] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)
    counts_asked: list[bool] = field(default_factory=list)  # for phrases that count in a mere question too
    rest: list[str] = field(default_factory=list)  # of the clause, behind each word


def plain(text: str) -> str:
    """Lower case, no apostrophes, hyphens and slashes as spaces, "unable to" and the like as "cannot", measurements in
    words."""
    text = text.lower().replace("\u2019", "'").replace("'", "").replace("\u2013", "-")
    text = _UNABLE.sub("cannot", text)
    return measured(re.sub(r"(?<=[a-z\d])[-/](?=[a-z])|(?<=[a-z])[-/](?=\d)|[_*\"()\[\]]", " ", text))


def _sentences(text: str) -> Iterator[_Sentence]:
    at = 0
    for border in [*_SENTENCE.finditer(text), None]:
        whole = text[at : border.start() if border else len(text)].strip()
        at = border.end() if border else at
        for raw in _LONGEST.findall(whole):
            sentence = _Sentence()
            begin = 0
            for cut in [*_CLAUSE.finditer(raw), None]:
                clause = raw[begin : cut.start() if cut else len(raw)].strip()
                _add(sentence, clause, border is not None and "?" in border.group())
                begin = cut.end() if cut else 0
            yield sentence


def _add(sentence: _Sentence, clause: str, asked: bool) -> None:
    """Add a clause's words to its sentence; asked: it ends in a question mark."""
    not_now = (_PAST.search(clause) or _RELATIVE.search(clause)) is not None and not _NOW.search(clause)
    opens_as_question = _ASKS.match(clause) is not None
    no_one = opens_as_question and not _SOMEONE.search(clause)
    quiet = _quiet(clause, asked or opens_as_question)
    found = list(_WORD.finditer(clause))
    denied = _denied([m.group() for m in found])
    for m, is_denied in zip(found, denied, strict=True):
        if m.group() in _FILLERS:
            continue
        if m.group() == ",":
            _border(sentence)
            continue
        at = m.start()
        counts = not (not_now or is_denied or any(a <= at < b for a, b in quiet))
        sentence.words.append(m.group())
        sentence.counts.append(counts and not no_one)
        sentence.counts_asked.append(counts)
        sentence.rest.append(clause[m.end() : m.end() + 80].strip(" :,-"))
    _border(sentence)


def _quiet(clause: str, question: bool) -> list[tuple[int, int]]:
    """The parts of a clause that are past, supposed or asked about."""
    end = len(clause)
    spans = [(m.end(), end) for m in _SUPPOSED.finditer(clause)]
    spans += [(m.end(), end) for m in _ABOUT.finditer(clause) if question or not _OWN.search(clause[: m.start()])]
    spans += [(m.end(), end) for m in _CAUSES.finditer(clause) if question]
    for m in _HISTORY.finditer(clause):
        renewed = _RENEWED.search(clause, m.end())
        spans.append((m.end(), renewed.start() if renewed else end))
    for m in _SPARED.finditer(clause):
        comma = clause.find(",", m.end())
        spans.append((m.end(), comma if comma >= 0 else end))
    return spans


def _border(sentence: _Sentence) -> None:
    """What no phrase goes over: a comma ("pain, itching of the scrotum" is no pain there), the end of a clause."""
    sentence.words.append("|")
    sentence.counts.append(False)
    sentence.counts_asked.append(False)
    sentence.rest.append("")


def _denied(words: list[str]) -> list[bool]:
    """For each word whether a denial before it reaches it."""
    denied, scope, whole = [], False, False  # whole: the denial is of a list
    for i, word in enumerate(words):
        if scope and word in (",", "and"):
            ahead = words[i + 1 : next((j for j in range(i + 1, len(words)) if words[j] == ","), len(words))]
            scope = whole and not _AFRESH.intersection(ahead)
        denied.append(scope)
        follows = next((w for w in words[i + 1 : i + 3] if w not in _FILLERS), "")
        if word in _DENY and (follows not in _NO_DENIAL or word in ("denies", "denied", "deny", "denying")):
            scope, whole = True, word in _LISTING or bool(_HAVE.intersection(words[i + 1 : i + 4]))
    return denied


# --- phrases --------------------------------------------------------------------------------------

Element = tuple[tuple[str, ...], tuple[str, ...]]  # whole words, beginnings of words; neither: a gap


@dataclass(frozen=True)
class Phrase:
    """Elements that follow each other in a sentence, and the name that they are found under."""

    name: str
    elements: tuple[Element, ...]
    asked: bool = False  # counts in a mere question too


def phrase(name: str, text: str) -> Phrase:
    """`word other/another begin* .. word`. ValueError if it is none."""
    elements: list[Element] = []
    for part in _UNABLE.sub("cannot", text.lower().replace("'", "")).split():
        if part == "..":
            elements.append(((), ()))
            continue
        options = part.split("/")
        if not all(re.fullmatch(r"[a-z]+\*?|\d+", o) for o in options) or any(
            o.endswith("*") and len(o) < 4 for o in options
        ):
            raise ValueError(f"{part!r} in {text!r} is not words between slashes; a * needs three letters before it")
        if set(options) <= _FILLERS:
            continue
        elements.append((tuple(o for o in options if o[-1] != "*"), tuple(o[:-1] for o in options if o[-1] == "*")))
    if not elements or not any(elements[0]) or not any(elements[-1]):
        raise ValueError(
            f"{text!r} needs a word at its beginning and end, not only {' '.join(sorted(_FILLERS))[:20]} ..."
        )
    return Phrase(name.removesuffix("?"), tuple(elements), name.endswith("?"))


def phrases(name: str, text: str) -> list[Phrase]:
    """The phrase of a text; of `chest & pain/tight*` both orders, with a gap between. ValueError if it is none."""
    return [phrase(name, " .. ".join(parts)) for parts in permutations(text.split(" & "))]


class Finder:
    """Finds phrases in texts, by the first word of each."""

    def __init__(self, phrases: Iterable[Phrase]) -> None:
        self._by_word: dict[str, list[Phrase]] = {}
        self._by_beginning: dict[str, list[Phrase]] = {}
        for p in phrases:
            for index, keys in zip((self._by_word, self._by_beginning), p.elements[0], strict=True):
                for key in keys:
                    index.setdefault(key, []).append(p)
        self._lengths = sorted({len(b) for b in self._by_beginning})

    def present(self, text: str) -> set[str]:
        """Names of the phrases that the text says someone has now."""
        found: set[str] = set()
        for sentence in _sentences(plain(text)):
            words = sentence.words
            for i, word in enumerate(words):
                if not sentence.counts_asked[i]:
                    continue
                for p in self._beginning(word):
                    counts = sentence.counts_asked[i] if p.asked else sentence.counts[i]
                    if not counts or p.name in found:
                        continue
                    end = _match(p.elements, words, i)
                    if end and not _GONE.match(sentence.rest[end - 1]):
                        found.add(p.name)
        return found

    def _beginning(self, word: str) -> Iterator[Phrase]:
        yield from self._by_word.get(word, ())
        for n in self._lengths:
            if n <= len(word):
                yield from self._by_beginning.get(word[:n], ())


def _match(elements: tuple[Element, ...], words: list[str], at: int) -> int:
    """Where the match that begins at a word ends, or 0. The first element is known to fit."""
    at += 1
    for k in range(1, len(elements)):
        whole, beginnings = elements[k]
        if not whole and not beginnings:
            for skipped in range(GAP + 1):
                j = at + skipped
                if j < len(words) and _fits(elements[k + 1], words[j]) and (end := _match(elements[k + 1 :], words, j)):
                    return end
                if j >= len(words) or words[j] in _DENY or words[j] == "|":
                    return 0
            return 0
        if at >= len(words) or not _fits(elements[k], words[at]):
            return 0
        at += 1
    return at


def _fits(element: Element, word: str) -> bool:
    return word in element[0] or (bool(element[1]) and word.startswith(element[1]))
