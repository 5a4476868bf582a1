"""When those who were turned away may come again: a place is kept for them at the time that they were told."""

from __future__ import annotations

import enum
import heapq
import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, replace

_EARLY_S = 0.75
_LATE_S = 5.0
_KEPT_WEIGHT = 0.1
_MOST = 4096
_TOGETHER_S = 0.5
_BUCKET_S = 4.0
_ROUNDING_S = 1e-9
_CHOICE = 2**-12  # of the distance of two places


class Patience(enum.Enum):
    """What a client said of how long it waits: ``ENOUGH`` for an answer that is begun when it was told to come, not for
    its end (``SOME``), or not even until then."""

    ENOUGH = enum.auto()
    SOME = enum.auto()
    NONE = enum.auto()

    @classmethod
    def of(cls, left_s: float, answering_s: float) -> Patience:
        """Of a client that has so much time left when it is to come, for an answer that takes so long."""
        if left_s <= 0:
            return cls.NONE
        return cls.ENOUGH if left_s > answering_s else cls.SOME


@dataclass(frozen=True, slots=True)
class Promise:
    """From ``due_s`` on there is room for ``work_s`` of a ``flow``'s work, at the ``place`` in the queue that it would
    have had."""

    due_s: float
    work_s: float
    patience: Patience
    flow: str = ""
    place: tuple[float, float, float] | None = None


class Promises:
    """One for each request that was turned away, by what it asks, until it comes again or is too late.

    Not all of them are kept, and it is learned how many are. Until it is, clients are expected to come who have said
    that they wait so long; for the others nothing is kept free, but nobody else is told to come at their time.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[int, Promise] = OrderedDict()
        self._by_due: list[tuple[float, int]] = []
        self._work_s: dict[Patience, defaultdict[int, float]] = {each: defaultdict(float) for each in Patience}
        self._flows: dict[str, dict[Patience, float]] = {}
        self._least_share = {Patience.ENOUGH: 1.0, Patience.SOME: 0.5, Patience.NONE: 0.0}
        self._most_share = dict.fromkeys(Patience, 1.0)
        self._kept: tuple[int, float, Promise | None] = 0, -math.inf, None

    def __len__(self) -> int:
        return len(self._open)

    def expects(self, now_s: float) -> bool:
        """Whether anybody may come who was told to."""
        return bool(self._open) or now_s - self._kept[1] < _TOGETHER_S

    def work_s(self, until_s: float = math.inf) -> float:
        """Seconds of work that is to be expected until then."""
        return sum(
            self._least_share[patience] * work_s
            for patience, by_due in self._work_s.items()
            for bucket, work_s in by_due.items()
            if bucket * _BUCKET_S <= until_s
        )

    def most_work_s(self, flow: str, work_s: float) -> float:
        """Seconds of work that may come again before more ``work_s`` of a flow: its own, and of each other one no more
        than it has then, as they take turns."""
        by_flow = {
            each: sum(self._most_share[patience] * part_s for patience, part_s in parts.items())
            for each, parts in self._flows.items()
        }
        own_s = by_flow.pop(flow, 0.0)
        return own_s + sum(min(other_s, own_s + work_s) for other_s in by_flow.values())

    def make(self, key: int, promise: Promise) -> None:
        """Promise it."""
        self._take_out(key)
        if len(self._open) >= _MOST:
            self._take_out(next(iter(self._open)))
        self._open[key] = promise
        heapq.heappush(self._by_due, (promise.due_s, key))
        if len(self._by_due) > 2 * _MOST:
            self._by_due = [(each.due_s, key) for key, each in self._open.items()]
            heapq.heapify(self._by_due)
        self._work_s[promise.patience][_bucket_of(promise)] += promise.work_s
        flow = self._flows.setdefault(promise.flow, dict.fromkeys(Patience, 0.0))
        flow[promise.patience] += promise.work_s

    def due_s(self, key: int) -> float | None:
        """When it was told to come again; None if nothing was promised."""
        promise = self._open.get(key)
        return None if promise is None else promise.due_s

    def is_due(self, key: int, now_s: float) -> bool:
        """Whether this is one that was told to come now.

        Several answers to one prompt come one right after the other, and were turned away with the first of them.
        """
        before, kept_s, _ = self._kept
        if key == before and now_s - kept_s < _TOGETHER_S:
            return True
        return self._due(key, now_s) is not None

    def _due(self, key: int, now_s: float) -> Promise | None:
        promise = self._open.get(key)
        return promise if promise is not None and now_s >= promise.due_s - _EARLY_S else None

    def settle(self, key: int, now_s: float, *, kept: bool) -> Promise | None:
        """One that was due came, and was let in, or had no time left; what it was promised, None if it was not due."""
        promise = self._due(key, now_s)
        if promise is None:
            return self._next_choice() if kept and key == self._kept[0] else None
        self._take_out(key)
        self._note(promise, kept=kept)
        if kept:
            self._kept = key, now_s, promise
        return promise

    def _next_choice(self) -> Promise | None:
        """The same promise, with the place right behind the last one."""
        key, kept_s, promise = self._kept
        if promise is not None and promise.place is not None:
            urgency, start_s, number = promise.place
            promise = replace(promise, place=(urgency, start_s, number + _CHOICE))
            self._kept = key, kept_s, promise
        return promise

    def expire(self, now_s: float) -> None:
        """Give up those that nobody came for."""
        while self._by_due and self._by_due[0][0] + _LATE_S <= now_s:
            due_s, key = heapq.heappop(self._by_due)
            promise = self._open.get(key)
            if promise is not None and promise.due_s == due_s:
                self._take_out(key)
                self._note(promise, kept=False)

    def _note(self, promise: Promise, *, kept: bool) -> None:
        for share in (self._least_share, self._most_share):
            share[promise.patience] += _KEPT_WEIGHT * (kept - share[promise.patience])

    def _take_out(self, key: int) -> None:
        promise = self._open.pop(key, None)
        if promise is not None:
            by_due, bucket = self._work_s[promise.patience], _bucket_of(promise)
            by_due[bucket] -= promise.work_s
            flow = self._flows[promise.flow]
            flow[promise.patience] -= promise.work_s
            if max(flow.values()) <= _ROUNDING_S:
                del self._flows[promise.flow]
            if by_due[bucket] <= _ROUNDING_S:
                del by_due[bucket]


def _bucket_of(promise: Promise) -> int:
    return int(promise.due_s / _BUCKET_S)
