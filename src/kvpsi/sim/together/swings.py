"""How calm a limit is."""

from __future__ import annotations

from collections.abc import Sequence

SWING_SHARE = 0.02
"""Of a cache's whole size: a limit that turns round by less than this does not swing."""


def swings(values: Sequence[float], least: float) -> int:
    """How often a series turns round: goes up after it went down, or down after it went up, by more than ``least``."""
    count, direction = 0, 0
    peak = trough = values[0] if values else 0.0
    for value in values:
        peak, trough = max(peak, value), min(trough, value)
        if direction <= 0 and value - trough > least:
            count += direction < 0
            direction, peak = 1, value
        elif direction >= 0 and peak - value > least:
            count += direction > 0
            direction, trough = -1, value
    return count
