"""Who may begin, who waits, and who is told to come again."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from kvpsi.admission.costs import Costs
from kvpsi.admission.policies import Adaptive, AdmissionPolicy, Load, Verdict
from kvpsi.admission.promises import Patience, Promise, Promises
from kvpsi.admission.queue import FairQueue, Waits
from kvpsi.errors import KvpsiError

_LEAST_RETRY_S, _LONGEST_RETRY_S = 1.0, 600.0
_MARGIN = 1.2
_SERVED_SHARE = 0.6
_LEAST_AT_ONCE = 2.0  # so that nobody who is in a hurry keeps all others from being answered together
_DEADLINE_WEIGHT = 0.1
_DEADLINES_KNOWN_S = 60.0
_LOOK_S = 0.05


class TurnedAwayError(KvpsiError):
    """A request has to come again. ``retry_after_s`` is when there should be room, as things go now."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(TurnedAwayError):
    """There is no place for one more."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"Too many requests are waiting; try again in {math.ceil(retry_after_s)} s.", retry_after_s)


class TooLateError(TurnedAwayError):
    """It would not be answered before its deadline."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(
            f"The answer would come too late, as others wait before it; try again in {math.ceil(retry_after_s)} s, or "
            "allow more time.",
            retry_after_s,
        )


class WaitedTooLongError(TurnedAwayError):
    """The time passed in which it was to begin."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("The request waited too long for its turn; try again later.", retry_after_s)


class Asks(Waits, Protocol):
    """What asks to be admitted.

    Attributes:
        arrived_s: when it came.
        wanted_by_s: clock time at which its answer is worth nothing any more.
        n_prompt: tokens of its prompt.
        max_tokens: the most of its answer.
        fingerprint: the same when the same client asks the same again.
    """

    @property
    def arrived_s(self) -> float: ...
    @property
    def wanted_by_s(self) -> float: ...
    @property
    def n_prompt(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def fingerprint(self) -> Hashable: ...


T = TypeVar("T", bound=Asks)


@dataclass(slots=True)
class Turned:
    """How many were told to come again: the queue was ``full``, it would have been or was too ``late``, or a more
    urgent one took their place (``displaced``)."""

    full: int = 0
    late: int = 0
    displaced: int = 0


@dataclass(frozen=True, slots=True)
class Places:
    """What is begun: ``running`` of ``parallel`` places are taken, and ``work_s`` seconds of work are left in them."""

    running: int
    parallel: int
    work_s: float


class Admission(Generic[T]):
    """The queue, the limit and the promises, for one engine. Not thread-safe.

    Args:
        most_waiting: requests that may wait.
        policy: how many are answered at once.
        clock: seconds.
        places: what is begun.
        load: what the policy is to see.

    Attributes:
        costs: to be told what requests took.
        turned: counts who was told to come again.
        verdict: of the policy, the last one.
    """

    def __init__(
        self,
        most_waiting: int,
        policy: AdmissionPolicy | None,
        clock: Callable[[], float],
        places: Callable[[], Places],
        load: Callable[[], Load],
    ) -> None:
        self.most = most_waiting
        self.policy: AdmissionPolicy = policy or Adaptive()
        self.costs = Costs()
        self.turned = Turned()
        self.verdict: Verdict | None = None
        self._clock, self._places, self._load = clock, places, load
        self._queue: FairQueue[T] = FairQueue()
        self._promises = Promises()
        self._state: Any = None
        self._looked_s = -math.inf
        self._deadline_in_work: float | None = None
        self._deadline_at_s = -math.inf

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[T]:
        return iter(self._queue)

    @property
    def n_promises(self) -> int:
        """Requests that were told when to come again, and have not come yet."""
        return len(self._promises)

    @property
    def is_full(self) -> bool:
        """Whether the next one would be turned away."""
        return len(self._queue) >= self.most + self._free(self._places())

    # -- coming --------------------------------------------------------------------------------------------------

    def offer(self, request: T) -> T | None:
        """Let one wait; the one that has to give way to it, if the queue is full and that is less urgent.

        Raises:
            QueueFullError: there is no place for it.
            TooLateError: it would not be answered in time.
        """
        now_s = self._clock()
        self._promises.expire(now_s)
        work_s = self.costs.work_s(request.n_prompt, request.max_tokens)
        key = hash(request.fingerprint) if self._promises.expects(now_s) else 0
        expected = self._promises.is_due(key, now_s)
        if not expected:  # else little of its time is left
            self._note_deadline(now_s, request, work_s)
        places = self._places()
        refuses = self._is_too_late if expected else self._is_scarce
        if refuses(now_s, request, work_s, places):
            self.turned.late += 1
            self._promises.settle(key, now_s, kept=False)
            raise TooLateError(self._promise(now_s, request, work_s, places))
        # places that were promised are there beside those of the queue
        if len(self._queue) >= self.most * (2 if expected else 1) + self._free(places):
            return self._displace(now_s, request, work_s, places)
        kept = self._promises.settle(key, now_s, kept=True) if expected else None
        self._queue.put(request, work_s, kept.place if kept else None)
        return None

    def _note_deadline(self, now_s: float, request: T, work_s: float) -> None:
        """How often the work of a request fits into the time that it has, on average."""
        if request.wanted_by_s == math.inf or not self.costs.are_known:
            return
        times = (request.wanted_by_s - now_s) / work_s
        if times < 1:  # it would be too late even alone, so that others need not hurry for it
            return
        before = self._deadline_in_work
        self._deadline_in_work = times if before is None else before + _DEADLINE_WEIGHT * (times - before)
        self._deadline_at_s = now_s

    def _in_time(self, now_s: float) -> float:
        """Answers at once of which each is done in a good part of the time that clients give it."""
        if self._deadline_in_work is None or now_s - self._deadline_at_s > _DEADLINES_KNOWN_S:
            return math.inf
        return max(_LEAST_AT_ONCE, _SERVED_SHARE * self._deadline_in_work)

    def _displace(self, now_s: float, request: T, work_s: float, places: Places) -> T:
        """Put it in the place of the last one, if it comes before that."""
        last = self._queue.last()
        if last is None or self._queue.key_of(request) >= last.key or last.key[0] < 0:
            self.turned.full += 1
            raise QueueFullError(self._promise(now_s, request, work_s, places))
        self._queue.put(request, work_s)
        self._queue.discard(last.request)
        self.turned.displaced += 1
        return last.request

    def _wait_s(self, request: T, places: Places) -> float:
        """Until it could begin: what waits before it, and until the first place is free.

        Of n answers that share the engine, of which what is left lies evenly between nothing and all, the first ends
        after 2 / (n + 1) of the work that is left in all of them. Those for whom there are places begin at once.
        """
        n_waiting, n_free = len(self._queue), self._free(places)
        if n_waiting < n_free:
            return 0.0
        waiting_s = self._queue.work_s(request.urgency)
        beginning_s = waiting_s * n_free / n_waiting if n_waiting else 0.0
        return waiting_s - beginning_s + 2 * (places.work_s + beginning_s) / (places.running + n_free + 1)

    def _is_scarce(self, now_s: float, request: T, work_s: float, places: Places) -> bool:
        """Whether it would wait longer than it may."""
        if not self.policy.foresees or not self.costs.are_known:
            return False
        wait_s = self._wait_s(request, places)
        if wait_s == 0:
            return False
        allowed_s = self._allowed_s(now_s, request, work_s, places)
        if wait_s > allowed_s:
            return True
        # work that was promised a place comes first, but nobody is turned away for it while nobody waits
        return len(self._queue) > 0 and wait_s + self._promises.work_s(now_s + allowed_s) > allowed_s

    def _is_too_late(self, now_s: float, request: T, work_s: float, places: Places) -> bool:
        """Whether it would not be done in time even if it began at once, beside others."""
        if not self.policy.foresees or not (places.running or len(self._queue)):
            return False
        return self._until_begin_s(now_s, request, work_s, places) < 0

    def _until_begin_s(self, now_s: float, request: T, work_s: float, places: Places) -> float:
        """By when it has to begin, with a margin as nobody knows how long answers get."""
        at_once = min(self._limit(places), places.running + len(self._queue) + 1)
        return (request.wanted_by_s - now_s) / _MARGIN - work_s * at_once

    def _allowed_s(self, now_s: float, request: T, work_s: float, places: Places) -> float:
        """How long it may wait for its begin."""
        until_begin_s = self._until_begin_s(now_s, request, work_s, places)
        return max(0.0, min(until_begin_s, (request.begin_by_s - now_s) / _MARGIN))

    def _limit(self, places: Places) -> int:
        return places.parallel if self.verdict is None else max(1, self.verdict.limit)

    def _free(self, places: Places) -> int:
        """Places that nobody has yet."""
        return max(0, min(places.parallel, self._limit(places)) - places.running)

    def _promise(self, now_s: float, request: T, work_s: float, places: Places) -> float:
        """After how many seconds there will be a place for it, which is kept unless that is very long."""
        key = hash(request.fingerprint)
        due_s = self._promises.due_s(key)
        if due_s is not None and due_s > now_s:
            return due_s - now_s
        # after all who wait now, as who comes again may not make others late who were let in before
        wait_s = max(
            _LEAST_RETRY_S, work_s, self._wait_s(request, places) + self._promises.most_work_s(request.flow, work_s)
        )
        if wait_s > _LONGEST_RETRY_S:
            return _LONGEST_RETRY_S
        if self.policy.foresees:
            patience = Patience.of(request.wanted_by_s - now_s - wait_s, work_s * self._limit(places))
            place = self._queue.key_of(request)
            self._promises.make(key, Promise(now_s + wait_s, work_s, patience, request.flow, place))
        return wait_s

    # -- beginning -----------------------------------------------------------------------------------------------

    def limit(self) -> int:
        """How many answers may be begun now."""
        return self.look().limit

    def look(self) -> Verdict:
        """What the policy decides from time to time."""
        now_s = self._clock()
        if self.verdict is None or now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self._promises.expire(now_s)
            self.verdict, self._state = self.policy.decide(self._load(), self._state)
            most = self._in_time(now_s) if self.policy.foresees else math.inf
            if self.verdict.limit > most:
                self.verdict = Verdict(int(most), f"more than {int(most)} at once would not be done in time")
        return self.verdict

    def next_wait_s(self) -> float:
        """For how long the one that is to begin next has been waiting."""
        first = self._queue.first_ones(1)
        return self._clock() - first[0].arrived_s if first else 0.0

    def first_ones(self, count: int) -> list[T]:
        """So many that are to begin next, in their order."""
        return self._queue.first_ones(count)

    def take(self, request: T) -> bool:
        """Take out one that begins; whether it was there."""
        return self._queue.take(request)

    def discard(self, request: T) -> bool:
        """Take out one that is not wanted any more; whether it was there."""
        return self._queue.discard(request)

    def put_back(self, request: T) -> None:
        """Let one that had begun wait again, before all others."""
        self._queue.put_back(request, self.costs.work_s(request.n_prompt, request.max_tokens))

    def overdue(self) -> list[tuple[T, WaitedTooLongError]]:
        """Take out those that were not begun in time, and what they are to be told."""
        now_s = self._clock()
        found = []
        for request in self._queue.overdue(now_s):
            work_s = self.costs.work_s(request.n_prompt, request.max_tokens)
            self.turned.late += 1
            found.append((request, WaitedTooLongError(self._promise(now_s, request, work_s, self._places()))))
        return found

    def retry_after_s(self, request: T) -> float:
        """What one that had to give way is to be told."""
        work_s = self.costs.work_s(request.n_prompt, request.max_tokens)
        return self._promise(self._clock(), request, work_s, self._places())
