"""LinuxSource when things move, vanish, are switched off or make no sense."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvpsi.pressure
from kvpsi.errors import PressureUnavailableError
from kvpsi.pressure import LinuxSource, ManualClock, PressureSource, PsutilSource, Reading, open_source
from kvpsi.pressure.locate import Cgroups, locate_cgroups

CopyTree = Callable[[str], Path]
MIB = 1 << 20
TREES = Path(__file__).parent / "trees"
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the live Linux kernel")


def test_exports_are_complete() -> None:
    assert sorted(kvpsi.pressure.__all__) == kvpsi.pressure.__all__
    for name in kvpsi.pressure.__all__:
        assert hasattr(kvpsi.pressure, name)


def pressure_text(total_us: int) -> str:
    line = f"avg10=0.00 avg60=0.00 avg300=0.00 total={total_us}"
    return f"some {line}\nfull {line}\n"


def test_stall_and_slope_between_two_ticks(copy_tree: CopyTree) -> None:
    root, clock = copy_tree("docker_cgroupns_v2"), ManualClock(50.0)
    source = LinuxSource(root, clock=clock)
    cgroup = root / "sys/fs/cgroup"
    (cgroup / "memory.pressure").write_text(pressure_text(40000 + 50_000))
    (root / "proc/pressure/io").write_text(pressure_text(700 + 20_000))
    (cgroup / "memory.current").write_text(str(530 * MIB))
    clock.advance(0.1)
    reading = source.read()
    assert reading.interval_s == pytest.approx(0.1)
    assert reading.memory.some.share == pytest.approx(0.5)
    assert reading.memory.scope == "cgroup:/"
    assert reading.io.some.share == pytest.approx(0.2)
    assert reading.io.scope == "system"
    assert reading.headroom.slope_bytes_s == pytest.approx(200 * MIB)


def test_rates_of_swapping_and_refaults(copy_tree: CopyTree) -> None:
    root, clock = copy_tree("jetson_zram"), ManualClock()
    source = LinuxSource(root, clock=clock)
    vmstat = root / "proc/vmstat"
    vmstat.write_text(vmstat.read_text().replace("pswpin 100000", "pswpin 100500"))
    stat = root / "sys/fs/cgroup/system.slice/nvargus.service/memory.stat"
    stat.write_text(stat.read_text().replace("workingset_refault_file 20", "workingset_refault_file 70"))
    clock.advance(0.5)
    assert source.read().refaults_s == 0.0, "while calm, rates are looked at every five seconds"
    clock.advance(4.5)
    reading = source.read()
    assert reading.swap.swap_in_bytes_s == pytest.approx(100 * os.sysconf("SC_PAGE_SIZE"))
    assert reading.swap.swap_out_bytes_s == 0.0
    assert reading.refaults_s == pytest.approx(10.0)


def test_a_limit_that_changes_is_seen_at_once_and_a_new_one_within_a_second(copy_tree: CopyTree) -> None:
    root, clock = copy_tree("docker_cgroupns_v2"), ManualClock()
    source = LinuxSource(root, clock=clock)
    limit = root / "sys/fs/cgroup/memory.max"
    limit.write_text(str(570 * MIB))
    assert source.read().headroom.limit_bytes == 570 * MIB
    limit.write_text("max\n")
    assert [each.scope for each in source.read().headrooms] == ["system"]
    limit.write_text(str(560 * MIB))
    clock.advance(1.0)
    assert source.read().headroom.limit_bytes == 560 * MIB


def test_a_vanished_cgroup_is_dropped_and_looked_up_again(copy_tree: CopyTree) -> None:
    root, clock = copy_tree("ubuntu_laptop_v2"), ManualClock()
    source = LinuxSource(root, clock=clock)
    scope = root / "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice"
    shutil.move(scope, root / "elsewhere")
    clock.advance(0.1)
    reading = source.read()
    assert any("app-terminal" in problem and "cannot be read" in problem for problem in reading.problems)
    assert reading.headroom.scope == "cgroup:/user.slice/user-1000.slice"
    shutil.move(root / "elsewhere", scope)
    clock.advance(0.1)
    reading = source.read()
    assert reading.problems == ()
    assert len(reading.headrooms) == 3


def test_a_moved_process_is_followed(copy_tree: CopyTree) -> None:
    root, clock = copy_tree("hidden_namespace_root_v2"), ManualClock()
    source = LinuxSource(root, pid=4242, clock=clock)
    mountinfo = root / "proc/4242/mountinfo"
    mountinfo.write_text(mountinfo.read_text().replace("/../..", "/"))
    (root / "proc/4242/cgroup").write_text("0::/machine.slice/other.scope\n")
    clock.advance(1.0)
    assert source.read().headroom.scope == "cgroup:/machine.slice/other.scope"


@pytest.mark.parametrize("path", ["/../../elsewhere", "/gone.scope (deleted)"])
def test_a_cgroup_out_of_sight_is_not_guessed(copy_tree: CopyTree, path: str) -> None:
    root = copy_tree("docker_cgroupns_v2")
    (root / "proc/self/cgroup").write_text(f"0::{path}\n")
    source = LinuxSource(root)
    assert [each.scope for each in source.read().headrooms] == ["system"]
    assert any("not visible" in line for line in source.describe())


def test_without_mountinfo_the_usual_places_are_tried(copy_tree: CopyTree) -> None:
    for name, scope in (
        ("hybrid_systemd", "cgroup:/system.slice/kvpsi.service"),
        ("ubuntu_laptop_v2", "cgroup:/user.slice/user-1000.slice"),
    ):
        root = copy_tree(name)
        (root / "proc/self/mountinfo").unlink()
        (root / "sys/fs/cgroup/cgroup.procs").touch()
        source = LinuxSource(root)
        assert source.read().headroom.scope == scope
        assert any("usual cgroup mount points" in line for line in source.describe())


def test_version_1_without_hierarchy_ignores_the_parents(copy_tree: CopyTree) -> None:
    root = copy_tree("hybrid_systemd")
    parent = root / "sys/fs/cgroup/memory/system.slice"
    (parent / "memory.limit_in_bytes").write_text(str(2001 * MIB))
    assert LinuxSource(root).read().headroom.scope == "cgroup:/system.slice"
    (parent / "memory.use_hierarchy").write_text("0\n")
    assert LinuxSource(root).read().headroom.scope == "cgroup:/system.slice/kvpsi.service"


@pytest.mark.parametrize("name", ["raspberry_pi", "debian_4_19_v1", "docker_cgroupns_v2"])
def test_lasting_problems_do_not_cost_a_search_per_tick(
    copy_tree: CopyTree, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root, clock, searches = copy_tree(name), ManualClock(), []

    def count(root: Path, pid: object) -> Cgroups:
        searches.append(root)
        return locate_cgroups(root, pid)  # type: ignore[arg-type]

    monkeypatch.setattr("kvpsi.pressure.source.locate_cgroups", count)
    source = LinuxSource(root, clock=clock)
    (root / "sys/fs/cgroup/memory.stat").unlink(missing_ok=True)
    for _ in range(50):
        clock.advance(0.01)
        source.read()
    assert len(searches) <= 2


def test_psi_switched_off_answers_eopnotsupp(copy_tree: CopyTree, monkeypatch: pytest.MonkeyPatch) -> None:
    root, real_open = copy_tree("docker_cgroupns_v2"), os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if "pressure" in str(path):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    reading = LinuxSource(root, clock=ManualClock()).read()
    assert reading.synthetic
    assert reading.memory.scope == "fallback"
    assert reading.headroom.scope == "cgroup:/"
    assert any("Operation not supported" in problem for problem in reading.problems)


def test_unreadable_files(copy_tree: CopyTree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy_tree("docker_cgroupns_v2")
    source = LinuxSource(root, clock=ManualClock())
    before = source.read()

    def refuse(*_: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "pread", refuse)
    reading = source.read()
    assert reading.headroom.available_bytes == before.headroom.available_bytes
    assert any("last known" in problem for problem in reading.problems)
    monkeypatch.undo()
    assert source.read().problems == ()


def test_a_tight_cgroup_that_fails_keeps_its_last_headroom(copy_tree: CopyTree) -> None:
    root = copy_tree("docker_cgroupns_v2")
    source = LinuxSource(root, clock=ManualClock())
    before = source.read().headroom
    (root / "sys/fs/cgroup/memory.current").write_text("nonsense\n")
    reading = source.read()
    assert (reading.headroom.scope, reading.headroom.available_bytes) == ("cgroup:/", before.available_bytes)
    assert "The last known headroom of cgroup:/ is repeated." in reading.problems


def test_a_cgroup_without_statistics_counts_no_cache(copy_tree: CopyTree) -> None:
    root = copy_tree("docker_cgroupns_v2")
    (root / "sys/fs/cgroup/memory.stat").write_text("rss 5\n")
    source = LinuxSource(root, clock=ManualClock(), working_set_file_bytes=10 * MIB)
    assert source.read().headroom.available_bytes == (600 - 550 - 10) * MIB
    (root / "sys/fs/cgroup/memory.current").write_text(str(580 * MIB))
    assert source.read().headroom.available_bytes == (600 - 580 - 10) * MIB


def test_a_limit_that_cannot_be_seen_is_the_first_problem(copy_tree: CopyTree) -> None:
    root = copy_tree("docker_cgroupns_v2")
    (root / "sys/fs/cgroup/memory.max").write_text("nonsense\n")
    reading = LinuxSource(root, clock=ManualClock()).read()
    assert reading.headroom.scope == "system"
    assert reading.problems[0].startswith("The headroom may be far too large")


def test_while_calm_only_what_decides_is_read(copy_tree: CopyTree, monkeypatch: pytest.MonkeyPatch) -> None:
    root, clock, real_open, opened = copy_tree("docker_cgroupns_v2"), ManualClock(), os.open, []

    def record(path: str, flags: int, *more: int) -> int:
        opened.append(Path(path).relative_to(root).as_posix())
        return real_open(path, flags, *more)

    source = LinuxSource(root, clock=clock)
    monkeypatch.setattr(os, "open", record)
    clock.advance(0.25)
    source.read()
    assert not any(name.endswith(("cpu.pressure", "io.pressure", "vmstat", "proc/self/cgroup")) for name in opened)
    assert {"sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat", "sys/fs/cgroup/memory.max"} <= set(opened)
    opened.clear()
    clock.advance(5.0)
    source.read()
    assert {"sys/fs/cgroup/io.pressure", "proc/self/cgroup", "proc/meminfo"} <= set(opened)


def test_it_can_be_imported_where_there_is_no_fcntl() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import kvpsi.pressure"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PressureUnavailableError):
        LinuxSource(tmp_path)
    source = open_source(tmp_path)
    assert isinstance(source, PsutilSource)
    assert source.read().synthetic

    def fail() -> None:
        raise RuntimeError("no such counter")

    monkeypatch.setattr("psutil.virtual_memory", fail)
    with pytest.raises(PressureUnavailableError, match="no such counter"):
        open_source(tmp_path)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@needs_linux
def test_live() -> None:
    source = open_source()
    assert isinstance(source, LinuxSource)
    assert isinstance(source, PressureSource)
    first = source.read()
    second = source.read()
    assert second.time_s > first.time_s
    assert 0 < second.headroom.available_bytes <= second.headroom.limit_bytes
    assert "system" in {each.scope for each in second.headrooms}
    assert all(line.endswith(".") for line in source.describe())
    before = open_descriptors()
    for _ in range(50):
        source.read()
    assert open_descriptors() == before, "reading leaks no descriptors"
    source.close()
    source.close()
    assert open_descriptors() < before
    assert source.read().headroom.limit_bytes > 0, "reading after close opens afresh"
    source.close()


NAMES = sorted(each.name for each in TREES.iterdir() if each.is_dir())


def damage(path: Path, how: str, rng: random.Random) -> None:
    if not path.is_file():
        return
    data = bytearray(path.read_bytes())
    if how == "truncate":
        del data[rng.randrange(len(data) + 1) :]
    elif how == "mutate":
        for _ in range(rng.randint(1, 8)):
            if data:
                data[rng.randrange(len(data))] = rng.choice(b"0123456789 -/:.\nxm\xff\x00")
    elif how == "insert":
        at = rng.randrange(len(data) + 1)
        data[at:at] = rng.choice([b"9" * 400, b"\n\n", b"max", b"-1", b"/..", b"\xc2\xb2", b" "])
    path.unlink()
    if how == "directory":
        path.mkdir()
    elif how != "delete":
        path.write_bytes(bytes(data))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    rounds=st.lists(
        st.lists(st.sampled_from(["truncate", "mutate", "insert", "delete", "directory"]), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    ),
    early=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_damage_makes_it_crash(
    tmp_path_factory: pytest.TempPathFactory, name: str, rounds: list[list[str]], early: bool, seed: int
) -> None:
    root = tmp_path_factory.mktemp("fuzz") / name
    shutil.copytree(TREES / name, root)
    rng, clock = random.Random(seed), ManualClock()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    hot = [path for path in files if "proc" in path.parts or "memory." in path.name]
    pid = 4242 if (root / "proc/4242").exists() else "self"
    source = None if early else open_source(root, pid=pid, clock=clock)
    for hows in rounds:
        for how in hows:
            damage(rng.choice(hot if rng.random() < 0.8 else files), how, rng)
        source = source or open_source(root, pid=pid, clock=clock)
        clock.advance(rng.choice([0.0, 0.01, 0.3, 40.0]))
        check_sane(source.read())
        source.describe()
    assert source is not None
    source.close()
    shutil.rmtree(root.parent)


def check_sane(reading: Reading) -> None:
    for stall in (reading.memory, reading.cpu, reading.io):
        assert 0.0 <= stall.some.share <= 1.0
        assert 0.0 <= stall.some.avg10 <= 1.0
    assert reading.swap.used_bytes >= 0
    assert isinstance(reading.headroom.available_bytes, int)
    assert reading.headroom.slope_bytes_s == reading.headroom.slope_bytes_s
    assert all(problem.endswith(".") for problem in reading.problems)
    if not reading.headrooms or reading.synthetic:
        assert reading.problems
