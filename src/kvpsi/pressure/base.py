"""What every source of readings promises."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from kvpsi.pressure.reading import Reading


@runtime_checkable
class PressureSource(Protocol):
    """Yields one Reading per call. Not thread-safe: one thread reads a source."""

    def read(self) -> Reading:
        """Sense now. What could not be read is told in ``Reading.problems``, not raised."""
        ...

    def close(self) -> None:
        """Give back file descriptors; may be called twice."""
        ...

    def describe(self) -> list[str]:
        """Plain sentences about what this source can see on this machine and what it cannot."""
        ...
