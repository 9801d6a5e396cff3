"""llama/sampling.py: settings, filters against transformers', draws against their distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.sampling import NotFinite, Sampler, SamplingParams, _largest

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def params(**changes: Any) -> SamplingParams:
    """Every filter off but those given."""
    return SamplingParams(**{**OFF, "seed": 0, **changes})


def distribution(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities (B, V) that the sampler draws from."""
    values, ids = sampler.candidates(sampler.adjust(logits))
    p = values.softmax(-1)
    return p if ids is None else torch.zeros(logits.shape).scatter(1, ids, p)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
    ],
)
def test_settings_out_of_range_name_themselves(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*must be"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_defaults_are_chatdoctors() -> None:
    p = SamplingParams()
    assert (p.temperature, p.top_k, p.top_p, p.repetition_penalty) == (0.5, 50, 1.0, 1.1)


LOGITS = st.integers(2, 40).flatmap(
    # Distinct values: transformers keeps every token that ties with the k-th, this sampler exactly k.
    lambda v: st.permutations([i * 0.37 - 4 for i in range(v)])
)


@settings(max_examples=60, deadline=None)
@given(
    logits=LOGITS,
    prompt=st.lists(st.integers(0, 1), max_size=4),
    temperature=st.sampled_from([0.2, 0.5, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.11, 0.53, 0.91, 1.0]),
    min_p=st.sampled_from([0.0, 0.0531, 0.31]),
    penalty=st.sampled_from([0.8, 1.0, 1.1, 1.5]),
)
def test_filters_equal_transformers(
    logits: list[float], prompt: list[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    from transformers.generation import logits_process as hf

    p = params(
        temperature=temperature,
        top_k=top_k if top_k != 1 else 2,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        penalize_prompt=True,
    )
    x = torch.tensor([logits])
    ids = torch.tensor([prompt], dtype=torch.int64)
    want = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, x) if penalty != 1 and prompt else x
    want = hf.TemperatureLogitsWarper(temperature)(ids, want)
    if p.top_k:
        want = hf.TopKLogitsWarper(p.top_k)(ids, want)
    if top_p < 1:
        want = hf.TopPLogitsWarper(top_p)(ids, want)
    if min_p > 0:
        want = hf.MinPLogitsWarper(min_p)(ids, want)
    sampler = Sampler([p], [prompt])
    values, order = sampler.candidates(sampler.adjust(x))
    if order is not None:
        values = torch.full_like(x, -math.inf).scatter(1, order, values)
    assert torch.equal(values, want)


def test_penalty_spares_the_prompt_unless_asked() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    spared = Sampler([params(repetition_penalty=2.0)], [[0]])
    assert torch.equal(spared.adjust(logits), logits)
    asked = Sampler([params(repetition_penalty=2.0, penalize_prompt=True)], [[0, 2]])
    assert torch.equal(asked.adjust(logits), torch.tensor([[1.0, 1.0, -2.0]]))


def test_penalty_follows_the_answer() -> None:
    sampler = Sampler([params(temperature=0.0, repetition_penalty=2.0)], [[]])
    logits = torch.tensor([[2.0, 1.5, 1.2]])
    assert [int(sampler(logits)) for _ in range(4)] == [0, 1, 2, 0]  # 2.0 / 2 = 1.0 falls behind 1.5, then 1.2


def test_greedy_is_the_argmax_and_leaves_the_logits_alone() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sampler = Sampler([params(temperature=0.0)] * 3, [[]] * 3, banned=[int(logits[0].argmax())])
    got = sampler(logits)
    assert torch.equal(got[1:], logits[1:].argmax(-1))
    assert got[0] == logits[0].topk(2).indices[1]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_banned_and_padding_ids_never_come(changes: dict[str, Any]) -> None:
    logits = torch.full((1, 12), -3.0)
    logits[0, [0, 1, 10, 11]] = 30.0  # unknown, BOS and two rows beyond the tokenizer's vocabulary
    sampler = Sampler([params(**changes)], [[]], vocab_size=10, banned=[0, 1])
    assert {int(sampler(logits)) for _ in range(200)} <= set(range(2, 10))


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8}]
)
def test_draws_follow_the_distribution(changes: dict[str, Any]) -> None:
    N, V = 6_000, 12
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(3)) * 1.5
    sampler = Sampler([params(seed=1, **changes)], [[]])
    counts = torch.bincount(torch.stack([sampler(logits) for _ in range(N)])[:, 0], minlength=V).double()
    p = distribution(sampler, logits)[0].double()
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * N
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 40  # 11 degrees of freedom at most: P(chi2 > 40) = 4e-5, and the seed is fixed


