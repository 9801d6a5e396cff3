"""Which replies become training dialogues: read, held against their row, and told apart from one another.

Called by generate.py. Whatever is refused has a reason of a few words, which the summary counts. Words only,
no model: an answer may be wrong in ways that no list of tests and drugs shows.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data.asking.client import Reply
from data.asking.prompts import EMERGENCY, FORM, MANNERS, RULES, SYSTEM, TASKS, Request
from data.conditions import singular
from data.diseases import Entry

NEAR = 0.7  # ROUGE-L from which two dialogues are near duplicates, as in self-instruct
LEAK = 8  # words in a row shared with the instructions of the prompt
SHORTEST = 4  # words of an answer

_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_LABEL = re.compile(r"^[\s*_#>-]*(patient|doctor)[\s*_]*:[*_]*[ \t]*", re.IGNORECASE | re.MULTILINE)
_ROLE = re.compile(
    r"(?:^|[.!?\"”'*]\s*)(patient|doctor|chatdoctor|physician|assistant|user|human|system|ai)\s*:"
    r"|###\s|<\|\w+\|>|\[/?INST\]",
    re.IGNORECASE | re.MULTILINE,
)
_MODEL = re.compile(r"\b(as|i am|i'm) an? (\w+ ){0,3}(ai|language model|chatbot|virtual assistant)\b", re.IGNORECASE)
_REFUSAL = re.compile(r"^(i'm |i am )?sorry,? but|^i (can't|cannot|can not) (help|assist|provide|write)", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\[['\"\w]|['\"\w]\]|[{}]|<\w+>|\.\.\.$")
_FACTS = re.compile(r"\b(Other names|Urgency|Disease|Facts):|\bthe (facts|list) (above|below|given|provided)\b")
_DOSE = re.compile(r"\b\d+([.,]\d+)?\s?(mg|mcg|µg|g|grams?|milligrams?|ml|iu|units?)\b", re.IGNORECASE)
_URGENT = re.compile(r"emergenc|ambulance|immediate|at once|right away|hospital|\b(911|112|999)\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_ENDS = re.compile(r"[.!?…][\"'’”)]*$")
_BRACKETS = re.compile(r"\s*\(([^()]*)\)")
_ARTICLE = re.compile(r"^(an?|the)\s+", re.IGNORECASE)
_ROUTES = {"topical", "ophthalmic", "otic", "nasal", "product", "preparation", "extract"}  # how SymCat names a form

Words = tuple[str, ...]


class Refused(Exception):
    """A reply that does not become a dialogue; str() is the reason."""


# --- reading --------------------------------------------------------------------------------------


def split(reply: Reply) -> tuple[str, str]:
    """Question and answer of a reply in the form that was asked for. Refused when it has another one."""
    text = _THOUGHT.sub("", reply.text).replace("\r\n", "\n").strip()
    if not text:
        raise Refused("empty")
    if reply.finish_reason == "length":
        raise Refused("truncated")
    _, *parts = _LABEL.split(text)
    roles, said = [role.lower() for role in parts[::2]], [" ".join(part.split()).strip("`*_ ") for part in parts[1::2]]
    if not roles:
        raise Refused("refusal" if _REFUSAL.search(text) else "not a dialogue")
    if roles != ["patient", "doctor"]:
        raise Refused("role leak" if roles[:2] == ["patient", "doctor"] else "not a dialogue")
    return said[0], said[1]


def check_text(question: str, answer: str) -> None:
    """Refused for what no dialogue may hold, whatever it is about."""
    both = f"{question}\n{answer}"
    if len(_WORD.findall(answer)) < SHORTEST or not question:
        raise Refused("empty")
    if not _valid(both):
        raise Refused("not valid Unicode")
    if _ROLE.search(both):
        raise Refused("role leak")
    if _MODEL.search(both):
        raise Refused("speaks as a language model")
    if _REFUSAL.search(answer):
        raise Refused("refusal")
    if not _ENDS.search(answer):
        raise Refused("truncated")
    if _FACTS.search(both) or _PLACEHOLDER.search(question) or _PLACEHOLDER.search(answer) or _leaks(both):
        raise Refused("prompt leak")


def _valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text and "\ufffd" not in text


def _leaks(text: str) -> bool:
    """Whether it repeats LEAK words in a row of what the prompt says apart from the row."""
    words = words_of(text)
    runs = {words[i : i + LEAK] for i in range(len(words) - LEAK + 1)}
    pieces = [SYSTEM, FORM, RULES, EMERGENCY, *MANNERS]
    for task in TASKS.values():
        pieces += re.split(r"\{\w+\}", task)
    return any(said[i : i + LEAK] in runs for said in map(words_of, pieces) for i in range(len(said) - LEAK + 1))


def words_of(text: str) -> Words:
    """Lower-case words, plural endings off, so that "X-rays" is "x-ray"."""
    return tuple(singular(w) for w in _WORD.findall(text.lower()))


# --- against the row ------------------------------------------------------------------------------


def names_of(term: str) -> set[Words]:
    """The ways to say a name of a list: without its brackets, what stands in them, and each part at a semicolon.

    "Alprazolam (Xanax)" is alprazolam and Xanax; "Lidocaine Topical" is lidocaine as well.
    """
    found: set[Words] = set()
    for part in [_BRACKETS.sub("", term), *_BRACKETS.findall(term)]:
        for piece in (part, *part.split(";")):
            words = words_of(_ARTICLE.sub("", piece.strip()))
            found.add(words)
            while len(words) > 1 and words[-1] in _ROUTES:
                words = words[:-1]
            found.add(words)
    return found - {()}


class Lexicon:
    """The tests and medications of all rows, to find those in an answer that its row does not have."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        ordinary: set[str] = set()  # words that are no drug where a test or symptom is spoken of ("blood glucose")
        tests: set[Words] = set()
        medications: set[Words] = set()
        for e in entries:
            for text in (e.name, *e.synonyms, *e.symptoms, *e.tests):
                ordinary.update(words_of(text))
            # What stands in brackets after a test is often ordinary English ("interview; evaluation; consultation").
            tests.update(words_of(_BRACKETS.sub("", t)) for t in e.tests)
            medications.update(names for m in e.medications for names in names_of(m))
        self._terms = {t for t in tests if t} | {m for m in medications if len(m) > 1 or m[0] not in ordinary}
        self._longest = max(map(len, self._terms), default=0)

    def foreign(self, answer: str, entry: Entry) -> str:
        """The first test or medication in an answer that is no part of its row, or ""."""
        own = {names for text in _texts(entry) for names in (words_of(text), *names_of(text))}
        longest = max(self._longest, *map(len, own))
        said = words_of(answer)
        at = 0
        while at < len(said):
            for size in range(min(longest, len(said) - at), 0, -1):
                words = said[at : at + size]
                if words in own:
                    at += size - 1
                    break
                if words in self._terms and not any(contains(o, words) for o in own):
                    return " ".join(words)
            at += 1
        return ""


