"""How much memory a neighbour wants at which time: pure functions of the seconds since it began."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, get_args

from kvpsi.errors import UsageError

ShapeName = Literal["grow", "pulse", "ramp", "sawtooth", "trace"]
MemoryKind = Literal["anon", "file", "both"]
_ABOVE_ZERO = {
    "size_bytes": "--pressure-mib",
    "step_bytes": "--pressure-step-mib",
    "rate_bytes_s": "--rate-mib-s",
    "period_s": "--period-s",
}
_NOT_NEGATIVE = {"warmup_s": "--pressure-warmup-s", "hold_s": "--hold-s"}
_MIB = 1 << 20


def step_bytes_for(size_bytes: int, least_bytes: int) -> int:
    """Steps for a neighbour that has ``size_bytes`` at most: a 256th of it in whole MiB, and 2 MiB at least; but no
    more than ``least_bytes``, as a process takes whole steps only, and less than one not at all."""
    return max(1, min(least_bytes, max(2 * _MIB, size_bytes // 256 // _MIB * _MIB)))


@dataclass(frozen=True, slots=True)
class HogSettings:
    """What the neighbour does.

    Attributes:
        size_bytes: the most it takes.
        step_bytes: it takes, and gives back, so much at once, and never a part of it.
        warmup_s: it waits so long before it begins.
        rate_bytes_s: how fast it grows.
        hold_s: how long it goes on once it has its size for the first time.
        shape: ``grow`` takes its size and keeps it; ``pulse`` has it in every first half of ``period_s`` and nothing
            in the second; ``sawtooth`` grows all through the period and drops everything at its end; ``ramp`` grows
            in the first half and shrinks in the second; ``trace`` follows ``trace``.
        period_s: of pulse, sawtooth and ramp, which grow at ``rate_bytes_s`` at most.
        kind: ``anon`` is memory of its own, ``file`` the page cache of a file, ``both`` half of each.
        trace: (seconds, bytes) in order of time; each holds until the next.
    """

    size_bytes: int = 256 << 20
    step_bytes: int = 2 << 20
    warmup_s: float = 0.0
    rate_bytes_s: float = 100 << 20
    hold_s: float = 10.0
    shape: ShapeName = "grow"
    period_s: float = 4.0
    kind: MemoryKind = "anon"
    trace: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        for name, option in _ABOVE_ZERO.items():
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"The neighbour's {name} ({option}) has to be a number above 0.")
        for name, option in _NOT_NEGATIVE.items():
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"The neighbour's {name} ({option}) has to be a number of seconds, 0 or more.")
        if self.shape not in get_args(ShapeName) or self.kind not in get_args(MemoryKind):
            raise UsageError(
                f"A neighbour's shape is one of {', '.join(get_args(ShapeName))} and its kind one of "
                f"{', '.join(get_args(MemoryKind))}, not {self.shape} and {self.kind}."
            )
        if (self.shape == "trace") != bool(self.trace):
            raise UsageError("A neighbour follows a trace if its shape is trace, and only then: give both or neither.")

    @property
    def grown_s(self) -> float:
        """Seconds after the warm-up at which it has its size for the first time."""
        return self.size_bytes / self.rate_bytes_s

    @property
    def duration_s(self) -> float:
        """When it ends, in seconds from its beginning."""
        if self.trace:
            return self.warmup_s + self.trace[-1][0] + self.hold_s
        return self.warmup_s + self.grown_s + self.hold_s

    def target_bytes(self, time_s: float) -> int:
        """What it wants ``time_s`` seconds after its beginning."""
        t = time_s - self.warmup_s
        if t < 0:
            return 0
        if self.trace:
            at = bisect_right(self.trace, t, key=lambda point: point[0])
            return self.trace[at - 1][1] if at else 0
        if self.shape == "grow":
            return self._grown(t)
        into, half = t % self.period_s, self.period_s / 2
        if self.shape == "pulse":
            return self._grown(into) if into < half else 0
        if self.shape == "sawtooth":
            return min(self._grown(into), int(self.size_bytes * into / self.period_s))
        rising = into if into < half else self.period_s - into
        return min(self._grown(into), int(self.size_bytes * rising / half))

    def _grown(self, t: float) -> int:
        return min(self.size_bytes, int(t * self.rate_bytes_s))
