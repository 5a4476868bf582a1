"""As many answers at once as keep their pace."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from kvpsi.admission.policies.base import Load, Verdict
from kvpsi.errors import UsageError

_LEAST_KNOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class AdaptiveSettings:
    """Constants of the limit.

    Attributes:
        tolerance: how many more answers at once than there usually were: they get slower by as much.
        usual_s: time over which it is averaged how many there were, less at first.
        queued_s: the least such time while somebody waits: then their number is what the limit makes it.
        comfortable_s: a time between two tokens that nobody minds: a person reads 5 to 10 tokens a second.
        slower: how much longer than on average over ``speed_s`` a token may take, for each answer, before there are to
            be fewer of them; it takes a little longer with every token that answers have got already.
        speed_s: so long.
        first_token_slower: the same for reading prompts.
        up_s, down_s: how fast the limit follows.
        idle_s: after so long without an answer all is forgotten.
        patience_s: who waits longer joins ``few`` answers at most, however slow they are.
        few: so many.
        cpu_stall, memory_stall, io_stall: pressure during which no more join than usually, however fast tokens come,
            and none at all while memory is short.
        held_factor: how much more slowly the usual number follows then.
        hard_memory_stall: pressure from which on nobody joins another, and one at a time is answered.
    """

    tolerance: float = 1.3
    usual_s: float = 180.0
    queued_s: float = 90.0
    comfortable_s: float = 0.05
    slower: float = 1.25
    speed_s: float = 60.0
    first_token_slower: float = 3.0
    up_s: float = 1.0
    down_s: float = 0.3
    idle_s: float = 5.0
    patience_s: float = 5.0
    few: int = 4
    cpu_stall: float = 0.3
    memory_stall: float = 0.05
    io_stall: float = 0.3
    hard_memory_stall: float = 0.2
    held_factor: float = 4.0

    def __post_init__(self) -> None:
        if min(self.tolerance, self.slower, self.first_token_slower) <= 1:
            raise UsageError("A tolerance is above 1: nobody can join without making the others slower.")
        if min(self.comfortable_s, self.usual_s, self.queued_s, self.speed_s, self.up_s, self.down_s) <= 0:
            raise UsageError("Times of the adaptive limit must be above 0 seconds.")


@dataclass(frozen=True, slots=True)
class AdaptiveState:
    """What is remembered: the limit, not rounded; averages, None while nothing is known: answers at once, seconds for a
    token of each of them, and for reading a token; and when what happened last."""

    limit: float
    time_s: float
    began_s: float | None = None
    usual: float | None = None
    token_s: float | None = None
    first_token_s: float | None = None
    busy_at_s: float = -math.inf
    joined_at_s: float = -math.inf


class Adaptive:
    """A gradient limit: the answers that there usually were at once, some more, and fewer when all gets slower.

    It follows Gradient2 of Netflix's concurrency-limits: a limit times the quotient of a long and a short average of
    the latency, with a tolerance. The latency is the time for a token, divided by the number of answers at once, as on
    a processor each of them gets slower by every other; that is what sizes it for limits between 1 and 32. Pressure on
    processors, memory or disks keeps the limit from growing.
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
                state = AdaptiveState(float(load.parallel), load.time_s)
            if load.pressure.memory_stall >= s.hard_memory_stall:
                return Verdict(1, _stalled(load)), state
            return Verdict(max(1, round(state.limit)), "nobody is being answered"), state
        each_s = None if load.token_s is None else load.token_s / max(1, load.writing)
        held = self._held_by(load)
        began_s = load.time_s if state.began_s is None else state.began_s
        # at first the averages go over what there is
        known_s = max(_LEAST_KNOWN_S, load.time_s - began_s)
        usual_s = max(known_s, s.queued_s) if load.waiting else known_s
        usual_s = min(usual_s, s.usual_s * (s.held_factor if held else 1.0))
        speed_s = min(known_s, s.speed_s)
        state = replace(
            state,
            began_s=began_s,
            busy_at_s=load.time_s,
            usual=_averaged(state.usual, None if each_s is None else float(load.running), elapsed_s / usual_s),
            token_s=_averaged(state.token_s, each_s, elapsed_s / speed_s),
            first_token_s=_averaged(state.first_token_s, load.first_token_s, elapsed_s / speed_s),
        )
        target = self._target(load, state)
        reason = f"{load.running} answers at {1000 * (load.token_s or 0):.0f} ms a token"
        if held and target > (most := self._most(load, state)):
            target, reason = most, held
        pace_s = s.up_s if target > state.limit else s.down_s
        limit = state.limit + (1 - math.exp(-elapsed_s / pace_s)) * (target - state.limit)
        state = replace(state, limit=min(float(load.parallel), max(1.0, limit)))
        whole = int(state.limit + 1e-6)
        if load.pressure.memory_stall >= s.hard_memory_stall:
            return Verdict(min(whole, load.running), _stalled(load)), state
        waited_long = load.next_wait_s > s.patience_s and load.time_s - state.joined_at_s > s.patience_s
        if whole <= load.running < min(s.few, load.parallel) and waited_long:
            state = replace(state, joined_at_s=load.time_s)
            return Verdict(load.running + 1, f"one waited for {load.next_wait_s:.0f} s"), state
        return Verdict(whole, reason), state

    def _target(self, load: Load, state: AdaptiveState) -> float:
        """Answers at once that would be as slow as is allowed."""
        s = self.settings
        if load.token_s is None or state.token_s is None or state.usual is None:
            return state.limit
        each_s = load.token_s / max(1, load.writing)
        slower = each_s / state.token_s / s.slower
        if load.first_token_s and state.first_token_s:
            slower = max(slower, load.first_token_s / state.first_token_s / s.first_token_slower)
        return max(s.tolerance * state.usual / max(1.0, slower), s.comfortable_s / each_s if slower <= 1 else 0.0)

    def _most(self, load: Load, state: AdaptiveState) -> float:
        """Answers at once beyond which there is no growth under pressure; more of them would take more memory, too."""
        if load.pressure.memory_stall >= self.settings.memory_stall:
            return max(1.0, float(load.running))
        return state.limit if state.usual is None else self.settings.tolerance * state.usual

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


def _stalled(load: Load) -> str:
    return f"memory stalls {load.pressure.memory_stall:.0%} of the time"


def _averaged(average: float | None, now: float | None, weight: float) -> float | None:
    if now is None or average is None:
        return average if now is None else now
    return average + (1 - math.exp(-weight)) * (now - average)
