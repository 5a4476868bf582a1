"""What the kernel would tell of simulated stalls: exact counters, and averages that it refreshes every two seconds.

Source: Linux, kernel/sched/psi.c: a group's ``some`` goes on while at least one of its tasks waits; every ``PSI_FREQ``
(2 s) the averages over 10, 60 and 300 s take in the share of the time since the last refresh.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kvpsi.pressure.psi import PressureLine, PressureText

_REFRESH_S = 2.0
_SPANS_S = (10.0, 60.0, 300.0)


class StallCounter:
    """``some`` of one group; ``clock`` tells simulated seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting = 0
        self._since_s = 0.0
        self._total_s = 0.0
        self._averages = [0.0] * len(_SPANS_S)
        self._refreshed_s = clock()
        self._refreshed_total_s = 0.0

    @property
    def total_s(self) -> float:
        """Seconds in which somebody waited, up to now."""
        running = self._clock() - self._since_s if self._waiting else 0.0
        return self._total_s + running

    def begin(self) -> None:
        """One more waits."""
        self._refresh()
        if not self._waiting:
            self._since_s = self._clock()
        self._waiting += 1

    def end(self) -> None:
        """One does not wait any more."""
        self._refresh()
        self._waiting -= 1
        if not self._waiting:
            self._total_s += self._clock() - self._since_s

    def text(self) -> PressureText:
        """As the pressure file would say it."""
        self._refresh()
        avg10, avg60, avg300 = self._averages
        return PressureText(PressureLine(avg10, avg60, avg300, int(self.total_s * 1e6)), None)

    def _refresh(self) -> None:
        """Bring the averages up to the last refresh that the kernel would have made by now."""
        now_s = self._clock()
        periods = int((now_s - self._refreshed_s) / _REFRESH_S)
        if periods < 1:
            return
        # what waits does so without a break since the last call, so that all periods but the first are alike
        for number in range(min(periods, int(10 * _SPANS_S[-1] / _REFRESH_S))):
            at_s = self._refreshed_s + (number + 1) * _REFRESH_S
            total_s = self._total_at(at_s)
            share = min(1.0, (total_s - self._refreshed_total_s) / _REFRESH_S)
            self._refreshed_total_s = total_s
            for n, span_s in enumerate(_SPANS_S):
                self._averages[n] += -math.expm1(-_REFRESH_S / span_s) * (share - self._averages[n])
        self._refreshed_s += periods * _REFRESH_S
        self._refreshed_total_s = self._total_at(self._refreshed_s)

    def _total_at(self, at_s: float) -> float:
        """The counter at a time since the last change."""
        return self._total_s + (max(0.0, at_s - self._since_s) if self._waiting else 0.0)
