"""Which diseases fit what a patient says: words -> symptoms -> diseases, in memory. Called by data/diseases.py only.

Words are stemmed by FTS5's porter, so that this index and the full-text one of the passages agree on what a word is.
"""

from __future__ import annotations

import itertools
import math
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from data.reviewable import numbered_lines

MAX_WORDS, MAX_CHARS = 400, 20_000  # of a text that are looked at, from its beginning
MAX_LETTERS = 64  # of a word: no term is as long, and FTS5 cuts the longest in mid-character

_K1, _B = 1.2, 0.75  # BM25's usual ones
_POWER = 8  # of a phrase's share: 90 % of it counts for .43 of the symptom, half of it for nothing
_LEAST = 0.5  # ... and less is no hit at all
_LONGEST = 4  # words of a lay term
_KNOWN = 100_000  # stems that are remembered: a server hears typing mistakes for years

LEXICON = Path(__file__).parent / "lexicon"
STOP_WORDS, LAY_TERMS = LEXICON / "stop_words.txt", LEXICON / "lay_terms.txt"
_WORD = re.compile(r"[^\W_]+")


class Words:
    """The words of a text as FTS5's tokenizer stems them, lay terms as the clinical ones. For one thread at a time."""

    def __init__(self) -> None:
        self._stop = _read_words(STOP_WORDS)
        self._stems: dict[str, str] = {}
        self._fts = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._fts.execute("CREATE VIRTUAL TABLE words USING fts5(word, tokenize='porter unicode61')")
        self._fts.execute("CREATE VIRTUAL TABLE stems USING fts5vocab('words', 'instance')")
        self._terms: dict[tuple[str, ...], tuple[str, ...]] = {}  # stems of a lay term -> of the clinical one
        for term, lay_terms in read_lay_terms(LAY_TERMS).items():
            for lay in lay_terms:
                self._terms.setdefault(tuple(self.stems(lay)), tuple(self.stems(term)))

    def close(self) -> None:
        """Let go of the memory; nothing can be stemmed afterwards."""
        self._fts.close()

    def stems(self, text: str) -> list[str]:
        """The stems of a text's words in order, stop words left out."""
        words = [w for w in words_of(text) if w not in self._stop]
        if len(self._stems) > _KNOWN:
            self._stems = {}
        self._learn(dict.fromkeys(w for w in words if w not in self._stems))
        return [stem for w in words if (stem := self._stems[w])]

    def clinical(self, text: str) -> list[str]:
        """The same with clinical terms for lay ones; twice, because a term may hold words that are lay themselves."""
        return self._translate(self._translate(self.stems(text)))

    def _translate(self, stems: list[str]) -> list[str]:
        out: list[str] = []
        i = 0
        while i < len(stems):
            lengths = (n for n in range(min(_LONGEST, len(stems) - i), 0, -1) if tuple(stems[i : i + n]) in self._terms)
            n = next(lengths, 0)
            out += self._terms[tuple(stems[i : i + n])] if n else [stems[i]]
            i += n or 1
        return out

    def _learn(self, words: Iterable[str]) -> None:
        numbered = list(enumerate(words))
        if not numbered:
            return
        self._fts.executemany("INSERT INTO words (rowid, word) VALUES (?, ?)", numbered)
        stems = dict(self._fts.execute("SELECT doc, term FROM stems ORDER BY doc, offset DESC"))
        self._fts.execute("DELETE FROM words")
        self._stems.update({w: stems.get(i, "") for i, w in numbered})


def _read_words(path: Path) -> frozenset[str]:
    return frozenset(word for _, line in numbered_lines(path) for word in line.split())


def read_lay_terms(path: Path) -> dict[str, tuple[str, ...]]:
    """A file of `term: lay; lay` lines, by term."""
    terms: dict[str, tuple[str, ...]] = {}
    for number, line in numbered_lines(path):
        if line.strip():
            term, _, rest = line.partition(":")
            lay = tuple(x.strip() for x in rest.split(";"))
            if not term.strip() or not all(lay) or term in terms:
                raise ValueError(f"{path}:{number}: {line!r} is not `term: lay; lay`, with each term once")
            terms[term] = lay
    return terms


def words_of(text: str) -> list[str]:
    """The lower-case words at the beginning of a text."""
    found = itertools.islice(_WORD.finditer(text[:MAX_CHARS]), MAX_WORDS)
    return [m[0].lower() for m in found if len(m[0]) <= MAX_LETTERS]


