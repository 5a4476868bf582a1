"""What a neighbour wants at which time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings
from kvpsi.hog.trace import TraceWriter, read_trace
from kvpsi.hog.worker import _from_json, as_json

MIB = 1 << 20


def targets_mib(settings: HogSettings, *times_s: float) -> list[float]:
    return [round(settings.target_bytes(t) / MIB, 3) for t in times_s]


def test_it_grows_after_the_warm_up_and_keeps_its_size() -> None:
    settings = HogSettings(200 * MIB, warmup_s=2, rate_bytes_s=100 * MIB, hold_s=3)
    assert targets_mib(settings, 0, 1.9, 2, 2.5, 3, 4, 6.9) == [0, 0, 0, 50, 100, 200, 200]
    assert settings.duration_s == 7


def test_pulse_sawtooth_and_ramp_repeat() -> None:
    fast = 10_000 * MIB
    pulse = HogSettings(100 * MIB, rate_bytes_s=fast, shape="pulse", period_s=4)
    assert targets_mib(pulse, 1, 3, 5, 7) == [100, 0, 100, 0]
    sawtooth = HogSettings(100 * MIB, rate_bytes_s=fast, shape="sawtooth", period_s=4)
    assert targets_mib(sawtooth, 0, 1, 2, 3.96, 4, 6) == [0, 25, 50, 99, 0, 50]
    ramp = HogSettings(100 * MIB, rate_bytes_s=fast, shape="ramp", period_s=4)
    assert targets_mib(ramp, 0, 1, 2, 3, 4, 5) == [0, 50, 100, 50, 0, 50]


@given(st.sampled_from(["grow", "pulse", "sawtooth", "ramp"]), st.floats(0, 100), st.floats(0.1, 10))
def test_it_never_wants_more_than_its_size_nor_grows_faster_than_its_rate(
    shape: str, time_s: float, period_s: float
) -> None:
    settings = HogSettings(100 * MIB, rate_bytes_s=30 * MIB, shape=shape, period_s=period_s)  # type: ignore[arg-type]
    now, later = settings.target_bytes(time_s), settings.target_bytes(time_s + 0.5)
    assert 0 <= now <= 100 * MIB
    assert later - now <= 15 * MIB * (2 if shape in ("sawtooth", "ramp") else 1) + 1 or later <= 15 * MIB + 1


def test_a_trace_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("# seconds,size\n0.5, 10M\n\n1,30M # a burst\n2,0\n")
    points = read_trace(file)
    settings = HogSettings(30 * MIB, shape="trace", trace=points, hold_s=1, warmup_s=1)
    assert targets_mib(settings, 1, 1.5, 1.9, 2, 2.9, 3, 9) == [0, 10, 10, 30, 30, 0, 0]
    assert settings.duration_s == 4
    assert _from_json(as_json(settings)) == settings


def test_a_trace_that_was_recorded_can_be_played(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    trace = TraceWriter(file)
    for time_s, others_mib in ((100.0, 500), (101.0, 700), (102.5, 400)):
        trace.add(time_s, others_mib * MIB)
    trace.close()
    assert read_trace(file) == ((0.0, 0), (1.0, 200 * MIB), (2.5, 0))
    with pytest.raises(UsageError, match="is there already"):
        TraceWriter(file)
    with pytest.raises(UsageError, match="cannot be written"):
        TraceWriter(tmp_path / "nowhere" / "trace.csv")


@pytest.mark.parametrize("text", ["", "1;2M", "x,1M", "1,much", "2,1M\n1,1M", "-1,1M", "nan,1M"])
def test_a_trace_that_is_none_is_refused_with_the_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"trace\.csv"):
        read_trace(file)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size_bytes": 0},
        {"step_bytes": -1},
        {"rate_bytes_s": 0.0},
        {"hold_s": -1.0},
        {"hold_s": math.inf},
        {"rate_bytes_s": math.nan},
        {"shape": "circle"},
        {"kind": "paper"},
        {"shape": "trace"},
        {"trace": ((0.0, 1),)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        HogSettings(**wrong)  # type: ignore[arg-type]
