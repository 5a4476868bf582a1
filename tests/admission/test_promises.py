"""A place is kept for whoever was told to come again, as far as such clients usually do."""

from __future__ import annotations

import pytest

from kvpsi.admission.promises import Patience, Promise, Promises


def test_it_is_kept_from_its_time_on_and_once() -> None:
    promises = Promises()
    promises.make(1, Promise(10.0, 2.0, Patience.ENOUGH))
    assert promises.due_s(1) == 10.0 and promises.due_s(2) is None
    assert not promises.is_due(1, 5.0), "it is not time yet"
    promises.settle(1, 5.0, kept=True)
    assert promises.is_due(1, 9.5) and len(promises) == 1
    promises.settle(1, 9.5, kept=True)
    assert promises.is_due(1, 9.6), "the second answer to the same prompt"
    assert not promises.is_due(1, 10.5) and promises.expects(9.6) and not promises.expects(10.5)
    assert len(promises) == 0 and promises.work_s() == promises.most_work_s("", 1.0) == 0.0


def test_work_counts_when_it_is_due_and_by_the_share_that_comes() -> None:
    promises = Promises()
    promises.make(1, Promise(10.0, 2.0, Patience.ENOUGH))
    promises.make(2, Promise(50.0, 2.0, Patience.ENOUGH))
    assert promises.work_s(20.0) == pytest.approx(2.0) and promises.work_s() == pytest.approx(4.0)
    promises.make(2, Promise(12.0, 2.0, Patience.ENOUGH))
    assert len(promises) == 2 and promises.work_s(20.0) == pytest.approx(4.0), "one for each"
    for key in range(10, 40):
        promises.make(key, Promise(15.0, 1.0, Patience.NONE))
    promises.expire(25.0)
    promises.make(3, Promise(30.0, 2.0, Patience.NONE))
    promises.make(4, Promise(40.0, 2.0, Patience.ENOUGH))
    assert promises.work_s(35.0) < 0.2 < 1.0 < promises.work_s(), "those who do not wait so long never came"


def test_nobody_came() -> None:
    promises = Promises()
    for key in range(40):
        promises.make(key, Promise(10.0 + key % 7, 1.0, Patience.ENOUGH))
    before = promises.work_s() / 40
    promises.expire(10.0)
    assert len(promises) == 40
    promises.expire(100.0)
    assert len(promises) == 0 and promises.work_s() == pytest.approx(0.0)
    promises.make(1, Promise(110.0, 1.0, Patience.ENOUGH))
    assert promises.work_s() < before / 10, "then hardly anything is kept free any more"
    for key in range(40):
        promises.make(key, Promise(110.0, 1.0, Patience.ENOUGH))
        promises.settle(key, 110.0, kept=True)
    promises.make(1, Promise(120.0, 1.0, Patience.ENOUGH))
    assert promises.work_s() > 0.9


def test_nothing_is_kept_free_for_those_who_said_that_they_do_not_wait_until_some_came() -> None:
    promises = Promises()
    promises.make(1, Promise(10.0, 2.0, Patience.NONE))
    promises.make(2, Promise(10.0, 2.0, Patience.SOME))
    assert promises.work_s() == 1.0 and promises.most_work_s("", 1.0) == 4.0
    promises.settle(2, 10.0, kept=False)  # it came, but had no time left
    promises.settle(1, 10.0, kept=True)
    promises.make(1, Promise(20.0, 2.0, Patience.NONE))
    promises.make(2, Promise(20.0, 2.0, Patience.SOME))
    assert promises.work_s() == pytest.approx(2 * 0.1 + 2 * 0.45)


def test_they_are_not_kept_without_end() -> None:
    promises = Promises()
    for key in range(5000):
        promises.make(key, Promise(10.0, 1.0, Patience.ENOUGH))
    assert len(promises) == 4096 and promises.due_s(0) is None and promises.due_s(4999) == 10.0


def test_who_floods_the_server_is_told_to_wait_and_nobody_else() -> None:
    promises = Promises()
    for key in range(1000):
        promises.make(key, Promise(100.0, 3.0, Patience.NONE, "flood"))
    promises.make(1000, Promise(100.0, 2.0, Patience.NONE, "modest"))
    assert promises.most_work_s("flood", 3.0) == pytest.approx(3002.0)
    assert promises.most_work_s("modest", 3.0) == pytest.approx(2.0 + 5.0)
    assert promises.most_work_s("new", 3.0) == pytest.approx(3.0 + 2.0)
    promises.expire(200.0)
    assert promises.most_work_s("flood", 3.0) == 0.0
