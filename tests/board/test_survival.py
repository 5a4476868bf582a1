"""On a 600 MiB board a neighbour grows: stock llama.cpp is killed, the governed model and the neighbour both live."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.board import forget_cached_pages, open_board, wait_for
from support.pressure_machine import PressureMachine

RUNNER = Path(__file__).parents[1] / "support" / "runner.py"
MIB = 1 << 20


def play(
    machine: PressureMachine, tmp_path: Path, model: Path, kind: str, *, wait: str, mib: int, mib_per_s: float
) -> tuple[int, int, int, dict[str, object]]:
    """Exit codes of model and neighbour, kills, and what the model reported."""
    forget_cached_pages(model)
    log, hog_log, events = tmp_path / "model.log", tmp_path / "hog.log", tmp_path / "events.jsonl"
    with open_board(machine, limit_bytes=600 * MIB) as board:
        runner = board.start([sys.executable, RUNNER, kind, model, 16384, 3000, 150, events], log)
        assert wait_for(log, wait, runner, 120), log.read_text()
        hog = board.start_hog(mib=mib, mib_per_s=mib_per_s, hold_s=5, log=hog_log)
        hog_code, runner_code = hog.wait(300), runner.wait(300)
        kills = board.oom_kills()
    lines = log.read_text().splitlines()
    report = json.loads(lines[-1]) if runner_code == 0 else {}
    print(kind, "model", runner_code, "neighbour", hog_code, "kills", kills, report, hog_log.read_text())
    return runner_code, hog_code, kills, report


@pytest.mark.engine
@pytest.mark.pressure
def test_stock_is_killed(pressure_machine: PressureMachine, tmp_path: Path, default_model: Path) -> None:
    code, _, kills, _ = play(pressure_machine, tmp_path, default_model, "stock", wait="READY", mib=300, mib_per_s=100)
    assert code == -9
    assert kills >= 1


@pytest.mark.engine
@pytest.mark.pressure
@pytest.mark.parametrize("mib_per_s", [100, 400])
@pytest.mark.parametrize("wait", ["READY", "WRITING"])
def test_governed_lives_and_so_does_the_neighbour(
    pressure_machine: PressureMachine, tmp_path: Path, default_model: Path, mib_per_s: float, wait: str
) -> None:
    """It starts while the prompt is read, or while the answer is written; both fit only if the cache shrinks."""
    code, hog_code, kills, report = play(
        pressure_machine, tmp_path, default_model, "governed", wait=wait, mib=400, mib_per_s=mib_per_s
    )
    assert (code, hog_code, kills) == (0, 0, 0)
    assert report["produced"] == 150
    assert report["trims"]
    assert report["trusted"] is True
