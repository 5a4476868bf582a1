"""As many answers at once as keep their pace."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from kvpsi.admission.policies.base import Load, Verdict
from kvpsi.errors import UsageError


@dataclass(frozen=True, slots=True)
class AdaptiveSettings:
    """Constants of the limit.

    Attributes:
        tolerance: how much slower than on average over ``long_s`` an answer may get because others join it.
        comfortable_s: a time between two tokens that nobody minds: a person reads 5 to 10 tokens a second.
        first_token_tolerance: how much slower than on average prompts may be read before nobody joins.
        long_s: time over which the averages go.
        up_s, down_s: how fast the limit follows.
        idle_s: after so long without an answer all is forgotten.
        patience_s: who waits longer joins ``few`` answers at most, however slow they are.
        few: so many.
        cpu_stall, memory_stall, io_stall: pressure from which on the limit does not grow.
        hard_memory_stall: pressure from which on nobody joins.
    """

    tolerance: float = 1.4
    comfortable_s: float = 0.05
    first_token_tolerance: float = 3.0
    long_s: float = 60.0
    up_s: float = 1.0
    down_s: float = 0.3
    idle_s: float = 5.0
    patience_s: float = 5.0
    few: int = 4
    cpu_stall: float = 0.3
    memory_stall: float = 0.05
    io_stall: float = 0.3
    hard_memory_stall: float = 0.2

    def __post_init__(self) -> None:
        if self.tolerance <= 1 or self.first_token_tolerance <= 1:
            raise UsageError("A tolerance is above 1: nobody can join without making the others slower.")
        if min(self.comfortable_s, self.long_s, self.up_s, self.down_s) <= 0:
            raise UsageError("Times of the adaptive limit must be above 0 seconds.")


@dataclass(frozen=True, slots=True)
class AdaptiveState:
    """The limit, not rounded; the long averages, None while nothing is known; and when what happened last."""

    limit: float
    time_s: float
    token_s: float | None = None
    first_token_s: float | None = None
    busy_at_s: float = -math.inf
    joined_at_s: float = -math.inf


class Adaptive:
    """A gradient limit: the answers at once, times how much slower they may get, by how slow they are.

    It follows Gradient2 of Netflix's concurrency-limits (a short against a long average of the latency, with a
    tolerance), sized for limits between 1 and 32: the latency is the time for a token, so one answer more is a step
    that shows. Pressure on processors, memory or disks keeps the limit from growing.
    """

    name: ClassVar[str] = "adaptive"
    foresees: ClassVar[bool] = True

    def __init__(self, settings: AdaptiveSettings | None = None) -> None:
        self.settings = settings or AdaptiveSettings()

    def decide(self, load: Load, state: AdaptiveState | None) -> tuple[Verdict, AdaptiveState]:
        """See `AdmissionPolicy`."""
        s = self.settings
        if state is None:
            state = AdaptiveState(float(load.parallel), load.time_s)
        elapsed_s = max(0.0, load.time_s - state.time_s)
        state = replace(state, time_s=load.time_s)
        if not load.running:
            if load.time_s - state.busy_at_s > s.idle_s:
                state = replace(state, limit=float(load.parallel), token_s=None, first_token_s=None)
            return Verdict(max(1, round(state.limit)), "nobody is being answered"), state
        state = replace(
            state,
            busy_at_s=load.time_s,
            token_s=_averaged(state.token_s, load.token_s, elapsed_s / s.long_s),
            first_token_s=_averaged(state.first_token_s, load.first_token_s, elapsed_s / s.long_s),
        )
        target = self._target(load, state)
        held = self._held_by(load)
        if held and target > state.limit:
            target, reason = max(state.limit, 1.0), held
        else:
            reason = f"{load.running} answers at {1000 * (load.token_s or 0):.0f} ms a token"
        pace_s = s.up_s if target > state.limit else s.down_s
        limit = state.limit + (1 - math.exp(-elapsed_s / pace_s)) * (target - state.limit)
        state = replace(state, limit=min(float(load.parallel), max(1.0, limit)))
        whole = int(state.limit + 1e-6)
        if load.pressure.memory_stall >= s.hard_memory_stall:
            return Verdict(
                min(whole, load.running), f"memory stalls {load.pressure.memory_stall:.0%} of the time"
            ), state
        waited_long = load.longest_wait_s > s.patience_s and load.time_s - state.joined_at_s > s.patience_s
        if whole <= load.running < min(s.few, load.parallel) and waited_long:
            state = replace(state, joined_at_s=load.time_s)
            return Verdict(load.running + 1, f"one waited for {load.longest_wait_s:.0f} s"), state
        return Verdict(whole, reason), state

    def _target(self, load: Load, state: AdaptiveState) -> float:
        """Answers at once that would be as slow as is allowed, if time for a token grows with their number."""
        s = self.settings
        if load.token_s is None or state.token_s is None:
            return state.limit
        target = load.running * max(s.comfortable_s, s.tolerance * state.token_s) / load.token_s
        if load.first_token_s and state.first_token_s:
            slower = load.first_token_s / state.first_token_s
            if slower > s.first_token_tolerance:
                target = min(target, load.running * s.first_token_tolerance / slower)
        return target

    def _held_by(self, load: Load) -> str | None:
        """The pressure that keeps the limit from growing."""
        for what, share, most in (
            ("memory", load.pressure.memory_stall, self.settings.memory_stall),
            ("the processors", load.pressure.cpu_stall, self.settings.cpu_stall),
            ("the disks", load.pressure.io_stall, self.settings.io_stall),
        ):
            if share >= most:
                return f"tasks wait for {what} {share:.0%} of the time"
        return None


def _averaged(average: float | None, now: float | None, weight: float) -> float | None:
    if now is None or average is None:
        return average if now is None else now
    return average + (1 - math.exp(-weight)) * (now - average)
