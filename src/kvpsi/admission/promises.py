"""When those who were turned away may come again: a place is kept for them at the time that they were told."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

_EARLY_S = 0.75
_LATE_S = 5.0
_KEPT_WEIGHT = 0.1
_MOST = 4096


@dataclass(frozen=True, slots=True)
class Promise:
    """From ``due_s`` on there is room for ``work_s`` of work; ``patient`` if the client said that it waits so long."""

    due_s: float
    work_s: float
    patient: bool


class Promises:
    """One for each request that was turned away, by what it asks, until it comes again or is too late.

    Not all of them are taken up, least of all those of clients who do not wait so long; what is kept free for them is
    the work that usually comes.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[int, Promise] = OrderedDict()
        self._by_due: list[tuple[float, int]] = []
        self._work_s: dict[bool, defaultdict[int, float]] = {kind: defaultdict(float) for kind in (True, False)}
        self._share_kept = {True: 1.0, False: 1.0}

    def __len__(self) -> int:
        return len(self._open)

    def work_s(self, until_s: float = math.inf) -> float:
        """Seconds of work that will probably come again until then."""
        return sum(
            self._share_kept[kind] * work_s
            for kind, by_second in self._work_s.items()
            for second, work_s in by_second.items()
            if second <= until_s
        )

    def make(self, key: int, promise: Promise) -> None:
        """Promise it."""
        self._take_out(key)
        if len(self._open) >= _MOST:
            self._take_out(next(iter(self._open)))
        self._open[key] = promise
        heapq.heappush(self._by_due, (promise.due_s, key))
        self._work_s[promise.patient][int(promise.due_s)] += promise.work_s

    def due_s(self, key: int) -> float | None:
        """When it was told to come again; None if nothing was promised."""
        promise = self._open.get(key)
        return None if promise is None else promise.due_s

    def take_up(self, key: int, now_s: float) -> bool:
        """Whether this is one that was told to come now; its promise is then kept."""
        promise = self._open.get(key)
        if promise is None or now_s < promise.due_s - _EARLY_S:
            return False
        self._take_out(key)
        self._share_kept[promise.patient] += _KEPT_WEIGHT * (1 - self._share_kept[promise.patient])
        return True

    def expire(self, now_s: float) -> None:
        """Give up those that nobody came for."""
        while self._by_due and self._by_due[0][0] + _LATE_S <= now_s:
            due_s, key = heapq.heappop(self._by_due)
            promise = self._open.get(key)
            if promise is not None and promise.due_s == due_s:
                self._take_out(key)
                self._share_kept[promise.patient] *= 1 - _KEPT_WEIGHT

    def _take_out(self, key: int) -> None:
        promise = self._open.pop(key, None)
        if promise is not None:
            by_second, second = self._work_s[promise.patient], int(promise.due_s)
            by_second[second] -= promise.work_s
            if by_second[second] <= 1e-9:
                del by_second[second]
