"""When those who were turned away may come again: a place is kept for them at the time that they were told."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

_EARLY_S = 0.75
_LATE_S = 15.0
_KEPT_WEIGHT = 0.1
_MOST = 4096


@dataclass(frozen=True, slots=True)
class Promise:
    """From ``due_s`` on there is room for ``work_s`` of work."""

    due_s: float
    work_s: float


class Promises:
    """One for each request that was turned away, by what it asks, until it comes again or is too late."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, Promise] = OrderedDict()
        self._work_s = 0.0
        self._share_kept = 0.7

    def __len__(self) -> int:
        return len(self._open)

    @property
    def work_s(self) -> float:
        """Seconds of work that will probably come again: promises are not always taken up."""
        return max(0.0, self._work_s) * self._share_kept

    def make(self, key: int, due_s: float, work_s: float) -> None:
        """Promise it."""
        self._take_out(key)
        if len(self._open) >= _MOST:
            self._take_out(next(iter(self._open)))
        self._open[key] = Promise(due_s, work_s)
        self._work_s += work_s

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
        self._share_kept += _KEPT_WEIGHT * (1 - self._share_kept)
        return True

    def expire(self, now_s: float) -> None:
        """Give up the oldest that nobody came for."""
        while self._open:
            key, promise = next(iter(self._open.items()))
            if now_s < promise.due_s + _LATE_S:
                return
            self._take_out(key)
            self._share_kept -= _KEPT_WEIGHT * self._share_kept

    def _take_out(self, key: int) -> None:
        promise = self._open.pop(key, None)
        if promise is not None:
            self._work_s = self._work_s - promise.work_s if self._open else 0.0
