"""Kernel files that are read again and again.

The only place of this package that reads files in the hot path.
"""

from __future__ import annotations

import os
from pathlib import Path

_CHUNK_BYTES = 16384


class HotFile:
    """One small text file; with ``keep_open`` its descriptor stays open and a read is one ``pread`` (2 µs).

    ``many_records`` marks files that the kernel hands out a page at a time (vmstat, mountinfo) and that
    therefore must be read until nothing comes; the others come whole in one read. Reading raises OSError,
    and the next read opens the file afresh.
    """

    __slots__ = ("_fd", "_keep_open", "_many_records", "path")

    def __init__(self, path: Path, *, keep_open: bool, many_records: bool = False) -> None:
        self.path = str(path)
        self._keep_open = keep_open
        self._many_records = many_records
        self._fd = -1

    def read(self) -> str:
        """The text; bytes that are not ASCII become replacement characters for the parser to stumble over."""
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            data = os.pread(self._fd, _CHUNK_BYTES, 0)
            if self._many_records or len(data) == _CHUNK_BYTES:
                data = self._read_rest(data)
        except OSError:
            self.close()
            raise
        if not self._keep_open:
            self.close()
        return data.decode("ascii", "replace")

    def _read_rest(self, data: bytes) -> bytes:
        while more := os.pread(self._fd, _CHUNK_BYTES, len(data)):
            data += more
        return data

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
