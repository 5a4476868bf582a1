"""The control law: what the cache may be, given what was sensed. Pure: no clock, no I/O, no thread.

Headroom feeds forward: what is free beyond a reserve may be used, what is missing to it is given back, in proportion.
Stall decides how hard to push when headroom alone does not tell. Growing back is slow and
waits for calm, giving is quick (as in Meta's Senpai, https://github.com/facebookincubator/senpai).

Between the low and the high mark the limit neither falls nor grows. What growing takes from the headroom there would
lie within one more neighbour's reach of the low mark, and to give it again costs tokens that were computed, while to
hold costs at most the memory between the two marks: growing stops at the high mark anyway (`_grow`). Whoever wants
that memory used sets ``high_bytes`` nearer to ``low_bytes``; with both the same there is no such zone.

Where several caches are governed under one limit, each gives its part of what is missing only, and none grows beyond
its share of what is left (`kvpsi.governor.shares`). Between the two marks all together hold what they hold, and who
holds more than its share yields slowly to those that hold less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from kvpsi.errors import UsageError
from kvpsi.governor.guards import Allowance, Futility, GuardSettings
from kvpsi.governor.shares import Fellows, Share
from kvpsi.pressure.reading import Reading
from kvpsi.status import CacheStatus as CacheStatus

MIB = 1 << 20
CREDIT_S = 2.0
"""For so long what was given may not show yet where counters lag."""
_BAND = 8  # of the distance between the marks, one part more than the reserve is left by those that share


@dataclass(frozen=True, slots=True)
class LawSettings:
    """Constants of the law.

    Attributes:
        low_bytes: headroom that is kept free; below it the cache gives. None: 5 % of the tightest limit, between
            48 MiB and 512 MiB, and never more than a quarter of the limit.
        high_bytes: headroom above which the cache may grow back. None: twice ``low_bytes``.
        lookahead_s: how far ahead the headroom's slope is extended.
        min_step_share, max_step_share: how much of the cache in use one step takes, from the mildest stall that
            counts to a hard one.
        stall_share: memory stall (``some``, share of a tick) from which on it counts.
        hard_stall_share: stall at which steps are largest.
        calm_share: stall below which a tick is calm.
        calm_hold_s: calm that must have lasted before the cache grows back.
        grow_share: how much of the whole cache the limit grows by in a second of calm.
        echo_s: after giving, for so long stall is taken for the echo of that work, and on scopes whose counters lag
            (the system's) what was given is credited.
        settle_s: after a saved conversation was taken in at once, for so long the headroom's slope is that work's and
            is not extended.
        pressed_chunk_tokens: prefill pieces under pressure, so that room is made in time before each.
        guards: how much may be forgotten, and when that is no use.
    """

    low_bytes: int | None = None
    high_bytes: int | None = None
    lookahead_s: float = 0.15
    min_step_share: float = 0.10
    max_step_share: float = 0.20
    stall_share: float = 0.05
    hard_stall_share: float = 0.30
    calm_share: float = 0.01
    calm_hold_s: float = 2.0
    grow_share: float = 0.05
    echo_s: float = 0.3
    settle_s: float = 0.5
    pressed_chunk_tokens: int = 64
    guards: GuardSettings = field(default_factory=GuardSettings)

    def __post_init__(self) -> None:
        for name in ("low_bytes", "high_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is {value}, but a headroom cannot be negative; use 0 or more bytes.")
        if self.low_bytes is not None and self.high_bytes is not None and self.high_bytes < self.low_bytes:
            raise UsageError(
                f"high_bytes ({self.high_bytes}) is below low_bytes ({self.low_bytes}); the cache would grow and "
                "shrink at once, so set high_bytes to at least low_bytes."
            )
        for name in (
            "min_step_share",
            "max_step_share",
            "stall_share",
            "hard_stall_share",
            "calm_share",
            "grow_share",
        ):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UsageError(f"{name} is {value}, but a share lies above 0 and is at most 1.")
        if self.min_step_share > self.max_step_share:
            raise UsageError("min_step_share is above max_step_share; swap them.")
        if not all(
            0 <= time_s < math.inf for time_s in (self.lookahead_s, self.calm_hold_s, self.echo_s, self.settle_s)
        ):
            raise UsageError("A time in the law's settings is negative or endless; use 0 or more seconds.")
        if self.pressed_chunk_tokens < 1:
            raise UsageError("pressed_chunk_tokens must be at least 1.")

    def low_for(self, limit_bytes: int) -> int:
        """The reserve for a scope of ``limit_bytes``."""
        if self.low_bytes is not None:
            return self.low_bytes
        return min(max(limit_bytes // 20, 48 * MIB), 512 * MIB, limit_bytes // 4)

    def high_for(self, limit_bytes: int) -> int:
        """The headroom from which on the cache may grow back, never below the reserve."""
        low = self.low_for(limit_bytes)
        return max(low, self.high_bytes) if self.high_bytes is not None else 2 * low


@dataclass(frozen=True, slots=True)
class State:
    """What the law remembers from tick to tick.

    ``limit_bytes`` is lowered by giving and grows back slowly; None before the first tick. Where it was all of the
    cache, whose size is ``capacity_bytes``, it stays so if the cache is made anew with another size. ``given`` lists
    recent releases as (time, bytes, headroom just before). ``loading_at_s`` is when a saved conversation was last seen
    being taken in. ``allowance`` and ``futility`` are what the guards remember. ``yielded_at_s`` is the last tick of
    yielding to other caches, None while it does not.
    """

    limit_bytes: int | None = None
    capacity_bytes: int | None = None
    calm_since_s: float | None = None
    grown_at_s: float = 0.0
    given: tuple[tuple[float, int, int], ...] = ()
    loading_at_s: float | None = None
    allowance: Allowance = field(default_factory=Allowance)
    futility: Futility = field(default_factory=Futility)
    yielded_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What the cache is to do.

    Attributes:
        limit_bytes: the cache must not hold more than this; what it holds beyond is to be given back now.
        give_bytes: how much of what is in use that is.
        urgent: a running prefill is to be interrupted for it.
        pressed: prefill goes in small pieces for the time being.
        withheld: more would be given if that did not mean to forget more than the guards allow.
        reason: one short sentence for people.
        share: what the cache may hold beside others; None: it is alone.
    """

    limit_bytes: int
    give_bytes: int = 0
    urgent: bool = False
    pressed: bool = False
    withheld: bool = False
    reason: str = "calm"
    share: Share | None = None


def record_given(state: State, reading: Reading, given_bytes: int) -> State:
    """The state after ``given_bytes`` really went back to the kernel following ``reading``."""
    entry = (reading.time_s, given_bytes, reading.headroom.available_bytes)
    return replace(state, given=(*state.given, entry))


def _lags(reading: Reading) -> bool:
    """Whether a release shows late: in MemAvailable it does, and on a GPU, whose engine unmaps when it gets to it. In a
    cgroup's usage it does not."""
    return reading.headroom.scope == "system" or reading.headroom.scope.startswith("gpu:")


def _credit_bytes(state: State, reading: Reading, settings: LawSettings, fellows: Fellows | None) -> int:
    """What was given, also by others, and does not show yet."""
    if not _lags(reading):
        return 0
    given = state.given if fellows is None else tuple(sorted((*state.given, *fellows.given)))
    recent = [g for g in given if reading.time_s - g[0] < max(CREDIT_S, settings.echo_s)]
    if not recent:
        return 0
    shown = max(0, reading.headroom.available_bytes - recent[0][2])
    return max(0, sum(g[1] for g in recent) - shown)


def _step_share(stall: float, settings: LawSettings) -> float:
    """Share of the cache to give for a stall: linear between the mildest that counts and a hard one."""
    span = max(settings.hard_stall_share - settings.stall_share, 1e-9)
    push = min(1.0, max(0.0, (stall - settings.stall_share) / span))
    return settings.min_step_share + push * (settings.max_step_share - settings.min_step_share)


def decide(
    reading: Reading, cache: CacheStatus, state: State, settings: LawSettings, fellows: Fellows | None = None
) -> tuple[Decision, State]:
    """One tick of the law; ``fellows`` are the other caches under the same limit, if there are any."""
    now, room = reading.time_s, reading.headroom
    state = replace(state, given=tuple(g for g in state.given if now - g[0] < CREDIT_S + settings.echo_s))
    low, high = settings.low_for(room.limit_bytes), settings.high_for(room.limit_bytes)
    available = room.available_bytes + _credit_bytes(state, reading, settings, fellows)
    if cache.loading_bytes:
        state = replace(state, loading_at_s=now)
    settled = state.loading_at_s is None or now - state.loading_at_s >= settings.settle_s
    predicted = available + int(min(0.0, room.slope_bytes_s if settled else 0.0) * settings.lookahead_s)
    stall = reading.memory.some.share
    echo = any(now - g[0] < settings.echo_s for g in state.given)
    stalled = stall >= settings.stall_share and predicted < 2 * high and not echo
    pressed = predicted < low or stalled
    share = fellows.share(available, low, high) if fellows is not None else None

    limit = state.limit_bytes
    if limit is None or limit == state.capacity_bytes:
        limit = cache.capacity_bytes
    give, withheld, reason = 0, False, "calm"
    if predicted < low:
        most = int(_step_share(settings.hard_stall_share, settings) * cache.used_bytes)
        missing = low - predicted
        give = min(missing if fellows is None else fellows.part_of(missing, lags=_lags(reading)), most)
        reason = f"headroom will be {predicted // MIB} MiB, {low // MIB} MiB are to stay free"
    guards = settings.guards
    state = replace(state, allowance=state.allowance.after(now, cache, limit, guards))
    if stalled:
        futility = state.futility.after(now, stall, reading.memory.some.total_us, cache, guards)
        state = replace(state, futility=futility)
        by_stall = int(_step_share(stall, settings) * cache.used_bytes)
        if fellows is not None:
            of_all = int(_step_share(stall, settings) * fellows.used_bytes)
            by_stall = min(fellows.part_of(of_all), int(settings.max_step_share * cache.used_bytes))
        futile = now < futility.until_s and by_stall > cache.lossless_bytes
        if futile:
            by_stall, withheld = cache.lossless_bytes, True
        if by_stall > give or (futile and not give):
            give = by_stall
            reason = f"memory stalls {stall:.0%} of the time with {available // MIB} MiB of headroom"
        if futile:
            reason += (
                f"; giving {futility.wasted_bytes // MIB} MiB did not change that, so nothing is forgotten for it for "
                f"{math.ceil(futility.until_s - now)} s"
            )
    spare = predicted - low - (high - low) // _BAND
    owed = share.owed_bytes(spare) if share is not None and not pressed else 0
    if fellows is not None and share is not None and owed and _yields(share, state, fellows):
        limit, state = _yield(share, owed, limit, now, cache, state, fellows)
        give = max(0, cache.used_bytes - limit)
        reason = f"others lack {share.others_lack_bytes // MIB} MiB of their shares"
    else:
        state = replace(state, yielded_at_s=None)
    give = max(0, min(give, cache.used_bytes - cache.floor_bytes))
    allowance = state.allowance.paying_for(max(cache.floor_bytes, cache.used_bytes - give))
    if give > cache.used_bytes - allowance.level_bytes:
        give, withheld = max(0, cache.used_bytes - allowance.level_bytes), True
        reason += f"; no more than {60 * guards.rate_bytes_s(cache.capacity_bytes) / MIB:.0f} MiB a minute is forgotten"
    state = replace(state, allowance=allowance)

    if pressed:
        if give:
            limit = min(limit, max(cache.floor_bytes, cache.used_bytes - give))
        state = replace(state, calm_since_s=None)
    elif predicted >= high and stall < settings.calm_share:
        beyond = predicted - high
        if share is not None:
            beyond = share.held_bytes - cache.used_bytes + share.room_bytes(beyond)
        limit, state = _grow(limit, beyond, now, cache, state, settings)
        if limit < cache.capacity_bytes and not owed:
            reason = "growing back"
    else:
        state = replace(state, calm_since_s=None)
        if not owed:
            reason = "holding"
    free = max(0, predicted - low)
    if share is not None:
        more = share.room_bytes(spare)
        free = min(free, share.held_bytes - cache.used_bytes + more)
        if not pressed and share.lack_bytes:
            # what others yield is taken at once, wherever between the two marks the headroom lies
            limit = max(limit, min(cache.capacity_bytes, share.held_bytes + min(more, share.lack_bytes)))
    state = replace(state, limit_bytes=limit, capacity_bytes=cache.capacity_bytes)

    # whatever was decided before, never grow into the reserve, and never shrink by more than is allowed
    gate = min(limit, cache.used_bytes + free - give)
    gate = max(cache.floor_bytes, gate, min(allowance.level_bytes, cache.capacity_bytes))
    urgent = give > 0 and (stalled or predicted < low // 2)
    return Decision(gate, give, urgent, pressed or predicted < high, withheld, reason, share), state


def _yields(share: Share, state: State, fellows: Fellows) -> bool:
    """Whether it holds so much too much, or another so much too little, that it begins to yield; or goes on with it."""
    tolerated = fellows.settings.tolerance_share
    if state.yielded_at_s is not None or share.over_bytes > tolerated * share.share_bytes:
        return True
    return share.worst_lack > tolerated and share.over_bytes > tolerated / 4 * share.share_bytes


def _yield(
    share: Share, owed: int, limit: int, now: float, cache: CacheStatus, state: State, fellows: Fellows
) -> tuple[int, State]:
    """Lower the limit towards the share: by ``yield_share`` a second, by no more than is owed, and with something
    forgotten for it only as long as all could still be forgotten in an emergency."""
    elapsed_s = 0.0 if state.yielded_at_s is None else min(1.0, max(0.0, now - state.yielded_at_s))
    step = int(fellows.settings.yield_share * cache.capacity_bytes * elapsed_s)
    lowest = max(share.held_bytes - owed, share.share_bytes, cache.floor_bytes)
    if not state.allowance.covers_all:
        lowest = max(lowest, state.allowance.level_bytes)
    below = max(lowest, min(limit, share.held_bytes) - step)
    return min(limit, below), replace(state, yielded_at_s=now)


def _grow(
    limit: int, spare: int, now: float, cache: CacheStatus, state: State, settings: LawSettings
) -> tuple[int, State]:
    """Raise the limit after calm has lasted: by ``grow_share`` a second, never past what is really there."""
    if state.calm_since_s is None:
        return limit, replace(state, calm_since_s=now, grown_at_s=now)
    if now - state.calm_since_s < settings.calm_hold_s:
        return limit, replace(state, grown_at_s=now)
    step = int(settings.grow_share * cache.capacity_bytes * (now - state.grown_at_s))
    ceiling = min(cache.capacity_bytes, cache.used_bytes + spare)
    return max(limit, min(limit + step, ceiling)), replace(state, grown_at_s=now)
