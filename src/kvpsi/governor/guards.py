"""Guards against being talked into forgetting: whoever makes memory pressure on purpose gets little of it. Pure, too.

Both look at what really happened since the last tick, and neither keeps back what can be had again (`CacheStatus`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kvpsi.errors import UsageError
from kvpsi.status import CacheStatus


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """How much may be forgotten, and when that is no use.

    Attributes:
        forget_bytes_per_min: how much a cache that shrinks may forget in a minute; None: a fifth of its whole size.
        forget_burst_bytes: how much of that it may save up, so that a real emergency gets it at once; None: its whole
            size.
        futile_after_s: after so much giving because of stall it must have fallen.
        futile_share: of what it was at first, the stall that is left if giving did not help.
        futile_hold_s: for so long nothing is forgotten because of stall after that.
    """

    forget_bytes_per_min: int | None = None
    forget_burst_bytes: int | None = None
    futile_after_s: float = 0.5
    futile_share: float = 0.5
    futile_hold_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("forget_bytes_per_min", "forget_burst_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is {value}, but no less than nothing can be forgotten; use 0 or more bytes.")
        if not 0 < self.futile_share <= 1:
            raise UsageError(f"futile_share is {self.futile_share}, but a share lies above 0 and is at most 1.")
        if not (0 < self.futile_after_s < math.inf and 0 <= self.futile_hold_s < math.inf):
            raise UsageError("A time in the guards' settings is negative or endless; use a number of seconds.")

    def rate_bytes_s(self, capacity_bytes: int) -> float:
        """What may be forgotten in a second."""
        a_minute = capacity_bytes / 5 if self.forget_bytes_per_min is None else self.forget_bytes_per_min
        return a_minute / 60

    def burst_bytes(self, capacity_bytes: int) -> float:
        """The most that may be forgotten at once."""
        return capacity_bytes if self.forget_burst_bytes is None else self.forget_burst_bytes


@dataclass(frozen=True, slots=True)
class Allowance:
    """A token bucket of bytes that a shrinking cache may still forget.

    What goes so that a new token can take its place is not counted: of a text that is longer than the cache so much
    goes in any case. So it is the size that is paid for, not what is forgotten.

    Attributes:
        left_bytes: what may still be forgotten; None before the first tick.
        burst_bytes: the most that this may be; where a larger cache makes it larger, so much more may be forgotten.
        level_bytes: below this the cache does not get without paying.
        at_s: the last tick.
        held_bytes, forgotten_bytes: what could only be given by forgetting, and what had been forgotten, at that tick.
    """

    left_bytes: float | None = None
    burst_bytes: float = 0.0
    level_bytes: int = 0
    at_s: float = 0.0
    held_bytes: int = 0
    forgotten_bytes: int = 0

    def after(self, now_s: float, cache: CacheStatus, limit_bytes: int, settings: GuardSettings) -> Allowance:
        """What is left at the next tick; ``limit_bytes`` is the limit at the first one."""
        held = max(0, cache.used_bytes - cache.lossless_bytes)
        burst = settings.burst_bytes(cache.capacity_bytes)
        if self.left_bytes is None:
            return Allowance(burst, burst, min(held, limit_bytes), now_s, held, cache.forgotten_bytes)
        refilled = (
            self.left_bytes
            + max(0.0, burst - self.burst_bytes)
            + settings.rate_bytes_s(cache.capacity_bytes) * max(0.0, now_s - self.at_s)
        )
        grown = held - self.held_bytes
        # what went without having been forgotten, such as a conversation that has ended, is no longer held at all
        level = self.level_bytes - max(0, -grown - max(0, cache.forgotten_bytes - self.forgotten_bytes))
        # what was paid for may still be held for a moment, and what grows back below the level does not raise it
        level = max(0, level, min(held, level + grown))
        return Allowance(min(burst, refilled), burst, level, now_s, held, cache.forgotten_bytes)

    @property
    def covers_all(self) -> bool:
        """Whether all that is held could be forgotten in an emergency: only then is anything forgotten for less."""
        return (self.left_bytes or 0.0) >= self.level_bytes

    def paying_for(self, size_bytes: int) -> Allowance:
        """What is left when the cache shrinks to a size, as far as that can be paid; its ``level_bytes`` is how far."""
        left = self.left_bytes or 0.0
        paid = max(0, min(self.level_bytes - size_bytes, int(left)))
        return replace(self, left_bytes=left - paid, level_bytes=self.level_bytes - paid)


@dataclass(frozen=True, slots=True)
class Futility:
    """Whether giving because of stall helps: an attempt lasts as long as stall goes on with less than a second between.

    Attributes:
        until_s: until when nothing is forgotten because of stall.
        stalled_s: when it stalled last.
        began_s, first_share, total_us, returned_bytes: what was when the attempt began.
        wasted_bytes: what the last attempt gave in vain.
    """

    until_s: float = -math.inf
    stalled_s: float = -math.inf
    began_s: float = 0.0
    first_share: float = 0.0
    total_us: int = 0
    returned_bytes: int = 0
    wasted_bytes: int = 0

    def after(self, now_s: float, share: float, total_us: int, cache: CacheStatus, settings: GuardSettings) -> Futility:
        """What is known after a tick in which memory stalled.

        Args:
            now_s: the tick's time.
            share: of the tick that was lost to stall.
            total_us: all stall that there ever was.
            cache: its sizes.
            settings: of the guard.
        """
        if now_s < self.until_s or now_s - self.stalled_s > 1.0:
            return replace(
                self,
                stalled_s=now_s,
                began_s=now_s,
                first_share=share,
                total_us=total_us,
                returned_bytes=cache.returned_bytes,
            )
        lasted_s, given_bytes = now_s - self.began_s, cache.returned_bytes - self.returned_bytes
        mean_share = (total_us - self.total_us) / 1e6 / max(lasted_s, 1e-3)
        fell = mean_share < settings.futile_share * self.first_share
        if lasted_s < settings.futile_after_s or not given_bytes or fell:
            return replace(self, stalled_s=now_s)
        return replace(self, stalled_s=now_s, until_s=now_s + settings.futile_hold_s, wasted_bytes=given_bytes)
