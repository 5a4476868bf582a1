"""What can be known of the processors, on recorded trees and on this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from kvpsi.pressure._text import MalformedTextError
from kvpsi.pressure.cpu import CpuSource, allowed_cpus, parse_busy_ticks, parse_cfs_quota, parse_cpu_max

STAT = """cpu  100 10 50 1000 5 1 2 30 7 0
cpu0 60 10 30 500 3 1 1 20 7 0
cpu1 40 0 20 500 2 0 1 10 0 0
intr 12345 0 1
ctxt 999
"""
PRESSURE = "some avg10={avg:.2f} avg60=0.00 avg300=0.00 total={total}\n"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class Machine:
    """A tree of files and a clock."""

    def __init__(self, root: Path, membership: str) -> None:
        self.root, self.now_s, self.own_s, self.cpus = root, 100.0, 0.0, frozenset({0, 1})
        write(root / "proc/self/cgroup", membership)
        self.stat(0, 0)

    def stat(self, cpu0: int, cpu1: int) -> None:
        write(self.root / "proc/stat", f"cpu {cpu0 + cpu1} 0 0 0\ncpu0 {cpu0} 0 0 9\ncpu1 {cpu1} 0 0 9\nintr 1\n")

    def open(self) -> CpuSource:
        return CpuSource(self.root, clock=lambda: self.now_s, own_s=lambda: self.own_s, affinity=lambda: self.cpus)


def test_ticks_of_the_processors_that_may_be_used() -> None:
    assert parse_busy_ticks(STAT, {0}) == 60 + 10 + 30 + 1 + 1
    assert parse_busy_ticks(STAT, {0, 1}) == 102 + 61
    for text in ("", "cpu 1 2 3 4\n", "cpu0 a b c\n", "cpux 1 2 3\n"):
        with pytest.raises(MalformedTextError):
            parse_busy_ticks(text, {0})


def test_quotas() -> None:
    assert parse_cpu_max("50000 100000\n") == 0.5
    assert parse_cpu_max("max 100000\n") is None
    assert parse_cfs_quota("-1\n", "100000\n") is None
    assert parse_cfs_quota("150000\n", "100000\n") == 1.5
    for text in ("", "x y", "-5 100"):
        with pytest.raises(MalformedTextError):
            parse_cpu_max(text)


def test_what_others_use_is_what_this_process_does_not(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n")
    source = machine.open()
    first = source.read()
    assert (first.interval_s, first.others_cpus, first.allowed_cpus) == (0.0, None, 2)
    machine.now_s += 2
    machine.own_s += 1.0
    machine.stat(200, 100)  # three seconds at a hundred ticks a second
    reading = source.read()
    assert reading.own_cpus == pytest.approx(0.5)
    assert reading.others_cpus == pytest.approx(1.0)
    machine.now_s += 1
    machine.stat(200, 100)
    assert source.read().others_cpus == 0.0
    machine.cpus = frozenset({1})  # the ticks before were of other processors
    machine.now_s += 1
    assert source.read().others_cpus is None


def test_quota_throttling_and_stall_of_version_2(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/a/b\n")
    own = tmp_path / "sys/fs/cgroup/a/b"
    write(tmp_path / "sys/fs/cgroup/cgroup.procs", "")
    write(tmp_path / "sys/fs/cgroup/a/cpu.max", "150000 100000\n")
    write(tmp_path / "sys/fs/cgroup/a/cpu.stat", "usage_usec 1\nnr_periods 10\nnr_throttled 5\nthrottled_usec 9\n")
    for name, text in {"cpu.max": "max 100000\n", "cgroup.type": "domain\n", "memory.pressure": ""}.items():
        write(own / name, text)
    write(own / "cpu.pressure", PRESSURE.format(avg=96, total=0))
    source = machine.open()
    first = source.read()
    assert (first.quota_cpus, first.throttled_share) == (1.5, 0.0)
    machine.now_s += 1
    write(tmp_path / "sys/fs/cgroup/a/cpu.stat", "usage_usec 1\nnr_periods 20\nnr_throttled 9\nthrottled_usec 9\n")
    write(own / "cpu.pressure", PRESSURE.format(avg=96, total=250_000))
    reading = source.read()
    assert reading.throttled_share == pytest.approx(0.4)
    assert reading.stall is not None
    assert (reading.stall.scope, reading.stall.some.avg10) == ("cgroup:/a/b", 0.96)
    assert reading.stall.some.share == pytest.approx(0.25)
    write(tmp_path / "sys/fs/cgroup/a/cpu.max", "max 100000\n")
    machine.now_s += 1
    assert source.read().quota_cpus is None
    source.close()


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "4:cpu:/a\n0::/\n")
    folder = tmp_path / "sys/fs/cgroup/cpu/a"
    write(folder / "cpu.cfs_quota_us", "50000\n")
    write(folder / "cpu.cfs_period_us", "100000\n")
    write(folder / "cpu.stat", "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n")
    write(tmp_path / "proc/pressure/cpu", PRESSURE.format(avg=1, total=5))
    source = machine.open()
    assert source.read().quota_cpus == 0.5
    machine.now_s += 1
    write(folder / "cpu.stat", "nr_periods 10\nnr_throttled 10\nthrottled_time 5\n")
    reading = source.read()
    assert reading.throttled_share == 1.0
    assert reading.stall is not None
    assert reading.stall.scope == "system"


def test_a_process_that_is_moved_is_followed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/a\n")
    write(tmp_path / "sys/fs/cgroup/cgroup.procs", "")
    write(tmp_path / "sys/fs/cgroup/a/cpu.max", "max 100000\n")
    write(tmp_path / "sys/fs/cgroup/b/cpu.max", "100000 100000\n")
    source = machine.open()
    assert source.read().quota_cpus is None
    write(tmp_path / "proc/self/cgroup", "0::/b\n")
    machine.now_s += 1
    assert source.read().quota_cpus == 1.0


def test_nothing_at_all_is_no_reason_to_fail(tmp_path: Path) -> None:
    source = CpuSource(tmp_path, clock=lambda: 0.0)
    reading = source.read()
    assert (reading.quota_cpus, reading.others_cpus, reading.stall) == (None, None, None)
    assert reading.allowed_cpus == len(allowed_cpus())
    source.close()
    source.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/stat")
def test_on_this_machine_what_this_process_burns_is_its_own() -> None:
    source = CpuSource()
    source.read()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass
    reading = source.read()
    source.close()
    assert reading.own_cpus > 0.3
    assert reading.others_cpus is not None
