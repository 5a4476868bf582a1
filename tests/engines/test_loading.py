"""How models are opened."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from kvpsi.engines.loading import LoadSettings, open_llama

MIB = 1 << 20

LOCKED = """
import sys
from pathlib import Path
from kvpsi.engines.loading import LoadSettings, open_llama
llm = open_llama(Path(sys.argv[1]), 256, LoadSettings(n_threads=1, lock_weights=True))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmLck"].split()[0]) << 10)
llm.close()
"""


@pytest.mark.engine
def test_locked_weights_are_locked_as_far_as_that_is_allowed(default_model: Path) -> None:
    resource = pytest.importorskip("resource", reason="there are no locked pages to ask for")
    # in a process of its own, as there is no telling whose locked pages they are otherwise
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, str(default_model)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = int(done.stdout.splitlines()[-1])
    size = default_model.stat().st_size
    allowed = soft == resource.RLIM_INFINITY or soft >= size or locked > soft  # the last: a privilege lifts the limit
    assert locked > size - 8 * MIB if allowed else locked <= soft


@pytest.mark.engine
def test_weights_are_not_locked_unless_that_is_asked_for(default_model: Path) -> None:
    before = Path("/proc/self/status").read_text().split("VmLck:")[1].split("\n")[0]
    with contextlib.closing(open_llama(default_model, 256, LoadSettings(n_threads=1))):
        assert Path("/proc/self/status").read_text().split("VmLck:")[1].split("\n")[0] == before