def _texts(entry: Entry) -> tuple[str, ...]:
    return (entry.name, *entry.synonyms, *entry.symptoms, *entry.tests, *entry.medications)


def contains(text: Words, words: Words) -> bool:
    n = len(words)
    return any(text[i : i + n] == words for i in range(len(text) - n + 1))


def check_row(request: Request, question: str, answer: str, lexicon: Lexicon) -> None:
    """Refused unless the dialogue says what its row says, and nothing of other rows."""
    entry, asked, said = request.entry, words_of(question), words_of(answer)
    disease = {names for name in (entry.name, *entry.synonyms) for names in names_of(name)}
    if request.about == "symptoms":
        symptoms = words_of(" ".join(request.symptoms))
        if any(contains(asked, n) and not contains(symptoms, n) for n in disease):
            raise Refused("question names the disease")
        if not any(contains(said, n) for n in disease):
            raise Refused("answer does not name the disease")
        if entry.urgency == "emergency" and not _URGENT.search(answer):
            raise Refused("emergency not said")
    else:
        if not any(contains(asked + said, n) for n in disease):
            raise Refused("does not name the disease")
        if not any(contains(said, n) for term in getattr(entry, request.about) for n in names_of(term)):
            raise Refused(f"answer names no {request.about.removesuffix('s')} of the row")
    if _DOSE.search(answer):
        raise Refused("names a dose")
    if foreign := lexicon.foreign(answer, entry):
        raise Refused(f"names a test or medication of other rows: {foreign}")


# --- against one another --------------------------------------------------------------------------


class Seen:
    """Dialogues kept so far. ROUGE-L, the F measure over the longest common subsequence of words, is what `indel`
    similarity is of texts with one character a word.
    """

    def __init__(self, near: float = NEAR) -> None:
        self.near = near
        self._indel, self._process = _rapidfuzz()
        self._letters: dict[str, str] = {}
        self._kept: list[str] = []

    def near_duplicate(self, text: str) -> int | None:
        """The number of the kept text that this one is too near to, or None, and then it is kept."""
        spelled = "".join(self._letter(w) for w in _WORD.findall(text.lower()))
        found = self._process.extractOne(
            spelled, self._kept, scorer=self._indel.normalized_similarity, score_cutoff=self.near
        )
        if found is not None:
            return int(found[2])
        self._kept.append(spelled)
        return None

    def _letter(self, word: str) -> str:
        n = len(self._letters)
        return self._letters.setdefault(word, chr(n + 0x800 * (n >= 0xD800)))  # beyond the surrogates


def _rapidfuzz() -> tuple[Any, Any]:
    try:
        return importlib.import_module("rapidfuzz.distance").Indel, importlib.import_module("rapidfuzz.process")
    except ImportError:
        raise ValueError("finding near duplicates needs the rapidfuzz package: pip install rapidfuzz") from None


def judge(replies: Iterable[tuple[Request, Reply]], lexicon: Lexicon) -> Iterator[tuple[Request, str, str, str]]:
    """(request, question, answer, "" or the reason of its refusal), in the order of the replies."""
    seen = Seen()
    for request, reply in replies:
        question, answer, reason = "", "", ""
        try:
            question, answer = split(reply)
            check_text(question, answer)
            check_row(request, question, answer, lexicon)
            if seen.near_duplicate(f"{question} {answer}") is not None:
                raise Refused("near duplicate")
        except Refused as e:
            reason = str(e)
        yield request, question, answer, reason
