"""`kvpsi top` beside a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque

import pytest

from kvpsi.cli.top import sparkline
from support.servers import Served


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kvpsi", "top", *options], capture_output=True, text=True, timeout=60)


def test_bars_reach_from_nothing_to_the_top() -> None:
    assert sparkline(deque([0.0, 0.5, 1.0, 2.0]), 1.0) == " ▄██"
    assert sparkline(deque([0.0, 1.0]), 0.0) == "  "


@pytest.mark.engine
def test_it_shows_what_the_server_is_doing(served: Served) -> None:
    done = run("--url", served.url, "--once")
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout and "headroom" in done.stdout and "governor" in done.stdout
    document = json.loads(run("--url", f"{served.url}/v1/", "--json").stdout)
    assert document["model"] == "small" and document["capacity_bytes"] > 0


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [(["--url", "http://127.0.0.1:9"], 1, "kvpsi serve"), (["--interval-s", "0"], 2, "--interval-s")],
)
def test_clumsy_input_is_told_in_a_sentence(options: list[str], status: int, said: str) -> None:
    done = run(*options)
    assert done.returncode == status and said in done.stderr and len(done.stderr.splitlines()) == 1
