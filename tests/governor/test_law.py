"""The control law as a function: what must hold for every reading, cache and memory of the past."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvpsi.errors import UsageError
from kvpsi.governor.law import MIB, CacheStatus, Decision, LawSettings, State, decide, record_given
from kvpsi.pressure import Headroom, Reading
from kvpsi.pressure.fake import make_reading

GIB = 1 << 30


def on_cgroup(reading: Reading) -> Reading:
    room = replace(reading.headroom, scope="cgroup:/x")
    return replace(reading, headroom=room, headrooms=(room,))


@st.composite
def caches(draw: st.DrawFn) -> CacheStatus:
    capacity = draw(st.integers(1, 4 * GIB))
    return CacheStatus(capacity, draw(st.integers(0, capacity)), draw(st.integers(0, capacity)))


@st.composite
def readings(draw: st.DrawFn) -> Reading:
    limit = draw(st.integers(1 * MIB, 64 * GIB))
    reading = make_reading(
        time_s=draw(st.floats(0, 1e6)),
        available_bytes=draw(st.integers(-GIB, limit)),
        limit_bytes=limit,
        slope_bytes_s=draw(st.floats(-4e9, 4e9)),
        memory_share=draw(st.floats(0, 1)),
    )
    return on_cgroup(reading) if draw(st.booleans()) else reading


@st.composite
def laws(draw: st.DrawFn) -> LawSettings:
    low = draw(st.none() | st.integers(0, GIB))
    high = draw(st.none() | st.integers(low or 0, 4 * GIB)) if low is not None else None
    least = draw(st.floats(0.01, 1))
    return LawSettings(low_bytes=low, high_bytes=high, min_step_share=least, max_step_share=draw(st.floats(least, 1)))


@st.composite
def states(draw: st.DrawFn, cache: CacheStatus, now_s: float) -> State:
    return State(
        limit_bytes=draw(st.none() | st.integers(min(cache.floor_bytes, cache.capacity_bytes), cache.capacity_bytes)),
        calm_since_s=draw(st.none() | st.floats(max(0.0, now_s - 10), now_s)),
        grown_at_s=max(0.0, now_s - draw(st.floats(0, 2))),
        given=tuple(
            (max(0.0, now_s - draw(st.floats(0, 4))), draw(st.integers(0, GIB)), draw(st.integers(-GIB, GIB)))
            for _ in range(draw(st.integers(0, 3)))
        ),
    )


@dataclasses.dataclass(frozen=True)
class Tick:
    reading: Reading
    cache: CacheStatus
    state: State
    law: LawSettings

    def decide(self) -> tuple[Decision, State]:
        return decide(self.reading, self.cache, self.state, self.law)

    @property
    def low(self) -> int:
        return self.law.low_for(self.reading.headroom.limit_bytes)

    @property
    def high(self) -> int:
        return self.law.high_for(self.reading.headroom.limit_bytes)

    @property
    def predicted(self) -> float:
        """Headroom a look ahead, without credit for what was given."""
        room = self.reading.headroom
        return room.available_bytes + min(0.0, room.slope_bytes_s) * self.law.lookahead_s


@st.composite
def ticks(draw: st.DrawFn, *, remembers: bool = True) -> Tick:
    reading, cache = draw(readings()), draw(caches())
    state = draw(states(cache, reading.time_s)) if remembers else State()
    return Tick(reading, cache, state, draw(laws()))


@given(ticks())
def test_the_limit_lies_between_floor_and_capacity(tick: Tick) -> None:
    decision, after = tick.decide()
    assert tick.cache.floor_bytes <= decision.limit_bytes <= tick.cache.capacity_bytes
    assert after.limit_bytes is not None and 0 <= after.limit_bytes <= tick.cache.capacity_bytes


@given(ticks())
def test_a_step_is_never_larger_than_its_share_and_never_goes_below_the_floor(tick: Tick) -> None:
    decision, _ = tick.decide()
    used, floor = tick.cache.used_bytes, tick.cache.floor_bytes
    assert 0 <= decision.give_bytes <= tick.law.max_step_share * used
    assert decision.give_bytes <= max(0, used - floor)
    if decision.give_bytes:
        assert decision.limit_bytes <= used - decision.give_bytes, "what is given must not be taken again"
        assert decision.pressed


@given(ticks(remembers=False))
def test_the_cache_never_grows_into_the_reserve(tick: Tick) -> None:
    decision, _ = tick.decide()
    growth = decision.limit_bytes - max(tick.cache.used_bytes, tick.cache.floor_bytes)
    assert growth <= max(0.0, tick.predicted - tick.low) + 1


@given(ticks(), st.floats(0, 1))
def test_ample_headroom_gives_nothing_whatever_the_stall(tick: Tick, share: float) -> None:
    ample = tick.high * 2 + int(max(0.0, -tick.reading.headroom.slope_bytes_s) * tick.law.lookahead_s) + 2
    room = replace(tick.reading.headroom, available_bytes=ample)
    stall = replace(tick.reading.memory, some=replace(tick.reading.memory.some, share=share))
    reading = replace(tick.reading, headroom=room, memory=stall)
    decision, _ = decide(reading, tick.cache, tick.state, tick.law)
    assert decision.give_bytes == 0 and not decision.urgent and not decision.pressed


@given(ticks(), st.integers(1, GIB), st.integers(100, GIB))
def test_without_headroom_something_is_given_as_long_as_there_is_something(tick: Tick, floor: int, more: int) -> None:
    tick = replace(tick, cache=CacheStatus(4 * GIB, floor + more, floor))
    missing = on_cgroup(replace(tick.reading, headroom=replace(tick.reading.headroom, available_bytes=-GIB)))
    decision, _ = decide(missing, tick.cache, tick.state, replace(tick.law, low_bytes=MIB, high_bytes=MIB))
    assert decision.give_bytes > 0 and decision.urgent and decision.pressed


@given(ticks())
def test_urgent_only_with_something_to_give(tick: Tick) -> None:
    decision, _ = tick.decide()
    assert not decision.urgent or decision.give_bytes > 0
    assert decision.reason and "\n" not in decision.reason


@given(ticks())
def test_the_law_is_pure(tick: Tick) -> None:
    before = dataclasses.astuple(tick)
    assert tick.decide() == tick.decide()
    assert dataclasses.astuple(tick) == before


# -- one scripted machine ------------------------------------------------------------------------------------------

LAW = LawSettings(low_bytes=64 * MIB, high_bytes=128 * MIB)
CACHE = CacheStatus(capacity_bytes=400 * MIB, used_bytes=200 * MIB, floor_bytes=20 * MIB)


def at(available_mib: float, time_s: float = 0.0, *, stall: float = 0.0, slope_mib_s: float = 0.0) -> Reading:
    reading = make_reading(
        time_s=time_s,
        available_bytes=int(available_mib * MIB),
        limit_bytes=600 * MIB,
        memory_share=stall,
        slope_bytes_s=slope_mib_s * MIB,
    )
    return on_cgroup(reading)


def test_what_is_missing_to_the_reserve_is_given() -> None:
    decision, state = decide(at(54), CACHE, State(), LAW)
    assert decision.give_bytes == 10 * MIB
    assert decision.limit_bytes == state.limit_bytes == 190 * MIB
    assert not decision.urgent
    assert "54 MiB" in decision.reason


def test_a_slope_is_looked_ahead_along() -> None:
    assert decide(at(74), CACHE, State(), LAW)[0].give_bytes == 0
    assert decide(at(74, slope_mib_s=-100), CACHE, State(), LAW)[0].give_bytes == 5 * MIB
    assert decide(at(54, slope_mib_s=+1000), CACHE, State(), LAW)[0].give_bytes == 10 * MIB, "hope is no headroom"


def test_a_conversation_that_is_taken_in_at_once_is_not_taken_for_a_neighbour() -> None:
    falling = at(200, 10.0, slope_mib_s=-2000)
    assert decide(falling, CACHE, State(), LAW)[0].give_bytes > 0
    loading = replace(CACHE, loading_bytes=150 * MIB)
    decision, state = decide(falling, loading, State(), LAW)
    assert decision.give_bytes == 0
    soon, later = replace(falling, time_s=10.4), replace(falling, time_s=10.6)
    assert decide(soon, CACHE, state, LAW)[0].give_bytes == 0, "the slope still shows it"
    assert decide(later, CACHE, state, LAW)[0].give_bytes > 0
    short = replace(falling, time_s=10.2, headroom=replace(falling.headroom, available_bytes=10 * MIB))
    assert decide(short, CACHE, state, LAW)[0].give_bytes > 0, "what is missing now is missing"


def test_stall_that_counts_is_urgent() -> None:
    stalled = at(70, stall=0.2)
    assert decide(stalled, CACHE, State(), LAW)[0].urgent


def test_half_the_reserve_is_urgent() -> None:
    assert not decide(at(33), CACHE, State(), LAW)[0].urgent
    assert decide(at(31), CACHE, State(), LAW)[0].urgent


@pytest.mark.parametrize("stall", [0.05, 0.1, 0.2, 0.3, 1.0])
def test_a_stall_with_tight_headroom_gives_the_more_the_harder_it_is(stall: float) -> None:
    decision, _ = decide(at(200, stall=stall), CACHE, State(), LAW)
    share = 0.10 + 0.10 * min(1.0, (stall - 0.05) / 0.25)
    assert decision.give_bytes == pytest.approx(share * CACHE.used_bytes, rel=1e-6)
    assert decision.pressed and "stalls" in decision.reason


@pytest.mark.parametrize(("available", "stall"), [(257, 1.0), (200, 0.049), (600, 1.0)])
def test_a_stall_with_ample_headroom_or_a_small_one_gives_nothing(available: int, stall: float) -> None:
    assert decide(at(available, stall=stall), CACHE, State(), LAW)[0].give_bytes == 0


@given(available=st.integers(64, 127), stall=st.floats(0, 0.0499), limit=st.integers(20, 400), ticks=st.integers(1, 30))
def test_between_low_and_high_nothing_changes(available: int, stall: float, limit: int, ticks: int) -> None:
    state = State(limit_bytes=limit * MIB)
    for i in range(ticks):
        decision, state = decide(at(available, 0.5 * i, stall=stall), CACHE, state, LAW)
        assert decision.give_bytes == 0
        assert state.limit_bytes == limit * MIB
        assert decision.limit_bytes == max(
            CACHE.floor_bytes, min(limit * MIB, CACHE.used_bytes + (available - 64) * MIB)
        )


@settings(max_examples=60)
@given(steps=st.lists(st.floats(0.005, 1.0), min_size=10, max_size=150))
def test_the_cache_grows_back_slowly_and_only_after_calm(steps: list[float]) -> None:
    now, state = 100.0, State(limit_bytes=100 * MIB)
    cache = replace(CACHE, used_bytes=90 * MIB)
    first_calm = now
    for step in steps:
        before = state.limit_bytes
        decision, state = decide(at(590, now), cache, state, LAW)
        assert before is not None and state.limit_bytes is not None
        assert state.limit_bytes >= before
        if now - first_calm < LAW.calm_hold_s:
            assert state.limit_bytes == 100 * MIB
        calm_for = now - first_calm - LAW.calm_hold_s
        # at most the growth of the time since the hold was over, and of the one tick in which it ended
        assert state.limit_bytes <= 100 * MIB + LAW.grow_share * cache.capacity_bytes * max(0.0, calm_for + 1.0) + 1
        assert decision.limit_bytes <= cache.capacity_bytes
        now += step
    if now - first_calm > LAW.calm_hold_s + 25:
        assert state.limit_bytes == cache.capacity_bytes


def test_growing_really_reaches_the_top_again_and_starts_anew_after_a_disturbance() -> None:
    state = State(limit_bytes=100 * MIB)
    cache = replace(CACHE, used_bytes=90 * MIB)
    for i in range(40):
        _, state = decide(at(590, 0.1 * i), cache, state, LAW)
    grown = state.limit_bytes
    assert grown is not None and 125 * MIB < grown < 145 * MIB
    _, state = decide(at(100, 4.1), cache, state, LAW)  # between low and high: calm is over
    assert state.calm_since_s is None
    for i in range(19):
        _, state = decide(at(590, 4.2 + 0.1 * i), cache, state, LAW)
        assert state.limit_bytes == grown
    for i in range(1000):
        _, state = decide(at(590, 7.0 + 0.1 * i), cache, state, LAW)
    assert state.limit_bytes == cache.capacity_bytes


def test_growing_back_leaves_the_high_mark_free() -> None:
    cache, state = replace(CACHE, used_bytes=90 * MIB), State(limit_bytes=100 * MIB)
    for i in range(400):
        _, state = decide(at(148, 0.1 * i), cache, state, LAW)
    assert state.limit_bytes == 110 * MIB  # 20 MiB are free beyond the high mark, 90 are used


def test_what_was_given_is_not_given_again_while_the_systems_counter_lags() -> None:
    state = State()
    first = replace(at(54), headroom=replace(at(54).headroom, scope="system"))
    decision, state = decide(first, CACHE, state, LAW)
    assert decision.give_bytes == 10 * MIB
    state = record_given(state, first, 10 * MIB)
    cache = replace(CACHE, used_bytes=190 * MIB)
    for i in range(1, 19):
        lagging = replace(first, time_s=0.1 * i)
        decision, state = decide(lagging, cache, state, LAW)
        assert decision.give_bytes == 0, f"second release after {0.1 * i:.1f} s"
    decision, state = decide(replace(first, time_s=2.5), cache, state, LAW)
    assert decision.give_bytes == 10 * MIB, "it never showed: it did not help, so more is due"
    assert len(state.given) == 0


def test_the_credit_shrinks_as_the_release_begins_to_show() -> None:
    first = replace(at(54), headroom=replace(at(54).headroom, scope="system"))
    state = record_given(State(limit_bytes=190 * MIB), first, 10 * MIB)
    cache = replace(CACHE, used_bytes=190 * MIB)
    showing = replace(first, time_s=0.5, headroom=replace(first.headroom, available_bytes=60 * MIB))
    assert decide(showing, cache, state, LAW)[0].give_bytes == 0
    taken = replace(first, time_s=0.5, headroom=replace(first.headroom, available_bytes=44 * MIB))
    assert decide(taken, cache, state, LAW)[0].give_bytes == 10 * MIB, "somebody else took ten more meanwhile"


def test_a_cgroup_shows_a_release_at_once_so_there_is_no_credit() -> None:
    state = record_given(State(), at(54), 10 * MIB)
    assert decide(at(54, 0.1), CACHE, state, LAW)[0].give_bytes == 10 * MIB


def test_the_stall_of_giving_is_not_answered_with_more() -> None:
    reading = at(200, stall=0.5)
    state = record_given(State(), reading, 40 * MIB)
    assert decide(at(200, 0.2, stall=0.5), CACHE, state, LAW)[0].give_bytes == 0
    assert decide(at(200, 0.35, stall=0.5), CACHE, state, LAW)[0].give_bytes > 0


def test_many_steps_end_at_the_floor() -> None:
    state, cache = State(), CACHE
    for i in range(100):
        decision, state = decide(at(0, 0.1 * i), cache, state, LAW)
        cache = replace(cache, used_bytes=cache.used_bytes - decision.give_bytes)
    assert cache.used_bytes == CACHE.floor_bytes
    assert decision.limit_bytes == CACHE.floor_bytes and decision.give_bytes == 0 and not decision.urgent


# -- settings ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 45))
def test_the_default_reserve_is_never_more_than_a_quarter(limit: int) -> None:
    law = LawSettings()
    assert 0 <= law.low_for(limit) <= min(512 * MIB, max(limit // 4, 0))
    assert law.high_for(limit) == 2 * law.low_for(limit)
    if limit >= 192 * MIB:
        assert law.low_for(limit) >= 48 * MIB


@pytest.mark.parametrize(
    "wrong",
    [
        {"low_bytes": -1},
        {"high_bytes": -1},
        {"low_bytes": 10, "high_bytes": 9},
        {"min_step_share": 0.0},
        {"max_step_share": 1.1},
        {"min_step_share": 0.3, "max_step_share": 0.2},
        {"stall_share": float("nan")},
        {"grow_share": 0},
        {"lookahead_s": -0.1},
        {"calm_hold_s": -1},
        {"echo_s": -1},
        {"lookahead_s": float("nan")},
        {"calm_hold_s": float("nan")},
        {"pressed_chunk_tokens": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        LawSettings(**wrong)  # type: ignore[arg-type]
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_high_mark_below_the_automatic_reserve_does_not_make_the_cache_swing() -> None:
    law = LawSettings(high_bytes=1)
    assert law.high_for(8 * GIB) >= law.low_for(8 * GIB)


def test_headroom_is_told_in_whole_mebibytes() -> None:
    room = Headroom(10 * MIB, 0.0, 600 * MIB, 590 * MIB, 0, "system")
    decision, _ = decide(replace(at(0), headroom=room), CACHE, State(), LAW)
    assert decision.reason == "headroom will be 10 MiB, 64 MiB are to stay free"


def test_without_a_zone_between_the_marks_the_limit_grows_back_down_to_the_reserve() -> None:
    law, state = replace(LAW, high_bytes=LAW.low_bytes), State(limit_bytes=100 * MIB)
    for tick in range(20):
        _, state = decide(at(100, 0.5 * tick), CACHE, state, law)
    assert state.limit_bytes is not None and state.limit_bytes > 100 * MIB


def test_a_cache_that_was_made_larger_has_all_of_it_unless_it_was_limited() -> None:
    larger = replace(CACHE, capacity_bytes=4 * CACHE.capacity_bytes)
    _, free = decide(at(2000), CACHE, State(), LAW)
    assert decide(at(2000, 0.02), larger, free, LAW)[0].limit_bytes > 2 * CACHE.capacity_bytes
    _, limited = decide(at(2000), CACHE, State(limit_bytes=150 * MIB), LAW)
    assert decide(at(2000, 0.02), larger, limited, LAW)[0].limit_bytes == 150 * MIB
