"""Two real models on one board that both want more than fits come to their shares, and one inherits the other's."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpsi.board import Board, BoardSettings, open_board
from kvpsi.hog import Hog, HogSettings
from kvpsi.sim.together.many import TOLERANCE
from kvpsi.sim.together.situation import SETTLING_S
from kvpsi.sim.together.swings import SWING_SHARE, swings

pytestmark = [pytest.mark.engine, pytest.mark.pressure, pytest.mark.usefixtures("board_places")]
MIB = 1 << 20
JUDGED_S = 20.0
CAPACITY = 8192 * 23040  # 30 layers, 3 KV heads of 64, K and V, two bytes each
# holds 2,400 tokens, reads on slowly when it is told to, and notes four times a second what it holds
MODEL = """
import json, sys, threading, time
from kvpsi import govern
from kvpsi.bench.conversation import text_tokens
from kvpsi.engines.loading import LoadSettings, open_llama, show_errors_only
from kvpsi.governor import ShareSettings

model, weight, folder, looks = sys.argv[1:]
show_errors_only()
llm = open_llama(model, 8192, LoadSettings(8192, 1))

def watch(governed):
    with open(looks, "w", buffering=1) as file:
        while not ended.wait(0.25):
            cache, decision = governed.cache, governed.governor.decision
            print(json.dumps({
                "at_s": time.monotonic(),
                "used_bytes": cache.used_cells * cache.bytes_per_cell,
                "limit_bytes": governed.governor.state.limit_bytes,
                "share_bytes": decision.share.share_bytes if decision.share else None,
                "headroom_bytes": governed.governor.reading.headroom.available_bytes,
                "reason": decision.reason,
                "trusted": cache.trusted,
            }), file=file)

ended = threading.Event()
with govern(llm, share=ShareSettings(float(weight), folder=folder)) as governed:
    watcher = threading.Thread(target=watch, args=(governed,))
    watcher.start()
    text = text_tokens(llm, 8000)
    llm.eval(text[:2400])
    print("READY", flush=True)
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set())).start()
    while not ended.wait(0.5):
        if llm.n_tokens < len(text):
            llm.eval(text[llm.n_tokens : llm.n_tokens + 64])
    watcher.join()
"""


class Model:
    """One of them, in a process of its own."""

    def __init__(self, board: Board, model: Path, folder: Path, weight: float) -> None:
        self.looks_file, self.log = folder / f"looks-{weight:g}.jsonl", folder / f"model-{weight:g}.log"
        with self.log.open("w") as log:
            command = [sys.executable, "-c", MODEL, model, str(weight), folder / "records", self.looks_file]
            self.process = board.start(
                command, group=f"model-{weight:g}", stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while "READY" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def tell(self) -> None:
        """Have it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        """Until it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)

    def looks(self, from_s: float, until_s: float) -> list[dict[str, float]]:
        """What it noted in a time."""
        lines = [json.loads(line) for line in self.looks_file.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        return [look for look in lines if from_s <= look["at_s"] < until_s]


def used(looks: list[dict[str, float]]) -> float:
    return statistics.fmean(look["used_bytes"] for look in looks)


def test_two_models_come_to_their_shares_and_one_inherits(tmp_path: Path, default_model: Path) -> None:
    records = tmp_path / "records"
    with open_board(BoardSettings(600 * MIB)) as board:
        small, large = (Model(board, default_model, tmp_path, weight) for weight in (1.0, 2.0))
        neighbour = HogSettings(245 * MIB, rate_bytes_s=100 * MIB, hold_s=300)
        hog = Hog(neighbour, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE))
        assert len(list(records.iterdir())) == 2
        for each in (small, large):
            each.tell()
        began_s = time.monotonic()
        time.sleep(SETTLING_S + JUDGED_S)
        span = (began_s + SETTLING_S, began_s + SETTLING_S + JUDGED_S)
        ours, theirs = small.looks(*span), large.looks(*span)
        share = used(ours) / (used(ours) + used(theirs))
        turns = {
            name: [swings([look[name] for look in looks], SWING_SHARE * CAPACITY) for looks in (ours, theirs)]
            for name in ("limit_bytes", "used_bytes")
        }
        least = min(look["headroom_bytes"] for look in (*ours, *theirs))
        print(
            f"{used(ours) / MIB:.1f} and {used(theirs) / MIB:.1f} MiB: share {share:.3f}, turned round {turns}, "
            f"least headroom {least / MIB:.0f} MiB, kills {board.figures().kills}"
        )

        small.process.send_signal(signal.SIGKILL)
        small.wait()
        killed_s = time.monotonic()
        time.sleep(20)
        inherited = large.looks(killed_s + 15, killed_s + 20)
        print(f"after the other was killed: {used(inherited) / MIB:.1f} MiB")
        assert [path.name.split("-")[0] for path in records.iterdir()] == [str(large.process.pid)]
        large.tell()
        assert large.wait() == 0, large.log.read_text()
        assert list(records.iterdir()) == []
        kills = board.figures().kills
        hog.end()
        fared = hog.wait()
    assert kills == 0 and fared.killed_by is None
    assert share == pytest.approx(1 / 3, rel=TOLERANCE)
    assert 1 - share == pytest.approx(2 / 3, rel=TOLERANCE)
    assert max(turns["limit_bytes"]) <= JUDGED_S / 10, "it swings"
    assert used(inherited) > 1.2 * used(theirs)
    assert all(look["trusted"] for look in (*ours, *theirs, *inherited))
