"""The simulated kernel's stall counter, against what a real one showed."""

from __future__ import annotations

import pytest

from kvpsi.pressure.fake import ManualClock
from kvpsi.sim.psi import StallCounter


def test_the_total_is_exact_and_the_average_lags() -> None:
    clock = ManualClock()
    stall = StallCounter(clock)
    for _ in range(64):  # half of the time, for eight seconds
        stall.begin()
        clock.advance(0.0625)
        stall.end()
        clock.advance(0.0625)
    assert stall.total_s == pytest.approx(4.0)
    assert stall.text().some.total_us == pytest.approx(4_000_000, abs=2)
    assert stall.text().some.avg10 == pytest.approx(0.27, abs=0.01), "as a real kernel said after 8 s"


def test_the_average_is_refreshed_every_two_seconds_only() -> None:
    clock = ManualClock()
    stall = StallCounter(clock)
    stall.begin()
    clock.advance(1.9)
    assert stall.text().some.avg10 == 0
    clock.advance(0.2)
    first = stall.text().some.avg10
    assert first == pytest.approx(0.18, abs=0.01)
    clock.advance(1.5)
    assert stall.text().some.avg10 == first
    clock.advance(600)
    assert stall.text().some.avg10 == pytest.approx(1.0, abs=1e-6)


def test_two_who_wait_at_the_same_time_count_once() -> None:
    clock = ManualClock()
    stall = StallCounter(clock)
    stall.begin()
    clock.advance(1)
    stall.begin()
    clock.advance(1)
    stall.end()
    clock.advance(1)
    stall.end()
    clock.advance(5)
    assert stall.total_s == 3.0


def test_what_ended_before_a_refresh_counts_in_it() -> None:
    clock = ManualClock()
    stall = StallCounter(clock)
    clock.advance(0.5)
    stall.begin()
    clock.advance(1.0)
    stall.end()
    clock.advance(10)
    assert stall.text().some.avg300 == pytest.approx(0.5 * 2 / 300, rel=0.05)
