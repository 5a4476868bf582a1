"""How much memory a neighbour wants at which time: pure functions of the seconds since it began."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kvpsi.errors import UsageError
from kvpsi.pressure._text import MalformedTextError
from kvpsi.units import parse_bytes

ShapeName = Literal["grow", "pulse", "ramp", "sawtooth", "trace"]
MemoryKind = Literal["anon", "file", "both"]
_ABOVE_ZERO = {
    "size_bytes": "--pressure-mib",
    "step_bytes": "--pressure-step-mib",
    "rate_bytes_s": "--rate-mib-s",
    "period_s": "--period-s",
}
_NOT_NEGATIVE = {"warmup_s": "--pressure-warmup-s", "hold_s": "--hold-s"}


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


def read_trace(path: Path) -> tuple[tuple[float, int], ...]:
    """A trace from a text file: lines of ``seconds,size`` in order of time, such as ``1.5,300M``; # starts a comment.

    Raises:
        UsageError: the file cannot be read, or a line is not of this form; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The trace {path} cannot be read ({error}).") from error
    points: list[tuple[float, int]] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        time_text, _, size_text = text.partition(",")
        try:
            time_s = float(time_text)
            if not 0 <= time_s < 1e6 or (points and time_s < points[-1][0]):
                raise MalformedTextError("times go up from 0")
            size = size_text.strip()
            points.append((time_s, 0 if size in ("0", "0M") else parse_bytes(size)))
        except (ValueError, UsageError) as error:
            raise UsageError(
                f"Line {number} of the trace {path} is not `seconds,size`, such as 1.5,300M: {error}"
            ) from error
    if not points:
        raise UsageError(f"The trace {path} has no line `seconds,size`, such as 1.5,300M.")
    return tuple(points)
