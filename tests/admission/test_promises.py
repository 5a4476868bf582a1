"""A place is kept for whoever was told to come again, as far as such clients usually do."""

from __future__ import annotations

import pytest

from kvpsi.admission.promises import Promise, Promises


def test_it_is_kept_from_its_time_on_and_once() -> None:
    promises = Promises()
    promises.make(1, Promise(10.0, 2.0, patient=True))
    assert promises.due_s(1) == 10.0 and promises.due_s(2) is None
    assert not promises.take_up(1, 5.0), "it is not time yet"
    assert promises.take_up(1, 9.5) and not promises.take_up(1, 10.0)
    assert len(promises) == 0 and promises.work_s() == 0.0


def test_work_counts_when_it_is_due_and_by_the_share_that_comes() -> None:
    promises = Promises()
    promises.make(1, Promise(10.0, 2.0, patient=True))
    promises.make(2, Promise(50.0, 2.0, patient=True))
    assert promises.work_s(20.0) == pytest.approx(2.0) and promises.work_s() == pytest.approx(4.0)
    promises.make(2, Promise(12.0, 2.0, patient=True))
    assert len(promises) == 2 and promises.work_s(20.0) == pytest.approx(4.0), "one for each"
    for key in range(10, 40):
        promises.make(key, Promise(15.0, 1.0, patient=False))
    promises.expire(25.0)
    promises.make(3, Promise(30.0, 2.0, patient=False))
    promises.make(4, Promise(40.0, 2.0, patient=True))
    assert promises.work_s(35.0) < 0.2 < 1.0 < promises.work_s(), "those who do not wait so long never came"


def test_nobody_came() -> None:
    promises = Promises()
    for key in range(40):
        promises.make(key, Promise(10.0 + key % 7, 1.0, patient=True))
    before = promises.work_s() / 40
    promises.expire(10.0)
    assert len(promises) == 40
    promises.expire(100.0)
    assert len(promises) == 0 and promises.work_s() == pytest.approx(0.0)
    promises.make(1, Promise(110.0, 1.0, patient=True))
    assert promises.work_s() < before / 10, "then hardly anything is kept free any more"
    for key in range(40):
        promises.make(key, Promise(110.0, 1.0, patient=True))
        assert promises.take_up(key, 110.0)
    promises.make(1, Promise(120.0, 1.0, patient=True))
    assert promises.work_s() > 0.9


def test_they_are_not_kept_without_end() -> None:
    promises = Promises()
    for key in range(5000):
        promises.make(key, Promise(10.0, 1.0, patient=True))
    assert len(promises) == 4096 and promises.due_s(0) is None and promises.due_s(4999) == 10.0
