"""kvcached's limit through its own command: a stand-in for ``kvctl`` that keeps what it is told in a file.

It answers as kvcached 0.1.5 does: ``list --json`` prints a list, ``limit`` prints a line, and of a cache that is not
there both complain without failing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpsi.engines.kvcached import KvcachedCache, KvcachedSizes, Kvctl
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.governor import Governor, LawSettings
from kvpsi.pressure.fake import ManualClock
from kvpsi.pressure.vram import VramSource

MIB, GIB = 1 << 20, 1 << 30

KVCTL = """
import json, sys
from pathlib import Path

file = Path(__file__).with_name("caches.json")
caches = json.loads(file.read_text())
command, *rest = sys.argv[1:]
if command == "list":
    names = [each for each in rest if each != "--json"]
    print(json.dumps([{"ipc": n, **caches[n]} for n in names if n in caches]))
elif rest[0] not in caches:
    print(f"Error: IPC '{rest[0]}' not found.", file=sys.stderr)
else:
    cache = caches[rest[0]]
    cache["limit_bytes"] = int(rest[1])
    cache["used_bytes"] = min(cache["used_bytes"], cache["limit_bytes"])
    file.write_text(json.dumps(caches))
    print("Updated kv cache limit")
"""


class Caches:
    """What the stand-in knows."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "caches.json"
        self.script = folder / "kvctl.py"
        self.script.write_text(KVCTL)
        self.write(limit_bytes=8 * GIB, used_bytes=6 * GIB)

    def write(self, **sizes: int) -> None:
        self.file.write_text(json.dumps({"VLLM": sizes}))

    def read(self) -> dict[str, int]:
        return dict(json.loads(self.file.read_text())["VLLM"])

    def control(self, name: str = "VLLM") -> Kvctl:
        return Kvctl(name, (sys.executable, str(self.script)))


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return Caches(tmp_path)


def test_sizes_are_read_and_the_limit_is_set(caches: Caches) -> None:
    control = caches.control()
    assert control.sizes() == KvcachedSizes(8 * GIB, 6 * GIB)
    control.set_limit(5 * GIB)
    assert control.sizes() == KvcachedSizes(5 * GIB, 5 * GIB)


