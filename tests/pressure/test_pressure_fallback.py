from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.pressure import Headroom, ManualClock, PressureSource, PsutilSource
from kvpsi.pressure.synthetic import SyntheticStall, synthetic_share

GIB = 1 << 30


def headroom(available_bytes: int, limit_bytes: int = 8 * GIB) -> Headroom:
    return Headroom(available_bytes, 0.0, limit_bytes, 0, 0, "system")


def test_synthetic_share_by_hand() -> None:
    comfort = 0.10 * 8 * GIB
    assert synthetic_share(headroom(int(comfort) + 1), 0.0) == 0.0
    assert synthetic_share(headroom(int(comfort / 2)), 0.0) == pytest.approx(0.25)
    assert synthetic_share(headroom(-5), 0.0) == 1.0
    assert synthetic_share(headroom(GIB, 0), 0.0) == 1.0
    assert synthetic_share(headroom(8 * GIB), 64 << 20) == pytest.approx(0.5)
    assert synthetic_share(headroom(2 * GIB, 1 << 40), 0.0) == 0.0, "comfort is at most 1 GiB"


@given(
    available=st.integers(-GIB, 8 * GIB),
    less=st.integers(0, GIB),
    swap_in=st.floats(0, 1e12),
    more=st.floats(0, 1e12),
)
def test_synthetic_share_is_monotone(available: int, less: int, swap_in: float, more: float) -> None:
    share = synthetic_share(headroom(available), swap_in)
    assert 0.0 <= share <= synthetic_share(headroom(available - less), swap_in + more) + 1e-12 <= 1.0 + 1e-12


def test_synthetic_averages_and_total() -> None:
    stall = SyntheticStall()
    for _ in range(1000):
        line = stall.measure(headroom(0), 0.0, 0.1).some
    assert line.share == 1.0
    assert line.avg10 == pytest.approx(1.0, abs=1e-3)
    assert line.avg10 > line.avg60 > line.avg300 > 0.2
    assert line.total_us == pytest.approx(100e6, rel=1e-6)


def test_psutil_source(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=8 * GIB, available=2 * GIB)
    swap = SimpleNamespace(total=GIB, used=GIB // 2, sin=0, sout=0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("psutil.swap_memory", lambda: swap)
    clock = ManualClock()
    source = PsutilSource(clock=clock, working_set_file_bytes=GIB)
    assert isinstance(source, PressureSource)
    first = source.read()
    assert (first.headroom.available_bytes, first.headroom.scope) == (GIB, "fallback")
    assert first.synthetic
    assert first.memory.scope == "fallback"
    assert "estimated" in first.problems[0]
    clock.advance(0.5)
    memory.available, swap.sin = GIB + GIB // 10, 32 << 20
    second = source.read()
    assert second.memory.some.share > 0.5
    assert second.swap.swap_in_bytes_s == pytest.approx(64 << 20)
    assert second.headroom.slope_bytes_s < 0
    source.working_set_file_bytes = 0
    assert source.working_set_file_bytes == 0
    assert source.read().headroom.slope_bytes_s == 0.0
    assert len(source.describe()) == 3
    source.close()


def test_psutil_that_fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PsutilSource(clock=ManualClock())
    before = source.read()

    def fail() -> None:
        raise OSError("gone")

    monkeypatch.setattr("psutil.virtual_memory", fail)
    monkeypatch.setattr("psutil.swap_memory", fail)
    reading = source.read()
    assert abs(reading.headroom.available_bytes - before.headroom.available_bytes) == 0
    assert len(reading.problems) >= 2


def test_psutil_without_swap_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> None:
        raise RuntimeWarning("'sin' and 'sout' could not be determined")

    monkeypatch.setattr("psutil.swap_memory", warn)
    source = PsutilSource()
    assert source.read().swap.total_bytes == 0
    assert "Swap cannot be read." in source.describe()
