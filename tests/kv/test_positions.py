"""Positions against a plain set."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from kvpsi.kv.rebuild.positions import Positions

BOUND = st.integers(-1, 40)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 30), st.integers(1, 12)),
        st.tuples(st.just("remove"), BOUND, BOUND),
        st.tuples(st.just("shift"), BOUND, BOUND, st.integers(-10, 10)),
    ),
    max_size=12,
)


def within(p: int, p0: int, p1: int) -> bool:
    return p >= max(p0, 0) and (p1 < 0 or p < p1)


def expand(ranges: list[tuple[int, int]]) -> list[int]:
    return [p for first, end in ranges for p in range(first, end)]


@given(CHANGES, st.integers(0, 8), st.integers(0, 8), st.integers(0, 30))
def test_behaves_like_a_set(changes: list[tuple], keep: int, tail: int, count: int) -> None:  # type: ignore[type-arg]
    held, truth = Positions(), set[int]()
    for kind, a, b, *by in changes:
        if kind == "add":
            held.add(np.arange(a, a + b, dtype=np.int32))
            truth |= set(range(a, a + b))
        elif kind == "remove":
            held.remove(a, b)
            truth = {p for p in truth if not within(p, a, b)}
        else:
            held.shift(a, b, by[0])
            moved = {p + by[0] for p in truth if within(p, a, b)}
            truth = {p for p in truth if not within(p, a, b)} | {p for p in moved if p >= 0}
    ordered = sorted(truth)
    assert expand(held.ranges) == ordered
    assert len(held) == len(ordered)
    assert held.last == max(ordered, default=-1)
    assert held.first == min(ordered, default=-1)
    assert held.gap == next(p for p in range(1000) if p not in truth)
    assert expand(held.between(keep, tail, count)) == ordered[keep : max(keep, len(ordered) - tail)][:count]


def test_takes_positions_in_any_order() -> None:
    held = Positions()
    held.add(np.array([7, 3, 4, 9, 8], dtype=np.int32))
    assert held.ranges == [(3, 5), (7, 10)]
