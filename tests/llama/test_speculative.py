"""llama/speculative.py: the text of plain decoding, its distribution, what the cache holds, and when drafting stops."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import layout, speculative
from llama.cache import KVCache
from llama.config import LlamaConfig, from_hf
from llama.generation import Answer, Context, Drafts, Request, stream
from llama.model import Llama
from llama.sampling import Sampler, SamplingParams
from llama.speculative import LENGTHS, NGRAMS, Drafter, DraftModel, Lookup, Pace
from llama.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)
SETTINGS = [
    GREEDY,
    SamplingParams(temperature=0.0, repetition_penalty=1.4),
    SamplingParams(temperature=1.0, top_k=0, repetition_penalty=1.0, seed=5),
    SamplingParams(temperature=0.7, top_k=9, repetition_penalty=1.3, seed=5),
    SamplingParams(temperature=1.3, top_k=0, top_p=0.8, min_p=0.02, repetition_penalty=1.2, seed=5),
    SamplingParams(temperature=0.8, top_k=0, min_p=0.1, repetition_penalty=1.2, penalize_prompt=True, seed=5),
]


class Fixed(Pace):
    """Always drafts n ids, or what is left of them."""

    def __init__(self, n: int) -> None:
        super().__init__(0.5)
        self.n = n

    def choose(self, kind: int, most: int) -> int:
        return min(self.n, most)

    def passed(self, drafted: int, seconds: float | None) -> None: ...


class Oracle:
    """Guesses from a given answer; from `wrong_at` on, every so many ids, wrongly."""

    free, prior = True, 0.5

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], wrong_every: int = 0) -> None:
        wrong = [(t + 1) % 20 if wrong_every and i % wrong_every == 0 else t for i, t in enumerate(answer, 1)]
        self.said = [*prompt, *wrong, *[3] * 40]

    def begin(self, ids: Sequence[int]) -> None: ...

    def kind(self, ids: Sequence[int]) -> int:
        return 0

    def draft(self, ids: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        return self.said[len(ids) : len(ids) + n]


def drafter(source: speculative.Source, n: int) -> Drafter:
    made = Drafter(source)
    made.pace = Fixed(n)
    return made


def scaled(config: LlamaConfig, seed: int, model: type[Llama] = Llama) -> Any:
    """A random model with large weights: greedy choices that are no close calls."""
    made = model(config)
    made.init_weights(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.mul_(1 if "norm" in name else 15)
    return made.eval()


class Counting(Llama):
    """A model that notes how many rows each of its passes had."""

    def forward(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        self.__dict__.setdefault("passes", []).append(tokens.shape[1])
        return super().forward(tokens, **kwargs)


CONFIG = LlamaConfig(32, 2, 4, 2, 64, 24, max_seq_len=160)


@pytest.fixture(scope="module")
def model() -> Counting:
    return scaled(CONFIG, 0, Counting)


@pytest.fixture(scope="module")
def small() -> Llama:
    return scaled(LlamaConfig(16, 1, 2, 1, 32, 30, max_seq_len=100), 3)


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Llama, list[int]]:
    """A trained model, and ids of its text."""
    from safetensors.torch import load_file

    folder = shared / "data/stories260K"
    config = from_hf(json.loads((folder / "config.json").read_text()))
    model = Llama(config)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({e.name: tensors[e.hf] for e in layout.entries(config)})
    return model.eval(), json.loads((folder / "greedy_ids.json").read_text())["input_ids"]


# --- the text ---


@pytest.mark.parametrize("params", SETTINGS)
def test_a_trained_models_text_is_that_of_plain_decoding(
    stories: tuple[Llama, list[int]], params: SamplingParams
) -> None:
    model, ids = stories
    draft = Llama(model.config)
    draft.load_state_dict(model.state_dict())
    with torch.no_grad():
        draft.layers[-1].mlp.down.weight.zero_()  # says much the same, not all
    for prompt in (ids[:1], ids[:60] + ids[:8]):
        want = list(stream(model, prompt, params, 90))
        for source in (Lookup(), DraftModel(draft.eval())):
            for n in (1, 3, 15):
                d = drafter(source, n)
                assert list(stream(model, prompt, params, 90, drafter=d)) == want
                assert isinstance(source, Lookup) or 0 < d.drafts.accepted < d.drafts.drafted


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize("wrong_every", [0, 1, 2, 3, 5])
def test_neither_right_nor_wrong_guesses_change_the_text(
    model: Counting, params: SamplingParams, wrong_every: int
) -> None:
    prompt, limits = [1, 5, 9], {"banned": [0, 4], "vocab_size": 20}
    want = list(stream(model, prompt, params, 60, **limits))  # type: ignore[arg-type]
    assert not set(want) & {0, 4, 20, 21, 22, 23}
    for n in (1, 2, 3, 7):
        d = drafter(Oracle(prompt, want, wrong_every), n)
        assert list(stream(model, prompt, params, 60, drafter=d, **limits)) == want  # type: ignore[arg-type]


@pytest.mark.parametrize("params", SETTINGS)
def test_a_draft_model_guesses_with_the_answers_own_sampler(model: Counting, params: SamplingParams) -> None:
    """The model as its own draft is always right: penalty, ban, random numbers and cache are the answer's."""
    prompt, limits = [1, 5, 9], {"banned": [0, 4], "vocab_size": 20}
    d = drafter(DraftModel(model), 7)
    got = list(stream(model, prompt, params, 61, drafter=d, **limits))  # type: ignore[arg-type]
    assert got == list(stream(model, prompt, params, 61, **limits))  # type: ignore[arg-type]
    # 1 from the prompt, 7 passes of 7 + 1, and of the 4 that are left 3 are guessed.
    assert (d.drafts.drafted, d.drafts.accepted) == (52, 52)


