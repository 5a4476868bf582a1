"""The positions that a sequence holds, as a few ranges: enough to know what is missing and what may go."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvpsi.kv.cells import IntArray

_END = 1 << 31


class Positions:
    """A set of positions, kept as sorted, disjoint ranges [first, end) that do not touch."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges: list[tuple[int, int]] = []
        for first, end in ranges:
            self._add_range(first, end)

    def __len__(self) -> int:
        return sum(end - first for first, end in self.ranges)

    @property
    def first(self) -> int:
        """Smallest position, -1 if there is none."""
        return self.ranges[0][0] if self.ranges else -1

    @property
    def last(self) -> int:
        """Largest position, -1 if there is none."""
        return self.ranges[-1][1] - 1 if self.ranges else -1

    @property
    def gap(self) -> int:
        """First position that is missing."""
        return self.ranges[0][1] if self.ranges and self.ranges[0][0] == 0 else 0

    def add(self, pos: IntArray) -> None:
        """Take positions in, shape [n], in any order."""
        if not len(pos):
            return
        ordered = np.unique(pos)
        breaks = np.flatnonzero(np.diff(ordered) != 1)
        firsts = ordered[np.concatenate([[0], breaks + 1])]
        lasts = ordered[np.concatenate([breaks, [len(ordered) - 1]])]
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            self._add_range(first, last + 1)

    def _add_range(self, first: int, end: int) -> None:
        if first >= end:
            return
        apart = []
        for a, b in self.ranges:
            if b < first or a > end:
                apart.append((a, b))
            else:
                first, end = min(a, first), max(b, end)
        self.ranges = sorted([*apart, (first, end)])

    def remove(self, p0: int, p1: int) -> None:
        """Take [p0, p1) out; a negative bound is open, as in llama.cpp."""
        low, high = max(p0, 0), _END if p1 < 0 else p1
        if low >= high:
            return
        cut = [piece for a, b in self.ranges for piece in ((a, min(b, low)), (max(a, high), b))]
        self.ranges = [(a, b) for a, b in cut if a < b]

    def shift(self, p0: int, p1: int, by: int) -> None:
        """Move the positions in [p0, p1) by ``by``; what falls below zero is gone."""
        low, high = max(p0, 0), _END if p1 < 0 else p1
        moving = [(max(a, low), min(b, high)) for a, b in self.ranges]
        self.remove(p0, p1)
        for a, b in moving:
            if a < b:
                self._add_range(max(a + by, 0), b + by)

    def between(self, keep: int, tail: int, count: int) -> list[tuple[int, int]]:
        """The oldest ``count`` positions but for the first ``keep`` and last ``tail``, as ranges [first, end).

        Fewer if there are not so many.
        """
        skip, left = keep, min(count, len(self) - keep - tail)
        found = []
        for a, b in self.ranges:
            start = min(b, a + skip)
            skip -= start - a
            end = min(b, start + max(0, left))
            if start < end:
                found.append((start, end))
                left -= end - start
        return found
