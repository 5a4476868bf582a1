"""`kvpsi serve` called clumsily, ended in the middle, and its port taken."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.interrupts import popen_heeding_ctrl_c

pytestmark = pytest.mark.engine


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvpsi", "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "--port"),
        (["--api-key", ""], "--api-key"),
        (["-np", "0"], "--parallel"),
        (["--queue", "-1"], "--queue"),
        (["--queue-timeout-s", "0"], "--queue-timeout-s"),
        (["--max-body", "10"], "--max-body"),
        (["--share-weight", "0"], "weight of 0"),
        (["--share-priority", "5000"], "priority of 5000"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
        (["--law", "grow=fast"], "--law"),
        (["--no-govern", "--log", "x.jsonl"], "--log"),
    ],
)
@pytest.mark.usefixtures("default_model")
def test_what_cannot_be_is_told_in_a_sentence(options: list[str], said: str) -> None:
    done = serve(*options)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.usefixtures("default_model")
def test_a_port_that_is_taken_is_told_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve("--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "--port" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_folder_that_cannot_hold_conversations_is_told_in_a_sentence(default_model: Path) -> None:
    done = serve("-m", str(default_model), "--port", "0", "--spill-dir", "/proc/parked")
    assert done.returncode == 1 and "--spill-dir" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_template_that_is_none_ends_it_with_a_sentence(default_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{% for %}")
    done = serve("-m", str(default_model), "--port", "0", "-c", "512", "--chat-template", str(template))
    assert done.returncode == 2 and "--chat-template" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("wait_s", [1.0, 6.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_ended_at_any_time(default_model: Path, number: signal.Signals, wait_s: float) -> None:
    command = [sys.executable, "-m", "kvpsi", "serve", "-m", str(default_model), "--port", "0", "-t", "1"]
    process = popen_heeding_ctrl_c(command, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(wait_s)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in stderr, stderr
    # a server is ended by SIGTERM when all is well; before it listens it is a command like any other, and before Python
    # runs, which takes longer than this on a machine that is busy, the signal ends it by itself
    wanted = (0, 128 + number, -number) if number == signal.SIGTERM else (128 + number, -number)
    assert process.returncode in wanted, stderr


@pytest.mark.parametrize("wait_s", [1.5, 2.5, 5.0])
def test_ctrl_c_twice_ends_it_without_a_word(default_model: Path, wait_s: float) -> None:
    command = [sys.executable, "-m", "kvpsi", "serve", "-m", str(default_model), "--port", "0", "-t", "1"]
    process = popen_heeding_ctrl_c(command, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(wait_s)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in stderr and process.returncode in (128 + signal.SIGINT, -signal.SIGINT), stderr


@pytest.mark.parametrize("keys", ["", " ", " , "])
@pytest.mark.usefixtures("default_model")
def test_an_empty_key_lets_nobody_in(keys: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPSI_API_KEY", keys)
    done = serve("--port", "0")
    assert done.returncode == 2 and "KVPSI_API_KEY" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    monkeypatch.delenv("KVPSI_API_KEY")
    file = tmp_path / "keys"
    file.write_text("# the key for everybody\n\n")
    done = serve("--port", "0", "--api-key-file", str(file))
    assert done.returncode == 2 and "--api-key-file" in done.stderr, done.stderr
    file.write_text("the key for bob\n")
    done = serve("--port", "0", "--api-key-file", str(file))
    assert done.returncode == 2 and "blank" in done.stderr, done.stderr
