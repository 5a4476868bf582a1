"""Starts a neighbour's process and tells what became of it, also where the kernel killed it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpsi.hog.shape import HogSettings
from kvpsi.hog.worker import as_json

Start = Callable[[Sequence[str]], "subprocess.Popen[str]"]
"""Starts a command with its standard output in a pipe."""


@dataclass(frozen=True, slots=True)
class HogReport:
    """How a neighbour fared.

    ``stall_s`` is the time in which its cgroup waited for memory, None where it was killed or the kernel does not
    say; ``slowest_touch_s`` the longest that one step's pages took, None where it was killed.
    """

    completed: bool
    killed_by: str | None
    seconds: float
    peak_bytes: int
    slowest_touch_s: float | None
    stall_s: float | None


def worker_command(settings: HogSettings) -> list[str]:
    """The command that is such a neighbour."""
    return [sys.executable, "-m", "kvpsi.hog", as_json(settings)]


class Hog:
    """A running neighbour."""

    def __init__(self, settings: HogSettings, start: Start | None = None) -> None:
        self._process = (start or _start)(worker_command(settings))
        self._seconds, self._peak_bytes = 0.0, 0
        self._told_to_end = False

    def wait(self, tell: Callable[[float, int], None] = lambda _time_s, _size_bytes: None) -> HogReport:
        """Wait until it ends; ``tell`` hears from time to time how many bytes it has after how many seconds.

        After Ctrl-C it can be called again.
        """
        lines, report = self._process.stdout, None
        assert lines is not None
        for line in lines:
            said = json.loads(line)
            if "report" in said:
                report = said["report"]
            else:
                self._seconds, self._peak_bytes = said["time_s"], max(self._peak_bytes, said["size_bytes"])
                tell(self._seconds, said["size_bytes"])
        lines.close()
        code = self._process.wait()
        if report is None and self._told_to_end and code == -signal.SIGTERM:  # before it had begun to listen
            return HogReport(False, None, self._seconds, self._peak_bytes, None, None)
        if report is None:
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return HogReport(False, how, self._seconds, self._peak_bytes, None, None)
        return HogReport(
            report["completed"],
            None,
            report["seconds"],
            report["peak_bytes"],
            report["slowest_touch_s"],
            report["stall_s"],
        )

    def end(self) -> None:
        """Have it stop and report."""
        self._told_to_end = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    # Ctrl-C on a terminal does not reach it: it is ended by `end`, or when nobody reads what it writes any more
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
