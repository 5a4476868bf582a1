from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.pressure import (
    ManualClock,
    Monitor,
    MonitorSettings,
    Reading,
    ScriptedSource,
    make_reading,
    next_interval_s,
    open_trigger_from_environment,
)

GB = 10**9
SETTINGS = MonitorSettings()
CALM = make_reading(available_bytes=50 * GB, limit_bytes=64 * GB)


def wait_for(condition: object, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@pytest.mark.parametrize(
    ("available", "slope", "share", "alert", "interval_s"),
    [
        (50 * GB, 0.0, 0.0, False, 1.0),
        (1 * GB, 0.0, 0.0, False, 0.25),
        (1 * GB, -4e9, 0.0, False, 0.0625),
        (1 * GB, +4e9, 0.0, False, 0.25),
        (0.1 * GB, 0.0, 0.0, False, 0.025),
        (0, 0.0, 0.0, False, 0.01),
        (-1 * GB, -1e9, 1.0, True, 0.01),
        (50 * GB, 0.0, 0.5, False, 0.1),
        (50 * GB, 0.0, 0.0, True, 0.1),
    ],
)
def test_interval(available: float, slope: float, share: float, alert: bool, interval_s: float) -> None:
    reading = make_reading(available_bytes=int(available), limit_bytes=64 * GB, slope_bytes_s=slope, memory_share=share)
    assert next_interval_s(reading, SETTINGS, alert=alert) == pytest.approx(interval_s)


@given(
    available=st.integers(-10 * GB, 100 * GB),
    less=st.integers(0, 10 * GB),
    slope=st.floats(-1e11, 1e11),
    share=st.floats(0, 1),
    alert=st.booleans(),
)
def test_less_headroom_never_waits_longer(available: int, less: int, slope: float, share: float, alert: bool) -> None:
    def interval(bytes_left: int, alerted: bool) -> float:
        reading = make_reading(available_bytes=bytes_left, slope_bytes_s=slope, memory_share=share)
        return next_interval_s(reading, SETTINGS, alert=alerted)

    assert 0.01 <= interval(available - less, True) <= interval(available, alert) <= 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"min_interval_s": 0.0}, {"max_interval_s": 0.001}, {"worst_case_bytes_s": 0.0}, {"looks": 0.5}],
)
def test_settings_are_validated(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        MonitorSettings(**wrong)


def test_tick_without_a_thread() -> None:
    clock, seen = ManualClock(), []
    tight = make_reading(available_bytes=GB // 10)
    monitor = Monitor(ScriptedSource([CALM, tight]), on_reading=seen.append, clock=clock)
    assert monitor.latest is None
    assert monitor.tick() == 1.0
    assert monitor.tick() == pytest.approx(0.025)
    assert monitor.latest is tight
    assert seen == [CALM, tight]


def test_errors_are_recorded_and_do_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Reading) -> None:
        raise RuntimeError("listener")

    seen: list[Reading] = []
    monitor = Monitor(ScriptedSource([OSError("source"), CALM]), on_reading=fail)
    unsubscribe = monitor.subscribe(seen.append)
    assert monitor.tick() == SETTINGS.stalled_interval_s
    assert isinstance(monitor.last_error, OSError)
    monitor.tick()
    assert str(monitor.last_error) == "listener"
    assert seen == [CALM], "the other listener is still told"
    assert monitor.error_count == 2
    unsubscribe()
    monitor.tick()
    assert seen == [CALM]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"], "repeats are not logged"


def test_thread_starts_wakes_and_stops() -> None:
    source = ScriptedSource([CALM])
    monitor = Monitor(source)
    monitor.wake()
    assert monitor.stop(), "stopping what never ran is fine"
    with monitor:
        assert wait_for(lambda: source.reads == 1)
        assert monitor.running
        monitor.start()
        monitor.wake()
        assert wait_for(lambda: source.reads == 2, 0.9), "woken before the calm second was over"
    assert not monitor.running
    assert not source.closed, "the source stays the caller's"
    monitor.wake()
    with monitor:
        assert wait_for(lambda: source.reads == 3)


def test_thread_survives_errors() -> None:
    source = ScriptedSource([OSError("a"), OSError("b"), CALM])
    with Monitor(source, settings=MonitorSettings(stalled_interval_s=0.01)) as monitor:
        assert wait_for(lambda: monitor.latest is CALM)
        assert monitor.error_count == 2


def test_a_listener_may_stop_its_monitor() -> None:
    monitor = Monitor(ScriptedSource([CALM]))
    monitor.subscribe(lambda _: monitor.stop())
    monitor.start()
    assert wait_for(lambda: not monitor.running)
    assert monitor.tick_count == 1


def test_no_descriptors_and_threads_are_left_behind() -> None:
    monitor = Monitor(ScriptedSource([CALM]))
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("cannot count descriptors here")
    before = sum(1 for _ in descriptors.iterdir())
    threads = threading.active_count()
    for _ in range(20):
        with monitor:
            pass
    assert sum(1 for _ in descriptors.iterdir()) == before
    assert threading.active_count() == threads


def test_a_trigger_wakes_it_and_keeps_it_alert(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no fifos here")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    trigger, reason = open_trigger_from_environment({"MEMORY_PRESSURE_WATCH": str(fifo)})
    assert trigger is not None, reason
    source = ScriptedSource([CALM])
    settings = MonitorSettings(stalled_interval_s=0.02, alert_s=0.2)
    with trigger, Monitor(source, trigger=trigger, settings=settings):
        assert wait_for(lambda: source.reads == 1)
        fifo.write_bytes(b"x")
        assert wait_for(lambda: source.reads >= 5, 0.9), "polls fast for a while after the trigger"


def test_a_trigger_closed_under_it_is_dropped(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no fifos here")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    trigger, _ = open_trigger_from_environment({"MEMORY_PRESSURE_WATCH": str(fifo)})
    assert trigger is not None
    source = ScriptedSource([CALM])
    with Monitor(source, trigger=trigger) as monitor:
        assert wait_for(lambda: source.reads == 1)
        trigger.close()
        monitor.wake()
        assert wait_for(lambda: source.reads >= 2)
        assert monitor.running


def test_scripted_source_and_clock() -> None:
    source = ScriptedSource([CALM])
    assert source.read() is source.read()
    assert source.reads == 2
    assert source.describe() == ["A script of 1 readings."]
    source.close()
    assert source.closed
    with pytest.raises(ValueError, match="at least one"):
        ScriptedSource([])
    clock = ManualClock(5.0)
    assert clock.advance(2.0) == 7.0 == clock()
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1.0)
