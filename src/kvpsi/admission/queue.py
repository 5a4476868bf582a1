"""Those who wait: the most urgent first, fair between those who are as urgent, and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

from kvpsi.admission.heap import MarkedHeap

URGENCIES = 8
"""Levels of urgency, 0 the most urgent; the scale of the ``Priority`` header (RFC 9218, section 4.1)."""
USUAL_URGENCY = 3
_FIRST_OF_ALL = -1.0
_MOST_FLOWS = 4096


Key: TypeAlias = tuple[float, float, float]
"""Urgency, virtual time of the begin in seconds, and a number, so that no two are the same."""


class Waits(Protocol):
    """What can stand in the queue.

    Attributes:
        urgency: 0 to 7, 0 the most urgent.
        flow: whose it is: whoever sends much waits behind whoever sends little.
        begin_by_s: clock time after which it is not worth beginning.
    """

    @property
    def urgency(self) -> int: ...
    @property
    def flow(self) -> str: ...
    @property
    def begin_by_s(self) -> float: ...


T = TypeVar("T", bound=Waits)


class Entry(Generic[T]):
    """A place in the queue: who stands there, its order, and the work that it will be, in seconds."""

    __slots__ = ("gone", "key", "request", "work_s")

    def __init__(self, request: T, key: tuple[float, ...], work_s: float) -> None:
        self.request, self.key, self.work_s = request, key, work_s
        self.gone = False


class FairQueue(Generic[T]):
    """Requests in the order in which they are to begin.

    Within a level of urgency it is start-time fair queueing: each request begins at the virtual time at which all
    earlier ones of its flow have had their share, and virtual time is that of the one that began last. (Goyal, Vin and
    Cheng, "Start-time Fair Queuing", SIGCOMM 1996.)
    """

    def __init__(self) -> None:
        self._entries: dict[T, Entry[T]] = {}
        self._order: MarkedHeap[Entry[T]] = MarkedHeap(_is_gone)
        self._reverse: MarkedHeap[Entry[T]] = MarkedHeap(_is_gone)
        self._by_deadline: MarkedHeap[Entry[T]] = MarkedHeap(_is_gone)
        self._virtual_s = [0.0] * URGENCIES
        self._had_s: dict[tuple[int, str], float] = {}
        self._work_s = [0.0] * URGENCIES
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: T) -> bool:
        return request in self._entries

    def __iter__(self) -> Iterator[T]:
        """All, in no particular order."""
        return iter(list(self._entries))

    def work_s(self, urgency: int = URGENCIES - 1) -> float:
        """Seconds of work of all that are as urgent or more so."""
        return max(0.0, sum(self._work_s[: urgency + 1]))

    def put(self, request: T, work_s: float, key: Key | None = None) -> Entry[T]:
        """Let one wait, at the place that it had before if a ``key`` tells that."""
        urgency, start_s, number = key or self.key_of(request)
        flow = (request.urgency, request.flow)
        self._had_s[flow] = max(start_s, self._had_s.get(flow, 0.0)) + work_s
        if len(self._had_s) > _MOST_FLOWS:
            self._forget_flows()
        return self._add(request, (urgency, start_s, number), work_s)

    def key_of(self, request: T) -> Key:
        """The order that it has if it comes now."""
        urgency = request.urgency
        start_s = max(self._virtual_s[urgency], self._had_s.get((urgency, request.flow), 0.0))
        self._number += 1
        return float(urgency), start_s, float(self._number)

    def put_back(self, request: T, work_s: float) -> Entry[T]:
        """Let one that had begun wait again, before all others."""
        self._number += 1
        return self._add(request, (_FIRST_OF_ALL, 0.0, -float(self._number)), work_s)

    def _add(self, request: T, key: tuple[float, ...], work_s: float) -> Entry[T]:
        entry = Entry(request, key, work_s)
        self._entries[request] = entry
        self._work_s[request.urgency] += work_s
        self._order.push(key, entry)
        self._reverse.push(tuple(-part for part in key), entry)
        self._number += 1
        self._by_deadline.push((request.begin_by_s, float(self._number)), entry)
        return entry

    def first_ones(self, count: int) -> list[T]:
        """So many that are to begin next, in their order."""
        return [entry.request for entry in self._order.first_ones(count)]

    def last(self) -> Entry[T] | None:
        """Who would begin after all others."""
        found = self._reverse.first()
        return None if found is None else found[1]

    def take(self, request: T) -> bool:
        """Take out one that begins; whether it was there."""
        entry = self._entries.get(request)
        if entry is not None and entry.key[0] >= 0:
            urgency = request.urgency
            self._virtual_s[urgency] = max(self._virtual_s[urgency], entry.key[1])
        return self._remove(request) is not None

    def discard(self, request: T) -> bool:
        """Take out one that is not wanted any more, which its flow does not pay for; whether it was there."""
        entry = self._remove(request)
        flow = (request.urgency, request.flow)
        if entry is not None and entry.key[0] >= 0 and flow in self._had_s:
            self._had_s[flow] -= entry.work_s
        return entry is not None

    def _remove(self, request: T) -> Entry[T] | None:
        entry = self._entries.pop(request, None)
        if entry is None:
            return None
        entry.gone = True
        self._work_s[request.urgency] -= entry.work_s
        if not self._entries:
            self._work_s = [0.0] * URGENCIES  # no rounding is carried on
        return entry

    def overdue(self, now_s: float) -> list[T]:
        """Take out those that are not worth beginning any more."""
        late = []
        while (found := self._by_deadline.first()) is not None and found[0][0] <= now_s:
            late.append(found[1].request)
            self.discard(found[1].request)
        return late

    def _forget_flows(self) -> None:
        """Who has had no more than others starts anew anyway; if that does not make room, all do."""
        self._had_s = {flow: had_s for flow, had_s in self._had_s.items() if had_s > self._virtual_s[flow[0]]}
        if len(self._had_s) > _MOST_FLOWS // 2:
            self._had_s.clear()


def _is_gone(entry: Entry[T]) -> bool:
    return entry.gone
