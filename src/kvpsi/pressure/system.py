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
        "Buffers",
        "Cached",
        "Active(file)",
        "Inactive(file)",
        "Unevictable",
        "Mapped",
        "Shmem",
        "SwapTotal",
        "SwapFree",
    ]
)
_KB = r" +([0-9]{1,15}) kB\n"
# The layout since Linux 3.14, for one search in place of twelve; what is different is read line by line.
_USUAL_MEMINFO = re.compile(
    rf"MemTotal:{_KB}MemFree:{_KB}MemAvailable:{_KB}Buffers:{_KB}Cached:{_KB}.*?"
    rf"\nActive\(file\):{_KB}Inactive\(file\):{_KB}Unevictable:{_KB}.*?\nSwapTotal:{_KB}SwapFree:{_KB}.*?"
    rf"\nMapped:{_KB}Shmem:{_KB}",
    re.DOTALL,
)
_VMSTAT_KEYS = frozenset(
    ["pswpin", "pswpout", "workingset_refault", "workingset_refault_file", "workingset_refault_anon"]
)


class Meminfo(NamedTuple):
    """The lines of /proc/meminfo that count here, in bytes.

    ``available_bytes`` is None before Linux 3.14; the slab is looked for only then. ``unevictable_bytes`` is all that
    cannot go, files or not.
    """

    total_bytes: int
    free_bytes: int
    available_bytes: int | None
    buffers_bytes: int = 0
    cached_bytes: int = 0
    active_file_bytes: int = 0
    inactive_file_bytes: int = 0
    unevictable_bytes: int = 0
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
        found |= _sizes(text, ["SReclaimable"])  # one more of what MemAvailable is estimated from
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
        active_file_bytes=found.get("Active(file)", 0),
        inactive_file_bytes=found.get("Inactive(file)", 0),
        unevictable_bytes=found.get("Unevictable", 0),
        mapped_bytes=found.get("Mapped", 0),
        shmem_bytes=found.get("Shmem", 0),
        slab_reclaimable_bytes=found.get("SReclaimable", 0),
        swap_total_bytes=found.get("SwapTotal", 0),
        swap_free_bytes=found.get("SwapFree", 0),
    )


def _usual_meminfo(match: re.Match[str]) -> Meminfo:
    sizes = [int(kb) << 10 for kb in match.groups()]
    total, free, available, buffers, cached, active, inactive, unevictable, swap_total, swap_free, mapped, shmem = sizes
    if total == 0:
        raise MalformedTextError("MemTotal is zero")
    files = (buffers, cached, active, inactive, unevictable, mapped)
    return Meminfo(total, free, available, *files, shmem, 0, swap_total, swap_free)


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
    shared memory and locked files too, which MemAvailable already leaves out. Before Linux 3.14 the estimate is
    ``MemFree + Cached + Buffers + SReclaimable - Shmem``.
    """
    available_bytes = memory.available_bytes
    if available_bytes is None:
        cache_bytes = memory.cached_bytes + memory.buffers_bytes + memory.slab_reclaimable_bytes
        available_bytes = memory.free_bytes + cache_bytes - memory.shmem_bytes
    mapped_file_bytes = max(0, memory.mapped_bytes - memory.shmem_bytes)
    locked_bytes = locked_file_bytes(
        memory.cached_bytes + memory.buffers_bytes - memory.shmem_bytes,
        memory.active_file_bytes + memory.inactive_file_bytes,
        memory.unevictable_bytes,
    )
    return available_bytes - max(0, max(mapped_file_bytes, working_set_file_bytes) - locked_bytes)


def locked_file_bytes(cached_bytes: int, listed_bytes: int, unevictable_bytes: int) -> int:
    """How much of the page cache is locked (``mlock``), as llama.cpp's ``use_mlock`` does with the weights.

    Such pages are on no list of files that may go. ``cached_bytes`` is the page cache without shared memory,
    ``listed_bytes`` what of it is on those lists; other memory can be unevictable as well, so that is only a bound.
    """
    return min(unevictable_bytes, max(0, cached_bytes - listed_bytes))


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
