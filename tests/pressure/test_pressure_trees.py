"""Every recorded system, with the values worked out by hand (see trees/README.md). All sizes in MiB."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from kvpsi.pressure import LinuxSource, ManualClock

MIB = 1 << 20
TREES = Path(__file__).parent / "trees"


@dataclass(frozen=True)
class Expected:
    tree: str
    available: dict[str, float]
    memory_scope: str = "system"
    swap: tuple[str, float, float] = ("system", 0, 0)
    with_working_set: tuple[int, dict[str, float]] | None = None
    synthetic_share: float | None = None
    has_refaults: bool = True
    pid: int | Literal["self"] = "self"
    notes: list[str] = field(default_factory=list)


LAPTOP = "cgroup:/user.slice/user-1000.slice/user@1000.service/app.slice/app-terminal-4711.scope"
POD = "cgroup:/kubepods/burstable/pod11111111-2222/c0ffee"

EXPECTED = [
    Expected(
        "ubuntu_laptop_v2",
        {
            LAPTOP: 6000 - 1500 + (300 + 200 + 30 - 100 - 10),
            "cgroup:/user.slice/user-1000.slice": 8000 - 5000 + (1600 + 100 - (500 - 200) - 25),
            "system": 9000 - (900 - 400),
        },
        memory_scope=LAPTOP,
        swap=(LAPTOP, 200, 150),
        with_working_set=(
            700,
            {
                LAPTOP: 6000 - 1500 + (530 - 700 - 10),
                "cgroup:/user.slice/user-1000.slice": 8000 - 5000 + (1700 - 700 - 25),
                "system": 9000 - 700,
            },
        ),
    ),
    Expected(
        "docker_cgroupns_v2",
        {"cgroup:/": 600 - 550 + (300 + 4 - 120 - 4), "system": 6000 - 250},
        memory_scope="cgroup:/",
        swap=("cgroup:/", 0, 0),
        with_working_set=(400, {"cgroup:/": 600 - 550 + (304 - 400 - 4), "system": 6000 - 400}),
    ),
    Expected(
        "hybrid_systemd",
        {"cgroup:/system.slice/kvpsi.service": 1000 - 700 + (200 - 60 - 5), "system": 2500 - 200},
        memory_scope="cgroup:/system.slice/kvpsi.service",
        swap=("cgroup:/system.slice/kvpsi.service", 200, 60),
    ),
    Expected(
        "debian_4_19_v1",
        {"system": 220 - 70},
        memory_scope="fallback",
        synthetic_share=((200 - 150) / 200) ** 2,
    ),
    Expected(
        "raspberry_pi",
        {"system": 2800 - 300},
        memory_scope="fallback",
        swap=("system", 200, 0),
        synthetic_share=0.0,
        notes=["No memory controller is visible"],
    ),
    Expected("jetson_zram", {"system": 500 - 100}, swap=("system", 3800, 3000)),
    Expected("kubernetes_pod_v1", {POD: 2000 - 1800 + (140 - 20 - 5), "system": 50000 - 1000}),
    Expected(
        "hidden_namespace_root_v2",
        {"cgroup:/machine.slice/box.scope": 1000 - 400 + 50, "system": 6000 - 250},
        memory_scope="cgroup:/machine.slice/box.scope",
        pid=4242,
    ),
    Expected(
        "before_memavailable",
        {"system": 300 + 200 + 20 + 30 - 10 - 30},
        memory_scope="fallback",
        synthetic_share=0.0,
        has_refaults=False,
        notes=["The cgroups of this process are unknown"],
    ),
    # locked: the page cache (363012 + 2028 - 12776) less what is on the lists of files (206340 + 145708)
    Expected("microvm_hybrid", {"system": (24304652 - (18236 - 12776 - 216)) / 1024}),
]


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda expected: expected.tree)
def test_tree(expected: Expected) -> None:
    source = LinuxSource(TREES / expected.tree, pid=expected.pid, clock=ManualClock(100.0))
    reading = source.read()
    available = {headroom.scope: headroom.available_bytes / MIB for headroom in reading.headrooms}
    assert available == expected.available
    assert reading.headroom.available_bytes == min(each.available_bytes for each in reading.headrooms)
    for headroom in reading.headrooms:
        sum_bytes = headroom.limit_bytes - headroom.usage_bytes + headroom.reclaimable_bytes
        assert headroom.available_bytes == sum_bytes
    swap = reading.swap
    assert (swap.scope, swap.total_bytes / MIB, swap.used_bytes / MIB) == expected.swap
    assert reading.memory.scope in (expected.memory_scope, "system")
    assert reading.synthetic == (expected.synthetic_share is not None)
    assert (reading.refaults_s is not None) == expected.has_refaults
    if expected.synthetic_share is None:
        assert reading.problems == ()
    else:
        assert reading.memory.some.share == pytest.approx(expected.synthetic_share)
        assert any("estimated" in problem for problem in reading.problems)
    for note in expected.notes:
        assert any(note in line for line in source.describe())
    source.close()


@pytest.mark.parametrize(
    "expected", [each for each in EXPECTED if each.with_working_set], ids=lambda expected: expected.tree
)
def test_weights_do_not_count_as_reclaimable(expected: Expected) -> None:
    assert expected.with_working_set is not None
    mib, available = expected.with_working_set
    source = LinuxSource(TREES / expected.tree, clock=ManualClock())
    source.working_set_file_bytes = mib * MIB
    reading = source.read()
    assert {each.scope: each.available_bytes / MIB for each in reading.headrooms} == available
    assert reading.headroom.slope_bytes_s == 0.0, "declaring the weights is no trend"


def test_own_stall_is_reported_for_the_scope_that_has_it() -> None:
    for expected in EXPECTED:
        source = LinuxSource(TREES / expected.tree, pid=expected.pid, clock=ManualClock())
        scopes = [stall.scope for stall in source._stalls("memory", 1.0)]
        wanted = [] if expected.memory_scope == "fallback" else ["system"]
        if expected.memory_scope.startswith("cgroup:"):
            wanted = [expected.memory_scope, "system"]
        assert scopes == wanted, expected.tree


def test_jetson_has_no_full_line_for_cpu() -> None:
    reading = LinuxSource(TREES / "jetson_zram").read()
    assert reading.cpu.full is None
    assert reading.memory.full is not None
    assert reading.memory.some.avg10 == pytest.approx(0.125)
