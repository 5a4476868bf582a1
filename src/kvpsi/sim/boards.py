"""Machines that can be simulated: how much memory there is, and how fast what is slower than memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvpsi.errors import UsageError

MIB, GIB = 1 << 20, 1 << 30
TOUCH_BYTES_S = 1e9
"""How fast one processor can touch fresh memory."""


@dataclass(frozen=True, slots=True)
class Swap:
    """Where memory goes that is not used for a while.

    Attributes:
        size_bytes: how much of it there may be.
        write_bytes_s, read_bytes_s: how fast; for zram that is how fast it is compressed and unpacked.
        zero_bytes_s: how fast pages go that hold nothing but zeros, of which zram keeps only that they do.
        ram_share: what a swapped byte still takes of the board's memory: about half for zram, as much memory can be
            compressed by two, and 0 for a disk.
    """

    size_bytes: int
    write_bytes_s: float = 400 * MIB
    read_bytes_s: float = 800 * MIB
    ram_share: float = 0.5
    zero_bytes_s: float = 800 * MIB

    def __post_init__(self) -> None:
        slowest_bytes_s = min(self.write_bytes_s, self.read_bytes_s, self.zero_bytes_s)
        if self.size_bytes < 1 or slowest_bytes_s <= 0 or not 0 <= self.ram_share < 1:
            raise UsageError("Swap needs a size and speeds above 0, and its share of memory lies from 0 to below 1.")


@dataclass(frozen=True, slots=True)
class Board:
    """One machine, or a cgroup that is used like one.

    Attributes:
        name: what users call it.
        memory_bytes: all of it.
        system_bytes: what kernel and services keep of that for themselves.
        swap: None if there is none.
        memory_bytes_s: how fast the processors read memory in practice; what a token takes follows from that.
        read_bytes_s: how fast files come from the disk, read a few pages at a time as mapped weights are.
        scope: as which the board's memory appears in readings; ``system`` counts as MemAvailable does.
    """

    name: str
    memory_bytes: int
    system_bytes: int = 0
    swap: Swap | None = None
    memory_bytes_s: float = 8e9
    read_bytes_s: float = 200 * MIB
    scope: str = "system"

    def __post_init__(self) -> None:
        if not 0 <= self.system_bytes < self.memory_bytes:
            raise UsageError(f"The system of board {self.name} leaves nothing of its memory; give the board more.")
        if min(self.memory_bytes_s, self.read_bytes_s) <= 0:
            raise UsageError(f"The speeds of board {self.name} have to be above 0.")


BOARDS: Mapping[str, Board] = {
    board.name: board
    for board in (
        # bandwidth: three fifths of what the makers state (68, 102, 17 GB/s), as is usual for reading weights
        Board("orin-nano-8gb", 8 * GIB, int(1.2 * GIB), Swap(int(3.7 * GIB)), 41e9, 400 * MIB),
        Board("orin-nx-16gb", 16 * GIB, int(1.4 * GIB), Swap(int(7.6 * GIB)), 61e9, 800 * MIB),
        Board("pi5-8gb", 8 * GIB, int(0.5 * GIB), Swap(2 * GIB), 10e9, 60 * MIB),
        Board("vps-4gb", 4 * GIB, int(0.35 * GIB), None, 10e9, 150 * MIB),
        Board(
            "laptop-16gb", 16 * GIB, int(2.5 * GIB), Swap(8 * GIB, 300 * MIB, 150 * MIB, ram_share=0.0), 40e9, 500 * MIB
        ),
    )
}
"""Presets; what the system keeps is that of a machine without a desktop, but for the laptop."""


def board_named(name: str) -> Board:
    """A preset.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in BOARDS:
        raise UsageError(f"There is no board {name!r}; the presets are {', '.join(BOARDS)}.")
    return BOARDS[name]
