"""What a governor tells of itself, of the memory around it and of its share: the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpsi.governor.governor import Governor


@dataclass(frozen=True, slots=True)
class GovernorStatus:
    """As of its last reading; zeros and a weight of one while there is none.

    Attributes:
        memory_limit_bytes: of the machine or container.
        headroom_bytes: what could be taken before somebody must wait.
        memory_pressure: share of the time in which somebody waited for memory.
        stall_s: seconds of that since the start.
        reserve_bytes, regrow_bytes: below which headroom it gives, and above which it takes again.
        may_hold_bytes: its share of ``all_may_hold_bytes``, what all governed ones may hold together; 0: it is alone.
        share_weight: of ``all_shares_weight``.
        learned: a short sentence for each setting that is no longer what it was at the start.
    """

    memory_limit_bytes: int = 0
    headroom_bytes: int = 0
    memory_pressure: float = 0.0
    stall_s: float = 0.0
    reserve_bytes: int = 0
    regrow_bytes: int = 0
    may_hold_bytes: int = 0
    all_may_hold_bytes: int = 0
    share_weight: float = 1.0
    all_shares_weight: float = 1.0
    learned: list[str] = field(default_factory=list)


def status_of(governor: Governor | None, capacity_bytes: int) -> GovernorStatus:
    """What it tells, of a cache of this size; from any thread."""
    if governor is None:
        return GovernorStatus()
    reading, decision, law = governor.reading, governor.decision, governor.settings
    memory_limit_bytes = reading.headroom.limit_bytes if reading else 0
    share = decision.share if decision else None
    return GovernorStatus(
        memory_limit_bytes=memory_limit_bytes,
        headroom_bytes=reading.headroom.available_bytes if reading else 0,
        memory_pressure=reading.memory.some.share if reading else 0.0,
        stall_s=governor.stall_s,
        reserve_bytes=law.low_for(memory_limit_bytes),
        regrow_bytes=law.high_for(memory_limit_bytes),
        may_hold_bytes=min(capacity_bytes, share.may_hold_bytes) if share else 0,
        all_may_hold_bytes=share.total_bytes if share else 0,
        share_weight=share.weight if share else 1.0,
        all_shares_weight=share.weights if share else 1.0,
        learned=governor.explained(),
    )
