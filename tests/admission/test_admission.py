"""Who is let in, who is turned away, and whether it was worth coming again."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import random
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest

from kvpsi.admission import Admission, Load, Places, QueueFullError, TooLateError
from kvpsi.admission.costs import Costs
from kvpsi.admission.policies import Adaptive, AdmissionPolicy, Static


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(eq=False)
class Asked:
    name: str = ""
    urgency: int = 3
    flow: str = ""
    arrived_s: float = 0.0
    begin_by_s: float = math.inf
    wanted_by_s: float = math.inf
    n_prompt: int = 0
    max_tokens: int = 100
    left_s: float = field(default=0.0, compare=False)

    @property
    def fingerprint(self) -> Hashable:
        return self.flow, self.name


class Engine:
    """Answers ``parallel`` at once, each as fast as its share of one second of work a second."""

    def __init__(self, parallel: int = 4, most: int = 8, policy: AdmissionPolicy | None = None) -> None:
        self.clock = Clock()
        self.parallel = parallel
        self.running: list[Asked] = []
        self.finished: list[tuple[Asked, float]] = []
        self.admission: Admission[Asked] = Admission(
            most, policy or Adaptive(), self.clock, lambda: self.places, lambda: self.load
        )
        self.admission.costs.note_answers(100, 1.0)  # 100 tokens a second, all answers together
        for _ in range(100):
            self.admission.costs.note_end(100)

    @property
    def places(self) -> Places:
        return Places(len(self.running), self.parallel, sum(asked.left_s for asked in self.running))

    @property
    def load(self) -> Load:
        return Load(self.clock.now_s, len(self.running), len(self.running), self.parallel, len(self.admission))

    def ask(self, **what: object) -> Asked:
        asked = Asked(arrived_s=self.clock.now_s, left_s=1.0, **what)  # type: ignore[arg-type]
        self.admission.offer(asked)
        return asked

    def busy(self) -> Engine:
        """The same, with nobody in the queue and an answer in every place."""
        for _ in range(self.parallel):
            self.ask()
            self.go_on(0.02)
        return self

    def go_on(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.01)):
            self.clock.now_s += 0.01
            for asked, _ in self.admission.overdue():
                asked.name += " overdue"
            while len(self.running) < min(self.parallel, self.admission.limit()) and len(self.admission):
                first = self.admission.first_ones(1)[0]
                self.admission.take(first)
                self.running.append(first)
            for asked in list(self.running):
                asked.left_s -= 0.01 / len(self.running)
                if asked.left_s <= 0:
                    self.running.remove(asked)
                    self.finished.append((asked, self.clock.now_s))


def test_the_queue_is_bounded_and_says_when_to_come_again() -> None:
    engine = Engine(most=3)
    for _ in range(4):
        engine.ask()
        engine.go_on(0.02)
    for _ in range(3):
        engine.ask()
    assert engine.admission.is_full
    with pytest.raises(QueueFullError, match="try again in") as caught:
        engine.ask()
    assert 1 <= caught.value.retry_after_s < 10
    assert engine.admission.turned.full == 1


def test_the_more_urgent_takes_the_place_of_the_last_one() -> None:
    engine = Engine(most=2).busy()
    first, second = Asked(), Asked(urgency=6)
    assert engine.admission.offer(first) is None and engine.admission.offer(second) is None
    with pytest.raises(QueueFullError):
        engine.admission.offer(Asked(urgency=7))
    assert engine.admission.offer(Asked(urgency=0)) is second
    assert engine.admission.retry_after_s(second) >= 1
    assert len(engine.admission) == 2 and engine.admission.turned.displaced == 1


def test_one_that_fills_the_queue_has_to_give_way_to_others() -> None:
    engine = Engine(most=4).busy()
    greedy = [Asked(flow="greedy") for _ in range(4)]
    for asked in greedy:
        engine.admission.offer(asked)
    assert engine.admission.offer(Asked(flow="modest")) is greedy[3]
    with pytest.raises(QueueFullError):
        engine.admission.offer(Asked(flow="greedy"))


def test_before_the_first_answer_work_is_guessed() -> None:
    engine = Engine(parallel=1, most=4)
    engine.admission.costs = Costs()
    engine.busy()
    greedy = [engine.ask(flow="greedy", name=str(number)) for number in range(3)]
    modest = engine.ask(flow="modest", wanted_by_s=engine.clock.now_s + 0.1)  # nobody knows that it will be too late
    assert engine.admission.first_ones(4) == [greedy[0], modest, *greedy[1:]]
    told = []
    for number in range(4):
        with pytest.raises(QueueFullError) as caught:
            engine.ask(flow="greedy", name=f"more {number}")
        told.append(caught.value.retry_after_s)
    assert all(b - a > 1 for a, b in itertools.pairwise(told)), "they do not come again all at once"


def test_who_was_there_before_stays_before_those_who_come_again() -> None:
    engine = Engine(parallel=1, most=2).busy()
    queued = [engine.ask(flow="a", name="1"), engine.ask(flow="b", name="2")]
    with pytest.raises(QueueFullError) as caught:
        engine.ask(flow="c", name="again")
    engine.clock.now_s += caught.value.retry_after_s  # all took longer than was thought
    again = engine.ask(flow="c", name="again")
    assert engine.admission.first_ones(3) == [*queued, again]


def test_what_cannot_be_answered_in_time_is_turned_away_at_once() -> None:
    engine = Engine(most=100)
    for _ in range(20):
        engine.ask()
        engine.go_on(0.01)
    with pytest.raises(TooLateError, match="too late") as caught:
        engine.ask(wanted_by_s=engine.clock.now_s + 10)
    assert caught.value.retry_after_s >= 5
    engine.ask(wanted_by_s=engine.clock.now_s + 60)
    plain = Engine(most=100, policy=Static())
    for _ in range(20):
        plain.ask()
        plain.go_on(0.01)
    plain.ask(wanted_by_s=plain.clock.now_s + 10)  # a policy that does not foresee takes it


def test_so_few_are_answered_at_once_that_they_are_done_in_time() -> None:
    engine = Engine(parallel=8, most=100)
    assert engine.admission.limit() == 8
    for _ in range(30):
        with contextlib.suppress(TooLateError):
            engine.ask(wanted_by_s=engine.clock.now_s + 8)
        engine.go_on(0.2)
    assert engine.admission.limit() == 4, "an answer takes a second alone, and may take 60 % of eight"
    for _ in range(60):
        with contextlib.suppress(TooLateError):
            engine.ask(wanted_by_s=engine.clock.now_s + 0.5)
        engine.go_on(0.2)
    assert engine.admission.limit() == 4, "those would be too late even alone, and slow down nobody"
    for _ in range(60):
        with contextlib.suppress(TooLateError):
            engine.ask(wanted_by_s=engine.clock.now_s + 2)
        engine.go_on(0.2)
    assert engine.admission.limit() == 2
    engine.go_on(70)
    assert engine.admission.limit() == 8


def test_an_idle_engine_turns_nobody_away() -> None:
    engine = Engine()
    engine.ask(wanted_by_s=engine.clock.now_s + 0.1)
    assert engine.admission.turned.late == 0


def test_who_waited_too_long_is_told() -> None:
    engine = Engine(parallel=1, policy=Static())
    engine.ask(name="long")
    late = engine.ask(name="late", begin_by_s=engine.clock.now_s + 0.5)
    engine.go_on(0.6)
    assert late.name == "late overdue"


def test_who_comes_again_when_told_gets_in_and_before_others() -> None:
    engine = Engine(most=4)
    for _ in range(8):
        engine.ask()
        engine.go_on(0.01)
    with pytest.raises(QueueFullError) as caught:
        engine.ask(name="again")
    with pytest.raises(QueueFullError) as sooner:
        engine.ask(name="again")
    assert sooner.value.retry_after_s == pytest.approx(caught.value.retry_after_s), "it is not told to wait longer"
    engine.go_on(caught.value.retry_after_s)
    while not engine.admission.is_full:
        engine.ask(name="newcomer")
    again = engine.ask(name="again")
    assert engine.admission.first_ones(1) == [again]


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_twice_the_load_is_answered_at_full_speed_and_promises_are_kept(seed: int, patient: bool) -> None:
    rng = random.Random(seed)
    engine, deadline_s = Engine(parallel=4, most=64), 20.0
    events = [(t, number) for number, t in enumerate(sorted(rng.uniform(0, 60) for _ in range(120)))]
    began, tries, honoured, kept, longest = engine.clock.now_s, {}, 0, 0, 0  # type: ignore[var-annotated]
    while engine.clock.now_s < began + 150:
        while events and began + events[0][0] <= engine.clock.now_s:
            _, number = heapq.heappop(events)
            again = number in tries
            tries[number] = tries.get(number, 0) + 1
            honoured += again
            try:
                engine.ask(name=str(number), wanted_by_s=engine.clock.now_s + deadline_s)
                kept += again
            except (QueueFullError, TooLateError) as error:
                if not again and (patient or error.retry_after_s < deadline_s):
                    heapq.heappush(events, (engine.clock.now_s - began + error.retry_after_s, number))
        longest = max(longest, len(engine.admission))
        engine.go_on(0.05)
    in_time = [ended for asked, ended in engine.finished if ended <= asked.arrived_s + deadline_s]
    assert longest <= 64
    assert sum(ended <= began + 60 for ended in in_time) >= 0.85 * 60, "goodput while twice as many come as can be"
    assert honoured >= 10 and kept >= 0.8 * honoured
    assert len(in_time) >= 0.9 * len(engine.finished)


def test_a_queue_of_none_still_lets_in_whom_there_are_places_for() -> None:
    engine = Engine(parallel=2, most=0)
    assert not engine.admission.is_full
    engine.ask(), engine.ask()
    with pytest.raises(QueueFullError):
        engine.ask()
    engine.go_on(0.02)
    assert engine.admission.is_full


def test_who_begins_at_once_is_not_taken_for_waiting() -> None:
    engine = Engine(parallel=8, most=100)
    for _ in range(8):  # all in one moment; together they take 8 s
        engine.ask(wanted_by_s=engine.clock.now_s + 15)
    with pytest.raises(TooLateError):
        engine.ask(wanted_by_s=engine.clock.now_s + 10)


def test_who_is_turned_away_does_not_pay_for_it() -> None:
    engine = Engine(most=2).busy()
    engine.ask(flow="others"), engine.ask(flow="others")
    for number in range(50):
        with contextlib.suppress(QueueFullError):
            engine.ask(flow="eager", name=str(number), urgency=4)
    engine.go_on(20)
    engine.busy()
    eager, other = engine.ask(flow="eager", urgency=4), engine.ask(flow="new", urgency=4)
    assert engine.admission.first_ones(2) == [eager, other]


def test_a_promise_holds_against_those_of_others_who_came_meanwhile() -> None:
    engine = Engine(most=4)
    for number in range(8):
        engine.ask(flow=f"first {number}")
        engine.go_on(0.01)
    with pytest.raises(QueueFullError) as caught:
        engine.ask(name="again", flow="mine")
    engine.go_on(caught.value.retry_after_s)
    number = 0
    while not engine.admission.is_full:
        number += 1
        engine.ask(flow=f"another {number}")
    again = [engine.ask(name="again", flow="mine") for _ in range(2)]  # two answers to one prompt
    assert engine.admission.first_ones(2) == again


def test_promises_that_nobody_keeps_are_bounded_and_keep_nobody_out() -> None:
    engine = Engine(most=64)
    slowest_s = 0.0
    for number in range(6000):
        try:
            engine.ask(name=str(number), wanted_by_s=engine.clock.now_s + 10)
        except TooLateError as error:
            slowest_s = max(slowest_s, error.retry_after_s)
        engine.go_on(0.02)
    assert slowest_s <= 600 and engine.admission.n_promises <= 4096
    assert len(engine.finished) >= 0.9 * 120, "nobody comes again, and the engine is busy all the same"