def test_a_draft_model_of_another_width_and_a_shorter_context(model: Counting, small: Llama) -> None:
    d = drafter(DraftModel(small), 3)
    want = list(stream(model, [1, 5], GREEDY, 150, vocab_size=24))
    assert list(stream(model, [1, 5], GREEDY, 150, vocab_size=24, drafter=d)) == want
    assert d.drafts.drafted > 30
    long = [5, 6] * 60
    assert list(stream(model, long, GREEDY, 9, vocab_size=24, drafter=d)) == list(stream(model, long, GREEDY, 9))


@pytest.mark.parametrize("wrong_every", [0, 4])
def test_lengths_and_a_full_context(model: Counting, wrong_every: int) -> None:
    prompt = [1, 5, 9]
    want = list(stream(model, prompt, GREEDY, 40))
    for most in range(1, 20):
        d = drafter(Oracle(prompt, want, wrong_every), 7)
        assert list(stream(model, prompt, GREEDY, most, drafter=d)) == want[:most]
    for left in range(1, 12):
        prompt = [7, 9] * 80
        prompt = prompt[: CONFIG.max_seq_len - left]
        want = list(stream(model, prompt, GREEDY, 40))
        assert len(want) == left
        assert list(stream(model, prompt, GREEDY, 40, drafter=drafter(Oracle(prompt, want), 7))) == want


def test_right_guesses_save_passes_and_wrong_ones_cost_none(model: Counting) -> None:
    prompt = [1, 5, 9]
    want = list(stream(model, prompt, GREEDY, 41))
    for wrong_every, passes in ((0, [3, *[4] * 10]), (1, [3, *[4] * 37, 3, 2, 1])):
        model.passes.clear()
        d = drafter(Oracle(prompt, want, wrong_every), 3)
        assert list(stream(model, prompt, GREEDY, 41, drafter=d)) == want
        assert model.passes == passes  # the id after the last right guess comes free
        assert d.drafts == Drafts(sum(passes) - 3 - len(passes) + 1, 0 if wrong_every else 30)


@pytest.mark.parametrize("place", range(1, 9))
def test_a_stop_id_inside_a_draft_ends_the_answer(model: Counting, place: int) -> None:
    prompt = [1, 5, 9]
    want = list(stream(model, prompt, GREEDY, 20))
    stop = want[place]
    context = Context(model)
    d = drafter(Oracle(prompt, want), 7)
    got = list(stream(model, prompt, GREEDY, 20, (stop,), context=context, drafter=d))
    assert got == want[: want.index(stop)]
    assert context.ids == [*prompt, *got]
    again = [*prompt, *got, 11, 12]
    assert list(stream(model, again, GREEDY, 9, context=context)) == list(stream(model, again, GREEDY, 9))


