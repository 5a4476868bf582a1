"""Makes a board, runs commands on it and takes it away again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal, get_args

from kvpsi.board import zram
from kvpsi.board.cgroups import BoardCgroups
from kvpsi.board.charge import SwapCharge
from kvpsi.board.janitor import Janitor
from kvpsi.board.places import find_places
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.pressure.psi import parse_pressure
from kvpsi.units import format_bytes

SwapKind = Literal["none", "zram", "shared"]
_LEAST_BYTES = 16 << 20
LEAST_CPUS, MOST_CPUS = 0.01, 1024
_SYSTEM_PRESSURE = Path("/proc/pressure/memory")
# Joins the cgroups named before "--" and becomes the command behind it; no other process of ours is on the board.
_ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"'


@dataclass(frozen=True, slots=True)
class BoardSettings:
    """What the small machine has.

    Attributes:
        memory_bytes: its memory; None: as much as there is.
        swap: ``shared`` is whatever this machine has. ``zram`` swaps to compressed memory; half of ``memory_bytes``
            fits in before it is compressed. What it then takes is taken off ``memory_bytes``, as on a machine of that
            size.
        cpus: processors, may be a fraction; None: all that there are.
    """

    memory_bytes: int | None
    swap: SwapKind = "none"
    cpus: float | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes is None:
            if self.swap == "zram":
                raise UsageError("A board with zram needs a size: give it one with --memory.")
        elif self.memory_bytes < _LEAST_BYTES:
            raise UsageError(
                f"A board of {format_bytes(self.memory_bytes)} is too small to run anything; "
                f"give it at least {format_bytes(_LEAST_BYTES)}."
            )
        if self.swap not in get_args(SwapKind):
            raise UsageError(f"A board's swap is one of {', '.join(get_args(SwapKind))}, not {self.swap!r}.")
        if self.cpus is not None and not LEAST_CPUS <= self.cpus <= MOST_CPUS:
            raise UsageError(
                f"A board cannot have {self.cpus:g} processors; give it between {LEAST_CPUS} and {MOST_CPUS}."
            )


@dataclass(frozen=True, slots=True)
class BoardFigures:
    """What the kernel counted on the board so far.

    ``stall_s`` is the time in which at least one process waited for memory; it and ``peak_bytes`` are None where
    the kernel does not say.
    """

    kills: int
    peak_bytes: int | None
    stall_s: float | None


class Board:
    """Runs commands; see `open_board`."""

    def __init__(self, cgroups: BoardCgroups) -> None:
        self.cgroups = cgroups
        self._processes: list[subprocess.Popen[str]] = []

    def start(
        self,
        command: Sequence[str | Path],
        *,
        group: str = "main",
        stdin: int | IO[str] | None = None,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Run a command on the board, in a group of its own so that its stall is counted apart.

        Raises:
            OSError: the shell that joins the cgroups could not be started.
        """
        folders = [str(folder) for folder in self.cgroups.group(group)]
        process = subprocess.Popen(
            ["/bin/sh", "-c", _ENTER, "sh", *folders, "--", *map(str, command)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            text=True,
        )
        self._processes.append(process)
        return process

    def figures(self) -> BoardFigures:
        """What the kernel counted so far."""
        return BoardFigures(self.cgroups.kills(), self.cgroups.peak_bytes(), self.stall_s())

    def stall_s(self, group: str = "", kind: Literal["some", "full"] = "some") -> float | None:
        """Seconds in which some (or all) processes of a group, or of the board, waited for memory."""
        file = self.cgroups.pressure_file(group)
        if file is None:
            return None
        try:
            pressure = parse_pressure(file.read_text())
        except (OSError, ValueError):
            return None
        line = pressure.some if kind == "some" else pressure.full
        return line.total_us / 1e6 if line is not None else None

    def pressure_file(self) -> Path:
        """Where the kernel tells the board's memory stall; without one of its own, the system's."""
        return self.cgroups.pressure_file() or _SYSTEM_PRESSURE

    def end(self) -> None:
        """End all that still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def open_board(settings: BoardSettings) -> Iterator[Board]:
    """A fresh board, removed afterwards with everything on it.

    Raises:
        EnvironmentProblem: this machine lets none be made; says why, and what would help.
    """
    places = find_places()
    if settings.cpus is not None and places.cpu is None:
        raise EnvironmentProblem("No processor limit can be set here, as there is no cpu controller: leave out --cpus.")
    cgroups = BoardCgroups(places, f"kvpsi-board-{os.getpid()}-{time.monotonic_ns()}")
    janitor = Janitor()
    board = Board(cgroups)
    charge: SwapCharge | None = None
    try:
        device: int | None = None
        if settings.swap == "zram" and settings.memory_bytes is not None:
            device = zram.put_in(settings.memory_bytes // 2, lambda number: janitor.will_undo("zram", number))
        for folder in cgroups.folders:
            janitor.will_undo("cgroup", str(folder))
        try:
            cgroups.make(settings.memory_bytes, swap=settings.swap, cpus=settings.cpus)
        except OSError as error:
            raise EnvironmentProblem(
                f"No board can be made here ({error}): run as root, with a memory controller."
            ) from error
        if device is not None and settings.memory_bytes is not None:
            charge = SwapCharge(settings.memory_bytes, partial(zram.used_bytes, device), cgroups.limit_memory)
            charge.start()
        yield board
    finally:
        with _uninterrupted():
            board.end()
            if charge:
                charge.stop()
            left = janitor.finish()
    if left:
        raise EnvironmentProblem(left)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until it is over; a process that is killed meanwhile leaves the rest to the janitor."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
