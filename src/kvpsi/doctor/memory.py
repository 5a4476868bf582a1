"""Can memory be given back, and what does the kernel do with it when it is short?"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import psutil

from kvpsi.doctor.finding import Finding
from kvpsi.models import DEFAULT_MODEL
from kvpsi.units import format_bytes

_PROBE_PAGES = 16


def release() -> Finding:
    """Really give pages of an own mapping back and look whether they are gone."""
    name = "giving memory back"
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_DONTNEED"):
        return Finding(
            name,
            "warn",
            "no madvise(MADV_DONTNEED) as Linux has it, so the context is rebuilt in another size instead",
            "Run kvpsi on Linux to give memory back page by page, which costs much less.",
        )
    size = _PROBE_PAGES * mmap.PAGESIZE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(b"\xff" * size)
        before = _resident_pages(pages)
        try:
            pages.madvise(mmap.MADV_DONTNEED)
        except OSError as error:
            return Finding(
                name,
                "fail",
                f"madvise fails ({error.strerror})",
                "Allow the madvise system call in this sandbox.",
            )
        after = _resident_pages(pages)
        zeroed = pages[:] == bytes(size)
    if not zeroed:
        return Finding(name, "fail", "released pages keep their content", "Use a real Linux kernel, not an emulation.")
    if before != _PROBE_PAGES or after != 0:
        return Finding(
            name,
            "warn",
            "released pages read as zeros, but mincore does not show them as gone",
            "Nothing to do, but watch the resident size yourself: this kernel does not report it exactly.",
        )
    return Finding(name, "ok", "madvise(MADV_DONTNEED) returns pages at once, checked with mincore")


def _resident_pages(pages: mmap.mmap) -> int | None:
    """Pages of the mapping that are in memory, as mincore(2) says; None where it does not work."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = (ctypes.c_ubyte * _PROBE_PAGES)()
    anchor = ctypes.c_char.from_buffer(pages)
    address = ctypes.c_void_p(ctypes.addressof(anchor))
    status: int = libc.mincore(address, ctypes.c_size_t(len(pages)), flags)
    del anchor  # or the mapping could not be closed
    return sum(flag & 1 for flag in flags) if status == 0 else None


def swap(root: Path) -> Finding:
    """Swap devices, and whether they are compressed memory (zram)."""
    try:
        lines = (root / "proc/swaps").read_text().splitlines()[1:]
        devices = [(fields[0], int(fields[2]) * 1024) for fields in map(str.split, lines) if len(fields) > 2]
    except (OSError, ValueError) as error:
        return Finding("swap", "warn", f"/proc/swaps cannot be read ({error})", "Mount /proc.")
    if not devices:
        return Finding(
            "swap",
            "warn",
            "none: under pressure the kernel can only drop file pages, the model's weights first",
            "Optional: set up zram, which gives the kernel time before it has to kill.",
        )
    shown = ", ".join(f"{name} ({format_bytes(size_bytes)})" for name, size_bytes in devices)
    return Finding("swap", "ok", shown)


def huge_pages(root: Path) -> Finding:
    """Transparent huge pages: ``always`` lets the kernel fill released holes again."""
    name = "transparent huge pages"
    try:
        text = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return Finding(name, "ok", "not built into this kernel")
    setting = text.partition("[")[2].partition("]")[0]
    if setting == "always":
        return Finding(
            name,
            "warn",
            "always: the kernel may fill released pages again when it builds huge ones",
            "Run `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled` as root.",
        )
    return Finding(name, "ok", setting or "unknown setting")


def locking() -> Finding:
    """How much memory may be locked; only locking the weights needs it."""
    if not hasattr(psutil, "RLIMIT_MEMLOCK"):
        return Finding("locked memory", "ok", "this system states no limit")
    limit_bytes = psutil.Process().rlimit(psutil.RLIMIT_MEMLOCK)[0]
    if limit_bytes == psutil.RLIM_INFINITY:
        return Finding("locked memory", "ok", "unlimited")
    fact = f"at most {format_bytes(limit_bytes)}"
    if limit_bytes >= DEFAULT_MODEL.size_bytes:
        return Finding("locked memory", "ok", fact)
    return Finding(
        "locked memory",
        "warn",
        f"{fact}: too little to lock a model's weights",
        "Only if you want to lock weights: raise it with `ulimit -l unlimited`.",
    )
