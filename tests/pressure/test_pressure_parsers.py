from __future__ import annotations

import contextlib
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.pressure._text import MalformedTextError, parse_count, parse_flat_keyed
from kvpsi.pressure.cgmemory import MemoryStat, parse_limit, parse_memory_stat, reclaimable_bytes
from kvpsi.pressure.cgroup import (
    hidden_levels,
    parse_mountinfo,
    parse_proc_cgroup,
    parts_below,
)
from kvpsi.pressure.psi import StallMeter, parse_pressure, worst_stall
from kvpsi.pressure.system import parse_meminfo, parse_vmstat, system_available_bytes

PRESSURE = "some avg10=1.50 avg60=0.20 avg300=0.00 total=123\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=45\n"


def some(total_us: int) -> str:
    return f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total_us}\n"


def test_pressure_file() -> None:
    parsed = parse_pressure(PRESSURE)
    assert parsed.some.avg10 == pytest.approx(0.015)
    assert parsed.some.total_us == 123
    assert parsed.full is not None
    assert parsed.full.total_us == 45
    assert parse_pressure(some(7)).full is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0",
        "some avg10=0.00 total=1",
        "some avg10=nan avg60=0 avg300=0 total=0",
        "some avg10=5000.00 avg60=0.00 avg300=0.00 total=0",
        "some",
        some(-1),
        some(10**19 * 9),
        some(10**30),
    ],
)
def test_malformed_pressure(text: str) -> None:
    with pytest.raises(MalformedTextError):
        parse_pressure(text)


def test_share_is_the_difference_over_the_tick() -> None:
    meter = StallMeter("system")
    assert meter.measure(parse_pressure(some(1_000_000)), 10.0).some.share == 0.0
    assert meter.measure(parse_pressure(some(1_050_000)), 10.1).some.share == pytest.approx(0.5)
    assert meter.measure(parse_pressure(some(9_000_000)), 10.2).some.share == 1.0
    assert meter.measure(parse_pressure(some(5)), 10.3).some.share == 0.0, "the counter went backwards"
    assert meter.measure(parse_pressure(some(10_005)), 10.4).some.share == pytest.approx(0.1)
    assert meter.measure(parse_pressure(some(20_005)), 10.4).some.share == 0.0, "no time went by"


def test_a_full_line_that_appears_has_no_baseline() -> None:
    meter = StallMeter("system")
    meter.measure(parse_pressure(some(0)), 0.0)
    stall = meter.measure(parse_pressure(PRESSURE), 1.0)
    assert stall.full is not None
    assert stall.full.share == 0.0


def test_worst_stall_prefers_the_share_then_the_average() -> None:
    own, system = StallMeter("cgroup:/x"), StallMeter("system")
    stalls = [own.measure(parse_pressure(some(0)), 0.0), system.measure(parse_pressure(PRESSURE), 0.0)]
    assert worst_stall(stalls) is stalls[1]
    stalls = [own.measure(parse_pressure(some(1000)), 1.0), system.measure(parse_pressure(PRESSURE), 1.0)]
    assert worst_stall(stalls) is stalls[0]
    assert worst_stall([]) is None


@pytest.mark.parametrize("text", ["", "-1", "1_0", "²", "1" * 21, "max", str(1 << 64)])
def test_counts_are_strict(text: str) -> None:
    with pytest.raises(MalformedTextError):
        parse_count(text, "it")


def test_flat_keyed() -> None:
    assert parse_flat_keyed("a 1\nb 2\nc x\n", {"a", "b", "z"}) == {"a": 1, "b": 2}
    with pytest.raises(MalformedTextError):
        parse_flat_keyed("c x\n", {"c"})


def test_limits() -> None:
    assert parse_limit("max\n") is None
    assert parse_limit("9223372036854771712\n") is None
    assert parse_limit("0\n") == 0
    with pytest.raises(MalformedTextError):
        parse_limit("")


def test_proc_cgroup() -> None:
    v1, v2, named = parse_proc_cgroup("4:memory,hugetlb:/a:b\n0::/c\n1:name=systemd:/\n")
    assert (v1.version, v1.controllers, v1.path) == (1, ("memory", "hugetlb"), "/a:b")
    assert (v2.version, v2.path) == (2, "/c")
    assert named.version == 1
    for text in ("nonsense", "x::/a", "0:/a", "0::a"):
        with pytest.raises(MalformedTextError):
            parse_proc_cgroup(text)


def test_mountinfo() -> None:
    text = (
        "28 1 259:2 / / rw,relatime shared:1 - ext4 /dev/sda rw\n"
        "30 23 0:26 /a\\040b /sys/fs/c\\134g rw shared:9 master:2 - cgroup2 cgroup2 rw\n"
        "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    )
    v2, v1 = parse_mountinfo(text)
    assert (v2.root, v2.mount_point, v2.version) == ("/a b", "/sys/fs/c\\g", 2)
    assert "memory" in v1.controllers
    with pytest.raises(MalformedTextError):
        parse_mountinfo("30 23 - cgroup2 cgroup2 rw")


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("/", "/", ()),
        ("/a/b", "/", ("a", "b")),
        ("/docker/x", "/docker/x", ()),
        ("/docker/x/y", "/docker/x", ("y",)),
        ("/docker/xy", "/docker/x", None),
        ("/../../a", "/../..", ("a",)),
        ("/../a", "/", None),
        ("/", "/..", None),
    ],
)
def test_parts_below(path: str, root: str, below: tuple[str, ...] | None) -> None:
    assert parts_below(path, root) == below


