"""Limits of processors and memory for one command: real cgroups, and what systemd would be asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpsi.board import BoardPlaces, limited, waiting
from kvpsi.board.limited import Limits, check, run_within, scope_command, scope_for
from kvpsi.board.waiting import wait_for
from kvpsi.errors import EnvironmentProblem, UsageError
from support.boards import left_behind
from support.servers import serving

MIB = 1 << 20
LOOK = "from kvpsi.board.limited import Limits, check; check(Limits(0.5, 64 << 20)); print('held')"


def test_what_makes_no_sense_is_told() -> None:
    assert not Limits() and Limits(cpus=1.0) and Limits(memory_bytes=64 * MIB)
    for wrong in ({"cpus": 0.0}, {"cpus": -1.0}, {"memory_bytes": 1}):
        with pytest.raises(UsageError):
            Limits(**wrong)  # type: ignore[arg-type]


def test_what_systemd_is_asked_for() -> None:
    assert scope_command(Limits(0.5, 4096 * MIB), ["kvpsi", "serve"], as_root=False) == [
        *("systemd-run", "--user", "--scope", "--quiet", "--collect"),
        *("-p", "CPUQuota=50%", "-p", "MemoryMax=4294967296", "--", "kvpsi", "serve"),
    ]
    plain = scope_command(Limits(memory_bytes=64 * MIB), ["true"], as_root=True, swap=False)
    assert "--user" not in plain and "MemorySwapMax=0" in plain and not any("CPUQuota" in part for part in plain)


def test_an_ordinary_user_goes_to_systemd_if_that_serves_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere() -> None:
        raise EnvironmentProblem("No board can be made here: run as root, with a memory controller.")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(limited, "find_places", nowhere)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="as a user whom systemd serves"):
        scope_for(Limits(cpus=1.0), ["true"])
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd/private").touch()
    monkeypatch.setattr(limited.shutil, "which", lambda name: f"/usr/bin/{name}")
    scope = scope_for(Limits(cpus=1.0), ["true"])
    assert scope is not None and scope[:2] == ["systemd-run", "--user"]


def test_a_part_of_a_percent_is_rounded_down_so_that_the_limit_holds() -> None:
    assert "CPUQuota=7%" in scope_command(Limits(0.075), ["true"], as_root=True)
    assert "CPUQuota=1%" in scope_command(Limits(0.012), ["true"], as_root=True)


@pytest.mark.parametrize("why", [SystemExit(0), KeyboardInterrupt()])
@pytest.mark.parametrize(("traps", "status"), [("trap 'exit 3' TERM;", 3), ("trap '' TERM;", 128 + signal.SIGKILL)])
def test_a_command_that_is_not_waited_for_any_longer_is_ended(
    monkeypatch: pytest.MonkeyPatch, why: BaseException, traps: str, status: int
) -> None:
    monkeypatch.setattr(waiting, "_GRACE_S", 0.5)
    monkeypatch.setattr(waiting, "_BY_ITSELF_S", 0.1)

    class Interrupted(subprocess.Popen[str]):
        waits = 0

        def wait(self, timeout: float | None = None) -> int:
            self.waits += 1
            if self.waits == 1:
                assert self.stdout is not None and self.stdout.readline() == "here\n"
                raise why
            return super().wait(timeout)

    command = ["sh", "-c", f"{traps} echo here; while :; do sleep 0.05; done"]
    with Interrupted(command, stdout=subprocess.PIPE, text=True) as process:
        assert wait_for(process) == status
        assert process.poll() is not None


def test_a_limit_that_is_not_in_force_is_an_error() -> None:
    with pytest.raises(EnvironmentProblem, match="not in force"):
        check(Limits(cpus=0.013))
    with pytest.raises(EnvironmentProblem, match="not in force"):
        check(Limits(memory_bytes=17 * MIB))


@pytest.mark.pressure
def test_a_command_is_held_and_its_exit_status_is_told(
    board_places: BoardPlaces, capfd: pytest.CaptureFixture[str]
) -> None:
    if board_places.cpu is None:
        pytest.skip("NO CPU CONTROLLER HERE: limits of processors cannot be tried.")
    assert run_within(Limits(0.5, 64 * MIB), [sys.executable, "-c", LOOK]) == 0
    assert capfd.readouterr().out == "held\n"
    assert run_within(Limits(memory_bytes=64 * MIB), ["/bin/sh", "-c", "exit 7"]) == 7
    assert run_within(Limits(memory_bytes=64 * MIB), ["/bin/sh", "-c", "kill -9 $$"]) == 137
    assert not left_behind(board_places, os.getpid())


@pytest.mark.pressure
@pytest.mark.engine
def test_a_server_within_limits_computes_with_fewer_threads_and_leaves_nothing(
    board_places: BoardPlaces, default_model: Path, tmp_path: Path
) -> None:
    if board_places.cpu is None:
        pytest.skip("NO CPU CONTROLLER HERE: limits of processors cannot be tried.")
    options = ("-t", "0", "-c", "1024", "--cpus", "0.5", "--memory", "1G")
    with serving(default_model, tmp_path, *options) as served:  # which also sees that SIGTERM ends it with 0
        status = served.get("/v1/kvpsi/status")
        assert status["threads"] == 1 and "quota" in status["threads_reason"]
        assert status["memory_limit_bytes"] <= 1 << 30
        assert left_behind(board_places, served.process.pid)
    assert not left_behind(board_places, served.process.pid)


@pytest.mark.pressure
@pytest.mark.engine
def test_after_kill_9_neither_server_nor_cgroup_is_left(
    board_places: BoardPlaces, default_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "kvpsi", "serve", "-m", str(default_model), "--port", "0", "-c", "512"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "-t", "1", "--memory", "1G"], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while "is served at" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left_behind(board_places, process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 30
    while left_behind(board_places, process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left_behind(board_places, process.pid)