def test_a_stop_text_inside_a_draft_ends_the_answer(small_tokenizer: Tokenizer) -> None:
    model = scaled(LlamaConfig(32, 2, 4, 2, 64, small_tokenizer.vocab_size, max_seq_len=160), 0)
    prompt = [1, *small_tokenizer.encode("fever")]
    plain = Answer(Request(prompt, GREEDY, 40), small_tokenizer)
    "".join(plain.stream(model))
    for start in range(2, 12):
        request = Request(prompt, GREEDY, 40, stop=(plain.text[start : start + 3],))
        want, got = Answer(request, small_tokenizer), Answer(request, small_tokenizer)
        pieces = list(want.stream(model))
        context = Context(model)
        assert list(got.stream(model, context, drafter(Oracle(prompt, plain.token_ids), 7))) == pieces
        assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
        assert context.ids == [*prompt, *got.token_ids]


def test_an_answer_counts_its_own_drafts(small_tokenizer: Tokenizer, tiny_config: LlamaConfig) -> None:
    model = scaled(tiny_config, 0)
    request = Request([1, 5, 6, 7, 5, 6, 7, 5, 6], GREEDY, 20)
    d = drafter(Lookup(), 3)
    answers = [Answer(request, small_tokenizer) for _ in range(2)]
    for answer in answers:
        "".join(answer.stream(model, drafter=d))
    first, second = (a.to_json() for a in answers)
    assert first["drafted_tokens"] == second["drafted_tokens"] > 0
    assert answers[0].drafts is not answers[1].drafts
    assert first["accepted_tokens"] == second["accepted_tokens"]
    plain = Answer(request, small_tokenizer)
    "".join(plain.stream(model))
    assert not {"drafted_tokens", "accepted_tokens"} & set(plain.to_json())


# --- what the cache holds ---


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_breaking_off_anywhere_leaves_ids_and_cache_in_step(model: Counting, small: Llama, data: st.DataObject) -> None:
    source = data.draw(st.sampled_from([Lookup(), DraftModel(small), "oracle"]))
    context, held = Context(model), [1]
    for _ in range(3):
        keep = data.draw(st.integers(1, len(held)))
        prompt = held[:keep] + data.draw(st.lists(st.integers(0, 19), max_size=8))
        prompt = prompt[:100]
        want = list(stream(model, prompt, GREEDY, 20, vocab_size=24))
        guess = Oracle(prompt, want, data.draw(st.integers(0, 4))) if source == "oracle" else source
        d = drafter(guess, data.draw(st.integers(1, 7)))
        tokens = stream(model, prompt, GREEDY, 20, vocab_size=24, context=context, drafter=d)
        got = [next(tokens) for _ in range(data.draw(st.integers(1, 20)))]
        assert got == want[: len(got)]
        assert context.ids == [*prompt, *got]
        assert context.cache is not None
        S = min(len(context.ids), context.cache.length)
        assert len(context.ids) - 1 <= S
        fresh = KVCache(CONFIG, 1, S)
        with torch.inference_mode():
            model(torch.tensor([context.ids[:S]]), cache=fresh)
        assert torch.allclose(context.cache._kv[..., :S, :], fresh._kv, atol=1e-3)
        held = context.ids[:]


def test_a_draft_model_reads_every_id_once(model: Counting) -> None:
    """Of a turn that goes on from the one before it, too; a wrong guess costs nothing but itself."""
    d = drafter(DraftModel(model), 3)
    d.source.begin(range(1, 11))
    model.passes.clear()
    sampler = Sampler([GREEDY], [[]])
    ids = list(range(1, 11))
    first = d.source.draft(ids, 3, sampler)
    assert model.passes == [1, 1, 1]  # one id is always left to run, for its logits
    model.passes.clear()
    ids += [first[0], (first[1] + 1) % 20]
    d.source.draft(ids, 3, sampler)
    assert model.passes == [1, 1, 1]  # the right guess stands, the id in place of the wrong one is read
    model.passes.clear()
    d.source.begin([*ids, 1, 2])
    assert model.passes == [2]


# --- the distribution ---


