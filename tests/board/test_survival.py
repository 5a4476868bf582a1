"""On a 600 MiB board a neighbour grows: stock llama.cpp is killed, the governed model and the neighbour both live."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpsi.bench.conversation import forget_cached_pages
from kvpsi.board import BoardSettings, open_board
from kvpsi.hog import Hog, HogSettings

RUNNER = Path(__file__).parents[1] / "support" / "runner.py"
MIB = 1 << 20

pytestmark = [pytest.mark.engine, pytest.mark.pressure, pytest.mark.usefixtures("board_places")]


def play(
    tmp_path: Path, model: Path, kind: str, *, wait: str, mib: int, mib_per_s: float
) -> tuple[int, str | None, int, dict[str, object]]:
    """Exit code of the model, what killed the neighbour, kills, and what the model reported."""
    forget_cached_pages(model)
    log, events = tmp_path / "model.log", tmp_path / "events.jsonl"
    neighbour = HogSettings(mib * MIB, rate_bytes_s=mib_per_s * MIB, hold_s=5)
    with open_board(BoardSettings(600 * MIB)) as board, log.open("w") as output:
        runner = board.start(
            [sys.executable, RUNNER, kind, model, "16384", "3000", "150", events],
            group="model",
            stdout=output,
            stderr=output,
        )
        assert wait_for(log, wait, runner, 120), log.read_text()
        hog = Hog(neighbour, lambda command: board.start(command, group="neighbour", stdout=subprocess.PIPE))
        fared, code = hog.wait(), runner.wait(300)
        kills = board.figures().kills
    lines = log.read_text().splitlines()
    report = json.loads(lines[-1]) if code == 0 else {}
    print(kind, "model", code, "neighbour", fared, "kills", kills, report)
    return code, fared.killed_by, kills, report


def wait_for(log: Path, text: str, process: subprocess.Popen[str], timeout_s: float) -> bool:
    """Whether ``text`` shows up in a log before the process ends or time runs out."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if text in log.read_text():
            return True
        if process.poll() is not None:
            return text in log.read_text()
        time.sleep(0.05)
    return False


def test_stock_is_killed(tmp_path: Path, default_model: Path) -> None:
    code, _, kills, _ = play(tmp_path, default_model, "stock", wait="READY", mib=300, mib_per_s=100)
    assert code == -9
    assert kills >= 1


@pytest.mark.parametrize("mib_per_s", [100, 400])
@pytest.mark.parametrize("wait", ["READY", "WRITING"])
def test_governed_lives_and_so_does_the_neighbour(
    tmp_path: Path, default_model: Path, mib_per_s: float, wait: str
) -> None:
    """It starts while the prompt is read, or while the answer is written; both fit only if the cache shrinks."""
    code, killed_by, kills, report = play(tmp_path, default_model, "governed", wait=wait, mib=400, mib_per_s=mib_per_s)
    assert (code, killed_by, kills) == (0, None, 0)
    assert report["produced"] == 150
    assert report["trims"]
    assert report["trusted"] is True
