"""The governor's thread on scripted readings and a cache that only remembers what it was told."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvpsi.governor import CacheStatus, Decision, Governor, LawSettings
from kvpsi.governor.law import MIB
from kvpsi.instrument import Instrument, Instruments, JsonLines
from kvpsi.kv import Release, Trim
from kvpsi.pressure import Reading
from kvpsi.pressure.fake import ManualClock, ScriptedSource, make_reading

LAW = LawSettings(low_bytes=64 * MIB, high_bytes=128 * MIB)
CAPACITY, FLOOR = 400 * MIB, 20 * MIB


class FakeCache:
    """Remembers calls; ``busy`` makes it refuse to shrink."""

    def __init__(self, used_bytes: int = 200 * MIB, *, busy: bool = False) -> None:
        self.used_bytes = used_bytes
        self.busy = busy
        self.limits: list[tuple[int, int | None]] = []
        self.given: list[int] = []
        self.interrupts = 0
        self.fail: Exception | None = None

    def status(self) -> CacheStatus:
        if self.fail is not None:
            raise self.fail
        return CacheStatus(CAPACITY, self.used_bytes, FLOOR, sum(self.given))

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        self.limits.append((limit_bytes, chunk_tokens))

    def give_now(self) -> int | None:
        if self.busy:
            return None
        given = max(0, self.used_bytes - self.limits[-1][0])
        self.used_bytes -= given
        self.given.append(given)
        return given

    def interrupt(self) -> bool:
        self.interrupts += 1
        return True


class Recorder(Instrument):
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def event(self, name: str, value: Any) -> None:
        self.events.append((name, value))

    def named(self, name: str) -> list[Any]:
        return [value for each, value in self.events if each == name]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def available(mib: int, time_s: float = 0.0) -> Reading:
    return make_reading(time_s=time_s, available_bytes=mib * MIB, limit_bytes=600 * MIB)


def test_the_gate_stands_before_start_returns() -> None:
    cache, source = FakeCache(), ScriptedSource([available(54)])
    governor = Governor(cache, source, settings=LAW)
    assert cache.limits == [] and source.reads == 0
    governor.monitor.start = lambda: None  # type: ignore[method-assign]
    assert governor.start() is governor
    assert cache.limits == [(190 * MIB, LAW.pressed_chunk_tokens)]
    assert cache.given == [10 * MIB]
    governor.stop()


def test_a_calm_machine_leaves_the_gate_open_and_prefill_whole() -> None:
    cache = FakeCache()
    governor = Governor(cache, ScriptedSource([available(580)]), settings=LAW)
    governor.on_reading(available(580))
    assert cache.limits == [(CAPACITY, None)]
    assert cache.given == [] and cache.interrupts == 0


@pytest.mark.parametrize(
    ("mib", "busy", "interrupts"), [(10, True, 1), (10, False, 0), (54, True, 0), (54, False, 0), (400, True, 0)]
)
def test_it_interrupts_only_what_is_busy_and_only_when_urgent(mib: int, busy: bool, interrupts: int) -> None:
    cache = FakeCache(busy=busy)
    governor = Governor(cache, ScriptedSource([available(mib)]), settings=LAW)
    governor.on_reading(available(mib))
    assert cache.interrupts == interrupts
    assert governor.decision is not None and governor.decision.urgent == (mib == 10)


def test_the_limit_is_set_before_the_cache_is_asked_to_shrink() -> None:
    calls: list[str] = []

    class Ordered(FakeCache):
        def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
            calls.append("limit")
            super().set_limit(limit_bytes, chunk_tokens)

        def give_now(self) -> int | None:
            calls.append("give")
            return super().give_now()

    Governor(Ordered(), ScriptedSource([available(54)]), settings=LAW).on_reading(available(54))
    assert calls == ["limit", "give"]


def test_the_thread_keeps_watching_and_ends_with_stop() -> None:
    cache, source = FakeCache(), ScriptedSource([available(580)] * 3 + [available(54, time_s=1.0)])
    before = set(threading.enumerate())
    with Governor(cache, source, settings=LAW) as governor:
        assert governor.monitor.running
        wait_until(lambda: bool(cache.given))
        mine = set(threading.enumerate()) - before
        assert len(mine) == 1
    assert not governor.monitor.running
    assert not any(thread.is_alive() for thread in mine)
    assert source.closed
    assert cache.limits[-1] == (CAPACITY, None)
    reads = source.reads
    time.sleep(0.15)
    assert source.reads == reads
    governor.stop()  # twice is fine
    assert cache.limits[-1] == (CAPACITY, None)


def test_a_source_that_fails_now_and_then_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    cache = FakeCache()
    source = ScriptedSource([available(580), OSError("gone"), OSError("gone"), available(54, time_s=1.0)])
    with caplog.at_level(logging.WARNING), Governor(cache, source, settings=LAW) as governor:
        wait_until(lambda: bool(cache.given))
        assert governor.monitor.error_count == 2
    assert sum("gone" in record.getMessage() for record in caplog.records) == 1


def test_a_cache_that_fails_is_reported_and_watched_on(caplog: pytest.LogCaptureFixture) -> None:
    cache, source = FakeCache(), ScriptedSource([available(580)] * 2 + [available(54, time_s=1.0)])
    with caplog.at_level(logging.WARNING):
        governor = Governor(cache, source, settings=LAW).start()
        cache.fail = RuntimeError("the cache broke")
        wait_until(lambda: governor.monitor.error_count >= 2)
        assert any("the cache broke" in record.getMessage() for record in caplog.records)
        assert governor.monitor.running
        cache.fail = None
        wait_until(lambda: bool(cache.given))
        governor.stop()
    assert source.closed


def test_a_source_that_fails_at_start_is_told_to_the_caller() -> None:
    cache = FakeCache()
    governor = Governor(cache, ScriptedSource([OSError("no pressure here")]), settings=LAW)
    with pytest.raises(OSError, match="no pressure here"):
        governor.start()
    assert not governor.monitor.running


def test_what_was_given_elsewhere_is_not_asked_for_twice() -> None:
    clock = ManualClock(10.0)
    cache = FakeCache()
    governor = Governor(cache, ScriptedSource([available(54)]), settings=LAW)
    governor.on_reading(available(54, clock()))
    for _ in range(15):
        clock.advance(0.1)
        governor.on_reading(available(54, clock()))  # the counter lags
    assert cache.given == [10 * MIB]
    clock.advance(3.0)
    governor.on_reading(available(54, clock()))
    assert len(cache.given) == 2


def test_the_instrument_sees_every_reading_and_each_change_of_mind_once() -> None:
    seen = Recorder()
    cache = FakeCache()
    governor = Governor(cache, ScriptedSource([available(580)]), settings=LAW, instrument=seen)
    script = [available(580), available(580), available(54), available(100), available(100), available(580)]
    for i, reading in enumerate(script):
        governor.on_reading(make_reading(time_s=10.0 * i, available_bytes=reading.headroom.available_bytes))
    assert len(seen.named("reading")) == len(script)
    decisions = seen.named("decision")
    assert all(isinstance(d, Decision) for d in decisions)
    assert [(d.pressed, d.give_bytes > 0) for d in decisions] == [(False, False), (True, True), (False, False)]


def test_the_stall_is_counted_from_the_start() -> None:
    def stalled(total_us: int) -> Reading:
        reading = available(580)
        some = replace(reading.memory.some, total_us=total_us)
        return replace(reading, memory=replace(reading.memory, some=some))

    governor = Governor(FakeCache(), ScriptedSource([available(580)]))
    assert governor.stall_s == 0.0
    governor.on_reading(stalled(5_000_000))
    assert governor.stall_s == 0.0
    governor.on_reading(stalled(7_500_000))
    assert governor.stall_s == 2.5
    governor.on_reading(stalled(0))  # another scope, whose counter is smaller
    assert governor.stall_s == 0.0


# -- instruments ----------------------------------------------------------------------------------------------------


def test_json_lines_are_one_valid_object_each() -> None:
    out = io.StringIO()
    lines = JsonLines(out, every_reading=1)
    lines.event("reading", available(54))
    lines.event("decision", Decision(5, 3, True, True, False, 'two\nlines "quoted" é'))
    lines.event("release", Release(8, 4, 0.25))
    lines.event("trim", Trim(10, 7, Release(8, 4, 0.25)))
    lines.event("distrust", "a reason")
    lines.event("refusal", {"wanted_cells": 3})
    written = out.getvalue().splitlines()
    assert len(written) == 6
    documents = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in written]
    assert [d["event"] for d in documents] == ["reading", "decision", "release", "trim", "distrust", "refusal"]
    assert all(abs(d["at_s"] - time.time()) < 60 for d in documents)
    assert documents[0]["headroom"]["available_bytes"] == 54 * MIB
    assert documents[1]["reason"] == 'two\nlines "quoted" é'
    assert documents[3]["release"] == {"requested_bytes": 8, "returned_bytes": 4, "seconds": 0.25}
    assert documents[4]["value"] == "a reason"


def test_json_lines_thin_out_readings_only() -> None:
    out = io.StringIO()
    lines = JsonLines(out, every_reading=10)
    for _ in range(25):
        lines.event("reading", available(54))
        lines.event("release", Release(8, 4, 0.25))
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    assert events.count("reading") == 2 and events.count("release") == 25


def test_json_lines_from_many_threads_do_not_mix() -> None:
    out = io.StringIO()
    lines = JsonLines(out, every_reading=1)
    threads = [
        threading.Thread(target=lambda: [lines.event("release", Release(8, 4, 0.25)) for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in out.getvalue().splitlines()]) == 400


def test_json_lines_have_no_figures_that_are_not_json() -> None:
    out = io.StringIO()
    JsonLines(out).event("release", Release(8, 4, float("inf")))
    json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_an_instrument_that_fails_disturbs_nobody_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Instrument):
        def event(self, name: str, value: Any) -> None:
            raise ValueError(f"cannot take {name} {value}")

    seen = Recorder()
    both = Instruments([Broken(), seen])
    with caplog.at_level(logging.WARNING):
        both.event("release", 1)
        both.event("release", 2)
    assert seen.named("release") == [1, 2]
    assert isinstance(both.last_error, ValueError)
    assert len(caplog.records) == 1 and "cannot take release 1" in caplog.records[0].getMessage()


def test_an_instrument_that_fails_does_not_keep_the_governor_from_giving() -> None:
    class Broken(Instrument):
        def event(self, name: str, value: Any) -> None:
            raise ValueError(name, value)

    cache = FakeCache()
    governor = Governor(cache, ScriptedSource([available(54)]), settings=LAW, instrument=Broken())
    governor.on_reading(available(54))
    assert cache.given == [10 * MIB]
