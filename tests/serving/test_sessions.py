"""Conversations that rest: found by what they share with a prompt, the least recently used first to go."""

from __future__ import annotations

import mmap

from hypothesis import given
from hypothesis import strategies as st

from kvpsi.serving.prefix import common_prefix
from kvpsi.serving.sessions import Session, Sessions


def session(tokens: list[int], n_bytes: int = 4096, pin: str | None = None) -> Session:
    return Session(tokens, mmap.mmap(-1, n_bytes), pin)


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30))
def test_the_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_the_one_that_shares_most_is_found() -> None:
    sessions = Sessions()
    other, near, best = session([9, 9]), session([1, 2, 9]), session([1, 2, 3, 9])
    for each in (other, near, best):
        sessions.add(each)
    match = sessions.best([1, 2, 3, 4, 5])
    assert match is not None and match.session is best and match.n_tokens == 3
    assert sessions.best([5, 1, 2]) is None
    sessions.clear()


def test_the_least_recently_used_goes_first_and_pinned_ones_last() -> None:
    sessions = Sessions()
    pinned, a, b = session([1, 1], 4096, "me"), session([2, 2], 8192), session([3, 3], 4096)
    for each in (pinned, a, b):
        sessions.add(each)
    assert sessions.n_bytes == 16384
    assert sessions.best([2, 2, 5]) is not None  # so that a was used after b
    assert sessions.drop_one(keeping=b) == 8192 and a.state.closed and not b.state.closed
    assert sessions.drop_one() == 4096 and b.state.closed
    assert sessions.drop_one() == 4096 and pinned.state.closed
    assert sessions.drop_one() == 0 and sessions.n_bytes == 0 and sessions.dropped == 3


def test_a_longer_one_takes_the_place_of_what_it_goes_on_from() -> None:
    sessions = Sessions()
    short, other = session([1, 2], pin="me"), session([1, 3])
    longer = session([1, 2, 3])
    for each in (short, other, longer):
        sessions.add(each)
    assert set(sessions) == {other, longer} and short.state.closed and longer.pin == "me"
    sessions.clear()
