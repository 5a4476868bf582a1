from __future__ import annotations

import base64
import errno
import os
import socket
import sys
from pathlib import Path

import pytest

from kvpsi.pressure import Trigger, TriggerSpec, open_trigger, open_trigger_from_environment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pressure triggers are Linux's own")
MEMORY = Path("/proc/pressure/memory")


def armed(path: Path, spec: TriggerSpec) -> Trigger:
    trigger, reason = open_trigger(path, spec)
    if trigger is None:
        pytest.skip(f"NO PRESSURE TRIGGERS HERE: {reason}")
    return trigger


def test_spec() -> None:
    assert TriggerSpec("full", 70_000, 1_000_000).text() == "full 70000 1000000"
    assert TriggerSpec().unprivileged().window_us == 2_000_000
    assert TriggerSpec(window_us=2_000_000).unprivileged().window_us == 2_000_000
    assert TriggerSpec(window_us=2_000_001).unprivileged().window_us == 4_000_000
    for spec in ({"window_us": 1}, {"stall_us": 0}, {"stall_us": 1_000_001}):
        with pytest.raises(ValueError, match="must be"):
            TriggerSpec(**spec)


def test_live_trigger_waits_and_closes() -> None:
    with armed(MEMORY, TriggerSpec("some", 1_900_000, 2_000_000)) as trigger:
        assert trigger.fileno() >= 0
        assert trigger.wait(0.01) in (True, False)
        assert trigger.alive
    assert trigger.fileno() == -1
    assert not trigger.wait(10.0), "a closed one does not wait"
    trigger.close()


def test_live_window_falls_back_to_multiples_of_two_seconds() -> None:
    with armed(MEMORY, TriggerSpec("some", 400_000, 500_000)) as trigger:
        assert trigger.spec.window_us in (500_000, 2_000_000)


def test_an_ordinary_file_takes_the_text(tmp_path: Path) -> None:
    path = tmp_path / "memory.pressure"
    path.touch()
    with Trigger(path, TriggerSpec()):
        assert path.read_bytes() == b"some 150000 1000000\0"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EPERM, "CAP_SYS_RESOURCE"),
        (errno.EINVAL, "refuses these thresholds"),
        (errno.EOPNOTSUPP, "switched off"),
        (errno.EBUSY, "taken"),
        (errno.EROFS, "read-only"),
        (errno.EXDEV, os.strerror(errno.EXDEV)),
    ],
)
def test_refusals_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    path = tmp_path / "memory.pressure"
    path.touch()
    trigger, why = open_trigger(path)
    assert trigger is None
    assert reason in why


def test_no_such_file(tmp_path: Path) -> None:
    trigger, reason = open_trigger(tmp_path / "none")
    assert trigger is None
    assert "no such file" in reason


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, ""),
        ({"MEMORY_PRESSURE_WATCH": "/dev/null"}, "switched memory pressure off"),
        ({"MEMORY_PRESSURE_WATCH": "here"}, "not an absolute path"),
        ({"MEMORY_PRESSURE_WATCH": "/dev/zero"}, "neither a file, a fifo nor a socket"),
        ({"MEMORY_PRESSURE_WATCH": "/nonexistent/x"}, "no such file"),
        ({"MEMORY_PRESSURE_WATCH": "/proc/self/stat", "MEMORY_PRESSURE_WRITE": "%"}, "not base64"),
    ],
)
def test_environment_that_yields_no_trigger(environ: dict[str, str], reason: str) -> None:
    trigger, why = open_trigger_from_environment(environ)
    assert trigger is None
    assert reason in why


def test_environment_with_a_pressure_file() -> None:
    spec = TriggerSpec("some", 1_900_000, 2_000_000)
    armed(MEMORY, spec).close()
    environ = {
        "MEMORY_PRESSURE_WATCH": str(MEMORY),
        "MEMORY_PRESSURE_WRITE": base64.b64encode(spec.text().encode() + b"\0").decode(),
    }
    trigger, reason = open_trigger_from_environment(environ)
    assert trigger is not None, reason
    with trigger:
        trigger.wait(0.01)
        assert trigger.alive


def test_environment_with_a_fifo(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    trigger, reason = open_trigger_from_environment({"MEMORY_PRESSURE_WATCH": str(path)})
    assert trigger is not None, reason
    with trigger:
        assert not trigger.wait(0.01)
        path.write_bytes(b"xx")
        assert trigger.wait(1.0)
        assert not trigger.wait(0.01), "drained, and no writer left is not the end"
        assert trigger.alive


def test_environment_with_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("/proc/self/cwd/sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("sock")
        server.listen()
        environ = {"MEMORY_PRESSURE_WATCH": str(path), "MEMORY_PRESSURE_WRITE": base64.b64encode(b"hi").decode()}
        trigger, reason = open_trigger_from_environment(environ)
        assert trigger is not None, reason
        with trigger:
            peer, _ = server.accept()
            with peer:
                assert peer.recv(10) == b"hi"
                peer.send(b"!")
                assert trigger.wait(1.0)
                assert trigger.alive
            assert not trigger.wait(1.0)
            assert not trigger.alive, "the other end hung up"
