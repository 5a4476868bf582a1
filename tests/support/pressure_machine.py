"""Finds out whether real memory pressure can be made here, inside an own cgroup."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class PressureMachine:
    """``parent`` is a cgroup directory in which children with a memory limit can be made."""

    parent: Path
    version: int

    @property
    def limit_file(self) -> str:
        return "memory.max" if self.version == 2 else "memory.limit_in_bytes"


def find_pressure_machine(root: Path = Path("/")) -> PressureMachine | str:
    """The machine, or a sentence that says why there is none."""
    try:
        (root / "proc/pressure/memory").read_text()
    except OSError as error:
        return f"/proc/pressure/memory cannot be read ({error.strerror}): boot with psi=1."
    why = "no memory cgroup is mounted below /sys/fs/cgroup"
    for machine in _candidates(root):
        refusal = _refusal(machine)
        if refusal is None:
            return machine
        why = refusal
    return f"{why}: run the tests as root on a machine with a memory controller."


def _candidates(root: Path) -> list[PressureMachine]:
    machines = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        parts = PurePosixPath(path.lstrip("/")).parts
        if "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            machines += [PressureMachine(mount.joinpath(*parts), 1), PressureMachine(mount, 1)]
        elif not controllers:
            mount = root / "sys/fs/cgroup"
            machines += [PressureMachine(mount.joinpath(*parts), 2), PressureMachine(mount, 2)]
    return [machine for machine in machines if machine.parent.is_dir()]


def _refusal(machine: PressureMachine) -> str | None:
    child = machine.parent / f"kvpsi-probe-{os.getpid()}"
    try:
        child.mkdir()
    except OSError as error:
        return f"no cgroup can be made in {machine.parent} ({error.strerror})"
    try:
        (child / machine.limit_file).write_text(str(64 << 20))
    except OSError as error:
        return f"no memory limit can be set in {machine.parent} ({error.strerror})"
    finally:
        child.rmdir()
    return None
