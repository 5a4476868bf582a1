"""Readings of a simulated board, as the law gets them of a real one."""

from __future__ import annotations

from dataclasses import replace

from kvpsi.pressure.psi import StallMeter
from kvpsi.pressure.rates import CounterRate, Slope
from kvpsi.pressure.reading import Headroom, Reading, Stall, Swap
from kvpsi.sim.memory import Memory


class SimSource:
    """A `kvpsi.pressure.PressureSource`: headroom is ``free + page cache - what is mapped or in the working set``, as
    of a cgroup's files.

    Args:
        memory: what is looked at.
        working_set_bytes: of files that are needed all the time, in memory or not.
    """

    def __init__(self, memory: Memory, working_set_bytes: int) -> None:
        self._memory, self._working_set_bytes = memory, working_set_bytes
        self._meter, self._slope = StallMeter(memory.board.scope), Slope()
        self._refaults = CounterRate()
        self._time_s: float | None = None

    def headroom(self) -> Headroom:
        """Without a slope."""
        memory, board = self._memory, self._memory.board
        mapped = sum(file.resident_bytes for file in memory.files)
        needed = max(mapped, self._working_set_bytes)
        reclaimable = max(-self._working_set_bytes, memory.idle_file_bytes + mapped - needed)
        usage = memory.usage_bytes
        return Headroom(
            available_bytes=board.memory_bytes - usage + reclaimable,
            slope_bytes_s=0.0,
            limit_bytes=board.memory_bytes,
            usage_bytes=usage,
            reclaimable_bytes=reclaimable,
            scope=board.scope,
        )

    def read(self) -> Reading:
        """Sense now."""
        memory, now_s = self._memory, self._memory.env.now
        room = self.headroom()
        room = replace(room, slope_bytes_s=self._slope.update(now_s, room.available_bytes))
        stall = self._meter.measure(memory.stall.text(), now_s)
        elapsed_s = 0.0 if self._time_s is None else now_s - self._time_s
        self._time_s = now_s
        swap = memory.board.swap
        return Reading(
            time_s=now_s,
            interval_s=elapsed_s,
            headroom=room,
            memory=stall,
            cpu=Stall(),
            io=Stall(),
            swap=Swap(swap.size_bytes if swap else 0, memory.swapped_bytes),
            refaults_s=self._refaults.update(now_s, memory.refaulted_bytes >> 12),
            headrooms=(room,),
        )

    def close(self) -> None:
        """Nothing is open."""

    def describe(self) -> list[str]:
        """What it is."""
        return [f"The simulated board {self._memory.board.name}."]
