"""Where sentences end, among cells in any order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.kv.cells import EMPTY
from kvpsi.kv.segments import LEAST_TOKENS, MOST_TOKENS, segments_of


def segments(pos: list[int], ends: list[int], owners: list[list[int]] | None = None) -> list[int]:
    owner = np.zeros((len(pos), 2), dtype=np.bool_)
    for cell, mine in enumerate(owners or [[0]] * len(pos)):
        owner[cell, mine] = pos[cell] != EMPTY
    last = np.isin(np.array(pos), ends)
    return segments_of(np.array(pos, dtype=np.int32), owner, last).tolist()


def test_a_segment_ends_with_its_sentence_unless_that_is_short() -> None:
    assert segments(list(range(20)), [2, 8, 15]) == [0] * 9 + [1] * 7 + [2] * 4


def test_cells_may_lie_in_any_order_and_free_ones_belong_to_none() -> None:
    assert segments([7, 6, EMPTY, 0, 1, 2, 3, 4, 5], [5]) == [1, 1, -1, 0, 0, 0, 0, 0, 0]


def test_a_long_sentence_is_cut() -> None:
    found = segments(list(range(100)), [])
    assert [found.count(n) for n in sorted(set(found))] == [MOST_TOKENS, MOST_TOKENS, 100 - 2 * MOST_TOKENS]


def test_a_gap_and_another_sequence_begin_anew() -> None:
    assert segments([0, 1, 2, 10, 11], []) == [0, 0, 0, 1, 1]
    assert segments([0, 1, 0, 1], [], [[0], [0], [1], [1]]) == [0, 0, 1, 1]
    assert segments([0, 1, 2], [], [[0, 1], [0, 1], [1]]) == [0, 0, 1], "shared cells count with the first"


def test_nothing_is_held() -> None:
    assert segments([EMPTY, EMPTY], []) == [-1, -1]


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_every_token_belongs_to_one_of_at_most_so_many(ends: list[bool]) -> None:
    found = segments(list(range(len(ends))), [i for i, each in enumerate(ends) if each])
    sizes = np.bincount(found)
    assert (np.diff(found) >= 0).all() and sizes.max() <= MOST_TOKENS
    assert (sizes[:-1] >= LEAST_TOKENS).all(), "all but the last are long enough"
