"""What a governor's last reading says of the room that there is, as the engine asks for it; from any thread."""

from __future__ import annotations

from kvpsi.governor import Governor


class SensedHeadroom:
    """Nothing is known where nothing is governed.

    Attributes:
        governor: set as soon as there is one.
    """

    def __init__(self) -> None:
        self.governor: Governor | None = None

    def free_bytes(self) -> int:
        """Headroom."""
        reading = self.governor.reading if self.governor else None
        return reading.headroom.available_bytes if reading else 0

    def spare_bytes(self) -> int:
        """Headroom beyond the reserve."""
        governor = self.governor
        reading = governor.reading if governor else None
        if governor is None or reading is None:
            return 0
        return reading.headroom.available_bytes - governor.settings.low_for(reading.headroom.limit_bytes)

    def is_tight(self) -> bool:
        """Whether headroom is below twice that at which the cache stops to grow."""
        governor = self.governor
        reading = governor.reading if governor else None
        if governor is None or reading is None:
            return False
        return reading.headroom.available_bytes < 2 * governor.settings.high_for(reading.headroom.limit_bytes)
