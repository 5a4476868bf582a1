from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.pressure.rates import CounterRate, Slope


def test_counter_rate() -> None:
    rate = CounterRate()
    assert rate.update(0.0, 100) == 0.0
    assert rate.update(0.5, 150) == pytest.approx(100.0)
    assert rate.update(0.5, 999) == pytest.approx(100.0), "no time went by: the last rate stands"
    assert rate.update(1.5, 10) == 0.0, "the counter went backwards"
    assert rate.update(2.5, 20) == pytest.approx(10.0)


@given(
    steps=st.lists(st.floats(0.001, 2.0), min_size=2, max_size=60),
    slope=st.floats(-1e10, 1e10),
    start=st.floats(0, 1e13),
)
def test_a_straight_line_has_its_slope_however_irregular_the_ticks(
    steps: list[float], slope: float, start: float
) -> None:
    meter, now_s = Slope(), 1e6
    assert meter.update(now_s, start) == 0.0
    for step in steps:
        now_s += step
        found = meter.update(now_s, start + slope * (now_s - 1e6))
    assert found == pytest.approx(slope, rel=1e-3, abs=2e4)


def test_a_jump_in_a_short_tick_after_a_long_one_is_damped() -> None:
    slope = Slope()
    slope.update(0.0, 0.0)
    slope.update(1.0, 0.0)
    assert -6e9 < slope.update(1.01, -1e9) < 0.0, "not the -100 GB/s of the last 10 ms"


def test_old_samples_are_forgotten() -> None:
    slope = Slope(span_s=0.4)
    for tick in range(20):
        slope.update(tick * 0.1, 1000.0 if tick < 10 else 0.0)
    assert slope.update(2.0, 0.0) == 0.0


def test_repeated_time_and_reset() -> None:
    slope = Slope()
    slope.update(1.0, 5.0)
    assert slope.update(1.0, 9.0) == 0.0
    assert slope.update(2.0, 10.0) == pytest.approx(1.0)
    slope.reset()
    assert slope.update(3.0, 0.0) == 0.0


def test_a_burst_of_reads_keeps_few_samples() -> None:
    slope = Slope(span_s=0.4)
    for tick in range(5000):
        found = slope.update(tick * 0.0005, tick * 0.5)
    assert found == pytest.approx(1000.0)
    assert len(slope._samples) < 60