def test_hidden_levels() -> None:
    assert [hidden_levels(root) for root in ("/", "/a", "/..", "/../..", "/../a")] == [0, 0, 1, 2, 0]


def test_meminfo() -> None:
    memory = parse_meminfo("MemTotal:  1000 kB\nMemFree: 10 kB\nHugePages_Total: 0\n")
    assert memory.total_bytes == 1_024_000
    assert memory.available_bytes is None
    for text in ("MemTotal: 1 kB", "MemTotal: 5\nMemFree: 1 kB", "MemTotal: 0 kB\nMemFree: 0 kB"):
        with pytest.raises(MalformedTextError):
            parse_meminfo(text)


def test_vmstat() -> None:
    assert parse_vmstat("pswpin 1\npswpout 2\nworkingset_refault 3").refaults == 3
    assert parse_vmstat("workingset_refault_file 3\nworkingset_refault_anon 4").refaults == 7
    assert parse_vmstat("").refaults is None


def test_memory_stat_of_both_versions() -> None:
    v2 = parse_memory_stat("inactive_file 5\nactive_file 6\nfile_mapped 4\nslab_reclaimable 1", 2)
    assert (v2.file_bytes, v2.mapped_bytes, v2.slab_reclaimable_bytes, v2.refaults) == (11, 4, 1, None)
    v1 = parse_memory_stat(
        "inactive_file 1\ntotal_inactive_file 5\ntotal_active_file 6\ntotal_mapped_file 4\n"
        "hierarchical_memory_limit 77",
        1,
    )
    assert (v1.file_bytes, v1.mapped_bytes, v1.hierarchical_limit_bytes) == (11, 4, 77)
    with pytest.raises(MalformedTextError):
        parse_memory_stat("inactive_file 5", 2)


@pytest.mark.parametrize("version", [1, 2])
def test_locked_weights_are_not_taken_off_the_other_files(version: Literal[1, 2]) -> None:
    total, cache, mapped = (
        ("total_", "total_cache", "total_mapped_file") if version == 1 else ("", "file", "file_mapped")
    )

    def stat(listed: int, unevictable: int) -> MemoryStat:
        text = f"{cache} 150\n{total}shmem 20\n{total}inactive_file {listed}\n{total}active_file 0\n{mapped} 110\n"
        return parse_memory_stat(text + f"{total}unevictable {unevictable}\n", version)

    assert reclaimable_bytes(stat(130, 0), 90) == 40, "weights of 90 that may go"
    assert reclaimable_bytes(stat(40, 90), 90) == 40, "the same, locked"
    assert stat(130, 90).locked_file_bytes == 0, "what is locked is no file"


def test_locked_weights_are_not_taken_off_what_the_system_has() -> None:
    usual = "Buffers: 10 kB\nCached: 140 kB\nSwapCached: 0 kB\n"
    usual += "Active(file): {} kB\nInactive(file): 0 kB\nUnevictable: {} kB\n"
    for first, rest in (("MemAvailable: {} kB\n", ""), ("", "MemAvailable: {} kB\n")):  # read both ways

        def available_kb(available: int, active: int, unevictable: int, first: str = first, rest: str = rest) -> int:
            text = "MemTotal:  1000 kB\nMemFree: 10 kB\n" + first.format(available) + usual.format(active, unevictable)
            text += "SwapTotal: 0 kB\nSwapFree: 0 kB\nDirty: 0 kB\nMapped: 100 kB\nShmem: 10 kB\n" + rest.format(
                available
            )
            return system_available_bytes(parse_meminfo(text), 80 << 10) >> 10

        assert available_kb(150, 140, 0) == 60
        assert available_kb(60, 50, 90) == 60
        assert available_kb(150, 140, 50) == 60, "what is locked is no file"


sizes = st.integers(0, 1 << 45)


@given(file=sizes, locked=sizes, slab=sizes, mapped=sizes, shmem=sizes, dirty=sizes, writeback=sizes, needed=sizes)
def test_reclaimable_is_bounded_and_never_grows_with_the_working_set(
    file: int, locked: int, slab: int, mapped: int, shmem: int, dirty: int, writeback: int, needed: int
) -> None:
    working_set = needed
    stat = MemoryStat(file, locked, slab, mapped, shmem, dirty, writeback, None, None)
    without, declared = reclaimable_bytes(stat, 0), reclaimable_bytes(stat, working_set)
    assert 0 <= without <= file + slab
    assert -working_set <= declared <= without


@given(text=st.text() | st.text("0123456789 =.:,/-_abcdefghijklmnop\n"))
def test_parsers_raise_only_their_own_error(text: str) -> None:
    for parse in (parse_pressure, parse_meminfo, parse_vmstat, parse_limit, parse_proc_cgroup, parse_mountinfo):
        with contextlib.suppress(MalformedTextError):
            parse(text)
