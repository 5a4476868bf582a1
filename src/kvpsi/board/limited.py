"""Runs a command within limits: on a board where cgroups can be made, else in a scope of the user's systemd."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpsi.board.board import LEAST_CPUS, MOST_CPUS, BoardSettings, open_board
from kvpsi.board.places import find_places
from kvpsi.board.waiting import wait_for
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.pressure import open_source
from kvpsi.pressure.cpu import cpu_quota
from kvpsi.units import format_bytes

_TOLERANCE = 1.02
_DELEGATE = (
    "let your user hand out processors and memory: put `[Service]` and `Delegate=cpu cpuset io memory pids` into "
    "/etc/systemd/system/user@.service.d/delegate.conf as root, and log in again"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Processors (may be a fraction) and memory; None: as much as there is."""

    cpus: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.cpus is not None and not LEAST_CPUS <= self.cpus <= MOST_CPUS:
            raise UsageError(
                f"Nothing can be held to {self.cpus:g} processors; give between {LEAST_CPUS} and {MOST_CPUS} with "
                "--cpus."
            )
        BoardSettings(self.memory_bytes, "shared", self.cpus)  # complains of too little memory

    def __bool__(self) -> bool:
        return self.cpus is not None or self.memory_bytes is not None


def run_within(limits: Limits, command: Sequence[str]) -> int:
    """Run a command within limits, and give its exit status; nothing is left of it afterwards.

    Ctrl-C and SIGTERM are passed on, and it is waited for, also if it was started by a script that ignores Ctrl-C.

    Raises:
        EnvironmentProblem: no limits can be set here; says what would help.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    scope = scope_for(limits, command)
    if scope is not None:
        return wait_for(subprocess.Popen(scope, text=True))
    with open_board(BoardSettings(limits.memory_bytes, "shared", limits.cpus)) as board:
        return wait_for(board.start(command))


def scope_for(limits: Limits, command: Sequence[str], *, swap: bool = True) -> list[str] | None:
    """The command in a scope of systemd's, where that is the way to hold it; None where a board is.

    That is for ordinary users, and for root where no cgroup can be made.

    Raises:
        EnvironmentProblem: neither can be had here; says what would help.
    """
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not as_root and _serves_users():
        return scope_command(limits, command, as_root=False, swap=swap)
    try:
        find_places()
    except EnvironmentProblem as problem:
        if as_root and Path("/run/systemd/system").exists() and shutil.which("systemd-run"):
            return scope_command(limits, command, as_root=True, swap=swap)
        raise EnvironmentProblem(f"{str(problem).rstrip('.')}, or as a user whom systemd serves.") from problem
    return None


def scope_command(limits: Limits, command: Sequence[str], *, as_root: bool, swap: bool = True) -> list[str]:
    """The command in a transient scope, which systemd removes by itself."""
    properties = []
    if limits.cpus is not None:
        properties += ["-p", f"CPUQuota={max(1, math.floor(100 * limits.cpus + 1e-6))}%"]
    if limits.memory_bytes is not None:
        properties += ["-p", f"MemoryMax={limits.memory_bytes}"]
    if not swap:
        properties += ["-p", "MemorySwapMax=0"]
    whose = [] if as_root else ["--user"]
    return ["systemd-run", *whose, "--scope", "--quiet", "--collect", *properties, "--", *command]


def _serves_users() -> bool:
    """Whether systemd takes commands of the user who asks."""
    uid = os.geteuid() if hasattr(os, "geteuid") else 0
    bus = Path(os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{uid}")) / "systemd" / "private"
    return shutil.which("systemd-run") is not None and bus.exists()


def check(limits: Limits) -> None:
    """See that this process is really held by them.

    Raises:
        EnvironmentProblem: it is not; says what would help.
    """
    quota = cpu_quota()
    if limits.cpus is not None and (quota is None or quota > limits.cpus * _TOLERANCE):
        raise EnvironmentProblem(f"The limit of {limits.cpus:g} processors is not in force here: {_DELEGATE}.")
    with contextlib.closing(open_source()) as source:
        least = min(room.limit_bytes for room in source.read().headrooms)
    if limits.memory_bytes is not None and least > limits.memory_bytes * _TOLERANCE:
        raise EnvironmentProblem(f"The limit of {format_bytes(limits.memory_bytes)} is not in force here: {_DELEGATE}.")
