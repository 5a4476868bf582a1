"""How much of the processors this process can have: affinity, quotas and throttling, and what others take of them.

Sources of the formats: proc(5) for /proc/stat; Linux, Documentation/admin-guide/cgroup-v2.rst (``cpu.max``,
``cpu.stat``) and Documentation/scheduler/sched-bwc.rst (``cpu.cfs_quota_us``, ``cpu.stat``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from kvpsi.pressure._text import MalformedTextError, parse_count, parse_flat_keyed
from kvpsi.pressure.files import HotFile
from kvpsi.pressure.locate import CgroupDirectory, Cgroups, locate_cgroups
from kvpsi.pressure.reading import Stall
from kvpsi.pressure.stalls import PressureFiles

_LOCATE_INTERVAL_S = 10.0
_QUOTA_INTERVAL_S = 1.0
_TICKS_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_BUSY_FIELDS = (0, 1, 2, 5, 6)  # user, nice, system, irq, softirq; a guest's time is in user, stolen time is nobody's


@dataclass(frozen=True, slots=True)
class CpuReading:
    """One look at the processors; shares and CPUs are means over ``interval_s``.

    Attributes:
        time_s: when it was taken.
        interval_s: time since the last one, 0 at the first.
        allowed_cpus: processors that this process may run on.
        quota_cpus: processors' worth of time that the tightest cgroup above it allows; None without a quota.
        own_cpus: processors' worth of time that this process used.
        others_cpus: the same of everybody else on the allowed processors; None where the kernel does not say.
        throttled_share: of the quota's periods, those at whose end the cgroup had to wait; 0 without a quota.
        stall: in which some task had to wait for a processor, of the process's own cgroup, or else of the system; None
            without PSI.
    """

    time_s: float
    interval_s: float
    allowed_cpus: int
    quota_cpus: float | None = None
    own_cpus: float = 0.0
    others_cpus: float | None = None
    throttled_share: float = 0.0
    stall: Stall | None = None


def allowed_cpus() -> frozenset[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the tightest cgroup above this process allows; None without a quota."""
    return min(_quotas_of(locate_cgroups(root)).values(), default=None)


def parse_cpu_max(text: str) -> float | None:
    """``cpu.max`` of version 2: ``quota period`` in microseconds, or ``max period``. Raises MalformedTextError."""
    quota, _, period = text.strip().partition(" ")
    return None if quota == "max" else parse_count(quota, "quota") / max(1, parse_count(period, "period"))


def parse_cfs_quota(quota: str, period: str) -> float | None:
    """``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` of version 1. Raises MalformedTextError."""
    if quota.strip().startswith("-"):
        return None
    return parse_count(quota.strip(), "quota") / max(1, parse_count(period.strip(), "period"))


def parse_busy_ticks(text: str, cpus: Collection[int]) -> int:
    """Ticks in which these processors computed so far, from /proc/stat. Raises MalformedTextError."""
    ticks, n_found = 0, 0
    for line in text.splitlines():
        name, *fields = line.split()
        if not name.startswith("cpu"):
            break  # the processors come first
        if name != "cpu" and parse_count(name[3:], "processor") in cpus:
            n_found += 1
            ticks += sum(parse_count(fields[i], name) for i in _BUSY_FIELDS if i < len(fields))
    if not n_found:
        raise MalformedTextError("no line of a processor that may be used")
    return ticks


