"""Processes that heed Ctrl-C whatever started the tests: a shell lets what it runs in the background ignore it."""

from __future__ import annotations

import functools
import signal
import subprocess

popen_heeding_ctrl_c = functools.partial(
    subprocess.Popen, preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
)
