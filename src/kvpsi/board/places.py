"""Where on this machine a board's cgroups can be made, version 2, version 1 or a mixture of both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvpsi.errors import EnvironmentProblem
from kvpsi.pressure._text import MalformedTextError
from kvpsi.pressure.cgroup import CgroupVersion, parse_proc_cgroup, path_parts

_PROBE_BYTES = 64 << 20
MEMORY_LIMIT_FILE: dict[CgroupVersion, str] = {1: "memory.limit_in_bytes", 2: "memory.max"}
CPU_QUOTA_FILE: dict[CgroupVersion, str] = {1: "cpu.cfs_quota_us", 2: "cpu.max"}


@dataclass(frozen=True, slots=True)
class Place:
    """A cgroup directory in which others can be made."""

    path: Path
    version: CgroupVersion


@dataclass(frozen=True, slots=True)
class BoardPlaces:
    """Parents of a board's cgroups: for its memory limit, its processors and its pressure files.

    With version 2 alone all are the same. ``cpu`` and ``pressure`` are None where there is no such thing.
    """

    memory: Place
    cpu: Place | None
    pressure: Place | None

    @property
    def all(self) -> tuple[Place, ...]:
        """Each place once."""
        return tuple(dict.fromkeys(p for p in (self.memory, self.cpu, self.pressure) if p is not None))


def find_places(root: Path = Path("/")) -> BoardPlaces:
    """Look where a cgroup with a memory limit can really be made, by making one.

    Raises:
        EnvironmentProblem: there is no such place; says why, and what would help.
    """
    try:
        entries = parse_proc_cgroup((root / "proc/self/cgroup").read_text())
    except (OSError, MalformedTextError) as error:
        raise EnvironmentProblem(f"The cgroups of this process are unknown ({error}): boards need Linux.") from error
    mount = root / "sys/fs/cgroup"
    unified = mount / "unified" if (mount / "unified" / "cgroup.procs").exists() else mount
    own: dict[str, Path] = {}
    for entry in entries:
        for controller in entry.controllers or ("",):
            own[controller] = Path(*path_parts(entry.path))
    second = _upwards(unified, own.get("", Path()), 2) if (unified / "cgroup.procs").exists() else []
    memory, why = _first_with(MEMORY_LIMIT_FILE, _PROBE_BYTES, _first_version(mount, "memory", own) + second)
    if memory is None:
        raise EnvironmentProblem(f"No board can be made here, as {why}: run as root, with a memory controller.")
    cpu, _ = _first_with(CPU_QUOTA_FILE, None, [memory, *_first_version(mount, "cpu", own), *second])
    pressure = memory if memory.version == 2 else next((p for p in second if _can_make(p)), None)
    return BoardPlaces(memory, cpu, pressure)


def _first_version(mount: Path, controller: str, own: dict[str, Path]) -> list[Place]:
    if controller not in own:
        return []
    folders = [folder for folder in mount.glob(f"*{controller}*") if controller in folder.name.split(",")]
    return [place for folder in folders for place in _upwards(folder, own[controller], 1)]


def _upwards(top: Path, below: Path, version: CgroupVersion) -> list[Place]:
    """The process's own cgroup and those above it, as far as they are there."""
    chain = [top / below, *(top / parent for parent in below.parents)]
    return [Place(path, version) for path in dict.fromkeys(chain) if path.is_dir()]


def _first_with(files: dict[CgroupVersion, str], probe: int | None, places: list[Place]) -> tuple[Place | None, str]:
    """The first place whose children have that file, and take the probe; else why the last one would not do."""
    why = "no memory cgroup is mounted below /sys/fs/cgroup"
    for place in places:
        try:
            with _child(place) as child:
                file = child / files[place.version]
                if place.version == 2 and not file.exists():
                    _switch_on(place)
                if probe is not None:
                    _write(file, str(probe))
                elif not file.exists():
                    raise FileNotFoundError(2, "No such file", str(file))
            return place, ""
        except OSError as error:
            why = f"no limit can be set in {place.path} ({error.strerror})"
    return None, why


def _switch_on(place: Place) -> None:
    """Let the cgroups below have controllers, as far as they are there and the kernel allows it."""
    for controller in ("memory", "cpu"):
        with contextlib.suppress(OSError):
            _write(place.path / "cgroup.subtree_control", f"+{controller}")


def _can_make(place: Place) -> bool:
    try:
        with _child(place):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _child(place: Place) -> Iterator[Path]:
    child = place.path / f"kvpsi-probe-{os.getpid()}"
    child.mkdir()
    try:
        yield child
    finally:
        child.rmdir()


def _write(file: Path, text: str) -> None:
    """Write to a file that must be there: a directory that is no cgroup has none."""
    with file.open("r+") as opened:
        opened.write(text)
