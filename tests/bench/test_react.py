"""The bench of reaction times: its arithmetic, and one small real burst."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpsi.bench.conversation import saved
from kvpsi.bench.react.play import Burst, play
from kvpsi.bench.react.run import Plan, figures_of
from kvpsi.errors import KvpsiError, UsageError
from kvpsi.hog import HogSettings

MIB = 1 << 20


def burst(reactor: Any, onset_s: float | None, gave_s: float | None) -> Burst:
    return Burst(reactor, "decoding", onset_s, gave_s, None, 8.0, 0)


def test_a_reaction_counts_from_the_first_stall() -> None:
    assert burst("kvpsi", 0.1, 0.13).reaction_s == pytest.approx(0.03)
    assert burst("kvpsi", 0.1, 0.05).reaction_s == 0, "it gave before it came to a stall"
    assert burst("kvpsi", None, 0.05).reaction_s == 0
    assert burst("kvpsi", 0.1, None).reaction_s is None


def test_where_nothing_was_given_the_whole_wait_counts() -> None:
    found = {f.name: f for f in figures_of([burst("kvpsi", 0.1, 0.15), burst("avg10", 0.5, None)])}
    assert found["decoding.reaction_p99"].value == pytest.approx(50) and found["decoding.reaction_p99"].met
    assert found["decoding.avg10_times_slower"].value == pytest.approx(7.5 / 0.05)
    assert figures_of([burst("kvpsi", 0.1, None)])[-1].met is False


def test_a_burst_that_made_no_pressure_proves_nothing() -> None:
    idle, killed = burst("kvpsi", None, None), replace(burst("kvpsi", None, None), kills=1)
    assert [f.name for f in figures_of([idle, idle])] == ["kvpsi.kills"]
    found = {f.name: f for f in figures_of([idle, killed])}
    assert found["kvpsi.kills"].met is False and found["decoding.reaction_p99"].value == 8000


@pytest.mark.parametrize("wrong", [{"bursts": 0}, {"n_tokens": 0}, {"n_tokens": 16384}])
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(Path("m.gguf"), **wrong)


@pytest.mark.engine
@pytest.mark.pressure
@pytest.mark.usefixtures("board_places")
def test_a_board_too_small_for_the_model_is_no_reaction_time(default_model: Path) -> None:
    with saved(default_model, 2048, 64) as talk, pytest.raises(KvpsiError, match="does not fit on a board"):
        play("kvpsi", "decoding", default_model, talk, 48 * MIB, HogSettings(MIB))


@pytest.mark.engine
@pytest.mark.pressure
@pytest.mark.usefixtures("board_places")
def test_a_small_burst(default_model: Path) -> None:
    hog = HogSettings(200 * MIB, rate_bytes_s=4 << 30, hold_s=2)
    with saved(default_model, 4096, 1500) as talk:
        seen = play("kvpsi", "decoding", default_model, talk, 350 * MIB, hog)
    assert seen.gave_s is not None and seen.gave_s < 2
    assert seen.returned_bytes > MIB
