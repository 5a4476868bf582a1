"""The bench of many short runs: its scenarios, its counting, and one small real run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvpsi.bench.conversation import Conversation, saved
from kvpsi.bench.oom.play import Outcome, play
from kvpsi.bench.oom.run import Plan, figures_of, row_of, run
from kvpsi.bench.oom.scenarios import draw
from kvpsi.bench.table import Table
from kvpsi.board import BoardPlaces
from kvpsi.errors import KvpsiError, UsageError
from kvpsi.hog import HogReport
from support.boards import left_behind

MIB = 1 << 20
ROOM = {1: 400 * MIB, 2: 300 * MIB}


def test_the_same_seed_draws_the_same_and_every_combination_comes() -> None:
    scenarios = draw(48, 7, ROOM)
    assert scenarios == draw(48, 7, ROOM) != draw(48, 8, ROOM)
    seen = {(s.swap, s.n_models, s.full, s.hog.shape) for s in scenarios}
    assert len(seen) == 24
    for s in scenarios:
        assert 0.74 * ROOM[s.n_models] < s.hog.size_bytes <= 0.95 * ROOM[s.n_models]
        assert 20 * MIB <= s.hog.rate_bytes_s <= 400 * MIB
        peak = max(s.hog.target_bytes(t / 20) for t in range(int(20 * s.hog.duration_s) + 1))
        assert peak > 0.9 * s.hog.size_bytes, "it really gets there"


def outcome(variant: Any, kills: int, done: list[dict[str, Any] | None]) -> Outcome:
    hog = HogReport(True, None, 1.0, MIB, 0.001, 0.0)
    return Outcome(draw(1, 1, ROOM)[0], variant, done, hog, kills, 500 * MIB, 0.5)


def test_kills_and_refusals_are_counted() -> None:
    said = {"seconds": [0.03, 0.04], "refused": 2, "trims": 1, "trusted": True}
    outcomes = [outcome("kvpsi", 0, [said]), outcome("fixed", 1, [None]), outcome("fixed", 0, [said])]
    found = {f.name: f for f in figures_of(outcomes)}
    assert found["kvpsi.runs_with_kills"].met and found["kvpsi.refused_tokens"].value == 2
    assert found["fixed.share_of_runs_with_kills"].value == 0.5
    assert figures_of([outcome("kvpsi", 1, [None])])[0].met is False
    assert row_of(outcomes[0])["max_ms"] == 40 and row_of(outcomes[1])["models_killed"] == 1


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"variants": ()}, {"variants": ("magic",)}])
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(Path("m.gguf"), **wrong)


def test_every_run_is_written_down_when_it_is_over(tmp_path: Path) -> None:
    said = {"seconds": [0.03], "refused": 0, "trims": 1, "trusted": True}
    table = Table(tmp_path / "new" / "oom.csv")
    for number in range(1, 3):
        table.add(row_of(outcome("kvpsi", 0, [said])))
        assert len((tmp_path / "new" / "oom.csv").read_text().splitlines()) == 1 + number
    assert table.problem is None


def test_a_full_disk_ends_nothing_and_is_told() -> None:
    table = Table(Path("/dev/full"))
    for _ in range(2):
        table.add(row_of(outcome("fixed", 1, [None])))
    assert table.rows == 0 and table.problem is not None
    assert "No space left" in table.problem


@pytest.mark.engine
@pytest.mark.pressure
def test_a_model_that_fails_is_no_model_that_was_killed(
    board_places: BoardPlaces, default_model: Path, tmp_path: Path
) -> None:
    broken = Conversation(512, 100, tmp_path / "broken.state")
    broken.state.write_bytes(b"not a state")
    with pytest.raises(KvpsiError, match="ended early"):
        play(draw(1, 1, ROOM)[0], "fixed", default_model, broken, 600 * MIB)
    assert not left_behind(board_places, os.getpid())


@pytest.mark.engine
@pytest.mark.pressure
def test_a_model_that_is_killed_at_once_is_a_result(board_places: BoardPlaces, default_model: Path) -> None:
    with saved(default_model, 16384, 100) as talk:
        seen = play(draw(1, 1, {1: 20 * MIB, 2: 20 * MIB})[0], "fixed", default_model, talk, 300 * MIB)
    assert seen.models_killed >= 1 and seen.kills >= 1
    assert not left_behind(board_places, os.getpid())


@pytest.mark.engine
@pytest.mark.pressure
@pytest.mark.usefixtures("board_places")
def test_one_small_run(default_model: Path, tmp_path: Path) -> None:
    document = run(Plan(default_model, runs=1, seed=3, n_ctx=(1024, 512)), tmp_path, lambda _: None)
    assert document["interrupted"] is False and document["problems"] == []
    variants: Any = document["variants"]
    assert variants["kvpsi"]["runs"] == variants["fixed"]["runs"] == 1
    assert variants["kvpsi"]["runs_with_kills"] == 0 and variants["kvpsi"]["p50_ms"] > 0
    assert len((tmp_path / "oom.csv").read_text().splitlines()) == 3
