"""Which whole pages lie in free cells: arithmetic on masks and addresses, without a loop over cells or planes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvpsi.kv.cells import BoolArray
from kvpsi.kv.layout import Plane
from kvpsi.kv.pages import PAGE_BYTES, Mapping

Addresses = npt.NDArray[np.int64]
_NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class FreeBytes:
    """Ranges of bytes of free cells, all arrays of shape [ranges].

    Those written to since the last release lie within [``slack_start``, ``slack_end``), which is empty (an end of 0)
    where there are none.
    """

    start: Addresses
    end: Addresses
    slack_start: Addresses
    slack_end: Addresses


def free_bytes(planes: Sequence[Plane], free: BoolArray, slack: BoolArray) -> FreeBytes:
    """Where the free cells of one stream lie that may hold pages.

    Args:
        planes: of the stream.
        free: which cells hold no token, shape [cells].
        slack: which of these were written to since the last release.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(np.int8)))
    first, end = edges[::2], edges[1::2]
    touched = np.flatnonzero(slack)
    low, high = np.searchsorted(touched, first), np.searchsorted(touched, end)
    has = high > low
    padded = np.append(touched, 0)  # what has no slack is not looked up
    slack_first, slack_end = padded[np.where(has, low, -1)], padded[np.where(has, high - 1, -1)] + 1
    # a range that is shorter than a page matters only where it may touch the next plane's
    at_edge = (first == 0) | (end == free.size)
    sizes = np.array([p.bytes_per_cell for p in planes], dtype=np.int64)
    plane, each = np.nonzero(at_edge | (has & ((end - first) * sizes[:, None] >= PAGE_BYTES)))
    base, size = np.array([p.base for p in planes], dtype=np.int64)[plane], sizes[plane]
    return FreeBytes(
        base + first[each] * size,
        base + end[each] * size,
        np.where(has[each], base + slack_first[each] * size, _NOWHERE),
        np.where(has[each], base + slack_end[each] * size, 0),
    )


def whole_pages_in(found: Iterable[FreeBytes]) -> list[Mapping]:
    """The whole pages of free bytes in which there is slack, in ascending order.

    Ranges that touch count as one, so that the page on their border goes, too. Nothing may lie between: without
    flash attention a few live cells are only a few bytes.
    """
    each = list(found)
    if not any(f.start.size for f in each):
        return []
    order = np.argsort(np.concatenate([f.start for f in each]), kind="stable")
    start, end, slack_start, slack_end = (
        np.concatenate([getattr(f, name) for f in each])[order] for name in ("start", "end", "slack_start", "slack_end")
    )
    begins = np.flatnonzero(np.concatenate([[True], start[1:] != end[:-1]]))
    joined_start, joined_end = start[begins], np.maximum.reduceat(end, begins)
    low, high = np.minimum.reduceat(slack_start, begins), np.maximum.reduceat(slack_end, begins)
    has = high > 0
    joined_start, joined_end, low, high = (a[has] for a in (joined_start, joined_end, low, high))
    # the pages that the slack touches, as far as they are free in whole
    first = -(-np.maximum(joined_start, low // PAGE_BYTES * PAGE_BYTES) // PAGE_BYTES) * PAGE_BYTES
    last = np.minimum(joined_end, -(-high // PAGE_BYTES) * PAGE_BYTES) // PAGE_BYTES * PAGE_BYTES
    return [Mapping(int(a), int(b)) for a, b in zip(first, last, strict=True) if b > a]
