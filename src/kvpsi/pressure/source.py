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
from kvpsi.pressure.cgmemory import CgroupMemory, CgroupMemorySample, reclaimable_bytes
from kvpsi.pressure.files import HotFile
from kvpsi.pressure.locate import Cgroups, locate_cgroups
from kvpsi.pressure.psi import worst_stall
from kvpsi.pressure.rates import CounterRate, Slope
from kvpsi.pressure.reading import Headroom, Reading, Resource, Stall, Swap
from kvpsi.pressure.stalls import RESOURCES, PressureFiles
from kvpsi.pressure.synthetic import SYNTHETIC_SCOPE, SyntheticStall
from kvpsi.pressure.system import Meminfo, Vmstat, parse_meminfo, parse_vmstat, system_available_bytes

_T = TypeVar("_T")

RELOCATE_INTERVAL_S = 30.0
RETRY_INTERVAL_S = 1.0
VMSTAT_INTERVAL_S = 0.1
_GONE = (errno.ENOENT, errno.ENODEV, errno.EIO, errno.ENOTDIR)


class LinuxSource:
    """Reads everything below ``root``; on the live root the files stay open.

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
        self._located_s: float | None = None
        self._relocate = False
        self._retry_s = float("-inf")
        self._slopes: dict[str, Slope] = {}
        self._vmstat: Vmstat | None = None
        self._vmstat_s: float | None = None
        self._swap_in, self._swap_out, self._refaults = CounterRate(), CounterRate(), CounterRate()
        self._refaults_from = ""
        self._synthetic = SyntheticStall()
        self._time_s: float | None = None
        self._last_headroom: Headroom | None = None
        self._problems: list[str] = []
        self.read()

    @property
    def working_set_file_bytes(self) -> int:
        """Bytes of files (the weights) that must stay in the page cache and so are not reclaimable."""
        return self._working_set_file_bytes

    @working_set_file_bytes.setter
    def working_set_file_bytes(self, value: int) -> None:
        self._working_set_file_bytes = max(0, value)
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
        meminfo = self._attempt("/proc/meminfo", lambda: parse_meminfo(self._meminfo_file.read()))
        samples = self._sample_cgroups(None if meminfo is None else meminfo.total_bytes)
        headrooms = self._headrooms(meminfo, samples, now_s)
        headroom = self._tightest(headrooms)
        swap = self._swap(meminfo, now_s)
        refaults_s = self._refault_rate(samples, now_s)
        stalls = {resource: worst_stall(self._stalls(resource, now_s)) for resource in RESOURCES}
        synthetic = self._synthetic.measure(headroom, swap.swap_in_bytes_s, interval_s)
        if stalls["memory"] is None:
            self._problems.append(
                "Without Pressure Stall Information the memory stall is estimated from headroom and swapping."
            )
        unknown = Stall(scope=SYNTHETIC_SCOPE)
        return Reading(
            time_s=now_s,
            interval_s=interval_s,
            headroom=headroom,
            memory=stalls["memory"] or synthetic,
            cpu=stalls["cpu"] or unknown,
            io=stalls["io"] or unknown,
            swap=swap,
            refaults_s=refaults_s,
            headrooms=headrooms,
            synthetic=stalls["memory"] is None,
            problems=tuple(self._problems),
        )

    def close(self) -> None:
        for file in (self._meminfo_file, self._vmstat_file, self._membership_file):
            file.close()
        self._system_pressure.close()
        self._drop_cgroups()
        self._located_s = None

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
        try:
            membership = self._membership_file.read()
        except OSError:
            membership = ""
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

    def _sample_cgroups(self, memory_total_bytes: int | None) -> list[tuple[CgroupMemory, CgroupMemorySample | None]]:
        return [
            (
                cgroup,
                self._attempt(f"Memory of {cgroup.scope}", partial(cgroup.sample, memory_total_bytes), in_cgroup=True),
            )
            for cgroup in self._memory
        ]

    def _headrooms(
        self,
        meminfo: Meminfo | None,
        samples: list[tuple[CgroupMemory, CgroupMemorySample | None]],
        now_s: float,
    ) -> tuple[Headroom, ...]:
        headrooms = []
        for cgroup, sample in samples:
            if sample is None or sample.limit_bytes is None or sample.stat is None:
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
        self._slopes = {each.scope: self._slopes[each.scope] for each in headrooms}
        return tuple(headrooms)

    def _headroom(self, scope: str, limit_bytes: int, usage_bytes: int, cache_bytes: int, now_s: float) -> Headroom:
        available_bytes = limit_bytes - usage_bytes + cache_bytes
        slope = self._slopes.setdefault(scope, Slope())
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
            self._last_headroom = min(headrooms, key=lambda headroom: headroom.available_bytes)
            return self._last_headroom
        if self._last_headroom is None:
            self.close()
            raise PressureUnavailableError(
                "No memory figures can be read here: " + " ".join(self._problems or ["nothing was found."])
            )
        self._problems.append("No memory figure could be read at this tick; the last known one is repeated.")
        return replace(self._last_headroom, slope_bytes_s=0.0)

    def _read_vmstat(self, now_s: float) -> Vmstat | None:
        """At most ten times a second: it is the dearest file, and only rates come from it."""
        recent = self._vmstat_s is not None and 0.0 <= now_s - self._vmstat_s < VMSTAT_INTERVAL_S
        if not recent:
            self._vmstat = self._attempt("/proc/vmstat", lambda: parse_vmstat(self._vmstat_file.read()))
            self._vmstat_s = now_s
        return self._vmstat

    def _swap(self, meminfo: Meminfo | None, now_s: float) -> Swap:
        """The scope with the least free swap; rates are the system's, the only ones there are."""
        if meminfo is None or meminfo.swap_total_bytes == 0:
            return Swap()
        used_bytes = max(0, meminfo.swap_total_bytes - meminfo.swap_free_bytes)
        candidates = [Swap(total_bytes=meminfo.swap_total_bytes, used_bytes=used_bytes)]
        for cgroup in self._memory:
            swap = _swap_or_none(cgroup)
            if swap is not None:
                candidates.append(swap)
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
                    return self._update_refaults(cgroup.scope, now_s, refaults)
        vmstat = self._read_vmstat(now_s)
        if vmstat is None or vmstat.refaults is None or self._vmstat_s is None:
            return None
        return self._update_refaults("system", self._vmstat_s, vmstat.refaults)

    def _update_refaults(self, scope: str, time_s: float, count: int) -> float:
        if scope != self._refaults_from:
            self._refaults, self._refaults_from = CounterRate(), scope
        return self._refaults.update(time_s, count)

    def _stalls(self, resource: Resource, now_s: float) -> list[Stall]:
        """This resource's stall in each scope that reports it, one's own first."""
        stalls = []
        for files in (self._own_pressure, self._system_pressure):
            if files is None:
                continue
            what = f"{resource.capitalize()} pressure of {files.scope}"
            stall = self._attempt(what, partial(files.measure, resource, now_s), in_cgroup=files is self._own_pressure)
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
