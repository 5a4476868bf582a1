"""Finds the cgroup directories of a process below a file-system root."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpsi.pressure._text import MalformedTextError
from kvpsi.pressure.cgroup import (
    CgroupEntry,
    CgroupMount,
    CgroupVersion,
    hidden_levels,
    parse_mountinfo,
    parse_proc_cgroup,
    parts_below,
    path_parts,
)

_SEARCH_LIMIT = 4096
_MEMORY_LIMIT_FILE: dict[CgroupVersion, str] = {1: "memory.limit_in_bytes", 2: "memory.max"}
_CPU_QUOTA_FILE: dict[CgroupVersion, str] = {1: "cpu.cfs_quota_us", 2: "cpu.max"}


@dataclass(frozen=True, slots=True)
class CgroupDirectory:
    """One cgroup that can be seen: ``name`` is its path in its hierarchy, as far as that is visible."""

    path: Path
    name: str
    version: CgroupVersion
    own: bool


@dataclass(frozen=True, slots=True)
class Cgroups:
    """The cgroups of one process.

    ``memory`` are those with a memory controller, from its own up to the topmost visible one, and ``cpu`` those in
    which a CPU quota can be set; ``pressure`` is its own version 2 cgroup if that has pressure files of its own (the
    root's are the system's). ``notes`` are plain sentences about what is missing.
    """

    memory: tuple[CgroupDirectory, ...] = ()
    cpu: tuple[CgroupDirectory, ...] = ()
    pressure: CgroupDirectory | None = None
    notes: tuple[str, ...] = ()


def locate_cgroups(root: Path, pid: int | Literal["self"] = "self") -> Cgroups:
    """Read /proc/<pid>/cgroup and mountinfo below ``root`` and look which directories are there.

    Never raises.
    """
    process = root / "proc" / str(pid)
    try:
        entries = parse_proc_cgroup(_read(process / "cgroup"))
    except (OSError, MalformedTextError) as error:
        return Cgroups(notes=(f"The cgroups of this process are unknown: {_reason(error)}.",))
    notes: list[str] = []
    try:
        mounts = parse_mountinfo(_read(process / "mountinfo"))
    except (OSError, MalformedTextError) as error:
        mounts = _usual_mounts(root)
        notes.append(f"The usual cgroup mount points are assumed: {_reason(error)}.")
    own_pid = os.getpid() if pid == "self" else pid
    memory: tuple[CgroupDirectory, ...] = ()
    cpu: tuple[CgroupDirectory, ...] = ()
    pressure: CgroupDirectory | None = None
    for entry in entries:
        if entry.version == 1 and not {"memory", "cpu"} & set(entry.controllers):
            continue
        chain = _chain(root, entry, mounts, own_pid)
        if not chain:
            notes.append(f"The version {entry.version} cgroup {entry.path} is not visible from here.")
            continue
        memory = memory or tuple(each for each in chain if _has(each, _MEMORY_LIMIT_FILE[entry.version]))
        cpu = cpu or tuple(each for each in chain if _has(each, _CPU_QUOTA_FILE[entry.version]))
        if entry.version == 2:
            pressure = _pressure_directory(chain[0])
    if not memory:
        notes.append("No memory controller is visible for this process, so only the system's memory counts.")
    return Cgroups(memory, cpu, pressure, tuple(notes))


def _chain(root: Path, entry: CgroupEntry, mounts: list[CgroupMount], own_pid: int) -> tuple[CgroupDirectory, ...]:
    """The directories from the process's own cgroup up to the mount point; none if its own is not visible."""
    place = _place(root, entry, [mount for mount in mounts if mount.carries(entry)], own_pid)
    if place is None:
        return ()
    mount, below = place
    above = tuple(part for part in path_parts(mount.root) if part != "..")
    chain: list[CgroupDirectory] = []
    for depth in range(len(below), -1, -1):
        path = _under(root, mount.mount_point).joinpath(*below[:depth])
        name = "/" + "/".join(above + below[:depth])
        if chain and entry.version == 1 and _is_flat(path):
            break
        chain.append(CgroupDirectory(path, name, entry.version, own=not chain))
    return tuple(chain)


def _place(
    root: Path, entry: CgroupEntry, mounts: list[CgroupMount], own_pid: int
) -> tuple[CgroupMount, tuple[str, ...]] | None:
    """The mount that shows the cgroup and the cgroup's components below it.

    The last mount covers earlier ones.
    """
    for mount in reversed(mounts):
        below = parts_below(entry.path, mount.root)
        if below is not None and _under(root, mount.mount_point).joinpath(*below).is_dir():
            return mount, below
    parts = path_parts(entry.path)
    if ".." in parts or entry.path.endswith(" (deleted)"):
        return None
    for mount in reversed(mounts):
        top = _under(root, mount.mount_point)
        if hidden_levels(mount.root):
            found = _search(top, hidden_levels(mount.root), parts, own_pid)
            if found is not None:
                return mount, found
            continue
        # A container without a cgroup namespace sees the host's path and only its own subtree: drop leading
        # components until a directory is there, as the JVM does. The mount point itself is the last resort.
        for start in range(len(parts) + 1):
            if top.joinpath(*parts[start:]).is_dir():
                return mount, parts[start:]
    return None


def _search(top: Path, levels: int, parts: tuple[str, ...], own_pid: int) -> tuple[str, ...] | None:
    """The mount starts above the namespace root, whose own name is hidden.

    Look which directory holds the process.
    """
    pattern = "/".join(("*",) * levels + tuple(_glob_escape(part) for part in parts))
    for directory in itertools.islice(_glob(top, pattern), _SEARCH_LIMIT):
        try:
            members = _read(directory / "cgroup.procs").split()
        except OSError:
            continue
        if str(own_pid) in members:
            return directory.relative_to(top).parts
    return None


def _glob(top: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from top.glob(pattern)
    except OSError:
        return


def _glob_escape(part: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in part)


def _is_flat(parent: Path) -> bool:
    """Version 1 without ``use_hierarchy``: this parent neither counts nor limits its children."""
    try:
        return _read(parent / "memory.use_hierarchy").strip() == "0"
    except OSError:
        return False


def _pressure_directory(own: CgroupDirectory) -> CgroupDirectory | None:
    is_hierarchy_root = not _has(own, "cgroup.type") and not _has(own, "cgroup.events")
    if is_hierarchy_root or not _has(own, "memory.pressure"):
        return None
    try:
        switched_off = _read(own.path / "cgroup.pressure").strip() == "0"
    except OSError:
        switched_off = False
    return None if switched_off else own


def _has(directory: CgroupDirectory, name: str) -> bool:
    return (directory.path / name).exists()


def _usual_mounts(root: Path) -> list[CgroupMount]:
    """Where systemd and the distributions mount cgroups, for when mountinfo cannot be read."""
    guesses = [
        CgroupMount("/", "/sys/fs/cgroup", 2, ()),
        CgroupMount("/", "/sys/fs/cgroup/unified", 2, ()),
        CgroupMount("/", "/sys/fs/cgroup/memory", 1, ("memory",)),
        CgroupMount("/", "/sys/fs/cgroup/cpu", 1, ("cpu",)),
        CgroupMount("/", "/sys/fs/cgroup/cpu,cpuacct", 1, ("cpu", "cpuacct")),
    ]
    return [each for each in guesses if _under(root, each.mount_point).is_dir()]


def _under(root: Path, absolute: str) -> Path:
    return root.joinpath(*path_parts(absolute))


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read()


def _reason(error: OSError | MalformedTextError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    return str(error)
