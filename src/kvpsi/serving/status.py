"""What the server is doing, as one record: for the metrics, the status page and `kvpsi top`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Status:
    """Sizes in bytes, times in seconds; counters count from the start.

    ``reason`` is why the governor decided as it did last. This model may hold ``may_hold_bytes`` of the
    ``all_may_hold_bytes`` that it and other governed ones may hold together; 0: it is alone. ``reserve_bytes`` to
    ``grow_share`` are the law's settings as they are now, and ``learned`` says of each that is no longer what it was at
    the start why.
    """

    model: str
    running: int
    waiting: int
    parallel: int
    sessions: int
    sessions_bytes: int
    sessions_dropped: int
    sessions_parked: int
    parked_bytes: int
    spilled_bytes: int
    parked: int
    restored: int
    parking_failures: int
    given_bytes: dict[str, int]
    capacity_bytes: int
    used_bytes: int
    committed_bytes: int
    resident_bytes: int
    limit_bytes: int
    may_hold_bytes: int
    all_may_hold_bytes: int
    share_weight: float
    all_shares_weight: float
    headroom_bytes: int
    memory_limit_bytes: int
    memory_pressure: float
    cpu_pressure: float
    io_pressure: float
    threads: int
    threads_reason: str
    thread_changes: int
    concurrency_limit: int
    admission: str
    admission_reason: str
    stall_s: float
    releases: int
    trims: int
    interrupts: int
    returned_bytes: int
    forgotten_tokens: int
    healed_tokens: int
    healing_s: float
    decodes: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    busy_s: float
    prompt_s: float
    finished: int
    finished_by: dict[str, int]
    failed: int
    cancelled: int
    rejected: dict[str, int]
    promises: int
    pauses: int
    governed: bool
    reason: str
    adapts: bool
    reserve_bytes: int
    regrow_bytes: int
    lookahead_s: float
    step_share: float
    stall_share: float
    calm_hold_s: float
    grow_share: float
    learned: list[str]
    uptime_s: float


StatusSource = Callable[[], Status]
