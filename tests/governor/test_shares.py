"""Fair shares: the arithmetic, and caches that find to them under the law."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvpsi.errors import UsageError
from kvpsi.governor.guards import GuardSettings
from kvpsi.governor.law import MIB, Decision, LawSettings, State, decide, record_given
from kvpsi.governor.peers import Record
from kvpsi.governor.shares import Claim, Fellows, ShareSettings, fair_shares, fill, split
from kvpsi.governor.sharing import Sharing
from kvpsi.pressure import Reading
from kvpsi.pressure.fake import make_reading
from kvpsi.status import CacheStatus

SIZES = st.integers(0, 1 << 40)


def claim(
    used: int,
    demand: int = 10**9,
    *,
    weight: float = 1.0,
    priority: int = 0,
    floor: int = 0,
    givable: int | None = None,
) -> Claim:
    return Claim(used, used, floor, demand, used if givable is None else givable, weight, priority)


@st.composite
def bounds(draw: st.DrawFn) -> list[tuple[float, int, int]]:
    n = draw(st.integers(1, 8))
    least = [draw(SIZES) for _ in range(n)]
    return [(draw(st.floats(0.01, 100)), each, each + draw(SIZES)) for each in least]


@st.composite
def claims(draw: st.DrawFn) -> list[Claim]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        used = draw(SIZES)
        found.append(
            Claim(
                used,
                used + draw(SIZES),
                draw(SIZES),
                draw(SIZES),
                draw(st.integers(0, used)),
                draw(st.floats(0.01, 100)),
                draw(st.integers(-1, 1)),
            )
        )
    return found


@given(SIZES, bounds())
def test_a_level_fills_all_within_their_bounds(total: int, asked: list[tuple[float, int, int]]) -> None:
    got = fill(total, asked)
    assert all(least <= each <= most for each, (_, least, most) in zip(got, asked, strict=True))
    expected = min(max(total, sum(least for _, least, _ in asked)), sum(most for _, _, most in asked))
    assert expected - sum(got) == pytest.approx(0, abs=len(asked) + 1e-6 * expected)


@given(SIZES, claims())
def test_nobody_gets_less_than_its_least_or_more_than_it_wants(total: int, all_claims: list[Claim]) -> None:
    shares = fair_shares(total, all_claims)
    for share, each in zip(shares, all_claims, strict=True):
        assert each.least_bytes <= share <= max(each.least_bytes, each.demand_bytes)
    assert sum(shares) <= max(total, sum(each.least_bytes for each in all_claims)) * (1 + 1e-6) + 1


@given(SIZES, claims())
def test_what_is_missing_is_given_once_together(missing: int, all_claims: list[Claim]) -> None:
    parts = split(missing, all_claims)
    assert all(0 <= part <= each.givable_bytes for part, each in zip(parts, all_claims, strict=True))
    expected = min(missing, sum(each.givable_bytes for each in all_claims))
    assert expected - sum(parts) == pytest.approx(0, abs=2 * len(parts) + 1e-6 * expected)


def test_shares_are_in_proportion_to_weights_among_those_who_want_more() -> None:
    assert fair_shares(90, [claim(0), claim(0, weight=2)]) == [30, 60]
    assert fair_shares(90, [claim(0), claim(0, weight=2), claim(0, demand=15)]) == [25, 50, 15]
    assert fair_shares(90, [claim(0, floor=40), claim(0, weight=2)]) == [40, 50], "a floor is kept"


def test_a_higher_priority_gets_all_it_wants_and_lower_ones_keep_their_floors() -> None:
    assert fair_shares(90, [claim(50, floor=10), claim(0, demand=70, priority=1)]) == [20, 70]
    assert fair_shares(90, [claim(50, floor=10), claim(0, priority=1)]) == [10, 80]


def test_who_holds_more_than_its_share_gives_first() -> None:
    assert split(30, [claim(100), claim(50)]) == [30, 0]
    assert split(80, [claim(100), claim(50)]) == [65, 15]
    assert split(2, [claim(60), claim(120, weight=2)]) == [0, 1], "in proportion, rounded down"
    assert split(60, [claim(60), claim(120, weight=2)]) == [20, 40]
    assert split(30, [claim(100, givable=10), claim(50)]) == [10, 20], "and the other what that one cannot"


@pytest.mark.parametrize(
    "wrong",
    [{"weight": 0.0}, {"weight": float("nan")}, {"priority": 5000}, {"yield_share": 0.0}, {"tolerance_share": 1.0}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ShareSettings(**wrong)  # type: ignore[arg-type]


# -- under the law ---------------------------------------------------------------------------------------------------

LAW = LawSettings(low_bytes=48 * MIB, high_bytes=96 * MIB)
CAPACITY, FLOOR = 400 * MIB, 5 * MIB


@dataclass
class Cache:
    """Takes what it may as fast as it can, and does at once what the law says."""

    peers: list[Cache]
    share: ShareSettings = field(default_factory=ShareSettings)
    law: LawSettings = LAW
    used: int = 0
    wanted: int = CAPACITY
    forgotten: int = 0
    returned: int = 0
    state: State = field(default_factory=State)
    record: Record | None = None
    decision: Decision | None = None

    def __post_init__(self) -> None:
        self.sharing = Sharing(self.share, self)

    def exchange(self, record: Record) -> list[Record]:
        self.record = replace(record, name=str(id(self)))
        return [each.record for each in self.peers if each is not self and each.record is not None]

    def close(self) -> None:
        self.record = None

    def tick(self, reading: Reading, takes: int) -> None:
        status = CacheStatus(CAPACITY, self.used, FLOOR, self.returned, forgotten_bytes=self.forgotten)
        fellows = self.sharing.look(reading, status, self.state)
        self.decision, self.state = decide(reading, status, self.state, self.law, fellows)
        gone = max(0, self.used - self.decision.limit_bytes)
        if gone:
            self.used, self.forgotten, self.returned = self.used - gone, self.forgotten + gone, self.returned + gone
            self.state = record_given(self.state, reading, gone)
        self.used = max(self.used, min(self.used + takes, self.decision.limit_bytes, self.wanted))


@dataclass
class Machine:
    """Caches under one limit, one look after the other, and what else there is."""

    memory: int
    caches: list[Cache] = field(default_factory=list)
    others: int = 0
    now_s: float = 0.0
    scope: str = "cgroup:/board"

    def add(self, share: ShareSettings, **more: object) -> Cache:
        self.caches.append(Cache(self.caches, share, **more))  # type: ignore[arg-type]
        return self.caches[-1]

    @property
    def available(self) -> int:
        return self.memory - self.others - sum(cache.used for cache in self.caches)

    def run(self, seconds: float, takes_mib: float = 1.0, tick_s: float = 0.02, *, at_once: bool = False) -> None:
        """``at_once``: all have read what there is before the first of them gives anything."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            seen = self.available
            for cache in list(self.caches):
                self.now_s += tick_s / len(self.caches)
                reading = make_reading(
                    time_s=self.now_s,
                    available_bytes=seen if at_once else self.available,
                    limit_bytes=self.memory,
                    interval_s=tick_s,
                )
                room = replace(reading.headroom, scope=self.scope)
                cache.tick(replace(reading, headroom=room, headrooms=(room,)), int(takes_mib * MIB))


