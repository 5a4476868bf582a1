"""The process that takes the memory. It writes its progress to standard output, one JSON object a line.

Usage: python -m kvpsi.hog SETTINGS, which is a `HogSettings` as JSON. SIGTERM and Ctrl-C end it early.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from pathlib import Path

from kvpsi.hog.memory import Hoard
from kvpsi.hog.shape import HogSettings
from kvpsi.pressure.locate import locate_cgroups
from kvpsi.pressure.psi import parse_pressure

REST_S = 0.05
TOUCH_EVERY_S = 0.2
"""Between two uses of all that it has."""
_TELL_EVERY_S = 0.1


def as_json(settings: HogSettings) -> str:
    """The argument that means these settings."""
    return json.dumps(dataclasses.asdict(settings))


def _from_json(text: str) -> HogSettings:
    fields = json.loads(text)
    fields["trace"] = tuple((time_s, n_bytes) for time_s, n_bytes in fields["trace"])
    return HogSettings(**fields)


def _stalled_us() -> int | None:
    """Microseconds in which something in the process's own cgroup (or the system) waited for memory so far."""
    own = locate_cgroups(Path("/")).pressure
    try:
        return parse_pressure(
            (own.path / "memory.pressure" if own else Path("/proc/pressure/memory")).read_text()
        ).some.total_us
    except (OSError, ValueError):
        return None


def run(settings: HogSettings, ended: threading.Event) -> dict[str, object]:
    """Take, touch and give back until it is over; what happened."""
    hoard = Hoard(settings.step_bytes, settings.kind)
    started, stalled_before = time.monotonic(), _stalled_us()
    touched_at, told_at, peak_bytes, reached_at = 0.0, 0.0, 0, None
    while not ended.is_set() and (now := time.monotonic() - started) < settings.duration_s:
        moved = hoard.step_towards(settings.target_bytes(now))
        if hoard.size_bytes > peak_bytes:
            peak_bytes, reached_at = hoard.size_bytes, now
        if not moved:
            if now - touched_at >= TOUCH_EVERY_S:
                touched_at = now
                hoard.touch()
            ended.wait(REST_S)
        if now - told_at >= _TELL_EVERY_S:
            told_at = now
            print(json.dumps({"time_s": round(now, 3), "size_bytes": hoard.size_bytes}), flush=True)
    stalled_after = _stalled_us()
    known = stalled_before is not None and stalled_after is not None
    return {
        "completed": not ended.is_set(),
        "seconds": time.monotonic() - started,
        "peak_bytes": peak_bytes,
        "peak_after_s": reached_at,
        "slowest_touch_s": hoard.slowest_touch_s,
        "stall_s": (stalled_after - stalled_before) / 1e6 if known else None,  # type: ignore[operator]
    }


def main(argument: str) -> None:
    """Run, and print the report as the last line."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    print(json.dumps({"report": run(_from_json(argument), ended)}), flush=True)
