"""One interface for watching what kvpsi senses, decides and does, and a writer of JSON lines."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
import time
from collections.abc import Iterable
from typing import Any, TextIO

log = logging.getLogger("kvpsi")


class Instrument:
    """Override what you want to see. Methods may be called from the engine's or the monitor's thread.

    An instrument must return quickly and must not raise; what it raises is ignored after it was reported once.
    """

    def event(self, name: str, value: Any) -> None:
        """Something happened: ``name`` is ``reading``, ``decision``, ``release``, ``trim``, ``rebuild``,
        ``interrupt``, ``refusal``, ``threads`` or ``distrust``; ``value`` is the immutable record of it."""


class Instruments(Instrument):
    """Passes every event to several instruments; one that fails is reported once and keeps nobody from seeing more."""

    def __init__(self, instruments: Iterable[Instrument] = ()) -> None:
        self.members = list(instruments)
        self.last_error: Exception | None = None

    def event(self, name: str, value: Any) -> None:
        """Hand on to all members."""
        for member in self.members:
            try:
                member.event(name, value)
            except Exception as error:  # an observer must not stop what it observes
                if self.last_error is None:
                    log.warning("An instrument failed, more of it is not reported: %r", error)
                self.last_error = error


def guarded(instrument: Instrument | None) -> Instruments:
    """The same instrument (None: one that sees nothing), except that what it raises is only reported."""
    if isinstance(instrument, Instruments):
        return instrument
    return Instruments([] if instrument is None else [instrument])


class JsonLines(Instrument):
    """Writes one JSON object a line: ``{"at_s": …, "event": …, …fields of the record}``.

    Calm readings are many and say little, so by default only every ``every_reading``-th is written.
    """

    def __init__(self, stream: TextIO, *, every_reading: int = 10) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._every = max(1, every_reading)
        self._readings = 0

    def event(self, name: str, value: Any) -> None:
        """Write the record as one line."""
        if name == "reading":
            self._readings += 1
            if self._readings % self._every:
                return
        fields = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {"value": value}  # type: ignore[arg-type]
        line = json.dumps(_finite({"at_s": round(time.time(), 3), "event": name, **fields}), default=str)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def _finite(value: Any) -> Any:
    """The same with null where a figure is not finite: JSON has no word for that."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
