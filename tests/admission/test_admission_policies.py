"""How many are answered at once: every policy as a pure function of the load."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.admission.policies import (
    POLICIES,
    Adaptive,
    AdaptiveSettings,
    AdmissionPolicy,
    Avg10Gate,
    Load,
    Pressure,
    Static,
    policy_named,
)
from kvpsi.errors import UsageError

CALM = Pressure()


class Server:
    """Answers that all get slower with every one more: ``token_s`` is what one alone takes for a token."""

    def __init__(self, policy: AdmissionPolicy, token_s: float = 0.03, parallel: int = 8) -> None:
        self.policy, self.token_s, self.parallel = policy, token_s, parallel
        self.state: Any = None
        self.now_s = 0.0
        self.running = 0
        self.limit = parallel
        self.reason = ""

    def for_s(self, seconds: float, wanted: int, pressure: Pressure = CALM, waits_s: float = 0.0) -> int:
        """So many want to be answered all the time; the answers at once at the end."""
        for _ in range(round(seconds / 0.05)):
            self.now_s += 0.05
            token_s = self.token_s * self.running if self.running else None
            waiting = wanted - self.running
            load = Load(
                self.now_s, self.running, self.running, self.parallel, waiting, waits_s, token_s, None, pressure
            )
            verdict, self.state = self.policy.decide(load, self.state)
            self.limit, self.reason = verdict.limit, verdict.reason
            self.running = min(wanted, max(self.running, self.limit)) if wanted > self.running else wanted
        return self.running


def test_whoever_comes_first_gets_all_places() -> None:
    assert Server(Adaptive()).for_s(1, wanted=8) == 8


def test_those_who_come_later_do_not_take_the_pace_away() -> None:
    server = Server(Adaptive(), token_s=0.03)
    assert server.for_s(10, wanted=4) == 4
    assert server.for_s(10, wanted=12) == 5, "one fifth slower is allowed, half as slow again is not"
    assert server.for_s(60, wanted=12) == 5, "also where ten seconds are all that is known"
    assert "ms a token" in server.reason


def test_where_tokens_come_faster_than_anybody_reads_all_may_join() -> None:
    server = Server(Adaptive(), token_s=0.005)
    server.for_s(10, wanted=1)
    assert server.for_s(5, wanted=8) == 8


def test_what_lasts_becomes_usual() -> None:
    server = Server(Adaptive(), token_s=0.03)
    server.for_s(10, wanted=4)
    assert server.for_s(1200, wanted=12) == 8


def test_when_everything_gets_slower_fewer_are_begun() -> None:
    server = Server(Adaptive(), token_s=0.03)
    server.for_s(30, wanted=8)
    server.token_s *= 3
    server.for_s(2, wanted=8)
    assert server.limit <= 4


def test_nobody_waits_for_ever_behind_a_slow_answer() -> None:
    server = Server(Adaptive(), token_s=1.0)
    server.for_s(10, wanted=1)
    assert server.for_s(4, wanted=5, waits_s=4.0) == 1
    assert server.for_s(1, wanted=5, waits_s=6.0) == 2
    assert server.for_s(30, wanted=5, waits_s=9.0) == AdaptiveSettings().few, "but the others keep what is left"


@pytest.mark.parametrize(
    ("pressure", "what"),
    [
        (Pressure(cpu_stall=0.4), "processors"),
        (Pressure(memory_stall=0.1), "memory"),
        (Pressure(io_stall=0.5), "disks"),
    ],
)
def test_pressure_keeps_the_limit_from_growing(pressure: Pressure, what: str) -> None:
    server = Server(Adaptive(), token_s=0.03)
    server.for_s(30, wanted=4)
    before = server.limit
    server.token_s /= 10  # much faster: there would be room for all
    assert server.for_s(20, wanted=12, pressure=pressure) <= before
    assert what in server.reason
    assert server.for_s(10, wanted=12) == 8


def test_hard_memory_pressure_lets_nobody_join() -> None:
    server = Server(Adaptive(), token_s=0.005)
    server.for_s(5, wanted=2)
    assert server.for_s(10, wanted=8, pressure=Pressure(memory_stall=0.3)) == 2
    idle = Server(Adaptive())
    assert idle.for_s(0.1, wanted=0) == 0 and idle.limit >= 1


def test_prompts_that_are_read_ever_more_slowly_let_nobody_join() -> None:
    policy, state = Adaptive(), None
    for tick in range(2000):
        verdict, state = policy.decide(Load(tick * 0.05, 4, 4, 8, 4, 0.0, 0.005, 0.003), state)
    assert verdict.limit == 8
    for tick in range(2000, 2040):
        verdict, state = policy.decide(Load(tick * 0.05, 4, 4, 8, 4, 0.0, 0.005, 0.03), state)
    assert verdict.limit < 4


def test_after_a_pause_nothing_is_remembered() -> None:
    server = Server(Adaptive(), token_s=0.03)
    server.for_s(30, wanted=2)
    assert server.limit < 8
    server.for_s(10, wanted=0)
    assert server.limit == 8


def test_the_gate_of_earlier_studies_and_a_fixed_number() -> None:
    gate = Avg10Gate()
    assert gate.decide(Load(0, 3, 3, 8, pressure=Pressure(cpu_avg10=0.96)), None)[0].limit == 3
    assert gate.decide(Load(0, 0, 0, 8, pressure=Pressure(cpu_avg10=0.96)), None)[0].limit == 0
    assert gate.decide(Load(0, 3, 3, 8, pressure=Pressure(cpu_avg10=0.95)), None)[0].limit == 8
    assert Static(3).decide(Load(0, 5, 5, 8), None)[0].limit == 3
    assert Static().decide(Load(0, 5, 5, 8), None)[0].limit == 8


LOADS = st.builds(
    Load,
    st.floats(0, 1e6),
    st.integers(0, 32),
    st.integers(0, 32),
    st.integers(1, 32),
    st.integers(0, 10_000),
    st.floats(0, 100),
    st.one_of(st.none(), st.floats(1e-5, 1e4)),
    st.one_of(st.none(), st.floats(1e-6, 1e3)),
    st.builds(Pressure, *[st.floats(0, 1)] * 4),
)


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(LOADS, max_size=30))
def test_any_load_has_a_limit_and_a_reason(name: str, loads: list[Load]) -> None:
    policy, state = policy_named(name), None
    for load in sorted(loads, key=lambda each: each.time_s):
        verdict, state = policy.decide(load, state)
        assert 0 <= verdict.limit <= max(load.parallel, load.running, 32)
        assert verdict.reason
        if name != "avg10":
            assert verdict.limit >= 1


def test_names() -> None:
    limits = {text: policy_named(text) for text in ("adaptive", "static", "static:4", "avg10", "avg10:90%")}
    assert isinstance(limits["static:4"], Static) and limits["static:4"].limit == 4
    assert isinstance(limits["avg10:90%"], Avg10Gate) and limits["avg10:90%"].closes_above == pytest.approx(0.9)
    for wrong in ("", "fast", "static:x", "static:0", "avg10:0", "avg10:120%", "adaptive:3"):
        with pytest.raises(UsageError):
            policy_named(wrong)
