"""What the law learns from a machine: what must hold for any readings, and what it learns from some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings, CacheStatus, Governor, LawSettings
from kvpsi.governor.adapt import AdaptState, adapt, explain
from kvpsi.governor.law import MIB, State, decide
from kvpsi.pressure import Reading
from kvpsi.pressure.fake import ScriptedSource, make_reading
from kvpsi.pressure.reading import Stall, StallLine

GIB = 1 << 30
SCOPE = 4096 * MIB
LAW, BOUNDS = LawSettings(), AdaptSettings()
CACHE = CacheStatus(capacity_bytes=400 * MIB, used_bytes=200 * MIB, floor_bytes=20 * MIB)


def at(time_s: float, mib: float, stall: float = 0.0, total_s: float = 0.0) -> Reading:
    """A reading of a scope of 4 GiB; stall as a share of the tick, and all that there ever was."""
    reading = make_reading(time_s=time_s, available_bytes=int(mib * MIB), limit_bytes=SCOPE)
    return replace(reading, memory=Stall(some=StallLine(share=stall, total_us=int(1e6 * total_s))))


@st.composite
def ticks(draw: st.DrawFn) -> list[tuple[Reading, CacheStatus]]:
    """Any readings in order of time, of a scope that stays the same, with any cache."""
    limit, now_s, total_us, found = draw(st.integers(1 * MIB, 64 * GIB)), 0.0, 0, []
    for _ in range(draw(st.integers(1, 20))):
        now_s += draw(st.floats(0, 100))
        total_us += draw(st.integers(0, 10**8))
        reading = make_reading(
            time_s=now_s,
            available_bytes=draw(st.integers(-GIB, limit)),
            limit_bytes=limit,
            slope_bytes_s=draw(st.floats(-4e9, 4e9)),
        )
        stall = Stall(some=StallLine(share=draw(st.floats(0, 1)), total_us=total_us))
        capacity = draw(st.integers(1, 4 * GIB))
        found.append((replace(reading, memory=stall), CacheStatus(capacity, draw(st.integers(0, capacity)), 0)))
    return found


TOLD = {
    ("lookahead_s",): "s ahead",
    ("grow_share",): "grows by",
    ("stall_share", "hard_stall_share"): "stall counts from",
    ("calm_share",): "of stall is calm",
}
LEARNED = {"low_bytes", "min_step_share", "max_step_share", "calm_hold_s", *(name for names in TOLD for name in names)}


@given(ticks())
def test_only_what_is_told_is_learned(seen: list[tuple[Reading, CacheStatus]]) -> None:
    state = AdaptState()
    for reading, cache in seen:
        law, state = adapt(reading, cache, state, LAW, BOUNDS)
        changed = {each.name for each in fields(law) if getattr(law, each.name) != getattr(LAW, each.name)}
        assert changed <= LEARNED


@given(ticks())
def test_whatever_is_seen_the_bounds_hold(seen: list[tuple[Reading, CacheStatus]]) -> None:
    state = AdaptState()
    for reading, cache in seen:
        law, state = adapt(reading, cache, state, LAW, BOUNDS)
        scope = reading.headroom.limit_bytes
        least = min(BOUNDS.least_reserve_bytes, scope // 4)
        assert law.low_bytes is not None and least <= law.low_bytes <= min(BOUNDS.most_reserve_bytes, scope // 4)
        assert law.high_for(scope) == 2 * law.low_bytes
        assert BOUNDS.least_lookahead_s <= law.lookahead_s <= BOUNDS.most_lookahead_s
        assert BOUNDS.least_step_factor * LAW.max_step_share <= law.max_step_share <= LAW.max_step_share
        assert LAW.stall_share <= law.stall_share <= BOUNDS.most_stall_share
        assert LAW.calm_share <= law.calm_share <= law.stall_share <= law.hard_stall_share <= 1
        assert BOUNDS.least_patience * LAW.calm_hold_s <= law.calm_hold_s <= LAW.calm_hold_s
        assert LAW.grow_share <= law.grow_share <= 1
        assert law.guards == LAW.guards
        assert all(line and "\n" not in line for line in explain(scope, law, state, LAW))
        told = " ".join(explain(scope, law, state, LAW))
        for names, sentence in TOLD.items():
            if any(getattr(law, name) > 1.1 * getattr(LAW, name) for name in names):
                assert sentence in told, "what is learned is told"


@given(ticks())
def test_what_was_given_stays(seen: list[tuple[Reading, CacheStatus]]) -> None:
    mine = LawSettings(64 * MIB, 80 * MIB, 0.2, 0.01, 0.3, stall_share=0.1, calm_share=0.02, grow_share=0.5)
    fixed, state = AdaptSettings(fixed=("calm_hold_s",)), AdaptState()
    for reading, cache in seen:
        law, state = adapt(reading, cache, state, mine, fixed)
        assert law == mine
        assert explain(reading.headroom.limit_bytes, law, state, mine) == []


class Fixed:
    """A cache that says what it is told to, and does nothing."""

    def __init__(self) -> None:
        self.said = CACHE

    def status(self) -> CacheStatus:
        return self.said

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        pass

    def give_now(self) -> int | None:
        return 0

    def interrupt(self) -> bool:
        return False


@settings(deadline=None)
@given(ticks())
def test_without_adapting_it_is_exactly_the_law(seen: list[tuple[Reading, CacheStatus]]) -> None:
    cache, state = Fixed(), State()
    governor = Governor(cache, ScriptedSource([at(0, 1)]))
    for reading, said in seen:
        cache.said = said
        governor.on_reading(reading)
        decision, state = decide(reading, said, state, LAW)
        assert governor.decision == decision and governor.state == state
    assert governor.settings == LAW and governor.explained() == []


def test_the_governor_decides_with_what_it_learned_and_tells_it() -> None:
    governor = Governor(Fixed(), ScriptedSource([at(0, 1)]), adapt=BOUNDS)
    for reading in [at(0, 3000), *short(10)]:
        governor.on_reading(reading)
    assert governor.settings.low_for(SCOPE) < LAW.low_for(SCOPE)
    told = governor.explained()
    assert any(line.startswith("reserve ") and "default 204 MiB" in line for line in told)
    assert any("memory was short once, at last with 30 MiB left and 0.00 s of stall" in line for line in told)


def learn(readings: Sequence[Reading], cache: CacheStatus = CACHE) -> tuple[LawSettings, AdaptState]:
    law, state = LAW, AdaptState()
    for reading in readings:
        law, state = adapt(reading, cache, state, LAW, BOUNDS)
    return law, state


def short(time_s: float, left_mib: float = 30, stall_s: float = 0.0, before_s: float = 0.0) -> list[Reading]:
    """Memory is short for half a second: so much was left, and stalled beside what had before."""
    total_s = before_s + stall_s
    return [
        at(time_s, left_mib + 10, total_s=before_s),
        at(time_s + 0.5, left_mib, total_s=total_s),
        *(at(time_s + 0.5 + 0.3 * n, 3000, total_s=total_s) for n in range(1, 6)),
    ]


def test_it_begins_as_the_law_is_but_for_what_large_machines_keep() -> None:
    quiet, state = learn([at(0.5 * n, 2000) for n in range(400)])
    assert quiet == replace(LAW, low_bytes=BOUNDS.untried_reserve_bytes) and state.shortages == 0
    small, _ = adapt(make_reading(limit_bytes=100 * MIB), CACHE, AdaptState(), LAW, BOUNDS)
    assert small == replace(LAW, low_bytes=25 * MIB)


def test_where_memory_was_given_in_time_less_suffices() -> None:
    law, state = learn([at(0, 3000), *short(100), *short(200, left_mib=10)])
    assert state.shortages == 2 and state.last is not None and state.last.least_bytes == 10 * MIB
    assert law.low_bytes == pytest.approx(BOUNDS.least_reserve_bytes)
    assert law.lookahead_s == BOUNDS.least_lookahead_s
    assert law.max_step_share < LAW.max_step_share and law.min_step_share < LAW.min_step_share
    assert law.calm_hold_s < LAW.calm_hold_s and law.grow_share > LAW.grow_share


def test_where_something_was_missing_the_reserve_grows_by_more_than_that() -> None:
    before, _ = learn([at(0, 3000), *short(100)])
    after, _ = learn([at(0, 3000), *short(100), *short(200, left_mib=-10)])
    assert before.low_bytes is not None and after.low_bytes == pytest.approx(before.low_bytes + 20 * MIB, rel=0.01)
    worse, _ = learn([at(0, 3000), *short(100), *short(200, left_mib=-400)])
    assert worse.low_bytes == pytest.approx(2 * before.low_bytes, rel=0.01), "it doubles at most"
    assert after.lookahead_s > before.lookahead_s and after.max_step_share > before.max_step_share
    assert after.calm_hold_s > before.calm_hold_s and after.grow_share < before.grow_share


def test_stall_in_a_shortage_counts_as_harm_and_noise_does_not() -> None:
    harmed, _ = learn([at(0, 3000), *short(100, left_mib=10, stall_s=0.2)])
    assert harmed.low_bytes is not None and harmed.low_bytes > BOUNDS.untried_reserve_bytes
    assert harmed.lookahead_s > LAW.lookahead_s
    noisy = [at(0.1 * n, 3000, stall=0.2, total_s=0.02 * n) for n in range(1000)]
    unharmed, _ = learn([*noisy, *short(100, left_mib=10, stall_s=0.2, before_s=20.0)])
    assert unharmed.lookahead_s < LAW.lookahead_s
    elsewhere, _ = learn([at(0, 3000), *short(100, left_mib=30, stall_s=0.2)])
    assert elsewhere.lookahead_s < LAW.lookahead_s, "most of the reserve was left"


def test_a_cache_that_has_nothing_to_give_teaches_nothing() -> None:
    empty = replace(CACHE, used_bytes=CACHE.floor_bytes)
    assert learn([at(0, 3000), *short(100, left_mib=-40)], empty)[1].shortages == 0


def test_stall_with_ample_headroom_raises_the_thresholds() -> None:
    law, state = learn([at(0.1 * n, 3000, stall=0.12) for n in range(200)])
    assert state.noise_share == pytest.approx(0.12, rel=0.05)
    assert 0.12 < law.stall_share < 0.25 and 0.1 < law.calm_share <= law.stall_share
    assert any("with ample headroom it is 12%" in line for line in explain(SCOPE, law, state, LAW))
    scarce, _ = learn([at(0.1 * n, 60, stall=0.12) for n in range(200)])
    assert scarce.stall_share == LAW.stall_share, "that stall may well be for want of memory"


def test_a_hard_stall_that_was_given_bounds_the_threshold() -> None:
    mine, state = LawSettings(hard_stall_share=0.1), AdaptState()
    for n in range(200):
        law, state = adapt(at(0.1 * n, 3000, stall=0.12), CACHE, state, mine, BOUNDS)
    assert law.stall_share == law.hard_stall_share == 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"fixed": ("reserve",)},
        {"rise_s": float("nan")},
        {"settled_s": 0.0},
        {"least_reserve_bytes": 2 * GIB},
        {"least_lookahead_s": 0.2},
        {"most_stall_share": 0.01},
        {"least_patience": 2.0},
        {"ease": 0.0},
        {"back_off": 0.5},
    ],
)
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        AdaptSettings(**wrong)  # type: ignore[arg-type]
