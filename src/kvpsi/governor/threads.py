"""How many threads compute: a pure law, as llama.cpp's threads wait for each other by spinning.

A thread that finds no processor keeps all others waiting at the next barrier, hundreds of times a token, so one thread
too many costs far more than one too few (docs/decisions/0011).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kvpsi.errors import UsageError
from kvpsi.pressure.cpu import CpuReading


@dataclass(frozen=True, slots=True)
class ThreadSettings:
    """Constants of the law.

    Attributes:
        most_threads: that ever compute; 0: as many as there are processors.
        tolerated_cpus: of a processor that others may use before a thread is taken away for it.
        smoothing_s: time over which what others use is averaged.
        stall_share: share of the time in which tasks wait for a processor, from which on others are in the way.
        throttled_share: share of the quota's periods that ran out early, from which on threads are too many.
        calm_hold_s: for how long there must have been room before a thread comes back.
        relapse_s: a thread that has to go within this time came back too soon: the next time it waits twice as long.
        longest_hold_s: the most that it waits; one that stayed for longer than this is given the short time again.
        idle_cpus: below this the process computes nothing, so that it cannot be kept waiting either.
    """

    most_threads: int = 0
    tolerated_cpus: float = 0.35
    smoothing_s: float = 0.5
    stall_share: float = 0.05
    throttled_share: float = 0.1
    calm_hold_s: float = 1.0
    relapse_s: float = 5.0
    longest_hold_s: float = 30.0
    idle_cpus: float = 0.1

    def __post_init__(self) -> None:
        if self.most_threads < 0:
            raise UsageError(f"{self.most_threads} threads make no sense; give 0 (as many as can run) or more.")
        if not 0 <= self.tolerated_cpus < 1:
            raise UsageError("tolerated_cpus is a part of one processor: 0 or more, and below 1.")
        if not 0 < self.calm_hold_s <= self.longest_hold_s:
            raise UsageError("calm_hold_s must be above 0 and at most longest_hold_s.")
        if self.smoothing_s <= 0:
            raise UsageError("smoothing_s must be above 0.")


@dataclass(frozen=True, slots=True)
class ThreadState:
    """What the law remembers: ``n_threads`` that compute now, 0 before the first look; what others use on average;
    since when there is room for more; when one came back last; and for how long there must be room the next time."""

    n_threads: int = 0
    others_cpus: float = 0.0
    room_since_s: float | None = None
    raised_s: float = -math.inf
    hold_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ThreadDecision:
    """How many threads are to compute, and one short sentence why."""

    n_threads: int
    reason: str


def decide_threads(
    reading: CpuReading, state: ThreadState, settings: ThreadSettings
) -> tuple[ThreadDecision, ThreadState]:
    """One look at the processors.

    Affinity and quota bound the threads at once. Others' use takes threads away as soon as they are in each other's
    way, and gives them back after a while of calm. What is left for this process is what others do not use.
    """
    now = reading.time_s
    state = replace(state, others_cpus=_smoothed(reading, state, settings), hold_s=state.hold_s or settings.calm_hold_s)
    ceiling, reason = _ceiling(reading, settings)
    n = min(state.n_threads or ceiling, ceiling)
    fits = max(1, min(ceiling, int(reading.allowed_cpus - state.others_cpus + settings.tolerated_cpus)))
    throttled = reading.quota_cpus is not None and reading.throttled_share >= settings.throttled_share and n > 1
    if throttled:
        fits = min(fits, n - 1)
        reason = f"the CPU quota ran out in {reading.throttled_share:.0%} of its periods"
    elif fits < ceiling:
        reason = f"others use {state.others_cpus:.1f} of {reading.allowed_cpus} processors"
    waits = reading.stall is None or reading.stall.some.share >= settings.stall_share
    if fits < n and (throttled or waits or reading.own_cpus < settings.idle_cpus):
        stayed_s, hold_s = now - state.raised_s, state.hold_s
        if stayed_s < settings.relapse_s:
            hold_s = min(settings.longest_hold_s, 2 * hold_s)
        elif stayed_s > settings.longest_hold_s:
            hold_s = settings.calm_hold_s
        return ThreadDecision(fits, reason), replace(state, n_threads=fits, room_since_s=None, hold_s=hold_s)
    if fits <= n:
        return ThreadDecision(n, reason), replace(state, n_threads=n, room_since_s=None)
    since = now if state.room_since_s is None else state.room_since_s
    if now - since < state.hold_s:
        return ThreadDecision(n, "waiting for calm to last"), replace(state, n_threads=n, room_since_s=since)
    state = replace(state, n_threads=fits, room_since_s=None, raised_s=now)
    return ThreadDecision(fits, reason), state


def _ceiling(reading: CpuReading, settings: ThreadSettings) -> tuple[int, str]:
    """The most threads that could run if nobody else did, and why."""
    most = [(reading.allowed_cpus, f"{reading.allowed_cpus} processors may be used")]
    if settings.most_threads:
        most.append((settings.most_threads, f"{settings.most_threads} threads were asked for"))
    if reading.quota_cpus is not None:
        most.append((max(1, int(reading.quota_cpus)), f"the CPU quota is {reading.quota_cpus:g} processors"))
    return min(most, key=lambda each: each[0])


def _smoothed(reading: CpuReading, state: ThreadState, settings: ThreadSettings) -> float:
    if reading.others_cpus is None:
        return state.others_cpus
    weight = 1 - math.exp(-reading.interval_s / settings.smoothing_s)
    return state.others_cpus + weight * (reading.others_cpus - state.others_cpus)
