"""Neighbours that make memory pressure on purpose, to have a model forget.

Each blow is made by processes of its own, so that an attacker whose process is killed strikes again all the same. They
take memory as fast as it can be touched, each on a processor of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvpsi.errors import UsageError
from kvpsi.governor.law import LawSettings
from kvpsi.hog import HogSettings, step_bytes_for
from kvpsi.pressure.interval import MonitorSettings
from kvpsi.sim.boards import TOUCH_BYTES_S

_LAW, _MONITOR = LawSettings(), MonitorSettings()
GOVERNOR_TIMES_S = (
    _MONITOR.stalled_interval_s,
    _MONITOR.max_interval_s,
    _LAW.echo_s,
    _LAW.settle_s,
    _LAW.calm_hold_s,
    _LAW.guards.futile_after_s + _LAW.calm_hold_s,
)
"""How often the governor looks, how long it takes stall for its own echo, how long it waits for calm, and the like."""
_AT_ONCE_BYTES_S = 1e12
_SHORTEST_S, _LONGEST_S = 0.05, 60.0
_MOST_BLOWS = 100_000


@dataclass(frozen=True, slots=True)
class Attack:
    """Blows, one after the other.

    Attributes:
        size_bytes: what all processes of a blow take together at most.
        period_s: from one blow to the next.
        share: of the period for which a process lives, in which it takes its part and keeps it.
        phase_s: when the first comes.
        n_processes: of a blow.
        staggered: they begin one after the other, all over the period, instead of at once.
    """

    size_bytes: int
    period_s: float
    share: float = 0.5
    phase_s: float = 0.0
    n_processes: int = 1
    staggered: bool = False

    def __post_init__(self) -> None:
        if self.size_bytes < self.n_processes or self.n_processes < 1 or self.phase_s < 0:
            raise UsageError("An attack has one process at least, a byte for each, and begins at 0 s or later.")
        if self.period_s < _SHORTEST_S or not 0 < self.share <= 1:
            raise UsageError(f"An attack's period is {_SHORTEST_S} s or more; its processes live for a share of it.")

    def processes(self, until_s: float) -> tuple[HogSettings, ...]:
        """All that begin until then.

        Raises:
            UsageError: they are too many to be simulated.
        """
        size_bytes = self.size_bytes // self.n_processes
        step_bytes = step_bytes_for(size_bytes, size_bytes)
        apart_s = self.period_s / self.n_processes if self.staggered else 0.0
        n_blows = max(0, math.ceil((until_s - self.phase_s) / self.period_s))
        if n_blows * self.n_processes > _MOST_BLOWS:
            raise UsageError(f"An attack of {n_blows} blows cannot be simulated; simulate fewer --seconds.")
        starts_s = [
            self.phase_s + blow * self.period_s + number * apart_s
            for blow in range(n_blows)
            for number in range(self.n_processes)
        ]
        return tuple(
            HogSettings(
                size_bytes, step_bytes, warmup_s=at_s, rate_bytes_s=_AT_ONCE_BYTES_S, hold_s=self.share * self.period_s
            )
            for at_s in starts_s
            if at_s < until_s
        )


def _ramp(rng: random.Random, size_bytes: int) -> Attack:
    """All of it as fast as can be, which is then dropped, again and again."""
    lives_s = size_bytes / TOUCH_BYTES_S + rng.uniform(0.05, 0.5)
    period_s = lives_s + rng.uniform(0.2, 5.0)
    return Attack(size_bytes, period_s, lives_s / period_s, rng.uniform(1, 6))


def _pulses(rng: random.Random, size_bytes: int) -> Attack:
    """Square pulses in the governor's own time."""
    period_s = rng.choice(GOVERNOR_TIMES_S)
    return Attack(size_bytes, period_s, rng.uniform(0.3, 0.7), rng.uniform(1, 6))


def _forks(rng: random.Random, size_bytes: int) -> Attack:
    """A storm of short-lived processes."""
    return Attack(size_bytes, rng.uniform(0.5, 3.0), rng.uniform(0.3, 1.0), rng.uniform(1, 6), 16, staggered=True)


def _any(rng: random.Random, size_bytes: int) -> Attack:
    """Anything: with many seeds, a search for what is worst."""
    period_s = math.exp(rng.uniform(math.log(_SHORTEST_S), math.log(_LONGEST_S)))
    return Attack(
        int(size_bytes * rng.uniform(0.1, 1.0)),
        period_s,
        rng.uniform(0.05, 1.0),
        rng.uniform(0, 10),
        rng.choice((1, 2, 4)),
        staggered=rng.random() < 0.5,
    )


ATTACKS: Mapping[str, Callable[[random.Random, int], Attack]] = {
    "ramp": _ramp,
    "pulses": _pulses,
    "forks": _forks,
    "any": _any,
}
"""Kinds, each drawn with so many bytes at most."""


def most_beyond(shed: tuple[tuple[float, int], ...], rate_s: float) -> float:
    """The most that was shed within any time beyond what this rate allows in it: so large a burst had to be allowed.

    Args:
        shed: (seconds, amount) in order of time.
        rate_s: amount a second.
    """
    level = most = at_s = 0.0
    for time_s, amount in shed:
        level = max(0.0, level - rate_s * (time_s - at_s)) + amount
        most, at_s = max(most, level), time_s
    return most


def most_within(shed: tuple[tuple[float, int], ...], seconds: float) -> int:
    """The most that was shed within any so many seconds."""
    most = first = total = 0
    for time_s, amount in shed:
        total += amount
        while shed[first][0] <= time_s - seconds:
            total -= shed[first][1]
            first += 1
        most = max(most, total)
    return most
