"""Whoever makes memory pressure on purpose gets what the guards allow, and a real emergency still gets all at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvpsi.errors import UsageError
from kvpsi.governor.guards import Allowance, GuardSettings
from kvpsi.governor.law import MIB, Decision, LawSettings, State, decide, record_given
from kvpsi.pressure import Reading
from kvpsi.pressure.fake import make_reading
from kvpsi.status import CacheStatus

TICK_S = 0.1
LAW = LawSettings(low_bytes=64 * MIB, high_bytes=128 * MIB, guards=GuardSettings(forget_bytes_per_min=60 * MIB))
CAPACITY = 400 * MIB


@dataclass
class Machine:
    """A cache that does at once what the law says, and fills up again with what there is room for."""

    law: LawSettings = LAW
    used: int = 300 * MIB
    lossless: int = 0
    state: State = field(default_factory=State)
    forgotten: int = 0
    returned: int = 0
    total_us: int = 0
    now_s: float = 0.0
    decision: Decision | None = None

    def tick(self, available_mib: float, stall: float = 0.0, *, fills_mib: float = 0.0) -> Decision:
        self.now_s += TICK_S
        self.total_us += int(1e6 * stall * TICK_S)
        status = CacheStatus(
            CAPACITY, self.used, 20 * MIB, self.returned, lossless_bytes=self.lossless, forgotten_bytes=self.forgotten
        )
        reading = self._reading(available_mib, stall)
        self.decision, self.state = decide(reading, status, self.state, self.law)
        gone = max(0, self.used - self.decision.limit_bytes)
        if gone:
            free = min(gone, self.lossless)
            self.lossless -= free
            self.forgotten += gone - free
            self.used -= gone
            self.returned += gone
            self.state = record_given(self.state, reading, gone)
        self.used = min(CAPACITY, max(self.used, min(self.decision.limit_bytes, self.used + int(fills_mib * MIB))))
        return self.decision

    def _reading(self, available_mib: float, stall: float) -> Reading:
        reading = make_reading(
            time_s=self.now_s, available_bytes=int(available_mib * MIB), limit_bytes=600 * MIB, memory_share=stall
        )
        memory = replace(reading.memory, some=replace(reading.memory.some, total_us=self.total_us))
        room = replace(reading.headroom, scope="cgroup:/x")
        return replace(reading, memory=memory, headroom=room, headrooms=(room,))


@settings(max_examples=25, deadline=None)
@given(
    period=st.integers(2, 200),
    pressed=st.integers(1, 100),
    stall=st.floats(0, 1),
    available=st.floats(-50, 100),
    burst=st.none() | st.integers(0, CAPACITY),
)
def test_pulses_of_any_kind_have_no_more_forgotten_than_is_allowed(
    period: int, pressed: int, stall: float, available: float, burst: int | None
) -> None:
    guards = GuardSettings(forget_bytes_per_min=60 * MIB, forget_burst_bytes=burst)
    machine = Machine(replace(LAW, guards=guards))
    for n in range(3000):
        if n % period < min(pressed, period):
            machine.tick(available, stall)
        else:
            machine.tick(500, fills_mib=50)
    most = guards.burst_bytes(CAPACITY) + guards.rate_bytes_s(CAPACITY) * machine.now_s
    assert machine.forgotten <= most + MIB


def test_a_real_emergency_gets_all_at_once() -> None:
    machine = Machine()
    for _ in range(40):
        machine.tick(-300)
    assert machine.used == 20 * MIB and machine.forgotten == 280 * MIB


def test_what_can_be_had_again_is_not_counted() -> None:
    guards = GuardSettings(forget_bytes_per_min=0, forget_burst_bytes=0)
    machine = Machine(replace(LAW, guards=guards), lossless=200 * MIB)
    for _ in range(60):
        machine.tick(-300)
    assert machine.forgotten == 0 and machine.used == 100 * MIB and machine.lossless == 0
    assert "no more than 0 MiB a minute" in machine.tick(-300).reason
    assert machine.decision is not None and machine.decision.limit_bytes == machine.used, (
        "new ones in place of old ones"
    )


def test_new_tokens_in_place_of_old_ones_are_not_counted() -> None:
    """Neither by themselves, nor if an eviction takes more at once than is needed, which then fills up again."""
    machine = Machine(replace(LAW, guards=GuardSettings(forget_bytes_per_min=0, forget_burst_bytes=50 * MIB)))
    for _ in range(20):
        machine.tick(0)
    used, left = machine.used, machine.state.allowance.left_bytes
    assert used == 250 * MIB and left == 0
    for _ in range(300):
        machine.forgotten += 3 * MIB
        machine.used -= 3 * MIB
        machine.tick(0)
        machine.used += 2 * MIB
        machine.tick(0)
        machine.used += 1 * MIB
        assert machine.tick(0).limit_bytes == used
    assert machine.used == used and machine.state.allowance.left_bytes == left


def test_giving_that_does_not_help_stops_and_says_so() -> None:
    machine = Machine()
    reasons = [machine.tick(150, stall=0.4).reason for _ in range(200)]  # whatever is given, it goes on
    forgotten = machine.forgotten
    assert 0 < forgotten < 130 * MIB
    assert "did not change that" in reasons[-1] and machine.decision is not None and not machine.decision.give_bytes
    for _ in range(100):
        machine.tick(150, stall=0.4)
    assert machine.forgotten == forgotten, "nothing more for half a minute"
    assert machine.tick(20, stall=0.4).give_bytes > 0, "what is really missing is given all the same"
    for _ in range(40):
        machine.tick(400)
    for _ in range(310):
        machine.tick(150, stall=0.0)
    assert machine.tick(150, stall=0.4).give_bytes > 0, "it may help another time"


def test_what_costs_nothing_is_given_even_if_it_does_not_help() -> None:
    machine = Machine(lossless=290 * MIB)
    for _ in range(400):
        machine.tick(150, stall=0.4)
    assert machine.forgotten == 0 and machine.lossless < 50 * MIB


def test_giving_that_helps_goes_on() -> None:
    machine = Machine()
    for _ in range(20):  # each attempt ends the stall for a while
        machine.tick(150, stall=0.5)
        for _ in range(5):
            machine.tick(150, stall=0.0)
    assert "did not change" not in (machine.decision.reason if machine.decision else "")
    assert machine.forgotten > 100 * MIB


@pytest.mark.parametrize(
    "wrong",
    [
        {"forget_bytes_per_min": -1},
        {"forget_burst_bytes": -1},
        {"futile_share": 0.0},
        {"futile_share": 1.1},
        {"futile_after_s": 0.0},
        {"futile_hold_s": float("inf")},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        GuardSettings(**wrong)  # type: ignore[arg-type]


def test_a_cache_that_grows_may_forget_as_much_more() -> None:
    small, large = CacheStatus(100 * MIB, 50 * MIB, 0), CacheStatus(400 * MIB, 50 * MIB, 0)
    guards = GuardSettings(forget_bytes_per_min=0)
    first = Allowance().after(0.0, small, 100 * MIB, guards)
    assert first.left_bytes == 100 * MIB
    assert first.after(0.1, large, 100 * MIB, guards).left_bytes == 400 * MIB
    spent = replace(first, left_bytes=0.0).after(0.1, large, 100 * MIB, guards)
    assert spent.left_bytes == 300 * MIB and spent.after(0.2, small, 100 * MIB, guards).left_bytes == 100 * MIB


def test_what_ends_is_not_paid_for_and_may_not_be_taken_for_forgotten() -> None:
    guards = GuardSettings(forget_bytes_per_min=0, forget_burst_bytes=0)
    before = Allowance().after(0.0, CacheStatus(CAPACITY, 300 * MIB, 0), CAPACITY, guards)
    ended = before.after(0.1, CacheStatus(CAPACITY, 100 * MIB, 0), CAPACITY, guards)
    forgot = before.after(0.1, CacheStatus(CAPACITY, 100 * MIB, 0, forgotten_bytes=200 * MIB), CAPACITY, guards)
    assert (ended.level_bytes, forgot.level_bytes) == (100 * MIB, 300 * MIB)
