"""How long to wait until the next reading: long when calm, short when memory could soon be gone."""

from __future__ import annotations

from dataclasses import dataclass

from kvpsi.pressure.reading import Headroom, Reading


@dataclass(frozen=True, slots=True)
class MonitorSettings:
    """Bounds and assumptions of the polling interval.

    ``worst_case_bytes_s`` is the speed at which a neighbour is assumed to be able to take memory at any
    moment: touching fresh pages on one core runs at about 1 GB/s. ``looks`` is how often to look before all
    would be gone at that speed. While memory stalls, the interval is at most ``stalled_interval_s``, and so
    it is for ``alert_s`` after a trigger fired (lmkd polls for one second at 10 to 100 ms).
    """

    min_interval_s: float = 0.01
    max_interval_s: float = 1.0
    worst_case_bytes_s: float = 1e9
    looks: float = 4.0
    stalled_share: float = 0.01
    stalled_interval_s: float = 0.1
    alert_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.min_interval_s <= self.stalled_interval_s:
            raise ValueError("min_interval_s must be above 0 and at most stalled_interval_s")
        if not self.min_interval_s <= self.max_interval_s:
            raise ValueError("max_interval_s must be at least min_interval_s")
        if self.worst_case_bytes_s <= 0.0 or self.looks < 1.0:
            raise ValueError("worst_case_bytes_s must be above 0 and looks at least 1")


def next_interval_s(reading: Reading, settings: MonitorSettings, *, alert: bool = False) -> float:
    """Seconds until the next reading: a quarter of the time in which the first scope could be used up.

    ``clip(available / max(worst case, -slope) / looks, min, max)`` over all scopes, like earlyoom's sleep
    (its ``main.c``), with the observed slope as a second opinion; shorter while memory stalls or after an
    alert.
    """
    scopes = reading.headrooms or (reading.headroom,)
    soonest_s = min(_seconds_left(headroom, settings.worst_case_bytes_s) for headroom in scopes)
    longest_s = settings.max_interval_s
    if alert or reading.memory.some.share >= settings.stalled_share:
        longest_s = min(longest_s, settings.stalled_interval_s)
    return min(longest_s, max(settings.min_interval_s, soonest_s / settings.looks))


def _seconds_left(headroom: Headroom, worst_case_bytes_s: float) -> float:
    return max(0.0, headroom.available_bytes / max(worst_case_bytes_s, -headroom.slope_bytes_s))
