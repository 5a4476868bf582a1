"""Takes memory in blocks, touches every page of it, and gives it back."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from typing import Protocol

# Half of each page is random, so that zram makes about half of it, as of much real memory, and never shares pages.
_HALF_PAGE_BYTES = mmap.PAGESIZE // 2


class Block(Protocol):
    """Some memory that is there until it is closed."""

    def touch(self) -> None:
        """Use every page, so that it has to be in memory."""

    def close(self) -> None:
        """Give it back."""


class AnonymousBlock:
    """Private memory; touching writes to it."""

    def __init__(self, size_bytes: int) -> None:
        self._pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        noise = os.urandom(_HALF_PAGE_BYTES * 16)
        for start in range(0, size_bytes, mmap.PAGESIZE):
            at = start // mmap.PAGESIZE % 16 * _HALF_PAGE_BYTES
            self._pages[start : start + _HALF_PAGE_BYTES] = noise[at : at + _HALF_PAGE_BYTES]
        self._count = 0

    def touch(self) -> None:
        """Write a byte to every page."""
        self._count = (self._count + 1) % 256
        n_pages = len(self._pages) // mmap.PAGESIZE
        self._pages[:: mmap.PAGESIZE] = bytes([self._count]) * n_pages

    def close(self) -> None:
        """Unmap it."""
        self._pages.close()


class FileBlock:
    """A file without a name, of which every page is read; it is gone with the process, however that ends."""

    def __init__(self, size_bytes: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the block is there
        for _ in range(size_bytes // mmap.PAGESIZE):
            self._file.write(os.urandom(mmap.PAGESIZE))
        self._file.flush()
        os.fsync(self._file.fileno())  # only clean pages can be dropped
        self._pages = mmap.mmap(self._file.fileno(), size_bytes, prot=mmap.PROT_READ)

    def touch(self) -> None:
        """Read a byte of every page."""
        self._pages[:: mmap.PAGESIZE]

    def close(self) -> None:
        """Unmap and drop the file."""
        self._pages.close()
        self._file.close()


class Hoard:
    """Blocks of ``step_bytes`` each; every second one is of a file for ``both``."""

    def __init__(self, step_bytes: int, kind: str) -> None:
        self._step_bytes = -(-step_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._kind = kind
        self._blocks: list[Block] = []
        self.slowest_touch_s = 0.0

    @property
    def size_bytes(self) -> int:
        """What it has."""
        return len(self._blocks) * self._step_bytes

    def step_towards(self, target_bytes: int) -> bool:
        """Take or give back one block; whether there was need to."""
        if self.size_bytes + self._step_bytes <= target_bytes:
            from_file = self._kind == "file" or (self._kind == "both" and len(self._blocks) % 2 == 1)
            self._blocks.append(FileBlock(self._step_bytes) if from_file else AnonymousBlock(self._step_bytes))
            return True
        if self.size_bytes > target_bytes:
            self._blocks.pop().close()
            return True
        return False

    def touch(self) -> None:
        """Touch every page of every block, and remember how long the slowest block took."""
        for block in self._blocks:
            began = time.perf_counter()
            block.touch()
            self.slowest_touch_s = max(self.slowest_touch_s, time.perf_counter() - began)
