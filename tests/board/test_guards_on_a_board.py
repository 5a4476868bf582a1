"""A neighbour that makes memory pressure on purpose does not talk a model into forgetting more than is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvpsi.board import Board, BoardSettings, open_board
from kvpsi.hog import Hog, HogSettings

pytestmark = [pytest.mark.engine, pytest.mark.pressure, pytest.mark.usefixtures("board_places")]
MIB = 1 << 20
SECONDS = 25.0
MODEL = """
import json, sys, time
from kvpsi import JsonLines, govern
from kvpsi.bench.conversation import text_tokens
from kvpsi.engines.loading import LoadSettings, open_llama, show_errors_only
from kvpsi.governor import GuardSettings, LawSettings

model, guards, high_mib, seconds, events = sys.argv[1:]
show_errors_only()
llm = open_llama(model, 8192, LoadSettings(8192, 1))
law = LawSettings(low_bytes=64 << 20, high_bytes=int(high_mib) << 20, guards=GuardSettings(**json.loads(guards)))
with open(events, "w") as file, govern(llm, settings=law, instrument=JsonLines(file)) as governed:
    cache = governed.cache
    llm.eval(text_tokens(llm, 4000))
    used, forgotten = cache.used_cells, cache.forgotten_cells
    print("READY", flush=True)
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        llm.eval([llm.sample(temp=0.0)])
        time.sleep(0.02)
    print(json.dumps({
        "forgotten_bytes": (cache.forgotten_cells - forgotten) * cache.bytes_per_cell,
        "used_bytes": used * cache.bytes_per_cell,
        "left_bytes": cache.used_cells * cache.bytes_per_cell,
        "capacity_bytes": cache.capacity_bytes,
        "trusted": cache.trusted,
    }), flush=True)
"""


def play(
    tmp_path: Path,
    model: Path,
    neighbour: HogSettings,
    guards: dict[str, float],
    high_mib: int,
    hog_limit_bytes: int = 0,
) -> tuple[dict[str, Any], list[str]]:
    """What the model says at its end, and the reasons of all decisions."""
    log, events = tmp_path / "model.log", tmp_path / "events.jsonl"
    with open_board(BoardSettings(700 * MIB, swap="zram")) as board, log.open("w") as output:
        command = [sys.executable, "-c", MODEL, model, json.dumps(guards), str(high_mib), str(SECONDS), events]
        runner = board.start(command, group="model", stdout=output, stderr=output)
        deadline = time.monotonic() + 180
        while "READY" not in log.read_text():
            assert runner.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        if hog_limit_bytes:
            limit(board, hog_limit_bytes)
        hog = Hog(neighbour, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE))
        code = runner.wait(300)
        hog.end()
        hog.wait()
    assert code == 0, log.read_text()
    told = [json.loads(line) for line in events.read_text().splitlines()]
    return json.loads(log.read_text().splitlines()[-1]), [e["reason"] for e in told if e["event"] == "decision"]


def limit(board: Board, n_bytes: int) -> None:
    """Let the neighbour have no more memory than that, so that it waits for swap all the time."""
    for folder in board.cgroups.group("hog"):
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (folder / name).exists():
                (folder / name).write_text(str(n_bytes))


def test_a_neighbour_that_only_stalls_is_given_no_more_when_that_does_not_help(
    tmp_path: Path, default_model: Path
) -> None:
    neighbour = HogSettings(110 * MIB, rate_bytes_s=200 * MIB, hold_s=300)
    report, reasons = play(tmp_path, default_model, neighbour, {}, high_mib=400, hog_limit_bytes=64 * MIB)
    assert any("stalls" in reason for reason in reasons), "there was no pressure"
    assert any("did not change that" in reason for reason in reasons)
    assert 0.5 * report["used_bytes"] < report["left_bytes"] < report["used_bytes"] and report["trusted"]


def test_pulses_of_memory_have_no_more_forgotten_than_is_allowed(tmp_path: Path, default_model: Path) -> None:
    neighbour = HogSettings(400 * MIB, rate_bytes_s=800 * MIB, hold_s=300, shape="pulse", period_s=2.0)
    guards = {"forget_bytes_per_min": 6 * MIB, "forget_burst_bytes": 10 * MIB}
    report, reasons = play(tmp_path, default_model, neighbour, guards, high_mib=128)
    assert any("a minute is forgotten" in reason for reason in reasons)
    new_bytes = 60 * SECONDS * report["capacity_bytes"] / 8192  # what new tokens may take the place of, at 60 a second
    most_bytes = 10 * MIB + 6 * MIB * (SECONDS + 5) / 60 + new_bytes
    assert 0 < report["forgotten_bytes"] <= most_bytes and report["trusted"]
