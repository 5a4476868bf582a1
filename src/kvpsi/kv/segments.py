"""Sentences, as far as tokens tell: what belongs together and is best forgotten together."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from kvpsi.kv.cells import EMPTY, BoolArray, IntArray

LEAST_TOKENS = 6
MOST_TOKENS = 48


def segments_of(pos: IntArray, owner: BoolArray, ends: BoolArray) -> IntArray:
    """The number of the segment that each cell belongs to, -1 where it is free; shape [n_cells].

    A segment ends with a token that ends a sentence, as far as it has `LEAST_TOKENS` by then, before a gap, or with
    `MOST_TOKENS`. Cells that several sequences share count with the first of them.

    Args:
        pos: positions, ``EMPTY`` where free; shape [n_cells].
        owner: which sequences see a cell; shape [n_cells, n_seq].
        ends: whether a cell's token ends a sentence; shape [n_cells].
    """
    found = np.full(len(pos), -1, dtype=np.int32)
    held = np.flatnonzero((pos != EMPTY) & owner.any(axis=1))
    first_owner = owner[held].argmax(axis=1)
    order = held[np.lexsort((pos[held], first_owner))]
    if not order.size:
        return found
    follows = (np.diff(pos[order]) == 1) & (np.diff(owner[order].argmax(axis=1)) == 0)
    stops = [*(np.flatnonzero(~follows) + 1).tolist(), len(order)]
    last = np.flatnonzero(ends[order]).tolist()
    starts = np.zeros(len(order), dtype=np.int32)
    at = 0
    for stop in stops:
        while at < stop:
            starts[at] = 1
            sentence = bisect_left(last, at + LEAST_TOKENS - 1)
            end = last[sentence] + 1 if sentence < len(last) else stop
            at = min(end, at + MOST_TOKENS, stop)
    found[order] = np.cumsum(starts) - 1
    return found
