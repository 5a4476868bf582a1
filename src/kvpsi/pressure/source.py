"""The Linux source.

Pressure files, memory cgroups, meminfo and vmstat, put together into one Reading per tick.
"""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from kvpsi.errors import PressureUnavailableError
from kvpsi.pressure._text import MalformedTextError
from kvpsi.pressure.cgmemory import NO_LIMIT_INTERVAL_S, CgroupMemory, CgroupMemorySample, reclaimable_bytes
from kvpsi.pressure.files import HotFile
from kvpsi.pressure.locate import Cgroups, locate_cgroups
from kvpsi.pressure.psi import worst_stall
from kvpsi.pressure.rates import CounterRate, Slope
from kvpsi.pressure.reading import Headroom, Reading, Resource, ScopeName, Stall, Swap
from kvpsi.pressure.stalls import PressureFiles
from kvpsi.pressure.synthetic import SYNTHETIC_SCOPE, SyntheticStall
from kvpsi.pressure.system import Meminfo, Vmstat, parse_meminfo, parse_vmstat, system_available_bytes

_T = TypeVar("_T")

RELOCATE_INTERVAL_S = 30.0
RETRY_INTERVAL_S = 1.0
VMSTAT_INTERVAL_S = 0.1
# While calm, what decides nothing (CPU, I/O, swap, refaults) is looked at every five seconds, and whether the
# process was moved every second: a little less, because ticks are never exact.
CALM_INTERVAL_S = 4.9
MEMBERSHIP_INTERVAL_S = 0.9
STALLED_SHARE = 0.01
# The machine's memory need not be looked at at every tick while a cgroup is much tighter and this much is left: a
# neighbour taking 1 GB/s could not use up a quarter of it in between.
SYSTEM_INTERVAL_S = 0.9
SYSTEM_FAR_BYTES = 4_000_000_000
_UNKNOWN_STALL = Stall(scope=SYNTHETIC_SCOPE)
_GONE = (errno.ENOENT, errno.ENODEV, errno.EIO, errno.ENOTDIR)


