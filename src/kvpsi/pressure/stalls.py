"""The three pressure files of one scope."""

from __future__ import annotations

from pathlib import Path

from kvpsi.pressure._text import MalformedTextError
from kvpsi.pressure.files import HotFile
from kvpsi.pressure.psi import PressureText, StallMeter, parse_pressure
from kvpsi.pressure.reading import Resource, ScopeName, Stall

RESOURCES: tuple[Resource, ...] = ("memory", "cpu", "io")


class PressureFiles:
    """memory, cpu and io pressure of a directory; ``pattern`` makes the file name of a resource."""

    def __init__(self, directory: Path, pattern: str, *, scope: ScopeName, keep_open: bool) -> None:
        self.scope = scope
        self._files = {
            resource: HotFile(directory / pattern.format(resource), keep_open=keep_open) for resource in RESOURCES
        }
        self.what = {resource: f"{resource.capitalize()} pressure of {scope}" for resource in RESOURCES}
        self._meters = {resource: StallMeter(scope) for resource in RESOURCES}
        self._parsed: dict[Resource, tuple[str, PressureText]] = {}

    def measure(self, resource: Resource, now_s: float) -> Stall:
        """The stall since the last call. Raises OSError and MalformedTextError."""
        text = self._files[resource].read()
        parsed = self._parsed.get(resource)
        if parsed is None or parsed[0] != text:
            parsed = self._parsed[resource] = (text, parse_pressure(text))
        return self._meters[resource].measure(parsed[1], now_s)

    def works(self, resource: Resource) -> bool:
        """Can this file be read at all? (Switched off, the kernel answers EOPNOTSUPP or hides it.)"""
        try:
            parse_pressure(self._files[resource].read())
        except (OSError, MalformedTextError):
            return False
        return True

    def close(self) -> None:
        for file in self._files.values():
            file.close()