def test_what_is_not_there_is_one_sentence(caches: Caches, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no cache 'SGLANG'"):
        caches.control("SGLANG").sizes()
    with pytest.raises(EnvironmentProblem, match="pip install kvcached"):
        Kvctl("VLLM", (str(tmp_path / "nowhere"),)).sizes()
    caches.script.write_text("raise SystemExit(3)")
    with pytest.raises(EnvironmentProblem, match="kvctl list failed"):
        caches.control().sizes()
    caches.script.write_text("print('[{}]')")
    with pytest.raises(EnvironmentProblem, match="something unknown"):
        caches.control().sizes()
    caches.script.write_text(KVCTL)
    with pytest.raises(UsageError, match="--floor"):
        KvcachedCache(caches.control(), floor_bytes=9 * GIB)


def test_small_changes_are_not_worth_a_call(caches: Caches) -> None:
    cache = KvcachedCache(caches.control(), floor_bytes=GIB)
    cache.set_limit(8 * GIB - 10 * MIB, None)
    assert caches.read()["limit_bytes"] == 8 * GIB
    cache.set_limit(7 * GIB, None)
    assert caches.read()["limit_bytes"] == 7 * GIB
    cache.set_limit(0, None)
    assert caches.read() == {"limit_bytes": GIB, "used_bytes": GIB}, "never below the floor"


class Gpu:
    """As much of NVIDIA's library as is asked for."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.total, self.free, self.fails = 16 * GIB, 2 * GIB, False

    def nvmlInit(self) -> None: ...  # noqa: N802 - NVIDIA's names
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index:
            raise RuntimeError("Invalid Argument")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: ARG002, N802
        if self.fails:
            raise RuntimeError("GPU is lost")
        return self


def test_a_gpu_tells_its_headroom_and_no_stall() -> None:
    gpu, clock = Gpu(), ManualClock()
    source = VramSource(0, gpu, clock)
    first = source.read()
    assert (first.headroom.available_bytes, first.headroom.limit_bytes) == (2 * GIB, 16 * GIB)
    assert first.memory.some.share == 0 and first.headroom.scope == "gpu:0"
    clock.advance(1.0)
    gpu.free = GIB
    assert source.read().headroom.slope_bytes_s == pytest.approx(-GIB)
    gpu.fails = True
    clock.advance(1.0)
    silent = source.read()
    assert "GPU is lost" in silent.problems[0]
    assert silent.headroom.available_bytes == GIB and silent.headroom.slope_bytes_s == 0, "what it said last"
    source.close()
    with pytest.raises(EnvironmentProblem, match="GPU 3 cannot be asked"):
        VramSource(3, gpu, clock)


def test_who_needs_the_gpu_gets_it_and_the_cache_grows_back(caches: Caches) -> None:
    gpu, clock = Gpu(), ManualClock()
    cache = KvcachedCache(caches.control(), floor_bytes=GIB, clock=clock)
    governor = Governor(cache, VramSource(0, gpu, clock))
    governor.monitor.tick()
    assert caches.read()["limit_bytes"] <= 8 * GIB
    for _ in range(10):  # somebody takes all that is free
        gpu.free = 100 * MIB + 6 * GIB - caches.read()["used_bytes"]
        clock.advance(0.2)
        governor.monitor.tick()
    assert governor.monitor.last_error is None
    pressed = caches.read()
    assert pressed["used_bytes"] < 6 * GIB - 300 * MIB and pressed["limit_bytes"] < 7 * GIB
    assert cache.status().returned_bytes >= 300 * MIB
    for _ in range(60):
        gpu.free = 9 * GIB
        clock.advance(1.0)
        governor.monitor.tick()
    assert caches.read()["limit_bytes"] == 8 * GIB
    cache.set_limit(2 * GIB, None)
    governor.stop()
    assert caches.read()["limit_bytes"] == 8 * GIB, "whoever governs no longer leaves no limit"


def test_a_gpu_that_is_silent_costs_nothing(caches: Caches) -> None:
    gpu, clock = Gpu(), ManualClock()
    cache = KvcachedCache(caches.control(), floor_bytes=GIB, clock=clock)
    governor = Governor(cache, VramSource(0, gpu, clock), settings=LawSettings(low_bytes=GIB, high_bytes=3 * GIB // 2))
    governor.monitor.tick()
    before = caches.read()
    gpu.fails = True
    for _ in range(5):
        clock.advance(0.2)
        governor.monitor.tick()
    assert caches.read() == before and before["used_bytes"] == 6 * GIB
    governor.stop()


def test_what_was_given_on_a_gpu_is_not_given_again_before_it_shows(caches: Caches) -> None:
    gpu, clock = Gpu(), ManualClock()
    gpu.free = 700 * MIB
    cache = KvcachedCache(caches.control(), floor_bytes=GIB, clock=clock)
    governor = Governor(cache, VramSource(0, gpu, clock), settings=LawSettings(low_bytes=GIB, high_bytes=3 * GIB // 2))
    for _ in range(5):  # the engine unmaps later: nothing more is free yet
        clock.advance(0.2)
        governor.monitor.tick()
    given = 6 * GIB - caches.read()["used_bytes"]
    assert 300 * MIB <= given < 600 * MIB
    governor.stop()


def test_an_engine_that_starts_again_has_no_cache_for_a_moment(caches: Caches) -> None:
    clock = ManualClock()
    cache = KvcachedCache(caches.control(), floor_bytes=GIB, clock=clock)
    known = caches.file.read_text()
    caches.file.write_text("{}")
    clock.advance(2.0)
    assert cache.status().used_bytes == 6 * GIB, "as of before"
    for _ in range(3):
        clock.advance(2.0)
        cache.status()
    clock.advance(2.0)
    with pytest.raises(UsageError, match="has no cache"):
        cache.status()
    caches.file.write_text(known)
    assert cache.status().used_bytes == 6 * GIB


def test_the_limit_is_told_again_to_an_engine_that_started_again(caches: Caches) -> None:
    clock = ManualClock()
    cache = KvcachedCache(caches.control(), floor_bytes=GIB, clock=clock)
    cache.set_limit(4 * GIB, None)
    caches.file.write_text("{}")
    clock.advance(2.0)
    cache.status()
    caches.write(limit_bytes=8 * GIB, used_bytes=5 * GIB)
    clock.advance(2.0)
    returned = cache.returned_bytes
    cache.status()
    cache.set_limit(4 * GIB, None)
    assert caches.read()["limit_bytes"] == 4 * GIB
    assert cache.returned_bytes == returned, "what the engine lost by itself was not given"


def test_a_limit_that_never_can_be_set_is_told_though_sizes_can_be_read(caches: Caches) -> None:
    cache = KvcachedCache(caches.control(), floor_bytes=GIB)
    caches.script.write_text(
        KVCTL.replace("elif rest[0] not in caches:", "elif True:\n    raise SystemExit(3)\nelif 0:")
    )
    cache.set_limit(4 * GIB, None)
    for _ in range(3):
        cache.give_now()
    with pytest.raises(EnvironmentProblem, match="kvctl limit failed"):
        cache.give_now()


def test_calls_that_fail_are_ridden_out_and_the_limit_is_set_at_the_end(caches: Caches) -> None:
    clock = ManualClock()
    cache = KvcachedCache(caches.control(), floor_bytes=GIB, clock=clock)
    cache.set_limit(4 * GIB, None)
    assert caches.read()["limit_bytes"] == 4 * GIB
    caches.script.write_text("raise SystemExit(3)")
    clock.advance(2.0)
    assert cache.status().used_bytes == 6 * GIB, "as of before"
    cache.set_limit(3 * GIB, None)
    with pytest.raises(EnvironmentProblem, match="kvctl limit failed"):
        cache.close()
    for _ in range(3):
        cache.set_limit(3 * GIB, None)
    with pytest.raises(EnvironmentProblem, match="kvctl limit failed"):
        cache.set_limit(3 * GIB, None)
    caches.script.write_text(KVCTL)
    cache.close()
    assert caches.read()["limit_bytes"] == 8 * GIB
