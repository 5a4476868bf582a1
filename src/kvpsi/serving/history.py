"""The last minutes of a server: figures once a second, and what the governor did and why."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from kvpsi.governor import Decision
from kvpsi.governor.threads import ThreadDecision
from kvpsi.instrument import Instrument
from kvpsi.kv import Trim
from kvpsi.kv.tracker import Release
from kvpsi.serving.status import Status
from kvpsi.units import format_bytes

_SAMPLES = 300
_EVENTS = 50
_QUIET_S = 1.0
_SHOWN = (
    "memory_pressure",
    "cpu_pressure",
    "headroom_bytes",
    "resident_bytes",
    "limit_bytes",
    "sessions_bytes",
    "tokens_per_second",
    "running",
    "waiting",
    "concurrency_limit",
    "threads",
)


class Events(Instrument):
    """What the governor did, in sentences; many of a kind within a second are told as one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: deque[dict[str, Any]] = deque(maxlen=_EVENTS)

    def event(self, name: str, value: Any) -> None:
        """Take note of what is worth telling."""
        text = _sentence(name, value)
        if text is None:
            return
        now = time.time()
        with self._lock:
            last = self._told[-1] if self._told else None
            if last is not None and last["name"] == name and now - last["time_s"] < _QUIET_S:
                self._told[-1] = {"time_s": now, "name": name, "text": text, "times": last["times"] + 1}
            else:
                self._told.append({"time_s": now, "name": name, "text": text, "times": 1})

    def all(self) -> list[dict[str, Any]]:
        """The last of them, oldest first."""
        with self._lock:
            return list(self._told)


def _sentence(name: str, value: Any) -> str | None:
    if name == "decision" and isinstance(value, Decision):
        given = f": gives {format_bytes(value.give_bytes)}" if value.give_bytes else ""
        return f"{value.reason}{given}"
    if name == "threads" and isinstance(value, ThreadDecision):
        return f"{value.n_threads} threads compute: {value.reason}"
    if name == "trim" and isinstance(value, Trim):
        return f"forgot {value.freed_cells} tokens, {format_bytes(value.release.returned_bytes)} went back"
    if name == "release" and isinstance(value, Release) and value.returned_bytes:
        return f"returned {format_bytes(value.returned_bytes)}"
    if name == "interrupt":
        return "stopped a decode to make room"
    if name == "refusal":
        return "refused more tokens for want of room"
    if name == "distrust":
        return f"gives nothing any more: {value}"
    return None


class History:
    """Samples of a status, once a second, in a thread of its own."""

    def __init__(self, status: Callable[[], Status], *, every_s: float = 1.0) -> None:
        self._status = status
        self._every_s = every_s
        self._samples: deque[dict[str, float]] = deque(maxlen=_SAMPLES)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpsi-history", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._ended.set()
        self._thread.join()

    def series(self) -> dict[str, list[float]]:
        """Each figure over time, oldest first; ``time_s`` since 1970."""
        samples = list(self._samples)
        return {name: [s[name] for s in samples] for name in ("time_s", *_SHOWN)}

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            status = self._status()
            self._samples.append({"time_s": time.time(), **{name: float(getattr(status, name)) for name in _SHOWN}})