def test_a_rows_draws_do_not_depend_on_its_neighbours() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, 100, generator=g)
    rows = [
        params(seed=1),
        params(seed=2, top_k=7, temperature=0.6),
        params(temperature=0.0),
        params(seed=4, top_p=0.8, repetition_penalty=1.3),
    ]
    together = Sampler(rows, [[]] * 4)
    alone = [Sampler([p], [[]]) for p in rows]
    for step in logits:
        assert together(step).tolist() == [int(s(row[None])) for s, row in zip(alone, step, strict=True)]


def test_same_seed_same_tokens_and_no_seed_fresh_ones() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler([params(seed=seed)], [[]])
        return [int(sampler(logits)) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("changes", [{}, {"top_k": 5, "repetition_penalty": 1.5}, {"temperature": 0.0}])
def test_a_fork_draws_the_same_and_is_not_noticed(changes: dict[str, Any]) -> None:
    logits = torch.randn(12, 1, 30, generator=torch.Generator().manual_seed(0))
    sampler, alone = (Sampler([params(**changes)], [[]], vocab_size=25, banned=[3]) for _ in range(2))
    for step in logits:
        fork = sampler.fork()
        ahead = [int(fork(step)) for _ in range(3)]
        assert ahead[0] == int(sampler.fork()(step)) == int(alone(step)) == int(sampler(step))


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampler = Sampler([params(seed=None)], [[]])
    sampler(torch.zeros(1, 10))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"temperature": 0.0}])
def test_damaged_logits_are_an_error(bad: float, changes: dict[str, Any]) -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        Sampler([params(**changes)], [[]])(logits)


def test_half_precision_logits_are_filtered_in_fp32() -> None:
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, _ = (s := Sampler([params(top_p=0.9)] * 2, [[]] * 2)).candidates(s.adjust(logits))
    assert values.dtype == torch.float32


def test_a_uniform_draw_of_almost_one_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2**-53, dtype=torch.float64))
    logits = torch.full((1, 7), 0.1)
    logits[0, 5:] = -math.inf
    assert int(Sampler([params()], [[]])(logits)) == 4


