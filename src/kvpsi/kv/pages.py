"""Pages of this process: give them back, count them, find where they are mapped (Linux only)."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE_BYTES = mmap.PAGESIZE

_MADV_DONTNEED = 4
_SYS_PROCESS_MADVISE = 440  # the same on all architectures that llama.cpp is built for
_PIDFD_SELF = -10000
_MOST_AT_ONCE = 1024  # UIO_MAXIOV
_MADV_NOHUGEPAGE = 15
_MADV_DONTDUMP = 16
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MADV_DODUMP = 17
_SMAPS_HEAD = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
_SMAPS_FIELD = re.compile(rb"^(Rss|Swap): +([0-9]+) kB", re.MULTILINE)

if sys.platform == "linux":
    _libc = ctypes.CDLL(None, use_errno=True)
    _madvise = _libc.madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _mincore = _libc.mincore
    _libc.syscall.restype = ctypes.c_long
    _mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class Mapping:
    """A range of the address space, [start, end) in bytes."""

    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


def can_release() -> bool:
    """Whether pages can be given back here: the semantics relied on (zeros afterwards) are Linux's own."""
    return sys.platform == "linux"


def whole_pages(start: int, end: int) -> Mapping | None:
    """The whole pages inside [start, end), None if there are none."""
    first = -(-start // PAGE_BYTES) * PAGE_BYTES
    last = end // PAGE_BYTES * PAGE_BYTES
    return Mapping(first, last) if last > first else None


def release(ranges: Sequence[Mapping]) -> None:
    """Give whole pages back to the kernel; they read as zeros until written again (madvise(2), MADV_DONTNEED).

    Raises:
        OSError: the kernel refused, for example because the pages are locked (EINVAL).
    """
    for start in range(0, len(ranges), _MOST_AT_ONCE):
        some = ranges[start : start + _MOST_AT_ONCE]
        if not _release_at_once(some):
            _advise(some, _MADV_DONTNEED)


def populate(ranges: Sequence[Mapping]) -> None:
    """Read pages of mapped files in that are missing (madvise(2), MADV_POPULATE_READ, since Linux 5.14).

    Raises:
        OSError: the kernel does not know it, or the file cannot be read.
    """
    _advise(ranges, _MADV_POPULATE_READ)


def provide(ranges: Sequence[Mapping]) -> None:
    """Have the kernel find memory for pages before they are written to (madvise(2), MADV_POPULATE_WRITE, since Linux
    5.14); what they hold stays.

    Raises:
        OSError: the kernel does not know it, or has no memory.
    """
    _advise(ranges, _MADV_POPULATE_WRITE)


def _advise(ranges: Sequence[Mapping], advice: int) -> None:
    for pages in ranges:
        if _madvise(pages.start, pages.n_bytes, advice) != 0:
            err = ctypes.get_errno()
            raise OSError(err, os.strerror(err))


def _release_at_once(ranges: Sequence[Mapping]) -> bool:
    """All ranges in one call, so that other processors are told once and not for each range; False on older kernels.

    process_madvise(2) on oneself with MADV_DONTNEED, since Linux 6.13; measured in docs/decisions/0002.
    """
    if len(ranges) < 2:
        return False
    vector = (ctypes.c_size_t * (2 * len(ranges)))(*(n for pages in ranges for n in (pages.start, pages.n_bytes)))
    done = _libc.syscall(
        ctypes.c_long(_SYS_PROCESS_MADVISE),
        ctypes.c_long(_PIDFD_SELF),
        vector,
        ctypes.c_size_t(len(ranges)),
        ctypes.c_long(_MADV_DONTNEED),
        ctypes.c_long(0),
    )
    return bool(done == sum(pages.n_bytes for pages in ranges))


def trim_heap() -> None:
    """Have the C library give back what was freed on its heap (glibc's malloc_trim(3); elsewhere nothing)."""
    if sys.platform == "linux" and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def forbid_huge_pages(pages: Mapping) -> bool:
    """Keep transparent huge pages out of a range, as one would refill the holes around each byte touched."""
    return bool(_madvise(pages.start, pages.n_bytes, _MADV_NOHUGEPAGE) == 0)


def set_apart(pages: Mapping, apart: bool = True) -> bool:
    """Make a range a mapping of its own, so that smaps counts it alone, or let it join its neighbours again.

    Its contents stay out of core dumps meanwhile; that is the flag which is used, as nobody else sets it and, unlike
    the one against huge pages, it can be taken back before the memory is used for something else.
    """
    return bool(_madvise(pages.start, pages.n_bytes, _MADV_DONTDUMP if apart else _MADV_DODUMP) == 0)


def present_bytes(ranges: Sequence[Mapping]) -> int:
    """Bytes of whole pages that are in memory, from mincore(2); pages that were only ever read count too."""
    flags = np.zeros(sum(pages.n_bytes for pages in ranges) // PAGE_BYTES, dtype=np.uint8)
    address = flags.ctypes.data
    for pages in ranges:
        _mincore(pages.start, pages.n_bytes, address)  # where it fails the flags stay 0
        address += pages.n_bytes // PAGE_BYTES
    return int(np.count_nonzero(flags & 1)) * PAGE_BYTES


def resident_bytes(ranges: Iterable[Mapping], smaps: Path = Path("/proc/self/smaps")) -> tuple[int, int]:
    """Resident and swapped bytes of the mappings that overlap ``ranges``, as smaps counts them.

    Exact where each range is a mapping of its own (see `set_apart`); a mapping that reaches beyond its
    range is counted in the share that overlaps.
    """
    wanted = list(ranges)
    rss = swapped = 0
    text = smaps.read_bytes()
    for head in _SMAPS_HEAD.finditer(text):
        start, end = (int(address, 16) for address in head.groups())
        overlap = sum(max(0, min(end, w.end) - max(start, w.start)) for w in wanted)
        if overlap:
            next_head = _SMAPS_HEAD.search(text, head.end())
            fields = dict(_SMAPS_FIELD.findall(text, head.end(), next_head.start() if next_head else len(text)))
            rss += int(fields.get(b"Rss", 0)) * 1024 * overlap // (end - start)
            swapped += int(fields.get(b"Swap", 0)) * 1024 * overlap // (end - start)
    return rss, swapped


def process_rss_bytes() -> int:
    """Resident set of this process as the kernel counts it (smaps_rollup, else statm)."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def anonymous_mappings(maps: Path = Path("/proc/self/maps")) -> list[Mapping]:
    """Private, writable ranges of this process without a file behind them, the heap included.

    Neighbouring mappings count as one: one allocation can lie in several that differ in their flags only.
    """
    found: list[Mapping] = []
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        name = fields[5].strip() if len(fields) == 6 else ""
        if fields[1].startswith("rw-p") and fields[4] == "0" and not name.startswith(("[stack", "[v")):
            low, _, high = fields[0].partition("-")
            start, end = int(low, 16), int(high, 16)
            if found and found[-1].end == start:
                start = found.pop().start
            found.append(Mapping(start, end))
    return found


def search(mapping: Mapping, needle: bytes, chunk_bytes: int = 1 << 23) -> Iterator[int]:
    """Addresses at which ``needle`` lies in a mapping of this process.

    Reads through /proc/self/mem, so that a mapping which another thread takes away meanwhile ends the search
    instead of the process.
    """
    overlap = len(needle) - 1
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        position = mapping.start
        while position < mapping.end:
            try:
                chunk = os.pread(fd, min(chunk_bytes + overlap, mapping.end - position), position)
            except OSError:
                return
            if not chunk:
                return
            at = chunk.find(needle)
            while at >= 0:
                if at < chunk_bytes:
                    yield position + at
                at = chunk.find(needle, at + 1)
            position += chunk_bytes
    finally:
        os.close(fd)
