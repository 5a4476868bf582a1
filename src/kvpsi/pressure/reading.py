"""What one tick of sensing yields: plain, immutable values with their units in their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ScopeName = str
"""Where a figure came from: ``system``, ``cgroup:<path>`` or ``fallback`` (synthesised without PSI)."""

Resource = Literal["memory", "cpu", "io"]


@dataclass(frozen=True, slots=True)
class StallLine:
    """One line of a pressure file (``some`` or ``full``).

    ``share`` is the part of the tick (0..1) that was lost to stalls, from the difference of ``total`` over
    the tick; the averages are the kernel's own, as shares (0..1), refreshed by it every 2 s only. Source:
    Linux, Documentation/accounting/psi.rst.
    """

    share: float = 0.0
    avg10: float = 0.0
    avg60: float = 0.0
    avg300: float = 0.0
    total_us: int = 0


@dataclass(frozen=True, slots=True)
class Stall:
    """Stall of one resource. ``full`` is None where the kernel does not report it."""

    some: StallLine = StallLine()
    full: StallLine | None = None
    scope: ScopeName = "system"


@dataclass(frozen=True, slots=True)
class Headroom:
    """Bytes that can still be allocated before the kernel has to evict what is needed, or kill.

    ``available_bytes`` is ``limit - usage + reclaimable page cache`` and may be negative: mapped files and
    the bytes declared as working set (the weights) do not count as reclaimable, present or not.
    ``slope_bytes_s`` is its rate of change (negative: shrinking), from the last few ticks.
    """

    available_bytes: int
    slope_bytes_s: float
    limit_bytes: int
    usage_bytes: int
    reclaimable_bytes: int
    scope: ScopeName


@dataclass(frozen=True, slots=True)
class Swap:
    """Swap as the narrowest scope that reports it sees it."""

    total_bytes: int = 0
    used_bytes: int = 0
    swap_in_bytes_s: float = 0.0
    swap_out_bytes_s: float = 0.0
    scope: ScopeName = "system"


@dataclass(frozen=True, slots=True)
class Reading:
    """One tick.

    ``headroom`` is the tightest of all scopes looked at (they are all in ``headrooms``); ``memory``,
    ``cpu`` and ``io`` are the stalls with the largest ``some.share`` among the scopes (own cgroup and
    system). ``refaults_s`` is the rate of pages that had to be read again after the kernel dropped them,
    None where the kernel does not say. While calm, a source may repeat ``cpu``, ``io``, ``swap`` and
    ``refaults_s`` for some seconds. ``problems`` lists, in plain sentences, what could not be read at
    this tick.
    """

    time_s: float
    interval_s: float
    headroom: Headroom
    memory: Stall
    cpu: Stall
    io: Stall
    swap: Swap
    refaults_s: float | None = None
    headrooms: tuple[Headroom, ...] = ()
    synthetic: bool = False
    problems: tuple[str, ...] = field(default=())
