"""What /proc/meminfo and /proc/vmstat say about the machine as a whole.

Source: Linux, Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kvpsi.pressure._text import MalformedTextError, find_fields, parse_count, parse_flat_keyed

_MEMINFO_KEYS = frozenset(
    [
        "MemTotal",
        "MemFree",
        "MemAvailable",
        "Mapped",
        "Shmem",
        "SwapTotal",
        "SwapFree",
    ]
)
# What MemAvailable is estimated from where the kernel does not tell it.
_OLD_MEMINFO_KEYS = frozenset(["Buffers", "Cached", "SReclaimable"])
_KB = r" +([0-9]{1,15}) kB\n"
# The layout since Linux 3.14, for one search in place of seven; what is different is read line by line.
_USUAL_MEMINFO = re.compile(
    rf"MemTotal:{_KB}MemFree:{_KB}MemAvailable:{_KB}.*?\nSwapTotal:{_KB}SwapFree:{_KB}.*?\nMapped:{_KB}Shmem:{_KB}",
    re.DOTALL,
)
_VMSTAT_KEYS = frozenset(
    ["pswpin", "pswpout", "workingset_refault", "workingset_refault_file", "workingset_refault_anon"]
)


class Meminfo(NamedTuple):
    """The lines of /proc/meminfo that count here, in bytes.

    ``available_bytes`` is None before Linux 3.14; buffers, cache and slab are looked for only then.
    """

    total_bytes: int
    free_bytes: int
    available_bytes: int | None
    buffers_bytes: int = 0
    cached_bytes: int = 0
    mapped_bytes: int = 0
    shmem_bytes: int = 0
    slab_reclaimable_bytes: int = 0
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0


def parse_meminfo(text: str) -> Meminfo:
    """Parse /proc/meminfo.

    Raises MalformedTextError without MemTotal, MemFree or with something not in kB.
    """
    usual = _USUAL_MEMINFO.match(text)
    if usual is not None:
        return _usual_meminfo(usual)
    found = _sizes(text, _MEMINFO_KEYS)
    if "MemAvailable" not in found:
        found |= _sizes(text, _OLD_MEMINFO_KEYS)
    for key in ("MemTotal", "MemFree"):
        if key not in found:
            raise MalformedTextError(f"no {key} line")
    if found["MemTotal"] == 0:
        raise MalformedTextError("MemTotal is zero")
    return Meminfo(
        total_bytes=found["MemTotal"],
        free_bytes=found["MemFree"],
        available_bytes=found.get("MemAvailable"),
        buffers_bytes=found.get("Buffers", 0),
        cached_bytes=found.get("Cached", 0),
        mapped_bytes=found.get("Mapped", 0),
        shmem_bytes=found.get("Shmem", 0),
        slab_reclaimable_bytes=found.get("SReclaimable", 0),
        swap_total_bytes=found.get("SwapTotal", 0),
        swap_free_bytes=found.get("SwapFree", 0),
    )


def _usual_meminfo(match: re.Match[str]) -> Meminfo:
    total, free, available, swap_total, swap_free, mapped, shmem = map(int, match.groups())
    if total == 0:
        raise MalformedTextError("MemTotal is zero")
    return Meminfo(
        total << 10, free << 10, available << 10, 0, 0, mapped << 10, shmem << 10, 0, swap_total << 10, swap_free << 10
    )


def _sizes(text: str, wanted: Collection[str]) -> dict[str, int]:
    """Lines ``key: 123 kB`` in bytes."""
    found: dict[str, int] = {}
    for key, value in find_fields(text, ":", wanted).items():
        if not value.endswith(" kB"):
            raise MalformedTextError(f"{key} is not in kB: {value[:40]!r}")
        found[key] = parse_count(value[:-3], key) * 1024
    return found


def system_available_bytes(memory: Meminfo, working_set_file_bytes: int) -> int:
    """MemAvailable less the mapped files that are needed again, present or not; may be negative.

    MemAvailable counts mapped files as free for the taking, and the weights are mapped files. Mapped counts
    shared memory too, which MemAvailable already leaves out. Before Linux 3.14 the estimate is
    ``MemFree + Cached + Buffers + SReclaimable - Shmem``.
    """
    available_bytes = memory.available_bytes
    if available_bytes is None:
        cache_bytes = memory.cached_bytes + memory.buffers_bytes + memory.slab_reclaimable_bytes
        available_bytes = memory.free_bytes + cache_bytes - memory.shmem_bytes
    mapped_file_bytes = max(0, memory.mapped_bytes - memory.shmem_bytes)
    return available_bytes - max(mapped_file_bytes, working_set_file_bytes)


@dataclass(frozen=True, slots=True)
class Vmstat:
    """Counters of /proc/vmstat in pages since boot.

    ``refaults`` is None where the kernel does not count them.
    """

    swap_in_pages: int
    swap_out_pages: int
    refaults: int | None


def parse_vmstat(text: str) -> Vmstat:
    """Parse /proc/vmstat. Kernels without swap support have no pswpin; that reads as 0."""
    found = parse_flat_keyed(text, _VMSTAT_KEYS)
    return Vmstat(
        swap_in_pages=found.get("pswpin", 0),
        swap_out_pages=found.get("pswpout", 0),
        refaults=refault_count(found),
    )


def refault_count(counters: Mapping[str, int], prefix: str = "") -> int | None:
    """Refaults of files and anonymous pages.

    One common counter before Linux 5.9. None if there is neither.
    """
    file_pages = counters.get(prefix + "workingset_refault_file")
    if file_pages is None:
        return counters.get(prefix + "workingset_refault")
    return file_pages + counters.get(prefix + "workingset_refault_anon", 0)
