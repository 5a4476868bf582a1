"""The queue: bounded, in order, and honest about how long it will take."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvpsi.serving.waiting import Drain, QueueFullError, Waiting


@dataclass(eq=False)
class Item:
    name: str
    deadline_s: float = float("inf")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_bounded_and_first_in_first_out() -> None:
    waiting: Waiting[Item] = Waiting(2, Clock())
    a, b, c = Item("a"), Item("b"), Item("c")
    waiting.put(a)
    waiting.put(b)
    with pytest.raises(QueueFullError) as caught:
        waiting.put(c)
    assert caught.value.retry_after_s > 0 and "try again" in str(caught.value)
    assert next(iter(waiting)) is a and waiting.discard(a)
    waiting.put_back(a)
    assert len(waiting) == 2 and list(waiting) == [a, b]
    assert waiting.discard(b)
    assert waiting.discard(a) and not waiting.discard(a) and len(waiting) == 0


def test_what_waited_too_long_is_taken_out() -> None:
    clock = Clock()
    waiting: Waiting[Item] = Waiting(5, clock)
    late, early = Item("late", clock.now + 1), Item("early", clock.now + 10)
    waiting.put(late)
    waiting.put(early)
    assert waiting.overdue() == []
    clock.now += 2
    assert waiting.overdue() == [late] and list(waiting) == [early]


def test_the_time_is_that_of_the_last_ends() -> None:
    clock = Clock()
    drain = Drain(clock)
    assert drain.seconds_for(3) == 1.0, "nothing is known yet"
    for _ in range(5):
        drain.note_end()
        clock.now += 2.0
    assert drain.seconds_for(1) == pytest.approx(2.5)  # 10 s since the first of five ends
    clock.now += 10
    assert drain.seconds_for(1) == pytest.approx(5.0), "it grows while nothing moves"
    assert drain.seconds_for(1000) == 60.0
