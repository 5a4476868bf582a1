"""Wake-ups from the kernel when a stall passes a threshold, instead of polling for it.

Sources: Linux, Documentation/accounting/psi.rst ("Monitoring for pressure thresholds") and
https://systemd.io/MEMORY_PRESSURE/ for ``$MEMORY_PRESSURE_WATCH`` and ``$MEMORY_PRESSURE_WRITE``.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import select
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

UNPRIVILEGED_WINDOW_US = 2_000_000
_MIN_WINDOW_US, _MAX_WINDOW_US = 500_000, 10_000_000
_POLLPRI = getattr(select, "POLLPRI", 2)
_POLLIN = getattr(select, "POLLIN", 1)
_POLLERR = getattr(select, "POLLERR", 8) | getattr(select, "POLLNVAL", 32)


@dataclass(frozen=True, slots=True)
class TriggerSpec:
    """Fire when ``stall_us`` of stall add up within ``window_us``, at most once per window."""

    kind: Literal["some", "full"] = "some"
    stall_us: int = 150_000
    window_us: int = 1_000_000

    def __post_init__(self) -> None:
        if not _MIN_WINDOW_US <= self.window_us <= _MAX_WINDOW_US:
            raise ValueError(f"window_us must be from {_MIN_WINDOW_US} to {_MAX_WINDOW_US}: {self.window_us}")
        if not 0 < self.stall_us <= self.window_us:
            raise ValueError(f"stall_us must be above 0 and at most window_us: {self.stall_us}")

    def text(self) -> str:
        """What is written to the pressure file."""
        return f"{self.kind} {self.stall_us} {self.window_us}"

    def unprivileged(self) -> TriggerSpec:
        """The nearest one that needs no CAP_SYS_RESOURCE: a window of whole multiples of 2 s."""
        windows = -(-self.window_us // UNPRIVILEGED_WINDOW_US)
        return replace(self, window_us=windows * UNPRIVILEGED_WINDOW_US)


class Trigger:
    """An armed trigger. The constructor raises OSError where the kernel refuses; see ``open_trigger``.

    Without CAP_SYS_RESOURCE the kernel takes only windows of whole multiples of 2 s and looks only that
    often, so a trigger then wakes late and must not be the only guard.
    """

    def __init__(self, path: Path, spec: TriggerSpec) -> None:
        self.path = path
        self.spec = spec
        try:
            fd = _arm(path, spec.text().encode() + b"\0")
        except OSError as error:
            if error.errno != errno.EINVAL or spec.unprivileged() == spec:
                raise
            self.spec = spec.unprivileged()
            fd = _arm(path, self.spec.text().encode() + b"\0")
        self._set_fd(fd, _POLLPRI)

    @classmethod
    def _adopt(cls, path: Path, fd: int, events: int) -> Trigger:
        """A trigger that someone else has specified (systemd), on an open descriptor."""
        trigger = cls.__new__(cls)
        trigger.path = path
        trigger.spec = TriggerSpec()
        trigger._set_fd(fd, events)
        return trigger

    def _set_fd(self, fd: int, events: int) -> None:
        self._fd = fd
        self.events = events
        self.alive = True

    def fileno(self) -> int:
        """For poll, together with ``events``; -1 when closed."""
        return self._fd

    def accept(self, happened: int) -> bool:
        """Take what poll reported on this descriptor: did the trigger fire?

        ``alive`` turns False when it never will again (its cgroup is gone, the other end hung up).
        """
        if happened & _POLLERR:
            self.alive = False
            return False
        if self.events & _POLLPRI:
            return bool(happened & _POLLPRI)
        if not happened:
            return False
        return self._drain()

    def wait(self, timeout_s: float) -> bool:
        """Block until the trigger fires (True), or until the time is over or it died (False)."""
        if not self.alive or self._fd < 0:
            return False
        poll = select.poll()
        poll.register(self._fd, self.events)
        return any(self.accept(happened) for _, happened in poll.poll(max(0.0, timeout_s) * 1000))

    def close(self) -> None:
        """Disarm; may be called twice."""
        self.alive = False
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Trigger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drain(self) -> bool:
        """A pipe or socket fires once for all that is in it; its end is the end of the trigger."""
        fired = False
        while True:
            try:
                data = os.read(self._fd, 4096)
            except BlockingIOError:
                return fired
            except OSError:
                data = b""
            if not data:
                self.alive = False
                return fired
            fired = True


def open_trigger(path: Path, spec: TriggerSpec | None = None) -> tuple[Trigger | None, str]:
    """Arm a trigger on a pressure file; without one, the reason why the caller has to poll instead."""
    if not hasattr(select, "poll"):
        return None, "This system has no poll, so there are no pressure triggers."
    try:
        trigger = Trigger(path, spec or TriggerSpec())
    except OSError as error:
        return None, f"No pressure trigger on {path}: {_refusal(error)}."
    return trigger, f"A pressure trigger is armed on {path}: {trigger.spec.text()}."


def open_trigger_from_environment(environ: Mapping[str, str] | None = None) -> tuple[Trigger | None, str]:
    """What the service manager asks to watch (``$MEMORY_PRESSURE_WATCH``), or the reason for None.

    ``/dev/null`` means that pressure is not to be watched; an empty reason means that nothing was asked for.
    """
    environ = os.environ if environ is None else environ
    watch = environ.get("MEMORY_PRESSURE_WATCH", "")
    if not watch:
        return None, ""
    path = Path(watch)
    if watch == os.devnull:
        return (
            None,
            "The service manager has switched memory pressure off (MEMORY_PRESSURE_WATCH is /dev/null).",
        )
    if not path.is_absolute():
        return None, f"MEMORY_PRESSURE_WATCH is not an absolute path: {watch}."
    if not hasattr(select, "poll"):
        return None, "This system has no poll, so there are no pressure triggers."
    try:
        payload = base64.b64decode(environ.get("MEMORY_PRESSURE_WRITE", ""), validate=True)
        return _watch(path, payload), f"Memory pressure is watched on {path}, as the service manager asked."
    except (binascii.Error, ValueError):
        return None, "MEMORY_PRESSURE_WRITE is not base64."
    except OSError as error:
        return None, f"No pressure trigger on {path}: {_refusal(error)}."


def open_best_trigger(own_cgroup: Path | None, root: Path = Path("/")) -> tuple[Trigger | None, str]:
    """What wakes a sleeping monitor: what the service manager asks for, else the own cgroup, else the system."""
    if os.environ.get("MEMORY_PRESSURE_WATCH"):
        return open_trigger_from_environment()
    folders = [] if own_cgroup is None else [own_cgroup / "memory.pressure"]
    reason = ""
    for path in (*folders, root / "proc/pressure/memory"):
        trigger, reason = open_trigger(path)
        if trigger is not None:
            break
    return trigger, reason


def _watch(path: Path, payload: bytes) -> Trigger:
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return Trigger._adopt(path, _arm(path, payload), _POLLPRI)
    if stat.S_ISFIFO(mode):
        # Read and write, so that opening does not wait and no writer leaving ends it.
        return Trigger._adopt(path, _arm(path, payload), _POLLIN)
    if stat.S_ISSOCK(mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(1.0)
            channel.connect(str(path))
            channel.sendall(payload)
            channel.setblocking(False)
            return Trigger._adopt(path, channel.detach(), _POLLIN)
    raise OSError(errno.ENXIO, "it is neither a file, a fifo nor a socket")


def _arm(path: Path, payload: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if payload:
            os.write(fd, payload)
    except BaseException:
        os.close(fd)
        raise
    return fd


_REFUSALS = {
    errno.EPERM: "this process may not set one (CAP_SYS_RESOURCE is missing)",
    errno.EACCES: "this process may not write to it",
    errno.EROFS: "it is mounted read-only",
    errno.EINVAL: "the kernel refuses these thresholds",
    errno.EOPNOTSUPP: "Pressure Stall Information is switched off",
    errno.EBUSY: "it is taken",
    errno.ENOENT: "there is no such file",
}


def _refusal(error: OSError) -> str:
    return _REFUSALS.get(error.errno or 0, error.strerror or str(error))
