"""One burst: a full model at work on a board with zram, a neighbour that takes memory at once, and a close look."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpsi.bench.conversation import Conversation, forget_cached_pages
from kvpsi.bench.lines import said
from kvpsi.bench.processes import must_have_been_killed
from kvpsi.board import Board, BoardSettings, open_board
from kvpsi.errors import EnvironmentProblem, KvpsiError
from kvpsi.hog import Hog, HogSettings
from kvpsi.units import format_bytes

Reactor = Literal["kvpsi", "avg10"]
Doing = Literal["decoding", "reading"]
# The kernel weighs each processor's stall with whole jiffies of work since the last look: whoever looks every
# millisecond makes that zero, and the counter stands still.
_LOOK_EVERY_S = 0.01
_GROUPS = ("model", "hog")
_CALM_SHARE = 0.01
_CALM_WINDOW_S = 0.1


@dataclass(frozen=True, slots=True)
class Burst:
    """What happened after the neighbour began.

    Attributes:
        reactor, doing: who reacted, and what the model was doing.
        onset_s: seconds until the kernel counted the first stall; None if it never did.
        gave_s: seconds until the first bytes went back; None if none did.
        relieved_s: seconds until both had stalled less than 1 % of a tenth of a second, after the onset; None if they
            did not within the burst.
        waited_s: seconds that were watched.
        returned_bytes: what went back in all.
        kills: processes that the kernel killed on the board.
    """

    reactor: Reactor
    doing: Doing
    onset_s: float | None
    gave_s: float | None
    relieved_s: float | None
    waited_s: float
    returned_bytes: int
    kills: int = 0

    @property
    def made_pressure(self) -> bool:
        """Whether there was anything to react to."""
        return self.onset_s is not None or self.gave_s is not None or self.kills > 0

    @property
    def reaction_s(self) -> float | None:
        """From the first stall to the first bytes; 0 where these went back before it came to a stall."""
        if self.gave_s is None:
            return None
        return max(0.0, self.gave_s - self.onset_s) if self.onset_s is not None else 0.0


def play(
    reactor: Reactor, doing: Doing, model: Path, conversation: Conversation, memory_bytes: int, hog: HogSettings
) -> Burst:
    """Make one burst.

    Raises:
        EnvironmentProblem: no board can be made here, or the kernel does not count its stall.
        KvpsiError: the model failed, or does not even fit on the board alone.
    """
    for file in (model, conversation.state):
        forget_cached_pages(file)
    with open_board(BoardSettings(memory_bytes, "zram")) as board:
        argument = conversation.as_argument(model)
        averages = str(board.pressure_file())
        command = [sys.executable, "-m", "kvpsi.bench.react.subject", reactor, doing, argument, averages]
        process = board.start(command, group="model", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        if board.stall_s("model") is None:
            raise EnvironmentProblem(
                "The kernel counts no stall of a board here: it needs PSI (psi=1 on its command line) and cgroup "
                "version 2, which may be beside version 1."
            )
        if not process.stdout.readline():
            must_have_been_killed(process)
            raise KvpsiError(f"The model does not fit on a board of {format_bytes(memory_bytes)}; raise --memory.")
        time.sleep(1.0)
        gave: list[tuple[float, int]] = []
        listener = threading.Thread(target=_listen, args=(process, gave))
        listener.start()
        began = time.monotonic()
        neighbour = Hog(hog, lambda c: board.start(c, group="hog", stdout=subprocess.PIPE))
        onset, relieved = _watch(board, began, hog.duration_s)
        if not gave:  # an average is slow
            time.sleep(max(0.0, began + hog.duration_s - time.monotonic()))
        waited_s = time.monotonic() - began
        neighbour.end()
        neighbour.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
        listener.join()
        if process.returncode != 0:
            must_have_been_killed(process)
        kills = board.figures().kills
    after = [(t, n) for t, n in gave if t >= began]
    first = after[0][0] - began if after else None
    return Burst(reactor, doing, onset, first, relieved, waited_s, sum(n for _, n in after), kills)


def _listen(process: subprocess.Popen[str], gave: list[tuple[float, int]]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            what, value = said(line)
            if what == "gave":
                gave.append((value[0], value[1]))


def _watch(board: Board, began: float, for_s: float) -> tuple[float | None, float | None]:
    """When the stall began and when it was over, in seconds from the beginning."""

    def stalled_s() -> float:
        return sum(board.stall_s(group) or 0.0 for group in _GROUPS)

    baseline_s = stalled_s()
    onset: float | None = None
    looks: list[tuple[float, float]] = []
    while (now := time.monotonic() - began) < for_s:
        stall_s = stalled_s()
        looks.append((now, stall_s))
        if onset is None and stall_s > baseline_s:
            onset = now
        if onset is not None and now - onset > _CALM_WINDOW_S:
            while len(looks) > 1 and looks[1][0] <= now - _CALM_WINDOW_S:
                looks.pop(0)
            if stall_s - looks[0][1] < _CALM_SHARE * (now - looks[0][0]):
                return onset, now
        time.sleep(_LOOK_EVERY_S)
    return onset, None
