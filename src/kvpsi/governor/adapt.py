"""What the law's constants become on this machine, learned from what it saw there, within bounds. Pure, as the law is.

- Each time that memory was short teaches something. Where some headroom was left and nobody waited, memory was given
  in time: a smaller reserve, less look-ahead and smaller steps suffice, and the cache may grow back faster. Where not,
  the reserve gets larger by what was missing, and all others go back towards what they were.
- Until memory was short for the first time nothing is known, so that all is as the law has it, except for what large
  machines keep beyond a reserve of 48 MiB, which is a guess: one processor takes no more in the time that giving takes.
- Stall that is seen while there is ample headroom is nobody's call for memory: the thresholds lie above it.

A setting that differs from its default was given by somebody, and stays. So do those that are named in ``fixed``, and
the guards, which are limits and not guesses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kvpsi.errors import UsageError
from kvpsi.governor.law import MIB, LawSettings
from kvpsi.pressure.reading import Reading
from kvpsi.status import CacheStatus

_DEFAULTS = LawSettings()


@dataclass(frozen=True, slots=True)
class AdaptSettings:
    """How fast it learns, and the bounds of what it may say.

    Attributes:
        fixed: names of settings of the law that stay as they are.
        least_reserve_bytes, most_reserve_bytes: bounds of the reserve, which never is more than a quarter of the limit.
        untried_reserve_bytes: the most that it is before memory was short for the first time.
        least_lookahead_s, most_lookahead_s: bounds of the look-ahead.
        settled_s: a time of short memory is over when it has not been short for so long,
        longest_s: or after so long.
        tolerated_s: of stall, in which giving was still in time.
        ease, back_off: factors of reserve, look-ahead and steps where it was, and where it was not.
        least_step_factor: bound of the factor by which steps get smaller.
        most_stall_share: bound of the stall that is taken for noise.
        rise_s, fall_s: how fast the noise is believed to have risen, and to have fallen.
        least_patience: bound of the factor by which it waits less long before it grows, and grows faster.
    """

    fixed: tuple[str, ...] = ()
    least_reserve_bytes: int = 24 * MIB
    most_reserve_bytes: int = 512 * MIB
    untried_reserve_bytes: int = 48 * MIB
    least_lookahead_s: float = 0.05
    most_lookahead_s: float = 0.30
    settled_s: float = 1.0
    longest_s: float = 5.0
    tolerated_s: float = 0.1
    ease: float = 1 / 3
    back_off: float = 1.5
    least_step_factor: float = 0.25
    most_stall_share: float = 0.40
    rise_s: float = 2.0
    fall_s: float = 60.0
    least_patience: float = 0.05

    def __post_init__(self) -> None:
        unknown = set(self.fixed) - set(LawSettings.__dataclass_fields__)
        if unknown:
            raise UsageError(f"The law has no setting {', '.join(sorted(unknown))}; name one of `LawSettings`.")
        times_s = (self.settled_s, self.longest_s, self.rise_s, self.fall_s)
        if not all(0 < time_s < math.inf for time_s in times_s):
            raise UsageError("A time in the settings of adapting is not above 0, or endless; use a number of seconds.")
        if not 0 <= self.least_reserve_bytes <= self.untried_reserve_bytes <= self.most_reserve_bytes:
            raise UsageError("Of the bounds of the reserve the least is the smallest, then the untried, then the most.")
        if not 0 <= self.least_lookahead_s <= _DEFAULTS.lookahead_s <= self.most_lookahead_s < math.inf:
            raise UsageError(f"The bounds of the look-ahead lie on both sides of {_DEFAULTS.lookahead_s} s.")
        if not _DEFAULTS.stall_share <= self.most_stall_share <= 1:
            raise UsageError(f"most_stall_share lies from {_DEFAULTS.stall_share} to 1.")
        if not all(0 < factor <= 1 for factor in (self.least_patience, self.least_step_factor, self.ease)):
            raise UsageError("least_patience, least_step_factor and ease lie above 0 and are at most 1.")
        if not 1 <= self.back_off < math.inf:
            raise UsageError("back_off is at least 1, or nothing would be learned from harm.")

    def keeps(self, given: LawSettings, name: str) -> bool:
        """Whether a setting is not to be changed."""
        return name in self.fixed or getattr(given, name) != getattr(_DEFAULTS, name)


@dataclass(frozen=True, slots=True)
class Shortage:
    """A time in which memory was short: when it began and was seen last, the least headroom, all stall that there had
    been before, and the stall since, less what is noise."""

    began_s: float
    seen_s: float
    least_bytes: int
    total_us: int
    stalled_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AdaptState:
    """What was learned.

    Attributes:
        time_s: of the last reading; None before the first.
        reserve_bytes: the reserve; None before the first reading.
        lookahead_s: the look-ahead.
        shortages: how often memory was short.
        shortage, last: the one that is going on, and the one before.
        step_factor: of the steps.
        noise_share: stall while there is ample headroom.
        patience: factor of the time that is waited before growing.
    """

    time_s: float | None = None
    reserve_bytes: float | None = None
    lookahead_s: float = _DEFAULTS.lookahead_s
    shortages: int = 0
    shortage: Shortage | None = None
    last: Shortage | None = None
    step_factor: float = 1.0
    noise_share: float = 0.0
    patience: float = 1.0


def adapt(
    reading: Reading, cache: CacheStatus, state: AdaptState, given: LawSettings, settings: AdaptSettings
) -> tuple[LawSettings, AdaptState]:
    """One tick: the law's settings for it, and what is known now.

    Args:
        reading: what was sensed.
        cache: its sizes.
        state: what was known.
        given: the law's settings as they were given.
        settings: bounds.
    """
    now_s, scope_bytes = reading.time_s, reading.headroom.limit_bytes
    if state.time_s is None:
        reserve = min(given.low_for(scope_bytes), settings.untried_reserve_bytes)
        state = replace(state, time_s=now_s, reserve_bytes=float(reserve))
    elapsed_s = max(0.0, now_s - (state.time_s or 0.0))
    law = law_of(scope_bytes, state, given, settings)
    state = _after_noise(reading, elapsed_s, state, law, settings)
    state = replace(state, time_s=now_s)
    state = _after_shortage(reading, cache, state, law, settings)
    return law_of(scope_bytes, state, given, settings), state


def law_of(scope_bytes: int, state: AdaptState, given: LawSettings, settings: AdaptSettings) -> LawSettings:
    """The law's settings after what is known, in a scope of so many bytes."""
    changed: dict[str, float | int] = {}
    if not settings.keeps(given, "low_bytes"):
        low = reserve_of(scope_bytes, state, settings)
        changed["low_bytes"] = low if given.high_bytes is None else min(low, given.high_bytes)
    if not settings.keeps(given, "lookahead_s"):
        changed["lookahead_s"] = state.lookahead_s
    if not settings.keeps(given, "stall_share"):
        most = given.hard_stall_share if settings.keeps(given, "hard_stall_share") else settings.most_stall_share
        changed["stall_share"] = max(given.stall_share, min(most, 1.5 * state.noise_share))
        changed["hard_stall_share"] = max(given.hard_stall_share, changed["stall_share"])
    if not (settings.keeps(given, "min_step_share") or settings.keeps(given, "max_step_share")):
        changed["min_step_share"] = given.min_step_share * state.step_factor
        changed["max_step_share"] = given.max_step_share * state.step_factor
    if not settings.keeps(given, "calm_share"):
        changed["calm_share"] = max(given.calm_share, min(settings.most_stall_share, state.noise_share))
    if not settings.keeps(given, "calm_hold_s"):
        changed["calm_hold_s"] = given.calm_hold_s * state.patience
    if not settings.keeps(given, "grow_share"):
        changed["grow_share"] = min(1.0, given.grow_share / state.patience)
    return replace(given, **changed)  # type: ignore[arg-type]