class CpuSource:
    """Looks at the processors; on the live root the files stay open. Not thread-safe. ``read`` never raises.

    Args:
        root: where ``proc`` and ``sys`` lie.
        clock: seconds.
        own_s: CPU seconds that this process has used.
        affinity: the processors that it may run on.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        clock: Callable[[], float] = time.monotonic,
        own_s: Callable[[], float] = time.process_time,
        affinity: Callable[[], frozenset[int]] = allowed_cpus,
    ) -> None:
        self._root, self._clock, self._own_s, self._affinity = root, clock, own_s, affinity
        self._keep_open = root == Path("/")
        self._stat = HotFile(root / "proc/stat", keep_open=self._keep_open, many_records=True)
        self._membership_file = HotFile(root / "proc/self/cgroup", keep_open=self._keep_open)
        self._system = PressureFiles(root / "proc/pressure", "{}", scope="system", keep_open=self._keep_open)
        self._own: PressureFiles | None = None
        self._membership = ""
        self._cgroups = Cgroups()
        self._limited: dict[CgroupDirectory, HotFile] = {}
        self._quota_cpus: float | None = None
        self._located_s = self._looked_s = float("-inf")
        self._last: tuple[float, float, frozenset[int], int | None] | None = None
        self._periods: dict[Path, tuple[int, int]] = {}

    def read(self) -> CpuReading:
        """Look now."""
        now_s, own_s, cpus = self._clock(), self._own_s(), self._affinity()
        self._follow_cgroups(now_s)
        ticks = self._busy_ticks(cpus)
        before, self._last = self._last, (now_s, own_s, cpus, ticks)
        interval_s = 0.0 if before is None else max(0.0, now_s - before[0])
        own_cpus, others_cpus = 0.0, None
        if before is not None and interval_s > 0:
            own_cpus = max(0.0, own_s - before[1]) / interval_s
            if ticks is not None and before[3] is not None and cpus == before[2]:
                others_cpus = max(0.0, (ticks - before[3]) / _TICKS_S / interval_s - own_cpus)
        return CpuReading(
            now_s,
            interval_s,
            len(cpus),
            self._quota_cpus,
            own_cpus,
            others_cpus,
            self._throttled_share(),
            self._stall(now_s),
        )

    def close(self) -> None:
        """Give back file descriptors; may be called twice."""
        for file in (self._stat, self._membership_file, *self._limited.values()):
            file.close()
        self._system.close()
        if self._own is not None:
            self._own.close()

    def _busy_ticks(self, cpus: frozenset[int]) -> int | None:
        try:
            return parse_busy_ticks(self._stat.read(), cpus)
        except (OSError, MalformedTextError):
            return None

    def _follow_cgroups(self, now_s: float) -> None:
        """Look the cgroups up again now and then, and where this process was moved; their quotas once a second."""
        if 0 <= now_s - self._looked_s < _QUOTA_INTERVAL_S:
            return
        self._looked_s = now_s
        try:
            membership = self._membership_file.read()
        except OSError:
            membership = ""
        if membership != self._membership or not 0 <= now_s - self._located_s < _LOCATE_INTERVAL_S:
            self._membership, self._located_s = membership, now_s
            self._adopt(locate_cgroups(self._root))
        quotas = _quotas_of(self._cgroups)
        self._quota_cpus = min(quotas.values(), default=None)
        for directory in quotas.keys() - self._limited.keys():
            self._limited[directory] = HotFile(directory.path / "cpu.stat", keep_open=self._keep_open)

    def _adopt(self, cgroups: Cgroups) -> None:
        if cgroups == self._cgroups:
            return
        for file in self._limited.values():
            file.close()
        self._limited, self._periods = {}, {}
        if self._own is not None:
            self._own.close()
        self._cgroups, own = cgroups, cgroups.pressure
        self._own = None
        if own is not None:
            self._own = PressureFiles(own.path, "{}.pressure", scope=f"cgroup:{own.name}", keep_open=self._keep_open)

    def _throttled_share(self) -> float:
        """Of the periods since the last look, those in which a quota ran out, where that was worst."""
        worst = 0.0
        for directory, file in self._limited.items():
            try:
                found = parse_flat_keyed(file.read(), ("nr_periods", "nr_throttled"))
            except (OSError, MalformedTextError):
                continue
            periods, throttled = found.get("nr_periods", 0), found.get("nr_throttled", 0)
            before = self._periods.get(directory.path, (periods, throttled))
            self._periods[directory.path] = (periods, throttled)
            if periods > before[0]:
                worst = max(worst, min(1.0, max(0, throttled - before[1]) / (periods - before[0])))
        return worst

    def _stall(self, now_s: float) -> Stall | None:
        for files in (self._own, self._system):
            if files is not None:
                try:
                    return files.measure("cpu", now_s)
                except (OSError, MalformedTextError):
                    continue
        return None


def _quotas_of(cgroups: Cgroups) -> dict[CgroupDirectory, float]:
    """The quotas of those that have one."""
    quotas = {directory: _quota_of(directory) for directory in cgroups.cpu}
    return {directory: quota for directory, quota in quotas.items() if quota is not None}


def _quota_of(directory: CgroupDirectory) -> float | None:
    try:
        if directory.version == 2:
            return parse_cpu_max((directory.path / "cpu.max").read_text())
        quota, period = (directory.path / f"cpu.cfs_{what}_us" for what in ("quota", "period"))
        return parse_cfs_quota(quota.read_text(), period.read_text())
    except (OSError, ValueError):
        return None
