"""Traces of what a neighbour has at which time: text files with lines of ``seconds,size``."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from kvpsi.errors import UsageError
from kvpsi.pressure._text import MalformedTextError
from kvpsi.units import parse_bytes

_MOST_BYTES = 64 << 20


def read_trace(path: Path) -> tuple[tuple[float, int], ...]:
    """A trace from a text file: lines of ``seconds,size`` in order of time, such as ``1.5,300M``; # starts a comment.

    Raises:
        UsageError: the file cannot be read, or a line is not of this form; names the line.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"The trace {path} is no regular file; name a text file with lines `seconds,size`.")
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"The trace {path} is larger than {_MOST_BYTES >> 20} MiB; leave out some of its lines.")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"The trace {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The trace {path} is no text; it has lines `seconds,size`, such as 1.5,300M.") from error
    points: list[tuple[float, int]] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        time_text, _, size_text = text.partition(",")
        try:
            try:
                time_s = float(time_text)
            except ValueError:
                raise MalformedTextError(f"{time_text.strip()!r} is no number of seconds") from None
            if not 0 <= time_s < 1e6 or (points and time_s < points[-1][0]):
                raise MalformedTextError("times go up from 0, to a million at most")
            size = size_text.strip()
            points.append((time_s, 0 if size in ("0", "0M") else parse_bytes(size)))
        except (ValueError, UsageError) as error:
            raise UsageError(
                f"Line {number} of the trace {path} is not `seconds,size`, such as 1.5,300M: {error}"
            ) from error
    if not points:
        raise UsageError(f"The trace {path} has no line `seconds,size`, such as 1.5,300M.")
    return tuple(points)


class TraceWriter:
    """Writes what others have more than when it began, a line for each look, to be played again.

    Raises:
        UsageError: the file is there already, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: TextIO = path.open("x", encoding="utf-8")
        except FileExistsError as error:
            raise UsageError(f"{path} is there already; name another file for the trace.") from error
        except OSError as error:
            raise UsageError(f"The trace {path} cannot be written ({error.strerror}); name another file.") from error
        self._began: tuple[float, int] | None = None
        self._file.write("# seconds,bytes that others have more than at the beginning\n")

    def add(self, time_s: float, others_bytes: int) -> None:
        """Note what others have now."""
        if self._began is None:
            self._began = time_s, others_bytes
        began_s, least_bytes = self._began
        self._file.write(f"{time_s - began_s:.2f},{max(0, others_bytes - least_bytes)}\n")
        self._file.flush()

    def close(self) -> None:
        """End it."""
        self._file.close()