def reserve_of(scope_bytes: int, state: AdaptState, settings: AdaptSettings) -> int:
    """The reserve after what is known."""
    return min(
        max(int(state.reserve_bytes or 0.0), settings.least_reserve_bytes),
        settings.most_reserve_bytes,
        scope_bytes // 4,
    )


def explain(scope_bytes: int, law: LawSettings, state: AdaptState, given: LawSettings) -> list[str]:
    """What was learned, in a scope of so many bytes: a sentence for all that is noticeably not as it was given."""
    found = []
    why = "memory was not short yet"
    if state.last is not None:
        times = "once" if state.shortages == 1 else f"{state.shortages} times"
        why = (
            f"memory was short {times}, at last with {state.last.least_bytes // MIB} MiB left and "
            f"{state.last.stalled_s:.2f} s of stall"
        )
    low, first = law.low_for(scope_bytes), given.low_for(scope_bytes)
    if low // MIB != first // MIB:
        found.append(f"reserve {low // MIB} MiB ({why}; default {first // MIB} MiB)")
    if law.lookahead_s != given.lookahead_s:
        found.append(f"looks {law.lookahead_s:.2g} s ahead ({why}; default {given.lookahead_s:g} s)")
    if law.max_step_share != given.max_step_share:
        found.append(f"steps of {law.max_step_share:.0%} at most ({why}; default {given.max_step_share:.0%})")
    if (law.calm_hold_s, law.grow_share) != (given.calm_hold_s, given.grow_share):
        found.append(
            f"grows by {law.grow_share:.0%} a second after {law.calm_hold_s:.2g} s of calm ({why}; default "
            f"{given.grow_share:.0%} after {given.calm_hold_s:g} s)"
        )
    if law.stall_share > 1.1 * given.stall_share:
        found.append(
            f"stall counts from {law.stall_share:.0%} of the time, and is hard from {law.hard_stall_share:.0%} (with "
            f"ample headroom it is {state.noise_share:.0%}; default {given.stall_share:.0%}, "
            f"{given.hard_stall_share:.0%})"
        )
    if law.calm_share > 1.1 * given.calm_share:
        found.append(
            f"up to {law.calm_share:.0%} of stall is calm (with ample headroom it is {state.noise_share:.0%}; default "
            f"{given.calm_share:.0%})"
        )
    return found


