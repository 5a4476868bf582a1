"""The law of threads, and the thread that runs it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.errors import UsageError
from kvpsi.governor.cpu import CpuGovernor
from kvpsi.governor.threads import ThreadSettings, ThreadState, decide_threads
from kvpsi.pressure.cpu import CpuReading
from kvpsi.pressure.reading import Stall, StallLine

TICK_S = 0.2


def look(
    at_s: float,
    others: float | None = 0.0,
    *,
    cpus: int = 2,
    quota: float | None = None,
    stall: float | None = 0.5,
    own: float = 1.0,
    throttled: float = 0.0,
) -> CpuReading:
    line = None if stall is None else Stall(StallLine(share=stall))
    return CpuReading(at_s, TICK_S, cpus, quota, own, others, throttled, line)


class Play:
    """Looks at a processor that others use more or less of, one tick after the other."""

    def __init__(self, settings: ThreadSettings | None = None) -> None:
        self.settings = settings or ThreadSettings()
        self.state = ThreadState()
        self.now_s = 0.0
        self.reason = ""

    def for_s(self, seconds: float, others: float | None = 0.0, **what: object) -> list[int]:
        threads = []
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            decision, self.state = decide_threads(look(self.now_s, others, **what), self.state, self.settings)  # type: ignore[arg-type]
            self.reason = decision.reason
            threads.append(decision.n_threads)
        return threads


def test_alone_all_processors_compute() -> None:
    assert set(Play().for_s(5, 0.05, stall=0.1)) == {2}
    assert set(Play().for_s(5, 0.05, cpus=8)) == {8}


def test_a_neighbour_takes_a_thread_away_within_half_a_second_and_gives_it_back() -> None:
    play = Play()
    play.for_s(2)
    # two threads and one neighbour on two processors: it gets less than a whole one, until a thread is gone
    beside = play.for_s(0.6, 0.7)
    assert beside[-1] == 1
    assert "others use" in play.reason
    assert set(play.for_s(5, 1.0)) == {1}
    back = play.for_s(3)
    assert back[-1] == 2
    assert back.index(2) * TICK_S >= play.settings.calm_hold_s


def test_two_neighbours_leave_one_thread_and_never_none() -> None:
    play = Play()
    assert play.for_s(2, 2.0, cpus=2)[-1] == 1
    assert play.for_s(2, 40.0, cpus=2)[-1] == 1
    assert Play().for_s(2, 3.0, cpus=8)[-1] == 5


def test_a_short_burst_and_a_little_use_change_nothing() -> None:
    play = Play()
    play.for_s(2)
    assert set(play.for_s(TICK_S, 1.0) + play.for_s(1, 0.0)) == {2}
    assert set(play.for_s(10, 0.3)) == {2}


def test_where_nobody_waits_nobody_is_in_the_way() -> None:
    play = Play()
    play.for_s(1)
    assert set(play.for_s(3, 1.0, stall=0.0)) == {2}
    assert play.for_s(1, 1.0, stall=0.3)[-1] == 1


def test_before_it_computes_it_knows_that_there_is_no_room() -> None:
    play = Play()
    play.for_s(1, 0.0, own=0.0)
    assert play.for_s(2, 2.0, own=0.0, stall=0.0)[-1] == 1


def test_without_psi_what_others_use_decides() -> None:
    assert Play().for_s(2, 1.5, stall=None)[-1] == 1


def test_without_any_figure_of_others_all_compute() -> None:
    assert set(Play().for_s(2, None, stall=None)) == {2}


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.0, 1), (1.9, 1), (2.0, 2), (16.0, 4)])
def test_a_quota_bounds_them_at_once(quota: float, threads: int) -> None:
    play = Play()
    assert play.for_s(1, cpus=4)[-1] == 4
    assert play.for_s(TICK_S, cpus=4, quota=quota)[-1] == threads


def test_a_quota_that_others_of_the_cgroup_use_up_takes_threads_away() -> None:
    play = Play()
    play.for_s(1, cpus=4, quota=3.0)
    assert play.for_s(TICK_S, cpus=4, quota=3.0, throttled=0.5)[-1] == 2
    assert "quota" in play.reason
    assert play.for_s(TICK_S, cpus=4, quota=3.0, throttled=0.5)[-1] == 1
    assert play.for_s(10, cpus=4, quota=0.5, throttled=1.0)[-1] == 1


def test_who_asked_for_fewer_gets_no_more() -> None:
    assert set(Play(ThreadSettings(most_threads=3)).for_s(3, cpus=8)) == {3}


def test_a_thread_that_comes_back_too_soon_waits_longer_each_time() -> None:
    play = Play()
    play.for_s(1)
    waits = []
    for _ in range(8):
        play.for_s(1, 1.0)
        calm = play.for_s(40)
        waits.append(calm.index(2) * TICK_S)
        # it is taken away again at once: another neighbour came
    assert waits[0] < 2.5
    quick = Play()
    quick.for_s(1)
    rises = []
    for _ in range(6):
        quick.for_s(1, 1.0)
        n = 0
        while quick.for_s(TICK_S)[-1] == 1:
            n += 1
        rises.append(n * TICK_S)
    assert rises[-1] > 3 * rises[0]
    assert rises[-1] <= quick.settings.longest_hold_s + 1


def test_one_that_stayed_for_long_comes_back_as_fast_as_the_first() -> None:
    play = Play()
    play.for_s(1)
    for _ in range(6):
        play.for_s(1, 1.0)
        while play.for_s(TICK_S)[-1] == 1:
            pass
    assert play.state.hold_s > 8
    play.for_s(60)  # it is all over
    play.for_s(1, 1.0)
    assert play.for_s(5).index(2) * TICK_S < 2.5


def test_a_quota_that_runs_out_leaves_no_more_than_others_do() -> None:
    play = Play()
    play.for_s(1, cpus=4, quota=4.0)
    assert play.for_s(TICK_S, 50.0, cpus=4, quota=4.0, throttled=0.5)[-1] == 1


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(1, 64), st.one_of(st.none(), st.floats(0.01, 100)), st.floats(0, 1)),
        max_size=40,
    ),
    st.integers(0, 64),
)
def test_whatever_happens_there_is_a_thread_and_never_more_than_may_run(
    ticks: list[tuple[float, int, float | None, float]], most: int
) -> None:
    state, settings = ThreadState(), ThreadSettings(most_threads=most)
    for number, (others, cpus, quota, share) in enumerate(ticks):
        reading = look(number * TICK_S, others, cpus=cpus, quota=quota, stall=share, throttled=share)
        decision, state = decide_threads(reading, state, settings)
        assert 1 <= decision.n_threads <= min(cpus, most or cpus, max(1, math.floor(quota or cpus)))
        assert decision.reason


@pytest.mark.parametrize(
    "wrong", [{"most_threads": -1}, {"tolerated_cpus": 1.0}, {"calm_hold_s": 0.0}, {"smoothing_s": 0.0}]
)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ThreadSettings(**wrong)  # type: ignore[arg-type]


class FakeEngine:
    def __init__(self) -> None:
        self.threads: list[int] = []
        self.interrupts = 0

    def set_threads(self, n_threads: int) -> None:
        self.threads.append(n_threads)

    def interrupt(self) -> bool:
        self.interrupts += 1
        return True


class Script:
    def __init__(self, readings: list[CpuReading]) -> None:
        self.readings = readings
        self.closed = False

    def read(self) -> CpuReading:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def close(self) -> None:
        self.closed = True


def test_the_governor_sets_what_changes_and_stops_a_decode_that_has_too_many() -> None:
    engine = FakeEngine()
    source = Script([look(0.2 * i, others) for i, others in enumerate([0.0, 0.0, 2.0, 2.0, *[0.0] * 20])])
    governor = CpuGovernor(engine, source)  # type: ignore[arg-type]
    for _ in range(24):
        governor.look()
    assert engine.threads == [2, 1, 2]
    assert engine.interrupts == 1
    assert governor.changes == 2
    governor.stop()
    governor.stop()
    assert source.closed


def test_a_source_that_fails_is_told_once_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Script):
        def read(self) -> CpuReading:
            if self.readings:
                return self.readings.pop()
            raise RuntimeError("gone")

    engine = FakeEngine()
    with CpuGovernor(engine, Broken([look(0.0)])) as governor:  # type: ignore[arg-type]
        deadline = 50
        while not caplog.records and deadline:
            governor._ended.wait(0.1)
            deadline -= 1
    assert engine.threads == [2]
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
