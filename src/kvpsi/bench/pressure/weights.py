"""What can be done for mapped weights, the first pages that the kernel drops: read them back at once after a trim."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from kvpsi.instrument import Instrument
from kvpsi.kv.pages import Mapping, populate


def mapped(file: Path, maps: Path = Path("/proc/self/maps")) -> list[Mapping]:
    """Where this process has mapped a file."""
    found = []
    wanted = str(file.resolve())
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted:
            low, _, high = fields[0].partition("-")
            found.append(Mapping(int(low, 16), int(high, 16)))
    return found


class Populator(Instrument):
    """Reads the weights back in a thread of its own whenever memory was given."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="kvpsi-bench-populate", daemon=True).start()

    def event(self, name: str, _value: Any) -> None:
        """Memory was given."""
        if name in ("trim", "release"):
            self._wanted.set()

    def _run(self) -> None:
        while self._wanted.wait():
            self._wanted.clear()
            populate(mapped(self._file))
