"""The format of /proc/pressure/* and of a cgroup's *.pressure, and the share of a tick lost to stalls.

Source: Linux, Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvpsi.pressure._text import MalformedTextError, parse_count
from kvpsi.pressure.reading import ScopeName, Stall, StallLine

_PERCENT = r"([0-9]{1,6}(?:\.[0-9]{1,6})?)"
_LINE = re.compile(rf"(some|full) avg10={_PERCENT} avg60={_PERCENT} avg300={_PERCENT} total=([0-9]{{1,20}})")


@dataclass(frozen=True, slots=True)
class PressureLine:
    """One parsed line.

    Averages as shares (0..1) and the stall time since boot (or since the cgroup was made).
    """

    avg10: float
    avg60: float
    avg300: float
    total_us: int


@dataclass(frozen=True, slots=True)
class PressureText:
    """One parsed pressure file. ``full`` is None for system CPU pressure on kernels before 5.13."""

    some: PressureLine
    full: PressureLine | None


def parse_pressure(text: str) -> PressureText:
    """Parse ``some avg10=0.00 avg60=0.00 avg300=0.00 total=0`` and the optional ``full`` line.

    Raises MalformedTextError when the ``some`` line is missing or any line that is there is not as
    documented.
    """
    lines: dict[str, PressureLine] = {}
    for line in text.splitlines():
        if line.startswith(("some", "full")):
            match = _LINE.fullmatch(line)
            if match is None:
                raise MalformedTextError(f"not a pressure line: {line[:60]!r}")
            kind, avg10, avg60, avg300, total = match.groups()
            lines[kind] = PressureLine(
                _parse_percent(avg10), _parse_percent(avg60), _parse_percent(avg300), parse_count(total, "total")
            )
    if "some" not in lines:
        raise MalformedTextError(f"no 'some' line in {text[:40]!r}")
    return PressureText(some=lines["some"], full=lines.get("full"))


def _parse_percent(text: str) -> float:
    percent = float(text)
    if percent > 1000.0:
        raise MalformedTextError(f"not a percentage: {text[:40]!r}")
    return min(1.0, percent / 100.0)


class StallMeter:
    """Turns the counters of one pressure file into shares of the tick.

    The kernel's averages are refreshed every 2 s only and lag by more; the counter is exact at every read,
    so the share comes from its difference.
    """

    def __init__(self, scope: ScopeName) -> None:
        self.scope = scope
        self._time_s: float | None = None
        self._totals_us: tuple[int, int | None] = (0, None)
        self._last: tuple[PressureText, Stall] | None = None

    def measure(self, text: PressureText, now_s: float) -> Stall:
        """The stall since the last call; shares are 0 at the first one and after a counter went backwards.

        The same object as last time, when that was calm, gives the same stall again: nothing is computed.
        """
        if self._last is not None and self._last[0] is text and _is_calm(self._last[1]):
            self._time_s = now_s
            return self._last[1]
        elapsed_us = 0.0 if self._time_s is None else (now_s - self._time_s) * 1e6
        some_before_us, full_before_us = self._totals_us
        some = _stall_line(text.some, some_before_us, elapsed_us)
        full = None
        if text.full is not None:
            # A line that was not there a tick ago has no baseline.
            full = _stall_line(text.full, full_before_us, elapsed_us)
        self._time_s = now_s
        self._totals_us = (text.some.total_us, None if text.full is None else text.full.total_us)
        stall = Stall(some=some, full=full, scope=self.scope)
        self._last = (text, stall)
        return stall


def _is_calm(stall: Stall) -> bool:
    return stall.some.share == 0.0 and (stall.full is None or stall.full.share == 0.0)


def _stall_line(line: PressureLine, before_us: int | None, elapsed_us: float) -> StallLine:
    share = 0.0
    if before_us is not None and elapsed_us > 0.0:
        share = min(1.0, max(0.0, (line.total_us - before_us) / elapsed_us))
    return StallLine(share=share, avg10=line.avg10, avg60=line.avg60, avg300=line.avg300, total_us=line.total_us)


def worst_stall(stalls: list[Stall]) -> Stall | None:
    """The one with the larger share of the last tick; between equals the larger avg10, then the first."""
    if len(stalls) == 1:
        return stalls[0]
    return max(stalls, key=lambda stall: (stall.some.share, stall.some.avg10), default=None)