class LinuxSource:
    """Reads everything below ``root``; on the live root the files stay open.

    Headroom and memory stall are new in every reading. While no task waits for memory, the rest may be up to five
    seconds old: stalls of CPU and I/O, swap, refaults, limits above the own cgroup where there were none; and up to one
    second: the own cgroup's limit where there was none, and the system's headroom where a cgroup's is much smaller.
    ``working_set_file_bytes`` is how much of the page cache this process needs again and again (the mapped
    weights); set it when it is known. Not thread-safe. Raises PressureUnavailableError when neither the
    system's memory nor a limited cgroup's can be read at the start; after that ``read`` never raises.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        pid: int | Literal["self"] = "self",
        working_set_file_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._pid = pid
        self._clock = clock
        self._keep_open = root == Path("/")
        self._working_set_file_bytes = max(0, working_set_file_bytes)
        proc = root / "proc"
        self._meminfo_file = HotFile(proc / "meminfo", keep_open=self._keep_open)
        self._vmstat_file = HotFile(proc / "vmstat", keep_open=self._keep_open, many_records=True)
        self._membership_file = HotFile(proc / str(pid) / "cgroup", keep_open=self._keep_open)
        self._system_pressure = PressureFiles(proc / "pressure", "{}", scope="system", keep_open=self._keep_open)
        self._own_pressure: PressureFiles | None = None
        self._memory: list[CgroupMemory] = []
        self._cgroups = Cgroups()
        self._membership = ""
        self._membership_s = float("-inf")
        self._calm = False
        self._located_s: float | None = None
        self._relocate = False
        self._retry_s = float("-inf")
        self._slopes: dict[str, Slope] = {}
        self._vmstat: Vmstat | None = None
        self._vmstat_s: float | None = None
        self._meminfo: Meminfo | None = None
        self._meminfo_s = float("-inf")
        self._samples: list[tuple[CgroupMemory, CgroupMemorySample | None]] = []
        self._samples_s = float("-inf")
        self._unlimited = False
        self._slow_s = float("-inf")
        self._cpu: Stall | None = None
        self._io: Stall | None = None
        self._swap = Swap()
        self._refaults_s: float | None = None
        self._swap_in, self._swap_out, self._refaults = CounterRate(), CounterRate(), CounterRate()
        self._refaults_from = ""
        self._synthetic = SyntheticStall()
        self._time_s: float | None = None
        self._last_headroom: Headroom | None = None
        self._last_headrooms: dict[str, Headroom] = {}
        self._problems: list[str] = []
        self.read()

    @property
    def working_set_file_bytes(self) -> int:
        """Bytes of files (the weights) that must stay in the page cache and so are not reclaimable."""
        return self._working_set_file_bytes

    @working_set_file_bytes.setter
    def working_set_file_bytes(self, value: int) -> None:
        self._working_set_file_bytes = max(0, value)
        self._meminfo_s = float("-inf")
        for slope in self._slopes.values():
            slope.reset()

    @property
    def cgroups(self) -> Cgroups:
        """Where this process is, as last looked up."""
        return self._cgroups

    def read(self) -> Reading:
        now_s = self._clock()
        interval_s = 0.0 if self._time_s is None else max(0.0, now_s - self._time_s)
        self._time_s = now_s
        self._problems = []
        self._follow_cgroups(now_s)
        memory = worst_stall(self._stalls("memory", now_s))
        self._calm = memory is not None and memory.some.share < STALLED_SHARE
        system_is_far = self._system_is_far(now_s)
        if not system_is_far:
            self._meminfo, self._meminfo_s = self._attempt("/proc/meminfo", self._read_meminfo), now_s
        meminfo = self._meminfo
        samples = self._sample_cgroups(None if meminfo is None else meminfo.total_bytes, now_s)
        headrooms = self._headrooms(None if system_is_far else meminfo, samples, now_s, system_is_far=system_is_far)
        headroom = self._tightest(headrooms)
        if not (self._calm and 0.0 <= now_s - self._slow_s < CALM_INTERVAL_S):
            self._look_at_the_rest(meminfo, samples, now_s)
        synthetic = memory is None
        if memory is None:
            memory = self._synthetic.measure(headroom, self._swap.swap_in_bytes_s, interval_s)
            self._problems.append(
                "Without Pressure Stall Information the memory stall is estimated from headroom and swapping."
            )
        return Reading(
            time_s=now_s,
            interval_s=interval_s,
            headroom=headroom,
            memory=memory,
            cpu=self._cpu or _UNKNOWN_STALL,
            io=self._io or _UNKNOWN_STALL,
            swap=self._swap,
            refaults_s=self._refaults_s,
            headrooms=headrooms,
            synthetic=synthetic,
            problems=tuple(self._problems),
        )

    def close(self) -> None:
        for file in (self._meminfo_file, self._vmstat_file, self._membership_file):
            file.close()
        self._system_pressure.close()
        self._drop_cgroups()
        self._located_s = None
        self._slow_s = float("-inf")

    def describe(self) -> list[str]:
        """What can be seen here, in plain sentences."""
        reading = self.read()
        lines = [
            _describe_stall("the whole system", self._system_pressure),
            "This process's own cgroup has no Pressure Stall Information apart from the system's."
            if self._own_pressure is None
            else _describe_stall(f"the cgroup {self._own_pressure.scope[7:]}", self._own_pressure),
        ]
        for headroom in reading.headrooms:
            mib = headroom.available_bytes >> 20
            lines.append(f"Memory of {headroom.scope}: {mib} MiB of headroom below {headroom.limit_bytes >> 20} MiB.")
        if reading.swap.total_bytes == 0:
            lines.append("There is no swap.")
        else:
            lines.append(
                f"Swap of {reading.swap.scope}: {reading.swap.used_bytes >> 20} MiB used of "
                f"{reading.swap.total_bytes >> 20} MiB."
            )
        return [*lines, *self._cgroups.notes, *(text for text in reading.problems if text not in lines)]

    def _attempt(self, what: str, read: Callable[[], _T], *, in_cgroup: bool = False) -> _T | None:
        """The one place where a file that fails becomes a sentence."""
        try:
            return read()
        except MalformedTextError as error:
            self._problems.append(f"{what} is not as expected: {error}.")
        except OSError as error:
            self._problems.append(f"{what} cannot be read: {error.strerror or error}.")
            self._relocate = self._relocate or (in_cgroup and error.errno in _GONE)
        return None

    def _follow_cgroups(self, now_s: float) -> None:
        """Look the cgroups up again when this process was moved, one vanished, or some seconds went by."""
        recent = 0.0 <= now_s - self._membership_s < MEMBERSHIP_INTERVAL_S
        if self._calm and recent and self._located_s is not None and not self._relocate:
            return
        membership = self._read_membership()
        self._membership_s = now_s
        due = self._located_s is None or not 0.0 <= now_s - self._located_s < RELOCATE_INTERVAL_S
        vanished = self._relocate and now_s >= self._retry_s
        if not (due or vanished or membership != self._membership):
            return
        self._membership, self._located_s, self._relocate = membership, now_s, False
        cgroups = locate_cgroups(self._root, self._pid)
        if cgroups != self._cgroups:
            self._drop_cgroups()
            self._adopt(cgroups)
        else:
            # What failed is still there, so it may go on failing: do not search at every tick.
            self._retry_s = now_s + RETRY_INTERVAL_S

    def _read_membership(self) -> str:
        try:
            return self._membership_file.read()
        except OSError:
            return ""

    def _adopt(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._memory = [CgroupMemory(each, keep_open=self._keep_open) for each in cgroups.memory]
        own = cgroups.pressure
        if own is not None:
            self._own_pressure = PressureFiles(
                own.path, "{}.pressure", scope=f"cgroup:{own.name}", keep_open=self._keep_open
            )

    def _drop_cgroups(self) -> None:
        for memory in self._memory:
            memory.close()
        if self._own_pressure is not None:
            self._own_pressure.close()
        self._memory, self._own_pressure, self._cgroups = [], None, Cgroups()
        self._slow_s = self._samples_s = float("-inf")

    def _sample_cgroups(
        self, memory_total_bytes: int | None, now_s: float
    ) -> list[tuple[CgroupMemory, CgroupMemorySample | None]]:
        if self._calm and self._unlimited and 0.0 <= now_s - self._samples_s < NO_LIMIT_INTERVAL_S:
            return self._samples
        samples = []
        for cgroup in self._memory:
            sample = partial(cgroup.sample, memory_total_bytes, now_s, calm=self._calm)
            samples.append((cgroup, self._attempt(cgroup.what, sample, in_cgroup=True)))
        self._samples, self._samples_s = samples, now_s
        self._unlimited = all(sample is not None and sample.limit_bytes is None for _, sample in samples)
        return samples

    def _headrooms(
        self,
        meminfo: Meminfo | None,
        samples: list[tuple[CgroupMemory, CgroupMemorySample | None]],
        now_s: float,
        *,
        system_is_far: bool,
    ) -> tuple[Headroom, ...]:
        headrooms = []
        for cgroup, sample in samples:
            if sample is None:
                headrooms.extend(self._guarded_headroom(cgroup, now_s))
                continue
            if sample.limit_bytes is None or sample.stat is None:
                continue
            cache_bytes = reclaimable_bytes(sample.stat, self._working_set_file_bytes)
            headrooms.append(self._headroom(cgroup.scope, sample.limit_bytes, sample.usage_bytes, cache_bytes, now_s))
        if meminfo is not None:
            available_bytes = system_available_bytes(meminfo, self._working_set_file_bytes)
            free_bytes = min(meminfo.free_bytes, meminfo.total_bytes)
            usage_bytes = meminfo.total_bytes - free_bytes
            headrooms.append(
                self._headroom("system", meminfo.total_bytes, usage_bytes, available_bytes - free_bytes, now_s)
            )
        elif system_is_far:
            headrooms.append(self._last_headrooms["system"])
        elif "system" in self._last_headrooms:
            headrooms.append(self._last_known("system"))
        self._last_headrooms = {each.scope: each for each in headrooms}
        if self._slopes.keys() != self._last_headrooms.keys():
            self._slopes = {scope: slope for scope, slope in self._slopes.items() if scope in self._last_headrooms}
        return tuple(headrooms)

    def _guarded_headroom(self, cgroup: CgroupMemory, now_s: float) -> list[Headroom]:
        """What a cgroup that is there but cannot be read leaves at most, so that a wider scope's room is not taken.

        Limit less use, with the cache last known or none; else the last known figure; else a sentence, the first.
        """
        if not cgroup.directory.path.is_dir():
            return []
        last = self._last_headrooms.get(cgroup.scope)
        try:
            figures = cgroup.without_cache()
        except (OSError, MalformedTextError):
            if last is not None:
                return [self._last_known(cgroup.scope)]
            self._problems.insert(0, f"The headroom may be far too large: a limit of {cgroup.scope} is not seen.")
            return []
        if figures is None:
            return []
        self._problems.append(f"The cache of {cgroup.scope} is not seen: none, or what was last known, counts.")
        cache_bytes = -self._working_set_file_bytes if last is None else last.reclaimable_bytes
        return [self._headroom(cgroup.scope, *figures, cache_bytes, now_s)]

    def _last_known(self, scope: ScopeName) -> Headroom:
        self._problems.append(f"The last known headroom of {scope} is repeated.")
        self._slopes.pop(scope, None)
        return replace(self._last_headrooms[scope], slope_bytes_s=0.0)

    def _headroom(self, scope: str, limit_bytes: int, usage_bytes: int, cache_bytes: int, now_s: float) -> Headroom:
        available_bytes = limit_bytes - usage_bytes + cache_bytes
        slope = self._slopes.get(scope)
        if slope is None:
            slope = self._slopes[scope] = Slope()
        return Headroom(
            available_bytes=available_bytes,
            slope_bytes_s=slope.update(now_s, available_bytes),
            limit_bytes=limit_bytes,
            usage_bytes=usage_bytes,
            reclaimable_bytes=cache_bytes,
            scope=scope,
        )

    def _tightest(self, headrooms: tuple[Headroom, ...]) -> Headroom:
        if headrooms:
            self._last_headroom = headrooms[0]
            if len(headrooms) > 1:
                self._last_headroom = min(headrooms, key=lambda headroom: headroom.available_bytes)
            return self._last_headroom
        if self._last_headroom is None:
            self.close()
            raise PressureUnavailableError(
                "No memory figures can be read here: " + " ".join(self._problems or ["nothing was found."])
            )
        self._problems.append("No memory figure could be read at this tick; the last known one is repeated.")
        return replace(self._last_headroom, slope_bytes_s=0.0)

    def _system_is_far(self, now_s: float) -> bool:
        """May the last figures of the whole machine, of at most 0.9 s ago, stand for this tick too?"""
        system, tightest = self._last_headrooms.get("system"), self._last_headroom
        if not self._calm or self._meminfo is None or system is None or tightest is None or tightest.scope == "system":
            return False
        farthest_bytes = max(SYSTEM_FAR_BYTES, 2 * tightest.available_bytes)
        return 0.0 <= now_s - self._meminfo_s < SYSTEM_INTERVAL_S and system.available_bytes >= farthest_bytes

    def _read_meminfo(self) -> Meminfo:
        return parse_meminfo(self._meminfo_file.read())

    def _read_vmstat(self, now_s: float) -> Vmstat | None:
        """At most ten times a second: it is the dearest file, and only rates come from it."""
        recent = self._vmstat_s is not None and 0.0 <= now_s - self._vmstat_s < VMSTAT_INTERVAL_S
        if not recent:
            self._vmstat = self._attempt("/proc/vmstat", lambda: parse_vmstat(self._vmstat_file.read()))
            self._vmstat_s = now_s
        return self._vmstat

    def _measure_swap(self, meminfo: Meminfo | None, now_s: float) -> Swap:
        """The scope with the least free swap; rates are the system's, the only ones there are."""
        if meminfo is None or meminfo.swap_total_bytes == 0:
            return Swap()
        used_bytes = max(0, meminfo.swap_total_bytes - meminfo.swap_free_bytes)
        candidates = [Swap(total_bytes=meminfo.swap_total_bytes, used_bytes=used_bytes)]
        candidates += [swap for cgroup in self._memory if (swap := _swap_or_none(cgroup)) is not None]
        narrowest = min(candidates, key=lambda swap: swap.total_bytes - swap.used_bytes)
        vmstat = self._read_vmstat(now_s)
        if vmstat is None or self._vmstat_s is None:
            return narrowest
        return replace(
            narrowest,
            swap_in_bytes_s=self._swap_in.update(self._vmstat_s, vmstat.swap_in_pages) * mmap.PAGESIZE,
            swap_out_bytes_s=self._swap_out.update(self._vmstat_s, vmstat.swap_out_pages) * mmap.PAGESIZE,
        )

    def _refault_rate(
        self, samples: list[tuple[CgroupMemory, CgroupMemorySample | None]], now_s: float
    ) -> float | None:
        """From this process's own cgroup where that counts refaults, else from the whole system."""
        for cgroup, sample in samples:
            if cgroup.directory.own and sample is not None and sample.stat is not None:
                refaults = sample.stat.refaults
                if refaults is not None:
                    return self._update_refaults(cgroup.scope, sample.stat_s, refaults)
        vmstat = self._read_vmstat(now_s)
        if vmstat is None or vmstat.refaults is None or self._vmstat_s is None:
            return None
        return self._update_refaults("system", self._vmstat_s, vmstat.refaults)

    def _update_refaults(self, scope: str, time_s: float, count: int) -> float:
        if scope != self._refaults_from:
            self._refaults, self._refaults_from = CounterRate(), scope
        return self._refaults.update(time_s, count)

    def _look_at_the_rest(
        self, meminfo: Meminfo | None, samples: list[tuple[CgroupMemory, CgroupMemorySample | None]], now_s: float
    ) -> None:
        """Stalls of CPU and I/O, swap and refaults: while calm, and if all went well, every five seconds."""
        problems_before = len(self._problems)
        self._cpu = worst_stall(self._stalls("cpu", now_s))
        self._io = worst_stall(self._stalls("io", now_s))
        self._swap = self._measure_swap(meminfo, now_s)
        self._refaults_s = self._refault_rate(samples, now_s)
        self._slow_s = now_s if len(self._problems) == problems_before else float("-inf")

    def _stalls(self, resource: Resource, now_s: float) -> list[Stall]:
        """This resource's stall in each scope that reports it, one's own first."""
        stalls = []
        for files in (self._own_pressure, self._system_pressure):
            if files is None:
                continue
            measure = partial(files.measure, resource, now_s)
            stall = self._attempt(files.what[resource], measure, in_cgroup=files is self._own_pressure)
            if stall is not None:
                stalls.append(stall)
        return stalls


def _swap_or_none(cgroup: CgroupMemory) -> Swap | None:
    """Swap accounting is often switched off; that is no problem worth a sentence."""
    try:
        return cgroup.swap()
    except (OSError, MalformedTextError):
        return None


def _describe_stall(where: str, files: PressureFiles) -> str:
    if files.works("memory"):
        return f"Pressure Stall Information of {where} can be read."
    return f"Pressure Stall Information of {where} cannot be read; booting with psi=1 may switch it on."
