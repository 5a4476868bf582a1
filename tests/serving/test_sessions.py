"""Conversations that rest: found by what they share with a prompt, the least recently used first to go."""

from __future__ import annotations

import mmap
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvpsi.kv.spill import Spilled
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
    assert sessions.oldest(lambda s: s is not b) is a and sessions.drop(a) == 8192
    assert sessions.oldest() is b and sessions.drop(b) == 4096
    assert sessions.oldest() is pinned and sessions.drop(pinned) == 4096
    assert sessions.oldest() is None and sessions.n_bytes == 0 and sessions.dropped == 3


def test_memory_goes_back_at_once_unless_it_is_being_written() -> None:
    sessions = Sessions()
    a, b = session([1, 1]), session([2, 2])
    for each in (a, b):
        sessions.add(each)
    states = a.state, b.state
    assert states[0] is not None and states[1] is not None
    b.is_written = True
    assert sessions.unload(a) == 4096 and sessions.drop(b) == 4096
    assert states[0].closed and not states[1].closed
    assert sessions.n_bytes == 0 and sessions.n_parked == 1 and b.is_gone
    states[1].close()


def test_the_file_of_one_that_is_removed_is_removed() -> None:
    removed: list[Spilled] = []
    sessions = Sessions(removed.append)
    parked = session([1, 1])
    parked.spilled = Spilled(Path("1.state"), 4096, b"digest")
    sessions.add(parked)
    sessions.clear()
    assert removed == [parked.spilled]


def test_a_longer_one_takes_the_place_of_what_it_goes_on_from() -> None:
    sessions = Sessions()
    short, other = session([1, 2], pin="me"), session([1, 3])
    state = short.state
    longer = session([1, 2, 3])
    for each in (short, other, longer):
        sessions.add(each)
    assert set(sessions) == {other, longer} and state is not None and state.closed and longer.pin == "me"
    sessions.clear()
