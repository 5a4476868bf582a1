"""The formats of /proc/<pid>/cgroup and /proc/<pid>/mountinfo, and how a cgroup's path maps to a directory.

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cgroups.rst and filesystems/proc.rst;
cgroups(7) and cgroup_namespaces(7).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kvpsi.pressure._text import MalformedTextError

CgroupVersion = Literal[1, 2]
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class CgroupEntry:
    """One line of /proc/<pid>/cgroup. Version 2 has hierarchy 0 and no controllers."""

    hierarchy: int
    controllers: tuple[str, ...]
    path: str

    @property
    def version(self) -> CgroupVersion:
        return 2 if self.hierarchy == 0 and not self.controllers else 1


def parse_proc_cgroup(text: str) -> list[CgroupEntry]:
    """Parse ``hierarchy:controllers:path`` lines; the path may itself contain colons.

    Raises MalformedTextError for a line that is not of this form or whose path is not absolute.
    """
    entries = []
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or not (number.isascii() and number.isdigit()) or not path.startswith("/"):
            raise MalformedTextError(f"not a cgroup line: {line[:60]!r}")
        names = tuple(name for name in controllers.split(",") if name)
        entries.append(CgroupEntry(int(number[:9]), names, path))
    return entries


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """A mounted cgroup hierarchy: ``root`` is the cgroup that ``mount_point`` shows.

    Inside a cgroup namespace the root is relative to the namespace and may start with ``/..``.
    """

    root: str
    mount_point: str
    version: CgroupVersion
    controllers: tuple[str, ...]

    def carries(self, entry: CgroupEntry) -> bool:
        """Is the cgroup of this /proc/<pid>/cgroup line found under this mount?"""
        if entry.version != self.version:
            return False
        return self.version == 2 or any(name in self.controllers for name in entry.controllers)


def parse_mountinfo(text: str) -> list[CgroupMount]:
    """The cgroup mounts of /proc/<pid>/mountinfo, in mount order; other file systems are skipped.

    Raises MalformedTextError for a cgroup line with too few fields.
    """
    mounts = []
    for line in text.splitlines():
        if " - cgroup" not in line:
            continue
        left, _, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if len(before) < 6 or len(after) < 3 or not before[3].startswith("/"):
            raise MalformedTextError(f"not a mountinfo line: {line[:60]!r}")
        if after[0] not in ("cgroup", "cgroup2"):
            continue
        version: CgroupVersion = 2 if after[0] == "cgroup2" else 1
        controllers = tuple(after[2].split(",")) if version == 1 else ()
        mounts.append(CgroupMount(_unescape(before[3]), _unescape(before[4]), version, controllers))
    return mounts


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of blanks, tabs, newlines and backslashes."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def path_parts(path: str) -> tuple[str, ...]:
    """The components of a cgroup path, without empty ones."""
    return tuple(part for part in path.split("/") if part)


def parts_below(path: str, root: str) -> tuple[str, ...] | None:
    """Where ``path`` lies below ``root``, as components; None if it does not or if that cannot be known.

    Both are relative to the same cgroup namespace root, so equal leading ``..`` cancel out.
    """
    parts, root_parts = path_parts(path), path_parts(root)
    below = parts[len(root_parts) :]
    if parts[: len(root_parts)] != root_parts or ".." in below:
        return None
    return below


def hidden_levels(root: str) -> int:
    """How many levels above the namespace root a mount starts (``/../..`` is 2); 0 if it does not."""
    parts = path_parts(root)
    return len(parts) if parts and all(part == ".." for part in parts) else 0
