"""Which diseases fit what a patient says: words -> symptoms -> diseases, in memory. Called by data/diseases.py only.

Words are stemmed by FTS5's porter, so that this index and the full-text one of the passages agree on what a word is.
"""

from __future__ import annotations

import itertools
import math
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MAX_WORDS = 400  # of a text that are looked at, from its beginning

_K1, _B = 1.2, 0.75  # BM25's usual ones
_POWER = 4  # half of a phrase's weight counts for a sixteenth of the symptom

STOP_WORDS = Path(__file__).parent / "lexicon" / "stop_words.txt"
_WORD = re.compile(r"[^\W_]+")


class Words:
    """The words of a text as FTS5's tokenizer stems them. For one thread."""

    def __init__(self) -> None:
        self._stop = _read_words(STOP_WORDS)
        self._stems: dict[str, str] = {}
        self._fts = sqlite3.connect(":memory:", isolation_level=None)
        self._fts.execute("CREATE VIRTUAL TABLE words USING fts5(word, tokenize='porter unicode61')")
        self._fts.execute("CREATE VIRTUAL TABLE stems USING fts5vocab('words', 'instance')")

    def content(self, text: str) -> list[str]:
        """The stems of a text's words in order, stop words left out."""
        words = [w for w in words_of(text) if w not in self._stop]
        if len(self._stems) > 100_000:  # a server's, after years of typing mistakes
            self._stems = {}
        self._learn(dict.fromkeys(w for w in words if w not in self._stems))
        return [stem for w in words if (stem := self._stems[w])]

    def _learn(self, words: Iterable[str]) -> None:
        numbered = list(enumerate(words))
        if not numbered:
            return
        self._fts.executemany("INSERT INTO words (rowid, word) VALUES (?, ?)", numbered)
        stems = dict(self._fts.execute("SELECT doc, term FROM stems ORDER BY doc, offset DESC"))
        self._fts.execute("DELETE FROM words")
        self._stems.update({w: stems.get(i, "") for i, w in numbered})


def _read_words(path: Path) -> frozenset[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def words_of(text: str) -> list[str]:
    """The lower-case words at the beginning of a text."""
    return [m[0].lower() for m in itertools.islice(_WORD.finditer(text), MAX_WORDS)]


class SymptomIndex:
    """Ranks diseases by the symptoms they have, which may be given by name or found in the words of a text.

    A disease scores twice for a text: BM25 over the words of its symptoms' names, and the IDF of every symptom that the
    text names, as a phrase: by its name or one of its wordings, by a power of the share of its words that are there.
    """

    def __init__(
        self, diseases: Mapping[int, Sequence[str]], wordings: Mapping[str, Sequence[str]], words: Words
    ) -> None:
        self._n = len(diseases)
        self._symptoms: dict[tuple[str, ...], int] = {}
        self._owners: list[list[int]] = []  # of each symptom: diseases
        self._phrases: list[tuple[frozenset[str], int]] = []  # stems, symptom
        documents: dict[int, Counter[str]] = {}
        for id_, symptoms in diseases.items():
            documents[id_] = Counter()
            for stems in dict.fromkeys(tuple(words.content(s)) for s in symptoms):
                if stems not in self._symptoms:
                    self._symptoms[stems] = len(self._owners)
                    self._owners.append([])
                    self._phrases.append((frozenset(stems), self._symptoms[stems]))
                self._owners[self._symptoms[stems]].append(id_)
                documents[id_].update(stems)
        for symptom, phrases in wordings.items():
            number = self._symptoms.get(tuple(words.content(symptom)))
            if number is not None:
                stems_of = {frozenset(words.content(p)) for p in phrases} - {frozenset()}
                self._phrases += [(stems, number) for stems in sorted(stems_of, key=sorted)]
        self._idf = [self._weight(len(ids)) for ids in self._owners]
        self._index_words(documents)

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
        rare = self._weight(0)
        self._by_word: dict[str, list[tuple[int, float]]] = defaultdict(list)  # phrases and the word's share of them
        for number, (stems, _) in enumerate(self._phrases):
            total = sum(self._word.get(s, rare) for s in stems)
            for stem in stems:
                self._by_word[stem].append((number, self._word.get(stem, rare) / total))

    def rank_names(self, names: Iterable[Sequence[str]]) -> list[tuple[int, float]]:
        """Ids of diseases and their scores, best first, for symptoms' names as stems."""
        scores: dict[int, float] = defaultdict(float)
        for number in dict.fromkeys(self._symptoms.get(tuple(n), -1) for n in names):
            if number >= 0:
                for id_ in self._owners[number]:
                    scores[id_] += self._idf[number]
        return _sorted(scores)

    def rank(self, text: Sequence[str]) -> list[tuple[int, float]]:
        """The same for a text, as the stems of its words."""
        scores: dict[int, float] = defaultdict(float)
        shares: dict[int, float] = defaultdict(float)
        for stem in sorted(set(text)):  # sorted: sums of floats must not depend on hash order
            for id_, score in self._bm25.get(stem, ()):
                scores[id_] += score
            for number, share in self._by_word.get(stem, ()):
                shares[number] += share
        said: dict[int, float] = {}
        for number, share in shares.items():
            symptom = self._phrases[number][1]
            said[symptom] = max(said.get(symptom, 0.0), share)
        for symptom, share in said.items():
            for id_ in self._owners[symptom]:
                scores[id_] += self._idf[symptom] * share**_POWER
        return _sorted(scores)


def _sorted(scores: Mapping[int, float]) -> list[tuple[int, float]]:
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
