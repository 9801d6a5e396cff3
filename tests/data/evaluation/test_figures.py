"""A figure says where it stands to its best floor, what is contaminated, and survives JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.evaluation.figures import Figure, Scores, figure, protocol_hash, transformed


def test_the_best_floor_is_the_one_to_beat() -> None:
    ours = Scores.of([1] * 70 + [0] * 30)
    weak, strong = Scores.of([1] * 20 + [0] * 80), Scores.of([1] * 69 + [0] * 31)
    f = figure("x", ours, protocol="p", floors={"chance": 0.25, "weak": weak, "strong": strong})
    assert (f.floor_name, f.floor) == ("strong", 0.69)
    assert f.indistinguishable_from_floor
    assert figure("x", ours, protocol="p", floors={"chance": 0.25, "weak": weak}).standing == "better than floor"
    assert figure("x", weak, protocol="p", floors={"strong": strong}).standing == "worse than floor"


def test_a_lower_loss_is_better() -> None:
    tokens = [10.0] * 50
    low, high = Scores([1.0 + i % 3 for i in range(50)], tokens), Scores([20.0 + i % 3 for i in range(50)], tokens)
    f = figure("x", low, protocol="p", floors={"a": high, "b": 9.0}, better="lower", unit="nats")
    assert (f.standing, f.floor_name) == ("better than floor", "a")
    assert figure("x", high, protocol="p", floors={"a": low}, better="lower").standing == "worse than floor"


def test_contaminated_items_are_counted_and_taken_off() -> None:
    f = figure("x", Scores.of([1, 1, 0, 0]), protocol="p", contaminated=[True, False, False, False])
    assert (f.value, f.contaminated, f.clean_value) == (0.5, 1, pytest.approx(1 / 3))
    assert figure("x", Scores.of([1]), protocol="p").contaminated is None
    assert figure("x", Scores.of([1]), protocol="p", contaminated=[True]).clean_value is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=50), st.floats(0, 1))
def test_json_and_back(right: list[bool], chance: float) -> None:
    groups = ["ab"[i % 2] for i in range(len(right))]
    f = figure("x", Scores.of(right), protocol="p", floors={"chance": chance}, groups=groups)
    assert Figure.from_json(json.loads(json.dumps(f.to_json()))) == f
    assert f.interval[0] <= f.value <= f.interval[1]
    assert sum(n for _, n in f.groups.values()) == f.n


def test_perplexity_is_the_loss_transformed() -> None:
    loss = figure("nll", Scores([2.0, 4.0], [2.0, 2.0]), protocol="p", floors={"u": 3.0}, better="lower", unit="nats")
    f = transformed(loss, "ppl", math.exp, "score", "")
    assert (f.value, f.floor, f.standing) == (math.exp(1.5), math.exp(3.0), loss.standing)


def test_the_hash_is_of_the_content() -> None:
    assert protocol_hash({"a": 1, "b": 2}) == protocol_hash({"b": 2, "a": 1}) != protocol_hash({"a": 1, "b": 3})