class SymptomIndex:
    """Ranks diseases by the symptoms they have, which may be given by name or found in the words of a text.

    A disease scores twice for a text: BM25 over the words of its symptoms' names, and the IDF of every symptom that the
    text names, as a phrase: by its name or one of its wordings, by a power of the share of its words that are there.
    A name of the disease itself counts as a symptom that no other has.
    """

    def __init__(
        self,
        diseases: Mapping[int, tuple[Sequence[str], Sequence[str]]],
        wordings: Mapping[str, Iterable[str]],
        clinical: Callable[[str], list[str]],
    ) -> None:
        """diseases: names and symptoms by id; wordings: how patients say a symptom; clinical: a text's words."""
        self._n = len(diseases)
        self.rarest = self._weight(0)  # of what no disease has
        self._symptoms: dict[tuple[str, ...], int] = {}
        self._owners: list[list[int]] = []  # of each symptom: diseases
        self._phrases: list[tuple[frozenset[str], int]] = []  # words, symptom
        self._lengths: dict[int, int] = {}  # of each disease: symptoms
        documents: dict[int, Counter[str]] = {}
        for id_, (names, symptoms) in diseases.items():
            documents[id_] = Counter()
            for words in dict.fromkeys(tuple(clinical(s)) for s in symptoms):
                if words not in self._symptoms:
                    self._symptoms[words] = self._add([words], [])
                self._owners[self._symptoms[words]].append(id_)
                documents[id_].update(words)
            self._lengths[id_] = len(set(symptoms))
            self._add(map(clinical, names), [id_])
        for symptom, phrases in wordings.items():
            number = self._symptoms.get(tuple(clinical(symptom)))
            if number is not None:
                self._phrases += [(words, number) for words in dict.fromkeys(frozenset(clinical(p)) for p in phrases)]
        self._idf = [self._weight(len(ids)) for ids in self._owners]
        self._index_words(documents)

    def _add(self, phrases: Iterable[Iterable[str]], owners: list[int]) -> int:
        """A symptom that these phrases name; its number."""
        self._owners.append(owners)
        self._phrases += [(words, len(self._owners) - 1) for words in dict.fromkeys(map(frozenset, phrases))]
        return len(self._owners) - 1

    def _weight(self, count: int) -> float:
        return math.log(1 + (self._n - count + 0.5) / (count + 0.5))

    def _index_words(self, documents: Mapping[int, Counter[str]]) -> None:
        """What a text's word leads to: diseases with their BM25, and phrases."""
        self._bm25: dict[str, list[tuple[int, float]]] = defaultdict(list)
        mean = sum(c.total() for c in documents.values()) / max(1, self._n)
        count = Counter(stem for stems in documents.values() for stem in stems)
        self._word = {stem: self._weight(n) for stem, n in count.items()}
        for id_, stems in documents.items():
            norm = _K1 * (1 - _B + _B * stems.total() / mean) if mean else 1
            for stem, n in stems.items():
                self._bm25[stem].append((id_, self._word[stem] * n * (_K1 + 1) / (n + norm)))
        self._by_word: dict[str, list[tuple[int, float]]] = defaultdict(list)  # phrases and the word's share of them
        for number, (stems, _) in enumerate(self._phrases):
            total = sum(self._word.get(s, self.rarest) for s in sorted(stems))  # sorted: see rank()
            for stem in stems:
                self._by_word[stem].append((number, self._word.get(stem, self.rarest) / total))

    def rank_names(self, names: Iterable[Sequence[str]]) -> list[tuple[int, float]]:
        """Ids of diseases and their scores, best first, for symptoms' names as clinical words."""
        scores: dict[int, float] = defaultdict(float)
        for number in dict.fromkeys(self._symptoms.get(tuple(n), -1) for n in names):
            if number >= 0:
                for id_ in self._owners[number]:
                    scores[id_] += self._idf[number]
        return self._sorted(scores)

    def rank(self, text: Sequence[str]) -> list[tuple[int, float]]:
        """The same for a text, as its clinical words."""
        scores: dict[int, float] = defaultdict(float)
        for stem in sorted(set(text)):  # sorted: sums of floats must not depend on hash order
            for id_, score in self._bm25.get(stem, ()):
                scores[id_] += score
        said: dict[int, float] = {}
        for number, share in self._named(text).items():
            symptom = self._phrases[number][1]
            said[symptom] = max(said.get(symptom, 0.0), share)
        for symptom, share in said.items():
            for id_ in self._owners[symptom]:
                scores[id_] += self._idf[symptom] * share**_POWER
        return self._sorted(scores)

    def covered(self, text: Sequence[str], ids: Sequence[int]) -> list[float]:
        """Of the words by which a text names symptoms, the shares that name those of these diseases, by weight."""
        words: set[str] = set()
        own: list[set[str]] = [set() for _ in ids]
        said = set(text)
        for number in self._named(text):
            phrase, symptom = self._phrases[number]
            stems, owners = phrase & said, self._owners[symptom]
            words |= stems
            for id_, mine in zip(ids, own, strict=True):
                if id_ in owners:
                    mine |= stems
        total = self._total(words)
        return [self._total(mine) / total if total else 0.0 for mine in own]

    def _total(self, stems: set[str]) -> float:
        return sum(self._word.get(s, self.rarest) for s in sorted(stems))

    def _named(self, text: Sequence[str]) -> dict[int, float]:
        """The phrases that a text holds at least half of, with the share of each that is there."""
        shares: dict[int, float] = defaultdict(float)
        for stem in sorted(set(text)):
            for number, share in self._by_word.get(stem, ()):
                shares[number] += share
        return {number: share for number, share in shares.items() if share >= _LEAST}

    def _sorted(self, scores: Mapping[int, float]) -> list[tuple[int, float]]:
        """Best first; of equals the one with fewer symptoms, which these few are more likely to come from."""
        return sorted(scores.items(), key=lambda pair: (-pair[1], self._lengths[pair[0]], pair[0]))
