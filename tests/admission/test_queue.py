"""Who is next."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kvpsi.admission.queue import URGENCIES, FairQueue


@dataclass(eq=False)
class Item:
    name: str = ""
    urgency: int = 3
    flow: str = ""
    begin_by_s: float = math.inf
    tags: list[str] = field(default_factory=list)


def names(queue: FairQueue[Item], count: int = 1000) -> str:
    return "".join(item.name for item in queue.first_ones(count))


def test_first_come_first_served_and_back_in_front() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item(name) for name in "abc"]
    for item in items:
        queue.put(item, 1.0)
    assert names(queue) == "abc" and names(queue, 2) == "ab" and len(queue) == 3
    assert queue.take(items[0]) and not queue.take(items[0])
    queue.put_back(items[0], 1.0)
    assert names(queue) == "abc"
    assert queue.discard(items[1]) and items[1] not in queue and names(queue) == "ac"
    last = queue.last()
    assert last is not None and last.request is items[2]


def test_the_more_urgent_goes_first() -> None:
    queue: FairQueue[Item] = FairQueue()
    for name, urgency in (("c", 5), ("a", 0), ("d", 7), ("b", 3)):
        queue.put(Item(name, urgency), 1.0)
    assert names(queue) == "abcd"


def test_who_sends_much_waits_behind_who_sends_little() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(10):
        queue.put(Item("A", flow="greedy"), 1.0)
    for _ in range(2):
        queue.put(Item("b", flow="modest"), 1.0)
    assert names(queue) == "AbAb" + 8 * "A"
    for _ in range(4):
        queue.take(queue.first_ones(1)[0])
    queue.put(Item("c", flow="late"), 1.0)
    assert names(queue, 3) == "cAA" or names(queue, 3) == "AcA"


def test_shares_are_of_work_not_of_requests() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(20):
        queue.put(Item("L", flow="long"), 4.0)
        queue.put(Item("s", flow="short"), 1.0)
    begun = ""
    while begun.count("s") < 16:
        first = queue.first_ones(1)[0]
        begun += first.name
        queue.take(first)
    assert 3 <= begun.count("L") <= 5


def test_what_is_not_worth_beginning_any_more_is_taken_out() -> None:
    queue: FairQueue[Item] = FairQueue()
    late, early = Item("late", begin_by_s=1.0), Item("early", begin_by_s=10.0)
    queue.put(early, 1.0)
    queue.put(late, 1.0)
    assert queue.overdue(0.5) == []
    assert queue.overdue(1.0) == [late] and queue.first_ones(5) == [early]


def test_work_is_that_of_all_before() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item(urgency=urgency) for urgency in (0, 3, 3, 7)]
    for item in items:
        queue.put(item, 2.0)
    assert (queue.work_s(0), queue.work_s(3), queue.work_s()) == (2.0, 6.0, 8.0)
    for item in items:
        queue.discard(item)
    assert queue.work_s() == 0.0


@given(st.integers(0, 1 << 30))
def test_it_is_always_what_a_plain_list_would_be(seed: int) -> None:
    rng = random.Random(seed)
    queue: FairQueue[Item] = FairQueue()
    model: list[tuple[tuple[float, ...], Item]] = []
    for _ in range(120):
        what = rng.random()
        if what < 0.5:
            item = Item(
                urgency=rng.randrange(URGENCIES), flow=rng.choice("abc"), begin_by_s=rng.choice([5.0, math.inf])
            )
            model.append((queue.put(item, rng.random()).key, item))
        elif what < 0.8 and model:
            model.sort(key=lambda each: each[0])
            _, item = model.pop(0)
            assert queue.first_ones(1) == [item]
            assert queue.take(item)
        elif what < 0.9 and model:
            _, item = model.pop(rng.randrange(len(model)))
            assert queue.discard(item)
        elif what < 0.92:
            late = queue.overdue(6.0)
            assert set(map(id, late)) == {id(item) for _, item in model if item.begin_by_s <= 6.0}
            model = [each for each in model if each[1].begin_by_s > 6.0]
        model.sort(key=lambda each: each[0])
        assert len(queue) == len(model)
        assert queue.first_ones(3) == [item for _, item in model[:3]]
        last = queue.last()
        assert (last.request if last else None) is (model[-1][1] if model else None)
    assert set(map(id, queue)) == {id(item) for _, item in model}
