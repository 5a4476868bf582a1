"""Real neighbours, small ones: what they say of themselves is what the kernel sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from kvpsi.hog import Hog, HogSettings, worker_command
from kvpsi.hog.memory import Hoard
from support.interrupts import popen_heeding_ctrl_c

MIB = 1 << 20


@pytest.mark.parametrize("kind", ["anon", "file", "both"])
def test_what_it_takes_is_resident_and_goes_back(kind: str) -> None:
    hoard = Hoard(2 * MIB, kind)
    before = psutil.Process().memory_info().rss
    while hoard.step_towards(33 * MIB):
        pass
    hoard.touch()
    grown = psutil.Process().memory_info().rss - before
    assert hoard.size_bytes == 32 * MIB and abs(grown - 32 * MIB) < 6 * MIB
    assert hoard.slowest_touch_s > 0
    while hoard.step_towards(0):
        pass
    assert hoard.size_bytes == 0 and psutil.Process().memory_info().rss - before < 6 * MIB


def test_it_reports_and_tells_while_it_runs() -> None:
    told: list[int] = []
    report = Hog(HogSettings(20 * MIB, rate_bytes_s=20 * MIB, hold_s=0.7)).wait(lambda _, size: told.append(size))
    assert report.completed and report.killed_by is None
    assert report.peak_bytes == 20 * MIB and 1.6 < report.seconds < 10
    assert told and max(told) <= 20 * MIB


def test_sigterm_ends_it_early_with_a_report() -> None:
    hog = Hog(HogSettings(4 * MIB, hold_s=60))
    threading.Timer(1.0, hog.end).start()
    report = hog.wait()
    assert not report.completed and report.killed_by is None and report.seconds < 30


def test_one_that_is_ended_before_it_began_was_not_killed() -> None:
    hog = Hog(HogSettings(4 * MIB, hold_s=60))
    hog.end()
    report = hog.wait()
    assert not report.completed and report.killed_by is None and report.peak_bytes == 0


def test_it_ends_quietly_when_nobody_listens_any_more() -> None:
    command = worker_command(HogSettings(4 * MIB, hold_s=60))
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.stdout is not None and worker.stdout.readline()
    worker.stdout.close()
    _, stderr = worker.communicate(timeout=30)
    assert not stderr


def test_one_that_was_killed_is_told_with_how_far_it_got() -> None:
    started: list[subprocess.Popen[str]] = []

    def start(command: object) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))  # type: ignore[call-overload]
        return started[0]

    hog = Hog(HogSettings(4 * MIB, hold_s=60), start)
    report = hog.wait(lambda *_: started[0].send_signal(signal.SIGKILL))
    assert report.killed_by == "SIGKILL" and report.peak_bytes == 4 * MIB
    assert report.stall_s is None and not report.completed


def test_the_command_prints_one_document() -> None:
    command = [sys.executable, "-m", "kvpsi", "hog", "--pressure-mib", "4", "--hold-s", "0.2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completed"] is True


def test_ctrl_c_ends_the_command_with_a_report() -> None:
    command = [sys.executable, "-m", "kvpsi", "hog", "--pressure-mib", "4", "--hold-s", "60", "--json"]
    process = popen_heeding_ctrl_c(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not psutil.Process(process.pid).children() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and not stderr
    report = json.loads(stdout)
    assert report["completed"] is False and report["peak_bytes"] == 4 * MIB


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pressure-mib", "0"], "above 0"),
        (["--rate-mib-s", "nan"], "--rate-mib-s"),
        (["--hold-s", "inf"], "--hold-s"),
        (["--pressure-mib", "1"], "--pressure-step-mib"),
        (["--pressure-mib", "100000000"], "--force"),
        (["--shape", "circle"], "sawtooth"),
        (["--trace", "nowhere.csv"], "cannot be read"),
    ],
)
def test_clumsy_options_are_told_in_a_sentence(options: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "kvpsi", "hog", *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
