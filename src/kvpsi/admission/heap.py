"""A heap from which anything may be taken out at the price of a mark."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_LEAST_SWEPT = 64


class MarkedHeap(Generic[T]):
    """The item with the smallest key first; items that are gone are passed over, and swept out once they are most.

    Every operation takes O(log n) steps, sweeping spread over the items that it takes out.

    Args:
        is_gone: whether an item was taken out.
    """

    def __init__(self, is_gone: Callable[[T], bool]) -> None:
        self._is_gone = is_gone
        self._items: list[tuple[tuple[float, ...], T]] = []
        self._sweep_at = _LEAST_SWEPT

    def push(self, key: tuple[float, ...], item: T) -> None:
        """Add one; no two keys are the same."""
        if len(self._items) >= self._sweep_at:
            self._items = [each for each in self._items if not self._is_gone(each[1])]
            heapq.heapify(self._items)
            self._sweep_at = max(_LEAST_SWEPT, 2 * len(self._items))
        heapq.heappush(self._items, (key, item))

    def first(self) -> tuple[tuple[float, ...], T] | None:
        """The smallest key and its item; None if there is none."""
        while self._items and self._is_gone(self._items[0][1]):
            heapq.heappop(self._items)
        return self._items[0] if self._items else None

    def first_ones(self, count: int) -> list[T]:
        """So many items with the smallest keys, in their order."""
        taken: list[tuple[tuple[float, ...], T]] = []
        while len(taken) < count and self.first() is not None:
            taken.append(heapq.heappop(self._items))
        for each in taken:
            heapq.heappush(self._items, each)
        return [item for _, item in taken]
