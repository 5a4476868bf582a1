"""The cgroups of one board: made with their limits, joined, read, and removed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvpsi.board.places import CPU_QUOTA_FILE, MEMORY_LIMIT_FILE, BoardPlaces, Place

_PERIOD_US = 100_000
_REMOVAL_S = 20.0


@dataclass(frozen=True, slots=True)
class BoardCgroups:
    """A directory called ``name`` in each of the places, and below it one for each group of processes."""

    places: BoardPlaces
    name: str

    @property
    def folders(self) -> tuple[Path, ...]:
        """The board's own directories."""
        return tuple(place.path / self.name for place in self.places.all)

    @property
    def memory(self) -> Path:
        """The one that limits memory."""
        return self.places.memory.path / self.name

    def make(self, memory_bytes: int | None, *, swap: str, cpus: float | None) -> None:
        """Make the directories and set the limits.

        Raises:
            OSError: the kernel refused.
        """
        for folder in self.folders:
            folder.mkdir()
        version = self.places.memory.version
        if memory_bytes is not None:
            self.limit_memory(memory_bytes)
        if version == 1:
            with contextlib.suppress(OSError):  # newer kernels always count what is below
                _write(self.memory / "memory.use_hierarchy", 1)
            if swap != "shared":
                _write(self.memory / "memory.swappiness", 60 if swap == "zram" else 0)
        elif swap == "none":
            _write(self.memory / "memory.swap.max", 0)
        if cpus is not None and self.places.cpu is not None:
            self._limit_cpus(self.places.cpu, cpus)
        for place in self.places.all:
            if place.version == 2:
                self._hand_down(place.path / self.name)

    def limit_memory(self, memory_bytes: int) -> None:
        """Set the limit anew.

        Raises:
            OSError: the kernel refused, in version 1 also if it can reclaim no more of what is used above that limit.
        """
        _write(self.memory / MEMORY_LIMIT_FILE[self.places.memory.version], memory_bytes)

    def _limit_cpus(self, place: Place, cpus: float) -> None:
        quota_us = max(1000, int(cpus * _PERIOD_US))
        file = place.path / self.name / CPU_QUOTA_FILE[place.version]
        _write(file, f"{quota_us} {_PERIOD_US}" if place.version == 2 else quota_us)

    @staticmethod
    def _hand_down(folder: Path) -> None:
        """Let the groups below count their own memory, where the kernel does that."""
        with contextlib.suppress(OSError):
            _write(folder / "cgroup.subtree_control", "+memory")

    def group(self, name: str) -> tuple[Path, ...]:
        """Directories of a group of processes, made if they are not there."""
        folders = tuple(folder / name for folder in self.folders)
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return folders

    # -- reading -------------------------------------------------------------------------------------------------

    def kills(self, group: str = "") -> int:
        """Processes that the kernel killed for want of memory, in one group or on the whole board."""
        if not group:
            return sum(self.kills(each.name) for each in self.memory.iterdir() if each.is_dir())
        name = "memory.events.local" if self.places.memory.version == 2 else "memory.oom_control"
        return _field(self.memory / group / name, "oom_kill")

    def peak_bytes(self) -> int | None:
        """The most memory that the board ever used; None where the kernel does not say."""
        name = "memory.peak" if self.places.memory.version == 2 else "memory.max_usage_in_bytes"
        return _number(self.memory / name)

    def usage_bytes(self, group: str = "") -> int | None:
        """Memory that the board uses, or one group of it; None where the kernel does not say."""
        name = "memory.current" if self.places.memory.version == 2 else "memory.usage_in_bytes"
        return _number(self.memory / group / name)

    def pressure_file(self, group: str = "", resource: str = "memory") -> Path | None:
        """Where the kernel tells the stall of the board or one group; None without PSI."""
        if self.places.pressure is None:
            return None
        file = self.places.pressure.path / self.name / group / f"{resource}.pressure"
        return file if file.exists() else None

    def refaults(self, group: str = "") -> int:
        """File pages that had to be read again after the kernel dropped them."""
        stat = self.memory / group / "memory.stat"
        total = "" if self.places.memory.version == 2 else "total_"  # version 2's figures include the groups below
        return max(_field(stat, total + name) for name in ("workingset_refault_file", "workingset_refault"))


def remove_tree(top: Path) -> None:
    """End all that runs in a cgroup and below, and remove the directories; does nothing if they are not there.

    Raises:
        OSError: something would not go within 20 s.
    """
    deadline = time.monotonic() + _REMOVAL_S
    for folder in _deepest_first(top):
        with contextlib.suppress(OSError):  # version 1: drop the files it read, so that nothing of it lingers
            _write(folder / "memory.force_empty", 0)
        while True:
            _kill_all(folder)
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _deepest_first(top: Path) -> Iterator[Path]:
    for folder, _, _ in os.walk(top, topdown=False):
        yield Path(folder)


def _kill_all(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _write(file: Path, value: object) -> None:
    with file.open("r+") as opened:
        opened.write(str(value))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _field(file: Path, name: str) -> int:
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
