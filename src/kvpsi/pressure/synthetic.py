"""A memory stall made up from headroom and swapping, for machines without Pressure Stall Information."""

from __future__ import annotations

import math

from kvpsi.pressure.reading import Headroom, ScopeName, Stall, StallLine

SYNTHETIC_SCOPE: ScopeName = "fallback"
COMFORT_SHARE = 0.10
COMFORT_MAX_BYTES = 1 << 30
SWAP_IN_HALF_BYTES_S = 64 << 20


def synthetic_share(headroom: Headroom, swap_in_bytes_s: float) -> float:
    """The share of time (0..1) that is taken to be lost: more with less headroom, more with faster swap-in.

    ``comfort = min(10 % of the limit, 1 GiB)``, ``h = clip((comfort - available) / comfort, 0, 1) ** 2``,
    ``s = swap_in / (swap_in + 64 MiB/s)``, ``share = 1 - (1 - h) * (1 - s)``. It is 0 with a comfortable
    headroom and no swap-in, 1 when nothing is left, and monotone in both. The 10 % are earlyoom's default;
    64 MiB/s is about where a SATA drive reading scattered pages keeps its readers waiting half of the time.
    """
    comfort_bytes = min(COMFORT_SHARE * headroom.limit_bytes, COMFORT_MAX_BYTES)
    if comfort_bytes <= 0.0:
        low = 1.0
    else:
        low = min(1.0, max(0.0, (comfort_bytes - headroom.available_bytes) / comfort_bytes)) ** 2
    swap_in_bytes_s = max(0.0, swap_in_bytes_s)
    swapping = swap_in_bytes_s / (swap_in_bytes_s + SWAP_IN_HALF_BYTES_S)
    return 1.0 - (1.0 - low) * (1.0 - swapping)


class SyntheticStall:
    """Keeps what the kernel would keep: the averages over 10, 60 and 300 s and the running total."""

    def __init__(self) -> None:
        self._averages = [0.0, 0.0, 0.0]
        self._total_us = 0.0

    def measure(self, headroom: Headroom, swap_in_bytes_s: float, interval_s: float) -> Stall:
        """The stall over a tick of ``interval_s`` seconds. There is no ``full`` line."""
        share = synthetic_share(headroom, swap_in_bytes_s)
        for index, span_s in enumerate((10.0, 60.0, 300.0)):
            weight = -math.expm1(-interval_s / span_s)
            self._averages[index] += weight * (share - self._averages[index])
        self._total_us += share * interval_s * 1e6
        avg10, avg60, avg300 = self._averages
        some = StallLine(share=share, avg10=avg10, avg60=avg60, avg300=avg300, total_us=int(self._total_us))
        return Stall(some=some, scope=SYNTHETIC_SCOPE)