def test_rows_join_and_leave_without_touching_the_others() -> None:
    """Filters on and off side by side: every row draws what it draws alone."""
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3, seed=1, repetition_penalty=1.5),
        SamplingParams(top_k=0, seed=2, top_p=0.8, repetition_penalty=1.0),
        SamplingParams(top_k=0, seed=3, min_p=0.1, penalize_prompt=True),
    ]
    g = torch.Generator().manual_seed(0)
    steps = [torch.randn(4, 40, generator=g) * 3 for _ in range(12)]
    alone = []
    for i, params in enumerate(settings):
        one = Sampler([params], [[5, 6]], banned=[0, 1])
        alone.append([int(one(logits[i : i + 1])) for logits in steps])
    together = Sampler([], [], banned=[0, 1])
    rows: list[int] = []
    got: list[list[int]] = [[] for _ in settings]
    for turn in range(12 + 3 * 3):  # row i joins at turn 3 i and leaves after its twelve draws
        for i in list(rows):
            if len(got[i]) == 12:
                at = rows.index(i)
                together.leave(at)
                last = rows.pop()
                if at < len(rows):
                    rows[at] = last
        if turn % 3 == 0 and turn // 3 < 4:
            together.join(settings[turn // 3], [5, 6])
            rows.append(turn // 3)
        new = together(torch.stack([steps[len(got[i])][i] for i in rows])).tolist()
        for i, token in zip(rows, new, strict=True):
            got[i].append(token)
    assert got == alone


# --- penalties by count, log-probabilities ---


@settings(max_examples=60, deadline=None)
@given(
    presence=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency=st.sampled_from([-0.5, 0.0, 1.1]),
    repetition=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 5),
)
def test_presence_and_frequency_penalties_are_openais(
    presence: float, frequency: float, repetition: float, seed: int
) -> None:
    """logit - count * frequency - (count > 0) * presence, over the answer; a neighbour without them notices nothing."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(12, 2, 9, generator=g)
    p = params(
        seed=1,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        penalize_prompt=True,
    )
    sampler, neighbour = Sampler([p, params(seed=2)], [[3, 3, 4], []]), Sampler([params(seed=2)], [[]])
    counts = torch.zeros(9)
    for logits in steps:
        want = logits[0].clone()
        seen = (counts > 0) | torch.isin(torch.arange(9), torch.tensor([3, 4]))
        want = torch.where(seen, torch.where(want < 0, want * repetition, want / repetition), want)
        want = want - counts * frequency - (counts > 0) * presence
        assert torch.allclose(sampler.adjust(logits)[0], want, atol=1e-6)
        drawn = sampler(logits).tolist()
        assert drawn[1] == int(neighbour(logits[1:]))
        counts[drawn[0]] += 1


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_penalties_hit_what_each_row_has_seen_and_nothing_else(data: st.DataObject) -> None:
    """Rows that join, go on and leave, against the definition row by row."""
    V = 9
    sampler, rows = Sampler([], []), []  # of each row: its penalty, what it has seen
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["join", "join", "go on", "go on", "leave"]))
        if what == "join":
            penalty, asked = data.draw(st.sampled_from([1.0, 1.3, 2.0])), data.draw(st.booleans())
            prompt = data.draw(st.lists(st.integers(0, V - 1), max_size=6))
            sampler.join(params(repetition_penalty=penalty, penalize_prompt=asked), prompt)
            rows.append((penalty, set(prompt if asked else ())))
        elif rows and what == "leave":
            at = data.draw(st.integers(0, len(rows) - 1))
            sampler.leave(at)
            last = rows.pop()
            if at < len(rows):
                rows[at] = last
        elif rows:
            logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
            want = logits.clone()
            for i, (penalty, seen) in enumerate(rows):
                for token in seen:
                    want[i, token] *= penalty if want[i, token] < 0 else 1 / penalty
            torch.testing.assert_close(sampler.adjust(logits), want)
            for (_, seen), token in zip(rows, sampler(logits).tolist(), strict=True):
                seen.add(token)


@given(
    n=st.integers(1, 3000),
    k=st.integers(1, 60),
    rows=st.integers(1, 3),
    levels=st.sampled_from([1, 2, 30, 10**6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_the_largest_are_topks(n: int, k: int, rows: int, levels: int, seed: int) -> None:
    """Also where many are equal; -inf and NaN where topk has them."""
    x = torch.randint(levels, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
    x[:, ::7] = -math.inf
    x[0, seed % n] = math.nan if seed % 3 == 0 else 0.5
    k = min(k, n)
    values, ids = _largest(x, k)
    torch.testing.assert_close(values, x.topk(k).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, x.gather(1, ids), rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [2.1, -2.1, math.nan, "much", None, True])
def test_penalties_out_of_range_name_themselves(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*must be"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 21, 1.0, True])
def test_top_logprobs_out_of_range_name_themselves(value: object) -> None:
    with pytest.raises(ValueError, match=r"^top_logprobs is .*must be"):
        SamplingParams(top_logprobs=value)  # type: ignore[arg-type]


def test_logprobs_are_the_models_own_before_any_filter() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 3
    rows = [
        params(temperature=0.0, logprobs=True, top_logprobs=3),
        params(seed=1),
        params(seed=2, temperature=1.7, top_k=2, repetition_penalty=2.0, logprobs=True),
        params(seed=3, top_logprobs=4),
    ]
    sampler = Sampler(rows, [[]] * 4, vocab_size=28, banned=[int(logits[0].argmax())])
    tokens = sampler(logits).tolist()
    told = sampler.logprobs(logits, tokens)
    assert set(told) == {0, 2}
    p = logits[:, :28].log_softmax(-1)
    for row, said in told.items():
        assert said.token == tokens[row]
        assert said.logprob == pytest.approx(float(p[row, tokens[row]]), abs=1e-6)
        values, ids = p[row].topk(rows[row].top_logprobs)
        assert [i for i, _ in said.top] == ids.tolist()
        assert [v for _, v in said.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_logits_are_left_as_they_were() -> None:
    """After a choice with a ban and every penalty, and after one that came to nothing."""
    settings = [params(repetition_penalty=1.5, penalize_prompt=True), params(top_k=3, repetition_penalty=2.0)]
    for changes in ({}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}):
        sampler = Sampler([*settings, params(**changes)], [[4, 5]] * 3, vocab_size=18, banned=[0, 1])
        logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
        before = logits.clone()
        for _ in range(5):
            sampler(logits)
            assert torch.equal(logits, before)
        logits[1, 7] = before[1, 7] = math.inf
        with pytest.raises(NotFinite):
            sampler(logits)
        assert torch.equal(logits, before)


def test_damaged_rows_are_named_before_any_draws() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    sampler, other = (Sampler([params(seed=i) for i in range(3)], [[]] * 3) for _ in range(2))
    damaged = logits.clone()
    damaged[1, 4] = math.nan
    with pytest.raises(NotFinite) as error:
        sampler(damaged)
    assert error.value.rows == [1]
    assert torch.equal(sampler(logits), other(logits))
