"""llama/prefixes.py: the longest beginning is found, what is kept stays within its bounds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.cache import Part
from llama.prefixes import Prefixes, as_array, shared

IDS = st.lists(st.integers(0, 2), max_size=8)


def part(ids: list[int]) -> Part:
    """Numbers that say which ids they are of, and scales."""
    t = torch.tensor([sum(3**i * (a + 1) for i, a in enumerate(ids[: n + 1])) for n in range(len(ids))]).float()
    return t.view(1, 1, -1, 1).expand(2, 2, -1, 3), t.view(1, 1, -1).expand(2, 2, -1)


@given(a=IDS, b=IDS)
def test_shared_is_the_common_beginning(a: list[int], b: list[int]) -> None:
    n = shared(as_array(a), as_array(b))
    assert a[:n] == b[:n]
    assert a[n : n + 1] != b[n : n + 1] or not a[n:] or not b[n:]


@settings(max_examples=200)
@given(kept=st.lists(IDS, max_size=12), asked=IDS, most=st.integers(0, 5), limit=st.integers(0, 900))
def test_the_longest_beginning_of_what_is_kept(kept: list[list[int]], asked: list[int], most: int, limit: int) -> None:
    prefixes = Prefixes(most, limit)
    for ids in kept:
        prefixes.keep(as_array(ids), part(ids))
        assert prefixes.nbytes == sum(k.nbytes for k in prefixes._kept) <= limit
        assert len(prefixes) <= most
    held = [k.ids.tolist() for k in prefixes._kept]
    assert all(ids in kept for ids in held)
    assert not any(a != b and b[: len(a)] == a for a in held for b in held)
    n, found = prefixes.longest(as_array(asked))
    assert n == max((shared(as_array(ids), as_array(asked)) for ids in held), default=0)
    if n:
        assert all(torch.equal(a, b) for a, b in zip(found, part(asked[:n]), strict=True))
    if most > 0 and limit == 900 and kept and kept[-1]:
        assert prefixes.longest(as_array(kept[-1]))[0] == len(kept[-1])


def test_what_was_of_use_longest_ago_goes() -> None:
    prefixes = Prefixes(2, 10**6)
    for ids in ([1, 1], [2, 2]):
        prefixes.keep(as_array(ids), part(ids))
    assert prefixes.longest(as_array([1, 1, 5]))[0] == 2
    prefixes.keep(as_array([3, 3]), part([3, 3]))
    assert [prefixes.longest(as_array([i, i]))[0] for i in (1, 2, 3)] == [2, 0, 2]


def test_a_copy_is_kept() -> None:
    prefixes, source = Prefixes(2, 10**6), torch.ones(2, 2, 4, 3)
    prefixes.keep(np.arange(4), (source,))
    source.zero_()
    assert torch.equal(prefixes.longest(np.arange(4))[1][0], torch.ones(2, 2, 4, 3))
    prefixes.clear()
    assert prefixes.longest(np.arange(4))[0] == prefixes.nbytes == len(prefixes) == 0
