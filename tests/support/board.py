"""A small machine to be killed on: one cgroup with a memory limit, and a neighbour that grows in it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.pressure_machine import PressureMachine

HOG = Path(__file__).with_name("hog.py")


@dataclass
class Board:
    """Start processes inside with `start`; all of them end with the board."""

    folder: Path
    machine: PressureMachine
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str | Path], log: Path) -> subprocess.Popen[str]:
        """Run a command inside, its standard output and error going to ``log``."""

        def enter() -> None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

        with log.open("w") as output:
            process = subprocess.Popen(
                [str(c) for c in command], stdout=output, stderr=subprocess.STDOUT, preexec_fn=enter, text=True
            )
        self.processes.append(process)
        return process

    def start_hog(self, *, mib: int, mib_per_s: float, hold_s: float, log: Path) -> subprocess.Popen[str]:
        """A neighbour that grows to ``mib``, touches all of it over and over for ``hold_s``, and ends with 0."""
        return self.start([sys.executable, HOG, mib, mib_per_s, hold_s], log)

    def oom_kills(self) -> int:
        """Processes killed for want of memory on this board so far."""
        name = "memory.events" if self.machine.version == 2 else "memory.oom_control"
        for line in (self.folder / name).read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0


@contextlib.contextmanager
def open_board(machine: PressureMachine, *, limit_bytes: int) -> Iterator[Board]:
    """A fresh cgroup, removed afterwards with everything in it."""
    folder = machine.parent / f"kvpsi-board-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    board = Board(folder, machine)
    try:
        (folder / machine.limit_file).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            if machine.version == 2:
                (folder / "memory.swap.max").write_text("0")
            else:
                (folder / "memory.swappiness").write_text("0")
        yield board
    finally:
        for process in board.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
        for _ in range(50):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def forget_cached_pages(file: Path) -> None:
    """Drop a file from the page cache, so that whoever reads it next is charged for it."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
