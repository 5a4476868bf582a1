"""Work on several processors: in order, and nothing is left of it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvpsi.sim.processes import spread

WORK = """
import time
from kvpsi.sim.processes import spread

if __name__ == "__main__":
    list(spread(time.sleep, [(60,)] * 4, 2))
"""


def test_what_comes_of_it_is_in_order() -> None:
    jobs = [(2, 5), (3, 2), (2, 10)]
    assert list(spread(pow, jobs, 2)) == list(spread(pow, jobs, 1)) == [32, 9, 1024]


@pytest.mark.skipif(os.name != "posix", reason="signals like these are sent on POSIX systems only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_goes_on_when_it_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    working = _workers(process.pid)
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    _, alive = psutil.wait_procs(working, timeout=20)
    assert not alive
    assert process.stderr is not None
    told = process.stderr.read()
    process.stderr.close()
    assert "InvalidStateError" not in told


def _workers(pid: int) -> list[psutil.Process]:
    """Those that work, as soon as there are two."""
    for _ in range(400):
        found = [each for each in psutil.Process(pid).children() if "spawn_main" in " ".join(each.cmdline())]
        if len(found) == 2:
            time.sleep(1)  # until they have begun
            return found
        time.sleep(0.05)
    raise AssertionError("nobody began to work")
