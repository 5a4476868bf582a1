"""Limits, use and reclaimable cache of one memory cgroup, version 1 or 2.

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kvpsi.pressure._text import MalformedTextError, parse_count, parse_flat_keyed
from kvpsi.pressure.cgroup import CgroupVersion
from kvpsi.pressure.files import HotFile
from kvpsi.pressure.locate import CgroupDirectory
from kvpsi.pressure.reading import Swap
from kvpsi.pressure.system import locked_file_bytes, refault_count

# Version 1 prints "no limit" as the largest multiple of the page size that fits a signed 64-bit number.
_NO_LIMIT_BYTES = 1 << 62

# How long, while calm, one's own file that says "no limit" is believed, how long those of the cgroups above are, and
# how old the statistics of a cgroup without a limit may be.
NO_LIMIT_INTERVAL_S = 0.9
NO_LIMIT_ABOVE_INTERVAL_S = 4.9
CALM_STAT_INTERVAL_S = 4.9

_REFAULT_KEYS = ("workingset_refault", "workingset_refault_file", "workingset_refault_anon")
_STAT_KEYS_V2 = frozenset(
    (
        *_REFAULT_KEYS,
        "file",
        "inactive_file",
        "active_file",
        "unevictable",
        "slab_reclaimable",
        "file_mapped",
        "shmem",
        "file_dirty",
        "file_writeback",
    )
)
_STAT_KEYS_V1 = frozenset(
    (
        *(f"total_{key}" for key in _REFAULT_KEYS),
        "total_cache",
        "total_inactive_file",
        "total_active_file",
        "total_unevictable",
        "total_mapped_file",
        "total_shmem",
        "total_dirty",
        "total_writeback",
        "hierarchical_memory_limit",
    )
)


def parse_limit(text: str) -> int | None:
    """``max`` or bytes (memory.max, memory.high, memory.swap.max, memory.limit_in_bytes).

    None is no limit.
    """
    word = text.strip()
    if word == "max":
        return None
    limit_bytes = parse_count(word, "limit")
    return None if limit_bytes >= _NO_LIMIT_BYTES else limit_bytes


class MemoryStat(NamedTuple):
    """What both versions of memory.stat say, under one set of names.

    ``file_bytes`` are on the lists of what may go, ``locked_file_bytes`` are not.
    """

    file_bytes: int
    locked_file_bytes: int
    slab_reclaimable_bytes: int
    mapped_bytes: int
    shmem_bytes: int
    dirty_bytes: int
    writeback_bytes: int
    refaults: int | None
    hierarchical_limit_bytes: int | None


def parse_memory_stat(text: str, version: CgroupVersion) -> MemoryStat:
    """Parse memory.stat; version 1's ``total_`` figures include the children, as version 2's always do.

    Raises MalformedTextError when a figure is missing without which the cache cannot be judged.
    """
    found = parse_flat_keyed(text, _STAT_KEYS_V2 if version == 2 else _STAT_KEYS_V1)
    total, cache, mapped, dirty, writeback = (
        ("", "file", "file_mapped", "file_dirty", "file_writeback")
        if version == 2
        else ("total_", "total_cache", "total_mapped_file", "total_dirty", "total_writeback")
    )
    for key in (total + "inactive_file", total + "active_file", mapped):
        if key not in found:
            raise MalformedTextError(f"no {key} line")
    limit_bytes = found.get("hierarchical_memory_limit", _NO_LIMIT_BYTES)
    file_bytes, shmem_bytes = (
        found[total + "inactive_file"] + found[total + "active_file"],
        found.get(total + "shmem", 0),
    )
    cached_bytes = found.get(cache, 0) - shmem_bytes
    return MemoryStat(
        file_bytes=file_bytes,
        locked_file_bytes=locked_file_bytes(cached_bytes, file_bytes, found.get(total + "unevictable", 0)),
        # Version 1 charges slab without saying how much of it is reclaimable.
        slab_reclaimable_bytes=found.get("slab_reclaimable", 0),
        mapped_bytes=found[mapped],
        shmem_bytes=shmem_bytes,
        dirty_bytes=found.get(dirty, 0),
        writeback_bytes=found.get(writeback, 0),
        refaults=refault_count(found, total),
        hierarchical_limit_bytes=None if limit_bytes >= _NO_LIMIT_BYTES else limit_bytes,
    )


def reclaimable_bytes(stat: MemoryStat, working_set_file_bytes: int) -> int:
    """Cache that can go without being missed; negative if the weights were evicted and must come back.

    ``files + reclaimable slab - max(mapped files, working set) - dirty - under writeback``, not below
    ``-working_set_file_bytes``. Mapped shared memory and locked files (locked weights) are not on the file lists, so
    they are not taken off them.
    """
    mapped_file_bytes = max(0, stat.mapped_bytes - stat.shmem_bytes)
    needed_bytes = max(0, max(mapped_file_bytes, working_set_file_bytes) - stat.locked_file_bytes)
    unclean_bytes = stat.dirty_bytes + stat.writeback_bytes
    cache_bytes = stat.file_bytes + stat.slab_reclaimable_bytes
    return max(-working_set_file_bytes, cache_bytes - needed_bytes - unclean_bytes)


class CgroupMemorySample(NamedTuple):
    """One look at a cgroup.

    Without a limit, usage is not read; ``stat`` is read for the limited and for one's own, at ``stat_s``.
    """

    limit_bytes: int | None
    usage_bytes: int
    stat: MemoryStat | None
    stat_s: float


class CgroupMemory:
    """The memory files of one cgroup directory, kept open. Methods raise OSError and MalformedTextError."""

    def __init__(self, directory: CgroupDirectory, *, keep_open: bool) -> None:
        self.directory = directory
        self.scope = f"cgroup:{directory.name}"
        self.what = f"Memory of {self.scope}"
        names = _FILES_V2 if directory.version == 2 else _FILES_V1
        self._files = {role: HotFile(Path(directory.path, name), keep_open=keep_open) for role, name in names.items()}
        self._limit_files = [self._files[role] for role in ("limit", "high") if role in self._files]
        self._no_limit_s: dict[HotFile, float] = {}
        self._last_stat: MemoryStat | None = None
        self._stat_s = float("-inf")

    def sample(self, memory_total_bytes: int | None, now_s: float, *, calm: bool = False) -> CgroupMemorySample:
        """Limit, use and statistics now; a limit that the machine's memory cannot reach is none.

        What has a limit is read in full every time. While calm, a file that said "no limit" is believed for
        0.9 s (4.9 s above one's own cgroup), and the statistics of a cgroup without a limit may be 4.9 s old.
        """
        limit_bytes = self._limit_bytes(now_s, calm=calm)
        stat, fresh = None, False
        if self.directory.own:
            fresh = not (calm and 0.0 <= now_s - self._stat_s < CALM_STAT_INTERVAL_S)
            stat = self._read_stat(now_s) if fresh else self._last_stat
            if stat is not None and stat.hierarchical_limit_bytes is not None:
                # Version 1 tells of limits above what a container can see.
                hierarchical_bytes = stat.hierarchical_limit_bytes
                limit_bytes = hierarchical_bytes if limit_bytes is None else min(limit_bytes, hierarchical_bytes)
        if limit_bytes is None or (memory_total_bytes is not None and limit_bytes >= memory_total_bytes):
            return CgroupMemorySample(None, 0, stat, self._stat_s)
        usage_bytes = self._usage_bytes()
        return CgroupMemorySample(limit_bytes, usage_bytes, stat if fresh else self._read_stat(now_s), now_s)

    def without_cache(self) -> tuple[int, int] | None:
        """Limit and use in bytes from their own files, for when the statistics fail; None without a limit."""
        limit_bytes = self._limit_bytes()
        return None if limit_bytes is None else (limit_bytes, self._usage_bytes())

    def swap(self) -> Swap | None:
        """The cgroup's own swap limit and use (rates are not known per cgroup); None where it has no limit.

        Version 1 limits memory and swap together; what that leaves beyond the memory limit counts as swap.
        """
        limit_bytes = parse_limit(self._files["swap_limit"].read())
        if limit_bytes is None:
            return None
        used_bytes = parse_count(self._files["swap_usage"].read().strip(), "swap usage")
        if self.directory.version == 1:
            memory_limit_bytes = self._limit_bytes()
            if memory_limit_bytes is None:
                return None
            limit_bytes = max(0, limit_bytes - memory_limit_bytes)
            used_bytes -= self._usage_bytes()
        return Swap(total_bytes=limit_bytes, used_bytes=max(0, used_bytes), scope=self.scope)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _limit_bytes(self, now_s: float = 0.0, *, calm: bool = False) -> int | None:
        """The lowest limit in bytes; while calm without the files that lately said that there is none."""
        lowest_bytes = None
        believed_s = NO_LIMIT_INTERVAL_S if self.directory.own else NO_LIMIT_ABOVE_INTERVAL_S
        for file in self._limit_files:
            if calm and 0.0 <= now_s - self._no_limit_s.get(file, float("-inf")) < believed_s:
                continue
            limit_bytes = parse_limit(file.read())
            if limit_bytes is None:
                self._no_limit_s[file] = now_s
            elif lowest_bytes is None or limit_bytes < lowest_bytes:
                lowest_bytes = limit_bytes
        return lowest_bytes

    def _usage_bytes(self) -> int:
        return parse_count(self._files["usage"].read().strip(), "usage")

    def _read_stat(self, now_s: float) -> MemoryStat:
        self._last_stat = parse_memory_stat(self._files["stat"].read(), self.directory.version)
        self._stat_s = now_s
        return self._last_stat


_FILES_V2 = {
    "limit": "memory.max",
    "high": "memory.high",
    "usage": "memory.current",
    "stat": "memory.stat",
    "swap_limit": "memory.swap.max",
    "swap_usage": "memory.swap.current",
}
_FILES_V1 = {
    "limit": "memory.limit_in_bytes",
    "usage": "memory.usage_in_bytes",
    "stat": "memory.stat",
    "swap_limit": "memory.memsw.limit_in_bytes",
    "swap_usage": "memory.memsw.usage_in_bytes",
}
