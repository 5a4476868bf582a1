"""Fair shares of the memory that several governed caches have together. Pure.

Shares are weighted max-min fair (Bertsekas and Gallager, Data Networks, 2nd edition 1992, section 6.5.2), with floors:
who wants less than its share gets what it wants, and what it leaves goes to the others, in proportion to their weights.
Every governor computes them from the same claims, so that all come to the same result without asking each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvpsi.errors import UsageError

_LEAST_SPLIT = 0.05


@dataclass(frozen=True, slots=True)
class ShareSettings:
    """How a cache shares memory with other governed ones under the same limit.

    Attributes:
        weight: what it gets is in proportion to this, among those of the same priority.
        priority: who has a higher one gets all that it can use first; lower ones keep their floors.
        tolerance_share: of its share, what a cache may hold too much, or another too little, before yielding begins.
        yield_share: of its whole size, what a cache yields to others in a second at most.
        folder: where all that share keep their records; empty: the usual one, ``none``: it shares with nobody.
    """

    weight: float = 1.0
    priority: int = 0
    tolerance_share: float = 0.04
    yield_share: float = 0.10
    folder: str = ""

    def __post_init__(self) -> None:
        if not 1e-3 <= self.weight <= 1e6:
            raise UsageError(f"A share's weight of {self.weight:g} makes no sense; give one from 0.001 to 1000000.")
        if not -1000 <= self.priority <= 1000:
            raise UsageError(f"A share's priority of {self.priority} makes no sense; give one from -1000 to 1000.")
        if not 0 <= self.tolerance_share < 1 or not 0 < self.yield_share <= 1:
            raise UsageError("tolerance_share lies from 0 to below 1, and yield_share above 0 and is at most 1.")


@dataclass(frozen=True, slots=True)
class Claim:
    """What one cache holds and wants, in bytes.

    Attributes:
        used_bytes: what it uses now.
        held_bytes: what it used lately and may use again: a cache that makes room for new tokens uses less for a
            moment, and nobody else is to take that.
        floor_bytes: what it cannot go below.
        demand_bytes: what it would hold if there were room.
        givable_bytes: what it could give now: down to its floor, and no more than its guards allow.
        weight, priority: see `ShareSettings`.
    """

    used_bytes: int
    held_bytes: int
    floor_bytes: int
    demand_bytes: int
    givable_bytes: int
    weight: float = 1.0
    priority: int = 0

    @property
    def least_bytes(self) -> int:
        """What it keeps in any case: its floor, unless it wants less."""
        return min(self.floor_bytes, max(self.held_bytes, self.demand_bytes))


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several caches may hold, in bytes.

    Attributes:
        share_bytes: its fair share.
        total_bytes: of which that is the share: what all may hold together.
        held_bytes: what it holds.
        others_lack_bytes, others_over_bytes: what others hold less than their shares, and more.
        worst_lack: the largest part of its share that another lacks.
        unclaimed_bytes: what nobody wants.
        promised_bytes: what all hold and do not use at the moment.
        weight, weights: its own, and of all of its priority.
    """

    share_bytes: int
    total_bytes: int
    held_bytes: int
    others_lack_bytes: int
    others_over_bytes: int
    worst_lack: float
    unclaimed_bytes: int
    promised_bytes: int
    weight: float
    weights: float

    @property
    def may_hold_bytes(self) -> int:
        """Its share, and what nobody wants besides."""
        return self.share_bytes + self.unclaimed_bytes

    @property
    def lack_bytes(self) -> int:
        """What it holds less than its share."""
        return max(0, self.share_bytes - self.held_bytes)

    @property
    def over_bytes(self) -> int:
        """What it holds more than its share."""
        return max(0, self.held_bytes - self.share_bytes)

    def room_bytes(self, spare_bytes: int) -> int:
        """How much it may take beyond what it holds, if so much is spare: all take together no more than there is."""
        spare, wanted = max(0, spare_bytes - self.promised_bytes), self.lack_bytes + self.others_lack_bytes
        if wanted > spare:
            return spare * self.lack_bytes // wanted
        return min(spare, self.lack_bytes + self.unclaimed_bytes)

    def owed_bytes(self, spare_bytes: int) -> int:
        """How much it is to yield if so much is spare, which is not enough for others: all that hold too much yield in
        proportion."""
        missing = self.others_lack_bytes - max(0, spare_bytes - self.promised_bytes)
        over = self.over_bytes + self.others_over_bytes
        return min(self.over_bytes, missing * self.over_bytes // over) if missing > 0 and over else 0


@dataclass(frozen=True, slots=True)
class Fellows:
    """Those that share a limit, as one of them knows them.

    Attributes:
        settings: its own.
        own: its claim, as of now.
        published: its claim as the others know it.
        others: their claims.
        given_bytes: what this one gave since that was published.
        given: what others gave lately, as (time, bytes, headroom just before).
    """

    settings: ShareSettings
    own: Claim
    published: Claim
    others: tuple[Claim, ...]
    given_bytes: int = 0
    given: tuple[tuple[float, int, int], ...] = ()

    @property
    def used_bytes(self) -> int:
        """What all use."""
        return self.own.used_bytes + sum(each.used_bytes for each in self.others)

    def share(self, available_bytes: int, low_bytes: int, high_bytes: int) -> Share:
        """What one may hold of what all may: what they hold, and what is free beyond the high mark, or less what is
        missing to the low one."""
        claims = (self.own, *self.others)
        held = sum(each.held_bytes for each in claims)
        promised = held - sum(each.used_bytes for each in claims)
        free = available_bytes - promised
        total = max(0, held + max(0, free - high_bytes) - max(0, low_bytes - free))
        mine, *fair = fair_shares(total, claims)
        gaps = [share - each.held_bytes for share, each in zip(fair, self.others, strict=True)]
        return Share(
            share_bytes=mine,
            total_bytes=total,
            held_bytes=self.own.held_bytes,
            others_lack_bytes=sum(max(0, gap) for gap in gaps),
            others_over_bytes=sum(max(0, -gap) for gap in gaps),
            worst_lack=max(max(0, gap) / max(1, share) for gap, share in zip(gaps, fair, strict=True)),
            unclaimed_bytes=max(0, total - mine - sum(fair)),
            promised_bytes=promised,
            weight=self.own.weight,
            weights=sum(each.weight for each in claims if each.priority == self.own.priority),
        )

    def part_of(self, missing_bytes: int, *, lags: bool = False) -> int:
        """How much of what is missing is this one's to give.

        From claims that were all published: what one knows newer of itself, the others do not know yet, and each would
        think that it is the others' turn. Where it ``lags``, what others gave since then does not show either; they
        are taken to have given their parts, as this one did.
        """
        before = self.given_bytes if lags else 0
        return max(0, split(missing_bytes + before, (self.published, *self.others))[0] - before)


def fair_shares(total_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """What each may hold of a total: by priority, and in proportion to weights among equals. Nobody gets less than its
    least, nor more than it wants."""
    shares = [claim.least_bytes for claim in claims]
    left = total_bytes - sum(shares)
    for priority in sorted({claim.priority for claim in claims}, reverse=True):
        if left <= 0:
            break
        equals = [n for n, claim in enumerate(claims) if claim.priority == priority]
        least = sum(shares[n] for n in equals)
        bounds = [(claims[n].weight, shares[n], max(shares[n], claims[n].demand_bytes)) for n in equals]
        for n, share in zip(equals, fill(left + least, bounds), strict=True):
            shares[n] = share
        left -= sum(shares[n] for n in equals) - least
    return shares


def split(missing_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """How much each gives so that all together give what is missing, once.

    First those that hold more than their share of what will be left, in proportion to how much more that is and as far
    as they can; then all others as far as that is not enough. What is left is taken to be a little less than all at
    least: many small amounts, given from claims that are the same for a while, are to come to the same as one large.
    """
    held = sum(claim.held_bytes for claim in claims)
    targets = fair_shares(held - max(missing_bytes, int(_LEAST_SPLIT * held)), claims)
    over = [max(0, claim.held_bytes - target) for claim, target in zip(claims, targets, strict=True)]
    first = fill(
        missing_bytes,
        [(max(1, each), 0, min(each, claim.givable_bytes)) for each, claim in zip(over, claims, strict=True)],
    )
    left = [max(0, claim.givable_bytes - given) for claim, given in zip(claims, first, strict=True)]
    rest = fill(missing_bytes - sum(first), [(max(1, each), 0, each) for each in left])
    return [one + other for one, other in zip(first, rest, strict=True)]


def fill(total_bytes: int, bounds: Sequence[tuple[float, int, int]]) -> list[int]:
    """Give each ``clip(weight * level, least, most)``, with the level at which all get the total together.

    Args:
        total_bytes: all that there is.
        bounds: weight, least and most of each, in bytes.

    Returns:
        What each gets, rounded down; the least of all if there is no more, the most if there is enough.
    """
    got = sum(least for _, least, _ in bounds)
    if total_bytes <= got:
        return [least for _, least, _ in bounds]
    if total_bytes >= sum(most for _, _, most in bounds):
        return [most for _, _, most in bounds]
    steps = [(least / weight, weight) for weight, least, _ in bounds]
    steps += [(most / weight, -weight) for weight, _, most in bounds]
    level, rising, filled = 0.0, 0.0, float(got)
    for at, weight in sorted(steps):
        more = rising * (at - level)
        if filled + more >= total_bytes:
            break
        level, rising, filled = at, rising + weight, filled + more
    if rising > 0:
        level += (total_bytes - filled) / rising
    return [min(most, max(least, math.floor(weight * level))) for weight, least, most in bounds]