@pytest.mark.parametrize("weights", [(1, 1), (1, 2), (1, 2, 3, 4), (5, 1, 1)])
def test_hungry_caches_come_to_their_shares_and_stay(weights: tuple[float, ...]) -> None:
    machine = Machine(300 * MIB)
    for weight in weights:
        machine.add(ShareSettings(weight))
    machine.run(10)
    seen = []
    for _ in range(40):
        machine.run(0.25)
        seen.append([cache.used for cache in machine.caches])
    for n, weight in enumerate(weights):
        fair = weight / sum(weights)
        assert all(each[n] / sum(each) == pytest.approx(fair, rel=0.1) for each in seen)
        assert max(each[n] for each in seen) - min(each[n] for each in seen) < 0.02 * CAPACITY
    assert machine.available >= 48 * MIB


def test_a_newcomer_gets_its_share_from_those_that_hold_more() -> None:
    machine = Machine(300 * MIB)
    first = machine.add(ShareSettings())
    machine.run(5)
    assert first.used > 230 * MIB, "alone it holds all"
    second = machine.add(ShareSettings(2))
    machine.run(10)
    assert second.used / (first.used + second.used) == pytest.approx(2 / 3, rel=0.1)
    assert machine.available > 40 * MIB


def test_who_leaves_or_falls_silent_leaves_all_to_the_other() -> None:
    machine = Machine(300 * MIB)
    first, second = machine.add(ShareSettings()), machine.add(ShareSettings())
    machine.run(10)
    before = first.used
    machine.caches.remove(second)  # its record is gone, and so is its memory
    machine.run(30)
    assert first.used > 1.4 * before


def test_who_wants_little_does_not_keep_others_from_the_rest() -> None:
    machine = Machine(300 * MIB)
    idle, busy = machine.add(ShareSettings(10), wanted=20 * MIB), machine.add(ShareSettings())
    machine.run(15)
    assert idle.used == 20 * MIB and busy.used > 175 * MIB


