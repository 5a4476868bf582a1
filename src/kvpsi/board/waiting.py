"""Waits for a command that runs within limits, and ends it when it is no longer waited for."""

from __future__ import annotations

import contextlib
import signal
import subprocess

_BY_ITSELF_S = 5.0
_GRACE_S = 10.0


def wait_for(process: subprocess.Popen[str]) -> int:
    """The command's exit status as a shell gives it.

    Ctrl-C in a terminal reaches the command itself, which is given a moment to end. If that was not so, and after
    SIGTERM, it is told to end, and killed if it does not within ten seconds, or at a second Ctrl-C.
    """
    try:
        process.wait()
    except (KeyboardInterrupt, SystemExit) as why:
        try:
            _end(process, _BY_ITSELF_S if isinstance(why, KeyboardInterrupt) else 0.0)
        finally:
            process.kill()  # does nothing if it has ended
            process.wait()
    code: int = process.returncode
    return 128 - code if code < 0 else code


def _end(process: subprocess.Popen[str], by_itself_s: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(by_itself_s)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