def _after_noise(
    reading: Reading, elapsed_s: float, state: AdaptState, law: LawSettings, settings: AdaptSettings
) -> AdaptState:
    room = reading.headroom
    if room.available_bytes < 2 * law.high_for(room.limit_bytes):
        return state
    share = reading.memory.some.share
    takes_s = settings.rise_s if share > state.noise_share else settings.fall_s
    weight = -math.expm1(-elapsed_s / takes_s)
    return replace(state, noise_share=state.noise_share + weight * (share - state.noise_share))


def _after_shortage(
    reading: Reading, cache: CacheStatus, state: AdaptState, law: LawSettings, settings: AdaptSettings
) -> AdaptState:
    now_s, room, before = reading.time_s, reading.headroom, state.shortage
    low = law.low_for(room.limit_bytes)
    falling_bytes_s = 0.0 if cache.loading_bytes else min(0.0, room.slope_bytes_s)
    predicted = room.available_bytes + falling_bytes_s * law.lookahead_s
    is_short = predicted < low and cache.used_bytes > cache.floor_bytes
    if before is None:
        if not is_short:
            return state
        total_us = reading.memory.some.total_us
        return replace(state, shortage=Shortage(now_s, now_s, room.available_bytes, total_us))
    lasted_s, total_us = now_s - before.began_s, reading.memory.some.total_us
    shortage = replace(
        before,
        seen_s=now_s if is_short else before.seen_s,
        least_bytes=min(before.least_bytes, room.available_bytes) if is_short else before.least_bytes,
        stalled_s=max(0.0, (total_us - before.total_us) / 1e6 - state.noise_share * lasted_s),
    )
    if now_s - shortage.seen_s < settings.settled_s and now_s - shortage.began_s < settings.longest_s:
        return replace(state, shortage=shortage)
    return _learned(shortage, state, settings)


def _learned(shortage: Shortage, state: AdaptState, settings: AdaptSettings) -> AdaptState:
    """What a time of short memory teaches: giving was in time if nobody waited and some headroom was left."""
    missing, reserve = max(0, -shortage.least_bytes), state.reserve_bytes or 0.0
    # who waited with much of the reserve left waited for something else
    waited = shortage.stalled_s > settings.tolerated_s and shortage.least_bytes < reserve / 2
    if missing or waited:
        factor = settings.back_off
        reserve = max(factor * reserve if waited else reserve, min(reserve + 2 * missing, 2 * reserve))
    else:
        factor = settings.ease
        reserve *= factor
    return replace(
        state,
        reserve_bytes=min(max(reserve, settings.least_reserve_bytes), settings.most_reserve_bytes),
        lookahead_s=min(max(factor * state.lookahead_s, settings.least_lookahead_s), settings.most_lookahead_s),
        step_factor=min(1.0, max(settings.least_step_factor, factor * state.step_factor)),
        patience=min(1.0, max(settings.least_patience, factor * state.patience)),
        shortages=state.shortages + 1,
        shortage=None,
        last=shortage,
    )
