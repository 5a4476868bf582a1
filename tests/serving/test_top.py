"""`kvpsi top` beside a real server."""

from __future__ import annotations

import dataclasses
import http.server
import json
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import pytest
from rich.console import Console

from kvpsi.cli.top import History, _screen, sparkline
from kvpsi.hog.trace import read_trace
from kvpsi.serving.status import Status
from support.servers import Served

COMMAND = [sys.executable, "-m", "kvpsi", "top"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60)


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)


def test_bars_reach_from_nothing_to_the_top() -> None:
    assert sparkline(deque([0.0, 0.5, 1.0, 2.0]), 1.0) == " ▄██"
    assert sparkline(deque([0.0, 1.0]), 0.0) == "  "


def test_memory_is_told_with_what_is_saved_and_parked(capsys: pytest.CaptureFixture[str]) -> None:
    status = dict.fromkeys((field.name for field in dataclasses.fields(Status)), 0)
    status |= {"capacity_bytes": 360 << 20, "resident_bytes": 3 << 20, "sessions_bytes": 300 << 20}
    status |= {"sessions": 52, "sessions_parked": 3, "parked_bytes": 12 << 20}
    status |= {"model": "small", "reason": "calm", "parallel": 8, "rejected": {"full": 2, "late": 1}}
    status |= {
        "threads": 2,
        "threads_reason": "2 processors may be used",
        "concurrency_limit": 5,
        "admission_reason": "calm",
    }
    status |= {
        "reserve_bytes": 24 << 20,
        "regrow_bytes": 48 << 20,
        "learned": ["reserve 24 MiB (memory was short once)"],
    }
    history = History()
    history.add(status)
    Console(width=150).print(_screen(status, history))
    shown = capsys.readouterr().out
    assert "303 MiB of 360 MiB" in shown and "49 (300 MiB)" in shown and "3 (12 MiB on disk)" in shown
    assert "answering 0 of 8" in shown and "3 rejected" in shown and "5 of 8" in shown
    assert "2 processors may be used" in shown
    assert "share" not in shown, "it is alone"
    assert "grows back above 48 MiB" in shown and "memory was short once" in shown
    Console(width=150).print(_screen({**status, "sessions_parked": 0}, history))
    assert "parked" not in capsys.readouterr().out
    shared = {
        "may_hold_bytes": 120 << 20,
        "all_may_hold_bytes": 180 << 20,
        "share_weight": 2.0,
        "all_shares_weight": 3.0,
    }
    Console(width=150).print(_screen({**status, **shared}, history))
    shown = capsys.readouterr().out
    assert "120 MiB of 180 MiB" in shown and "weight 2 of 3" in shown


@pytest.mark.engine
def test_it_shows_what_the_server_is_doing(served: Served) -> None:
    done = run("--url", served.url, "--once")
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout and "headroom" in done.stdout and "governor" in done.stdout
    document = json.loads(run("--url", f"{served.url.removeprefix('http://')}/v1/", "--json").stdout)
    assert document["model"] == "small" and document["capacity_bytes"] > 0


@pytest.mark.engine
def test_what_others_take_is_recorded_until_ctrl_c(served: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    command = [*COMMAND, "--url", served.url, "--interval-s", "0.1", "--record", str(trace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = ""
        while shown.count("memory pressure") < 4:
            line = process.stdout.readline()
            assert line
            shown += line
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    points = read_trace(trace)
    assert len(points) >= 4 and points[0] == (0.0, 0)
    assert all(0 <= size_bytes < 256 << 20 for _, size_bytes in points), "nobody took much meanwhile"
    assert run("--url", served.url, "--once", "--record", str(trace)).returncode == 2, "it is not overwritten"


@pytest.mark.engine
@pytest.mark.parametrize("ending", ["reader", "Ctrl-C"])
def test_a_pipe_gets_one_frame_after_the_other(served: Served, ending: str) -> None:
    command = [*COMMAND, "--url", served.url, "--interval-s", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        shown = ""
        while shown.count("memory pressure") < 3:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            shown += line
        if ending == "reader":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == (1 if ending == "reader" else 130)
        assert process.stderr.read() == "" and "\x1b" not in shown


@pytest.mark.parametrize(
    ("options", "said"), [([], "wants an API key"), (["--api-key", "guessed"], "does not accept this API key")]
)
def test_a_missing_key_and_a_wrong_one_are_told_apart(options: list[str], said: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request).start()
        done = run("--url", f"127.0.0.1:{server.server_port}", *options)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--url", "http://127.0.0.1:9"], 1, "kvpsi serve"),
        (["--url", "localhost:9"], 1, "http://localhost:9/v1"),
        (["--url", "localhost:x"], 1, "kvpsi serve"),
        (["--url", "ftp://127.0.0.1"], 2, "begins with http:// or https://"),
        (["--interval-s", "0"], 2, "--interval-s"),
    ],
)
def test_clumsy_input_is_told_in_a_sentence(options: list[str], status: int, said: str) -> None:
    done = run(*options)
    assert done.returncode == status and said in done.stderr and len(done.stderr.splitlines()) == 1
