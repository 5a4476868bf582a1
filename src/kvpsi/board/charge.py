"""Takes the memory that a board's zram device needs off the board's limit.

On a real machine the compressed pages lie in the same memory as all else. The kernel counts them nowhere: without this
a board would have its memory and half as much again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_PERIOD_S = 0.02
_LEAST_CHANGE_BYTES = 256 << 10


class SwapCharge:
    """A thread that keeps the limit at ``memory_bytes`` less what the device uses.

    Args:
        memory_bytes: of the board.
        used_bytes: what the device uses now.
        set_limit: sets the board's limit in bytes. It may raise OSError while the kernel finds nothing to reclaim.
    """

    def __init__(self, memory_bytes: int, used_bytes: Callable[[], int], set_limit: Callable[[int], None]) -> None:
        self._memory_bytes = memory_bytes
        self._used_bytes = used_bytes
        self._set_limit = set_limit
        self._charged_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpsi-board-swap", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait until it has."""
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        """Set the limit if the device uses noticeably more or less than it was set for."""
        try:
            used_bytes = self._used_bytes()
            if abs(used_bytes - self._charged_bytes) >= _LEAST_CHANGE_BYTES:
                self._set_limit(self._memory_bytes - used_bytes)
                self._charged_bytes = used_bytes
        except (OSError, ValueError):
            return  # tried again in a moment

    def _run(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.look()
