"""Whoever makes memory pressure on purpose, in simulated time: no more is forgotten than the guards allow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.cli.main import main
from kvpsi.errors import UsageError
from kvpsi.governor.guards import GuardSettings
from kvpsi.governor.law import LawSettings
from kvpsi.sim.attackers import ATTACKS, Attack, most_beyond, most_within
from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.conversation import Talk
from kvpsi.sim.llms import Llm
from kvpsi.sim.many import play_one
from kvpsi.sim.neighbours import processes
from kvpsi.sim.play import Outcome
from kvpsi.sim.situation import Situation

LLM = Llm("small", 94 * MIB, 23040, 384, runtime_bytes=120 * MIB)
BOARD = Board("600M", 600 * MIB, scope="cgroup:board")
TALK = Talk(n_conversations=1, first_tokens=5000, prompt_tokens=300, answer_tokens=200, think_s=1.0)
SHED = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=30).map(lambda found: tuple(sorted(found)))


@given(SHED, st.floats(0, 5))
def test_the_most_within_any_time_is_what_all_windows_say(shed: tuple[tuple[float, int], ...], rate_s: float) -> None:
    windows = [
        (shed[last][0] - shed[first][0], sum(amount for _, amount in shed[first : last + 1]))
        for first in range(len(shed))
        for last in range(first, len(shed))
    ]
    assert most_beyond(shed, rate_s) == pytest.approx(max((n - rate_s * long_s for long_s, n in windows), default=0.0))
    assert most_within(shed, 10.0) == max((n for long_s, n in windows if long_s < 10.0), default=0)


def test_an_attack_never_takes_more_than_its_size() -> None:
    for kind in ATTACKS:
        found = processes(kind, 200 * MIB, 60.0, 7)
        assert found == processes(kind, 200 * MIB, 60.0, 7) != processes(kind, 200 * MIB, 60.0, 8)
        assert all(each.warmup_s < 60 for each in found)
        for each in found[:50]:
            beside = [b for b in found if b.warmup_s <= each.warmup_s < b.duration_s - 1e-6]
            assert sum(b.size_bytes for b in beside) <= 200 * MIB, kind
    assert len(processes("forks", 200 * MIB, 60.0, 7)) > 100


@pytest.mark.parametrize("wrong", [{"size_bytes": 0}, {"period_s": 0.01}, {"share": 0.0}, {"phase_s": -1.0}])
def test_attacks_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Attack(**({"size_bytes": MIB, "period_s": 1.0} | wrong))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fewer --seconds"):
        Attack(MIB, 0.05).processes(1e6)


def attacked(kind: str, guards: GuardSettings, seed: int) -> Outcome:
    law = LawSettings(guards=guards)
    return play_one(Situation(BOARD, LLM, 16384, ((kind, 450 * MIB),), talk=TALK, seconds=60.0, law=law), "kvpsi", seed)


@pytest.mark.parametrize(("kind", "seed"), [("ramp", 3), ("pulses", 7), ("forks", 1), ("any", 1)])
def test_no_more_is_shed_than_the_guards_allow(kind: str, seed: int) -> None:
    guards = GuardSettings(forget_bytes_per_min=6 * MIB, forget_burst_bytes=10 * MIB)
    found = attacked(kind, guards, seed)
    rate_s = guards.rate_bytes_s(0) / LLM.bytes_per_token
    # in whole tokens, and what was allowed goes up to a second later
    assert most_beyond(found.shed, rate_s) <= 10 * MIB / LLM.bytes_per_token + rate_s + 1
    assert (kind == "any" or found.shed) and "model" not in found.killed


def test_without_guards_attackers_get_far_more() -> None:
    """So that the test above is one."""
    endless = GuardSettings(forget_bytes_per_min=1 << 40, forget_burst_bytes=1 << 40)
    assert sum(amount for _, amount in attacked("ramp", endless, 3).shed) * LLM.bytes_per_token > 3 * 10 * MIB


def test_attackers_work_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--memory", "4G", "-m", "1b", "--neighbours", "ramp:2G,forks:500M", "--seeds", "1", "-j", "1"]
    words += ["--seconds", "10", "--controllers", "kvpsi", "--forget-rate", "0", "--out-dir", str(tmp_path), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["situation"]["law"]["guards"]["forget_bytes_per_min"] == 0
    assert document["table"][0]["tokens_shed"] == 0
