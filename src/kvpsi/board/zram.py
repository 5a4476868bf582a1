"""A swap device of compressed memory (Linux, Documentation/admin-guide/blockdev/zram.rst)."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from kvpsi.errors import EnvironmentProblem

_CONTROL = Path("/sys/class/zram-control")
_FIRST_ADDED = 1  # device 0 is there from the beginning and cannot be told from one that somebody uses
_PRIORITY = 100


def put_in(size_bytes: int, announce: Callable[[int], None]) -> int:
    """Add a device, and swap to it; its number.

    Args:
        announce: told the number before anything is swapped to it.

    Raises:
        EnvironmentProblem: this machine has no zram, or does not let it be used.
    """
    number = _add()
    announce(number)
    try:
        _setting(number, "disksize").write_text(str(size_bytes))
    except OSError as error:
        raise EnvironmentProblem(
            f"The zram device {number} would not take a size ({error.strerror}): run as root, or use --swap none."
        ) from error
    _run("mkswap", f"/dev/zram{number}")
    _run("swapon", "--priority", str(_PRIORITY), f"/dev/zram{number}")
    return number


def used_bytes(number: int) -> int:
    """Memory that a device takes, for what is swapped to it and for itself.

    Raises:
        OSError: there is no such device any more.
        ValueError: the kernel writes something else there.
    """
    _, _, used, *_ = _setting(number, "mm_stat").read_text().split()
    return int(used)


def take_away(number: int) -> None:
    """Stop swapping to a device, and remove it; does nothing if it is not there.

    Raises:
        EnvironmentProblem: it could not be switched off.
        OSError: it could not be emptied.
    """
    if not _setting(number, "reset").exists():
        return
    if any(line.split()[0] == f"/dev/zram{number}" for line in Path("/proc/swaps").read_text().splitlines()):
        _run("swapoff", f"/dev/zram{number}")
    _setting(number, "reset").write_text("1")
    if number >= _FIRST_ADDED:
        with contextlib.suppress(OSError):  # an older kernel keeps it, empty
            (_CONTROL / "hot_remove").write_text(str(number))


def _add() -> int:
    """A device that nobody uses: a new one, or where none can be added the first, if it is free."""
    with contextlib.suppress(OSError, ValueError):
        return int((_CONTROL / "hot_add").read_text())
    with contextlib.suppress(OSError, ValueError):
        if int(_setting(0, "disksize").read_text()) == 0:
            return 0
    raise EnvironmentProblem("There is no free zram device: `modprobe zram` as root adds one, or use --swap none.")


def _setting(number: int, name: str) -> Path:
    return Path(f"/sys/block/zram{number}/{name}")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError as error:
        raise EnvironmentProblem(f"{command[0]} is not installed: install util-linux, or use --swap none.") from error
    if done.returncode != 0:
        raise EnvironmentProblem(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
