"""The requests that wait: a bounded queue that knows how long it will take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from kvpsi.errors import KvpsiError

_REMEMBERED_ENDS = 16
_LONGEST_S = 60.0


class Waits(Protocol):
    """What can stand in the queue."""

    deadline_s: float
    """Clock time after which it is not worth beginning."""


T = TypeVar("T", bound=Waits)


class QueueFullError(KvpsiError):
    """Too many wait already. ``retry_after_s`` is when there should be room, as things go now."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"Too many requests are waiting; try again in {math.ceil(retry_after_s)} s.")
        self.retry_after_s = retry_after_s


class Drain:
    """How fast requests end, from the last few.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_REMEMBERED_ENDS)

    def note_end(self) -> None:
        """A request has ended."""
        self._ends.append(self._clock())

    def seconds_for(self, n_requests: int) -> float:
        """Until so many more have ended, a minute at most; 1.0 as long as too few have ended to tell.

        The time since the last end counts, so that the figure grows while nothing moves.
        """
        if len(self._ends) < 2:
            return 1.0
        span_s = max(self._clock() - self._ends[0], 1e-3)
        return min(_LONGEST_S, n_requests * span_s / (len(self._ends) - 1))


class Waiting(Generic[T]):
    """First in, first out; what has waited too long is taken out with `overdue`.

    Args:
        most: how many may wait.
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.most = most
        self.drain = Drain(clock)
        self._clock = clock
        self._queue: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[T]:
        return iter(self._queue)

    def put(self, request: T) -> None:
        """Let one wait.

        Raises:
            QueueFullError: there are as many as may wait already.
        """
        if len(self._queue) >= self.most:
            raise QueueFullError(self.drain.seconds_for(1))
        self._queue.append(request)

    def put_back(self, request: T) -> None:
        """Let one that had begun wait again, before all others."""
        self._queue.appendleft(request)

    def discard(self, request: T) -> bool:
        """Take one out that is not wanted any more; whether it was there."""
        try:
            self._queue.remove(request)
        except ValueError:
            return False
        return True

    def overdue(self) -> list[T]:
        """Take out those whose deadline has passed."""
        now = self._clock()
        late = [r for r in self._queue if r.deadline_s <= now]
        for request in late:
            self._queue.remove(request)
        return late