class Chain:
    """Stands in for a model: the next id depends on the last one."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.table = logits
        self.config = LlamaConfig(2, 1, 1, 1, 2, len(logits), max_seq_len=64)
        self.embed, self.norm = torch.nn.Embedding(1, 1), torch.nn.LayerNorm(1)

    def __call__(self, tokens: torch.Tensor, cache: KVCache, last_only: bool = False) -> torch.Tensor:
        cache.advance(tokens.shape[1])
        return self.table[tokens[:, -1:] if last_only else tokens]


class SecondChance(Drafter):
    """A wrong rule: where the guess was not drawn, it may be by a second number. Nothing else is wrong with it."""

    def steps(
        self, model: Any, tokens: torch.Tensor, context: Context, sampler: Sampler, room: int
    ) -> Iterator[list[int]]:
        ids = list(context.ids)
        self.source.begin(ids)
        for _ in range(room):
            logits = model.table[ids[-1:]]
            (guess,) = self.source.draft(ids, 1, sampler) if self.source.kind(ids) is not None else (None,)
            if self.keeps(guess, logits, sampler):
                torch.rand(1, 1, dtype=torch.float64, generator=sampler._generators[0])
            ids += sampler(logits).tolist()
            yield ids[-1:]

    def keeps(self, guess: int | None, logits: torch.Tensor, sampler: Sampler) -> bool:
        return guess is not None and int(sampler.fork()(logits)) != guess


class OncePerRound(SecondChance):
    """A right rule in the same words: the number that is left out has not been looked at."""

    def keeps(self, guess: int | None, logits: torch.Tensor, sampler: Sampler) -> bool:
        return guess is not None


V, PROMPT = 5, [1, 1, 0, 1, 0, 2, 1, 2, 2, 1, 3, 0, 1]  # whatever follows its last id has followed it before
PARAMS = {"temperature": 1.2, "top_k": 3, "repetition_penalty": 1.6}
LOGITS = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 0.8


def chi_squared(make: type[Drafter], source: speculative.Source, N: int) -> tuple[float, int, int]:
    """Of N answers of 3 ids against their exact probabilities: (statistic, degrees of freedom, guesses right)."""
    exact = {}
    for path in itertools.product(range(V), repeat=3):
        p = 1.0
        for i, token in enumerate(path):
            # Asked to punish the prompt, and given the answer as one, it is in the state that the answer has led to.
            s = Sampler([SamplingParams(**PARAMS, penalize_prompt=True)], [path[:i]], banned=[4])
            values, ids = s.candidates(s.adjust(LOGITS[[(PROMPT[-1:] + list(path))[i]]]))
            assert ids is not None
            p *= float(torch.zeros(1, V).scatter(1, ids, values.softmax(-1))[0, token])
        exact[path] = p
    counts = dict.fromkeys(exact, 0)
    d = make(source)
    d.pace = Fixed(3)
    for seed in range(N):
        params = SamplingParams(**PARAMS, seed=seed)
        counts[tuple(stream(Chain(LOGITS), PROMPT, params, 3, banned=[4], drafter=d))] += 1  # type: ignore[arg-type]
    if any(counts[path] for path, p in exact.items() if p == 0):
        return math.inf, 0, 0
    cells = [(counts[path], N * p) for path, p in exact.items() if p > 0]
    return sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1, d.drafts.accepted


def sources() -> list[speculative.Source]:
    other = LOGITS + torch.randn(V, V, generator=torch.Generator().manual_seed(4)) * 0.7
    return [Lookup(), DraftModel(Chain(other))]  # type: ignore[arg-type]


@pytest.mark.parametrize("i", [0, 1])
def test_sampled_answers_follow_the_models_distribution(i: int) -> None:
    chi2, degrees, right = chi_squared(Drafter, sources()[i], 4000)
    assert degrees == 26  # three of four ids that are not banned pass top_k
    assert right > 500
    assert chi2 < 60  # P(chi2 > 60) = 2e-4 with 26 degrees of freedom, and the seeds are fixed


@pytest.mark.parametrize("i", [0, 1])
def test_that_test_finds_a_wrong_rule(i: int) -> None:
    assert 120 < chi_squared(SecondChance, sources()[i], 4000)[0] < math.inf
    assert chi_squared(OncePerRound, sources()[i], 4000)[0] < 60


# --- lookup ---


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=40), n=st.integers(1, 9), cuts=st.integers(1, 40))
def test_lookup_equals_the_naive_search(ids: list[int], n: int, cuts: int) -> None:
    lookup = Lookup()
    lookup.begin(ids[:cuts])
    for end in range(min(cuts, len(ids)), len(ids) + 1):  # the index grows with the ids
        kind = lookup.kind(ids[:end])
    want = None
    for size in NGRAMS:
        found = [at for at in range(size, len(ids)) if ids[at - size : at] == ids[-size:]]
        if size <= len(ids) and found:
            want, at = size, found[-1]
            break
    assert kind == want
    if want is not None:
        followed = list(ids)
        for _ in range(n):
            followed.append(followed[at])
            at += 1
        assert lookup.draft(ids, n, Sampler([GREEDY], [[]])) == followed[len(ids) :]


def test_lookup_forgets_the_answer_before() -> None:
    lookup = Lookup()
    lookup.begin([1, 2, 3, 4])
    assert lookup.kind([1, 2, 3, 4, 2, 3]) == 2
    lookup.begin([5, 6])
    assert lookup.kind([5, 6, 2, 3]) is None


# --- when it pays ---


def paced(seconds: dict[int, float], rounds: int = 5, prior: float = 0.5) -> Pace:
    pace = Pace(prior)
    for n, s in seconds.items():
        for _ in range(rounds):
            pace.passed(n, s)
    return pace


def judged(pace: Pace, right: int, wrong: int) -> Pace:
    """So many right and wrong guesses, mixed evenly."""
    for i in range(right + wrong):
        pace.judge(0, i * right % (right + wrong) < right)
    return pace


def test_pace_chooses_what_yields_most_per_second() -> None:
    flat = {0: 1.0, 3: 1.1, 7: 1.2, 15: 1.3}
    steep = {0: 1.0, 3: 1.3, 7: 2.2, 15: 3.7}
    assert judged(paced(flat), 60, 0).choose(0, 99) == 15
    assert judged(paced(flat), 60, 0).choose(0, 14) == 7
    assert judged(paced(flat), 60, 0).choose(0, 2) == 0
    assert judged(paced(steep), 14, 6).choose(0, 99) == 3
    assert judged(paced(steep), 60, 0).choose(0, 99) in (7, 15)
    assert judged(paced(steep), 0, 60).choose(0, 99) == 0
    assert judged(paced({0: 1.0, 3: 4.5, 7: 9.0, 15: 18.0}), 60, 0).choose(0, 99) == 0
    # Of guesses that are right half the time, 3 yield 1 + 1/2 + 1/4 + 1/8 ids a pass; MARGIN is what that must win.
    for seconds, n in ((1.875 / Pace.MARGIN - 0.01, 3), (1.875 / Pace.MARGIN + 0.01, 0)):
        assert paced({0: 1.0, 3: seconds}).choose(0, 3) == n


def test_pace_first_times_a_plain_pass_and_judges_kinds_apart() -> None:
    assert judged(Pace(0.9), 60, 0).choose(0, 99) == 0
    pace = judged(paced({0: 1.0}), 0, 60)
    assert pace.choose(0, 99) == 0
    assert pace.chance(0) < 0.1 < 0.5 == pace.chance(1)


def test_pace_forgets_timings_and_judgements() -> None:
    pace = judged(paced({0: 1.0, 3: 9.0}, prior=0.9), 60, 0)
    assert pace.choose(0, 3) == 0
    for _ in range(Pace.RECENT):
        pace.passed(0, 1.0)
    assert pace.choose(0, 3) == 3
    for _ in range(Pace.RECENT):
        pace.passed(3, 1.0)
    assert pace.choose(0, 3) == 0, "a plain pass is to be timed again"
    pace = judged(paced({0: 1.0}, prior=0.9), 0, 10)
    assert pace.choose(0, 3) == 0
    for _ in range(500):
        pace.passed(0, 1.0)
    assert pace.choose(0, 3) == 3


class Clocked(Chain):
    """A chain whose passes take time on a clock of its own; costs: rows -> seconds."""

    def __init__(self, logits: torch.Tensor, clock: list[float], costs: dict[int, float]) -> None:
        super().__init__(logits)
        self.config = LlamaConfig(2, 1, 1, 1, 2, len(logits), max_seq_len=1024)
        self.clock, self.costs = clock, costs

    def __call__(self, tokens: torch.Tensor, cache: KVCache, last_only: bool = False) -> torch.Tensor:
        self.clock[0] += self.costs.get(tokens.shape[1], 0.0)
        return super().__call__(tokens, cache, last_only)


def seconds_of(
    monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, costs: dict[int, float], source: str, draft_cost: float
) -> tuple[float, Drafts]:
    """Seconds of an answer of 600 ids, and what was drafted for it."""
    clock = [0.0]
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    draft = Clocked(logits.roll(1, 0), clock, dict.fromkeys(range(1, 99), draft_cost))
    if source == "right":
        draft.table = logits
    d = Drafter(Lookup() if source == "lookup" else DraftModel(draft))  # type: ignore[arg-type]
    params = SamplingParams(temperature=1.0, top_k=0, repetition_penalty=1.0, seed=1)
    list(stream(Clocked(logits, clock, costs), [1, 2, 3], params, 600, drafter=d))  # type: ignore[arg-type]
    return clock[0], d.drafts


COSTS = {1: 1.0, 4: 1.3, 8: 2.2, 16: 3.7}
PLAIN = 599.0
RANDOM, CYCLE = torch.zeros(40, 40), 20 * torch.eye(40).roll(1, 1)


@pytest.mark.parametrize(
    ("logits", "source", "draft_cost", "least", "most"),
    [
        (RANDOM, "lookup", 0.0, 0.0, 1.02),  # text that never repeats
        (CYCLE, "lookup", 0.0, 0.2, 0.4),  # text that always does
        (CYCLE, "wrong", 0.1, 1.0, 1.08),
        (CYCLE, "right", 1.0, 1.0, 1.08),  # a draft model that takes as long as the model
        (CYCLE, "right", 0.05, 0.2, 0.4),
    ],
)
def test_it_stops_where_it_does_not_pay_and_goes_on_where_it_does(
    monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, source: str, draft_cost: float, least: float, most: float
) -> None:
    seconds, _ = seconds_of(monkeypatch, logits, COSTS, source, draft_cost)
    assert least <= seconds / PLAIN <= most


def test_it_resumes_when_the_text_begins_to_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(3, 400, (60,), generator=generator).tolist()
    text = torch.randint(3, 400, (150,), generator=generator).tolist() + block + block * 3

    class Script(Clocked):
        def __call__(self, tokens: torch.Tensor, cache: KVCache, last_only: bool = False) -> torch.Tensor:
            at = cache.length
            super().__call__(tokens[:, :1] * 0, cache, last_only)
            clock[0] += self.costs[tokens.shape[1]] - self.costs[1]
            cache.advance(tokens.shape[1] - 1)
            rows = torch.tensor([[*text, *[0] * 99][at : at + tokens.shape[1]]])
            return torch.nn.functional.one_hot(rows, 400).float() * 20

    d = Drafter(Lookup())
    model = Script(torch.zeros(400, 400), clock, COSTS)
    got = list(stream(model, [1], GREEDY, len(text), drafter=d))  # type: ignore[arg-type]
    assert got == text
    assert clock[0] < 210 + 180 * 0.5
    assert d.drafts.drafted - d.drafts.accepted < 30


def test_the_first_draft_after_a_pause_is_not_timed(model: Counting) -> None:
    """A draft model then reads what it missed, which no later draft does."""

    class Planned(Fixed):
        def __init__(self, lengths: Sequence[int]) -> None:
            super().__init__(0)
            self.lengths, self.noted = list(lengths), []  # type: ignore[var-annotated]

        def choose(self, kind: int, most: int) -> int:
            return self.lengths.pop(0)

        def passed(self, drafted: int, seconds: float | None) -> None:
            self.noted.append((drafted, seconds is not None))

    d = Drafter(DraftModel(model))
    d.pace = pace = Planned([0, 3, 3, 7, 0, 0, 3, 3])
    tokens = stream(model, [1, 5, 9], GREEDY, 60, drafter=d)
    for _ in range(1 + 1 + 4 + 4 + 8 + 1 + 1 + 4 + 4):
        next(tokens)
    timed = [True, False, True, True, True, True, False, True]
    assert pace.noted == list(zip([0, 3, 3, 7, 0, 0, 3, 3], timed, strict=True))


def test_lengths_rise() -> None:
    assert list(LENGTHS) == sorted(set(LENGTHS))
