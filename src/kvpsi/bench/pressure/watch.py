"""What the kernel says of a board while something runs on it, ten times a second."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, fields

import psutil

from kvpsi.board import Board

_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. Stall times are the kernel's counters in seconds; unknown figures are 0."""

    time_s: float
    usage_bytes: int
    model_rss_bytes: int
    hog_rss_bytes: int
    swap_used_bytes: int
    board_stall_s: float
    model_stall_s: float
    hog_stall_s: float
    refaults: int

    @classmethod
    def names(cls) -> list[str]:
        """Column names."""
        return [f.name for f in fields(cls)]


class Watch:
    """Samples from `start` to `stop`, in a thread of its own that is not on the board."""

    def __init__(self, board: Board, model_pid: int) -> None:
        self.samples: list[Sample] = []
        self.hog_pid: int | None = None
        self._board, self._model_pid = board, model_pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpsi-bench-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, after one last look."""
        self._ended.set()
        self._thread.join()
        self.samples.append(self.look())

    def look(self) -> Sample:
        """One sample."""
        board, cgroups = self._board, self._board.cgroups
        return Sample(
            time.monotonic(),
            cgroups.usage_bytes() or 0,
            _rss_bytes(self._model_pid),
            _rss_bytes(self.hog_pid),
            psutil.swap_memory().used,
            board.stall_s() or 0.0,
            board.stall_s("model") or 0.0,
            board.stall_s("hog") or 0.0,
            cgroups.refaults(),
        )

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.samples.append(self.look())


def _rss_bytes(pid: int | None) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid is not None else 0
    except psutil.Error:
        return 0
