"""The file behind ``--log``. A disk that fills up ends the log, not the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.instrument import Instrument, JsonLines


class EventLog(Instrument):
    """Writes events until that fails; `close` and then `raise_if_incomplete` say so when the answer is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failure: OSError | None = None
        try:
            self._stream = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"The log {path} cannot be written ({error.strerror}); name another file.") from error
        self._lines = JsonLines(self._stream)

    def event(self, name: str, value: Any) -> None:
        """Write one event; nothing more after the first that could not be written."""
        if self._failure is not None:
            return
        try:
            self._lines.event(name, value)
        except OSError as error:
            self._failure = error

    def close(self) -> None:
        """Close the file; what was left to write and cannot be is remembered as a failure."""
        try:
            self._stream.close()
        except OSError as error:
            self._failure = self._failure or error

    def raise_if_incomplete(self) -> None:
        """Raise EnvironmentProblem if an event is missing in the file."""
        if self._failure is not None:
            raise EnvironmentProblem(
                f"The log {self._path} is incomplete ({self._failure.strerror}); free space, or name another file."
            ) from self._failure