def test_a_higher_priority_is_served_first() -> None:
    machine = Machine(200 * MIB)
    low, high = machine.add(ShareSettings()), machine.add(ShareSettings(priority=1), wanted=110 * MIB)
    machine.run(30)
    assert high.used == 110 * MIB and FLOOR < low.used < 45 * MIB


def test_sixteen_give_what_is_missing_once_and_not_sixteen_times() -> None:
    def forgotten(*, together: bool) -> tuple[int, int]:
        machine = Machine(1000 * MIB)
        for _ in range(16):
            machine.add(ShareSettings(), used=55 * MIB)
            if not together:
                machine.caches[-1].peers = []
        machine.run(5, takes_mib=0)
        before = sum(cache.forgotten for cache in machine.caches)
        machine.others = machine.available - 8 * MIB  # 40 MiB are missing
        machine.run(1, takes_mib=0, tick_s=0.01, at_once=True)
        return sum(cache.forgotten for cache in machine.caches) - before, machine.available

    given, left = forgotten(together=True)
    assert 39 * MIB <= given <= 50 * MIB and left >= 47 * MIB
    assert forgotten(together=False)[0] > 150 * MIB, "each a fifth of what it holds"


def test_the_whole_systems_lag_does_not_have_each_give_for_all() -> None:
    """MemAvailable tells late of what others gave, too."""
    machine = Machine(1000 * MIB, scope="system")
    caches = [machine.add(ShareSettings(), used=200 * MIB) for _ in range(4)]
    machine.run(3, takes_mib=0)
    lagging = [cache.used for cache in caches]
    machine.others = machine.available - 8 * MIB
    for _ in range(60):  # 1.2 s in which it does not move
        machine.others = machine.memory - sum(cache.used for cache in caches) - 8 * MIB
        machine.run(0.02, takes_mib=0)
    given = sum(lagging) - sum(cache.used for cache in caches)
    assert 39 * MIB <= given <= 70 * MIB


def test_for_another_nothing_is_forgotten_that_an_emergency_would_need() -> None:
    machine = Machine(300 * MIB)
    guards = GuardSettings(forget_bytes_per_min=6 * MIB, forget_burst_bytes=40 * MIB)
    full = machine.add(ShareSettings(), law=replace(LAW, guards=guards))
    machine.run(5)
    held, forgotten = full.used, full.forgotten
    machine.add(ShareSettings(3))
    machine.run(20)
    assert full.forgotten - forgotten <= 40 * MIB + 6 * MIB * 20 / 60 and full.used > held - 45 * MIB
    machine.others = 60 * MIB
    machine.run(1)
    assert machine.available > 0, "what was spared for that"


def test_alone_the_law_is_the_same() -> None:
    reading = make_reading(time_s=1.0, available_bytes=30 * MIB, limit_bytes=600 * MIB)
    cache = CacheStatus(CAPACITY, 200 * MIB, FLOOR)
    sharing = Cache([]).sharing
    assert sharing.look(reading, cache, State()) is None
    assert decide(reading, cache, State(), LAW, None) == decide(reading, cache, State(), LAW)


def test_those_under_another_limit_and_those_that_hang_are_no_fellows() -> None:
    reading = make_reading(time_s=100.0, available_bytes=30 * MIB, limit_bytes=600 * MIB)
    status = CacheStatus(CAPACITY, 200 * MIB, FLOOR)
    other = Cache([])
    mine = Cache([other])
    for time_s, scope, known in ((99.0, "system", True), (99.0, "cgroup:/x", False), (90.0, "system", False)):
        other.record = Record(time_s, (scope,), claim(MIB), 0, "other")
        mine.sharing = Sharing(ShareSettings(), mine)
        assert (mine.sharing.look(reading, status, State()) is not None) == known


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-200, 900), st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.booleans(),
)
def test_whatever_others_say_the_limit_lies_between_floor_and_capacity(
    ticks: list[tuple[int, int, int]], n_others: int, higher: bool
) -> None:
    state = State()
    for n, (available, used, other) in enumerate(ticks):
        reading = make_reading(time_s=n * 0.1, available_bytes=available * MIB, limit_bytes=900 * MIB)
        status = CacheStatus(CAPACITY, used * MIB, FLOOR)
        own = claim(used * MIB, floor=FLOOR)
        fellows = Fellows(ShareSettings(), own, own, (claim(other * MIB, priority=int(higher)),) * n_others)
        decision, state = decide(reading, status, state, LAW, fellows)
        assert FLOOR <= decision.limit_bytes <= CAPACITY
        assert 0 <= decision.give_bytes <= max(0, used * MIB - FLOOR)
        assert decision.limit_bytes - max(used * MIB, FLOOR) <= max(0, available - 48) * MIB + 1
