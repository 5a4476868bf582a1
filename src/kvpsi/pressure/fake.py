"""A clock and a source that do as they are told, for tests and for the simulator."""

from __future__ import annotations

from collections.abc import Iterable

from kvpsi.pressure.reading import Headroom, Reading, Stall, StallLine, Swap


class ManualClock:
    """A clock that moves only when told to. Call it for the time in seconds."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> float:
        """Move on and return the new time. Raises ValueError for a step back."""
        if seconds < 0.0:
            raise ValueError(f"time does not run backwards: {seconds}")
        self.now_s += seconds
        return self.now_s


class ScriptedSource:
    """Yields the given readings one after the other and then repeats the last one.

    An exception among them is raised when its turn comes. ``reads`` counts the calls.
    """

    def __init__(self, readings: Iterable[Reading | Exception]) -> None:
        self._readings = list(readings)
        if not self._readings:
            raise ValueError("a scripted source needs at least one reading")
        self.reads = 0
        self.closed = False

    def read(self) -> Reading:
        reading = self._readings[min(self.reads, len(self._readings) - 1)]
        self.reads += 1
        if isinstance(reading, Exception):
            raise reading
        return reading

    def close(self) -> None:
        self.closed = True

    def describe(self) -> list[str]:
        return [f"A script of {len(self._readings)} readings."]


def make_reading(
    *,
    time_s: float = 0.0,
    interval_s: float = 0.1,
    available_bytes: int = 4 << 30,
    limit_bytes: int = 8 << 30,
    slope_bytes_s: float = 0.0,
    memory_share: float = 0.0,
    cpu_share: float = 0.0,
    io_share: float = 0.0,
    swap: Swap | None = None,
    refaults_s: float | None = 0.0,
) -> Reading:
    """A reading of one system scope from the few figures that matter."""
    headroom = Headroom(
        available_bytes=available_bytes,
        slope_bytes_s=slope_bytes_s,
        limit_bytes=limit_bytes,
        usage_bytes=limit_bytes - available_bytes,
        reclaimable_bytes=0,
        scope="system",
    )
    return Reading(
        time_s=time_s,
        interval_s=interval_s,
        headroom=headroom,
        memory=Stall(some=StallLine(share=memory_share)),
        cpu=Stall(some=StallLine(share=cpu_share)),
        io=Stall(some=StallLine(share=io_share)),
        swap=swap or Swap(),
        refaults_s=refaults_s,
        headrooms=(headroom,),
    )
