"""A real server on loopback, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.loads(response.read())


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Served]:
    """`kvpsi serve` with one thread, until it says where it serves."""
    log = folder / "server.log"
    parked = folder / "parked"
    command = [sys.executable, "-m", "kvpsi", "serve", "-m", str(model), "--port", "0", "-t", "1"]
    command += ["--spill-dir", str(parked), *options]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=stderr, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"is served at (http://\S+)/v1", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Served(process, found.group(1), log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not list(parked.rglob("parked-*"))
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()
